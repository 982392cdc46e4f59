"""What a study will take: jobs, numbers of cells, seconds and bytes, and the lines that say so."""

import shutil
import socket

import pytest

from tuneformer import paths
from tuneformer.data.fetch import RemoteFile
from tuneformer.report import plan
from tuneformer.study import load_study


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch):
    """No downloads, no network, no measuring, four cores."""

    def refuse(*_):
        msg = "the plan went to the network"
        raise AssertionError(msg)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(plan, "measure", lambda _: 0.01)
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 4)


def run_of(**changes):
    return load_study("small", task="drugs", demo_cells=1000, validation_share=0.1, test_share=0.2, **changes)


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, 720),
        ({"folds": 4}, 675),
        ({"train_cells": 300}, 300),
        ({"train_cells": 5000}, 720),
        ({"cells_per_class": 20}, 60),  # three classes
        ({"train_set": "pseudobulk", "k": 10}, 72),
        ({"train_set": "pseudobulk", "k": 10, "steps_of": "single_cell"}, 720),
        ({"k": 10, "steps_of": "pseudobulk"}, 72),
        ({"train_set": "mixture", "pad": 30, "padded_classes": ["Dex", "Nutlin"]}, 780),
        ({"train_set": "synthetic", "generator": "nb"}, 720),
    ],
)
def test_a_train_set_has_its_own_number_of_cells(settings, changes, cells):
    assert plan.trained_cells(run_of(**changes)) == cells


def test_seconds_are_those_of_all_cells_that_are_seen(settings):
    run = run_of(epochs=3)
    assert plan.run_seconds(run, 0.5) == pytest.approx((3 * 720 * (1 + 0.1 / 3) + 200 / 3) * 0.5)
    few = run_of(epochs=3, train_cells=20, min_steps=400, batch_size=10)
    assert plan.run_seconds(few, 0.5) == pytest.approx((4000 * (1 + 0.1 / 3) + 200 / 3) * 0.5)
    assert plan.run_seconds(run_of(arm="logistic_counts"), 0.5) == plan.BASELINE_SECONDS


def test_the_lines_of_a_simulated_study(settings, capsys):
    assert plan.main(["small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Study small: 2 tasks x 6 arms = 12 jobs, 36 runs, of which 0 are finished"
    assert lines[2:5] == [
        "  tasks      drugs, doses",
        "  arms       full, linear_probe, random_init, logistic_counts, pseudobulk_k2, pseudobulk_k10",
        "  contrasts  pre-training: full against random_init",
    ]
    assert "             pseudo-bulk of 10: pseudobulk_k10 against full" in lines
    assert "  downloads  none" in lines
    model = (paths.ASSETS / "demo_checkpoint" / "model.safetensors").stat().st_size
    needed = 2 * 6000 * 192 * 7 + 10 * model + 36 * plan.RUN_BYTES
    assert any(
        line.startswith(f"  disk       {needed / 1e6:,.0f} MB (rough), of which {10 * model / 1e6:,.0f}")
        for line in lines
    )
    assert lines[-2].startswith("  time       about ")
    assert lines[-2].endswith(" s, 4 jobs at a time") or lines[-2].endswith(" minutes, 4 jobs at a time")
    assert lines[-1] == "             measured: 100 cells/s in training, with random weights"
    assert not paths.RUNS.exists()


def test_finished_runs_take_no_time(finished):
    lines = plan.plan("small")
    assert lines[0].endswith("36 runs, of which 36 are finished")
    assert lines[-1] == "  time       none: every run is finished"


def test_downloads_are_named_with_their_sizes(settings, monkeypatch):
    files = [
        RemoteFile("set/a.h5ad", "https://example.org/a", size=145_178_504),
        RemoteFile("set/b.dataset", "https://example.org/b"),
        RemoteFile("set/here.h5ad", "https://example.org/here", size=7),
    ]
    monkeypatch.setattr(plan.sources, "remote_files", lambda _: files)
    monkeypatch.setattr(plan.fetch, "is_present", lambda file: file.name == "set/here.h5ad")
    lines = plan.plan("small")
    start = lines.index("  downloads  at least 145.2 MB to downloads, 2 of 3 files")
    assert lines[start + 1 : start + 3] == [
        "             set/a.h5ad: 145.2 MB",
        "             set/b.dataset: size not known",
    ]


def test_a_checkpoint_that_is_not_here_yet_is_counted(settings):
    with (paths.PARAMS / "small.yaml").open("a") as file:
        file.write("checkpoint: Geneformer-V1-10M\n")
    text = "\n".join(plan.plan("small"))
    assert "Geneformer-V1-10M/model.safetensors: 41.2 MB" in text
    assert "of which 412 MB for models" in text


def test_what_is_not_known_is_said(settings):
    with (paths.PARAMS / "small.yaml").open("a") as file:
        file.write("dataset: own\npath: cells.h5ad\n")
    text = "\n".join(plan.plan("small"))
    assert "the number of cells is not known before notebook 01 reads them" in text
    assert "  disk       at least " in text


def test_a_disk_that_is_too_small_is_said_before_anything_starts(settings, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    assert "that does not fit: set TUNEFORMER_RUNS and TUNEFORMER_DOWNLOADS" in "\n".join(plan.plan("small"))


def test_a_study_that_cannot_be_used_is_one_sentence(settings, capsys):
    assert plan.main(["smal"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("params/smal.yaml does not exist. Did you mean small?")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "less than 1 s"),
        (89.4, "89 s"),
        (90, "1.5 minutes"),
        (1500, "25 minutes"),
        (9000, "2.5 hours"),
        (864000, "10 days"),
    ],
)
def test_times_are_said_in_a_unit_that_fits(seconds, text):
    assert plan._duration(seconds) == text


class TestMeasuring:
    """With the real function, on the demo checkpoint."""

    @pytest.fixture(autouse=True)
    def _really(self, nothing_here, monkeypatch):
        monkeypatch.undo()

    def test_a_step_is_timed_at_the_length_of_the_study(self, monkeypatch):
        settings = load_study("tiny", device="cpu", threads=1)
        monkeypatch.setattr(plan, "BUDGET", 30.0)
        assert 0 < plan.measure(settings) < 10

    def test_too_little_memory_is_one_sentence(self, monkeypatch):
        import torch
        from torch.optim import AdamW

        def lacking(*_, **__):
            msg = "DefaultCPUAllocator: can't allocate memory"
            raise RuntimeError(msg)

        monkeypatch.setattr(AdamW, "step", lacking)
        with pytest.raises(plan.UserError, match="needs more memory than there is; take a smaller one"):
            plan.measure(load_study("tiny", device="cpu", threads=1))
        assert torch.get_num_threads() >= 1
