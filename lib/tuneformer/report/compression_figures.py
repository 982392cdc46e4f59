"""Figures of the compressed variants of a model.

In: the table that `tuneformer.evaluate.compression_table.compression_table` makes. Out: drawings, each with the table
that it was drawn from.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tuneformer.evaluate.compression_table import SPEED, front, wide
from tuneformer.finetune.compression import REFERENCE
from tuneformer.report.plotting import CONTROL, MARKERS, PALETTE, Drawing, titled

KINDS = {
    REFERENCE: "fp32",
    "bf16": "bf16",
    "int8_dynamic": "int8, weights and inputs",
    "int8_weights": "int8, weights only",
    "pruned": "pruned weights",
    "heads": "removed heads",
    "neurons": "removed neurons",
    "layers": "dropped layers",
    "onnx": "ONNX",
    "onnx_int8": "ONNX, int8",
}
COLORS = (CONTROL, *PALETTE[:8], PALETTE[7])
SPAN = 0.1  # smallest range of macro-F1 that is shown, so that tiny differences look tiny
AXES = {"file_bytes": "Size on disk (MB)", f"{SPEED}1": f"Times as fast as {REFERENCE}, one thread"}


def pareto(table: pd.DataFrame, *, simulated: bool) -> Drawing:
    """Draw size and speed of each variant against its macro-F1; a line joins those that no other beats.

    The bar of a variant is the 95 % interval of its difference to fp32, put at its macro-F1.

    Parameters
    ----------
    table
        From `tuneformer.evaluate.compression_table.compression_table`.
    simulated
        Whether the title has to say that the cells are simulated.

    Returns
    -------
    The figure and its table: variant, kind, file_bytes, speed:1, macro_f1, low, high, size_front,
    speed_front.
    """
    data = _data(table)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    for ax, (metric, label), on_front in zip(axes, AXES.items(), ("size_front", "speed_front"), strict=True):
        _panel(ax, data, metric, on_front)
        ax.set(xlabel=label)
    middle, half = (data["low"].min() + data["high"].max()) / 2, (data["high"].max() - data["low"].min()) * 0.55
    axes[0].set(ylabel="Macro-F1", ylim=(middle - max(half, SPAN / 2), middle + max(half, SPAN / 2)))
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="Variant")
    for handle in legend.legend_handles:
        handle.set_sizes([110])
    figure.suptitle(titled("Compressed variants of one model", simulated=simulated), x=0.01, ha="left")
    key = "Bars: 95 % interval of the difference to fp32. Larger symbols: more removed. Dotted: none is better in both."
    figure.supxlabel(key, x=0.01, ha="left", fontsize=10)
    return Drawing(figure, data)


def _data(table: pd.DataFrame) -> pd.DataFrame:
    data = wide(table)[[*AXES, "macro_f1"]].rename_axis(columns=None).reset_index()
    name = data["variant"]
    data.insert(1, "kind", [variant if variant in KINDS else variant.split("_")[0] for variant in name])
    change = table[table["metric"] == "macro_f1_difference"].set_index("variant").loc[name]
    moved = (data["macro_f1"].to_numpy() - change["value"]).to_numpy()  # the macro-F1 of fp32
    data["low"], data["high"] = moved + change["low"].to_numpy(), moved + change["high"].to_numpy()
    data["size_front"] = name.isin(front(table, "file_bytes", smaller=True))
    data["speed_front"] = name.isin(front(table, f"{SPEED}1", smaller=False))
    return data


def _panel(ax: Axes, data: pd.DataFrame, metric: str, on_front: str) -> None:
    unit = 1e6 if metric == "file_bytes" else 1
    best = data[data[on_front]].sort_values(metric)
    ax.plot(best[metric] / unit, best["macro_f1"], ":", color=CONTROL, linewidth=1.5, zorder=1)
    for (kind, label), color, marker in zip(KINDS.items(), COLORS, MARKERS + "*", strict=True):
        part = data[data["kind"] == kind]
        if part.empty:
            continue
        places = part[metric].to_numpy() / unit
        errors = (part[["macro_f1", "high"]].to_numpy() - part[["low", "macro_f1"]].to_numpy()).T
        ax.errorbar(places, part["macro_f1"].to_numpy(), yerr=errors, fmt="none", ecolor=color, elinewidth=1.2)
        sizes = 65 * np.arange(1, len(part) + 1) if len(part) > 1 else 110  # the more was removed, the larger
        look = {"color": color, "edgecolor": "white", "linewidth": 0.7, "zorder": 3}
        ax.scatter(places, part["macro_f1"], s=sizes, marker=marker, label=label, **look)
    ax.set_xlim(0, None)
