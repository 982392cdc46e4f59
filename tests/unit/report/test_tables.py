"""Tables: they say what the answer says, rounded, and failed runs are seen."""

import pandas as pd
import pytest

from tuneformer.report import tables


def test_arms_come_best_first_with_their_failed_runs_and_costs(results):
    table = tables.arms(results.answer, results.runs)
    assert list(table.columns) == [
        "Task",
        "Arm",
        "Macro-F1 (95 % interval)",
        "Runs",
        "Training time (s)",
        "Parameters that learn",
    ]
    drugs = table[table["Task"] == "drugs"]
    assert list(drugs["Arm"]) == [arm["arm"] for arm in results.answer["tasks"][0]["arms"]]
    full = table[table["Arm"] == "full"].set_index("Task")
    assert full.loc["drugs", ["Runs", "Training time (s)", "Parameters that learn"]].tolist() == ["3", "17.0", "1,600"]
    assert full.loc["doses", "Runs"] == "2 of 3"


def test_an_arm_without_a_finished_run_has_no_numbers(results):
    answer = {**results.answer, "tasks": [results.answer["tasks"][0]]}
    answer["tasks"][0]["arms"][0] |= {"mean": None, "low": None, "high": None, "n_runs": 0, "n_failed": 3}
    row = tables.arms(answer, results.runs).iloc[0]
    assert row["Macro-F1 (95 % interval)"] == tables.MISSING
    assert row["Runs"] == "0 of 3"


def test_contrasts_give_the_verdict_of_the_answer(results):
    table = tables.contrasts(results.answer)
    assert len(table) == 8
    assert list(table["Verdict"][:4]) == ["higher", "not decided", "same within 0.03", "lower"]
    assert list(table["p (Holm)"][:2]) == ["< 0.001", "0.300"]
    one = results.answer["tasks"][0]["contrasts"][0]
    assert table.iloc[0]["Difference in Macro-F1 (95 % interval)"].startswith(f"{one['difference']:+.3f} (")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.5, 0.4, 0.61), "0.500 (0.400 to 0.610)"),
        ((0.5, None, None), "0.500"),
        ((None, None, None), "-"),
        ((float("nan"), 0, 1), "-"),
    ],
)
def test_intervals_are_written_where_they_are_known(numbers, text):
    assert tables.with_interval(*numbers) == text


def test_folds_are_summed_up_and_seeds_of_a_fold_averaged(results):
    assert tables.folds(results.runs, results.predictions, "macro_f1").empty
    runs = pd.DataFrame({"task": "t", "arm": "a", "seed": [0, 1, 0, 1], "fold": [0, 0, 1, 1], "status": "ok"})
    runs["macro_f1"] = [0.4, 0.6, 0.8, 1.0]
    predictions = pd.DataFrame({"task": "t", "arm": "a", "label": ["x", "y", "x"], "predicted": ["x", "x", "x"]})
    row = tables.folds(runs, predictions, "macro_f1").loc[("t", "a")]
    assert row.tolist() == ["0.700 ± 0.283", 2, "0.667"]


def test_markdown_cannot_be_broken_by_a_name():
    table = tables.markdown(pd.DataFrame({"a": ["x|y"], "b": ["1"]}))
    assert table.splitlines() == ["| a | b |", "| --- | --- |", r"| x\|y | 1 |"]


def test_runs_that_never_left_one_class_are_counted_and_withheld_verdicts_say_why(results):
    results.answer["tasks"][0]["arms"][0]["n_constant"] = 2
    results.answer["tasks"][0]["contrasts"][0] |= {"verdict": "withheld", "why": "the checkpoint knows 3% of the genes"}
    assert tables.arms(results.answer, results.runs)["Runs"][0] == "3, 2 of one class"
    assert tables.contrasts(results.answer)["Verdict"][0] == "withheld: the checkpoint knows 3% of the genes"


def test_train_and_validation_scores_stand_beside_those_of_the_test_cells(results):
    runs = results.runs.assign(train_macro_f1=0.95, validation_macro_f1=0.9, quadratic_weighted_kappa=None)
    table = tables.beside(results.answer, runs)
    assert list(table)[2:] == ["Macro-F1 of training cells", "… of validation cells", "… of test cells"]
    own = runs.query("task == 'drugs' and arm == 'full'")["macro_f1"].mean()
    row = table.set_index(["Task", "Arm"]).loc[("drugs", "full")]
    assert row.tolist() == ["0.950", "0.900", f"{own:.3f}"]
