"""What the seeds of a study say together: intervals, paired differences and the answer table.

In: rows of ``metrics.csv``. Out: means over seeds with 95 % t intervals. They cover the spread between seeds (training
cells drawn, head, order) on one fixed test set; they do not cover the choice of the test cells, as the tests in
`tuneformer.evaluate.comparisons` do. In a cross-validation the intervals are over folds, and wider, because the
training cells of the folds overlap.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.evaluate.metrics import confusion_table
from tuneformer.study.treatments import BASELINES

CONTROL = "random_init"
TREATMENT = "full"  # what the control is treated like, but for the pre-training
LINEAR = "logistic_counts"  # the baseline that a strategy has to beat
CONFIDENCE = 0.95
MISSING = "-"
SCORES = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}  # metrics that figures and tables show, and their names
RESAMPLES = 9999  # of the seeds, for a bootstrap interval
COSTS = {"seconds": "cost:wall_seconds", "parameters": "cost:trainable_parameters"}


class Interval(NamedTuple):
    """Mean of `n` values, their standard deviation, and the 95 % interval of the mean; NaN where n is 1."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def interval(values: Iterable[float], *, overlap: float = 0.0) -> Interval:
    """Return the mean of the values (one per seed) with its 95 % interval after Student's t distribution.

    Missing values are left out. With one value there is no spread, so sd, low and high are NaN.

    Parameters
    ----------
    values
        One a seed, or in a cross-validation one a fold.
    overlap
        Test cells per training cell of a fold; 0 for values that are independent. The variance of the mean of J values
        is (1/J + overlap) times theirs (Nadeau and Bengio 2003, Machine Learning 52:239, section 5).

    Raises
    ------
    ValueError
        No value is left.
    """
    values = np.asarray(list(values), dtype=float)
    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        msg = "An interval needs at least one value that is not NaN; no run of this group has finished with a score."
        raise ValueError(msg)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan, np.nan, n)
    sd = float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / np.sqrt(n / (1 + n * overlap))
    return Interval(mean, sd, float(mean - half), float(mean + half), n)


def over_runs(rows: pd.DataFrame) -> Interval:
    """Return the mean of the column value over runs with its `interval`: over seeds, or over folds.

    The seeds of a fold share its cells, so their mean is one value.

    Parameters
    ----------
    rows
        Rows of ``metrics.csv`` of one arm and one metric: value and, where there are folds, fold, n_train and n_test.
    """
    shared = overlap(rows)
    return interval(rows.groupby("fold")["value"].mean() if shared else rows["value"], overlap=shared)


def by_run(rows: pd.DataFrame, columns: str) -> pd.DataFrame:
    """Lay out the column value: one row a seed, or fold (the mean of its seeds), and one column a value of `columns`.

    In a fold, only seeds count that all columns have.
    """
    if overlap(rows) == 0:
        return rows.pivot(index="seed", columns=columns, values="value")
    return rows.pivot(index=["fold", "seed"], columns=columns, values="value").dropna().groupby("fold").mean()


def overlap(rows: pd.DataFrame) -> float:
    """Return the test cells per training cell of the folds of a cross-validation; 0 without folds."""
    if "fold" not in rows or rows["fold"].isna().all():
        return 0.0
    return float((rows["n_test"] / rows["n_train"]).mean())


def bootstrap_interval(values: Iterable[float]) -> Interval:
    """Return the mean of the values (one per seed) with its 95 % interval after the percentile bootstrap.

    It assumes no distribution, but with few values it is too narrow: of normal values, 5 give an interval that holds
    the true mean in 83 % of all cases, 20 one that does in 93 % (counted in the tests). Tables therefore show
    `interval`; this one shows whether that depends on the values being normal. Missing values are left out, and with
    one value there is no spread, as in `interval`. The draw has a fixed seed.

    Raises
    ------
    ValueError
        No value is left.
    """
    known = [value for value in values if not np.isnan(value)]
    found = interval(known)
    if found.n == 1:
        return found
    options = {"confidence_level": CONFIDENCE, "method": "percentile", "rng": np.random.default_rng(0)}
    low, high = stats.bootstrap((known,), np.mean, n_resamples=RESAMPLES, **options).confidence_interval
    return found._replace(low=float(low), high=float(high))


