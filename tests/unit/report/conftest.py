"""A study with results, made here: two tasks, six arms, three seeds; one run failed."""

import numpy as np
import pandas as pd
import pytest

from tuneformer import paths
from tuneformer.artifacts import write_json
from tuneformer.evaluate.telling import recommendations
from tuneformer.report.results import Results
from tuneformer.study import load_study

QUESTION = "Which strategy tells <drugs> & doses apart? (simulated cells)"
STUDY = f"""
question: "{QUESTION}"
tasks: [drugs, doses]
arms:
  full:
  linear_probe:
  random_init:
  logistic_counts:
  pseudobulk_k{{k}}: {{strategy: full, train_set: pseudobulk, k: [2, 10]}}
contrasts:
  pre-training: [random_init, full]
  linear model: [logistic_counts, full]
  pseudo-bulk of {{k}}: [full, "pseudobulk_k{{k}}"]
figure: {{x: k, hue: strategy}}
seeds: [0, 1, 2]
"""
SKILL = {
    "full": 1.6,
    "linear_probe": 1.0,
    "random_init": 0.3,
    "logistic_counts": 2.0,
    "pseudobulk_k2": 1.5,
    "pseudobulk_k10": 0.9,
}
CLASSES = {"drugs": ["Untreated", "Nutlin", "Dex"], "doses": ["0.1", "50"]}
CELLS = 60
FAILED = ("doses", "full", 1)


def predictions_of(task, skill, rng):
    """What a run predicted: cells, labels, predicted classes and the probability of each class."""
    classes = np.array(CLASSES[task])
    labels = np.arange(CELLS) % len(classes)
    odds = np.exp(rng.normal(size=(CELLS, len(classes))) + skill * np.eye(len(classes))[labels])
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    table = pd.DataFrame({"cell": [f"cell{number}" for number in range(CELLS)], "label": classes[labels]})
    table["predicted"] = classes[probabilities.argmax(axis=1)]
    return table.join(pd.DataFrame(probabilities, columns=[f"probability:{name}" for name in classes]))


def row_of(settings, predictions):
    """The row of runs.csv of one run; one that failed has no scores."""
    place = {"study": settings.study, "task": settings.task, "arm": settings.arm, **settings.arm_keys()}
    place |= {"seed": settings.seed, "fold": settings.fold, "n_train": 100, "n_validation": 20, "n_test": CELLS}
    if (settings.task, settings.arm, settings.seed) == FAILED:
        return place | {"status": "failed", "reason": "the loss became nan at step 3", "key": "0" * 16}
    right = predictions["label"] == predictions["predicted"]
    recalls = right.groupby(predictions["label"]).mean()
    return place | {
        "status": "ok",
        "reason": "",
        "best_epoch": 2,
        "accuracy": float(right.mean()),
        "macro_f1": float(recalls.mean()),
        **{f"recall:{name}": float(recalls[name]) for name in CLASSES[settings.task]},
        "wall_seconds": 10.0 * SKILL[settings.arm] + settings.seed,
        "trainable_parameters": int(1000 * SKILL[settings.arm]),
        "key": "0" * 16,
    }


