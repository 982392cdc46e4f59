"""Real cells through the own-data path: three public data sets of different make."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tuneformer import paths
from tuneformer.data import qc, sources
from tuneformer.study import load_study

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)

    def prepare_file(name, **changes):
        path = str(Path(os.environ["TUNEFORMER_DATA"]) / name)
        return qc.prepare_cells(load_study("pbmc_facs", path=path, **changes))

    return prepare_file


def test_sorted_pbmc_by_their_params_file(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = load_study("pbmc_facs")
    cells = sources.load(settings)
    assert cells.shape == (3774, 16_791)
    flags = qc.qc_flags(cells, settings)
    assert flags[list(qc.RULES)].sum().tolist() == [0, 11, 3, 0]
    assert 0.015 < flags["mito_share"].median() < 0.025
    np.testing.assert_array_equal(flags["n_counts"], cells.obs["n_counts"])
    adata = qc.prepare_cells(settings)
    assert adata.n_obs == 3760
    assert adata.obs["label"].nunique() == 10
    assert (adata.obs["label"].astype(str) == adata.obs["celltype"].astype(str)).all()
    assert adata.var["ensembl_id"].str.fullmatch(r"ENSG\d{11}").all()
    shares = pd.crosstab(adata.obs["label"], adata.obs["split"], normalize="index")
    assert (shares - pd.Series({"train": 0.8, "validation": 0.1, "test": 0.1})).abs().max().max() < 1 / 163


def test_cell_lines_with_whole_plates_held_out(prepare):
    adata = prepare("mixology_celseq2_5cl_raw.h5ad", label="cell_line_demuxlet", group_by="batch", max_counts=None)
    assert adata.n_obs == 909
    assert list(adata.obs["label"].cat.categories) == ["A549", "H1975", "H2228", "H838", "HCC827"]
    assert adata.obs.groupby("batch", observed=True)["split"].nunique().tolist() == [1, 1, 1]
    assert adata.obs["split"].nunique() == 3
    assert adata.obs["mito_share"].isna().all()  # the file has no symbols


def test_singlets_can_be_selected(prepare):
    adata = prepare(
        "mixology_celseq2_5cl_raw.h5ad",
        label="cell_line_demuxlet",
        select_column="demuxlet_cls",
        select_values=["SNG"],
        max_counts=None,
    )
    assert adata.n_obs == 571


def test_pancreas_with_whole_donors_held_out(prepare):
    adata = prepare("baron_human_subset_175.h5ad", label="Group", group_by="orig.ident")
    assert adata.n_obs == 173
    assert adata.obs.groupby("orig.ident", observed=True)["split"].nunique().max() == 1
    assert pd.crosstab(adata.obs["label"], adata.obs["split"]).to_numpy().all()
    unnamed = ~adata.var["ensembl_id"].str.fullmatch(r"ENSG\d{11}")
    assert unnamed.sum() == 467
    assert (adata.var["ensembl_id"] == adata.var["symbol"])[unnamed].all()
