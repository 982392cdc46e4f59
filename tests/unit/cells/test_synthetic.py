"""The generators have the moments that theory gives them, within the bounds, from the cells that they may look at."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from tuneformer.artifacts import UserError
from tuneformer.cells import synthetic
from tuneformer.cells.synthetic import GENERATORS

MANY = 20_000
SIGMAS = 4.5  # accepted distance, in standard errors: 1 in 150,000 tests fails by chance


def as_cells(counts, labels=None, doses=None):
    """Make cells of counts (cells, genes); one class without doses by default."""
    labels = ["A"] * len(counts) if labels is None else labels
    obs = pd.DataFrame({"label": pd.Categorical(labels, categories=["A", "B", "C"], ordered=True)})
    obs["dose"] = np.zeros(len(counts)) if doses is None else doses
    obs.index = [f"cell{number}" for number in range(len(counts))]
    genes = [f"G{number}" for number in range(np.shape(counts)[1])]
    var = pd.DataFrame({"ensembl_id": genes}, index=genes)
    return ad.AnnData(sparse.csr_matrix(np.asarray(counts, dtype=np.float32)), obs=obs, var=var)


def strata_of(cells):
    return cells.obs["label"].astype(str).astype("category").rename("stratum")


def make(cells, generator, numbers, *, reference=None, rank=5, seed=0, name="made"):
    numbers = pd.Series(numbers if isinstance(numbers, dict) else {"A": numbers})
    return synthetic.generate(
        cells,
        strata=strata_of(cells),
        numbers=numbers,
        generator=generator,
        reference=reference,
        rank=rank,
        rng=np.random.default_rng(seed),
        name=name,
    )


def assert_moments(values, mean, variance):
    """Compare means and variances of the columns of `values` with theory, within `SIGMAS` standard errors."""
    n = len(values)
    deviations = values - values.mean(axis=0)
    spread = (deviations**2).sum(axis=0) / (n - 1)
    mean_error = np.sqrt(spread / n)
    variance_error = np.sqrt(((deviations**4).mean(axis=0) - spread**2) / n)
    assert (np.abs(values.mean(axis=0) - mean) < SIGMAS * mean_error).all()
    assert (np.abs(spread - variance) < SIGMAS * variance_error).all()


def correlations(counts):
    return np.corrcoef(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1000).T)


@pytest.fixture(scope="module")
def source():
    """Three hundred cells of class A: genes from rare to common, over-dispersed, of very different library sizes."""
    rng = np.random.default_rng(1)
    depth = rng.lognormal(0, 0.4, (300, 1))
    mean = np.array([0.03, 0.2, 1.0, 3.0, 10.0, 60.0])
    return as_cells(rng.poisson(depth * mean * rng.gamma(2, 1 / 2, (300, 6))))


@pytest.fixture(scope="module")
def programs():
    """One thousand cells in which genes 0-9 vary together, and so do genes 10-19; genes 20-39 vary alone."""
    rng = np.random.default_rng(2)
    shared = np.repeat(rng.normal(0, 0.5, (1000, 2)), 10, axis=1)
    rate = np.hstack([np.exp(shared), rng.gamma(4, 1 / 4, (1000, 20))])
    return as_cells(rng.poisson(rng.uniform(5, 20, 40) * rate))


@pytest.fixture
def classes():
    """Cells of A in two doses, of B, and of C; the doses of A have one value of the column plate each, B has two."""
    rng = np.random.default_rng(3)
    labels = ["A"] * 20 + ["B"] * 10 + ["C"] * 10
    cells = as_cells(rng.poisson(rng.gamma(1, 3, (40, 12))), labels, [1.0] * 10 + [2.0] * 10 + [0.0] * 20)
    cells.obs["drug"] = cells.obs["label"].astype(str) + " drug"
    cells.obs["plate"] = ["P", "Q"] * 20
    return cells


def test_a_bulk_point_is_the_mean_of_the_cells_of_its_stratum(classes):
    strata = (classes.obs["label"].astype(str) + " @ " + classes.obs["dose"].map("{:g}".format)).astype("category")
    points = synthetic.bulk_points(classes, strata.cat.add_categories("D @ 1"))
    assert list(points.obs_names) == ["A @ 1", "A @ 2", "B @ 0", "C @ 0"]
    dense = classes.X.toarray().astype(float)
    expected = [dense[(strata == name).to_numpy()].mean(axis=0) for name in points.obs_names]
    np.testing.assert_allclose(points.X.toarray(), expected, rtol=1e-12)
    np.testing.assert_allclose(points.obs["n_counts"], np.sum(expected, axis=1), rtol=1e-12)
    assert points.obs["members"].tolist() == [10, 10, 10, 10]
    assert points.obs["dose"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert points.obs["drug"].tolist() == ["A drug", "A drug", "B drug", "C drug"]
    assert "plate" not in points.obs
    assert points.obs["label"].dtype == classes.obs["label"].dtype


@pytest.mark.parametrize("generator", GENERATORS)
def test_made_cells_are_whole_counts_with_the_obs_of_their_stratum(classes, generator):
    made = make(classes, generator, {"C": 7, "A": 30, "B": 0}, name="synthetic_x")
    assert made.shape == (37, 12)
    assert isinstance(made.X, sparse.csr_matrix)
    assert made.X.dtype == np.float32
    assert made.X.has_canonical_format
    assert (made.X.data > 0).all()
    np.testing.assert_array_equal(made.X.data, np.rint(made.X.data))
    assert made.obs["label"].tolist() == made.obs["stratum"].tolist() == ["C"] * 7 + ["A"] * 30
    assert made.obs["label"].dtype == classes.obs["label"].dtype
    assert made.obs["drug"].tolist() == ["C drug"] * 7 + ["A drug"] * 30
    assert (made.obs["members"] == 1).all()
    np.testing.assert_array_equal(made.obs["n_counts"], made.X.toarray().sum(axis=1))
    assert made.var.equals(classes.var)
    assert made.obs_names[0] == "synthetic_x_00001"
    assert made.obs_names[-1] == "synthetic_x_00037"


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_seed_decides(classes, generator):
    first, again, other = (make(classes, generator, 20, seed=seed).X.toarray() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("generator", GENERATORS)
def test_pieces_of_bounded_memory_make_the_same_kind_of_cells(source, generator, monkeypatch):
    whole = make(source, generator, 4000).X.toarray()
    monkeypatch.setattr(synthetic, "ENTRIES", 600)
    pieces = make(source, generator, 4000, seed=1).X.toarray()
    assert pieces.shape == whole.shape
    error = np.sqrt((whole.var(axis=0) + pieces.var(axis=0)) / 4000)
    assert (np.abs(whole.mean(axis=0) - pieces.mean(axis=0)) < SIGMAS * error).all()


def test_gaussian_counts_are_rounded_truncated_normals(source):
    real = source.X.toarray().astype(float)
    mean, sd, maximum = real.mean(axis=0), real.std(axis=0, ddof=1), real.max(axis=0)
    values = make(source, "gaussian", MANY).X.toarray().astype(float)
    assert values.min() >= 0
    assert (values.max(axis=0) <= maximum).all()
    for gene in range(source.n_vars):
        law = stats.truncnorm(-mean[gene] / sd[gene], (maximum[gene] - mean[gene]) / sd[gene], mean[gene], sd[gene])
        steps = np.arange(maximum[gene] + 1)
        share = law.cdf(steps + 0.5) - law.cdf(steps - 0.5)
        expected = (steps * share).sum()
        if share[1:].sum() * MANY < 20:  # too rare for moments: gene 0 is never above half a count
            assert np.count_nonzero(values[:, gene]) < 60
            continue
        assert_moments(values[:, [gene]], expected, ((steps - expected) ** 2 * share).sum())
        zeros = np.mean(values[:, gene] == 0)
        assert abs(zeros - share[0]) < SIGMAS * np.sqrt(max(share[0], 1e-3) / MANY)


def test_truncated_normals_far_from_their_center_end_at_the_next_bound():
    rng = np.random.default_rng(0)
    center = np.array([-3.0, -500.0, 14.0, 600.0, -1e9, 5.0])
    sd = np.array([1.0, 1.0, 1.0, 1.0, 1e-6, 1e-6])
    values = synthetic._truncated_normal(center, sd, np.full(6, 10.0), (MANY, 6), rng)
    for column, (low, high) in {0: (3, 13), 2: (-14, -4)}.items():
        law = stats.truncnorm(low, high, center[column], 1)
        assert_moments(values[:, [column]], law.mean(), law.var())
    np.testing.assert_allclose(values[:, [1, 3, 4, 5]], np.tile([0, 10, 0, 5.0], (MANY, 1)), atol=1e-4)


def test_gaussian_full_has_the_covariance_of_the_source(programs):
    real = programs.X.toarray().astype(float)
    values = make(programs, "gaussian_full", MANY, rank=2).X.toarray().astype(float)
    assert values.min() >= 0
    assert (values.max(axis=0) <= real.max(axis=0)).all()
    blocks = [np.arange(10), np.arange(10, 20)]
    for one, other in ((0, 0), (1, 1), (0, 1)):
        pairs = np.ix_(blocks[one], blocks[other])
        off = ~np.eye(10, dtype=bool) if one == other else np.ones((10, 10), dtype=bool)
        wanted, found = (np.corrcoef(values.T)[pairs][off].mean() for values in (real, values))
        assert abs(wanted - found) < 0.05  # truncation at 0 takes a little away
    assert np.corrcoef(values.T)[:10, :10][~np.eye(10, dtype=bool)].min() > 0.3


@pytest.mark.parametrize("generator", ["gaussian", "nb"])
def test_without_factors_genes_are_independent(programs, generator):
    off = ~np.eye(10, dtype=bool)
    real, made = (correlations(cells.X.toarray()) for cells in (programs, make(programs, generator, 4000)))
    assert real[:10, :10][off].mean() > 0.4
    assert abs(made[:10, :10][off].mean()) < 0.05  # not 0: normalised counts of a cell add up to the same sum


def test_nb_copula_has_the_correlations_of_the_source(programs):
    real, made = (correlations(cells.X.toarray()) for cells in (programs, make(programs, "nb_copula", 4000, rank=2)))
    off = ~np.eye(10, dtype=bool)
    for start in (0, 10):
        block = np.s_[start : start + 10, start : start + 10]
        wanted, found = real[block][off].mean(), made[block][off].mean()
        assert wanted > 0.4
        # components of 10 genes hold (1 - r) / 10 of what is each gene's own; scores of counts lose a little
        assert 0.95 * wanted < found < wanted + (1 - wanted) / 10 + 0.03
    assert abs(made[:10, 20:].mean() - real[:10, 20:].mean()) < 0.03


@pytest.mark.parametrize("generator", ["nb", "nb_copula"])
def test_nb_counts_have_the_mean_and_variance_of_theory(source, generator):
    real = source.X.toarray().astype(float)
    library = real.sum(axis=1)
    share = real.sum(axis=0) / library.sum()
    n = len(real)
    dispersion = np.empty(len(share))
    for gene in range(len(share)):
        squares = sum((real[cell, gene] - library[cell] * share[gene]) ** 2 for cell in range(n))
        excess = squares * n / (n - 1) - sum(library * share[gene])
        dispersion[gene] = max(excess / sum((library * share[gene]) ** 2), 0)
    assert (dispersion[2:5] > 0.2).all()
    made = make(source, generator, MANY).X.toarray().astype(float)
    within = library.mean() * share + dispersion * share**2 * (library**2).mean()
    assert_moments(made, library.mean() * share, within + share**2 * library.var())


def test_with_equal_libraries_the_dispersion_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    first = rng.negative_binomial(2, 0.3, (50, 5))
    counts = np.hstack([first, 100 - first.sum(axis=1, keepdims=True)])
    found = synthetic.dispersions(sparse.csr_matrix(counts.astype(float)))
    mean, variance = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    np.testing.assert_allclose(found, np.maximum((variance - mean) / mean**2, synthetic.POISSON))


def test_quantiles_are_those_of_scipy():
    rng = np.random.default_rng(0)
    mean = np.exp(rng.uniform(-6, 8, 3000))
    dispersion = np.where(rng.random(3000) < 0.3, synthetic.POISSON, np.exp(rng.uniform(-6, 3, 3000)))
    probability = rng.random(3000)
    expected = stats.nbinom.ppf(probability, 1 / dispersion, 1 / (1 + dispersion * mean))
    found = synthetic._quantile(probability, mean, dispersion)
    assert (np.abs(found - expected) <= 1e-9 * expected).mean() > 0.999
    np.testing.assert_allclose(found, expected, atol=1)
    assert (synthetic._quantile(np.ones(2) - 1e-16, np.array([0.1, 50.0]), np.array([1e-8, 2.0])) < 5000).all()


def test_scores_of_the_right_distribution_are_standard_normal():
    rng = np.random.default_rng(0)
    library = rng.uniform(500, 1500, MANY)
    share, dispersion = np.array([1e-4, 1e-3, 0.01, 0.3]), np.array([0.5, 1e-8, 0.2, 0.1])
    size = 1 / dispersion
    counts = rng.negative_binomial(size, size / (size + library[:, None] * share)).astype(float)
    scores = synthetic._normal_scores(sparse.csr_matrix(counts), library, share, dispersion, rng)
    for gene in range(4):
        assert stats.kstest(scores[:, gene], "norm").pvalue > 1e-4
        assert abs(stats.spearmanr(scores[:, gene], library).statistic) < SIGMAS / np.sqrt(MANY)


@pytest.mark.parametrize("generator", GENERATORS)
def test_genes_without_variance(generator):
    counts = np.tile([0, 3, 1], (8, 1))
    values = make(as_cells(counts), generator, 3000).X.toarray()
    if generator.startswith("gaussian"):
        np.testing.assert_array_equal(values, np.tile([0, 3, 1], (3000, 1)))
    else:
        assert not values[:, 0].any()
        poisson = stats.poisson([3, 1])
        none = poisson.pmf(0).prod()  # cells without counts are drawn again
        mean = poisson.mean() / (1 - none)
        assert_moments(values[:, 1:], mean, (poisson.var() + poisson.mean() ** 2) / (1 - none) - mean**2)


@pytest.mark.parametrize("generator", GENERATORS)
def test_two_cells_are_enough_for_any_rank(generator):
    made = make(as_cells([[5, 0, 2, 9], [1, 3, 2, 4]]), generator, 50, rank=20)
    assert made.n_obs == 50
    assert np.isfinite(made.X.data).all()


def test_no_cell_is_without_counts():
    rng = np.random.default_rng(0)
    made = make(as_cells(rng.poisson(0.1, (200, 4))), "nb", 1000)
    assert made.n_obs == 1000
    assert made.obs["n_counts"].min() == 1


@pytest.fixture
def treated():
    """Sixty untreated cells (B), and as many of a treated class (A) that has one gene more."""
    rng = np.random.default_rng(5)
    untreated, changed = rng.poisson(rng.gamma(2, 4, (2, 60, 8)))
    untreated[:, 0] = 0
    return as_cells(np.vstack([changed, untreated]), ["A"] * 60 + ["B"] * 60)


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_reference_is_all_that_is_seen_of_how_cells_vary(treated, generator):
    reference = (treated.obs["label"] == "B").to_numpy()
    before = make(treated, generator, 40, reference=reference).X.toarray()
    moved = treated.copy()
    dense = moved.X.toarray()
    dense[0] += dense[1:60].sum(axis=0)  # all counts of the treated cells into one of them: same mean, other variance
    dense[1:60] = 0
    moved.X = sparse.csr_matrix(dense)
    np.testing.assert_array_equal(before, make(moved, generator, 40, reference=reference).X.toarray())
    dense = treated.X.toarray()
    dense[60] += dense[61:90].sum(axis=0)
    dense[61:90] = 0
    moved.X = sparse.csr_matrix(dense)
    assert (before != make(moved, generator, 40, reference=reference).X.toarray()).any()


def test_a_gene_that_the_reference_never_has_keeps_its_bulk_mean(treated):
    reference = (treated.obs["label"] == "B").to_numpy()
    mean = float(treated.X[:60, 0].mean())
    assert (make(treated, "gaussian", 50, reference=reference).X.toarray()[:, 0] == np.rint(mean)).all()
    share = treated.X[:60, 0].sum() / treated.X[:60].sum()
    library = treated.X[60:].toarray().sum(axis=1)
    made = make(treated, "nb", MANY, reference=reference).X.toarray()[:, [0]].astype(float)
    expected = share * library
    assert_moments(made, expected.mean(), expected.mean() + expected.var())  # Poisson given the library size


def test_with_a_reference_one_cell_of_a_stratum_is_enough(treated):
    few = treated[59:].copy()
    reference = (few.obs["label"] == "B").to_numpy()
    assert make(few, "nb_copula", 10, reference=reference).n_obs == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"numbers": 0}, r"No synthetic cell is asked for; ask for 1 or more in some stratum\."),
        (
            {"reference": np.zeros(40, dtype=bool)},
            "nb takes variances from 2 cells or more, and the untreated class has 0",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_sentence(classes, change, sentence):
    with pytest.raises(UserError, match=sentence):
        make(classes, **{"generator": "nb", "numbers": 5} | change)


def test_one_cell_does_not_say_how_cells_vary(classes):
    with pytest.raises(UserError, match=r"gaussian takes .*, and stratum 'A' has 1; .* \(variances: untreated, "):
        make(classes[19:].copy(), "gaussian", 5)


def test_cells_that_stay_empty_are_refused():
    empty = as_cells([[0, 0], [0, 0], [3, 1], [1, 2]], ["A", "A", "B", "B"])
    with pytest.raises(UserError, match=r"The cells of stratum 'A' have no counts, so no cells can be made"):
        make(empty, "nb", 5)
    thin = as_cells([[1, 0], [0, 0], [0, 0], [0, 3], [0, 3]], ["A"] * 3 + ["B"] * 2)
    reference = np.array([False] * 3 + [True] * 2)
    with pytest.raises(UserError, match=r"Stratum 'A' has 0\.333 counts a cell on average, and 100 draws in a row"):
        make(thin, "gaussian", 5, reference=reference)
