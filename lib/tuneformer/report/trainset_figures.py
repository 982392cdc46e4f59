"""Figures and tables on what a model was trained on: pseudo-bulk, synthetic cells, mixtures, and their controls.

In: rows of ``metrics.csv``. Out: drawings (figure and table) by name, only those that the study's train sets allow; and
tables as text. The numbers are those of `tuneformer.evaluate.trainset_effects`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from tuneformer.evaluate import learning_curves, statistics, trainset_effects
from tuneformer.evaluate.trainset_effects import BASELINE, PARTS, SCORES, WHOLE
from tuneformer.report import plotting
from tuneformer.report.plotting import CONTROL, MARKERS, PALETTE, Drawing
from tuneformer.study.train_sets import GENERATORS, parse
from tuneformer.study.treatments import BASELINES

PANEL_COLUMNS = 3
GROUPS = ("Three ways to aggregate", "Single cells, but fewer", "Pseudo-bulk, one thing changed")
LOWER, HIGHER, UNCLEAR = PALETTE[1], PALETTE[0], CONTROL
CHANGED = tuple(zip((*PALETTE[3:6], PALETTE[7], *PALETTE[1:3]) * 3, (MARKERS[3:] + MARKERS[:3]) * 2, strict=True))
SEEDS = "Points and lines: mean over the seeds and its 95 % interval."


def drawings(metrics: pd.DataFrame, *, simulated: bool) -> dict[str, Drawing]:
    """Draw what the train sets of a study did to its scores.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv``.
    simulated
        Whether the titles have to say that the cells are simulated.

    Returns
    -------
    Figure name to figure and table, for each task (and the linear baseline, and strategy where there are several):
    ``fig4_<task>_against_k``, ``fig5_<task>_decomposition``, ``fig6_<task>_per_class``, ``fig7_<task>_share``,
    ``fig8_<task>_confusion``; ``fig9_<task>_learning_curve``. What the
    train sets do not allow is left out; a study with one train set gives {}.
    """
    of_curve = learning_curves.rows_of(metrics)
    drawn: dict[str, Drawing | None] = {
        f"fig9_{task}_learning_curve": learning_curve(rows, title=task, simulated=simulated)
        for task, rows in of_curve.groupby("task", sort=False)
    }
    metrics = trainset_effects.varied(metrics[~learning_curves.has_few(metrics)])
    for (task, strategy), rows in metrics.groupby(["task", "strategy"], sort=False):
        named = trainset_effects.needs_name(strategy, metrics)
        stem = f"{task}_{strategy}" if named else task
        title = f"{task}, {strategy}" if named else task
        drawn |= {
            f"fig4_{stem}_against_k": against_k(rows, title=title, simulated=simulated),
            f"fig5_{stem}_decomposition": decomposition(rows, title=title, simulated=simulated),
            f"fig6_{stem}_per_class": per_class(rows, title=title, simulated=simulated),
            f"fig7_{stem}_share": share(rows, title=title, simulated=simulated),
            f"fig8_{stem}_confusion": confusions(
                rows, _that_matter(rows["train_set"].unique()), title=title, simulated=simulated
            ),
        }
    return {name: drawn[name] for name in sorted(drawn) if drawn[name] is not None}


def strategy_drawings(metrics: pd.DataFrame, *, simulated: bool) -> dict[str, Drawing]:
    """Draw how the strategies compare: scores, confusion matrices and cost, on single cells where the study has these.

    Returns
    -------
    ``fig1_scores``, ``fig2_confusion_<task>``, ``fig3_cost``; {} for a study that varies the train set alone.
    """
    if not trainset_effects.compares_strategies(metrics):
        return {}
    rows = trainset_effects.strategy_rows(metrics)
    trained = rows[rows["strategy"] != "majority"]  # which has one column of cells, and no cost
    return {
        "fig1_scores": plotting.strategy_scores(rows, simulated=simulated),
        **plotting.confusion_matrices(trained, simulated=simulated),
        "fig3_cost": plotting.cost_and_score(trained, simulated=simulated),
    }


def against_k(metrics: pd.DataFrame, *, title: str, simulated: bool) -> Drawing | None:
    """Draw accuracy and macro-F1 against the number of cells behind a point, beside the controls.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv`` of one task and one strategy; None comes back when no train set has a k.
    title
        What they are rows of.
    simulated
        Whether the title has to say that the cells are simulated.
    """
    data = trainset_effects.decline(metrics)
    if data.empty:
        return None
    data.insert(3, "panel", [_group(name) for name in data["train_set"]])
    panels = [name for name in GROUPS if name in set(data["panel"])]
    figure, axes = plt.subplots(
        3, len(panels), figsize=(max(6.6, 0.8 + 3.2 * len(panels)), 6.6), sharey="row", squeeze=False,
        height_ratios=[1, 1, 0.45], layout="constrained",
    )  # fmt: skip
    first = trainset_effects.first_aggregation(data["train_set"])
    for column, panel in zip(axes.T, panels, strict=True):
        for ax, (metric, name) in zip(column, SCORES.items(), strict=False):
            ax.set_xscale("log")
            rows = data[data["metric"] == metric]
            mine = rows[(rows["panel"] == panel) & (rows["train_set"] != BASELINE)]
            if first and panel != GROUPS[0]:
                plain = rows[rows["series"] == first].sort_values("k")
                ax.plot(plain["k"], plain["mean"], color=PALETTE[0], linewidth=1.2, label=f"{first}, as on the left")
            looks = zip(PALETTE, MARKERS, strict=False) if panel == GROUPS[0] else CHANGED
            _lines(ax, mine, "series", "k", dict(zip(mine["series"].unique(), looks, strict=False)), 1.12)
            _baseline(ax, rows[rows["train_set"] == BASELINE], 1)
            ax.set(ylabel=name if ax in axes[:, 0] else "", title=panel if ax is column[0] else "")
            ax.set_xticks(data["k"].unique(), data["k"].unique())
            ax.xaxis.set_minor_locator(NullLocator())
        column[0].tick_params(labelbottom=False)
        column[1].set_xlabel("Cells behind a point (k)")
        column[2].set_axis_off()
        column[2].legend(*column[1].get_legend_handles_labels(), loc="upper left", borderaxespad=0)
    _head(figure, f"{title}: trained on pseudo-bulk", SEEDS, simulated=simulated)
    return Drawing(figure, data)


def decomposition(metrics: pd.DataFrame, *, title: str, simulated: bool) -> Drawing | None:
    """Draw the parts of the fall from single cells to pseudo-bulk (sum): a panel per k, a row per part.

    Parameters and the return value are those of `against_k`; None where no k has all five train sets of the path.
    """
    data = trainset_effects.decomposition(metrics)
    if data.empty:
        return None
    names, ks = [*PARTS, WHOLE], list(data["k"].unique())
    figure, axes = plt.subplots(
        len(SCORES), len(ks), figsize=(max(8.4, 1.9 + 1.72 * len(ks)), 5.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (metric, name) in zip(axes, SCORES.items(), strict=True):
        for ax, k in zip(row, ks, strict=True):
            part = data[(data["metric"] == metric) & (data["k"] == k)].set_index("part").loc[names]
            colors = [HIGHER if fall < 0 else LOWER for fall in part["fall"]]
            colors[-1] = PALETTE[6]
            clear = (part["low"] > 0) | (part["high"] < 0)
            faces = [color if known else "white" for color, known in zip(colors, clear, strict=True)]
            ax.barh(range(len(names)), part["fall"], height=0.62, color=colors, alpha=0.4)
            ax.hlines(range(len(names)), part["low"], part["high"], color=colors, linewidth=2)
            ax.scatter(part["fall"], range(len(names)), color=faces, edgecolors=colors, s=22, zorder=3)
            ax.axvline(0, color="black", linewidth=1)
            ax.axhline(len(PARTS) - 0.5, color=CONTROL, linewidth=0.8)
            ax.set_yticks(range(len(names)), names)
            ax.set(ylim=(len(names) - 0.5, -0.5), title=f"k = {k}" if ax in axes[0] else "")
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.tick_params(labelsize=9)
            ax.grid(visible=False, axis="y")
        row[0].set_ylabel(name)
    key = (
        "Fall of the score: right of the line a loss (orange), left of it a gain (blue). Lines: 95 % interval over the "
        "seeds;\nfilled points where it excludes zero. The four parts add up to the whole fall."
    )
    text = f"{title}: the parts of the fall to pseudo-bulk (sum)"
    _head(figure, text, key, simulated=simulated)
    return Drawing(figure, data)


def per_class(metrics: pd.DataFrame, *, title: str, simulated: bool) -> Drawing | None:
    """Draw, for macro-F1 and the recall of each class, the difference of every train set to all single cells.

    Left out of the figure, not of its table: controls, shares of synthetic cells, and all aggregations but the first. A
    padded train set is compared with one padded with copies of real cells too.

    Parameters and the return value are those of `against_k`; None where nothing can be compared with all single cells.
    """
    data = trainset_effects.compared(metrics)
    data = data[data["metric"] != "accuracy"].reset_index(drop=True)
    names = _compared(metrics["train_set"].unique())
    shown = (data["against"] == BASELINE) | data["against"].str.startswith("mixture_copies", na=False)
    pairs = data[shown & data["train_set"].isin(names)].drop(columns=["low", "high"])
    pairs = pairs.rename(columns={"difference_low": "low", "difference_high": "high"})
    names = [name for name in names if name in set(pairs["train_set"])]
    if not names:
        return None
    means = data[data["train_set"] == BASELINE].set_index("metric")["mean"]
    panels = list(dict.fromkeys(["macro_f1", *pairs["metric"]]))
    columns = min(PANEL_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 + 2.6 * columns, 1.2 + rows * (0.7 + 0.27 * len(names))), sharey=True, sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for place, (ax, metric) in enumerate(zip(axes.flat, panels, strict=False)):
        mine = pairs[pairs["metric"] == metric]
        to_copies = mine["against"] != BASELINE
        _differences(ax, mine[~to_copies], names, 0.14 if to_copies.any() else 0, "o")
        _differences(ax, mine[to_copies], names, -0.18, "D")
        known = f", single cells {means[metric]:.2f}" if metric in means else ""
        ax.set_title(f"{SCORES.get(metric, metric.removeprefix('recall:'))}{known}", fontsize=11)
        ax.axvline(0, color="black", linewidth=1)
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="Difference" if place + columns >= len(panels) else "")
        ax.tick_params(labelsize=9, labelbottom=place + columns >= len(panels))
    key = "Difference to single cells (circles), paired by seed, with 95 % interval."
    if (pairs["against"] != BASELINE).any():
        key = f"{key[:-1]}; diamonds: difference to padding with copies."
    key += "\nFilled and coloured where the interval excludes zero: blue higher, orange lower."
    _head(figure, f"{title}: macro-F1, and recall of each class, by train set", key, simulated=simulated)
    return Drawing(figure, data)


def share(metrics: pd.DataFrame, *, title: str, simulated: bool) -> Drawing | None:
    """Draw accuracy and macro-F1 against the percentage of the training cells that are synthetic.

    Parameters and the return value are those of `against_k`; None where no train set is a share.
    """
    data = trainset_effects.shares(metrics)
    if data.empty:
        return None
    figure, axes = plt.subplots(1, len(SCORES), figsize=(9.4, 4.2), layout="constrained")
    for ax, (metric, name) in zip(axes, SCORES.items(), strict=True):
        rows = data[data["metric"] == metric]
        looks = dict(zip(GENERATORS, zip(PALETTE, MARKERS, strict=False), strict=False))
        _lines(ax, rows[rows["percent"] > 0], "generator", "percent", looks, 0.9)
        _baseline(ax, rows[rows["percent"] == 0].drop_duplicates("metric"), 0)
        ax.set(xlabel="Synthetic cells among the training cells (%)", ylabel=name)
        ax.xaxis.set_major_locator(FixedLocator([*sorted(data["percent"].unique())]))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    text = f"{title}: real cells replaced by synthetic ones"
    _head(figure, text, SEEDS, simulated=simulated)
    return Drawing(figure, data)


def learning_curve(metrics: pd.DataFrame, *, title: str, simulated: bool) -> Drawing:
    """Draw accuracy and macro-F1 of every strategy and baseline against the number of training cells of a class.

    Parameters and the return value are those of `against_k`.
    """
    data = learning_curves.learning_curve(metrics)
    figure, axes = plt.subplots(1, len(SCORES), figsize=(10.6, 4.6), layout="constrained")
    names = list(metrics["strategy"].unique())
    colors = dict(zip([name for name in names if name != statistics.CONTROL], PALETTE * 2, strict=False))
    for ax, (metric, name) in zip(axes, SCORES.items(), strict=True):
        for place, strategy in enumerate(names):
            rows = data[(data["metric"] == metric) & (data["strategy"] == strategy)]
            style = "--" if strategy in BASELINES else "-"
            color = colors.get(strategy, CONTROL)
            look = {"color": color, "marker": MARKERS[place % len(MARKERS)], "linestyle": style, "markersize": 5}
            ax.plot(rows["cells"], rows["mean"], label=strategy, **look)
            ax.fill_between(rows["cells"], rows["low"], rows["high"], color=color, alpha=0.1, linewidth=0)
        ax.set(xscale="log", xlabel="Training cells of each class", ylabel=name)
        ax.xaxis.set_major_locator(FixedLocator([*sorted(data["cells"].round().unique())]))
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.xaxis.set_minor_locator(NullLocator())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="Dashed: baselines")
    _head(figure, f"{title}: score against labelled cells", SEEDS.replace("lines", "areas"), simulated=simulated)
    return Drawing(figure, data)


def confusions(metrics: pd.DataFrame, train_sets: Sequence[str], *, title: str, simulated: bool) -> Drawing | None:
    """Draw the confusion matrices of some train sets side by side, in their order; the cells of the seeds are added up.

    Parameters
    ----------
    metrics
        Rows of ``metrics.csv`` of one task and one strategy.
    train_sets
        Their names; None comes back for fewer than two, or when no run of them has scores.
    title
        What they are rows of.
    simulated
        Whether the title has to say that the cells are simulated.
    """
    if len(train_sets) < 2:
        return None
    rows = pd.concat([metrics[metrics["train_set"] == name] for name in train_sets])
    rows = rows.assign(task=title, strategy=rows["train_set"], train_set=BASELINE)  # a panel per train set, by its name
    drawn = list(plotting.confusion_matrices(rows, simulated=simulated).values())
    if not drawn:
        return None
    figure, data = drawn[0]
    for ax in figure.axes:
        ax.set_title(ax.get_title(loc="left"), fontsize=10)
    figure.suptitle(plotting.titled(f"{title}: confusion by train set", simulated=simulated), x=0.01, ha="left")
    return Drawing(figure, data.rename(columns={"arm": "train_set"}))


def tables(metrics: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the effects of the train sets as text for a reader: rounded, with 95 % intervals.

    Returns
    -------
    Title to table, only those that the study's train sets allow; {} for a study with one train set.
    """
    effects = trainset_effects
    metrics = effects.varied(metrics)
    if metrics.empty:
        return {}
    runs = ["task", "strategy"] if metrics["strategy"].nunique() > 1 else ["task"]
    pairs, recalls = effects.differences(metrics), effects.per_class(metrics)
    to_baseline = recalls["against"].isna() | (recalls["against"] == BASELINE)
    changed = pairs[pairs["metric"].isin(SCORES) & (pairs["against"] != BASELINE)]
    made = {
        "Score against k": _grid(effects.decline(metrics), [*runs, "metric", "series"], "k", _score),
        "Parts of the fall at each k; negative is a gain": _grid(
            effects.decomposition(metrics),
            [*runs, "metric", "part"],
            "k",
            lambda row: _signed(row.fall, row.low, row.high),
        ),
        "Changed train sets against the unchanged": _grid(
            changed, [*runs, "train_set", "against"], "metric", lambda row: _signed(row.difference, row.low, row.high)
        ),
        "Spread between sum, mean and approximate mean": _spread(effects.aggregations(metrics), [*runs, "metric", "k"]),
        "Score against the share of synthetic cells (%)": _grid(
            effects.shares(metrics), [*runs, "metric", "generator"], "percent", _score
        ),
        "Recall, and its difference to single cells": _grid(
            recalls[to_baseline], [*runs, "train_set"], "class", _recall
        ),
        "Difference of recall to padding with copies": _grid(
            recalls[~to_baseline & recalls["against"].str.startswith("mixture", na=False)],
            [*runs, "train_set"],
            "class",
            lambda row: _signed(row.difference, row.difference_low, row.difference_high),
        ),
    }  # fmt: skip
    return {title: table.rename_axis(columns=title) for title, table in made.items() if not table.empty}


