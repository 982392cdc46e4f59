"""Training: one set-up of the Trainer of transformers for cells, genes and masked tokens, and a run on cells.

In: settings, a model with its plan, and batches. Out: the model with its best weights, the log of each epoch, and the
cost; for cells an `Outcome` with the predictions of the test cells. Nothing is written.
"""

import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import transformers
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import Dataset, Sampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tuneformer.artifacts import UserError
from tuneformer.model import classifier, hardware, losses, strategies
from tuneformer.model.classifier import Batch, Cells

if TYPE_CHECKING:
    from tuneformer.study import Study
    from tuneformer.tokens.encode import Tokens

SPLITS = ("train", "validation", "test")
PROBABILITY = "probability:"


class TrainingFailed(RuntimeError):
    """A training that cannot go on, because a loss or a prediction is not finite."""


@dataclass(kw_only=True)
class Training:
    """What a training left; after a failure, what it left until then.

    ``status``: ``ok``, ``failed`` or ``out-of-memory``, with the ``reason`` if it is not ``ok``. ``history``: one row
    per epoch (epoch, train_loss, the scores of the validation, seconds). ``best_epoch``: the one whose weights were
    kept. ``cost``: ``wall_seconds`` and ``cpu_seconds`` (training and validation), ``cells_per_second``,
    ``optimizer_steps``, ``training_cells``, ``trainable_parameters`` (that learnt at any time), ``total_parameters``,
    ``flops`` (estimate, `strategies.training_flops`), ``device``, ``peak_memory_mb`` (of the process) and, on a GPU,
    ``peak_gpu_memory_mb``.
    """

    status: str = "ok"
    reason: str = ""
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    best_epoch: int | None = None
    cost: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def keeping_failures(self, who: str) -> Iterator[None]:
        """Keep a divergence or a lack of memory as ``status`` and ``reason``, and say it; other errors are raised."""
        try:
            yield
        except Exception as error:
            if isinstance(error, TrainingFailed):
                self.status, self.reason = "failed", str(error)
            elif hardware.is_out_of_memory(error):
                self.status, self.reason = "out-of-memory", "memory ran out; set a smaller batch_size or max_length."
            else:
                raise
            print(f"{who}: {self.status}: {self.reason}", file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class Outcome(Training):
    """What a run on cells left: a `Training`, and the test cells as the best epoch predicts them.

    ``predictions``: one row per test cell (cell, label, group if the tokens have one, predicted,
    ``probability:<class>``), and ``model``: the model with the best weights, adapters of ``lora`` merged. A run that
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


@dataclass(eq=False)
class PlanCallback(TrainerCallback):
    """Lets the groups of a plan learn in each step; after an epoch it validates, logs and keeps the best weights."""

    plan: strategies.Plan
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    validate: Callable[[], dict[str, float]]
    validate_at: Collection[int]
    best: str | None
    early_stop: int | None
    bf16: bool
    who: str
    learning: frozenset[str] | None = None
    step: str = ""
    passed: Counter[tuple[str, frozenset[str]]] = field(
        default_factory=Counter
    )  # what passed while which groups learnt
    epoch_loss: float = 0.0
    epoch_cells: int = 0
    epoch_start: float = 0.0
    best_epoch: int | None = None
    best_score: float = -np.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of the first epoch."""
        self.epoch_start = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Freeze and thaw what the plan says."""
        learning = self.plan.learning(state.global_step, state.max_steps)
        if learning != self.learning:
            strategies.set_learning(model, self.plan, learning)
            self.learning = learning
        self.step = f"step {state.global_step + 1} of {state.max_steps}"

    def loss_of(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch; refuse one that is not finite, which the Trainer would pass over."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(model, batch)
        if not torch.isfinite(loss):
            msg = f"the loss became {loss.item()} in {self.step}; set a smaller learning_rate, or precision: fp32."
            raise TrainingFailed(msg)
        n_cells, length = ids.shape
        for what, number in {"cells": 1, "tokens": length, "pairs": length**2}.items():
            self.passed[what, self.learning] += n_cells * number
        self.epoch_cells += n_cells
        self.epoch_loss += loss.item() * n_cells
        return loss

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """After the last step of an epoch, validate."""
        if state.global_step not in self.validate_at:
            return
        epoch = len(_epochs(state)) + 1
        row = {"epoch": epoch, "train_loss": self.epoch_loss / self.epoch_cells, **self.validate()}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name != "epoch")
        if self.best and row[self.best] > self.best_score:
            self.best_score, self.best_epoch = row[self.best], epoch
            learnt = strategies.learning_parameters(model, self.plan)
            self.best_weights = {name: weight.detach().clone() for name, weight in learnt.items()}
        if self.best and self.early_stop is not None and epoch - self.best_epoch >= self.early_stop:
            control.should_training_stop = True
        row["seconds"] = time.perf_counter() - self.epoch_start
        state.log_history.append(row)  # the Trainer keeps it with its state, so that it survives an interruption
        best = f" (best epoch {self.best_epoch})" if self.best else ""
        line = f"{self.who} epoch {epoch}/{len(self.validate_at)}: {shown}{best}, {row['seconds']:.1f} s"
        print(line, file=sys.stderr, flush=True)
        self.epoch_loss, self.epoch_cells, self.epoch_start = 0.0, 0, time.perf_counter()

    def work(self, model: nn.Module) -> dict[str, float]:
        """Return how many cells passed, how many parameters learnt, and the operations that this took."""
        passed = {
            groups: {what: self.passed[what, groups] for what in ("tokens", "pairs")} for _, groups in self.passed
        }
        flops = [strategies.training_flops(model, self.plan, learning=groups, **n) for groups, n in passed.items()]
        return {
            "cells": sum(number for (what, _), number in self.passed.items() if what == "cells"),
            "trainable_parameters": sum(w.numel() for w in strategies.learning_parameters(model, self.plan).values()),
            "total_parameters": sum(weight.numel() for weight in model.parameters()),
            "flops": sum(flops),
        }


class _PlanTrainer(Trainer):
    """The Trainer of transformers with the loss of the callback, and our order of the cells."""

    loss_is_scaled_for_ga = False  # it is a mean over the batch, whatever the model says that it accepts

    def __init__(self, callback: PlanCallback, sampler: Sampler[int] | None, **arguments: Any) -> None:
        self.callback, self.sampler = callback, sampler
        super().__init__(**arguments)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> torch.Tensor:
        return self.callback.loss_of(model, inputs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Leave out the Trainer's own count, which takes as long as the optimizer."""
        return 0


def train(
    settings: "Study",
    model: nn.Module,
    data: Dataset,
    log: Training,
    *,
    plan: strategies.Plan,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    validate: Callable[[], dict[str, float]],
    steps: int,
    validate_at: Collection[int],
    best: str | None = None,
    sampler: Sampler[int] | None = None,
    collate: Callable[[Any], Batch] = lambda batch: batch,
    folder: Path | None = None,
    who: str = "",
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train a model by its plan: AdamW, linear warm-up and decay, gradients clipped to norm 1; the best weights stay.

    Call `hardware.prepare` and ``transformers.set_seed(settings.seed)`` before the model is built.

    Parameters
    ----------
    settings
        ``learning_rate``, ``weight_decay``, ``batch_size``, ``warmup_steps``, ``warmup_cap``, ``early_stop``, ``seed``,
        ``device`` and ``precision`` are read (for pre-training: a ``model_copy`` with these replaced).
    model
        It is moved to the device of the run.
    data
        Training cells: ``data.__getitems__(places)`` gives what `collate` makes a batch of. `Cells` gives ready ones.
    log
        Filled in place, also when the training ends in an error.
    loss
        Of the model and a batch on its device: the mean over the batch, computed under autocast.
    validate
        Scores of the model after an epoch; they become columns of the history.
    steps, validate_at
        Optimizer steps, and after which of them (from 1) to validate; what lies between is an "epoch" of the log.
    best
        Name of the score whose highest value (of several the first) chooses the epoch; None keeps the last weights.
    sampler
        Order of the cells; None shuffles them in each pass.
    folder
        Where the state is kept ten times on the way, and from where an interrupted training goes on.
    who
        Name of the training in its lines of progress.

    Raises
    ------
    TrainingFailed
        A loss is not finite; `Training.keeping_failures` makes a status of it.
    """
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    device = hardware.device_of(settings.device)
    bf16 = hardware.uses_bf16(device, settings.precision)
    optimizer = torch.optim.AdamW(strategies.optimizer_groups(settings, model.to(device), plan), fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps(settings, steps), steps)
    callback = PlanCallback(plan, loss, validate, validate_at, best, settings.early_stop, bf16, who)
    with tempfile.TemporaryDirectory() as nowhere:  # the Trainer wants a folder, also to write nothing into it
        arguments = TrainingArguments(
            output_dir=str(folder or nowhere),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            save_strategy="steps" if folder else "no",
            save_steps=max(1, steps // 10),
            save_total_limit=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            seed=settings.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would each take a batch of batch_size
        parts = {"model": model, "args": arguments, "data_collator": collate, "train_dataset": data}
        parts |= {"callbacks": [callback, *callbacks], "optimizers": (optimizer, schedule)}
        trainer = _PlanTrainer(callback, sampler, **parts)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        kept = [state.parent for state in Path(arguments.output_dir).glob("checkpoint-*/trainer_state.json")]
        last = max(kept, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            log.cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            work = callback.work(model)
            log.cost |= {"cells_per_second": work.pop("cells") / log.cost["wall_seconds"]}
            log.cost |= {"optimizer_steps": trainer.state.global_step, "training_cells": len(data), **work}
            log.cost |= hardware.used(device, "bf16" if bf16 else "fp32")
            log.history, log.best_epoch = pd.DataFrame(_epochs(trainer.state)), callback.best_epoch
    with torch.no_grad():
        for name, weight in callback.best_weights.items():
            model.get_parameter(name).copy_(weight)


def fit_cells(settings: "Study", tokens: "Tokens") -> Outcome:
    """Fine-tune a classifier by the strategy of a run, and predict its test cells once.

    The recipe of the studies, in batches of cells of similar length. After each epoch the validation cells are
    predicted; the test cells are predicted once, at the end, with the weights of the epoch with the highest validation
    macro-F1 (of several the first). On a CPU a run gives the same numbers each time; strategies with the same seed see
    the same cells in the same order, and start from the same head.

    Parameters
    ----------
    tokens
        Exactly the cells of the run, from `tuneformer.cells.make.prepare`.

    Returns
    -------
    The outcome. A run that diverges or lacks memory does not raise, but returns with another status than ``ok``.

    Raises
    ------
    UserError
        A class has no cells to train, validate or test on; or the checkpoint, the device or the strategy cannot be
        used.
    """
    rows, classes = rows_of_splits(settings, tokens), list(tokens.classes)
    table = tokens.dataset.remove_columns("input_ids").to_pandas()
    labels = pd.Categorical(table["label"], classes).codes
    outcome = Outcome(classes=classes, **{f"n_{split}": len(at) for split, at in rows.items()})
    if settings.sampling == "upsampled":  # here, after every split: a copy of a training cell is a training cell
        rows["train"] = upsampled(rows["train"], labels[rows["train"]], np.random.default_rng([settings.seed, 6]))
    pad = tokens.vocabulary.specials["<pad>"]
    cells = {split: Cells(tokens.dataset, pad, rows=at, labels=labels[at]) for split, at in rows.items()}
    counts = np.bincount(cells["train"].labels, minlength=len(classes))
    is_balanced = settings.sampling == "balanced"  # then every class is seen equally often
    criterion = losses.make_loss(settings, np.ones_like(counts) if is_balanced else counts)
    bf16 = hardware.uses_bf16(hardware.prepare(settings), settings.precision)
    transformers.set_seed(settings.seed)
    model = classifier.build(settings, tokens.vocabulary, classes)
    model.config.trained_in_bf16 = bf16
    plan = strategies.prepare(settings, model)
    steps = optimizer_steps(settings, tokens.step_cells or len(rows["train"]))
    every = steps // settings.epochs

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return criterion(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])

    def predicted(split: str) -> np.ndarray:
        logits = torch.from_numpy(classifier.predict(model, cells[split], bf16=bf16))
        if not torch.isfinite(logits).all():
            msg = "the model predicts values that are not finite; set a smaller learning_rate, or precision: fp32."
            raise TrainingFailed(msg)
        return losses.probabilities(logits, settings.loss).numpy()

    with outcome.keeping_failures(describe(settings)):
        train(
            settings,
            model,
            cells["train"],
            outcome,
            plan=plan,
            loss=loss,
            validate=lambda: validation_scores(cells["validation"].labels, predicted("validation")),
            steps=steps,
            validate_at=range(every, steps + 1, every),
            best="validation_macro_f1",
            sampler=order_of(settings, cells["train"]),
            who=describe(settings),
        )
        strategies.merge_adapters(model)  # the test cells are predicted by the model as it is kept
        outcome.predictions = predictions_table(table.iloc[rows["test"]], classes, predicted("test"))
        outcome.model = model.cpu()
    return outcome


def rows_of_splits(settings: "Study", tokens: "Tokens") -> dict[str, np.ndarray]:
    """Return the rows of train, validation and test; UserError if a class has no cells in one of them."""
    counts = cells_table(tokens)
    if settings.fold is not None and settings.group_by is not None:  # a test group need not have every class
        counts = counts.drop(columns="test")
    empty = counts.stack()[lambda n: n == 0]
    if len(empty):
        label, split = empty.index[0]
        msg = f"Class {label!r} has no {split} cells; give it more cells, or leave it out of classes."
        raise UserError(msg)
    split = tokens.dataset.select_columns(["split"]).to_pandas()["split"]
    return {name: np.flatnonzero(split == name) for name in SPLITS}


def cells_table(tokens: "Tokens") -> pd.DataFrame:
    """Count the cells of a run by class (rows, and "all") and part (columns train, validation, test)."""
    table = tokens.dataset.select_columns(["label", "split"]).to_pandas().astype(str)
    counts = pd.crosstab(table["label"], table["split"]).reindex(index=tokens.classes, columns=SPLITS, fill_value=0)
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


def warmup_steps(settings: "Study", steps: int) -> int:
    """Return the steps of warm-up: as asked for, but at most the share ``warmup_cap`` of all (null: no limit)."""
    if settings.warmup_cap is None:
        return settings.warmup_steps
    return min(settings.warmup_steps, int(settings.warmup_cap * steps))


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
    return LengthGroupedSampler(settings.batch_size, lengths=cells.lengths, generator=generator)


def describe(settings: "Study") -> str:
    """Return the name of a run as progress lines show it."""
    fold = "" if settings.fold is None else f" fold {settings.fold}"
    return f"{settings.task} {settings.arm} seed {settings.seed}{fold}"


def _epochs(state: transformers.TrainerState) -> list[dict[str, float]]:
    """Return the rows of the history among what the Trainer has logged."""
    return [row for row in state.log_history if "seconds" in row]
