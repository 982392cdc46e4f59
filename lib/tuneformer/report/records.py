"""Records of runs, and the results of a study collected from them.

In: the outcome and the scores of a run. Out: ``record.json`` in the run's folder, written last, so that it alone proves
a finished run; and per study ``results/<study>/metrics.csv`` with the records beside it.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tuneformer.data import catalog, preprocessing
from tuneformer.data.readers import CellsError
from tuneformer.evaluate import cross_validation, statistics
from tuneformer.study import grid, paths
from tuneformer.study.params import ParameterError, Study, TrainingParams, read_yaml
from tuneformer.study.run import checkpoint_hash, fingerprint, finished_record

if TYPE_CHECKING:
    from tuneformer.finetune.training import Outcome

COLUMNS = (
    "study",
    "dataset",
    "task",
    "train_set",
    "strategy",
    "seed",
    "fold",
    "metric",
    "value",
    "n_train",
    "n_test",
    "fingerprint",
)
ARM = ["task", "train_set", "strategy"]
PACKAGES = ("tuneformer", "torch", "transformers", "peft", "anndata", "datasets", "numpy", "pandas", "scikit-learn")


class RecordError(ValueError):
    """A record or a table of results that is missing or cannot be used; the message says what to do."""


def write_record(settings: Study, outcome: "Outcome", scores: pd.DataFrame) -> Path:
    """Write the record of a run, which declares the run finished.

    Parameters
    ----------
    settings
        The run.
    outcome
        What training left, from `tuneformer.finetune.training.finetune`.
    scores
        Columns metric and value, from `tuneformer.evaluate.metrics.score_run`; empty for a run that failed.

    Returns
    -------
    ``record.json`` in the run's folder. Missing numbers are null there.

    Raises
    ------
    RecordError
        A run with status ok that has no scores, or a failed one that has some.
    """
    is_ok = outcome.status == "ok"
    if is_ok == scores.empty:
        need = "needs scores" if is_ok else "cannot have scores"
        msg = f"The run {grid.describe(settings)} has status {outcome.status}, so its record {need}."
        raise RecordError(msg)
    record = {
        "study": settings.study,
        "run": grid.describe(settings),
        "dataset": settings.dataset,
        "simulated": settings.simulated,
        "task": settings.task,
        "train_set": settings.train_set,
        "strategy": settings.strategy,
        "seed": settings.seed,
        "fold": settings.fold,
        "inputs": inputs_of(settings),
        "status": outcome.status,
        "reason": outcome.reason,
        "fingerprint": outcome.fingerprint,
        "n_train": outcome.n_train,
        "n_validation": outcome.n_validation,
        "n_test": outcome.n_test,
        "best_epoch": outcome.best_epoch,
        "metrics": dict(zip(scores["metric"], scores["value"], strict=True)),
        "cost": outcome.cost,
        "history": outcome.history.to_dict(orient="records"),
        "parameters": settings.model_dump(),
        "versions": _versions(),
        "git": _git_state(),
    }
    target = paths.run_dir(settings) / "record.json"
    paths.write_text(target, json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    return target


def inputs_of(settings: Study) -> dict[str, str]:
    """Return hashes of what a run reads beside its parameters: the source of its cells, and its checkpoint."""
    return {"cells": catalog.source_hash(settings), "checkpoint": checkpoint_hash(settings.checkpoint)}


def read_records(study: str) -> list[dict[str, Any]]:
    """Read the records of the runs of a study's grid, in the order of the grid; see `read_runs`.

    Raises
    ------
    ParameterError
        The study cannot be used.
    """
    return [record for _, record in read_runs(study)]


def read_runs(study: str) -> list[tuple[Study, dict[str, Any]]]:
    """Read the runs of a study's grid that have a record, in the order of the grid, each with its record.

    A run that has finished here is taken from ``runs/``; of the others, the record kept in ``results/<study>/records``
    by an earlier batch, if every parameter that it states and its inputs are still those of the study.

    Raises
    ------
    ParameterError
        The study cannot be used.
    """
    found = []
    for settings in grid.runs(study):
        record = finished_record(settings)
        kept = paths.results_dir(study) / "records" / record_name(settings)
        if record is None and kept.is_file():
            record = json.loads(kept.read_text(encoding="utf-8"))
            record = record if still_holds(record, settings) else None
        if record is not None:
            found.append((settings, record))
    return found


def record_name(settings: Study) -> str:
    """Return the file name of a run's record in ``results/<study>/records``."""
    part = paths.part_name(settings).replace("/", "__")
    return "__".join([part, settings.train_set, settings.strategy, f"seed{settings.seed}.json"])


