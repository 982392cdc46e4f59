"""Quality-controlled demo cells, made once, and settings of runs on them in a folder of their own."""

import pytest

from tuneformer.data import preprocessing
from tuneformer.study import paths
from tuneformer.study.params import load_study


@pytest.fixture(scope="session")
def demo_cells(tmp_path_factory):
    """Simulated cells after quality control, with split: about 2,200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        return preprocessing.prepare_cells(load_study("tiny", demo_cells=2500))


@pytest.fixture
def made_settings(tmp_path, monkeypatch):
    """Settings of a run on a made train set; working files go to a folder of the test."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def settings(train_set, **changes):
        fixed = {"train_cells": None, "demo_cells": 2500, "padded_classes": ["BMS", "Untreated"]}
        return load_study("tiny", train_set=train_set, **(fixed | changes))

    return settings
