"""The one rule of judgement: which of the declared contrasts of a study are differences, and what each arm scores.

In: predictions of the runs (rows of ``predictions.parquet``) and the contrasts that the study declares. Out: one table
of differences with intervals, p values after Holm and a verdict; the content of ``answer.json``; plain sentences.
Every "higher", "lower" and "same" on README, page, notebooks and figures comes from here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

from tuneformer.artifacts import UserError
from tuneformer.study import BASELINES, CONTROL, GENE_BASELINES, Contrast, Study, contrasts

ALPHA = 0.05
CONFIDENCE = 0.95
SAMPLES = 2000  # bootstrap samples: the standard error that they give is right within 2 %
CHUNK = 250  # samples drawn at a time, so that many test cells fit into memory
NAMES = {"macro_f1": "macro-F1", "weighted_f1": "weighted F1", "auc": "AUC"}
HIGHER, LOWER, SAME, UNDECIDED = "higher", "lower", "same", "not decided"


class Estimate(NamedTuple):
    """A mean or a mean difference, its standard error, and the degrees of freedom of that; NaN where not known."""

    value: float = np.nan
    error: float = np.nan
    df: float = np.nan


@dataclass(frozen=True)
class Scored:
    """The runs of one task on its test cells, and on test cells drawn again.

    ``place``: (arm, seed) to its column in the scores. ``values``: scores, (folds, runs), of one row without folds.
    ``drawn``: scores on the drawn cells, the same draws for every run, (samples, runs); without rows for folds.
    ``cells``: number of test cells by class. ``n_units``: number of cells or groups that were drawn from, or of folds.
    ``floor``: what one more error in the smallest class (or in the class that is scored) does to the score.
    """

    place: dict[tuple[str, int], int]
    values: np.ndarray
    drawn: np.ndarray
    cells: dict[str, int]
    n_units: int
    folds: int
    floor: float

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds that all of these arms have."""
        return sorted(set.intersection(*({seed for name, seed in self.place if name == arm} for arm in arms)))

    def estimate(self, arm: str, reference: str | None, n_train: float | None, *, fixed_model: bool) -> Estimate:
        """Return the mean score of an arm, or its mean difference to a reference over the seeds that both have."""
        seeds = self.seeds(arm, reference or arm)
        values, drawn = (scores[:, [self.place[arm, seed] for seed in seeds]] for scores in (self.values, self.drawn))
        if reference is not None:
            of_reference = [self.place[reference, seed] for seed in seeds]
            values, drawn = values - self.values[:, of_reference], drawn - self.drawn[:, of_reference]
        if not seeds:
            return Estimate()
        if self.folds:
            n_test = sum(self.cells.values()) / self.folds
            return resampled_t(values.mean(axis=1), n_train or n_test * (self.folds - 1), n_test, floor=self.floor)
        return crossed_difference(values[0], drawn, self.n_units, floor=self.floor, fixed_model=fixed_model)


NOTHING = Scored({}, np.empty((0, 0)), np.empty((0, 0)), {}, 0, 0, 0.0)


def crossed_difference(
    observed: np.ndarray, drawn: np.ndarray, n_units: int, *, floor: float = 0.0, fixed_model: bool = False
) -> Estimate:
    """Estimate a mean over seeds that was measured on one test set, for other seeds and other test cells.

    Seeds are paired, since runs of one seed share training cells, head and order, and the drawn cells are the same for
    all runs. Drawing both at once would count the chance of single predictions three times and that of few seeds too
    low (Owen 2007, Annals of Applied Statistics 1:386). So the variance is put together as for two crossed random
    factors: by seeds (their variance / n), plus by cells (bootstrap variance of the mean over seeds), minus what both
    contain (bootstrap variance of the differences between seeds / n; neither is taken as less than it). Degrees of
    freedom of such a sum: Satterthwaite 1946, Biometrics Bulletin 2:110. Where seeds make little difference the test is
    stricter than its level, for a few of them cannot show that.

    Parameters
    ----------
    observed
        Score, or difference of two, on the test cells, (seeds,).
    drawn
        The same on test cells drawn again, (samples, seeds).
    n_units
        Number of cells, or of groups drawn whole.
    floor
        Smallest standard error that the choice of the test cells is taken to have.
    fixed_model
        The question is about this very model, so only test cells are random.

    Returns
    -------
    With fewer than two seeds (unless `fixed_model`) or units nothing is known of the spread, and the error is NaN.
    """
    n = len(observed)
    if n_units < 2 or (n < 2 and not fixed_model):
        return Estimate(observed.mean())
    correction = n_units / (n_units - 1)  # a bootstrap variance of a mean of u units is (u - 1) / u of the right one
    deviations = drawn - drawn.mean(axis=0)
    by_cells = max(correction * deviations.mean(axis=1).var(), floor**2)
    if fixed_model:
        return Estimate(observed.mean(), np.sqrt(by_cells), n_units - 1)
    by_both = correction * deviations.var(axis=1, ddof=1).mean() / n
    by_seeds, by_cells = max(observed.var(ddof=1) / n, by_both), max(by_cells, by_both)
    variance = by_seeds + by_cells - by_both
    parts = [(by_seeds, n - 1), (by_cells, n_units - 1), (by_both, (n - 1) * (n_units - 1))]
    uncertainty = sum(part**2 / df for part, df in parts)
    return Estimate(observed.mean(), np.sqrt(variance), variance**2 / uncertainty if uncertainty else n - 1)


