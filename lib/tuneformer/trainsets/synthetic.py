r"""Synthetic single cells: drawn around a bulk point, with the variation that single cells have.

In: single cells with raw counts and the stratum (class within dose) of each; for each stratum a number of cells wanted.
Out: that many made cells, whole counts, from one of four generators; and the bulk points they are made from.

A bulk sample says how strongly each gene is expressed on average. It does not say how much single cells differ; that is
taken from single cells (the source): those of the stratum itself, or, with a reference, untreated cells only.

Generators
----------
Genes g; source cells c, n of them, with counts Y and library sizes (total counts) L; bulk point m, the mean counts of
the cells of the stratum; r factors; z and e, independent standard normal numbers of one synthetic cell.

``gaussian`` is the bulk thesis. Each gene is drawn from a normal distribution with mean :math:`m_g` and the variance
:math:`v_g` of the source; a value below 0 or above the gene's maximum in the source is drawn again.

``gaussian_full`` is the thesis's future work: the covariance is that of the source too, as far as r factors hold it.

.. math:: x = m + F z + \sqrt{v - \mathrm{diag}(F F^T)}\; e

F (genes, r): first principal components of the source times their standard deviations. z is drawn once for a cell,
and e of each gene again until the value is within the bounds.

``nb`` draws gamma-Poisson counts around the shares of the genes in the bulk point, with a library size drawn from
those of the source.

.. math::

   x_g \mid L &\sim \mathrm{NB}(\text{mean } \mu_g = L\, m_g / \textstyle\sum_{g'} m_{g'},
   \ \text{variance } \mu_g + \phi_g \mu_g^2) \\
   \phi_g &= \frac{\frac{n}{n-1} \sum_c (Y_{cg} - L_c p_g)^2 - \sum_c L_c p_g}{p_g^2 \sum_c L_c^2}, \quad
   p_g = \frac{\sum_c Y_{cg}}{\sum_c L_c}

So the dispersion is matched to the moments of the source around what each library size lets expect; with equal library
sizes it is (variance - mean) / mean squared. Below 0 it is set to 0, which is Poisson.

``nb_copula`` has these same counts for a given library size, but its genes vary together: the counts are the quantiles
at the probabilities of latent normal numbers of variance 1.

.. math:: u = \Lambda z + \sqrt{1 - \mathrm{diag}(\Lambda \Lambda^T)}\; e

:math:`\Lambda` (genes, r): first principal components of the normal scores of the source times their standard
deviations. The score of a count is found by putting it into its own negative binomial distribution, at random within
the step that belongs to it (the distributional transform). Scores of rare counts are less correlated than what the
counts came from, so their correlations come out too weak.

With few source cells the factors fit chance too: n cells have no more than n - 1 factors.

Decisions
---------
Counts are whole. The Gaussian generators round to the nearest whole number; otherwise almost every draw of a truncated
normal distribution would be above 0, and every gene detected. Their mean is not the bulk mean: cutting off the part
below 0 raises it, and rounding takes genes with a low mean to 0. That belongs to the method and is left as it is.

"Drawn again until it is within the bounds" is drawn at once, from the normal distribution truncated there, which is the
same distribution. A bulk mean above the maximum of the source raises the maximum to the next whole number.

A gene without variance in the source has its bulk mean, rounded; a gene without counts in the source is Poisson in the
nb generators. A cell without any count has no tokens and is drawn again.

With a reference only the bulk point comes from the stratum. Gaussian: variances, covariances and maxima are those of
the untreated cells as they are, not rescaled to the bulk point, as the thesis combines them; the bulk point must be a
mean per cell, so the number of cells in the bulk sample has to be known. nb: dispersions, library sizes and
correlations are those of the untreated cells; of the bulk point only the shares of the genes are used, which is all
that a bulk sample tells, and the variance follows from mean and dispersion.

Quantiles of the negative binomial distribution are summed up from 0, for all entries at once that can be above 0, so
that the work is proportional to the sum of the counts, and exact. (A copula on gamma rates, with Poisson counts on top,
would be simpler; but its Poisson noise weakens the correlations, and the inverse gamma distribution is slow.)

Sources
-------
A. Kuźnicki, bachelor thesis, TU Delft 2024, section 2.3 and discussion. Copula of counts by the distributional
transform: Sun et al. 2021, scDesign2 (doi:10.1186/s13059-021-02367-2), with a full correlation matrix in place of
factors.
"""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, special, stats
from sklearn.decomposition import PCA

