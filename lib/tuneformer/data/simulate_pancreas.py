"""A simulated look-alike of the human pancreas in six technologies: 14 cell types, the rarest with seven cells.

In: a number of cells and a seed. Out: cells for the study of class imbalance and of technologies that differ. Genes,
programs and counts are those of `tuneformer.data.simulate`, so the demo checkpoint knows them. No cell here is real,
and no score on them says anything about the pancreas.

Model
-----
The activity of the programs in a cell is that of its lineage, plus that of its type, plus variation between cells;
types of one lineage (alpha, beta, delta, gamma, epsilon) differ in the second only, and so are close. A technology
multiplies the expression of each gene by a log-normal factor of its own, and has its own depth. The types have the
published sizes, scaled, but at least seven cells; half of the cells are of one technology. Another has sorted endocrine
cells only, and the rarest types are in three or four technologies, with at least one cell in each, so that a split by
technology finds each type in three groups or more. In the full-length technologies, reads that fit several genes are
divided between them, so that the "counts" are not whole numbers.

Sources
-------
Types, their sizes, and technologies: Luecken et al. 2022, scIB (doi:10.1038/s41592-021-01336-8), human pancreas, 16,382
cells. Expected counts with two decimals: Li and Dewey 2011, RSEM (doi:10.1186/1471-2105-12-323).
"""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import simulate

FIRST_TYPE = 1000  # numbers of types and lineages here; the corpus uses 0, 1, 2, ... and never gets so far
LEAST_CELLS = 7  # of a type
LINEAGE_SCALE = 1.0  # of the activities of a lineage, relative to a cell type of the corpus
TYPE_SCALE = 0.4  # and of what a type adds to its lineage
GENE_SD = 0.6  # of the natural log of the factor by which a technology multiplies a gene
SHARED_GENES = 0.3  # share of the genes that share reads with others
KEPT_READS = (0.5, 1.0)  # share of its reads that such a gene keeps


@dataclass(frozen=True)
class CellType:
    """A type: how many cells the published data have of it, and which technologies have it."""

    name: str
    cells: int
    lineage: str
    technologies: tuple[str, ...]


@dataclass(frozen=True)
class Technology:
    """A technology: about its share of the cells, median counts, and whether it reads whole transcripts without UMI."""

    name: str
    share: float
    depth: float
    full_length: bool


TECHNOLOGIES = (
    Technology("celseq", 0.06, depth=2000.0, full_length=False),
    Technology("celseq2", 0.14, depth=3500.0, full_length=False),
    Technology("fluidigmc1", 0.04, depth=9000.0, full_length=True),
    Technology("inDrop", 0.52, depth=1800.0, full_length=False),
    Technology("smarter", 0.09, depth=8000.0, full_length=True),
    Technology("smartseq2", 0.15, depth=10000.0, full_length=True),
)
EVERYWHERE = tuple(technology.name for technology in TECHNOLOGIES)
UNSORTED = tuple(name for name in EVERYWHERE if name != "smarter")
TYPES = (
    CellType("alpha", 5493, "endocrine", EVERYWHERE),
    CellType("beta", 4169, "endocrine", EVERYWHERE),
    CellType("ductal", 2142, "exocrine", UNSORTED),
    CellType("acinar", 1669, "exocrine", UNSORTED),
    CellType("delta", 1055, "endocrine", EVERYWHERE),
    CellType("gamma", 699, "endocrine", EVERYWHERE),
    CellType("activated_stellate", 464, "stromal", UNSORTED),
    CellType("endothelial", 313, "stromal", UNSORTED),
    CellType("quiescent_stellate", 193, "stromal", ("celseq", "celseq2", "fluidigmc1", "inDrop")),
    CellType("macrophage", 79, "immune", ("celseq", "celseq2", "inDrop", "smartseq2")),
    CellType("mast", 42, "immune", ("celseq2", "inDrop", "smartseq2")),
    CellType("epsilon", 32, "endocrine", ("celseq2", "inDrop", "smarter", "smartseq2")),
    CellType("schwann", 25, "stromal", ("celseq2", "inDrop", "smartseq2")),
    CellType("t_cell", 7, "immune", ("celseq2", "inDrop", "smartseq2")),
)


