"""Records of runs and the table collected from them: whole, strict, and only of runs that belong to the study."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate.metrics import score_run
from tuneformer.finetune.training import Outcome
from tuneformer.report import records
from tuneformer.study import grid, paths, run
from tuneformer.study.params import load_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study tiny with its tokens made, in folders of its own."""
    for name in ("RUNS", "RESULTS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.setattr(run, "checkpoint_hash", lambda _: "weights")
    monkeypatch.setattr(records, "checkpoint_hash", lambda _: "weights")
    settings = load_study("tiny")
    paths.write_text(paths.tokens_path(settings) / "tokens.json", '{"fingerprint": "tokens"}')
    return settings


def outcome_of(settings, **changes):
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    predictions = pd.DataFrame({"cell": ["x", "y", "z"], "label": ["a", "a", "b"]})
    predictions[["probability:a", "probability:b"]] = probabilities
    content = {
        "status": "ok",
        "reason": "",
        "fingerprint": run.training_fingerprint(settings, "tokens"),
        "classes": ["a", "b"],
        "history": pd.DataFrame({"epoch": [1, 2], "train_loss": [0.9, math.nan]}),
        "best_epoch": 2,
        "cost": {"wall_seconds": 1.5, "trainable_parameters": np.int64(12), "flops": math.nan, "device": "cpu"},
        "n_train": 8,
        "n_validation": 2,
        "n_test": 3,
        "predictions": predictions,
    }
    return Outcome(**content | changes)


def write(settings, **changes):
    outcome = outcome_of(settings, **changes)
    return records.write_record(settings, outcome, score_run(outcome))


FAILED = {
    "status": "failed",
    "reason": "the loss became nan",
    "best_epoch": None,
    "history": pd.DataFrame(),
    "cost": {},
}


def refuse_constant(name):
    pytest.fail(f"{name} is no JSON")


def test_a_record_is_strict_json_that_says_how_the_run_was_made(study):
    path = write(study)
    assert path == paths.run_dir(study) / "record.json"
    record = json.loads(path.read_text(), parse_constant=refuse_constant)
    assert record["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert record["history"] == [{"epoch": 1, "train_loss": 0.9}, {"epoch": 2, "train_loss": None}]
    assert record["cost"] == {"wall_seconds": 1.5, "trainable_parameters": 12, "flops": None, "device": "cpu"}
    assert record["parameters"] == json.loads(study.model_dump_json())
    assert (record["strategy"], record["seed"], record["fold"], record["simulated"]) == ("full", 0, None, True)
    assert set(records.PACKAGES) < set(record["versions"])
    assert len(record["git"]["commit"]) == 40
    assert record["git"]["dirty"] in (True, False)


def test_a_record_outside_git_says_so(study, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert json.loads(write(study).read_text())["git"] == {"commit": None, "dirty": None}


def test_a_written_record_makes_the_run_finished(study):
    assert run.finished_record(study) is None
    write(study)
    assert run.finished_record(study)["status"] == "ok"


def test_scores_and_status_have_to_fit(study):
    outcome = outcome_of(study)
    with pytest.raises(records.RecordError, match="full seed 0 has status ok, so its record needs scores"):
        records.write_record(study, outcome, score_run(outcome_of(study, **FAILED)))
    with pytest.raises(records.RecordError, match="has status failed, so its record cannot have scores"):
        records.write_record(study, outcome_of(study, **FAILED), score_run(outcome))
    assert not (paths.run_dir(study) / "record.json").exists()


def test_collect_writes_one_tidy_table_in_the_order_of_the_grid(study):
    runs = grid.runs("tiny")
    for settings in reversed(runs):
        write(settings)
    metrics = records.collect("tiny")
    assert tuple(metrics.columns) == records.COLUMNS
    found = metrics.drop_duplicates("fingerprint")[["strategy", "seed"]]
    assert found.to_numpy().tolist() == [[settings.strategy, settings.seed] for settings in runs]
    assert not metrics.duplicated(["task", "train_set", "strategy", "seed", "metric"]).any()
    assert (metrics["n_train"] == 8).all()
    assert metrics["fold"].isna().all()
    values = metrics[metrics["fingerprint"] == metrics["fingerprint"][0]].set_index("metric")["value"]
    assert values["accuracy"] == 2 / 3  # every digit survives the file
    assert values["cost:trainable_parameters"] == 12
    assert np.isnan(values["cost:flops"])
    assert "cost:device" not in values
    names = sorted(file.name for file in (paths.RESULTS / "tiny" / "records").iterdir())
    assert len(names) == len(runs)
    assert names[0] == "drug_5class__single_cell__full__seed0.json"


def test_collecting_twice_gives_the_same_bytes(study):
    write(study)
    records.collect("tiny")
    before = {file.name: file.read_bytes() for file in (paths.RESULTS / "tiny").rglob("*") if file.is_file()}
    records.collect("tiny")
    assert {file.name: file.read_bytes() for file in (paths.RESULTS / "tiny").rglob("*") if file.is_file()} == before


def test_a_failed_run_stays_as_a_row(study):
    write(study, **FAILED)
    metrics = records.collect("tiny")
    assert metrics[["metric", "value"]].to_numpy().tolist() == [["status:failed", 1.0]]


def test_runs_outside_the_grid_and_stale_ones_are_left_out(study, monkeypatch):
    write(study)
    write(load_study("tiny", strategy="lora"))
    write(load_study("tiny", seed=1), fingerprint="of other parameters")
    write(load_study("tiny", seed=1, strategy="linear_probe", learning_rate=0.5))
    assert [(record["strategy"], record["seed"]) for record in records.read_records("tiny")] == [("full", 0)]
    monkeypatch.setattr(run, "checkpoint_hash", lambda _: "other weights")
    assert records.read_records("tiny") == []


def test_a_run_that_is_not_made_again_keeps_its_results_while_they_hold(study, monkeypatch):
    for settings in grid.runs("tiny"):
        write(settings)
    whole = records.collect("tiny")
    (paths.run_dir(study) / "record.json").unlink()
    pd.testing.assert_frame_equal(records.collect("tiny"), whole)
    kept = paths.RESULTS / "tiny" / "records" / records.record_name(study)
    record = json.loads(kept.read_text())
    assert records.still_holds(record, study.model_copy(update={"threads": 7, "question": "another?"}))
    assert not records.still_holds(record, study.model_copy(update={"learning_rate": 0.5}))
    del record["parameters"]["lora_alpha"]  # as if the key had been new since
    assert records.still_holds(record, study)
    assert not records.still_holds(record, study.model_copy(update={"lora_alpha": 2 * study.lora_alpha}))
    folded = study.model_copy(update={"folds": 5, "fold": 0})
    of_fold = record | {"parameters": record["parameters"] | {"folds": 5, "fold": 0}}
    assert records.still_holds(of_fold, folded)
    assert not records.still_holds(of_fold, folded.model_copy(update={"folds": 10}))
    assert not records.still_holds(record, folded)
    monkeypatch.setattr(records, "checkpoint_hash", lambda _: "other weights")
    assert len(records.collect("tiny")["fingerprint"].unique()) == len(grid.runs("tiny")) - 1


def test_a_run_that_left_the_study_leaves_its_results(study, monkeypatch):
    for settings in grid.runs("tiny"):
        write(settings)
    records.collect("tiny")
    fewer = [settings for settings in grid.runs("tiny") if settings.strategy == "full"]
    monkeypatch.setattr(grid, "runs", lambda _: fewer)
    assert set(records.collect("tiny")["strategy"]) == {"full"}
    assert len(list((paths.RESULTS / "tiny" / "records").iterdir())) == len(fewer)


def test_the_command_counts_runs(study, capsys):
    write(study)
    write(load_study("tiny", seed=1), **FAILED)
    assert records.main(["tiny"]) == 0
    assert capsys.readouterr().out == "results/tiny/metrics.csv: 2 of 4 runs, 1 of them failed\n"


def test_the_command_says_in_one_sentence_what_is_missing(study, capsys):
    assert records.main(["tiny"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Study tiny has no finished run" in said
    assert "make report STUDY=tiny" in said
    assert records.main(["tinyy"]) == 2
    assert "Did you mean tiny?" in capsys.readouterr().err
    assert not paths.RESULTS.exists()


def test_results_that_cannot_be_read_are_refused(study):
    with pytest.raises(records.RecordError, match=r"tiny/metrics.csv does not exist; run `make report STUDY=tiny`"):
        records.read_metrics("tiny")
    path = paths.RESULTS / "tiny" / "metrics.csv"
    paths.write_text(path, "study,value\ntiny,1\n")
    with pytest.raises(records.RecordError, match="needs at least one row, and the columns study, dataset"):
        records.read_metrics("tiny")
    paths.write_text(path, ",".join(records.COLUMNS) + "\n")
    with pytest.raises(records.RecordError, match="needs at least one row"):
        records.read_metrics("tiny")


def test_predicted_classes_are_kept_for_paired_comparisons(study):
    runs = grid.runs("tiny")
    for settings in runs:
        outcome = outcome_of(settings)
        with paths.atomic_path(paths.run_dir(settings) / "predictions.parquet") as partial:
            outcome.predictions.to_parquet(partial)
        write(settings)
    records.collect("tiny")
    table = records.read_predictions("tiny")
    assert len(table) == 3 * len(runs)
    first = table[(table["strategy"] == "full") & (table["seed"] == 0)]
    assert first[["cell", "label", "predicted"]].to_numpy().tolist() == [
        ["x", "a", "a"],
        ["y", "a", "b"],
        ["z", "b", "b"],
    ]
    (paths.run_dir(study) / "record.json").unlink()
    records.collect("tiny")
    again = records.read_predictions("tiny")
    keys = ["strategy", "seed", "cell"]
    pd.testing.assert_frame_equal(
        again.astype(str).sort_values(keys, ignore_index=True), table.astype(str).sort_values(keys, ignore_index=True)
    )
    with pytest.raises(records.RecordError, match=r"demo/predictions\.parquet does not exist; run"):
        records.read_predictions("demo")