def resampled_t(values: np.ndarray, n_train: float, n_test: float, *, floor: float = 0.0) -> Estimate:
    """Estimate a mean over folds or repeated splits of the same cells.

    The training sets of the splits overlap, so their scores are correlated: the variance of the mean of J values is
    taken as (1/J + n_test/n_train) times theirs (Nadeau and Bengio 2003, Machine Learning 52:239, section 5; for k-fold
    cross-validation Bouckaert and Frank 2004, PAKDD, 3).

    Parameters
    ----------
    values
        Score, or difference of two, one per split. All seeds of a study have the same folds, so a seed is no further
        split: give the means over seeds.
    n_train, n_test
        Training and test cells of a split.
    floor
        Smallest standard error.
    """
    n = len(values)
    variance = (1 / n + n_test / n_train) * values.var(ddof=1) if n > 1 else np.nan
    return Estimate(values.mean(), np.sqrt(np.maximum(variance, floor**2)), n - 1)


def judge(
    predictions: pd.DataFrame,
    contrasts: Sequence[Contrast],
    *,
    score: str = "macro_f1",
    margin: float,
    alpha: float = ALPHA,
    n_train: Mapping[tuple[str, str], float] | None = None,
    fixed_model: bool = False,
) -> pd.DataFrame:
    """Judge the declared contrasts of a study, in all its tasks together.

    Parameters
    ----------
    predictions
        Rows of ``predictions.parquet``: task, arm, seed, fold, cell, label, predicted and, where whole groups are held
        out, group; groups are then drawn in place of cells. An arm and seed without all folds is left out.
    contrasts
        What is asked, of each task; nothing else is tested.
    score
        accuracy, macro_f1, balanced_accuracy, weighted_f1, ``recall:<class>`` or ``precision:<class>``.
    margin
        Two arms are the same if their difference is shown to be smaller than this.
    n_train
        Training cells by task and arm, read with folds only, where the larger of the two arms counts (a made cell is
        of several); None takes all cells of the other folds.
    fixed_model
        As `crossed_difference`.

    Returns
    -------
    One row per task and contrast: ``task``, ``contrast``, ``reference``, ``arm``; ``difference`` (arm - reference, mean
    over shared seeds); ``low`` and ``high`` (95 % interval of this contrast alone); ``p``; ``p_holm`` and ``p_same``
    (of "there is no difference" and, by two one-sided tests, of "it is as large as the margin": Holm's correction over
    all rows for each); ``verdict`` (higher, lower, same or not decided, at `alpha`); ``seeds`` (shared), ``cells``,
    ``units`` (cells, groups or folds), ``folds``, ``score``, ``margin``.

    Raises
    ------
    UserError
        A score that predicted classes do not give; runs of one task with other test cells or labels, a cell that is
        tested twice, or a cell without group.
    """
    return _judge(score_tasks(predictions, score), contrasts, score, margin, alpha, n_train, fixed_model)


def arm_scores(
    predictions: pd.DataFrame,
    *,
    score: str = "macro_f1",
    n_train: Mapping[tuple[str, str], float] | None = None,
    fixed_model: bool = False,
) -> pd.DataFrame:
    """Return the mean score of each arm with its 95 % interval, for other seeds and test cells; over folds, corrected.

    The interval is computed on the logit scale (delta method), so that it stays between 0 and 1. Where all cells are
    right, or none, it is that of Clopper and Pearson for as many cells as the smallest class and the number of classes
    make. With one seed and one test set there is none. Parameters are those of `judge`.

    Returns
    -------
    ``task``, ``arm``, ``mean``, ``low``, ``high``; one row per arm with a finished seed.
    """
    return _arm_scores(score_tasks(predictions, score), n_train, fixed_model)


