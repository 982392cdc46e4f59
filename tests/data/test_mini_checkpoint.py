"""The checkpoint mini and its corpus of real cells: no evaluation cell in it, and every real study can start."""

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tuneformer import paths
from tuneformer.data import corpus, fetch, qc, readers
from tuneformer.study import load_study
from tuneformer.tokens import encode
from tuneformer.tokens.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)

FEWEST = 20  # genes with a count: two cells that agree in so many are the same cell, and those with fewer say nothing
STUDIES = sorted(path.stem for path in paths.PARAMS.glob("real_*.yaml"))


def read(path):
    stored = ad.read_h5ad(path)
    genes = pd.DataFrame({"ensembl_id": stored.var["ensembl_id"].to_numpy(str)})
    return readers.summed(stored.X.tocsr().astype(np.float32), stored.obs[[]].copy(), genes, {})


def count_vectors(cells, genes):
    """Return the hash of the counts of every cell over some genes; cells with counts of few of them are left out."""
    counts = cells[:, genes].X.tocsr()
    counts.sort_indices()
    counts.eliminate_zeros()
    ends = zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    return {
        hash((counts.indices[start:end].tobytes(), counts.data[start:end].tobytes()))
        for start, end in ends
        if end - start >= FEWEST
    }


def test_no_cell_of_an_evaluation_set_is_in_the_corpus():
    settings = load_study("mini_pretrain")
    sides = [read(path) for path in corpus.corpus_files(settings.pretrain_files)]
    folder = Path(os.environ["TUNEFORMER_DATA"])
    evaluated = [*sorted((folder / "real_cells").glob("*.h5ad")), *sorted(folder.glob("[!p]*.h5ad"))]
    assert len(evaluated) == 7
    names = readers.read_pbmc68k()
    mapped = names.var["symbol"].map(Vocabulary.read(fetch.checkpoint_path("mini")).aliases)
    pbmc68k = names[:, mapped.notna()].copy()
    pbmc68k.var_names = mapped.dropna().to_numpy()
    pbmc68k = pbmc68k[:, ~pbmc68k.var_names.duplicated()]
    for cells in [*map(read, evaluated), pbmc68k]:
        assert len(count_vectors(cells, cells.var_names)) > 0.9 * cells.n_obs
        for side in sides:
            shared = side.var_names.intersection(cells.var_names)
            assert not count_vectors(side, shared) & count_vectors(cells, shared)


def test_the_same_cells_are_found_where_there_are_any():
    cells = read(Path(os.environ["TUNEFORMER_DATA"]) / "pbmc_facs_raw.h5ad")
    half = cells[::2, ::2]
    assert len(count_vectors(cells, half.var_names) & count_vectors(half, half.var_names)) > 0.9 * half.n_obs


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_on_real_cells_has_cells_that_the_checkpoint_knows(study, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = load_study(study)
    cells = qc.prepare_cells(settings)
    assert not cells.uns["provenance"]["simulated"]
    encode.refuse_unmapped(cells, Vocabulary.read(fetch.checkpoint_path("mini")))
    sizes = pd.crosstab(cells.obs["label"], cells.obs["split"])
    assert sizes["train"].min() >= 10
    assert sizes["test"].min() >= 5


def test_without_the_folder_a_study_says_what_to_set(monkeypatch):
    monkeypatch.delenv("TUNEFORMER_DATA")
    with pytest.raises(ValueError, match=r"path: .*pc9_erlotinib_d11\.h5ad needs the variable TUNEFORMER_DATA"):
        qc.prepare_cells(load_study("real_pc9_erlotinib"))
