"""How fast a model trains on this machine, measured before it is here.

In: a run of a study. Out: the operations that a cell costs it, and how many a second a few training steps reach with
random weights: those of the checkpoint's architecture, which is known before its weights are downloaded.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig

from tuneformer.finetune import hardware, strategies
from tuneformer.finetune.checkpoints import CellClassifier, read_config
from tuneformer.study import paths
from tuneformer.study.params import Study
from tuneformer.study.treatments import BASELINES

STEPS = 10  # timed training steps, at most
SHORT = 64  # tokens of the first cell that is tried

# Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9 (V1); Chen et al. 2024, doi:10.1101/2024.08.16.608180 (V2)
ARCHITECTURES = {
    name: {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "vocab_size": tokens,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.02,
    }
    for name, (layers, width, heads, inner, positions, tokens) in {
        "Geneformer-V1-10M": (6, 256, 4, 512, 2048, 25_426),
        "Geneformer-V2-104M": (12, 768, 12, 3072, 4096, 20_275),
        "Geneformer-V2-316M": (18, 1152, 18, 4608, 4096, 20_275),
    }.items()
}


class ThroughputError(ValueError):
    """A model that cannot be tried here; the message says why."""


@dataclass(frozen=True)
class Speed:
    """What ``steps`` training steps of ``batch`` cells of ``length`` tokens reached; the median of them counts.

    ``is_whole``: whether these are the batch and the length of the study, or as much of them as there was time for.
    """

    flops_per_second: float
    cells_per_second: float
    steps: int
    batch: int
    length: int
    is_whole: bool


def config_of(settings: Study) -> BertConfig:
    """Return the configuration of a study's model: from its checkpoint, or as published if that is not here yet.

    Raises
    ------
    CheckpointError
        A local checkpoint has none.
    """
    name, folder = settings.checkpoint, paths.checkpoint_dir(settings.checkpoint)
    is_here = name not in ARCHITECTURES or (folder / "config.json").is_file()
    config = read_config(folder) if is_here else BertConfig(**ARCHITECTURES[name])
    config.update({"attention_probs_dropout_prob": settings.attention_dropout, "pooling": settings.pooling})
    config._attn_implementation = settings.attention
    return config


def length_of(settings: Study) -> int:
    """Return the most tokens of a cell: ``max_length``, or the positions of the checkpoint."""
    return settings.max_length or config_of(settings).max_position_embeddings


def cell_flops(settings: Study) -> tuple[float, float]:
    """Estimate the operations for one cell of the most tokens: in training, averaged over the run, and in prediction.

    Returns
    -------
    As `strategies.training_flops`, with the groups that learn at the time; a baseline trains nothing.

    Raises
    ------
    CheckpointError, ParameterError
        The checkpoint or the strategy cannot be used.
    """
    length = length_of(settings)
    size = {"n_tokens": length, "n_pairs": length**2}
    with torch.device("meta"):  # shapes without memory
        model = CellClassifier(config_of(settings))
        predicted = strategies.training_flops(model, **size, learning=frozenset())
        if settings.strategy in BASELINES:
            return 0.0, predicted
        plan = strategies.prepare(settings, model)
    learnt = Counter(plan.learning(step, 100) for step in range(100))  # by hundredths of the run
    trained = sum(n * strategies.training_flops(model, **size, learning=groups) for groups, n in learnt.items())
    return trained / 100, predicted


def measure(settings: Study, *, seconds: float) -> Speed:
    """Train a few steps of a study's model with random weights, on random tokens, with everything learning.

    Begins with one short cell, and goes on to the batch and the length of the study as far as the time allows.

    Parameters
    ----------
    settings
        A run: checkpoint, max_length, batch_size, device, precision, attention and threads are read.
    seconds
        What all steps together may take.

    Raises
    ------
    ThroughputError
        A step needs more memory than there is.
    CheckpointError, ParameterError
        The checkpoint or the device cannot be used.
    """
    hardware.prepare(settings)
    begin = time.perf_counter()
    try:
        trial = _Trial(settings)
        sizes = list(_sizes(settings.batch_size, length_of(settings)))
        trial.step(sizes[0])  # the first one sets things up
        for size, larger in zip(sizes, [*sizes[1:], sizes[-1]], strict=True):
            took = trial.step(size)
            expected = took * trial.flops(larger) / trial.flops(size)
            if time.perf_counter() - begin + 2 * expected > seconds:
                break
        times = [took]
        while len(times) < STEPS and time.perf_counter() - begin + took < seconds:
            times.append(trial.step(size))
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        msg = (
            f"checkpoint: a training step of {settings.checkpoint} needs more memory than there is; take a smaller one."
        )
        raise ThroughputError(msg) from error
    typical = statistics.median(times)
    return Speed(trial.flops(size) / typical, size[0] / typical, len(times), *size, is_whole=size == sizes[-1])


class _Trial:
    """A model with random weights and its optimizer, for steps of any size (cells, tokens)."""

    def __init__(self, settings: Study) -> None:
        self.device = hardware.device_of(settings)
        self.is_bf16 = hardware.trains_in_bf16(settings)
        with self.device:
            self.model = CellClassifier(config_of(settings)).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, size: tuple[int, int]) -> float:
        """Train one step; return its seconds."""
        begin = time.perf_counter()
        tokens = torch.randint(3, self.model.config.vocab_size, size, generator=self.generator).to(self.device)
        labels = torch.zeros(size[0], dtype=torch.long, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            output = self.model(tokens, torch.ones_like(tokens), labels=labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def flops(self, size: tuple[int, int]) -> float:
        """Return the operations of a step."""
        n_tokens = size[0] * size[1]
        learning = frozenset(strategies.parameters_by_group(self.model))
        return strategies.training_flops(self.model, n_tokens=n_tokens, n_pairs=n_tokens * size[1], learning=learning)


def _sizes(batch: int, length: int) -> Iterator[tuple[int, int]]:
    """Give sizes of steps (cells, tokens), from one short cell to the whole: first tokens doubled, then cells."""
    cells, tokens = 1, min(SHORT, length)
    yield cells, tokens
    while tokens < length:
        tokens = min(2 * tokens, length)
        yield cells, tokens
    while cells < batch:
        cells = min(2 * cells, batch)
        yield cells, tokens
