"""Names of train sets: what a model is trained on.

In: a name such as ``pseudobulk_k10_sum_thinned``. Out: the same as a typed `TrainSet`; or an error that shows the
forms.
"""

import re
from dataclasses import dataclass
from typing import Literal

AGGREGATIONS = ("sum", "mean", "approx_mean")
GENERATORS = ("gaussian", "gaussian_full", "nb", "nb_copula")
FORMS = (
    "single_cell",
    "single_cell_n<cells per class>",
    "single_cell_k<k>",
    "single_cell_k<k>_steps",
    "pseudobulk_k<k>_<sum|mean|approx_mean>[_<thinned|capped|boosted|steps>]",
    "synthetic_<gaussian|gaussian_full|nb|nb_copula>[_<untreated|bulk>]",
    "mixture_<generator|copies>_<pad<n>|share<percent>>",
    "bulk",
)

_AGGREGATION = "|".join(AGGREGATIONS)
_GENERATOR = "|".join(sorted(GENERATORS, key=len, reverse=True))
_PATTERNS = (
    r"(?P<kind>single_cell)",
    r"(?P<kind>single_cell)_(?P<amount>n)(?P<number>\d+)",
    r"(?P<kind>single_cell)_k(?P<k>\d+)(?P<control>_steps)?",
    rf"(?P<kind>pseudobulk)_k(?P<k>\d+)_(?P<aggregation>{_AGGREGATION})(?P<control>_(thinned|capped|boosted|steps))?",
    rf"(?P<kind>synthetic)_(?P<generator>{_GENERATOR})(?P<control>_(untreated|bulk))?",
    rf"(?P<kind>mixture)_(?P<generator>{_GENERATOR}|copies)_(?P<amount>pad|share)(?P<number>\d+)",
    r"(?P<kind>bulk)",
)


@dataclass(frozen=True)
class TrainSet:
    """What the name of a train set says.

    ``kind``: single_cell, pseudobulk, synthetic, mixture or bulk (the samples of a bulk table). ``k``: mean number of
    cells in a group. ``aggregation``: how a group becomes a point. ``generator``: of synthetic cells, or copies (of
    real ones). ``control``: points (one cell of each group), steps (the optimizer steps of the other side), thinned,
    capped, boosted, untreated (only untreated cells say how cells vary), bulk (so do they, and bulk samples give the
    means). ``amount`` and ``number``: n, most cells of each class; pad, cells added to each padded class; share,
    percent of the cells that are synthetic.
    """

    kind: Literal["single_cell", "pseudobulk", "synthetic", "mixture", "bulk"]
    k: int | None = None
    aggregation: str | None = None
    generator: str | None = None
    control: str | None = None
    amount: str | None = None
    number: int | None = None

    @property
    def is_bulk(self) -> bool:
        """Whether it is made of the samples of ``bulk_counts``."""
        return "bulk" in (self.kind, self.control)


def parse(name: str) -> TrainSet:
    """Read the name of a train set.

    Raises
    ------
    ValueError
        The name has none of `FORMS`, a group has fewer than 2 cells, or a share or padding is out of its bounds.
    """
    match = next(filter(None, (re.fullmatch(pattern, name) for pattern in _PATTERNS)), None)
    if match is None:
        msg = f"{name!r} is no train set; the forms are {', '.join(FORMS)}"
        raise ValueError(msg)
    said = {key: value for key, value in match.groupdict().items() if value is not None}
    for key in {"k", "number"} & set(said):
        said[key] = int(said[key])
    if "control" in said:
        said["control"] = said["control"].removeprefix("_")
    elif said["kind"] == "single_cell" and "k" in said:
        said["control"] = "points"
    if said.get("k", 2) < 2:
        msg = f"{name!r}: k is the number of cells in a group and must be 2 or more"
        raise ValueError(msg)
    highest = 99 if said.get("amount") == "share" else None
    if said.get("number", 1) < 1 or (highest and said["number"] > highest):
        msg = f"{name!r}: a share is a whole percentage from 1 to 99, any other number of cells at least 1"
        raise ValueError(msg)
    if said.get("generator") == "copies" and said["amount"] == "share":
        msg = f"{name!r}: copies can pad (mixture_copies_pad<n>), but replacing cells by copies of others is no mixture"
        raise ValueError(msg)
    if said.get("control") == "thinned" and said["aggregation"] != "sum":
        msg = f"{name!r}: only sums are counts that can be thinned; write pseudobulk_k{said['k']}_sum_thinned"
        raise ValueError(msg)
    return TrainSet(**said)
