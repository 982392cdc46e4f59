"""A saved model in a process of its own, as it would run on a small computer: load it, predict, measure that.

In: the folder of a model (``model.onnx``, or ``config.json`` and ``model.safetensors``) and cells. Out: logits, cells
per second and peak memory. A process that runs ONNX never loads torch, and none loads what trains.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tuneformer.model import memory

Batch = tuple[np.ndarray, np.ndarray]
Predictor = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From tokens and attention mask, (batch, length) int64 each, to logits, (batch, classes)."""


def load(folder: Path, *, threads: int) -> Predictor:
    """Load a saved model that may use so many CPU threads."""
    if (folder / "model.onnx").is_file():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as OMP_WAIT_POLICY=passive for torch
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    import torch

    from tuneformer.model import variants

    torch.set_num_threads(threads)
    model = variants.read_model(folder)

    def predict(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids), torch.from_numpy(mask)).logits.numpy()

    return predict


def batches(ids: np.ndarray, lengths: np.ndarray, size: int) -> list[Batch]:
    """Divide cells, padded on the right (cells, length), into batches of `size`, each as long as its longest cell."""
    parts = [slice(start, start + size) for start in range(0, len(ids), size)]
    masks = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return [(ids[part, : lengths[part].max()].copy(), masks[part, : lengths[part].max()].copy()) for part in parts]


def rates(predictors: dict[str, Predictor], work: list[Batch], repeats: int) -> dict[str, list[float]]:
    """Predict the same batches by turns; return the cells per second of each repetition after a warm-up.

    By turns, because what else a machine has to do changes from second to second: the ratio of neighbours says more
    than that of two medians.
    """
    n_cells = sum(len(ids) for ids, _ in work)
    found: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(repeats + 1):
        for name, predict in predictors.items():
            start = time.perf_counter()
            for ids, mask in work:
                predict(ids, mask)
            found[name].append(n_cells / (time.perf_counter() - start))
    return {name: numbers[1:] for name, numbers in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Load a model, predict all cells of a file, and print what that took as JSON.

    The file has arrays ``ids`` (cells, length), ``lengths``, and ``timed``, the numbers of the cells on which speed and
    memory are measured. Keys printed: ``import_memory_mb`` (peak before the model is loaded), ``peak_memory_mb`` (peak
    after loading it and predicting the timed cells on one thread), ``rates`` and ``reference_rates`` (threads to the
    cells per second of each repetition, of the model and of the one that it is compared with).
    """
    parser = argparse.ArgumentParser(prog="python -m tuneformer.model.deployed", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument("reference", type=Path, help="of the model that its speed is compared with")
    parser.add_argument("cells", type=Path, help="npz file of the cells")
    parser.add_argument("logits", type=Path, help="npy file to be written")
    for option in ("batch", "threads", "repeats"):
        parser.add_argument(f"--{option}", type=int, required=True)
    given = parser.parse_args(arguments)
    if (given.folder / "model.onnx").is_file():
        import onnxruntime  # noqa: F401
    else:
        from tuneformer.model import variants  # noqa: F401
    stored = np.load(given.cells)
    ids, lengths, timed = stored["ids"], stored["lengths"], stored["timed"]
    work = batches(ids[timed], lengths[timed], given.batch)
    measured = {"import_memory_mb": memory.peak_memory(), "rates": {}, "reference_rates": {}}
    predict = load(given.folder, threads=1)
    rates({"model": predict}, work, 1)
    measured["peak_memory_mb"] = memory.peak_memory()
    np.save(given.logits, np.concatenate([predict(*batch) for batch in batches(ids, lengths, given.batch)]))
    for threads in sorted({1, given.threads}):
        both = {"rates": given.folder, "reference_rates": given.reference}
        predictors = {name: load(folder, threads=threads) for name, folder in both.items()}
        for name, numbers in rates(predictors, work, given.repeats).items():
            measured[name][threads] = numbers
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
