"""Figures of a study of gene classes, and its committed results.

In: a `GeneStudy`. Out: figures with the tables they were drawn from, and ``results/<study>/genes.csv`` and
``genes_scores.csv``.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tuneformer.evaluate import gene_study
from tuneformer.evaluate.gene_baselines import BASELINES
from tuneformer.evaluate.gene_study import NONE, PERMUTED, RIVAL, GeneStudy
from tuneformer.finetune.genes import CELLS, CURVE_POINTS
from tuneformer.report.plotting import CONTROL, PALETTE, Drawing, confusion_matrix, titled
from tuneformer.study import paths

LEVELS = {"token": "Tokens: each has a vote (as published)", "gene": "Genes: each has one vote"}
SCORE_COLUMNS = ("strategy", "seed", "fold", "gene", "class", *CELLS, "threshold")


def roc_curves(study: GeneStudy, strategy: str) -> Drawing:
    """Draw the ROC curve of a strategy and its spread over folds: by tokens, and by genes beside a baseline.

    Returns
    -------
    The figure and its table: level, strategy, false_positive_rate, mean and sd of the true-positive rate over folds and
    seeds, and the number of curves.
    """
    grid = np.linspace(0, 1, CURVE_POINTS)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.9), sharey=True, layout="constrained")
    panels = {
        "token": {strategy: gene_study.token_curves(study, strategy)},
        "gene": {name: gene_study.gene_curves(study, name) for name in (strategy, RIVAL)},
    }
    tables = []
    for ax, (level, curves) in zip(axes, panels.items(), strict=True):
        for color, (name, values) in zip(PALETTE, curves.items(), strict=False):
            mean, sd = values.mean(axis=1), values.std(axis=1, ddof=1)
            auc = np.trapezoid(mean, grid)
            ax.plot(grid, mean, color=color, label=f"{name}, area {auc:.2f}")
            ax.fill_between(grid, (mean - sd).clip(0), (mean + sd).clip(max=1), color=color, alpha=0.18, linewidth=0)
            table = pd.DataFrame({"false_positive_rate": grid, "mean": mean, "sd": sd, "curves": values.shape[1]})
            tables.append(table.assign(level=level, strategy=name))
        ax.plot([0, 1], [0, 1], color=CONTROL, linestyle=":")
        ax.set(xlabel="False-positive rate", title=LEVELS[level], xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        ax.legend(loc="lower right")
    axes[0].set_ylabel("True-positive rate")
    title = titled(f"ROC curve of {study.task.classes[1]} genes", simulated=study.settings.simulated)
    figure.suptitle(f"{title}: mean over folds and seeds, band one standard deviation", x=0.01, ha="left")
    data = pd.concat(tables, ignore_index=True)
    return Drawing(figure, data[["level", "strategy", "false_positive_rate", "mean", "sd", "curves"]])


def auc_of_methods(study: GeneStudy, metrics: pd.DataFrame) -> Drawing:
    """Draw the area under the ROC curve of each method: by tokens, by genes with intervals, and with permuted classes.

    Returns
    -------
    The figure and its table: strategy, level, control, seed, fold, value (one point each), and mean, low and high where
    there is an interval.
    """
    rows = metrics[(metrics["metric"] == "auc") & (metrics["cells"] == "context") & metrics["seed"].notna()]
    per_fold = rows[(rows["level"] == "token") & rows["fold"].notna()]
    whole = rows[(rows["level"] == "gene") & rows["fold"].isna()]
    points = pd.concat([per_fold, whole])[["strategy", "level", "control", "seed", "fold", "value"]]
    intervals = _intervals(metrics)
    methods = study.methods
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.45 * len(methods)), sharex=True, sharey=True, layout="constrained"
    )
    for ax, level in zip(axes, LEVELS, strict=True):
        _auc_panel(ax, points[points["level"] == level], intervals if level == "gene" else None, methods)
        ax.set(xlabel="Area under the ROC curve", title=LEVELS[level])
    title = titled("How well genes of two classes are told apart", simulated=study.settings.simulated)
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(
        "Blue: strategies, orange: baselines; left one point a fold and seed, right one a seed, with the 95 % interval "
        "over genes.\nGrey: the same with permuted classes. Dotted: chance.", x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    return Drawing(figure, points.merge(intervals, on=["strategy", "level", "control"], how="left"))


def confusion_of(study: GeneStudy, strategy: str) -> Drawing:
    """Draw what the genes of each class were called, at the threshold that the training genes gave.

    Returns
    -------
    The figure and its table: true, called, genes (summed over seeds).
    """
    counts = gene_study.confusion(study, strategy)
    figure = confusion_matrix(counts, title="")
    figure.suptitle(titled(f"{strategy}, test genes", simulated=study.settings.simulated), x=0.01, ha="left")
    table = counts.rename_axis(index="true", columns="called").stack().rename("genes").reset_index()
    return Drawing(figure, table)


def draw_all(study: GeneStudy, metrics: pd.DataFrame) -> dict[str, Drawing]:
    """Return the figures of a study by name; the first strategy stands for the others in two of them."""
    first = study.strategies[0]
    return {
        "fig1_auc": auc_of_methods(study, metrics),
        "fig2_roc": roc_curves(study, first),
        "fig3_confusion": confusion_of(study, first),
    }


def write_results(study: GeneStudy, metrics: pd.DataFrame) -> list[Path]:
    """Write ``genes.csv`` (`gene_study.metrics_table`) and ``genes_scores.csv`` of a study, each whole or not at all.

    ``genes_scores.csv`` has one row a method, seed and gene, with the columns `SCORE_COLUMNS`; permuted controls are
    left out. Returns the two paths.
    """
    folder = paths.results_dir(study.settings.study)
    own = study.scores[study.scores["control"] == NONE]
    scores = own[list(SCORE_COLUMNS)].sort_values(["strategy", "seed", "fold", "gene"], na_position="first")
    tables = {"genes.csv": metrics, "genes_scores.csv": scores.round(6)}
    for name, table in tables.items():
        paths.write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
    return [folder / name for name in tables]


def _intervals(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return strategy, level, control, mean, low and high of the gene-level areas of all seeds together."""
    whole = metrics[(metrics["level"] == "gene") & (metrics["cells"] == "context") & metrics["seed"].isna()]
    whole = whole[whole["fold"].isna() & (whole["control"] == NONE)]
    whole = whole[whole["metric"].isin(["auc", "auc:low", "auc:high"])]
    table = whole.pivot(index="strategy", columns="metric", values="value").reset_index()
    table = table.rename(columns={"auc": "mean", "auc:low": "low", "auc:high": "high"}).rename_axis(columns=None)
    return table.assign(level="gene", control=NONE)


def _auc_panel(ax: Axes, points: pd.DataFrame, intervals: pd.DataFrame | None, methods: list[str]) -> None:
    """Draw one panel: methods from top to bottom, permuted controls below each in grey."""
    for place, name in enumerate(methods):
        color = PALETTE[1] if name in BASELINES else PALETTE[0]
        for control, look, offset in ((NONE, color, -0.1), (PERMUTED, CONTROL, 0.22)):
            values = points.loc[(points["strategy"] == name) & (points["control"] == control), "value"]
            ax.plot(values, np.full(len(values), place + offset), "o", color=look, markersize=4, alpha=0.4)
            if intervals is None and len(values):
                ax.plot(values.mean(), place + offset, "D", color=look, markersize=7, markeredgecolor="white")
        found = intervals[intervals["strategy"] == name] if intervals is not None else pd.DataFrame()
        for row in found.itertuples():
            ax.hlines(place - 0.1, row.low, row.high, color=color, linewidth=2.2)
            ax.plot(row.mean, place - 0.1, "D", color=color, markersize=7, markeredgecolor="white")
    ax.axvline(0.5, color=CONTROL, linestyle=":", linewidth=1.2, zorder=0)
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(len(methods) - 0.4, -0.6)
