"""What the stages cost on this machine, ours beside the plain way in one run: ``make bench``.

In: nothing but the repository, and real cells and dictionaries where TUNEFORMER_DATA names their folder. Working files
go to a temporary folder. Out: ``results.json`` and, written from it alone, ``README.md``, both in ``benchmarks/``.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import table
import torch

from tuneformer import paths
from tuneformer.artifacts import write_json, write_text
from tuneformer.data import simulate

HERE = Path(__file__).parent
STAGES = ("qc", "tokenize", "pseudobulk", "synthetic")
SIZES = [10_000, 100_000]
REPEATS = 5
LONGEST = 60.0  # seconds: the plain way is measured at a larger size where it should not take longer
FIRST_CELL = """
import json
cells = [cell for cell in json.load(open("05_finetune_strategies.ipynb"))["cells"] if cell["cell_type"] == "code"]
exec("\\n".join("".join(cell["source"]) for cell in cells[:2]), {})
"""


def summary(values: list[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def seconds_of(command: list[str], repeats: int, **options: Any) -> dict[str, float]:
    """Return how long a command takes."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, **options)
        taken.append(time.perf_counter() - start)
    return summary(taken)


def bandwidth() -> float:
    """Return the bytes per second that one thread reads and writes in a copy of 256 MB, the best of five."""
    source = np.ones(2**25)
    target, taken = np.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        taken.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(taken)


def matmul_peak(kind: torch.dtype, size: int = 2048) -> float:
    """Return the floating-point operations per second of a product of square matrices, the best of five."""
    left, taken = torch.ones(size, size, dtype=kind), []
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken)


def machine(cells: str) -> dict[str, Any]:
    """Say on what, when and with which cells was measured; the load is that before the start."""
    load = os.getloadavg()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cells": cells,
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(load, 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "scanpy", "datasets", "numpy")},
        "bytes_per_second": bandwidth(),
        "flops_fp32": matmul_peak(torch.float32),
        "flops_bf16": matmul_peak(torch.bfloat16),
    }


def source_cells() -> tuple[ad.AnnData, str, str]:
    """Return cells with ``obs["label"]``, what they are, and the folder of the vocabulary (none: the demo's)."""
    data = os.environ.get("TUNEFORMER_DATA")
    if data is None:
        cells = simulate.simulate_corpus(4_000, n_types=10, seed=0)
        cells.obs = cells.obs.rename(columns={"cell_type": "label"})
        return cells, "simulated cells, demo vocabulary", ""
    cells = ad.read_h5ad(Path(data) / "pbmc_facs_raw.h5ad")
    cells.obs = cells.obs[["celltype"]].rename(columns={"celltype": "label"})
    return cells, "PBMC (pbmc_facs_raw.h5ad), V1 dictionaries", str(Path(data) / "geneformer_v1")


def write_cells(cells: ad.AnnData, n_cells: int, vocabulary: str, folder: Path) -> int:
    """Write so many cells, drawn with replacement, and return the number of their counts above 0."""
    folder.mkdir()
    rows = np.random.default_rng(0).integers(cells.n_obs, size=n_cells)
    obs = cells.obs.iloc[rows].set_axis([f"cell{number}" for number in range(n_cells)])
    drawn = ad.AnnData(cells.X[rows], obs=obs, var=cells.var)
    drawn.write_h5ad(folder / "cells.h5ad")
    (folder / "vocabulary.txt").write_text(vocabulary, encoding="utf-8")
    return int(drawn.X.nnz)


