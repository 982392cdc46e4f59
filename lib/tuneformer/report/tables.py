"""Tables for readers, rounded, of what ``answer.json`` and ``runs.csv`` say.

In: an answer (see `tuneformer.evaluate.compare.answer`) and rows of ``runs.csv``. Out: tables of text. Nothing here
judges: every verdict is the answer's.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tuneformer.arms import READ_BY
from tuneformer.keys import TrainingKeys

MISSING = "-"
LEAST_P = 0.001  # smaller p values are not written out
NAMES = {
    "macro_f1": "Macro-F1",
    "auc": "AUC",
    "k": "Cells behind a point (k)",
    "cells_per_class": "Training cells per class",
    "train_cells": "Training cells",
    "share": "Share of synthetic cells",
}
COSTS = {"wall_seconds": "Training time (s)", "trainable_parameters": "Parameters that learn"}


def score_name(score: str) -> str:
    """Return a score or another column of ``runs.csv`` as figures and tables name it."""
    words = score.replace("macro_f1", "macro-F1").replace(":", " of ").replace("_", " ")
    return NAMES.get(score) or COSTS.get(score) or words[:1].upper() + words[1:]


def with_interval(value: float, low: float, high: float, *, sign: str = "") -> str:
    """Write a value with its 95 % interval: ``0.512 (0.480 to 0.544)``; without one if there was a single run."""
    if pd.isna(value):
        return MISSING
    text = f"{value:{sign}.3f}"
    return text if pd.isna(low) or pd.isna(high) else f"{text} ({low:{sign}.3f} to {high:{sign}.3f})"


def arms(answer: Mapping[str, Any], runs: pd.DataFrame) -> pd.DataFrame:
    """List the arms of every task, best first: score with interval, runs (failed ones said), mean time and parameters.

    Text, with the columns Task and Arm first.
    """
    score = f"{score_name(answer['score'])} (95 % interval)"
    rows = []
    for task in answer["tasks"]:
        of_task = runs[runs["task"] == task["task"]]
        costs = of_task.reindex(columns=["arm", *COSTS]).groupby("arm").mean()
        for arm in task["arms"]:
            n_all = arm["n_runs"] + arm["n_failed"]
            done = f"{arm['n_runs']} of {n_all}" if arm["n_failed"] else f"{n_all}"
            row = {"Task": task["task"], "Arm": arm["arm"], score: with_interval(arm["mean"], arm["low"], arm["high"])}
            seconds, parameters = costs.loc[arm["arm"]] if arm["arm"] in costs.index else (None, None)
            row |= {"Runs": done, COSTS["wall_seconds"]: MISSING if pd.isna(seconds) else f"{seconds:,.1f}"}
            row[COSTS["trainable_parameters"]] = MISSING if pd.isna(parameters) else f"{parameters:,.0f}"
            rows.append(row)
    return pd.DataFrame(rows)


def contrasts(answer: Mapping[str, Any]) -> pd.DataFrame:
    """List what was asked and found: for each task and declared contrast the difference and its verdict, as text."""
    rows = [
        {
            "Task": task["task"],
            "Contrast": one["contrast"],
            "Arm": one["arm"],
            "against": one["reference"],
            f"Difference in {score_name(answer['score'])} (95 % interval)": with_interval(
                one["difference"], one["low"], one["high"], sign="+"
            ),
            "p (Holm)": _p_value(one["p_holm"]),
            "Verdict": f"same within {answer['margin']:g}" if one["verdict"] == "same" else one["verdict"],
        }
        for task in answer["tasks"]
        for one in task["contrasts"]
    ]
    return pd.DataFrame(rows)


def folds(runs: pd.DataFrame, predictions: pd.DataFrame, score: str) -> pd.DataFrame:
    """Summarise a cross-validation: mean and standard deviation over the folds, and accuracy of all cells pooled.

    Returns
    -------
    Text, indexed by task and arm; no rows without folds. The seeds of a fold are averaged first.
    """
    runs = runs[runs["fold"].notna() & (runs["status"] == "ok")]
    if runs.empty:
        return pd.DataFrame()
    by_fold = runs.groupby(["task", "arm", "fold"], sort=False)[score].mean()
    spread = by_fold.groupby(["task", "arm"], sort=False).agg(["mean", "std", "count"])
    right = predictions["label"].astype(str) == predictions["predicted"].astype(str)
    pooled = right.groupby([predictions["task"].astype(str), predictions["arm"].astype(str)]).mean()
    shown = pd.DataFrame(index=spread.index)
    shown[f"{score_name(score)}, mean ± sd over folds"] = [
        f"{mean:.3f} ± {sd:.3f}" for mean, sd, _ in spread.to_numpy()
    ]
    shown["Folds"] = spread["count"]
    shown["Accuracy, all cells pooled"] = pooled.reindex(spread.index).map("{:.3f}".format)
    return shown


def lines_of(runs: pd.DataFrame, x: str, hue: str | None) -> pd.DataFrame:
    """Return the x of each arm (missing where the arm does not read that key) and the name of its line."""
    keys = [name for name in TrainingKeys.model_fields if name in runs and name not in (x, hue)]
    arms = runs.groupby("arm", sort=False)[list(dict.fromkeys(filter(None, [*keys, x, hue])))].first()
    for name in filter(None, (x, hue)):
        reader, values = READ_BY.get(name, ("", set()))
        arms[name] = arms[name].where(arms[reader].isin(values)) if reader else arms[name]
    texts = arms[keys].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
    usual = texts[arms[x].notna()].mode().iloc[0]
    for arm in arms.index:
        own = [str(arms.loc[arm, hue])] if hue and pd.notna(arms.loc[arm, hue]) else []
        own += [f"{name}: {text}" for name, text in texts.loc[arm].items() if text != usual[name]]
        arms.loc[arm, "line"] = ", ".join(own) or "mean"
    return arms[[x, "line"]]


def markdown(table: pd.DataFrame) -> str:
    """Write a table of text as Markdown; names cannot break out of their cell."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def _p_value(p: float | None) -> str:
    if p is None or pd.isna(p):
        return MISSING
    return f"< {LEAST_P}" if p < LEAST_P else f"{p:.3f}"
