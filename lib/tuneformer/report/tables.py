"""Tables for readers, rounded, of what ``answer.json`` and ``runs.csv`` say.

In: an answer (see `tuneformer.evaluate.compare.answer`) and rows of ``runs.csv``. Out: tables of text. Nothing here
judges: every verdict is the answer's.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tuneformer.arms import READ_BY
from tuneformer.evaluate.telling import WITHHELD, score_name
from tuneformer.keys import TrainingKeys

MISSING = "-"
LEAST_P = 0.001  # smaller p values are not written out
NAMES = {
    "k": "Cells behind a point (k)",
    "cells_per_class": "Training cells per class",
    "train_cells": "Training cells",
    "share": "Share of synthetic cells",
}
BESIDE = {
    "train_macro_f1": "Macro-F1 of training cells",
    "validation_macro_f1": "… of validation cells",
    "macro_f1": "… of test cells",
    "group_macro_f1": "… of groups of classes",
    "quadratic_weighted_kappa": "Weighted kappa",
    "mean_absolute_error_classes": "Classes off",
    "expected_calibration_error": "Calibration error",
    "calibrated_error": "… if calibrated",
}
COSTS = {"wall_seconds": "Training time (s)", "trainable_parameters": "Parameters that learn"}


def heading(column: str) -> str:
    """Return a score or another column of ``runs.csv`` as figures and tables name it."""
    words = score_name(column)
    return NAMES.get(column) or COSTS.get(column) or words[:1].upper() + words[1:]


def with_interval(value: float, low: float, high: float, *, sign: str = "") -> str:
    """Write a value with its 95 % interval: ``0.512 (0.480 to 0.544)``; without one if there was a single run."""
    if pd.isna(value):
        return MISSING
    text = f"{value:{sign}.3f}"
    return text if pd.isna(low) or pd.isna(high) else f"{text} ({low:{sign}.3f} to {high:{sign}.3f})"


def arms(answer: Mapping[str, Any], runs: pd.DataFrame) -> pd.DataFrame:
    """List the arms of every task, best first: score with interval, runs, mean time and parameters.

    Text, with the columns Task and Arm first. Runs that failed, and those that called all cells the same, are counted.
    """
    score = f"{heading(answer['score'])} (95 % interval)"
    rows = []
    for task in answer["tasks"]:
        of_task = runs[runs["task"] == task["task"]]
        costs = of_task.reindex(columns=["arm", *COSTS]).groupby("arm").mean()
        for arm in task["arms"]:
            n_all = arm["n_runs"] + arm["n_failed"]
            done = f"{arm['n_runs']} of {n_all}" if arm["n_failed"] else f"{n_all}"
            done += f", {arm['n_constant']} of one class" if arm["n_constant"] else ""
            name = f"{arm['arm']} (ceiling)" if arm["is_ceiling"] else arm["arm"]
            row = {"Task": task["task"], "Arm": name, score: with_interval(arm["mean"], arm["low"], arm["high"])}
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
            f"Difference in {heading(answer['score'])} (95 % interval)": with_interval(
                one["difference"], one["low"], one["high"], sign="+"
            ),
            "p (Holm)": _p_value(one["p_holm"]),
            "Verdict": _verdict(one),
        }
        for task in answer["tasks"]
        for one in task["contrasts"]
    ]
    return pd.DataFrame(rows)


def beside(answer: Mapping[str, Any], runs: pd.DataFrame) -> pd.DataFrame:
    """List what else is known of each arm: the columns `BESIDE` of its runs, as means.

    Text, with the columns Task and Arm first.
    """
    known = {name: text for name, text in BESIDE.items() if name in runs and runs[name].notna().any()}
    first = next(iter(known), None)  # no heading begins with what it leaves out
    known |= {first: known[first].replace("…", "Macro-F1")} if first else {}
    means = runs.groupby(["task", "arm"])[[*known]].mean()
    order = [(task["task"], arm["arm"]) for task in answer["tasks"] for arm in task["arms"] if arm["n_runs"]]
    shown = means.reindex(order).map(lambda value: MISSING if pd.isna(value) else f"{value:.3f}")
    return shown.rename(columns=known).rename_axis(index=["Task", "Arm"]).reset_index()


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
    shown[f"{heading(score)}, mean ± sd over folds"] = [f"{mean:.3f} ± {sd:.3f}" for mean, sd, _ in spread.to_numpy()]
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
    if x in ("cells_per_class", "train_cells"):  # null takes all
        first = runs.drop_duplicates("arm").set_index("arm")
        n_classes = first.filter(like="recall:").notna().sum(axis=1) if x == "cells_per_class" else 1
        n_all = (first["n_train"] / n_classes).round()
        arms[x] = arms[x].fillna(n_all.where(arms["train_set"] == "single_cell") if "train_set" in arms else n_all)
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


def _verdict(one: Mapping[str, Any]) -> str:
    if one["verdict"] == WITHHELD:
        return f"withheld: {one['why']}"
    return f"same within {one['margin']:g}" if one["verdict"] == "same" else one["verdict"]
