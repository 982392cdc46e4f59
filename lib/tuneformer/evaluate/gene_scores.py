"""How well genes of two classes are told apart, one vote a gene.

In: a score for each gene, its class, and the fold in which it was tested. Out: the area under the ROC curve with an
interval, and a threshold. Scores are compared within a fold only: those of two folds come from two models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import roc_curve

RESAMPLES = 2000  # of the genes, for an interval
CONFIDENCE = 0.95


class GeneInterval(NamedTuple):
    """A value and its 95 % bootstrap interval over genes."""

    value: float
    low: float
    high: float


def pair_auc(scores: np.ndarray, target: np.ndarray, fold: np.ndarray) -> float:
    """Return the share of pairs (a positive and a negative gene of one fold) whose positive has the higher score.

    A tie counts one half. With one fold this is the area under the ROC curve; with several it is their mean, weighted
    by the number of pairs (the covariate-adjusted AUC of Janes and Pepe 2009, doi:10.1093/biomet/asp002, with the fold
    as the covariate). Pooled scores of all folds would also compare scores of different models, which shifts the area
    below one half when there is nothing to find.

    Parameters
    ----------
    scores, target, fold
        Score, 1 or 0, and fold of each gene; a gene with the score NaN is left out.

    Returns
    -------
    0 to 1; NaN if no fold has genes of both classes.
    """
    won = [_won(scores, *sides) for sides in _sides(scores, target, fold)]
    n_pairs = sum(matrix.size for matrix in won)
    return float(sum(matrix.sum() for matrix in won) / n_pairs) if n_pairs else np.nan


def auc_interval(scores: Sequence[np.ndarray], target: np.ndarray, fold: np.ndarray) -> GeneInterval:
    """Return the mean of `pair_auc` over several scores of the same genes (seeds), with its interval.

    Genes are drawn with replacement within fold and class, the same for all seeds. The interval says how the value
    depends on which genes are listed; it holds the fitted models as they are.

    Parameters
    ----------
    scores
        Scores of the genes, one array a seed. Where one is NaN, all are.
    target, fold
        As `pair_auc`.
    """
    return _interval(scores, None, target, fold)


def auc_difference(
    scores: Sequence[np.ndarray], others: Sequence[np.ndarray], target: np.ndarray, fold: np.ndarray
) -> GeneInterval:
    """Return the difference of two means of `pair_auc`, with its interval: the same genes are drawn for both.

    Parameters
    ----------
    scores, others
        Scores of the genes by two methods, one array a seed each.
    target, fold
        As `pair_auc`.
    """
    return _interval(scores, others, target, fold)


def best_threshold(scores: np.ndarray, target: np.ndarray) -> float:
    """Return the threshold with the highest balanced accuracy, half-way between two scores; of several the highest.

    Genes with a score above it are called positive. A gene with the score NaN is left out.
    """
    known = ~np.isnan(scores)
    false, true, thresholds = roc_curve(target[known], scores[known], drop_intermediate=False)
    best = int(np.argmax(true - false))
    if best == 0:
        return float(scores[known].max())  # nothing is positive
    below = scores[known][scores[known] < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if len(below) else float(np.nextafter(thresholds[best], -np.inf))


def _sides(scores: np.ndarray, target: np.ndarray, fold: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows of the positive and of the negative genes with a score, for each fold that has both."""
    known = ~np.isnan(scores)
    sides = [
        (np.flatnonzero(known & (fold == one) & (target == 1)), np.flatnonzero(known & (fold == one) & (target == 0)))
        for one in np.unique(fold)
    ]
    return [(positive, negative) for positive, negative in sides if len(positive) and len(negative)]


def _won(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return 1, 0 or, for a tie, one half for each pair, (positive, negative)."""
    difference = scores[positive][:, None] - scores[negative][None, :]
    return (np.sign(difference) + 1) / 2


def _interval(
    scores: Sequence[np.ndarray], others: Sequence[np.ndarray] | None, target: np.ndarray, fold: np.ndarray
) -> GeneInterval:
    rng = np.random.default_rng(0)
    total, drawn, n_pairs = 0.0, np.zeros(RESAMPLES), 0
    for positive, negative in _sides(scores[0], target, fold):
        won = np.mean([_won(one, positive, negative) for one in scores], axis=0)
        if others is not None:
            won = won - np.mean([_won(one, positive, negative) for one in others], axis=0)
        times = [
            rng.multinomial(len(side), np.full(len(side), 1 / len(side)), RESAMPLES) for side in (positive, negative)
        ]
        drawn += np.einsum("bi,ij,bj->b", times[0], won, times[1], optimize=True)
        total += won.sum()
        n_pairs += won.size
    if not n_pairs:
        return GeneInterval(np.nan, np.nan, np.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn / n_pairs, [tail, 1 - tail])
    return GeneInterval(float(total / n_pairs), float(low), float(high))
