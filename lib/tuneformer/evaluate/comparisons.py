"""Which arms of a study differ: paired tests on the same test cells, and where the variance of the scores comes from.

In: the predictions of the runs of a task. Out: the difference of every two arms with its 95 % interval and p value,
corrected for the number of pairs; the groups of arms that cannot be told apart; shares of the variance of the scores.

An arm is what is compared: a strategy, on one train set. Two things are drawn by chance, seeds (training cells, head,
order) and test cells, and a difference must hold for others of both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.evaluate.statistics import CONFIDENCE, with_arms

PROBABILITY = "probability:"
SAMPLES = 2000  # bootstrap samples: the standard error that they give is right within 2 %
LEVEL = round(1 - CONFIDENCE, 9)  # 0.05, not 0.05000000000000004
PAIR = ("a", "b", "score_a", "score_b", "difference", "low", "high", "p", "p_holm", "seeds", "cells", "units")

Predictions = Mapping[str, Mapping[int, pd.DataFrame]]
"""Arm -> seed -> predictions of one run: columns cell, label, ``probability:<class>``."""
Score = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From the number of the true class (cells,), probabilities (cells, classes) and weights (samples, cells) of the cells
to the score of each sample (samples,)."""


class ComparisonError(ValueError):
    """Runs that cannot be compared; the message says why."""


class Difference(NamedTuple):
    """A mean difference, its 95 % interval, the p value of "there is none", and the degrees of freedom of both."""

    difference: float
    low: float
    high: float
    p: float
    df: float


class BootstrapScores(NamedTuple):
    """Scores of runs on their test cells and on test cells drawn again.

    ``runs``: columns arm, seed, value, one row a run. ``drawn``: scores on the drawn cells, the same draws for every
    run, (samples, runs). ``n_cells`` and ``n_units``: number of test cells, and of what was drawn, cells or groups.
    """

    runs: pd.DataFrame
    drawn: np.ndarray
    n_cells: int
    n_units: int