from tuneformer.study.train_sets import GENERATORS
from tuneformer.trainsets.strata import TrainSetError, shared_columns

ENTRIES = 1_000_000  # cells x genes worked on at a time, 8 MB an array
FACTOR_CELLS = 2000  # most cells from which the latent correlations of nb_copula are estimated
POISSON = 1e-8  # smallest dispersion; below it, negative binomial and Poisson cannot be told apart
SMALLEST_SD = 1e-6  # of a Gaussian gene, in counts; far below the rounding
FARTHEST = 37.0  # standard deviations; beyond, the normal distribution function is 0 in float64
LOWEST_LOG = -600.0  # of a probability that float64 still holds with room to multiply
TRIES = 100


def bulk_points(cells: ad.AnnData, strata: pd.Series) -> ad.AnnData:
    """Make one bulk point of each stratum: the mean count of each gene over its cells.

    Parameters
    ----------
    cells
        Raw counts in ``X``.
    strata
        Stratum of each cell, (cells,).

    Returns
    -------
    AnnData (strata that have cells, genes): CSR float64 ``X``; ``var`` of `cells`; ``obs``, named by stratum, with
    label, dose and any other column that has one value in each stratum, stratum, n_counts (sum of the means), members
    (number of cells).
    """
    codes = pd.Categorical(strata).remove_unused_categories()
    names, first, members = codes.categories, *np.unique(codes.codes, return_index=True, return_counts=True)[1:]
    indicator = sparse.csr_matrix((1 / members[codes.codes], (codes.codes, np.arange(cells.n_obs))))
    means = sparse.csr_matrix(indicator @ sparse.csr_matrix(cells.X, dtype=np.float64))
    obs = shared_columns(cells, strata).iloc[first].set_axis(names.astype(str))
    obs["stratum"] = pd.Categorical(names, categories=names)
    obs["n_counts"] = np.asarray(means.sum(axis=1)).ravel()
    obs["members"] = members
    return ad.AnnData(means, obs=obs, var=cells.var)


