"""Pseudo-bulk: points that are made of several single cells each, and the controls that belong to them.

In: single cells with raw counts, and the stratum (class within dose) of each. Out: one point per group of about k
cells, as the sum, mean or approximate mean of its counts; one cell of each group; or points thinned to the depth of
single cells. Given a folder, counts of points stay on disk in it, and memory does not grow with their number.
"""

from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import counts
from tuneformer.params import require_choice

SEPARATOR = "\n"  # between the names in obs["member_names"]; a name may contain a space
EXACT = 2**24  # whole numbers up to here are exact in float32


def strata(cells: ad.AnnData, dose_column: str | None) -> pd.Series:
    """Return the stratum of each cell, the unit that is never mixed: its class, or ``class @ dose``.

    Categorical, indexed by cell; categories in the order of classes and rising doses. A class without cells, or a cell
    without a dose, is a UserError.
    """
    label = cells.obs["label"]
    empty = label.cat.categories.difference(label.unique())
    if len(empty):
        msg = f"Class {empty[0]!r} has no cells to make others from; leave it out of classes, or give it cells."
        raise UserError(msg)
    if dose_column is None:
        return label.cat.as_unordered().rename("stratum")
    require_choice(dose_column, cells.obs.columns, "the cells", "dose_column")
    missing = cells.obs_names[cells.obs[dose_column].isna()]
    if len(missing):
        msg = f"dose_column: {len(missing)} cells have no {dose_column!r} (first: {missing[0]}); drop them first."
        raise UserError(msg)
    pairs = cells.obs.groupby(["label", dose_column], observed=True)
    found = pairs.size().index  # in the order of ngroup
    names = np.array([f"{name} @ {f'{dose:g}' if isinstance(dose, float) else dose}" for name, dose in found])
    return pd.Series(pd.Categorical(names[pairs.ngroup()], pd.unique(names)), cells.obs_names, name="stratum")


