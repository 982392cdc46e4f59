"""The benchmark: it runs, says what was measured, and its page shows the numbers that were committed."""

import json
import os
import subprocess
import sys

import pytest

from tuneformer import paths

BENCHMARKS = paths.ROOT / "benchmarks"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import table

    return table


def test_the_page_shows_the_committed_results(table):
    results = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))
    assert (BENCHMARKS / "README.md").read_text(encoding="utf-8") == table.readme(results)


def test_a_median_is_shown_with_its_range(table):
    assert table.spread({"min": 1.0, "median": 2.0, "max": 4.0}) == "2.00 (1.00–4.00)"
    assert table.spread({"min": 1.0, "median": 1.0, "max": 1.0}) == "1.00"
    assert table.flat({"probe": {"run_seconds": 2.5}, "n_cells": 1000}) == {
        "probe: run seconds": "2.5",
        "n cells": "1,000",
    }


def test_every_stage_is_measured_beside_the_plain_way(tmp_path, table):
    environment = {name: value for name, value in os.environ.items() if name != "TUNEFORMER_DATA"}
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"date", "cells", "cpu", "cores", "threads", "load_average"} <= results["measured"].keys()
    assert results["measured"]["cells"].startswith("simulated")
    assert [row["stage"] for row in results["stages"]] == list(table.STAGES)
    for row in results["stages"]:
        for way in ("ours", "plain"):
            assert row[way]["seconds"]["min"] <= row[way]["seconds"]["median"] <= row[way]["seconds"]["max"]
            assert row[way]["peak_memory_mb"] > 0
        assert row["floor_seconds"] > 0
        assert row["times_faster"].keys() == {"min", "median", "max"}
    assert results["startup"][0]["what"] == "import tuneformer"
    assert table.readme(results) == (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--smoke"], []])
def test_that_of_the_gpu_runs_small_on_a_processor_and_says_what_it_lacks(arguments):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if arguments:
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        assert min(row["plain_cells_per_second"], row["ours_cells_per_second"], row["share_of_peak"]) > 0
    else:
        assert done.returncode == 1
        assert done.stderr == "There is no GPU here; run this where torch finds one, or with --smoke.\n"
