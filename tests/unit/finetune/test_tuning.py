"""Trials at the same budget, on validation cells alone, that can be stopped and end in a study of their own."""

import gc
import json
import os
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest

from tuneformer.finetune import training, tuning
from tuneformer.study import paths
from tuneformer.study.params import ParameterError, load_study
from tuneformer.trainsets import assemble

OWN = """\
question: Which strategy? (simulated cells)
tasks: [drug_5class, nutlin_2class]
strategies: [full, selective, random_init]
seeds: [0, 1]
classes: ["1e5", b]
learning_rate: 1e-2
freeze_layers: 1
epochs: 2
early_stop: 1
precision: fp32
train_cells: 24
quick_train_sets: [single_cell]
expected_mean_macro_f1: {full: 0.4}
expected_tolerance: 0.1
"""
BUDGET = {"rates": [1e-3, 1e-2], "seeds": [7, 8]}


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Every training ends in a collection of garbage, which takes longer than these trainings: spare it what is old."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def study(checkpoint, tokens, tmp_path, monkeypatch):
    """The study ``mine`` on the random checkpoint; every task has the same made-up cells."""
    folder = tmp_path / "params"
    folder.mkdir()
    for name in ("_base", "drug_5class", "nutlin_2class"):
        (folder / f"{name}.yaml").write_text((paths.PARAMS / f"{name}.yaml").read_text())
    (folder / "mine.yaml").write_text(OWN + f"checkpoint: {checkpoint}\n")
    monkeypatch.setattr(paths, "PARAMS", folder)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(assemble, "prepare_tokens", lambda settings: tokens)
    return "mine"


@pytest.fixture
def quick(monkeypatch):
    """Trials that take no time; returns what was validated. The best rates: full 1e-2, selective 1e-3."""
    made = []

    def validate(settings, tokens):
        made.append(settings)
        score = settings.learning_rate * (-1 if settings.strategy == "selective" else 1)
        score += settings.seed / 100 + (settings.task == "drug_5class")
        return pd.DataFrame({"epoch": [1, 2], "validation_macro_f1": [score, score - 1]})

    monkeypatch.setattr(tuning, "validate", validate)
    return made


def without(tokens, part):
    keep = [row for row, split in enumerate(tokens.dataset["split"][:]) if split != part]
    return replace(tokens, dataset=tokens.dataset.select(keep))


def with_other_test_cells(tokens):
    table = tokens.dataset.to_dict()
    for row, split in enumerate(table["split"]):
        if split == "test":
            table["input_ids"][row], table["label"][row] = [5], "a"
    return replace(tokens, dataset=datasets.Dataset.from_dict(table, features=tokens.dataset.features))


def test_test_cells_play_no_part(run_settings, tokens, monkeypatch):
    predicted = Counter()
    predict = training.ClassifierTrainer.probabilities

    def counted(self, cells):
        predicted[len(cells)] += 1
        return predict(self, cells)

    monkeypatch.setattr(training.ClassifierTrainer, "probabilities", counted)
    settings = run_settings(train_cells=24, validation_share=0.25, seed=3)
    histories = [
        tuning.validate(settings, cells).drop(columns="seconds")
        for cells in (tokens, without(tokens, "test"), with_other_test_cells(tokens))
    ]
    assert predicted == {8: 3 * settings.epochs}  # the validation cells after each epoch; the test set has 12
    assert histories[0].equals(histories[1])
    assert histories[0].equals(histories[2])
    assert not histories[0].equals(
        tuning.validate(run_settings(train_cells=24, seed=4), tokens).drop(columns="seconds")
    )


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_trial_is_validated_as_the_run_it_stands_for(run_settings, tokens, strategy):
    settings = run_settings(strategy=strategy, train_cells=24, validation_share=0.25)
    trial, run = tuning.validate(settings, tokens), training.finetune(settings, tokens).history
    pd.testing.assert_frame_equal(trial.drop(columns="seconds"), run.drop(columns="seconds"), check_exact=True)


def test_every_strategy_gets_the_same_trials_and_steps(study, monkeypatch):
    steps = Counter()
    train = training.ClassifierTrainer.training_step

    def counted(self, *args, **kwargs):
        steps[self.settings.strategy, self.settings.task, self.settings.learning_rate, self.settings.seed] += 1
        return train(self, *args, **kwargs)

    monkeypatch.setattr(training.ClassifierTrainer, "training_step", counted)
    plan = tuning.trials(study, **BUDGET)
    trials = Counter((run.strategy, run.task, run.seed) for run in plan)
    assert len(trials) == 3 * 2 * 2  # strategies x tasks x seeds
    assert set(trials.values()) == {2}  # rates
    table = tuning.run_trials([run for run in plan if (run.task, run.seed) == ("drug_5class", 7)], jobs=1)
    assert len(steps) == len(table) == 3 * 2
    assert set(steps.values()) == set(table["optimizer_steps"]) == {2 * 2}  # 24 cells, 12 a step, 2 epochs
    assert table["validation_macro_f1"].between(0, 1).all()
    assert set(table["n_train"]) == {24}


