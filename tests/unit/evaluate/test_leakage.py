"""The leakage gate: a small run that is clean, and the same run with one leak planted at a time."""

from dataclasses import replace
from types import SimpleNamespace

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import counts
from tuneformer.evaluate import leakage
from tuneformer.study import load_study
from tuneformer.tokens.encode import Tokens
from tuneformer.tokens.vocabulary import Vocabulary

N_CELLS, N_GENES = 120, 40
WELLS = {"train": "W1", "validation": "W2", "test": "W3"}
WHERE = "^tiny drug_5class full seed 0: "


def vocabulary_of(medians=1.0, aliases=None):
    genes = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(N_GENES)]})
    genes["token_id"], genes["median"] = np.arange(2, N_GENES + 2, dtype=np.int32), medians
    return Vocabulary(genes=genes, specials={"<pad>": 0, "<mask>": 1}, aliases=aliases or {})


def tokens_of(table, **options):
    """Tokens of cells: names in the column cell, a list that differs from all others unless it is given."""
    rng = np.random.default_rng(0)
    if "input_ids" not in table:
        table = table.assign(input_ids=[rng.permutation(np.arange(2, 30, dtype=np.int32)) for _ in range(len(table))])
    return Tokens(datasets.Dataset.from_pandas(table, preserve_index=False), vocabulary_of(), ["a", "b"], **options)


