"""One fine-tuning run: one train set, one strategy, one seed.

In: a study and the tokens of its task. Out: an `Outcome` (log per epoch, predictions of the test cells, cost), written
to the run's folder as ``predictions.parquet`` and, last, ``outcome.json``; loaded from there when nothing has changed.
"""

import json
import logging
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from sklearn.metrics import f1_score
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tuneformer.data import splits
from tuneformer.finetune import checkpoints, hardware, losses, sampling, strategies
from tuneformer.finetune.collator import CellCollator
from tuneformer.study import grid, paths
from tuneformer.study.params import Study
from tuneformer.study.run import training_fingerprint
from tuneformer.tokens.tokenizer import Tokens

SPLITS = ("train", "validation", "test")
PREDICTION_BATCH = 64  # cells; without gradients four times a training batch fits where that does
PROBABILITY = "probability:"


class TrainingFailed(RuntimeError):
    """A run that cannot go on; ``status`` is ``failed`` or ``out-of-memory``, as the record will say."""

    def __init__(self, message: str, status: str = "failed") -> None:
        super().__init__(message)
        self.status = status


class TrainingDataError(ValueError):
    """Cells that a classifier cannot be trained or tested on; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    ``status``: ``ok``, ``failed`` or ``out-of-memory``, with the ``reason`` if it is not ``ok``. ``history``: one row
    an epoch (epoch, train_loss, validation_loss in nats per cell, validation_accuracy, validation_macro_f1, seconds).
    ``best_epoch``: the epoch with the highest validation macro-F1, whose weights made the ``predictions``: one row a
    test cell (cell, label, ``probability:<class>``); empty for a run that failed. ``cost``: see `finetune`.
    """

    status: str
    reason: str
    fingerprint: str
    classes: list[str]
    history: pd.DataFrame
    best_epoch: int | None
    cost: dict[str, Any]
    n_train: int
    n_validation: int
    n_test: int
    predictions: pd.DataFrame

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each class, (test cells, classes)."""
        return self.predictions[[PROBABILITY + name for name in self.classes]].to_numpy(float)


@dataclass
class RunLog:
    """What a run has done so far; kept outside the trainer, so that a run that fails still has it."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def finetune(settings: Study, tokens: Tokens) -> Outcome:
    """Fine-tune a classifier by the strategy of a run, and predict its test cells once.

    The recipe of the studies: AdamW, linear warm-up and decay, gradients clipped to norm 1, batches of cells of similar
    length. After each epoch the validation cells are predicted; the test cells are predicted once, at the end, with the
    weights of the epoch with the highest validation macro-F1 (of several the first). On a CPU a run gives the same
    numbers each time; strategies with the same seed see the same cells in the same order, and start from the same head.

    Parameters
    ----------
    settings
        The run.
    tokens
        From `tuneformer.trainsets.assemble.prepare_tokens`.

    Returns
    -------
    The outcome. A run that diverges or lacks memory does not raise, but returns with another status than ``ok``. Its
    cost: ``wall_seconds`` and ``cpu_seconds`` (training and validation), ``cells_per_second``, ``optimizer_steps``,
    ``training_cells``, ``trainable_parameters`` (that learnt at any time), ``total_parameters``, ``flops`` (estimate,
    `tuneformer.finetune.strategies.training_flops`), ``peak_memory_mb`` (of the process), ``peak_gpu_memory_mb`` (on a
    GPU), ``device``.

    Raises
    ------
    TrainingDataError
        A class has no cells to train, validate or test on.
    CheckpointError, ParameterError
        The checkpoint, the device or the strategy's parameters cannot be used.
    """
    current = training_fingerprint(settings, tokens.provenance["fingerprint"])
    finished = read_outcome(settings, current)
    if finished is not None:
        return finished
    drawn = draw_cells(settings, tokens)
    learnt = training_rows(settings, tokens, drawn["train"])
    cells = {split: read_cells(tokens, rows) for split, rows in (drawn | {"train": learnt}).items()}
    for name in ("record.json", "outcome.json", "predictions.parquet"):  # of another run, which this one replaces
        (paths.run_dir(settings) / name).unlink(missing_ok=True)
    log, status, reason = RunLog(), "ok", ""
    probabilities = np.empty((0, len(tokens.classes)))
    try:
        probabilities = _train(settings, tokens, cells, log)
    except Exception as error:
        failure = _as_failure(error)
        status, reason = failure.status, str(failure)
        print(f"{grid.describe(settings)}: {status}: {reason}", file=sys.stderr, flush=True)
    test = drawn["test"][: len(probabilities)]
    predictions = pd.DataFrame(tokens.dataset.select_columns(["cell", "label"])[test])
    for number, name in enumerate(tokens.classes):
        predictions[PROBABILITY + name] = probabilities[:, number]
    outcome = Outcome(
        status=status,
        reason=reason,
        fingerprint=current,
        classes=list(tokens.classes),
        history=pd.DataFrame(log.history),
        best_epoch=log.best_epoch,
        cost=log.cost,
        n_train=len(drawn["train"]),
        n_validation=len(drawn["validation"]),
        n_test=len(drawn["test"]),
        predictions=predictions,
    )
    if status == "ok":
        write_outcome(settings, outcome)
    return outcome