def paired_difference(scores: pd.DataFrame, a: str, b: str) -> Interval:
    """Return the mean of (score of `a` - score of `b`) over the seeds that both have, with its 95 % t interval.

    Runs of one seed share training cells, head initialisation and order, so the pair removes what they have in common.
    In a cross-validation the difference is over folds, in each over the seeds that both have.

    Parameters
    ----------
    scores
        Columns strategy, seed, value and, where there are folds, fold, n_train, n_test: one row per run, of one task,
        one train set and one metric.
    a, b
        Strategies.

    Raises
    ------
    ValueError
        A strategy without scores, two scores of one strategy and seed, or no seed that both have.
    """
    rows = scores.dropna(subset=["value"])
    rows = rows[rows["strategy"].isin([a, b])]
    twice = rows[rows.duplicated(["strategy", "seed", *({"fold"} & set(rows))])]
    if not twice.empty:
        msg = (
            f"{twice['strategy'].iloc[0]} has several scores for seed {twice['seed'].iloc[0]}: "
            "give rows of one task, one train set and one metric."
        )
        raise ValueError(msg)
    for name in (a, b):
        if name not in set(rows["strategy"]):
            msg = f"{name} has no scores here; strategies with scores: {', '.join(scores['strategy'].unique())}."
            raise ValueError(msg)
    wide = by_run(rows, "strategy").dropna()
    if wide.empty:
        msg = f"{a} and {b} have no seed in common, so they cannot be compared seed by seed."
        raise ValueError(msg)
    return interval(wide[a] - wide[b], overlap=overlap(rows))


def with_arms(metrics: pd.DataFrame) -> pd.DataFrame:
    """Add the column arm: what is compared, the strategy, named with its train set where the study has several."""
    several = metrics["train_set"].nunique() > 1
    arm = metrics["train_set"] + ", " + metrics["strategy"] if several else metrics["strategy"]
    return metrics.assign(arm=arm)


