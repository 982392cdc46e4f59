"""Effects of train sets: parts that add up, differences paired by seed, and sentences that claim no more than these."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM

from tuneformer.evaluate import trainset_effects

BASE = np.array([0.60, 0.63, 0.62, 0.66])
LOSS = np.array([0.10, 0.11, 0.12, 0.11])  # a clear loss: its 95 % interval lies above zero
NOISE = np.array([0.03, -0.04, 0.02, -0.022])  # no clear difference
PATH = ["single_cell", "single_cell_k5_steps", "single_cell_k5", "pseudobulk_k5_sum_thinned", "pseudobulk_k5_sum"]
PARTS = [LOSS, NOISE, LOSS / 2, -LOSS / 5]  # the last part is a gain


def table_of(scores, *, task="drugs", strategy="full", recalls=None):
    """Rows of metrics.csv for {train set: macro-F1 of seeds 0, 1, ...}; None is a failed run.

    Accuracy is macro-F1 + 0.1. `recalls`: {class: what is added to macro-F1}.
    """
    rows = []
    for train_set, values in scores.items():
        for seed, value in enumerate(values):
            run = {"task": task, "train_set": train_set, "strategy": strategy, "seed": seed, "fold": np.nan}
            run["fingerprint"] = f"{task}{train_set}{strategy}{seed}"
            if value is None:
                rows.append(run | {"metric": "status:failed", "value": 1.0})
                continue
            found = {"accuracy": value + 0.1, "macro_f1": value, "cost:wall_seconds": 1.0, "confusion:a:a": 3.0}
            found |= {f"recall:{name}": value + shift for name, shift in (recalls or {}).items()}
            rows += [run | {"metric": metric, "value": number} for metric, number in found.items()]
    return pd.DataFrame(rows)


def path_scores(parts=PARTS):
    """Scores along the path from single cells to pseudo-bulk that lose `parts` on the way."""
    return dict(zip(PATH, [BASE, *(BASE - lost for lost in np.cumsum(parts, axis=0))], strict=True))


def expected_interval(values):
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return pytest.approx((np.mean(values), found.low, found.high))


def said(metrics, start):
    """The one sentence that begins so."""
    found = [text for texts in trainset_effects.sentences(metrics).values() for text in texts if text.startswith(start)]
    assert len(found) == 1, found
    return found[0]


def test_the_parts_of_the_fall_are_those_put_in_and_add_up():
    table = trainset_effects.decomposition(table_of(path_scores()))
    assert set(table["metric"]) == {"accuracy", "macro_f1"}
    for _, rows in table.groupby("metric"):
        assert rows["part"].tolist() == ["fewer steps", "fewer points", "averaging", "depth and length", "whole fall"]
        for row, values in zip(rows.itertuples(), [*PARTS, sum(PARTS)], strict=True):
            assert (row.fall, row.low, row.high) == expected_interval(values)
            assert (row.k, row.n) == (5, 4)
        assert rows["fall"].iloc[:4].sum() == pytest.approx(rows["fall"].iloc[4], abs=1e-12)
    assert (table.loc[table["part"] == "depth and length", "high"] < 0).all()  # a gain stays negative


def test_the_parts_add_up_although_a_run_failed():
    scores = path_scores()
    scores["single_cell_k5"] = [*scores["single_cell_k5"][:3], None]
    table = trainset_effects.decomposition(table_of(scores))
    assert (table["n"] == 3).all()
    rows = table[table["metric"] == "macro_f1"].set_index("part")["fall"]
    assert rows.iloc[:4].sum() == pytest.approx(rows.iloc[4], abs=1e-12)
    assert rows["whole fall"] == pytest.approx(sum(PARTS)[:3].mean())


@pytest.mark.parametrize("missing", PATH)
def test_without_one_train_set_of_the_path_there_are_no_parts(missing):
    scores = {name: values for name, values in path_scores().items() if name != missing}
    assert trainset_effects.decomposition(table_of(scores)).empty


def test_differences_are_paired_by_seed_and_follow_the_controls():
    scores = {
        "single_cell": BASE,
        "pseudobulk_k5_mean": BASE - LOSS,
        "pseudobulk_k5_mean_boosted": BASE - LOSS + NOISE,
        "synthetic_nb_untreated": BASE - 2 * LOSS,
        "mixture_copies_pad7": BASE + NOISE,
        "mixture_nb_pad7": [*(BASE + NOISE + LOSS)[:3], None],
        "mixture_nb_pad9": BASE,
    }
    table = trainset_effects.differences(table_of(scores))
    table = table[table["metric"] == "macro_f1"].set_index(["train_set", "against"])
    assert table.index.tolist() == [
        ("pseudobulk_k5_mean", "single_cell"),
        ("pseudobulk_k5_mean_boosted", "single_cell"),
        ("pseudobulk_k5_mean_boosted", "pseudobulk_k5_mean"),
        ("synthetic_nb_untreated", "single_cell"),  # synthetic_nb itself is not in the study
        ("mixture_copies_pad7", "single_cell"),
        ("mixture_nb_pad7", "single_cell"),
        ("mixture_nb_pad7", "mixture_copies_pad7"),
        ("mixture_nb_pad9", "single_cell"),
    ]
    columns = ["difference", "low", "high"]
    assert tuple(table.loc[("pseudobulk_k5_mean", "single_cell"), columns]) == expected_interval(-LOSS)
    assert tuple(table.loc[("pseudobulk_k5_mean_boosted", "pseudobulk_k5_mean"), columns]) == expected_interval(NOISE)
    assert tuple(table.loc[("mixture_nb_pad7", "mixture_copies_pad7"), columns]) == expected_interval(LOSS[:3])
    assert table.loc[("mixture_nb_pad7", "mixture_copies_pad7"), "n"] == 3


def test_decline_has_single_cells_at_one_and_names_the_lines():
    scores = path_scores() | {"pseudobulk_k10_sum": BASE - 2 * LOSS, "synthetic_nb": BASE}
    table = trainset_effects.decline(table_of(scores))
    table = table[table["metric"] == "macro_f1"].set_index("train_set")
    assert table["k"].to_dict() == {**dict.fromkeys(PATH, 5), "single_cell": 1, "pseudobulk_k10_sum": 10}
    assert table["series"].tolist() == [
        "single cells", "steps of N/k single cells", "N/k single cells", "sum, thinned", "sum", "sum",
    ]  # fmt: skip
    row = table.loc["pseudobulk_k10_sum"]
    assert (row["mean"], row["low"], row["high"]) == expected_interval(BASE - 2 * LOSS)
    assert (row["difference"], row["difference_low"], row["difference_high"]) == expected_interval(-2 * LOSS)
    assert np.isnan(table.loc["single_cell", "difference"])


def test_a_task_without_a_k_has_no_decline():
    metrics = pd.concat([table_of(path_scores()), table_of({"single_cell": BASE, "synthetic_nb": BASE}, task="two")])
    assert set(trainset_effects.decline(metrics)["task"]) == {"drugs"}


def test_spread_of_the_aggregations_is_judged_by_the_blocked_analysis_of_variance():
    rng = np.random.default_rng(0)
    scores = {f"pseudobulk_k5_{name}": BASE + rng.normal(0, 0.02, 4) for name in ("sum", "mean", "approx_mean")}
    scores["pseudobulk_k9_sum"] = BASE  # alone at its k
    table = trainset_effects.aggregations(table_of(scores))
    assert table["k"].tolist() == [5, 5]
    row = table[table["metric"] == "macro_f1"].iloc[0]
    values = np.array([scores[f"pseudobulk_k5_{name}"] for name in ("sum", "mean", "approx_mean")])
    long = pd.DataFrame([(i, j, values[i, j]) for i in range(3) for j in range(4)], columns=["arm", "seed", "value"])
    known = AnovaRM(long, "value", "seed", within=["arm"]).fit().anova_table
    assert row["p"] == pytest.approx(known["Pr > F"].item())
    assert row["between"] == pytest.approx(values.mean(axis=1).std(ddof=1))
    assert row["seeds"] == pytest.approx(np.sqrt(values.var(axis=1, ddof=1).mean()))
    assert (row["between"] / row["expected"]) ** 2 == pytest.approx(known["F Value"].item())


def test_spread_test_is_wrong_as_often_as_it_says():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(1000, 5, 3)) + 3 * rng.normal(size=(1000, 5, 1))  # seeds differ, aggregations do not
    found = [trainset_effects._blocked_test(pd.DataFrame(draw)) for draw in draws]
    assert np.mean([one["p"] < 0.05 for one in found]) == pytest.approx(0.05, abs=0.021)  # 3 standard errors
    ratio = np.mean([one["between"] ** 2 for one in found]) / np.mean([one["expected"] ** 2 for one in found])
    assert ratio == pytest.approx(1, abs=0.106)  # 3 standard errors


def test_aggregations_that_agree_in_every_seed_are_the_same():
    scores = {f"pseudobulk_k5_{name}": BASE for name in ("sum", "mean", "approx_mean")}
    table = trainset_effects.aggregations(table_of(scores))
    assert (table["p"] == 1).all()
    assert (table["between"] == 0).all()
    assert "differ no more than noise explains" in said(table_of(scores), "Sum, mean")


def test_aggregations_that_differ_beyond_noise_are_said_to():
    small = np.array([0.001, -0.001, 0.001, -0.001])
    arms = {"sum": BASE, "mean": BASE + 0.1, "approx_mean": BASE + 0.05 + small}
    metrics = table_of({f"pseudobulk_k5_{name}": values for name, values in arms.items()})
    assert "differ more than noise explains" in said(metrics, "Sum, mean")


def test_recall_of_each_class_with_its_differences():
    scores = {
        "single_cell": BASE,
        "mixture_copies_pad7": BASE + NOISE,
        "mixture_nb_pad7": BASE + NOISE + LOSS,
    }
    table = trainset_effects.per_class(table_of(scores, recalls={"a": 0.1, "b": -0.1}))
    assert table[["train_set", "class", "against"]].fillna("").drop_duplicates().shape[0] == len(table) == 2 * 4
    row = table[(table["class"] == "b") & (table["against"] == "mixture_copies_pad7")].iloc[0]
    assert (row["recall"], row["low"], row["high"]) == expected_interval(BASE + NOISE + LOSS - 0.1)
    assert (row["difference"], row["difference_low"], row["difference_high"]) == expected_interval(LOSS)
    baseline = table[(table["class"] == "a") & (table["train_set"] == "single_cell")].iloc[0]
    assert baseline["recall"] == pytest.approx(BASE.mean() + 0.1)
    assert np.isnan(baseline["difference"])


def test_shares_run_from_real_cells_alone_to_synthetic_cells_alone():
    scores = {
        "single_cell": BASE,
        "mixture_nb_share75": BASE - LOSS,
        "mixture_nb_share25": BASE,
        "synthetic_nb": BASE - 2 * LOSS,
        "synthetic_nb_untreated": BASE,
        "synthetic_gaussian": BASE,  # no share between, so no line
        "mixture_gaussian_full_share50": BASE,
    }
    table = trainset_effects.shares(table_of(scores))
    table = table[table["metric"] == "macro_f1"]
    assert table.groupby("generator")["percent"].apply(list).to_dict() == {
        "nb": [0, 25, 75, 100],
        "gaussian_full": [0, 50],
    }
    last = table[(table["generator"] == "nb") & (table["percent"] == 100)].iloc[0]
    assert last["train_set"] == "synthetic_nb"
    assert (last["difference"], last["difference_low"], last["difference_high"]) == expected_interval(-2 * LOSS)


def test_a_fall_is_called_clear_where_its_interval_excludes_zero():
    scores = {"single_cell": BASE, "pseudobulk_k5_sum": BASE - LOSS, "pseudobulk_k2_sum": BASE + NOISE}
    text = said(table_of(scores | {"pseudobulk_k10_sum": BASE + LOSS}), "Trained on pseudo-bulk (sum)")
    low, high = stats.ttest_1samp(-LOSS, 0).confidence_interval(0.95)
    assert f"is clearly lower for k = 5: -0.110 ({low:+.3f} to {high:+.3f}); clearly higher for k = 10: +0.110" in text
    assert "; not clearly different for k = 2: -0.003" in text


def test_one_seed_gives_no_verdict():
    scores = {name: values[:1] for name, values in path_scores().items()} | {"pseudobulk_k5_sum_boosted": [0.9]}
    texts = trainset_effects.sentences(table_of(scores))["drugs"]
    assert "known for one seed only, without a verdict, for k = 5" in texts[0]
    assert not any("clear" in text for text in texts)


def test_the_parts_are_said_with_their_signs_and_only_clear_ones_are_called_so():
    metrics = table_of(path_scores())
    whole = said(metrics, "At k = 5 the whole fall")
    assert "fewer steps 0.110 (" in whole
    assert "depth and length -0.022 (" in whole
    assert whole.endswith("a negative part is a gain.")
    cost, gain = (said(metrics, f"Over the 1 value of k, a clear {word}") for word in ("cost", "gain"))
    assert cost.endswith(": fewer steps at k = 5; averaging at k = 5.")
    assert gain.endswith(": depth and length at k = 5.")
    nothing = said(table_of(path_scores([NOISE] * 4)), "Over the 1 value of k, a clear cost")
    assert nothing.endswith(": no part at any k.")


def test_what_was_changed_in_pseudobulk_is_compared_with_the_unchanged():
    scores = {
        "single_cell": BASE,
        "pseudobulk_k5_sum": BASE - LOSS,
        "pseudobulk_k5_sum_boosted": BASE - LOSS + NOISE,
        "pseudobulk_k5_sum_steps": BASE,
        "pseudobulk_k5_sum_capped": BASE - 2 * LOSS,
    }
    metrics = table_of(scores)
    assert "not clearly different for k = 5 sum: -0.003" in said(metrics, "With single cells added to the validation")
    assert "clearly higher for k = 5 sum: +0.110" in said(metrics, "With as many optimizer steps")
    assert "clearly lower for k = 5 sum: -0.110" in said(metrics, "With token lists cut")


def test_padding_is_judged_against_copies_and_recalls_against_chance():
    scores = {
        "single_cell": BASE,
        "mixture_copies_pad7": BASE + LOSS,
        "mixture_nb_pad7": BASE + LOSS + NOISE,
        "mixture_gaussian_pad7": BASE,
    }
    metrics = table_of(scores, recalls={"a": 0.0})
    text = said(metrics, "Padded with synthetic cells instead of copies")
    assert "clearly lower for gaussian +7: -0.110" in text
    assert "not clearly different for nb +7: -0.003" in text
    assert "clearly higher for copies +7: +0.110" in said(metrics, "Padded instead of left alone")
    recall = said(metrics, "Recall of a class, padded against copies")
    assert "clearly other in 1 of 2 comparisons" in recall
    assert "a with mixture_gaussian_pad7 -0.110" in recall
    assert trainset_effects.sentences(metrics)["drugs"][0] == text  # the main finding comes first


def test_synthetic_cells_alone_and_their_generators():
    scores = {
        "single_cell": BASE,
        "synthetic_gaussian": BASE - LOSS,
        "synthetic_nb": BASE + NOISE,
        "synthetic_nb_untreated": BASE - LOSS,
    }
    metrics = table_of(scores)
    text = said(metrics, "Trained on synthetic cells alone")
    assert "clearly lower for gaussian: -0.110" in text
    assert "not clearly different for nb: -0.003" in text
    assert "untreated" not in text
    assert "nb scores highest" in said(metrics, "Of the generators")
    assert "it leads gaussian: +0.107" in said(metrics, "Of the generators")
    scores["synthetic_gaussian"] = BASE
    assert "gaussian scores highest" in said(table_of(scores), "Of the generators")
    assert "it has no clear lead over nb: +0.003" in said(table_of(scores), "Of the generators")
    assert "clearly lower for nb: -0.107" in said(metrics, "With variances from untreated cells")


def test_each_generator_has_its_sentence_on_shares():
    scores = {"single_cell": BASE, "mixture_nb_share50": BASE - LOSS, "mixture_nb_share25": BASE + NOISE}
    text = said(table_of(scores), "With a share of the cells replaced by nb cells")
    assert "clearly lower for 50 %: -0.110" in text
    assert "not clearly different for 25 %: -0.003" in text


def test_a_study_with_one_train_set_says_nothing():
    metrics = table_of({"single_cell": BASE})
    assert trainset_effects.sentences(metrics) == {}
    assert trainset_effects.lines(metrics) == [trainset_effects.ALONE]
    for table in (trainset_effects.decline, trainset_effects.decomposition, trainset_effects.aggregations):
        assert table(metrics).empty
    assert trainset_effects.shares(metrics).empty
    assert trainset_effects.differences(metrics).empty


def test_a_train_set_whose_runs_all_failed_is_left_out():
    metrics = table_of({"single_cell": BASE, "pseudobulk_k5_sum": [None] * 4, "pseudobulk_k2_sum": BASE - LOSS})
    text = said(metrics, "Trained on pseudo-bulk")
    assert "k = 2: -0.110" in text
    assert "k = 5" not in text


def test_without_single_cells_only_what_can_be_compared_is_said():
    metrics = table_of({"synthetic_nb": BASE, "synthetic_gaussian": BASE - LOSS})
    assert [text.split(",")[0] for text in trainset_effects.sentences(metrics)["drugs"]] == ["Of the generators"]


def test_tasks_and_strategies_are_judged_apart():
    scores = {"single_cell": BASE, "pseudobulk_k5_sum": BASE - LOSS}
    metrics = pd.concat([table_of(scores), table_of(scores, task="two"), table_of(scores, strategy="lora")])
    found = trainset_effects.sentences(metrics)
    assert [text.split(":")[0] for text in found["drugs"]] == ["full", "lora"]
    assert len(found["two"]) == 1
    assert trainset_effects.lines(metrics)[0].startswith("drugs: full: Trained on pseudo-bulk")


def test_a_strategy_with_one_train_set_does_not_take_part():
    scores = {"single_cell": BASE, "pseudobulk_k5_sum": BASE - LOSS}
    metrics = pd.concat([table_of(scores), table_of({"single_cell": BASE}, strategy="logistic_counts")])
    assert set(trainset_effects.varied(metrics)["strategy"]) == {"full"}
    assert trainset_effects.sentences(metrics) == trainset_effects.sentences(table_of(scores))


def test_strategies_are_compared_on_single_cells():
    one = table_of({"single_cell": BASE, "pseudobulk_k5_sum": BASE})
    assert set(trainset_effects.strategy_rows(one)["train_set"]) == {"single_cell"}
    assert not trainset_effects.compares_strategies(one)
    assert trainset_effects.compares_strategies(pd.concat([one, table_of({"single_cell": BASE}, strategy="lora")]))
    assert trainset_effects.compares_strategies(table_of({"single_cell": BASE}))
    made = table_of({"synthetic_nb": BASE, "pseudobulk_k5_sum": BASE})
    assert len(trainset_effects.strategy_rows(made)) == len(made)
    assert trainset_effects.compares_strategies(made)
