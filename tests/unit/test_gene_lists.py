"""Lists of genes of two classes: the forms that are read, and what is refused with which sentence."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest

from tuneformer.data import gene_lists, simulate, simulate_genes
from tuneformer.data.gene_lists import GeneListError, from_csv, from_pickle, read_gene_classes
from tuneformer.data.readers import CellsError
from tuneformer.data.simulate_genes import INSENSITIVE, SENSITIVE, simulate_gene_classes
from tuneformer.study.params import load_study

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
        ("", r"was not read as a csv \(No columns to parse"),
        (
            "ensembl_id,class\nENSG01,a\nENSG02,b\nENSG01,a\n",
            r"1 genes stand more than once \(first: ENSG01\); keep one line for each gene\.",
        ),
        (
            "ensembl_id,class\nENSG01,a\nENSG02,b\nENSG02,b\nENSG01,b\n",
            r"1 genes stand in both classes \(first: ENSG01\)",
        ),
        (MARKED + "ENSG04,D,Yes,Yes\n", r"1 genes stand in both classes \(first: ENSG04\)"),
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
    with pytest.raises(GeneListError, match=message):
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
        ({"a": ["ENSG01", "ENSG01"], "b": ["ENSG02"]}, "1 genes stand more than once"),
        ({"a": ["ENSG01"], "b": ["ENSG02", "ENSG01"]}, "1 genes stand in both classes"),
        ({"a": ["ENSG01"], "b": []}, r"the list has 1: a \(1\)"),
    ],
)
def test_a_pickle_that_cannot_be_used_is_refused_and_not_run(pickled, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GeneListError, match=message):
        from_pickle(pickled(content))
    assert not (tmp_path / "should-not-exist").exists()


def test_a_damaged_pickle_is_refused(pickled):
    path = pickled({"a": ["ENSG01"], "b": ["ENSG02"]})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(GeneListError, match=r"genes\.pickle was not read"):
        from_pickle(path)


def test_the_study_says_where_the_list_is(csv, pickled):
    for path in (csv(MARKED), pickled({"a": ["ENSG01"], "b": ["ENSG02", "ENSG03"]})):
        assert len(read_gene_classes(load_study("tiny", gene_classes=str(path))).classes) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gene_classes": "lists/none.csv"}, GeneListError, r"none\.csv does not exist; set it to demo, or to a csv"),
        ({"gene_classes": "$NO_SUCH_FOLDER/a.csv"}, CellsError, "needs the variable NO_SUCH_FOLDER"),
        ({"dataset": "pbmc68k"}, GeneListError, "demo names simulated genes, but dataset is pbmc68k"),
        ({"gene_classes": "a.csv", "gene_null": True}, GeneListError, "gene_null: true draws simulated classes"),
    ],
)
def test_a_study_without_a_usable_list_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        read_gene_classes(load_study("tiny", **changes))


# --- simulated classes ---


def membership(classes):
    """The program of each listed gene, and its base expression."""
    universe = simulate.make_universe()
    rows = universe.var["ensembl_id"].reset_index(drop=True)
    places = pd.Index(rows).get_indexer(classes.index)
    return universe.loadings[places].argmax(axis=1), universe.base[places], (universe.loadings[places] > 0).sum(axis=1)


@pytest.mark.parametrize("null", [False, True])
def test_simulated_classes_are_the_same_for_a_seed_and_differ_between_seeds(null):
    first, again, other = (simulate_gene_classes(seed=seed, null=null) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    assert first.index.is_unique
    assert len(first) == 490
    assert set(first) == {SENSITIVE, INSENSITIVE}


def sensitive_by_program(null, seeds=range(40)):
    """Share of sensitive genes of each program of each draw, for programs with ten listed genes at least."""
    shares = []
    for seed in seeds:
        classes = simulate_gene_classes(seed=seed, null=null)
        by_program = (classes == SENSITIVE).groupby(membership(classes)[0]).agg(["mean", "size"])
        shares += by_program.loc[by_program["size"] >= 10, "mean"].tolist()
    return np.array(shares)


def test_a_quarter_of_the_programs_are_sensitive_and_their_genes_nearly_all():
    shares = sensitive_by_program(null=False)
    inside = shares > 0.5
    assert (abs(shares - 0.5) < 0.15).mean() < 0.01  # two kinds of programs, hardly one between
    assert inside.mean() == pytest.approx(0.25, abs=0.03)
    assert shares[inside].mean() == pytest.approx(simulate_genes.INSIDE, abs=0.015)
    assert shares[~inside].mean() == pytest.approx(simulate_genes.OUTSIDE, abs=0.01)


def test_null_classes_have_nothing_to_do_with_programs():
    shares = sensitive_by_program(null=True)
    assert shares.mean() == pytest.approx(0.2525, abs=0.01)
    assert shares.max() < 0.85  # of some 600 programs with 10 to 20 genes at 25 %


@pytest.mark.parametrize("what", [1, 2])
def test_base_expression_and_number_of_programs_do_not_tell_the_class(what):
    differences = []
    for seed in range(60):
        classes = simulate_gene_classes(seed=seed, null=False)
        values = membership(classes)[what]
        is_sensitive = (classes == SENSITIVE).to_numpy()
        differences.append((values[is_sensitive].mean() - values[~is_sensitive].mean()) / values.std())
    standard_error = np.std(differences, ddof=1) / np.sqrt(60)
    assert abs(np.mean(differences)) < 4 * standard_error + 0.02


def test_sensitive_programs_are_as_active_in_the_demo_cells_as_the_others():
    rng = np.random.default_rng(0)
    activity = simulate.cell_type_activity(simulate.CELL_LINE)
    drawn = np.array([activity[simulate_genes._sensitive_programs(rng)].mean() for _ in range(400)])
    free = np.array([activity[rng.choice(60, 15, replace=False)].mean() for _ in range(400)])
    assert drawn.mean() == pytest.approx(activity.mean(), abs=4 * drawn.std() / 20)
    assert drawn.std() < 0.8 * free.std()


def test_positive_is_the_rarer_class_of_the_demo():
    read = read_gene_classes(load_study("tiny"))
    assert read.positive == SENSITIVE
    assert gene_lists.check_classes(read.classes, "again").negative == INSENSITIVE
