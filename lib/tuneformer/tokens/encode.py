"""Rank-value encoding: each cell becomes its genes, those most above their usual level first.

In: cells with raw counts, in memory or backed by an h5ad of any layout, and a `Vocabulary`. Out: a Hugging Face dataset
of ``input_ids`` that the official Geneformer code reads as well. Cells are read, ranked and written a few at a time, so
memory does not grow with their number. Nothing is compiled: numpy's two sorts per cell are faster than a numba loop.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute
from scipy import sparse

from tuneformer import artifacts, paths
from tuneformer.artifacts import UserError
from tuneformer.data import counts, fetch, qc, sources
from tuneformer.study import Study
from tuneformer.tokens import official
from tuneformer.tokens.vocabulary import Vocabulary, counts_by_gene, gene_ids, genes_summed

if TYPE_CHECKING:
    from anndata import AnnData

TIE = 1e-12  # relative: above the rounding of float64 (2e-16), below the smallest step seen in real cells (1e-8)
CHUNK = 2000  # cells in memory at once
LOOKED_AT = 20_000  # cells by which it is judged whether the vocabulary knows the genes
FEWEST = 0.5  # share of the detected genes of a cell that the vocabulary has to know
REPORT = 10.0  # seconds between two lines of progress
DATA = "data-00000-of-00001.arrow"  # as datasets.save_to_disk names the only file of rows

datasets.disable_progress_bars()  # a bar for the one file that is written says nothing, and fills notebooks


@dataclass(frozen=True)
class Tokens:
    """The tokens of a task or of a run.

    ``dataset`` as `encode` makes it; ``vocabulary`` of its ``input_ids``; ``classes`` in the order of the study;
    ``key`` of the folder it was read from; ``step_cells`` the number of cells by which the optimizer steps are counted,
    None for that of the training cells; ``sources`` the names of the real cells that made cells were made from.
    """

    dataset: datasets.Dataset
    vocabulary: Vocabulary
    classes: list[str]
    key: str = ""
    step_cells: int | None = None
    sources: list[str] = field(default_factory=list)


def encode(
    adata: "AnnData",
    vocabulary: Vocabulary,
    *,
    max_length: int,
    columns: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> datasets.Dataset:
    """Encode every cell as its detected genes, sorted by count / n_counts x 10,000 / median, highest first.

    n_counts and 10,000 are the same for all genes of a cell, so the order is that of count / median. Genes whose values
    agree to a relative `TIE` are tied, and are in the order of their tokens. Genes outside the vocabulary and genes
    without a count are left out; a list that is too long loses its end. V2 puts ``<cls>`` before and ``<eos>`` after
    the genes of a cell; both stay when it is cut.

    Source: Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9), Methods, "Rank value encoding".

    Parameters
    ----------
    max_length
        Most tokens of a cell, special tokens included.
    columns
        Further columns of the dataset, with one value per cell, which becomes text.
    folder
        Empty folder into which the rows are written as they are made; None keeps them in memory.

    Returns
    -------
    Dataset with one row per cell: ``input_ids`` (list of int32), ``length`` (special tokens included), ``cell`` (name)
    and `columns`.

    Raises
    ------
    UserError
        `max_length` leaves no room for a gene; a cell has no gene in the vocabulary; a count is negative or not finite;
        a column has missing values.
    """
    batches = _batches(adata, vocabulary, max_length, columns or {})
    first = next(batches)
    if folder is None:
        return datasets.Dataset(pa.Table.from_batches([first, *batches]))
    begun = datasets.Dataset(pa.Table.from_batches([first]), fingerprint=uuid4().hex[:16])
    begun.save_to_disk(folder, num_shards=1)  # its state.json and dataset_info.json hold for all rows, which follow
    with pa.OSFile(str(folder / DATA), "wb") as file, pa.ipc.new_stream(file, first.schema) as stream:
        stream.write_batch(first)
        for batch in batches:
            stream.write_batch(batch)
    return datasets.load_from_disk(folder)


def task_vocabulary(settings: Study, cells: "AnnData") -> Vocabulary:
    """Return the vocabulary of a task: the checkpoint's, or its tokens with medians of the training cells."""
    base = Vocabulary.read(fetch.checkpoint_dir(settings.checkpoint))
    if settings.vocabulary == "checkpoint":
        return base
    train = cells[(cells.obs["split"] == "train").to_numpy()]
    number = artifacts.key(qc.cells_key(settings), base.hash)
    return artifacts.remembered("fitted vocabulary", number, lambda: Vocabulary.fit(train, base))


