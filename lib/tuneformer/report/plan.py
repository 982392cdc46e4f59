"""What a study will take, before anything starts: arms, jobs, contrasts, downloads, disk and a rough time.

In: the name of a study, or of a batch. Out: lines for a reader. Nothing is downloaded or written. The time is rough: a
few training steps with random weights are measured, and all cells counted at the longest length.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuneformer import paths
from tuneformer.artifacts import UserError, stored_key
from tuneformer.data import fetch, sources
from tuneformer.study import Study, batch, contrasts, jobs, load_study

if TYPE_CHECKING:
    from transformers import BertConfig

BUDGET = 10.0  # seconds of measuring, about
START_SECONDS = 12.0  # a job starts Python, papermill and a kernel
BASELINE_SECONDS = 3.0  # of a run
TOKEN_BYTES, COUNT_BYTES = 4, 3  # of a token, and of a count in the compressed file of the cells
RUN_BYTES = 100_000  # predictions and history of a run, and its share of the executed notebook
MB = 1e6
# Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9 (V1); Chen et al. 2024, doi:10.1101/2024.08.16.608180 (V2):
# layers, width, heads, feed-forward width, positions, vocabulary
ARCHITECTURES = {
    "Geneformer-V1-10M": (6, 256, 4, 512, 2048, 25_426),
    "Geneformer-V2-104M": (12, 768, 12, 3072, 4096, 20_275),
    "Geneformer-V2-316M": (18, 1152, 18, 4608, 4096, 20_275),
}
KNOWN_CELLS = {"sciplex2": 19_164, "sciplex2_geo": 19_164, "pancreas": 16_382, "pbmc68k": 700}  # at most, by task
"""Cells of data sets that are not simulated, after quality control; a task may select fewer."""


def plan(study: str) -> list[str]:
    """Return what a study will take, as lines.

    Raises
    ------
    UserError
        The study, its checkpoint or its device cannot be used.
    """
    settings, asked = load_study(study), jobs(study)
    first = {task: load_study(study, task=task) for task in settings.tasks}
    runs = [run for job in asked for run in job.runs()]
    waiting = [run for run in runs if stored_key(paths.run_dir(run)) is None]
    size = f"{_counted(len(first), 'task')} x {_counted(len(settings.arms), 'arm')} = {_counted(len(asked), 'job')}"
    lines = [
        f"Study {study}: {size}, {_counted(len(runs), 'run')}, of which {len(runs) - len(waiting)} are finished",
        f"  question   {settings.question}",
        f"  tasks      {', '.join(first)}",
        f"  arms       {', '.join(settings.arms)}",
    ]
    pairs = [f"{one.contrast}: {one.arm} against {one.reference}" for one in contrasts(settings)]
    lines += [f"  {'' if number else 'contrasts':<10} {one}" for number, one in enumerate(pairs)]
    needed = [one for task in first.values() for one in sources.remote_files(task)]
    remotes = list({one.name: one for one in needed}.values())
    missing = [one for one in remotes if not fetch.is_present(one)]
    return [*lines, *_download_lines(missing, len(remotes)), *_disk_lines(runs, missing), *_time_lines(waiting)]


def n_cells(settings: Study) -> int | None:
    """Return how many cells a task has, at most; None where that is not known before they are read."""
    return settings.demo_cells if settings.simulated else KNOWN_CELLS.get(settings.dataset)


def trained_cells(settings: Study) -> int:
    """Return how many cells a run sees in an epoch; a made cell is one, and copies of rare classes do not count."""
    share = 1 - 1 / settings.folds if settings.folds else 1 - settings.test_share
    train = (n_cells(settings) or 0) * share * (1 - settings.validation_share)
    train = min(train, settings.train_cells or train)
    if settings.cells_per_class and settings.classes:
        train = min(train, settings.cells_per_class * len(settings.classes))
    fewer = settings.steps_of == "pseudobulk" or (settings.train_set == "pseudobulk" and settings.steps_of == "own")
    return round((train / settings.k if fewer else train) + (settings.pad or 0) * len(settings.padded_classes))


def run_seconds(settings: Study, seconds_per_cell: float) -> float:
    """Estimate the seconds of a run as if everything learned; to predict a cell costs a third of training on it."""
    if settings.is_baseline:
        return BASELINE_SECONDS
    trained = max(trained_cells(settings) * settings.epochs, settings.min_steps * settings.batch_size)
    tested = (n_cells(settings) or 0) * (1 / settings.folds if settings.folds else settings.test_share)
    return (trained * (1 + settings.validation_share / 3) + tested / 3) * seconds_per_cell


def measure(settings: Study) -> float:
    """Return the seconds that training on one cell takes, from steps with random weights and more and more tokens.

    What there is no time to try is extrapolated from the number of tokens.

    Raises
    ------
    UserError
        A step needs more memory than there is, or the checkpoint or the device cannot be used.
    """
    import torch

    from tuneformer.model import hardware
    from tuneformer.model.classifier import CellClassifier

    device, config = hardware.prepare(settings), _config(settings)
    uses_bf16, length = hardware.uses_bf16(device, settings.precision), _length(settings)
    labels = torch.zeros(settings.batch_size, dtype=torch.long, device=device)
    try:
        model = CellClassifier(config).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters())
        spent, seconds, tokens = 0.0, 0.0, min(16, length)
        while spent == 0.0 or (tokens < length and spent + 5 * seconds < BUDGET):
            tokens = min(4 * tokens, length) if spent else tokens  # the first step sets things up
            start = time.perf_counter()
            ids = torch.randint(3, config.vocab_size, (settings.batch_size, tokens), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
                model(ids, torch.ones_like(ids), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            spent += seconds
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        msg = (
            f"checkpoint: a step of training {settings.checkpoint} needs more memory than there is; take a smaller one."
        )
        raise UserError(msg) from error
    return seconds / settings.batch_size * length / tokens


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what a study will take on this machine, before anything starts."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.plan", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml; or default, or all")
    try:
        for study in batch(parser.parse_args(arguments).study):
            print(*plan(study), sep="\n", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _config(settings: Study) -> "BertConfig":
    """Return the configuration of a study's model: from its checkpoint, or as published if that is not here yet."""
    from transformers import BertConfig

    from tuneformer.model.classifier import read_config

    folder = fetch.checkpoint_path(settings.checkpoint)
    if settings.checkpoint in ARCHITECTURES and not (folder / "config.json").is_file():
        layers, width, heads, inner, positions, tokens = ARCHITECTURES[settings.checkpoint]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        sizes |= {"intermediate_size": inner, "max_position_embeddings": positions, "vocab_size": tokens}
        config = BertConfig(**sizes, hidden_act="relu")
    else:
        config = read_config(folder)
    config.update({"attention_probs_dropout_prob": settings.attention_dropout, "pooling": settings.pooling})
    config._attn_implementation = settings.attention
    return config


