"""What the seeds of a study say together: intervals, paired differences and the answer table.

In: rows of ``metrics.csv``. Out: means over seeds with 95 % t intervals. They cover the spread between seeds (training
cells drawn, head, order) on one fixed test set; they do not cover the choice of the test cells.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.evaluate.metrics import confusion_table

CONTROL = "random_init"
TREATMENT = "full"  # what the control is treated like, but for the pre-training
CONFIDENCE = 0.95
MISSING = "-"
COSTS = {"seconds": "cost:wall_seconds", "parameters": "cost:trainable_parameters"}


class Interval(NamedTuple):
    """Mean of `n` values, their standard deviation, and the 95 % interval of the mean; NaN where n is 1."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def interval(values: Iterable[float]) -> Interval:
    """Return the mean of the values (one per seed) with its 95 % interval after Student's t distribution.

    Missing values are left out. With one value there is no spread, so sd, low and high are NaN.

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
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / np.sqrt(n)
    return Interval(mean, sd, float(mean - half), float(mean + half), n)


def paired_difference(scores: pd.DataFrame, a: str, b: str) -> Interval:
    """Return the mean of (score of `a` - score of `b`) over the seeds that both have, with its 95 % t interval.

    Runs of one seed share training cells, head initialisation and order, so the pair removes what they have in common.

    Parameters
    ----------
    scores
        Columns strategy, seed, value: one row per run, of one task, one train set and one metric.
    a, b
        Strategies.

    Raises
    ------
    ValueError
        A strategy without scores, two scores of one strategy and seed, or no seed that both have.
    """
    rows = scores.dropna(subset=["value"])
    rows = rows[rows["strategy"].isin([a, b])]
    twice = rows[rows.duplicated(["strategy", "seed"])]
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
    wide = rows.pivot(index="seed", columns="strategy", values="value").dropna()
    if wide.empty:
        msg = f"{a} and {b} have no seed in common, so they cannot be compared seed by seed."
        raise ValueError(msg)
    return interval(wide[a] - wide[b])


def with_arms(metrics: pd.DataFrame) -> pd.DataFrame:
    """Add the column arm: what is compared, the strategy, named with its train set where the study has several."""
    several = metrics["train_set"].nunique() > 1
    arm = metrics["train_set"] + ", " + metrics["strategy"] if several else metrics["strategy"]
    return metrics.assign(arm=arm)


def answer_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rank the strategies of each task by their mean test macro-F1 and say what they cost.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.

    Returns
    -------
    One row per task, train set and strategy, best first within a task. task, train_set, strategy; runs and failed (of
    these); macro_f1, low, high (95 % interval over seeds); accuracy; seconds and parameters (means; trainable
    parameters); gain, gain_low, gain_high (paired difference to `random_init`; NaN without that control and for the
    control itself).
    """
    keys = ["task", "train_set", "strategy"]
    rows = [
        {**dict(zip(keys, key, strict=True)), **_answer_row(part)} for key, part in metrics.groupby(keys, sort=False)
    ]
    table = pd.DataFrame(rows)
    gains = [_gain(metrics, row.task, row.train_set, row.strategy) for row in table.itertuples()]
    table[["gain", "gain_low", "gain_high"]] = pd.DataFrame(gains, index=table.index, dtype=float)
    order = {task: place for place, task in enumerate(metrics["task"].unique())}
    table["_task"] = table["task"].map(order)
    table = table.sort_values(["_task", "macro_f1"], ascending=[True, False], kind="stable", na_position="last")
    return table.drop(columns="_task").reset_index(drop=True)


def verdicts(metrics: pd.DataFrame) -> pd.DataFrame:
    """Judge each task: which strategy is ahead, whether clearly so, and what pre-training is worth.

    Returns
    -------
    One row per task with scores. task; best, macro_f1, low, high and seeds of the strategy with the highest mean;
    second, lead, lead_low, lead_high: the next one on the same train set, and the paired difference to it; pretrained,
    gain, gain_low, gain_high: `full`, and its paired difference to `random_init`, which is treated alike but for the
    pre-training. Missing where there is nothing to compare.
    """
    scored = answer_table(metrics).dropna(subset=["macro_f1"])
    return pd.DataFrame([_verdict(metrics, table) for _, table in scored.groupby("task", sort=False)])


