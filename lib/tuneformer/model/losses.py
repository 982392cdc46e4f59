"""What a classifier is trained on: losses for classes of unequal size.

In: logits of cells or tokens (batch, classes), labels (batch,) and, for some, how often each class is trained on. Out:
one number to minimise, in nats where the loss is a likelihood. A label of -100 is ignored: it enters no sum and no
mean, and a batch of nothing else has loss 0 and gradient 0. Means over cells divide by their number, not by the sum of
their weights: then the mean over parts of a batch, or over batches, estimates the loss of all training cells.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tuneformer.artifacts import UserError

if TYPE_CHECKING:
    from tuneformer.study import Study

IGNORED = -100
Loss = Callable[[Tensor, Tensor], Tensor]


def probabilities(logits: Tensor, loss: str) -> Tensor:
    """Turn logits (batch, classes) into probabilities, in the way that the loss of that name was trained for.

    The softmax; for ``bce`` the sigmoids divided by their sum. After ``balanced_softmax`` or ``weighted`` they are
    those of a population where all classes are equally frequent.
    """
    scores = functional.logsigmoid(logits) if loss == "bce" else logits  # softmax of log s is s / sum s, never 0 / 0
    return torch.softmax(scores, dim=-1)


def class_weights(train_counts: np.ndarray | Tensor) -> Tensor:
    """Weigh classes by their inverse frequency: n / (K n_c) for n_c of n cells and K classes, float64.

    The mean over the training cells is 1, and each class has the same sum: scikit-learn's ``balanced``, from King and
    Zeng 2001 (Political Analysis 9:137). UserError if a class has no training cell.
    """
    counts = torch.as_tensor(train_counts).to(torch.float64)
    if not (counts > 0).all():
        number = int((counts <= 0).nonzero()[0])
        msg = (
            f"Class number {number} of {len(counts)} has no training cell, so it has no weight; give it one, leave it "
            "out of classes, or set loss: cross_entropy."
        )
        raise UserError(msg)
    return counts.sum() / (len(counts) * counts)


def cross_entropy(logits: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the mean of -w_y log p_y over the cells, p the softmax; `weights` (classes,) are 1 if None."""
    logits, labels = _labelled(logits, labels)
    weights = None if weights is None else weights.to(logits)
    return functional.cross_entropy(logits, labels, weight=weights, reduction="sum") / max(len(labels), 1)


def balanced_softmax(logits: Tensor, labels: Tensor, *, log_prior: Tensor) -> Tensor:
    """Return the cross entropy of the logits plus `log_prior`, which training sees and prediction does not.

    `log_prior`: log frequency of each class among the training cells, up to a constant, (classes,).
    Source: Ren et al. 2020 (arXiv:2007.10740), equation 3.
    """
    return cross_entropy(logits + log_prior.to(logits), labels)


def focal(logits: Tensor, labels: Tensor, *, gamma: float, alpha: Tensor | None = None) -> Tensor:
    """Return the mean of -alpha_y (1 - p_y)^gamma log p_y over the cells: easy cells count less.

    `gamma`: focusing, 0 or more; 0 is the cross entropy. `alpha`: weight of each class, (classes,); 1 if None.
    Source: Lin et al. 2017 (arXiv:1708.02002), equation 5, with a softmax and an alpha per class.
    """
    logits, labels = _labelled(logits, labels)
    log_p = torch.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    doubt = -torch.expm1(log_p)  # 1 - p, without cancellation
    doubt = doubt.clamp(min=torch.finfo(logits.dtype).tiny)  # the slope of 0^gamma is infinite for gamma < 1
    losses = -(doubt**gamma) * log_p
    if alpha is not None:
        losses = alpha.to(logits)[labels] * losses
    return losses.sum() / max(len(labels), 1)


def soft_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - the mean over the classes of 2 sum(p g) / (sum(p^2) + sum(g^2)), sums over the cells of the batch.

    p is the softmax, g is 1 for cells of the class and else 0. Classes without a cell in the batch are left out of the
    mean: their overlap is 0 whatever is predicted. The loss depends on the batch as a whole, and is no mean over cells.

    Source: Milletari et al. 2016 (arXiv:1606.04797), section 3, for one class against background.
    """
    logits, labels = _labelled(logits, labels)
    p = torch.softmax(logits, dim=1)
    g = functional.one_hot(labels, logits.shape[1]).to(p)
    present = g.any(dim=0)
    overlap = 2 * (p * g).sum(dim=0) / ((p**2).sum(dim=0) + (g**2).sum(dim=0)).where(present, 1)
    return (1 - overlap)[present].sum() / max(int(present.sum()), 1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over cells of the sum over classes: -log s for the true class, -log(1 - s) else, s the sigmoid.

    The slope in a logit is s - g for a cell (g is 1 for its class, else 0), as that of the cross entropy is p - g. The
    mean over classes, torch's default, divides it by their number: AdamW undoes that, clipping to a norm does not.
    """
    logits, labels = _labelled(logits, labels)
    target = functional.one_hot(labels, logits.shape[1]).to(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return losses / max(len(labels), 1)


LOSSES: dict[str, Callable[["Study", np.ndarray | Tensor], Loss]] = {
    "cross_entropy": lambda settings, counts: cross_entropy,
    "weighted": lambda settings, counts: partial(cross_entropy, weights=class_weights(counts)),
    "balanced_softmax": lambda settings, counts: partial(
        balanced_softmax, log_prior=class_weights(counts).reciprocal().log()
    ),
    "focal": lambda settings, counts: partial(
        focal, gamma=settings.focal_gamma, alpha=class_weights(counts) if settings.focal_alpha == "balanced" else None
    ),
    "dice": lambda settings, counts: soft_dice,
    "bce": lambda settings, counts: binary_cross_entropy,
}
"""Name to function: from the settings and the training cells of each class to the loss."""


def make_loss(settings: "Study", train_counts: np.ndarray | Tensor) -> Loss:
    """Return the loss that a run trains on: a function of logits (batch, classes) and labels (batch,).

    `train_counts`: training cells (or tokens) of each class, (classes,), after upsampling. UserError if a class has
    none and the loss weighs classes by their number.
    """
    return LOSSES[settings.loss](settings, train_counts)


@torch.no_grad()
def start_at_base_rate(bias: Tensor, settings: "Study", train_counts: np.ndarray | Tensor) -> None:
    """Set the bias of a new head, (classes,), for ``bce`` to the log-odds of each class; other losses keep it.

    At bias 0 every sigmoid says 0.5, and most of a short training goes into learning that a class is rare (Lin et al.
    2017, arXiv:1708.02002, section 3.3). The softmax needs none of it: equal logits say 1 / K. A class without cells
    counts as half a cell.
    """
    if settings.loss == "bce":
        counts = torch.as_tensor(train_counts).to(torch.float64).clamp(min=0.5)
        bias.copy_(torch.logit(counts / counts.sum()))


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Drop what is ignored."""
    kept = labels != IGNORED
    return logits[kept], labels[kept]
