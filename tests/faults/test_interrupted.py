"""A batch that is killed, or whose job fails: nothing finished is made again, nothing half-made is trusted."""

import os
import signal
import time
from collections import Counter


def wait_for(condition, process, *, seconds=600):
    """Wait until `condition` holds while `process` is at work."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the batch did not get there"
        time.sleep(0.05)


def kill_midway(repository, sign):
    """Start the batch, let three jobs and the first seed of the fourth finish, then send a signal to all of it."""
    held = repository.root / "hold-linear_probe-1"
    held.touch()
    process = repository.start(*repository.batch_command())
    others = ("full", "random_init", "logistic_counts")
    wait_for(
        lambda: (
            all(repository.table(arm).exists() for arm in others)
            and "begin drug_5class linear_probe 1 1" in repository.diary()
        ),
        process,
    )
    time.sleep(0.5)  # Snakemake takes note that the three have ended
    os.killpg(process.pid, sign)
    process.communicate(timeout=300)
    held.unlink()


def ends(repository):
    return Counter(line for line in repository.diary() if line.startswith("end"))


def test_a_batch_ends_and_has_nothing_to_do_when_called_again(quick_repository):
    batch = quick_repository.batch()
    assert batch.returncode == 0, batch.stderr
    counts = Counter(line.split()[0] for line in quick_repository.diary())
    assert counts == {"qc": 1, "tokenize": 1, "begin": 8, "end": 8}
    lines = [line for line in batch.stdout.splitlines() if "macro-F1" in line]
    assert len(lines) == 4
    assert sum(line.startswith("tiny [4/4] drug_5class ") for line in lines) >= 1
    assert {line.split()[-1] for line in ends(quick_repository)} == {"1"}  # one thread per job
    again = quick_repository.batch()
    assert again.returncode == 0, again.stderr
    assert len(quick_repository.diary()) == 18


def test_after_an_interrupt_a_job_goes_on_at_the_next_seed(quick_repository):
    kill_midway(quick_repository, signal.SIGINT)
    assert not quick_repository.table("linear_probe").exists()
    resumed = quick_repository.batch()
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(ends(quick_repository).values()) == [1] * 8


def test_after_a_kill_finished_seeds_are_kept(quick_repository):
    """Snakemake cannot know whether the other batch is dead, so it says how to go on and does not decide."""
    kill_midway(quick_repository, signal.SIGKILL)
    refused = quick_repository.batch()
    assert refused.returncode != 0
    assert "--unlock" in refused.stderr
    assert quick_repository.call("-m", "snakemake", "--unlock", "--config", "study=tiny").returncode == 0
    resumed = quick_repository.batch()
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(ends(quick_repository).values()) == [1] * 8
    assert quick_repository.table("linear_probe").exists()


def test_an_executed_notebook_without_rows_is_no_proof(quick_repository):
    quick_repository.batch()
    quick_repository.table("full").unlink()
    (quick_repository.run_folder("full", 1) / "key").unlink()
    assert quick_repository.table("full").with_suffix(".ipynb").exists()
    assert quick_repository.batch().returncode == 0
    counts = ends(quick_repository)
    assert counts["end drug_5class full 0 1"] == 1
    assert counts["end drug_5class full 1 1"] == 2
    assert sum(counts.values()) == 9


def test_a_job_that_raises_stops_the_batch_and_says_where(quick_repository):
    (quick_repository.root / "fail-linear_probe").touch()
    stopped = quick_repository.batch()
    assert stopped.returncode != 0
    shown = stopped.stdout + stopped.stderr
    assert (
        "raised ValueError: the loss is not a number (see runs/tiny/drug_5class/linear_probe/seeds0-1.ipynb)" in shown
    )
    assert not quick_repository.table("linear_probe").exists()
    assert not quick_repository.run_folder("linear_probe", 0).exists()
    (quick_repository.root / "fail-linear_probe").unlink()
    assert quick_repository.batch().returncode == 0
    assert sorted(ends(quick_repository).values()) == [1] * 8


def test_a_training_that_failed_is_a_result_and_the_batch_goes_on(quick_repository):
    (quick_repository.root / "diverge-linear_probe").touch()
    batch = quick_repository.batch()
    assert batch.returncode == 0, batch.stderr
    assert "linear_probe: no run succeeded (2 of 2 runs failed), " in batch.stdout
    assert batch.stdout.count("macro-F1 0.500") == 3
    assert quick_repository.batch().returncode == 0
    assert len(quick_repository.diary()) == 18


def test_changed_parameters_have_their_runs_made_again(quick_repository):
    quick_repository.batch()
    params = quick_repository.root / "params" / "tiny.yaml"
    params.write_text(params.read_text().replace("epochs: 5", "epochs: 6"))
    assert quick_repository.batch().returncode == 0
    counts = Counter(line.split()[0] for line in quick_repository.diary())
    assert counts == {"qc": 1, "tokenize": 1, "begin": 16, "end": 16}


def test_committed_results_do_not_stand_for_runs(quick_repository):
    """In a fresh clone an answer is there before any run; the jobs have to be done all the same."""
    answer = quick_repository.root / "results" / "tiny" / "answer.json"
    answer.parent.mkdir(parents=True)
    answer.touch()
    planned = quick_repository.call("-m", "snakemake", "-n", "--config", "study=tiny", "--quiet", "host")
    counts = dict(line.split() for line in planned.stdout.splitlines() if len(line.split()) == 2)
    asked = ("qc", "tokenize", "job", "collect", "figures", "page", "all", "total")
    assert [counts[rule] for rule in asked] == ["1", "1", "4", "1", "1", "1", "1", "10"]
