"""What the stages of the demo study cost on this machine: `make bench`.

In: nothing but the repository; working files go to a temporary folder. Out: ``benchmarks/results.json`` and a table.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from tuneformer import paths
from tuneformer.artifacts import write_json
from tuneformer.data import fetch, simulate
from tuneformer.study import load_study
from tuneformer.tokens import encode
from tuneformer.tokens.vocabulary import Vocabulary

STUDY, TASK = "demo", "drug_5class"
ONE_RUN = ["-p", "arm", "full", "-p", "seeds", "[0]", "-p", "threads", "1"]
STAGES = {"01_qc": [], "02_tokenize": [], "05_finetune_strategies": ONE_RUN}


def run_stage(notebook: str, options: list[str], runs: Path) -> dict[str, float]:
    """Run one notebook as the batch does; return its seconds and the peak memory of its largest process in MB."""
    command = [sys.executable, "-m", "tuneformer.run", notebook, STUDY, "-p", "task", TASK, *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"TUNEFORMER_RUNS": str(runs)})
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        msg = f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}; see the line above."
        raise SystemExit(msg)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = usage.ru_maxrss * unit / 1e6
    return {"seconds": round(time.perf_counter() - start, 1), "peak_memory_mb": round(peak)}


def training_speed(precision: str, attention: str, runs: Path) -> float:
    """Return the training cells per second of a run on one thread, validation included."""
    options = ["-p", "epochs", "2", "-p", "precision", precision, "-p", "attention", attention]
    run_stage("05_finetune_strategies", [*ONE_RUN, *options], runs)
    table = runs / STUDY / TASK / "full" / "seeds0.csv"
    return round(float(pd.read_csv(table)["cells_per_second"].iloc[0]), 1)


def tokenizer_speed() -> float:
    """Return the cells per second of rank-value encoding, the best of three passes."""
    settings = load_study(STUDY, task=TASK)
    cells = simulate.simulate_sciplex2(settings.demo_cells, seed=settings.demo_seed)
    vocabulary = Vocabulary.read(fetch.checkpoint_dir(settings.checkpoint))
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        encode.encode(cells, vocabulary, max_length=encode.task_length(settings), columns={})
        passes.append(cells.n_obs / (time.perf_counter() - start))
    return round(max(passes))


def import_seconds(module: str) -> float:
    """Return the seconds that a new process takes to import a module, the best of three."""
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        passes.append(time.perf_counter() - start)
    return round(min(passes), 2)


def main() -> None:
    """Measure, print, and write ``benchmarks/results.json``."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        stages = {name: run_stage(name, options, runs) for name, options in STAGES.items()}
        speeds = {
            f"{precision}, {attention}": training_speed(precision, attention, runs)
            for precision in ("fp32", "bf16")
            for attention in ("sdpa", "eager")
        }
    modules = ("tuneformer", "tuneformer.study", "tuneformer.model.fit")
    results = {
        "machine": {
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "study": STUDY,
        "task": TASK,
        "stages": stages,
        "tokenizer_cells_per_second": tokenizer_speed(),
        "training_cells_per_second_one_thread": speeds,
        "import_seconds": {module: import_seconds(module) for module in modules},
    }
    write_json(paths.ROOT / "benchmarks" / "results.json", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
