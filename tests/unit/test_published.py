"""Published numbers: the table is consistent with the studies that repeat them, and stands beside real cells only."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate import published
from tuneformer.evaluate.statistics import interval
from tuneformer.study import grid, train_sets, treatments
from tuneformer.study.params import load_study

FOUR = ["full", "linear_probe", "selective", "lp_ft"]
LITERAL = sorted(set(published.read()["study"]))  # files with the published settings


def rows(dataset="sciplex2", study="sciplex2_strategies", task="nutlin_2class", train_set="single_cell", **values):
    """Rows of metrics.csv: ``strategy=[value of each seed]``, of the metric accuracy."""
    table = pd.DataFrame(
        [(name, seed, value) for name, listed in values.items() for seed, value in enumerate(listed)],
        columns=["strategy", "seed", "value"],
    )
    sides = {"study": study, "dataset": dataset, "task": task, "train_set": train_set, "metric": "accuracy"}
    return table.assign(**sides, fold=np.nan, n_train=100, n_test=20)


@pytest.mark.parametrize("study", LITERAL)
def test_every_published_arm_is_in_the_grid_of_its_study(study):
    runs = grid.runs(study)
    asked = {(run.task, run.train_set, run.strategy) for run in runs}
    table = published.read().query("study == @study")
    for row in table.itertuples():
        assert {(row.task, row.train_set, name) for name in row.strategy.split()} <= asked
    assert not any(run.simulated for run in runs)
    assert {run.checkpoint for run in runs} == {"Geneformer-V1-10M"}


def test_published_rows_are_numbers_of_known_scores():
    table = published.read()
    assert table["value"].between(0, 1, inclusive="right").all()
    assert set(table["relation"]) <= {"=", "<", "<=", ">"}
    assert not table.duplicated(["study", "task", "train_set", "strategy", "metric", "trial"]).any()
    assert table["source"].str.fullmatch(r"(strategies|bulk|pancreas) study, \S.*").all()
    kinds = table["metric"].str.split(":").str[0]
    assert set(kinds) <= {"accuracy", "macro_f1", "recall", "token_auc"}
    for row in table[kinds == "recall"].itertuples():
        classes = load_study(row.study, task=row.task).classes
        assert not classes or row.metric.removeprefix("recall:") in classes
    for name in {name for listed in table["strategy"] for name in listed.split()}:
        assert treatments.parse(name).strategy in treatments.STRATEGIES
    assert all(map(train_sets.parse, table["train_set"]))


def test_the_numbers_that_the_issue_names():
    table = published.read().fillna({"trial": 0})
    value = {(row.study, row.metric, row.trial): row.value for row in table.itertuples()}
    assert value["cardiomyopathy", "accuracy", 0] == 0.8731
    assert value["sciplex2_nutlin_2class", "accuracy", 0] == 0.9625
    assert value["sciplex2_nutlin_2class", "macro_f1", 0] == 0.94
    assert value["sciplex2_nutlin_4class", "accuracy", 0] == 0.6805
    assert value["sciplex2_nutlin_4class", "macro_f1", 0] == 0.65
    classes = ["Untreated", "Nutlin", "Dex", "BMS", "SAHA"]
    baseline = [value["sciplex2_drug_5class", f"recall:{name}", 0] for name in classes]
    assert baseline == [0.68, 0.73, 0.94, 0.70, 0.92]
    third = [value["sciplex2_padding", f"recall:{name}", 3] for name in classes]
    assert third == [0.57, 0.81, 0.92, 0.73, 0.93]


@pytest.mark.parametrize("study", LITERAL)
def test_a_study_with_published_settings_states_them(study):
    for run in grid.runs(study):
        assert (run.learning_rate, run.learning_rates, run.weight_decay) == (5e-5, {}, 0.001)
        assert (run.warmup_steps, run.warmup_cap, run.min_steps) == (500, None, 0)
        assert (run.pooling, run.freeze_embeddings, run.train_cells) == ("first", False, None)
        assert run.strategy not in treatments.BASELINES
        if run.dataset == "sciplex2":
            assert (run.batch_size, run.epochs, run.loss, run.folds) == (12, 10, "cross_entropy", 0)
            assert (run.min_counts, run.max_counts, run.max_mito_share) == (500, 12000, 0.5)
            assert run.test_share == (0.2 if run.task.startswith("nutlin") else 0.1)
            assert (run.min_hash_umis, run.min_hash_ratio, run.max_hash_qval) == (None, None, None)
            assert run.validation_share == pytest.approx(1 / 9)


def test_the_pancreas_study_states_its_table_of_settings():
    runs = {run.strategy: run for run in grid.runs("pancreas_published")}
    enhanced = runs["selective_freeze2_focal_upsampled"]
    assert (enhanced.loss, enhanced.sampling, enhanced.freeze_layers) == ("focal", "upsampled", 2)
    assert (enhanced.batch_size, enhanced.epochs, enhanced.folds, enhanced.group_by) == (64, 1, 5, None)
    baseline = runs["full_batch12"]
    assert (baseline.loss, baseline.sampling, baseline.batch_size) == ("cross_entropy", "all", 12)
    assert (enhanced.fractional_counts, enhanced.min_counts, enhanced.max_counts) == (True, 0, None)


def test_other_published_settings():
    heart = load_study("cardiomyopathy")
    assert (heart.batch_size, heart.epochs, heart.group_by, heart.freeze_layers) == (12, 1, "individual", 2)
    assert load_study("sciplex2_padding").padded_classes == ["BMS", "Untreated"]
    sizes = {train_sets.parse(name).k for name in load_study("sciplex2_pseudobulk").train_sets} - {None}
    assert sizes == {2, 5, 10, 25, 100}
    assert load_study("sciplex2_pseudobulk").group_spread == 0.25


def test_ours_is_the_mean_over_the_strategies_run_by_run():
    scores = dict(
        zip(FOUR, np.array([[0.9, 0.92, 0.95], [0.94, 0.9, 0.91], [0.97, 1, 0.98], [0.96, 0.95, 1]]), strict=True)
    )
    table = published.compare(rows(**scores, random_init=[0.1, 0.1, 0.1]))
    assert list(table["metric"]) == ["accuracy"]
    expected = interval(np.mean(list(scores.values()), axis=0))
    found = table.iloc[0]
    assert (found["mean"], found["low"], found["high"], found["runs"]) == pytest.approx(
        (expected.mean, expected.low, expected.high, 3)
    )
    assert (found["published"], found["study"]) == (0.9625, "sciplex2_nutlin_2class")


def test_a_strategy_without_runs_leaves_nothing_to_compare():
    metrics = rows(**dict.fromkeys(FOUR[:3], (0.9, 0.8)))
    assert published.compare(metrics).empty
    assert published.tables(metrics) == []
    assert published.sentence(metrics) == (
        "The four studies published no number for the cells, tasks, train sets and strategies of sciplex2_strategies."
    )
    failed = rows(**dict.fromkeys(FOUR, (0.9,))).assign(value=np.nan)
    assert published.compare(failed).empty


def test_trials_are_averaged_and_bounds_are_kept_or_not():
    sides = {"task": "drug_5class", "full": [0.60, 0.62, 0.61]}
    padded = rows(train_set="mixture_gaussian_pad700", **sides).assign(metric="recall:Untreated")
    found = published.compare(padded).iloc[0]
    assert (found["published"], found["trials"], found["verdict"]) == (pytest.approx(0.61), 4, published.AGREES)
    for values, verdict in {
        (0.40, 0.41, 0.42): published.AGREES,
        (0.40, 0.45, 0.50): published.UNCLEAR,
        (0.60, 0.61, 0.62): published.HIGHER,
        (0.40,): published.UNCLEAR,
    }.items():
        found = published.compare(rows(train_set="synthetic_gaussian", task="drug_5class", full=values)).iloc[0]
        assert (found["relation"], found["published"], found["verdict"]) == ("<=", 0.45, verdict)
    low = rows(train_set="synthetic_gaussian", task="saha_2class", full=[0.70, 0.71]).assign(metric="recall:SAHA")
    assert published.compare(low)["verdict"].tolist() == [published.LOWER]
    text = published.tables(low)[0]["Published"].tolist()
    assert text == ["> 0.8"]


def test_folds_widen_the_interval():
    metrics = rows("pancreas", "pancreas", "pancreas_types", selective_freeze2_focal_upsampled=[0.9, 0.92, 0.94, 0.91])
    folds = metrics.assign(fold=metrics["seed"].astype(float), seed=0)
    found = published.compare(folds).iloc[0]
    expected = interval(metrics["value"], overlap=20 / 100)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["verdict"] == (published.LOWER if expected.high < 0.97 else published.AGREES)


@pytest.mark.parametrize(("study", "dataset"), [("demo", "demo"), ("demo_pancreas", "demo_pancreas")])
def test_no_published_number_stands_beside_simulated_cells(study, dataset):
    metrics = pd.concat(
        [
            rows(dataset, study, **dict.fromkeys(FOUR, (0.9, 0.8))),
            rows(dataset, study, "pancreas_types", selective_freeze2_focal_upsampled=[0.9, 0.8]),
        ]
    )
    assert published.compare(metrics).empty
    assert published.tables(metrics) == []
    assert published.sentence(metrics).startswith(
        f"The cells of {study} are simulated; published numbers are of real cells"
    )


def test_the_sentence_counts_the_verdicts():
    metrics = pd.concat(
        [
            rows(**dict.fromkeys(FOUR, (0.95, 0.97, 0.96))),
            rows(task="nutlin_4class", **dict.fromkeys(FOUR, (0.5, 0.51))),
        ]
    )
    assert published.sentence(metrics).startswith("Published values beside ours, 2: 1 agrees, 1 ours is lower (agrees:")
    table = published.tables(metrics)[0]
    assert table.index[0] == ("nutlin_2class", "single_cell", "full, linear_probe, selective, lp_ft", "accuracy")
    assert table["Published"].tolist() == ["0.9625", "0.6805"]
    assert table["Ours (95 % interval)"].iloc[0] == "0.960 (0.935 to 0.985)"
