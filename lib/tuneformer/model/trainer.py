"""One set-up of the Trainer of transformers for three trainings: cells, genes and masked tokens.

In: settings, a model with its plan, and batches. Out: the model with the weights that are kept, the log of each epoch,
and the cost. Nothing is written unless a folder is given from which an interrupted training goes on.
"""

import gc
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from tuneformer.model import hardware, strategies
from tuneformer.model.classifier import Batch

if TYPE_CHECKING:
    from tuneformer.study import Study


LAST, LOWEST = "last epoch", "validation loss"
UNCHECKED = 50  # steps on a GPU between two looks at the loss


class TrainingFailed(RuntimeError):
    """A training that cannot go on, because a loss or a prediction is not finite."""


@dataclass(kw_only=True)
class Training:
    """What a training left; after a failure, what it left until then.

    ``status``: ``ok``, ``failed`` or ``out-of-memory``, with the ``reason`` if it is not ``ok``. ``history``: one row
    per epoch (epoch, train_loss, the scores of the validation, seconds). ``best_epoch``: the one whose weights were
    kept, and ``chosen_by`` what: ``last epoch``, ``validation loss`` or ``cross-validated loss``. ``cost``:
    ``wall_seconds`` and ``cpu_seconds`` (training and validation), ``cells_per_second``,
    ``optimizer_steps``, ``training_cells``, ``trainable_parameters`` (that learnt at any time), ``total_parameters``,
    ``flops`` (estimate, `strategies.training_flops`), ``device``, ``peak_memory_mb`` (of the process) and, on a GPU,
    ``peak_gpu_memory_mb``.
    """

    status: str = "ok"
    reason: str = ""
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    best_epoch: int | None = None
    chosen_by: str = LAST
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


