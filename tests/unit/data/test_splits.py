"""The split: every cell once, classes in proportion, groups whole, the same on every machine and in any order."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from tuneformer.artifacts import UserError
from tuneformer.data.splits import PARTS, assign_fold, assign_split, draw_cells, split_key

reproducible = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def labelled_cells(draw):
    sizes = draw(st.lists(st.integers(3, 60), min_size=1, max_size=5))
    names = [f"cell{number}" for number in range(sum(sizes))]
    labels = pd.Series([f"class{k}" for k, size in enumerate(sizes) for _ in range(size)], index=names)
    return labels.loc[draw(st.permutations(names))]


shares = st.floats(0.05, 0.4)
seeds = st.integers(0, 2**31)


@reproducible
@given(labelled_cells(), shares, shares, seeds)
def test_every_cell_is_in_one_part_and_classes_keep_their_shares(labels, test_share, validation_share, seed):
    split = assign_split(labels, test_share=test_share, validation_share=validation_share, seed=seed)
    assert list(split.index) == list(labels.index)
    assert set(split) == set(PARTS)
    for _, part in split.groupby(labels):
        count = part.value_counts()
        assert abs(count["test"] - test_share * len(part)) <= 1
        assert abs(count["validation"] - validation_share * (len(part) - count["test"])) <= 1
        assert count.min() >= 1


@reproducible
@given(labelled_cells(), seeds, st.randoms(use_true_random=False))
def test_the_order_of_the_cells_does_not_matter(labels, seed, random):
    split = assign_split(labels, test_share=0.2, validation_share=0.2, seed=seed)
    names = list(labels.index)
    random.shuffle(names)
    again = assign_split(labels.loc[names], test_share=0.2, validation_share=0.2, seed=seed)
    assert again.loc[labels.index].equals(split)
    assert split_key(again) == split_key(split)


@st.composite
def grouped_cells(draw):
    """Draw donors with cells of some classes each, and wells with cells of one class."""
    n_classes = draw(st.integers(1, 4))
    groups = draw(
        st.lists(st.lists(st.integers(0, 12), min_size=n_classes, max_size=n_classes), min_size=3, max_size=15)
    )
    rows = [
        (f"class{k}", f"group{g}")
        for g, sizes in enumerate(groups)
        for k, size in enumerate(sizes)
        for _ in range(size)
    ]
    assume(rows)
    frame = pd.DataFrame(rows, columns=["label", "group"])
    frame.index = [f"cell{number}" for number in range(len(frame))]
    return frame


@reproducible
@given(grouped_cells(), shares, shares, seeds)
def test_groups_stay_whole_and_every_class_is_in_every_part_or_the_split_is_refused(frame, test, validation, seed):
    try:
        split = assign_split(
            frame["label"], test_share=test, validation_share=validation, seed=seed, groups=frame["group"]
        )
    except UserError:
        event("refused")
        return
    assert list(split.index) == list(frame.index)
    assert split.groupby(frame["group"]).nunique().max() == 1
    assert pd.crosstab(frame["label"], split).to_numpy().all()
    assert pd.crosstab(frame["label"], split).shape[1] == len(PARTS)


@reproducible
@given(st.integers(3, 30), st.integers(1, 4), shares, shares, seeds)
def test_groups_with_all_classes_are_never_refused(n_groups, n_classes, test, validation, seed):
    rows = [(f"class{k}", f"donor{g}") for g in range(n_groups) for k in range(n_classes) for _ in range(4)]
    frame = pd.DataFrame(rows, columns=["label", "donor"])
    split = assign_split(frame["label"], test_share=test, validation_share=validation, seed=seed, groups=frame["donor"])
    donors = frame["donor"].groupby(split, observed=True).nunique()
    assert abs(donors["test"] - test * n_groups) <= 1
    assert abs(donors["validation"] - validation * (n_groups - donors["test"])) <= 1


@reproducible
@given(st.lists(st.integers(1, 50), min_size=3, max_size=3), shares, shares, seeds)
def test_three_groups_give_one_to_each_part_whatever_their_size(sizes, test, validation, seed):
    groups = pd.Series([f"donor{g}" for g, size in enumerate(sizes) for _ in range(size)], name="donor")
    labels = pd.Series("a", index=groups.index)
    split = assign_split(labels, test_share=test, validation_share=validation, seed=seed, groups=groups)
    assert groups.groupby(split, observed=True).nunique().to_dict() == dict.fromkeys(PARTS, 1)


def test_wells_of_one_class_each_keep_the_shares():
    rows = [(f"class{k}", f"well{k}-{w}") for k in range(5) for w in range(40) for _ in range(20 + w)]
    frame = pd.DataFrame(rows, columns=["label", "well"])
    split = assign_split(frame["label"], test_share=0.1, validation_share=1 / 9, seed=0, groups=frame["well"])
    shares = pd.crosstab(frame["label"], split, normalize="index")
    largest_well = 59 / (40 * 39.5)
    assert (shares - pd.Series({"train": 0.8, "validation": 0.1, "test": 0.1})).abs().max().max() < largest_well


def test_the_seed_decides_the_split():
    labels = pd.Series("a", index=[f"cell{number}" for number in range(200)])
    drawn = [assign_split(labels, test_share=0.5, validation_share=0.2, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].equals(drawn[1])
    assert 60 < (drawn[0] != drawn[2]).sum() < 180


def test_the_split_is_the_same_on_every_machine():
    labels = pd.Series(["a", "b"] * 10, index=[f"cell{number}" for number in range(20)])
    split = assign_split(labels, test_share=0.2, validation_share=0.25, seed=3)
    assert split_key(split) == "991c32be88027f1e"


def test_a_class_that_is_too_small_is_refused():
    labels = pd.Series(["a"] * 10 + ["b"] * 2)
    with pytest.raises(UserError, match=r"^Class 'b' has 2 cells after quality control, too few"):
        assign_split(labels, test_share=0.1, validation_share=0.1, seed=0)


def test_a_share_that_leaves_no_training_cell_is_refused():
    labels = pd.Series(["a"] * 4)
    with pytest.raises(UserError, match="change the shares"):
        assign_split(labels, test_share=0.9, validation_share=0.1, seed=0)


def test_a_class_in_two_groups_is_refused():
    labels = pd.Series(["a", "a", "a", "b", "b", "b"])
    groups = pd.Series([1, 2, 3, 1, 2, 2], name="donor")
    with pytest.raises(UserError, match=r"^Class 'b' is in 2 groups of 'donor'.*group_by: null\.$"):
        assign_split(labels, test_share=0.1, validation_share=0.1, seed=0, groups=groups)


def test_missing_names_classes_and_groups_are_refused():
    shares = {"test_share": 0.2, "validation_share": 0.2, "seed": 0}
    with pytest.raises(UserError, match="'x' is given more than once"):
        assign_split(pd.Series(["a"] * 3, index=["x", "x", "y"]), **shares)
    with pytest.raises(UserError, match="1 cells have no class"):
        assign_split(pd.Series(["a", None, "a"]), **shares)
    with pytest.raises(UserError, match="2 cells have no group in 'well'"):
        assign_split(pd.Series(["a"] * 4), **shares, groups=pd.Series(["A", None, None, "B"], name="well"))


def all_folds(labels, folds, **options):
    """Parts of every cell, one column a fold."""
    options = {"validation_share": 1 / 9, "seed": 0} | options
    return pd.DataFrame({fold: assign_fold(labels, folds=folds, fold=fold, **options) for fold in range(folds)})


@reproducible
@given(labelled_cells(), st.integers(2, 8), st.floats(0.05, 0.3), seeds, st.randoms(use_true_random=False))
def test_over_the_folds_every_cell_is_tested_once_and_classes_keep_their_shares(labels, folds, share, seed, random):
    sizes = labels.value_counts()
    rest = sizes - np.ceil(sizes / folds)
    try:
        parts = all_folds(labels, folds, validation_share=share, seed=seed)
    except UserError:
        assert (sizes < folds).any() or (rest < 2).any()
        event("refused")
        return
    assert list(parts.index) == list(labels.index)
    assert ((parts == "test").sum(axis=1) == 1).all()
    tested = pd.DataFrame({fold: labels[parts[fold] == "test"].value_counts() for fold in parts})
    assert not tested.isna().any(axis=None)
    assert (tested.max(axis=1) - tested.min(axis=1)).max() <= 1
    assert np.ptp(tested.sum()) <= 1
    for fold in parts:
        counts = pd.crosstab(labels, parts[fold])
        assert counts.to_numpy().min() >= 1
        left = counts["train"] + counts["validation"]
        assert ((counts["validation"] - share * left).abs() <= 1).all()
    names = list(labels.index)
    random.shuffle(names)
    assert all_folds(labels.loc[names], folds, validation_share=share, seed=seed).loc[labels.index].equals(parts)


@reproducible
@given(grouped_cells(), st.integers(2, 5), shares, seeds, st.randoms(use_true_random=False))
def test_over_the_folds_every_group_is_tested_once_or_the_folds_are_refused(frame, folds, share, seed, random):
    options = {"validation_share": share, "seed": seed}
    try:
        parts = all_folds(frame["label"], folds, groups=frame["group"], **options)
    except UserError:
        event("refused")
        return
    is_test = (parts == "test").groupby(frame["group"]).mean()
    assert is_test.isin([0, 1]).all(axis=None)
    assert (is_test.sum(axis=1) == 1).all()
    assert (is_test.sum() >= 1).all()
    whole = (parts == "validation").groupby(frame["group"]).mean().isin([0, 1]).all(axis=None)
    event(f"whole groups in validation: {whole}")
    for fold in parts:
        counts = pd.crosstab(frame["label"], parts[fold])
        assert (counts[["train", "validation"]] > 0).all(axis=None)
    shuffled = frame.sample(frac=1, random_state=random.randrange(2**31))
    again = all_folds(shuffled["label"], folds, groups=shuffled["group"], **options)
    assert again.loc[frame.index].equals(parts)


@reproducible
@given(st.integers(4, 24), st.integers(2, 4), st.integers(1, 4), seeds)
def test_groups_with_all_classes_are_dealt_out_evenly(n_groups, folds, n_classes, seed):
    rows = [(f"class{k}", f"donor{g}") for g in range(n_groups) for k in range(n_classes) for _ in range(4)]
    frame = pd.DataFrame(rows, columns=["label", "donor"])
    parts = all_folds(frame["label"], folds, seed=seed, groups=frame["donor"])
    donors = pd.Series({fold: frame["donor"][parts[fold] == "test"].nunique() for fold in parts})
    assert np.ptp(donors) <= 1


def test_single_validation_cells_are_taken_in_all_folds_where_a_class_is_in_two_groups():
    frame = pd.DataFrame(
        [("a", g) for g in "ABCD" for _ in range(20)] + [("b", g) for g in "AB" for _ in range(10)],
        columns=["label", "donor"],
    )
    parts = all_folds(frame["label"], 4, groups=frame["donor"], validation_share=0.2)
    for fold in parts:
        held = frame[parts[fold] == "validation"]
        tested = frame.loc[parts[fold] == "test", "donor"].unique()
        others = frame[~frame["donor"].isin(tested)]
        assert set(held["donor"]) == set(others["donor"])
        assert held["label"].value_counts().to_dict() == {
            name: round(0.2 * n) for name, n in others["label"].value_counts().items()
        }


def test_whole_validation_groups_are_taken_where_that_is_possible():
    frame = pd.DataFrame([(c, g) for g in "ABCDE" for c in "ab" for _ in range(10)], columns=["label", "donor"])
    parts = all_folds(frame["label"], 5, groups=frame["donor"], validation_share=0.25)
    for fold in parts:
        assert frame["donor"].groupby(parts[fold], observed=True).nunique().to_dict() == {
            "test": 1,
            "train": 3,
            "validation": 1,
        }


def test_folds_are_the_same_on_every_machine_and_validation_cells_differ_between_them():
    labels = pd.Series(["a", "b"] * 20, index=[f"cell{number}" for number in range(40)])
    parts = all_folds(labels, 4, seed=3, validation_share=0.2)
    assert [split_key(parts[fold]) for fold in parts] == [
        "65c8e1691a94e567",
        "42085d152881ac79",
        "8e3557c497120681",
        "2e29e2eca4af7dc8",
    ]
    assert (parts == "validation").sum(axis=1).between(0, 3).all()
    assert (parts == "validation").any(axis=1).sum() > 15
    grouped = all_folds(labels, 4, seed=3, groups=pd.Series(np.arange(40) // 4, index=labels.index, name="well"))
    assert split_key(grouped[0]) == "052cc8f5cc155110"


def test_the_rarest_pancreas_class_has_enough_cells_for_five_folds():
    labels = pd.Series(["alpha"] * 50 + ["t_cell"] * 7)
    for part in all_folds(labels, 5).to_dict("series").values():
        counts = part[labels == "t_cell"].value_counts()
        assert counts["test"] in (1, 2)
        assert counts["validation"] == 1
        assert counts["train"] >= 4


@pytest.mark.parametrize(("n", "folds"), [(4, 5), (3, 2), (1, 2)])
def test_a_class_too_small_for_the_folds_is_refused(n, folds):
    labels = pd.Series(["a"] * 20 + ["b"] * n)
    with pytest.raises(UserError, match=rf"^Class 'b' has {n} cells .* too few for {folds} folds.*change folds\.$"):
        assign_fold(labels, folds=folds, fold=0, validation_share=0.1, seed=0)


def test_without_validation_all_that_is_not_tested_is_trained_on():
    labels = pd.Series(["a"] * 40 + ["b"] * 20, [f"cell{number}" for number in range(60)])
    split = assign_split(labels, test_share=0.2, validation_share=0, seed=0)
    assert split.value_counts().to_dict() == {"train": 48, "test": 12, "validation": 0}
    table = pd.DataFrame({"label": labels, "split": split})
    drawn = draw_cells(table, train_cells=12, validation_share=0, seed=0)
    assert [len(rows) for rows in drawn.values()] == [12, 0, 12]


def test_a_validation_share_that_leaves_no_training_cell_is_refused():
    labels = pd.Series(["a"] * 20 + ["b"] * 5)
    with pytest.raises(UserError, match=r"^Class 'b' has 4 cells outside the test cells .* share of 0\.9"):
        assign_fold(labels, folds=5, fold=0, validation_share=0.9, seed=0)


def test_folds_that_groups_cannot_make_are_refused():
    labels = pd.Series(["a"] * 12 + ["b"] * 4)
    donors = pd.Series([*"ABC" * 4, *"AAAA"], name="donor")
    options = {"fold": 0, "validation_share": 0.2, "seed": 0}
    with pytest.raises(
        UserError, match=r"^'donor' has 3 groups, and 4 folds need one whole group each; set folds to 3"
    ):
        assign_fold(labels, folds=4, groups=donors, **options)
    with pytest.raises(
        UserError, match=r"^Class 'b' is in no group of 'donor' but those tested in fold \d of 3.*null\.$"
    ):
        assign_fold(labels, folds=3, groups=donors, **options)
    with pytest.raises(UserError, match="1 cells have no group in 'donor'"):
        assign_fold(labels, folds=3, groups=donors.where(donors.index > 0), **options)
    with pytest.raises(UserError, match=r"^fold: 3 is not one of 3 folds"):
        assign_fold(labels, folds=3, fold=3, validation_share=0.2, seed=0)


def test_a_group_too_large_for_validation_stays_in_training():
    """Only the group with half of the cells has class b besides the last two, so whole groups would take it."""
    sizes = {"large": 60, "second": 20, "third": 20, "fourth": 20}
    rows = [(name, "b" if number == 0 and name != "second" else "a") for name in sizes for number in range(sizes[name])]
    frame = pd.DataFrame(rows, columns=["group", "label"], index=[f"cell{n}" for n in range(len(rows))])
    frame.loc[frame.index[:10], "label"] = "b"
    for fold in range(4):
        part = assign_fold(frame["label"], folds=4, fold=fold, validation_share=1 / 9, seed=0, groups=frame["group"])
        assert (part == "validation").sum() <= 3 / 9 * (part != "test").sum()
