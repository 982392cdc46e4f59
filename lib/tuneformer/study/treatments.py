"""Names of treatments: how a model is fine-tuned.

In: a name such as ``selective_freeze4_focal``. Out: the same as a typed `Treatment`, and the keys of a study that it
sets; or an error that shows the forms.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

Strategy = Literal[
    "full",
    "linear_probe",
    "selective",
    "lp_ft",
    "gradual_last_to_first",
    "gradual_first_to_last",
    "layerwise_lr_decay",
    "lora",
    "random_init",
]
Baseline = Literal["majority", "logistic_counts", "logistic_ranks", "knn_pca", "frozen_embedding_ridge"]
Loss = Literal["cross_entropy", "weighted", "balanced_softmax", "focal", "dice", "bce"]
Sampling = Literal["all", "upsampled", "balanced"]

STRATEGIES, BASELINES = get_args(Strategy), get_args(Baseline)
FORM = "<strategy>[_freeze<layers>][_batch<cells>][_<loss>][_<sampling>]"

_LOSSES = "|".join(sorted(get_args(Loss), key=len, reverse=True))
_SAMPLINGS = "|".join(get_args(Sampling))
_PATTERN = re.compile(
    rf"(?P<strategy>{'|'.join(STRATEGIES)})(_freeze(?P<freeze_layers>\d+))?(_batch(?P<batch_size>\d+))?"
    rf"(_(?P<loss>{_LOSSES}))?(_(?P<sampling>{_SAMPLINGS}))?"
)


@dataclass(frozen=True)
class Treatment:
    """What the name of a treatment says; what it does not say is None, and as the study has it."""

    strategy: Strategy | Baseline
    freeze_layers: int | None = None
    batch_size: int | None = None
    loss: Loss | None = None
    sampling: Sampling | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a study that the name sets, with their values."""
        return {key: value for key, value in vars(self).items() if key != "strategy" and value is not None}


def parse(name: str) -> Treatment:
    """Read the name of a treatment, or of a baseline, which has no parts.

    Raises
    ------
    ValueError
        The name is no baseline and does not have `FORM`, freezes layers of another strategy than selective, or asks
        for batches of no cell.
    """
    if name in BASELINES:
        return Treatment(name)
    match = _PATTERN.fullmatch(name)
    if match is None:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        msg = f"{name!r} is no strategy{hint}; the form is {FORM}, the strategies are {', '.join(STRATEGIES)}"
        raise ValueError(msg)
    said = {key: value for key, value in match.groupdict().items() if value is not None}
    for key in {"freeze_layers", "batch_size"} & set(said):
        said[key] = int(said[key])
    if "freeze_layers" in said and said["strategy"] != "selective":
        msg = f"{name!r}: only selective freezes layers; write selective{name.removeprefix(said['strategy'])}"
        raise ValueError(msg)
    if said.get("batch_size") == 0:
        msg = f"{name!r}: a batch needs at least one cell"
        raise ValueError(msg)
    return Treatment(**said)
