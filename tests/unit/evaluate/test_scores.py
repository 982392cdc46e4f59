"""Scores of a run: checked by hand and against one another."""

import itertools

import numpy as np
import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.data.simulate import simulate_sciplex2
from tuneformer.evaluate.scores import (
    CALIBRATED_DRAWS,
    confusion,
    coverage_curve,
    dose_values,
    reliability_curve,
    score,
)
from tuneformer.study import load_study

CLASSES = ["b", "a"]
# true b: 3 cells, predicted b, b, a; true a: 1 cell, predicted a
LABELS = ["b", "b", "b", "a"]
PROBABILITIES = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
OF_ORDER = ["quadratic_weighted_kappa", "mean_absolute_error_classes"]
OF_DOSES = [*OF_ORDER, "mean_absolute_error_log10_dose"]


def scored(labels=LABELS, probabilities=PROBABILITIES, classes=CLASSES):
    return pd.Series(score(labels, probabilities, classes))


def made_up(n=200, n_classes=4, digits=2, seed=0):
    """Labels and probabilities that know something of them; rounded, so that confidences are tied."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(n_classes, size=n)
    odds = np.exp(rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[numbers])
    probabilities = (odds / odds.sum(axis=1, keepdims=True)).round(digits)
    probabilities[:, 0] = 1 - probabilities[:, 1:].sum(axis=1)
    classes = [f"{10**number} uM" for number in range(n_classes)]
    return np.array(classes)[numbers], np.abs(probabilities), classes


def test_scores_by_hand():
    found = scored()
    assert found["accuracy"] == 3 / 4
    # F1 of b: precision 1, recall 2/3; of a: precision 1/2, recall 1
    assert found["macro_f1"] == pytest.approx((2 * 1 * (2 / 3) / (5 / 3) + 2 * 0.5 * 1 / 1.5) / 2)
    assert (found["recall:b"], found["recall:a"]) == (pytest.approx(2 / 3), 1)
    assert (found["precision:b"], found["precision:a"]) == (1, 1 / 2)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["weighted_f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    # b ranks 0.9 b, 0.6 b, 0.3 a, 0.2 b: 2 of 3 pairs in order; a ranks the other way round, with the same pairs
    assert found["macro_auroc"] == pytest.approx(2 / 3)
    # precision at each cell found, b: 1, 1, 3/4; a, in the ranking 0.8 b, 0.7 a, ...: 1/2
    assert found["macro_average_precision"] == pytest.approx(((1 + 1 + 3 / 4) / 3 + 1 / 2) / 2)
    assert found["log_loss"] == pytest.approx(-np.log(0.9 * 0.6 * 0.2 * 0.7) / 4)
    # confidences 0.9 right, 0.6 right, 0.8 wrong, 0.7 right, each in a bin of its own
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.4 + 0.8 + 0.3) / 4)
    # wrong among the first 1, 2, 3, 4 cells: 0, 1, 1, 1
    assert found["area_under_risk_coverage"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_the_scores_keep_their_order():
    assert all(isinstance(value, float) for value in score(LABELS, PROBABILITIES, CLASSES).values())
    names = list(score(["1 uM", "2 uM"], np.eye(2), ["1 uM", "2 uM"]))
    general = [
        "accuracy",
        "macro_f1",
        "balanced_accuracy",
        "weighted_f1",
        "macro_auroc",
        "macro_average_precision",
        "log_loss",
        "expected_calibration_error",
        "calibrated_error",
        "area_under_risk_coverage",
    ]
    by_class = ["precision:1 uM", "precision:2 uM", "recall:1 uM", "recall:2 uM"]
    assert names == [*general, *OF_DOSES, *by_class]
    assert list(score(LABELS, PROBABILITIES, CLASSES))[:10] == general
    assert not set(OF_DOSES) & set(score(LABELS, PROBABILITIES, CLASSES))


def test_scores_of_many_cells_by_their_definitions():
    labels, probabilities, classes = made_up()
    found = scored(labels, probabilities, classes)
    confidence = probabilities.max(axis=1)
    right = np.array(classes)[probabilities.argmax(axis=1)] == labels
    assert len(set(confidence)) < len(confidence)
    aurocs, precisions = [], []
    for number, name in enumerate(classes):
        is_class, values = labels == name, probabilities[:, number]
        pairs = [np.sign(a - b) for a in values[is_class] for b in values[~is_class]]
        aurocs.append((1 + np.mean(pairs)) / 2)  # the share of pairs in order; a tie is half
        at_least = [values >= threshold for threshold in values[is_class]]
        precisions.append(np.mean([is_class[taken].mean() for taken in at_least]))
    assert found["macro_auroc"] == pytest.approx(np.mean(aurocs))
    assert found["macro_average_precision"] == pytest.approx(np.mean(precisions))
    risks = [1 - right[confidence >= threshold].mean() for threshold in confidence]
    assert found["area_under_risk_coverage"] == pytest.approx(np.mean(risks))
    error, edges = 0, [0, *np.unique(np.quantile(confidence, np.arange(1, 10) / 10)), 1]
    for low, high in itertools.pairwise(edges):
        taken = (confidence > low) & (confidence <= high)
        if taken.any():
            error += taken.mean() * abs(right[taken].mean() - confidence[taken].mean())
    assert found["expected_calibration_error"] == pytest.approx(error)
    numbers = np.array([classes.index(name) for name in labels])
    off = probabilities.argmax(axis=1) - numbers
    by_chance = [(a - b) ** 2 for a, b in itertools.product(probabilities.argmax(axis=1), numbers)]
    assert found["quadratic_weighted_kappa"] == pytest.approx(1 - np.mean(off**2) / np.mean(by_chance))
    assert found["mean_absolute_error_log10_dose"] == pytest.approx(np.abs(off).mean())
    assert found["mean_absolute_error_classes"] == pytest.approx(np.abs(off).mean())


def test_perfect_predictions():
    classes = ["0.25 uM", "2.5 uM", "25 uM"]
    found = scored(classes * 5, np.tile(np.eye(3), (5, 1)), classes)
    errors = ["log_loss", "expected_calibration_error", "calibrated_error", "area_under_risk_coverage", *OF_DOSES[1:]]
    best = dict.fromkeys(errors, 0)
    assert found.to_dict() == pytest.approx({name: best.get(name, 1) for name in found.index}, abs=1e-12)


def test_predictions_that_know_only_the_class_sizes():
    """The same probabilities for every cell: honest, the entropy of the classes, no ranking, no use in abstaining."""
    classes, shares = ["1 uM", "2 uM", "3 uM"], [0.6, 0.3, 0.1]
    found = scored(np.repeat(classes, [60, 30, 10]), np.tile(shares, (100, 1)), classes)
    assert found["macro_auroc"] == 0.5
    assert found["macro_average_precision"] == pytest.approx(np.mean(shares))
    assert found["log_loss"] == pytest.approx(-np.dot(shares, np.log(shares)))
    assert found["expected_calibration_error"] == pytest.approx(0, abs=1e-12)
    assert found["area_under_risk_coverage"] == pytest.approx(0.4)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["weighted_f1"] == pytest.approx(0.6 * 2 * 0.6 / 1.6)
    assert found["quadratic_weighted_kappa"] == 0
    assert found["precision:1 uM"] == 0.6
    assert np.isnan(found["precision:2 uM"])


def test_random_predictions_are_at_chance():
    """The standard error of an AUROC at chance is at most sqrt((n + 1) / (12 p q)) of n = p + q cells: 5 of them."""
    rng = np.random.default_rng(0)
    classes = ["1 uM", "2 uM", "3 uM"]
    found = scored(np.repeat(classes, 1000), rng.dirichlet(np.ones(3), 3000), classes)
    assert abs(found["macro_auroc"] - 1 / 2) < 5 * np.sqrt(3001 / (12 * 1000 * 2000))
    assert abs(found["accuracy"] - 1 / 3) < 5 * np.sqrt(2 / 9 / 3000)
    assert abs(found["quadratic_weighted_kappa"]) < 5 / np.sqrt(3000)
    assert abs(found["area_under_risk_coverage"] - 2 / 3) < 0.05
    # the probability of the true class is beta(1, 2), whose mean of -ln is 1 + 1 / 2, with variance 1 + 1 / 4
    assert abs(found["log_loss"] - 1.5) < 5 * np.sqrt(1.25 / 3000)


def test_a_sure_mistake_costs_36_nats():
    found = scored(["a", "b"], np.eye(2)[::-1], ["a", "b"])
    assert found["log_loss"] == pytest.approx(-np.log(np.finfo(float).eps))
    assert found["macro_auroc"] == 0


def test_probabilities_in_single_precision_are_scored_alike():
    labels, probabilities, classes = made_up(digits=9)
    single = scored(labels, probabilities.astype(np.float32), classes)
    pd.testing.assert_series_equal(single, scored(labels, probabilities, classes), rtol=1e-5)


def test_what_a_test_set_cannot_say_is_nan():
    """Warnings are errors here, and scikit-learn warns of each of these."""
    classes = ["1 uM", "2 uM", "3 uM"]
    absent = scored(classes[:2], np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), classes)
    assert list(absent.index[absent.isna()]) == ["precision:3 uM", "recall:3 uM"]
    ones = ["macro_auroc", "macro_average_precision", "balanced_accuracy", "weighted_f1", "quadratic_weighted_kappa"]
    assert (absent[ones] == 1).all()
    one = scored(classes[:1] * 2, np.array([[0.8, 0.2], [0.6, 0.4]]), classes[:2])
    undefined = ["macro_auroc", "macro_average_precision", OF_DOSES[0], "precision:2 uM", "recall:2 uM"]
    assert list(one.index[one.isna()]) == undefined
    alone = scored(classes[:1] * 2, np.ones((2, 1)), classes[:1])
    assert list(alone.index[alone.isna()]) == ["macro_auroc", "macro_average_precision", "log_loss", OF_DOSES[0]]


def test_doses_are_read_from_the_names_of_classes():
    for task, doses in {"nutlin_4class": [0.25, 2.5, 25, 125], "nutlin_2class": [0, 25]}.items():
        assert dose_values(load_study("demo_strategies", task=task).classes).tolist() == doses
    cells = simulate_sciplex2(500, seed=0).obs.dropna()
    labels = cells["dose_label"].astype(str).unique()
    by_label = cells.groupby("dose_label", observed=True)["dose_um"].first()
    np.testing.assert_allclose(dose_values(labels), by_label[labels])
    assert dose_values(["1e-3 mM", "500 nM", "2uM", "3 µM", "4 μM", "5 pM", "6 M"]) == pytest.approx(
        [1, 0.5, 2, 3, 4, 5e-6, 6e6]
    )
    for names in (["Untreated", "25 uM"], ["24 h", "48 h"], ["0.25", "2.5"], ["-1 uM", "1 uM"], ["25 uM Nutlin"]):
        assert dose_values(names) is None


def test_doses_are_ordered_by_their_size_and_compared_in_powers_of_ten():
    classes = ["25 uM", "0.25 uM", "2.5 uM"]
    predicted = np.eye(3)[[1, 0, 2, 2]]
    labels = ["0.25 uM", "0.25 uM", "2.5 uM", "25 uM"]  # right, two decades too high, right, one too low
    found = scored(labels, predicted, classes)
    assert found["mean_absolute_error_log10_dose"] == pytest.approx((0 + 2 + 0 + 1) / 4)
    # places 0 0 1 2, predicted 0 2 1 1: squares off 0 4 0 1; all 16 pairs: 0 4 1 1, twice; 1 1 0 0; 4 0 1 1
    assert found["quadratic_weighted_kappa"] == pytest.approx(1 - (5 / 4) / ((6 + 6 + 2 + 6) / 16))


def test_a_vehicle_class_is_ordered_but_has_no_logarithm():
    found = scored(["0 uM", "0 uM", "25 uM", "25 uM"], np.eye(2)[[0, 1, 1, 1]], ["0 uM", "25 uM"])
    assert "mean_absolute_error_log10_dose" not in found
    assert found["quadratic_weighted_kappa"] == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))  # Cohen's, of two classes


def test_reliability_curve_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.6, 0.4], [0.6, 0.4], [0.75, 0.25], [0.1, 0.9], [1, 0]])
    table = reliability_curve(["a", "b", "a", "a", "b", "b"], probabilities, ["a", "b"], bins=3)
    assert table["cells"].tolist() == [3, 1, 2]  # two of a confidence of 0.6 stay together
    np.testing.assert_allclose(table["confidence"], [1.7 / 3, 0.75, 0.95])
    np.testing.assert_allclose(table["accuracy"], [2 / 3, 1, 1 / 2])
    many = reliability_curve(*made_up(n=1000, digits=9))
    assert many["cells"].tolist() == [100] * 10


@pytest.mark.parametrize("n", [85, 1000])
def test_the_error_of_a_calibrated_model_is_what_such_a_model_shows(n):
    """Labels drawn from the probabilities themselves, 300 times: their mean error, within 4 of its standard errors."""
    rng = np.random.default_rng(n)
    probabilities = rng.dirichlet(np.ones(4), n)
    names = np.array(list("abcd"))
    drawn = [names[(probabilities.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)] for _ in range(300)]
    found = pd.DataFrame([score(labels, probabilities, [*names]) for labels in drawn])
    errors = found["expected_calibration_error"]
    assert found["calibrated_error"].nunique() == 1  # it does not look at the labels
    both = errors.std() * np.sqrt(1 / 300 + 1 / CALIBRATED_DRAWS)
    assert errors.mean() == pytest.approx(found["calibrated_error"][0], abs=4 * both)
    assert found["calibrated_error"][0] > {85: 0.08, 1000: 0.02}[n]  # with few cells far from 0


def test_classes_in_order_are_scored_by_how_far_off_they_are():
    classes, labels = ["low", "middle", "high"], ["low", "low", "middle", "high"]
    found = scored(labels, np.eye(3)[[0, 2, 1, 1]], classes)
    assert not set(OF_ORDER) & set(found.index)
    found = pd.Series(score(labels, np.eye(3)[[0, 2, 1, 1]], classes, ordered=True))
    assert found["mean_absolute_error_classes"] == pytest.approx((0 + 2 + 0 + 1) / 4)
    assert found["quadratic_weighted_kappa"] == pytest.approx(1 - (5 / 4) / ((6 + 6 + 2 + 6) / 16))
    assert "mean_absolute_error_log10_dose" not in found


def test_groups_of_classes_are_scored_by_the_sum_of_their_probabilities():
    classes, groups = ["a", "b", "c", "d"], {"few": ["a", "b"], "many": ["c"]}
    probabilities = np.array([[0.3, 0.3, 0.4, 0], [0.4, 0.1, 0.5, 0], [0.1, 0.2, 0.7, 0], [0, 0, 0.2, 0.8]])
    found = score(["a", "b", "c", "d"], probabilities, classes, groups=groups)
    # few .6 right, a tie goes to the first, many .7 right; d is in no group
    assert found["group_macro_f1"] == 1
    assert found["accuracy"] == 2 / 4
    wrong = score(["c", "b", "c", "d"], probabilities, classes, groups=groups)
    assert wrong["group_macro_f1"] == pytest.approx((2 * 1 * 0.5 / 1.5 + 2 * 1 * 0.5 / 1.5) / 2)
    task = load_study("demo_strategies", task="nutlin_4class")
    assert task.ordered
    assert {name for names in task.groups.values() for name in names} == set(task.classes)


def test_coverage_curve_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.4, 0.6]])
    table = coverage_curve(["a", "a", "a", "b"], probabilities, ["a", "b"])
    assert table["threshold"].tolist() == [0.9, 0.8, 0.6]  # two cells at 0.8, one of them wrong, come together
    assert table["coverage"].tolist() == [1 / 4, 3 / 4, 1]
    np.testing.assert_allclose(table["accuracy"], [1, 2 / 3, 3 / 4])
    with pytest.raises(UserError, match="no class of this run: z"):
        coverage_curve(["z"], np.array([[1.0, 0.0]]), ["a", "b"])


def test_macro_f1_counts_every_class_the_same():
    """Predicting the frequent class always is right for most cells and worthless for macro-F1."""
    found = scored(["b"] * 99 + ["a"], np.tile([0.9, 0.1], (100, 1)))
    assert (found["accuracy"], found["recall:a"]) == (0.99, 0)
    assert found["macro_f1"] < 0.5


def test_a_class_without_test_cells_has_no_recall_and_no_say():
    probabilities = np.c_[PROBABILITIES, np.zeros(4)]
    found = scored(probabilities=probabilities, classes=["b", "a", "rare"])
    assert np.isnan(found["recall:rare"])
    macro = ["macro_f1", "balanced_accuracy", "macro_auroc", "macro_average_precision"]
    assert found[macro].to_dict() == pytest.approx(scored()[macro].to_dict())
    probabilities[1] = [0.3, 0.1, 0.6]  # a cell that is taken for it counts for its own class only
    found = scored(probabilities=probabilities, classes=["b", "a", "rare"])
    # F1 of b: precision 1, recall 1/3; of a: precision 1/2, recall 1
    assert found["macro_f1"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert found["precision:rare"] == 0


def test_the_order_of_the_classes_does_not_change_the_scores():
    turned = scored(probabilities=PROBABILITIES[:, ::-1], classes=CLASSES[::-1])
    assert turned.to_dict() == pytest.approx(scored().to_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [], "probabilities": np.empty((0, 2))}, "no test cells"),
        ({"labels": LABELS[:3]}, r"shape \(4, 2\), expected \(3, 2\)"),
        ({"classes": ["b", "a", "c"]}, r"expected \(4, 3\)"),
        ({"labels": ["b", "b", "b", "z"]}, "no class of this run: z"),
        ({"probabilities": PROBABILITIES * np.nan}, "4 of 4 test cells are negative, NaN"),
        ({"probabilities": PROBABILITIES * 3}, "do not sum to 1"),
        ({"probabilities": np.array([[1.5, -0.5], *PROBABILITIES[1:]])}, "1 of 4 test cells are negative"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        scored(**change)


def test_confusion_counts_cells_of_all_runs_in_the_order_of_the_classes():
    run = pd.DataFrame({"label": LABELS, "predicted": ["b", "b", "a", "a"]})
    table = confusion(run, CLASSES)
    assert table.index.tolist() == table.columns.tolist() == CLASSES
    assert table.to_numpy().tolist() == [[2, 1], [0, 1]]
    both = pd.concat([run, run]).astype("category")
    assert confusion(both, [*CLASSES, "rare"]).to_numpy().tolist() == [[4, 2, 0], [0, 2, 0], [0, 0, 0]]
    assert confusion(run).index.tolist() == ["a", "b"]
    assert confusion(run[:0]).empty
    assert np.trace(table) / table.to_numpy().sum() == scored()["accuracy"]
