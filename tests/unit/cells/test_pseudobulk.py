"""Strata and pseudo-bulk, against sums made cell by cell, against theory, and against scanpy."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.cells.pseudobulk import SEPARATOR, aggregate, group_cells, one_per_group, strata, thin
from tuneformer.tokens import encode
from tuneformer.tokens.vocabulary import SPECIALS_V1, Vocabulary

HOW = ("sum", "mean", "approx_mean")


def rng(seed=0):
    return np.random.default_rng(seed)


def member_names(points):
    return [names.split(SEPARATOR) for names in points.obs["member_names"]]


def in_strata(*sizes):
    """The strata of so many cells each, the cells in random order."""
    names = np.repeat([f"s{number}" for number in range(len(sizes))], sizes)
    return pd.Series(rng().permutation(names), dtype="category")


def make_cells(counts, strata):
    obs = pd.DataFrame(
        {
            "label": pd.Categorical(strata.str[:2], categories=["s1", "s0", "s2"], ordered=True),
            "dose": strata.map({"s0": 0.5, "s1": 10.0, "s2": 0.5}).to_numpy(float),
            "well": [f"w{number % 3}" for number in range(len(strata))],
            "n_counts": -1.0,
        }
    )
    obs.index = [f"a cell {number}" for number in range(len(strata))]
    genes = [f"GENE{number}" for number in range(counts.shape[1])]
    var = pd.DataFrame({"ensembl_id": genes, "symbol": genes}, index=genes)
    return ad.AnnData(sparse.csr_matrix(np.asarray(counts, dtype=np.float32)), obs=obs, var=var)


def make_vocabulary(medians):
    genes = pd.DataFrame({"ensembl_id": [f"GENE{number}" for number in range(len(medians))]})
    genes["token_id"] = np.arange(2, 2 + len(medians), dtype=np.int32)
    genes["median"] = np.asarray(medians, dtype=float)
    return Vocabulary(genes=genes, specials=SPECIALS_V1, aliases={})


@pytest.fixture(scope="module")
def small():
    """40 cells of 3 strata, 12 genes, in groups of about 4, and their points in all aggregations."""
    stratum = in_strata(17, 20, 3)
    cells = make_cells(rng(1).poisson(1.5, (40, 12)), stratum)
    groups = group_cells(stratum, k=4, spread=0.25, rng=rng(2))
    made = {how: aggregate(cells, groups, how=how, k=4, strata=stratum, name=how) for how in HOW}
    return cells, stratum, groups, made


# --- strata ---


@pytest.fixture
def dosed():
    label = pd.Categorical(["Dex", "Untreated", "Dex", "Dex"], categories=["Untreated", "Dex"], ordered=True)
    obs = pd.DataFrame({"label": label, "dose": [10.0, 0.0, 0.5, 10.0]}, index=list("abcd"))
    return ad.AnnData(np.ones((4, 1)), obs=obs)


@pytest.mark.parametrize(
    ("dose_column", "expected", "categories"),
    [
        ("dose", ["Dex @ 10", "Untreated @ 0", "Dex @ 0.5", "Dex @ 10"], ["Untreated @ 0", "Dex @ 0.5", "Dex @ 10"]),
        (None, ["Dex", "Untreated", "Dex", "Dex"], ["Untreated", "Dex"]),
    ],
)
def test_a_stratum_is_a_class_at_a_dose_if_there_are_doses(dosed, dose_column, expected, categories):
    found = strata(dosed, dose_column)
    assert list(found) == expected
    assert list(found.cat.categories) == categories
    assert list(found.index) == list("abcd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda obs: obs.assign(dose=[1, np.nan, 2, 3]),
            r"dose_column: 1 cells have no 'dose' \(first: b\); drop them",
        ),
        (lambda obs: obs.drop(columns="dose"), "the cells: dose_column 'dose' is not one of label"),
        (
            lambda obs: obs.assign(label=obs["label"].cat.add_categories("BMS")),
            "Class 'BMS' has no cells to make others",
        ),
    ],
)
def test_what_strata_need_and_do_not_find_is_said(dosed, change, sentence):
    dosed.obs = change(dosed.obs)
    with pytest.raises(UserError, match=sentence):
        strata(dosed, "dose")


# --- groups ---


@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    k=st.integers(2, 50),
    spread=st.sampled_from([0, 0.25, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
@profile(max_examples=80, deadline=None)
def test_every_cell_is_in_one_group_of_its_stratum_within_the_bounds(sizes, k, spread, seed):
    stratum = in_strata(*sizes)
    groups = group_cells(stratum, k=k, spread=spread, rng=rng(seed))
    members = np.bincount(groups)
    assert groups.shape == (sum(sizes),)
    assert members.sum() == sum(sizes)
    assert members.min() >= 1
    assert members.max() <= 2 * k - 1
    assert stratum.groupby(groups).nunique().eq(1).all()
    first = stratum.groupby(groups).first()
    assert first.is_monotonic_increasing  # stratum after stratum


@pytest.mark.parametrize("k", [2, 10, 100])
def test_group_sizes_have_the_mean_and_spread_that_was_asked_for(k):
    n_groups = 3000
    members = np.bincount(group_cells(in_strata(n_groups * k), k=k, spread=0.25, rng=rng(k)))
    sd = np.sqrt((k / 4) ** 2 + 1 / 12)  # of a rounded normal; the bounds are four standard deviations away
    if k == 2:
        one = 0.15866  # P(e < -0.25), and as often 3; the rest are 2
        sd = np.sqrt(2 * one)
    assert abs(members.mean() - k) < 3 * sd / np.sqrt(n_groups)
    assert abs(members.std() - sd) < 3 * sd / np.sqrt(2 * n_groups)


def test_the_bounds_are_reached_and_not_passed_when_the_spread_is_large():
    members = np.bincount(group_cells(in_strata(5000), k=10, spread=5.0, rng=rng()))
    assert set(members) >= {1, 19}
    assert members.max() == 19


@pytest.mark.parametrize(
    ("cells", "k", "expected"),
    [
        (30, 10, [10, 10, 10]),
        (24, 10, [10, 14]),  # 4 cells are left: fewer than half of k, so they join
        (25, 10, [5, 10, 10]),  # 5 are half of k: a group of their own
        (7, 10, [7]),  # k is larger than the stratum: one smaller group
        (1, 100, [1]),
        (5, 2, [1, 2, 2]),
    ],
)
def test_what_is_left_of_a_stratum(cells, k, expected):
    assert sorted(np.bincount(group_cells(in_strata(cells), k=k, spread=0.0, rng=rng()))) == expected


@pytest.mark.parametrize(("cells", "expected"), [(19, [19]), (20, [16, 4]), (15, [15])])
def test_few_cells_stay_apart_only_where_joining_would_pass_the_bound(cells, expected):
    class Drawn:  # the first group is to have 16 cells, the bound is 19
        def permutation(self, places):
            return places

        def normal(self, _mean, _sd, number):
            return np.full(number, 0.6)

    assert np.bincount(group_cells(in_strata(cells), k=10, spread=0.25, rng=Drawn())).tolist() == expected


def test_groups_follow_the_seed_and_not_the_names_of_strata():
    stratum = in_strata(50, 70)
    groups = group_cells(stratum, k=5, spread=0.25, rng=rng(3))
    assert np.array_equal(groups, group_cells(stratum, k=5, spread=0.25, rng=rng(3)))
    assert not np.array_equal(groups, group_cells(stratum, k=5, spread=0.25, rng=rng(4)))
    renamed = stratum.cat.rename_categories({"s0": "z", "s1": "a"})
    assert np.array_equal(groups, group_cells(renamed, k=5, spread=0.25, rng=rng(3)))


def test_members_are_drawn_at_random_from_the_whole_stratum():
    n_cells, k = 20_000, 10
    groups = group_cells(in_strata(n_cells), k=k, spread=0.0, rng=rng())
    place = np.argsort(np.argsort(np.arange(n_cells))) / n_cells
    means = np.bincount(groups, weights=place) / k
    sd = np.sqrt(1 / 12 / k)  # of the mean of k uniform places
    assert abs(means.std() - sd) < 3 * sd / np.sqrt(2 * len(means))


# --- aggregation ---


def test_points_are_the_sums_and_means_of_their_members(small):
    cells, _, groups, made = small
    dense = cells.X.toarray()
    for number in range(groups.max() + 1):
        total = np.zeros(12)
        for row in np.flatnonzero(groups == number):
            total += dense[row]
        assert made["sum"].X[[number]].toarray()[0].tolist() == total.tolist()
        assert made["mean"].X[[number]].toarray()[0] == pytest.approx(total / (groups == number).sum(), rel=1e-15)
        assert made["approx_mean"].X[[number]].toarray()[0].tolist() == (total / 4).tolist()


def test_points_are_those_of_scanpy(small):
    cells, _, groups, made = small
    whole = ad.AnnData(cells.X.astype(float), obs=cells.obs.assign(group=pd.Categorical(groups)))
    theirs = scanpy.get.aggregate(whole, by="group", func=["sum", "mean"])
    np.testing.assert_array_equal(made["sum"].X.toarray(), theirs.layers["sum"])
    np.testing.assert_allclose(made["mean"].X.toarray(), theirs.layers["mean"], rtol=1e-14)


def test_sums_keep_every_count_and_totals_are_recorded(small):
    cells, _, groups, made = small
    assert made["sum"].X.sum(axis=0).tolist() == cells.X.sum(axis=0).tolist()
    for how in HOW:
        totals = made[how].X.toarray().sum(axis=1, dtype=np.float64)
        assert made[how].obs["n_counts"].to_numpy() == pytest.approx(totals, rel=1e-14)
        assert made[how].obs["members"].tolist() == np.bincount(groups).tolist()
        assert sparse.isspmatrix_csr(made[how].X)
        assert made[how].X.dtype == (np.float32 if how == "sum" else np.float64)


def test_sums_stay_exact_beyond_a_sum_in_float32():
    big = make_cells(np.array([[2**23 + 1, 0], [2**23 - 2, 1]]), pd.Series(["s0", "s0"]))
    options = {"groups": np.zeros(2, dtype=int), "k": 2, "strata": pd.Series(["s0", "s0"]), "name": "p"}
    assert aggregate(big, how="sum", **options).X.toarray().tolist() == [[2**24 - 1, 1]]
    big.X[0, 0] += 2
    with pytest.raises(UserError, match=r"16,777,217 counts in one point.*lower k"):
        aggregate(big, how="sum", **options)


def test_obs_has_what_the_members_share_and_their_names(small, tmp_path):
    cells, stratum, groups, made = small
    points = made["sum"]
    assert points.obs_names[[0, -1]].tolist() == ["sum_0001", f"sum_{points.n_obs:04d}"]
    assert set(points.obs) == {"label", "dose", "stratum", "n_counts", "members", "member_names"}  # no well
    assert points.obs["label"].dtype == cells.obs["label"].dtype
    points.write_h5ad(tmp_path / "points.h5ad")
    points = ad.read_h5ad(tmp_path / "points.h5ad")
    names = member_names(points)
    for number, row in enumerate(points.obs.itertuples()):
        members = cells.obs[groups == number]
        assert sorted(names[number]) == sorted(members.index)
        assert (row.label, row.dose, row.stratum) == (
            *members[["label", "dose"]].iloc[0],
            stratum[groups == number].iloc[0],
        )
    assert sorted(name for part in names for name in part) == sorted(cells.obs_names)


def test_aggregation_does_not_depend_on_the_order_of_the_cells(small):
    cells, stratum, groups, made = small
    order = rng().permutation(cells.n_obs)
    again = aggregate(cells[order], groups[order], how="sum", k=4, strata=stratum.iloc[order], name="sum")
    assert (again.X != made["sum"].X).nnz == 0
    assert list(map(set, member_names(again))) == list(map(set, member_names(made["sum"])))


# --- controls ---


def test_one_cell_stands_for_each_group(small):
    cells, stratum, groups, made = small
    singles = one_per_group(cells, groups, rng=rng(), strata=stratum, name="single_cell_k4")
    shared = ["label", "dose", "stratum"]
    assert singles.obs[shared].to_numpy().tolist() == made["sum"].obs[shared].to_numpy().tolist()
    assert (singles.obs["members"] == 1).all()
    for row, (one,), members in zip(
        range(singles.n_obs), member_names(singles), member_names(made["sum"]), strict=True
    ):
        assert one in members
        assert singles.X[[row]].toarray().tolist() == cells[one].X.toarray().tolist()
        assert singles.obs["n_counts"].iloc[row] == cells[one].X.sum()
    again = one_per_group(cells, groups, rng=rng(), strata=stratum, name="single_cell_k4")
    other = one_per_group(cells, groups, rng=rng(1), strata=stratum, name="single_cell_k4")
    assert member_names(again) == member_names(singles) != member_names(other)


def test_each_member_is_as_likely_to_stand_for_its_group():
    n_groups = 2000
    stratum = pd.Series("s0", index=range(4 * n_groups))
    cells = make_cells(np.ones((4 * n_groups, 1)), stratum)
    singles = one_per_group(cells, np.repeat(np.arange(n_groups), 4), rng=rng(), strata=stratum, name="p")
    places = cells.obs_names.get_indexer([one for (one,) in member_names(singles)]) % 4
    error = np.sqrt(n_groups * 1 / 4 * 3 / 4)
    assert (abs(np.bincount(places, minlength=4) - n_groups / 4) < 3 * error).all()


def test_thinned_counts_have_the_mean_and_variance_of_the_binomial():
    counts, repeats, depth = np.array([0, 1, 3, 10, 50, 400, 536]), 4000, 250
    points = make_cells(np.tile(counts, (repeats, 1)), pd.Series(["s0"] * repeats))
    thinned = thin(points, np.full(repeats, depth), rng=rng()).X.toarray()
    kept = depth / counts.sum()
    variance = counts * kept * (1 - kept)
    assert (abs(thinned.mean(axis=0) - counts * kept) <= 4 * np.sqrt(variance / repeats)).all()
    excess = 1 / np.maximum(counts, 1) * (1 - 6 * kept * (1 - kept)) / (kept * (1 - kept))  # kurtosis of the binomial
    assert (abs(thinned.var(axis=0) - variance) <= 4 * variance * np.sqrt((2 + excess) / repeats)).all()
    assert (thinned <= counts).all()
    assert (thinned == np.floor(thinned)).all()
    assert abs(thinned.sum(axis=1).mean() - depth) < 4 * np.sqrt(variance.sum() / repeats)


def test_thinning_leaves_the_given_points_and_shallow_ones_as_they_are(small):
    points = small[3]["sum"]
    before = points.copy()
    depths = np.where(np.arange(points.n_obs) % 2, 10.0, 1e6)
    thinned = thin(points, depths, rng=rng())
    assert (points.X != before.X).nnz == 0
    assert np.array_equal(points.X.indices, before.X.indices)
    assert (thinned.X[::2] != before.X[::2]).nnz == 0
    assert (thinned.obs["n_counts"] <= before.obs["n_counts"]).all()
    assert thinned.obs["n_counts"].tolist() == thinned.X.sum(axis=1, dtype=float).A1.tolist()
    assert (thinned.X.data > 0).all()
    assert thinned.obs.drop(columns="n_counts").equals(before.obs.drop(columns="n_counts"))
    assert (thin(points, depths, rng=rng()).X != thinned.X).nnz == 0
    assert (thin(points, depths, rng=rng(1)).X != thinned.X).nnz > 0


def test_what_cannot_be_thinned_is_refused(small):
    made = small[3]["approx_mean"]
    with pytest.raises(UserError, match="these points are means; thin their sums"):
        thin(made, np.full(made.n_obs, 5), rng=rng())


# --- what the model sees ---


@st.composite
def tied_cells(draw):
    """Cells, groups and medians with many ties: few different counts, medians that are multiples of 1/10."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    counts = draw(
        st.lists(st.lists(st.integers(0, 6), min_size=8, max_size=8), min_size=sum(sizes), max_size=sum(sizes))
    )
    counts = np.array(counts)
    counts[:, 0] += 1  # a point without any gene is refused by the tokenizer
    medians = draw(st.lists(st.integers(1, 12), min_size=8, max_size=8))
    return counts, np.repeat(np.arange(len(sizes)), sizes), np.array(medians) / 10