def test_tuning_uses_seeds_that_the_study_does_not_report():
    for path in paths.PARAMS.glob("[!_]*.yaml"):
        assert set(tuning.SEEDS).isdisjoint(load_study(path.stem).seeds)


def test_rates_are_tried_around_that_of_the_study(run_settings):
    tried = tuning.candidates(run_settings(learning_rate=1.234e-3))
    assert [setting["learning_rate"] for setting in tried] == [1.2e-4, 4.1e-4, 1.234e-3, 3.7e-3, 1.2e-2]


def test_frozen_layers_vary_within_the_same_number_of_settings(run_settings, tmp_path):
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    depths = {}
    for n_layers in (1, 2, 3, 6, 12):
        folder = tmp_path / f"layers{n_layers}"
        folder.mkdir()
        config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}))
        changes = {"strategy": "selective", "checkpoint": str(folder), "learning_rate": 1e-2, "freeze_layers": 2}
        tried = tuning.candidates(run_settings(**changes), rates)
        assert [setting["learning_rate"] for setting in tried] == rates
        depths[n_layers] = [setting["freeze_layers"] for setting in tried]
        assert depths[n_layers][3] == 2  # the study's own setting
    assert depths[2] == [1, 1, 1, 2, 1]
    assert depths[3] == [2, 2, 1, 2, 1]
    assert depths[6] == [3, 1, 4, 2, 5]
    assert depths[12] == [4, 11, 6, 2, 8]


def test_the_best_mean_over_tasks_and_seeds_is_written_as_a_study(study, quick, capsys):
    options = ["--rates", "1e-3", "1e-2", "--seeds", "7", "8", "--jobs", "1"]
    assert tuning.main([study, *options]) == 0
    tuned = load_study("mine_tuned")
    assert tuned.learning_rates == {"full": 1e-2, "selective": 1e-3, "random_init": 1e-2}
    selective = next(run for run in quick if run.strategy == "selective" and run.learning_rate == 1e-3)
    assert tuned.freeze_layers == selective.freeze_layers
    own = load_study(study)
    changed = {key for key, value in own.model_dump().items() if value != getattr(tuned, key)}
    assert changed - {"freeze_layers"} == {
        *("study", "question", "learning_rates"),
        *("quick_train_sets", "expected_mean_macro_f1", "expected_tolerance"),
    }
    assert tuned.classes == ["1e5", "b"]
    assert load_study("mine_tuned", strategy="selective").peak_learning_rate == 1e-3
    text = (paths.PARAMS / "mine_tuned.yaml").read_text()
    assert (
        "# Made by `python -m tuneformer.finetune.tuning mine --rates 0.001 0.01 --seeds 7 8`, not by hand.\n" in text
    )
    assert "2 settings x tasks (drug_5class, nutlin_2class) x seeds (7, 8) = 8 trials," in text
    assert "on validation cells (simulated; train set single_cell)" in text
    assert "full: 0.01, 0.585; the largest rate tried" in text  # mean of 1 and 0, of 0.07 and 0.08, and 0.01
    assert max(map(len, text.splitlines())) <= 120
    table = pd.read_csv(paths.RESULTS / "mine_tuned" / "trials.csv")
    assert tuple(table.columns) == tuning.COLUMNS
    assert len(table) == 24
    assert table.loc[table["strategy"] != "selective", "freeze_layers"].isna().all()
    out = capsys.readouterr().out
    assert "mine: 24 trials, 0 of them finished before" in out
    assert "[24/24] nutlin_2class random_init seed 8, rate 0.01: validation macro-F1 0.090, " in out
    assert text == _again(study, options)


def _again(study, options):
    """Make the file once more, from finished trials."""
    (paths.PARAMS / "mine_tuned.yaml").unlink()
    assert tuning.main([study, *options]) == 0
    return (paths.PARAMS / "mine_tuned.yaml").read_text()


def test_a_study_that_is_its_own_task_keeps_it(study, quick):
    (paths.PARAMS / "alone.yaml").write_text(
        (paths.PARAMS / "mine.yaml").read_text().replace("tasks: [drug_5class, nutlin_2class]\n", "label: dose\n")
    )
    tuning.tune("alone", **BUDGET)
    tuned = load_study("alone_tuned")
    assert (tuned.task, tuned.tasks, tuned.label) == ("alone", ["alone"], "dose")
    tuning.tune(study, task="nutlin_2class", **BUDGET)
    assert load_study("mine_tuned").tasks == ["nutlin_2class"]