def sample_points(samples: ad.AnnData, strata: pd.Series, *, depth: float) -> ad.AnnData:
    """Make one bulk point of each stratum from real bulk samples: the mean of the shares of its samples, times `depth`.

    How many cells are in a sample is not known, so the point is brought to the depth of a cell; the replicates of a
    stratum count the same, however deeply each was sequenced.

    Parameters
    ----------
    samples
        As `tuneformer.data.bulk.load_bulk` makes them.
    strata
        Stratum of each sample, (samples,).
    depth
        Total count of a point, such as the mean of single cells.

    Returns
    -------
    As `bulk_points`; members is the number of samples.
    """
    totals = np.asarray(samples.X.sum(axis=1)).ravel()
    scaled = sparse.csr_matrix(sparse.diags_array(depth / totals) @ samples.X)
    return bulk_points(ad.AnnData(scaled, obs=samples.obs, var=samples.var), strata)


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
) -> ad.AnnData:
    """Make synthetic cells of each stratum.

    Parameters
    ----------
    cells
        Single cells from which everything is estimated (never test cells): raw counts in ``X``; ``obs["label"]``.
    strata
        Stratum of each cell, (cells,); not read with `points` and `reference`.
    numbers
        Stratum to number of synthetic cells.
    generator
        One of `tuneformer.study.train_sets.GENERATORS`; see the head of the module.
    reference
        Which cells are untreated, (cells,): only they say how single cells vary. None: the cells of each stratum do.
    rank
        Most factors of ``gaussian_full`` and ``nb_copula``.
    rng
        Of all draws.
    name
        Cells are named ``<name>_00001`` and so on.
    points
        Bulk points to draw around, as `sample_points` makes them; None takes those of `cells` (`bulk_points`).

    Returns
    -------
    AnnData (cells, genes), stratum after stratum in the order of `numbers`: whole counts in ``X`` (CSR, float32);
    ``var`` of `cells`; ``obs`` as `bulk_points`, with n_counts (sum of ``X``) and members (1).

    Raises
    ------
    TrainSetError
        The generator is unknown, `rank` is below 1, no cell is asked for, a stratum has no cells or no counts, fewer
        than two cells say how cells vary, or cells without any count are drawn again and again.
    """
    _check(generator, rank, numbers)
    if points is None:
        points = bulk_points(cells, strata)
    wanted = numbers[numbers > 0]
    shared = None
    if reference is not None:
        remedy = "set untreated_class to a class with more cells"
        shared = _fit(cells[reference], generator, rank, rng, where="the untreated class", remedy=remedy)
    parts = []
    for stratum, number in wanted.items():
        if stratum not in points.obs_names:
            msg = f"Stratum {stratum!r} has no cells, so it has no bulk point; strata with cells: {_few(points)}."
            raise TrainSetError(msg)
        mean = points[stratum].X.toarray().ravel()
        if not mean.any():
            msg = f"The cells of stratum {stratum!r} have no counts, so no cells can be made from them; drop them."
            raise TrainSetError(msg)
        model = shared
        if model is None:
            own = cells[(strata == stratum).to_numpy()]
            remedy = (
                f"give it more cells (train_cells), or take those of untreated cells (synthetic_{generator}_untreated)"
            )
            model = _fit(own, generator, rank, rng, where=f"stratum {stratum!r}", remedy=remedy)
        parts.append(_draw(model, mean, int(number), rng, stratum))
    counts = sparse.vstack(parts, format="csr", dtype=np.float32)
    obs = points.obs.loc[np.repeat(wanted.index.astype(str), wanted)].copy()
    obs.index = [f"{name}_{number:05d}" for number in range(1, len(obs) + 1)]
    obs["n_counts"] = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    obs["members"] = 1
    return ad.AnnData(counts, obs=obs, var=cells.var)


def generate_all(
    cells: ad.AnnData, *, strata: pd.Series, untreated: str, rank: int, seed: int
) -> dict[str, ad.AnnData]:
    """Make as many synthetic cells as there are single cells, by every generator.

    Parameters
    ----------
    cells, strata, rank
        As `generate`.
    untreated
        Class of the untreated cells; where it has cells, each generator is used again with these as reference.
    seed
        Of each generator.

    Returns
    -------
    Name (``gaussian``, ..., and ``gaussian_untreated``, ...) to made cells.

    Raises
    ------
    TrainSetError
        As `generate`.
    """
    is_untreated = (cells.obs["label"] == untreated).to_numpy()
    references = {"": None, "_untreated": is_untreated} if is_untreated.any() else {"": None}
    return {
        f"{generator}{ending}": generate(
            cells,
            strata=strata,
            numbers=strata.value_counts(sort=False),
            generator=generator,
            reference=reference,
            rank=rank,
            rng=np.random.default_rng([seed, 2]),
            name=f"{generator}{ending}",
        )
        for ending, reference in references.items()
        for generator in GENERATORS
    }


