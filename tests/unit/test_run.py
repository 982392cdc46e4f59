"""One papermill job: what is executed, what is loaded, and what is said when something goes wrong."""

import json
import time

import nbformat
import pytest

from tuneformer import paths, run
from tuneformer.study import load_study


def test_each_executed_notebook_has_a_place_of_its_own():
    names = ["00_pretrain", "01_qc", "02_tokenize", "05_finetune_strategies", "06_figures"]
    settings = load_study("tiny")
    places = [paths.executed_path(name, settings) for name in names]
    assert len(set(places)) == len(names)
    assert places[3].parent == paths.arm_dir(settings)


@pytest.mark.parametrize(
    ("seeds", "name"), [([0], "seeds0"), ([0, 1, 2], "seeds0-2"), ([0, 2], "seeds0_2"), ([3, 4], "seeds3-4")]
)
def test_a_job_is_named_by_its_seeds(seeds, name):
    assert paths.part_name(load_study("tiny", seeds=seeds)) == name


def test_a_finished_job_is_loaded_and_a_changed_one_is_not(repository):
    first = repository.run("05_finetune_strategies", "-p", "arm", "full")
    assert first.stdout.startswith("tiny [1/4] drug_5class full: macro-F1 0.500, "), first.stderr
    start = time.perf_counter()
    again = repository.run("05_finetune_strategies", "-p", "arm", "full", "-p", "threads", "1")
    assert again.stdout == "tiny [1/4] drug_5class full: macro-F1 0.500, loaded\n"
    assert time.perf_counter() - start < 10
    assert [line.split()[0] for line in repository.diary()] == ["begin", "end"] * 2
    changed = repository.run("05_finetune_strategies", "-p", "arm", "full", "-p", "learning_rate", "1e-2")
    assert changed.returncode == 0
    assert len(repository.diary()) == 8
    other = repository.run("05_finetune_strategies", "-p", "strategy", "lora", "-p", "seeds", "[0]")
    assert " drug_5class lora: macro-F1" in other.stdout  # not an arm of the study
    assert len(repository.diary()) == 10


def test_seeds_narrow_a_job_and_what_they_made_is_kept(repository):
    assert repository.run("05_finetune_strategies", "-p", "seeds", "[0]").returncode == 0
    assert repository.run("05_finetune_strategies").returncode == 0
    assert [line.split()[3] for line in repository.diary() if line.startswith("end")] == ["0", "1"]


def test_the_executed_notebook_shows_its_parameters(repository):
    ended = repository.run("01_qc", "-p", "task", "drug_5class")
    assert ended.stdout.startswith("runs/tiny/drug_5class/01_qc.ipynb: "), ended.stderr
    executed = nbformat.read(repository.root / "runs" / "tiny" / "drug_5class" / "01_qc.ipynb", as_version=4)
    injected = [cell.source for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert 'task = "drug_5class"' in injected[0]
    assert 'study = "tiny"' in injected[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["05_finetune"], 2, "notebooks/05_finetune.ipynb does not exist; the notebooks are 01_qc, 02_tokenize, 05_"),
        (
            ["01_qc", "-p", "task", "drug_5clas"],
            2,
            "task 'drug_5clas' is not one of drug_5class. Did you mean drug_5cl",
        ),
        (["01_qc", "-p", "arm", "ful"], 2, "arm 'ful' is not one of full, "),
        (["01_qc", "-p", "epoch", "3"], 2, "unknown key 'epoch'; the nearest valid key is 'epochs'"),
        (
            ["01_qc", "-p", "arm", "random_init", "-p", "strategy", "full"],
            2,
            "the strategy of the arm random_init is random_init; ask for",
        ),
        (["01_qc", "-p", "epochs", "[1"], 2, "is no value that a params file could hold"),
        (["05_finetune_strategies"], 1, "raised ValueError: the loss is not a number (see runs/"),
    ],
)
def test_what_goes_wrong_is_one_line(quick_repository, arguments, code, message):
    (quick_repository.root / "fail-full").touch()
    ended = quick_repository.run(*arguments)
    assert ended.returncode == code
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not quick_repository.table("full").exists()


def test_rows_of_something_else_are_not_taken(quick_repository):
    quick_repository.run("05_finetune_strategies")
    table = quick_repository.table("full")
    key = json.loads((quick_repository.run_folder("full", 0) / "row.json").read_text())["key"]
    table.write_text(table.read_text().replace(key, "0123456789abcdef"))
    assert "loaded" not in quick_repository.run("05_finetune_strategies").stdout
    assert "loaded" in quick_repository.run("05_finetune_strategies").stdout


def test_a_batch_says_how_much_time_is_left(monkeypatch):
    """By the jobs that ended since it began, so that neither those of yesterday nor a pause before it count."""
    now = time.time()
    assert run.time_left([now], 3) == ""  # not in a batch
    monkeypatch.setenv(run.BATCH_START, str(now - 600))
    yesterday = [now - 80_000, now - 79_000]
    assert run.time_left([*yesterday, now - 300, now], 4) == ", about 20 min left"
    assert run.time_left([*yesterday, now - 300, now], 0) == ""
    assert run.time_left(yesterday, 4) == ""
