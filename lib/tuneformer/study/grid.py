"""From a study to its runs: every task x train set x strategy or baseline x seed x fold.

In: the name of a study, or of a batch of several. Out: the resolved settings of each run; as a command, one line a
study that counts them.
"""

import argparse
import sys
from itertools import groupby

from tuneformer.study import paths
from tuneformer.study.params import ParameterError, Study, load_study

AXES = {"tasks": "task", "train_sets": "train_set", "strategies": "strategy", "seeds": "seed"}
"""Keys of a study that span its grid, and the key that each sets in a run."""
MAIN = "demo"
DEFAULT, ALL = "default", "all"  # names of batches, so of no study


def runs(study: str) -> list[Study]:
    """List the runs of a study, task by task, in the order of its params file; baselines are runs like strategies.

    Parameters
    ----------
    study
        Name of a file in ``params/``, without ``.yaml``.

    Returns
    -------
    The settings of each run.

    Raises
    ------
    ParameterError
        The study cannot be used, or a side of its grid is empty or names a value twice.
    """
    first = load_study(study)
    for key in AXES:
        values = getattr(first, key)
        if not values:
            msg = f"params/{study}.yaml: {key} is empty, so the study has no runs; name at least one."
            raise ParameterError(msg)
    for key in (*AXES, "baselines"):
        values = getattr(first, key)
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            msg = f"params/{study}.yaml: {key} names {repeated[0]!r} more than once; keep one."
            raise ParameterError(msg)
    return [
        settings.model_copy(update={"train_set": train_set, "seed": seed, "fold": fold})
        for plain in (load_study(study, task=task, strategy=first.base_strategy) for task in first.tasks)
        for fold in (range(first.folds) if first.folds else [None])
        for train_set in first.train_sets
        for settings in map(plain.treated, (*first.strategies, *first.baselines))
        for seed in first.seeds
    ]


def batch(name: str) -> list[Study]:
    """List the runs of a batch.

    Parameters
    ----------
    name
        ``default``: all runs of `MAIN`, and of each study with ``quick_train_sets`` those train sets with its first
        task and seed. ``all``: all runs of `MAIN` and of the other demo studies. Else the name of a study.

    Returns
    -------
    The settings of each run, those of `MAIN` first.

    Raises
    ------
    ParameterError
        A study cannot be used, or ``quick_train_sets`` names one that is not in its grid.
    """
    if name not in (DEFAULT, ALL):
        return runs(name)
    listed = runs(MAIN)
    for study in sorted(path.stem for path in paths.PARAMS.glob("[!_]*.yaml")):
        if study == MAIN:
            continue
        settings = load_study(study)
        if name == DEFAULT and settings.quick_train_sets:
            listed += quick_runs(study)
        if name == ALL and study.startswith(f"{MAIN}_") and settings.pretrain_output is None:
            listed += runs(study)
    return listed


def quick_runs(study: str) -> list[Study]:
    """List the runs of a study that the default batch makes again: its ``quick_train_sets``, first task, first seed.

    Raises
    ------
    ParameterError
        As `runs`, or a quick train set is not in the grid.
    """
    listed = runs(study)
    first = listed[0]
    for name in first.quick_train_sets:
        if name not in first.train_sets:
            msg = f"params/{study}.yaml: quick_train_sets names {name!r}, which is not one of its train_sets."
            raise ParameterError(msg)
    asked = (first.tasks[0], first.seeds[0])
    return [run for run in listed if run.train_set in first.quick_train_sets and (run.task, run.seed) == asked]


def describe(run: Study) -> str:
    """Return the name of a run as progress lines show it."""
    fold = "" if run.fold is None else f" fold {run.fold}"
    return f"{run.task}{fold} {run.train_set} {run.strategy} seed {run.seed}"


def main(arguments: list[str] | None = None) -> int:
    """Print the size of each study of a batch; end with 2 and one sentence when one cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.study.grid", description=main.__doc__)
    parser.add_argument("batch", help=f"name of a file in params/, without .yaml; or {DEFAULT}, or {ALL}")
    name = parser.parse_args(arguments).batch
    try:
        listed = batch(name)
        for study, own in groupby(listed, key=lambda run: run.study):
            own = list(own)
            is_grid = own[0].kind == "cells"
            print(_size(runs(study), len(own)) if is_grid else f"Study {study}: one notebook on {own[0].kind}")
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _size(listed: list[Study], asked: int) -> str:
    """Say how the grid of a study spans its runs, and how many of them are asked for."""
    first = listed[0]
    counts = {key: len(getattr(first, key)) for key in (*AXES, "baselines")}
    sides = {key: f"{n} {key if n > 1 else _ONE[key]}".replace("_", " ") for key, n in counts.items() if n}
    baselines = sides.pop("baselines", None)
    if baselines:
        sides["strategies"] = f"({sides['strategies']} + {baselines})"
    if first.folds:
        sides["folds"] = f"{first.folds} folds"
    whole = f"Study {first.study}: {' x '.join(sides.values())} = {len(listed)} run{'s' if len(listed) > 1 else ''}"
    return whole if asked == len(listed) else f"{whole}, {asked} of them in this batch"


_ONE = AXES | {"baselines": "baseline"}

if __name__ == "__main__":
    sys.exit(main())
