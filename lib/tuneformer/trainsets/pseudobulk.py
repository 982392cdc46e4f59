"""Pseudo-bulk: points that are made of several single cells each, and the controls that belong to them.

In: single cells with raw counts, and the stratum (class within dose) of each. Out: one point for each group of about k
cells, as sum, mean or approximate mean of its counts; one cell of each group; points thinned to the depth of single
cells; and the tables that 03_pseudobulk shows.
"""

from collections.abc import Mapping

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.study.train_sets import AGGREGATIONS
from tuneformer.tokens import tokenizer
from tuneformer.tokens.vocabulary import Vocabulary, counts_by_gene, gene_ids
from tuneformer.trainsets.strata import TrainSetError, shared_columns

SIZES = (2, 5, 10, 25, 100)  # values of k in the bulk thesis
SEPARATOR = "\n"  # between the names in obs["member_names"]; a name may hold a space
EXACT = 2**24  # whole numbers up to here are exact in float32


def group_cells(strata: pd.Series, *, k: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Put the cells of each stratum into groups of about `k`.

    The cells of a stratum are put in random order and cut into groups of round(k (1 + e)) cells, e ~ N(0, spread), at
    least 1 and at most 2k - 1. At the end fewer cells are left. If they are fewer than k / 2, they join the group
    before, where that stays within 2k - 1; otherwise they are a group of their own. (The thesis does not say what it
    did with them. A group of very few cells is nearer to single cells than k says, and with small strata there would
    be many.) A stratum of fewer than k cells mostly becomes one smaller group. No stratum is left without a group, so
    there are never fewer groups than classes, and every cell is in one group.

    Strata take their random numbers in the order of their categories, cells in the given order; names and order have no
    other part in the draw.

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.2.

    Parameters
    ----------
    strata
        Stratum of each cell, (cells,).
    k
        Number of cells in a group, on average; 2 or more.
    spread
        Standard deviation of the number of cells in a group, as a share of `k`.
    rng
        Of the draw.

    Returns
    -------
    Number of the group of each cell, (cells,): 0, 1, 2, ..., stratum after stratum.

    Raises
    ------
    TrainSetError
        `k` is below 2, there are no cells, or a cell has no stratum.
    """
    if k < 2:
        msg = f"k is {k}, but a pseudo-bulk point is made of 2 cells or more; for single cells, use single_cell."
        raise TrainSetError(msg)
    codes = strata.astype("category").cat.codes.to_numpy()
    if not len(codes) or codes.min() < 0:
        what = f"{(codes < 0).sum()} of {len(codes)} cells have no stratum" if len(codes) else "There are no cells"
        msg = f"{what}, so no groups can be made; keep cells whose class and dose are known."
        raise TrainSetError(msg)
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


def aggregate(cells: ad.AnnData, groups: np.ndarray, *, how: str, k: int, strata: pd.Series, name: str) -> ad.AnnData:
    """Make one point of each group of cells.

    The counts are summed in float64, by the product of a sparse indicator matrix (groups, cells) with ``X``. Sums are
    whole numbers, which float32 holds exactly up to 2^24. Means stay float64: float32 would round them by up to 6e-8
    and so break ties of genes that are tied in the sums, and swap genes that are nearly tied. The 1e-16 of float64 is
    far below `tuneformer.tokens.tokenizer.TIE`, so that all three aggregations have the same tokens.

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.2.

    Parameters
    ----------
    cells
        Raw counts in ``X``; ``obs["label"]``.
    groups
        Number of the group of each cell, from `group_cells`; (cells,).
    how
        ``sum``; ``mean``, the sum divided by the number of cells in the group; ``approx_mean``, the sum divided by `k`,
        as if that number were not known.
    k
        Number of cells in a group, on average.
    strata
        Stratum of each cell, (cells,).
    name
        Points are named ``<name>_0001`` and so on, in the order of the groups.

    Returns
    -------
    AnnData (groups, genes): ``X`` CSR, float32 for sums and float64 for means; ``var`` of `cells`; ``obs``: label, dose
    and whatever else has one value in each stratum, stratum, n_counts (sum of ``X``), members (number of cells) and
    member_names (to be read with `member_names`).

    Raises
    ------
    TrainSetError
        `how` is unknown, lengths do not fit, a group has no cells or cells of two strata, or a sum exceeds 2^24.
    """
    members = _members(cells, groups, strata)
    if how not in AGGREGATIONS:
        msg = f"{how!r} is no aggregation; use {', '.join(AGGREGATIONS)}."
        raise TrainSetError(msg)
    divisors = {"sum": np.ones(len(members)), "mean": members, "approx_mean": np.full(len(members), k)}
    pairs = (groups, np.arange(cells.n_obs))
    indicator = sparse.csr_matrix((np.ones(cells.n_obs), pairs), shape=(len(members), cells.n_obs))
    counts = indicator @ sparse.csr_matrix(cells.X, dtype=np.float64)
    counts.sort_indices()  # thinning draws in this order
    if counts.nnz and counts.data.max() > EXACT:
        msg = f"A gene has {counts.data.max():,.0f} counts in one point; sums are exact up to {EXACT:,}: lower k."
        raise TrainSetError(msg)
    counts.data /= np.repeat(divisors[how], np.diff(counts.indptr))
    order = np.argsort(groups, kind="stable")
    first = np.cumsum(members) - members  # place in `order` where each group begins
    names = [SEPARATOR.join(part) for part in np.split(cells.obs_names.to_numpy(object)[order], first[1:])]
    obs = _obs(cells, order[first], strata, name).assign(
        n_counts=np.asarray(counts.sum(axis=1)).ravel(), members=members, member_names=names
    )
    return ad.AnnData(counts.astype(np.float32) if how == "sum" else counts, obs=obs, var=cells.var.copy())


def one_per_group(
    cells: ad.AnnData, groups: np.ndarray, *, rng: np.random.Generator, strata: pd.Series, name: str
) -> ad.AnnData:
    """Draw one member of each group: as many points as `aggregate` makes, in the same order, but of one cell each.

    Parameters
    ----------
    cells, groups, strata, name
        As `aggregate`.
    rng
        Of the draw.

    Returns
    -------
    As `aggregate`, with members 1; ``X`` is float32.

    Raises
    ------
    TrainSetError
        As `aggregate`.
    """
    _members(cells, groups, strata)
    order = rng.permutation(cells.n_obs)
    rows = order[np.unique(groups[order], return_index=True)[1]]
    counts = sparse.csr_matrix(cells.X[rows], dtype=np.float32)
    obs = _obs(cells, rows, strata, name).assign(
        n_counts=np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel(),
        members=1,
        member_names=cells.obs_names.to_numpy(object)[rows],
    )
    return ad.AnnData(counts, obs=obs, var=cells.var.copy())


def thin(points: ad.AnnData, depths: np.ndarray, *, rng: np.random.Generator) -> ad.AnnData:
    """Thin summed counts, so that a point has about the total count of a single cell.

    Each of the molecules of a point is kept with probability depth / total, or 1 where the point has no more than
    `depth`: a count c becomes Binomial(c, min(1, depth / total)). The new total is `depth` on average, not exactly.

    Parameters
    ----------
    points
        From `aggregate`, as sums.
    depths
        Total count aimed at for each point, such as ``n_counts`` of `one_per_group` for the same groups; (points,).
    rng
        Of the draw.

    Returns
    -------
    A copy of `points` with thinned ``X`` (float32) and the new ``obs["n_counts"]``.

    Raises
    ------
    TrainSetError
        Lengths do not fit, a depth is negative or missing, or ``X`` holds no whole numbers, as means do.
    """
    depths = np.asarray(depths, dtype=float)
    if depths.shape != (points.n_obs,) or not (depths >= 0).all():
        msg = f"There are {points.n_obs} points and {depths.size} depths; give each point one, of 0 or more."
        raise TrainSetError(msg)
    counts = sparse.csr_matrix(points.X, dtype=np.float64, copy=True)  # eliminate_zeros works in place
    if (counts.data != np.floor(counts.data)).any():
        msg = (
            "Only whole counts can be thinned, and these points are means; thin their sums, which have the same tokens "
            "as their means."
        )
        raise TrainSetError(msg)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    kept = np.minimum(1, depths / np.maximum(totals, 1))
    counts.data = rng.binomial(counts.data.astype(np.int64), np.repeat(kept, np.diff(counts.indptr))).astype(float)
    counts.eliminate_zeros()
    thinned = points.copy()
    thinned.X = counts.astype(np.float32)
    thinned.obs["n_counts"] = np.asarray(counts.sum(axis=1)).ravel()
    return thinned


def member_names(points: ad.AnnData) -> list[list[str]]:
    """Return the names of the cells that each point is made of; none for a point whose ``member_names`` is empty."""
    return [names.split(SEPARATOR) if names else [] for names in points.obs["member_names"]]


def group_example(
    points: Mapping[str, ad.AnnData], cells: ad.AnnData, vocabulary: Vocabulary, *, n: int = 8
) -> pd.DataFrame:
    """Show how the first point came to be, gene by gene.

    Parameters
    ----------
    points
        How they were aggregated to points of the same groups, as `aggregate` makes them; sums first.
    cells
        The cells that they were made of.
    vocabulary
        Medians of the genes.
    n
        Number of genes: the first tokens of the point.

    Returns
    -------
    Rows: gene symbols. Columns: the count in each member, the value in each aggregation, and each value / median, by
    which the genes are sorted.
    """
    sums = next(iter(points.values()))
    ranked = tokenizer.ranked_genes(sums, vocabulary, cell=sums.obs_names[0], n=n)
    ids = vocabulary.genes.set_index("token_id")["ensembl_id"].loc[ranked["token_id"]]
    codes = pd.Index(ids).get_indexer(vocabulary.resolve(gene_ids(cells)))
    members = member_names(sums)[0]
    values = {
        **dict(zip(members, counts_by_gene(cells[members], codes, len(ranked)).toarray().astype(int), strict=True)),
        **{how: counts_by_gene(made[[0]], codes, len(ranked)).toarray()[0] for how, made in points.items()},
    }
    table = pd.DataFrame(values, index=pd.Index(ranked["gene"], name="gene"))
    ratios = {f"{how} / median": table[how] / ranked["median"].to_numpy() for how in points}
    return table.assign(**ratios)


def same_tokens(
    cells: ad.AnnData, strata: pd.Series, vocabulary: Vocabulary, *, max_length: int, spread: float, seed: int
) -> pd.DataFrame:
    """Count, for each of `SIZES`, the points whose tokens are the same in all three aggregations of the same groups.

    Parameters
    ----------
    cells, strata
        As `aggregate`.
    vocabulary, max_length
        As `tuneformer.tokens.tokenizer.tokenize`.
    spread
        As `group_cells`.
    seed
        Seed of the groups.

    Returns
    -------
    Rows: k. Columns: ``points``, and for ``mean`` and ``approx_mean`` the number of points whose tokens are those of
    the sum; then the same for means that were rounded to float32.
    """
    rows = {}
    for k in SIZES:
        groups = group_cells(strata, k=k, spread=spread, rng=np.random.default_rng([seed, k]))
        made = {how: aggregate(cells, groups, how=how, k=k, strata=strata, name=how) for how in AGGREGATIONS}
        for how in ("mean", "approx_mean"):
            made[f"{how} in float32"] = ad.AnnData(made[how].X.astype(np.float32), var=cells.var)
        tokens = {
            how: tokenizer.rank_value_encode(points, vocabulary, max_length=max_length) for how, points in made.items()
        }
        summed = tokens.pop("sum")
        same = {how: sum(map(np.array_equal, lists, summed)) for how, lists in tokens.items()}
        rows[k] = {"points": len(summed), **same}
    return pd.DataFrame(rows).T.rename_axis(index="k")


def measure_points(
    cells: ad.AnnData, strata: pd.Series, vocabulary: Vocabulary, *, max_length: int, spread: float, seed: int
) -> pd.DataFrame:
    """Measure single cells, and for each of `SIZES` the points as they are and thinned to single-cell depth.

    Parameters
    ----------
    cells, strata, vocabulary, max_length, spread, seed
        As `same_tokens`; the groups are the same.

    Returns
    -------
    One row a point: ``kind`` (single cells, pseudo-bulk, thinned), ``k`` (1 for single cells), ``members`` (cells in
    the point), ``counts``, ``genes`` (with a count), ``tokens`` (before the cut), ``tokens read`` (at most
    `max_length`).
    """
    sets = {("single cells", 1): cells}
    for k in SIZES:
        rng = np.random.default_rng([seed, k])
        groups = group_cells(strata, k=k, spread=spread, rng=rng)
        points = aggregate(cells, groups, how="sum", k=k, strata=strata, name="sum")
        depths = one_per_group(cells, groups, rng=rng, strata=strata, name="cell").obs["n_counts"].to_numpy()
        sets |= {("pseudo-bulk", k): points, ("thinned", k): thin(points, depths, rng=rng)}
    tables = []
    for (kind, k), points in sets.items():
        tokens = tokenizer.uncut_lengths(points, vocabulary).to_numpy()
        members = points.obs["members"].to_numpy() if "members" in points.obs else np.ones(points.n_obs, dtype=int)
        table = pd.DataFrame({"kind": kind, "k": k, "members": members})
        table["counts"] = np.asarray(points.X.sum(axis=1, dtype=np.float64)).ravel()
        table["genes"] = np.asarray((points.X != 0).sum(axis=1)).ravel()
        table["tokens"], table["tokens read"] = tokens, tokens.clip(max=max_length)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def group_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Summarise `measure_points`.

    Returns
    -------
    Rows: kind and k. Columns: ``points``; least, median and largest number of ``members``; the medians of ``counts``,
    ``genes``, ``tokens`` and ``tokens read``; and ``above cap``, the share of points with more tokens read than the
    median single cell, which are those that capping their tokens to it would change.
    """
    cap = measured.loc[measured["kind"] == "single cells", "tokens read"].median()
    rows = measured.assign(**{"above cap": measured["tokens read"] > cap}).groupby(["kind", "k"], sort=False)
    members = rows["members"].agg(
        **{"points": "size", "fewest members": "min", "members": "median", "most members": "max"}
    )
    medians = rows[["counts", "genes", "tokens", "tokens read"]].median()
    return pd.concat([members, medians, rows["above cap"].mean()], axis=1)


def _members(cells: ad.AnnData, groups: np.ndarray, strata: pd.Series) -> np.ndarray:
    """Check that cells, groups and strata fit each other; return the number of cells in each group, (groups,)."""
    if not cells.n_obs == len(groups) == len(strata):
        msg = (
            f"There are {cells.n_obs} cells, {len(groups)} group numbers and {len(strata)} strata; make groups and "
            "strata of the very cells that are aggregated."
        )
        raise TrainSetError(msg)
    members = np.bincount(groups)
    if not members.all():
        msg = f"Group {np.argmin(members)} has no cells; number groups 0, 1, 2, ... as group_cells does."
        raise TrainSetError(msg)
    mixed = pd.Series(strata.to_numpy()).groupby(groups).nunique() > 1
    if mixed.any():
        msg = f"Group {mixed.idxmax()} has cells of more than one stratum; make the groups with group_cells."
        raise TrainSetError(msg)
    return members


def _obs(cells: ad.AnnData, rows: np.ndarray, strata: pd.Series, name: str) -> pd.DataFrame:
    """Make the obs of points from one member of each: what has one value in each stratum, and the stratum."""
    obs = shared_columns(cells, strata).iloc[rows].assign(stratum=strata.iloc[rows].to_numpy())
    obs.index = [f"{name}_{number:04d}" for number in range(1, len(rows) + 1)]
    return obs