@dataclass(frozen=True)
class _Gaussian:
    """How the genes of the source vary: ``variance``, ``maximum`` (genes,), ``loadings`` F (genes, rank)."""

    variance: np.ndarray
    maximum: np.ndarray
    loadings: np.ndarray

    @classmethod
    def fit(cls, counts: sparse.csr_matrix, rank: int, rng: np.random.Generator) -> "_Gaussian":
        """Take the moments of `counts`, (cells, genes), with at most `rank` factors."""
        n_cells, n_genes = counts.shape
        mean, square = (np.asarray(values.mean(axis=0)).ravel() for values in (counts, counts.multiply(counts)))
        variance = (square - mean**2) * n_cells / (n_cells - 1)
        variance[variance < 1e-12 * square] = 0  # what rounding leaves of the difference of equal numbers
        varying = np.flatnonzero(variance)
        loadings = np.zeros((n_genes, rank))
        loadings[varying] = _principal_loadings(counts[:, varying], rank, rng)
        return cls(variance, counts.max(axis=0).toarray().ravel(), loadings)

    def draw(self, mean: np.ndarray, number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        """Draw `number` cells around the bulk point `mean`, (genes,)."""
        maximum = np.maximum(self.maximum, np.ceil(mean))
        genes = np.flatnonzero(maximum)
        center, loadings = mean[genes], self.loadings[genes]
        sd = np.sqrt(np.maximum(self.variance[genes] - (loadings**2).sum(axis=1), SMALLEST_SD**2))
        if loadings.any():
            center = center + rng.standard_normal((number, loadings.shape[1])) @ loadings.T  # (cells, genes)
        values = np.rint(_truncated_normal(center, sd, maximum[genes], (number, len(genes)), rng))
        rows, columns = np.nonzero(values)
        return _sparse(values[rows, columns], rows, genes[columns], (number, len(mean)))


@dataclass(frozen=True)
class _NegativeBinomial:
    """How the genes of the source vary: ``dispersion`` (genes,), ``library`` (cells,), ``loadings`` (genes, rank)."""

    dispersion: np.ndarray
    library: np.ndarray
    loadings: np.ndarray

    @classmethod
    def fit(cls, counts: sparse.csr_matrix, rank: int, rng: np.random.Generator) -> "_NegativeBinomial":
        """Match the moments of `counts`, (cells, genes), with at most `rank` factors."""
        n_cells, n_genes = counts.shape
        library, total = (np.asarray(counts.sum(axis=axis)).ravel() for axis in (1, 0))
        share = total / library.sum()
        square = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
        expected = share**2 * (library**2).sum()  # squared expectations, summed over the cells; (genes,)
        residual = square - 2 * share * (counts.T @ library) + expected
        excess = residual * n_cells / (n_cells - 1) - total
        dispersion = np.divide(excess, expected, out=np.zeros(n_genes), where=total > 0)
        dispersion = np.maximum(dispersion, POISSON)
        loadings = np.zeros((n_genes, rank))
        if rank:
            rows, genes = rng.permutation(n_cells)[:FACTOR_CELLS], np.flatnonzero(total)
            scores = _normal_scores(counts[rows][:, genes], library[rows], share[genes], dispersion[genes], rng)
            loadings[genes] = _principal_loadings(scores, rank, rng)
        return cls(dispersion, library, loadings)

    def draw(self, mean: np.ndarray, number: int, rng: np.random.Generator) -> sparse.csr_matrix:
        """Draw `number` cells whose relative expression is that of the bulk point `mean`, (genes,)."""
        genes = np.flatnonzero(mean)
        shape = (number, len(genes))
        expected = rng.choice(self.library, number)[:, None] * (mean[genes] / mean.sum())  # (cells, genes)
        if self.loadings.any():
            loadings = self.loadings[genes]
            own = np.sqrt(np.maximum(1 - (loadings**2).sum(axis=1), 0))
            latent = rng.standard_normal((number, loadings.shape[1])) @ loadings.T + own * rng.standard_normal(shape)
            above = special.ndtr(-latent)
        else:
            above = rng.random(shape)  # the probability of a larger value
        rows, columns = np.nonzero(above < expected)  # a count is above 0 with at most this probability
        values = _quantile(1 - above[rows, columns], expected[rows, columns], self.dispersion[genes[columns]])
        return _sparse(values, rows, genes[columns], (number, len(mean)))


def _check(generator: str, rank: int, numbers: pd.Series) -> None:
    if generator not in GENERATORS:
        msg = f"{generator!r} is no generator of synthetic cells; use {', '.join(GENERATORS)}."
        raise TrainSetError(msg)
    if rank < 1:
        msg = f"covariance_rank is {rank}; correlations between genes need 1 factor or more."
        raise TrainSetError(msg)
    if not (numbers > 0).any():
        msg = "No synthetic cell is asked for; ask for 1 or more in some stratum."
        raise TrainSetError(msg)


def _fit(
    source: ad.AnnData, generator: str, rank: int, rng: np.random.Generator, *, where: str, remedy: str
) -> _Gaussian | _NegativeBinomial:
    """Estimate how single cells vary; `where` and `remedy` are for the error."""
    if source.n_obs < 2:
        msg = f"{generator} takes variances from 2 cells or more, and {where} has {source.n_obs}; {remedy}."
        raise TrainSetError(msg)
    family = _Gaussian if generator.startswith("gaussian") else _NegativeBinomial
    counts = sparse.csr_matrix(source.X, dtype=np.float64)
    return family.fit(counts, rank if generator in ("gaussian_full", "nb_copula") else 0, rng)


def _draw(
    model: _Gaussian | _NegativeBinomial, mean: np.ndarray, number: int, rng: np.random.Generator, stratum: str
) -> sparse.csr_matrix:
    """Draw cells in pieces of bounded memory; draw those without any count again."""
    most = max(1, ENTRIES // len(mean))
    parts, missing, left = [], number, TRIES
    while missing:
        part = model.draw(mean, min(missing, most), rng)
        part = part[np.diff(part.indptr) > 0]
        parts.append(part)
        missing -= part.shape[0]
        left = TRIES if part.shape[0] else left - 1
        if not left:
            msg = (
                f"Stratum {stratum!r} has {mean.sum():.3g} counts a cell on average, and {TRIES} draws in a row gave "
                "cells without any, which have no tokens; leave the stratum out, or raise min_counts."
            )
            raise TrainSetError(msg)
    return sparse.vstack(parts, format="csr")


def _principal_loadings(values: np.ndarray | sparse.csr_matrix, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Return the first principal components of `values`, (cells, genes), times their standard deviation; (genes, rank).

    There are at most cells - 1 and genes - 1; the others are 0.
    """
    loadings = np.zeros((values.shape[1], rank))
    found = min(rank, min(values.shape) - 1)
    if found > 0:
        pca = PCA(found, svd_solver="arpack", random_state=int(rng.integers(2**31))).fit(values)
        loadings[:, :found] = pca.components_.T * np.sqrt(pca.explained_variance_)
    return loadings


def _truncated_normal(
    center: np.ndarray, sd: np.ndarray, maximum: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Draw from normal distributions truncated to 0 ... `maximum`, by the inverse of the distribution function.

    Where `center` is below 0 the distribution is mirrored, so that the probabilities are small numbers, which float64
    tells apart, and not numbers near 1. A center too far outside gives the bound next to it.
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

    The distribution function is summed up from 0 until it reaches the probability, in all entries at once; those that
    have reached it drop out, so that the work is proportional to the sum of the counts. Where the probability of no
    count is too small for float64 (means in the hundreds without dispersion), scipy finds the quantile.
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
        rows, columns = np.nonzero(part)
        size, success = 1 / dispersion[columns], 1 / (1 + dispersion[columns] * mean[rows, columns])
        below[rows, columns] = special.betainc(size, part[rows, columns], success)
        above[rows, columns] = special.betainc(size, part[rows, columns] + 1, success)
        place = below + (above - below) * rng.random(part.shape)
        scores[start : start + step] = special.ndtri(np.clip(place, 1e-15, 1 - 1e-15))
    scores -= scores.mean(axis=0)
    return scores / scores.std(axis=0, ddof=1)


def _sparse(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return a CSR matrix of counts without stored zeros; `rows` rise, and in a row `columns` do."""
    kept = values > 0
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=shape[0]))])
    return sparse.csr_matrix((values[kept].astype(np.float32), columns[kept], indptr), shape=shape)


def _few(points: ad.AnnData) -> str:
    names = list(points.obs_names)
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
