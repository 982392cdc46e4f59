r"""Synthetic single cells: drawn around a bulk point, with the variation that single cells have.

In: single cells with raw counts and the stratum (class within dose) of each; for each stratum, how many cells are
wanted. Out: that many cells with whole counts, from one of four generators, and the bulk points they are drawn around.

A bulk sample says how strongly each gene is expressed on average, not how much single cells differ. The latter is taken
from single cells (the source): those of the stratum itself or, with a reference, untreated cells only.

Generators
----------
Genes g; source cells c, n of them, with counts Y and library sizes (total counts) L; bulk point m, the mean counts of
the cells of the stratum; r factors; z and e, independent standard normal numbers of one synthetic cell.

``gaussian`` is the bulk thesis: each gene from a normal distribution with mean :math:`m_g` and the variance :math:`v_g`
of the source; a value below 0 or above the gene's maximum in the source is drawn again.

``gaussian_full`` is the thesis's future work: the covariance is that of the source too, as far as r factors hold it.

.. math:: x = m + F z + \sqrt{v - \mathrm{diag}(F F^T)}\; e

F (genes, r): first principal components of the source times their standard deviations. z is drawn once per cell, e of
each gene again until the value is within the bounds.

``nb`` draws gamma-Poisson counts around the shares of the genes in the bulk point, with a library size drawn from
those of the source.

.. math::

   x_g \mid L &\sim \mathrm{NB}(\text{mean } \mu_g = L\, m_g / \textstyle\sum_{g'} m_{g'},
   \ \text{variance } \mu_g + \phi_g \mu_g^2) \\
   \phi_g &= \frac{\frac{n}{n-1} \sum_c (Y_{cg} - L_c p_g)^2 - \sum_c L_c p_g}{p_g^2 \sum_c L_c^2}, \quad
   p_g = \frac{\sum_c Y_{cg}}{\sum_c L_c}

So the dispersion matches the moments of the source around what each library size lets one expect; with equal library
sizes it is (variance - mean) / mean squared. Below 0 it is set to 0, which is Poisson.

``nb_copula`` has these same counts for a given library size, but its genes vary together: the counts are the quantiles
at the probabilities of latent normal numbers of variance 1.

.. math:: u = \Lambda z + \sqrt{1 - \mathrm{diag}(\Lambda \Lambda^T)}\; e

:math:`\Lambda` (genes, r): first principal components of the normal scores of the source times their standard
deviations. The score of a count is found by putting it into its own negative binomial distribution, at random within
the step that belongs to it (the distributional transform). Scores of rare counts are less correlated than the counts'
own causes, so their correlations come out too weak. n cells have at most n - 1 factors, which fit chance too.

Decisions
---------
Counts are whole: the Gaussian generators round, or almost every draw of a truncated normal would be above 0. Their mean
is not the bulk mean (cutting below 0 raises it, rounding takes rare genes to 0); that belongs to the method and stays.
"Drawn again until within the bounds" is drawn at once, from the normal distribution truncated there, which is the same.
A bulk mean above the maximum of the source raises the maximum to the next whole number. A gene without variance in the
source has its bulk mean, rounded; one without counts in the source is Poisson in the nb generators. A cell without any
count has no tokens and is drawn again.

With a reference only the bulk point comes from the stratum. Gaussian: variances, covariances and maxima are those of
the untreated cells as they are, as the thesis combines them, so the bulk point must be a mean per cell. nb:
dispersions, library sizes and correlations are those of the untreated cells, and only the shares of the genes are read
from the bulk point, which is all that a bulk sample tells.

Sources
-------
A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.3 and discussion. Copula of counts by the distributional
transform: Sun et al. 2021, scDesign2 (doi:10.1186/s13059-021-02367-2), with factors in place of a full correlation
matrix.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, special, stats

from tuneformer.artifacts import UserError
from tuneformer.cells.pseudobulk import bulk_points
from tuneformer.data.counts import collected

ENTRIES = 1_000_000  # cells x genes worked on at a time, 8 MB an array
SOURCE_CELLS = 20_000  # most cells of a stratum from which it is estimated how single cells vary
FACTOR_CELLS = 2000  # most cells from which the latent correlations of nb_copula are estimated
POISSON = 1e-8  # smallest dispersion; below it, negative binomial and Poisson cannot be told apart
SMALLEST_SD = 1e-6  # of a Gaussian gene, in counts; far below the rounding
FARTHEST = 37.0  # standard deviations; beyond, the normal distribution function is 0 in float64
LOWEST_LOG = -600.0  # of a probability that float64 still holds with room to multiply
TRIES = 100  # draws in a row that may give nothing but empty cells

Draw = Callable[[np.ndarray, int, np.random.Generator], sparse.csr_matrix]
"""Draws so many cells around a bulk point (genes,): (cells, genes)."""


def generate(
    cells: ad.AnnData,
    *,
    strata: pd.Series,
    numbers: pd.Series,
    generator: str,
    reference: np.ndarray | None,
    rank: int,
    rng: np.random.Generator,
    name: str,
    points: ad.AnnData | None = None,
    folder: Path | None = None,
) -> ad.AnnData:
    """Make synthetic cells of each stratum.

    Parameters
    ----------
    cells
        Single cells from which everything is estimated (never test cells).
    strata
        Stratum of each cell, (cells,); not read with both `points` and `reference`.
    numbers
        Stratum to number of synthetic cells.
    reference
        Which cells are untreated, (cells,): only they say how single cells vary. None: the cells of each stratum do.
    rank
        Most factors of ``gaussian_full`` and ``nb_copula``.
    points
        Bulk points to draw around, from `pseudobulk.sample_points`; None takes those of `cells`.
    folder
        Where ``X`` is kept (`counts.Counts`); None keeps it in memory.

    Returns
    -------
    AnnData (cells, genes), stratum after stratum in the order of `numbers`: whole counts in ``X`` (CSR, float32);
    ``var`` of `cells`; ``obs`` as `bulk_points`, with n_counts (sum of ``X``), members (1) and member_names (empty: a
    synthetic cell is made of the moments of all cells, and of no cell in particular).

    Raises
    ------
    UserError
        No cell is asked for, a stratum has no counts, fewer than two cells say how cells vary, or cells
        without any count are drawn again and again.
    """
    if points is None:
        points = bulk_points(cells, strata)
    wanted = numbers[numbers > 0]
    if not len(wanted):
        msg = "No synthetic cell is asked for; ask for 1 or more in some stratum."
        raise UserError(msg)

    def drawn() -> Iterator[sparse.csr_matrix]:
        if reference is not None:
            draw = _fit(cells[reference], "the untreated class", generator, rank, rng)
        for stratum, number in wanted.items():
            mean = points[stratum].X.toarray().ravel()
            if not mean.any():
                msg = f"The cells of stratum {stratum!r} have no counts, so no cells can be made from them; drop them."
                raise UserError(msg)
            if reference is None:
                draw = _fit(cells[(strata == stratum).to_numpy()], f"stratum {stratum!r}", generator, rank, rng)
            for values in _draw_all(draw, mean, int(number), rng, stratum):
                yield values.astype(np.float32)

    made, totals = collected(drawn(), folder)
    obs = points.obs.loc[np.repeat(wanted.index.astype(str), wanted)].copy()
    obs.index = [f"{name}_{number:05d}" for number in range(1, len(obs) + 1)]
    obs["n_counts"] = totals
    return ad.AnnData(made, obs=obs.assign(members=1, member_names=""), var=cells.var)


def gaussian(counts: sparse.csr_matrix, rank: int, rng: np.random.Generator) -> Draw:
    """Fit variances, maxima and at most `rank` factors to `counts`, (cells, genes); return what draws from them."""
    n_cells, n_genes = counts.shape
    mean, square = (np.asarray(values.mean(axis=0)).ravel() for values in (counts, counts.multiply(counts)))
    variance = (square - mean**2) * n_cells / (n_cells - 1)
    variance[variance < 1e-12 * square] = 0  # what rounding leaves of the difference of equal numbers
    varying = np.flatnonzero(variance)
    loadings = np.zeros((n_genes, rank))  # F
    loadings[varying] = _principal_loadings(counts[:, varying], rank, rng)
    largest = counts.max(axis=0).toarray().ravel()

    def draw(mean: np.ndarray, number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        maximum = np.maximum(largest, np.ceil(mean))
        genes = np.flatnonzero(maximum)
        center, own = mean[genes], loadings[genes]
        sd = np.sqrt(np.maximum(variance[genes] - (own**2).sum(axis=1), SMALLEST_SD**2))
        if own.any():
            center = center + rng.standard_normal((number, rank)) @ own.T  # (cells, genes)
        values = np.rint(_truncated_normal(center, sd, maximum[genes], (number, len(genes)), rng))
        rows, columns = np.nonzero(values)
        return _sparse(values[rows, columns], rows, genes[columns], (number, n_genes))

    return draw


def negative_binomial(counts: sparse.csr_matrix, rank: int, rng: np.random.Generator) -> Draw:
    """Fit dispersions, library sizes and at most `rank` latent factors to `counts`; return what draws from them."""
    n_cells, n_genes = counts.shape
    library, total, share = _sums(counts)
    dispersion = dispersions(counts)
    loadings = np.zeros((n_genes, rank))  # Lambda
    if rank:
        rows, genes = rng.permutation(n_cells)[:FACTOR_CELLS], np.flatnonzero(total)
        scores = _normal_scores(counts[rows][:, genes], library[rows], share[genes], dispersion[genes], rng)
        loadings[genes] = _principal_loadings(scores, rank, rng)

    def draw(mean: np.ndarray, number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        genes = np.flatnonzero(mean)
        shape = (number, len(genes))
        expected = rng.choice(library, number)[:, None] * (mean[genes] / mean.sum())  # (cells, genes)
        if loadings.any():
            own = np.sqrt(np.maximum(1 - (loadings[genes] ** 2).sum(axis=1), 0))
            latent = rng.standard_normal((number, rank)) @ loadings[genes].T + own * rng.standard_normal(shape)
            above = special.ndtr(-latent)
        else:
            above = rng.random(shape)  # the probability of a larger value
        rows, columns = np.nonzero(above < expected)  # a count is above 0 with at most this probability
        values = _quantile(1 - above[rows, columns], expected[rows, columns], dispersion[genes[columns]])
        return _sparse(values, rows, genes[columns], (number, n_genes))

    return draw


GENERATORS: dict[str, tuple[Callable[[sparse.csr_matrix, int, np.random.Generator], Draw], bool]] = {
    "gaussian": (gaussian, False),
    "gaussian_full": (gaussian, True),
    "nb": (negative_binomial, False),
    "nb_copula": (negative_binomial, True),
}
"""What is fitted to the source, and whether genes vary together."""


def dispersions(counts: sparse.csr_matrix) -> np.ndarray:
    """Match the negative binomial dispersion of each gene to the moments of `counts`, (cells, genes); (genes,)."""
    n_cells, n_genes = counts.shape
    library, total, share = _sums(counts)
    square = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    expected = share**2 * (library**2).sum()  # squared expectations, summed over the cells; (genes,)
    residual = square - 2 * share * (counts.T @ library) + expected
    excess = residual * n_cells / (n_cells - 1) - total
    return np.maximum(np.divide(excess, expected, out=np.zeros(n_genes), where=total > 0), POISSON)


def _sums(counts: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return library sizes (cells,), total counts (genes,), and shares of the genes in all counts (genes,)."""
    library, total = (np.asarray(counts.sum(axis=axis)).ravel() for axis in (1, 0))
    return library, total, total / library.sum()