def simulate_pancreas(n_cells: int, *, seed: int) -> ad.AnnData:
    """Simulate `n_cells` of the human pancreas of scIB; `seed` draws the cells, not the types and technologies.

    Returns
    -------
    AnnData (`n_cells`, 900): counts in ``X`` (CSR, float32), with two decimals in full-length technologies; ``var``
    ensembl_id, symbol; ``obs`` celltype, tech.

    Raises
    ------
    UserError
        Fewer cells than seven of each type.
    """
    universe = simulate.make_universe()
    rng = np.random.default_rng([seed, 6])
    table = cell_numbers(n_cells)  # (types, technologies)
    place = rng.permutation(np.repeat(np.arange(table.size), table.to_numpy().ravel()))
    type_of, technology_of = np.divmod(place, len(TECHNOLOGIES))
    activity = type_activity()[type_of] + simulate.cell_variation(n_cells, rng)
    gene_effects, kept = _technology_effects()
    depth = np.array([technology.depth for technology in TECHNOLOGIES])[technology_of]
    library = depth * np.exp(rng.normal(0, simulate.LIBRARY_SD, n_cells))
    mito_share = rng.beta(*simulate.MITO_BETA, n_cells)
    counts = simulate.draw_counts(
        universe, activity, library, mito_share, rng, gene_shift=gene_effects, shift_of=technology_of
    )
    full_length = np.array([technology.full_length for technology in TECHNOLOGIES])
    obs = pd.DataFrame(
        {"celltype": pd.Categorical(table.index[type_of]), "tech": pd.Categorical(table.columns[technology_of])},
        index=[f"pancreas{number}" for number in range(n_cells)],
    )
    return ad.AnnData(_divide_reads(counts, kept, full_length[technology_of]), obs=obs, var=universe.var)


def cell_numbers(n_cells: int) -> pd.DataFrame:
    """Return how many cells of each type (rows) each technology (columns) has; UserError as `simulate_pancreas`."""
    if n_cells < LEAST_CELLS * len(TYPES):
        msg = f"{n_cells} cells are fewer than {LEAST_CELLS} of each of {len(TYPES)} types; set demo_cells to more."
        raise UserError(msg)
    sizes = _apportion(n_cells, np.array([one.cells for one in TYPES]), LEAST_CELLS)
    table = pd.DataFrame(0, index=[one.name for one in TYPES], columns=list(EVERYWHERE))
    shares = pd.Series({technology.name: technology.share for technology in TECHNOLOGIES})
    for one, size in zip(TYPES, sizes, strict=True):
        table.loc[one.name, list(one.technologies)] = _apportion(size, shares[list(one.technologies)].to_numpy(), 1)
    return table


def type_activity() -> np.ndarray:
    """Return the mean activity of the programs in each type, (types, programs)."""
    lineages = list(dict.fromkeys(one.lineage for one in TYPES))
    shared = np.stack([simulate.cell_type_activity(FIRST_TYPE + number) for number in range(len(lineages))])
    own = np.stack([simulate.cell_type_activity(FIRST_TYPE + len(lineages) + number) for number in range(len(TYPES))])
    return LINEAGE_SCALE * shared[[lineages.index(one.lineage) for one in TYPES]] + TYPE_SCALE * own


def _technology_effects() -> tuple[np.ndarray, np.ndarray]:
    """Draw the log factors of genes (technologies, genes), and the share of its reads that each gene keeps (genes,)."""
    rng = np.random.default_rng([simulate.UNIVERSE_SEED, 6])
    effects = rng.normal(0, GENE_SD, (len(TECHNOLOGIES), simulate.N_GENES))
    kept = np.ones(simulate.N_GENES)
    is_shared = rng.uniform(size=simulate.N_GENES) < SHARED_GENES
    kept[is_shared] = rng.uniform(*KEPT_READS, is_shared.sum())
    return effects, kept


def _divide_reads(counts: sparse.csr_matrix, kept: np.ndarray, is_full_length: np.ndarray) -> sparse.csr_matrix:
    """Multiply the counts of full-length cells by the share `kept` (genes,), to two decimals."""
    cell_of = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    expected = (counts.data * kept[counts.indices]).round(2)
    counts.data = np.where(is_full_length[cell_of], expected, counts.data).astype(np.float32)
    return counts


def _apportion(n: int, weights: np.ndarray, least: int) -> np.ndarray:
    """Divide `n` by `weights` into whole numbers of at least `least`, by largest remainders; the largest pays."""
    exact = n * weights / weights.sum()
    parts = np.maximum(least, np.floor(exact)).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: max(0, n - parts.sum())]] += 1
    while parts.sum() > n:
        parts[parts.argmax()] -= 1
    return parts