def _group(train_set: str) -> str:
    """Return the panel of `against_k` to which a train set belongs."""
    said = parse(train_set)
    if said.kind == "single_cell":
        return GROUPS[1] if said.control else GROUPS[0]
    return GROUPS[2] if said.control else GROUPS[0]


def _compared(train_sets: Iterable[str]) -> list[str]:
    """Return the train sets whose classes are shown: no controls, no shares (they have a figure), one aggregation."""
    said = {name: parse(name) for name in train_sets if name != BASELINE}
    first = trainset_effects.first_aggregation(said)
    return [
        name
        for name, one in said.items()
        if one.kind == "synthetic"
        or one.amount == "pad"
        or (one.aggregation == first and one.control is None and one.k)
    ]


def _that_matter(train_sets: Iterable[str]) -> list[str]:
    """Return single cells, smallest and largest k, and synthetic cells alone: a panel for each of 40 says nothing."""
    said = {name: parse(name) for name in _compared(train_sets)}
    ks = [one.k for one in said.values() if one.k]
    ends = {min(ks), max(ks)} if ks else set()
    kept = [name for name, one in said.items() if one.k in ends or (one.kind == "synthetic" and one.control is None)]
    return [BASELINE, *kept]


def _lines(ax: Axes, rows: pd.DataFrame, by: str, x: str, looks: Mapping[str, tuple[str, str]], apart: float) -> None:
    """Draw a line with intervals for each value of `by`.

    `looks` gives colour and marker. Lines are moved sideways so that their intervals can be told apart: on a
    logarithmic axis by the factor `apart` from one to the next, else by that much.
    """
    names = list(dict.fromkeys(rows[by]))
    for place, name in enumerate(names):
        part = rows[rows[by] == name].sort_values(x)
        color, marker = looks[name]
        off = place - (len(names) - 1) / 2
        at = part[x] * apart**off if ax.get_xscale() == "log" else part[x] + apart * off
        ax.vlines(at, part["low"], part["high"], color=color, linewidth=1.6, alpha=0.6)
        ax.plot(
            at, part["mean"], marker=marker, color=color, linewidth=1.4, markersize=5.5, label=name.replace("_", " ")
        )