def answer(
    settings: Study, runs: pd.DataFrame, predictions: pd.DataFrame, declared: Sequence[Contrast] | None = None
) -> dict[str, Any]:
    """Answer a study: the content of ``answer.json``.

    Parameters
    ----------
    settings
        The study: its kind, tasks, contrasts, score and margin are read.
    runs, predictions
        Rows of ``runs.csv`` and ``predictions.parquet``. A run that failed leaves its arm and seed out.
    declared
        Contrasts, where they are not those of the params file (the variants of a compressed model).

    Returns
    -------
    See CONTRACT in the notebook 06: study, question, simulated, kind, score, margin, alpha, rule, n_contrasts and
    tasks, each with folds, seeds, test_cells by class, arms (best first) and contrasts. What is not known is None.
    """
    declared = contrasts(settings) if declared is None else declared
    fixed_model = settings.kind == "compression"
    is_ok = runs["status"] == "ok"
    n_train = runs[is_ok].groupby(["task", "arm"])["n_train"].mean().to_dict()
    scored = dict.fromkeys(settings.tasks, NOTHING) | score_tasks(predictions, settings.score)
    judged = _judge(scored, declared, settings.score, settings.margin, ALPHA, n_train, fixed_model)
    means = _arm_scores(scored, n_train, fixed_model)
    tasks = []
    for task, found in scored.items():
        of_task = runs[runs["task"] == task]
        arms = of_task.groupby("arm", sort=False).agg(
            n_runs=("status", lambda status: (status == "ok").sum()),
            n_failed=("status", lambda status: (status != "ok").sum()),
            strategy=("strategy", "first"),
        )
        arms = arms.join(means[means["task"] == task].set_index("arm")[["mean", "low", "high"]])
        arms["is_baseline"] = arms["strategy"].isin([*BASELINES, *GENE_BASELINES])
        arms["is_control"] = arms["strategy"] == CONTROL
        arms = arms.drop(columns="strategy").sort_values("mean", ascending=False, kind="stable").reset_index()
        tasks.append(
            {
                "task": task,
                "folds": found.folds,
                "seeds": sorted(of_task["seed"].unique().tolist()),
                "test_cells": found.cells,
                "arms": _plain(arms),
                "contrasts": _plain(judged[judged["task"] == task].drop(columns="task")),
            }
        )
    head = {name: getattr(settings, name) for name in ("study", "question", "simulated", "kind", "score", "margin")}
    is_fold = {found.folds > 0 for found in scored.values() if found.place}
    rule = _rule(settings, len(judged), has_folds=True in is_fold, fixed_model=fixed_model)
    return {**head, "alpha": ALPHA, "rule": rule, "n_contrasts": len(judged), "tasks": tasks}


def sentence(row: Mapping[str, Any]) -> str:
    """Say in plain words what one contrast of `judge`, or of an answer, found."""
    arm, reference = row["arm"], row["reference"]
    if not row["seeds"]:
        return f"{arm} and {reference} could not be compared: they share no seed that both have finished."
    shown = f"{row['difference']:+.3f} {score_name(row['score'])}"
    is_tested = not pd.isna(row["p"])
    if is_tested:
        shown += f" ({row['low']:+.3f} to {row['high']:+.3f})"
    said = {
        HIGHER: f"{arm} scores higher than {reference}",
        LOWER: f"{arm} scores lower than {reference}",
        SAME: f"{arm} and {reference} are the same within {row['margin']:g}",
        UNDECIDED: f"No difference could be decided between {arm} and {reference}",
    }[row["verdict"]]
    size = f"{_counted(row['folds'], 'fold')}, " if row["folds"] else ""
    size += f"{_counted(row['seeds'], 'seed')}, {_counted(row['cells'], 'test cell')}"
    if not row["folds"] and row["units"] < row["cells"]:
        size += f" in {_counted(row['units'], 'group')}"
    end = ""
    if row["verdict"] == UNDECIDED and is_tested and row["p"] < ALPHA:
        end = f"; p = {row['p']:.3f} alone, {row['p_holm']:.3f} among all contrasts of the study"
    return f"{said}: {shown}, {size}{end}."


