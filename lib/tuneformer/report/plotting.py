"""Figures of the notebooks and the page, in one style.

In: tables (training history, token lengths, ``metrics.csv``). Out: matplotlib figures, and for a study's figures the
files ``figures/<study>/<name>`` .png, .pdf and the .csv they were drawn from, whose bytes depend on the numbers alone.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from tuneformer.evaluate import statistics
from tuneformer.evaluate.metrics import confusion_table
from tuneformer.study import paths
from tuneformer.study.params import Study
from tuneformer.study.treatments import BASELINES

# Okabe & Ito 2008, distinct under every common form of colour blindness; yellow, too pale for lines, stands last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#F0E442")
MARKERS = "osD^vPX<>"
CONTROL = "#777777"
COST_NAMES = {"cost:wall_seconds": "Training time (s)", "cost:trainable_parameters": "Trainable parameters"}
MOST_PANELS = 12  # confusion matrices of a task side by side
PANEL_COLUMNS = 3
WIDE = 100  # ratio of costs above which an axis shows powers of ten only


class Drawing(NamedTuple):
    """A figure and the table it was drawn from."""

    figure: Figure
    data: pd.DataFrame


def set_style() -> None:
    """Set fonts, colours and sizes of every later figure."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=list(PALETTE),
        font="DejaVu Sans",
        rc={
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "figure.dpi": 90,
            "figure.titlesize": 13,
            "grid.color": "#e3e3e3",
            "grid.linewidth": 0.8,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "pdf.fonttype": 42,
            "savefig.dpi": 160,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
        },
    )


def titled(text: str, *, simulated: bool) -> str:
    """Return a title that says so when the numbers below it are simulated."""
    return f"{text} (simulated)" if simulated else text


def loss_curve(curve: pd.DataFrame, references: Mapping[str, float], *, title: str) -> Figure:
    """Draw the masked-token loss of pre-training against losses that need no context.

    Parameters
    ----------
    curve
        Columns step, train_loss, held_out_loss (nats per token).
    references
        Name to loss (nats per token), drawn as horizontal lines.
    title
        Title of the figure.
    """
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(curve["step"], curve["train_loss"], color=PALETTE[5], label="training cells")
    ax.plot(curve["step"], curve["held_out_loss"], color=PALETTE[0], label="held-out cells")
    for (name, value), style in zip(references.items(), ("--", ":", "-.", (0, (6, 2))), strict=False):
        ax.axhline(value, color=CONTROL, linestyle=style, linewidth=1.3, label=name)
    ax.set(xlabel="Optimizer step", ylabel="Loss (nats per token)", title=title)
    figure.legend(loc="outside right center")
    return figure


