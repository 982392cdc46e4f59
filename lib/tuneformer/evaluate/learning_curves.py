"""How the score grows with the number of labelled cells, for every strategy and baseline.

In: rows of ``metrics.csv`` of a study with train sets ``single_cell_n<n>``. Out: the score against the cells of each
class, and what to do with so many cells in a sentence. Empty for other studies.
"""

import pandas as pd

from tuneformer.evaluate import statistics
from tuneformer.evaluate.statistics import SCORES
from tuneformer.study.train_sets import parse
from tuneformer.study.treatments import BASELINES

BASELINE = "single_cell"  # the train set of all cells


def has_few(metrics: pd.DataFrame) -> pd.Series:
    """Return which rows are of a train set ``single_cell_n<n>``."""
    return metrics["train_set"].isin([name for name in metrics["train_set"].unique() if parse(name).amount == "n"])


def rows_of(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that belong to a learning curve: those that `has_few` names, and beside them all single cells."""
    few = has_few(metrics)
    return metrics[few | ((metrics["train_set"] == BASELINE) & few.any())]


def learning_curve(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the mean score of each strategy and baseline against the number of training cells of a class.

    Returns
    -------
    task, strategy, metric (accuracy, macro_f1), train_set, cells (training cells divided by classes); mean, sd, low,
    high (95 % t interval over seeds) and n, the number of seeds.
    """
    rows = rows_of(metrics)
    rows = rows[rows["metric"].isin([*SCORES]) | rows["metric"].str.startswith("recall:")]
    classes = rows[rows["metric"].str.startswith("recall:")].groupby("task")["metric"].nunique()
    scored = rows[rows["metric"].isin([*SCORES])].dropna(subset=["value"])
    keys = ["task", "strategy", "metric", "train_set"]
    table = [
        {
            **dict(zip(keys, key, strict=True)),
            "cells": part["n_train"].mean() / classes[key[0]],
            **statistics.over_runs(part)._asdict(),
        }
        for key, part in scored.groupby(keys, sort=False)
    ]
    columns = [*keys, "cells", "mean", "sd", "low", "high", "n"]
    return pd.DataFrame(table, columns=columns).sort_values([*keys[:3], "cells"], kind="stable", ignore_index=True)


def sentences(metrics: pd.DataFrame) -> dict[str, list[str]]:
    """Say for each task and number of cells what scores highest, and whether fine-tuning beats the linear model.

    The score is macro-F1; differences are paired by seed, with their 95 % t interval.
    """
    rows = rows_of(metrics)
    rows = rows[rows["metric"] == "macro_f1"]
    curve = learning_curve(metrics)
    curve = curve[curve["metric"] == "macro_f1"].sort_values("cells", kind="stable")
    said: dict[str, list[str]] = {}
    for (task, train_set), table in curve.groupby(["task", "train_set"], sort=False):
        best = table.loc[table["mean"].idxmax()]
        score = statistics.with_interval(best["mean"], best["low"], best["high"])
        text = f"With {best['cells']:.0f} cells of each class {best['strategy']} scores highest, {score}"
        tuned = table[~table["strategy"].isin([*BASELINES, statistics.CONTROL])]
        own = rows[(rows["task"] == task) & (rows["train_set"] == train_set)]
        if len(tuned) and statistics.LINEAR in set(own["strategy"]):
            leader = tuned.loc[tuned["mean"].idxmax(), "strategy"]
            found = statistics.paired_difference(own, leader, statistics.LINEAR)
            verb = statistics.beats(found.low, found.high)
            difference = statistics.with_interval(found.mean, found.low, found.high, sign="+")
            text += f"; of the strategies {leader}, which {verb} {statistics.LINEAR}: {difference}"
        said.setdefault(task, []).append(f"{text}.")
    return said
