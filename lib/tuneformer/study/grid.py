"""From a study to its runs: every task x train set x strategy x seed.

In: the name of a study. Out: the resolved settings of each of its runs; as a command, one line that counts them.
"""

import argparse
import sys

from tuneformer.study.params import ParameterError, Study, load_study

AXES = {"tasks": "task", "train_sets": "train_set", "strategies": "strategy", "seeds": "seed"}
"""Keys of a study that span its grid, and the key that each sets in a run."""


def runs(study: str) -> list[Study]:
    """List the runs of a study, task by task, in the order of its params file.

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
        repeated = [value for value in values if values.count(value) > 1]
        if repeated:
            msg = f"params/{study}.yaml: {key} names {repeated[0]!r} more than once; keep one."
            raise ParameterError(msg)
    return [
        settings.model_copy(update={"train_set": train_set, "strategy": strategy, "seed": seed})
        for settings in (load_study(study, task=task) for task in first.tasks)
        for train_set in first.train_sets
        for strategy in first.strategies
        for seed in first.seeds
    ]


def describe(run: Study) -> str:
    """Return the name of a run as progress lines show it."""
    return f"{run.task} {run.train_set} {run.strategy} seed {run.seed}"


def main(arguments: list[str] | None = None) -> int:
    """Print the size of a study's grid; end with 2 and one sentence when the study cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.study.grid", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    name = parser.parse_args(arguments).study
    try:
        listed = runs(name)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    sides = " x ".join(f"{len(getattr(listed[0], key))} {key.replace('_', ' ')}" for key in AXES)
    print(f"Study {name}: {sides} = {len(listed)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