def draw_cells(settings: Study, tokens: Tokens) -> dict[str, np.ndarray]:
    """Choose the cells of a run: at most ``train_cells`` of the single cells, by the seed of the run.

    See `tuneformer.data.splits.draw_cells`. Of a made train set all cells are taken: ``train_cells`` limited the single
    cells that it was made of.

    Returns
    -------
    Rows of the dataset, ascending, for train, validation and test.

    Raises
    ------
    TrainingDataError
        A class has no cells in one of the three parts.
    CellsError
        ``train_cells`` is smaller than the number of classes.
    """
    table = tokens.dataset.select_columns(["label", "split"]).to_pandas()
    counts = pd.crosstab(table["label"], table["split"]).reindex(index=tokens.classes, columns=SPLITS, fill_value=0)
    if settings.fold is not None and settings.group_by is not None:  # a test group need not have every class
        counts = counts.drop(columns="test")
    empty = counts.stack()[lambda n: n == 0]
    if len(empty):
        label, split = empty.index[0]
        msg = (
            f"Class {label!r} has no {split} cells; give it more cells, or leave it out of classes in the params file."
        )
        raise TrainingDataError(msg)
    return splits.draw_cells(
        table,
        train_cells=None if paths.is_made(settings) else settings.train_cells,
        validation_share=settings.validation_share,
        seed=settings.seed,
    )


