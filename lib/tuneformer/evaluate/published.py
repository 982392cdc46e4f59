"""Published numbers beside ours, wherever both exist.

In: ``assets/published.csv``, the numbers of the four published studies, and rows of ``metrics.csv``. Out: a table with
the published value and our mean with its interval for the same data set, task, train set and strategy, and a sentence.
Published numbers are of real cells; beside scores on simulated cells none is shown.
"""

import operator

import numpy as np
import pandas as pd

from tuneformer.evaluate import statistics
from tuneformer.evaluate.statistics import Interval
from tuneformer.study import paths
from tuneformer.study.params import load_study

FILE = paths.ASSETS / "published.csv"
AGREES, HIGHER, LOWER, UNCLEAR = "agrees", "ours is higher", "ours is lower", "unclear"
_HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt}  # what is said of the published study's own score
_SIDES = ["task", "train_set", "strategy", "metric"]
_COLUMNS = [*_SIDES, "relation", "published", "trials", "mean", "low", "high", "runs", "verdict"]
_COLUMNS += ["study", "source", "note"]


def read() -> pd.DataFrame:
    """Read the published numbers, one row each.

    Returns
    -------
    ``study``: the params file that repeats it with the published settings; ``task``, ``train_set``, ``metric`` as in
    ``metrics.csv``; ``strategy``: one, or several (with blanks between) over which the published value is a mean;
    ``trial``: number of the trial, missing where there is one; ``relation``: ``=``, or ``<``, ``<=``, ``>`` for a
    bound; ``value`` (0 to 1); ``source``: study and place in it; ``note``: what that leaves open, and how it is taken.
    """
    return pd.read_csv(FILE, dtype={"trial": "Int64"}, keep_default_na=False, na_values={"trial": ""})


def compare(metrics: pd.DataFrame) -> pd.DataFrame:
    """Set each published value beside ours for the same data set, task, train set and strategy.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv`` of one study.

    Returns
    -------
    One row for each published value of which the study has runs: task, train_set, strategy, metric, relation;
    published, the mean over its trials, and trials; mean, low, high (95 % interval) and runs of ours, from
    `tuneformer.evaluate.statistics.interval`; study, source, note as in `read`. ``verdict``: ``agrees`` if the
    published value lies in our interval, or our interval keeps the published bound; ``ours is higher`` or ``ours is
    lower`` if not; ``unclear`` if the bound lies within the interval, or one run gives no interval. The interval is
    over seeds (and folds): it does not cover the choice of the published study's test cells, so that a value next to it
    is not refuted.
    No row where the cells are simulated.

    Raises
    ------
    ParameterError
        The params file of a published study is missing or cannot be used.
    """
    table = read()
    datasets = {name: load_study(name).dataset for name in table["study"].unique()}
    asked = table[table["study"].map(datasets) == metrics["dataset"].iloc[0]]
    rows = []
    for _, part in asked.groupby(["study", *_SIDES, "relation"], sort=False):
        row = part.iloc[0].to_dict()
        ours = _ours(metrics, row)
        if ours is None:
            continue
        row |= {"published": part["value"].mean(), "trials": len(part), **ours._asdict(), "runs": ours.n}
        rows.append({**row, "verdict": _verdict(row["relation"], row["published"], ours)})
    return pd.DataFrame(rows, columns=_COLUMNS)


def sentence(metrics: pd.DataFrame) -> str:
    """Say how many published values `compare` found beside ours, and how many agree; or why there are none."""
    study = metrics["study"].iloc[0]
    if load_study(study).simulated:
        return f"The cells of {study} are simulated; published numbers are of real cells, so none stands beside ours."
    verdicts = compare(metrics)["verdict"].value_counts()
    if verdicts.empty:
        return f"The four studies published no number for the cells, tasks, train sets and strategies of {study}."
    said = ", ".join(f"{verdicts[name]} {name}" for name in (AGREES, HIGHER, LOWER, UNCLEAR) if name in verdicts)
    return (
        f"Published values beside ours, {verdicts.sum()}: {said} (agrees: in our 95 % interval, or a bound it keeps)."
    )


def tables(metrics: pd.DataFrame) -> list[pd.DataFrame]:
    """Return `compare` as text for a reader; no table where there is nothing to compare, as with simulated cells."""
    table = compare(metrics)
    if table.empty:
        return []
    shown = table[["task", "train_set", "strategy", "metric"]].set_axis(
        ["Task", "Train set", "Strategy", "Score"], axis=1
    )
    shown["Strategy"] = shown["Strategy"].str.replace(" ", ", ")
    shown["Published"] = [
        f"{'' if row.relation == '=' else row.relation + ' '}{row.published:.4g}"
        f"{f' ({row.trials} trials)' if row.trials > 1 else ''}"
        for row in table.itertuples()
    ]
    ours = table[["mean", "low", "high"]].itertuples(index=False)
    shown["Ours (95 % interval)"] = [statistics.with_interval(*row) for row in ours]
    shown["Runs"] = table["runs"]
    shown["Verdict"] = table["verdict"]
    shown["Source"] = table["source"]
    shown["Left open there"] = table["note"]
    return [shown.set_index(["Task", "Train set", "Strategy", "Score"])]


def _ours(metrics: pd.DataFrame, row: dict) -> Interval | None:
    """Return our mean and interval for a published row; of several strategies their mean, run by run."""
    arms = row["strategy"].split()
    same = (metrics[["task", "train_set", "metric"]] == [row["task"], row["train_set"], row["metric"]]).all(axis=1)
    found = metrics[same & metrics["strategy"].isin(arms)].dropna(subset=["value"])
    if set(found["strategy"]) != set(arms):
        return None
    values = statistics.by_run(found, "strategy").dropna().mean(axis=1)
    return statistics.interval(values, overlap=statistics.overlap(found)) if len(values) else None


def _verdict(relation: str, published: float, ours: Interval) -> str:
    if np.isnan(ours.low):
        return UNCLEAR
    if relation == "=":
        return HIGHER if ours.low > published else LOWER if ours.high < published else AGREES
    kept = {_HOLDS[relation](end, published) for end in (ours.low, ours.high)}
    if len(kept) == 2:
        return UNCLEAR
    return AGREES if kept == {True} else LOWER if relation == ">" else HIGHER
