"""The simulated pancreas has the published sizes, technologies that differ as stated, and types close in a lineage."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.data import simulate, simulate_pancreas
from tuneformer.data.splits import assign_fold, assign_split


@pytest.fixture(scope="module")
def cells():
    return simulate_pancreas.simulate_pancreas(1500, seed=0)


def test_published_numbers_give_the_published_types_and_no_type_has_fewer_than_seven_cells():
    types = {one.name: one.cells for one in simulate_pancreas.TYPES}
    assert simulate_pancreas.cell_numbers(16382).sum(axis=1).to_dict() == types
    assert sum(types.values()) == 16382
    for n in (98, 1500, 4000):
        sizes = simulate_pancreas.cell_numbers(n).sum(axis=1)
        assert sizes.sum() == n
        assert sizes.min() == 7
    scaled = simulate_pancreas.cell_numbers(4000).sum(axis=1)
    frequent = scaled[scaled > 20].drop("alpha")  # the largest type pays for the rare ones
    assert (frequent - 4000 / 16382 * pd.Series(types)[frequent.index]).abs().max() <= 1
    with pytest.raises(UserError, match=r"^97 cells are fewer than 7 of each of 14 types; set demo_cells to more\.$"):
        simulate_pancreas.simulate_pancreas(97, seed=0)


@pytest.mark.parametrize("n", [98, 1500, 16382])
def test_every_type_is_in_the_technologies_that_are_stated_and_in_at_least_three(n):
    table = simulate_pancreas.cell_numbers(n)
    for one in simulate_pancreas.TYPES:
        assert set(table.columns[table.loc[one.name] > 0]) == set(one.technologies)
    assert (table > 0).sum(axis=1).min() == 3
    assert table["inDrop"].sum() > table.sum().drop("inDrop").max()


def test_the_cells_are_those_of_the_table_in_random_order(cells):
    counted = pd.crosstab(cells.obs["celltype"].astype(str), cells.obs["tech"].astype(str))
    expected = simulate_pancreas.cell_numbers(1500)
    pd.testing.assert_frame_equal(counted.loc[expected.index, expected.columns], expected, check_names=False)
    share = expected.sum(axis=1) / 1500
    is_same = cells.obs["celltype"].astype(str).to_numpy()[:-1] == cells.obs["celltype"].astype(str).to_numpy()[1:]
    assert is_same.mean() == pytest.approx((share**2).sum(), abs=0.05)  # 4 standard errors: 0.043
    pd.testing.assert_frame_equal(cells.var, simulate.make_universe().var)


def test_only_full_length_technologies_have_fractions(cells):
    full_length = {one.name: one.full_length for one in simulate_pancreas.TECHNOLOGIES}
    is_full = cells.obs["tech"].astype(str).map(full_length).to_numpy()
    counts = cells.X.toarray()
    assert (counts[~is_full] == counts[~is_full].round()).all()
    fractional = counts[is_full] != counts[is_full].round()
    assert fractional.any(axis=1).all()
    assert fractional.any(axis=0).mean() == pytest.approx(simulate_pancreas.SHARED_GENES, abs=0.05)
    np.testing.assert_allclose(100 * counts, (100 * counts).round(), rtol=1e-6)
    assert counts.dtype == np.float32
    assert (cells.X.data > 0).all()


def test_depth_and_genes_are_those_of_the_technology(cells):
    total = pd.Series(np.asarray(cells.X.sum(axis=1)).ravel(), index=cells.obs_names)
    for one in simulate_pancreas.TECHNOLOGIES:
        here = (cells.obs["tech"] == one.name).to_numpy()
        kept = 1 - simulate_pancreas.SHARED_GENES * 0.25 if one.full_length else 1
        error = 4 * simulate.LIBRARY_SD * np.sqrt(np.pi / 2 / here.sum())  # 4 standard errors of a log median
        assert np.log(total[here].median()) == pytest.approx(np.log(one.depth * kept), abs=error + 0.05)
    effects, _ = simulate_pancreas._technology_effects()
    assert effects.std(axis=1) == pytest.approx(simulate_pancreas.GENE_SD, rel=0.06)
    alpha = (cells.obs["celltype"] == "alpha").to_numpy()
    means = [
        np.log(cells[alpha & (cells.obs["tech"] == name).to_numpy()].X.mean(axis=0).A1 + 1e-3)
        for name in ("celseq2", "inDrop")
    ]
    frequent = (means[0] > 0) & (means[1] > 0)
    assert np.corrcoef((means[0] - means[1])[frequent], (effects[1] - effects[3])[frequent])[0, 1] > 0.9


def test_types_of_a_lineage_are_closer_than_others():
    activity = simulate_pancreas.type_activity()
    lineage = np.array([one.lineage for one in simulate_pancreas.TYPES])
    distance = np.linalg.norm(activity[:, None] - activity[None], axis=2)
    same = lineage[:, None] == lineage
    assert distance[same & ~np.eye(14, dtype=bool)].max() < distance[~same].min()
    corpus = np.stack([simulate.cell_type_activity(number) for number in range(300)])
    assert np.linalg.norm(activity[:, None] - corpus, axis=2).min() > 2


def test_the_seed_draws_the_cells_and_nothing_else(cells):
    again, other = (simulate_pancreas.simulate_pancreas(1500, seed=seed) for seed in (0, 1))
    assert (cells.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, again.obs)
    assert (cells.X != other.X).nnz > 0
    assert (cells.obs["celltype"].astype(str) != other.obs["celltype"].astype(str)).any()


def test_the_cells_can_be_split_by_technology_and_into_five_folds(cells):
    labels, technologies = cells.obs["celltype"].astype(str), cells.obs["tech"].astype(str)
    options = {"validation_share": 0.1, "seed": 0}
    for fold in range(5):
        split = assign_fold(labels, folds=5, fold=fold, **options)
        assert pd.crosstab(labels, split).to_numpy().min() >= 1
    for fold in range(6):
        split = assign_fold(labels, folds=6, fold=fold, groups=technologies, **options)
        assert technologies[split == "test"].nunique() == 1
        assert (pd.crosstab(labels, split)[["train", "validation"]] > 0).all(axis=None)
    split = assign_split(labels, test_share=0.2, groups=technologies, **options)
    assert pd.crosstab(labels, split).to_numpy().min() >= 1