def group_cells(strata: pd.Series, *, k: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Put the cells of each stratum into groups of about `k`.

    The cells of a stratum are put in random order and cut into groups of round(k (1 + e)) cells, e ~ N(0, spread), at
    least 1 and at most 2k - 1. Fewer than k / 2 cells left at the end join the group before, where that stays within
    2k - 1; otherwise they are a group of their own. So no stratum is left without a group, and every cell is in one.
    (The thesis does not say what it did with the rest.) Names and order of strata have no part in the draw.

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.2.

    Parameters
    ----------
    strata
        Stratum of each cell, from `strata`; (cells,).
    k
        Mean number of cells in a group, 2 or more.
    spread
        Standard deviation of the number of cells in a group, as a share of `k`.

    Returns
    -------
    Number of the group of each cell, (cells,): 0, 1, 2, ..., stratum after stratum.
    """
    codes = strata.cat.codes.to_numpy()
    groups = np.empty(len(codes), dtype=np.int64)
    n_groups = 0
    for code in np.unique(codes):
        cells = rng.permutation(np.flatnonzero(codes == code))
        sizes = np.clip(np.rint(k * (1 + rng.normal(0, spread, len(cells)))), 1, 2 * k - 1)  # more than will be needed
        number = np.searchsorted(np.cumsum(sizes), np.arange(len(cells)), side="right")
        *_, before, last = [0, *np.bincount(number)]
        if before and last < k / 2 and before + last <= 2 * k - 1:
            number[number == number[-1]] -= 1
        groups[cells] = n_groups + number
        n_groups += number[-1] + 1
    return groups


def sharing_groups(
    strata: pd.Series, *, k: int, spread: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one group for each cell: the cell and others of its stratum, so that a cell is in about `k` groups.

    Sizes as in `group_cells`, but at most the size of the stratum, of which no cell is twice in a group. Points and
    their number are then told apart: the points are pseudo-bulk, and there are as many as single cells.

    Returns
    -------
    Number of the group, and the cell, of each membership: `groups` and `members` of `aggregate`.
    """
    codes = strata.cat.codes.to_numpy()
    members = []
    for code in np.unique(codes):
        cells = np.flatnonzero(codes == code)
        sizes = np.clip(np.rint(k * (1 + rng.normal(0, spread, len(cells)))), 1, min(2 * k - 1, len(cells)))
        for place, size in enumerate(sizes.astype(int)):
            others = (
                rng.choice(len(cells) - 1, size - 1, replace=False, shuffle=False) if size > 1 else np.empty(0, int)
            )
            members.append(cells[[place, *(others + (others >= place))]])
    return np.repeat(np.arange(len(members)), list(map(len, members))), np.concatenate(members)


def aggregate(
    cells: ad.AnnData,
    groups: np.ndarray,
    *,
    how: str,
    k: int,
    strata: pd.Series,
    name: str,
    members: np.ndarray | None = None,
    folder: Path | None = None,
) -> ad.AnnData:
    """Make one point of each group of cells.

    Sums are stored as float32, which holds them exactly up to 2^24. Means stay float64: float32 would round them by up
    to 6e-8, which breaks ties of genes that are tied in the sums; the 1e-16 of float64 is far below the tolerance of
    `tuneformer.tokens.encode`, so that all three have the same tokens. (scanpy.get.aggregate gives the same sums, but
    as a dense array: 2.4 GB for 10,000 points of 30,000 genes.)

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.2.

    Parameters
    ----------
    groups, k, strata
        From `group_cells`, and what it was given; (cells,).
    members
        With groups of `sharing_groups`: the cell of each of `groups`; None: every cell is in one group.
    how
        ``sum``; ``mean``, the sum divided by the number of cells in the group; ``approx_mean``, the sum divided by `k`,
        as if that number were not known.
    name
        Points are named ``<name>_0001`` and so on, in the order of the groups.
    folder
        Where ``X`` is kept (`counts.Counts`); None keeps it in memory.

    Returns
    -------
    AnnData (groups, genes): CSR ``X``; ``var`` of `cells`; ``obs``: label, dose and whatever else has one value in each
    stratum, stratum, n_counts (sum of ``X``), members (number of cells) and member_names (joined by `SEPARATOR`).

    Raises
    ------
    UserError
        A sum exceeds 2^24.
    """
    members = np.arange(cells.n_obs) if members is None else members
    sizes = np.bincount(groups)
    divisor = {"sum": np.ones(len(sizes)), "mean": sizes, "approx_mean": np.full(len(sizes), k)}[how]
    by_cell = np.argsort(members, kind="stable")
    begins = np.searchsorted(members[by_cell], np.arange(cells.n_obs + 1))  # of the groups of each cell

    def entries() -> Iterator[counts.Entries]:
        for part, values in counts.chunks(cells):
            chosen = by_cell[begins[part.start] : begins[part.stop]]
            taken = values[members[chosen] - part.start]
            yield np.repeat(groups[chosen], np.diff(taken.indptr)), taken.indices, taken.data

    def points() -> Iterator[sparse.csr_matrix]:
        shape = len(sizes), cells.n_vars
        for first, sums in counts.by_row(entries(), shape, n_cells=len(members), dtype=np.float64):
            sums.sort_indices()  # thinning draws in this order
            if sums.nnz and sums.data.max() > EXACT:
                msg = f"A gene has {sums.data.max():,.0f} counts in one point; sums are exact up to {EXACT:,}: lower k."
                raise UserError(msg)
            sums.data /= np.repeat(divisor[first : first + sums.shape[0]], np.diff(sums.indptr))
            yield sums.astype(np.float32) if how == "sum" else sums

    made, totals = counts.collected(points(), folder)
    members = members[np.argsort(groups, kind="stable")]
    first = np.cumsum(sizes) - sizes  # place in `members` where each group begins
    names = np.split(cells.obs_names.to_numpy(object)[members], first[1:])
    obs = _obs(cells, members[first], strata, name).assign(
        n_counts=totals, members=sizes, member_names=list(map(SEPARATOR.join, names))
    )
    return ad.AnnData(made, obs=obs, var=cells.var.copy())


def one_per_group(
    cells: ad.AnnData,
    groups: np.ndarray,
    *,
    rng: np.random.Generator,
    strata: pd.Series,
    name: str,
    members: np.ndarray | None = None,
    folder: Path | None = None,
) -> ad.AnnData:
    """Draw one cell of each group: as many points as `aggregate` makes, in the same order, but with one member each."""
    order = rng.permutation(len(groups))
    rows = order[np.unique(groups[order], return_index=True)[1]]
    rows = rows if members is None else members[rows]

    drawn = (values.astype(np.float32) for _, values in counts.chunks(cells[rows]))
    made, totals = counts.collected(drawn, folder)
    obs = _obs(cells, rows, strata, name).assign(
        n_counts=totals, members=1, member_names=cells.obs_names.to_numpy(object)[rows]
    )
    return ad.AnnData(made, obs=obs, var=cells.var.copy())


def thin(points: ad.AnnData, depths: np.ndarray, *, rng: np.random.Generator, folder: Path | None = None) -> ad.AnnData:
    """Thin summed counts, so that a point has about the total count of a single cell.

    Each molecule of a point is kept with probability min(1, depth / total), so a count c becomes Binomial(c, that); the
    new total is `depth` on average, not exactly. `depths` (points,) are such as ``n_counts`` of `one_per_group` for the
    same groups. Returns a copy of `points` with thinned ``X`` (float32) and the new ``obs["n_counts"]``; values that
    are not whole, as in means, are a UserError.
    """

    def thinned() -> Iterator[sparse.csr_matrix]:
        for part, whole in counts.chunks(points):
            if (whole.data != np.floor(whole.data)).any():
                msg = "Only whole counts can be thinned, and these points are means; thin their sums, which have the "
                msg += "same tokens."
                raise UserError(msg)
            values = whole.astype(np.float64)
            before = np.asarray(values.sum(axis=1)).ravel()
            kept = np.repeat(np.minimum(1, depths[part] / np.maximum(before, 1)), np.diff(values.indptr))
            values.data = rng.binomial(values.data.astype(np.int64), kept).astype(float)
            values.eliminate_zeros()
            yield values.astype(np.float32)

    made, totals = counts.collected(thinned(), folder)
    return ad.AnnData(made, obs=points.obs.assign(n_counts=totals), var=points.var.copy())


def bulk_points(cells: ad.AnnData, strata: pd.Series) -> ad.AnnData:
    """Make one bulk point of each stratum: the mean count of each gene over its cells.

    Returns AnnData (strata that have cells, genes): CSR float64 ``X``; ``var`` of `cells`; ``obs``, named by stratum:
    label, dose and any other column with one value in each stratum, stratum, n_counts (sum of the means), members
    (cells).
    """
    codes = pd.Categorical(strata).remove_unused_categories()
    names, first, members = codes.categories, *np.unique(codes.codes, return_index=True, return_counts=True)[1:]
    means = np.zeros(len(names) * cells.n_vars)
    for part, values in counts.chunks(cells):
        stratum = np.repeat(codes.codes[part].astype(np.int64), np.diff(values.indptr))
        np.add.at(means, stratum * cells.n_vars + values.indices, values.data * (1 / members[stratum]))
    means = sparse.csr_matrix(means.reshape(len(names), cells.n_vars))
    obs = shared_columns(cells, strata).iloc[first].set_axis(names.astype(str))
    obs["stratum"] = pd.Categorical(names, categories=names)
    obs["n_counts"] = np.asarray(means.sum(axis=1)).ravel()
    obs["members"] = members
    return ad.AnnData(means, obs=obs, var=cells.var)


def sample_points(samples: ad.AnnData, strata: pd.Series, *, depth: float) -> ad.AnnData:
    """Make one bulk point of each stratum from real bulk samples: the mean of the shares of its samples, times `depth`.

    How many cells are in a sample is not known, so the point is brought to the depth of a cell (the mean total count of
    single cells); replicates count the same, however deeply each was sequenced. As `bulk_points`; members are samples.
    """
    totals = np.asarray(samples.X.sum(axis=1)).ravel()
    scaled = sparse.csr_matrix(sparse.diags_array(depth / totals) @ samples.X)
    return bulk_points(ad.AnnData(scaled, obs=samples.obs, var=samples.var), strata)


def shared_columns(cells: ad.AnnData, strata: pd.Series) -> pd.DataFrame:
    """Return the obs columns with one value in each stratum, such as label and dose, which made cells take over."""
    columns = cells.obs.drop(columns=["n_counts", "mito_share", "counts_hash"], errors="ignore")
    return columns.loc[:, columns.groupby(strata.to_numpy(), observed=True).nunique(dropna=False).eq(1).all()]


def _obs(cells: ad.AnnData, rows: np.ndarray, strata: pd.Series, name: str) -> pd.DataFrame:
    """Make the obs of points from one member of each: what has one value in each stratum, and the stratum."""
    obs = shared_columns(cells, strata).iloc[rows].assign(stratum=strata.iloc[rows].to_numpy())
    obs.index = [f"{name}_{number:04d}" for number in range(1, len(rows) + 1)]
    return obs
