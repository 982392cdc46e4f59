"""Readers: raw counts wherever they are and in whatever file, gene identifiers, and the PBMC that scanpy carries."""

import gzip
import pickle

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import counts, readers, sources
from tuneformer.data.counts import Counts
from tuneformer.study import load_study

COUNTS = np.array([[0, 3, 1], [2, 0, 0], [1, 1, 40]], dtype=np.float32)
IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
OWN = load_study("tiny", dataset="own", path="cells.h5ad")


@pytest.fixture
def cells():
    obs = pd.DataFrame({"type": ["a", "b", "a"]}, index=["c1", "c2", "c3"])
    var = pd.DataFrame({"ensembl_id": IDS, "symbol": ["TP53", "MT-ND1", "ACTB"]}, index=["g1", "g2", "g3"])
    return ad.AnnData(sparse.csr_matrix(COUNTS), obs=obs, var=var)


@pytest.fixture
def read(tmp_path):
    def write_and_read(adata, *, counts="X", ensembl_id=None, symbol=None):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        settings = load_study("tiny", counts=counts, ensembl_id=ensembl_id, symbol=symbol)
        return readers.read_h5ad(tmp_path / "cells.h5ad", settings)

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
    assert isinstance(adata.X, Counts)
    np.testing.assert_array_equal(adata.X.to_memory().toarray(), COUNTS)
    assert list(adata.obs["type"]) == ["a", "b", "a"]
    assert list(adata.var["ensembl_id"]) == list(adata.var_names) == IDS
    assert list(adata.var["symbol"]) == ["TP53", "MT-ND1", "ACTB"]


def test_a_dense_matrix_longer_than_one_piece_is_read_whole(cells, read, monkeypatch):
    monkeypatch.setattr(counts, "VALUES", 6)
    cells.X = COUNTS
    np.testing.assert_array_equal(read(cells)[:].X.toarray(), COUNTS)


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
    assert adata[:].X.sum() == COUNTS.sum()


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
    adata = readers.read_h5ad(tmp_path / "cells.h5ad", load_study("tiny"))
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
    with pytest.raises(UserError, match=r"not whole numbers \(off by 0\.50"):
        readers.recover_counts(values, totals=np.array([5000, 5000]))
    values = sparse.csr_matrix(np.log1p([[4.0, 8.0], [2.0, 2.0]]))
    with pytest.raises(UserError, match="counts of 1 cells do not fit their recorded total"):
        readers.recover_counts(values, totals=np.array([1250, 5000]))
    with pytest.raises(UserError, match="1 cells have no value"):
        readers.recover_counts(sparse.csr_matrix([[1.0, 0.0], [0.0, 0.0]]), totals=np.array([1, 1]))


def test_pbmc68k_are_700_real_cells_of_ten_types():
    adata = sources.load(load_study("tiny", dataset="pbmc68k"))
    assert adata.shape == (700, 765)
    assert (adata.X.data == adata.X.data.round()).all()
    assert adata.X.data.min() == 1
    assert adata.obs["bulk_labels"].nunique() == 10
    share = adata.X.sum(axis=1).A1 / adata.obs["n_counts_all_genes"]
    assert 0.1 < share.min() < share.max() < 0.4
    assert adata.uns["dataset"]["simulated"] is False


def test_the_source_hash_follows_the_source(cells, tmp_path):
    demo = [load_study("tiny"), load_study("tiny", demo_seed=1), load_study("tiny", min_counts=0)]
    hashes = [sources.source_key(settings) for settings in demo]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    own = load_study("tiny", dataset="own", path=str(tmp_path / "cells.h5ad"))
    before = sources.source_key(own)
    cells[:2].write_h5ad(tmp_path / "cells.h5ad")
    assert sources.source_key(own) != before


