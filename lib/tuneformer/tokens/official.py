"""Cells that others tokenized: the official Geneformer format (a ``.dataset`` folder).

In: a data set that the official tokenizer wrote, whose cells enter fine-tuning as they are. Out: a dataset as
`tuneformer.tokens.encode.encode` makes it. The way back is `tuneformer.tokens.export`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tuneformer.artifacts import UserError
from tuneformer.tokens.vocabulary import Vocabulary

CHUNK = 20_000  # cells read at once: official files have 8 bytes per token, which are 300 MB


def read_dataset(
    path: Path, cells: list[str], vocabulary: Vocabulary, *, max_length: int, columns: Mapping[str, Any]
) -> datasets.Dataset:
    """Take the tokens of some cells from a data set in the official format.

    Parameters
    ----------
    cells
        Their names: values of the column ``cell``, or row0, row1, ... where the folder has none.
    max_length, columns
        As `tuneformer.tokens.encode.encode`; in V2 ``<eos>`` stays at the end of a list that is cut.

    Raises
    ------
    UserError
        A cell has no token, or a token that the checkpoint does not know; the tokens are those of the other version of
        Geneformer, with or without ``<cls>`` and ``<eos>``.
    """
    stored = datasets.load_from_disk(str(path))
    names = stored["cell"][:] if "cell" in stored.column_names else [f"row{row}" for row in range(len(stored))]
    rows = pd.Index(names).astype(str).get_indexer(cells)
    parts = []
    for start in range(0, len(rows), CHUNK):
        chunk = stored.select_columns(["input_ids"]).select(rows[start : start + CHUNK]).with_format("arrow")[:]
        lists = chunk["input_ids"].combine_chunks().cast(pa.list_(pa.int32()))
        _refuse_unknown(lists, vocabulary, path)
        parts.append(_cut(lists, max_length, vocabulary))
    ids = pa.chunked_array(parts)
    table = {"input_ids": ids, "length": pc.list_value_length(ids).cast(pa.int64()), "cell": cells}
    texts = {name: np.asarray(values).astype(str).astype(object) for name, values in columns.items()}
    return datasets.Dataset(pa.table(table | texts))


def _refuse_unknown(lists: pa.ListArray, vocabulary: Vocabulary, path: Path) -> None:
    """Refuse cells without tokens, and tokens that are not those of the vocabulary."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    if not lengths.all():
        msg = f"{path}: {(lengths == 0).sum()} cells have no token; leave them out."
        raise UserError(msg)
    tokens = lists.flatten().to_numpy()
    unknown = ~np.isin(tokens, [*vocabulary.genes["token_id"], *vocabulary.begins_with, *vocabulary.ends_with])
    if unknown.any():
        msg = (
            f"{path}: {unknown.sum():,} of {len(tokens):,} tokens are not in the vocabulary of the checkpoint (such as "
            f"{tokens[unknown][0]}); set checkpoint to the model for which the data set was tokenized."
        )
        raise UserError(msg)
    first, last = (tokens[np.cumsum(lengths) - back] for back in (lengths, 1))
    if vocabulary.begins_with:
        bare = (first != vocabulary.begins_with[0]) | (last != vocabulary.ends_with[0])
        if bare.any():
            msg = (
                f"{path}: {bare.sum():,} of {len(bare):,} cells do not begin with <cls> and end with <eos>, as those "
                "of Geneformer V2 do; set checkpoint to Geneformer-V1-10M, or tokenize the cells for V2."
            )
            raise UserError(msg)
    elif len(first) > 1 and (first == first[0]).all() and (last == last[0]).all():
        msg = (
            f"{path}: every cell begins with token {first[0]} and ends with {last[0]}, like the <cls> and <eos> of "
            "Geneformer V2, which V1 does not have; set checkpoint to a V2 model, or tokenize the cells for V1."
        )
        raise UserError(msg)


def _cut(lists: pa.ListArray, longest: int, vocabulary: Vocabulary) -> pa.ListArray:
    """Cut lists after `longest` tokens; the special token at their end stays."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    cut = lists.flatten().to_numpy()[place < longest]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, longest))]).astype(np.int32)
    if vocabulary.ends_with:
        cut[offsets[1:] - 1] = vocabulary.ends_with[0]
    return pa.ListArray.from_arrays(offsets, cut)