def variance_shares(predictions: pd.DataFrame, *, score: str = "macro_f1") -> pd.DataFrame:
    """Divide the variance of the scores of each task into what arms, seeds, both together and test cells contribute.

    A two-way layout of arms and seeds without repetition, solved from the mean squares (method of moments). Test cells
    drawn again move all runs together, and arms, seeds and single runs by themselves: the whole is the mean bootstrap
    variance of a run's score, and its parts are taken out of the others. An estimate below 0 counts as 0.

    Returns
    -------
    Shares, 0 to 1: one row per task, columns ``arm``, ``seed``, ``arm x seed``, ``test cells``. A task with fewer than
    two arms, or two seeds that all arms have, is left out. Folds are pooled.
    """
    shares = {}
    for task, found in score_tasks(predictions.assign(fold=np.nan), score).items():
        arms = list(dict.fromkeys(arm for arm, _ in found.place))
        seeds = found.seeds(*arms)
        if min(len(arms), len(seeds)) < 2 or found.n_units < 2:
            continue
        layout = np.array([[found.place[arm, seed] for seed in seeds] for arm in arms])  # (arms, seeds)
        deviations = (found.drawn - found.drawn.mean(axis=0))[:, layout]  # (samples, arms, seeds)
        correction = found.n_units / (found.n_units - 1)
        by_cells = components(deviations)
        parts = {
            name: value - correction * by_cells[name].mean()
            for name, value in components(found.values[0][layout]).items()
        }
        parts["test cells"] = correction * (deviations**2).mean()
        variance = pd.Series(parts).clip(lower=0)
        shares[task] = variance / (variance.sum() or np.nan)
    return pd.DataFrame(shares).T.rename_axis(index="task")


