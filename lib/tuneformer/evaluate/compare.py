"""The one rule of judgement: which of the declared contrasts of a study are differences, and what each arm scores.

In: rows of ``predictions.parquet`` and ``runs.csv``, and the contrasts that the study declares. Out: one table of
differences with intervals, p values after Holm and a verdict; the content of ``answer.json``. Every "higher", "lower"
and "same" on README, page, notebooks and figures comes from here; `tuneformer.evaluate.telling` puts it into words.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from tuneformer.evaluate.resampling import FEW_CELLS, MEANS, NOTHING, Estimate, Scored, score_tasks
from tuneformer.evaluate.telling import (
    ALPHA,
    HIGHER,
    LEAST_KNOWN,
    LOWER,
    MOST_CONSTANT,
    MOST_SEEDS,
    MOST_TIMES,
    SAME,
    UNDECIDED,
    WITHHELD,
    counted,
    recommendations,
    rule_of,
)
from tuneformer.keys import CEILING
from tuneformer.study import BASELINES, CONTROL, GENE_BASELINES, Contrast, Study, contrasts

TAIL = (1 - 0.95) / 2
COLUMNS = ["task", *Contrast._fields, "difference", "low", "high", "p", "p_holm", "p_same", "verdict"]
COLUMNS += ["seeds", "cells", "units", "folds", "score", "margin", "why", "more_seeds", "times_cells"]

Runs = pd.DataFrame | Mapping[str, Scored]
"""Rows of ``predictions.parquet`` (task, arm, seed, fold, cell, label, predicted and, where whole groups are held out,
group), or what `tuneformer.evaluate.resampling.score_tasks` made of them."""


def judge(
    predictions: Runs,
    contrasts: Sequence[Contrast],
    *,
    score: str = "macro_f1",
    margin: float,
    alpha: float = ALPHA,
    n_train: Mapping[tuple[str, str], float] | None = None,
    fixed_model: bool = False,
    withheld: Mapping[tuple[str, str, str], str] | None = None,
) -> pd.DataFrame:
    """Judge the declared contrasts of a study, in all its tasks together.

    Parameters
    ----------
    contrasts
        What is asked, of each task; nothing else is tested.
    score
        accuracy, macro_f1, balanced_accuracy, weighted_f1 or ``recall:<class>``.
    margin
        Two arms are the same if their difference is shown to be smaller than this.
    n_train
        Training cells by task and arm, read with folds only: the larger of the two arms counts, for a made cell is of
        several. None takes all cells of the other folds.
    fixed_model
        The arms are variants of one and the same model: only test cells are random.
    withheld
        Why there is no verdict, by task, reference and arm. Nor is there one where `too_few` test cells would decide.

    Returns
    -------
    One row per task and contrast, columns `COLUMNS`. ``difference``: arm - reference, mean over the ``seeds`` that both
    have. ``low``, ``high``: 95 % interval of this contrast alone. ``p``: of no difference; ``p_holm``: the same after
    Holm's correction over all rows; ``p_same``: of a difference as large as the margin (two one-sided tests), corrected
    likewise. ``verdict``: higher, lower, same, not decided or withheld (``why``; such a row has no p and does not count
    in Holm's correction). ``units``: cells, groups or folds. Of what is not decided, ``more_seeds`` and ``times_cells``
    are the fewest with which this very rule would decide, if difference and spread stayed as they are.

    Raises
    ------
    UserError
        As `tuneformer.evaluate.resampling.score_tasks`.
    """
    rows, scored = [], _scored(predictions, score)
    for task, found in scored.items():
        for one in contrasts:
            trained = max((n_train or {}).get((task, arm), 0) for arm in (one.arm, one.reference))
            estimate = found.estimate(one.arm, one.reference, n_train=trained, fixed_model=fixed_model)
            row = {"task": task, **one._asdict(), **estimate._asdict(), "folds": found.folds}
            seeds = len(found.seeds(one.arm, one.reference))
            sizes = {"cells": found.n_cells, "units": found.n_units} if seeds else {"cells": 0, "units": 0}
            why = too_few(found, score) or (withheld or {}).get((task, one.reference, one.arm))
            rows.append(row | {"seeds": seeds, **sizes, "why": why if seeds else None})
    table = pd.DataFrame(rows, columns=None if rows else sorted({*COLUMNS, *Estimate._fields} - {"difference"}))
    table = table.assign(score=score, margin=margin, more_seeds=None, times_cells=None)
    value, error, df = table[list(Estimate._fields)].to_numpy(float).T
    half = stats.t.ppf(1 - TAIL, df) * error
    table["low"], table["high"] = np.clip(value - half, -1, 1), np.clip(value + half, -1, 1)
    table["p"] = 2 * stats.t.sf(np.abs(value) / error, df)
    table["p_same"] = stats.t.sf((margin - np.abs(value)) / error, df)  # the larger of the two one-sided p values
    table.loc[table["why"].notna(), ["p", "p_same"]] = np.nan
    table = decided(table.rename(columns={"value": "difference"}), alpha)
    is_open = (table["verdict"] == UNDECIDED) & table["p"].notna() & (table["folds"] == 0)
    if is_open.any():
        levels = alpha / (table["p_holm"] >= alpha).sum(), alpha / max((table["p_same"] >= alpha).sum(), 1)
        needed = [
            _needed(scored[one.task], one.arm, one.reference, margin, levels, fixed_model=fixed_model)
            for one in table[is_open].itertuples()
        ]
        table.loc[is_open, ["more_seeds", "times_cells"]] = np.array(needed, dtype=object)
    return table[COLUMNS]


def decided(table: pd.DataFrame, alpha: float = ALPHA) -> pd.DataFrame:
    """Add ``p_holm`` and ``verdict`` to rows with difference, p and p_same, and correct ``p_same`` over all rows."""
    table = table.assign(p_holm=holm(table["p"]), p_same=holm(table["p_same"]))
    is_other, is_more = table["p_holm"] < alpha, table["difference"] > 0
    cases = [table["why"].notna(), is_other & is_more, is_other & ~is_more, table["p_same"] < alpha]
    return table.assign(verdict=np.select(cases, [WITHHELD, HIGHER, LOWER, SAME], UNDECIDED))


def too_few(found: Scored, score: str) -> str | None:
    """Say why nothing can be judged, where a class with fewer than `FEW_CELLS` test cells would decide; else None.

    In a mean over classes such classes are left out (`resampling.few_cells`), unless only one other class is there.
    """
    asked = {score.partition(":")[2]} if ":" in score else found.cells.keys() - found.left_out if score in MEANS else ()
    few = [
        f"{name} has {counted(n, 'test cell')}" for name, n in found.cells.items() if n < FEW_CELLS and name in asked
    ]
    return f"{', '.join(few)}, and no verdict rests on fewer than {FEW_CELLS}" if few else None


def _needed(
    found: Scored, arm: str, reference: str, margin: float, levels: tuple[float, float], *, fixed_model: bool
) -> tuple[int | None, float | None]:
    """Return how many more seeds, or times the test cells, would decide; None where it takes more than the most.

    `levels`: what p of a difference, and of sameness, has to be below. With n contrasts still open, Holm's next step
    asks for alpha / n, as long as the others stay as they are.
    """

    def first(steps: np.ndarray, **planned: np.ndarray) -> float | None:
        value, error, df = found.estimate(arm, reference, fixed_model=fixed_model, **planned)
        p, p_same = 2 * stats.t.sf(abs(value) / error, df), stats.t.sf((margin - abs(value)) / error, df)
        decides = (p < levels[0]) | (p_same < levels[1])
        return steps[decides.argmax()].item() if decides.any() else None

    seeds, times = np.arange(1, MOST_SEEDS + 1), np.linspace(1.5, MOST_TIMES, 18)
    n_seeds = None if fixed_model else first(seeds, n_seeds=seeds + len(found.seeds(arm, reference)))
    return n_seeds, first(times, times_units=times)


def arm_scores(
    predictions: Runs,
    *,
    score: str = "macro_f1",
    n_train: Mapping[tuple[str, str], float] | None = None,
    fixed_model: bool = False,
) -> pd.DataFrame:
    """Return the mean score of each arm with its 95 % `interval`, for other seeds and test cells (folds: corrected).

    With one seed and one test set there is no interval. Parameters as `judge`.

    Returns
    -------
    ``task``, ``arm``, ``mean``, ``low``, ``high``; one row per arm with a finished seed.
    """
    rows = []
    for task, found in _scored(predictions, score).items():
        for arm in dict.fromkeys(arm for arm, _ in found.place):
            estimate = found.estimate(arm, n_train=(n_train or {}).get((task, arm)), fixed_model=fixed_model)
            low, high = interval(estimate, found.floor)
            rows.append({"task": task, "arm": arm, "mean": estimate.value, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["task", "arm", "mean", "low", "high"])


def interval(estimate: Estimate, floor: float = 1.0) -> tuple[float, float]:
    """Return the 95 % interval of a score, computed on the logit scale (delta method): it stays between 0 and 1.

    At 0 and 1 it is that of Clopper and Pearson for 1 / `floor` cells (the smallest class times the number of classes).
    """
    mean, error, df = estimate
    if np.isnan(error):
        return np.nan, np.nan
    if 0 < mean < 1:
        half = stats.t.ppf(1 - TAIL, df) * error / (mean * (1 - mean))
        low, high = special.expit(special.logit(mean) + np.array([-half, half]))
        return float(low), float(high)
    return (TAIL**floor, 1.0) if mean == 1 else (0.0, 1 - TAIL**floor)


def answer(
    settings: Study, runs: pd.DataFrame, predictions: pd.DataFrame, declared: Sequence[Contrast] | None = None
) -> dict[str, Any]:
    """Answer a study: the content of ``answer.json``, in which what is not known is None.

    Parameters
    ----------
    runs, predictions
        Rows of ``runs.csv`` and ``predictions.parquet``. A run that failed leaves its arm and seed out.
    declared
        Contrasts; None takes those of the study and, for compression, compares every variant with the first.

    Returns
    -------
    ``study``, ``question``, ``simulated``, ``kind``, ``score``, ``margin``, ``alpha``, ``rule`` (one sentence),
    ``n_contrasts`` (of all tasks) and ``tasks``: for each ``task``, ``folds``, ``seeds``, ``test_cells`` (by class),
    ``left_out`` (classes that are not in the judged score), ``arms`` (best first: `arm_scores`, n_runs, n_failed,
    n_constant, is_baseline, is_control, is_ceiling), ``contrasts`` (`judge`) and ``recommendation`` (sentences). A
    study with the factorial of pseudo-bulk has ``falls`` too (`shapley.shapley_shares`, with the ``k`` of each).
    """
    from tuneformer.evaluate import shapley

    is_ok, is_compression = runs["status"] == "ok", settings.kind == "compression"
    if declared is None:
        first, *variants = runs["arm"].unique()
        declared = [Contrast(arm, first, arm) for arm in variants] if is_compression else contrasts(settings)
    scored = dict.fromkeys(settings.tasks, NOTHING) | score_tasks(predictions, settings.score)
    options: dict[str, Any] = {"score": settings.score, "fixed_model": is_compression and runs["seed"].nunique() == 1}
    if any(found.folds for found in scored.values()):
        options["n_train"] = runs[is_ok].groupby(["task", "arm"], observed=True)["n_train"].mean().to_dict()
    runs = runs.assign(n_constant=_constant(runs, predictions))
    judged = judge(scored, declared, margin=settings.margin, withheld=_untold(runs, declared), **options)
    means = arm_scores(scored, **options)
    runs = runs.assign(n_runs=is_ok, n_failed=~is_ok, is_control=runs["strategy"] == CONTROL)
    runs["is_baseline"] = runs["strategy"].isin({*BASELINES, *GENE_BASELINES} - {CEILING})
    runs = runs.assign(is_ceiling=runs["strategy"] == CEILING)
    flags = dict.fromkeys(["n_runs", "n_failed", "n_constant"], "sum")
    flags |= dict.fromkeys(["is_baseline", "is_control", "is_ceiling"], "any")
    factorials = shapley.pseudobulk_factors(settings) if settings.kind == "cells" else {}
    falls = [shapley.shapley_shares(scored, arms, score=settings.score).assign(k=k) for k, arms in factorials.items()]
    tasks = []
    for task, found in scored.items():
        of_task = runs[runs["task"] == task]
        arms = means[means["task"] == task].drop(columns="task").set_index("arm")
        arms = of_task.groupby("arm", sort=False, observed=True)[[*flags]].agg(flags).join(arms)
        arms = arms.sort_values("mean", ascending=False).reset_index()[["arm", "mean", "low", "high", *flags]]
        contrasts_of_task = judged[judged["task"] == task].drop(columns="task")
        head = {"task": task, "folds": found.folds, "seeds": sorted(map(int, of_task["seed"].unique()))}
        head |= {"test_cells": {name: int(n) for name, n in found.cells.items()}, "left_out": found.left_out}
        tasks.append({**head, "arms": plain(arms), "contrasts": plain(contrasts_of_task)})
        tasks[-1]["recommendation"] = recommendations(tasks[-1])
        if falls:
            fall = pd.concat(falls, ignore_index=True)
            tasks[-1]["falls"] = plain(fall[fall["task"] == task].drop(columns="task"))
    head = {name: getattr(settings, name) for name in ("study", "question", "simulated", "kind", "score", "margin")}
    rule = rule_of(
        settings, int(judged["why"].isna().sum()), has_folds="n_train" in options, n_seeds=runs["seed"].nunique()
    )
    return {**head, "alpha": ALPHA, "rule": rule, "n_contrasts": len(judged), "tasks": tasks}


def variance_shares(predictions: pd.DataFrame, *, score: str = "macro_f1") -> pd.DataFrame:
    """Divide the variance of the scores of each task into what arms, seeds, both together and test cells contribute.

    A two-way layout of arms and seeds without repetition, solved from the mean squares (method of moments). Test cells
    drawn again move all runs together, and arms, seeds and single runs by themselves: the whole is the mean bootstrap
    variance of a run's score, and its parts are taken out of the others. An estimate below 0 counts as 0.

    Returns
    -------
    Shares, 0 to 1: one row per task, columns ``arm``, ``seed``, ``arm x seed``, ``test cells``; folds are pooled. A
    task with fewer than two arms, or two seeds that all arms have, is left out.
    """
    shares = {}
    for task, found in score_tasks(predictions.assign(fold=np.nan), score).items():
        arms = list(dict.fromkeys(arm for arm, _ in found.place))
        seeds = found.seeds(*arms)
        if min(len(arms), len(seeds), found.n_units) < 2:
            continue
        layout = np.array([[found.place[arm, seed] for seed in seeds] for arm in arms])  # (arms, seeds)
        deviations = (found.drawn - found.drawn.mean(axis=0))[:, layout]  # (samples, arms, seeds)
        correction = found.n_units / (found.n_units - 1)
        of_cells, of_runs = components(deviations), components(found.values[0][layout])
        parts = {name: value - correction * of_cells[name].mean() for name, value in of_runs.items()}
        variance = pd.Series({**parts, "test cells": correction * (deviations**2).mean()}).clip(lower=0)
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

    A bootstrap over genes that holds the fitted models fixed is too narrow, for other training genes would have given
    other models; permuted classes are learned anew each time. One-sided; with n permutations at least 1 / (n + 1)
    (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    permuted = np.asarray(list(permuted), dtype=float)
    return float((1 + (permuted >= observed).sum()) / (1 + len(permuted)))


def _constant(runs: pd.DataFrame, predictions: pd.DataFrame) -> np.ndarray:
    """Say of each run whether it called all its test cells, of several classes, the same."""
    place = ["task", "arm", "seed", "fold"]
    kinds = predictions.astype({"task": str, "arm": str, "label": str, "predicted": str})
    kinds = kinds.groupby(place, dropna=False)[["label", "predicted"]].nunique()
    is_constant = (kinds["predicted"] == 1) & (kinds["label"] > 1)
    rows = pd.MultiIndex.from_frame(runs[place].astype({"seed": int, "fold": float}))
    constant = is_constant[is_constant].reset_index()[place].astype({"seed": int, "fold": float})
    return rows.isin(pd.MultiIndex.from_frame(constant))


def _untold(runs: pd.DataFrame, declared: Iterable[Contrast]) -> dict[tuple[str, str, str], str]:
    """Say of which contrasts with the control nothing follows on pre-training.

    The checkpoint knows too few of the genes, or too many runs of one side never left one class: then what is compared
    is whether training got going within its steps.
    """
    found = {}
    columns = ["task", "arm", "strategy", "known_genes", "n_constant"]
    for task, rows in runs.reindex(columns=columns).groupby("task", sort=False):
        by_arm = rows.groupby("arm").agg({"known_genes": "first", "strategy": "first", "n_constant": ["sum", "size"]})
        by_arm.columns = ["known_genes", "strategy", "n_constant", "n_runs"]
        for one in declared:
            ends = by_arm.reindex([one.reference, one.arm])
            if CONTROL not in set(ends["strategy"]):
                continue
            place, share = (str(task), one.reference, one.arm), ends["known_genes"].astype(float).max()
            stuck = ends[ends["n_constant"] > MOST_CONSTANT * ends["n_runs"]]
            if share < LEAST_KNOWN:
                found[place] = (
                    f"the checkpoint knows {share:.0%} of the genes, too few to say what its pre-training does"
                )
            elif len(stuck):
                name, worst = stuck.index[0], stuck.iloc[0]
                found[place] = (
                    f"{worst['n_constant']:.0f} of {worst['n_runs']:.0f} runs of {name} never left one class, so that "
                    "the steps were too few to compare what they lead to"
                )
    return found


def _scored(predictions: Runs, score: str) -> Mapping[str, Scored]:
    return score_tasks(predictions, score) if isinstance(predictions, pd.DataFrame) else predictions


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON can hold them: NaN as None, numbers with six digits."""
    rows = table.to_dict("records")
    rounded = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return [{k: None if pd.isna(v) else v for k, v in row.items()} for row in rounded]