def measured(stage: str, way: str, folder: Path) -> dict[str, float]:
    """Do a stage once in a process of its own."""
    runs = folder / "runs"
    if stage == "qc":
        shutil.rmtree(runs, ignore_errors=True)
    command = [sys.executable, str(HERE / "stages.py"), stage, way, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TUNEFORMER_RUNS": str(runs)})
    if ended.returncode != 0:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def stage_row(
    stage: str, folder: Path, n_cells: int, n_counts: int, rate: float, *, repeats: int, plain: bool
) -> dict[str, Any]:
    """Measure one stage, ours and the plain way in turns; `rate` is the bandwidth in bytes per second."""
    ways = ("ours", "plain") if plain else ("ours",)
    passes = [{way: measured(stage, way, folder) for way in ways} for _ in range(repeats)]
    row: dict[str, Any] = {"stage": stage, "n_cells": n_cells}
    for way in ways:
        row[way] = {
            "seconds": summary([one[way]["seconds"] for one in passes]),
            "peak_memory_mb": max(one[way]["peak_memory_mb"] for one in passes),
        }
    if plain:
        row["times_faster"] = summary([one["plain"]["seconds"] / one["ours"]["seconds"] for one in passes])
    row["floor_seconds"] = (8 * n_counts + passes[0]["ours"]["written"]) / rate
    row["share_of_floor"] = row["floor_seconds"] / row["ours"]["seconds"]["median"]
    return row


def stages(sizes: list[int], repeats: int, rate: float, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Measure all stages at all sizes; the larger ones once. Return also what the cells are."""
    cells, what, vocabulary = source_cells()
    rows: list[dict[str, Any]] = []
    for n_cells in sizes:
        place = folder / str(n_cells)
        n_counts = write_cells(cells, n_cells, vocabulary, place)
        for stage in STAGES:
            smaller = [row for row in rows if row["stage"] == stage and "plain" in row]
            expected = max((row["plain"]["seconds"]["median"] * n_cells / row["n_cells"] for row in smaller), default=0)
            is_first = n_cells == sizes[0]
            options = {"repeats": repeats if is_first else 1, "plain": is_first or 0 < expected <= LONGEST}
            rows.append(stage_row(stage, place, n_cells, n_counts, rate, **options))
            print(f"{stage}, {n_cells:,} cells: {rows[-1]['ours']['seconds']['median']:.1f} s", file=sys.stderr)
        shutil.rmtree(place)
    return rows, what


def startup(repeats: int, folder: Path, *, batch: bool) -> list[dict[str, Any]]:
    """Measure what has to be waited for before anything happens; with `batch`, a whole study and one job of it."""
    python, rows = sys.executable, []

    def add(what: str, command: list[str], limit: float | None, **options: Any) -> None:
        taken = seconds_of(command, options.pop("repeats", repeats), **options)
        rows.append({"what": what, "seconds": taken, "wanted_seconds": limit})
        print(f"{what}: {taken['median']:.2f} s", file=sys.stderr)

    add("import tuneformer", [python, "-c", "import tuneformer"], 0.2)
    add("import tuneformer.study", [python, "-c", "import tuneformer.study"], None)
    add("parameters and imports of notebook 05", [python, "-c", FIRST_CELL], 3.0, cwd=paths.NOTEBOOKS)
    if batch:
        places = {"TUNEFORMER_RUNS": str(folder / "runs"), "TUNEFORMER_SITE": str(folder / "site")}
        options = {"cwd": paths.ROOT, "env": os.environ | places}
        snakemake = [python, "-m", "snakemake", "-s", str(paths.ROOT / "Snakefile"), "--directory", str(folder)]
        study = ["--config", "study=tiny"]
        add("the study tiny from nothing, 4 arms", [*snakemake, "--cores", "all", *study], None, repeats=1, **options)
        add("snakemake on a finished study", [*snakemake, "-n", *study], 3.0, **options)
        job = [python, "-m", "tuneformer.run", "05_finetune_strategies", "tiny", "-p", "arm", "full"]
        add("a job that is finished already", job, None, **options)
        arm = str(folder / "runs" / "tiny" / "drug_5class" / "full")
        again = f"import shutil, subprocess; shutil.rmtree({arm!r}); subprocess.run({[*job, '-p', 'seeds', '[0]']!r})"
        add("a job of one seed, 5 epochs of 300 cells", [python, "-c", again], None, repeats=min(repeats, 3), **options)
    return rows


def parts(sizes: list[int]) -> dict[str, Any]:
    """Measure what has a file of its own: training on the processor, and how the stages grow with the cells."""
    found: dict[str, Any] = {}
    if "TUNEFORMER_DATA" in os.environ:  # it trains on real cells
        found["training"] = importlib.import_module("training").measure()
    return found | {"large": importlib.import_module("large").measure(sizes)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results.json and README.md."""
    parser = argparse.ArgumentParser(prog="python benchmarks/bench.py", description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of cells, the smallest first")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measurements at the smallest size")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it runs: the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and README.md")
    given = parser.parse_args(arguments)
    sizes, repeats = ([200], 1) if given.smoke else (given.sizes, given.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {"measured": machine("")}
        rate = results["measured"]["bytes_per_second"]
        results["stages"], results["measured"]["cells"] = stages(sizes, repeats, rate, folder)
        results["startup"] = startup(repeats, folder, batch=not given.smoke)
    if not given.smoke:
        results |= parts(sizes)
    write_json(given.out / "results.json", results)
    write_text(given.out / "README.md", table.readme(results))


if __name__ == "__main__":
    main()