def headline(judged: pd.DataFrame) -> str:
    """Sum up `verdicts` in one line: in how many tasks one strategy leads, and in how many pre-training pays.

    Clearly means that the 95 % interval of the paired difference lies above zero.
    """
    if judged.empty:
        return "No run has finished with a score."
    ahead, pays = (judged["lead_low"] > 0).sum(), (judged["gain_low"] > 0).sum()
    tasks = len(judged)
    if tasks == 1:
        lead = "One strategy is clearly ahead." if ahead else "No strategy is clearly ahead."
        worth = "Pre-training clearly pays." if pays else "It is not clear that pre-training pays."
    else:
        lead = f"One strategy is clearly ahead in {ahead or 'none'} of {tasks} tasks."
        worth = f"Pre-training clearly pays in {pays or 'none'} of {tasks} tasks."
    said = {lead: judged["second"].notna().any(), worth: judged["pretrained"].notna().any()}
    return " ".join(text for text, compared in said.items() if compared)


def sentences(judged: pd.DataFrame) -> dict[str, str]:
    """Say in words what `verdicts` holds, task by task."""
    return {row.task: _sentence(row) for row in judged.itertuples()}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `answer_table` as text for a reader: rounded, with intervals, without empty columns."""
    shown = pd.DataFrame({"Task": table["task"], "Train set": table["train_set"], "Strategy": table["strategy"]})
    shown["Macro-F1 (95 % interval)"] = [
        _with_interval(*row) for row in table[["macro_f1", "low", "high"]].itertuples(index=False)
    ]
    shown["Accuracy"] = [_number(value) for value in table["accuracy"]]
    shown[f"Gain over {CONTROL} (95 % interval)"] = [
        _with_interval(*row, sign="+") for row in table[["gain", "gain_low", "gain_high"]].itertuples(index=False)
    ]
    shown["Time (s)"] = [_number(value, ",.1f") for value in table["seconds"]]
    shown["Trainable parameters"] = [_number(value, ",.0f") for value in table["parameters"]]
    finished = table["runs"] - table["failed"]
    shown["Runs"] = [
        f"{done}" if done == runs else f"{done} of {runs}" for done, runs in zip(finished, table["runs"], strict=True)
    ]
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
    scores = values.get("macro_f1", missing)
    found = interval(scores) if len(scores) else Interval(np.nan, np.nan, np.nan, np.nan, 0)
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


def _gain(metrics: pd.DataFrame, task: str, train_set: str, strategy: str) -> tuple[float, float, float]:
    missing = (np.nan, np.nan, np.nan)
    if strategy == CONTROL:
        return missing
    rows = _macro_f1(metrics, task, train_set)
    if not _share_a_seed(rows, strategy, CONTROL):
        return missing
    found = paired_difference(rows, strategy, CONTROL)
    return found.mean, found.low, found.high


def _macro_f1(metrics: pd.DataFrame, task: str, train_set: str) -> pd.DataFrame:
    is_asked = (metrics["task"] == task) & (metrics["train_set"] == train_set) & (metrics["metric"] == "macro_f1")
    return metrics.loc[is_asked, ["strategy", "seed", "value"]].dropna()


def _verdict(metrics: pd.DataFrame, table: pd.DataFrame) -> dict[str, object]:
    """Judge one task; `table` holds its rows of `answer_table` that have a score, best first."""
    best = table.iloc[0]
    rows = _macro_f1(metrics, best["task"], best["train_set"])
    row = best[["task", "macro_f1", "low", "high"]].to_dict()
    row |= {"best": best["strategy"], "seeds": best["runs"] - best["failed"], "second": None, "pretrained": None}
    row |= dict.fromkeys(["lead", "lead_low", "lead_high", "gain", "gain_low", "gain_high"], np.nan)
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
    return not set(rows.loc[rows["strategy"] == a, "seed"]).isdisjoint(rows.loc[rows["strategy"] == b, "seed"])


def _sentence(row: NamedTuple) -> str:
    seeds = "1 seed" if row.seeds == 1 else f"{row.seeds} seeds"
    score = _with_interval(row.macro_f1, row.low, row.high)
    text = [f"{row.best} has the highest mean macro-F1 over {seeds}, {score}."]
    if row.second is not None:
        lead = _with_interval(row.lead, row.lead_low, row.lead_high, sign="+")
        how = "It leads" if row.lead_low > 0 else "It has no clear lead over"
        text.append(f"{how} {row.second}: {lead}.")
    if row.pretrained is not None:
        gain = _with_interval(row.gain, row.gain_low, row.gain_high, sign="+")
        worth = "pays" if row.gain_low > 0 else "hurts" if row.gain_high < 0 else "shows no clear gain"
        text.append(f"Pre-training {worth}: {row.pretrained} against {CONTROL}, the same model without it, {gain}.")
    return " ".join(text)


def _with_interval(mean: float, low: float, high: float, sign: str = "") -> str:
    if np.isnan(mean):
        return MISSING
    text = format(mean, f"{sign}.3f")
    return text if np.isnan(low) else f"{text} ({low:{sign}.3f} to {high:{sign}.3f})"


def _number(value: float, style: str = ".3f") -> str:
    return MISSING if np.isnan(value) else format(value, style)