def _fit(source: ad.AnnData, where: str, generator: str, rank: int, rng: np.random.Generator) -> Draw:
    """Estimate from the cells of `where`, at most `SOURCE_CELLS` of them, how single cells vary."""
    if source.n_obs < 2:
        msg = f"{generator} takes variances from 2 cells or more, and {where} has {source.n_obs}; give it more cells "
        msg += "(train_cells), or take the variances of another class (variances: untreated, untreated_class)."
        raise UserError(msg)
    if source.n_obs > SOURCE_CELLS:
        source = source[np.sort(rng.choice(source.n_obs, SOURCE_CELLS, replace=False))]
    fit, has_factors = GENERATORS[generator]
    return fit(sparse.csr_matrix(source.X, dtype=np.float64), rank if has_factors else 0, rng)


def _draw_all(draw: Draw, mean: np.ndarray, number: int, rng: np.random.Generator, stratum: str) -> Iterator:
    """Draw cells in pieces of bounded memory; draw those without any count again."""
    most = max(1, ENTRIES // len(mean))
    missing, left = number, TRIES
    while missing:
        part = draw(mean, min(missing, most), rng)
        part = part[np.diff(part.indptr) > 0]
        yield part
        missing -= part.shape[0]
        left = TRIES if part.shape[0] else left - 1
        if not left:
            msg = f"Stratum {stratum!r} has {mean.sum():.3g} counts a cell on average, and {TRIES} draws in a row gave "
            msg += "cells without any, which have no tokens; leave the stratum out, or raise min_counts."
            raise UserError(msg)


def _principal_loadings(values: np.ndarray | sparse.csr_matrix, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Return the first principal components of `values`, (cells, genes), times their standard deviations, or 0.

    Those of an array, whose columns have mean 0, are found by random projection, as exactly as scores need.
    """
    from sklearn.decomposition import PCA
    from sklearn.utils.extmath import randomized_svd

    loadings = np.zeros((values.shape[1], rank))
    found = min(rank, min(values.shape) - 1)
    if found > 0:
        state = int(rng.integers(2**31))
        if isinstance(values, np.ndarray):
            _, sd, axes = randomized_svd(values, found, n_iter=4, random_state=state)
            loadings[:, :found] = axes.T * sd / np.sqrt(len(values) - 1)
        else:
            pca = PCA(found, svd_solver="arpack", random_state=state).fit(values)
            loadings[:, :found] = pca.components_.T * np.sqrt(pca.explained_variance_)
    return loadings


def _truncated_normal(
    center: np.ndarray, sd: np.ndarray, maximum: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draw from normal distributions truncated to 0 ... `maximum`, by the inverse of the distribution function.

    Where `center` is below 0 the distribution is mirrored, so that probabilities are small numbers, which float64 tells
    apart, and not numbers near 1. A center too far outside gives the bound next to it.
    """
    low = np.minimum(-center / sd, FARTHEST)
    high = np.maximum((maximum - center) / sd, -FARTHEST)
    mirrored = low > 0
    least = special.ndtr(np.where(mirrored, -high, low))
    most = special.ndtr(np.where(mirrored, -low, high))
    deviation = special.ndtri(least + (most - least) * rng.random(shape))
    return np.clip(center + np.where(mirrored, -deviation, deviation) * sd, 0, maximum)


def _log_zero(mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability of no count."""
    return -np.log1p(dispersion * mean) / dispersion


def _quantile(probability: np.ndarray, mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return the negative binomial quantiles, all arguments (entries,).

    The distribution function is summed up from 0 until it reaches the probability, in all entries at once, so that the
    work is proportional to the sum of the counts. Where the probability of no count is too small for float64 (means in
    the hundreds without dispersion), scipy finds the quantile.
    """
    counts = np.zeros(len(mean))
    log_zero = _log_zero(mean, dispersion)
    large = log_zero < LOWEST_LOG
    if large.any():
        size = 1 / dispersion[large]
        counts[large] = stats.nbinom.ppf(probability[large], size, 1 / (1 + mean[large] * dispersion[large]))
    left = np.flatnonzero(~large)
    mass = np.exp(log_zero[left])  # of the count that has been reached
    below = mass.copy()
    reached = 0
    while True:
        going = (probability[left] > below) & ((mass > 1e-17) | (reached < mean[left]))  # or else below is 1, rounded
        left, mass, below = left[going], mass[going], below[going]
        if not len(left):
            return counts
        spread = dispersion[left]
        mass *= (1 + spread * reached) * mean[left] / ((reached + 1) * (1 + spread * mean[left]))
        below += mass
        reached += 1
        counts[left] = reached


def _normal_scores(
    counts: sparse.csr_matrix, library: np.ndarray, share: np.ndarray, dispersion: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Put each count into its negative binomial distribution, and that on the normal scale; (cells, genes), variance 1.

    A count y is put at random between the probabilities of less than y and of at most y.
    """
    scores = np.empty(counts.shape, dtype=np.float32)
    step = max(1, ENTRIES // counts.shape[1])
    for start in range(0, len(library), step):
        part = counts[start : start + step].toarray()
        mean = library[start : start + step, None] * share
        above = np.exp(_log_zero(mean, dispersion))
        below = np.zeros_like(above)
        at = np.nonzero(part)
        count, expected, spread = part[at], mean[at], dispersion[at[1]]
        below[at], above[at] = above[at], above[at] * (1 + expected / (1 + spread * expected))  # of a count of 1
        is_more = count > 1
        at = at[0][is_more], at[1][is_more]
        size, success = 1 / spread[is_more], 1 / (1 + spread[is_more] * expected[is_more])
        below[at] = special.betainc(size, count[is_more], success)
        above[at] = special.betainc(size, count[is_more] + 1, success)
        place = below + (above - below) * rng.random(part.shape)
        scores[start : start + step] = special.ndtri(np.clip(place, 1e-15, 1 - 1e-15))
    scores -= scores.mean(axis=0)
    scores /= np.sqrt(np.einsum("cg,cg->g", scores, scores) / (len(scores) - 1))
    return scores


def _sparse(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return a CSR matrix of counts without stored zeros; `rows` rise, and in a row `columns` do."""
    kept = values > 0
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=shape[0]))])
    return sparse.csr_matrix((values[kept].astype(np.float32), columns[kept], indptr), shape=shape)