def _baseline(ax: Axes, rows: pd.DataFrame, at: float) -> None:
    """Draw the score of all single cells as a point at `at` and a dotted line."""
    for row in rows.itertuples():
        ax.axhline(row.mean, color="black", linestyle=":", linewidth=1.2)
        ax.vlines(at, row.low, row.high, color="black", linewidth=1.6)
        ax.plot(at, row.mean, "o", color="black", markersize=6, label="single cells")


def _differences(ax: Axes, pairs: pd.DataFrame, names: list[str], offset: float, marker: str) -> None:
    """Draw differences with intervals, one row per train set; a clear one is filled and coloured."""
    for row in pairs.itertuples():
        place = names.index(row.train_set) - offset
        color = HIGHER if row.low > 0 else LOWER if row.high < 0 else UNCLEAR
        ax.hlines(place, row.low, row.high, color=color, linewidth=1.8)
        face = "white" if color == UNCLEAR else color
        ax.plot(row.difference, place, marker, color=color, markerfacecolor=face, markersize=5.5)


def _head(figure: Figure, title: str, key: str, *, simulated: bool) -> None:
    figure.suptitle(plotting.titled(title, simulated=simulated), x=0.01, ha="left")
    figure.supxlabel(key, x=0.01, ha="left", fontsize=10)


def _grid(table: pd.DataFrame, index: list[str], columns: str, text: Callable[[Any], str]) -> pd.DataFrame:
    """Lay `text` of every row out by `index` and `columns`, in the order of the rows."""
    if table.empty:
        return table
    shown = table.assign(text=[text(row) for row in table.itertuples()]).replace({"metric": SCORES})
    return shown.pivot_table(index=index, columns=columns, values="text", aggfunc="first", sort=False).fillna("-")


def _spread(table: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    names = {"between": "between their means", "expected": "expected from noise", "seeds": "between seeds"}
    return table.replace({"metric": SCORES}).set_index(index)[[*names, "p", "n"]].rename(columns=names).round(3)


def _score(row: Any) -> str:
    return statistics.with_interval(row.mean, row.low, row.high)


def _signed(mean: float, low: float, high: float) -> str:
    return statistics.with_interval(mean, low, high, sign="+")


def _recall(row: Any) -> str:
    difference = _signed(row.difference, row.difference_low, row.difference_high)
    return f"{row.recall:.3f}" if pd.isna(row.difference) else f"{row.recall:.3f}; {difference}"
