"""Figures of train sets that are not single cells.

In: the table of points that `tuneformer.trainsets.pseudobulk.measure_points` makes. Out: matplotlib figures.
"""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tuneformer.report.plotting import CONTROL, PALETTE, titled

PANELS = {
    "members": "Cells in a point",
    "counts": "Counts of a point (UMI)",
    "genes": "Genes with a count",
    "tokens": "Tokens before the cut (dashed)",
}


def points_against_k(measured: pd.DataFrame, *, max_length: int, simulated: bool) -> Figure:
    """Draw what points hold against the number of cells they are made of: medians, and lines from 5 to 95 %.

    Parameters
    ----------
    measured
        As `tuneformer.trainsets.pseudobulk.measure_points` makes it.
    max_length
        Most tokens that the model reads, a dashed line.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    One panel each for members, counts (both on a logarithmic scale), genes and tokens.
    """
    colors = {"single cells": CONTROL, "pseudo-bulk": PALETTE[0], "thinned": PALETTE[1]}
    look = {"markers": ["D", "o", "s"], "markersize": 6, "linestyle": "none", "err_kws": {"linewidth": 1.8}}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, layout="constrained")
    for ax, (column, label) in zip(axes.flat, PANELS.items(), strict=True):
        sns.pointplot(
            measured, x="k", y=column, hue="kind", palette=colors, hue_order=list(colors), dodge=0.3, ax=ax, **look,
            estimator="median", errorbar=("pi", 90), log_scale=(False, column in ("members", "counts")),
        )  # fmt: skip
        ax.set(xlabel="k" if ax in axes[1] else "", ylabel=label)
    for ax in axes[0]:
        ax.yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    for ax in axes[1]:
        ax.set_ylim(0, None)
    axes[1, 1].axhline(max_length, color="black", linestyle="--")
    handles = axes[0, 0].get_legend_handles_labels()
    for ax in axes.flat:
        ax.get_legend().remove()
    figure.legend(*handles, loc="outside lower center", ncols=len(colors))
    figure.suptitle(titled("Pseudo-bulk points and single cells", simulated=simulated), x=0.01, ha="left")
    return figure