def still_holds(record: Mapping[str, Any], settings: Study) -> bool:
    """Return whether a record states the parameters that a run has now, and was made of the same cells and weights.

    A parameter that was not there when the record was written has to have its default now.
    """
    now = _plain(settings.section(TrainingParams) | {"folds": settings.folds, "fold": settings.fold})
    stated = _defaults() | record["parameters"]
    same = all(stated[key] == now[key] for key in now.keys() - {"threads", "device"})
    return same and record.get("inputs") == inputs_of(settings)


@functools.cache
def _defaults() -> dict[str, Any]:
    return _plain(read_yaml(paths.PARAMS / "_base.yaml"))


def rows_of(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows that one record gives ``metrics.csv``: scores, then cost, or ``status:<status>`` if it failed."""
    values = dict(record["metrics"])
    if record["status"] != "ok":
        values[f"status:{record['status']}"] = 1.0
    values |= {f"cost:{key}": value for key, value in record["cost"].items() if not isinstance(value, str)}
    rows = pd.DataFrame({"metric": list(values), "value": pd.array(list(values.values()), dtype="Float64")})
    return rows.assign(**{key: record[key] for key in COLUMNS if key not in ("metric", "value")})[list(COLUMNS)]


def collect(study: str) -> pd.DataFrame:
    """Collect the runs of a study's grid (see `read_records`) into ``results/<study>``.

    Returns
    -------
    The rows of ``results/<study>/metrics.csv``. The records are copied to ``results/<study>/records``, and the class
    that each run predicted for each test cell to ``predictions.parquet`` (see `read_predictions`).

    Raises
    ------
    RecordError
        No run has finished.
    ParameterError
        The study cannot be used.
    """
    runs = read_runs(study)
    if not runs:
        msg = (
            f"Study {study} has no finished run in {paths.shown(paths.RUNS / study)}; run `make report STUDY={study}`."
        )
        raise RecordError(msg)
    text = pd.concat([rows_of(record) for _, record in runs]).to_csv(index=False, lineterminator="\n")
    folder = paths.results_dir(study)
    predictions = _collect_predictions(study, {record["fingerprint"] for _, record in runs})
    with paths.atomic_path(folder / "predictions.parquet") as partial:
        predictions.to_parquet(partial, index=False, compression="zstd")
    with paths.atomic_path(folder / "records") as partial:
        partial.mkdir()
        for settings, record in runs:
            (partial / record_name(settings)).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    paths.write_text(folder / "metrics.csv", text)
    metrics = read_metrics(study)
    curves = _collect_curves(study, metrics)
    if len(curves):
        paths.write_text(folder / "roc.csv", curves.to_csv(index=False, lineterminator="\n", float_format="%.5g"))
    return metrics


def read_curves(study: str) -> pd.DataFrame:
    """Read the ROC curves of a cross-validation, ``results/<study>/roc.csv``; no rows if the study has none.

    Returns
    -------
    task, train_set, strategy, runs (hash of the fingerprints of its runs) and the columns of
    `tuneformer.evaluate.cross_validation.roc_curves`, for the best strategy of each task, the first of the study and
    the linear baseline, with the first seed.
    """
    path = paths.results_dir(study) / "roc.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=[*ARM, "runs", "label", "fpr", "tpr", "auc"])


def _collect_curves(study: str, metrics: pd.DataFrame) -> pd.DataFrame:
    """Return what `read_curves` describes: from the probabilities in ``runs/``, else as kept before."""
    runs = grid.runs(study)
    if not runs[0].folds:
        return pd.DataFrame()
    means = metrics[metrics["metric"] == "macro_f1"].groupby(ARM)["value"].mean()
    kept, parts = read_curves(study), []
    for (task, train_set), scores in means.groupby(ARM[:2]):
        strategies = scores.droplevel(ARM[:2])
        tuned = strategies.drop(strategies.index.intersection(runs[0].baselines))
        best = [tuned.idxmax()] if len(tuned) else []
        for strategy in dict.fromkeys([*best, runs[0].strategies[0], statistics.LINEAR]):
            arm = {"task": task, "train_set": train_set, "strategy": strategy}
            sides = {**arm, "seed": runs[0].seeds[0]}
            folds = [run for run in runs if all(getattr(run, key) == value for key, value in sides.items())]
            of_arm = metrics[(metrics[list(sides)] == pd.Series(sides)).all(axis=1)]
            arm["runs"] = fingerprint(sorted(of_arm["fingerprint"].unique()))
            if folds and all(finished_record(run) is not None for run in folds):
                tables = [pd.read_parquet(paths.run_dir(run) / "predictions.parquet") for run in folds]
                parts.append(cross_validation.roc_curves(pd.concat(tables, ignore_index=True)).assign(**arm))
            elif len(kept):
                parts.append(kept[(kept[list(arm)] == pd.Series(arm)).all(axis=1)])
    parts = [part for part in parts if len(part)]
    found = pd.concat(parts, ignore_index=True) if parts else kept
    return found[[*ARM, "runs", *found.columns.difference([*ARM, "runs"], sort=False)]]


def read_metrics(study: str) -> pd.DataFrame:
    """Read ``results/<study>/metrics.csv``.

    Raises
    ------
    RecordError
        The file is missing, empty, or has other columns.
    """
    path = paths.results_dir(study) / "metrics.csv"
    if not path.is_file():
        msg = f"{paths.shown(path)} does not exist; run `make report STUDY={study}`, which collects the runs into it."
        raise RecordError(msg)
    metrics = pd.read_csv(path, dtype={"fingerprint": str, "value": float, "fold": float}, float_precision="round_trip")
    if tuple(metrics.columns) != COLUMNS or metrics.empty:
        needed = f"at least one row, and the columns {', '.join(COLUMNS)}"
        msg = f"{paths.shown(path)} needs {needed}; delete it and run `make report STUDY={study}`."
        raise RecordError(msg)
    return metrics


def read_tuned(study: str) -> pd.DataFrame:
    """Read the metrics of a study's tuned copy (`tuneformer.finetune.tuning`); no rows if it has none with results."""
    tuned = f"{study}_tuned"
    has_results = (paths.results_dir(tuned) / "metrics.csv").is_file()
    return read_metrics(tuned) if has_results else pd.DataFrame(columns=COLUMNS)


def read_predictions(study: str) -> pd.DataFrame:
    """Read the predicted class of each test cell in each run of a study, which paired comparisons need.

    Returns
    -------
    task, train_set, strategy, seed, fingerprint, cell, label, predicted; where a task holds out whole groups, group;
    and in a cross-validation, fold: one row a run and test cell. As each cell is tested in one fold, task, train set,
    strategy and seed name it once.

    Raises
    ------
    RecordError
        The file is missing.
    """
    path = paths.results_dir(study) / "predictions.parquet"
    if not path.is_file():
        msg = f"{paths.shown(path)} does not exist; run `make report STUDY={study}`, which writes it."
        raise RecordError(msg)
    return pd.read_parquet(path)


def _collect_predictions(study: str, fingerprints: set[str]) -> pd.DataFrame:
    """Return the predicted classes of the runs with these fingerprints: from ``runs/``, else as kept before."""
    parts, groups = [], {}
    for settings in grid.runs(study):
        record, table = finished_record(settings), paths.run_dir(settings) / "predictions.parquet"
        if record is None or not table.is_file():
            continue
        scores = pd.read_parquet(table)
        classes = scores.filter(like="probability:")
        names = classes.columns.str.removeprefix("probability:").to_numpy()
        sides = {key: getattr(settings, key) for key in ("task", "train_set", "strategy", "seed")}
        predicted = names[classes.to_numpy().argmax(axis=1)]
        part = scores[["cell", "label"]].assign(predicted=predicted, fingerprint=record["fingerprint"], **sides)
        if settings.fold is not None:
            part["fold"] = settings.fold
        if settings.group_by is not None:
            name = paths.part_name(settings)
            if name not in groups:
                groups[name] = preprocessing.prepare_cells(settings).obs[settings.group_by].astype(str)
            part["group"] = groups[name].loc[part["cell"]].to_numpy()
        parts.append(part)
    kept = paths.results_dir(study) / "predictions.parquet"
    made = {fingerprint for part in parts for fingerprint in part["fingerprint"].unique()}
    if kept.is_file():
        old = pd.read_parquet(kept)
        parts.insert(0, old[old["fingerprint"].isin(fingerprints - made)])
    order = ["task", "train_set", "strategy", "seed", "fingerprint", "cell", "label", "predicted"]
    parts = [part for part in parts if len(part)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=order)
    order += [column for column in ("group", "fold") if column in table]
    return table[order].astype({key: "category" for key in order if key not in ("seed", "fold")})


def main(arguments: list[str] | None = None) -> int:
    """Collect the finished runs of a study; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.records", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    study = parser.parse_args(arguments).study
    try:
        metrics = collect(study)
        asked = len(grid.runs(study))
    except (RecordError, ParameterError, CellsError) as error:
        print(error, file=sys.stderr)
        return 2
    runs, failed = metrics["fingerprint"], metrics["metric"].str.startswith("status:")
    print(f"results/{study}/metrics.csv: {runs.nunique()} of {asked} runs, {runs[failed].nunique()} of them failed")
    return 0


def _plain(value: Any) -> Any:
    """Turn numpy numbers into plain ones and NaN into None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


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