def components(values: np.ndarray) -> dict[str, np.ndarray]:
    """Solve the mean squares of layouts without repetition, (..., arms, seeds), for their variance components."""
    n_arms, n_seeds = values.shape[-2:]
    by_arm, by_seed = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    rest = values - by_arm - by_seed + values.mean(axis=(-2, -1), keepdims=True)
    residual = (rest**2).sum(axis=(-2, -1)) / ((n_arms - 1) * (n_seeds - 1))
    return {
        "arm": by_arm[..., 0].var(axis=-1, ddof=1) - residual / n_seeds,
        "seed": by_seed[..., 0, :].var(axis=-1, ddof=1) - residual / n_arms,
        "arm x seed": residual,
    }


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Adjust p values for their number after Holm 1979; missing ones stay missing and do not count."""
    from statsmodels.stats.multitest import multipletests

    p_values = np.array(list(p_values), dtype=float)
    known = ~np.isnan(p_values)
    if known.any():
        p_values[known] = multipletests(p_values[known], method="holm")[1]
    return p_values


def permutation_p(observed: float, permuted: Iterable[float]) -> float:
    """Test a score of genes against chance: the share of permutations of the classes that reach it, itself counted.

    A bootstrap over genes with the fitted models held fixed is too narrow, as it does not know that other training
    genes would have given other models; permuted classes are learned anew each time. One-sided, never 0: with n
    permutations at least 1 / (n + 1) (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    permuted = np.asarray(list(permuted), dtype=float)
    return float((1 + (permuted >= observed).sum()) / (1 + len(permuted)))


def off_reference(settings: Study, runs: pd.DataFrame) -> dict[str, float]:
    """Return the mean macro-F1 of each arm that is farther than ``expected_tolerance`` from its reference."""
    means = runs.groupby("arm")["macro_f1"].mean().dropna()
    expected, tolerance = settings.expected_macro_f1, settings.expected_tolerance
    return {arm: mean for arm, mean in means.items() if arm in expected and abs(mean - expected[arm]) > tolerance}


def score_name(score: str) -> str:
    """Return a score as sentences name it."""
    return NAMES.get(score) or score.replace(":", " of ").replace("_", " ")


def score_tasks(predictions: pd.DataFrame, score: str) -> dict[str, Scored]:
    """Score the runs of every task on its test cells, and on test cells (or whole groups) drawn with replacement."""
    return {
        str(task): _score_task(rows, score) for task, rows in predictions.groupby("task", sort=False, observed=True)
    }


def weighted_scores(
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, score: str, classes: Sequence[str]
) -> np.ndarray:
    """Score runs on many samples of the same cells at once, by products of matrices.

    Parameters
    ----------
    labels, predicted
        Numbers of classes, (cells,) and (runs, cells).
    weights
        How often each cell is in each sample, (samples, cells).
    score, classes
        As `judge`; the names of the classes.

    Returns
    -------
    (samples, runs); NaN where a sample has no cell of the class that is scored.
    """
    numbers, weights = np.arange(len(classes)), weights.astype(np.float32)
    true = labels[:, None] == numbers  # (cells, classes)
    n_true = weights @ true.astype(np.float32)  # (samples, classes)
    found = np.empty((len(weights), len(predicted)))
    for run, one in enumerate(predicted):
        called = one[:, None] == numbers
        hits, n_called = (weights @ part.astype(np.float32) for part in (true & called, called))
        found[:, run] = _score(hits, n_true, n_called, score, classes)
    return found


def _score(hits: np.ndarray, true: np.ndarray, called: np.ndarray, score: str, classes: Sequence[str]) -> np.ndarray:
    """Return a score (samples,) from numbers of cells by class, (samples, classes)."""
    name, _, of_class = score.partition(":")
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, f1 = hits / true, np.where(true > 0, 2 * hits / (true + called), np.nan)  # NaN: no cells of the class
        if name in ("recall", "precision") and of_class in classes:
            return (recall if name == "recall" else hits / called)[:, list(classes).index(of_class)]
    if score == "accuracy":
        return hits.sum(axis=1) / true.sum(axis=1)
    if score == "macro_f1":
        return np.nanmean(f1, axis=1)
    if score == "balanced_accuracy":
        return np.nanmean(recall, axis=1)
    if score == "weighted_f1":
        return np.nansum(f1 * true, axis=1) / true.sum(axis=1)
    msg = (
        f"The score {score!r} cannot be judged from predicted classes; set score to accuracy, macro_f1, "
        "balanced_accuracy, weighted_f1, recall:<class> or precision:<class>."
    )
    raise UserError(msg)


def _score_task(rows: pd.DataFrame, score: str) -> Scored:
    task, n_folds = rows["task"].iloc[0], rows["fold"].nunique()
    rows = rows.astype(dict.fromkeys(["arm", "cell", "label", "predicted"], str))
    if n_folds:
        rows = rows[rows.groupby(["arm", "seed"])["fold"].transform("nunique") == n_folds]
    if rows.empty:
        return NOTHING
    twice = rows[rows.duplicated(["arm", "seed", "cell"])]
    if len(twice):
        first = twice.iloc[0]
        msg = f"{task}, {first.arm}, seed {first.seed}: the cell {first.cell!r} is tested more than once; run it again."
        raise UserError(msg)
    classes = np.unique(rows[["label", "predicted"]])
    rows["number"] = pd.Index(classes).get_indexer(rows["predicted"])
    predicted = rows.pivot(index=["arm", "seed"], columns="cell", values="number")
    cells = rows.drop_duplicates("cell").set_index("cell").loc[predicted.columns]
    lacking = predicted.isna().sum(axis=1)
    if lacking.any() or len(rows.drop_duplicates(["cell", "label"])) > len(cells):
        arm, seed = lacking.idxmax()
        what = f"{arm}, seed {seed}, lacks test cells of other runs" if lacking.any() else "the labels of a cell differ"
        msg = f"{task}: {what}; only runs on the same test cells can be compared, so run the study again."
        raise UserError(msg)
    labels, units = pd.Index(classes).get_indexer(cells["label"]), np.arange(len(cells))
    if "group" in cells and cells["group"].notna().any():
        units, _ = pd.factorize(cells["group"])
        if units.min() < 0:
            msg = (
                f"{task}: {(units < 0).sum()} test cells have no group, such as {cells.index[units < 0][0]}; run 01_qc."
            )
            raise UserError(msg)
    numbers = predicted.to_numpy(int)
    counts = cells["label"].value_counts()
    n_units = n_folds or units.max() + 1
    if n_folds:
        values = weighted_scores(labels, numbers, pd.get_dummies(cells["fold"]).to_numpy().T, score, classes)
        drawn = np.empty((0, len(numbers)))
    else:
        values = weighted_scores(labels, numbers, np.ones((1, len(cells))), score, classes)
        rng = np.random.default_rng(0)
        weights = (draw_units(n_units, CHUNK, rng)[:, units] for _ in range(SAMPLES // CHUNK))
        drawn = np.vstack([weighted_scores(labels, numbers, part, score, classes) for part in weights])
    of_class = score.partition(":")[2]
    floor = 1 / (counts.get(of_class, 1) if of_class else len(counts) * counts.min())
    place = {run: number for number, run in enumerate(predicted.index)}
    values, drawn = (part[~np.isnan(part).any(axis=1)] for part in (values, drawn))
    return Scored(place, values, drawn, counts.to_dict(), n_units, n_folds, floor)


def draw_units(n_units: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw cells, or groups, with replacement: how often each is in each sample, (samples, units)."""
    drawn = rng.integers(n_units, size=(samples, n_units)) + n_units * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * n_units).reshape(samples, n_units)


def _judge(
    scored: Mapping[str, Scored],
    declared: Sequence[Contrast],
    score: str,
    margin: float,
    alpha: float,
    n_train: Mapping[tuple[str, str], float] | None,
    fixed_model: bool,
) -> pd.DataFrame:
    rows = []
    for task, found in scored.items():
        for one in declared:
            trained = max((n_train or {}).get((task, arm), 0) for arm in (one.arm, one.reference))
            row = {"task": task, **one._asdict(), "seeds": len(found.seeds(one.arm, one.reference))}
            row |= found.estimate(one.arm, one.reference, trained, fixed_model=fixed_model)._asdict()
            is_known = row["seeds"] > 0
            row |= {"cells": is_known * sum(found.cells.values()), "units": is_known * found.n_units}
            rows.append(row | {"folds": found.folds})
    names = ["task", *Contrast._fields, *Estimate._fields, "seeds", "cells", "units", "folds"]
    table = pd.DataFrame(rows, columns=names).assign(score=score, margin=margin)
    value, error, df = table[["value", "error", "df"]].to_numpy(float).T
    half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
    table["low"], table["high"] = np.clip(value - half, -1, 1), np.clip(value + half, -1, 1)
    table["p"] = 2 * stats.t.sf(np.abs(value) / error, df)
    table["p_holm"] = holm(table["p"])
    table["p_same"] = holm(stats.t.sf((margin - np.abs(value)) / error, df))  # the larger of the two one-sided p values
    is_other = table["p_holm"] < alpha
    cases = [is_other & (value > 0), is_other & (value < 0), table["p_same"] < alpha]
    table["verdict"] = np.select(cases, [HIGHER, LOWER, SAME], UNDECIDED)
    order = ["difference", "low", "high", "p", "p_holm", "p_same", "verdict", "seeds", "cells", "units", "folds"]
    return table.rename(columns={"value": "difference"})[["task", *Contrast._fields, *order, "score", "margin"]]


def _arm_scores(
    scored: Mapping[str, Scored], n_train: Mapping[tuple[str, str], float] | None, fixed_model: bool
) -> pd.DataFrame:
    rows = []
    tail = (1 - CONFIDENCE) / 2
    for task, found in scored.items():
        for arm in dict.fromkeys(arm for arm, _ in found.place):
            mean, error, df = found.estimate(arm, None, (n_train or {}).get((task, arm)), fixed_model=fixed_model)
            low, high = np.nan, np.nan
            if not np.isnan(error) and 0 < mean < 1:
                half = stats.t.ppf(1 - tail, df) * error / (mean * (1 - mean))
                low, high = special.expit(special.logit(mean) + np.array([-half, half]))
            elif not np.isnan(error):
                low, high = (tail**found.floor, 1.0) if mean == 1 else (0.0, 1 - tail**found.floor)
            rows.append({"task": task, "arm": arm, "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["task", "arm", "mean", "low", "high"])


def _rule(settings: Study, n: int, *, has_folds: bool, fixed_model: bool) -> str:
    """Say in one sentence how a study is judged."""
    units = f"groups of {settings.group_by}" if settings.group_by else "test cells"
    if fixed_model:
        how = f"for other {units} and this very model (bootstrap)"
    elif has_folds:
        how = "over folds, seeds averaged (corrected resampled t test of Nadeau and Bengio)"
    else:
        how = f"for other seeds and other {units} (two crossed random factors, paired by seed)"
    return (
        f"A difference is that of arm and reference on the same cells, tested {how}; it is higher or lower if p < "
        f"{ALPHA} after Holm over all {_counted(n, 'declared contrast')}, or else the same within {settings.margin:g} "
        f"{score_name(settings.score)} if two one-sided tests against that margin say so, corrected likewise."
    )


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON can hold them: NaN as None, numbers with six digits."""
    rows = table.to_dict("records")
    return [
        {name: None if pd.isna(v) else float(f"{v:.6g}") if isinstance(v, float) else v for name, v in row.items()}
        for row in rows
    ]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
