"""What a study will take, before anything starts: runs, downloads, disk and time.

In: the name of a study, or of a batch. Out: lines for a reader. Nothing is downloaded or written. The time is an
estimate: the operations of all runs, divided by those per second that `tuneformer.finetune.throughput` measures here.
"""

import argparse
import functools
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import anndata as ad
import pandas as pd

from tuneformer.data import catalog, readers
from tuneformer.data.download import RemoteFile, RemoteFolder, is_present
from tuneformer.data.readers import CellsError
from tuneformer.data.simulate_pancreas import TYPES, cell_numbers
from tuneformer.finetune import hardware, throughput
from tuneformer.finetune.checkpoints import CheckpointError
from tuneformer.finetune.throughput import Speed, ThroughputError
from tuneformer.finetune.training import device_name
from tuneformer.study import grid, paths, train_sets
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.run import finished_record
from tuneformer.study.treatments import BASELINES

Remote = RemoteFile | RemoteFolder

BUDGET = 18.0  # seconds of measuring for one study, at most
RUN_THREADS = 1  # CPU threads of a run in a batch (rule finetune of the Snakefile)
TOKEN_BYTES = 4
COUNT_BYTES = 3  # of a count in cells.h5ad, which is compressed: those of the demo have 2 to 3
RUN_BYTES = 300_000  # notebook, record and predictions of a run: those of the demo have 200,000
MB = 1e6
KNOWN_CELLS = {  # cells of each class of data sets that may not be here yet
    "sciplex2": {"Dex": 6214, "Nutlin": 4016, "SAHA": 3318, "Untreated": 3254, "BMS": 2362},  # after the thesis's QC
    "pancreas": {one.name: one.cells for one in TYPES},
}


@dataclass(frozen=True)
class Cells:
    """How many cells of a task, or of one fold of it, train, validate and test.

    ``classes``: cells of each class; one number for all where classes are not known. ``basis``: where that is from.
    """

    train: float
    validation: float
    test: float
    classes: pd.Series
    basis: str

    @property
    def all(self) -> float:
        """All cells of the task."""
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Work:
    """What a run computes: optimizer steps, cells trained (each time that it is seen counts), cells predicted."""

    steps: int
    trained: float
    predicted: float


def cells_of(settings: Study) -> Cells | None:
    """Return the numbers of cells of a run's task or fold; None where they are not known before a download.

    Exact where notebook 01 has made the cells. Else from the file, where it is here, or from published numbers, both
    before quality control; of cells that are selected by a column that is not known, at most so many.

    Raises
    ------
    CellsError
        The study's own file is missing or cannot be read.
    """
    made = paths.cells_path(settings)
    if made.is_file():
        obs = _obs(made)
        part = obs["split"].value_counts()
        numbers = [int(part.get(name, 0)) for name in ("train", "validation", "test")]
        return Cells(*numbers, classes=obs["label"].value_counts(), basis="counted after quality control")
    classes, basis = _class_sizes(settings)
    if classes is None:
        return None
    n_cells = float(classes.sum())
    n_test = n_cells / settings.folds if settings.folds else n_cells * settings.test_share
    n_validation = (n_cells - n_test) * settings.validation_share
    return Cells(n_cells - n_test - n_validation, n_validation, n_test, classes, basis)


def train_set_of(settings: Study, cells: Cells) -> tuple[Cells, float]:
    """Return the numbers of a run's own train set, and of the cells that an epoch's steps are counted by.

    A made train set has as many points as `tuneformer.trainsets.assemble` makes, but for chance; the samples of a bulk
    table are counted as if they were cells. Copies of rare classes count for the steps only.
    """
    if settings.train_cells is not None and settings.train_cells < cells.train:
        share = settings.train_cells / cells.train
        cells = replace(cells, train=float(settings.train_cells), validation=cells.validation * share)
    said = train_sets.parse(settings.train_set)
    drawn = cells
    if said.kind == "pseudobulk" or said.control == "points":
        cells = replace(cells, train=cells.train / said.k, validation=cells.validation / said.k)
    elif said.amount == "pad":
        cells = replace(cells, train=cells.train + said.number * len(settings.padded_classes))
    elif said.amount == "n":
        share = min(1.0, said.number * max(len(settings.classes), len(cells.classes)) / cells.train)
        cells = replace(cells, train=cells.train * share, validation=cells.validation * share)
    if said.control == "steps":
        return cells, drawn.train / said.k if said.kind == "single_cell" else drawn.train
    copies = len(cells.classes) * cells.classes.max() / cells.classes.sum() if settings.sampling == "upsampled" else 1.0
    return cells, cells.train * copies


