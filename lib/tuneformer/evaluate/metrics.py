"""Scores of one run on its test cells.

In: the true class and the predicted probabilities of each test cell. Out: tidy rows (metric, value): accuracy,
macro_f1, ``recall:<class>`` and ``confusion:<true>:<predicted>``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

if TYPE_CHECKING:
    from tuneformer.finetune.training import Outcome


class ScoreError(ValueError):
    """Labels or probabilities that cannot be scored; the message says why."""


def score_run(outcome: "Outcome") -> pd.DataFrame:
    """Score the test cells of a run with `score`; a run that failed has no predictions and gives an empty table."""
    if outcome.status != "ok":
        return pd.DataFrame({"metric": pd.Series(dtype=str), "value": pd.Series(dtype=float)})
    return score(outcome.predictions["label"], outcome.probabilities, outcome.classes)


def score(labels: Sequence[str], probabilities: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """Score the predictions of one run; the predicted class of a cell is its most probable one.

    Parameters
    ----------
    labels
        True class of each test cell, (cells,).
    probabilities
        Probability of each class, (cells, classes), columns in the order of `classes`; a row sums to 1.
    classes
        Names of the classes.

    Returns
    -------
    Columns metric and value. ``accuracy``: share of cells predicted right. ``macro_f1``: mean over the classes of the
    harmonic mean of precision and recall (scikit-learn's ``f1_score``; a class neither present nor predicted is left
    out). ``recall:<class>``: share of the cells of a class predicted right, NaN for a class without test cells.
    ``confusion:<true>:<predicted>``: number of cells.

    Raises
    ------
    ScoreError
        No cells, shapes that do not fit, an unknown label, or probabilities that are not probabilities.
    """
    true, classes, probabilities = np.asarray(labels, dtype=str), list(classes), np.asarray(probabilities, dtype=float)
    _check(true, probabilities, classes)
    predicted = np.asarray(classes)[probabilities.argmax(axis=1)]
    options = {"labels": classes, "zero_division": np.nan}
    rows = {
        "accuracy": accuracy_score(true, predicted),
        "macro_f1": f1_score(true, predicted, average="macro", **options),
    }
    recalls = recall_score(true, predicted, average=None, **options)
    rows |= {f"recall:{name}": value for name, value in zip(classes, recalls, strict=True)}
    counts = confusion_matrix(true, predicted, labels=classes)
    rows |= {
        f"confusion:{row}:{column}": counts[i, j] for i, row in enumerate(classes) for j, column in enumerate(classes)
    }
    return pd.DataFrame({"metric": list(rows), "value": [float(value) for value in rows.values()]})


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


def _check(true: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> None:
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
