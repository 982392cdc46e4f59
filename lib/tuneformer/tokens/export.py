"""Tokens of a study for the official Geneformer code: ``python -m tuneformer.tokens.export <study> <folder>``.

In: the tokens of a task. Out: a ``.dataset`` folder that the official ``Classifier`` takes.
"""

import argparse
import sys
from pathlib import Path

import datasets

from tuneformer.artifacts import UserError, atomic_path
from tuneformer.study import Study, load_study
from tuneformer.tokens import encode


def write_dataset(settings: Study, dataset: datasets.Dataset, folder: Path) -> Path:
    """Write tokens for the official ``Classifier``, whole or not at all; return the folder.

    It takes the classes from ``cell_state_dict={"state_key": ...}``, a column named as in the cells, and the split from
    ``split_id_dict={"attr_key": "split", "train": ["train", "validation"], "test": ["test"]}``.
    """
    names = {"label": state_column(settings)} | ({"group": settings.group_by} if settings.group_by else {})
    with atomic_path(Path(folder)) as partial:
        dataset.rename_columns(names).save_to_disk(partial)
    return Path(folder)


def state_column(settings: Study) -> str:
    """Return the column of classes that `write_dataset` writes: that of the cells, unless the classifier refuses it."""
    return "cell_state" if settings.label in ("label", "labels", "cell", "split", settings.group_by) else settings.label


def main(arguments: list[str] | None = None) -> int:
    """Write the tokens of a study's single cells for the official classifier; end with 2 and one sentence if not."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.tokens.export", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    parser.add_argument("folder", type=Path, help="folder to write, such as cells.dataset")
    parser.add_argument("--task", help="one of the study's tasks; the first if left out")
    given = parser.parse_args(arguments)
    try:
        settings = load_study(given.study, **({"task": given.task} if given.task else {}))
        dataset = encode.single_cell_tokens(settings).dataset
        folder = write_dataset(settings, dataset, given.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: {len(dataset):,} cells, classes in the column {state_column(settings)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
