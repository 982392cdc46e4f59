"""Realism is measured by what the names say: exact on cells whose distance is known, and like brute force."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from tuneformer.artifacts import UserError
from tuneformer.cells import realism

DISTANCES = ["zero fraction", "mean", "variance", "library size", "detected genes", "energy distance"]


def as_cells(counts):
    counts = sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(counts.shape[0])])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{number}" for number in range(counts.shape[1])]))


def draw(n_cells, seed):
    """Draw cells of one distribution: 120 genes from rare to common, 40 of them in two programs."""
    rng = np.random.default_rng(seed)
    activity = np.hstack([np.repeat(rng.normal(0, 0.7, (n_cells, 2)), 20, axis=1), np.zeros((n_cells, 80))])
    rate = np.geomspace(0.05, 20, 120)[np.random.default_rng(0).permutation(120)]
    return rng.poisson(rng.lognormal(0, 0.3, (n_cells, 1)) * rate * np.exp(activity)) + 1e-9


@pytest.fixture(scope="module")
def real():
    return as_cells(np.floor(draw(300, 1)))


@pytest.fixture(scope="module")
def others():
    return as_cells(np.floor(draw(300, 2)))


@pytest.fixture(scope="module")
def same(real, others):
    """Return the row of other cells of the same distribution."""
    return realism.compare(real, others, seed=0)


@pytest.fixture
def without_classifier(monkeypatch):
    """Save the time of the trees where nothing is said about them."""
    monkeypatch.setattr(realism, "_classifier_auc", lambda *_: 0.5)


@pytest.mark.usefixtures("without_classifier")
def test_equal_cells_have_no_distance(real):
    row = realism.compare(real, real[::-1].copy(), seed=0)
    np.testing.assert_allclose(row[DISTANCES].to_numpy(), 0, atol=1e-9)
    assert row["gene correlation"] == pytest.approx(1)


def test_other_cells_of_the_same_distribution_cannot_be_told_apart(same):
    assert abs(same["classifier AUC"] - 0.5) < 4 * np.sqrt((1 / 300 + 1 / 300) / 12)  # standard error of an AUC of 0.5
    assert same["gene correlation"] > 0.75
    assert abs(same["zero fraction"]) < 0.01


def test_twice_the_counts_are_twice_the_mean_and_library(real):
    row = realism.compare(real, as_cells(2 * real.X.toarray()), seed=0)
    expected = {"mean": 1, "variance": 2, "library size": 1, "detected genes": 0, "zero fraction": 0}
    np.testing.assert_allclose(row[list(expected)], list(expected.values()), atol=1e-9)
    assert row["gene correlation"] == pytest.approx(1)
    assert row["energy distance"] == pytest.approx(0, abs=1e-9)
    assert row["classifier AUC"] > 0.6


def test_genes_that_have_changed_places_are_seen(real, same):
    genes = np.random.default_rng(0).permutation(real.n_vars)
    row = realism.compare(real, as_cells(real.X.toarray()[:, genes]), seed=0)
    np.testing.assert_allclose(
        row[["zero fraction", "library size", "detected genes"]].to_numpy(dtype=float), 0, atol=1e-9
    )
    assert row["classifier AUC"] > 0.99
    assert row["mean"] > 1
    assert abs(row["gene correlation"]) < 0.2
    assert row["energy distance"] > 20 * same["energy distance"]


def test_cells_without_correlations_are_seen(real, same):
    rng = np.random.default_rng(0)
    row = realism.compare(real, as_cells(rng.permuted(real.X.toarray(), axis=0)), seed=0)
    np.testing.assert_allclose(row[["zero fraction", "mean", "variance"]].to_numpy(dtype=float), 0, atol=1e-9)
    assert abs(row["gene correlation"]) < 0.2
    assert row["energy distance"] > 2 * same["energy distance"]
    assert row["classifier AUC"] > 0.8


@pytest.mark.usefixtures("without_classifier")
def test_moments_correlation_and_libraries_are_those_of_brute_force(real):
    made = as_cells(np.floor(np.random.default_rng(3).gamma(0.5, 4, (300, 120))))
    row = realism.compare(real, made, seed=0)
    x, y = (cells.X.toarray().astype(float) for cells in (real, made))
    assert row["zero fraction"] == pytest.approx((y == 0).mean() - (x == 0).mean())
    shown = (x > 0).mean(axis=0) >= 0.1
    assert 0 < (~shown).sum() < 60
    assert row["mean"] == pytest.approx(np.median(np.abs(np.log2(y.mean(axis=0) / x.mean(axis=0)))[shown]))
    ratio = np.log2(y.var(axis=0) / x.var(axis=0))
    assert row["variance"] == pytest.approx(np.median(np.abs(ratio[shown])))
    totals = [values.sum(axis=1) for values in (x, y)]
    assert row["library size"] == pytest.approx(stats.wasserstein_distance(*map(np.log2, totals)))
    scaled = [
        np.log1p(values / total[:, None] * np.median(totals[0])) for values, total in zip((x, y), totals, strict=True)
    ]
    genes = np.argsort(-scaled[0].var(axis=0))[:100]
    pairs = [np.corrcoef(values[:, genes].T)[np.triu_indices(100, 1)] for values in scaled]
    assert row["gene correlation"] == pytest.approx(np.corrcoef(*pairs)[0, 1])


@pytest.mark.usefixtures("without_classifier")
def test_a_gene_that_never_varies_has_no_correlation(real):
    made = real.X.toarray()
    scaled = np.log1p(made / made.sum(axis=1, keepdims=True) * np.median(made.sum(axis=1)))
    made[:, scaled.var(axis=0).argmax()] = 0
    assert 0 < realism.compare(real, as_cells(made), seed=0)["gene correlation"] < 1


def test_energy_distance_is_that_of_brute_force_and_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(1, 2, size=(5, 3))

    def mean_distance(a, b):
        return np.mean([np.sqrt(((one - other) ** 2).sum()) for one in a for other in b])

    expected = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    assert realism.energy_distance(x, y) == pytest.approx(expected)
    one = realism.energy_distance(x[:, :1], y[:, :1])
    assert one == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2)  # scipy returns the square root


def test_embeddings_are_fitted_on_real_cells_only(real, others):
    counts = [realism.drawn_counts(cells, 300, np.random.default_rng(0)) for cells in (real, others)]
    places = realism.embeddings(*realism.normalised(*counts))
    far = realism.embeddings(*realism.normalised(counts[0], counts[1][:20]))
    assert places[0].shape == places[1].shape == (300, realism.COMPONENTS)
    np.testing.assert_allclose(places[0], far[0], atol=1e-9)
    np.testing.assert_allclose(places[1][:20], far[1], atol=1e-9)


@pytest.mark.usefixtures("without_classifier")
def test_the_seed_decides_which_cells_are_compared(real, others):
    first, again, other = (realism.compare(real, others[:100], seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_series_equal(first, again)
    assert not first.equals(other)


@pytest.mark.usefixtures("without_classifier")
def test_no_more_cells_are_compared_than_said(real, others, monkeypatch):
    drawn = []
    take = realism.drawn_counts
    monkeypatch.setattr(realism, "MAX_CELLS", 40)
    monkeypatch.setattr(realism, "drawn_counts", lambda *given: drawn.append(take(*given)) or drawn[-1])
    realism.compare(real, others, seed=0)
    assert [counts.shape[0] for counts in drawn] == [40, 40]


def test_what_cannot_be_compared_is_refused_with_a_sentence(real, others):
    with pytest.raises(UserError, match=r"9 real and 300 synthetic cells are too few to compare; 10 are needed\."):
        realism.compare(real[:9], others, seed=0)
    with pytest.raises(UserError, match=r"Real and synthetic cells have different genes; make the synthetic ones"):
        realism.compare(real, others[:, ::-1], seed=0)
