"""The stages as the field usually writes them: everything in memory, and a Python loop over cells, groups or classes.

In: a folder with ``cells.h5ad`` (obs label) and the vocabulary of a model. Out: files beside it. Written here for
comparison; nothing is copied from another code base.
"""

from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from tuneformer.tokens.vocabulary import Vocabulary

RNG = np.random.default_rng(0)


def qc(folder: Path, vocabulary: Vocabulary) -> None:
    """Read the file whole, let scanpy measure the cells, and copy those that pass."""
    adata = ad.read_h5ad(folder / "cells.h5ad")
    adata.var["mito"] = adata.var["symbol"].str.startswith("MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mito"], percent_top=None, log1p=False, inplace=True)
    keep = (adata.obs["total_counts"] >= 500) & ~(adata.obs["pct_counts_mito"] > 20)
    adata[keep.to_numpy()].copy().write_h5ad(folder / "plain.h5ad")


def tokenize(folder: Path, vocabulary: Vocabulary, max_length: int = 2048) -> None:
    """Normalise each cell, divide by the medians, sort, truncate; collect the lists and give them to `datasets`."""
    adata = ad.read_h5ad(folder / "cells.h5ad")
    codes = vocabulary.codes(adata)
    known = np.flatnonzero(codes >= 0)
    tokens, medians = vocabulary.genes.iloc[codes[known]][["token_id", "median"]].to_numpy().T
    rows = []
    for cell in range(adata.n_obs):
        counts = adata.X[cell].toarray().ravel()
        values = counts[known] / counts.sum() * 10_000 / medians
        found = np.flatnonzero(values)
        rows.append(tokens[found[np.argsort(-values[found])]][:max_length].astype(int).tolist())
    table = {"input_ids": rows, "length": [len(row) for row in rows], "cell": list(adata.obs_names)}
    datasets.Dataset.from_dict(table).save_to_disk(folder / "plain.dataset")


def pseudobulk(folder: Path, vocabulary: Vocabulary, k: int = 10) -> None:
    """Sum the dense counts of ten cells of a class at a time."""
    adata = ad.read_h5ad(folder / "cells.h5ad")
    sums, labels = [], []
    for label in adata.obs["label"].unique():
        cells = RNG.permutation(np.flatnonzero(adata.obs["label"] == label))
        for start in range(0, len(cells), k):
            sums.append(adata.X[cells[start : start + k]].toarray().sum(axis=0))
            labels.append(label)
    points = ad.AnnData(np.stack(sums), obs=pd.DataFrame({"label": labels}).rename(str), var=adata.var)
    points.write_h5ad(folder / "plain.h5ad")


def synthetic(folder: Path, vocabulary: Vocabulary) -> None:
    """Draw as many cells of each class as it has from a normal distribution of each gene, as a dense matrix."""
    adata = ad.read_h5ad(folder / "cells.h5ad")
    drawn, labels = [], []
    for label in adata.obs["label"].unique():
        counts = adata.X[np.flatnonzero(adata.obs["label"] == label)].toarray()
        values = RNG.normal(counts.mean(axis=0), counts.std(axis=0), counts.shape)
        drawn.append(sparse.csr_matrix(values.clip(0).round().astype(np.float32)))
        labels += [label] * len(counts)
    made = ad.AnnData(
        sparse.vstack(drawn, format="csr"), obs=pd.DataFrame({"label": labels}).rename(str), var=adata.var
    )
    made.write_h5ad(folder / "plain.h5ad")
