"""What smaller variants of a fine-tuned model are worth: each is loaded by a process of its own and measured there.

In: a run and its tokens. Out: for each variant (`tuneformer.model.variants`) the size of its files, memory, cells per
second and predictions of the test cells. All on the CPU, which is what a small model is for.
"""

import json
import os
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pandas as pd
import torch

from tuneformer import paths
from tuneformer.artifacts import UserError, key, made, read_json, stored_key, write_json
from tuneformer.data import fetch
from tuneformer.model import fit, losses
from tuneformer.model.classifier import CellClassifier, Cells
from tuneformer.model.variants import read_model, write_model, write_variant
from tuneformer.study import Study, TrainingKeys

if TYPE_CHECKING:
    from tuneformer.tokens.encode import Tokens

VERSION = "compress.1"
REFERENCE = "fp32"


def fine_tuned(settings: Study, tokens: "Tokens") -> CellClassifier:
    """Load the model of a run with the weights that it keeps, or train and save it; UserError if the run fails."""

    def train(folder: Path) -> None:
        outcome = fit.fit_cells(settings, tokens)
        if outcome.status != "ok":
            msg = f"{settings.task} {settings.arm} seed {settings.seed}: {outcome.reason}"
            raise UserError(msg)
        write_model(outcome.model.cpu().float(), folder)

    return read_model(made(_folder(settings) / "model", _key(settings, tokens), train))


def variants(settings: Study, model: CellClassifier) -> list[str]:
    """Name the variants that a study asks for; heads and neurons are rounded, and every layer keeps one of each."""
    config = model.config
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    n_heads = config.num_attention_heads * n_layers
    heads, neurons = (
        [min(round(share * n_all), most) for share in settings.pruned_shares]
        for n_all, most in ((n_heads, n_heads - n_layers), (n_neurons, n_neurons - 1))
    )
    of_kind = {
        "pruned": [f"pruned_{share * 100:.0f}" for share in settings.pruned_shares],
        "heads": [f"heads_{n}of{n_heads}" for n in heads if n],
        "neurons": [f"neurons_{n}of{n_neurons}" for n in neurons if n],
        "layers": [f"layers_{n}of{n_layers}" for n in range(1, n_layers)],
    }
    named = [name for kind in settings.compressions for name in of_kind.get(kind, [kind])]
    return list(dict.fromkeys([REFERENCE, *named]))


def measure(settings: Study, tokens: "Tokens", model: CellClassifier) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make, save and measure the variants of a model; those that were measured before are loaded.

    Every variant is loaded from its files by a new process (`tuneformer.model.deployed`), which predicts the same
    batches of the same test cells.

    Returns
    -------
    Rows of ``runs.csv``, one per variant, the reference first: ``arm`` is the variant; ``file_bytes`` of all files that
    are needed to load it, and ``zipped_bytes`` of the same, each compressed; ``peak_memory_mb`` of the whole process
    and ``model_memory_mb``, what loading and predicting added to it; ``cells_per_second:<threads>``, and
    ``speed:<threads>``, times as fast as the reference by turns in one process (medians, with the quartiles as
    ``speed_low`` and ``speed_high``). And predictions: task, arm, seed, fold, and what an `Outcome` has of each cell.
    """
    rows = fit.rows_of_splits(settings, tokens)["test"]
    rows = rows[np.argsort(np.asarray(tokens.dataset["length"])[rows], kind="stable")]
    cells = tokens.dataset.remove_columns("input_ids").to_pandas().iloc[rows]
    tested = Cells(tokens.dataset, tokens.vocabulary.specials["<pad>"], rows=rows)
    ids = tested.__getitems__(np.arange(len(rows)))["input_ids"].numpy().astype(np.int64)  # (cells, length)
    timed = np.linspace(0, len(rows) - 1, min(settings.benchmark_cells, len(rows))).round().astype(int)  # all lengths
    found, predictions = [], []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "cells.npz"
        np.savez(file, ids=ids, lengths=tested.lengths, timed=timed)
        for name in variants(settings, model):
            number = key(_key(settings, tokens), name, _benchmark(settings))

            def make(folder: Path, name: str = name) -> None:
                _write_and_measure(settings, model, name, folder, file)

            is_new = stored_key(_folder(settings) / name) != number
            folder = made(_folder(settings) / name, number, make)
            logits = torch.from_numpy(np.load(folder / "logits.npy")).double()
            probabilities = losses.probabilities(logits, settings.loss).numpy()
            found.append(_row(settings, name, read_json(folder / "measured.json")) | {"key": number})
            table = fit.predictions_table(cells, tokens.classes, probabilities)
            predictions.append(table.assign(task=settings.task, arm=name, seed=settings.seed, fold=settings.fold))
            if not is_new:
                continue
            line = f"{name}: {found[-1]['file_bytes'] / 1e6:.2f} MB, {found[-1]['cells_per_second:1']:.0f} cells/s"
            print(line, file=sys.stderr, flush=True)
    return pd.DataFrame(found).assign(n_test=len(cells)), pd.concat(predictions, ignore_index=True)


def file_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def zipped_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder, each compressed by zlib; zeros take little room there."""
    return sum(len(zlib.compress(file.read_bytes())) for file in folder.iterdir())


