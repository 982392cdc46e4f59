"""Rank-value encoding: each cell becomes its genes, the most above their usual level first.

In: cells with raw counts, and a `Vocabulary`. Out: a Hugging Face dataset of ``input_ids`` that the official Geneformer
code reads as well, and tables that say what of the cells it holds.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from tuneformer.data import bulk, checkpoint_files, preprocessing
from tuneformer.study import paths, train_sets
from tuneformer.study.params import Study, TokensParams
from tuneformer.study.run import fingerprint
from tuneformer.tokens.vocabulary import Vocabulary, counts_by_gene, gene_ids

if TYPE_CHECKING:
    import anndata as ad

TIE = 1e-12  # relative: above the rounding of float64 (2e-16), below the smallest step seen in real cells (1e-8)
CHUNK = 2000  # cells sorted at once
FEWEST = 0.5  # share of the detected genes of a cell that the vocabulary has to know
CARRIED = MappingProxyType({"label": "label", "split": "split"})

datasets.disable_progress_bars()  # a bar of the one shard that is written says nothing, and fills notebooks


class TokensError(ValueError):
    """Cells that cannot be made into tokens; the message says why and what to do."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a task.

    ``dataset`` as `tokenize` makes it; ``vocabulary`` that its ``input_ids`` refer to; ``classes`` in the order of the
    study; ``provenance`` as in ``tokens.json``: fingerprint, and the hashes of cells, vocabulary and split.
    """

    dataset: datasets.Dataset
    vocabulary: Vocabulary
    classes: list[str]
    provenance: dict[str, Any]


def rank_value_encode(adata: "ad.AnnData", vocabulary: Vocabulary, *, max_length: int) -> list[np.ndarray]:
    """Encode every cell as its detected genes, sorted by count / n_counts x 10,000 / median, highest first.

    n_counts and 10,000 are the same for all genes of a cell, so the order is that of count / median. Genes whose values
    agree to a relative `TIE` are tied, and stand in the order of their tokens. Genes outside the vocabulary and genes
    without a count are left out; the end of a list that is too long is cut off. V2 sets ``<cls>`` before and ``<eos>``
    after the genes of a cell; both stay when it is cut.

    Source: Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9), Methods, "Rank value encoding".

    Parameters
    ----------
    adata
        Raw counts in ``X``; ``var["ensembl_id"]``.
    vocabulary
        Genes, tokens, medians.
    max_length
        Most tokens of a cell, special tokens included.

    Returns
    -------
    The tokens of each cell, in the order of the cells, int32.

    Raises
    ------
    TokensError
        `max_length` leaves no room for a gene, or a cell has no gene in the vocabulary.
    VocabularyError
        No ``var["ensembl_id"]``; a value of ``X`` is negative or not finite.
    """
    tokens, offsets = _encode(adata, vocabulary, max_length)
    return [tokens[begin:end] for begin, end in pairwise(offsets)]


def tokenize(
    adata: "ad.AnnData", vocabulary: Vocabulary, *, max_length: int, carry: Mapping[str, str] = CARRIED
) -> datasets.Dataset:
    """Make the dataset that a model is trained on, one row a cell.

    Parameters
    ----------
    adata, vocabulary, max_length
        As `rank_value_encode`.
    carry
        Columns of the dataset, and the ``obs`` columns that they come from; values become text.

    Returns
    -------
    Dataset with ``input_ids`` (list of int32), ``length`` (special tokens included), ``cell`` (name) and the carried
    columns.

    Raises
    ------
    TokensError, VocabularyError
        As `rank_value_encode`; or a carried column is missing, or misses values.
    """
    columns = {}
    for column, source in carry.items():
        if source not in adata.obs or adata.obs[source].isna().any():
            msg = f"obs[{source!r}] is missing for {'some' if source in adata.obs else 'all'} cells; run 01_qc first."
            raise TokensError(msg)
        columns[column] = adata.obs[source].astype(str).to_numpy(object)
    tokens, offsets = _encode(adata, vocabulary, max_length)
    table = {
        "input_ids": pa.LargeListArray.from_arrays(offsets, tokens).cast(pa.list_(pa.int32())),
        "length": np.diff(offsets),
        "cell": adata.obs_names.to_numpy(object),
    }
    return datasets.Dataset(pa.table(table | columns))


def task_vocabulary(settings: Study, cells: "ad.AnnData") -> Vocabulary:
    """Return the vocabulary of a task: the checkpoint's, or its tokens with medians of the training cells.

    Parameters
    ----------
    settings
        ``checkpoint`` and ``vocabulary`` are read.
    cells
        As `tuneformer.data.preprocessing.prepare_cells` makes them; only those of the split "train" are fitted.

    Raises
    ------
    VocabularyError
        The checkpoint has no vocabulary that can be read, or no median can be fitted.
    """
    base = Vocabulary.read(checkpoint_files.ensure(settings.checkpoint))
    if settings.vocabulary == "checkpoint":
        return base
    return Vocabulary.fit(cells[(cells.obs["split"] == "train").to_numpy()], base)


def task_length(settings: Study) -> int:
    """Return the most tokens of a cell: ``max_length``, or the positions of the checkpoint where it is null.

    Raises
    ------
    TokensError
        The checkpoint has no readable ``config.json``, or fewer positions than ``max_length``.
    """
    config = checkpoint_files.ensure(settings.checkpoint) / "config.json"
    try:
        positions = json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError) as error:
        msg = f"{config} does not say how many positions the model has ({error}); set checkpoint to a model's folder."
        raise TokensError(msg) from error
    if settings.max_length is not None and settings.max_length > positions:
        msg = f"max_length is {settings.max_length}, but the checkpoint has {positions} positions; at most that fits."
        raise TokensError(msg)
    return settings.max_length or positions


def carried(settings: Study) -> dict[str, str]:
    """Return the ``carry`` of a task: label, split and, where whole groups are held out, group."""
    return CARRIED | ({"group": settings.group_by} if settings.group_by else {})


def write_tokens(
    settings: Study,
    cells: "ad.AnnData",
    vocabulary: Vocabulary,
    dataset: datasets.Dataset,
    *,
    step_cells: int | None = None,
    sources: Iterable[str] = (),
) -> Tokens:
    """Write dataset, ``vocabulary.parquet``, ``sources.txt`` and ``tokens.json`` as one folder, whole or not at all.

    Parameters
    ----------
    settings
        Decides the folder (`tuneformer.study.paths.tokens_path`) and the fingerprint.
    cells, vocabulary
        What `dataset` was made of; the classes are the categories of ``obs["label"]``.
    dataset
        As `tokenize` makes it.
    step_cells
        Number of cells by which the optimizer steps of a run are counted; None counts its training cells.
    sources
        Names of the real cells that made cells were made from; none for single cells.
    """
    classes = list(cells.obs["label"].cat.categories)
    provenance = {
        "fingerprint": _fingerprint(settings),
        "cells": preprocessing.cells_fingerprint(settings),
        "vocabulary": vocabulary.hash,
        "split": fingerprint(list(dataset["cell"]), list(dataset["split"])),
        "classes": classes,
        "n_cells": len(dataset),
        "step_cells": step_cells,
    }
    with paths.atomic_path(paths.tokens_path(settings)) as partial:
        dataset.save_to_disk(partial)
        vocabulary.write(partial)
        paths.write_text(partial / "sources.txt", "".join(f"{name}\n" for name in sources))
        paths.write_text(partial / "tokens.json", json.dumps(provenance, indent=1) + "\n")
    return Tokens(dataset=dataset, vocabulary=vocabulary, classes=classes, provenance=provenance)


def read_tokens(settings: Study) -> Tokens | None:
    """Read the tokens of a run's train set; None if there are none for these very parameters and cells."""
    folder = paths.tokens_path(settings)
    if not (folder / "tokens.json").is_file():
        return None
    provenance = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    if provenance["fingerprint"] != _fingerprint(settings):
        return None
    return Tokens(datasets.load_from_disk(folder), Vocabulary.read(folder), provenance["classes"], provenance)


