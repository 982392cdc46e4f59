"""The results of a study: collected from its runs, read by whatever shows them, published when a maintainer wants that.

In: what the jobs left in ``runs/<study>``. Out: five files in ``runs/<study>/results`` (runs.csv, predictions.parquet,
history.parquet, answer.json, study.yaml), and copies of them in ``results/<study>`` after `publish`.
"""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tuneformer import paths
from tuneformer.artifacts import UserError, atomic_path, read_json, write_json, write_text
from tuneformer.evaluate import compare
from tuneformer.evaluate.resampling import weighted_scores
from tuneformer.evaluate.runs import finished_runs, history_of, predictions_of
from tuneformer.report import readme
from tuneformer.study import Study, TaskKeys, jobs, load_study

FILES = ("runs.csv", "predictions.parquet", "history.parquet", "answer.json", "study.yaml")
PLACE = ["task", "arm", "seed", "fold"]
PREDICTED = ["cell", "label", "predicted"]
EPOCH = [
    "epoch",
    "train_loss",
    "train_macro_f1",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    "seconds",
]
PACKAGES = ("tuneformer", "torch", "transformers", "peft", "anndata", "datasets", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True)
class Results:
    """What was found: the study (its first task and arm), the tables of its runs, and the answer.

    ``runs``: one row per run, with those that failed; ``predictions``: one row per run and test cell; ``history``: one
    per run and epoch; ``folder``: where they are.
    """

    settings: Study
    runs: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame
    answer: dict[str, Any]
    folder: Path

    @property
    def judged(self) -> pd.DataFrame:
        """``runs``, with the score as it is judged: in a mean over classes those with few test cells are left out."""
        score, few = self.answer["score"], {task["task"]: task["left_out"] for task in self.answer["tasks"]}
        if not any(few.values()):
            return self.runs
        found = {}
        names = self.predictions.astype({"fold": "Int64", **dict.fromkeys(["task", "arm", "label", "predicted"], str)})
        for place, rows in names.groupby(PLACE, dropna=False):
            classes = pd.Index(np.unique(rows[["label", "predicted"]]))
            true, called = (classes.get_indexer(rows[name]) for name in ("label", "predicted"))
            once = np.ones((1, len(rows)))
            (of_run,) = weighted_scores(true, called[None], once, score, list(classes), few[place[0]])[0]
            found[tuple(map(str, place))] = of_run
        places = self.runs[PLACE].astype({"fold": "Int64"}).astype(str).apply(tuple, axis=1)
        return self.runs.assign(**{score: places.map(found)})

    @property
    def is_of_this_machine(self) -> bool:
        """Whether they were made here, and do not come with the repository."""
        return self.folder.is_relative_to(paths.RUNS)


def collect(study: str) -> Results:
    """Collect the finished runs of a study into ``runs/<study>/results``, and compute its answer.

    A run counts if it was made with what it depends on now. The files are replaced together, or not at all. A study of
    genes or of compression is one notebook, which has written its results with `write`.

    Raises
    ------
    UserError
        No run has finished, or the study cannot be used.
    """
    settings = load_study(study)
    if settings.kind != "cells":
        return read(study)
    asked = [run for job in jobs(study) for run in job.runs()]
    finished = [run for job in jobs(study) for run in finished_runs(job)]
    if not finished:
        msg = (
            f"Study {study} has no finished run in {paths.shown(paths.RUNS / study)}; run `make report STUDY={study}`."
        )
        raise UserError(msg)
    runs = pd.DataFrame([read_json(paths.run_dir(run) / "row.json") for run in finished])
    scored = [run for run, status in zip(finished, runs["status"], strict=True) if status == "ok"]
    history = [history_of(run).filter([*PLACE, *EPOCH]) for run in finished]
    write(settings, runs, [predictions_of(run) for run in scored], history)
    print(f"{study}: {len(runs)} of {len(asked)} runs, {(runs['status'] != 'ok').sum()} failed")
    return read(study)


def write(
    settings: Study,
    runs: pd.DataFrame,
    predictions: Sequence[pd.DataFrame],
    history: Sequence[pd.DataFrame],
    answer: dict[str, Any] | None = None,
) -> Path:
    """Write the five files of a study's results, all of them or none; return their folder.

    Parameters
    ----------
    predictions, history
        Tables to put below each other. Of the probabilities of all classes the highest is kept.
    answer
        None computes it with `tuneformer.evaluate.compare.answer`.
    """
    folder = paths.RUNS / settings.study / "results"
    whole = _together(predictions, [*PREDICTED, "probability"])
    with atomic_path(folder) as partial:
        partial.mkdir()
        runs.to_csv(partial / "runs.csv", index=False, lineterminator="\n")
        whole.to_parquet(partial / "predictions.parquet", index=False, compression="zstd")
        _together(history, EPOCH).to_parquet(partial / "history.parquet", index=False, compression="zstd")
        write_json(partial / "answer.json", compare.answer(settings, runs, whole) if answer is None else answer)
        write_text(partial / "study.yaml", yaml.safe_dump(_resolved(settings), sort_keys=False, width=120))
    return folder


