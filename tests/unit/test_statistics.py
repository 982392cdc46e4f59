"""Intervals, paired differences and the answer: checked by hand, by scipy and by simulation."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tuneformer.evaluate import comparisons, statistics

BASE = np.array([0.5, 0.6, 0.7])
CLEAR = np.array([0.10, 0.11, 0.12])  # differences whose 95 % interval lies above zero
UNCLEAR = np.array([0.1, -0.1, 0.01])  # differences whose interval includes zero


def table_of(scores, *, task="drugs", costs=None):
    """Rows of metrics.csv for {strategy: scores of seeds 0, 1, ...}; None is a failed run."""
    rows = []
    for strategy, values in scores.items():
        for seed, value in enumerate(values):
            run = {
                "study": "s",
                "dataset": "demo",
                "task": task,
                "train_set": "single_cell",
                "strategy": strategy,
                "seed": seed,
                "fold": np.nan,
                "n_train": 10,
                "n_test": 10,
                "fingerprint": f"{task}{strategy}{seed}",
            }
            if value is None:
                rows.append(run | {"metric": "status:failed", "value": 1.0})
                continue
            rows += [run | {"metric": metric, "value": value} for metric in ("accuracy", "macro_f1")]
            rows += [run | {"metric": f"cost:{key}", "value": cost} for key, cost in (costs or {}).items()]
    return pd.DataFrame(rows)


def scores_of(metrics):
    return metrics[metrics["metric"] == "macro_f1"]


def test_interval_is_the_one_of_scipy():
    values = [0.61, 0.64, 0.58, 0.66]
    found = statistics.interval([*values, np.nan])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.sd, found.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 4))


def test_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.6, 0.02, size=(2000, 3))
    hits = [found.low <= 0.6 <= found.high for found in map(statistics.interval, draws)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)  # 3 standard errors of a share over 2,000 draws


def test_one_seed_says_nothing_about_the_spread():
    found = statistics.interval([0.5])
    assert (found.mean, found.n) == (0.5, 1)
    assert np.isnan([found.sd, found.low, found.high]).all()


def test_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        statistics.interval([np.nan])


def test_the_bootstrap_interval_is_of_the_means_of_values_drawn_again():
    """Of two values a and b the mean is a, (a + b) / 2 or b, with shares 1/4, 1/2 and 1/4: the interval is a to b."""
    found = statistics.bootstrap_interval([0.4, np.nan, 0.6])
    assert found == pytest.approx((0.5, np.sqrt(0.02), 0.4, 0.6, 2))
    assert statistics.bootstrap_interval(iter([0.4, 0.6])) == pytest.approx(found)
    equal = statistics.bootstrap_interval([0.7, 0.7, 0.7])
    assert (equal.low, equal.high) == pytest.approx((0.7, 0.7))
    alone = statistics.bootstrap_interval([0.5])
    assert (alone.mean, alone.n) == (0.5, 1)
    assert np.isnan([alone.low, alone.high]).all()
    with pytest.raises(ValueError, match="at least one value"):
        statistics.bootstrap_interval([])


def test_the_bootstrap_interval_of_many_values_is_the_t_interval():
    values = np.random.default_rng(0).normal(0.6, 0.02, size=400)
    by_t, found = statistics.interval(values), statistics.bootstrap_interval(values)
    half = by_t.high - by_t.mean
    assert (found.low, found.high) == pytest.approx((by_t.low, by_t.high), abs=0.06 * half)


@pytest.mark.parametrize(("n", "coverage"), [(5, 0.83), (20, 0.93)])
def test_the_bootstrap_interval_of_few_values_is_too_narrow(n, coverage, monkeypatch):
    """Within 3 standard errors of the coverage that 4,000 data sets with numpy's quantiles have: 0.828 and 0.927."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    draws = np.random.default_rng(1).normal(size=(500, n))
    hits = [found.low <= 0 <= found.high for found in map(statistics.bootstrap_interval, draws)]
    assert np.mean(hits) == pytest.approx(coverage, abs=3 * np.sqrt(coverage * (1 - coverage) / 500))


