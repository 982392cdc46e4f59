"""One run, and one job: all seeds and folds of one arm of one task.

In: the settings of a run. Out: its row of ``runs.csv`` and, in its folder, ``row.json``, ``predictions.parquet`` and
``history.csv``; a run that is finished is never made again. Of each arm the model of the best seed is kept.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tuneformer import paths
from tuneformer.artifacts import atomic_path, key, made, read_json, stored_key, write_json
from tuneformer.data import bulk, fetch, qc
from tuneformer.study import Study, TrainingKeys
from tuneformer.tokens import encode
from tuneformer.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tuneformer.model.fit import Outcome

VERSION = "run.1"
CHOSEN = ("train_loss", "train_macro_f1", "validation_loss", "validation_macro_f1")
"""Scores of the epoch whose weights were kept, beside those of the test cells."""
COST_FREE = ("device", "threads")  # they change what a run costs, and its numbers only by rounding


def run_key(settings: Study) -> str:
    """Return the key of everything that one run depends on: parameters, seed, cells, split, tokens and weights."""
    parameters = {name: value for name, value in settings.keys(TrainingKeys).items() if name not in COST_FREE}
    reads_bulk = settings.train_set == "bulk" or settings.means == "bulk"
    inputs = [qc.cells_key(settings), encode.tokens_key(settings), fetch.checkpoint_key(settings.checkpoint)]
    inputs += [bulk.source_hash(settings)] if reads_bulk else []
    return key(VERSION, parameters, settings.seed, settings.fold, *inputs)


def run(settings: Study) -> dict[str, Any]:
    """Make one run: prepare its cells, refuse leaks, train or fit, and score the test cells once.

    Returns
    -------
    The row of ``runs.csv``. A run that diverged or lacked memory is a row too, with another status than ``ok``.

    Raises
    ------
    UserError
        The study, its cells or its checkpoint cannot be used.
    """
    folder = made(paths.run_dir(settings), run_key(settings), lambda partial: _make(settings, partial))
    _keep_best_model(settings, folder)
    return read_json(folder / "row.json")


def run_job(settings: Study) -> pd.DataFrame:
    """Make all runs of one arm and task, seed by seed; return one row per run.

    Each run is kept as soon as it ends, so that a job that was killed goes on where it stopped.
    """
    rows, asked = [], settings.runs()
    for number, one in enumerate(asked, start=1):
        start, is_new = time.perf_counter(), stored_key(paths.run_dir(one)) != run_key(one)
        rows.append(run(one))
        if is_new:
            judged = f"macro-F1 {rows[-1]['macro_f1']:.3f}" if rows[-1]["status"] == "ok" else rows[-1]["status"]
            line = f"[{number}/{len(asked)}] {one.describe()}: {judged}, {time.perf_counter() - start:.1f} s"
            print(line, file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def finish_job(settings: Study, rows: pd.DataFrame) -> Path:
    """Write the rows of a job, whole or not at all; return the file."""
    with atomic_path(paths.job_table(settings)) as partial:
        rows.to_csv(partial, index=False)
    return paths.job_table(settings)


def finished_job(settings: Study) -> pd.DataFrame | None:
    """Return the rows of a job if it is finished and nothing that it depends on has changed."""
    path = paths.job_table(settings)
    if not path.is_file():
        return None
    rows = pd.read_csv(path, dtype={"key": str})
    return rows if list(rows["key"]) == [run_key(one) for one in settings.runs()] else None


def finished_runs(settings: Study) -> list[Study]:
    """Return the runs of a job that are finished, and were made of what they depend on now."""
    return [one for one in settings.runs() if stored_key(paths.run_dir(one)) == run_key(one)]


def read_predictions(settings: Study) -> pd.DataFrame:
    """Read what the finished runs of a job predicted: task, arm, seed, fold, cell, label, predicted, probabilities."""
    return _below_each_other([predictions_of(one) for one in finished_runs(settings)], ["label", "predicted"])


def read_histories(settings: Study) -> pd.DataFrame:
    """Read the training history of the finished runs of a job: task, arm, seed, fold, and one row per epoch."""
    return _below_each_other([history_of(one) for one in finished_runs(settings)], ["epoch"])


def predictions_of(run: Study) -> pd.DataFrame:
    """Read what a finished run predicted for its test cells; no rows if it failed."""
    return pd.read_parquet(paths.run_dir(run) / "predictions.parquet").assign(**_place(run))


def history_of(run: Study) -> pd.DataFrame:
    """Read the epochs of a finished run; one that failed in its first epoch has none."""
    path = paths.run_dir(run) / "history.csv"
    table = pd.read_csv(path) if path.stat().st_size > 1 else pd.DataFrame(columns=["epoch"])
    return table.assign(**_place(run))


def _place(run: Study) -> dict[str, Any]:
    return {"task": run.task, "arm": run.arm, "seed": run.seed, "fold": run.fold}


def _below_each_other(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Join tables of runs; if there is no row, return an empty one with these columns and those of the run."""
    parts = [part for part in parts if len(part)]
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["task", "arm", "seed", "fold", *columns])
    )


