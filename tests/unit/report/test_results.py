"""Results: only of runs that belong to the study, written whole; the repository changes only when one is published."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from tuneformer import paths
from tuneformer.artifacts import UserError, write_json
from tuneformer.evaluate import runs as evaluate_runs
from tuneformer.report import results as module
from tuneformer.report.results import FILES, collect, publish, read


@pytest.fixture(autouse=True)
def _known_inputs(monkeypatch, make_answer):
    """A run's key depends on its parameters alone, and the answer is one that is known."""
    monkeypatch.setattr(evaluate_runs, "run_key", lambda run: f"{run.task}-{run.arm}-{run.learning_rate}-{run.seed}")
    monkeypatch.setattr(module.compare, "answer", make_answer)


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_collect_writes_five_files_with_a_row_per_run(finished, capsys):
    found = collect("small")
    assert capsys.readouterr().out == "small: 36 of 36 runs, 1 failed\n"
    assert {file.name for file in (paths.RUNS / "small" / "results").iterdir()} == set(FILES)
    assert len(found.runs) == 36
    assert not found.runs.duplicated(["task", "arm", "seed", "fold"]).any()
    assert list(found.runs["arm"].unique()) == [
        "full",
        "linear_probe",
        "random_init",
        "logistic_counts",
        "pseudobulk_k2",
        "pseudobulk_k10",
    ]
    assert found.runs.loc[
        found.runs["arm"] == "pseudobulk_k10", ["train_set", "k"]
    ].drop_duplicates().to_numpy().tolist() == [["pseudobulk", 10.0]]
    assert found.answer["study"] == "small"
    assert len(found.history) == 35 * 3


def test_a_failed_run_stays_as_a_row_with_its_reason(finished):
    found = collect("small")
    row = found.runs[found.runs["status"] != "ok"].iloc[0]
    assert (row["task"], row["arm"], row["seed"]) == ("doses", "full", 1)
    assert row["reason"] == "the loss became nan at step 3"
    assert pd.isna(row["macro_f1"])
    of_run = found.predictions[(found.predictions["task"] == "doses") & (found.predictions["arm"] == "full")]
    assert sorted(of_run["seed"].unique()) == [0, 2]


def test_every_digit_of_a_score_survives_the_file(finished):
    found = collect("small").runs
    first = json.loads((paths.RUNS / "small" / "drugs" / "full" / "seed0" / "row.json").read_text())
    assert found.loc[0, "macro_f1"] == first["macro_f1"]


def test_predictions_keep_the_probability_of_the_predicted_class(finished):
    found = collect("small").predictions
    whole = pd.read_parquet(paths.RUNS / "small" / "drugs" / "full" / "seed0" / "predictions.parquet")
    mine = found[(found["task"] == "drugs") & (found["arm"] == "full") & (found["seed"] == 0)]
    assert mine["predicted"].tolist() == whole["predicted"].tolist()
    assert mine["probability"].to_numpy() == pytest.approx(whole.filter(like=":").max(axis=1), abs=5e-4)
    assert isinstance(found["cell"].dtype, pd.CategoricalDtype)
    assert "group" not in found


def test_the_group_of_each_test_cell_is_kept_where_a_task_has_groups(finished):
    for file in (paths.RUNS / "small").rglob("predictions.parquet"):
        table = pd.read_parquet(file)
        table.assign(group=[f"well{number % 6}" for number in range(len(table))]).to_parquet(file)
    found = collect("small").predictions
    assert found.set_index("cell")["group"].astype(str)["cell7"].unique().tolist() == ["well1"]


def test_only_epochs_are_kept_of_a_history(finished):
    file = paths.RUNS / "small" / "drugs" / "logistic_counts" / "seed0" / "history.csv"
    file.write_text("epoch,train_loss,model__C\n1,0.5,0.01\n2,0.4,0.1\n")
    history = collect("small").history
    assert history.columns.tolist() == ["task", "arm", "seed", "fold", "epoch", "train_loss"]
    assert len(history[history["arm"] == "logistic_counts"]) == 2 + 5 * 3


def test_collecting_twice_gives_the_same_bytes(finished):
    collect("small")
    before = files(paths.RUNS / "small" / "results")
    collect("small")
    assert files(paths.RUNS / "small" / "results") == before


def test_runs_of_other_parameters_and_unfinished_ones_are_left_out(finished, capsys):
    (paths.RUNS / "small" / "drugs" / "full" / "seed0" / "key").write_text("of other parameters\n")
    (paths.RUNS / "small" / "drugs" / "full" / "seed1" / "key").unlink()
    assert len(collect("small").runs) == 34
    assert capsys.readouterr().out == "small: 34 of 36 runs, 1 failed\n"


def test_a_run_that_left_the_study_leaves_its_results(finished):
    text = (paths.PARAMS / "small.yaml").read_text()
    (paths.PARAMS / "small.yaml").write_text(text.replace("seeds: [0, 1, 2]", "seeds: [0, 2]"))
    assert sorted(collect("small").runs["seed"].unique()) == [0, 2]


