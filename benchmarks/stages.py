"""One stage in a process of its own: ``python benchmarks/stages.py tokenize ours FOLDER``.

In: a folder with ``cells.h5ad``, and, after the stage ``qc``, its working files. Out: one line of JSON with the seconds
(from the file to the written result, imports left out), the peak memory, and the fewest bytes that have to be moved:
each count read once (8 bytes) and the result written once.
"""

import json
import os
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np

from tuneformer.cells import pseudobulk as points
from tuneformer.cells import synthetic as drawing
from tuneformer.data import fetch
from tuneformer.data import qc as control
from tuneformer.model import memory
from tuneformer.study import load_study
from tuneformer.tokens import encode
from tuneformer.tokens.vocabulary import Vocabulary


def cells_of(folder: Path) -> ad.AnnData:
    """Return the quality-controlled cells, which are made if they are not there yet."""
    return control.prepare_cells(load_study("own_data", path=str(folder / "cells.h5ad"), label="label"))


def qc(folder: Path, vocabulary: Vocabulary) -> int:
    """Check, measure, select and split the cells."""
    cells_of(folder)
    return 0


def tokenize(folder: Path, vocabulary: Vocabulary) -> int:
    """Encode the cells, row after row into a file."""
    target = folder / f"ours-{os.getpid()}.dataset"
    target.mkdir()
    dataset = encode.encode(cells_of(folder), vocabulary, max_length=2048, folder=target)
    return 4 * int(dataset.data.column("length").to_numpy().sum())


def pseudobulk(folder: Path, vocabulary: Vocabulary) -> int:
    """Sum about ten cells of a class at a time."""
    cells = cells_of(folder)
    strata = points.strata(cells, None)
    groups = points.group_cells(strata, k=10, spread=0.1, rng=np.random.default_rng(0))
    made = points.aggregate(cells, groups, how="sum", k=10, strata=strata, name="pseudobulk")
    made.write_h5ad(folder / "ours.h5ad")
    return 8 * made.X.nnz


def synthetic(folder: Path, vocabulary: Vocabulary) -> int:
    """Draw as many cells of each class as it has, gene by gene from a normal distribution."""
    cells = cells_of(folder)
    strata = points.strata(cells, None)
    options = {"generator": "gaussian", "reference": None, "rank": 10, "name": "synthetic"}
    numbers = strata.value_counts(sort=False)
    made = drawing.generate(cells, strata=strata, numbers=numbers, rng=np.random.default_rng(0), **options)
    made.write_h5ad(folder / "ours.h5ad")
    return 8 * made.X.nnz


def vocabulary_of(folder: Path) -> Vocabulary:
    """Return the vocabulary of V1 where the real dictionaries are, otherwise that of the demo checkpoint."""
    given = (folder / "vocabulary.txt").read_text(encoding="utf-8")
    return Vocabulary.read(Path(given) if given else fetch.checkpoint_dir("demo"))


def main() -> None:
    """Do the stage, and print what it took."""
    stage, way, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    vocabulary = vocabulary_of(folder)
    if way == "plain":
        import plain

        do = getattr(plain, stage)
    else:
        import scanpy.pp  # noqa: F401 (its import is no part of the stage)

        do = {"qc": qc, "tokenize": tokenize, "pseudobulk": pseudobulk, "synthetic": synthetic}[stage]
    start = time.perf_counter()
    written = do(folder, vocabulary)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_memory_mb": memory.peak_memory(), "written": written}))


if __name__ == "__main__":
    main()