def accuracy(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of the cells whose most probable class is the true one (a `Score`)."""
    right = (probabilities.argmax(axis=1) == labels).astype(float)
    return weights @ right / weights.sum(axis=1)


def macro_f1(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the classes that have cells, as `tuneformer.evaluate.metrics` does (a `Score`).

    The F1 of a class is 2 hits / (true + predicted), so two products of matrices give it for all samples at once.
    """
    classes = np.arange(probabilities.shape[1])
    true = labels[:, None] == classes  # (cells, classes)
    predicted = probabilities.argmax(axis=1)[:, None] == classes
    hits = weights @ (true & predicted).astype(float)  # (samples, classes)
    either = weights @ (true.astype(float) + predicted)
    has_cells = weights @ true.astype(float) > 0
    return np.nanmean(np.divide(2 * hits, either, out=np.full_like(hits, np.nan), where=has_cells), axis=1)


SCORES: Mapping[str, Score] = MappingProxyType({"accuracy": accuracy, "macro_f1": macro_f1})


def compare(
    predictions: Predictions,
    *,
    score: Score = macro_f1,
    groups: pd.Series | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every two arms on the same test cells, for other seeds and other test cells.

    Cells (or whole groups) are drawn with replacement, the same for all runs; seeds are paired, since runs of one seed
    share training cells, head and order. Drawing both at once would count the chance of single predictions three times
    and that of few seeds too low (Owen 2007, Annals of Applied Statistics 1:386). So the variance of a mean difference
    over n seeds is put together as for two crossed random factors: by seeds (their variance / n, to which drawing them
    tends but for n - 1), plus by cells (bootstrap variance of the mean over seeds), minus what both of these contain
    (bootstrap variance of the differences between seeds / n; neither is taken as less than it). Interval and p value
    are those of Student's t with the degrees of freedom of such a sum (Satterthwaite 1946, Biometrics Bulletin 2:110).
    Where seeds make little difference the test is stricter than its level, for a few of them cannot show that.

    Parameters
    ----------
    predictions
        Of the runs of one task. Arms are compared by the seeds that both have.
    score
        What is compared.
    groups
        Group (well, donor) of each test cell, indexed by cell; groups are drawn whole. None draws cells.
    samples, seed
        Number of bootstrap samples, and the seed of their draw.

    Returns
    -------
    One row a pair, best arms first: ``a`` and ``b`` (a has the higher mean), ``score_a`` and ``score_b`` (means over
    their runs), ``difference`` (a - b, mean over shared seeds), ``low`` and ``high`` (95 % interval, of this pair
    alone), ``p``, ``p_holm`` (Holm's correction over all rows), ``seeds`` (shared), ``cells``, ``units`` (cells or
    groups drawn). With fewer than two shared seeds nothing is known of their spread, and interval and p are NaN.

    Raises
    ------
    ComparisonError
        As `bootstrap_scores`.
    """
    scores = bootstrap_scores(predictions, score=score, groups=groups, samples=samples, seed=seed)
    place = scores.runs.reset_index().pivot(index="seed", columns="arm", values="index")
    means = scores.runs.groupby("arm", sort=False)["value"].mean().sort_values(ascending=False, kind="stable")
    values = scores.runs["value"].to_numpy()
    rows = []
    for a, b in combinations(means.index, 2):
        of_a, of_b = place[[a, b]].dropna().to_numpy(int).T
        found = crossed_difference(
            values[of_a] - values[of_b], scores.drawn[:, of_a] - scores.drawn[:, of_b], scores.n_units
        )
        row = {"a": a, "b": b, "score_a": means[a], "score_b": means[b], **found._asdict()}
        rows.append(row | {"seeds": len(of_a), "cells": scores.n_cells, "units": scores.n_units})
    table = pd.DataFrame(rows, columns=[*PAIR, "df"])
    return table.assign(p_holm=holm(table["p"]))[list(PAIR)]


def bootstrap_scores(
    predictions: Predictions,
    *,
    score: Score = macro_f1,
    groups: pd.Series | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> BootstrapScores:
    """Score every run on its test cells, and on cells (or whole groups) drawn from them with replacement.

    Parameters are those of `compare`.

    Raises
    ------
    ComparisonError
        There are no runs; a run has other test cells, labels or classes than the first; a cell stands twice or has no
        group; fewer than two cells or groups.
    """
    runs = [(arm, number, table) for arm, tables in predictions.items() for number, table in tables.items()]
    if not runs:
        msg = "There are no predictions to compare; run the study first."
        raise ComparisonError(msg)
    first = runs[0][2]
    cells = pd.Index(first["cell"])
    columns = [column for column in first if column.startswith(PROBABILITY)]
    labels = pd.Index(columns).get_indexer(PROBABILITY + first["label"])
    weights, n_units = draw_weights(cells, groups, samples, np.random.default_rng(seed))
    weights = np.vstack([np.ones(len(cells)), weights])  # the first sample is the test set itself
    scored = np.empty((len(weights), len(runs)))
    for number, (arm, seed_of_run, table) in enumerate(runs):
        what = f"{arm}, seed {seed_of_run}"
        rows = _rows(table, first, what)
        scored[:, number] = score(labels, table[columns].to_numpy(float)[rows], weights)
    table = pd.DataFrame({"arm": [run[0] for run in runs], "seed": [run[1] for run in runs], "value": scored[0]})
    return BootstrapScores(table, scored[1:], len(cells), n_units)


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Adjust p values for their number, so that one false positive among them is as rare as in a single test.

    Missing values stay missing and do not count. Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    (``multipletests`` of statsmodels gives the same, but collects the garbage of the whole process at each call.)
    """
    p_values = np.asarray(list(p_values), dtype=float)
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: (~np.isnan(p_values)).sum()]  # NaN stands last
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def resampled_t_test(differences: Iterable[float], *, n_train: int, n_test: int) -> Difference:
    """Test the mean difference of two arms over repeated or k-fold splits of the same cells.

    The training sets of the splits overlap, so their scores are correlated and a plain paired t test finds differences
    where there are none. The variance of the mean of J differences is taken as (1/J + n_test/n_train) times theirs,
    with J - 1 degrees of freedom.

    Source: Nadeau and Bengio 2003, Machine Learning 52:239, section 5; for repeated k-fold cross-validation, Bouckaert
    and Frank 2004, PAKDD, 3.

    Parameters
    ----------
    differences
        Score of one arm minus that of the other, one a split.
    n_train, n_test
        Training and test cells of a split.

    Raises
    ------
    ComparisonError
        Fewer than two splits.
    """
    differences = np.asarray(list(differences), dtype=float)
    n = len(differences)
    if n < 2:
        msg = f"{n} split(s) say nothing about the spread between splits; give two or more."
        raise ComparisonError(msg)
    return _by_t(differences.mean(), (1 / n + n_test / n_train) * differences.var(ddof=1), n - 1)


def variance_shares(scores: pd.DataFrame) -> pd.DataFrame:
    """Divide the variance of scores into what strategies, seeds and the rest contribute.

    A two-way layout without repetition, both factors random: the components are solved from the mean squares (method
    of moments). An estimate below 0 is set to 0 and marked. The test cells are fixed here, so that the first three rows
    hold also what the choice of these cells does to them; `variance_shares_with_cells` takes it out.

    Parameters
    ----------
    scores
        Columns strategy, seed, value: one row a run, of one task, one train set and one metric. Seeds that some
        strategy lacks are left out.

    Returns
    -------
    Rows ``strategy``, ``seed`` (common to all strategies) and ``strategy x seed`` (the rest: what a seed does to one
    strategy only); columns ``variance`` (of the score of one run), ``share`` (of their sum), ``clipped``.

    Raises
    ------
    ComparisonError
        Fewer than two strategies, or fewer than two seeds that all have.
    """
    layout = _layout(scores.rename(columns={"strategy": "arm"}))
    return _shares(_components(layout.to_numpy().T))


def variance_shares_with_cells(
    predictions: Predictions,
    *,
    score: Score = macro_f1,
    groups: pd.Series | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Divide the variance of scores as `variance_shares` does, and set the choice of the test cells apart.

    Test cells drawn again move all runs together, and strategies, seeds and single runs by themselves. The whole is the
    row ``test cells``, the mean bootstrap variance of a run's score; the three parts that the other rows contain too
    are estimated from the bootstrap samples and taken out of them.

    Parameters are those of `compare`.

    Returns
    -------
    As `variance_shares`, with the row ``test cells``.

    Raises
    ------
    ComparisonError
        As `variance_shares` and `bootstrap_scores`.
    """
    scores = bootstrap_scores(predictions, score=score, groups=groups, samples=samples, seed=seed)
    layout = _layout(scores.runs.assign(place=scores.runs.index), values="place").to_numpy().T  # (arms, seeds)
    deviations = (scores.drawn - scores.drawn.mean(axis=0))[:, layout]  # (samples, arms, seeds)
    correction = scores.n_units / (scores.n_units - 1)
    by_cells = {name: correction * part.mean() for name, part in _components(deviations).items()}
    found = _components(scores.runs["value"].to_numpy()[layout])
    parts = {name: found[name] - by_cells[name] for name in found}
    return _shares(parts | {"test cells": correction * (deviations**2).mean()})


def indistinguishable(table: pd.DataFrame) -> pd.DataFrame:
    """Rank the arms of each task and say which of them cannot be told apart.

    Parameters
    ----------
    table
        Rows of `compare` with columns task and metric, as `compare_tasks` returns them.

    Returns
    -------
    One row for each task, metric and arm, best first: ``rank``, ``arm``, ``score`` (mean over its runs), ``like`` (the
    arms whose difference to it is not significant at 5 % after Holm's correction; one that could not be tested is among
    them), ``like_best`` (whether it is the best or like the best). "Like" does not mean equal, and it is not
    transitive: a may be like b and b like c where a is better than c.
    """
    rows = []
    for (task, metric), pairs in table.groupby(["task", "metric"], sort=False):
        scores = dict(zip(pairs["a"], pairs["score_a"], strict=True)) | dict(
            zip(pairs["b"], pairs["score_b"], strict=True)
        )
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        alike = pairs[~(pairs["p_holm"] < LEVEL)]
        both = set(zip(alike["a"], alike["b"], strict=True)) | set(zip(alike["b"], alike["a"], strict=True))
        for rank, arm in enumerate(ranked, start=1):
            like = [other for other in ranked if (arm, other) in both]
            row = {"task": task, "metric": metric, "rank": rank, "arm": arm, "score": scores[arm], "like": like}
            rows.append(row | {"like_best": rank == 1 or ranked[0] in like})
    return pd.DataFrame(rows, columns=["task", "metric", "rank", "arm", "score", "like", "like_best"])


def compare_tasks(predictions: pd.DataFrame, *, samples: int = SAMPLES) -> pd.DataFrame:
    """Compare every two arms of each task of a study by accuracy and macro-F1.

    Parameters
    ----------
    predictions
        Rows of ``results/<study>/predictions.parquet``: task, train_set, strategy, seed, cell, label and predicted (a
        class), and, where whole groups are held out, group, which are then drawn in place of cells.
    samples
        Number of bootstrap samples.

    Returns
    -------
    Rows of `compare` with task and metric first. Holm's correction is over all pairs of one task and metric: to ask
    about one train set only, give its rows only, for every pair that is not asked about costs power. An arm is
    a strategy, named with its train set where the study has several. A task with one arm has no rows.

    Raises
    ------
    ComparisonError
        As `compare`.
    """
    tables = []
    for task, runs, groups in _tasks(predictions):
        for metric, score in SCORES.items():
            pairs = compare(runs, score=score, groups=groups, samples=samples)
            tables += [pairs.assign(task=task, metric=metric)] if len(pairs) else []
    columns = ["task", "metric", *PAIR]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def variance_tasks(predictions: pd.DataFrame, *, samples: int = SAMPLES) -> pd.DataFrame:
    """Divide the variance of the macro-F1 of each task of a study by `variance_shares_with_cells`.

    Parameters
    ----------
    predictions, samples
        As `compare_tasks`.

    Returns
    -------
    Share of the variance (0 to 1): one row a task, one column a source. A task with fewer than two arms or seeds is
    left out.
    """
    shares = {
        task: variance_shares_with_cells(runs, groups=groups, samples=samples)["share"]
        for task, runs, groups in _tasks(predictions)
        if len(runs) > 1 and len(set.intersection(*map(set, runs.values()))) > 1
    }
    return pd.DataFrame(shares).T.rename_axis(index="task")


def crossed_difference(observed: np.ndarray, drawn: np.ndarray, n_units: int) -> Difference:
    """Test the mean over seeds of differences that were measured on drawn test cells too; `compare` says how.

    Parameters
    ----------
    observed
        Difference on the test cells, (seeds,).
    drawn
        Difference on test cells drawn again, (samples, seeds).
    n_units
        Number of cells or groups that were drawn from.

    Returns
    -------
    The difference; with fewer than two seeds, without interval and p value.
    """
    n = len(observed)
    if n < 2:
        return Difference(float(observed.mean()) if n else np.nan, np.nan, np.nan, np.nan, np.nan)
    correction = n_units / (n_units - 1)  # a bootstrap variance of a mean of u units is (u - 1) / u of the right one
    deviations = drawn - drawn.mean(axis=0)
    by_both = correction * deviations.var(axis=1, ddof=1).mean() / n
    by_seeds = max(observed.var(ddof=1) / n, by_both)
    by_cells = max(correction * deviations.mean(axis=1).var(), by_both)
    variance = by_seeds + by_cells - by_both
    parts = [(by_seeds, n - 1), (by_cells, n_units - 1), (by_both, (n - 1) * (n_units - 1))]
    uncertainty = sum(part**2 / df for part, df in parts)
    return _by_t(observed.mean(), variance, variance**2 / uncertainty if uncertainty else n - 1)


def _tasks(predictions: pd.DataFrame) -> Iterator[tuple[str, dict[str, dict[int, pd.DataFrame]], pd.Series | None]]:
    """Give the runs of each task as `compare` takes them, and the group of each test cell where groups are held out."""
    rows = with_arms(predictions.astype({"train_set": str, "strategy": str, "label": str, "predicted": str}))
    for task, of_task in rows.groupby("task", sort=False, observed=True):
        classes = np.unique(of_task[["label", "predicted"]])
        runs: dict[str, dict[int, pd.DataFrame]] = {}
        folds = of_task["fold"].nunique() if "fold" in of_task else 0
        for (arm, seed), run in of_task.groupby(["arm", "seed"], sort=False):
            if folds and run["fold"].nunique() < folds:  # a failed fold leaves its arm and seed without some cells
                continue
            chosen = run["predicted"].to_numpy()[:, None] == classes  # (cells, classes)
            table = pd.DataFrame(chosen.astype(float), columns=PROBABILITY + classes.astype(object))
            runs.setdefault(arm, {})[seed] = table.assign(cell=run["cell"].to_numpy(), label=run["label"].to_numpy())
        groups = None
        if "group" in rows and of_task["group"].notna().any():
            groups = of_task.drop_duplicates("cell").set_index("cell")["group"]
        yield task, runs, groups


def _by_t(center: float, variance: float, df: float) -> Difference:
    error = np.sqrt(variance)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
    p = 1.0 if center == 0 else 0.0 if error == 0 else 2 * stats.t.sf(abs(center) / error, df)
    return Difference(float(center), float(center - half), float(center + half), float(p), float(df))


def _rows(table: pd.DataFrame, first: pd.DataFrame, what: str) -> np.ndarray:
    """Return where the cells of `first` stand in `table`; refuse other cells, labels or classes."""
    cells = pd.Index(table["cell"])
    if not cells.is_unique:
        twice = cells[cells.duplicated()][0]
        msg = f"{what}: the predictions hold the test cell {twice!r} more than once; run it again."
        raise ComparisonError(msg)
    rows = cells.get_indexer(first["cell"])
    other = None
    if set(table.columns) != set(first.columns):
        other = "classes"
    elif len(table) != len(first) or (rows < 0).any():
        other = "test cells"
    elif (table["label"].to_numpy()[rows] != first["label"].to_numpy()).any():
        other = "labels"
    if other:
        msg = f"{what}: its {other} are not those of the first run; compare runs of one task and split."
        raise ComparisonError(msg)
    return rows


def draw_weights(
    cells: pd.Index, groups: pd.Series | None, samples: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draw cells, or whole groups of them, with replacement.

    Parameters
    ----------
    cells
        Names.
    groups
        Group of each cell, indexed by name; None draws cells.
    samples
        Number of samples.
    rng
        Of the draw.

    Returns
    -------
    How often each cell is in each sample, (samples, cells); and the number of cells or groups.

    Raises
    ------
    ComparisonError
        A cell has no group, or there are fewer than two cells or groups.
    """
    if groups is None:
        unit_of = np.arange(len(cells))
    else:
        unit_of, _ = pd.factorize(groups.reindex(cells))
        if (unit_of < 0).any():
            msg = f"{(unit_of < 0).sum()} test cells have no group (first: {cells[unit_of < 0][0]}); give one to each."
            raise ComparisonError(msg)
    n_units = len(np.unique(unit_of))
    if n_units < 2:
        msg = f"The {len(cells)} test cells are of one group, which cannot say how much others would differ; test more."
        raise ComparisonError(msg)
    drawn = rng.integers(n_units, size=(samples, n_units)) + n_units * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * n_units).reshape(samples, n_units)
    return counts[:, unit_of].astype(float), n_units


def _layout(runs: pd.DataFrame, values: str = "value") -> pd.DataFrame:
    """Return one column an arm and one row a seed that all arms have."""
    table = runs.pivot(index="seed", columns="arm", values=values).dropna()
    if min(table.shape) < 2:
        msg = f"{table.shape[1]} strategies share {table.shape[0]} seeds; variance shares need two of each."
        raise ComparisonError(msg)
    return table.astype(runs[values].dtype)


def _components(values: np.ndarray) -> dict[str, np.ndarray]:
    """Solve the mean squares of a two-way layout (..., arms, seeds) for the variance components."""
    n_arms, n_seeds = values.shape[-2:]
    by_arm, by_seed = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    rest = values - by_arm - by_seed + values.mean(axis=(-2, -1), keepdims=True)
    residual = (rest**2).sum(axis=(-2, -1)) / ((n_arms - 1) * (n_seeds - 1))
    return {
        "strategy": by_arm[..., 0].var(axis=-1, ddof=1) - residual / n_seeds,
        "seed": by_seed[..., 0, :].var(axis=-1, ddof=1) - residual / n_arms,
        "strategy x seed": residual,
    }


def _shares(components: Mapping[str, float]) -> pd.DataFrame:
    found = pd.Series({name: float(value) for name, value in components.items()})
    variance = found.clip(lower=0)
    share = variance / variance.sum() if variance.sum() > 0 else variance * np.nan
    return pd.DataFrame({"variance": variance, "share": share, "clipped": found < 0})
