"""Where the repository keeps its files, and how a file is written whole or not at all.

In: a resolved study. Out: paths below the repository root, and atomic writes (temporary file, fsync, rename).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuneformer.study.params import Study


def _find_root() -> Path:
    """Return the folder that holds ``params/_base.yaml``: beside the package, or above the working directory."""
    candidates = [Path(__file__).resolve().parents[3], Path.cwd(), *Path.cwd().parents]
    for folder in candidates:
        if (folder / "params" / "_base.yaml").is_file():
            return folder
    msg = (
        f"No params/_base.yaml beside the package or above {Path.cwd()}: tuneformer works inside a clone of its "
        "repository; clone it and install it with `pip install -e .`."
    )
    raise FileNotFoundError(msg)


ROOT = _find_root()
PARAMS = ROOT / "params"
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
RUNS = Path(os.environ.get("TUNEFORMER_RUNS", ROOT / "runs"))
DOWNLOADS = Path(os.environ.get("TUNEFORMER_DOWNLOADS", ROOT / "data"))
SITE = ROOT / "site"
ASSETS = Path(__file__).resolve().parents[1] / "assets"
PUBLISHED = ("Geneformer-V1-10M", "Geneformer-V2-104M", "Geneformer-V2-316M")
"""Checkpoints that are downloaded; their files are listed in `tuneformer.data.checkpoint_files`."""


def task_dir(settings: "Study") -> Path:
    """Return the working folder of one task, or of one fold of it: ``runs/<study>/<task>[/fold<f>]``."""
    return RUNS / settings.study / part_name(settings)


def part_name(settings: "Study") -> str:
    """Return the name of what has a split of its own: the task, or ``<task>/fold<f>`` in a cross-validation."""
    return settings.task if settings.fold is None else f"{settings.task}/fold{settings.fold}"


def cells_path(settings: "Study") -> Path:
    """Return the file of quality-controlled, split cells that 01_qc writes."""
    return task_dir(settings) / "cells.h5ad"


def train_set_dir(settings: "Study") -> Path:
    """Return the folder of one train set: its tokens and the runs trained on it."""
    return task_dir(settings) / settings.train_set


def is_made(settings: "Study") -> bool:
    """Return whether a run's train set is made of its cells, anew for each seed, and is not the cells themselves."""
    return settings.train_set != "single_cell"


def tokens_path(settings: "Study") -> Path:
    """Return the folder of a run's tokens (``datasets.save_to_disk`` format); of made cells, one for each seed."""
    return train_set_dir(settings) / (f"tokens_seed{settings.seed}" if is_made(settings) else "tokens")


def run_dir(settings: "Study") -> Path:
    """Return the folder of one fine-tuning run: its record, predictions and executed notebook."""
    return train_set_dir(settings) / settings.strategy / f"seed{settings.seed}"


def user_path(written: str) -> Path:
    """Return a path that a user wrote into a study: $VARIABLES and ~ expanded; if relative, below the repository."""
    return ROOT / Path(os.path.expandvars(written)).expanduser()


def checkpoint_dir(name: str) -> Path:
    """Return the folder of a checkpoint.

    ``demo`` lies in the package, a published one (see `PUBLISHED`) where downloads go; any other name is a path (see
    `user_path`).
    """
    if name in PUBLISHED:
        return DOWNLOADS / name
    return ASSETS / "demo_checkpoint" if name == "demo" else user_path(name)


def is_token_folder(path: Path) -> bool:
    """Return whether a path is the folder of a data set that ``datasets.save_to_disk`` wrote."""
    return all((Path(path) / name).is_file() for name in ("state.json", "dataset_info.json"))


def is_tokenized(settings: "Study") -> bool:
    """Return whether the cells of a study are tokens already, so that there is nothing for 02_tokenize to do."""
    if settings.dataset == "own":
        return is_token_folder(user_path(settings.path))
    return settings.dataset == "cardiomyopathy"


def results_dir(study: str) -> Path:
    """Return the committed results of a study: ``metrics.csv`` and ``records/``."""
    return RESULTS / study


def figures_dir(study: str) -> Path:
    """Return the committed figures of a study."""
    return FIGURES / study


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the repository when it lies in it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; move it onto `target` when the block ends without an error.

    Works for a file or a folder. A reader sees the old thing or the new one, never half of either; after an error the
    temporary path is removed and `target` is as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    partial = scratch / target.name
    try:
        yield partial
        _flush_to_disk(partial)
        if partial.is_dir() and target.exists():
            target.rename(scratch / "replaced")
        partial.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` atomically, as UTF-8."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def _flush_to_disk(path: Path) -> None:
    """Force `path` (a file, or every file of a folder) out of the system's buffers."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