def test_pairs_remove_what_the_seeds_have_in_common():
    """A difference that is constant within seeds is found exactly, however much the seeds differ."""
    rows = scores_of(table_of({"full": BASE + 0.01, "random_init": BASE}))
    found = statistics.paired_difference(rows, "full", "random_init")
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.01, 0.01, 0.01, 3))
    assert statistics.paired_difference(rows, "random_init", "full").mean == pytest.approx(-0.01)


def test_paired_difference_is_the_paired_t_test_of_scipy():
    a, b = [0.5, 0.7, 0.6, 0.9], [0.4, 0.7, 0.3, 0.6]
    found = statistics.paired_difference(scores_of(table_of({"lora": a, "full": b})), "lora", "full")
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_only_seeds_that_both_have_are_paired():
    rows = scores_of(table_of({"full": [0.5, None, 0.7], "lora": [0.4, 0.9, 0.5]}))
    found = statistics.paired_difference(rows, "full", "lora")
    assert (found.mean, found.n) == (pytest.approx(0.15), 2)


def test_what_cannot_be_paired_is_refused():
    rows = scores_of(table_of({"full": [0.5, None], "lora": [None, 0.4]}))
    with pytest.raises(ValueError, match="no seed in common"):
        statistics.paired_difference(rows, "full", "lora")
    with pytest.raises(ValueError, match="selective has no scores here; strategies with scores: full, lora"):
        statistics.paired_difference(rows, "full", "selective")
    with pytest.raises(ValueError, match="full has several scores for seed 0"):
        statistics.paired_difference(pd.concat([rows, rows]), "full", "lora")


def test_answer_table_ranks_within_each_task_and_counts_failures():
    costs = {"wall_seconds": 4.0, "trainable_parameters": 1000}
    first = table_of({"random_init": [0.5, 0.5], "full": [0.8, 0.6], "lora": [0.9, None]}, costs=costs)
    second = table_of({"random_init": [0.4, 0.4], "full": [0.3, 0.3]}, task="doses", costs=costs)
    table = statistics.answer_table(pd.concat([first, second]))
    assert table["task"].tolist() == ["drugs"] * 3 + ["doses"] * 2
    assert table["strategy"].tolist() == ["lora", "full", "random_init", "random_init", "full"]
    lora = table.iloc[0]
    assert (lora.runs, lora.failed, lora.macro_f1, lora.gain) == (2, 1, 0.9, pytest.approx(0.4))
    assert np.isnan([lora.low, lora.gain_low]).all()
    full = table.iloc[1]
    assert (full.gain, full.seconds, full.parameters) == (pytest.approx(0.2), 4.0, 1000)
    assert table.loc[table["strategy"] == "random_init", "gain"].isna().all()


def test_a_task_in_which_every_run_failed_stays_in_the_table():
    table = statistics.answer_table(table_of({"full": [None, None]}))
    assert (table["runs"].item(), table["failed"].item()) == (2, 2)
    assert np.isnan(table["macro_f1"].item())
    assert statistics.readable(table)["Runs"].item() == "0 of 2"
    judged = statistics.verdicts(table_of({"full": [None, None]}))
    assert statistics.sentences(judged) == {}
    assert statistics.headline(judged) == "No run has finished with a score."


def test_a_lead_is_clear_only_when_the_paired_interval_excludes_zero():
    clear = statistics.verdicts(table_of({"full": BASE + CLEAR, "lora": BASE, "random_init": BASE - 0.2}))
    assert "It leads lora: +0.110" in statistics.sentences(clear)["drugs"]
    assert statistics.headline(clear) == "One strategy is clearly ahead. Pre-training clearly pays."
    unclear = statistics.verdicts(table_of({"full": BASE + UNCLEAR, "lora": BASE, "random_init": BASE - UNCLEAR}))
    assert "It has no clear lead over lora" in statistics.sentences(unclear)["drugs"]
    assert statistics.headline(unclear) == "No strategy is clearly ahead. It is not clear that pre-training pays."


