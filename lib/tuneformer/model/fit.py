"""A fine-tuning run on cells: from settings and tokens to an `Outcome`. Nothing is written.

In: the settings of a run, and the tokens of exactly its cells. Out: log, cost, predictions of the test cells, and the
model. How a model is trained, whatever it is trained on, is in `tuneformer.model.trainer`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import transformers
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import Sampler, WeightedRandomSampler

from tuneformer.artifacts import UserError
from tuneformer.model import classifier, hardware, losses, strategies
from tuneformer.model.classifier import Batch, Cells
from tuneformer.model.frozen import Frozen
from tuneformer.model.trainer import Training, TrainingFailed, train
from tuneformer.tokens.encode import column, places

if TYPE_CHECKING:
    from tuneformer.study import Study
    from tuneformer.tokens.encode import Tokens

SPLITS = ("train", "validation", "test")
PROBABILITY = "probability:"
SORTED = 50  # batches whose cells are sorted by length at a time
NO_SCORES = dict.fromkeys(["validation_loss", "validation_accuracy", "validation_macro_f1"], np.nan)
FEWEST_CHOOSING = 200  # validation cells; with five, most epochs tie, and what is chosen is chance


@dataclass(kw_only=True)
class Outcome(Training):
    """What a run on cells left: a `Training`, and the test cells as the kept weights predict them.

    ``predictions``: one row per test cell (cell, label, group if the tokens have one, predicted,
    ``probability:<class>``), and ``model``: the model with the kept weights, adapters of ``lora`` merged. A run that
    failed has neither, a baseline no model.
    """

    classes: list[str]
    n_train: int
    n_validation: int
    n_test: int
    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    model: classifier.CellClassifier | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each class, (test cells, classes)."""
        return self.predictions[[PROBABILITY + name for name in self.classes]].to_numpy(float)


def fit_cells(settings: "Study", tokens: "Tokens", frozen: Path | None = None) -> Outcome:
    """Fine-tune a classifier by the strategy of a run, and predict its test cells once.

    The recipe of the studies, in batches of cells of similar length. After each epoch the validation cells are
    predicted; the test cells are predicted once, at the end, with the weights of the last epoch or, by ``epoch_rule``,
    of the epoch with the lowest validation loss (of several the last). On a CPU a run gives the same numbers each time;
    strategies with the same seed see the same cells in the same order, and start from the same head.

    `tokens` are exactly the cells of the run; `frozen` is the folder of what frozen layers make of the cells of the
    task (`tuneformer.model.frozen`), which all runs share; None computes it in each step. A run that diverges or lacks
    memory returns, with a status that says so.

    Raises
    ------
    UserError
        A class lacks cells in a part, or the checkpoint, the device or the strategy cannot be used.
    """
    rows, classes = rows_of_splits(settings, tokens), list(tokens.classes)
    labels = places(column(tokens.dataset, "label"), classes)
    outcome = Outcome(classes=classes, **{f"n_{split}": len(at) for split, at in rows.items()})
    if settings.sampling == "upsampled":  # here, after every split: a copy of a training cell is a training cell
        rows["train"] = upsampled(rows["train"], labels[rows["train"]], np.random.default_rng([settings.seed, 6]))
    pad = tokens.vocabulary.specials["<pad>"]
    packed = settings.attention == "auto"
    cells = {name: Cells(tokens.dataset, pad, rows=at, labels=labels[at], packed=packed) for name, at in rows.items()}
    counts = np.bincount(cells["train"].labels, minlength=len(classes))
    is_balanced = settings.sampling == "balanced"  # then every class is seen equally often
    n_cells = counts.max() * len(classes) if settings.steps_of == "upsampled" else tokens.step_cells or counts.sum()
    counts = np.ones_like(counts) if is_balanced else counts
    criterion = losses.make_loss(settings, counts)
    bf16 = hardware.uses_bf16(hardware.prepare(settings), settings.precision)
    transformers.set_seed(settings.seed)
    model = classifier.build(settings, tokens.vocabulary, classes)
    model.config.trained_in_bf16 = bf16
    losses.start_at_base_rate(model.classifier.bias, settings, counts)
    plan = strategies.prepare(settings, model)
    steps = optimizer_steps(settings, int(n_cells))
    every = steps // settings.epochs

    below = Frozen(frozen, settings.frozen_cache_gb * 1e9, bf16=bf16)

    def forward(split: str, batch: Batch) -> torch.Tensor:
        return model(**below.inputs(model, cells[split], batch)).logits

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        labels = batch.pop("labels")
        return criterion(forward("train", batch), labels)

    def predicted(split: str) -> np.ndarray:
        logits = classifier.predict(model, cells[split], bf16=bf16, forward=functools.partial(forward, split))
        logits = torch.from_numpy(logits)
        if not torch.isfinite(logits).all():
            msg = "the model predicts values that are not finite; set a smaller learning_rate, or precision: fp32."
            raise TrainingFailed(msg)
        return losses.probabilities(logits, settings.loss).numpy()

    def validate() -> dict[str, float]:
        labels = cells["validation"].labels
        return validation_scores(labels, predicted("validation")) if len(labels) else NO_SCORES

    with outcome.keeping_failures(settings.describe()):
        train(
            settings,
            model,
            cells["train"],
            outcome,
            plan=plan,
            loss=loss,
            validate=validate,
            steps=steps,
            validate_at=range(every, steps + 1, every),
            lowest="validation_loss" if chosen_by_validation(settings, outcome.n_validation) else None,
            sampler=order_of(settings, cells["train"]),
            who=settings.describe(),
        )
        strategies.merge_adapters(model)  # the test cells are predicted by the model as it is kept
        if plan.adapters:
            model.requires_grad_(True)  # what was frozen has changed by merging
        tested = tokens.dataset.select(rows["test"]).remove_columns("input_ids").to_pandas()
        outcome.predictions = predictions_table(tested, classes, predicted("test"))
        outcome.model = model.cpu()
    return outcome


