"""The official Geneformer format (a ``.dataset`` folder), in and out.

In: a data set that the official tokenizer wrote, whose cells enter fine-tuning as they are; or the tokens of a run.
Out: a `datasets.Dataset` as `tuneformer.tokens.tokenizer.tokenize` makes it; or a folder that the official
``Classifier`` takes: as a command, ``python -m tuneformer.tokens.official <study> <folder>``.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tuneformer.data import readers
from tuneformer.study import paths
from tuneformer.study.params import ParameterError, Study, load_study
from tuneformer.tokens import tokenizer
from tuneformer.tokens.tokenizer import TokensError
from tuneformer.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    import anndata as ad

CHUNK = 20_000  # cells read at once: official files hold 8 bytes a token, which are 300 MB
RESERVED = ("label", "labels")  # the official classifier wants to name its numbered classes so, and refuses them


def read_dataset(settings: Study, cells: "ad.AnnData", vocabulary: Vocabulary, path: Path) -> datasets.Dataset:
    """Take the tokens of the cells of a task from a data set in the official format.

    Lists longer than the positions of the checkpoint are cut; in V2 ``<eos>`` stays at the end.

    Parameters
    ----------
    settings
        ``checkpoint``, ``max_length`` and ``group_by`` are read.
    cells
        As `tuneformer.data.preprocessing.prepare_cells` makes them of the same folder: classes, split, groups.
    vocabulary
        Of the checkpoint.
    path
        The folder.

    Returns
    -------
    As `tuneformer.tokens.tokenizer.tokenize`, one row a cell of `cells`, in their order.

    Raises
    ------
    TokensError
        A cell has no token, or a token that the checkpoint does not know; the tokens are those of the other version of
        Geneformer, with or without ``<cls>`` and ``<eos>``.
    CellsError
        The folder cannot be read.
    """
    rows = readers.read_tokenized(path).obs_names.get_indexer(cells.obs_names)
    stored = datasets.load_from_disk(str(path)).select_columns(["input_ids"]).with_format("arrow")
    longest = tokenizer.task_length(settings)
    parts = []
    for start in range(0, len(rows), CHUNK):
        lists = stored.select(rows[start : start + CHUNK])[:]["input_ids"].combine_chunks().cast(pa.list_(pa.int32()))
        _refuse_unknown(lists, vocabulary, path)
        parts.append(_cut(lists, longest, vocabulary))
    ids = pa.chunked_array(parts)
    table = {
        "input_ids": ids,
        "length": pc.list_value_length(ids).cast(pa.int64()),
        "cell": cells.obs_names.to_numpy(object),
    }
    carried = {
        name: cells.obs[source].astype(str).to_numpy(object) for name, source in tokenizer.carried(settings).items()
    }
    return datasets.Dataset(pa.table(table | carried))


def write_dataset(settings: Study, dataset: datasets.Dataset, folder: Path) -> Path:
    """Write the tokens of a run for the official ``Classifier``.

    It takes the column of the classes from ``cell_state_dict={"state_key": ...}`` and refuses a column ``label``, which
    it wants to make itself; here the classes stand in a column named as in the cells. ``split`` can be given to it as
    ``split_id_dict={"attr_key": "split", "train": ["train", "validation"], "test": ["test"]}``.

    Parameters
    ----------
    settings
        The run; ``label`` and ``group_by`` name columns.
    dataset
        As `tuneformer.tokens.tokenizer.tokenize` makes it.
    folder
        Where it is written, whole or not at all.

    Returns
    -------
    The folder: input_ids, length, cell, split, the classes and, where whole groups are held out, the groups.
    """
    names = {"label": state_column(settings)}
    if "group" in dataset.column_names:
        names["group"] = settings.group_by
    with paths.atomic_path(Path(folder)) as partial:
        dataset.rename_columns(names).save_to_disk(partial)
    return Path(folder)


def state_column(settings: Study) -> str:
    """Return the name of the column of classes in what `write_dataset` writes: that of the cells, unless reserved."""
    return "cell_state" if settings.label in (*RESERVED, "cell", "split", settings.group_by) else settings.label


def main(arguments: list[str] | None = None) -> int:
    """Write the tokens of a study's single cells for the official classifier; end with 2 and one sentence if not."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.tokens.official", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    parser.add_argument("folder", type=Path, help="folder to write, such as cells.dataset")
    parser.add_argument("--task", help="one of the study's tasks; the first if left out")
    given = parser.parse_args(arguments)
    try:
        settings = load_study(given.study, **({"task": given.task} if given.task else {}))
        tokens = tokenizer.read_tokens(settings)
        if tokens is None:
            msg = (
                f"{paths.shown(paths.tokens_path(settings))} has no tokens of this study; make them by "
                f"python -m tuneformer.study.run 02_tokenize --study {settings.study} --task {settings.task}."
            )
            raise TokensError(msg)
        folder = write_dataset(settings, tokens.dataset, given.folder)
    except (ParameterError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: {len(tokens.dataset):,} cells, classes in the column {state_column(settings)!r}")
    return 0


def _refuse_unknown(lists: pa.ListArray, vocabulary: Vocabulary, path: Path) -> None:
    """Refuse cells without tokens, and tokens that are not those of the vocabulary."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    if not lengths.all():
        msg = f"{path}: {(lengths == 0).sum()} cells have no token; leave them out."
        raise TokensError(msg)
    tokens = lists.flatten().to_numpy()
    ends = np.cumsum(lengths)
    known = np.zeros(vocabulary.size, dtype=bool)
    known[[*vocabulary.genes["token_id"], *vocabulary.begins_with, *vocabulary.ends_with]] = True
    inside = (tokens >= 0) & (tokens < len(known))
    inside[inside] = known[tokens[inside]]
    if not inside.all():
        msg = (
            f"{path}: {(~inside).sum():,} of {len(tokens):,} tokens are not in the vocabulary of the checkpoint (such "
            f"as {tokens[~inside][0]}); set checkpoint to the model for which the data set was tokenized."
        )
        raise TokensError(msg)
    first, last = tokens[ends - lengths], tokens[ends - 1]
    if vocabulary.begins_with:
        framed = (first == vocabulary.begins_with[0]) & (last == vocabulary.ends_with[0])
        if not framed.all():
            msg = (
                f"{path}: {(~framed).sum():,} of {len(framed):,} cells do not begin with <cls> and end with <eos>, as "
                "those of Geneformer V2 do; set checkpoint to Geneformer-V1-10M, or tokenize the cells for V2."
            )
            raise TokensError(msg)
    elif len(first) > 1 and (first == first[0]).all() and (last == last[0]).all():
        msg = (
            f"{path}: every cell begins with token {first[0]} and ends with {last[0]}, like the <cls> and <eos> of "
            "Geneformer V2, which V1 does not have; set checkpoint to a V2 model, or tokenize the cells for V1."
        )
        raise TokensError(msg)


def _cut(lists: pa.ListArray, longest: int, vocabulary: Vocabulary) -> pa.ListArray:
    """Cut lists after `longest` tokens; the special token at their end stays."""
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    if lengths.max() <= longest:
        return lists
    tokens, kept = lists.flatten().to_numpy(), np.minimum(lengths, longest)
    begins = np.cumsum(lengths) - lengths
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], kept) + np.repeat(begins, kept)
    cut = tokens[places]
    if vocabulary.ends_with:
        cut[offsets[1:] - 1] = vocabulary.ends_with[0]
    return pa.ListArray.from_arrays(offsets, cut)


if __name__ == "__main__":
    sys.exit(main())
