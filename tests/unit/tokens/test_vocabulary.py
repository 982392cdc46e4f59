"""Vocabulary: reading (with a pickle that may be hostile), writing, fitting medians."""

import os
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.tokens.vocabulary import SPECIALS_V1, Vocabulary, nonzero_medians, read_dictionary

SPECIALS_V2 = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}


def make_vocabulary(genes, *, specials=SPECIALS_V1, aliases=None):
    """Give the genes (id: median) the tokens after the special ones."""
    table = pd.DataFrame({"ensembl_id": list(genes), "median": np.array(list(genes.values()), float)})
    table["token_id"] = np.arange(len(table), dtype=np.int32) + len(specials)
    return Vocabulary(genes=table, specials=specials, aliases=aliases or {})


def make_cells(counts, genes, **obs):
    return ad.AnnData(
        sparse.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame(obs, index=[f"cell{number}" for number in range(len(counts))]),
        var=pd.DataFrame({"ensembl_id": genes}, index=[f"row{number}" for number in range(len(genes))]),
    )


def pickle_to(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture
def official_folder(tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG2": np.int16(5), "ENSG1": np.int16(4)}
    pickle_to(tmp_path / "token_dictionary_gc.pkl", tokens)
    pickle_to(tmp_path / "gene_median_dictionary_gc.pkl", {"ENSG1": np.float64(2.5), "ENSG2": 1.5, "ENSG9": 3.0})
    pickle_to(tmp_path / "ensembl_mapping_dict_gc.pkl", {"ENSG1": "ENSG1", "OLD1": "ENSG1", "OLD9": "ENSG9"})
    return tmp_path


def test_official_pickles_are_read(official_folder):
    vocabulary = Vocabulary.read(official_folder)
    assert vocabulary.specials == SPECIALS_V2
    assert vocabulary.genes.to_dict("list") == {
        "ensembl_id": ["ENSG1", "ENSG2"],
        "token_id": [4, 5],
        "median": [2.5, 1.5],
    }
    assert vocabulary.aliases == {"OLD1": "ENSG1"}
    assert (vocabulary.begins_with, vocabulary.ends_with) == ((2,), (3,))
    assert vocabulary.size == 6


def test_what_is_written_is_read_back(official_folder, tmp_path):
    official = Vocabulary.read(official_folder)
    official.write(tmp_path / "other")
    again = Vocabulary.read(tmp_path / "other")
    pd.testing.assert_frame_equal(again.genes, official.genes)
    assert (again.specials, again.aliases, again.hash) == (official.specials, official.aliases, official.hash)


def test_every_part_changes_the_hash():
    base = {"A": 1.0, "B": 2.0}
    variants = [
        make_vocabulary(base),
        make_vocabulary({"A": 1.0, "B": np.nextafter(2.0, 3.0)}),
        make_vocabulary({"B": 2.0, "A": 1.0}),
        make_vocabulary({"A": 1.0, "C": 2.0}),
        make_vocabulary(base, specials=SPECIALS_V2),
        make_vocabulary(base, specials={"<mask>": 0, "<pad>": 1}),
        make_vocabulary(base, aliases={"X": "A"}),
        make_vocabulary(base, aliases={"X": "B"}),
    ]
    assert len({vocabulary.hash for vocabulary in variants}) == len(variants)
    assert make_vocabulary(base).hash == variants[0].hash


class Evil:
    """Makes a file when it is unpickled by `pickle.load`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, protocol):
    file, trace = tmp_path / "token_dictionary.pkl", tmp_path / "trace"
    pickle_to(file, {"ENSG1": Evil(trace)}, protocol)
    with pytest.raises(UserError, match=r"token_dictionary\.pkl was not read .*mkdir, and only text and numbers"):
        read_dictionary(file)
    assert not trace.exists()
    with file.open("rb") as handle:
        pickle.load(handle)  # which shows that the check above can fail
    assert trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "os.system", "numpy.load", "numpy.ndarray"])
def test_no_other_constructor_is_found(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    file = tmp_path / "evil.pkl"
    file.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match=f"it asks for {name}, and only"):
        read_dictionary(file)


@pytest.mark.parametrize(
    "content", [["ENSG1"], {"ENSG1": [1]}, {1: "ENSG1"}, {"ENSG1": None}, {"ENSG1": {"a": 1}}, "ENSG1"]
)
def test_a_pickle_of_another_shape_is_refused(tmp_path, content):
    pickle_to(tmp_path / "medians.pkl", content)
    with pytest.raises(UserError, match=r"medians\.pkl is not a dictionary of gene to text or number"):
        read_dictionary(tmp_path / "medians.pkl")


def test_a_numpy_object_scalar_is_refused(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRS'x'\ntR.")
    with pytest.raises(UserError, match="object dtype"):
        read_dictionary(tmp_path / "evil.pkl")


@pytest.mark.parametrize("content", [b"", b"no pickle at all", pickle.dumps({"ENSG1": 2.0})[:-4]])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    (tmp_path / "medians.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"medians\.pkl was not read as a pickle of text and numbers"):
        read_dictionary(tmp_path / "medians.pkl")


def test_what_is_missing_is_named(official_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: no folder; set checkpoint to"):
        Vocabulary.read(tmp_path / "nowhere")
    pickle_to(official_folder / "token_dictionary_other.pkl", {})
    with pytest.raises(UserError, match=r"2 files token_dictionary\*\.pkl, where one is needed"):
        Vocabulary.read(official_folder)
    (official_folder / "token_dictionary_other.pkl").unlink()
    (official_folder / "gene_median_dictionary_gc.pkl").unlink()
    with pytest.raises(UserError, match=r"0 files gene_median_dictionary\*\.pkl"):
        Vocabulary.read(official_folder)


@pytest.mark.parametrize("content", [b"no parquet", None])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content):
    if content is None:
        pd.DataFrame({"gene": ["A"]}).to_parquet(tmp_path / "vocabulary.parquet")
    else:
        (tmp_path / "vocabulary.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"vocabulary\.parquet is not a vocabulary of tuneformer"):
        Vocabulary.read(tmp_path)


def test_dictionaries_that_do_not_fit_are_refused(official_folder):
    pickle_to(official_folder / "gene_median_dictionary_gc.pkl", {"ENSG1": 2.5})
    with pytest.raises(UserError, match=r"median of 1 genes .*ENSG2, nan"):
        Vocabulary.read(official_folder)
    pickle_to(official_folder / "gene_median_dictionary_gc.pkl", {"ENSG1": 2.5, "ENSG2": 0.0})
    with pytest.raises(UserError, match=r"ENSG2, 0\.0"):
        Vocabulary.read(official_folder)
    pickle_to(official_folder / "token_dictionary_gc.pkl", {"<pad>": 0, "<mask>": 1, "ENSG1": 1})
    with pytest.raises(UserError, match="token 1 twice"):
        Vocabulary.read(official_folder)
    pickle_to(official_folder / "token_dictionary_gc.pkl", {"<pad>": 0, "ENSG1": 1})
    with pytest.raises(UserError, match="no <mask> token"):
        Vocabulary.read(official_folder)


def test_a_gene_occurs_once():
    genes = pd.DataFrame({"ensembl_id": ["A", "A"], "token_id": [2, 3], "median": [1.0, 1.0]})
    with pytest.raises(UserError, match="gene A twice"):
        Vocabulary(genes=genes, specials=SPECIALS_V1, aliases={})


def test_v2_resolves_names_and_v1_takes_them_as_they_are():
    genes, aliases = {"ENSG1": 1.0, "ENSG2": 1.0}, {"OLD1": "ENSG1", "ENSG2": "ENSG1"}
    names = pd.Index(["ensg1", "old1", "ENSG2", "C1orf1"])
    v2 = make_vocabulary(genes, specials=SPECIALS_V2, aliases=aliases)
    assert list(v2.resolve(names)) == ["ENSG1", "ENSG1", "ENSG1", "C1orf1"]
    assert list(make_vocabulary(genes).resolve(names)) == list(names)


def test_medians_match_a_dense_reference():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (60, 30)) * (rng.uniform(size=30) < 0.8)
    counts[:, 0] += 1
    cells = make_cells(counts, [f"G{number}" for number in range(30)])
    scaled = counts / counts.sum(axis=1, keepdims=True) * 10_000
    expected = {f"G{gene}": np.median(column[column > 0]) for gene, column in enumerate(scaled.T) if column.any()}
    medians = nonzero_medians(cells)
    assert list(medians.index) == list(expected)
    np.testing.assert_allclose(medians, list(expected.values()), rtol=1e-12)
    assert 0 < len(expected) < 30
    cells.obs["n_counts"] = 2 * counts.sum(axis=1)  # as if half of the counts were of genes left out
    np.testing.assert_allclose(nonzero_medians(cells), medians / 2, rtol=1e-12)


def test_medians_of_genes_with_one_name_are_of_their_sum():
    cells = make_cells([[1, 3, 4], [0, 0, 8]], ["A", "A", "B"])
    assert nonzero_medians(cells).to_dict() == {"A": 5_000, "B": 7_500}


def test_stored_zeros_are_no_counts():
    cells = make_cells([[1, 3], [2, 2]], ["A", "B"])
    cells.X.data[0] = 0
    assert nonzero_medians(cells).to_dict() == {"A": 5_000, "B": 7_500}


def test_medians_refuse_what_is_no_raw_count():
    with pytest.raises(UserError, match="1 of 2 cells have no count"):
        nonzero_medians(make_cells([[1, 2], [0, 0]], ["A", "B"]))
    for bad in (-1, np.nan, np.inf):
        with pytest.raises(UserError, match="X has negative or missing values"):
            nonzero_medians(make_cells([[1, bad]], ["A", "B"]))
    with pytest.raises(UserError, match=r'no var\["ensembl_id"\] \(columns: symbol\)'):
        nonzero_medians(ad.AnnData(np.ones((1, 1)), var=pd.DataFrame({"symbol": ["A"]}, index=["0"])))


def test_fitting_keeps_known_tokens_and_appends_unknown_genes():
    base = make_vocabulary({"A": 1.0, "B": 2.0, "C": 3.0}, specials=SPECIALS_V2, aliases={"OLD_A": "A", "OLD_C": "C"})
    cells = make_cells([[6, 2, 2, 0, 0], [0, 0, 10, 0, 0]], ["new1", "b", "old_a", "C", "new2"])
    fitted = Vocabulary.fit(cells, base)
    assert fitted.genes.to_dict("list") == {
        "ensembl_id": ["A", "B", "new1"],
        "token_id": [4, 5, 7],
        "median": [6_000, 2_000, 6_000],
    }
    assert fitted.specials == base.specials
    assert fitted.aliases == {"OLD_A": "A"}


def test_fitting_without_a_base_numbers_genes_in_order():
    fitted = Vocabulary.fit(make_cells([[1, 0, 3]], ["B", "X", "A"]))
    assert dict(zip(fitted.genes["ensembl_id"], fitted.genes["token_id"], strict=True)) == {"B": 2, "A": 3}
    assert (fitted.specials, fitted.begins_with, fitted.ends_with) == (SPECIALS_V1, (), ())
    with pytest.raises(UserError, match="None of the 1 genes has a count in the 0 training cells"):
        Vocabulary.fit(make_cells(np.zeros((0, 1)), ["A"]))
