"""The real list of dosage-sensitive transcription factors, and the real dictionaries of Geneformer."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tuneformer import paths
from tuneformer.data import gene_lists, qc
from tuneformer.model import gene_task
from tuneformer.study import load_study
from tuneformer.tokens.vocabulary import Vocabulary

SCORED = (63, 178)  # sensitive and insensitive factors in at least 5 of 1,000 blood cells

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)


@pytest.fixture
def data():
    return Path(os.environ["TUNEFORMER_DATA"])


@pytest.fixture
def listed(data):
    return gene_lists.from_csv(data / "dosage_sens_tf_labels.csv")


def test_the_list_has_122_sensitive_and_368_insensitive_factors(listed):
    assert listed.classes.value_counts().to_dict() == {"dosage_insensitive": 368, "dosage_sensitive": 122}
    assert listed.positive == "dosage_sensitive"
    assert listed.classes["ENSG00000010539"] == "dosage_insensitive"  # ZNF200
    assert listed.classes.index.str.fullmatch(r"ENSG\d{11}").all()


def test_the_same_list_as_the_official_pickle(listed, tmp_path):
    lists = {name: genes.index.tolist() for name, genes in listed.classes.groupby(listed.classes)}
    (tmp_path / "dosage_sensitivity_TFs.pickle").write_bytes(pickle.dumps(lists))
    read = gene_lists.from_pickle(tmp_path / "dosage_sensitivity_TFs.pickle")
    assert read.classes.sort_index().equals(listed.classes.sort_index())


@pytest.mark.parametrize(
    ("version", "unknown"),
    [("v1", []), ("v2", ["ENSG00000177946", "ENSG00000196381", "ENSG00000214189", "ENSG00000249459"])],
)
def test_v1_knows_all_genes_and_v2_all_but_four(data, listed, version, unknown):
    vocabulary = Vocabulary.read(data / f"geneformer_{version}")
    names = vocabulary.resolve(listed.classes.index)
    assert names.is_unique  # no two of them are one gene of the model
    outside = listed.classes[~names.isin(vocabulary.genes["ensembl_id"])]
    assert sorted(outside.index) == unknown
    assert set(outside) <= {"dosage_insensitive"}


def test_the_list_in_the_cells_of_sorted_blood(data, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("token_dictionary", "gene_median_dictionary"):
        (file,) = (data / "geneformer_v1").glob(f"{name}*.pkl")
        (checkpoint / file.name).write_bytes(file.read_bytes())
    config = {"model_type": "bert", "vocab_size": 25_426, "max_position_embeddings": 2048}
    (checkpoint / "config.json").write_text(json.dumps(config))
    path = str(data / "dosage_sens_tf_labels.csv")
    settings = load_study(
        "pbmc_facs", checkpoint=str(checkpoint), vocabulary="checkpoint", gene_classes=path, gene_cells=1000
    )
    task = gene_task.prepare_genes(settings)
    assert task.counts.loc["dosage_sensitive"].tolist() == [122, 122, SCORED[0]]
    assert task.counts.loc["dosage_insensitive"].tolist() == [368, 368, SCORED[1]]
    assert task.unknown == []
    assert len(task.rare) == 490 - sum(SCORED)
    context = task.tokens.dataset.select(task.context)
    found = qc.prepare_cells(settings)[context["cell"][:], task.genes["gene"]].X > 0
    is_whole = np.array(context["length"][:]) < 2048  # the tokens of the others are cut, and genes may be lost
    n_cells = task.genes["context_cells"].to_numpy()
    assert is_whole.mean() > 0.9
    assert (n_cells >= found[is_whole].sum(axis=0).A1).all()
    assert (n_cells <= found.sum(axis=0).A1).all()
