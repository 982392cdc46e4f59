"""Fine-tuning of V1-10M shapes beside the plain recipe, and a probe with and without its frozen states.

In: ``$TUNEFORMER_DATA/pbmc_facs_raw.h5ad`` and the V1 dictionaries; random weights. Out: cells per second and ratios.
The two ways take turns, so that other work on the machine slows both alike. They have one core: two threads that wait
for each other all the time take ten times longer where others want the cores, too, and that is no property of a way.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from tuneformer.model import classifier, hardware, memory, strategies, trainer
from tuneformer.model.classifier import CellClassifier, Cells
from tuneformer.model.frozen import Frozen
from tuneformer.study import Study, load_study
from tuneformer.tokens.encode import encode
from tuneformer.tokens.vocabulary import Vocabulary

SHAPES = {
    "V1-10M": {"layers": 6, "width": 256, "heads": 4, "feed_forward": 512, "positions": 2048, "genes": 25_426},
    "V2-104M": {"layers": 12, "width": 768, "heads": 12, "feed_forward": 3072, "positions": 4096, "genes": 20_275},
    "tiny": {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "positions": 2048, "genes": 25_426},
}
BATCH, CLASSES = 12, 5
THREADS = 1


def real_tokens(n_batches: int, positions: int = 2048, longest: int = 700) -> Any:
    """Return the tokens of real PBMC that have at most `longest`, in batches of similar length, the longest first.

    The batches are evenly spread over the cells in the order of their lengths, as if 50 batches had been sorted and a
    few of them drawn. A step of the plain recipe with 12 cells of 2,048 tokens took 20 GB on a CPU, and was killed.
    """
    data = Path(os.environ["TUNEFORMER_DATA"])
    cells = ad.read_h5ad(data / "pbmc_facs_raw.h5ad")
    cells = cells[np.linspace(0, cells.n_obs - 1, 50 * n_batches).astype(int)].copy()
    dataset = encode(cells, Vocabulary.read(data / "geneformer_v1"), max_length=positions)
    lengths = np.array(dataset["length"])
    order = np.argsort(-lengths, kind="stable")[(lengths > longest).sum() :]
    middles = (np.arange(n_batches) + 0.5) / n_batches * len(order)
    starts = (middles - BATCH / 2).astype(int)
    return dataset.select(order[starts[:, None] + np.arange(BATCH)].ravel())


def config_of(shape: str) -> BertConfig:
    """Return the configuration of a Geneformer with five classes."""
    size = SHAPES[shape]
    return BertConfig(
        vocab_size=size["genes"],
        hidden_size=size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=size["feed_forward"],
        max_position_embeddings=size["positions"],
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        num_labels=CLASSES,
        pad_token_id=0,
    )


def plain(shape: str, cells: Cells, steps: int, *, cpu: bool) -> float:
    """Train by the studies' recipe: the Trainer of transformers, fp32, its own attention; return seconds."""
    transformers.set_seed(0)
    model = BertForSequenceClassification(config_of(shape))
    for layer in model.bert.encoder.layer[:2]:
        layer.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=5e-5, weight_decay=0.001,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=cpu,
            remove_unused_columns=False, dataloader_pin_memory=not cpu,
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)
        own = _InOrder(model, arguments, data_collator=lambda batch: batch, train_dataset=cells)
        own.remove_callback(PrinterCallback)
        start = time.perf_counter()
        own.train()
        return _seconds_since(start, cpu=cpu)


class _InOrder(Trainer):
    """The Trainer, with the cells in their order: batches of similar length, as the studies have them."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def ours(shape: str, cells: Cells, steps: int, settings: Study, below: Frozen | None = None) -> tuple[float, Any]:
    """Train as `fit.fit_cells` does, without validation; return seconds, and the log."""
    transformers.set_seed(0)
    config = config_of(shape)
    config.update({"pooling": "first", "attention_probs_dropout_prob": 0.0})
    config._attn_implementation = "auto"
    model, log = CellClassifier(config), trainer.Training()
    plan = strategies.prepare(settings, model)

    def loss(model: CellClassifier, batch: classifier.Batch) -> torch.Tensor:
        labels = batch.pop("labels")
        batch = below.inputs(model, cells, batch) if below else batch
        return torch.nn.functional.cross_entropy(model(**batch).logits, labels)

    start = time.perf_counter()
    trainer.train(
        settings, model, cells, log, plan=plan, loss=loss, validate=dict, steps=steps, validate_at={steps},
        sampler=SequentialSampler(cells),
    )  # fmt: skip
    return _seconds_since(start, cpu=settings.device == "cpu"), log


def _seconds_since(start: float, *, cpu: bool) -> float:
    if not cpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_way(way: str, shape: str, n_batches: int) -> tuple[float, float, float]:
    """Train on all cells in this process, which nothing has set up; return seconds, those of the core, peak MB."""
    cells = Cells(real_tokens(n_batches), 0, labels=np.arange(n_batches * BATCH) % CLASSES, packed=way == "ours")
    torch.set_num_threads(THREADS)
    cpu = time.process_time()
    if way == "plain":
        seconds = plain(shape, cells, n_batches, cpu=True)
    else:
        settings = settings_of("selective")
        hardware.prepare(settings)
        seconds, _ = ours(shape, cells, n_batches, settings)
    return seconds, time.process_time() - cpu, memory.peak_memory()


def probe_ratio(shape: str, n_batches: int, epochs: int) -> float:
    """Return how many times longer the epochs of a probe take without frozen states; each of them costs the same."""
    cells = Cells(real_tokens(n_batches), 0, labels=np.arange(n_batches * BATCH) % CLASSES, packed=True)
    settings = settings_of("linear_probe")
    hardware.prepare(settings)
    whole, _ = ours(shape, cells, n_batches, settings)
    with tempfile.TemporaryDirectory() as folder:
        below = Frozen(Path(folder), 1e9, bf16=hardware.uses_bf16(torch.device("cpu"), "auto"))
        kept, _ = ours(shape, cells, n_batches * epochs, settings, below)
    return whole * epochs / kept


def settings_of(strategy: str) -> Study:
    """Return settings for the processor, with the arithmetic that it has."""
    changes = {"strategy": strategy, "freeze_layers": 2, "batch_size": BATCH, "device": "cpu", "precision": "auto"}
    return load_study("tiny").model_copy(update=changes | {"threads": THREADS})


def alone(function: Callable, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(shape: str = "V1-10M", n_batches: int = 4, rounds: int = 2, epochs: int = 100) -> dict[str, float]:
    """Return cells per second, memory and ratio of both ways; and how much faster a probe is with frozen states."""
    ways = ("plain", "ours")
    found = np.array([[alone(one_way, way, shape, n_batches) for way in ways] for _ in range(rounds)])
    seconds, cpu, memories = found[..., 0], found[..., 1].sum(axis=0), found[..., 2].max(axis=0)
    speed, ratios = n_batches * BATCH / seconds.mean(axis=0), seconds[:, 0] / seconds[:, 1]
    return {
        **{f"{way}_cells_per_second": float(value) for way, value in zip(ways, speed, strict=True)},
        **{f"{way}_peak_memory_mb": float(value) for way, value in zip(ways, memories, strict=True)},
        "ratio": float(speed[1] / speed[0]),
        "ratio_of_core_seconds": float(cpu[0] / cpu[1]),
        "smallest_ratio": float(ratios.min()),
        "largest_ratio": float(ratios.max()),
        "probe_epochs": epochs,
        "probe_ratio": alone(probe_ratio, shape, n_batches, epochs),
    }


if __name__ == "__main__":
    print(json.dumps(measure(rounds=1), indent=1))