def test_a_control_that_wins_is_said_to_win():
    judged = statistics.verdicts(table_of({"full": BASE, "random_init": BASE + CLEAR}))
    sentence = statistics.sentences(judged)["drugs"]
    assert sentence.startswith("random_init has the highest mean macro-F1 of the strategies over 3 seeds")
    assert "Pre-training hurts: full against random_init, the same model without it, -0.110" in sentence


def test_without_the_control_nothing_is_said_about_pre_training():
    metrics = table_of({"full": [0.5, 0.6], "lora": [0.4, 0.5]})
    assert "re-training" not in statistics.sentences(statistics.verdicts(metrics))["drugs"]
    assert not any("Gain" in column for column in statistics.readable(statistics.answer_table(metrics)))


def test_headline_counts_tasks():
    first = table_of({"full": BASE + CLEAR, "random_init": BASE})
    second = table_of({"full": BASE, "random_init": BASE + UNCLEAR}, task="doses")
    judged = statistics.verdicts(pd.concat([first, second]))
    expected = "One strategy is clearly ahead in 1 of 2 tasks. Pre-training clearly pays in 1 of 2 tasks."
    assert statistics.headline(judged) == expected


def test_arms_name_the_train_set_only_where_there_are_several():
    metrics = table_of({"full": [0.5]})
    assert statistics.with_arms(metrics)["arm"].unique().tolist() == ["full"]
    both = pd.concat([metrics, metrics.assign(train_set="mixture")])
    assert statistics.with_arms(both)["arm"].unique().tolist() == ["single_cell, full", "mixture, full"]
    assert "Train set" in statistics.readable(statistics.answer_table(both.assign(fingerprint=range(len(both)))))


def test_accuracy_gap_finds_a_table_that_contradicts_itself():
    run = table_of({"full": [0.75]})
    cells = {
        "recall:a": 0.5,
        "recall:b": 1.0,
        "confusion:a:a": 1,
        "confusion:a:b": 1,
        "confusion:b:a": 0,
        "confusion:b:b": 2,
    }
    rows = pd.concat([run.head(1).assign(metric=metric, value=float(value)) for metric, value in cells.items()])
    assert statistics.accuracy_gap(pd.concat([run, rows])) == 0
    run.loc[run["metric"] == "accuracy", "value"] = 0.8
    assert statistics.accuracy_gap(pd.concat([run, rows])) == pytest.approx(0.05)


def test_only_a_mean_beyond_the_tolerance_is_off_its_reference():
    metrics = pd.DataFrame(
        {
            "strategy": ["full", "full", "lora", "selective"],
            "metric": ["macro_f1", "macro_f1", "macro_f1", "macro_f1"],
            "value": [0.60, 0.64, 0.30, 0.10],
        }
    )
    expected = {"full": 0.60, "lora": 0.35, "lp_ft": 0.9}
    assert statistics.off_reference(metrics, expected, 0.03) == {"lora": 0.30}
    assert statistics.off_reference(metrics, expected, 0.06) == {}
    assert statistics.off_reference(metrics, {}, 0.0) == {}


def test_a_strategy_is_held_against_the_linear_model(results):
    linear = results[results["strategy"] == "full"].copy()
    linear["strategy"], linear["fingerprint"] = "logistic_counts", "linear" + linear["fingerprint"]
    better = linear["metric"].isin(["macro_f1", "accuracy"])
    linear.loc[better, "value"] += 0.1
    metrics = pd.concat([results, linear])
    judged = statistics.verdicts(metrics).set_index("task")
    assert judged["best"].to_dict() == {"drugs": "full", "doses": "full"}  # a baseline is never the best strategy
    np.testing.assert_allclose(judged["beyond"], -0.1)
    assert (judged["beating"] == 0).all()
    assert list(judged["tried"]) == [2, 2]  # the control random_init is no strategy
    sentence = statistics.sentences(statistics.verdicts(metrics))["drugs"]
    said = "It loses to logistic_counts, a linear model on the counts of the same cells: -0.100 (-0.100 to -0.100)"
    assert f"{said}; of 2 strategies none clearly does." in sentence
    headline = statistics.headline(statistics.verdicts(metrics))
    assert headline.endswith("A strategy clearly beats the linear model logistic_counts in none of 2 tasks.")
    table = statistics.answer_table(metrics)
    assert table.iloc[0]["strategy"] == "logistic_counts"
    assert table.loc[table["strategy"] == "logistic_counts", ["gain", "beyond"]].isna().all(axis=None)
    assert "Against logistic_counts (95 % interval)" in statistics.readable(table)
    assert "logistic_counts" not in str(statistics.readable(statistics.answer_table(results)).columns)
    linear.loc[better, "value"] -= 0.2
    ahead = statistics.verdicts(pd.concat([results, linear]))
    assert "It beats logistic_counts" in statistics.sentences(ahead)["drugs"]
    assert (ahead["beating"] >= 1).all()