def task_length(settings: Study) -> int:
    """Return the most tokens of a cell: ``max_length``, or the positions of the checkpoint where it is null.

    A checkpoint without a readable ``config.json``, or with fewer positions than ``max_length``, is a UserError.
    """
    config = fetch.checkpoint_dir(settings.checkpoint) / "config.json"
    try:
        positions = artifacts.read_json(config)["max_position_embeddings"]
    except (UserError, KeyError) as error:
        msg = f"{config} does not say how many positions the model has ({error}); set checkpoint to a model's folder."
        raise UserError(msg) from error
    if settings.max_length is not None and settings.max_length > positions:
        msg = f"max_length is {settings.max_length}, but the checkpoint has {positions} positions; at most that fits."
        raise UserError(msg)
    return settings.max_length or positions


def single_cell_tokens(settings: Study, cells: "AnnData | None" = None) -> Tokens:
    """Return the tokens of all cells of a task, made once and kept in `paths.tokens_dir`.

    Cells that others tokenized (`tuneformer.tokens.official`) are taken as they are. The rows are the cells of
    `qc.prepare_cells`, in their order; give these as `cells` where they are at hand.

    Returns
    -------
    Tokens with the columns of `encode`, ``label``, ``split`` (of the fold of `settings`) and, where whole groups are
    held out, ``group``.

    Raises
    ------
    UserError
        As `encode`, `task_vocabulary` and `refuse_unmapped`.
    """
    cells = qc.prepare_cells(settings) if cells is None else cells

    def make(folder: Path) -> None:
        vocabulary = task_vocabulary(settings, cells)
        columns = {"label": cells.obs["label"]}
        if settings.group_by:
            columns["group"] = cells.obs[settings.group_by]
        options = {"max_length": task_length(settings), "columns": columns}
        if paths.is_tokenized(settings):
            path = sources.source_path(settings)
            dataset = official.read_dataset(path, list(cells.obs_names), vocabulary, **options)
        else:
            if settings.vocabulary == "checkpoint":
                refuse_unmapped(cells, vocabulary)
            dataset = encode(cells, vocabulary, folder=folder, **options)
        write(folder, Tokens(dataset, vocabulary, list(cells.obs["label"].cat.categories)))

    tokens = read(artifacts.made(paths.tokens_dir(settings), tokens_key(settings), make))
    split = cells.obs["split"].cat
    split = pa.DictionaryArray.from_arrays(split.codes, list(split.categories)).cast(pa.string())
    return replace(tokens, dataset=tokens.dataset.add_column("split", split, new_fingerprint=uuid4().hex[:16]))


def tokens_key(settings: Study) -> str:
    """Return the key of `single_cell_tokens`: cells, vocabulary and length; the fold only where medians are fitted."""
    fitted = settings.vocabulary == "fit"
    cells = qc.cells_key(settings if fitted else settings.at(fold=None))
    checkpoint = Vocabulary.read(fetch.checkpoint_dir(settings.checkpoint)).hash
    return artifacts.key("tokens.1", cells, settings.vocabulary, checkpoint, task_length(settings))


def write(folder: Path, tokens: Tokens) -> None:
    """Write tokens into a folder: rows (unless `encode` put them there), vocabulary, and the rest as tokens.json."""
    if not (folder / DATA).is_file():
        tokens.dataset.save_to_disk(folder, num_shards=1)
    tokens.vocabulary.write(folder)
    rest = {"classes": tokens.classes, "step_cells": tokens.step_cells, "sources": tokens.sources}
    artifacts.write_json(folder / "tokens.json", rest)


