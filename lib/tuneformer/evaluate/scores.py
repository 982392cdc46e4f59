"""Scores of one run on its test cells, and the tables behind some of them.

In: the true class and the predicted probabilities of each test cell. Out: how many cells are right (accuracy, macro_f1,
recall ...), how well they are ranked (macro_auroc ...), whether the probabilities can be believed (log_loss ...), how
far off ordered classes are; calibration and coverage curves, and counts of true by predicted class.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from tuneformer.artifacts import UserError

CALIBRATION_BINS = 10
CALIBRATED_DRAWS = 200  # of labels, for the calibration error of a model whose probabilities are right
MICROMOLAR = {"p": 1e-6, "n": 1e-3, "u": 1.0, "µ": 1.0, "μ": 1.0, "m": 1e3, "": 1e6}  # Unicode has two signs for micro
DOSE = re.compile(rf"(?P<number>\d+(\.\d+)?([eE][-+]?\d+)?) ?(?P<prefix>[{''.join(MICROMOLAR)}]?)M")


def score(
    labels: Sequence[str],
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    ordered: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Score the predictions of one run; the predicted class of a cell is its most probable one.

    Parameters
    ----------
    labels
        True class of each test cell.
    probabilities
        (cells, classes), columns in the order of `classes`; a row sums to 1.
    classes
        Names of the classes. Where all are doses (see `dose_values`), doses are scored too.
    ordered
        The classes are in order: how far off they are is scored too.
    groups
        Names of groups to the classes in them, which are scored too, by the sum of their probabilities.

    Returns
    -------
    In this order; what cannot be computed is NaN.

    ``accuracy``, ``macro_f1``, ``balanced_accuracy``, ``weighted_f1``
        Share of cells predicted right; mean F1 and mean recall of the classes that have test cells; mean F1 weighted by
        the cells of the classes (all as scikit-learn).
    ``macro_auroc``, ``macro_average_precision``
        Each class against the rest, ranked by its probability; mean over the classes that have test cells, NaN unless
        there are two of them.
    ``log_loss``
        Nats per cell, at most 36 (probabilities are clipped at the machine epsilon); NaN for a single class.
    ``expected_calibration_error``
        Distance of confidence and accuracy over the bins of `reliability_curve`, weighted by their cells (Guo et al.
        2017, arXiv:1706.04599, equation 3).
    ``calibrated_error``
        The same that a model would show on so many cells whose probabilities are right: the mean over labels drawn from
        its confidences. It is above 0, and the more so the fewer cells there are (Roelofs et al. 2022,
        arXiv:2012.08668).
    ``area_under_risk_coverage``
        Mean over the cells of the share predicted wrong among those predicted at least as confidently (Geifman and
        El-Yaniv 2017, arXiv:1705.08500): 0 is perfect; confidence that says nothing gives 1 - accuracy.
    ``quadratic_weighted_kappa``, ``mean_absolute_error_classes``
        Ordered classes and doses only: agreement beyond chance, where n places off in the order of the classes count n
        squared; mean number of places off.
    ``mean_absolute_error_log10_dose``
        Doses only, and only if none is 0 (a vehicle has no logarithm, and to leave its cells out would reward calling a
        cell vehicle when in doubt): mean distance in powers of ten.
    ``group_macro_f1``
        Groups only: macro-F1 of the groups, over the cells whose class is in one.
    ``precision:<class>``, ``recall:<class>``
        NaN for a class never predicted; NaN for a class without test cells.

    Raises
    ------
    UserError
        No cells, shapes that do not fit, an unknown label, or probabilities that are not probabilities.
    """
    from sklearn import metrics

    true, probabilities, classes = _checked(labels, probabilities, classes)
    predicted = np.asarray(classes)[probabilities.argmax(axis=1)]
    options = {"labels": classes, "zero_division": np.nan}
    tested = set(true)
    found = {
        "accuracy": metrics.accuracy_score(true, predicted),
        "macro_f1": metrics.f1_score(true, predicted, average="macro", labels=[c for c in classes if c in tested]),
        "balanced_accuracy": metrics.recall_score(true, predicted, average="macro", **options),
        "weighted_f1": metrics.f1_score(true, predicted, average="weighted", **options),
    }
    found |= _of_probabilities(true, probabilities, classes)
    doses = dose_values(classes)
    if doses is not None or ordered:
        found |= _of_order(true, predicted, classes, doses)
    if groups:
        found["group_macro_f1"] = _of_groups(true, probabilities, classes, groups)
    for name, measure in {"precision": metrics.precision_score, "recall": metrics.recall_score}.items():
        values = measure(true, predicted, average=None, **options)
        found |= {f"{name}:{one}": value for one, value in zip(classes, values, strict=True)}
    return {name: float(value) for name, value in found.items()}


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
    """Compare the confidence of the predictions, their highest probability, with how often they are right.

    Parameters and errors as `score`.

    Returns
    -------
    One row per bin, from the least confident: ``cells``, about as many in each (equal confidences share a bin), and
    their mean ``confidence`` and ``accuracy``.
    """
    confidence, right = _confidence(labels, probabilities, classes)
    table = pd.DataFrame({"cells": 1, "confidence": confidence, "accuracy": right.astype(float)})
    steps = {"cells": "sum", "confidence": "mean", "accuracy": "mean"}
    return table.groupby(_bins(confidence, bins)).agg(steps).reset_index(drop=True)


