"""What a study will take: numbers of cells, steps, seconds and bytes, and the lines that say so."""

import math
import shutil
import socket

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tuneformer.data import catalog
from tuneformer.finetune import throughput, training
from tuneformer.finetune.throughput import Speed
from tuneformer.report import plan
from tuneformer.report.plan import Cells, Work
from tuneformer.study import grid, paths
from tuneformer.study.params import load_study
from tuneformer.tokens.tokenizer import Tokens

CELLS = Cells(800.0, 100.0, 100.0, pd.Series({"a": 700, "b": 200, "c": 100}), "known")
SPEED = Speed(1e9, cells_per_second=10.0, steps=3, batch=12, length=128, is_whole=True)


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No downloads, no runs, no network, no measuring."""

    def refuse(*_):
        msg = "the plan went to the network"
        raise AssertionError(msg)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "data")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: SPEED)
    monkeypatch.setattr(plan, "start_seconds", lambda: 2.0)
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 4)


def run_of(strategy="full", **changes):
    return load_study("tiny", train_cells=None, device="cpu", **changes).treated(strategy)


@pytest.mark.parametrize(
    ("train_set", "n_train", "n_validation", "step_cells"),
    [
        ("single_cell", 800, 100, 800),
        ("single_cell_n20", 100, 12.5, 100),  # five classes in the task
        ("single_cell_k5", 160, 20, 160),
        ("single_cell_k5_steps", 800, 100, 160),
        ("pseudobulk_k100_mean", 8, 1, 8),
        ("pseudobulk_k10_sum_thinned", 80, 10, 80),
        ("pseudobulk_k10_sum_steps", 80, 10, 800),
        ("synthetic_nb", 800, 100, 800),
        ("mixture_nb_pad30", 860, 100, 860),
        ("mixture_nb_share50", 800, 100, 800),
    ],
)
def test_a_made_train_set_has_its_own_number_of_points(train_set, n_train, n_validation, step_cells):
    run = run_of(train_set=train_set, padded_classes=["BMS", "Untreated"])
    cells, found = plan.train_set_of(run, CELLS)
    assert (cells.train, cells.validation, cells.test, found) == (n_train, n_validation, 100, step_cells)


def test_few_training_cells_come_with_few_validation_cells():
    cells, step_cells = plan.train_set_of(load_study("tiny", train_cells=200), CELLS)
    assert (cells.train, cells.validation, step_cells) == (200, 25, 200)
    assert plan.train_set_of(load_study("tiny", train_cells=5000), CELLS)[0] == CELLS


@pytest.mark.parametrize("study", ["tiny", "demo_learning_curve", "sciplex2_pseudobulk", "pancreas_published"])
def test_steps_are_those_of_training(study):
    for run in grid.runs(study):
        if run.strategy in run.strategies and run.sampling == "all":
            cells, step_cells = plan.train_set_of(run, CELLS)
            tokens = Tokens(None, None, [], {"step_cells": math.ceil(step_cells)})
            assert plan.work_of(run, CELLS).steps == training.optimizer_steps(run, tokens, round(cells.train))


def test_copies_of_rare_classes_take_steps():
    work = plan.work_of(run_of("full_batch64_upsampled", epochs=3), CELLS)
    n_copied = 3 * 700 * 0.8  # each of three classes as large as the largest, eight of ten cells train
    assert work == Work(steps=3 * 27, trained=3 * 27 * 64, predicted=3 * 100 + 100)
    assert work.steps == 3 * math.ceil(n_copied / 64)


def test_a_baseline_trains_nothing():
    assert plan.work_of(run_of("majority"), CELLS) == Work(0, 0, 0)
    assert plan.work_of(run_of("frozen_embedding_ridge"), CELLS) == Work(0, 0, 1000)


def test_cells_before_anything_is_here():
    demo = plan.cells_of(load_study("demo", demo_cells=1000))
    assert (demo.train, demo.validation, demo.test) == pytest.approx((800, 100, 100))
    fold = plan.cells_of(load_study("pancreas_published"))
    assert fold.all == pytest.approx(16_382)
    assert fold.test == pytest.approx(16_382 / 5)
    assert (fold.classes["t_cell"], len(fold.classes)) == (7, 14)
    assert len(plan.cells_of(load_study("pancreas_technology")).classes) == 9
    saha = plan.cells_of(load_study("sciplex2_synthetic_2class"))
    assert dict(saha.classes) == {"Untreated": 3254, "SAHA": 3318}
    nutlin = plan.cells_of(load_study("sciplex2_nutlin_4class"))
    assert (nutlin.all, nutlin.basis) == (4016, "published, at most")
    assert plan.cells_of(load_study("cardiomyopathy")) is None


def test_cells_that_are_here_are_counted(tmp_path):
    obs = pd.DataFrame(
        {"treatment": ["a"] * 6 + ["b"] * 3 + ["c"], "part": ["x"] * 9 + ["y"]}, index=map(str, range(10))
    )
    own = tmp_path / "own.h5ad"
    ad.AnnData(np.ones((10, 2), dtype=np.float32), obs=obs).write_h5ad(own)
    options = {"dataset": "own", "path": str(own), "test_share": 0.2, "validation_share": 0.5}
    found = plan.cells_of(load_study("saha_2class", classes=[], **options))
    assert (found.train, found.validation, found.test) == pytest.approx((4, 4, 2))
    assert dict(found.classes) == {"a": 6, "b": 3, "c": 1}
    assert dict(plan.cells_of(load_study("saha_2class", classes=[], min_class_cells=3, **options)).classes) == {
        "a": 6,
        "b": 3,
    }
    chosen = load_study("saha_2class", classes=["a", "c"], select_column="part", select_values=["x"], **options)
    assert dict(plan.cells_of(chosen).classes) == {"a": 6}
    settings = load_study("tiny")
    made = paths.cells_path(settings)
    made.parent.mkdir(parents=True)
    obs = pd.DataFrame(
        {"label": ["a"] * 6 + ["b"] * 4, "split": ["train"] * 7 + ["test"] * 3}, index=map(str, range(10))
    )
    ad.AnnData(np.ones((10, 2), dtype=np.float32), obs=obs.astype("category")).write_h5ad(made)
    found = plan.cells_of(settings)
    assert (found.train, found.validation, found.test, found.basis) == (7, 0, 3, "counted after quality control")


def test_seconds_are_operations_over_operations_per_second():
    run = run_of(epochs=2, batch_size=16)
    trained, predicted = throughput.cell_flops(run)
    seconds = plan.run_seconds([run, run.treated("majority")], {"drug_5class": CELLS}, {16: SPEED})
    assert seconds == [(2 * 800 * trained + 300 * predicted) / 1e9, 0.0]


def test_a_study_of_genes_trains_a_model_for_each_fold_and_the_permuted_control():
    first = load_study(
        "demo_gene_dosage", kind="genes", strategies=["full", "linear_probe"], seeds=[0, 1], gene_folds=5
    )
    models = plan.models_of([first])
    assert [run.strategy for run in models] == ["full"] * 20 + ["linear_probe"] * 10
    run = first.model_copy(update={"gene_cells": 100, "batch_size": 32, "epochs": 3})
    assert plan.work_of(run, CELLS) == Work(steps=12, trained=12 * 32, predicted=3 * 100 + 200)


def test_the_lines_of_a_simulated_study(capsys):
    assert plan.main(["tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "Study tiny: 1 task x 1 train set x 2 strategies x 2 seeds = 4 runs",
        "  runs       4, of which 0 are finished",
        "  downloads  none",
    ]
    n_cells, share = 1500, 300 / 1200  # train_cells of those that train
    tokens, kept = 128 * 4 * (300 + 150 * share + 150), 128 * 3 * n_cells  # validation is drawn in proportion
    assert lines[3].startswith(
        f"  disk       {(tokens + kept + 4 * 300_000) / 1e6:,.0f} MB (estimate): 0 MB of downloads, "
    )
    runs = [run.model_copy(update={"device": "cpu"}) for run in grid.runs("tiny")]
    each = plan.run_seconds(runs, {"drug_5class": plan.cells_of(runs[0])}, {12: SPEED})
    total = max(max(each) + 2.0, (sum(each) + 6 * 2.0) / 4)  # two notebooks come before the four runs
    assert lines[4].startswith(f"  time       about {plan._duration(total)} (estimate) on ")
    assert lines[4].endswith(
        f": 4 fine-tuning runs of {plan._duration(min(each))} to {plan._duration(max(each))}, 4 at a time"
    )
    assert lines[5] == "             measured: 10 cells/s in 3 training steps of 12 cells x 128 tokens, random weights"
    assert lines[6].startswith("             counted: 1,500 cells a task (simulated, at most), each of 128 tokens")


def test_the_downloads_of_a_real_study_are_named_with_their_sizes(capsys):
    assert plan.main(["sciplex2_nutlin_2class"]) == 0
    lines = capsys.readouterr().out.splitlines()
    remotes = catalog.needed(load_study("sciplex2_nutlin_2class"))
    total = sum(remote.size for remote in remotes) / 1e6
    missing = f"{len(remotes)} of {len(remotes)} files are missing"
    assert lines[2] == f"  downloads  {total:,.1f} MB to {paths.DOWNLOADS}, {missing}"
    assert "             Geneformer-V1-10M/model.safetensors: 41.2 MB" in lines
    assert not paths.DOWNLOADS.exists()


def test_what_is_not_known_is_said(capsys):
    assert plan.main(["cardiomyopathy"]) == 0
    text = capsys.readouterr().out
    assert "cardiomyopathy/human_dcm_hcm_nf.dataset: size not known" in text
    assert "  downloads  at least " in text
    assert "  disk       at least " in text
    assert "the number of cells is not known before python -m tuneformer.data.download cardiomyopathy" in text


def test_own_cells_in_another_format_are_not_counted_before_they_are_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "tenx").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path / "tenx"))
    assert plan.main(["own_data"]) == 0
    assert "the number of cells is not known before notebook 01 reads them" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_said_before_anything_starts(capsys, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    assert plan.main(["sciplex2_drug_5class"]) == 0
    assert "that does not fit: set TUNEFORMER_RUNS and TUNEFORMER_DOWNLOADS" in capsys.readouterr().out
    assert plan.main(["tiny"]) == 0
    assert "that does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], "params/demoo.yaml does not exist. Did you mean demo?"),
        (["own_data"], "path: $DATA needs the variable DATA, which is not set"),
    ],
)
def test_a_study_that_cannot_be_used_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
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