def chosen_by_validation(settings: "Study", n_validation: int) -> bool:
    """Return whether validation cells choose the epoch: where the study asks for it, and there are enough of them."""
    return settings.epoch_rule == "validation_loss" and n_validation >= FEWEST_CHOOSING


def rows_of_splits(settings: "Study", tokens: "Tokens") -> dict[str, np.ndarray]:
    """Return the rows of train, validation and test; UserError if a class has no cells in one of them."""
    counts = cells_table(tokens)
    if settings.fold is not None and settings.group_by is not None:  # a test group need not have every class
        counts = counts.drop(columns="test")
    if settings.validation_share == 0:
        counts = counts.drop(columns="validation")
    empty = counts.stack()[lambda n: n == 0]
    if len(empty):
        label, split = empty.index[0]
        msg = f"Class {label!r} has no {split} cells; give it more cells, or leave it out of classes."
        raise UserError(msg)
    split = places(column(tokens.dataset, "split"), SPLITS)
    return {name: np.flatnonzero(split == number) for number, name in enumerate(SPLITS)}


def cells_table(tokens: "Tokens") -> pd.DataFrame:
    """Count the cells of a run by class (rows, and "all") and part (columns train, validation, test)."""
    known = {"label": tokens.classes, "split": SPLITS}
    label, split = (places(column(tokens.dataset, name), values) for name, values in known.items())
    counts = np.zeros((len(tokens.classes), len(SPLITS)), dtype=int)
    np.add.at(counts, (label, split), 1)
    counts = pd.DataFrame(counts, index=list(tokens.classes), columns=list(SPLITS))
    counts.loc["all"] = counts.sum()
    return counts


def predictions_table(cells: pd.DataFrame, classes: list[str], probabilities: np.ndarray) -> pd.DataFrame:
    """Return the probabilities of test cells, (cells, classes), beside their cell, label and group, as in `Outcome`."""
    table = cells[[name for name in ("cell", "label", "group") if name in cells]].reset_index(drop=True)
    table["predicted"] = np.asarray(classes, dtype=object)[probabilities.argmax(axis=1)]
    return table.assign(**{PROBABILITY + name: probabilities[:, place] for place, name in enumerate(classes)})


def validation_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return validation_loss (nats per cell), validation_accuracy and validation_macro_f1 (of the classes present)."""
    predicted = probabilities.argmax(axis=1)
    likelihood = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(float).tiny)
    return {
        "validation_loss": float(-np.log(likelihood).mean()),
        "validation_accuracy": float((predicted == labels).mean()),
        "validation_macro_f1": float(f1_score(labels, predicted, labels=np.unique(labels), average="macro")),
    }


def optimizer_steps(settings: "Study", n_cells: int) -> int:
    """Return the optimizer steps of ``epochs`` passes over so many cells in batches of ``batch_size``.

    No run takes fewer than ``min_steps``, and with ``steps_of`` the cells are those of another train set: an "epoch" of
    the log is then the same share of the steps, not a pass over the cells.
    """
    steps = -(-n_cells // settings.batch_size) * settings.epochs
    return max(steps, -(-settings.min_steps // settings.epochs) * settings.epochs)


def upsampled(rows: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return `rows`, and after them rows of the rarer classes, drawn with replacement until all classes are equal."""
    classes, counts = np.unique(labels, return_counts=True)
    missing = counts.max() - counts
    drawn = [rng.choice(rows[labels == name], n, replace=True) for name, n in zip(classes, missing, strict=True)]
    return np.concatenate([rows, *drawn])


def order_of(settings: "Study", cells: Cells) -> Sampler[int]:
    """Return the order of the training cells, by a generator that nothing else uses: the same for every strategy.

    ``balanced`` draws a class, each equally likely, and then one of its cells; else each cell comes once in a pass, in
    batches of similar length.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.sampling == "balanced":
        weights = 1 / np.bincount(cells.labels)[cells.labels]
        return WeightedRandomSampler(weights, len(cells), generator=generator)
    return ByLength(cells.lengths, settings.batch_size, generator)


class ByLength(Sampler[int]):
    """Each cell once in a pass, in random batches of similar length; the longest cell first, so that memory shows.

    As `LengthGroupedSampler` of transformers has it (50 batches at a time are sorted), but without lists of all cells.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, generator: torch.Generator) -> None:
        self.lengths, self.batch_size, self.generator = lengths, batch_size, generator

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Give the places of the cells; the next pass has another order."""
        order = torch.randperm(len(self), generator=self.generator).numpy().astype(np.int32)
        size = self.batch_size * min(SORTED, max(1, len(self) // (self.batch_size * 4)))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            order[start : start + size] = part[np.argsort(-self.lengths[part], kind="stable")]
        longest = int(self.lengths[order[::size]].argmax()) * size  # a part begins with its longest cell
        order[[0, longest]] = order[[longest, 0]]
        for start in range(0, len(order), size):
            yield from order[start : start + size].tolist()
