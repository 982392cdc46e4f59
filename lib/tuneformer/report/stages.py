"""Figures of one notebook each: pre-training (00), quality control (01), made cells (03, 04) and compression (08).

In: the tables that these notebooks compute. Out: matplotlib figures in the style of `tuneformer.report.figures`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tuneformer.cells import realism
from tuneformer.report.figures import CONTROL, PALETTE, titled
from tuneformer.study import Study

if TYPE_CHECKING:
    import anndata as ad
    from scipy import sparse

DRAWN_CELLS, DRAWN_GENES, BINS = 500, 1000, 20  # of each set of made cells
MEASURES = {
    "n_counts": "Total count (UMI)",
    "mito_share": "Mitochondrial share of the counts",
    "n_genes": "Genes with a count",
}
POINTS = {
    "members": "Cells in a point",
    "counts": "Counts of a point (UMI)",
    "genes": "Genes with a count",
    "tokens": "Tokens before the cut (dashed)",
}
REALISM = {  # panel: label of x, label of y
    "variance": ("Mean count of a gene", "Variance"),
    "zeros": ("Mean count of a gene", "Share of cells without it"),
    "library size": ("Total count of a cell", "Share of the cells"),
    "detected genes": ("Genes with a count", "Share of the cells"),
    "components": ("First component", "Second component"),
}


def loss_curve(curve: pd.DataFrame, references: Mapping[str, float], *, title: str) -> Figure:
    """Draw the masked-token loss (nats per token) of pre-training, and losses that need no context as lines.

    `curve` has the columns step, train_loss and held_out_loss.
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

    `flags`: from `tuneformer.data.qc`. `labels`: class of every cell, or missing. What was not measured has no panel.
    """
    known = list(settings.classes) or sorted(labels.dropna().astype(str).unique())
    shown = labels.astype(object).map(str, na_action="ignore").fillna("no label")
    shown = shown.where(shown.isin([*known, "no label"]), "other class")
    data = flags.assign(shown=shown, n_counts=flags["n_counts"].clip(lower=1))
    order = [name for name in [*known, "other class", "no label"] if name in set(shown)]
    limits = {"n_counts": [settings.min_counts, settings.max_counts], "mito_share": [settings.max_mito_share]}
    panels = [name for name in limits if flags[name].notna().any()]
    if not panels:
        return _without_counts()
    size = (1 + 4.5 * len(panels), 1.4 + 0.38 * len(order))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], panels, strict=True):
        look = {"cut": 0, "density_norm": "width", "inner": "quart", "linewidth": 1, "color": PALETTE[5]}
        sns.violinplot(data, x=name, y="shown", order=order, log_scale=(name == "n_counts", False), ax=ax, **look)
        for limit in filter(None, limits[name]):
            ax.axvline(limit, color=PALETTE[1], linestyle="--")
        ax.set(xlabel=MEASURES[name], ylabel="")
    _label_log_counts(axes[0, 0])
    title = titled("Cells before quality control, with the limits", simulated=settings.simulated)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def qc_scatter(flags: pd.DataFrame, settings: Study) -> Figure:
    """Draw total count against detected genes and mitochondrial share, coloured by the first rule that a cell fails."""
    panels = [name for name in ("n_genes", "mito_share") if flags[name].notna().any()]
    if flags["n_counts"].isna().all() or not panels:
        return _without_counts()
    rules = flags.select_dtypes(bool)
    first = rules.idxmax(axis=1).where(rules.any(axis=1), "kept")
    numbers = first.value_counts()
    names = {rule: f"fails {rule} ({numbers.get(rule, 0):,})" for rule in rules}
    names = {"kept": f"kept ({numbers.get('kept', 0):,})", **names}
    colors = dict(zip(names.values(), ["#b0b0b0", *PALETTE], strict=False))
    size = (1 + 4.5 * len(panels), 4.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    data = flags.assign(rule=first.map(names)).sort_values("rule", key=lambda rule: ~rule.str.startswith("kept"))
    look = {"hue": "rule", "style": "rule", "hue_order": list(colors), "style_order": list(colors), "palette": colors}
    for ax, name in zip(axes[0], panels, strict=True):
        sns.scatterplot(data, x="n_counts", y=name, s=14, linewidth=0, ax=ax, **look)
        ax.set(xscale="log", xlabel=MEASURES["n_counts"], ylabel=MEASURES[name])
        _label_log_counts(ax)
        handles = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(*handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, markerscale=2)
    figure.suptitle(titled("What quality control drops", simulated=settings.simulated), x=0.01, ha="left")
    return figure


def points_against_k(measured: pd.DataFrame, *, max_length: int, simulated: bool) -> Figure:
    """Draw what pseudo-bulk points hold against the cells behind them: medians, and lines from 5 to 95 %.

    `measured` has one row per point: kind (single cells, pseudo-bulk, thinned), k, and the columns of `POINTS`.
    """
    colors = {"single cells": CONTROL, "pseudo-bulk": PALETTE[0], "thinned": PALETTE[1]}
    look = {"markers": ["D", "o", "s"], "markersize": 6, "linestyle": "none", "err_kws": {"linewidth": 1.8}}
    look |= {"palette": colors, "hue_order": list(colors), "dodge": 0.3, "estimator": "median", "errorbar": ("pi", 90)}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for ax, (column, label) in zip(axes.flat, POINTS.items(), strict=True):
        is_log = column in ("members", "counts")
        sns.pointplot(measured, x="k", y=column, hue="kind", log_scale=(False, is_log), ax=ax, **look)
        ax.set(xlabel="k" if ax in axes[1] else "", ylabel=label)
        ax.yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
        if not is_log:
            ax.set_ylim(0, None)
        handles = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    axes[1, 1].axhline(max_length, color="black", linestyle="--")
    figure.legend(*handles, loc="outside lower center", ncols=len(colors))
    figure.suptitle(titled("Pseudo-bulk points and single cells", simulated=simulated), x=0.01, ha="left")
    return figure


def realism_panels(real: "ad.AnnData", made: Mapping[str, "ad.AnnData"], *, seed: int, simulated: bool) -> Figure:
    """Draw sets of made cells (a column each) over held-out real cells, in grey.

    Rows: variance of each gene, and share of the cells without it, against its mean count (dashed: Poisson counts);
    total counts and detected genes of the cells; the first two principal components of the real cells.
    """
    rng = np.random.default_rng([seed, 3])
    number = min(DRAWN_CELLS, real.n_obs, *(cells.n_obs for cells in made.values()))
    real_counts = realism.drawn_counts(real, number, rng)
    by_mean = np.argsort(realism.gene_moments(real_counts)["mean"].to_numpy(), kind="stable")
    genes, tables = by_mean[:: -(-len(by_mean) // DRAWN_GENES)], []
    for name, cells in made.items():
        pair = [real_counts, realism.drawn_counts(cells, number, rng)]
        places = realism.embeddings(*realism.normalised(*pair))
        for kind, counts, place in zip(("real", "made"), pair, places, strict=True):
            tables.append(_measured(counts, place, genes).assign(made=name, cells=kind))
    data = pd.concat(tables, ignore_index=True)
    size = (1.2 + 2.7 * len(made), 13)
    figure, axes = plt.subplots(
        len(REALISM), len(made), figsize=size, sharex="row", sharey="row", squeeze=False, layout="constrained"
    )
    for row, (panel, (x_label, y_label)) in zip(axes, REALISM.items(), strict=True):
        points = data[data["panel"] == panel]
        for ax, name, color in zip(row, made, PALETTE * len(made), strict=False):
            _realism_panel(ax, panel, points[points["made"] == name], points["x"], color)
            ax.set(xlabel=x_label, ylabel=y_label if ax is row[0] else "", title=name if panel == "variance" else "")
    title = titled("Made cells, in colour, on held-out real cells, in grey", simulated=simulated)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def pareto(runs: pd.DataFrame, *, score: str = "macro_f1", simulated: bool) -> Figure:
    """Draw size on disk (MB) and speed of the compressed variants of a model against their score.

    `runs` has one row per variant: arm, file_bytes, ``speed:1`` and the score. None beats those on the dotted line in
    both.
    """
    data = runs.rename(columns={"arm": "Variant"}).assign(megabytes=runs["file_bytes"] / 1e6)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    panels = {"megabytes": "Size on disk (MB)", "speed:1": "Times as fast as fp32, one thread"}
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        best = data.sort_values([column, score], ascending=[column == "megabytes", False])
        best = best[best[score] > best[score].cummax().shift(fill_value=-1)]
        ax.plot(best[column], best[score], ":", color=CONTROL, linewidth=1.5, zorder=1)
        sns.scatterplot(data, x=column, y=score, hue="Variant", style="Variant", s=90, palette="tab20", ax=ax)
        ax.set(xlabel=label, ylabel="Macro-F1" if score == "macro_f1" else score, xlim=(0, None))
        handles = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(*handles, loc="outside right center", title="Variant")
    figure.suptitle(titled("Compressed variants of one model", simulated=simulated), x=0.01, ha="left")
    return figure


def _without_counts() -> Figure:
    """Say in place of a figure that the cells are tokens already."""
    figure = plt.figure(figsize=(5, 0.6))
    figure.text(0.01, 0.5, "A tokenized data set has no counts to draw.", va="center")
    return figure


def _label_log_counts(ax: Axes) -> None:
    """Write 100, 300, 1,000 ... on a logarithmic x axis."""
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _measured(counts: "sparse.csr_array", place: np.ndarray, genes: np.ndarray) -> pd.DataFrame:
    """Measure one set of cells for all panels; columns panel, x, y."""
    moments = realism.gene_moments(counts).iloc[genes]
    columns = {
        "variance": (moments["mean"], moments["variance"]),
        "zeros": (moments["mean"], moments["zeros"]),
        "library size": (counts.sum(axis=1), np.nan),
        "detected genes": (np.diff(counts.indptr), np.nan),
        "components": (place[:, 0], place[:, 1]),
    }
    return pd.concat([pd.DataFrame({"panel": panel, "x": x, "y": y}) for panel, (x, y) in columns.items()])


def _realism_panel(ax: Axes, panel: str, points: pd.DataFrame, shared_x: pd.Series, color: str) -> None:
    """Draw real and made cells; `shared_x` holds the x of all panels in the row, for common bins."""
    for kind, shade in (("real", CONTROL), ("made", color)):
        part = points[points["cells"] == kind]
        if panel in ("library size", "detected genes"):
            is_log = panel == "library size"
            edges = (np.geomspace if is_log else np.linspace)(shared_x.min(), shared_x.max(), BINS + 1)
            weights = np.full(len(part), 1 / len(part))
            ax.hist(part["x"], bins=edges, weights=weights, color=shade, alpha=0.5, edgecolor="none")
            if is_log:
                ax.set_xscale("log")
                _label_log_counts(ax)
        else:
            drawn = part[(part["x"] > 0) & (part["y"] > 0)] if panel == "variance" else part
            ax.scatter(drawn["x"], drawn["y"], s=7, linewidths=0, color=shade, alpha=0.5)
    if panel in ("variance", "zeros"):
        means = np.geomspace(shared_x[shared_x > 0].min(), shared_x.max(), 100)
        ax.plot(means, means if panel == "variance" else np.exp(-means), color="black", linestyle="--", linewidth=1)
        ax.set(xscale="log", yscale="log" if panel == "variance" else "linear")