def answer_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rank the strategies and baselines of each task by their mean test macro-F1 and say what they cost.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.

    Returns
    -------
    One row per task, train set and strategy, best first within a task. task, train_set, strategy; runs and failed (of
    these); macro_f1, low, high (95 % interval over seeds); accuracy; seconds and parameters (means; trainable
    parameters); gain, gain_low, gain_high (paired difference to `random_init`; NaN without that control, for itself
    and for baselines); beyond, beyond_low, beyond_high (paired difference to `logistic_counts`; NaN without it and for
    baselines).
    """
    keys = ["task", "train_set", "strategy"]
    rows = [
        {**dict(zip(keys, key, strict=True)), **_answer_row(part)} for key, part in metrics.groupby(keys, sort=False)
    ]
    table = pd.DataFrame(rows)
    for name, against in {"gain": CONTROL, "beyond": LINEAR}.items():
        found = [_against(metrics, row.task, row.train_set, row.strategy, against) for row in table.itertuples()]
        table[[name, f"{name}_low", f"{name}_high"]] = pd.DataFrame(found, index=table.index, dtype=float)
    order = {task: place for place, task in enumerate(metrics["task"].unique())}
    table["_task"] = table["task"].map(order)
    table = table.sort_values(["_task", "macro_f1"], ascending=[True, False], kind="stable", na_position="last")
    return table.drop(columns="_task").reset_index(drop=True)


def intervals_by_method(metrics: pd.DataFrame) -> pd.DataFrame:
    """Set the t interval of the mean macro-F1 of each arm beside the bootstrap interval, as text.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.

    Returns
    -------
    Indexed by task and arm: runs, mean, sd, and the two intervals; see `interval` and `bootstrap_interval`. The
    bootstrap knows nothing of the overlap of folds.
    """
    rows = with_arms(metrics[metrics["metric"] == "macro_f1"].dropna(subset=["value"]))
    table = []
    for (task, arm), part in rows.groupby(["task", "arm"], sort=False):
        values = part.groupby("fold")["value"].mean() if overlap(part) else part["value"]
        by_t, drawn = over_runs(part), bootstrap_interval(values)
        texts = [MISSING if found.n == 1 else f"{found.low:.3f} to {found.high:.3f}" for found in (by_t, drawn)]
        table.append((task, arm, by_t.n, round(by_t.mean, 3), round(by_t.sd, 3), *texts))
    columns = ["task", "arm", "runs", "mean", "sd", "t interval", "bootstrap interval"]
    return pd.DataFrame(table, columns=columns).set_index(["task", "arm"])


def verdicts(metrics: pd.DataFrame) -> pd.DataFrame:
    """Judge each task: which strategy is ahead, whether clearly so, and what pre-training is worth.

    Returns
    -------
    One row per task with scores. task; best, macro_f1, low, high of the strategy with the highest mean, over so many
    seeds and folds (0 without);
    second, lead, lead_low, lead_high: the next one on the same train set, and the paired difference to it; pretrained,
    gain, gain_low, gain_high: `full`, and its paired difference to `random_init`, which is treated alike but for the
    pre-training; beyond, beyond_low, beyond_high: paired difference of the best strategy to `logistic_counts`; beating
    and tried: of how many strategies that interval lies above zero, and how many have one. Missing where there is
    nothing to compare. Baselines are never the best or the second.
    """
    scored = answer_table(metrics).dropna(subset=["macro_f1"])
    scored = scored[~scored["strategy"].isin(BASELINES)]
    return pd.DataFrame([_verdict(metrics, table) for _, table in scored.groupby("task", sort=False)])


def headline(judged: pd.DataFrame) -> str:
    """Sum up `verdicts` in one line: in how many tasks one leads, pre-training pays, the linear model is beaten.

    Clearly means that the 95 % interval of the paired difference lies above zero.
    """
    if judged.empty:
        return "No run has finished with a score."
    ahead, pays = (judged["lead_low"] > 0).sum(), (judged["gain_low"] > 0).sum()
    beaten = (judged["beating"] > 0).sum()
    tasks = len(judged)
    if tasks == 1:
        linear = f"{'A' if beaten else 'No'} strategy clearly beats the linear model {LINEAR}."
        lead = "One strategy is clearly ahead." if ahead else "No strategy is clearly ahead."
        worth = "Pre-training clearly pays." if pays else "It is not clear that pre-training pays."
    else:
        lead = f"One strategy is clearly ahead in {ahead or 'none'} of {tasks} tasks."
        worth = f"Pre-training clearly pays in {pays or 'none'} of {tasks} tasks."
        linear = f"A strategy clearly beats the linear model {LINEAR} in {beaten or 'none'} of {tasks} tasks."
    said = {
        lead: judged["second"].notna().any(),
        worth: judged["pretrained"].notna().any(),
        linear: judged["tried"].any(),
    }
    return " ".join(text for text, compared in said.items() if compared)


def sentences(judged: pd.DataFrame) -> dict[str, str]:
    """Say in words what `verdicts` holds, task by task."""
    return {row.task: _sentence(row) for row in judged.itertuples()}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `answer_table` as text for a reader: rounded, with intervals, without empty columns."""
    shown = pd.DataFrame({"Task": table["task"], "Train set": table["train_set"], "Strategy": table["strategy"]})
    shown["Macro-F1 (95 % interval)"] = [
        with_interval(*row) for row in table[["macro_f1", "low", "high"]].itertuples(index=False)
    ]
    shown["Accuracy"] = [_number(value) for value in table["accuracy"]]
    shown[f"Gain over {CONTROL} (95 % interval)"] = [
        with_interval(*row, sign="+") for row in table[["gain", "gain_low", "gain_high"]].itertuples(index=False)
    ]
    shown["Time (s)"] = [_number(value, ",.1f") for value in table["seconds"]]
    shown["Trainable parameters"] = [_number(value, ",.0f") for value in table["parameters"]]
    finished = table["runs"] - table["failed"]
    shown["Runs"] = [
        f"{done}" if done == runs else f"{done} of {runs}" for done, runs in zip(finished, table["runs"], strict=True)
    ]
    shown[f"Against {LINEAR} (95 % interval)"] = [
        with_interval(*row, sign="+") for row in table[["beyond", "beyond_low", "beyond_high"]].itertuples(index=False)
    ]
    if table["beyond"].isna().all():
        shown = shown.drop(columns=f"Against {LINEAR} (95 % interval)")
    if table["train_set"].nunique() == 1:
        shown = shown.drop(columns="Train set")
    return shown if table["gain"].notna().any() else shown.drop(columns=f"Gain over {CONTROL} (95 % interval)")


