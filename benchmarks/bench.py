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

import torch

from tuneformer.data import simulate
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.tokens.tokenizer import rank_value_encode, task_length
from tuneformer.tokens.vocabulary import Vocabulary

STUDY, TASK = "demo", "drug_5class"
STAGES = {
    "01_qc": [],
    "02_tokenize": [],
    "05_finetune_strategies": ["--strategy", "full", "-p", "threads", "1"],
}


def run_stage(notebook: str, options: list[str], runs: Path) -> dict[str, float]:
    """Run one notebook as the batch does; return its seconds and the peak memory of its largest process in MB."""
    command = [sys.executable, "-m", "tuneformer.study.run", notebook, "--study", STUDY, "--task", TASK, *options]
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
    options = ["--strategy", "full", "-p", "threads", "1", "-p", "epochs", "2"]
    run_stage("05_finetune_strategies", [*options, "-p", "precision", precision, "-p", "attention", attention], runs)
    record = paths.run_dir(load_study(STUDY, task=TASK, strategy="full")).relative_to(paths.RUNS) / "record.json"
    return round(json.loads((runs / record).read_text(encoding="utf-8"))["cost"]["cells_per_second"], 1)


def tokenizer_speed() -> float:
    """Return the cells per second of rank-value encoding, the best of three passes."""
    settings = load_study(STUDY, task=TASK)
    cells = simulate.simulate_sciplex2(settings.demo_cells, seed=settings.demo_seed)
    vocabulary = Vocabulary.read(paths.checkpoint_dir(settings.checkpoint))
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        rank_value_encode(cells, vocabulary, max_length=task_length(settings))
        passes.append(cells.n_obs / (time.perf_counter() - start))
    return round(max(passes))


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
    }
    paths.write_text(paths.ROOT / "benchmarks" / "results.json", json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
