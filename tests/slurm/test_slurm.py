"""The profile for Slurm as it is shipped, on a real cluster of one node: ``make test-slurm``."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from tuneformer import paths

BATCH = ("-m", "tuneformer.batch")
quick = pytest.mark.parametrize("cluster", [False], ids=["without accounting"], indirect=True)


@pytest.fixture
def profile(tmp_path):
    """The profile, but asking every 2 s how jobs end; what a test changes is given by `changed`."""
    folder = tmp_path / "profile"
    shutil.copytree(paths.ROOT / "profiles" / "slurm", folder)

    def changed(**keys):
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings |= {"slurm-init-seconds-before-status-checks": 2, "latency-wait": 5, **keys}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(folder)

    return changed


@pytest.fixture
def held(cluster, quick_repository):  # whose batch ends before the cluster does
    """A repository on the cluster, whose batch stays in the second seed of one of its jobs."""
    quick_repository.environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "STUDY": "tiny"}
    hold(quick_repository).touch()
    return quick_repository


def hold(repository):
    return repository.root / "hold-linear_probe-1"


def trained(repository):
    """Return how often the run that is held has begun (with as many threads as the machine allows)."""
    return sum(line.startswith("begin drug_5class linear_probe 1 ") for line in repository.diary())


def ends(repository):
    return sorted(line for line in repository.diary() if line.startswith("end"))


def ended_jobs(cluster, fields):
    """Return fields of all jobs that the cluster remembers."""
    return [line.split() for line in cluster.call("squeue", "--states=all", "-h", "-o", fields).splitlines()]


def test_tiny_runs_through_it(cluster, profile, tmp_path):
    """All rules and the page, in jobs that ask for what the profile says."""
    folders = {"TUNEFORMER_RUNS": str(tmp_path / "runs"), "TUNEFORMER_SITE": str(tmp_path / "site")}
    environment = cluster.environment | folders | {"STUDY": "tiny", "PROFILE": profile()}
    with (tmp_path / "said").open("w") as said:
        subprocess.run(
            [sys.executable, *BATCH], cwd=paths.ROOT, env=environment, stdout=said, stderr=said, timeout=1800
        )
    told = (tmp_path / "said").read_text()
    assert ("Slurm with accounting: sacct " if cluster.has_accounting else "Slurm without accounting (") in told
    assert (tmp_path / "site" / "index.html").is_file(), told
    runs = pd.read_csv(tmp_path / "runs" / "tiny" / "results" / "runs.csv")
    assert list(runs["status"]) == ["ok"] * 8
    jobs = ended_jobs(cluster, "%T %C %m %l %b")
    assert {tuple(job) for job in jobs} == {
        ("COMPLETED", "4", "6000M", "4:00:00", "N/A"),  # rule job
        ("COMPLETED", "1", "6000M", "4:00:00", "N/A"),  # notebooks 01 and 02
    }
    assert sum(cores == "4" for _, cores, *_ in jobs) == 4


@quick
def test_a_job_of_a_study_on_the_gpu_asks_for_one(held, cluster, profile):
    hold(held).unlink()
    params = held.root / "params" / "tiny.yaml"
    params.write_text(params.read_text() + "device: cuda\n")
    ended = held.call(*BATCH, **held.environment, PROFILE=profile(until=["job"]))
    assert ended.returncode == 0, ended.stderr
    asked = sorted(gres for (gres,) in ended_jobs(cluster, "%b"))
    assert asked == ["N/A", "N/A"] + ["gres:gpu:1"] * 4


@quick
def test_a_job_out_of_time_goes_on_at_its_next_seed(held, cluster, profile):
    resources = {"mem_mb": 6000, "runtime": 1}
    asked = profile(**{"until": ["job"], "default-resources": resources})
    first = held.start(*BATCH, **held.environment, PROFILE=asked)
    cluster.wait_for(lambda: trained(held) == 2, "the job is not sent again", seconds=300)
    hold(held).unlink()
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0, (out, err)
    assert ["TIMEOUT"] in ended_jobs(cluster, "%T")
    assert len(ends(held)) == len(set(ends(held))) == 8


@quick
def test_jobs_of_a_killed_batch_are_cancelled_by_the_next(held, cluster, profile):
    asked = profile(until=["job"])
    first = held.start(*BATCH, **held.environment, PROFILE=asked)
    cluster.wait_for(lambda: trained(held), "the job does not start", seconds=300)
    first.kill()
    first.communicate()
    at_work = [job for job, state in ended_jobs(cluster, "%i %T") if state == "RUNNING"]
    assert at_work, "the job outlives Snakemake, otherwise this test shows nothing"
    second = held.start(*BATCH, **held.environment, PROFILE=asked)
    cluster.wait_for(lambda: trained(held) == 2, "the job is not sent again", seconds=300)
    hold(held).unlink()
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "; ending its Slurm jobs " in out
    assert len(ends(held)) == len(set(ends(held))) == 8


def test_without_the_commands_of_slurm_the_sentence_says_where_to_go(tmp_path):
    environment = os.environ | {"PATH": str(tmp_path), "STUDY": "tiny", "PROFILE": "slurm"}
    refused = subprocess.run([sys.executable, *BATCH], cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.endswith("call make on a login node of the cluster.\n")
