"""Which genes belong to which of two classes, such as dosage-sensitive and -insensitive.

In: ``gene_classes`` of a study: demo (simulated), a csv, or a pickle as Geneformer's examples have it. Out:
`GeneClasses`; or one sentence that says what to change in the list.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tuneformer.artifacts import UserError
from tuneformer.data import fetch, simulate, sources
from tuneformer.data.refusals import expanded_path, read_table
from tuneformer.data.unpickle import read_pickle
from tuneformer.paths import user_path
from tuneformer.study import Study

GENE, CLASS = "ensembl_id", "class"
MARKS = ("yes", "true", "1", "1.0", "x")  # what a column of a class holds for its genes, in any case
FORMS = f"columns {GENE} and {CLASS}, or {GENE} and a column for each class with Yes for its genes"

SENSITIVE, INSENSITIVE = "dosage_sensitive", "dosage_insensitive"
N_LISTED = (
    320  # genes with a class, a quarter of them sensitive, as of the factors listed by Ni et al. 2019 (122 and 368)
)
LEAST_BASE = -0.5  # log base expression of a listed gene; rarer genes are in few cells
NEIGHBOURS = 4  # programs of which one is sensitive
INSIDE, OUTSIDE = 0.92, 0.03  # probability that a gene is sensitive, in a sensitive program and elsewhere


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
    UserError
        The file is missing, cannot be downloaded, holds something else than genes of two classes, or names a gene
        twice; or ``demo`` is asked for with cells that are not those of the demo.
    """
    if settings.gene_classes == "demo":
        if settings.dataset != "demo":
            msg = (
                f"gene_classes: demo names simulated genes, but dataset is {settings.dataset}; set gene_classes to a "
                "csv or pickle of your genes."
            )
            raise UserError(msg)
        return check_classes(simulate_gene_classes(seed=settings.demo_seed, null=settings.gene_null), "the demo")
    if settings.gene_null:
        msg = f"gene_null: true draws simulated classes, but gene_classes is {settings.gene_classes}; set it to demo."
        raise UserError(msg)
    if user_path(settings.gene_classes) == sources.DOSAGE_GENES.target:
        fetch.fetch(sources.DOSAGE_GENES)
    path = expanded_path("gene_classes", settings.gene_classes, "demo, or to a csv or pickle of genes and classes")
    return from_pickle(path) if path.suffix in (".pkl", ".pickle") else from_csv(path)


def from_csv(path: Path) -> GeneClasses:
    """Read a csv of genes and classes, in one of the `FORMS`; other columns, such as names, are left alone.

    Other forms, and lines that lack a gene or its class, are a UserError; else raises as `check_classes`.
    """
    table = read_table("gene_classes", path, dtype=str, skipinitialspace=True)
    marked = [name for name in table.columns if name != GENE and _is_marks(table[name])]
    if GENE not in table or (CLASS not in table and len(marked) < 2):
        msg = f"{path} has the columns {', '.join(table.columns)}; it needs {FORMS}."
        raise UserError(msg)
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
        raise UserError(msg)
    return check_classes(pairs.set_index(GENE)[CLASS], str(path))


def from_pickle(path: Path) -> GeneClasses:
    """Read a pickled dictionary of class to list of genes, as Geneformer's examples have it; nothing in it is run.

    Anything else is a UserError; else raises as `check_classes`.
    """
    content = read_pickle(path)
    is_lists = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(genes, list) and all(isinstance(gene, str) for gene in genes)
        for name, genes in content.items()
    )
    if not is_lists:
        msg = f"{path} is not a dictionary of class to list of Ensembl ids; write that, or a csv with {FORMS}."
        raise UserError(msg)
    pairs = [(gene.strip(), name) for name, genes in content.items() for gene in genes]
    return check_classes(pd.DataFrame(pairs, columns=[GENE, CLASS]).set_index(GENE)[CLASS], str(path))


def check_classes(classes: pd.Series, where: str) -> GeneClasses:
    """Refuse (UserError) genes (index) that are given twice, and other than two classes; `where` names the list."""
    n_classes = classes[classes.index.duplicated(keep=False)].groupby(level=0).nunique()
    for what, genes in {"in both classes": n_classes.index[n_classes > 1], "given twice": n_classes.index}.items():
        if len(genes):
            msg = f"{where}: genes that are {what}: {len(genes)} (first: {genes[0]}); keep one line for each gene."
            raise UserError(msg)
    sizes = classes.value_counts()
    if len(sizes) != 2:
        named = ", ".join(f"{name} ({number})" for name, number in sizes.items()) or "none"
        msg = f"{where}: two classes of genes are told apart, but the list has {len(sizes)}: {named}."
        raise UserError(msg)
    negative, positive = sorted(sizes.index, key=lambda name: (-sizes[name], name))
    return GeneClasses(classes.rename_axis("gene").rename("class"), positive=positive, negative=negative)


def simulate_gene_classes(*, seed: int, null: bool) -> pd.Series:
    """Draw which genes have a class, "dosage-sensitive" or not; with `null` the class depends on nothing.

    A quarter of the programs are sensitive. A gene belongs to the program of its largest loading, and is sensitive with
    probability `INSIDE` if that is a sensitive program, else with `OUTSIDE`: the class follows, with noise, from the
    genes with which a gene rises and falls. Expression alone does not give it away: base expression and the number and
    size of loadings are drawn independently of the programs, and sensitive programs are drawn evenly over the
    activities that programs have in the demo cells. The constants were fixed on seeds of 90 and above, so that a linear
    model of frozen embeddings succeeds and one of expression does not.

    Returns
    -------
    `SENSITIVE` or `INSENSITIVE` by gene identifier: `N_LISTED` genes of one program or more, in the simulator's order.
    """
    universe = simulate.make_universe()
    rng = np.random.default_rng([seed, 7])
    candidates = np.flatnonzero((universe.loadings > 0).any(axis=1) & (universe.base >= LEAST_BASE))
    listed = np.sort(rng.choice(candidates, N_LISTED, replace=False))
    is_inside = np.isin(universe.loadings[listed].argmax(axis=1), _sensitive_programs(rng))
    chance = np.where(is_inside, INSIDE, OUTSIDE)
    if null:
        chance = np.full(N_LISTED, (INSIDE + (NEIGHBOURS - 1) * OUTSIDE) / NEIGHBOURS)
    is_sensitive = rng.uniform(size=N_LISTED) < chance
    genes = pd.Index(universe.var["ensembl_id"].to_numpy()[listed], name="gene")
    return pd.Series(np.where(is_sensitive, SENSITIVE, INSENSITIVE), index=genes, name="class")


def _is_marks(column: pd.Series) -> bool:
    """Return whether a column holds nothing but marks, and one at least."""
    known = column.dropna().str.strip().str.lower()
    return len(known) > 0 and known.isin(MARKS).all()


def _sensitive_programs(rng: np.random.Generator) -> np.ndarray:
    """Draw one of each four programs that are alike in the demo cells: in being moved at all, then in activity."""
    activity = simulate.cell_type_activity(simulate.CELL_LINE)
    moves = np.abs(simulate.drug_effects()).sum(axis=0) > 0
    moves[:2] = True  # the cell cycle
    groups = np.lexsort((activity, moves)).reshape(-1, NEIGHBOURS)
    return groups[np.arange(len(groups)), rng.integers(NEIGHBOURS, size=len(groups))]
