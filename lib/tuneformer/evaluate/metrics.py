"""Scores of one run on its test cells.

In: the true class and the predicted probabilities of each test cell. Out: tidy rows (metric, value): how many cells are
right (accuracy, macro_f1, recall ...), how well they are ranked (macro_auroc ...), whether the probabilities can be
believed (log_loss, expected_calibration_error), how far off doses are; and the curves behind some of these numbers.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    precision_score,
    recall_score,
    roc_auc_score,
)

if TYPE_CHECKING:
    from tuneformer.finetune.training import Outcome

CALIBRATION_BINS = 15
MICROMOLAR = {"p": 1e-6, "n": 1e-3, "u": 1.0, "µ": 1.0, "μ": 1.0, "m": 1e3, "": 1e6}  # Unicode has two signs for micro
DOSE = re.compile(rf"(?P<number>\d+(\.\d+)?([eE][-+]?\d+)?) ?(?P<prefix>[{''.join(MICROMOLAR)}]?)M")


class ScoreError(ValueError):
    """Labels or probabilities that cannot be scored; the message says why."""


def score_run(outcome: "Outcome") -> pd.DataFrame:
    """Score the test cells of a run with `score`; a run that failed has no predictions and gives an empty table."""
    if outcome.status != "ok":
        return pd.DataFrame({"metric": pd.Series(dtype=str), "value": pd.Series(dtype=float)})
    labels, doses = outcome.predictions["label"], dose_values(outcome.classes)
    return score(labels, outcome.probabilities, outcome.classes, doses=doses)


def score(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str], *, doses: np.ndarray | None = None
) -> pd.DataFrame:
    """Score the predictions of one run; the predicted class of a cell is its most probable one.

    Parameters
    ----------
    labels
        True class of each test cell, (cells,).
    probabilities
        Probability of each class, (cells, classes), columns in the order of `classes`; a row sums to 1.
    classes
        Names of the classes.
    doses
        Dose of each class in any one unit, from `dose_values`; None for classes that are no doses.

    Returns
    -------
    Columns metric and value, in this order; what cannot be computed is NaN.

    ``accuracy``
        Share of cells predicted right.
    ``macro_f1``
        Mean over the classes that have test cells of the harmonic mean of precision and recall (scikit-learn's
        ``f1_score``). A test set of whole groups may lack a class.
    ``balanced_accuracy``
        Mean recall of the classes that have test cells.
    ``weighted_f1``
        The mean of F1 weighted by the test cells of the classes.
    ``macro_auroc``, ``macro_average_precision``
        Area under the ROC curve and average precision of each class against the rest, ranked by its probability; their
        mean over the classes that have test cells. NaN unless there are two of them.
    ``log_loss``
        Mean of -ln(probability of the true class), nats per cell. Probabilities are clipped at the machine epsilon, as
        scikit-learn does: no cell counts more than 36 nats. NaN for a single class.
    ``expected_calibration_error``
        Mean distance of confidence and accuracy over the bins of `reliability_curve`, weighted by their cells (Guo et
        al. 2017, arXiv:1706.04599, equation 3, with their 15 bins).
    ``area_under_risk_coverage``
        Mean over the test cells of the share predicted wrong among the cells predicted at least as confidently
        (Geifman and El-Yaniv 2017, arXiv:1705.08500): 0 is perfect; confidence that says nothing gives 1 - accuracy.
    ``quadratic_weighted_kappa``
        With `doses` only. Agreement of true and predicted dose beyond chance, where a prediction n places off in the
        order of the doses counts n squared (scikit-learn's ``cohen_kappa_score``); NaN if one class is all there is.
    ``mean_absolute_error_log10_dose``
        With `doses` only, and only if none is 0: mean distance of predicted and true dose, in powers of ten. A vehicle
        class has no logarithm. Leaving out the cells that are, or are taken for, vehicle would reward a model that
        calls a cell vehicle when in doubt, so there is no such row for a task with a vehicle class.
    ``precision:<class>``, ``recall:<class>``
        Share of the cells predicted as a class that are of it, NaN for a class never predicted; share of the cells of a
        class predicted right, NaN for a class without test cells.
    ``confusion:<true>:<predicted>``
        Number of cells.

    Raises
    ------
    ScoreError
        No cells, shapes that do not fit, an unknown label, or probabilities that are not probabilities.
    """
    true, probabilities, classes = _checked(labels, probabilities, classes)
    predicted = np.asarray(classes)[probabilities.argmax(axis=1)]
    options = {"labels": classes, "zero_division": np.nan}
    tested = set(true)
    present = [name for name in classes if name in tested]
    rows = {
        "accuracy": accuracy_score(true, predicted),
        "macro_f1": f1_score(true, predicted, average="macro", labels=present),
        "balanced_accuracy": recall_score(true, predicted, average="macro", **options),
        "weighted_f1": f1_score(true, predicted, average="weighted", **options),
    }
    rows |= _scores_of_probabilities(true, probabilities, classes)
    if doses is not None:
        rows |= _scores_of_doses(true, predicted, classes, np.asarray(doses, dtype=float))
    for name, measure in {"precision": precision_score, "recall": recall_score}.items():
        values = measure(true, predicted, average=None, **options)
        rows |= {f"{name}:{one}": value for one, value in zip(classes, values, strict=True)}
    counts = pd.crosstab(true, predicted).reindex(index=classes, columns=classes, fill_value=0)
    rows |= {f"confusion:{row}:{column}": counts.loc[row, column] for row in classes for column in classes}
    return pd.DataFrame({"metric": list(rows), "value": [float(value) for value in rows.values()]})


def dose_values(classes: Sequence[str]) -> np.ndarray | None:
    """Read the doses that the names of classes state, such as ``0.25 uM`` or ``500 nM``.

    Returns
    -------
    Concentrations in uM, in the order of `classes`; None unless each name is a number and a molar unit (pM to M).
    """
    found = [DOSE.fullmatch(str(name)) for name in classes]
    if not all(found):
        return None
    return np.array([float(match["number"]) * MICROMOLAR[match["prefix"]] for match in found])


def reliability_curve(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str], bins: int = CALIBRATION_BINS
) -> pd.DataFrame:
    """Compare the confidence of the predictions, which is their highest probability, with how often they are right.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 2.

    Parameters
    ----------
    labels, probabilities, classes
        As `score`.
    bins
        Number of bins of equal width from 0 to 1.

    Returns
    -------
    One row a bin: ``low`` and ``high`` (a confidence of exactly ``low`` belongs to the bin below), ``cells``, and their
    mean ``confidence`` and ``accuracy``, NaN in a bin without cells.

    Raises
    ------
    ScoreError
        As `score`.
    """
    confidence, right = _confidence(labels, probabilities, classes)
    edges = np.linspace(0, 1, bins + 1)
    cells = pd.DataFrame({"bin": np.digitize(confidence, edges[1:-1], right=True)})
    cells["confidence"], cells["accuracy"] = confidence, right
    by_bin = cells.groupby("bin")
    means = by_bin[["confidence", "accuracy"]].mean().reindex(range(bins))
    counts = by_bin.size().reindex(range(bins), fill_value=0)
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "cells": counts})
    return table.join(means).rename_axis(index=None)


def coverage_curve(labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Say how accurate the predictions are if only the most confident are given, and the model abstains from the rest.

    Parameters
    ----------
    labels, probabilities, classes
        As `score`.

    Returns
    -------
    One row for each confidence that occurs, falling: ``coverage`` (share of the cells predicted at least as
    confidently), ``accuracy`` (of these) and ``threshold`` (the confidence). The last row has all cells.

    Raises
    ------
    ScoreError
        As `score`.
    """
    confidence, right = _confidence(labels, probabilities, classes)
    cells = pd.DataFrame({"threshold": confidence, "right": right})
    groups = cells.groupby("threshold")["right"].agg(["size", "sum"]).sort_index(ascending=False).cumsum().reset_index()
    accuracy = groups["sum"] / groups["size"]
    return pd.DataFrame(
        {"coverage": groups["size"] / len(cells), "accuracy": accuracy, "threshold": groups["threshold"]}
    )


def confidence_tables(outcome: "Outcome") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `reliability_curve` and `coverage_curve` of a run's test cells; both are empty for a run that failed."""
    if outcome.status != "ok":
        return pd.DataFrame({"confidence": [], "accuracy": []}), pd.DataFrame({"coverage": [], "accuracy": []})
    judged = outcome.predictions["label"], outcome.probabilities, outcome.classes
    return reliability_curve(*judged), coverage_curve(*judged)


def confusion_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the confusion matrix that rows of `score` hold; the counts of several runs are added up.

    Parameters
    ----------
    scores
        Columns metric and value, of one run or of several runs with the same classes.

    Returns
    -------
    Cells, (true classes, predicted classes), in the order of the rows; empty when no run has a score.
    """
    totals = scores.groupby("metric", sort=False)["value"].sum()
    classes = [metric.removeprefix("recall:") for metric in totals.index if metric.startswith("recall:")]
    counts = [[totals[f"confusion:{row}:{column}"] for column in classes] for row in classes]
    return pd.DataFrame(counts, index=classes, columns=classes).astype(int)


def _scores_of_probabilities(true: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> dict[str, float]:
    """Return the rows that depend on the probabilities, not only on the most probable class."""
    number = {name: place for place, name in enumerate(classes)}
    numbers = np.array([number[name] for name in true])
    is_class = numbers[:, None] == np.arange(len(classes))  # (cells, classes)
    rows = dict.fromkeys(["macro_auroc", "macro_average_precision", "log_loss"], np.nan)
    present = is_class.any(axis=0)
    if present.sum() > 1:
        tested = is_class[:, present], probabilities[:, present]
        rows["macro_auroc"] = roc_auc_score(*tested, average="macro")
        rows["macro_average_precision"] = average_precision_score(*tested, average="macro")
    if len(classes) > 1:
        exact = probabilities / probabilities.sum(axis=1, keepdims=True)  # float32 sums to 1 but for its rounding
        rows["log_loss"] = log_loss(numbers, exact, labels=range(len(classes)))
    bins = reliability_curve(true, probabilities, classes)
    gap = (bins["confidence"] - bins["accuracy"]).abs()
    rows["expected_calibration_error"] = (gap * bins["cells"]).sum() / len(true)
    curve = coverage_curve(true, probabilities, classes)
    added = curve["coverage"].diff().fillna(curve["coverage"])
    rows["area_under_risk_coverage"] = ((1 - curve["accuracy"]) * added).sum()
    return rows


def _scores_of_doses(
    true: np.ndarray, predicted: np.ndarray, classes: list[str], doses: np.ndarray
) -> dict[str, float]:
    """Return the rows that depend on the order and the size of the doses."""
    ordered = [classes[place] for place in np.argsort(doses, kind="stable")]
    rows = {"quadratic_weighted_kappa": np.nan}
    if len({*true, *predicted}) > 1:
        rows["quadratic_weighted_kappa"] = cohen_kappa_score(true, predicted, labels=ordered, weights="quadratic")
    if (doses > 0).all():
        power = dict(zip(classes, np.log10(doses), strict=True))
        powers = [[power[name] for name in names] for names in (true, predicted)]
        rows["mean_absolute_error_log10_dose"] = mean_absolute_error(*powers)
    return rows


def _confidence(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest probability of each cell, and whether it is that of the true class."""
    true, probabilities, classes = _checked(labels, probabilities, classes)
    return probabilities.max(axis=1), np.asarray(classes)[probabilities.argmax(axis=1)] == true


def _checked(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return true labels, probabilities and classes as `score` needs them, or raise `ScoreError`."""
    true, classes, probabilities = np.asarray(labels, dtype=str), list(classes), np.asarray(probabilities, dtype=float)
    if not len(true):
        msg = "There are no test cells to score; check the split of this task."
        raise ScoreError(msg)
    if probabilities.shape != (len(true), len(classes)):
        msg = (
            f"The probabilities have shape {probabilities.shape}, expected ({len(true)}, {len(classes)}): "
            "one row per test cell, one column per class."
        )
        raise ScoreError(msg)
    unknown = sorted(set(true) - set(classes))
    if unknown:
        msg = f"The test cells have labels that are no class of this run: {', '.join(unknown)}."
        raise ScoreError(msg)
    wrong = ~(np.isclose(probabilities.sum(axis=1), 1, atol=1e-3) & (probabilities >= 0).all(axis=1))
    if wrong.any():
        msg = (
            f"The probabilities of {wrong.sum()} of {len(true)} test cells are negative, NaN or do not sum to 1; "
            "the training diverged or the scores were not passed through a softmax."
        )
        raise ScoreError(msg)
    return true, probabilities, classes
