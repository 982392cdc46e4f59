"""Cells of many files for pre-training: joined by Ensembl identifier, quality-controlled, a tenth held out.

In: h5ad files with raw counts and ``var`` ensembl_id, or folders of them. Out: one AnnData. Labels are not read.
"""

import hashlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data.readers import summed
from tuneformer.data.refusals import expanded_path

MIN_COUNTS = 500  # smallest total of a kept cell
MAX_MITO_SHARE = 0.25  # largest mitochondrial share of a kept cell, where the file has such genes
HELD_OUT = 10  # every so many-th cell, by the hash of its file and name, is never trained on


def corpus_files(written: list[str]) -> list[Path]:
    """Return the h5ad files that ``pretrain_files`` means, in order; nothing there, or none, is a UserError."""
    found = [expanded_path("pretrain_files", name, "h5ad files, or folders of them") for name in written]
    files = [file for path in found for file in (sorted(path.glob("*.h5ad")) if path.is_dir() else [path])]
    if not files:
        msg = f"pretrain_files: no h5ad file in {', '.join(map(paths.shown, found))}; name files or folders of them."
        raise UserError(msg)
    return files


def read_corpus(files: list[Path]) -> ad.AnnData:
    """Join the cells of h5ad files with at least `MIN_COUNTS` counts and at most `MAX_MITO_SHARE` mitochondrial ones.

    Returns
    -------
    AnnData (cells, genes of any file): counts in ``X`` (CSR, float32; a gene that a file lacks is 0 there);
    ``var["ensembl_id"]``, ``var["symbol"]``; ``obs``: file, n_counts, held_out (bool, of about one in `HELD_OUT`).
    """
    parts = [_read(file) for file in files]
    cells = ad.concat(parts, join="outer")
    genes = pd.concat([part.var for part in parts])
    return ad.AnnData(
        sparse.csr_matrix(cells.X, dtype=np.float32),
        obs=cells.obs,
        var=genes[~genes.index.duplicated()].loc[cells.var_names],
    )


def _read(path: Path) -> ad.AnnData:
    """Read the counts of one file, and drop poor cells."""
    stored = ad.read_h5ad(path)
    names = [f"{path.stem}:{cell}" for cell in stored.obs_names]
    ids = stored.var["ensembl_id"].to_numpy(str)
    symbols = stored.var["symbol"].to_numpy(str) if "symbol" in stored.var else ids
    genes = pd.DataFrame({"ensembl_id": ids, "symbol": symbols})
    held_out = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0 for name in names]
    obs = pd.DataFrame({"file": path.stem, "held_out": held_out}, index=names)
    cells = summed(sparse.csr_matrix(stored.X, dtype=np.float32), obs, genes, {})
    cells.obs["n_counts"] = cells.X.sum(axis=1).A1
    mito = cells[:, cells.var["symbol"].str.startswith("MT-")].X.sum(axis=1).A1
    poor = (cells.obs["n_counts"] < MIN_COUNTS) | (mito > MAX_MITO_SHARE * cells.obs["n_counts"])
    return cells[~poor.to_numpy()].copy()