def work_of(settings: Study, cells: Cells) -> Work:
    """Return what a run computes, with steps as `tuneformer.finetune.training.optimizer_steps` counts them.

    A baseline trains nothing; of baselines, only the one that reads the frozen model is counted, with one prediction of
    every cell.
    """
    if settings.strategy in BASELINES:
        return Work(0, 0.0, cells.all if settings.strategy == "frozen_embedding_ridge" else 0.0)
    if settings.kind == "genes":
        cells, step_cells = (
            replace(cells, validation=settings.gene_cells, test=2 * settings.gene_cells),
            settings.gene_cells,
        )
    else:
        cells, step_cells = train_set_of(settings, cells)
    per_epoch = max(math.ceil(step_cells / settings.batch_size), math.ceil(settings.min_steps / settings.epochs))
    steps = per_epoch * settings.epochs
    return Work(steps, steps * min(settings.batch_size, step_cells), settings.epochs * cells.validation + cells.test)


def models_of(runs: list[Study]) -> list[Study]:
    """Return one setting for each model that the runs of a study train, and each baseline that they fit.

    A study of gene classes trains each strategy, and the first once more with permuted classes, in each seed and fold
    of genes; one of compression trains one model.
    """
    first = runs[0]
    if first.kind == "genes":
        names = [first.strategies[0], *first.strategies]
        return [first.treated(name) for name in names for _ in first.seeds for _ in range(first.gene_folds)]
    return runs[:1] if first.kind == "compression" else runs


def plan(runs: list[Study], *, seconds: float = BUDGET) -> list[str]:
    """Return what the runs of one study will take, as lines.

    Parameters
    ----------
    runs
        Of one study.
    seconds
        What measuring may take.

    Raises
    ------
    ValueError
        Cells, checkpoint or device of the study cannot be used; the message says why.
    """
    models = models_of(runs)
    waiting = [run for run in models if run.kind != "cells" or finished_record(run) is None]
    parts = {paths.part_name(run): run for run in runs}
    remotes = list(dict.fromkeys(remote for run in parts.values() for remote in catalog.needed(run)))
    cells = {part: cells_of(run) for part, run in parts.items()}
    return [
        f"  runs       {len(models)}, of which {len(models) - len(waiting)} are finished",
        *_download_lines(remotes),
        *_disk_lines(runs, remotes, cells),
        *_time_lines(waiting, cells, seconds),
    ]


