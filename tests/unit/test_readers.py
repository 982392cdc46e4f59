"""Readers: raw counts out of an h5ad wherever they are, gene identifiers, and the PBMC that scanpy carries."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.data import catalog, readers
from tuneformer.data.readers import CellsError
from tuneformer.study.params import load_study

COUNTS = np.array([[0, 3, 1], [2, 0, 0], [1, 1, 40]], dtype=np.float32)
IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]


@pytest.fixture
def cells():
    obs = pd.DataFrame({"type": ["a", "b", "a"]}, index=["c1", "c2", "c3"])
    var = pd.DataFrame({"ensembl_id": IDS, "symbol": ["TP53", "MT-ND1", "ACTB"]}, index=["g1", "g2", "g3"])
    return ad.AnnData(sparse.csr_matrix(COUNTS), obs=obs, var=var)


@pytest.fixture
def read(tmp_path):
    def write_and_read(adata, *, counts="X", ensembl_id=None, symbol=None):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return readers.read_h5ad_counts(tmp_path / "cells.h5ad", counts=counts, ensembl_id=ensembl_id, symbol=symbol)

    return write_and_read


@pytest.mark.parametrize("stored", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize("place", ["X", "raw", "umi"])
def test_counts_are_read_from_each_place_in_each_form(cells, read, stored, place):
    normalised = cells.copy()
    normalised.X = np.log1p(cells.X)
    if place == "X":
        normalised.X = stored(COUNTS)
    elif place == "raw":
        normalised.raw = ad.AnnData(stored(COUNTS), obs=cells.obs, var=cells.var)
    else:
        normalised.layers["umi"] = stored(COUNTS)
    adata = read(normalised, counts=place)
    assert isinstance(adata.X, sparse.csr_matrix)
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    assert list(adata.obs["type"]) == ["a", "b", "a"]
    assert list(adata.var["ensembl_id"]) == list(adata.var_names) == IDS
    assert list(adata.var["symbol"]) == ["TP53", "MT-ND1", "ACTB"]


def test_a_dense_matrix_longer_than_one_piece_is_read_whole(cells, read, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 2)
    cells.X = COUNTS
    np.testing.assert_array_equal(read(cells).X.toarray(), COUNTS)


def test_without_columns_the_index_names_the_genes(cells, read):
    cells.var = pd.DataFrame(index=IDS)
    adata = read(cells)
    assert list(adata.var["ensembl_id"]) == list(adata.var["symbol"]) == IDS


def test_named_columns_are_taken(cells, read):
    cells.var = pd.DataFrame({"gene_id": IDS, "name": ["A", "B", "C"]}, index=["g1", "g2", "g3"])
    adata = read(cells, ensembl_id="gene_id", symbol="name")
    assert list(adata.var["ensembl_id"]) == IDS
    assert list(adata.var["symbol"]) == ["A", "B", "C"]


def test_a_gene_without_identifier_goes_by_its_index_name(cells, read):
    cells.var["ensembl_id"] = [IDS[0], "", None]
    adata = read(cells)
    assert list(adata.var["ensembl_id"]) == [IDS[0], "g2", "g3"]
    assert adata.X.sum() == COUNTS.sum()


def test_versions_are_cut_off(cells, read):
    cells.var["ensembl_id"] = ["ENSG00000141510.17", "ENSMUSG00000059552.3", "ENSG00000182378.14_PAR_Y"]
    assert list(read(cells).var["ensembl_id"]) == ["ENSG00000141510", "ENSMUSG00000059552", "ENSG00000182378"]


def test_names_with_a_dot_that_are_no_ensembl_identifiers_stay(cells, read):
    cells.var["ensembl_id"] = ["AL627309.1", "AL627309.2", "RP11-206L10.2"]
    assert list(read(cells).var["ensembl_id"]) == ["AL627309.1", "AL627309.2", "RP11-206L10.2"]


def test_what_is_not_needed_is_not_read(cells, tmp_path):
    cells.layers["broken"] = cells.X.copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:
        file["layers/broken"].attrs["encoding-type"] = "from the future"
    adata = readers.read_h5ad_counts(tmp_path / "cells.h5ad", counts="X", ensembl_id=None, symbol=None)
    assert adata.shape == (3, 3)
    assert not adata.layers


def test_counts_come_back_from_log_normalised_values():
    rng = np.random.default_rng(0)
    drawn = rng.poisson(0.5, (40, 60))
    drawn[:, 0] = 1  # at least one count of 1 in each cell
    counts = sparse.csr_matrix(drawn.astype(np.float32))
    totals = 3 * counts.sum(axis=1).A1  # most genes of the cell are not in the table
    values = sparse.csr_matrix(sparse.diags_array(10_000 / totals) @ counts).log1p()
    values.data = values.data.round(3)
    recovered = readers.recover_counts(values, totals=totals)
    np.testing.assert_array_equal(recovered.toarray(), counts.toarray())


def test_counts_that_do_not_come_back_are_refused():
    values = sparse.csr_matrix(np.log1p([[4.0, 6.0], [2.0, 2.0]]))  # a smallest count of 2 makes 1.5 of a count of 3
    with pytest.raises(CellsError, match=r"not whole numbers \(off by 0\.50"):
        readers.recover_counts(values, totals=np.array([5000, 5000]))
    values = sparse.csr_matrix(np.log1p([[4.0, 8.0], [2.0, 2.0]]))
    with pytest.raises(CellsError, match="counts of 1 cells do not fit their recorded total"):
        readers.recover_counts(values, totals=np.array([1250, 5000]))
    with pytest.raises(CellsError, match="1 cells have no value"):
        readers.recover_counts(sparse.csr_matrix([[1.0, 0.0], [0.0, 0.0]]), totals=np.array([1, 1]))


def test_pbmc68k_are_700_real_cells_of_ten_types():
    adata = catalog.load_cells(load_study("pbmc68k"))
    assert adata.shape == (700, 765)
    assert (adata.X.data == adata.X.data.round()).all()
    assert adata.X.data.min() == 1
    assert adata.obs["bulk_labels"].nunique() == 10
    share = adata.X.sum(axis=1).A1 / adata.obs["n_counts_all_genes"]
    assert 0.1 < share.min() < share.max() < 0.4
    assert adata.uns["dataset"]["simulated"] is False


def test_the_source_hash_follows_the_source(cells, tmp_path):
    demo = [load_study("tiny"), load_study("tiny", demo_seed=1), load_study("tiny", min_counts=0)]
    hashes = [catalog.source_hash(settings) for settings in demo]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    own = load_study("pbmc_facs", path=str(tmp_path / "cells.h5ad"))
    before = catalog.source_hash(own)
    cells[:2].write_h5ad(tmp_path / "cells.h5ad")
    assert catalog.source_hash(own) != before


def test_a_path_is_expanded_and_relative_to_the_repository(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog.paths, "ROOT", tmp_path)
    monkeypatch.setenv("MY_CELLS", "somewhere")
    (tmp_path / "somewhere").mkdir()
    cells.write_h5ad(tmp_path / "somewhere" / "cells.h5ad")
    for path in ("somewhere/cells.h5ad", "$MY_CELLS/cells.h5ad", "${MY_CELLS}/cells.h5ad"):
        assert catalog.own_path(load_study_in(path)) == tmp_path / "somewhere" / "cells.h5ad"


def load_study_in(path):
    return load_study("pbmc68k").model_copy(update={"dataset": "own", "path": path})