def training_rows(settings: Study, tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """Return the rows that an epoch passes over: the training cells, with ``upsampled`` those of rare classes again.

    The copies are drawn from the training cells of the run alone, after every split.
    """
    if settings.sampling != "upsampled":
        return rows
    labels = np.asarray(tokens.dataset.select(rows)["label"][:])
    return sampling.upsampled(rows, labels, np.random.default_rng([settings.seed, 6]))


def cells_table(tokens: Tokens, drawn: dict[str, np.ndarray]) -> pd.DataFrame:
    """Count the cells of a run by class (rows, and "all") and part (columns)."""
    labels = pd.Series(tokens.dataset["label"][:])
    table = pd.DataFrame({split: labels.iloc[rows].value_counts() for split, rows in drawn.items()})
    table = table.reindex(tokens.classes)
    table.loc["all"] = table.sum()
    return table.astype(int)


def optimizer_steps(settings: Study, tokens: Tokens, n_train: int) -> int:
    """Return the optimizer steps of a run: ``epochs`` passes over its training cells in batches of ``batch_size``.

    A train set named ``_steps`` takes the steps of so many cells as it says in its ``step_cells`` instead, and no run
    takes fewer than ``min_steps``. An "epoch" of the log is then the same share of the steps, not a pass over the
    cells.
    """
    n_cells = tokens.provenance.get("step_cells") or n_train
    steps = -(-n_cells // settings.batch_size) * settings.epochs
    return max(steps, -(-settings.min_steps // settings.epochs) * settings.epochs)


def warmup_steps(settings: Study, total_steps: int) -> int:
    """Return the steps of warm-up: as asked for, but at most the share ``warmup_cap`` of all (null: no limit)."""
    if settings.warmup_cap is None:
        return settings.warmup_steps
    return min(settings.warmup_steps, int(settings.warmup_cap * total_steps))


def read_outcome(settings: Study, fingerprint: str) -> Outcome | None:
    """Read the outcome of a run from its folder; None if a run with this fingerprint never got to its end there."""
    content, predictions = paths.run_dir(settings) / "outcome.json", paths.run_dir(settings) / "predictions.parquet"
    if not content.is_file() or not predictions.is_file():
        return None
    stored = json.loads(content.read_text(encoding="utf-8"))
    if stored["fingerprint"] != fingerprint:
        return None
    stored["history"] = pd.DataFrame(stored["history"])
    return Outcome(**stored, predictions=pd.read_parquet(predictions))


class ClassifierTrainer(Trainer):
    """HF Trainer that follows a `Plan`, keeps the best weights in memory, and stops when a loss is not finite.

    Parameters
    ----------
    settings, plan, log
        The run.
    arguments
        Of the Trainer.
    """

    def __init__(self, settings: Study, plan: strategies.Plan, log: RunLog, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.settings, self.plan, self.log_of_run = settings, plan, log
        self.learning: frozenset[str] | None = None
        self.passed: Counter[tuple[str, frozenset[str]]] = Counter()  # tokens and pairs of tokens by what learnt
        self.epoch_loss, self.epoch_cells, self.epoch_start = 0.0, 0, time.perf_counter()
        self.cells_seen = 0
        self.order = torch.Generator().manual_seed(settings.seed)
        labels = torch.tensor([cell["labels"] for cell in self.train_dataset])
        counts = torch.bincount(labels, minlength=self.model.config.num_labels)
        is_balanced = settings.sampling == "balanced"  # then every class is seen equally often
        self.loss = losses.make_loss(settings, torch.ones_like(counts) if is_balanced else counts)
        self.labels = labels

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch, of the kind that the run asks for."""
        labels = inputs["labels"]
        output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.loss(output.logits, labels)
        return (loss, output) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        # a generator of its own: the order of the cells must not depend on the random numbers that a strategy uses up
        if self.settings.sampling == "balanced":
            return sampling.BalancedSampler(self.labels.numpy(), seed=self.settings.seed)
        lengths = [len(cell["input_ids"]) for cell in self.train_dataset]
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths, generator=self.order)

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Train one batch with the groups that learn in this step."""
        learning = self.plan.learning(self.state.global_step, self.state.max_steps)
        if learning != self.learning:
            strategies.set_learning(self.model, learning)
            self.learning = learning
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            msg = (
                f"the loss became {loss.item()} in step {self.state.global_step + 1} of {self.state.max_steps}; set a "
                "smaller learning_rate, or precision: fp32."
            )
            raise TrainingFailed(msg)
        n_cells, length = inputs["input_ids"].shape
        self.passed["tokens", learning] += n_cells * length
        self.passed["pairs", learning] += n_cells * length**2
        self.epoch_loss += loss.item() * n_cells
        self.epoch_cells += n_cells
        self.cells_seen += n_cells
        return loss

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Leave out the Trainer's own count, which takes as long as the optimizer; see `training_flops`."""
        return 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Predict the validation cells after an epoch, log it, and keep its weights if it is the best so far."""
        log, settings = self.log_of_run, self.settings
        probabilities = self.probabilities(self.eval_dataset)
        labels = np.array([cell["labels"] for cell in self.eval_dataset])
        predicted = probabilities.argmax(axis=1)
        likelihood = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(float).tiny)
        epoch = len(log.history) + 1
        row = {
            "epoch": epoch,
            "train_loss": self.epoch_loss / self.epoch_cells,
            "validation_loss": float(-np.log(likelihood).mean()),
            "validation_accuracy": float((predicted == labels).mean()),
            "validation_macro_f1": float(f1_score(labels, predicted, labels=np.unique(labels), average="macro")),
            "seconds": time.perf_counter() - self.epoch_start,
        }
        log.history.append(row)
        scores = [past["validation_macro_f1"] for past in log.history]
        if scores[-1] > max(scores[:-1], default=-1):
            log.best_epoch = epoch
            weights = strategies.learning_parameters(self.model, self.plan)
            log.best_weights = {name: weight.detach().clone() for name, weight in weights.items()}
        if settings.early_stop is not None and epoch - log.best_epoch >= settings.early_stop:
            self.control.should_training_stop = True
        self.control.should_evaluate = False  # else the Trainer comes again at the end of its own epoch
        print(
            f"{grid.describe(settings)} epoch {epoch}/{settings.epochs}: train loss {row['train_loss']:.3f}, "
            f"validation macro-F1 {scores[-1]:.3f} (best {scores[log.best_epoch - 1]:.3f} in epoch {log.best_epoch}), "
            f"{row['seconds']:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        self.epoch_loss, self.epoch_cells, self.epoch_start = 0.0, 0, time.perf_counter()
        return {}

    def restore_best(self) -> None:
        """Put the weights of the best epoch back into the model."""
        weights = strategies.learning_parameters(self.model, self.plan)
        with torch.no_grad():
            for name, best in self.log_of_run.best_weights.items():
                weights[name].copy_(best)

    def probabilities(self, cells: list[dict[str, Any]]) -> np.ndarray:
        """Predict cells in batches of similar length; return (cells, classes) in the order of `cells`."""
        order = np.argsort([len(cell["input_ids"]) for cell in cells], kind="stable")
        logits = np.empty((len(cells), self.model.config.num_labels))
        logits[order] = self.predict([cells[row] for row in order]).predictions
        if not np.isfinite(logits).all():
            msg = "the model predicts values that are not finite; set a smaller learning_rate, or precision: fp32."
            raise TrainingFailed(msg)
        return losses.probabilities(torch.from_numpy(logits), self.settings.loss).numpy()


def make_trainer(
    settings: Study, tokens: Tokens, cells: dict[str, list[dict[str, Any]]], log: RunLog, *, accumulate: int = 1
) -> ClassifierTrainer:
    """Build model, optimizer, schedule and trainer of a run.

    Parameters
    ----------
    settings, tokens, log
        The run.
    cells
        Cells of train, validation and test: ``{"input_ids", "labels"}`` each.
    accumulate
        Batches whose gradients are averaged for one step, of ``batch_size / accumulate`` cells each.
    """
    device = hardware.device_of(settings)
    transformers.set_seed(settings.seed)
    model = checkpoints.load_classifier(settings, tokens.vocabulary, tokens.classes)
    plan = strategies.prepare(settings, model)
    total_steps = optimizer_steps(settings, tokens, len(cells["train"]))
    optimizer = torch.optim.AdamW(strategies.optimizer_groups(settings, model.to(device), plan), fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=warmup_steps(settings, total_steps), num_training_steps=total_steps
    )
    arguments = TrainingArguments(
        output_dir=str(paths.run_dir(settings)),
        max_steps=total_steps,
        per_device_train_batch_size=settings.batch_size // accumulate,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=PREDICTION_BATCH,
        eval_strategy="steps",
        eval_steps=max(1, total_steps // settings.epochs),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        bf16=hardware.trains_in_bf16(settings),
        dataloader_pin_memory=device.type == "cuda",
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would each take a batch of batch_size
    trainer = ClassifierTrainer(
        settings,
        plan,
        log,
        model=model,
        args=arguments,
        data_collator=CellCollator(tokens.vocabulary.specials["<pad>"]),
        train_dataset=cells["train"],
        eval_dataset=cells["validation"],
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def _train(settings: Study, tokens: Tokens, cells: dict[str, list[dict[str, Any]]], log: RunLog) -> np.ndarray:
    """Train, and return the probabilities of the test cells, (test cells, classes); fills `log`."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    hardware.prepare(settings)
    trainer = make_trainer(settings, tokens, cells, log)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        trainer.train()
    finally:
        log.cost |= _cost(trainer, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    trainer.restore_best()
    return trainer.probabilities(cells["test"])


def _cost(trainer: ClassifierTrainer, *, wall: float, cpu: float) -> dict[str, Any]:
    model, device = trainer.model, trainer.args.device
    flops = [
        strategies.training_flops(
            model,
            n_tokens=trainer.passed["tokens", learning],
            n_pairs=trainer.passed["pairs", learning],
            learning=learning,
        )
        for learning in {groups for _, groups in trainer.passed}
    ]
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "cells_per_second": trainer.cells_seen / wall,
        "optimizer_steps": trainer.state.global_step,
        "training_cells": len(trainer.train_dataset),
        "trainable_parameters": sum(
            weight.numel() for weight in strategies.learning_parameters(model, trainer.plan).values()
        ),
        "total_parameters": sum(weight.numel() for weight in model.parameters()),
        "flops": sum(flops),
        "device": device_name(device, bf16=trainer.args.bf16),
        **hardware.peak_memory(device),
    }


def device_name(device: torch.device, *, bf16: bool) -> str:
    """Return what computed a run, and in which arithmetic, as its record says it."""
    arithmetic = "bf16" if bf16 else "fp32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {arithmetic}"
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{name}, {torch.get_num_threads()} threads, {arithmetic}"


def _as_failure(error: Exception) -> TrainingFailed:
    """Return an error as the failure of a run, or raise it again if it is anything else."""
    if isinstance(error, TrainingFailed):
        return error
    if hardware.is_out_of_memory(error):
        return TrainingFailed("memory ran out; set a smaller batch_size or max_length.", status="out-of-memory")
    raise error


def read_cells(tokens: Tokens, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return cells as the collator takes them, in memory."""
    table = tokens.dataset.select(rows).select_columns(["input_ids", "label"]).with_format("arrow")[:]
    number = {name: place for place, name in enumerate(tokens.classes)}
    ids, labels = table["input_ids"].combine_chunks(), table["label"].to_pylist()
    flat, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
    return [
        {"input_ids": flat[offsets[row] : offsets[row + 1]].astype(np.int64), "labels": number[label]}
        for row, label in enumerate(labels)
    ]


def write_outcome(settings: Study, outcome: Outcome) -> None:
    """Write the predictions and then the rest of an outcome to the folder of its run, each file whole or not at all."""
    folder = paths.run_dir(settings)
    with paths.atomic_path(folder / "predictions.parquet") as partial:
        outcome.predictions.to_parquet(partial, index=False)
    content = {key: value for key, value in vars(outcome).items() if key != "predictions"}
    content["history"] = outcome.history.to_dict(orient="list")
    paths.write_text(folder / "outcome.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