def answer_of(settings, runs, _predictions):
    """An answer in the form of `tuneformer.evaluate.compare.answer`, with verdicts that are known."""
    tasks = []
    for task, of_task in runs.groupby("task", sort=False):
        arms = []
        for arm, rows in of_task.groupby("arm", sort=False):
            scores = rows["macro_f1"].dropna()
            mean = float(scores.mean()) if len(scores) else None
            one = {"arm": arm, "mean": mean, "low": mean and mean - 0.04, "high": mean and mean + 0.04}
            one |= {"n_runs": len(scores), "n_failed": len(rows) - len(scores)}
            one |= {"is_baseline": arm == "logistic_counts", "is_control": arm == "random_init"}
            one |= {"is_ceiling": False, "n_constant": 0}
            arms.append(one)
        means = {one["arm"]: one["mean"] for one in arms}
        contrasts = [
            {
                "contrast": contrast,
                "reference": reference,
                "arm": arm,
                "difference": means[arm] - means[reference],
                "low": means[arm] - means[reference] - 0.05,
                "high": means[arm] - means[reference] + 0.05,
                "p": 0.01,
                "p_holm": 0.0004 if verdict in ("higher", "lower") else 0.3,
                "p_same": 0.4,
                "verdict": verdict,
                "seeds": 3,
                "cells": CELLS,
                "units": CELLS,
                "folds": 0,
                "score": "macro_f1",
                "margin": 0.03,
                "why": None,
                "more_seeds": 12 if verdict == "not decided" else None,
                "times_cells": None,
            }
            for contrast, reference, arm, verdict in (
                ("pre-training", "random_init", "full", "higher"),
                ("linear model", "logistic_counts", "full", "not decided"),
                ("pseudo-bulk of 2", "full", "pseudobulk_k2", "same"),
                ("pseudo-bulk of 10", "full", "pseudobulk_k10", "lower"),
            )
            if means[arm] and means[reference]
        ]
        test_cells = {name: CELLS // len(CLASSES[task]) for name in CLASSES[task]}
        arms.sort(key=lambda one: -(one["mean"] or 0))
        tasks.append({"task": task, "folds": 0, "seeds": [0, 1, 2], "test_cells": test_cells})
        tasks[-1] |= {"arms": arms, "contrasts": contrasts, "left_out": {}}
        tasks[-1]["recommendation"] = recommendations(tasks[-1])
    return {
        "study": settings.study,
        "question": settings.question,
        "simulated": settings.simulated,
        "kind": settings.kind,
        "score": "macro_f1",
        "margin": 0.03,
        "alpha": 0.05,
        "rule": "A difference is clear when p, corrected after Holm for 8 contrasts, is below 0.05.",
        "n_contrasts": 8,
        "tasks": tasks,
    }


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Every folder of the repository somewhere else, with the study `small` and its two tasks in params/."""
    for name in ("PARAMS", "RUNS", "RESULTS", "FIGURES", "SITE", "DOWNLOADS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    paths.PARAMS.mkdir()
    (paths.PARAMS / "small.yaml").write_text(STUDY)
    for task, classes in CLASSES.items():
        (paths.PARAMS / f"{task}.yaml").write_text(f"classes: {classes}\n")
    return tmp_path


@pytest.fixture
def settings(elsewhere):
    return load_study("small")


def all_runs(settings):
    """The settings of every run of the study, each with its predictions (none for the run that failed)."""
    rng = np.random.default_rng(0)
    for task in settings.tasks:
        for arm in settings.arms:
            for run in load_study(settings.study, task=task, arm=arm).runs():
                failed = (run.task, run.arm, run.seed) == FAILED
                made = predictions_of(run.task, SKILL[run.arm], rng)
                yield run, None if failed else made


@pytest.fixture
def results(settings):
    """The results of the study, in memory."""
    rows, tables, histories = [], [], []
    for run, made in all_runs(settings):
        place = {"task": run.task, "arm": run.arm, "seed": run.seed, "fold": run.fold}
        rows.append(row_of(run, made))
        if made is not None:
            highest = made.filter(like="probability:").max(axis=1).round(3)
            tables.append(made[["cell", "label", "predicted"]].assign(probability=highest, **place))
            epochs = pd.DataFrame(
                {"epoch": [1, 2, 3], "train_loss": [1.1, 0.8, 0.6], "validation_loss": [1.1, 0.9, 1.0]}
            )
            epochs["validation_macro_f1"] = [0.3, 0.6, 0.5]
            histories.append(epochs.assign(**place))
    runs, predictions = pd.DataFrame(rows), pd.concat(tables, ignore_index=True)
    answer = answer_of(settings, runs, predictions)
    return Results(settings, runs, predictions, pd.concat(histories, ignore_index=True), answer, paths.RUNS)


def write_results(results, folder):
    """Write results as the files that readers find."""
    folder.mkdir(parents=True, exist_ok=True)
    results.runs.to_csv(folder / "runs.csv", index=False)
    results.predictions.to_parquet(folder / "predictions.parquet")
    results.history.to_parquet(folder / "history.parquet")
    write_json(folder / "answer.json", results.answer)
    (folder / "study.yaml").write_text("checkpoint: demo\n")


@pytest.fixture
def finished(settings):
    """What the jobs of the study leave: the folder of every run, one of which failed."""
    for run, made in all_runs(settings):
        folder = paths.run_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "row.json", {name: None if pd.isna(x) else x for name, x in row_of(run, made).items()})
        epochs = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [1.1, 0.8, 0.6]})
        (epochs if made is not None else pd.DataFrame()).to_csv(folder / "history.csv", index=False)
        (made if made is not None else pd.DataFrame()).to_parquet(folder / "predictions.parquet", index=False)
        (folder / "key").write_text(f"{run.task}-{run.arm}-{run.learning_rate}-{run.seed}\n")
    return settings


@pytest.fixture
def make_predictions():
    return predictions_of


@pytest.fixture
def make_answer():
    return answer_of


@pytest.fixture
def write():
    return write_results