def accuracy_gap(metrics: pd.DataFrame) -> float:
    """Return the largest distance, over the runs, of the accuracy to the one that the confusion matrix gives."""
    scored = metrics[metrics["fingerprint"].isin(metrics.loc[metrics["metric"] == "accuracy", "fingerprint"])]
    gaps = []
    for _, rows in scored.groupby("fingerprint"):
        table = confusion_table(rows).to_numpy()
        stated = rows.loc[rows["metric"] == "accuracy", "value"].item()
        gaps.append(abs(np.trace(table) / table.sum() - stated))
    return max(gaps)


def off_reference(metrics: pd.DataFrame, expected: Mapping[str, float], tolerance: float) -> dict[str, float]:
    """Return the mean macro-F1 of each strategy that is farther than `tolerance` from its reference.

    Parameters
    ----------
    metrics
        Columns strategy, metric and value.
    expected
        Reference by strategy; a strategy that has none, or no score here, is not checked.
    tolerance
        Largest accepted distance.
    """
    means = metrics[metrics["metric"] == "macro_f1"].groupby("strategy")["value"].mean()
    return {name: mean for name, mean in means.items() if name in expected and abs(mean - expected[name]) > tolerance}


def _answer_row(part: pd.DataFrame) -> dict[str, float]:
    values = {metric: rows["value"].dropna() for metric, rows in part.groupby("metric")}
    missing = pd.Series(dtype=float)
    scores = part[(part["metric"] == "macro_f1") & part["value"].notna()]
    found = over_runs(scores) if len(scores) else Interval(np.nan, np.nan, np.nan, np.nan, 0)
    failed = part.loc[part["metric"].str.startswith("status:"), "fingerprint"].nunique()
    return {
        "runs": part["fingerprint"].nunique(),
        "failed": failed,
        "macro_f1": found.mean,
        "low": found.low,
        "high": found.high,
        "accuracy": values.get("accuracy", missing).mean(),
        **{name: values.get(metric, missing).mean() for name, metric in COSTS.items()},
    }


def _against(
    metrics: pd.DataFrame, task: str, train_set: str, strategy: str, control: str
) -> tuple[float, float, float]:
    missing = (np.nan, np.nan, np.nan)
    if strategy == control or strategy in BASELINES:
        return missing
    rows = _macro_f1(metrics, task, train_set)
    if not _share_a_seed(rows, strategy, control):
        return missing
    found = paired_difference(rows, strategy, control)
    return found.mean, found.low, found.high


def _macro_f1(metrics: pd.DataFrame, task: str, train_set: str) -> pd.DataFrame:
    is_asked = (metrics["task"] == task) & (metrics["train_set"] == train_set) & (metrics["metric"] == "macro_f1")
    columns = ["strategy", "seed", "fold", "value", "n_train", "n_test"]
    return metrics.loc[is_asked, metrics.columns.intersection(columns)].dropna(subset=["value"])


