"""How much synthetic cells are like real ones.

In: held-out real cells, and synthetic cells that were made without them. Out: distances between the two. Both should
have the classes and doses in the same proportions; a different composition counts as a distance.
"""

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score

from tuneformer.artifacts import UserError

MAX_CELLS = 2000  # of each set, so that time and memory are bounded
COMPONENTS = 20  # of the embeddings
DETECTED = 0.1  # share of the real cells in which a gene is detected, for its variance to be compared
CORRELATED = 100  # genes whose correlations are compared
FOLDS = 5


def compare(real: ad.AnnData, synthetic: ad.AnnData, *, seed: int) -> pd.Series:
    """Measure how far synthetic cells are from real ones.

    As many cells of each are compared: all of the smaller set, at most `MAX_CELLS`, drawn at random by the seed (which
    also seeds the classifier). "Normalised" means log(1 + count / total count of the cell x median total count of the
    real cells). Other real cells in place of the synthetic ones show what perfect looks like with so few cells.

    Parameters
    ----------
    real, synthetic
        Raw counts in ``X`` of the same genes; nothing was estimated from `real` (validation cells, never test cells).

    Returns
    -------
    ``zero fraction``
        Share of zeros among the counts, synthetic minus real (0 is perfect).
    ``mean``, ``variance``
        Median over the genes of the absolute log2 ratio of the mean and variance of their counts (0 is perfect, 1 is a
        factor of two), over genes detected in at least `DETECTED` of the real cells.
    ``library size``, ``detected genes``
        Wasserstein distance between the log2 total counts of the cells, and between the log2 numbers of their genes
        with a count (0 is perfect, 1 is a factor of two).
    ``gene correlation``
        Pearson correlation between the correlations of pairs of genes in real and in synthetic cells: normalised
        counts of the `CORRELATED` genes that vary most in the real cells (1 is perfect). A gene that does not vary has
        correlation 0 with all others.
    ``energy distance``
        2 E|x - y| - E|x - x'| - E|y - y'| of real cells x and synthetic cells y in the first `COMPONENTS` principal
        components of the normalised real cells (0 is perfect).
    ``classifier AUC``
        Classifier two-sample test: area under the ROC curve of boosted trees that tell real from synthetic cells by
        `COMPONENTS` principal components of both together, library size and detected genes, mean over `FOLDS`
        cross-validation folds (0.5 is perfect, 1 is always told apart).

    Raises
    ------
    UserError
        A set has fewer than two cells per fold, or the genes are not the same.

    Sources: energy distance: Székely and Rizzo 2013 (doi:10.1016/j.jspi.2013.03.018). Two-sample test: Lopez-Paz and
    Oquab 2017 (arXiv:1610.06545), with AUC in place of accuracy.
    """
    if not real.var_names.equals(synthetic.var_names):
        msg = "Real and synthetic cells have different genes; make the synthetic ones from cells of the same data set."
        raise UserError(msg)
    number = min(real.n_obs, synthetic.n_obs, MAX_CELLS)
    if number < 2 * FOLDS:
        msg = f"{real.n_obs} real and {synthetic.n_obs} synthetic cells are too few to compare; {2 * FOLDS} are needed."
        raise UserError(msg)
    rng = np.random.default_rng([seed, 2])
    counts = [drawn_counts(cells, number, rng) for cells in (real, synthetic)]
    normal = normalised(*counts)
    library = [np.log2(values.sum(axis=1)) for values in counts]
    detected = [np.log2(np.diff(values.indptr)) for values in counts]
    measures = np.hstack([np.stack([library, detected], axis=2).reshape(-1, 2), _components(sparse.vstack(normal))[0]])
    return pd.Series(
        {
            "zero fraction": (counts[0].nnz - counts[1].nnz) / np.prod(counts[0].shape),
            **_moment_ratios(*counts),
            "library size": stats.wasserstein_distance(*library),
            "detected genes": stats.wasserstein_distance(*detected),
            "gene correlation": _gene_correlation(*normal),
            "energy distance": energy_distance(*embeddings(*normal)),
            "classifier AUC": _classifier_auc(measures, np.repeat([0, 1], number), seed),
        }
    )


def drawn_counts(cells: ad.AnnData, number: int, rng: np.random.Generator) -> sparse.csr_array:
    """Draw `number` cells without replacement and return their counts, (cells, genes), without stored zeros."""
    rows = rng.permutation(cells.n_obs)[:number]
    counts = sparse.csr_array(cells[rows].X, dtype=np.float64)
    counts.eliminate_zeros()
    return counts


def normalised(real: sparse.csr_array, synthetic: sparse.csr_array) -> list[sparse.csr_array]:
    """Return log(1 + count / total count of the cell x median total count of the real cells) of both sets."""
    target = np.median(real.sum(axis=1))
    return [(sparse.diags_array(target / counts.sum(axis=1)) @ counts).log1p() for counts in (real, synthetic)]


def gene_moments(counts: sparse.csr_array) -> pd.DataFrame:
    """Return ``mean``, ``variance`` and share of ``zeros`` of the counts of each gene."""
    number = counts.shape[0]
    mean, square = (values.mean(axis=0) for values in (counts, counts.multiply(counts)))
    variance = (square - mean**2) * number / (number - 1)
    return pd.DataFrame({"mean": mean, "variance": variance, "zeros": 1 - counts.count_nonzero(axis=0) / number})


def embeddings(real: sparse.csr_array, synthetic: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets of normalised cells in the first principal components of the real ones; (cells, components)."""
    coordinates, pca = _components(real)
    return coordinates, pca.transform(synthetic)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| of two samples, (cells, dimensions); 0 for equal samples."""
    return float(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean())


def _components(cells: sparse.csr_array) -> tuple[np.ndarray, PCA]:
    pca = PCA(min(COMPONENTS, min(cells.shape) - 1), svd_solver="arpack", random_state=0)
    return pca.fit_transform(cells), pca


def _moment_ratios(real: sparse.csr_array, synthetic: sparse.csr_array) -> dict[str, float]:
    """Return the median absolute log2 ratios of the genes' means and variances."""
    moments = [gene_moments(counts) for counts in (real, synthetic)]
    shown = (1 - moments[0]["zeros"] >= DETECTED) & (moments[0]["variance"] > 0)
    with np.errstate(divide="ignore"):  # a gene without synthetic counts is infinitely far away
        logs = [np.log2(table.loc[shown, ["mean", "variance"]].clip(lower=0)) for table in moments]
    return (logs[1] - logs[0]).abs().median().to_dict()


def _gene_correlation(real: sparse.csr_array, synthetic: sparse.csr_array) -> float:
    """Return the correlation between the gene-gene correlations of normalised real and synthetic cells."""
    most_variable = np.argsort(-gene_moments(real)["variance"].to_numpy(), kind="stable")[:CORRELATED]
    pairs = []
    for cells in (real, synthetic):
        values = cells[:, most_variable].toarray()
        values -= values.mean(axis=0)
        length = np.sqrt((values**2).sum(axis=0))
        values /= np.where(length > 0, length, 1)
        pairs.append((values.T @ values)[np.triu_indices(len(most_variable), 1)])
    return float(stats.pearsonr(*pairs).statistic)


def _classifier_auc(measures: np.ndarray, synthetic: np.ndarray, seed: int) -> float:
    """Return how well boosted trees tell which cells are synthetic, by `measures` (cells, features)."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    trees = HistGradientBoostingClassifier(random_state=seed)
    return float(cross_val_score(trees, measures, synthetic, cv=folds, scoring="roc_auc").mean())
