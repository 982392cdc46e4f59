"""Figures of synthetic cells beside real ones.

In: held-out real cells, and sets of made cells. Out: a figure with a column of panels for each set, and the numbers it
was drawn from.
"""

from collections.abc import Mapping

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import sparse

from tuneformer.report.plotting import CONTROL, PALETTE, Drawing, titled
from tuneformer.trainsets import realism

DRAWN_CELLS = 500  # of each set
DRAWN_GENES = 1000  # evenly along the mean count in the real cells
BINS = 20
PANELS = {  # name: label of x, label of y
    "variance": ("Mean count of a gene", "Variance"),
    "zeros": ("Mean count of a gene", "Share of cells without it"),
    "library size": ("Total count of a cell", "Share of the cells"),
    "detected genes": ("Genes with a count", "Share of the cells"),
    "components": ("First component", "Second component"),
}


def realism_panels(real: ad.AnnData, made: Mapping[str, ad.AnnData], *, seed: int, simulated: bool) -> Drawing:
    """Draw made cells over real ones: a column of five panels for each set of made cells.

    The panels: variance of each gene, and share of the cells without a count of it, against its mean count (dashed:
    Poisson counts; on a logarithmic axis a gene without counts is left out); total counts and detected genes of the
    cells; and the first two principal components of the real cells, normalised as in
    `tuneformer.trainsets.realism.compare`.

    Parameters
    ----------
    real
        Held-out real cells.
    made
        Name to made cells.
    seed
        Seed of the draw of at most `DRAWN_CELLS` cells of each set.
    simulated
        Whether the title has to say that the real cells are simulated too.

    Returns
    -------
    The figure and its table: made (name of the set), cells ("real" or "made"), panel, x, y. In the panels of total
    counts and detected genes x is the value of a cell and y is missing.
    """
    rng = np.random.default_rng([seed, 3])
    number = min(DRAWN_CELLS, real.n_obs, *(cells.n_obs for cells in made.values()))
    real_counts = realism.drawn_counts(real, number, rng)
    by_mean = np.argsort(realism.gene_moments(real_counts)["mean"].to_numpy(), kind="stable")
    genes = by_mean[:: -(-len(by_mean) // DRAWN_GENES)]
    tables = []
    for name, cells in made.items():
        pair = [real_counts, realism.drawn_counts(cells, number, rng)]
        places = realism.embeddings(*realism.normalised(*pair))
        tables += [
            _points(counts, place, genes).assign(made=name, cells=kind)
            for kind, counts, place in zip(("real", "made"), pair, places, strict=True)
        ]
    data = pd.concat(tables, ignore_index=True)[["made", "cells", "panel", "x", "y"]]
    figure, axes = plt.subplots(
        len(PANELS), len(made), figsize=(1.2 + 2.7 * len(made), 13), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (panel, (x_label, y_label)) in zip(axes, PANELS.items(), strict=True):
        points = data[data["panel"] == panel]
        for ax, name, color in zip(row, made, PALETTE * len(made), strict=False):
            _draw_panel(ax, panel, points[points["made"] == name], points["x"], color)
            ax.set(xlabel=x_label, title=name if panel == "variance" else "")
        row[0].set_ylabel(y_label)
    title = titled("Made cells, in colour, on held-out real cells, in grey", simulated=simulated)
    figure.suptitle(title, x=0.01, ha="left")
    return Drawing(figure, data)


def _points(counts: sparse.csr_array, place: np.ndarray, genes: np.ndarray) -> pd.DataFrame:
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


def _draw_panel(ax: Axes, panel: str, points: pd.DataFrame, shared_x: pd.Series, color: str) -> None:
    """Draw real and made cells; `shared_x` holds the x of all panels in the row, for common bins."""
    sets = [points[points["cells"] == kind] for kind in ("real", "made")]
    looks = [{"color": CONTROL, "alpha": 0.5}, {"color": color, "alpha": 0.5}]
    if panel in ("library size", "detected genes"):
        space = np.geomspace if panel == "library size" else np.linspace
        edges = space(shared_x.min(), shared_x.max(), BINS + 1)
        for part, look in zip(sets, looks, strict=True):
            ax.hist(part["x"], bins=edges, weights=np.full(len(part), 1 / len(part)), edgecolor="none", **look)
        if panel == "library size":
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter("{x:,.0f}")
        return
    for part, look in zip(sets, looks, strict=True):
        shown = part[(part["x"] > 0) & (part["y"] > 0)] if panel == "variance" else part
        ax.scatter(shown["x"], shown["y"], s=7, linewidths=0, **look)
    if panel == "components":
        return
    means = np.geomspace(shared_x[shared_x > 0].min(), shared_x.max(), 100)
    ax.plot(means, means if panel == "variance" else np.exp(-means), color="black", linestyle="--", linewidth=1)
    ax.set(xscale="log", yscale="log" if panel == "variance" else "linear")