def test_a_study_of_which_every_run_failed_can_be_read(finished, monkeypatch, make_answer):
    for row in (paths.RUNS / "small").rglob("row.json"):
        content = json.loads(row.read_text())
        write_json(row, {**content, "status": "failed", "macro_f1": None})
        (row.parent / "history.csv").write_text("\n")
    found = collect("small")
    assert (found.runs["status"] == "failed").all()
    assert found.predictions.empty
    assert found.history.empty


def test_an_answer_that_cannot_be_computed_leaves_the_old_results(finished, monkeypatch):
    collect("small")
    before = files(paths.RUNS / "small" / "results")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.compare, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect("small")
    assert files(paths.RUNS / "small" / "results") == before


def test_the_study_says_how_its_runs_were_made(finished):
    collect("small")
    stated = yaml.safe_load((paths.RUNS / "small" / "results" / "study.yaml").read_text())
    assert stated["tasks"]["doses"]["classes"] == ["0.1", "50"]
    assert stated["learning_rate"] == 5e-5
    assert set(module.PACKAGES) < set(stated["versions"])
    assert stated["git"] == {"commit": None, "dirty": None}  # the folder of this test is no checkout


def test_a_study_that_is_one_notebook_has_written_its_results_itself(results, make_predictions):
    with (paths.PARAMS / "small.yaml").open("a") as file:
        file.write("kind: compression\n")
    wide = make_predictions("drugs", 1.0, np.random.default_rng(0)).assign(task="drugs", arm="fp32", seed=0, fold=None)
    module.write(results.settings, results.runs, [wide], [], results.answer)
    found = collect("small")
    assert found.answer == results.answer
    assert found.predictions["probability"].between(0, 1).all()
    assert not any(name.startswith("probability:") for name in found.predictions)
    assert found.history.empty


def test_readers_take_what_ran_here_and_else_what_the_repository_has(results, write):
    write(results, paths.RESULTS / "small")
    assert not read("small").is_of_this_machine
    write(results, paths.RUNS / "small" / "results")
    assert read("small").is_of_this_machine
    found = read("small")
    pd.testing.assert_series_equal(found.runs["macro_f1"], results.runs["macro_f1"])
    assert found.runs["fold"].isna().all()
    assert found.answer == results.answer


def test_results_that_cannot_be_used_are_one_sentence(results, write):
    with pytest.raises(UserError, match=r"small/runs.csv does not exist; run `make report STUDY=small`"):
        read("small")
    folder = paths.RESULTS / "small"
    write(results, folder)
    (folder / "runs.csv").write_text("study,value\nsmall,1\n")
    with pytest.raises(UserError, match="lacks the columns arm, fold, key, seed, status, task"):
        read("small")
    (folder / "runs.csv").write_text(",".join(results.runs.columns) + "\n")
    with pytest.raises(UserError, match="has no row"):
        read("small")
    (folder / "predictions.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match=r"results/small cannot be read"):
        read("small")


def test_collecting_changes_nothing_in_the_repository(finished):
    collect("small")
    assert not paths.RESULTS.exists()
    assert not paths.FIGURES.exists()


def test_publish_copies_results_and_pictures_and_writes_the_numbers(finished):
    collect("small")
    figures = paths.RUNS / "small" / "figures"
    figures.mkdir()
    for name in ("scores.png", "scores.pdf", "scores.csv"):
        (figures / name).write_bytes(b"content")
    (paths.FIGURES / "small").mkdir(parents=True)
    (paths.FIGURES / "small" / "old.png").write_bytes(b"old")
    readme = paths.ROOT / "README.md"
    readme.write_text("before\n<!-- numbers: small -->\nold\n<!-- end -->\nafter\n")
    assert publish("small") == ["results/small", "figures/small", "README.md"]
    assert files(paths.RESULTS / "small") == files(paths.RUNS / "small" / "results")
    assert [file.name for file in (paths.FIGURES / "small").iterdir()] == ["scores.png"]
    assert "`pseudobulk_k10`" in readme.read_text()
    assert publish("small") == ["results/small", "figures/small"]


def test_only_what_ran_here_is_published(results, write, capsys):
    write(results, paths.RESULTS / "small")
    before = files(paths.RESULTS)
    assert module.main(["publish", "small"]) == 2
    assert "Study small was not run here" in capsys.readouterr().err
    assert files(paths.RESULTS) == before


def test_the_command_says_in_one_sentence_what_is_missing(settings, capsys):
    assert module.main(["collect", "small"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Study small has no finished run in runs/small; run `make report STUDY=small`." in said
    assert module.main(["collect", "smal"]) == 2
    assert "Did you mean small?" in capsys.readouterr().err
    assert not paths.RUNS.exists()