def test_what_is_finished_is_not_made_again(study, quick, monkeypatch, capsys):
    validate = tuning.validate

    def interrupted(settings, tokens):
        if len(quick) == 5:
            raise KeyboardInterrupt
        return validate(settings, tokens)

    command = [study, "--rates", "1e-3", "1e-2", "--seeds", "7", "8", "--jobs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "validate", interrupted)
        assert tuning.main(command) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    kept = paths.RUNS / study / "tuning" / "trials.csv"
    assert len(pd.read_csv(kept)) == 5
    assert [path.name for path in kept.parent.iterdir()] == ["trials.csv"]
    assert not (paths.PARAMS / "mine_tuned.yaml").exists()
    assert tuning.main(command) == 0
    assert len(quick) == 24
    assert "24 trials, 5 of them finished before" in capsys.readouterr().out
    tuning.tune(study, task="drug_5class", rates=[1e-3, 1e-2, 1e-1], seeds=[7, 8])
    assert len(quick) == 24 + 3 * 2  # one more rate for three strategies, two seeds
    (paths.PARAMS / "mine.yaml").write_text((paths.PARAMS / "mine.yaml").read_text().replace("epochs: 2", "epochs: 3"))
    tuning.tune(study, **BUDGET)
    assert len(quick) == 30 + 24  # other parameters, other fingerprints


def test_a_rate_that_diverges_is_kept_and_never_chosen(study, capsys):
    tuning.tune(study, task="drug_5class", rates=[1e-2, 1e30], seeds=[7])
    table = pd.read_csv(paths.RESULTS / "mine_tuned" / "trials.csv")
    failed = table[table["learning_rate"] == 1e30]
    assert list(failed["status"]) == ["failed"] * 3
    assert failed["validation_macro_f1"].isna().all()
    assert failed["reason"].str.contains("set a smaller learning_rate").all()
    assert set(load_study("mine_tuned").learning_rates.values()) == {1e-2}
    assert "full: 0.01, " in (text := (paths.PARAMS / "mine_tuned.yaml").read_text())
    assert "; 1 of 2 trials diverged" in text
    assert "[2/6] drug_5class full seed 7, rate 1e+30: failed, " in capsys.readouterr().out
    assert tuning.main([study, "--task", "drug_5class", "--rates", "1e30", "--seeds", "7", "--jobs", "1"]) == 1
    assert "full: every setting diverged in some trial; try smaller --rates than 1e+30" in capsys.readouterr().err


def test_one_divergence_rules_a_rate_out_and_the_smaller_of_equal_rates_is_taken():
    rows = {
        "strategy": "full",
        "learning_rate": [1e-2, 1e-3, 1e-4] * 2,
        "freeze_layers": pd.NA,
        "task": ["a"] * 3 + ["b"] * 3,
        "validation_macro_f1": [0.9, 0.5, 0.7, np.nan, 0.7, 0.5],
        "status": ["ok"] * 3 + ["failed"] + ["ok"] * 2,
    }
    chosen = tuning.choose(pd.DataFrame(rows).astype({"freeze_layers": "Int64"})).iloc[0]
    assert (chosen["learning_rate"], chosen["edge"], chosen["failed"]) == (1e-4, "smallest", 1)
    assert chosen["validation_macro_f1"] == pytest.approx(0.6)


def test_lack_of_memory_is_no_score(study, monkeypatch, capsys):
    def validate(settings, tokens):
        raise MemoryError

    monkeypatch.setattr(tuning, "validate", validate)
    assert tuning.main([study, "--jobs", "1"]) == 1
    assert "drug_5class full seed 1000, rate 0.001: memory ran out; use fewer --jobs" in capsys.readouterr().err
    assert not (paths.RUNS / study / "tuning").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["min"], "params/min.yaml does not exist. Did you mean mine?"),
        (["mine", "--task", "saha"], "'saha' is not a task of params/mine.yaml"),
        (["mine", "--rates", "0", "1e-3"], "--rates: a learning rate has to be above 0 (one is 0)"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_sentence(study, arguments, message, capsys):
    assert tuning.main(arguments) == 2
    err = capsys.readouterr().err
    assert message.removeprefix("params/") in err
    assert err.count("\n") == 1


def test_trials_are_made_by_several_processes(run_settings, monkeypatch):
    monkeypatch.setattr(tuning, "run_trial", vars)  # known in a new process without seconds of imports
    waiting = {f"key {seed}": run_settings(seed=seed) for seed in range(3)}
    assert {key: row["seed"] for key, row in tuning._made(waiting, 2)} == {"key 0": 0, "key 1": 1, "key 2": 2}


def test_a_process_that_is_killed_ends_the_trials_with_a_sentence(monkeypatch):
    monkeypatch.setattr(tuning, "run_trial", os._exit)
    with pytest.raises(tuning.TuningError, match=r"a trial was killed, .* use fewer --jobs"):
        list(tuning._made({"a": 1, "b": 2}, 2))


def test_a_study_with_folds_is_not_tuned():
    with pytest.raises(ParameterError, match="what validates in one fold is tested in another"):
        tuning.trials("demo_pancreas")