def read(folder: Path) -> Tokens:
    """Read what `write` wrote; the rows stay on disk (memory-mapped)."""
    rest = artifacts.read_json(folder / "tokens.json")
    key = artifacts.stored_key(folder) or ""
    return Tokens(datasets.load_from_disk(folder), Vocabulary.read(folder), key=key, **rest)


def column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Return one column of a dataset as Arrow has it: no object of Python for each cell."""
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def places(texts: pa.Array | pa.ChunkedArray, values: Sequence[str] | pa.Array) -> np.ndarray:
    """Return the place of each of `texts` among `values`; -1 where it is none of them."""
    values = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    return compute.index_in(texts, values).fill_null(-1).to_numpy()


def refuse_unmapped(adata: "AnnData", vocabulary: Vocabulary) -> None:
    """Refuse cells of which the vocabulary does not know half of the detected genes, counted over cells together.

    So the many genes of an annotation that hardly any cell has do not matter. Of many cells, `LOOKED_AT` are counted.
    """
    parts = np.array_split(np.arange(adata.n_obs), -(-adata.n_obs // CHUNK))[:: -(-adata.n_obs // LOOKED_AT)]
    detected = np.zeros(adata.n_vars)
    for rows in parts:
        for _, values in counts.chunks(adata[rows]):
            detected += values.getnnz(axis=0)
    known = vocabulary.codes(adata) >= 0
    share = detected[known].sum() / max(detected.sum(), 1)
    if share < FEWEST:
        unknown = gene_ids(adata)[~known]
        msg = (
            f"The checkpoint knows {share:.0%} of the genes that a cell has, and at least {FEWEST:.0%} are needed (not "
            f"known: {', '.join(unknown[:3])}); set ensembl_id to the var column with human Ensembl identifiers, or "
            "copy Geneformer's gene_name_id_dict beside the checkpoint if genes have symbols, or set vocabulary: fit."
        )
        raise UserError(msg)


def ranked_genes(adata: "AnnData", vocabulary: Vocabulary, *, cell: str, n: int = 8) -> pd.DataFrame:
    """Show why the first `n` genes of the tokens of one cell are the first.

    Columns: ``gene`` (symbol), ``count``, ``median``, ``count / median``, ``token_id``, in the order of the tokens.
    """
    one = adata[[cell]]
    codes = vocabulary.codes(adata)
    tokens = encode(one, vocabulary, max_length=n + vocabulary.n_framing)["input_ids"][0]
    count = counts_by_gene(one, codes, len(vocabulary.genes)).toarray()[0]
    table = vocabulary.genes.assign(count=count.astype(int)).set_index("token_id", drop=False)
    table = table.loc[[token for token in tokens if token in table.index]]
    symbols = pd.Series(adata.var["symbol"].astype(str).to_numpy(), index=vocabulary.resolve(gene_ids(adata)))
    table["gene"] = table["ensembl_id"].map(symbols[~symbols.index.duplicated()])
    table["count / median"] = table["count"] / table["median"]
    return table[["gene", "count", "median", "count / median", "token_id"]].reset_index(drop=True)


def _batches(
    adata: "AnnData", vocabulary: Vocabulary, max_length: int, columns: Mapping[str, Any]
) -> Iterator[pa.RecordBatch]:
    """Encode the cells a chunk at a time."""
    if not adata.n_vars:
        msg = (
            "The cells of this study are tokens already, so there are no counts to rank and nothing to do here; go on "
            "with 05_finetune_strategies, which reads the tokens as they are."
        )
        raise UserError(msg)
    for name, values in columns.items():
        missing = int(pd.isna(np.asarray(values)).sum())
        if missing:
            msg = f"The column {name!r} has no value for {missing} of {adata.n_obs} cells; run 01_qc first."
            raise UserError(msg)
    texts = {name: np.asarray(values) for name, values in {"cell": adata.obs_names, **columns}.items()}
    room = max_length - vocabulary.n_framing
    if room < 1:
        msg = f"max_length is {max_length}, which leaves no room for a gene beside the special tokens; set it to more."
        raise UserError(msg)
    codes, begun, told = vocabulary.codes(adata), time.monotonic(), time.monotonic()
    medians, token_of = vocabulary.genes["median"].to_numpy(), vocabulary.genes["token_id"].to_numpy(np.int32)
    for part, raw in counts.chunks(adata, CHUNK):
        values = genes_summed(raw, codes, len(vocabulary.genes))
        _refuse_empty(adata, part, values, vocabulary)
        values.data /= medians[values.indices]
        tokens, offsets = _framed(_ranked(values, token_of), values.indptr, room, vocabulary)
        yield pa.record_batch(
            {
                "input_ids": pa.ListArray.from_arrays(offsets, tokens),
                "length": np.diff(offsets).astype(np.int64),
                **{name: _text(values[part]) for name, values in texts.items()},
            }
        )
        if time.monotonic() - told > REPORT:
            told, rate = time.monotonic(), part.stop / (time.monotonic() - begun)
            left = (adata.n_obs - part.stop) / rate
            print(f"{part.stop:,} of {adata.n_obs:,} cells, {rate:,.0f} per second, {left:.0f} s left", flush=True)


def _ranked(values: sparse.csr_matrix, token_of: np.ndarray) -> np.ndarray:
    """Sort the genes of every cell by falling value, then by token; return the tokens, as many as stored values.

    Two sorts per cell, which numpy does with vector instructions: faster than a compiled loop over all cells. The
    second one sorts the number of the tie group with the token in its lower 32 bits.
    """
    cells = list(pairwise(values.indptr.tolist()))
    order = np.empty(values.nnz, dtype=np.int64)
    falling = -values.data
    for begin, end in cells:
        order[begin:end] = falling[begin:end].argsort()
        order[begin:end] += begin
    value = values.data[order]
    group = np.zeros(values.nnz, dtype=np.int64)
    np.cumsum(value[1:] < value[:-1] * (1 - TIE), out=group[1:])
    group <<= 32
    group |= token_of[values.indices[order]]
    for begin, end in cells:
        group[begin:end].sort()
    return group.astype(np.int32)  # the lower 32 bits


def _framed(genes: np.ndarray, indptr: np.ndarray, room: int, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Cut the lists to `room` genes and put special tokens around them; return all tokens, and where lists begin."""
    n_genes = np.diff(indptr)
    rank = np.arange(len(genes)) - np.repeat(indptr[:-1], n_genes)
    lengths = np.minimum(n_genes, room) + vocabulary.n_framing
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = np.empty(offsets[-1], dtype=np.int32)
    is_gene = np.ones(offsets[-1], dtype=bool)
    for special, places in (vocabulary.begins_with, offsets[:-1]), (vocabulary.ends_with, offsets[1:] - 1):
        if special:
            tokens[places] = special[0]
            is_gene[places] = False
    tokens[is_gene] = genes[rank < room]
    return tokens, offsets


def _text(values: Any) -> pa.Array:
    """Return values of a column as text."""
    return pa.array(np.asarray(values).astype(str).astype(object), pa.string())


def _refuse_empty(adata: "AnnData", part: slice, values: sparse.csr_matrix, vocabulary: Vocabulary) -> None:
    """Refuse cells without a gene in the vocabulary."""
    empty = adata.obs_names[part][np.diff(values.indptr) == 0]
    if len(empty):
        msg = (
            f"{len(empty)} of {values.shape[0]} cells have no gene in the vocabulary (first: {empty[0]}); its genes "
            f"are named like {vocabulary.genes['ensembl_id'].iloc[0]}, those of the cells like {gene_ids(adata)[0]}: "
            "set ensembl_id to the column with such names, or vocabulary: fit, or drop these cells."
        )
        raise UserError(msg)
