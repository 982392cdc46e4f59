"""Counts on disk: the same as in memory whatever the layout, a few cells at a time, or one sentence."""

import tempfile

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.cells import pseudobulk, synthetic
from tuneformer.data import counts, qc
from tuneformer.data.counts import Counts
from tuneformer.study import load_study
from tuneformer.tokens.vocabulary import nonzero_medians

LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
OWN = {"dataset": "own", "label": "celltype", "classes": [], "dose_column": None, "min_counts": 0, "max_counts": None}


def values_of(n_cells=60, n_genes=20, seed=0):
    return np.random.default_rng(seed).poisson(1.5, (n_cells, n_genes)).astype(np.float32)


def cells_of(values, layout="csr"):
    obs = pd.DataFrame({"celltype": pd.Categorical(np.tile(["T", "B"], len(values))[: len(values)])})
    obs.index = [f"cell{number}" for number in range(len(values))]
    names = [f"ENSG{number:011d}" for number in range(values.shape[1])]
    return ad.AnnData(LAYOUTS[layout](values), obs=obs, var=pd.DataFrame({"ensembl_id": names}, index=names))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        cells_of(values_of(), layout).write_h5ad(folder / f"{layout}.h5ad", compression="gzip")
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(counts, "CELLS", 7)
    monkeypatch.setattr(counts, "VALUES", 130)
    monkeypatch.setattr(counts, "BAND", 11)


@given(
    st.lists(st.integers(0, 59), max_size=80), st.integers(1, 60), st.integers(0, 8), st.sampled_from(["csr", "dense"])
)
@settings(max_examples=100, deadline=None)
def test_any_rows_are_those_of_the_matrix(files, rows, size, apart, layout):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CELLS": size, "VALUES": 20 * size, "APART": apart}.items():
            patch.setattr(counts, name, value)
        stored, places = Counts(files / f"{layout}.h5ad"), np.array(rows, dtype=int)
        np.testing.assert_array_equal(stored[places].toarray(), values_of()[places])
        np.testing.assert_array_equal(stored.taken(places)[:].toarray(), values_of()[places])
        cells = ad.AnnData(stored)
        np.testing.assert_array_equal(cells[places, [3, 1]].X.toarray(), values_of()[places][:, [3, 1]])