def tokens(points, medians, max_length=8):
    made = encode.encode(
        points, make_vocabulary(medians), max_length=max_length, columns={"label": points.obs["label"]}
    )
    return made.to_dict()


@given(case=tied_cells(), k=st.sampled_from([2, 3, 5, 7, 10, 25, 49, 100]))
@profile(max_examples=60, deadline=None)
def test_the_three_aggregations_have_the_same_tokens(case, k):
    counts, groups, medians = case
    stratum = pd.Series([f"s{group % 3}" for group in groups])
    cells = make_cells(counts, stratum)
    summed, mean, approx = (
        tokens(aggregate(cells, groups, how=how, k=k, strata=stratum, name="p"), medians) for how in HOW
    )
    assert summed == mean == approx


def test_means_in_float32_would_break_ties():
    """Tied are 3 / 0.3 and 1 / 0.1; a third of each is not, once 1 / 3 has been rounded up to float32."""
    stratum = pd.Series(["s0"] * 3)
    cells = make_cells(np.array([[3, 1], [0, 0], [0, 0]]), stratum)
    made = {how: aggregate(cells, np.zeros(3, dtype=int), how=how, k=3, strata=stratum, name="p") for how in HOW}
    made["rounded"] = made["mean"].copy()
    made["rounded"].X = made["mean"].X.astype(np.float32)
    found = {how: tokens(points, [0.3, 0.1])["input_ids"][0] for how, points in made.items()}
    assert found == {"sum": [2, 3], "mean": [2, 3], "approx_mean": [2, 3], "rounded": [3, 2]}


def test_simulated_points_have_the_same_tokens_for_every_k(demo_cells, made_settings):
    vocabulary = encode.task_vocabulary(made_settings(), demo_cells)
    stratum = strata(demo_cells, "dose")
    rounded = 0
    for k in (2, 5, 10, 25, 100):
        groups = group_cells(stratum, k=k, spread=0.25, rng=rng(k))
        made = {how: aggregate(demo_cells, groups, how=how, k=k, strata=stratum, name="p") for how in HOW}
        made["float32"] = made["mean"].copy()
        made["float32"].X = made["mean"].X.astype(np.float32)
        found = {how: encode.encode(points, vocabulary, max_length=3000)["input_ids"] for how, points in made.items()}
        assert list(found["sum"]) == list(found["mean"]) == list(found["approx_mean"])
        rounded += list(found["sum"]) != list(found["float32"])
    assert rounded >= 4  # what the comparison shows if something is different: float32 swaps genes