def _verdict(metrics: pd.DataFrame, table: pd.DataFrame) -> dict[str, object]:
    """Judge one task; `table` holds its rows of `answer_table` that have a score, best first."""
    best = table.iloc[0]
    rows = _macro_f1(metrics, best["task"], best["train_set"])
    row = best[["task", "macro_f1", "low", "high"]].to_dict()
    folds = rows["fold"].nunique() if "fold" in rows else 0
    seeds = rows.loc[rows["strategy"] == best["strategy"], "seed"].nunique()
    row |= {"best": best["strategy"], "seeds": seeds, "folds": folds, "second": None, "pretrained": None}
    row |= dict.fromkeys(["lead", "lead_low", "lead_high", "gain", "gain_low", "gain_high"], np.nan)
    row |= best[["beyond", "beyond_low", "beyond_high"]].to_dict()
    beyond = table.loc[table["strategy"] != CONTROL, ["beyond", "beyond_low"]].dropna(subset=["beyond"])
    row |= {"beating": int((beyond["beyond_low"] > 0).sum()), "tried": len(beyond)}
    rivals = table[(table["train_set"] == best["train_set"]) & (table["strategy"] != best["strategy"])]["strategy"]
    if len(rivals) and _share_a_seed(rows, best["strategy"], rivals.iloc[0]):
        lead = paired_difference(rows, best["strategy"], rivals.iloc[0])
        row |= {"second": rivals.iloc[0], "lead": lead.mean, "lead_low": lead.low, "lead_high": lead.high}
    gaining = table[(table["strategy"] == TREATMENT) & table["gain"].notna()]
    if len(gaining):
        row |= {"pretrained": TREATMENT}
        row |= gaining.iloc[0][["gain", "gain_low", "gain_high"]].to_dict()
    return row


def _share_a_seed(rows: pd.DataFrame, a: str, b: str) -> bool:
    keys = ["seed", "fold"] if overlap(rows) else ["seed"]
    runs = [set(rows.loc[rows["strategy"] == name, keys].itertuples(index=False, name=None)) for name in (a, b)]
    return not runs[0].isdisjoint(runs[1])


def _sentence(row: NamedTuple) -> str:
    seeds = f"{row.folds} folds" if row.folds else "1 seed" if row.seeds == 1 else f"{row.seeds} seeds"
    score = with_interval(row.macro_f1, row.low, row.high)
    highest = "a mean macro-F1" if row.second is None else "the highest mean macro-F1 of the strategies"
    text = [f"{row.best} has {highest} over {seeds}, {score}."]
    if row.second is not None:
        lead = with_interval(row.lead, row.lead_low, row.lead_high, sign="+")
        how = "It leads" if row.lead_low > 0 else "It has no clear lead over"
        text.append(f"{how} {row.second}: {lead}.")
    if row.pretrained is not None:
        gain = with_interval(row.gain, row.gain_low, row.gain_high, sign="+")
        worth = "pays" if row.gain_low > 0 else "hurts" if row.gain_high < 0 else "shows no clear gain"
        text.append(f"Pre-training {worth}: {row.pretrained} against {CONTROL}, the same model without it, {gain}.")
    if row.tried:
        beyond = with_interval(row.beyond, row.beyond_low, row.beyond_high, sign="+")
        verb = beats(row.beyond_low, row.beyond_high)
        others = f"; of {row.tried} strategies {row.beating or 'none'} clearly does" if row.tried > 1 else ""
        text.append(f"It {verb} {LINEAR}, a linear model on the counts of the same cells: {beyond}{others}.")
    return " ".join(text)


def beats(low: float, high: float) -> str:
    """Say what the interval of a difference to a rival means: beats it, loses to it, or does not clearly beat it."""
    return "beats" if low > 0 else "loses to" if high < 0 else "does not clearly beat"


def with_interval(mean: float, low: float, high: float, sign: str = "") -> str:
    """Return a number with its interval as text, such as ``0.473 (0.386 to 0.560)``; a dash where it is missing."""
    if np.isnan(mean):
        return MISSING
    text = format(mean, f"{sign}.3f")
    return text if np.isnan(low) else f"{text} ({low:{sign}.3f} to {high:{sign}.3f})"


def _number(value: float, style: str = ".3f") -> str:
    return MISSING if np.isnan(value) else format(value, style)
