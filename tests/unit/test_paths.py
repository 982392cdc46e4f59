"""Paths: where the repository keeps its files, and that two things never share a folder."""

import subprocess
import sys

import pytest

from tuneformer import paths
from tuneformer.study import jobs, load_study


def test_the_root_is_the_repository():
    assert (paths.ROOT / "Snakefile").is_file()
    assert paths.ASSETS.parent.samefile(paths.ROOT / "lib" / "tuneformer")


def test_two_runs_never_share_a_folder():
    runs = [run for study in ("demo_pancreas", "demo_pseudobulk") for job in jobs(study) for run in job.runs()]
    folders = {paths.run_dir(run) for run in runs}
    assert len(folders) == len(runs)
    assert all(folder.is_relative_to(paths.RUNS) for folder in folders)
    shared = {path(run) for run in runs for path in (paths.cells_dir, paths.tokens_dir, paths.made_dir)}
    assert not folders & shared


def test_arms_with_the_same_train_set_share_its_made_cells():
    study = load_study("demo_pseudobulk")
    tuned, linear, other = (study.with_arm(f"pseudobulk_k{name}") for name in ("5_sum", "5_logistic", "5_mean"))
    assert paths.made_dir(tuned) == paths.made_dir(linear)
    assert paths.made_dir(tuned) != paths.made_dir(other)
    assert paths.made_dir(tuned) != paths.made_dir(tuned.at(seed=1))


def test_an_arm_with_tokens_of_its_own_has_a_folder_for_them():
    study = load_study("tiny", arms={"full": None, "full_short": {"max_length": 64}, "lora": {"vocabulary": "fit"}})
    folders = [paths.tokens_dir(study.with_arm(arm)) for arm in study.arms]
    assert len(set(folders)) == 3
    assert folders[0].name == "tokens"
    folded = load_study("tiny", folds=3, vocabulary="fit")
    assert paths.tokens_dir(folded.at(fold=1)).name == "tokens_fold1"  # medians are of the training cells
    assert paths.cells_dir(folded.at(fold=1)) == paths.cells_dir(folded.at(fold=2))


@pytest.mark.parametrize(
    ("seeds", "name"), [([0, 1, 2], "seeds0-2"), ([0, 2, 5], "seeds0_2_5"), ([3], "seeds3"), ([2, 1], "seeds2_1")]
)
def test_a_job_has_a_name_by_its_seeds(seeds, name):
    job = load_study("tiny", seeds=seeds)
    assert paths.part_name(job) == name
    assert paths.executed_path("05_finetune_strategies", job).parent == paths.arm_dir(job)


def test_each_executed_notebook_has_a_place_of_its_own():
    names = ["00_pretrain", "01_qc", "02_tokenize", "05_finetune_strategies", "06_figures"]
    places = [paths.executed_path(name, job) for name in names for job in jobs("tiny")]
    assert len(set(places)) == len(names) - 1 + len(jobs("tiny"))  # notebook 05 is executed for each arm


def test_results_that_were_made_here_are_taken_first(tmp_path, monkeypatch):
    for name in ("RUNS", "RESULTS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    assert paths.results_dir("demo") == tmp_path / "results" / "demo"
    here = tmp_path / "runs" / "demo" / "results"
    here.mkdir(parents=True)
    (here / "answer.json").touch()
    assert paths.results_dir("demo") == here


def test_a_path_of_a_user_is_expanded(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/somewhere")
    assert str(paths.user_path("$SOMEWHERE/cells.h5ad")) == "/somewhere/cells.h5ad"
    assert paths.user_path("cells.h5ad") == paths.ROOT / "cells.h5ad"
    assert "~" not in str(paths.user_path("~/cells.h5ad"))


def test_messages_show_paths_below_the_repository():
    assert paths.shown(paths.PARAMS / "tiny.yaml") == "params/tiny.yaml"
    assert paths.shown(paths.ROOT.parent / "x") == str(paths.ROOT.parent / "x")


def test_runs_can_lie_elsewhere(tmp_path):
    command = [sys.executable, "-c", "from tuneformer import paths; print(paths.RUNS)"]
    environment = {"TUNEFORMER_RUNS": str(tmp_path), "PYTHONPATH": str(paths.ASSETS.parent.parent)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(tmp_path)


def test_a_package_outside_a_clone_says_what_it_needs(tmp_path):
    code = f"import shutil; shutil.copytree({str(paths.ASSETS.parent)!r}, 'tuneformer'); import tuneformer.paths"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "tuneformer works inside a clone of its repository" in ended.stderr
