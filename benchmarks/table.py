"""The text of ``benchmarks/README.md``. In: what ``results.json`` holds. Out: Markdown; nothing is measured here."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tuneformer.report.tables import markdown

STAGES = {"qc": "quality control", "tokenize": "tokens", "pseudobulk": "pseudo-bulk", "synthetic": "synthetic cells"}
INTRODUCTION = """# What the stages cost

Written by `make bench` from `results.json` beside it; do not edit.

Measured on {date}: {cpu}, {cores} cores, load average {load_average} at the start. Where that is not near 0, other
programs took part of the machine: seconds are then too long, and ratios are a better guide.
Cells: {cells}, drawn with replacement.
A copy in memory moves {gigabytes:.1f} GB/s; a matrix product does {fp32:.0f} GFLOP/s in fp32 and {bf16:.0f} in bf16
(threads: {threads}).

Every measurement is a process of its own, so that its peak memory is its own, and begins after the imports. Ours and
the plain way take turns; seconds are the median, with the smallest and the largest in brackets, and *times faster* is
taken turn by turn. The plain way is in `plain.py`: everything in memory, and a Python loop over cells, groups or
classes. It is left out at sizes where it would take more than a minute. The *floor* is the time in which the counts
could be read once and the result be written once at the speed of a copy in memory.
"""


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """Return a median with its range; a single measurement has none."""
    low, middle, high = (f"{found[name]:.{digits}f}" for name in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"


def stages(rows: list[dict[str, Any]]) -> str:
    """Return the table of the stages."""
    shown = [
        {
            "Stage": STAGES[row["stage"]],
            "Cells": f"{row['n_cells']:,}",
            "Ours, s": spread(row["ours"]["seconds"]),
            "Cells/s": f"{row['n_cells'] / row['ours']['seconds']['median']:,.0f}",
            "MB": f"{row['ours']['peak_memory_mb']:,.0f}",
            "Plain, s": spread(row["plain"]["seconds"]) if "plain" in row else "–",
            "Plain, MB": f"{row['plain']['peak_memory_mb']:,.0f}" if "plain" in row else "–",
            "Times faster": spread(row["times_faster"], 1) if "plain" in row else "–",
            "Share of the floor": f"{row['share_of_floor']:.1%}",
        }
        for row in rows
    ]
    return markdown(pd.DataFrame(shown))


def startup(rows: list[dict[str, Any]]) -> str:
    """Return the table of what is waited for."""
    wanted = [f"{row['wanted_seconds']:g}" if row["wanted_seconds"] else "–" for row in rows]
    seconds = [spread(row["seconds"]) for row in rows]
    return markdown(pd.DataFrame({"Start-up": [row["what"] for row in rows], "s": seconds, "Wanted, at most": wanted}))


def flat(found: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested values as one level, with names such as ``probe: seconds``."""
    values: dict[str, str] = {}
    for name, value in found.items():
        shown = above + name.replace("_", " ")
        values |= flat(value, f"{shown}: ") if isinstance(value, Mapping) else {shown: plain_number(value)}
    return values


def plain_number(value: Any) -> str:
    """Return a value as a reader wants it: four digits are enough."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def readme(results: Mapping[str, Any]) -> str:
    """Return the whole text."""
    measured = dict(results["measured"])
    measured["gigabytes"] = measured["bytes_per_second"] / 1e9
    measured |= {kind: measured[f"flops_{kind}"] / 1e9 for kind in ("fp32", "bf16")}
    parts = [INTRODUCTION.format(**measured), stages(results["stages"]), startup(results["startup"])]
    if "large" in results:
        rows = pd.DataFrame([flat(row) for row in results["large"]]).fillna("–")
        parts += ["Growth with the number of cells (`large.py`):", markdown(rows)]
    if "training" in results:
        rows = pd.Series(flat(results["training"])).rename_axis("Training").reset_index(name="")
        parts += ["Training, V1-10M shapes, ours and the plain recipe in one run (`training.py`):", markdown(rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"