def folds(values: dict[str, list[float]], *, n_train: int, n_test: int) -> pd.DataFrame:
    """Return macro-F1 rows of one seed, one fold after the other."""
    rows = [
        {"strategy": name, "seed": 0, "fold": float(fold), "value": value, "n_train": n_train, "n_test": n_test}
        for name, scores in values.items()
        for fold, value in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def test_the_interval_over_folds_is_that_of_the_corrected_resampled_t_test():
    scores = {"full": [0.7, 0.72, 0.69, 0.75, 0.71], "selective": [0.66, 0.7, 0.69, 0.7, 0.65]}
    rows = folds(scores, n_train=80, n_test=20)
    found = statistics.paired_difference(rows, "full", "selective")
    expected = comparisons.resampled_t_test(np.subtract(*scores.values()), n_train=80, n_test=20)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.difference, expected.low, expected.high))
    mean = statistics.over_runs(rows[rows["strategy"] == "full"])
    plain = statistics.interval(scores["full"])
    assert (mean.high - mean.low) == pytest.approx((plain.high - plain.low) * np.sqrt((1 / 5 + 1 / 4) / (1 / 5)))


def test_without_folds_the_interval_is_the_plain_one():
    rows = folds({"full": [0.7, 0.72, 0.69]}, n_train=80, n_test=20).assign(fold=np.nan, seed=[0, 1, 2])
    assert statistics.over_runs(rows) == statistics.interval([0.7, 0.72, 0.69])
    assert statistics.by_run(rows, "strategy").index.to_list() == [0, 1, 2]


def test_both_intervals_of_the_mean_stand_side_by_side():
    values = [0.5, 0.6, 0.7]
    rows = pd.DataFrame(
        {"task": "t", "train_set": "single_cell", "strategy": "full", "seed": [0, 1, 2], "value": values}
    )
    rows = pd.concat([rows, rows.assign(strategy="alone").head(1)]).assign(metric="macro_f1", fold=np.nan)
    table = statistics.intervals_by_method(rows)
    by_t, drawn = statistics.interval(values), statistics.bootstrap_interval(values)
    assert table.loc[("t", "full"), "t interval"] == f"{by_t.low:.3f} to {by_t.high:.3f}"
    assert table.loc[("t", "full"), "bootstrap interval"] == f"{drawn.low:.3f} to {drawn.high:.3f}"
    assert table.loc[("t", "full"), ["runs", "mean", "sd"]].to_list() == [3, 0.6, 0.1]
    assert table.loc[("t", "alone"), ["runs", "t interval"]].to_list() == [1, "-"]


def test_arms_that_share_a_seed_but_no_fold_are_not_compared():
    rows = folds({"full": [0.7, 0.72], "random_init": [0.5, 0.52]}, n_train=80, n_test=20)
    rows = rows[(rows["strategy"] == "full") == (rows["fold"] == 0)]
    rows = rows.assign(task="t", train_set="single_cell", metric="macro_f1", fingerprint=[f"f{n}" for n in range(2)])
    table = statistics.answer_table(rows).set_index("strategy")
    assert np.isnan(table.loc["full", "gain"])
    assert statistics.verdicts(rows)["second"].isna().all()
