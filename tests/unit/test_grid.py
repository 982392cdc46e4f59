"""From a study to its runs."""

import os
import subprocess
import sys

import pytest

from tuneformer.study import grid, paths
from tuneformer.study.params import ParameterError, load_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Write a params file ``mine`` over the real base and return its name."""
    (tmp_path / "_base.yaml").write_text((paths.PARAMS / "_base.yaml").read_text())
    (tmp_path / "easy.yaml").write_text("label: drug\n")
    (tmp_path / "hard.yaml").write_text("label: dose\n")
    monkeypatch.setattr(paths, "PARAMS", tmp_path)

    def write(text):
        (tmp_path / "mine.yaml").write_text(text)
        return "mine"

    return write


def test_every_combination_is_a_run_once(study):
    runs = grid.runs(study("tasks: [easy, hard]\nstrategies: [full, lora]\nbaselines: []\nseeds: [0, 5, 7]\n"))
    combinations = [(run.task, run.train_set, run.strategy, run.seed) for run in runs]
    assert len(set(combinations)) == len(combinations) == 12
    assert combinations[0] == ("easy", "single_cell", "full", 0)
    assert combinations[-1] == ("hard", "single_cell", "lora", 7)
    assert {(run.task, run.label) for run in runs} == {("easy", "drug"), ("hard", "dose")}


def test_baselines_are_runs_beside_the_strategies(study, capsys):
    name = study("strategies: [full]\nbaselines: [majority, knn_pca]\nseeds: [0, 1]\n")
    assert [run.strategy for run in grid.runs(name)] == ["full"] * 2 + ["majority"] * 2 + ["knn_pca"] * 2
    assert grid.main([name]) == 0
    assert "1 train set x (1 strategy + 2 baselines) x 2 seeds = 6 runs" in capsys.readouterr().out
    with pytest.raises(ParameterError, match="baselines names 'majority' more than once"):
        grid.runs(study("baselines: [majority, majority]\n"))


def test_the_default_batch_has_the_main_study_and_a_part_of_the_others(study, tmp_path, capsys):
    (tmp_path / "demo.yaml").write_text("strategies: [full]\nbaselines: []\n")
    sides = "tasks: [easy, hard]\ntrain_sets: [single_cell, pseudobulk_k2_sum]\nstrategies: [full]\nbaselines: []\n"
    sides += "seeds: [4, 5]\n"
    study(f"{sides}quick_train_sets: [pseudobulk_k2_sum]\n")
    (tmp_path / "demo_more.yaml").write_text("strategies: [full]\nbaselines: []\nseeds: [0]\n")
    (tmp_path / "demo_made.yaml").write_text("pretrain_output: somewhere\n")
    assert [run.study for run in grid.batch("all")] == ["demo"] * 5 + ["demo_more"]
    default = grid.batch("default")
    assert [run.study for run in default] == ["demo"] * 5 + ["mine"]
    assert (default[-1].task, default[-1].train_set, default[-1].seed) == ("easy", "pseudobulk_k2_sum", 4)
    assert [run.study for run in grid.batch("mine")] == ["mine"] * 8
    assert grid.main(["default"]) == 0
    assert "Study mine: 2 tasks x 2 train sets x 1 strategy x 2 seeds = 8 runs, 1 of them" in capsys.readouterr().out
    study(f"{sides}quick_train_sets: [pseudobulk_k5_sum]\n")
    with pytest.raises(ParameterError, match="quick_train_sets names 'pseudobulk_k5_sum', which is not one of its"):
        grid.batch("default")


def test_a_run_is_what_its_notebook_resolves(study):
    for run in grid.runs(study("tasks: [easy, hard]\nstrategies: [full, lora]\nseeds: [0, 1]\nepochs: 2\n")):
        changes = {key: getattr(run, key) for key in ("task", "train_set", "strategy", "seed")}
        assert run == load_study("mine", **changes)


def test_the_demo_study_asks_enough():
    runs = grid.runs("demo")
    assert len(runs) >= 40
    assert len({run.seed for run in runs}) >= 3
    assert "random_init" in {run.strategy for run in runs}


@pytest.mark.parametrize("key", ["train_sets", "strategies", "seeds"])
def test_an_empty_side_is_refused(study, key):
    name = study(f"{key}: []\n")
    with pytest.raises(ParameterError, match=f"params/mine.yaml: {key} is empty"):
        grid.runs(name)


def test_a_value_named_twice_is_refused(study):
    with pytest.raises(ParameterError, match="seeds names 1 more than once"):
        grid.runs(study("seeds: [1, 0, 1]\n"))


def test_the_command_counts_the_runs_or_says_what_is_wrong(capsys):
    assert grid.main(["tiny"]) == 0
    assert capsys.readouterr().out == "Study tiny: 1 task x 1 train set x 2 strategies x 2 seeds = 4 runs\n"
    assert grid.main(["tinny"]) == 2
    assert "Did you mean tiny?" in capsys.readouterr().err


def test_reading_a_study_is_light():
    """Snakemake reads the grid at each start, so it must not wait for torch or scanpy."""
    code = "import sys, tuneformer.study.run; print({'torch', 'scanpy', 'papermill', 'pandas'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_study_that_is_one_notebook_runs_it_for_its_page(tmp_path):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--config", "study=demo_compress"]
    environment = os.environ | {"TUNEFORMER_RUNS": str(tmp_path)}
    planned = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "whole_study" in planned.stdout