def _make(settings: Study, folder: Path) -> None:
    """Make a run in an empty folder."""
    from tuneformer.cells import make
    from tuneformer.evaluate import leakage

    prepared, frozen = make.prepare(settings), paths.frozen_dir(settings)
    leakage.refuse_leaks(prepared, settings)
    if settings.is_baseline:
        from tuneformer.model import baselines

        outcome = baselines.fit(settings, prepared, frozen)
    else:
        from tuneformer.model import fit

        outcome = fit.fit_cells(settings, prepared.tokens, frozen)
    leakage.refuse_unfair(outcome, prepared, settings)
    outcome.predictions.to_parquet(folder / "predictions.parquet", index=False)
    outcome.history.to_csv(folder / "history.csv", index=False)
    row = row_of(settings, outcome) | {"known_genes": known_genes(settings, prepared.tokens.vocabulary)}
    write_json(folder / "row.json", row)
    if outcome.model is not None:
        from tuneformer.model import classifier

        card = {name: row[name] for name in ("study", "task", "arm", "seed", "fold", "n_train", "validation_loss")}
        of_arm = settings.at(seed=0, fold=0 if settings.folds else None)  # its key is the same for each seed and fold
        card |= {"simulated": settings.simulated, "job": run_key(of_arm)}
        classifier.save(folder / "model", outcome.model, prepared.tokens.vocabulary, outcome.classes, card)


def row_of(settings: Study, outcome: "Outcome") -> dict[str, Any]:
    """Return the row of ``runs.csv`` of one run; what is not known is None."""
    from tuneformer.evaluate import scores

    row: dict[str, Any] = {"study": settings.study, "task": settings.task, "arm": settings.arm}
    row |= settings.arm_keys() | {"seed": settings.seed, "fold": settings.fold}
    for name in ("status", "reason", "n_train", "n_validation", "n_test", "best_epoch", "chosen_by"):
        row[name] = getattr(outcome, name)
    kept = outcome.history[outcome.history["epoch"] == outcome.best_epoch] if len(outcome.history) else outcome.history
    for name in CHOSEN:
        row[name] = float(kept[name].iloc[-1]) if name in kept and len(kept) else None
    if outcome.status == "ok":
        labels, predicted = outcome.predictions["label"], outcome.predictions["predicted"]
        row["constant"] = bool(predicted.nunique() == 1 and labels.nunique() > 1)
        options = {"ordered": settings.ordered, "groups": settings.groups}
        row |= scores.score(labels, outcome.probabilities, outcome.classes, **options)
    row |= outcome.cost | {"key": run_key(settings)}
    return {name: None if value != value else value for name, value in row.items()}  # NaN is not JSON


def known_genes(settings: Study, vocabulary: Vocabulary) -> float | None:
    """Return the share of the genes of a run of which the checkpoint has embeddings; None for what reads none."""
    if settings.is_control or (settings.is_baseline and not settings.strategy.startswith("frozen")):
        return None
    published = Vocabulary.read(fetch.checkpoint_dir(settings.checkpoint)).genes["ensembl_id"]
    return float(vocabulary.genes["ensembl_id"].isin(published).mean())


def _keep_best_model(settings: Study, folder: Path) -> None:
    """Move the model of a run to the folder of its arm if it is the best on validation cells so far; else delete it."""
    from filelock import FileLock

    if not (folder / "model" / "model.json").is_file():
        return
    kept = paths.arm_dir(settings) / "model"
    with FileLock(kept.with_name(".model.lock")):
        new = read_json(folder / "model" / "model.json")
        old = read_json(kept / "model.json") if (kept / "model.json").is_file() else {}
        is_same_job = old.get("job") == new["job"]
        losses = [card.get("validation_loss") for card in (new, old)]  # None without validation: the first stays
        if not is_same_job or (None not in losses and losses[0] < losses[1]):
            with atomic_path(kept) as partial:
                shutil.copytree(folder / "model", partial)
        shutil.rmtree(folder / "model")