def test_a_path_is_expanded_and_relative_to_the_repository(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("MY_CELLS", "somewhere")
    (tmp_path / "somewhere").mkdir()
    cells.write_h5ad(tmp_path / "somewhere" / "cells.h5ad")
    for path in ("somewhere/cells.h5ad", "$MY_CELLS/cells.h5ad", "${MY_CELLS}/cells.h5ad"):
        settings = OWN.model_copy(update={"path": path})
        assert sources.source_path(settings) == tmp_path / "somewhere" / "cells.h5ad"


@pytest.fixture
def own(tmp_path):
    """Read a file as own cells; `files` are written beside a checkpoint that maps symbols, if there are any."""

    def read_own(path, *, names=None, **changes):
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        if names is not None:
            (checkpoint / "gene_name_id_dict_gc30M.pkl").write_bytes(pickle.dumps(names))
        fixed = {"path": str(path), "counts": "auto", "checkpoint": str(checkpoint)}
        return readers.read_own(path, OWN.model_copy(update=fixed | changes))

    return read_own


PLACES = {"counts": 'layers["counts"]', "raw": "raw", "X": "X"}


@pytest.mark.parametrize(
    "holds", [("counts", "raw", "X"), ("raw", "X"), ("X",), ("counts",), ("raw",), ("counts", "X")]
)
def test_auto_takes_the_first_place_that_holds_counts(cells, read, holds):
    values = {place: np.log1p(COUNTS) for place in PLACES} | {
        place: COUNTS + number for number, place in enumerate(PLACES) if place in holds
    }
    cells.raw = ad.AnnData(sparse.csr_matrix(values["raw"]), obs=cells.obs, var=cells.var)
    cells.X = sparse.csr_matrix(values["X"])
    cells.layers["counts"] = sparse.csr_matrix(values["counts"])
    adata = read(cells, counts="auto")
    np.testing.assert_array_equal(adata[:].X.toarray(), values[holds[0]])
    assert adata.uns["recognised"]["counts"] == {"counts": "layers['counts']"}.get(holds[0], holds[0])


@pytest.mark.parametrize("wrong", [np.log1p(COUNTS), -COUNTS, COUNTS * np.nan, np.zeros_like(COUNTS)])
def test_auto_refuses_a_file_without_counts(cells, read, wrong):
    cells.X = sparse.csr_matrix(wrong)
    with pytest.raises(UserError, match=r"^cells.h5ad has no raw counts in X: .* no whole numbers, .*give the cells"):
        read(cells, counts="auto")
    cells.layers["umi"] = sparse.csr_matrix(COUNTS)
    with pytest.raises(UserError, match=r"set counts to the layer that has them \(umi\)"):
        read(cells, counts="auto")


@pytest.mark.parametrize("column", ["gene_ids", "ensembl", "id"])
def test_ensembl_identifiers_are_found_in_any_column(cells, read, column):
    versions = [f"{name}.{number}" for number, name in enumerate(IDS, start=1)]
    cells.var = pd.DataFrame({"chromosome": ["1", "2", "3"], column: versions}, index=["TP53", "MT-ND1", "ACTB"])
    adata = read(cells)
    assert list(adata.var["ensembl_id"]) == IDS
    assert list(adata.var["symbol"]) == ["TP53", "MT-ND1", "ACTB"]
    assert adata.uns["recognised"]["gene identifiers"] == f"Ensembl identifiers in var[{column!r}]"


def test_ensembl_identifiers_in_the_index_go_before_other_columns(cells, read):
    cells.var = pd.DataFrame(
        {"mouse": [f"ENSMUSG0000000000{n}" for n in range(3)], "feature_name": list("ABC")}, index=IDS
    )
    adata = read(cells)
    assert list(adata.var["ensembl_id"]) == IDS
    assert list(adata.var["symbol"]) == ["A", "B", "C"]


def test_versions_of_one_gene_are_summed_and_counted(cells, read):
    cells.var["ensembl_id"] = [f"{IDS[0]}.1", f"{IDS[0]}.2_PAR_Y", IDS[2]]
    adata = read(cells)
    np.testing.assert_array_equal(adata[:].X.toarray(), np.column_stack([COUNTS[:, :2].sum(axis=1), COUNTS[:, 2]]))
    assert list(adata.var["ensembl_id"]) == [IDS[0], IDS[2]]
    assert adata.uns["recognised"]["genes summed"] == "1, which have the identifier of another one"


def test_symbols_are_mapped_by_the_dictionary_of_the_checkpoint(cells, own, tmp_path):
    cells.var = pd.DataFrame(index=["TP53", "c1orf5", "LOST"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    adata = own(tmp_path / "cells.h5ad", names={"TP53": IDS[0], "C1orf5": IDS[1], "ACTB": IDS[2]})
    assert list(adata.var["ensembl_id"]) == [IDS[0], IDS[1], "LOST"]
    assert list(adata.var["symbol"]) == ["TP53", "c1orf5", "LOST"]
    np.testing.assert_array_equal(adata[:].X.toarray(), COUNTS)
    assert adata.uns["recognised"]["gene identifiers"] == "gene symbols in the index of var"
    assert adata.uns["recognised"]["symbols mapped"] == "2 of 3 to Ensembl identifiers"


def test_symbols_of_one_gene_are_summed(cells, own, tmp_path):
    cells.var = pd.DataFrame(index=["TP53", "P53", "ACTB"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    adata = own(tmp_path / "cells.h5ad", names={"TP53": IDS[0], "P53": IDS[0], "ACTB": IDS[2]})
    np.testing.assert_array_equal(adata[:].X.toarray(), np.column_stack([COUNTS[:, :2].sum(axis=1), COUNTS[:, 2]]))
    assert adata.uns["recognised"]["genes summed"].startswith("1, which")


def test_without_a_dictionary_symbols_are_the_identifiers(cells, own, tmp_path):
    cells.var = pd.DataFrame(index=["TP53", "MT-ND1", "ACTB"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert list(own(tmp_path / "cells.h5ad").var["ensembl_id"]) == ["TP53", "MT-ND1", "ACTB"]


def test_ensembl_identifiers_are_not_looked_up(cells, own, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    adata = own(tmp_path / "cells.h5ad", names={"TP53": "ENSG00000000009"})
    assert list(adata.var["ensembl_id"]) == IDS


def test_symbols_are_looked_up_as_they_are_and_in_capitals(tmp_path):
    (tmp_path / "names.pkl").write_bytes(pickle.dumps({"A1BG": IDS[0], "C2orf1": IDS[1]}))
    ids, n_mapped = readers.to_ensembl(["A1BG", "C2ORF1", "a1bg", IDS[2], "?"], tmp_path / "names.pkl")
    assert list(ids) == [IDS[0], IDS[1], IDS[0], IDS[2], "?"]
    assert n_mapped == 3


@pytest.mark.parametrize(
    ("ids", "symbols", "species"),
    [
        (["ENSMUSG00000000001", "ENSMUSG00000000002.3"], ["A", "B"], ("mouse", "ENSMUSG00000000001")),
        (["ENSRNOG00000000001", "ENSRNOG00000000002"], ["A", "B"], ("another species", "ENSRNOG00000000001")),
        (["Gapdh", "mt-Nd1", "Actb"], ["Gapdh", "mt-Nd1", "Actb"], ("mouse or rat", "Gapdh")),
        (["ENSG00000000001", "ENSMUSG00000000002"], ["A", "B"], None),
        (IDS, ["Gapdh", "mt-Nd1", "Actb"], None),
        (["GAPDH", "C1orf5", "HLA-A"], ["GAPDH", "C1orf5", "HLA-A"], None),
        (["SIMG00000000001", "SIMG00000000002"], ["SIM1", "MT-SIM2"], None),
        ([], [], None),
    ],
)
def test_the_species_is_recognised(ids, symbols, species):
    assert readers.foreign_species(ids, symbols) == species


def write_10x_folder(folder, *, features="features.tsv", zipped=True, types=("Gene Expression",) * 3):
    """Write what Cell Ranger writes: genes x cells, 1-based; before version 3 `genes.tsv`, plain and without types."""
    folder.mkdir()
    columns = (
        [IDS, ["TP53", "MT-ND1", "ACTB"], types] if features == "features.tsv" else [IDS, ["TP53", "MT-ND1", "ACTB"]]
    )
    table = "".join("\t".join(line) + "\n" for line in zip(*columns, strict=True))
    io.mmwrite(folder / "m.mtx", sparse.coo_matrix(COUNTS.T.astype(int)))
    texts = {features: table, "barcodes.tsv": "AA-1\nCC-1\nGG-1\n", "matrix.mtx": (folder / "m.mtx").read_text()}
    (folder / "m.mtx").unlink()
    for name, text in texts.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def write_10x_h5(path):
    """Write the layout of Cell Ranger 3: a CSC of features x barcodes in the group matrix."""
    stored = sparse.csc_matrix(COUNTS.T.astype(np.int32))
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        for name, values in {"data": stored.data, "indices": stored.indices, "indptr": stored.indptr}.items():
            matrix[name] = values
        matrix["shape"] = np.array(stored.shape)
        matrix["barcodes"] = np.array([b"AA-1", b"CC-1", b"GG-1"])
        features = matrix.create_group("features")
        features["id"] = np.array([name.encode() for name in IDS])
        features["name"] = np.array([b"TP53", b"TP53", b"ACTB"])  # symbols need not be unique
        features["feature_type"] = np.array([b"Gene Expression"] * 2 + [b"Antibody Capture"])
        features["genome"] = np.array([b"GRCh38"] * 3)
    return path


@pytest.mark.parametrize(
    ("features", "zipped"), [("features.tsv", True), ("features.tsv", False), ("genes.tsv", False)]
)
def test_a_10x_folder_is_recognised(own, tmp_path, features, zipped):
    adata = own(write_10x_folder(tmp_path / "filtered", features=features, zipped=zipped))
    np.testing.assert_array_equal(adata[:].X.toarray(), COUNTS)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert list(adata.obs_names) == ["AA-1", "CC-1", "GG-1"]
    assert list(adata.var["ensembl_id"]) == IDS
    assert list(adata.var["symbol"]) == ["TP53", "MT-ND1", "ACTB"]
    assert adata.uns["recognised"]["file"] == "10x folder"


def test_a_10x_h5_is_recognised_and_only_its_genes_are_taken(own, tmp_path):
    adata = own(write_10x_h5(tmp_path / "filtered.h5"))
    np.testing.assert_array_equal(adata[:].X.toarray(), COUNTS[:, :2])
    assert list(adata.var["ensembl_id"]) == IDS[:2]
    assert list(adata.var["symbol"]) == ["TP53", "TP53"]
    assert list(adata.obs_names) == ["AA-1", "CC-1", "GG-1"]
    assert adata.uns["recognised"] == {
        "file": "10x h5",
        "counts": "its matrix",
        "gene identifiers": "Ensembl identifiers in the index of features",
    }


def test_faulty_10x_data_are_refused(own, tmp_path):
    folder = write_10x_folder(tmp_path / "filtered", types=("Peaks",) * 3)
    with pytest.raises(UserError, match="has no features of the type Gene Expression"):
        own(folder)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"AA-1\n"))
    with pytest.raises(UserError, match="the matrix has 3 features and 3 barcodes, but the tables list 3 and 1"):
        own(folder)
    (folder / "matrix.mtx.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="could not be read as 10x data"):
        own(folder)
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(UserError, match=r"has no features.tsv or genes.tsv \(or .gz\); set path to"):
        own(folder)
    with pytest.raises(UserError, match="has no counts in 'raw', but one matrix"):
        own(folder, counts="raw")


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.tsv.gz"])
def test_labels_of_a_10x_file_come_from_a_table(own, tmp_path, name):
    table = pd.DataFrame({"celltype": ["T", "B", "T"]}, index=pd.Index(["GG-1", "AA-1", "TT-1"], name="barcode"))
    table.to_csv(tmp_path / name, sep="\t" if "tsv" in name else ",")
    adata = own(write_10x_folder(tmp_path / "filtered"), obs_table=str(tmp_path / name))
    assert adata.obs["celltype"].fillna("none").to_dict() == {"AA-1": "B", "CC-1": "none", "GG-1": "T"}
    assert adata.uns["recognised"]["cell table"] == f"2 cells are in {name}"


def test_names_of_cells_may_be_numbers(tmp_path):
    (tmp_path / "labels.csv").write_text("cell,celltype\n007,T\n010,B\n")
    cells = ad.AnnData(np.ones((2, 1)), obs=pd.DataFrame(index=["010", "007"]), uns={"recognised": {}})
    assert readers._with_table(cells, str(tmp_path / "labels.csv")).obs["celltype"].tolist() == ["B", "T"]


def test_a_table_that_does_not_fit_is_refused(own, tmp_path):
    folder, path = write_10x_folder(tmp_path / "filtered"), tmp_path / "labels.csv"
    path.write_text("barcode,celltype\nAA,B\n")
    with pytest.raises(
        UserError, match=r"names cells like 'AA', those of the data like 'AA-1'; make the names the same"
    ):
        own(folder, obs_table=str(path))
    path.write_text("barcode,celltype\nAA-1,B\nAA-1,T\n")
    with pytest.raises(UserError, match="names the cell 'AA-1' more than once"):
        own(folder, obs_table=str(path))
    path.write_text("")
    with pytest.raises(UserError, match="could not be read as a table"):
        own(folder, obs_table=str(path))
    with pytest.raises(UserError, match=r"obs_table: .*nowhere.csv does not exist"):
        own(folder, obs_table=str(tmp_path / "nowhere.csv"))


def test_the_hash_of_own_cells_follows_every_file(own, tmp_path):
    folder, table = write_10x_folder(tmp_path / "filtered", zipped=False), tmp_path / "labels.csv"
    own(folder)
    settings = OWN.model_copy(update={"path": str(folder), "checkpoint": str(tmp_path / "checkpoint")})
    with_table = settings.model_copy(update={"obs_table": str(table)})
    table.write_text("barcode,celltype\nAA-1,B\n")
    hashes = [sources.source_key(settings), sources.source_key(with_table)]
    table.write_text("barcode,celltype\nAA-1,T\n")
    hashes.append(sources.source_key(with_table))
    (folder / "barcodes.tsv").write_text("AA-1\nCC-1\nTT-1\n")
    hashes.append(sources.source_key(settings))
    own(folder, names={"TP53": IDS[0]})
    hashes.append(sources.source_key(settings))
    assert len(set(hashes)) == 5


def test_a_tokenized_data_set_has_labels_but_no_counts(own, tmp_path):
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "disease": datasets.ClassLabel(names=["nf", "dcm"]),
            "individual": datasets.Value("string"),
        }
    )
    rows = {"input_ids": [[2, 3], [4]], "disease": [1, 0], "individual": ["p1", "p2"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "heart.dataset")
    adata = own(tmp_path / "heart.dataset")
    assert adata.shape == (2, 0)
    assert adata.obs.to_dict("list") == {"disease": ["dcm", "nf"], "individual": ["p1", "p2"], "length": [2, 1]}
    assert list(adata.obs_names) == ["row0", "row1"]
    datasets.Dataset.from_dict({"disease": [1]}).save_to_disk(tmp_path / "no.dataset")
    with pytest.raises(UserError, match="it needs one table with a column input_ids"):
        own(tmp_path / "no.dataset")
