"""A batch that is killed, or whose run fails: nothing finished is redone, nothing half-made is trusted."""

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
    """Start the batch, let three runs finish and the fourth begin, then send a signal to all of it."""
    held = repository.root / "hold-linear_probe-1"
    held.touch()
    process = repository.start(*repository.batch_command())
    others = [("full", 0), ("full", 1), ("linear_probe", 0)]
    wait_for(
        lambda: (
            all(repository.record(*run).exists() for run in others)
            and "begin drug_5class linear_probe 1 1" in repository.diary()
        ),
        process,
    )
    time.sleep(0.5)  # Snakemake takes note that the three have ended
    os.killpg(process.pid, sign)
    process.communicate(timeout=300)
    held.unlink()


def test_a_batch_ends_and_has_nothing_to_do_when_called_again(quick_repository):
    batch = quick_repository.batch()
    assert batch.returncode == 0, batch.stderr
    counts = Counter(line.split()[0] for line in quick_repository.diary())
    assert counts == {"qc": 1, "tokenize": 1, "begin": 4, "end": 4}
    lines = [line for line in batch.stdout.splitlines() if "macro-F1" in line]
    assert len(lines) == 4
    assert sum(line.startswith("tiny [4/4] drug_5class single_cell ") for line in lines) >= 1
    assert {line.split()[-1] for line in quick_repository.diary() if line.startswith("end")} == {
        "1"
    }  # one thread a run
    again = quick_repository.batch()
    assert again.returncode == 0, again.stderr
    assert len(quick_repository.diary()) == 10


def test_after_an_interrupt_only_unfinished_runs_are_made(quick_repository):
    kill_midway(quick_repository, signal.SIGINT)
    assert not quick_repository.record("linear_probe", 1).exists()
    resumed = quick_repository.batch()
    assert resumed.returncode == 0, resumed.stderr
    ends = Counter(line for line in quick_repository.diary() if line.startswith("end"))
    assert len(ends) == 4
    assert set(ends.values()) == {1}


def test_after_a_kill_the_lock_is_left_to_the_user(quick_repository):
    """Snakemake cannot know whether the other batch is dead, so it says how to go on and does not decide."""
    kill_midway(quick_repository, signal.SIGKILL)
    refused = quick_repository.batch()
    assert refused.returncode != 0
    assert "--unlock" in refused.stderr
    assert quick_repository.call("-m", "snakemake", "--unlock", "--config", "study=tiny").returncode == 0
    resumed = quick_repository.batch()
    assert resumed.returncode == 0, resumed.stderr
    ends = Counter(line for line in quick_repository.diary() if line.startswith("end"))
    assert sorted(ends.values()) == [1, 1, 1, 1]
    assert all(
        quick_repository.record(strategy, seed).exists() for strategy in ("full", "linear_probe") for seed in (0, 1)
    )


def test_an_executed_notebook_without_a_record_is_no_proof(quick_repository):
    quick_repository.batch()
    quick_repository.record("full").unlink()
    assert quick_repository.record("full").with_name("05_finetune_strategies.ipynb").exists()
    assert quick_repository.batch().returncode == 0
    ends = Counter(line for line in quick_repository.diary() if line.startswith("end"))
    assert ends["end drug_5class full 0 1"] == 2
    assert sum(ends.values()) == 5


def test_a_run_that_raises_stops_the_batch_and_says_where(quick_repository):
    (quick_repository.root / "fail-linear_probe").touch()
    stopped = quick_repository.batch()
    assert stopped.returncode != 0
    shown = stopped.stdout + stopped.stderr
    assert "raised ValueError: the loss is not a number (see runs/tiny/drug_5class/single_cell/linear_probe/" in shown
    assert not quick_repository.record("linear_probe").exists()
    (quick_repository.root / "fail-linear_probe").unlink()
    assert quick_repository.batch().returncode == 0
    ends = Counter(line for line in quick_repository.diary() if line.startswith("end"))
    assert sorted(ends.values()) == [1, 1, 1, 1]


def test_a_training_that_failed_is_a_result_and_the_batch_goes_on(quick_repository):
    (quick_repository.root / "diverge-linear_probe").touch()
    batch = quick_repository.batch()
    assert batch.returncode == 0, batch.stderr
    assert batch.stdout.count(" linear_probe seed ") == batch.stdout.count(": failed, ") == 2
    assert batch.stdout.count("macro-F1 0.500") == 2
    assert quick_repository.batch().returncode == 0
    assert len(quick_repository.diary()) == 10


def test_changed_parameters_have_their_runs_made_again(quick_repository):
    quick_repository.batch()
    params = quick_repository.root / "params" / "tiny.yaml"
    params.write_text(params.read_text().replace("epochs: 5", "epochs: 6"))
    assert quick_repository.batch().returncode == 0
    counts = Counter(line.split()[0] for line in quick_repository.diary())
    assert counts == {"qc": 1, "tokenize": 1, "begin": 8, "end": 8}


def test_committed_results_do_not_stand_for_runs(quick_repository):
    """In a fresh clone metrics.csv is there before any run; the runs have to be made all the same."""
    metrics = quick_repository.root / "results" / "tiny" / "metrics.csv"
    metrics.parent.mkdir(parents=True)
    metrics.touch()
    planned = quick_repository.call("-m", "snakemake", "-n", "--config", "study=tiny", "--quiet", "host")
    counts = dict(line.split() for line in planned.stdout.splitlines() if len(line.split()) == 2)
    jobs = ("qc", "tokenize", "finetune", "leakage", "collect", "figures", "page", "all", "total")
    assert [counts[job] for job in jobs] == ["1", "1", "4", "1", "1", "1", "1", "1", "11"]