@pytest.fixture
def task(monkeypatch):
    """All cells of a task, as quality control leaves them."""
    rng = np.random.default_rng(0)
    split = np.tile(["train", "train", "train", "validation", "test", "test"], N_CELLS // 6)
    obs = pd.DataFrame({"label": np.tile(["a", "a", "b"], N_CELLS // 3), "split": split})
    obs["well"] = obs["split"].map(WELLS) + obs["label"]
    obs.index = [f"cell {number}" for number in range(N_CELLS)]  # a name may hold a space
    counts = sparse.csr_matrix(rng.poisson(2, (N_CELLS, N_GENES)).astype(np.float32))
    cells = ad.AnnData(counts, obs=obs.astype({"label": "category", "split": "category"}))
    monkeypatch.setattr(leakage.qc, "prepare_cells", lambda settings: cells)
    monkeypatch.setattr(leakage.encode, "task_vocabulary", lambda settings, cells: vocabulary_of())
    return cells


@pytest.fixture
def settings():
    return load_study("tiny").model_copy(update={"group_by": "well"})


def prepared_of(cells, **options):
    table = cells.obs[["label", "split"]].astype(str).rename_axis("cell").reset_index()
    return SimpleNamespace(cells=cells.copy(), tokens=tokens_of(table, **options))


def single_cells(task):
    """A run on some of the training cells."""
    taken = (task.obs["split"] != "train").to_numpy() | (np.arange(N_CELLS) < 60)
    return prepared_of(task[taken])


def made_cells(task):
    """A run on 10 made cells, with the real test cells."""
    rng = np.random.default_rng(1)
    obs = pd.DataFrame({"label": ["a", "b"] * 5, "split": ["train"] * 8 + ["validation"] * 2})
    obs.index = [f"pseudobulk {number}" for number in range(10)]
    made = ad.AnnData(sparse.csr_matrix(rng.poisson(9, (10, N_GENES)).astype(np.float32)), obs=obs)
    is_test = (task.obs["split"] == "test").to_numpy()
    sources = list(task.obs_names[~is_test])
    return prepared_of(ad.concat([made, task[is_test]], merge="same"), sources=sources)


def change_tokens(prepared, change, **options):
    table = change(prepared.tokens.dataset.to_pandas())
    prepared.tokens = replace(prepared.tokens, dataset=datasets.Dataset.from_pandas(table, preserve_index=False))
    prepared.tokens = replace(prepared.tokens, **options)
    return prepared


def refused(prepared, settings, what, cell=None):
    example = rf" \(1, such as {cell}\); " if cell else r" \([\d,]+, such as .+\); "
    with pytest.raises(UserError, match=WHERE + what + example):
        leakage.refuse_leaks(prepared, settings)


@pytest.mark.parametrize("make", [single_cells, made_cells])
@pytest.mark.parametrize("is_tokenized", [False, True])
def test_a_clean_run_passes(task, settings, make, is_tokenized):
    prepared = make(task)
    if is_tokenized:  # by others, without counts
        prepared.cells = None
    leakage.refuse_leaks(prepared, settings)


# --- the split


def test_a_group_in_two_parts(task, settings):
    prepared = single_cells(task)
    task.obs["well"] = task.obs["well"].where(task.obs_names != "cell 4", "W1a")  # a test cell
    refused(prepared, settings, "groups of 'well' in more than one part of the split", "W1a")
    leakage.refuse_leaks(prepared, settings.model_copy(update={"group_by": None}))


def test_validation_may_be_cells_of_the_training_groups_of_a_fold(task, settings):
    task.obs["well"] = np.where(task.obs["split"] == "test", "W3", "W1")
    refused(single_cells(task), settings, "groups of 'well' in more than one part of the split", "W1")
    leakage.refuse_leaks(single_cells(task), settings.at(fold=0))


def test_a_cell_name_that_occurs_twice(task, settings):
    prepared = single_cells(task)
    task.obs_names = ["cell 1", *task.obs_names[1:]]
    refused(prepared, settings, "cell names that occur more than once", "cell 1")


# --- cells in the wrong part


def test_a_test_cell_that_is_trained_on(task, settings):
    def repeat(table):
        again = table[table["cell"] == "cell 4"].assign(split="train")
        return pd.concat([table, again], ignore_index=True)

    refused(
        change_tokens(single_cells(task), repeat), settings, "test cells that are trained or validated on", "cell 4"
    )


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("split", "train", "cells in another part than the split gave them"),
        ("label", "b", "cells with another label than after quality control"),
        ("cell", "made up", "test cells of the split that are not tested"),
    ],
)
def test_a_test_cell_that_is_changed(task, settings, column, value, what):
    def change(table):
        table[column] = table[column].where(table["cell"] != "cell 4", value)
        return table

    refused(change_tokens(single_cells(task), change), settings, what, "cell 4")


def test_a_made_cell_that_is_tested_and_a_test_cell_that_is_tested_twice(task, settings):
    prepared = change_tokens(
        made_cells(task), lambda table: table.assign(split=table["split"].where(table.index > 0, "test"))
    )
    refused(prepared, settings, "tested cells that are not real cells", "pseudobulk 0")
    twice = change_tokens(made_cells(task), lambda table: pd.concat([table, table[-1:]], ignore_index=True))
    refused(twice, settings, "test cells that are tested more than once", "cell 119")


def test_counts_and_tokens_in_another_order(task, settings):
    prepared = single_cells(task)
    prepared.cells = prepared.cells[::-1]
    refused(prepared, settings, "cells whose counts and tokens are not in the same row")
    prepared.cells = prepared.cells[1:]
    refused(prepared, settings, "cells whose counts and tokens are not in the same row")


# --- what made cells are made of


def test_a_test_cell_inside_a_made_cell(task, settings):
    prepared = made_cells(task)
    prepared.tokens.sources.append("cell 4")
    refused(prepared, settings, "test cells that made cells are made of", "cell 4")


def test_made_cells_have_to_name_known_sources(task, settings):
    prepared = made_cells(task)
    prepared.tokens.sources.append("nobody")
    refused(prepared, settings, "sources of made cells that are no cells of the task", "nobody")
    prepared.tokens.sources.clear()
    refused(prepared, settings, "made cells of unknown sources")
    leakage.refuse_leaks(prepared, settings.model_copy(update={"train_set": "bulk"}))  # of another experiment


# --- the same cell under two names


def test_a_test_cell_with_the_counts_of_a_training_cell(task, settings):
    prepared = single_cells(task)
    rows = prepared.cells.X.tolil()
    rows[prepared.cells.obs_names.get_loc("cell 4")] = rows[0]
    prepared.cells.X = rows.tocsr()
    refused(prepared, settings, "test cells with the counts of a cell that is trained on", "cell 4")
    rows[prepared.cells.obs_names.get_loc("cell 4"), 0] += 1
    prepared.cells.X = rows.tocsr()
    leakage.refuse_leaks(prepared, settings)


@pytest.mark.parametrize(("length", "is_refused"), [(counts.FEW_VALUES, False), (counts.FEW_VALUES + 1, True)])
def test_a_test_cell_with_the_tokens_of_a_training_cell_unless_they_are_few(task, settings, length, is_refused):
    def shorten(table):
        for name in ("cell 0", "cell 4"):
            table.at[table.index[table["cell"] == name][0], "input_ids"] = np.arange(2, 2 + length, dtype=np.int32)
        return table

    prepared = change_tokens(single_cells(task), shorten)
    leakage.refuse_leaks(prepared, settings)  # their counts differ
    prepared.cells = None
    if is_refused:
        refused(prepared, settings, "test cells with the tokens of a cell that is trained on", "cell 4")
    else:
        leakage.refuse_leaks(prepared, settings)


# --- medians


def test_a_vocabulary_that_saw_test_cells(task, settings):
    medians = np.ones(N_GENES)
    medians[3] = 1.5
    prepared = change_tokens(single_cells(task), lambda table: table, vocabulary=vocabulary_of(medians))
    what = "genes of the vocabulary that are not those of the {}"
    refused(prepared, settings, what.format("checkpoint"), "ENSG00000000003")
    fitted = settings.model_copy(update={"vocabulary": "fit"})
    refused(prepared, fitted, what.format("training cells"), "ENSG00000000003")
    other = vocabulary_of(aliases={"OLD": "ENSG00000000000"})
    prepared = change_tokens(single_cells(task), lambda table: table, vocabulary=other)
    refused(prepared, settings, what.format("checkpoint"), "a special token or an alias")


# --- what a run left


def outcome_of(prepared, *, best=3, losses=(0.5, 0.2, 0.2), **changes):
    table = prepared.tokens.dataset.to_pandas()
    tested = table.loc[table["split"] == "test", ["cell", "label"]].reset_index(drop=True)
    history = pd.DataFrame({"epoch": np.arange(len(losses)) + 1, "validation_loss": losses})
    known = {"status": "ok", "history": history, "best_epoch": best, "chosen_by": "last epoch", "predictions": tested}
    return SimpleNamespace(**known | changes)


def test_a_fair_run_passes_and_a_failed_one_has_nothing_to_check(task, settings):
    prepared = single_cells(task)
    chosen = {"chosen_by": "validation loss"}
    for fair in ({}, chosen, chosen | {"best": 2}, {"best": None, "history": pd.DataFrame()}):
        leakage.refuse_unfair(outcome_of(prepared, **fair), prepared, settings)
    leakage.refuse_unfair(SimpleNamespace(status="failed"), prepared, settings)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: table.iloc[[0, *range(len(table))]], r"that are predicted more than once \(1, such as cell 4\)"),
        (lambda table: table[2:], r"test cells that are not predicted \(2, such as cell 4\)"),
        (
            lambda table: pd.concat([table, table[:1].assign(cell="cell 0")]),
            r"predicted cells that are no test cells \(1, such as cell 0\)",
        ),
        (
            lambda table: table.assign(label=["?", *table["label"][1:]]),
            r"test cells with another class than in the tokens \(1, such as cell 4\)",
        ),
    ],
)
def test_predictions_that_are_not_of_each_test_cell_once(task, settings, change, what):
    prepared = single_cells(task)
    outcome = outcome_of(prepared)
    outcome.predictions = change(outcome.predictions)
    with pytest.raises(UserError, match=WHERE + ".*" + what + "; delete .*seed0 and run the study again"):
        leakage.refuse_unfair(outcome, prepared, settings)


@pytest.mark.parametrize(
    ("rule", "best", "right"),
    [("last epoch", 2, 3), ("validation loss", 1, 2), ("validation loss", 7, 2), ("cross-validated loss", None, 2)],
)
def test_an_epoch_that_its_rule_did_not_choose(task, settings, rule, best, right):
    prepared = single_cells(task)
    with pytest.raises(UserError, match=rf"its rule \({rule}\) did not choose \(1, such as {best}, not {right}\)"):
        leakage.refuse_unfair(outcome_of(prepared, best=best, chosen_by=rule), prepared, settings)
