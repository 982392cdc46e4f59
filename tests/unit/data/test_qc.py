"""Quality control: each rule drops what it should, cells get their class, and a file is read or made again."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer import artifacts, paths
from tuneformer.artifacts import stored_key
from tuneformer.data import counts, qc, simulate, sources
from tuneformer.study import load_study


@pytest.fixture
def settings():
    return load_study("tiny", min_counts=10, max_counts=100, max_mito_share=0.5, dose_column=None)


@pytest.fixture
def cells():
    """Return six cells, of which all but the first fail something: total count, mitochondrial share, label."""
    counts = np.array([[20, 5], [4, 5], [100, 1], [5, 20], [2, 3], [20, 20]], dtype=np.int64)
    treatment = pd.Categorical(["Dex", "Dex", "BMS", "BMS", "BMS", None])
    obs = pd.DataFrame({"treatment": treatment}, index=[f"c{number}" for number in range(6)])
    var = pd.DataFrame({"ensembl_id": ["G1", "G2"], "symbol": ["TP53", "mt-Nd1"]}, index=["G1", "G2"])
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


def test_small_classes_are_left_out_and_named(settings):
    labels = ["a"] * 5 + ["b"] * 4 + ["c"] * 3
    obs = pd.DataFrame({"treatment": labels}, index=[f"c{number}" for number in range(12)])
    cells = ad.AnnData(sparse.csr_matrix(np.ones((12, 1))), obs=obs)
    asked = settings.model_copy(update={"classes": [], "min_class_cells": 4})
    selected = qc.select_task_cells(cells, asked)
    assert list(selected.obs["label"].cat.categories) == ["a", "b"]
    assert selected.uns["recognised"] == {"classes left out": "1 of less than 4 cells: c"}
    named = qc.select_task_cells(cells, asked.model_copy(update={"classes": ["c", "a"]}))
    assert list(named.obs["label"].cat.categories) == ["c", "a"]
    assert "recognised" not in named.uns


def test_each_rule_flags_its_cells(cells, settings):
    flags = qc.qc_flags(cells, settings)
    assert flags["n_counts"].tolist() == [25, 9, 101, 25, 5, 40]
    assert flags["n_genes"].tolist() == [2] * 6
    np.testing.assert_allclose(flags["mito_share"], [0.2, 5 / 9, 1 / 101, 0.8, 0.6, 0.5])
    failed = {rule: list(flags.index[flags[rule]]) for rule in qc.RULES}
    assert failed == {
        "label": ["c5"],
        "min_counts": ["c1", "c4"],
        "max_counts": ["c2"],
        "max_mito_share": ["c1", "c3", "c4"],
    }


def test_limits_are_inclusive_and_can_be_off(cells):
    settings = load_study("tiny", dose_column=None, min_counts=9, max_counts=101, max_mito_share=0.8)
    flags = qc.qc_flags(cells, settings)
    assert list(flags.index[flags["min_counts"] | flags["max_counts"] | flags["max_mito_share"]]) == ["c4"]
    unlimited = load_study("tiny", dose_column=None, max_counts=None)
    assert not qc.qc_flags(cells, unlimited)["max_counts"].any()


def test_a_group_or_selection_that_is_missing_counts_as_no_label(cells):
    cells.obs["well"] = ["A1", None, "A1", "A2", "A2", "A3"]
    cells.obs["drug"] = ["Dex", "Dex", None, "BMS", "BMS", "BMS"]
    settings = load_study("tiny", dose_column=None, group_by="well", select_column="drug", select_values=["BMS"])
    flags = qc.qc_flags(cells, settings)
    assert list(flags.index[flags["label"]]) == ["c1", "c2", "c5"]


def test_without_mitochondrial_genes_the_share_is_missing_and_drops_nothing(cells, settings):
    cells.var["symbol"] = ["TP53", "ACTB"]
    flags = qc.qc_flags(cells, settings)
    assert flags["mito_share"].isna().all()
    assert not flags["max_mito_share"].any()


def test_an_empty_cell_fails_without_a_warning(cells, settings):
    cells.X[0] = 0
    flags = qc.qc_flags(cells, settings)
    assert flags.loc["c0", "min_counts"]
    assert np.isnan(flags.loc["c0", "mito_share"])


def test_kept_cells_carry_their_measures(cells, settings):
    kept = qc.keep_cells(cells, qc.qc_flags(cells, settings))
    assert list(kept.obs_names) == ["c0"]
    assert kept.obs["n_counts"].tolist() == [25.0]
    assert kept.obs["mito_share"].tolist() == pytest.approx([0.2])
    assert isinstance(kept.X, sparse.csr_matrix)
    assert kept.X.dtype == np.float32
    assert cells.n_obs == 6


def test_classes_keep_their_order_and_other_cells_go():
    adata = simulate.simulate_sciplex2(600, seed=0)
    adata = adata[adata.obs["treatment"].notna()].copy()
    settings = load_study("nutlin_4class")
    selected = qc.select_task_cells(adata, settings)
    assert list(selected.obs["label"].cat.categories) == ["0.25 uM", "2.5 uM", "25 uM", "125 uM"]
    assert selected.obs["label"].cat.ordered
    assert set(selected.obs["drug"]) == {"Nutlin"}
    assert set(selected.obs["dose"]) == {0.1, 1.0, 10.0, 50.0}
    expected = ((adata.obs["drug"] == "Nutlin") & adata.obs["dose"].isin([0.1, 1, 10, 50])).sum()
    assert selected.n_obs == expected > 0


def test_no_classes_means_all_sorted(cells):
    settings = load_study("tiny", classes=[])
    selected = qc.select_task_cells(cells[:5].copy(), settings)
    assert list(selected.obs["label"].cat.categories) == ["BMS", "Dex"]


def test_numbers_can_be_classes(cells):
    cells.obs["cluster"] = [0, 1, 1, 2, 0, 2]
    settings = load_study("tiny", label="cluster", classes=["2", "0"])
    assert qc.select_task_cells(cells, settings).obs["label"].tolist() == ["0", "2", "0", "2"]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = load_study("tiny")
    return settings, qc.prepare_cells(settings)


def test_prepared_cells_are_counts_with_class_split_and_provenance(prepared):
    settings, adata = prepared
    assert list(adata.obs["label"].cat.categories) == settings.classes
    assert adata.obs["n_counts"].between(settings.min_counts, settings.max_counts).all()
    np.testing.assert_array_equal(adata.obs["n_counts"], adata[:].X.sum(axis=1).A1)
    assert set(adata.obs["split"]) == {"train", "validation", "test"}
    provenance = adata.uns["provenance"]
    assert provenance["n_cells"] == adata.n_obs
    assert provenance["simulated"] is True
    assert provenance["key"] == qc.cells_key(settings)


def test_cells_that_are_there_are_read_and_not_made_again(prepared, monkeypatch):
    settings, made = prepared
    monkeypatch.setattr(artifacts, "_REMEMBERED", {})  # as in another process
    monkeypatch.setattr(sources, "load", lambda _: pytest.fail("made again"))
    monkeypatch.setattr(qc, "split_cells", lambda *_: pytest.fail("split again"))
    read = qc.prepare_cells(settings)
    assert read.obs["split"].equals(made.obs["split"])
    assert read.uns["provenance"] == made.uns["provenance"]
    assert read.obs["label"].equals(made.obs["label"])
    assert (read[:].X != made[:].X).nnz == 0


def test_cells_of_other_parameters_are_made_again_and_files_are_whole(prepared):
    settings, made = prepared
    other = qc.prepare_cells(load_study("tiny", min_counts=1000))
    assert other.n_obs < made.n_obs
    folder = paths.cells_dir(settings)
    assert len(counts.read_cells(folder / "cells.h5ad")) == other.n_obs
    assert [file.name.split("_")[0] for file in sorted(folder.iterdir())] == ["cells.h5ad", "key", "split"]
    assert stored_key(folder) == qc.cells_key(load_study("tiny", min_counts=1000))


def test_keys_of_training_do_not_touch_the_cells(prepared):
    settings, _ = prepared
    keys = {
        qc.cells_key(load_study("tiny", **change))
        for change in ({}, {"seed": 5}, {"strategy": "lora"}, {"learning_rate": 1e-2}, {"vocabulary": "fit"})
    }
    assert keys == {qc.cells_key(settings)}
    assert qc.cells_key(load_study("tiny", split_seed=1)) not in keys


def test_the_split_does_not_depend_on_the_training_seed(prepared):
    _, made = prepared
    again = qc.prepare_cells(load_study("tiny", seed=7, strategy="linear_probe"))
    assert again.obs["split"].equals(made.obs["split"])
