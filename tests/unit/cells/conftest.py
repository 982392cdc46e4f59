"""Settings of runs on made train sets, whose working files go to one folder for all tests of this area."""

import pytest

from tuneformer import paths
from tuneformer.data import qc
from tuneformer.study import load_study


@pytest.fixture(scope="package", autouse=True)
def runs_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        yield


@pytest.fixture(scope="package")
def made_settings():
    """Settings of a run on about 2,200 simulated cells, all of them used."""

    def settings(**keys):
        fixed = {"train_cells": None, "demo_cells": 2500, "arm": "full"}
        return load_study("tiny", **(fixed | keys))

    return settings


@pytest.fixture(scope="package")
def demo_cells(made_settings):
    """Simulated cells after quality control, with their split."""
    return qc.prepare_cells(made_settings())[:].to_memory()
