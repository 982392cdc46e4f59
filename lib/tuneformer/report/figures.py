"""Figures of the notebooks and the page, in one style; nothing here judges.

In: tables (history, predictions, `results.Results`). Out: matplotlib figures, and from `save` the files
``runs/<study>/figures/<name>`` .png, .pdf and .csv, whose bytes depend on the numbers alone.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tuneformer import paths
from tuneformer.artifacts import atomic_path, write_text
from tuneformer.evaluate.resampling import FEW_CELLS
from tuneformer.report.tables import COSTS, heading, lines_of
from tuneformer.study import Study

if TYPE_CHECKING:
    from tuneformer.report.results import Results

# Okabe & Ito 2008, distinct under every common form of colour blindness; yellow, too pale for lines, comes last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#F0E442")
CONTROL = "#777777"
KINDS = {"fine-tuned": PALETTE[0], "control": CONTROL, "baseline": PALETTE[1]}
LEGEND_MOST = 12  # names that a legend can hold
MOST_BARS = 6  # lines whose intervals can be told apart
TICKS = {"size": 13, "linewidth": 1.3, "alpha": 0.5, "jitter": False}  # one short line per run
CEILING = {"color": "black", "linestyle": "--", "linewidth": 1.3, "label": "ceiling (Bayes)"}
WIDE = 20  # ratio of values above which an axis is logarithmic
BARS = {"estimator": "median", "errorbar": ("pi", 100)}  # of (low, mean, high): the mean, with bars from low to high


def set_style() -> None:
    """Set fonts, colours and sizes of every later figure."""
    rc = {
        "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
        "axes.titlesize": 12, "axes.labelsize": 11, "figure.dpi": 90, "figure.titlesize": 13, "grid.color": "#e3e3e3",
        "grid.linewidth": 0.8, "legend.fontsize": 10, "legend.frameon": False, "pdf.fonttype": 42, "savefig.dpi": 160,
        "xtick.labelsize": 10, "ytick.labelsize": 10,
    }  # fmt: skip
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE), font="DejaVu Sans", rc=rc)


def titled(text: str, *, simulated: bool) -> str:
    """Return a title that says so when the numbers below it are simulated."""
    return f"{text} (simulated)" if simulated else text


def save(figure: Figure, settings: Study, name: str, data: pd.DataFrame | None = None) -> list[str]:
    """Write a figure of a study as png and pdf and, if given, the table it was drawn from as csv.

    Each file is written whole or not at all and carries no date, so that the same numbers give the same bytes. Returns
    the files, as messages show them.
    """
    stem = paths.RUNS / settings.study / "figures" / name
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    for ending, hidden in metadata.items():
        with atomic_path(stem.with_name(f"{name}.{ending}")) as partial:
            figure.savefig(partial, metadata=hidden)
    if data is not None:
        write_text(stem.with_name(f"{name}.csv"), data.to_csv(index=False, lineterminator="\n"))
    endings = [*metadata, "csv"] if data is not None else metadata
    return [paths.shown(stem.with_name(f"{name}.{ending}")) for ending in endings]


def arm_scores(results: "Results") -> Figure:
    """Draw every run of every arm, with mean and interval as the answer has them, one panel per task.

    A filled diamond: a declared contrast calls this arm higher or lower than its reference.
    """
    answer = results.answer
    asked = answer["tasks"]
    order = list(dict.fromkeys(arm["arm"] for task in asked for arm in task["arms"] if not arm["is_ceiling"]))
    figure, axes = _panels(len(asked), 0.8 + 0.3 * len(order), names=order, legend=[*KINDS, CEILING["label"]])
    judged, has_ceiling = results.judged, False
    for ax, task in zip(axes, asked, strict=True):
        arms = pd.DataFrame(task["arms"])
        has_ceiling |= _ceiling(ax.axvline, task)
        arms = arms[~arms["is_ceiling"]]
        kind = np.select([arms["is_baseline"], arms["is_control"]], ["baseline", "control"], "fine-tuned")
        kinds = dict(zip(arms["arm"], kind, strict=True))
        clear = {one["arm"] for one in task["contrasts"] if one["verdict"] in ("higher", "lower")}
        runs = judged[(judged["task"] == task["task"]) & judged["arm"].isin(order)]
        look = {"order": order, "palette": KINDS, "legend": False, "ax": ax}
        sns.stripplot(runs, x=answer["score"], y="arm", hue=runs["arm"].map(kinds), marker="|", **TICKS, **look)
        for is_clear in (False, True):
            bars = _low_mean_high(arms[arms["arm"].isin(clear) == is_clear])
            if len(bars):
                face = {} if is_clear else {"markerfacecolor": "white"}
                points = {"markers": "D", "markersize": 7, "linestyle": "none", "err_kws": {"linewidth": 2.2}, **BARS}
                sns.pointplot(bars, x="value", y="arm", hue=bars["arm"].map(kinds), **points, **face, **look)
        ax.set(xlabel=heading(answer["score"]), ylabel="", title=task["task"])
    shown = [kind for kind in KINDS if kind in {*kinds.values()}]
    handles = [Line2D([], [], color=KINDS[kind], marker="D", linewidth=2.2, label=kind) for kind in shown]
    handles += [Line2D([], [], **CEILING)] if has_ceiling else []
    _head(figure, "Test score of every arm", results, handles=handles)
    key = "Ticks: runs. Diamond and line: mean and 95 % interval; filled where a contrast finds it higher or lower."
    same = " logistic_ranks reads what the model reads: the tokens of a cell." if "logistic_ranks" in order else ""
    _foot(figure, key + same)
    return figure


def contrast_differences(results: "Results") -> Figure:
    """Draw the declared contrasts, one panel per task: difference and interval of each, open where nothing is decided.

    The band is the margin within which two arms count as the same.
    """
    answer = results.answer
    looks = {
        "higher": PALETTE[0],
        "lower": PALETTE[1],
        "same": PALETTE[2],
        "not decided": CONTROL,
        "withheld": "#b0b0b0",
    }
    rows = pd.DataFrame([{**one, "task": task["task"]} for task in answer["tasks"] for one in task["contrasts"]])
    rows["label"] = rows["contrast"] + ": " + rows["arm"] + " - " + rows["reference"]
    rows["mean"] = rows["difference"].astype(float)
    order, names = list(rows["label"].unique()), list(rows["task"].unique())
    figure, axes = _panels(len(names), 0.8 + 0.34 * len(order), names=order, legend=list(looks))
    for ax, task in zip(axes, names, strict=True):
        ax.axvspan(-answer["margin"], answer["margin"], color="#f0f0f0", zorder=0)
        ax.axvline(0, color="black", linewidth=1)
        for verdict, color in looks.items():
            bars = _low_mean_high(rows[(rows["task"] == task) & (rows["verdict"] == verdict)])
            if len(bars):
                face = {"markerfacecolor": "white"} if verdict in ("not decided", "withheld") else {}
                points = {"markers": "o", "markersize": 7, "linestyle": "none", "err_kws": {"linewidth": 2.2}, **BARS}
                sns.pointplot(bars, x="value", y="label", order=order, color=color, ax=ax, **points, **face)
        ax.set(xlabel=f"Difference in {heading(answer['score'])}", ylabel="", title=task)
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(len(order) - 0.5, -0.5)
    found = [name for name in looks if name in set(rows["verdict"])]
    handles = [Line2D([], [], color=looks[name], marker="o", label=name) for name in found]
    _head(figure, "The declared contrasts", results, handles=handles)
    _foot(figure, f"Lines: 95 % interval. Grey band: within {answer['margin']:g}, which counts as the same.")
    return figure


def by_columns(results: "Results") -> Figure:
    """Draw the columns that the study's key `figure` names: y against x, a line for each value of hue.

    A number on x gives lines, anything else points. Arms that differ in more than x and hue have lines of their own,
    named by what differs; arms that have no x are horizontal. The intervals are the answer's; another y has none.
    """
    wanted = results.settings.figure
    x, y = wanted["x"], wanted.get("y", results.answer["score"])
    runs, is_judged = results.judged, y == results.answer["score"]
    ceilings = {arm["arm"] for task in results.answer["tasks"] for arm in task["arms"] if arm["is_ceiling"]}
    runs = runs[runs[y].notna() & ~runs["arm"].isin(ceilings)]
    lines = lines_of(runs, x, wanted.get("hue"))
    runs = runs.drop(columns=x).join(lines, on="arm")
    levels = list(lines.loc[lines[x].notna(), "line"].unique())
    colors = [PALETTE[place % len(PALETTE)] for place in range(len(levels))]
    look = {"x": x, "hue": "line", "hue_order": levels, "palette": colors}
    shows_bars = is_judged and len(levels) <= MOST_BARS
    bar = BARS if shows_bars else {**BARS, "errorbar": None}
    legend = [*levels, *("arm " + lines.index[lines[x].isna()])]
    figure, axes = _panels(len(results.answer["tasks"]), max(3.6, 0.25 * len(legend)), legend=legend)
    for ax, task in zip(axes, results.answer["tasks"], strict=True):
        of_task = runs[runs["task"] == task["task"]]
        bars = pd.DataFrame(task["arms"]).set_index("arm")[["low", "mean", "high"]]
        if not is_judged:
            bars = of_task.groupby("arm", sort=False)[[y]].mean().set_axis(["mean"], axis=1)
        bars = bars.join(lines, how="inner")
        points = _low_mean_high(bars[bars[x].notna()])
        if pd.api.types.is_numeric_dtype(lines[x]):
            sns.scatterplot(of_task, y=y, s=18, alpha=0.35, linewidth=0, legend=False, ax=ax, **look)
            dashes = {level: (4, 1.5) if place >= len(PALETTE) else "" for place, level in enumerate(levels)}
            style = {"style": "line", "style_order": levels, "markers": True, "dashes": dashes, "err_style": "bars"}
            sns.lineplot(points, y="value", ax=ax, **style, **look, **bar)
            _number_axis(ax, points[x], at_values=True)
        else:
            sns.stripplot(of_task, y=y, dodge=True, marker="_", legend=False, ax=ax, **TICKS, **look)
            dodge = 0.8 - 0.8 / len(levels)
            sns.pointplot(points, y="value", linestyle="none", markers="D", dodge=dodge, ax=ax, **look, **bar)
            ax.set_xticks(ax.get_xticks(), [text.get_text().replace("_", "\n") for text in ax.get_xticklabels()])
        styles = itertools.cycle(("--", ":", "-.", (0, (6, 2))))
        for name, mean in bars.loc[bars[x].isna(), "mean"].items():
            ax.axhline(mean, color=CONTROL, linestyle=next(styles), linewidth=1.3, label=f"arm {name}")
        _ceiling(ax.axhline, task if is_judged else {"arms": []})
        ax.set(xlabel=heading(x), ylabel=heading(y), title=task["task"])
        handles = ax.get_legend_handles_labels()
        if ax.get_legend():
            ax.get_legend().remove()
    figure.legend(*handles, loc="outside right center", title=heading(wanted["hue"]) if "hue" in wanted else None)
    _head(figure, f"{heading(y)} by {heading(x).lower()}", results)
    _foot(figure, "Faint: runs. Lines and marks: means" + (", with the 95 % interval." if shows_bars else "."))
    return figure


def class_sizes(results: "Results") -> Figure:
    """Draw the test cells of each class, one panel per task; hatched: too few, and left out of a mean over classes."""
    asked = [task for task in results.answer["tasks"] if task["test_cells"]]
    most = max(len(task["test_cells"]) for task in asked)
    longest = max(len(name) for task in asked for name in task["test_cells"])
    size = (len(asked) * (3 + 0.085 * longest), 1.6 + 0.3 * most)
    figure, axes = plt.subplots(1, len(asked), figsize=size, squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], asked, strict=True):
        cells = pd.Series(task["test_cells"])
        bars = ax.barh(cells.index, cells, color=PALETTE[0])
        for bar, name in zip(bars, cells.index, strict=True):
            bar.set(hatch="///" if name in task["left_out"] else None, edgecolor="white")
        ax.bar_label(bars, [f" {n:,} ({n / cells.sum():.0%})" for n in cells], fontsize=9)
        ax.set(xlabel="Test cells", title=task["task"], xlim=(0, 1.35 * cells.max()))
        ax.invert_yaxis()
    _head(figure, "How many cells each class has", results)
    return figure


def class_recalls(results: "Results", task: str) -> Figure:
    """Draw the recall of each class (columns, with their test cells) under each arm (rows, best first)."""
    of_task = next(one for one in results.answer["tasks"] if one["task"] == task)
    predictions = results.predictions[results.predictions["task"] == task].astype({"label": str, "predicted": str})
    predictions["recall"] = (predictions["label"] == predictions["predicted"]).astype(float)
    table = predictions.astype({"arm": str}).pivot_table(index="arm", columns="label", values="recall")
    cells = of_task["test_cells"]
    table = table.reindex(index=[arm["arm"] for arm in of_task["arms"] if arm["arm"] in table.index], columns=[*cells])
    few = {name for name, number in cells.items() if number < FEW_CELLS}
    names = [f"{name}{' *' if name in few else ''}\n{cells.get(name, 0):,} cells" for name in table]
    figure, ax = plt.subplots(figsize=(3.4 + 0.85 * table.shape[1], 1.7 + 0.32 * len(table)), layout="constrained")
    look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "annot": True, "fmt": ".2f", "linewidths": 1}
    sns.heatmap(table.set_axis(names, axis=1), cbar_kws={"label": "Recall"}, annot_kws={"size": 9}, ax=ax, **look)
    plain_heatmap(ax)
    ax.set(ylabel="", xlabel="")
    _head(figure, f"{task}: share of each class that is found", results)
    if few:
        _foot(figure, f"* fewer than {FEW_CELLS} test cells: says little.")
    return figure


def cost_and_score(results: "Results") -> Figure:
    """Draw the score of every run against what it cost: rows are costs, columns are tasks."""
    score, runs = results.answer["score"], results.judged
    costs = [cost for cost in COSTS if cost in runs and runs[cost].notna().any()]
    trained = runs[runs[score].notna()].rename(columns={"arm": "Arm", "strategy": "Strategy"})
    long = trained.melt([score, "task", "Arm", "Strategy"], costs, "cost", "value").query(
        "value > 0 and Strategy != 'bayes'"
    )
    name = "Arm" if long["Arm"].nunique() <= LEGEND_MOST else "Strategy"
    grid = sns.relplot(
        long, x="value", y=score, row="cost", col="task", hue=name, style=name, palette=_palette(long[name].unique()),
        height=2.9, aspect=1.15, s=45, alpha=0.75, linewidth=0, facet_kws={"sharex": "row", "sharey": "col"},
    )  # fmt: skip
    for (cost, task), ax in grid.axes_dict.items():
        _number_axis(ax, long.loc[long["cost"] == cost, "value"], at_values=False)
        ax.set(xlabel=COSTS[cost], ylabel=heading(score), title=task if cost == costs[0] else "")
        ax.tick_params(labelbottom=True)
    handles, names = grid.legend.legend_handles, [text.get_text() for text in grid.legend.texts]
    grid.legend.remove()
    grid.figure.set_layout_engine("constrained")
    grid.figure.legend(handles, names, loc="outside right center", title=name)
    _head(grid.figure, "What a run costs and what it scores", results)
    return grid.figure


# --- shared ---


def _panels(
    number: int, height: float, *, names: Sequence[str] = (), legend: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side, with room for names on their left and a legend on their right."""
    left, right = (0.085 * max(map(len, texts), default=0) for texts in (names, legend))
    size = (1.2 + left + right + (4.2 if number == 1 else 2.7 if names else 3.6) * number, height + 1.1)
    figure, axes = plt.subplots(1, number, figsize=size, sharey=bool(names), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def _ceiling(draw: Callable[..., Line2D], task: Mapping[str, Any]) -> bool:
    """Draw what no classifier can expect to exceed, where the cells are simulated and it is known; say whether."""
    found = [arm["mean"] for arm in task["arms"] if arm["is_ceiling"] and arm["mean"] is not None]
    if found:
        draw(np.mean(found), **CEILING)
    return bool(found)


def _low_mean_high(table: pd.DataFrame) -> pd.DataFrame:
    """Return three rows per row, value = low, mean and high, which seaborn draws with `BARS`."""
    ends = table.columns.intersection(["low", "mean", "high"])
    return table.melt(table.columns.difference(ends), ends, "end", "value").dropna(subset=["value"])


def _palette(names: Iterable[str]) -> dict[str, str]:
    """Return a colour per name: grey for the control, the palette in turn for the others."""
    colors = itertools.cycle(PALETTE)
    return {name: CONTROL if name == "random_init" else next(colors) for name in names}


def _number_axis(ax: Axes, values: pd.Series, *, at_values: bool) -> None:
    """Make a horizontal axis logarithmic if its values are far apart, and put the ticks at them if asked to."""
    places = np.unique(values)
    if places[0] > 0 and (places[-1] > WIDE * places[0] or not at_values):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if places[-1] > 100 * places[0] else (1, 2, 5), numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(_short_number))
    if at_values and len(places) <= 10:
        ax.set_xticks(places, [_short_number(place) for place in places])


def _short_number(value: float, _place: int = 0) -> str:
    """Write a tick: 0.5, 20, 5k, 1M."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def plain_heatmap(ax: Axes) -> None:
    """Take grid and tick marks from a heatmap, and write long names aslant."""
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(ax.get_yticks(), ax.get_yticklabels(), rotation=0)


def _head(figure: Figure, title: str, results: "Results", *, handles: Sequence[Line2D] = ()) -> None:
    """Write the title, and a legend on the right."""
    figure.suptitle(titled(title, simulated=results.answer["simulated"]), x=0.01, ha="left")
    if handles:
        figure.legend(handles=handles, loc="outside right center")


def _foot(figure: Figure, text: str) -> None:
    figure.supxlabel(textwrap.fill(text, int(13 * figure.get_figwidth())), x=0.01, ha="left", fontsize=10)
