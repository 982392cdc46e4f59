"""The real list of dosage-sensitive transcription factors."""

import os
import pickle
from pathlib import Path

import pytest

from tuneformer.data import gene_lists

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
