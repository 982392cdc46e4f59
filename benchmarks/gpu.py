"""Fine-tuning on a GPU: V1-10M and V2-104M shapes, the plain recipe beside ours, in one call of a few minutes.

In: ``$TUNEFORMER_DATA``, and a GPU; ``--smoke`` runs a tiny model on made-up cells and the CPU
through the same code. Out: a JSON line for
each shape: cells per second, ratio, peak memory, and the share of the peak of a matrix product measured here.
"""

import json
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from training import BATCH, CLASSES, ours, plain, real_tokens

from tuneformer.model import hardware
from tuneformer.model.classifier import Cells
from tuneformer.study import load_study


def peak_flops(device: torch.device, size: int) -> float:
    """Return the floating-point operations per second of a product of square matrices in bf16, the best of five."""
    one, best = torch.randn(size, size, device=device, dtype=torch.bfloat16), 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 20 * size**3 / (time.perf_counter() - start))
    return best


def made_up_tokens(n_batches: int) -> Dataset:
    """Return tokens of cells that do not exist, 20 to 200 each."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, n_batches * BATCH)
    return Dataset.from_dict({"input_ids": [rng.integers(2, 25_000, n) for n in lengths], "length": lengths})


def main(arguments: list[str]) -> int:
    """Measure and print; 1 without a GPU."""
    is_smoke = "--smoke" in arguments
    if not is_smoke and not torch.cuda.is_available():
        print("There is no GPU here; run this where torch finds one, or with --smoke.", file=sys.stderr)
        return 1
    device = torch.device("cpu" if is_smoke else "cuda")
    n_batches, shapes = (2, ["tiny"]) if is_smoke else (20, ["V1-10M", "V2-104M"])
    changes = {"strategy": "selective", "freeze_layers": 1, "batch_size": BATCH, "precision": "auto"}
    settings = load_study("tiny").model_copy(update=changes | {"device": device.type})
    hardware.prepare(settings)
    peak = peak_flops(device, 512 if is_smoke else 8192)
    dataset = made_up_tokens(n_batches) if is_smoke else real_tokens(n_batches, longest=2048)
    labels = np.arange(len(dataset)) % CLASSES
    padded, packed = (Cells(dataset, 0, labels=labels, packed=is_packed) for is_packed in (False, True))
    for shape in shapes:
        row = {"shape": shape, "device": hardware.used(device, "")["device"]}
        for name in ("plain", "ours"):
            if not is_smoke:
                torch.cuda.reset_peak_memory_stats()
            if name == "plain":
                plain(shape, padded, 2, cpu=is_smoke)  # kernels are chosen
                seconds = plain(shape, padded, n_batches, cpu=is_smoke)
            else:
                ours(shape, packed, 2, settings)
                seconds, log = ours(shape, packed, n_batches, settings)
                row["share_of_peak"] = log.cost["flops"] / seconds / peak
            row[f"{name}_cells_per_second"] = len(dataset) / seconds
            row[f"{name}_gpu_memory_mb"] = None if is_smoke else torch.cuda.max_memory_allocated() / 1e6
        print(json.dumps(row | {"ratio": row["ours_cells_per_second"] / row["plain_cells_per_second"]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