@functools.cache
def start_seconds() -> float:
    """Measure how long Python takes to start and to import what a run needs."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import papermill, tuneformer.finetune.training"], check=True)
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    """Say what a study will take on this machine, before anything starts: runs, downloads, disk and time."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.plan", description=main.__doc__)
    parser.add_argument("study", help=f"name of a file in params/, without .yaml; or {grid.DEFAULT}, or {grid.ALL}")
    name = parser.parse_args(arguments).study
    try:
        for study, part in groupby(grid.batch(name), key=lambda run: run.study):
            if grid.main([study]):
                return 2
            print(*plan(list(part)), sep="\n", flush=True)
    except (ParameterError, CellsError, CheckpointError, ThroughputError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _class_sizes(settings: Study) -> tuple[pd.Series | None, str]:
    """Return the cells of each class (one number where classes are not known), and where that is from."""
    if settings.dataset == "demo_pancreas":
        return cell_numbers(settings.demo_cells).sum(axis=1), "simulated"
    if settings.simulated:
        return pd.Series({"all": settings.demo_cells}), "simulated, at most"
    if settings.dataset in KNOWN_CELLS:
        known = pd.Series(KNOWN_CELLS[settings.dataset])
        if set(settings.classes) <= set(known.index):
            return known[settings.classes or known >= settings.min_class_cells], "published"
        selected = [name for name in settings.select_values if name in known] or list(known.index)
        return pd.Series({"all": known[selected].sum()}), "published, at most"
    obs = readers.read_pbmc68k().obs if settings.dataset == "pbmc68k" else _obs(catalog.source_path(settings))
    if obs is None:
        return None, ""
    if settings.select_column in obs:
        obs = obs[obs[settings.select_column].astype(str).isin(settings.select_values)]
    if settings.label not in obs:
        return pd.Series({"all": len(obs)}), "in the file, at most"
    sizes = obs[settings.label].dropna().astype(str).value_counts()
    kept = sizes.index.isin(settings.classes) if settings.classes else sizes >= settings.min_class_cells
    return sizes[kept & (sizes > 0)], "in the file, before quality control"


def _obs(path: Path) -> pd.DataFrame | None:
    """Return the table of cells of an h5ad file or a tokenized folder, without its counts; None if it is neither."""
    if path.suffix == ".h5ad" and path.is_file():
        backed = ad.read_h5ad(path, backed="r")
        backed.file.close()
        return backed.obs
    return readers.read_tokenized(path).obs if (path / "state.json").is_file() else None


def _download_lines(remotes: list[Remote]) -> list[str]:
    missing = [remote for remote in remotes if not is_present(remote)]
    if not missing:
        return [f"  downloads  none ({len(remotes)} files are here)" if remotes else "  downloads  none"]
    least = "at least " if any(remote.size is None for remote in missing) else ""
    size = f"{least}{_total(missing) / MB:,.1f} MB to {paths.shown(paths.DOWNLOADS)}"
    lines = [f"  downloads  {size}, {len(missing)} of {len(remotes)} files are missing"]
    for remote in missing:
        known = "size not known" if remote.size is None else f"{remote.size / MB:,.1f} MB"
        lines.append(f"             {remote.name}: {known}")
    return lines


def _total(remotes: list[Remote]) -> int:
    """Return the known bytes of what is not here."""
    return sum(remote.size or 0 for remote in remotes if not is_present(remote))


def _disk_lines(runs: list[Study], remotes: list[Remote], cells: dict[str, Cells | None]) -> list[str]:
    length = throughput.length_of(runs[0])
    tokenized = {paths.tokens_path(run): run for run in runs if cells[paths.part_name(run)]}
    n_tokenized = sum(train_set_of(run, cells[paths.part_name(run)])[0].all for run in tokenized.values())
    n_kept = sum(found.all for found in cells.values() if found)
    made = length * (n_kept * COUNT_BYTES + n_tokenized * TOKEN_BYTES) + len(runs) * RUN_BYTES
    fetched = _total(remotes)
    folder = next(parent for parent in [paths.RUNS, *paths.RUNS.parents] if parent.is_dir())
    free = shutil.disk_usage(folder).free
    parts = f"{fetched / MB:,.0f} MB of downloads, {made / MB:,.0f} MB of cells, tokens and runs"
    least = "" if all(cells.values()) else "at least "
    line = f"  disk       {least}{(made + fetched) / MB:,.0f} MB (estimate): {parts}; {free / MB:,.0f} MB are free"
    lacking = "             that does not fit: set TUNEFORMER_RUNS and TUNEFORMER_DOWNLOADS to folders on a larger disk"
    return [line, lacking] if made + fetched > free else [line]


def _time_lines(waiting: list[Study], cells: dict[str, Cells | None], seconds: float) -> list[str]:
    if not waiting:
        return ["  time       none: every run is finished"]
    is_grid, cores = waiting[0].kind == "cells", os.cpu_count() or 1
    trained = [run for run in waiting if run.strategy not in BASELINES] or waiting[:1]
    batches = {run.batch_size: run.model_copy(update={"threads": RUN_THREADS if is_grid else cores}) for run in trained}
    speeds = {size: throughput.measure(batches[size], seconds=seconds / len(batches)) for size in sorted(batches)}
    device, length = hardware.device_of(waiting[0]), throughput.length_of(waiting[0])
    where = device_name(device, bf16=hardware.trains_in_bf16(waiting[0]))
    lines = list(map(_measured_line, speeds.values()))
    known = [found for found in cells.values() if found]
    if len(known) < len(cells):
        is_own = waiting[0].dataset == "own"
        until = "notebook 01 reads them" if is_own else f"python -m tuneformer.data.download {waiting[0].study}"
        return [f"  time       not known on {where}: the number of cells is not known before {until}", *lines]
    each = run_seconds(waiting, cells, speeds)
    start = start_seconds()
    starts = start * (len(trained) + 2 * len(cells) if is_grid else 1)  # two notebooks come before every part
    at_once = cores if is_grid else 1
    if device.type == "cuda":  # which the runs of a batch share
        total = sum(each) + starts / at_once
    else:
        total = max(max(each) + start, (sum(each) + starts) / at_once)
    shown = list(dict.fromkeys(_duration(found) for found in sorted(run_seconds(trained, cells, speeds))))
    runs = "1 fine-tuning run" if len(trained) == 1 else f"{len(trained)} fine-tuning runs"
    spread = f"{runs} of {' to '.join(dict.fromkeys([shown[0], shown[-1]]))}, {at_once} at a time"
    sizes = list(dict.fromkeys(f"{found:,.0f}" for found in sorted(found.all for found in known)))
    counted = f"{' to '.join(dict.fromkeys([sizes[0], sizes[-1]]))} cells a task ({known[0].basis})"
    return [
        f"  time       about {_duration(total)} (estimate) on {where}: {spread}",
        *lines,
        f"             counted: {counted}, each of {length:,} tokens, the most that it can have",
    ]


def run_seconds(runs: list[Study], cells: dict[str, Cells], speeds: dict[int, Speed]) -> list[float]:
    """Estimate the seconds of each run: its operations over those per second, which depend on the batch size."""
    flops = {name: throughput.cell_flops(run) for name, run in {run.strategy: run for run in runs}.items()}
    each = []
    for run in runs:
        work, (training, predicting) = work_of(run, cells[paths.part_name(run)]), flops[run.strategy]
        speed = speeds.get(run.batch_size, next(iter(speeds.values())))
        each.append((work.trained * training + work.predicted * predicting) / speed.flops_per_second)
    return each


def _measured_line(speed: Speed) -> str:
    size = f"{speed.batch} {'cell' if speed.batch == 1 else 'cells'} x {speed.length:,} tokens"
    steps = "1 training step" if speed.steps == 1 else f"{speed.steps} training steps"
    line = f"             measured: {speed.cells_per_second:.3g} cells/s in {steps} of {size}, random weights"
    return line if speed.is_whole else f"{line} (a whole batch would take too long)"


def _duration(seconds: float) -> str:
    """Return a time as a person says it."""
    for unit, size in {"days": 86400, "hours": 3600, "minutes": 60}.items():
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"


if __name__ == "__main__":
    sys.exit(main())
