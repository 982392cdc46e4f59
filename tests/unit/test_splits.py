"""The split: every cell once, classes in proportion, groups whole, the same on every machine and in any order."""

import pandas as pd
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from tuneformer.data.readers import CellsError
from tuneformer.data.splits import PARTS, assign_split, split_hash, split_table

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
    assert split_hash(again) == split_hash(split)


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
    except CellsError:
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
    assert split_hash(split) == "991c32be88027f1e"


def test_a_class_that_is_too_small_is_refused():
    labels = pd.Series(["a"] * 10 + ["b"] * 2)
    with pytest.raises(CellsError, match=r"^Class 'b' has 2 cells after quality control, too few"):
        assign_split(labels, test_share=0.1, validation_share=0.1, seed=0)


def test_a_share_that_leaves_no_training_cell_is_refused():
    labels = pd.Series(["a"] * 4)
    with pytest.raises(CellsError, match="change the shares"):
        assign_split(labels, test_share=0.9, validation_share=0.1, seed=0)


def test_a_class_in_two_groups_is_refused():
    labels = pd.Series(["a", "a", "a", "b", "b", "b"])
    groups = pd.Series([1, 2, 3, 1, 2, 2], name="donor")
    with pytest.raises(CellsError, match=r"^Class 'b' is in 2 groups of 'donor'.*group_by: null\.$"):
        assign_split(labels, test_share=0.1, validation_share=0.1, seed=0, groups=groups)


def test_missing_names_classes_and_groups_are_refused():
    shares = {"test_share": 0.2, "validation_share": 0.2, "seed": 0}
    with pytest.raises(CellsError, match="'x' stands more than once"):
        assign_split(pd.Series(["a"] * 3, index=["x", "x", "y"]), **shares)
    with pytest.raises(CellsError, match="1 cells have no class"):
        assign_split(pd.Series(["a", None, "a"]), **shares)
    with pytest.raises(CellsError, match="2 cells have no group in 'well'"):
        assign_split(pd.Series(["a"] * 4), **shares, groups=pd.Series(["A", None, None, "B"], name="well"))


def test_the_table_adds_up():
    labels = pd.Series(["a"] * 10 + ["b"] * 20)
    table = split_table(labels, assign_split(labels, test_share=0.1, validation_share=1 / 9, seed=0))
    assert table.loc["a"].tolist() == [8, 1, 1, 10]
    assert table.loc["all"].tolist() == [24, 3, 3, 30]
