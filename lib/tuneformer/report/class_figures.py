"""Figures and tables of a cross-validation: the classes one by one, ROC curves, and the spread of the folds.

In: rows of ``metrics.csv``, ``predictions.parquet`` and, where they were kept, ROC curves. Out: drawings (figure and
table) by name; and tables as text. The numbers are those of `tuneformer.evaluate.cross_validation`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tuneformer.evaluate import cross_validation
from tuneformer.evaluate.cross_validation import MACRO
from tuneformer.evaluate.statistics import MISSING, SCORES, with_arms, with_interval
from tuneformer.report import plotting
from tuneformer.report.plotting import PALETTE, Drawing
from tuneformer.study.treatments import BASELINES

PANEL_COLUMNS = 3
LEAST_P = 0.001  # smaller p values are not written out
COLORS = tuple(color for color in PALETTE if color != "#000000")  # which is that of the average
STYLES = ("-", (0, (4, 1.5)))  # of the lines of the first and the second round of colours


def drawings(
    metrics: pd.DataFrame, predictions: pd.DataFrame, roc: pd.DataFrame, *, simulated: bool
) -> dict[str, Drawing]:
    """Draw what a cross-validation found.

    Parameters
    ----------
    metrics, predictions
        Rows of ``metrics.csv`` and ``predictions.parquet``; without folds there is nothing to draw.
    roc
        Columns task, train_set, strategy and those of `tuneformer.evaluate.cross_validation.roc_curves`; may be empty.
    simulated
        Whether the titles have to say that the cells are simulated.

    Returns
    -------
    For each task ``fig10_<task>_folds``, ``fig11_<task>_class_accuracy`` and ``fig12_<task>_roc``; what there is no
    number for is left out.
    """
    drawn = {}
    for task, rows in metrics[metrics["fold"].notna()].groupby("task", sort=False):
        of_task = predictions[predictions["task"] == task]
        classes = cross_validation.class_table(of_task)
        curves = with_arms(roc[roc["task"] == task])
        title = {"title": task, "simulated": simulated}
        if rows["metric"].isin(SCORES).any():
            drawn[f"fig10_{task}_folds"] = fold_scores(rows, of_task, **title)
        if len(classes):
            drawn[f"fig11_{task}_class_accuracy"] = class_accuracy(classes, **title)
        if len(curves):
            drawn[f"fig12_{task}_roc"] = roc_panels(curves, **title)
    return drawn


def fold_scores(metrics: pd.DataFrame, predictions: pd.DataFrame, *, title: str, simulated: bool) -> Drawing:
    """Draw accuracy and macro-F1 of each arm: every fold a point, their mean, and the score of all cells pooled.

    Parameters
    ----------
    metrics, predictions
        Rows of one task.
    title
        Of the figure.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    The figure (a panel a metric) and its table: arm, metric, fold, value (the seeds averaged), mean, sd, pooled.
    """
    rows = with_arms(metrics[metrics["metric"].isin(SCORES) & metrics["fold"].notna()]).dropna(subset=["value"])
    by_fold = rows.groupby(["arm", "metric", "fold"], sort=False, as_index=False)["value"].mean()
    table = cross_validation.fold_table(metrics, predictions)
    data = by_fold.merge(table[["arm", "metric", "mean", "sd", "pooled"]], on=["arm", "metric"])
    arms = list(table["arm"].unique())
    size = (2.6 + 0.09 * max(map(len, arms)) + 3.2 * len(SCORES), 1.5 + 0.34 * len(arms))
    figure, axes = plt.subplots(1, len(SCORES), figsize=size, sharey=True, layout="constrained")
    folds = sorted(data["fold"].unique())
    for ax, metric in zip(axes, SCORES, strict=True):
        for arm, part in data[data["metric"] == metric].groupby("arm", sort=False):
            color = PALETTE[1] if arm.split(", ")[-1] in BASELINES else PALETTE[0]
            offsets = (np.array([folds.index(fold) for fold in part["fold"]]) + 0.5) / len(folds) - 0.5
            first, place = part.iloc[0], arms.index(arm)
            ax.plot(part["value"], place + 0.4 * offsets, "o", color=color, markersize=4, alpha=0.5)
            ax.plot(first["mean"], place, "D", color=color, markersize=7, markeredgecolor="white")
            ax.plot(first["pooled"], place, "|", color="black", markersize=15, markeredgewidth=2)
        ax.set(xlabel=SCORES[metric], ylim=(len(arms) - 0.4, -0.6))
    axes[0].set_yticks(range(len(arms)), arms)
    key = "Small points: folds. Diamond: their mean. Black bar: all cells pooled, each tested once."
    key += " Orange: baselines." if any(arm.split(", ")[-1] in BASELINES for arm in arms) else ""
    _head(figure, f"{title}: {len(folds)}-fold cross-validation", key, simulated=simulated)
    return Drawing(figure, data)


def class_accuracy(classes: pd.DataFrame, *, title: str, simulated: bool) -> Drawing:
    """Draw the accuracy of each class (its recall) under each arm, the largest class on top.

    Parameters
    ----------
    classes
        Rows of one task of `tuneformer.evaluate.cross_validation.class_table`.
    title, simulated
        As `fold_scores`.

    Returns
    -------
    The figure and `classes`.
    """
    wide = classes.pivot(index="label", columns="arm", values="accuracy")
    counts = classes.drop_duplicates("label").set_index("label")["cells"]
    wide = wide.loc[counts.index, classes["arm"].unique()]
    size = (2.6 + 0.62 * wide.shape[1], 1.9 + 0.34 * len(wide) + 0.055 * max(map(len, wide.columns)))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    colors = ax.pcolormesh(wide, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for (row, column), share in np.ndenumerate(wide):
        if np.isfinite(share):
            look = {"color": "white" if share > 0.55 else "black", "size": 8}
            ax.text(column + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", **look)
    ax.set_xticks(np.arange(wide.shape[1]) + 0.5, wide.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(np.arange(len(wide)) + 0.5, [f"{label} ({n:,})" for label, n in counts.items()])
    ax.set(ylim=(len(wide), 0), ylabel="Class (cells)")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    figure.colorbar(colors, ax=ax, label="Share of the class predicted right", pad=0.02)
    _head(figure, f"{title}: accuracy of each class", "All folds together; the mean of the seeds.", simulated=simulated)
    return Drawing(figure, classes)


def roc_panels(roc: pd.DataFrame, *, title: str, simulated: bool) -> Drawing:
    """Draw the ROC curve of each class against the rest, one panel an arm.

    Parameters
    ----------
    roc
        Of one task: arm, and the columns of `tuneformer.evaluate.cross_validation.roc_curves`.
    title, simulated
        As `fold_scores`.

    Returns
    -------
    The figure and its table: arm, label, fpr, tpr, auc.
    """
    arms, labels = roc["arm"].unique(), [label for label in roc["label"].unique() if label != MACRO]
    looks = {label: (COLORS[k % len(COLORS)], STYLES[k // len(COLORS) % 2]) for k, label in enumerate(labels)}
    columns = min(PANEL_COLUMNS, len(arms))
    rows = -(-len(arms) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.0 * columns + 2.2, 3.1 * rows + 0.9), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(arms) :]:
        ax.set_axis_off()
    for place, (ax, arm) in enumerate(zip(axes.flat, arms, strict=False)):
        part = roc[roc["arm"] == arm]
        for label, curve in part.groupby("label", sort=False):
            _curve(ax, curve, label, looks)
        area = part.loc[part["label"] == MACRO, "auc"].iloc[0]
        ax.set_title(f"{arm}\nmacro AUC {area:.3f}", fontsize=10)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ax.set_xlabel("False positive rate" if place + columns >= len(arms) else "")
        ax.set_ylabel("True positive rate" if place % columns == 0 else "")
    handles = {handle.get_label(): handle for ax in axes.flat for handle in ax.get_lines()}
    shown = [handles[label] for label in (*labels, MACRO)]
    figure.legend(handles=shown, loc="outside right upper", fontsize=9)
    key = "Each class against the rest, ranked by its probability; all folds together."
    _head(figure, f"{title}: ROC", key, simulated=simulated)
    return Drawing(figure, roc[["arm", "label", "fpr", "tpr", "auc"]])


def tables(metrics: pd.DataFrame, predictions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Write the tables of a cross-validation as text: its scores, its classes, and how the best arm differs.

    Parameters
    ----------
    metrics, predictions
        As `drawings`.

    Returns
    -------
    Title to table; {} without folds.
    """
    scores = cross_validation.fold_table(metrics, predictions)
    if scores.empty:
        return {}
    scores = scores.replace({"metric": SCORES})
    scores["text"] = [f"{_number(row.mean)} ± {_number(row.sd)}; {_number(row.pooled)}" for row in scores.itertuples()]
    classes = cross_validation.class_table(predictions)
    classes["text"] = [with_interval(row.accuracy, row.low, row.high) for row in classes.itertuples()]
    pairs = cross_validation.compare_folds(metrics).replace({"metric": SCORES})
    pairs = pairs[pairs["a"] == pairs.groupby(["task", "metric"])["a"].transform("first")]
    pairs["difference (95 % interval)"] = [
        with_interval(row.difference, row.low, row.high, sign="+") for row in pairs.itertuples()
    ]
    pairs["p (Holm, all pairs)"] = ["< 0.001" if p < LEAST_P else _number(p) for p in pairs["p_holm"]]
    shown = {
        "Mean and standard deviation over the folds; all cells pooled": _grid(scores, ["task", "arm"], "metric"),
        "Accuracy of each class, pooled over the folds (95 % interval)": _grid(
            classes, ["task", "label", "cells"], "arm"
        ),
        "The best arm against the others, over the folds": pairs.set_index(["task", "metric", "a", "b"])[
            ["difference (95 % interval)", "p (Holm, all pairs)", "folds"]
        ],
    }
    return {title: table for title, table in shown.items() if len(table)}


def _curve(ax: Axes, curve: pd.DataFrame, label: str, looks: dict[str, tuple]) -> None:
    if label == MACRO:
        ax.plot(curve["fpr"], curve["tpr"], color="black", linewidth=2.6, alpha=0.75, label=label)
        return
    color, style = looks[label]
    ax.plot(curve["fpr"], curve["tpr"], color=color, linestyle=style, linewidth=1.3, label=label)


def _head(figure: plt.Figure, title: str, key: str, *, simulated: bool) -> None:
    figure.suptitle(plotting.titled(title, simulated=simulated), x=0.01, ha="left")
    figure.supxlabel(key, x=0.01, ha="left", fontsize=10)


def _number(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.3f}"


def _grid(table: pd.DataFrame, index: list[str], columns: str) -> pd.DataFrame:
    """Lay the column text out by `index` and `columns`, in the order of the rows."""
    return table.pivot_table(index=index, columns=columns, values="text", aggfunc="first", sort=False).fillna(MISSING)
