"""Figures of one job, which notebook 05 shows; nothing here judges.

In: history, predictions and counts of the runs of an arm. Out: matplotlib figures in the style of `figures`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tuneformer.evaluate import scores
from tuneformer.report.figures import CONTROL, plain_heatmap


def training_curves(history: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw losses (nats per cell) and validation scores per epoch, one thin line per run.

    Parameters
    ----------
    history
        Column epoch and, where there are several runs, seed and fold; every column with ``loss`` in its name goes to
        the left, the validation scores to the right. A column best_epoch marks the epochs whose weights were kept.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    losses = {name: name.replace("_", " ") for name in history if "loss" in name}
    rates = {"validation_accuracy": "accuracy", "validation_macro_f1": "macro-F1"}
    rates = {name: label for name, label in rates.items() if name in history}
    keys = [key for key in ("seed", "fold", "best_epoch") if key in history and history[key].notna().any()]
    for ax, names, label in zip(axes, (losses, rates), ("Loss (nats per cell)", "Validation score"), strict=True):
        if names:
            long = history.melt(["epoch", *keys], names, "measure", "value").replace({"measure": names})
            look = {"x": "epoch", "y": "value", "hue": "measure", "hue_order": list(names.values()), "ax": ax}
            run = long[keys].astype(str).agg("/".join, axis=1) if keys else None
            sns.lineplot(long, units=run, estimator=None, alpha=0.7, **look)
            if "best_epoch" in keys:
                sns.scatterplot(long[long["epoch"] == long["best_epoch"]], s=45, legend=False, **look)
            ax.legend(title=None)
        ax.set(xlabel="Epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def confusion(table: pd.DataFrame, title: str) -> Figure:
    """Draw what became of the cells of each class; a row of `table`, from `scores.confusion`, sums to one."""
    size = 2.6 + 0.75 * len(table)
    figure, ax = plt.subplots(figsize=(size + 0.9, size), layout="constrained")
    ax.set_title(title)
    if not table.to_numpy().any():
        ax.text(0.5, 0.5, "no predictions", ha="center", va="center")
        return figure
    shares = table.div(table.sum(axis=1).replace(0, np.nan), axis=0)
    look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "annot": True, "fmt": ".2f", "linewidths": 1, "square": True}
    sns.heatmap(shares, cbar=False, annot_kws={"size": 10 if len(table) <= 5 else 8}, ax=ax, **look)
    plain_heatmap(ax)
    ax.set(xlabel="Predicted class", ylabel="True class")
    return figure


def confidence_curves(predictions: pd.DataFrame, *, title: str) -> Figure:
    """Draw whether a model is as often right as it is sure, and how right it is where it is surest.

    `predictions`: label and ``probability:<class>``, of several runs all together; no rows if all of them failed.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    left.plot([0, 1], [0, 1], color=CONTROL, linestyle="--", linewidth=1.2, label="as sure as right")
    if len(predictions):
        shares = predictions.filter(regex="^probability:")
        given = (predictions["label"], shares.to_numpy(), list(shares.columns.str.removeprefix("probability:")))
        bins = scores.reliability_curve(*given)
        place = [*predictions.columns.intersection(["seed", "fold"])]
        n_runs = predictions.groupby(place, dropna=False).ngroups if place else 1
        sure = bins["confidence"]
        strays = 1.96 * np.sqrt(sure * (1 - sure) / (bins["cells"] / n_runs))  # binomial, of the cells of one run
        band = {"color": "#e8e8e8", "zorder": 0, "label": "one run, if calibrated (95 %)"}
        left.fill_between(sure, sure - strays, sure + strays, **band)
        sns.lineplot(bins, x="confidence", y="accuracy", marker="o", label="this arm", ax=left)
        sns.lineplot(scores.coverage_curve(*given), x="coverage", y="accuracy", errorbar=None, ax=right)
    left.set(xlabel="Confidence (highest probability)", ylabel="Share predicted right", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="Share of the cells predicted, the surest first", xlim=(0, 1))
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def roc_curves(predictions: pd.DataFrame, *, title: str) -> Figure:
    """Draw the ROC curve of each class that has test cells against the rest, from the probabilities of all runs."""
    from sklearn.metrics import RocCurveDisplay

    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    ax.plot([0, 1], [0, 1], color=CONTROL, linestyle=":", label="chance")
    names = predictions.filter(regex="^probability:").columns.str.removeprefix("probability:")
    for name in names[names.isin(predictions["label"].astype(str).unique())]:
        truth = predictions["label"].astype(str) == name
        RocCurveDisplay.from_predictions(truth, predictions[f"probability:{name}"], name=name, ax=ax)
    ax.set(xlabel="False positive rate", ylabel="True positive rate", title=title, aspect="auto")
    ax.legend().remove()
    figure.legend(loc="outside right center")
    return figure
