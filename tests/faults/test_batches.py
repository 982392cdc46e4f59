"""A batch that is killed is cleared up after by the next one, and one that is at work is left alone."""

import os
import signal
import time

import psutil
import pytest

from tuneformer import batch
from tuneformer.artifacts import UserError, read_json, write_json

BATCH = ("-m", "tuneformer.batch")
TRAINED = "begin drug_5class linear_probe 1 1"


@pytest.fixture
def held(quick_repository):
    """A repository whose batch does two jobs at a time, and stays in the second seed of one of them."""
    profile = quick_repository.root / "profiles" / "jobs"
    profile.mkdir()
    (profile / "config.yaml").write_text("cores: 2\nuntil: [job]\n")
    quick_repository.environment = {"STUDY": "tiny", "PROFILE": "jobs"}
    hold(quick_repository).touch()
    return quick_repository


def hold(repository):
    return repository.root / "hold-linear_probe-1"


def begin(repository, times=1):
    """Start a batch, and wait until it trains."""
    process = repository.start(*BATCH, **repository.environment)
    end = time.monotonic() + 300
    while repository.diary().count(TRAINED) < times:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the batch does not train"
        time.sleep(0.05)
    return process


def at_work(repository):
    """Return the processes of the last batch."""
    return batch._processes(read_json(repository.root / "runs" / ".batch.json"))


def ends(repository):
    return sorted(line for line in repository.diary() if line.startswith("end"))


def test_what_a_killed_snakemake_leaves_is_ended_and_nothing_is_trained_twice(held):
    first = begin(held)
    first.kill()
    first.wait()
    left = at_work(held)
    assert left, "the job outlives Snakemake, otherwise this test shows nothing"
    second = begin(held, times=2)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in left)
    first.communicate()  # which waits for the last that could write to its output
    hold(held).unlink()
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    lines = [line for line in out.splitlines() if "killed" in line]
    assert len(lines) == 1
    assert f"process {first.pid} on " in lines[0]
    assert "; ending its processes " in lines[0]
    assert len(ends(held)) == len(set(ends(held))) == 8


def test_a_batch_at_work_is_named_and_left_alone(held):
    first = begin(held)
    refused = held.call(*BATCH, **held.environment)
    assert refused.returncode == 2
    (sentence,) = refused.stderr.splitlines()
    assert sentence.startswith("A batch is at work (study tiny, process ")
    assert f"`kill {first.pid}`" in sentence
    hold(held).unlink()
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    assert "killed" not in out
    again = held.call(*BATCH, **held.environment)
    assert again.returncode == 0, again.stderr
    assert "killed" not in again.stdout
    assert len(ends(held)) == 8


def test_after_the_whole_group_was_killed_the_next_batch_needs_no_unlock(held):
    first = begin(held)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    hold(held).unlink()
    second = held.call(*BATCH, **held.environment)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("The last batch was killed (study tiny, ") == 1
    assert len(ends(held)) == len(set(ends(held))) == 8


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A record of a batch that another machine started, and Snakemake's lock."""
    monkeypatch.setattr(batch, "RECORD", tmp_path / ".batch.json")
    monkeypatch.setattr(batch, "LOCKS", tmp_path)
    (tmp_path / "0.output.lock").write_text(f"{batch.paths.RUNS}/tiny/06_figures.done\n")
    last = {"name": "tuneformer-0", "study": "tiny", "pid": 1, "host": "login2", "boot": "", "on_slurm": False}
    write_json(batch.RECORD, last | {"started": "2026-11-24 21:00"})
    return tmp_path


def test_a_batch_of_another_machine_is_not_taken_for_dead(elsewhere):
    with pytest.raises(UserError, match=r"on another machine .*login2.* delete"):
        batch.clear()
    assert (elsewhere / "0.output.lock").exists()


def test_one_that_has_ended_there_is_in_nobodys_way(elsewhere, capsys):
    (elsewhere / "0.output.lock").unlink()
    batch.clear()
    assert capsys.readouterr().out == ""


def test_a_lock_that_another_start_of_the_machine_left_is_removed(elsewhere, capsys):
    write_json(batch.RECORD, read_json(batch.RECORD) | {"host": batch.socket.gethostname(), "pid": os.getpid()})
    batch.clear()
    assert "The last batch was killed (study tiny, " in capsys.readouterr().out
    assert not (elsewhere / "0.output.lock").exists()


def test_locks_of_other_folders_stay(elsewhere):
    write_json(batch.RECORD, read_json(batch.RECORD) | {"host": batch.socket.gethostname()})
    (elsewhere / "1.output.lock").write_text("/elsewhere/runs/tiny/06_figures.done\n")
    batch.clear()
    assert (elsewhere / "1.output.lock").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JOBS", "0"),
        ("JOBS", "2; touch p"),
        ("PROFILE", "$(touch p)"),
        ("PROFILE", "no_such"),
        ("PROFILE", "default/.."),
    ],
)
def test_a_value_that_cannot_be_used_is_one_sentence(name, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}="):
        batch.options()
    assert list(tmp_path.iterdir()) == []