def read(study: str) -> Results:
    """Read the results of a study: those made here, or else those of the repository.

    Raises
    ------
    UserError
        There are none, a file is missing or cannot be read, or the study cannot be used.
    """
    settings = load_study(study)
    folder = paths.results_dir(study)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        where = paths.shown(folder / missing[0])
        msg = f"{where} does not exist; run `make report STUDY={study}`, which collects the runs of the study into it."
        raise UserError(msg)
    try:
        runs = pd.read_csv(folder / "runs.csv", dtype={"key": str, "fold": "Int64"}, float_precision="round_trip")
        predictions = pd.read_parquet(folder / "predictions.parquet")
        history = pd.read_parquet(folder / "history.parquet")
        lacking = {*PLACE, "status", "key"} - {*runs}
    except (OSError, ValueError) as error:
        msg = f"The results in {paths.shown(folder)} cannot be read ({error}); run `make report STUDY={study}`."
        raise UserError(msg) from error
    if lacking or runs.empty:
        what = f"lacks the columns {', '.join(sorted(lacking))}" if lacking else "has no row"
        msg = f"{paths.shown(folder / 'runs.csv')} {what}; collect it again: `make report STUDY={study}`."
        raise UserError(msg)
    return Results(settings, runs, predictions, history, read_json(folder / "answer.json"), folder)


def publish(study: str) -> list[str]:
    """Copy the results of a study and its pictures into the repository, and write its numbers into ``README.md``.

    Returns
    -------
    What was written, as messages show it.

    Raises
    ------
    UserError
        The study has no results that were made here.
    """
    results = read(study)
    if not results.is_of_this_machine:
        msg = (
            f"Study {study} was not run here, so it has nothing new to publish; run `make report STUDY={study}` first."
        )
        raise UserError(msg)
    with atomic_path(paths.RESULTS / study) as partial:
        partial.mkdir()
        for name in FILES:
            shutil.copyfile(results.folder / name, partial / name)
    with atomic_path(paths.FIGURES / study) as partial:
        partial.mkdir()
        for picture in sorted((paths.RUNS / study / "figures").glob("*.png")):
            shutil.copyfile(picture, partial / picture.name)
    written = [paths.RESULTS / study, paths.FIGURES / study]
    page = paths.ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    new = readme.with_numbers(text, results.answer, results.runs)
    if new != text:
        write_text(page, new)
        written.append(page)
    return list(map(paths.shown, written))


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect or publish the results of a study; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.results", description=main.__doc__)
    parser.add_argument("action", choices=["collect", "publish"])
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    given = parser.parse_args(arguments)
    try:
        if given.action == "collect":
            _refuse_outdated(collect(given.study))
        else:
            print(*publish(given.study), sep="\n")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _refuse_outdated(found: Results) -> None:
    """Raise a `UserError` if runs are missing: a batch that has ended has them all, unless code or inputs changed."""
    asked = [run for job in jobs(found.settings.study) for run in job.runs()]
    if found.settings.kind == "cells" and len(found.runs) < len(asked):
        study = found.settings.study
        msg = (
            f"{study}: {len(asked) - len(found.runs)} of {len(asked)} runs are missing, or were made of other inputs "
            f"or by other code; run `.venv/bin/snakemake --cores all --config study={study} --forcerun job`."
        )
        raise UserError(msg)


def _together(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Put tables below each other, with names as categories; where there are none, an empty one with these columns."""
    parts = [part for part in parts if len(part)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*PLACE, *columns])
    wide = table.filter(like="probability:")
    if wide.shape[1]:
        highest = wide.max(axis=1).round(3).astype("float32")
        table = table.drop(columns=wide.columns).assign(probability=highest)
    names = table.columns.intersection(["task", "arm", "cell", "label", "predicted", "group"])
    table = table[[*PLACE, *table.columns.drop(PLACE)]]
    return table.astype({**dict.fromkeys(names, "category"), "seed": "int64", "fold": "Int64"})


def _resolved(settings: Study) -> dict[str, Any]:
    """Return every key of a study and of its tasks, and what it was run with."""
    tasks = {task: load_study(settings.study, task=task).keys(TaskKeys) for task in settings.tasks}
    own = settings.model_dump(mode="json", exclude={"task", "arm", "seed", "fold", *TaskKeys.model_fields})
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**own, "tasks": tasks, "versions": {"python": platform.python_version(), **versions}, "git": _git_state()}


def _git_state() -> dict[str, Any]:
    """Return the commit and whether files differ from it; None for both outside a git checkout."""
    command = ["git", "-C", str(paths.ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


if __name__ == "__main__":
    sys.exit(main())