def _length(settings: Study) -> int:
    return settings.max_length or _config(settings).max_position_embeddings


def _download_lines(missing: list[fetch.RemoteFile], n_all: int) -> list[str]:
    if not missing:
        return ["  downloads  none" + (f" ({_counted(n_all, 'file')} here)" if n_all else "")]
    least = "at least " if any(one.size is None for one in missing) else ""
    total = sum(one.size or 0 for one in missing) / MB
    lines = [f"  downloads  {least}{total:,.1f} MB to {paths.shown(paths.DOWNLOADS)}, {len(missing)} of {n_all} files"]
    sizes = ["size not known" if one.size is None else f"{one.size / MB:,.1f} MB" for one in missing]
    return lines + [f"             {one.name}: {size}" for one, size in zip(missing, sizes, strict=True)]


def _disk_lines(runs: list[Study], missing: list[fetch.RemoteFile]) -> list[str]:
    """Add up downloads, cells and tokens of each task, what each run leaves, and one model per fine-tuned arm."""
    tasks = {run.task: run for run in runs}.values()
    cells = sum((n_cells(run) or 0) * _length(run) for run in tasks) * (TOKEN_BYTES + COUNT_BYTES)
    weights = fetch.checkpoint_path(runs[0].checkpoint) / "model.safetensors"
    published = [one.size or 0 for one in fetch.checkpoint_files(runs[0].checkpoint) if one.name.endswith(weights.name)]
    model = weights.stat().st_size if weights.is_file() else sum(published)
    models = len({(run.task, run.arm) for run in runs if not run.is_baseline}) * model
    needed = sum(one.size or 0 for one in missing) + cells + models + len(runs) * RUN_BYTES
    folder = next(parent for parent in [paths.RUNS, *paths.RUNS.parents] if parent.is_dir())
    free = shutil.disk_usage(folder).free
    least = "" if all(n_cells(run) for run in tasks) else "at least "
    line = f"  disk       {least}{needed / MB:,.0f} MB (rough), of which {models / MB:,.0f} MB for models"
    lacking = "             that does not fit: set TUNEFORMER_RUNS and TUNEFORMER_DOWNLOADS to folders on a larger disk"
    return [f"{line}; {free / MB:,.0f} MB are free", *([lacking] if needed > free else [])]


def _time_lines(waiting: list[Study]) -> list[str]:
    if not waiting:
        return ["  time       none: every run is finished"]
    if waiting[0].kind != "cells":
        return [f"  time       not estimated for a study of {waiting[0].kind}"]
    if any(n_cells(run) is None for run in waiting):
        return ["  time       not known: the number of cells is not known before notebook 01 reads them"]
    tuned = [run for run in waiting if not run.is_baseline]
    each = measure(tuned[0]) if tuned else 0.0
    seconds = [run_seconds(run, each) for run in waiting]
    n_jobs = len({(run.task, run.arm) for run in waiting})
    at_once = min(os.cpu_count() or 1, n_jobs)
    total = (sum(seconds) + n_jobs * START_SECONDS) / at_once
    spread = f"{_counted(len(waiting), 'run')} of {_duration(min(seconds))} to {_duration(max(seconds))}"
    lines = [f"  time       about {_duration(total)} (rough): {spread}, {_counted(at_once, 'job')} at a time"]
    speed = f"             measured: {1 / each:.3g} cells/s in training, with random weights" if tuned else ""
    return [*lines, speed] if tuned else lines


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Return a time as a person says it."""
    for unit, size in {"days": 86400, "hours": 3600, "minutes": 60}.items():
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"


if __name__ == "__main__":
    sys.exit(main())