def vocabulary_share(adata: "ad.AnnData", vocabulary: Vocabulary) -> pd.DataFrame:
    """Say how much of the cells the vocabulary holds.

    Returns
    -------
    Rows "genes with a count" and "counts"; columns ``in cells``, ``in vocabulary`` and ``share``.

    Raises
    ------
    TokensError
        The cells were tokenized by others.
    """
    if preprocessing.has_no_counts(adata):
        msg = (
            "The cells of this study are tokens already, so there are no counts to rank and nothing to do here; go on "
            "with 05_finetune_strategies, which reads the tokens as they are."
        )
        raise TokensError(msg)
    known = pd.Index(vocabulary.genes["ensembl_id"]).get_indexer(vocabulary.resolve(gene_ids(adata))) >= 0
    per_gene = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    totals = {"genes with a count": per_gene > 0, "counts": per_gene}
    table = pd.DataFrame({name: [values.sum(), values[known].sum()] for name, values in totals.items()}).T.astype(int)
    table.columns = ["in cells", "in vocabulary"]
    return table.assign(share=table["in vocabulary"] / table["in cells"])


def refuse_unmapped(adata: "ad.AnnData", vocabulary: Vocabulary) -> None:
    """Refuse cells of which the vocabulary does not know half of the genes that are detected in a cell.

    Raises
    ------
    TokensError
        It does not. The share is that over all counted genes of all cells together, so that the many genes of an
        annotation that hardly any cell has do not matter.
    """
    known = pd.Index(vocabulary.genes["ensembl_id"]).get_indexer(vocabulary.resolve(gene_ids(adata))) >= 0
    counts = sparse.csr_matrix(adata.X)
    detected = np.bincount(counts.indices, weights=counts.data != 0, minlength=adata.n_vars)
    share = detected[known].sum() / max(detected.sum(), 1)
    if share < FEWEST:
        unknown = gene_ids(adata)[~known]
        msg = (
            f"The checkpoint knows {share:.0%} of the genes that a cell has, and at least {FEWEST:.0%} are needed (not "
            f"known: {', '.join(unknown[:3])}); set ensembl_id to the var column with human Ensembl identifiers, or "
            "copy Geneformer's gene_name_id_dict beside the checkpoint if genes have symbols, or set vocabulary: fit."
        )
        raise TokensError(msg)


