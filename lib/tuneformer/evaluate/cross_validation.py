"""What the folds of a cross-validation say together.

In: rows of ``metrics.csv`` and of ``predictions.parquet`` with a fold. Out: scores with their spread over the folds,
and pooled over the cells; the accuracy of each class with its interval; differences of treatments with a p value that
knows that the training cells of the folds overlap; ROC curves.

All seeds of a study have the same folds, so a seed is no further fold: where there are several, seeds are averaged
first. Over the folds every cell is tested once: pooled scores are those of all cells, of the one model that each met.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import auc, f1_score, roc_curve

from tuneformer.evaluate.comparisons import LEVEL, PROBABILITY, Difference, holm, resampled_t_test
from tuneformer.evaluate.statistics import CONFIDENCE, SCORES, with_arms
from tuneformer.study.treatments import BASELINES

MACRO = "macro average"
RUN = ("task", "train_set", "strategy")
FEW = 3  # treatments are named
RARE = 50  # cells of a class, over all folds
ROC_POINTS = 200  # of the curve of a class


class FoldError(ValueError):
    """Predictions that are not those of a cross-validation; the message says why."""


def fold_table(metrics: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and macro-F1 of each arm: mean and spread over the folds, and pooled over all cells.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``; those without a fold are left out.
    predictions
        Rows of ``predictions.parquet``.

    Returns
    -------
    One row a task, arm and metric: ``folds`` and ``seeds`` with a score; ``mean`` and ``sd`` over the folds (the seeds
    of a fold averaged); ``pooled``, from the predictions of all cells, averaged over the seeds that finished all folds,
    NaN if none did. A macro-F1 is not the mean of those of its parts: with few cells of a class in a fold, the pooled
    one is the better estimate.

    Raises
    ------
    FoldError
        A cell was tested twice by runs of one arm and seed.
    """
    pooled = _pooled(predictions)
    rows = []
    for (*run, arm, metric), part in _scores(metrics).groupby([*RUN, "arm", "metric"], sort=False):
        by_fold = part.groupby("fold")["value"].mean()
        row = {"task": run[0], "arm": arm, "metric": metric, "folds": len(by_fold), "seeds": part["seed"].nunique()}
        found = [_score(cells, metric) for cells in pooled.get(tuple(run), [])]
        row |= {"mean": by_fold.mean(), "sd": by_fold.std(), "pooled": np.mean(found) if found else np.nan}
        rows.append(row)
    columns = ["task", "arm", "metric", "folds", "seeds", "mean", "sd", "pooled"]
    return pd.DataFrame(rows, columns=columns)


