"""Which genes are told apart, in which folds, and in which cells they are read.

In: a study, with a list of genes of two classes. Out: a `GeneTask`, the same for all arms and seeds.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, train_test_split

from tuneformer.artifacts import UserError, key
from tuneformer.data import gene_lists
from tuneformer.study import Study
from tuneformer.tokens import encode
from tuneformer.tokens.encode import Tokens

FEWEST_CELLS = 5  # context cells that a scored gene is in, at least
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class GeneTask:
    """Genes to be told apart, and the cells in which they are read.

    ``genes``: one row per gene that is scored: gene, class, target (1: of the positive class), token_id, context_cells
    and other_cells (how many it is in), fold. ``classes``: negative and positive. ``counts``: how many genes of each
    class were listed, are in the vocabulary, and are scored. ``unknown``: listed genes outside the vocabulary;
    ``rare``: those in fewer than `FEWEST_CELLS` context cells. ``context`` and ``other``: rows of the cells in
    ``tokens``. ``permutation``: its number, if the classes are permuted.
    """

    genes: pd.DataFrame
    classes: list[str]
    counts: pd.DataFrame
    unknown: list[str]
    rare: list[str]
    context: np.ndarray
    other: np.ndarray
    tokens: Tokens
    permutation: int | None = None

    @property
    def key(self) -> str:
        """Changes with any gene, class, fold or cell."""
        table = self.genes[["gene", "class", "token_id", "fold"]].to_csv(index=False)
        return key(table, self.classes, self.context.tolist(), self.other.tolist(), self.tokens.key)


def prepare_genes(settings: Study) -> GeneTask:
    """Find the listed genes in the vocabulary and in the cells, and divide them into folds, stratified by class.

    ``gene_cells`` cells of the training part are the context; as many cells at most of the test part are the others.
    Both are drawn by ``split_seed``, as the folds are, so they are the same for all arms and seeds.

    Raises
    ------
    UserError
        The list cannot be used; two listed names are the same gene of the vocabulary; there are fewer training cells
        than ``gene_cells``; or a class has fewer genes left than there are folds, or than can be learnt and validated.
    """
    listed = gene_lists.read_gene_classes(settings)
    tokens = encode.single_cell_tokens(settings)
    names = tokens.vocabulary.resolve(listed.classes.index)
    gene_lists.check_classes(pd.Series(listed.classes.to_numpy(), index=names), "The list in the vocabulary's names")
    table = pd.DataFrame({"gene": names, "class": listed.classes.to_numpy(), "listed": listed.classes.index})
    table["target"] = (table["class"] == listed.positive).astype(int)
    table["token_id"] = table["gene"].map(tokens.vocabulary.genes.set_index("ensembl_id")["token_id"])
    known = table["token_id"].notna()
    context, other = _draw_cells(settings, tokens)
    for column, rows in {"context_cells": context, "other_cells": other}.items():
        ids = tokens.dataset.select_columns("input_ids").with_format("arrow")[rows]["input_ids"]
        n_cells = np.bincount(ids.combine_chunks().flatten().to_numpy(), minlength=tokens.vocabulary.size)
        table[column] = table["token_id"].map(pd.Series(n_cells)).fillna(0).astype(int)  # a gene is in a cell once
    scored = known & (table["context_cells"] >= FEWEST_CELLS)
    classes = [listed.negative, listed.positive]
    counts = {"listed": known | ~known, "in the vocabulary": known, "scored": scored}
    counts = {name: table.loc[kept, "class"].value_counts().reindex(classes) for name, kept in counts.items()}
    counts = pd.DataFrame(counts).fillna(0).astype(int)
    _refuse_few(settings, counts, table["listed"].iloc[0])
    return GeneTask(
        genes=_with_folds(settings, table[scored].drop(columns="listed").reset_index(drop=True)),
        classes=classes,
        counts=counts,
        unknown=table.loc[~known, "listed"].tolist(),
        rare=table.loc[known & ~scored, "listed"].tolist(),
        context=context,
        other=other,
        tokens=tokens,
    )


def permuted(settings: Study, task: GeneTask, number: int) -> GeneTask:
    """Return the task with the classes permuted over the genes, and folds stratified by these: a control.

    Whatever a method still finds then is not in the classes. `number` is that of the permutation.
    """
    order = np.random.default_rng([settings.split_seed, 8, number]).permutation(len(task.genes))
    drawn = {name: task.genes[name].to_numpy()[order] for name in ("class", "target")}
    return replace(task, genes=_with_folds(settings, task.genes.assign(**drawn)), permutation=number)


def parts_of(settings: Study, task: GeneTask, fold: int) -> np.ndarray:
    """Return train, validation or test for each gene: the fold is tested, a part of the others chooses the epoch.

    Of the genes outside the fold the share ``validation_share``, and two of each class at least, is for validation.
    """
    outside = np.flatnonzero(task.genes["fold"] != fold)
    targets = task.genes["target"].to_numpy()[outside]
    n_validation = round(max(settings.validation_share, 2 / np.bincount(targets).min()) * len(outside))
    _, chosen = train_test_split(outside, test_size=n_validation, stratify=targets, random_state=settings.split_seed)
    parts = np.full(len(task.genes), "test", dtype=object)
    parts[outside], parts[chosen] = "train", "validation"
    return parts


def fold_table(settings: Study, task: GeneTask) -> pd.DataFrame:
    """Count the genes of each class by part, for each fold."""
    rows = [task.genes[["class"]].assign(part=parts_of(settings, task, n), fold=n) for n in range(settings.gene_folds)]
    table = pd.concat(rows).value_counts().unstack(["part", "class"], fill_value=0).sort_index()
    return table.reindex(columns=pd.MultiIndex.from_product([PARTS, task.classes]), fill_value=0)


def _draw_cells(settings: Study, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Draw the context cells from the training part, and the others from the test part; rows, ascending."""
    split = tokens.dataset.select_columns("split").to_pandas()["split"]
    rng = np.random.default_rng([settings.split_seed, 9])
    available = {part: np.flatnonzero(split == part) for part in ("train", "test")}
    if len(available["train"]) < settings.gene_cells:
        msg = (
            f"gene_cells: {settings.gene_cells} cells were asked for as context, but the training part has "
            f"{len(available['train'])}; set fewer."
        )
        raise UserError(msg)
    drawn = [rows[rng.permutation(len(rows))[: settings.gene_cells]] for rows in available.values()]
    return np.sort(drawn[0]), np.sort(drawn[1])