def qc_violins(flags: pd.DataFrame, labels: pd.Series, settings: Study) -> Figure:
    """Draw counts and mitochondrial share of the cells of every class before quality control, with the limits.

    Without mitochondrial genes there is one panel only.

    Parameters
    ----------
    flags
        `tuneformer.data.preprocessing.qc_flags` of the cells.
    labels
        Class of every cell, or missing; indexed as `flags`.
    settings
        The study, for the limits and for whether the cells are simulated.
    """
    if flags["n_counts"].isna().all():
        return _without_counts()
    known = list(settings.classes) or sorted(labels.dropna().astype(str).unique())
    text = labels.astype(object).map(str, na_action="ignore").fillna("no label")
    shown = text.where(text.isin([*known, "no label"]), "other class")
    data = flags.assign(shown=shown, n_counts=flags["n_counts"].clip(lower=1))
    order = [name for name in [*known, "other class", "no label"] if name in set(shown)]
    panels = _measured(flags, {"n_counts": "Total count (UMI)", "mito_share": "Mitochondrial share of the counts"})
    limits = {"n_counts": [settings.min_counts, settings.max_counts], "mito_share": [settings.max_mito_share]}
    size = (1 + 4.5 * len(panels), 1.4 + 0.38 * len(order))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, (column, label) in zip(axes[0], panels.items(), strict=True):
        sns.violinplot(
            data, x=column, y="shown", order=order, cut=0, density_norm="width", inner="quart", linewidth=1,
            color=PALETTE[5], log_scale=(column == "n_counts", False), ax=ax,
        )  # fmt: skip
        for limit in filter(None, limits[column]):
            ax.axvline(limit, color=PALETTE[1], linestyle="--")
        ax.set(xlabel=label, ylabel="")
    _label_log_counts(axes[0, 0])
    title = titled("Cells before quality control, with the limits", simulated=settings.simulated)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def qc_scatter(flags: pd.DataFrame, settings: Study) -> Figure:
    """Draw total count against detected genes and against mitochondrial share: which cells each rule drops.

    A cell that fails several rules has the colour of the first.

    Parameters
    ----------
    flags
        `tuneformer.data.preprocessing.qc_flags` of the cells; its columns of truth values are the rules.
    settings
        The study, for whether the cells are simulated.
    """
    if flags["n_counts"].isna().all():
        return _without_counts()
    rules = flags.select_dtypes(bool)
    first = rules.idxmax(axis=1).where(rules.any(axis=1), "kept")
    panels = _measured(flags, {"n_genes": "Genes with a count", "mito_share": "Mitochondrial share of the counts"})
    size = (1 + 4.5 * len(panels), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, (column, label) in zip(axes[0], panels.items(), strict=True):
        for name, color, marker in zip(["kept", *rules], ["#b0b0b0", *PALETTE], MARKERS, strict=False):
            cells = flags[first == name]
            text = f"kept ({len(cells):,})" if name == "kept" else f"fails {name} ({len(cells):,})"
            size = 6 if name == "kept" else 14
            ax.scatter(cells["n_counts"], cells[column], s=size, color=color, marker=marker, linewidths=0, label=text)
        ax.set(xscale="log", xlabel="Total count (UMI)", ylabel=label)
        _label_log_counts(ax)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, markerscale=2)
    figure.suptitle(titled("What quality control drops", simulated=settings.simulated), x=0.01, ha="left")
    return figure