def class_table(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of each class (its recall), pooled over the folds.

    Parameters
    ----------
    predictions
        As `fold_table`.

    Returns
    -------
    One row a task, arm and class, the largest class first: ``cells``; ``accuracy``, the share of them predicted right,
    averaged over the seeds that finished all folds; ``low`` and ``high``, its 95 % interval after Wilson for so many
    cells (1927, Journal of the American Statistical Association 22:209). More seeds do not make it narrower: it is the
    interval for other cells of the class. It does not know that cells of a donor are alike.

    Raises
    ------
    FoldError
        As `fold_table`.
    """
    rows = []
    for run, seeds in _pooled(predictions).items():
        counts = seeds[0]["label"].value_counts()
        right = [(cells["label"] == cells["predicted"]).groupby(cells["label"]).mean() for cells in seeds]
        shares = sum(right) / len(right)
        for label, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            low, high = wilson(shares[label], n)
            row = {"label": label, "cells": n, "accuracy": shares[label], "low": low, "high": high}
            rows.append(dict(zip(RUN, run, strict=True)) | row)
    table = with_arms(pd.DataFrame(rows, columns=[*RUN, "label", "cells", "accuracy", "low", "high"]))
    return table[["task", "arm", "label", "cells", "accuracy", "low", "high"]]


def compare_folds(metrics: pd.DataFrame) -> pd.DataFrame:
    """Compare every two arms of each task over the folds by `tuneformer.evaluate.comparisons.resampled_t_test`.

    Parameters
    ----------
    metrics
        As `fold_table`.

    Returns
    -------
    One row a task, metric and pair, the better arm first: ``a``, ``b``, ``score_a``, ``score_b`` (means over the folds
    that both have), ``difference``, ``low`` and ``high`` (95 % interval, of this pair alone), ``p``, ``p_holm`` (Holm's
    correction over all pairs of the task and metric), ``folds``. With fewer than two common folds interval and p are
    NaN.
    """
    tables = []
    for (task, metric), part in _scores(metrics).groupby(["task", "metric"], sort=False):
        runs = part.set_index(["fold", "seed", "arm"])[["value", "n_train", "n_test"]].unstack("arm")
        means = runs["value"].mean().sort_values(ascending=False, kind="stable")
        rows = [_compare_pair(runs, a, b) for a, b in combinations(means.index, 2)]
        table = pd.DataFrame(rows, columns=["a", "b", "score_a", "score_b", *Difference._fields, "folds"])
        tables.append(table.assign(task=task, metric=metric, p_holm=holm(table["p"])))
    columns = ["task", "metric", "a", "b", "score_a", "score_b", "difference", "low", "high", "p", "p_holm", "folds"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def roc_curves(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the ROC curve of each class against the rest, and their average.

    The cells are ranked over all folds together, though the folds' models need not mean the same by a probability:
    where they do not, the area is smaller than the mean of the folds' areas (``macro_auroc``).

    Parameters
    ----------
    scores
        Predictions of one arm and seed, all folds below one another: label and ``probability:<class>`` of each cell.

    Returns
    -------
    ``label`` (a class, or "macro average"), ``fpr`` and ``tpr`` (false and true positive rate, at most 200 points a
    class), ``auc`` (area under the whole curve; of the average, the mean over the classes). Classes without cells, or
    without other cells, have no curve.
    """
    labels = scores["label"].astype(str).to_numpy()
    classes = [column.removeprefix(PROBABILITY) for column in scores if column.startswith(PROBABILITY)]
    classes = [name for name in classes if 0 < (labels == name).sum() < len(labels)]
    curves = {name: roc_curve(labels == name, scores[PROBABILITY + name])[:2] for name in classes}
    if not curves:
        return pd.DataFrame(columns=["label", "fpr", "tpr", "auc"])
    areas = {name: auc(*curve) for name, curve in curves.items()}
    grid = np.linspace(0, 1, ROC_POINTS - 1)
    average = np.mean([np.interp(grid, *curve) for curve in curves.values()], axis=0)  # at 0, the top of the step
    curves[MACRO] = np.r_[0, grid], np.r_[0, average]
    areas[MACRO] = np.mean(list(areas.values()))
    tables = []
    for name, (fpr, tpr) in curves.items():
        length = fpr + tpr  # along the curve, 0 to 2
        kept = np.unique(np.searchsorted(length, np.linspace(0, 2, ROC_POINTS).clip(max=length[-1])))
        tables.append(pd.DataFrame({"label": name, "fpr": fpr[kept], "tpr": tpr[kept], "auc": areas[name]}))
    return pd.concat(tables, ignore_index=True)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share seen in `n` cells, after Wilson 1927 (see `class_table`)."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def _scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of accuracy and macro-F1 of runs of a fold, with their arm."""
    rows = with_arms(metrics[metrics["fold"].notna()])
    return rows[rows["metric"].isin(SCORES)].dropna(subset=["value"])


def _pooled(predictions: pd.DataFrame) -> dict[tuple[str, ...], list[pd.DataFrame]]:
    """Return, by task, train set and strategy, the predictions of each seed that finished all folds of the task."""
    if "fold" not in predictions:
        return {}
    rows = predictions[predictions["fold"].notna()]
    rows = rows.astype(dict.fromkeys((*RUN, "cell", "label", "predicted"), str))
    folds = rows.groupby("task")["fold"].unique()
    found: dict[tuple[str, ...], list[pd.DataFrame]] = {}
    for (*run, seed), cells in rows.groupby([*RUN, "seed"], sort=False):
        if cells["cell"].duplicated().any():
            twice = cells.loc[cells["cell"].duplicated(), "cell"].iloc[0]
            msg = f"{', '.join(run)}, seed {seed}: cell {twice!r} is tested in more than one fold; run 01_qc again."
            raise FoldError(msg)
        if set(cells["fold"]) == set(folds[run[0]]):
            found.setdefault(tuple(run), []).append(cells)
    return found


def _score(cells: pd.DataFrame, metric: str) -> float:
    """Score pooled predictions as `tuneformer.evaluate.metrics.score` does those of a run."""
    label, predicted = cells["label"], cells["predicted"]
    if metric == "accuracy":
        return float((label == predicted).mean())
    return float(f1_score(label, predicted, labels=label.unique(), average="macro"))


def _compare_pair(runs: pd.DataFrame, a: str, b: str) -> dict[str, float | str]:
    """Return a row of `compare_folds`; `runs` has a row a fold and seed, and columns (value ..., arm)."""
    both = runs[runs["value"][[a, b]].notna().all(axis=1)]
    by_fold = both.groupby("fold").mean()
    scores = by_fold["value"]
    row = {"a": a, "b": b, "score_a": scores[a].mean(), "score_b": scores[b].mean(), "folds": len(by_fold)}
    differences = scores[a] - scores[b]
    if len(by_fold) < 2:
        return row | Difference(differences.mean(), np.nan, np.nan, np.nan, np.nan)._asdict()
    sizes = {part: float(by_fold[part][[a, b]].to_numpy().mean()) for part in ("n_train", "n_test")}
    return row | resampled_t_test(differences, **sizes)._asdict()


def sentences(metrics: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, list[str]]:
    """Say what the treatments of a cross-validation do beside the first of them, for all classes and for rare ones.

    Parameters
    ----------
    metrics, predictions
        As `fold_table`.

    Returns
    -------
    For each task with several treatments of one train set: the macro-F1 against the first treatment, over the folds,
    with Holm's correction over these comparisons; the best baseline; and the accuracy on cells of rare classes, those
    with fewer than `RARE` cells, pooled over the folds.
    """
    scores = _scores(metrics)
    scores = scores[scores["metric"] == "macro_f1"]
    classes = class_table(predictions)
    found = {}
    for task, rows in scores.groupby("task", sort=False):
        wide = rows.pivot(index=["fold", "seed"], columns="arm", values=["value", "n_train", "n_test"])
        arms = [arm for arm in dict.fromkeys(rows["arm"]) if arm not in BASELINES]
        if len(arms) > 1 and rows["fold"].nunique() > 1 and rows["train_set"].nunique() == 1:
            found[task] = [*_against_first(wide, arms), *_on_baselines(rows), *_on_rare(classes, task, arms)]
    return found


def _against_first(wide: pd.DataFrame, arms: list[str]) -> list[str]:
    first, *others = arms
    pairs = pd.DataFrame([_compare_pair(wide, arm, first) for arm in others])
    pairs = pairs[pairs["folds"] > 1].reset_index(drop=True)
    if pairs.empty:
        return []
    pairs["p_holm"] = holm(pairs["p"])
    clear = pairs["p_holm"] < LEVEL
    groups = {
        "clearly higher with": pairs[clear & (pairs["difference"] > 0)],
        "clearly lower with": pairs[clear & (pairs["difference"] < 0)],
    }
    parts = [
        f"{how} {', '.join(f'{row.a} ({row.difference:+.3f})' for row in part.itertuples())}"
        for how, part in groups.items()
        if len(part)
    ]
    alike = list(pairs["a"][~clear])
    rest = ", ".join(alike) if len(alike) <= FEW else f"the other {len(alike)}"
    parts += [f"not clearly different with {rest}"] if (~clear).any() else []
    folds, score = pairs["folds"].iloc[0], pairs["score_b"].iloc[0]
    return [f"Beside {first}, {score:.3f} over {folds} folds, macro-F1 is {'; '.join(parts)}."]


def _on_baselines(rows: pd.DataFrame) -> list[str]:
    means = rows.groupby("arm")["value"].mean()
    baselines = means[means.index.isin(BASELINES)]
    tuned = means.drop(baselines.index)
    if baselines.empty or tuned.empty:
        return []
    best, name = tuned.idxmax(), baselines.idxmax()
    return [
        f"The highest mean is that of {best}, {tuned[best]:.3f}; the best baseline is {name}, {baselines[name]:.3f}."
    ]


def _on_rare(classes: pd.DataFrame, task: str, arms: list[str]) -> list[str]:
    rare = classes[(classes["task"] == task) & (classes["cells"] < RARE)]
    if rare.empty:
        return []
    arms = [arm for arm in arms if arm in set(rare["arm"])]  # one whose run failed in a fold has no pooled accuracy
    if not arms:
        return []
    right = (rare["accuracy"] * rare["cells"]).groupby(rare["arm"]).sum() / rare.groupby("arm")["cells"].sum()
    names = list(dict.fromkeys(rare["label"]))
    tuned, baselines = right[right.index.isin(arms)], right[right.index.isin(BASELINES)]
    best = tuned.idxmax()
    text = (
        f"Of the cells of the {len(names)} classes with fewer than {RARE} cells, {arms[0]} finds {right[arms[0]]:.0%}"
    )
    text += f", {best} the most, {right[best]:.0%}" if best != arms[0] else ", the most of all treatments"
    text += f"; the best baseline, {baselines.idxmax()}, {baselines.max():.0%}" if len(baselines) else ""
    return [f"{text}."]