def _folder(settings: Study) -> Path:
    return paths.arm_dir(settings) / f"compressed_seed{settings.seed}"


def _key(settings: Study, tokens: "Tokens") -> str:
    """Return the key of the model of a run."""
    parameters = settings.keys(TrainingKeys)
    del parameters["device"], parameters["threads"]
    return key(VERSION, parameters, settings.seed, settings.fold, tokens.key, fetch.checkpoint_key(settings.checkpoint))


def _benchmark(settings: Study) -> dict[str, Any]:
    """Return what the numbers of a variant depend on beside its name and the model."""
    options = {"batch": settings.benchmark_batch, "threads": settings.threads or joblib.cpu_count()}
    libraries = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    return options | {"cells": settings.benchmark_cells, "repeats": settings.benchmark_repeats} | libraries


def _write_and_measure(settings: Study, model: CellClassifier, name: str, folder: Path, cells: Path) -> None:
    """Write a variant, and what a new process measures of it, into an empty folder."""
    own = folder / "model"
    write_variant(model, name, own)
    reference = own if name == REFERENCE else _folder(settings) / REFERENCE / "model"
    options = [f"--{option}={_benchmark(settings)[option]}" for option in ("batch", "threads", "repeats")]
    command = [sys.executable, "-m", "tuneformer.model.deployed", own, reference, cells, folder / "logits.npy"]
    # OpenMP threads that wait have to sleep: by default they spin, and other work on the machine then halts them all
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*command, *options], cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        msg = f"{settings.task} {settings.arm}: the variant {name} could not be loaded and measured: {reason}"
        raise UserError(msg)
    sizes = {"file_bytes": file_bytes(own), "zipped_bytes": zipped_bytes(own)}
    write_json(folder / "measured.json", sizes | json.loads(done.stdout))


def _row(settings: Study, name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the row of ``runs.csv`` of a variant, without its scores."""
    row = {"study": settings.study, "task": settings.task, "arm": name, "strategy": settings.strategy}
    row |= {"seed": settings.seed, "fold": settings.fold, "status": "ok", "reason": ""}
    row |= {each: measured[each] for each in ("file_bytes", "zipped_bytes", "peak_memory_mb")}
    row["model_memory_mb"] = measured["peak_memory_mb"] - measured["import_memory_mb"]
    for threads, rates in measured["rates"].items():
        ratios = np.divide(rates, measured["reference_rates"][threads])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        row |= {f"cells_per_second:{threads}": float(np.median(rates)), f"speed:{threads}": middle}
        row |= {f"speed_low:{threads}": low, f"speed_high:{threads}": high}
    return row | {"device": torch.cpu.get_capabilities().get("cpu_name", "CPU")}