def coverage_curve(labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Say how accurate the predictions are if only the most confident are given, and the model abstains from the rest.

    Parameters and errors as `score`.

    Returns
    -------
    One row for each confidence that occurs, falling: ``coverage`` (share of the cells predicted at least as
    confidently), ``accuracy`` (of these) and ``threshold`` (the confidence). The last row has all cells.
    """
    confidence, right = _confidence(labels, probabilities, classes)
    by_threshold = pd.Series(right).groupby(confidence).agg(["size", "sum"]).sort_index(ascending=False).cumsum()
    return pd.DataFrame(
        {
            "coverage": (by_threshold["size"] / len(right)).to_numpy(),
            "accuracy": (by_threshold["sum"] / by_threshold["size"]).to_numpy(),
            "threshold": by_threshold.index.to_numpy(),
        }
    )


def confusion(predictions: pd.DataFrame, classes: Sequence[str] | None = None) -> pd.DataFrame:
    """Count test cells by true class (rows) and predicted class (columns).

    Parameters
    ----------
    predictions
        Columns label and predicted, of one run or of several, whose counts are added up.
    classes
        In the order wanted; None takes those that occur, sorted.
    """
    label, predicted = (predictions[name].astype(str).to_numpy() for name in ("label", "predicted"))
    classes = sorted({*label, *predicted}) if classes is None else list(classes)
    table = pd.crosstab(label, predicted).reindex(index=classes, columns=classes, fill_value=0)
    return table.rename_axis(index="label", columns="predicted").astype(int)


def _of_probabilities(true: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> dict[str, float]:
    """Return the scores that depend on the probabilities, not only on the most probable class."""
    from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

    numbers = pd.Index(classes).get_indexer(true)
    is_class = numbers[:, None] == np.arange(len(classes))  # (cells, classes)
    found = dict.fromkeys(["macro_auroc", "macro_average_precision", "log_loss"], np.nan)
    present = is_class.any(axis=0)
    if present.sum() > 1:
        tested = is_class[:, present], probabilities[:, present]
        found["macro_auroc"] = roc_auc_score(*tested, average="macro")
        found["macro_average_precision"] = average_precision_score(*tested, average="macro")
    if len(classes) > 1:
        exact = probabilities / probabilities.sum(axis=1, keepdims=True)  # float32 sums to 1 but for its rounding
        found["log_loss"] = log_loss(numbers, exact, labels=range(len(classes)))
    curve = coverage_curve(true, probabilities, classes)
    added = curve["coverage"].diff().fillna(curve["coverage"])
    confidence, right = _confidence(true, probabilities, classes)
    drawn = np.random.default_rng(0).random((CALIBRATED_DRAWS, len(true))) < confidence
    found["expected_calibration_error"] = _calibration_errors(confidence, right[None])[0]
    found["calibrated_error"] = _calibration_errors(confidence, drawn).mean()
    found["area_under_risk_coverage"] = ((1 - curve["accuracy"]) * added).sum()
    return found


def _bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each cell, from 0; equal confidences are in one."""
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.unique(np.digitize(confidence, edges, right=True), return_inverse=True)[1]


def _calibration_errors(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the calibration error of each row of `right`, (draws, cells)."""
    bins = _bins(confidence, CALIBRATION_BINS)
    sums = (right - confidence) @ (bins[:, None] == np.arange(bins.max() + 1))  # (draws, bins)
    return np.abs(sums).sum(axis=1) / len(confidence)


def _of_order(
    true: np.ndarray, predicted: np.ndarray, classes: list[str], doses: np.ndarray | None
) -> dict[str, float]:
    """Return the scores that depend on the order of the classes, and on the size of doses."""
    from sklearn.metrics import cohen_kappa_score

    ordered = classes if doses is None else [classes[place] for place in np.argsort(doses, kind="stable")]
    place = pd.Series(range(len(ordered)), index=ordered)
    found = {"quadratic_weighted_kappa": np.nan}
    if len({*true, *predicted}) > 1:
        found["quadratic_weighted_kappa"] = cohen_kappa_score(true, predicted, labels=ordered, weights="quadratic")
    found["mean_absolute_error_classes"] = np.abs(place[true].to_numpy() - place[predicted].to_numpy()).mean()
    if doses is not None and (doses > 0).all():
        power = pd.Series(np.log10(doses), index=classes)
        found["mean_absolute_error_log10_dose"] = np.abs(power[true].to_numpy() - power[predicted].to_numpy()).mean()
    return found


def _of_groups(
    true: np.ndarray, probabilities: np.ndarray, classes: list[str], groups: Mapping[str, Sequence[str]]
) -> float:
    """Return the macro-F1 of groups of classes."""
    from sklearn.metrics import f1_score

    group_of = {name: group for group, names in groups.items() for name in names}
    names = [*groups]
    sums = np.column_stack(
        [probabilities[:, [group_of.get(one) == name for one in classes]].sum(axis=1) for name in names]
    )
    grouped = np.array([group_of.get(name, "") for name in true])
    tested = grouped != ""
    called = np.array(names)[sums.argmax(axis=1)]
    present = [name for name in names if name in grouped]
    return f1_score(grouped[tested], called[tested], average="macro", labels=present) if present else np.nan


def _confidence(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest probability of each cell, and whether it is that of the true class."""
    true, probabilities, classes = _checked(labels, probabilities, classes)
    return probabilities.max(axis=1), np.asarray(classes)[probabilities.argmax(axis=1)] == true


def _checked(
    labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return true labels, probabilities and classes as `score` needs them, or raise `UserError`."""
    true, classes, probabilities = np.asarray(labels, dtype=str), list(classes), np.asarray(probabilities, dtype=float)
    if not len(true):
        msg = "There are no test cells to score; check the split of this task."
        raise UserError(msg)
    if probabilities.shape != (len(true), len(classes)):
        msg = (
            f"The probabilities have shape {probabilities.shape}, expected ({len(true)}, {len(classes)}): "
            "one row per test cell, one column per class."
        )
        raise UserError(msg)
    unknown = sorted(set(true) - set(classes))
    if unknown:
        msg = f"The test cells have labels that are no class of this run: {', '.join(unknown)}."
        raise UserError(msg)
    wrong = ~(np.isclose(probabilities.sum(axis=1), 1, atol=1e-3) & (probabilities >= 0).all(axis=1))
    if wrong.any():
        msg = (
            f"The probabilities of {wrong.sum()} of {len(true)} test cells are negative, NaN or do not sum to 1; "
            "the training diverged or the scores were not passed through a softmax."
        )
        raise UserError(msg)
    return true, probabilities, classes