def _with_folds(settings: Study, genes: pd.DataFrame) -> pd.DataFrame:
    """Give each gene its fold, stratified by class."""
    folds = np.empty(len(genes), dtype=int)
    split = StratifiedKFold(settings.gene_folds, shuffle=True, random_state=settings.split_seed)
    for number, (_, tested) in enumerate(split.split(genes, genes["target"])):
        folds[tested] = number
    return genes.astype({"token_id": int}).assign(fold=folds)


def _refuse_few(settings: Study, counts: pd.DataFrame, example: str) -> None:
    """Raise if a class has too few genes for the folds."""
    total, fewest = counts.sum(), _fewest(settings.gene_folds)
    if not total["in the vocabulary"]:
        msg = (
            f"None of the {total['listed']} listed genes is in the vocabulary; they are named like {example}: list "
            "Ensembl ids, or take the checkpoint that belongs to these names."
        )
        raise UserError(msg)
    rarest = counts["scored"].idxmin()
    if counts["scored"][rarest] < fewest:
        msg = (
            f"Class {rarest!r} has {counts['scored'][rarest]} genes left, and {settings.gene_folds} folds need "
            f"{fewest}: of {total['listed']} listed genes {total['listed'] - total['in the vocabulary']} are not in "
            f"the vocabulary and {total['in the vocabulary'] - total['scored']} are in fewer than {FEWEST_CELLS} of "
            f"the {settings.gene_cells} context cells; list more genes, or set a smaller gene_folds or a larger "
            "gene_cells."
        )
        raise UserError(msg)


def _fewest(folds: int) -> int:
    """Return how many genes a class needs, so that outside each fold two can be learnt and two choose the epoch."""
    return next(n for n in range(max(folds, 5), 99) if n - -(-n // folds) >= 4)