def uncut_lengths(adata: "ad.AnnData", vocabulary: Vocabulary) -> pd.Series:
    """Return the number of tokens that each cell would have without a limit, special tokens included."""
    n_special = len(vocabulary.begins_with) + len(vocabulary.ends_with)
    lengths = np.diff(_known_counts(adata, vocabulary).indptr) + n_special
    return pd.Series(lengths, index=adata.obs_names, name="tokens")


def length_table(adata: "ad.AnnData", vocabulary: Vocabulary, *, max_length: int) -> pd.DataFrame:
    """Describe the number of tokens of a cell before the cut, by class and for all cells.

    Returns
    -------
    Rows: the classes of ``obs["label"]`` and "all"; columns ``cells``, ``min``, ``median``, ``max`` and ``cut``, the
    share of cells with more than `max_length` tokens.
    """
    labels = adata.obs["label"]
    frame = pd.DataFrame({"class": labels.astype(str), "length": uncut_lengths(adata, vocabulary)})
    both = pd.concat([frame, frame.assign(**{"class": "all"})])
    both["cut"] = both["length"] > max_length
    by_class = both.groupby("class")
    table = by_class["length"].agg(cells="size", min="min", median="median", max="max")
    return table.join(by_class["cut"].mean()).reindex([*labels.cat.categories, "all"])


def ranked_genes(adata: "ad.AnnData", vocabulary: Vocabulary, *, cell: str, n: int = 8) -> pd.DataFrame:
    """Show how the first `n` genes of the tokens of one cell came to stand there.

    Returns
    -------
    ``gene`` (symbol), ``count``, ``median``, ``count / median``, ``token_id``, in the order of the tokens.
    """
    one = adata[[cell]]
    n_special = len(vocabulary.begins_with) + len(vocabulary.ends_with)
    tokens, _ = _encode(one, vocabulary, n + n_special)
    table = vocabulary.genes.assign(count=_known_counts(one, vocabulary).toarray()[0].astype(int))
    table = table.set_index("token_id", drop=False).reindex(tokens[len(vocabulary.begins_with) :]).dropna()
    table["gene"] = _symbols(adata, vocabulary, table["ensembl_id"])
    table["count / median"] = table["count"] / table["median"]
    columns = table[["gene", "count", "median", "count / median", "token_id"]]
    return columns.astype({"count": int, "token_id": int}).reset_index(drop=True)


def top_genes(
    adata: "ad.AnnData", vocabulary: Vocabulary, dataset: datasets.Dataset, *, first: int = 10, n: int = 5
) -> pd.DataFrame:
    """Count which genes stand among the first tokens of the cells of each class.

    Parameters
    ----------
    adata, vocabulary
        Cells and vocabulary; gene symbols are taken from ``var["symbol"]``, classes from ``obs["label"]``.
    dataset
        As `tokenize` makes it from them.
    first
        Number of tokens looked at in each cell, special ones not counted.
    n
        Number of genes shown for each class.

    Returns
    -------
    ``class``, ``gene`` (symbol), ``ensembl_id``, ``share`` (of the cells of the class that have the gene among their
    first tokens), ``share of all`` (the same of all cells); sorted by class and falling share.
    """
    table = dataset.select_columns(["input_ids", "label"]).with_format("arrow")[:]
    begin = len(vocabulary.begins_with)
    heads = pc.list_slice(table["input_ids"].combine_chunks(), begin, begin + first, return_fixed_size_list=False)
    labels = table["label"].to_pandas()
    seen = pd.DataFrame({"token_id": heads.flatten(), "class": labels.to_numpy()[pc.list_parent_indices(heads)]})
    counts = seen.groupby(["class", "token_id"]).size().rename("cells").reset_index()
    counts = counts.merge(vocabulary.genes[["token_id", "ensembl_id"]], on="token_id")  # leaves <eos> out
    counts["share"] = counts["cells"] / counts["class"].map(labels.value_counts())
    counts["share of all"] = counts.groupby("token_id")["cells"].transform("sum") / len(labels)
    counts["gene"] = _symbols(adata, vocabulary, counts["ensembl_id"])
    counts["class"] = pd.Categorical(counts["class"], categories=adata.obs["label"].cat.categories)
    ordered = counts.sort_values(["class", "share", "token_id"], ascending=[True, False, True])
    best = ordered.groupby("class", observed=True).head(n).reset_index(drop=True)
    return best[["class", "gene", "ensembl_id", "share", "share of all"]]


