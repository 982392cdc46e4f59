"""Corpora of many files: joined by gene, poor cells dropped, held-out cells the same whatever lies beside them."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import corpus, sources
from tuneformer.model import pretrain
from tuneformer.study import load_study


def write_cells(path, genes, counts, label="kind"):
    counts = np.asarray(counts, dtype=np.float32)
    obs = pd.DataFrame({label: "a"}, index=[f"c{row}" for row in range(len(counts))])
    var = pd.DataFrame({"ensembl_id": genes, "symbol": [gene.replace("ENSG", "S") for gene in genes]})
    ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=var.set_index(pd.Index(genes))).write_h5ad(path)
    return path


@pytest.fixture
def files(tmp_path):
    first = write_cells(tmp_path / "one.h5ad", ["ENSG1", "ENSG2"], [[600, 0], [300, 400], [100, 100]])
    second = write_cells(tmp_path / "two.h5ad", ["ENSG2", "ENSG3"], [[0, 700], [500, 1]])
    return [first, second]


def test_files_are_joined_by_gene_and_poor_cells_are_dropped(files):
    cells = corpus.read_corpus(files)
    assert list(cells.var["ensembl_id"]) == ["ENSG1", "ENSG2", "ENSG3"]
    assert list(cells.var["symbol"]) == ["S1", "S2", "S3"]
    assert cells.X.toarray().tolist() == [[600, 0, 0], [300, 400, 0], [0, 0, 700], [0, 500, 1]]
    assert list(cells.obs["file"]) == ["one", "one", "two", "two"]
    assert list(cells.obs["n_counts"]) == [600, 700, 700, 501]


def test_cells_with_mostly_mitochondrial_counts_are_dropped(tmp_path):
    path = write_cells(tmp_path / "m.h5ad", ["ENSG1", "ENSG2"], [[600, 0], [500, 400]])
    stored = ad.read_h5ad(path)
    stored.var["symbol"] = ["A", "MT-B"]
    stored.write_h5ad(path)
    assert list(corpus.read_corpus([path]).obs_names) == ["m:c0"]


def test_a_tenth_is_held_out_whatever_the_other_files_are(tmp_path, files):
    many = write_cells(tmp_path / "many.h5ad", ["ENSG1"], np.full((2000, 1), 600))
    alone = corpus.read_corpus([many]).obs["held_out"]
    beside = corpus.read_corpus([*files, many]).obs["held_out"]
    assert beside[alone.index].equals(alone)
    assert abs(alone.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 2000)  # four standard errors


def test_a_folder_means_its_h5ad_files_and_a_wrong_one_is_named(tmp_path, files, monkeypatch):
    assert corpus.corpus_files([str(tmp_path), str(files[0])]) == [*files, files[0]]
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UserError, match=r"^pretrain_files: \$NOWHERE/x needs the variable NOWHERE, which is not set"):
        corpus.corpus_files(["$NOWHERE/x"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^pretrain_files: no h5ad file in .*empty"):
        corpus.corpus_files([str(tmp_path / "empty")])


def test_the_vocabulary_has_the_genes_that_enough_cells_have_and_knows_their_symbols(files, monkeypatch):
    monkeypatch.setattr(pretrain, "MIN_CELLS", 2)
    vocabulary = pretrain.real_vocabulary(corpus.read_corpus(files), None)
    assert list(vocabulary.genes["ensembl_id"]) == ["ENSG1", "ENSG2", "ENSG3"]
    assert vocabulary.aliases == {"S1": "ENSG1", "S2": "ENSG2", "S3": "ENSG3"}
    monkeypatch.setattr(pretrain, "MIN_CELLS", 3)
    with pytest.raises(UserError, match="None of the 0 genes"):
        pretrain.real_vocabulary(corpus.read_corpus(files), None)


def test_own_cells_of_several_files_keep_the_genes_that_all_have(files):
    settings = load_study("tiny", dataset="own", path=str(files[0]), more_paths=[str(files[1])], label="kind")
    cells = sources.load(settings)
    assert list(cells.var["ensembl_id"]) == ["ENSG2"]
    assert list(cells.obs["file"]) == ["one", "one", "one", "two", "two"]
    assert cells.X.toarray().ravel().tolist() == [0, 400, 100, 0, 500]
    assert cells.obs_names.is_unique
    alone = load_study("tiny", dataset="own", path=str(files[0]), label="kind")
    assert sources.source_key(settings) != sources.source_key(alone)
