"""The official tokenizer and ours, on real cells with the real dictionaries.

The golden files hold what the official tokenizer made. It computes count / n_counts x 10,000 in float32 (the matrix is
divided by multiplying with the float32 reciprocal) and divides by the median in float64, so it can swap two genes with
different counts whose values differ by less than float32 resolves. A tie is that and nothing more: the official
arithmetic must order the golden tokens without one exception, and ours may differ only at such a pair.
"""

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.tokens.encode import encode, refuse_unmapped
from tuneformer.tokens.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)

FLOAT32 = 6 * 2.0**-24  # three float32 roundings (reciprocal, product, x 10,000) in each of two values
SWAPPED = {"v1": 0, "v2": 1}  # cells in which float32 swaps a pair, of 420
POSITIONS = {"v1": 2048, "v2": 4096}


@pytest.fixture(scope="module")
def cells():
    return ad.read_h5ad(Path(os.environ["TUNEFORMER_DATA"]) / "pbmc_facs_raw.h5ad")[::9].copy()


@pytest.fixture(scope="module", params=["v1", "v2"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def vocabulary(version):
    return Vocabulary.read(Path(os.environ["TUNEFORMER_DATA"]) / f"geneformer_{version}")


@pytest.fixture(scope="module")
def golden(version, cells):
    folder = Path(os.environ["TUNEFORMER_DATA"]).parent / "golden"
    frame = pd.read_parquet(folder / f"pbmc_facs_tokens_{version}.parquet")
    assert list(frame["barcode"]) == list(cells.obs["barcode"])
    return frame


@pytest.fixture(scope="module")
def encoded(version, cells, vocabulary):
    return encode(cells, vocabulary, max_length=POSITIONS[version]).with_format("numpy")["input_ids"][:]


def counts_by_token(cells, vocabulary):
    """Sum counts by token, one gene at a time, (cells, tokens): a reference beside `counts_by_gene`."""
    token_of = vocabulary.genes.set_index("ensembl_id")["token_id"]
    counts = np.zeros((cells.n_obs, vocabulary.size))
    for name, column in zip(vocabulary.resolve(cells.var["ensembl_id"]), cells.X.toarray().T, strict=True):
        if name in token_of.index:
            counts[:, token_of[name]] += column
    return counts


def test_the_real_dictionaries_are_read(version, vocabulary, tmp_path):
    assert len(vocabulary.genes) + len(vocabulary.specials) == vocabulary.size == {"v1": 25_426, "v2": 20_275}[version]
    assert vocabulary.specials == {"v1": {"<pad>": 0, "<mask>": 1}}.get(
        version, {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    )
    vocabulary.write(tmp_path)
    assert Vocabulary.read(tmp_path).hash == vocabulary.hash


def test_lengths_are_the_official_ones(golden, encoded):
    assert [len(cell) for cell in encoded] == list(golden["length"])


def test_tokens_are_the_official_ones_but_for_ties(version, golden, encoded, cells, vocabulary):
    medians = np.ones(vocabulary.size)
    medians[vocabulary.genes["token_id"]] = vocabulary.genes["median"]
    swapped = 0
    for ours, official, counts in zip(encoded, golden["input_ids"], counts_by_token(cells, vocabulary), strict=True):
        places = np.flatnonzero(ours != official)
        mine, theirs = ours[places], official[places]
        swapped += len(places) > 0
        assert sorted(mine) == sorted(theirs)
        np.testing.assert_allclose(counts[mine] / medians[mine], counts[theirs] / medians[theirs], rtol=FLOAT32)
        assert (counts[mine] != counts[theirs]).all()
    assert swapped == SWAPPED[version]


def test_the_official_arithmetic_orders_the_official_tokens(golden, cells, vocabulary):
    medians = np.ones(vocabulary.size)
    medians[vocabulary.genes["token_id"]] = vocabulary.genes["median"]
    n_special = len(vocabulary.begins_with)
    counts = counts_by_token(cells, vocabulary).astype(np.float32)
    reciprocal = np.float32(1) / cells.obs["n_counts"].to_numpy(np.float32)
    for official, row, factor in zip(golden["input_ids"], counts, reciprocal, strict=True):
        genes = official[n_special : len(official) - n_special]
        values = (row * factor * np.float32(10_000))[genes].astype(np.float64) * (1 / medians[genes])
        assert (np.diff(values) <= 0).all()
        assert (values > 0).all()


def test_cells_that_the_checkpoint_does_not_know_are_refused(cells, vocabulary):
    refuse_unmapped(cells, vocabulary)
    strange = cells.copy()
    detected = np.asarray((cells.X != 0).sum(axis=0)).ravel()
    known = vocabulary.codes(cells) >= 0
    order = np.argsort(-detected * known, kind="stable")
    hidden = order[: np.searchsorted(np.cumsum(detected[order]), 0.6 * detected.sum())]
    names = strange.var["ensembl_id"].astype(str).to_numpy()
    names[hidden] = [f"gene{number}" for number in range(len(hidden))]
    strange.var["ensembl_id"] = names
    share = detected[known & ~np.isin(np.arange(len(known)), hidden)].sum() / detected.sum()
    message = rf"^The checkpoint knows {share:.0%} of the genes that a cell has, and at least"
    with pytest.raises(UserError, match=message):
        refuse_unmapped(strange, vocabulary)
