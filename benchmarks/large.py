"""What large data sets take: 01, 02, the start of training, pseudo-bulk and synthetic cells, by number of cells.

In: nothing; PBMC in $TUNEFORMER_DATA are resampled if they are there, else counts are simulated. Out: seconds and peak
memory of each stage, each in a process of its own, from `measure`; as a command (`python benchmarks/large.py 10000
100000`) a table. Working files go to a temporary folder (below TMPDIR): 14 kB a cell at most, removed at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer import paths
from tuneformer.cells import pseudobulk, synthetic
from tuneformer.data import counts, qc
from tuneformer.model.memory import peak_memory
from tuneformer.study import Study, load_study

GENES = 16_791  # of the PBMC
BLOCK = 5000  # cells
STEPS = 50  # batches that are built
SYNTHETIC = 10_000  # genes of synthetic cells, and most genes that are drawn from
STAGES = ("01", "02", "training start", "pseudo-bulk", "synthetic")
GROWTH = 1.5  # times the growth of the cells that the seconds may grow, beyond a constant


def blocks(n_cells: int) -> Iterator[sparse.csr_matrix]:
    """Give counts like those of PBMC: real cells drawn again, with single molecules lost, or simulated ones."""
    rng = np.random.default_rng(0)
    pool = None if path_of_pbmc() is None else sparse.csr_matrix(ad.read_h5ad(path_of_pbmc()).X)
    shares = rng.lognormal(0, 2, GENES)
    for start in range(0, n_cells, BLOCK):
        number = min(BLOCK, n_cells - start)
        if pool is None:
            drawn = [np.bincount(rng.choice(GENES, 2000, p=shares / shares.sum()), minlength=GENES) for _ in range(50)]
            block = sparse.csr_matrix(np.array(drawn))[rng.integers(50, size=number)]
        else:
            block = pool[rng.integers(pool.shape[0], size=number)]
        block = block.astype(np.float32)
        block.data = np.maximum(1, rng.binomial(block.data.astype(np.int64), 0.9)).astype(np.float32)
        yield block


def write_cells(path: Path, n_cells: int) -> None:
    """Write an h5ad of so many cells in five classes and forty wells, some cells at a time."""
    rng = np.random.default_rng(1)
    genes = ad.read_h5ad(path_of_pbmc(), backed="r").var["ensembl_id"].astype(str) if path_of_pbmc() else None
    names = pd.Index([f"ENSG{number:011d}" for number in range(GENES)]) if genes is None else pd.Index(genes)
    obs = pd.DataFrame(
        {
            "treatment": pd.Categorical(rng.choice([f"class{number}" for number in range(5)], n_cells)),
            "well": pd.Categorical(rng.choice([f"W{number}" for number in range(40)], n_cells)),
        },
        index=[f"cell{number:07d}" for number in range(n_cells)],
    )
    var = pd.DataFrame({"ensembl_id": names.to_numpy(), "symbol": names.to_numpy()}, index=names)
    ad.AnnData(obs=obs, var=var).write_h5ad(path)
    counts.write(path, blocks(n_cells))


def path_of_pbmc() -> Path | None:
    """Return where the real PBMC are, if they are."""
    path = Path(os.environ.get("TUNEFORMER_DATA", "")) / "pbmc_facs_raw.h5ad"
    return path if path.is_file() else None


def settings_of(folder: Path) -> Study:
    """Return the study of the large file: own cells, and a checkpoint with the official V1 dictionary where it is."""
    own = {"dataset": "own", "path": str(folder / "cells.h5ad"), "classes": [], "dose_column": None, "group_by": None}
    known = {"vocabulary": "fit"} if path_of_pbmc() is None else {"checkpoint": str(folder / "checkpoint")}
    return load_study("tiny", **own, **known, min_counts=0, max_counts=None, max_length=None, train_cells=None)


def write_checkpoint(folder: Path) -> None:
    """Put the official V1 dictionaries, as far as they are there, beside a configuration of 2,048 positions."""
    folder.mkdir()
    for file in (path_of_pbmc().parent / "geneformer_v1").iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))


def stage(name: str, folder: Path) -> dict[str, float]:
    """Do one stage in this process; return its seconds (also of CPU), the peak memory (MB) and what it added (MB)."""
    paths.RUNS = folder / "runs"
    settings = settings_of(folder)
    before, start, cpu, steps = peak_memory(), time.perf_counter(), time.process_time(), {}
    if name == "write":
        write_cells(folder / "cells.h5ad", int(os.environ["N_CELLS"]))
        if path_of_pbmc() is not None:
            write_checkpoint(folder / "checkpoint")
    elif name == "01":
        qc.prepare_cells(settings)
    elif name == "02":
        from tuneformer.tokens import encode

        encode.single_cell_tokens(settings)
    elif name == "training start":
        steps = training_start(settings)
    elif name == "pseudo-bulk":
        cells = qc.prepare_cells(settings)
        stratum = pseudobulk.strata(cells, None)
        groups = pseudobulk.group_cells(stratum, k=10, spread=0.25, rng=np.random.default_rng(0))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pseudobulk.aggregate(cells, groups, how="sum", k=10, strata=stratum, name="p", folder=Path(scratch))
    else:
        steps = synthetic_cells(settings, name, int(os.environ["N_CELLS"]), folder)
    cpu = time.process_time() - cpu
    seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(cpu, 1)}
    return {**seconds, "peak_mb": round(peak_memory()), "added_mb": round(peak_memory() - before), **steps}


def training_start(settings: Study) -> dict[str, float]:
    """Prepare a run of cells that have tokens, check it for leaks, and build its first batches; without imports.

    ``added_mb`` is without the pages of the token file that batches have read (``mapped_mb``): the system takes these
    back when others need memory, and brings in 2 MB or so around every cell while nobody does.
    """
    from tuneformer.cells import make
    from tuneformer.evaluate import leakage
    from tuneformer.model import fit
    from tuneformer.model.classifier import Cells

    imported, times = peak_memory(), [time.process_time()]
    prepared = make.prepare(settings)
    times.append(time.process_time())
    leakage.refuse_leaks(prepared, settings)
    times.append(time.process_time())
    rows = fit.rows_of_splits(settings, prepared.tokens)
    cells = Cells(prepared.tokens.dataset, 0, rows=rows["train"])
    order, added = np.random.default_rng(0).permutation(len(cells)), peak_memory() - imported
    for step in range(STEPS):
        cells.__getitems__(order[12 * step : 12 * step + 12])
    times.append(time.process_time())
    parts = dict(zip(("prepare", "leaks", "batches"), np.diff(times).round(1).tolist(), strict=True))
    mapped = peak_memory() - imported - added
    return {"cpu_seconds": round(times[-1] - times[0], 1), "added_mb": round(added), "mapped_mb": round(mapped)} | parts


def synthetic_cells(settings: Study, name: str, number: int, folder: Path) -> dict[str, float]:
    """Draw synthetic cells of 10^4 genes by one generator, from at most 10,000 cells."""
    cells = qc.prepare_cells(settings)[:10_000, :SYNTHETIC].to_memory()
    stratum = pseudobulk.strata(cells, None)
    numbers = stratum.value_counts(sort=False)
    numbers[:] = number // len(numbers)
    options = {"strata": stratum, "numbers": numbers, "reference": None, "rank": 20, "name": "s"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rng = np.random.default_rng(0)
        synthetic.generate(cells, generator=name, rng=rng, folder=Path(scratch), **options)
    return {"draw": round(time.perf_counter() - start, 1)}


def measure(sizes: list[int], synthetic_sizes: list[int] = (1000, 10_000)) -> list[dict]:
    """Measure the stages for each number of cells; return rows: stage, cells, seconds, peak_mb, added_mb, ..."""
    rows = []
    for n_cells in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("write", *STAGES[:4]):
                rows.append({"stage": name, "cells": n_cells, **_in_a_process(name, folder, n_cells)})
            if n_cells == min(sizes):
                for generator in ("gaussian", "nb_copula"):
                    for number in synthetic_sizes:
                        found = _in_a_process(generator, folder, number)
                        rows.append({"stage": f"synthetic {generator}", "cells": number, **found})
    return [row for row in rows if row["stage"] != "write"]


def grows_too_fast(rows: list[dict]) -> list[str]:
    """Return the stages whose CPU seconds grow much faster than the number of cells, beyond the first size's."""
    found = []
    for stage, part in pd.DataFrame(rows).groupby("stage"):
        part = part.sort_values("cells")
        times = part["cpu_seconds"].to_numpy()
        ratio = part["cells"].to_numpy()[1:] / part["cells"].to_numpy()[:-1]
        found += [stage] if (times[1:] > GROWTH * ratio * times[:-1]).any() else []
    return found


def _in_a_process(name: str, folder: str, number: int) -> dict[str, float]:
    """Run `stage` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--stage", name, folder]
    done = subprocess.run(command, env=os.environ | {"N_CELLS": str(number)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    print(f"{name}, {number:,}: {done.stdout.splitlines()[-1]}", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        print(json.dumps(stage(sys.argv[2], Path(sys.argv[3]))))
    else:
        table = measure([int(number) for number in sys.argv[1:]] or [10_000, 100_000])
        print(pd.DataFrame(table).to_string(index=False))
        print(f"faster than linear: {grows_too_fast(table) or 'none'}")