def test_sums_of_genes_follow_each_other_and_leave_genes_out(files):
    first = np.repeat([0, 1, 2, -1], 5)
    both = Counts(files / "csr.h5ad").summed(first, 3).summed(np.array([0, -1, 0]), 1).astype(np.float64)
    expected = values_of()[:, (first == 0) | (first == 2)].sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(both[:].toarray(), expected)
    assert (both.shape, both[:].dtype) == ((60, 1), np.float64)
    again = Counts(files / "csr.h5ad").with_notes(both.taken([4, 2]).notes())
    np.testing.assert_array_equal(again[:].toarray(), expected[[4, 2]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backed", [None, "r"])
def test_chunks_of_any_layout_and_of_views_are_those_of_the_matrix(
    files, layout, backed, small_chunks, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = ad.read_h5ad(files / f"{layout}.h5ad", backed=backed)
    order = np.random.default_rng(1).permutation(60)[:31]
    for chosen, expected in {
        "all": (cells, values_of()),
        "rows": (cells[order], values_of()[order]),
        "rows and genes": (cells[order, [9, 2, 4]], values_of()[order][:, [9, 2, 4]]),
    }.values():
        parts = list(counts.chunks(chosen))
        assert all(part.stop - part.start <= 7 for part, _ in parts)
        np.testing.assert_array_equal(sparse.vstack([one for _, one in parts]).toarray(), expected)
    assert not list(tmp_path.iterdir())  # a matrix by columns was written by rows there


@given(seed=st.integers(0, 99), band=st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_entries_in_any_order_are_sorted_by_row_and_summed(seed, band):
    rng = np.random.default_rng(seed)
    rows, columns, data = rng.integers(0, 23, 300), rng.integers(0, 9, 300), rng.integers(1, 9, 300).astype(np.float32)
    parts = zip(*(np.split(one, [50, 50, 170]) for one in (rows, columns, data)), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "BAND", band)
        firsts, pieces = zip(*counts.by_row(parts, (23, 9), n_cells=60, dtype=np.float64), strict=True)
    assert list(firsts) == list(np.cumsum([0, *(piece.shape[0] for piece in pieces[:-1])]))
    expected = sparse.coo_matrix((data, (rows, columns)), (23, 9)).toarray()
    np.testing.assert_array_equal(sparse.vstack(pieces).toarray(), expected)


def test_equal_lists_have_equal_numbers_and_short_ones_none():
    values = np.tile(values_of(3, 40), (2, 1))
    values[5, :30] = 0
    numbers = counts.hashes(sparse.csr_matrix(values))
    assert (numbers[:2] == numbers[3:5]).all()
    assert (len(set(numbers)), numbers[5]) == (4, 0)


# --- one sentence


def test_a_file_that_goes_or_changes(files, tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_bytes((files / "csr.h5ad").read_bytes())
    stored = Counts(path)
    cells_of(values_of(61)).write_h5ad(path)
    with pytest.raises(
        UserError, match=r"cells\.h5ad has changed since its cells were read; put it back as it was, or"
    ):
        stored[3]
    path.unlink()
    with pytest.raises(UserError, match=r"cells\.h5ad is gone; put it back"):
        stored[3]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def settings(cells, **changes):
        cells.write_h5ad(tmp_path / "cells.h5ad")
        return load_study("tiny", **OWN | {"path": str(tmp_path / "cells.h5ad")} | changes)

    return settings


@pytest.mark.parametrize(
    ("name", "place", "value", "reason"),
    [
        ("indices", 5, 20, "indices must be < 20"),
        ("indices", 5, -1, "indices must be >= 0"),
        ("indptr", 3, 0, "indptr falls"),
    ],
)
def test_a_damaged_matrix(own, tmp_path, name, place, value, reason):
    settings = own(cells_of(values_of()))
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file[f"X/{name}"][place] = value
    with pytest.raises(
        UserError, match=rf"cells\.h5ad: X could not be read as counts \(.*{reason}.*\); write it again"
    ):
        qc.prepare_cells(settings)


# --- what is made of counts on disk


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_cells_are_rows_of_the_source_and_no_copy(own, layout, small_chunks):
    values = values_of()
    values[::7] = 0
    settings = own(cells_of(values, layout), min_counts=20)
    cells = qc.prepare_cells(settings)
    kept = values.sum(axis=1) >= 20
    assert 0 < kept.sum() < 60
    np.testing.assert_array_equal(cells[:].X.toarray(), values[kept])
    with h5py.File(paths.cells_dir(settings) / qc.FILE) as file:
        assert "X" not in file
    by_rows = paths.task_dir(settings) / "by_rows"
    assert by_rows.exists() == (layout == "csc")
    if layout == "csc":  # it is made again when it is gone
        (by_rows / "key").unlink()
        qc.remembered("cells", "another", lambda: None)
        np.testing.assert_array_equal(qc.prepare_cells(settings)[:].X.toarray(), values[kept])


def test_nothing_reads_all_counts_at_once(own, monkeypatch, small_chunks):
    """Not quality control, medians, pseudo-bulk, bulk points, or the copy of a prepared AnnData."""
    settings = own(cells_of(values_of(200)))
    most, getitem = 7 * 20, h5py.Dataset.__getitem__

    def watched(stored, place, *rest, **keywords):
        value = getitem(stored, place, *rest, **keywords)
        assert not stored.name.startswith("/X/d") or value.size <= most
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    cells = qc.prepare_cells(settings).copy()
    assert isinstance(cells.X, Counts)
    stratum = pseudobulk.strata(cells, None)
    groups = pseudobulk.group_cells(stratum, k=10, spread=0.25, rng=np.random.default_rng(0))
    points = pseudobulk.aggregate(cells, groups, how="sum", k=10, strata=stratum, name="p")
    assert points.X.sum() == cells.obs["n_counts"].sum() == pytest.approx(values_of(200).sum())
    lazy, whole = nonzero_medians(cells), nonzero_medians(cells_of(values_of(200)))
    pd.testing.assert_series_equal(lazy, whole)
    means = synthetic.bulk_points(cells, stratum)
    expected = pd.DataFrame(values_of(200)).groupby(stratum.to_numpy(), observed=True).mean()
    np.testing.assert_allclose(means.X.toarray(), expected.to_numpy())


@pytest.mark.parametrize("stage", ["sum", "mean", "one", "thin", "nb_copula", "gaussian"])
def test_made_cells_are_the_same_in_memory_and_on_disk(stage, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(synthetic, "ENTRIES", 130)
    cells = cells_of(values_of())
    cells.obs["label"], cells.obs["n_counts"] = cells.obs["celltype"], values_of().sum(axis=1)
    stratum = pseudobulk.strata(cells, None)

    def make(folder):
        rng = np.random.default_rng(5)
        groups = pseudobulk.group_cells(stratum, k=4, spread=0.25, rng=rng)
        options = {"strata": stratum, "name": "made", "folder": folder}
        if stage in ("sum", "mean"):
            return pseudobulk.aggregate(cells, groups, how=stage, k=4, **options)
        if stage == "one":
            return pseudobulk.one_per_group(cells, groups, rng=rng, **options)
        if stage == "thin":
            points = pseudobulk.aggregate(cells, groups, how="sum", k=4, **options)
            return pseudobulk.thin(points, np.full(points.n_obs, 20.0), rng=rng, folder=folder)
        given = {"numbers": stratum.value_counts(sort=False), "reference": None, "rank": 3}
        return synthetic.generate(cells, generator=stage, rng=rng, **given, **options)

    in_memory, on_disk = make(None), make(tmp_path)
    assert isinstance(on_disk.X, Counts)
    assert on_disk.X.dtype == in_memory.X.dtype
    np.testing.assert_array_equal(on_disk[:].X.toarray(), in_memory.X.toarray())
    pd.testing.assert_frame_equal(on_disk.obs, in_memory.obs)


def test_measures_are_those_of_scanpy(own, small_chunks):
    import scanpy as sc

    values = values_of() * np.float32(1.37)  # full-length protocols have fractions
    cells = cells_of(values)
    cells.var["symbol"] = [f"MT-{number}" if number % 3 == 0 else f"G{number}" for number in range(20)]
    flags = qc.qc_flags(cells, own(cells.copy(), fractional_counts=True))
    cells.var["mito"] = cells.var["symbol"].str.startswith("MT-")
    expected, _ = sc.pp.calculate_qc_metrics(cells, qc_vars=["mito"], percent_top=None, log1p=False)
    np.testing.assert_array_equal(flags["n_counts"], expected["total_counts"])
    np.testing.assert_array_equal(flags["n_genes"], expected["n_genes_by_counts"])
    np.testing.assert_array_equal(flags["mito_share"], expected["pct_counts_mito"] / 100)
