"""Lists of genes of two classes: the forms that are read, and what is refused with which sentence."""

import os
import pickle

import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.data import gene_lists
from tuneformer.data.gene_lists import INSENSITIVE, SENSITIVE, from_csv, from_pickle, read_gene_classes
from tuneformer.study import load_study

MARKED = """ensembl_id,gene_name,dosage_insensitive,dosage_sensitive
ENSG01,ZNF200,Yes,
ENSG02,YES,,Yes
ENSG03,AHRR,Yes,
"""


@pytest.fixture
def csv(tmp_path):
    def write(text):
        path = tmp_path / "genes.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def pickled(tmp_path):
    def write(content):
        path = tmp_path / "genes.pickle"
        path.write_bytes(pickle.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        MARKED,
        MARKED.replace("Yes", "x"),
        MARKED.replace("\n", "\r\n"),
        "ensembl_id,class\nENSG01,dosage_insensitive\nENSG02, dosage_sensitive\nENSG03,dosage_insensitive\n",
    ],
)
def test_a_csv_is_read_in_either_form(csv, text):
    read = from_csv(csv(text))
    assert read.classes.to_dict() == {
        "ENSG01": "dosage_insensitive",
        "ENSG02": "dosage_sensitive",
        "ENSG03": "dosage_insensitive",
    }
    assert (read.positive, read.negative) == ("dosage_sensitive", "dosage_insensitive")


def test_the_official_pickle_is_read_as_the_csv(pickled, csv):
    lists = {"dosage_sensitive": ["ENSG02"], "dosage_insensitive": ["ENSG01", "ENSG03"]}
    read = from_pickle(pickled(lists))
    assert read.classes.sort_index().equals(from_csv(csv(MARKED)).classes.sort_index())
    assert read.positive == "dosage_sensitive"


def test_of_classes_of_the_same_size_the_second_by_name_is_positive(pickled):
    assert from_pickle(pickled({"b": ["ENSG01"], "a": ["ENSG02"]})).positive == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,sensitive\nENSG01,Yes\n", "has the columns gene, sensitive; it needs columns ensembl_id and class, or"),
        ("ensembl_id,gene_name\nENSG01,A\n", "has the columns ensembl_id, gene_name; it needs"),
        ("ensembl_id,gene_name,sensitive\nENSG01,A,Yes\n", "it needs columns ensembl_id and class, or"),
        ("", r"could not be read as a table \(No columns to parse"),
        (
            "ensembl_id,class\nENSG01,a\nENSG02,b\nENSG01,a\n",
            r"genes that are given twice: 1 \(first: ENSG01\); keep one line for each gene\.",
        ),
        (
            "ensembl_id,class\nENSG01,a\nENSG02,b\nENSG02,b\nENSG01,b\n",
            r"genes that are in both classes: 1 \(first: ENSG01\)",
        ),
        (MARKED + "ENSG04,D,Yes,Yes\n", r"genes that are in both classes: 1 \(first: ENSG04\)"),
        (
            MARKED + "ENSG04,D,,\n",
            r"1 of 4 lines lack a gene or its class \(first: line 5\); complete or delete them\.",
        ),
        ("ensembl_id,class\nENSG01,a\n,b\n", r"1 of 2 lines lack a gene or its class \(first: line 3\)"),
        ("ensembl_id,class\nENSG01,a\nENSG02,a\n", r"but the list has 1: a \(2\)\."),
        ("ensembl_id,class\nENSG01,a\nENSG02,b\nENSG03,c\n", r"the list has 3: a \(1\), b \(1\), c \(1\)\."),
        ("ensembl_id,class\n", r"the list has 0: none\."),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(csv, text, message):
    with pytest.raises(UserError, match=message):
        from_csv(csv(text))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmful(), r"asks for posix\.mkdir"),
        ({"a": ["ENSG01"], "b": Harmful()}, r"asks for posix\.mkdir"),
        (pd.Series(["ENSG01"]), r"asks for pandas"),
        ({"a": {"ENSG01"}, "b": ["ENSG02"]}, "set"),
        ({"a": ["ENSG01"], "b": "ENSG02"}, "is not a dictionary of class to list of Ensembl ids"),
        ({"a": ["ENSG01"], "b": [7]}, "is not a dictionary of class to list of Ensembl ids"),
        (["ENSG01"], "is not a dictionary of class to list of Ensembl ids"),
        ({"a": ["ENSG01", "ENSG01"], "b": ["ENSG02"]}, "genes that are given twice: 1"),
        ({"a": ["ENSG01"], "b": ["ENSG02", "ENSG01"]}, "genes that are in both classes: 1"),
        ({"a": ["ENSG01"], "b": []}, r"the list has 1: a \(1\)"),
    ],
)
def test_a_pickle_that_cannot_be_used_is_refused_and_not_run(pickled, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        from_pickle(pickled(content))
    assert not (tmp_path / "should-not-exist").exists()


def test_a_damaged_pickle_is_refused(pickled):
    path = pickled({"a": ["ENSG01"], "b": ["ENSG02"]})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"genes\.pickle was not read"):
        from_pickle(path)


def test_the_study_says_where_the_list_is(csv, pickled):
    for path in (csv(MARKED), pickled({"a": ["ENSG01"], "b": ["ENSG02", "ENSG03"]})):
        assert len(read_gene_classes(load_study("tiny", gene_classes=str(path))).classes) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gene_classes": "lists/none.csv"}, r"none\.csv does not exist; set it to demo, or to a csv"),
        ({"gene_classes": "$NO_SUCH_FOLDER/a.csv"}, "needs the variable NO_SUCH_FOLDER"),
        ({"dataset": "pbmc68k"}, "demo names simulated genes, but dataset is pbmc68k"),
        ({"gene_classes": "a.csv", "gene_null": True}, "gene_null: true draws simulated classes"),
    ],
)
def test_a_study_without_a_usable_list_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read_gene_classes(load_study("tiny", **changes))


def test_positive_is_the_rarer_class_of_the_demo():
    read = read_gene_classes(load_study("tiny"))
    assert read.positive == SENSITIVE
    assert gene_lists.check_classes(read.classes, "again").negative == INSENSITIVE
