"""Which genes belong to which of two classes, such as dosage-sensitive and -insensitive.

In: ``gene_classes`` of a study: demo (simulated), a csv, or a pickle as Geneformer's examples have it. Out:
`GeneClasses`; or a `GeneListError` that says what to change in the list.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tuneformer.data import catalog, pickles, readers
from tuneformer.data.download import fetch
from tuneformer.data.simulate_genes import simulate_gene_classes
from tuneformer.study import paths
from tuneformer.study.params import Study

GENE, CLASS = "ensembl_id", "class"
MARKS = ("yes", "true", "1", "1.0", "x")  # what a column of a class holds for its genes, in any case
FORMS = f"columns {GENE} and {CLASS}, or {GENE} and a column for each class with Yes for its genes"


class GeneListError(ValueError):
    """A list of genes that cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class GeneClasses:
    """Genes of two classes.

    ``classes``: class by gene identifier, each gene once. ``positive``: the rarer class (of two of the same size the
    second by name), which is what a score is for; ``negative``: the other.
    """

    classes: pd.Series
    positive: str
    negative: str


def read_gene_classes(settings: Study) -> GeneClasses:
    """Read, download or draw the classes of genes that a study asks for.

    Raises
    ------
    GeneListError
        The file is missing, holds something else than genes of two classes, or names a gene twice; or ``demo`` is asked
        for with cells that are not those of the demo.
    CellsError
        The path names a $VARIABLE that is not set, or the file cannot be downloaded.
    """
    if settings.gene_classes == "demo":
        if settings.dataset != "demo":
            msg = (
                f"gene_classes: demo names simulated genes, but dataset is {settings.dataset}; set gene_classes to a "
                "csv or pickle of your genes."
            )
            raise GeneListError(msg)
        return check_classes(simulate_gene_classes(seed=settings.demo_seed, null=settings.gene_null), "the demo")
    if settings.gene_null:
        msg = f"gene_null: true draws simulated classes, but gene_classes is {settings.gene_classes}; set it to demo."
        raise GeneListError(msg)
    readers.refuse_unset("gene_classes", settings.gene_classes)
    path = paths.user_path(settings.gene_classes)
    if path == catalog.DOSAGE_GENES.target:
        fetch(catalog.DOSAGE_GENES)
    if not path.is_file():
        msg = f"gene_classes: {path} does not exist; set it to demo, or to a csv or pickle of genes and classes."
        raise GeneListError(msg)
    return from_pickle(path) if path.suffix in (".pkl", ".pickle") else from_csv(path)


def from_csv(path: Path) -> GeneClasses:
    """Read a csv of genes and classes, in one of the `FORMS`. Other columns, such as names, are left alone.

    Raises
    ------
    GeneListError
        No such columns, a gene without a class or with both, a gene that stands twice, or not two classes.
    """
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except (OSError, ValueError) as error:  # ValueError: pandas' errors of parsing, and text that is no UTF-8
        msg = f"{path} was not read as a csv ({' '.join(str(error).split())}); write {FORMS}."
        raise GeneListError(msg) from error
    marked = [name for name in table.columns if name != GENE and _is_marks(table[name])]
    if GENE not in table or (CLASS not in table and len(marked) < 2):
        msg = f"{path} has the columns {', '.join(table.columns)}; it needs {FORMS}."
        raise GeneListError(msg)
    table[GENE] = table[GENE].str.strip()
    if CLASS in table:
        pairs = table[[GENE, CLASS]].apply(lambda column: column.str.strip())
    else:
        long = table.melt(id_vars=GENE, value_vars=marked, var_name=CLASS, value_name="mark")
        pairs = long.loc[long["mark"].notna(), [GENE, CLASS]]
    lacking = table.loc[~table[GENE].isin(pairs.dropna()[GENE]), GENE]
    if len(lacking):
        msg = (
            f"{path}: {len(lacking)} of {len(table)} lines lack a gene or its class (first: line "
            f"{lacking.index[0] + 2}); complete or delete them."
        )
        raise GeneListError(msg)
    return check_classes(pd.Series(pairs[CLASS].to_numpy(), index=pairs[GENE].to_numpy()), str(path))


def from_pickle(path: Path) -> GeneClasses:
    """Read a pickled dictionary of class to list of genes, without running anything that the file may carry.

    This is how Geneformer's examples keep theirs (``dosage_sensitivity_TFs.pickle``).

    Raises
    ------
    GeneListError
        The file is no such dictionary, a gene stands twice, or there are not two classes.
    """
    try:
        content: Any = pickles.read_pickle(path)
    except ValueError as error:
        raise GeneListError(str(error)) from error
    is_lists = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(genes, list) and all(isinstance(gene, str) for gene in genes)
        for name, genes in content.items()
    )
    if not is_lists:
        msg = f"{path} is not a dictionary of class to list of Ensembl ids; write that, or a csv with {FORMS}."
        raise GeneListError(msg)
    pairs = [(gene.strip(), name) for name, genes in content.items() for gene in genes]
    classes = pd.Series([name for _, name in pairs], index=[gene for gene, _ in pairs], dtype=object)
    return check_classes(classes, str(path))


def check_classes(classes: pd.Series, where: str) -> GeneClasses:
    """Check that genes (index) have one class each, and that there are two classes.

    Parameters
    ----------
    classes
        Class of each line of a list; genes are the index.
    where
        Name of the list, for messages.

    Raises
    ------
    GeneListError
        A gene stands in both classes, or twice in one; or there is any other number of classes than two.
    """
    repeated = classes[classes.index.duplicated(keep=False)]
    n_classes = repeated.groupby(level=0).nunique()
    for what, genes in {
        "stand in both classes": n_classes.index[n_classes > 1],
        "stand more than once": n_classes.index,
    }.items():
        if len(genes):
            msg = f"{where}: {len(genes)} genes {what} (first: {genes[0]}); keep one line for each gene."
            raise GeneListError(msg)
    sizes = classes.value_counts()
    if len(sizes) != 2:
        named = ", ".join(f"{name} ({number})" for name, number in sizes.items()) or "none"
        msg = f"{where}: two classes of genes are told apart, but the list has {len(sizes)}: {named}."
        raise GeneListError(msg)
    negative, positive = sorted(sizes.index, key=lambda name: (-sizes[name], name))
    return GeneClasses(classes.rename_axis("gene").rename("class"), positive=positive, negative=negative)


def _is_marks(column: pd.Series) -> bool:
    """Return whether a column holds nothing but marks, and one at least."""
    known = column.dropna().str.strip().str.lower()
    return len(known) > 0 and known.isin(MARKS).all()