def _fingerprint(settings: Study) -> str:
    checkpoint = Vocabulary.read(checkpoint_files.ensure(settings.checkpoint))
    parts = settings.section(TokensParams), preprocessing.cells_fingerprint(settings), checkpoint.hash
    made = [settings.train_set, settings.seed, settings.train_cells] if paths.is_made(settings) else []
    if train_sets.parse(settings.train_set).is_bulk:
        made.append(bulk.source_hash(settings))
    return fingerprint("tokens", *parts, task_length(settings), *made)


def _encode(adata: "ad.AnnData", vocabulary: Vocabulary, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all cells one after the other, and where each cell begins and the last ends (cells + 1,)."""
    room = max_length - len(vocabulary.begins_with) - len(vocabulary.ends_with)
    if room < 1:
        msg = f"max_length is {max_length}, which leaves no room for a gene beside the special tokens; set it to more."
        raise TokensError(msg)
    values = _known_counts(adata, vocabulary)
    _refuse_empty(adata, values, vocabulary)
    values.data /= vocabulary.genes["median"].to_numpy()[values.indices]
    token_of = vocabulary.genes["token_id"].to_numpy(np.int32)
    ranked = [_rank(values[start : start + CHUNK], token_of, room) for start in range(0, adata.n_obs, CHUNK)]

    n_genes = np.minimum(np.diff(values.indptr), room)  # (cells,)
    lengths = n_genes + len(vocabulary.begins_with) + len(vocabulary.ends_with)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    is_gene = np.ones(offsets[-1], dtype=bool)
    for special, places in (vocabulary.begins_with, offsets[:-1]), (vocabulary.ends_with, offsets[1:] - 1):
        if special:
            tokens[places] = special[0]
            is_gene[places] = False
    tokens[is_gene] = np.concatenate([[], *ranked])
    return tokens, offsets


def _known_counts(adata: "ad.AnnData", vocabulary: Vocabulary) -> sparse.csr_matrix:
    """Return the counts of the genes of the vocabulary, (cells, genes of the vocabulary)."""
    codes = pd.Index(vocabulary.genes["ensembl_id"]).get_indexer(vocabulary.resolve(gene_ids(adata)))
    return counts_by_gene(adata, codes, len(vocabulary.genes))


def _symbols(adata: "ad.AnnData", vocabulary: Vocabulary, genes: pd.Series) -> pd.Series:
    """Return the symbol of each gene: that of the first row of `adata` that the vocabulary takes for this gene."""
    symbols = pd.Series(adata.var["symbol"].astype(str).to_numpy(), index=vocabulary.resolve(gene_ids(adata)))
    return genes.map(symbols[~symbols.index.duplicated()])


def _rank(values: sparse.csr_matrix, token_of: np.ndarray, room: int) -> np.ndarray:
    """Sort the genes of every cell by falling value, then by token; return the tokens of the first `room` of each."""
    n_genes = np.diff(values.indptr)
    cell = np.repeat(np.arange(len(n_genes)), n_genes)
    order = np.lexsort((-values.data, cell))
    value, token = values.data[order], token_of[values.indices[order]]
    falls = np.ones(len(value), dtype=bool)
    falls[1:] = (cell[1:] != cell[:-1]) | (value[1:] < value[:-1] * (1 - TIE))
    token = token[np.lexsort((token, np.cumsum(falls)))]
    rank = np.arange(len(token)) - np.repeat(values.indptr[:-1], n_genes)
    return token[rank < room]


def _refuse_empty(adata: "ad.AnnData", values: sparse.csr_matrix, vocabulary: Vocabulary) -> None:
    """Raise if a cell has no gene in the vocabulary."""
    empty = adata.obs_names[np.diff(values.indptr) == 0]
    if len(empty) == 0:
        return
    msg = (
        f"{len(empty)} of {adata.n_obs} cells have no gene in the vocabulary (first: {empty[0]}); its genes are "
        f"named like {vocabulary.genes['ensembl_id'].iloc[0]}, those of the cells like {gene_ids(adata)[0]}: set "
        "ensembl_id to the column with such names, or vocabulary: fit, or drop these cells."
    )
    raise TokensError(msg)