@dataclass(eq=False)
class PlanCallback(TrainerCallback):
    """Lets the groups of a plan learn in each step; after an epoch it validates, logs and remembers weights to keep."""

    model: nn.Module
    plan: strategies.Plan
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    validate: Callable[[], dict[str, float]]
    validate_at: Collection[int]
    lowest: str | None
    early_stop: int | None
    bf16: bool
    who: str
    learning: frozenset[str] | None = None
    step: str = ""
    passed: dict[frozenset[str], np.ndarray] = field(default_factory=dict)  # by what learnt: cells, tokens, pairs
    epoch_loss: torch.Tensor | float = 0.0  # on the device: to read it is to wait for it
    unchecked: int = 0
    epoch_cells: int = 0
    epoch_start: float = field(default_factory=time.perf_counter)
    best_epoch: int | None = None
    best_score: float = np.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Freeze and thaw what the plan says."""
        learning = self.plan.learning(state.global_step, state.max_steps)
        if learning != self.learning:
            strategies.set_learning(self.model, self.plan, learning)
            self.learning = learning
        if not self.model.training:  # validated
            self.model.train()
        self.step = f"step {state.global_step + 1} of {state.max_steps}"

    def loss_of(self, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch; refuse one that is not finite, which the Trainer would pass over."""
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, batch)
        lengths = np.array(batch.get("lengths") or [ids.shape[1]] * len(ids))
        passed = np.array([len(lengths), lengths.sum(), (lengths**2).sum()])
        self.passed[self.learning] = self.passed.get(self.learning, 0) + passed
        self.epoch_cells += len(lengths)
        self.epoch_loss = self.epoch_loss + loss.detach().double() * len(lengths)
        self.unchecked += 1
        if ids.device.type == "cpu" or self.unchecked == UNCHECKED:
            self.refuse_divergence(loss.detach())
        return loss

    def refuse_divergence(self, loss: torch.Tensor | float = np.nan) -> None:
        """Raise if a loss since the last check was not finite; on a GPU that waits for all that is under way."""
        self.unchecked = 0
        if not np.isfinite(float(self.epoch_loss)):
            value = float(self.epoch_loss if np.isfinite(float(loss)) else loss)
            msg = f"the loss became {value} in {self.step}; set a smaller learning_rate, or precision: fp32."
            raise TrainingFailed(msg)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step of an epoch, validate."""
        if state.global_step not in self.validate_at:
            return
        self.refuse_divergence()
        epoch = len(state.log_history) + 1
        row = {"epoch": epoch, "train_loss": float(self.epoch_loss) / self.epoch_cells, **self.validate()}
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name != "epoch")
        if self.lowest is None:
            self.best_epoch = epoch
        elif row[self.lowest] <= self.best_score:
            self.best_score, self.best_epoch = row[self.lowest], epoch
            learnt = strategies.learning_parameters(self.model, self.plan)
            self.best_weights = {name: weight.detach().clone() for name, weight in learnt.items()}
        if self.lowest and self.early_stop is not None and epoch - self.best_epoch >= self.early_stop:
            control.should_training_stop = True
        row["seconds"] = time.perf_counter() - self.epoch_start
        state.log_history.append(row)  # the Trainer keeps it with its state, so that it survives an interruption
        best = f" (best epoch {self.best_epoch})" if self.lowest else ""
        line = f"{self.who} epoch {epoch}/{len(self.validate_at)}: {shown}{best}, {row['seconds']:.1f} s"
        print(line, file=sys.stderr, flush=True)
        self.epoch_loss, self.epoch_cells, self.epoch_start = 0.0, 0, time.perf_counter()


class _PlanTrainer(Trainer):
    """The Trainer of transformers with the loss of the callback, and our order of the cells."""

    loss_is_scaled_for_ga = False  # it is a mean over the batch, whatever the model says that it accepts

    def __init__(self, callback: PlanCallback, sampler: Sampler[int] | None, **arguments: Any) -> None:
        self.callback, self.sampler = callback, sampler
        super().__init__(**arguments)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> torch.Tensor:
        return self.callback.loss_of(inputs)

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
    lowest: str | None = None,
    sampler: Sampler[int] | None = None,
    collate: Callable[[Any], Batch] = lambda batch: batch,
    folder: Path | None = None,
    who: str = "",
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train a model by its plan: AdamW, linear warm-up and decay, gradients clipped to norm 1.

    Call `hardware.prepare` and ``transformers.set_seed(settings.seed)`` before the model is built.

    Parameters
    ----------
    data, collate
        Training cells: ``data.__getitems__(places)`` gives what `collate` makes a batch of. `Cells` gives ready ones.
    log
        Filled in place, also when the training ends in an error.
    loss
        Of the model and a batch on its device: the mean over the batch, computed under autocast.
    validate
        Scores of the model after an epoch; they become columns of the history.
    steps, validate_at
        Optimizer steps, and after which of them (from 1) to validate; what lies between is an "epoch" of the log.
    lowest
        Name of the score whose lowest value (of several the last) chooses the epoch; None keeps the last weights.
    sampler
        Order of the cells; None shuffles them in each pass.
    folder
        Where the state is kept ten times on the way, and from where an interrupted training goes on (with its last
        weights: the best ones are not kept there).

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
    callback = PlanCallback(model, plan, loss, validate, validate_at, lowest, settings.early_stop, bf16, who)
    with tempfile.TemporaryDirectory() as nowhere:  # the Trainer wants a folder, also to write nothing into it
        arguments = TrainingArguments(
            output_dir=str(folder or nowhere),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            save_strategy="steps" if folder else "no",
            save_steps=max(1, steps // 10),
            save_total_limit=1,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it waits for the loss of every step
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            seed=settings.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would each take a batch of batch_size
        # The Trainer walks through all modules and weights several times a step; only a state on the disk needs them.
        learnt = strategies.learning_parameters(model, plan).values()
        walked = model if folder else nn.ParameterList(learnt)
        parts = {"model": walked, "args": arguments, "data_collator": collate, "train_dataset": data}
        parts |= {"callbacks": [callback, *callbacks], "optimizers": (optimizer, schedule)}
        trainer = _PlanTrainer(callback, sampler, **parts)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        kept = [state.parent for state in Path(arguments.output_dir).glob("checkpoint-*/trainer_state.json")]
        last = max(kept, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
        wall, cpu = time.perf_counter(), time.process_time()
        gc.freeze()  # accelerate collects garbage when it begins: a third of a second among all that is imported
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            gc.unfreeze()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            log.history = pd.DataFrame([row for row in trainer.state.log_history if "seconds" in row])
            log.best_epoch, log.chosen_by = callback.best_epoch, LOWEST if lowest else LAST
            log.cost = {
                "wall_seconds": wall,
                "cpu_seconds": cpu,
                "cells_per_second": sum(n_cells for n_cells, *_ in callback.passed.values()) / wall,
                "optimizer_steps": trainer.state.global_step,
                "training_cells": len(data),
                "trainable_parameters": sum(weight.numel() for weight in learnt),
                "total_parameters": sum(weight.numel() for weight in model.parameters()),
                "flops": sum(
                    strategies.training_flops(model, plan, n_tokens=n_tokens, n_pairs=n_pairs, learning=groups)
                    for groups, (_, n_tokens, n_pairs) in callback.passed.items()
                ),
                **hardware.used(device, "bf16" if bf16 else "fp32"),
            }
    with torch.no_grad():
        for name, weight in callback.best_weights.items():
            model.get_parameter(name).copy_(weight)


def warmup_steps(settings: "Study", steps: int) -> int:
    """Return the steps of warm-up: as asked for, but at most the share ``warmup_cap`` of all (null: no limit)."""
    if settings.warmup_cap is None:
        return settings.warmup_steps
    return min(settings.warmup_steps, int(settings.warmup_cap * steps))
