"""Where the repository keeps its files.

In: the settings of a run. Out: paths below the root of the repository; nothing is read or written here.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tuneformer.artifacts import UserError, key
from tuneformer.keys import TokensKeys

if TYPE_CHECKING:
    from tuneformer.study import Study


def _find_root() -> Path:
    """Return the folder that holds ``params/_base.yaml``: beside the package, or above the working directory."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents):
        if (folder / "params" / "_base.yaml").is_file():
            return folder
    msg = (
        f"No params/_base.yaml beside the package or above {Path.cwd()}: tuneformer works inside a clone of its "
        "repository; clone it and install it with `pip install -e .`."
    )
    raise UserError(msg)


ROOT = _find_root()
PARAMS = ROOT / "params"
NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
RUNS = Path(os.environ.get("TUNEFORMER_RUNS", ROOT / "runs"))
DOWNLOADS = Path(os.environ.get("TUNEFORMER_DOWNLOADS", ROOT / "data"))
SITE = Path(os.environ.get("TUNEFORMER_SITE", ROOT / "site"))
TOKEN_KEYS = ("checkpoint", "vocabulary", "max_length")
ASSETS = Path(__file__).resolve().parent / "assets"


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the repository when it lies in it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def user_path(written: str) -> Path:
    """Return a path that a user wrote into a study: $VARIABLES and ~ expanded; if relative, below the repository."""
    return ROOT / Path(os.path.expandvars(written)).expanduser()


def is_token_folder(path: Path) -> bool:
    """Return whether a path is the folder of a data set that ``datasets.save_to_disk`` wrote."""
    return all((Path(path) / name).is_file() for name in ("state.json", "dataset_info.json"))


def is_tokenized(settings: "Study") -> bool:
    """Return whether the cells of a study are tokens already, so that there is nothing for 02_tokenize to do."""
    if settings.dataset == "own":
        return is_token_folder(user_path(settings.path))
    return settings.dataset == "cardiomyopathy"


def task_dir(settings: "Study") -> Path:
    """Return the working folder of one task: ``runs/<study>/<task>``."""
    return RUNS / settings.study / settings.task


def cells_dir(settings: "Study") -> Path:
    """Return the folder of the quality-controlled cells of a task, which all its folds share."""
    return task_dir(settings) / "cells"


def tokens_dir(settings: "Study") -> Path:
    """Return the folder of the tokens of all cells of a task.

    With fitted medians each fold has its own, and so has an arm with a checkpoint, vocabulary or length of its own.
    """
    own = {name: value for name, value in (settings.arms[settings.arm] or {}).items() if name in TOKEN_KEYS}
    fold = f"_fold{settings.fold}" if settings.vocabulary == "fit" and settings.fold is not None else ""
    return task_dir(settings) / f"tokens{fold}{f'_{key(own)[:8]}' if own else ''}"


def by_rows_dir(settings: "Study") -> Path:
    """Return the folder of the counts of a task's source, by rows, where they are stored by columns."""
    return task_dir(settings) / "by_rows"


def frozen_dir(settings: "Study") -> Path:
    """Return the folder of what frozen layers make of the cells of a task."""
    return task_dir(settings) / "frozen"


def made_dir(settings: "Study") -> Path:
    """Return the folder of the made cells of one run, which all arms with the same keys for it share."""
    number = key(settings.keys(TokensKeys), settings.seed, settings.fold)
    return task_dir(settings) / "made" / f"{settings.train_set}_{number[:8]}"


def arm_dir(settings: "Study") -> Path:
    """Return the folder of one arm of a task: what its job leaves."""
    return task_dir(settings) / settings.arm


def run_dir(settings: "Study") -> Path:
    """Return the folder of one run: one seed (and fold) of an arm."""
    fold = "" if settings.fold is None else f"_fold{settings.fold}"
    return arm_dir(settings) / f"seed{settings.seed}{fold}"


def part_name(settings: "Study") -> str:
    """Return the name of a job: the seeds that it runs, such as ``seeds0-4``, or ``seeds0_3`` with gaps."""
    seeds = settings.seeds
    in_a_row = len(seeds) > 1 and list(range(seeds[0], seeds[-1] + 1)) == seeds
    return f"seeds{seeds[0]}-{seeds[-1]}" if in_a_row else "seeds" + "_".join(map(str, seeds))


def executed_path(notebook: str, settings: "Study") -> Path:
    """Return where the executed copy of a notebook goes: beside the things that it wrote."""
    if notebook.startswith("05"):
        return arm_dir(settings) / f"{part_name(settings)}.ipynb"
    folder = RUNS / settings.study if notebook[:2] in ("00", "06") else task_dir(settings)
    return folder / f"{notebook}.ipynb"


def job_table(settings: "Study") -> Path:
    """Return the table that a job writes last: it alone proves that the job is finished."""
    return executed_path("05", settings).with_suffix(".csv")


def results_dir(study: str) -> Path:
    """Return the folder of the results of a study: of a batch that ran here, or else as committed."""
    here = RUNS / study / "results"
    return here if (here / "answer.json").is_file() else RESULTS / study
