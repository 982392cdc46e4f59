"""Simulated classes of genes: which of the simulated genes are "dosage-sensitive".

In: a seed. Out: a class for some of the genes of `tuneformer.data.simulate`. Nothing here is biology; every document
that shows a number made from these classes says "simulated".

Model
-----
A quarter of the gene programs are sensitive. A gene belongs to the program with its largest loading: a gene of a
sensitive program is dosage-sensitive with probability `INSIDE`, any other with `OUTSIDE`. So the class follows, with
noise, from the place of a gene in the network: from the genes with which it rises and falls.

Expression alone should not give the class away. Base expression and the number and size of loadings are drawn in the
simulator independently of which program is which, so they have the same distribution in both classes. The activity of a
program in the demo cells shifts its genes, so sensitive programs are drawn evenly: programs are sorted by whether drug
or cell cycle move them, then by their activity in the cell line, and one of each four neighbours is drawn. (Genes are
not paired by expression: class means that are equal over all genes would differ in training genes one way and in test
genes the other, and a classifier of expression would fall below chance.)

In the null version each gene is sensitive with the same probability, whatever its place.

The constants were fixed on draws with seeds of 90 and above, before any model was trained on the classes of the demo
studies; the aim was that a linear model of frozen embeddings succeeds and one of expression does not.
"""

import numpy as np
import pandas as pd

from tuneformer.data import simulate

SENSITIVE, INSENSITIVE = "dosage_sensitive", "dosage_insensitive"
N_LISTED = 490  # as in the list of transcription factors after Ni et al. 2019 (122 and 368)
LEAST_BASE = 0.0  # log base expression of a listed gene: its median over all genes; rarer genes stand in few cells
NEIGHBOURS = 4  # programs of which one is sensitive
INSIDE, OUTSIDE = 0.92, 0.03  # probability of sensitive


def simulate_gene_classes(*, seed: int, null: bool) -> pd.Series:
    """Draw which genes are listed, and the class of each.

    Parameters
    ----------
    seed
        Seed of the draw.
    null
        Whether the classes are drawn without any tie to programs, or to anything else of the genes.

    Returns
    -------
    `SENSITIVE` or `INSENSITIVE` by gene identifier; `N_LISTED` genes, in the order of the simulator. Each belongs to at
    least one program.
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


def _sensitive_programs(rng: np.random.Generator) -> np.ndarray:
    """Draw one of each four programs that are alike in how they behave in the demo cells."""
    activity = simulate.cell_type_activity(simulate.CELL_LINE)
    moves = np.abs(simulate.drug_effects()).sum(axis=0) > 0
    moves[:2] = True  # the cell cycle
    groups = np.lexsort((activity, moves)).reshape(-1, NEIGHBOURS)
    return groups[np.arange(len(groups)), rng.integers(NEIGHBOURS, size=len(groups))]