def training_curves(history: pd.DataFrame, *, best_epoch: int | None, title: str) -> Figure:
    """Draw loss and validation scores per epoch.

    Parameters
    ----------
    history
        Column epoch; every column with ``loss`` in its name (nats per cell) goes to the left, the validation scores
        ``validation_accuracy`` and ``validation_macro_f1`` to the right.
    best_epoch
        The epoch whose weights were kept, marked by a dashed line; None for a run that failed before it had one.
    title
        Title of the figure.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    losses = [name for name in history.columns if "loss" in name]
    scores = [name for name in ("validation_accuracy", "validation_macro_f1") if name in history.columns]
    for ax, names, label in zip(axes, (losses, scores), ("Loss (nats per cell)", "Validation score"), strict=True):
        for name, color, marker in zip(names, PALETTE, MARKERS, strict=False):
            shown = name.replace("macro_f1", "macro-F1").replace("_", " ")
            ax.plot(history["epoch"], history[name], color=color, marker=marker, label=shown)
        if best_epoch is not None:
            ax.axvline(best_epoch, color=CONTROL, linestyle="--", linewidth=1.2, label=f"kept: epoch {best_epoch}")
            ax.legend()
        ax.set(xlabel="Epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def confidence_curves(reliability: pd.DataFrame, coverage: pd.DataFrame, *, title: str) -> Figure:
    """Draw whether a model is as often right as it is sure, and how right it is where it is surest.

    Parameters
    ----------
    reliability
        Columns confidence and accuracy, one row a bin of confidence; empty for a run that failed.
    coverage
        Columns coverage and accuracy: of the most confident predictions of that share of the cells.
    title
        Title of the figure.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    known = reliability.dropna()
    left.plot([0, 1], [0, 1], color=CONTROL, linestyle="--", linewidth=1.2, label="as sure as right")
    left.plot(known["confidence"], known["accuracy"], "o-", color=PALETTE[0], label="this model")
    left.set(xlabel="Confidence (highest probability)", ylabel="Share predicted right", xlim=(0, 1), ylim=(0, 1.02))
    left.legend()
    right.plot(coverage["coverage"], coverage["accuracy"], color=PALETTE[0])
    right.set(xlabel="Share of the cells predicted, the surest first", xlim=(0, 1))
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def confusion_matrix(counts: pd.DataFrame, *, title: str, ax: Axes | None = None) -> Figure:
    """Draw a confusion matrix whose rows sum to one; a row says what became of the cells of one class.

    Parameters
    ----------
    counts
        Cells, (true classes, predicted classes); empty for a run that failed.
    title
        Title of the figure, or of the panel when `ax` is given.
    ax
        Where to draw; a new figure by default.
    """
    if ax is None:
        size = 2.6 + 0.75 * len(counts)
        _, ax = plt.subplots(figsize=(size + 0.9, size), layout="constrained")
    ax.set(xlabel="Predicted class", ylabel="True class", title=title)
    ax.grid(visible=False)
    if counts.empty:
        ax.text(0.5, 0.5, "no predictions", ha="center", va="center")
        return ax.figure
    totals = counts.sum(axis=1)
    shares = counts.div(totals.where(totals > 0), axis=0)
    ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            look = {"color": "white" if share > 0.55 else "black", "size": 10 if len(counts) <= 5 else 8}
            ax.text(column + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", **look)
    places = np.arange(len(counts)) + 0.5
    ax.set_xticks(places, counts.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, counts.index)
    ax.set(aspect="equal", ylim=(len(counts), 0))
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax.figure


def strategy_scores(metrics: pd.DataFrame, *, simulated: bool) -> Drawing:
    """Draw accuracy and macro-F1 per task and strategy: every seed a point, the mean and its 95 % interval.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    The figure (rows: metrics, columns: tasks) and its table: task, arm, metric, seed, value, mean, low, high.
    """
    data = pd.concat([_with_intervals(metrics, metric) for metric in statistics.SCORES], ignore_index=True)
    tasks, arms = data["task"].unique(), data["arm"].unique()
    size = (2.2 + 3.3 * len(tasks), 1.2 + 2 * (0.8 + 0.3 * len(arms)))
    figure, axes = plt.subplots(2, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for row, metric in zip(axes, statistics.SCORES, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            part = data[(data["metric"] == metric) & (data["task"] == task)]
            _points_and_intervals(ax, part, list(arms))
            ax.set(xlabel=statistics.SCORES[metric], title=task if metric == "accuracy" else "")
    figure.suptitle(titled("Test score per fine-tuning strategy", simulated=simulated), x=0.01, ha="left")
    key = f"Small points: seeds. Diamond and line: mean and 95 % interval. Dotted: mean of {statistics.CONTROL}."
    key += " Orange: baselines." if set(metrics["strategy"]) & set(BASELINES) else ""
    figure.supxlabel(key, x=0.01, ha="left", fontsize=10)
    return Drawing(figure, data)


def confusion_matrices(metrics: pd.DataFrame, *, simulated: bool) -> dict[str, Drawing]:
    """Draw, for each task, the row-normalised confusion matrices of its strategies side by side.

    Of more than `MOST_PANELS` arms only these: the best, the first, the control and the linear baseline.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``; the counts of the seeds, and of folds, are added up.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    Figure name (``fig2_confusion_<task>``) to the figure and its table: arm, true, predicted, cells, share.
    """
    labelled = statistics.with_arms(metrics)
    drawings = {}
    for task, rows in labelled.groupby("task", sort=False):
        tables = {arm: confusion_table(part) for arm, part in rows.groupby("arm", sort=False)}
        tables = {arm: table for arm, table in tables.items() if not table.empty}
        if not tables:
            continue
        if len(tables) > MOST_PANELS:
            scores = rows[(rows["metric"] == "macro_f1") & ~rows["strategy"].isin(BASELINES)]
            best = scores.groupby("arm")["value"].mean().idxmax()
            chosen = [best, next(iter(tables)), statistics.CONTROL, statistics.LINEAR]
            tables = {arm: tables[arm] for arm in dict.fromkeys(chosen) if arm in tables}
        title = titled(f"{task}: what became of the test cells of each class", simulated=simulated)
        drawings[f"fig2_confusion_{task}"] = _confusion_panels(tables, title)
    return drawings


def cost_and_score(metrics: pd.DataFrame, *, simulated: bool) -> Drawing:
    """Draw what a strategy costs against what it scores: every seed a point, the mean of the seeds larger.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    The figure (rows: time and trainable parameters, columns: tasks) and its table: task, arm, seed, macro_f1, costs.
    """
    labelled = statistics.with_arms(metrics)
    wide = labelled[labelled["metric"].isin(["macro_f1", *COST_NAMES])]
    keys = ["task", "arm", "seed", *(["fold"] if statistics.overlap(wide) else [])]
    data = wide.pivot_table(index=keys, columns="metric", values="value", sort=False).reset_index()
    data = data.rename_axis(columns=None)
    costs = [cost for cost in COST_NAMES if cost in data.columns]
    if not costs or "macro_f1" not in data.columns:
        msg = "metrics.csv holds no run with both a macro-F1 and a cost, so there is nothing to compare."
        raise ValueError(msg)
    data = data.dropna(subset=["macro_f1"])
    tasks, arms = data["task"].unique(), data["arm"].unique()
    figure, axes = plt.subplots(
        len(costs), len(tasks), figsize=(2.6 + 3.3 * len(tasks), 0.6 + 3.2 * len(costs)),
        sharey="col", sharex="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, cost in zip(axes, costs, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            part = data[data["task"] == task]
            for arm, (color, marker) in zip(arms, _looks(arms), strict=True):
                mine = part[part["arm"] == arm]
                ax.plot(mine[cost], mine["macro_f1"], marker, color=color, markersize=4, alpha=0.45)
                mean = mine[[cost, "macro_f1"]].mean()
                ax.plot(mean[cost], mean["macro_f1"], marker, color=color, markersize=9, label=arm)
            ax.set(xscale="log", xlabel=COST_NAMES[cost], title=task if cost == costs[0] else "")
            wide = data[cost].max() > WIDE * data[cost].min()
            ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=6))
            ax.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            ax.xaxis.set_minor_locator(NullLocator())
        row[0].set_ylabel("Macro-F1")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", title="Strategy")
    figure.suptitle(titled("Cost against score", simulated=simulated), x=0.01, ha="left")
    figure.supxlabel(
        "Small points: seeds. Large points: their means. Cost on a logarithmic scale.", x=0.01, ha="left", fontsize=10
    )
    return Drawing(figure, data)


def save_figure(figure: Figure, data: pd.DataFrame, study: str, name: str) -> list[Path]:
    """Write one figure of a study as ``figures/<study>/<name>`` .png, .pdf and the .csv it was drawn from.

    Each file is written whole or not at all, and carries no date, so that the same numbers give the same bytes.

    Returns
    -------
    The three files.
    """
    stem = paths.figures_dir(study) / name
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    for ending, hidden in metadata.items():
        with paths.atomic_path(stem.with_name(name + ending)) as partial:
            figure.savefig(partial, metadata=hidden)
    paths.write_text(stem.with_name(f"{name}.csv"), data.to_csv(index=False, lineterminator="\n"))
    return [stem.with_name(name + ending) for ending in (".png", ".pdf", ".csv")]


def save_figures(drawings: Mapping[str, Drawing], study: str) -> list[str]:
    """Write several figures of a study with `save_figure`; return the files' paths below the repository."""
    files = [save_figure(drawing.figure, drawing.data, study, name) for name, drawing in drawings.items()]
    return [f"figures/{study}/{file.name}" for trio in files for file in trio]


def _without_counts() -> Figure:
    """Say in place of a figure that the cells are tokens already."""
    figure = plt.figure(figsize=(5, 0.6))
    figure.text(0.01, 0.5, "A tokenized data set has no counts to draw.", va="center")
    return figure


def _measured(flags: pd.DataFrame, panels: Mapping[str, str]) -> dict[str, str]:
    """Return the panels whose column was measured in some cell."""
    return {column: label for column, label in panels.items() if flags[column].notna().any()}


def _label_log_counts(ax: Axes) -> None:
    """Write 100, 300, 1,000 ... on a logarithmic x axis."""
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _with_intervals(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one row per run with the mean and the interval of its arm beside it."""
    labelled = statistics.with_arms(metrics)
    columns = ["task", "arm", "metric", "seed", "fold", "value", "n_train", "n_test"]
    rows = labelled.loc[labelled["metric"] == metric, labelled.columns.intersection(columns, sort=False)]
    if rows.empty:
        msg = f"metrics.csv holds no rows with metric {metric}; no run of this study has finished with a score."
        raise ValueError(msg)
    summary = [
        {"task": task, "arm": arm, **statistics.over_runs(runs)._asdict()}
        for (task, arm), runs in rows.groupby(["task", "arm"], sort=False)
    ]
    table = pd.DataFrame(summary)[["task", "arm", "mean", "low", "high"]]
    kept = rows[["task", "arm", "metric", "seed", "value"]] if statistics.overlap(rows) == 0 else rows
    return kept.merge(table, on=["task", "arm"], how="left")


def _points_and_intervals(ax: Axes, part: pd.DataFrame, arms: list[str]) -> None:
    """Draw one panel: arms from top to bottom, the control's mean as a vertical line."""
    for arm, rows in part.groupby("arm", sort=False):
        place = arms.index(arm)
        control = statistics.CONTROL in arm
        baseline = arm.split(", ")[-1] in BASELINES
        color = CONTROL if control else PALETTE[1] if baseline else PALETTE[0]
        first = rows.iloc[0]
        offsets = np.linspace(-0.16, 0.16, len(rows)) if len(rows) > 1 else [0.0]
        ax.hlines(place, first["low"], first["high"], color=color, linewidth=2.2)
        ax.plot(rows["value"], place + np.asarray(offsets), "o", color=color, markersize=4, alpha=0.5)
        ax.plot(first["mean"], place, "D", color=color, markersize=7, markeredgecolor="white")
        if control:
            ax.axvline(first["mean"], color=CONTROL, linestyle=":", linewidth=1.2, zorder=0)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.6)


def _confusion_panels(tables: Mapping[str, pd.DataFrame], title: str) -> Drawing:
    columns = min(PANEL_COLUMNS, len(tables))
    rows = -(-len(tables) // columns)
    classes = len(next(iter(tables.values())))
    side = 1.3 + 0.5 * classes
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * (side + 0.3), rows * side + 0.6), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(tables) :]:
        ax.set_axis_off()
    records = []
    for place, (ax, (arm, table)) in enumerate(zip(axes.flat, tables.items(), strict=False)):
        confusion_matrix(table, title=arm, ax=ax)
        below, beside = place + columns < len(tables), place % columns > 0
        ax.tick_params(length=0, labelbottom=not below, labelleft=not beside)
        ax.set(xlabel="" if below else ax.get_xlabel(), ylabel="" if beside else ax.get_ylabel())
        long = table.rename_axis(index="true", columns="predicted").stack().rename("cells").reset_index()
        long["share"] = long["cells"] / long.groupby("true")["cells"].transform("sum")
        records.append(long.assign(arm=arm)[["arm", "true", "predicted", "cells", "share"]])
    figure.suptitle(title, x=0.01, ha="left")
    return Drawing(figure, pd.concat(records, ignore_index=True))


def _plain_number(value: float, _place: int) -> str:
    """Write a tick of a logarithmic axis: 0.5, 20, 5k, 1M."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _looks(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Return a colour and a marker for each arm: grey for the control, the palette in turn for the others."""
    colors = iter(PALETTE * 10)
    markers = iter(MARKERS * 10)
    return [(CONTROL, "s") if statistics.CONTROL in arm else (next(colors), next(markers)) for arm in arms]
