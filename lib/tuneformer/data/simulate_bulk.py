"""A simulated bulk experiment beside the simulated cells: one sample of each well, of cells of its own.

In: a seed. Out: a table of counts, genes x samples, and what was in each well. As everything that
`tuneformer.data.simulate` makes, this is no biology.
"""

import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.data import simulate

CELLS = 10_000  # simulated and lysed, about 50 in each of the 192 wells
SEED_STEP = 7001  # from the seed of the single cells to that of the bulk samples, which share no cell and no well


def simulate_bulk(*, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Simulate bulk samples: all cells of a well, good and bad ones, added up.

    The drugs are those of `tuneformer.data.simulate.simulate_sciplex2`, and so are genes and doses; cells, library
    sizes and well effects are drawn anew, as in another experiment.

    Parameters
    ----------
    seed
        Seed of the single cells (``demo_seed``) beside which the samples stand.

    Returns
    -------
    Counts, genes x samples, whole numbers; and the wells, indexed by sample: ``obs`` of the simulated cells as far as
    it has one value in a well.
    """
    cells = simulate.simulate_sciplex2(CELLS, seed=seed + SEED_STEP)
    cells = cells[cells.obs["well"].notna()]
    codes, wells = pd.factorize(cells.obs["well"].astype(str), sort=True)
    gather = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    counts = (gather @ cells.X.astype(np.float64)).toarray().T.astype(np.int64)
    _, first = np.unique(codes, return_index=True)
    sheet = cells.obs.iloc[first].set_axis(wells).rename_axis("sample")
    return pd.DataFrame(counts, index=cells.var["ensembl_id"].rename("gene"), columns=wells), sheet
