"""Train sets as runs meet them: real test cells, made of no test cell, the same for a seed, and refused plainly."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.cells import make
from tuneformer.cells.pseudobulk import SEPARATOR, strata
from tuneformer.data import qc
from tuneformer.evaluate import leakage
from tuneformer.model import fit
from tuneformer.tokens import encode

POINTS = {"train_set": "pseudobulk", "k": 5}
PADDED = {"train_set": "mixture", "padded_classes": ["BMS", "Untreated"]}
MADE = {
    "one cell": {**POINTS, "aggregation": "one_cell"},
    "sum": POINTS,
    "mean": {**POINTS, "aggregation": "mean"},
    "thinned": {**POINTS, "depth": "single_cell"},
    "capped": {**POINTS, "token_length": "single_cell"},
    "real validation": {**POINTS, "validation_cells": "real"},
    "steps": {**POINTS, "steps_of": "single_cell"},
    "sharing": {**POINTS, "points": "single_cell"},
    "sharing, few steps": {**POINTS, "points": "single_cell", "depth": "single_cell", "steps_of": "pseudobulk"},
    "nb": {"train_set": "synthetic", "generator": "nb"},
    "untreated": {"train_set": "synthetic", "generator": "gaussian", "variances": "untreated"},
    "copies": {**PADDED, "generator": "copies", "pad": 20},
    "padded": {**PADDED, "generator": "nb", "pad": 20},
    "share": {"train_set": "mixture", "generator": "nb", "share": 0.5},
    "bulk": {"train_set": "bulk", "bulk_counts": "demo"},
    "around bulk": {"train_set": "synthetic", "generator": "nb", "means": "bulk", "bulk_counts": "demo"},
}
SINGLE = {
    "single cells": {},
    "few": {"cells_per_class": 10},
    "fewer steps": {"k": 5, "steps_of": "pseudobulk"},
}


def make_cells(settings, cells):
    with tempfile.TemporaryDirectory() as folder:
        made, *rest = make.make_cells(settings, cells, Path(folder))
        return made[:].to_memory(), *rest


def part(cells, *names):
    return cells[cells.obs["split"].isin(names).to_numpy()]


def member_names(cells):
    return [names.split(SEPARATOR) for names in cells.obs["member_names"]]


def members(cells):
    names = cells.obs.get("member_names", cells.obs_names)
    return set(SEPARATOR.join(names).split(SEPARATOR)) - {""}


@pytest.mark.parametrize("name", [*SINGLE, *MADE])
def test_the_test_cells_are_the_real_ones_and_nothing_is_made_of_them(name, demo_cells, made_settings):
    settings = made_settings(**(SINGLE | MADE)[name])
    prepared = make.prepare(settings)
    leakage.refuse_leaks(prepared, settings)
    cells, table = prepared.cells, prepared.tokens.dataset.remove_columns("input_ids").to_pandas()
    real, test = part(demo_cells, "test"), part(cells, "test")
    assert list(test.obs_names) == list(real.obs_names)
    assert (test.X != real.X).nnz == 0
    assert list(test.obs["label"]) == list(real.obs["label"])
    learnable = set(part(demo_cells, "train", "validation").obs_names)
    assert set(prepared.tokens.sources) <= learnable
    assert members(part(cells, "train", "validation")) <= learnable
    if name not in SINGLE:
        assert members(part(cells, "train")) <= set(prepared.tokens.sources)
    assert cells.obs_names.is_unique
    assert (cells.obs["label"].cat.categories == demo_cells.obs["label"].cat.categories).all()
    assert (pd.crosstab(cells.obs["label"], cells.obs["split"])[["train", "validation"]] > 0).all(axis=None)
    for column in ("label", "split"):  # cells and tokens correspond row by row
        assert list(table[column]) == list(cells.obs[column])
    assert list(table["cell"]) == list(cells.obs_names)
    assert prepared.tokens.classes == list(demo_cells.obs["label"].cat.categories)


@pytest.mark.parametrize("name", ["few", *MADE])
def test_a_seed_gives_the_same_cells_and_another_seed_others(name, demo_cells, made_settings):
    def draw(seed):
        settings = made_settings(**(SINGLE | MADE)[name], seed=seed, train_cells=1500)
        return make.prepare(settings).cells if name in SINGLE else make_cells(settings, demo_cells)[0]

    first, again, other = map(draw, (0, 0, 1))
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    assert list(first.obs["split"]) != list(other.obs["split"]) or (first.X != other.X).nnz > 0


def test_single_cells_are_taken_as_they_are(demo_cells, made_settings):
    prepared = make.prepare(made_settings())
    assert (prepared.cells.X != demo_cells.X).nnz == 0
    pd.testing.assert_frame_equal(prepared.cells.obs, demo_cells.obs)
    assert (prepared.tokens.step_cells, prepared.tokens.sources) == (None, [])


def test_the_controls_of_a_pseudobulk_differ_from_it_in_one_thing(demo_cells, made_settings):
    points, thinned, singles = (
        part(make_cells(made_settings(**MADE[name]), demo_cells)[0], "train", "validation")
        for name in ("sum", "thinned", "one cell")
    )
    for control in (thinned, singles):  # as many points, of the same classes and parts, of the same groups
        for column in ("label", "split"):
            assert list(control.obs[column]) == list(points.obs[column])
    assert all(one in group for (one,), group in zip(member_names(singles), member_names(points), strict=True))
    depth, shallow, single = (np.median(cells.obs["n_counts"]) for cells in (points, thinned, singles))
    assert depth > 4 * single
    assert shallow == pytest.approx(single, rel=0.03)


def test_points_that_share_cells_are_as_many_as_single_cells(demo_cells, made_settings):
    made, step_cells, sources = make_cells(made_settings(**MADE["sharing"]), demo_cells)
    few = make_cells(made_settings(**MADE["sharing, few steps"]), demo_cells)
    for name in ("train", "validation"):
        points, singles = part(made, name), part(demo_cells, name)
        assert points.obs["label"].value_counts().to_dict() == singles.obs["label"].value_counts().to_dict()
        assert members(points) == set(singles.obs_names)  # of training cells, or of validation cells, and of all
    thinned, singles = part(few[0], "train"), part(demo_cells, "train")
    assert np.median(thinned.obs["n_counts"]) == pytest.approx(np.median(singles.obs["n_counts"]), rel=0.03)
    assert set(sources) == set(part(demo_cells, "train", "validation").obs_names)
    own = make_cells(made_settings(**POINTS), demo_cells)[0]
    assert (step_cells, few[1]) == (None, (own.obs["split"] == "train").sum())


def test_few_cells_of_each_class(demo_cells, made_settings):
    obs = make.prepare(made_settings(cells_per_class=16)).cells.obs
    table = pd.crosstab(obs["label"], obs["split"])
    assert (table["train"] == 16).all()
    assert (table["validation"] == 2).all()
    assert make.prepare(made_settings(cells_per_class=100_000)).cells.n_obs == demo_cells.n_obs


def test_train_cells_are_the_same_for_every_train_set(demo_cells, made_settings):
    changes = {"train_cells": 1500, "seed": 3}
    singles = make.prepare(made_settings(**changes)).cells
    sources = make_cells(made_settings(**MADE["nb"], **changes), demo_cells)[2]
    assert (singles.obs["split"] == "train").sum() == 1500
    assert set(sources) == set(part(singles, "train", "validation").obs_names)
    with pytest.raises(UserError, match="train_cells: 3 is less than one for each of 5 classes"):
        make.prepare(made_settings(train_cells=3))


def test_steps_are_counted_by_the_other_side(demo_cells, made_settings):
    few, points, steps = (
        make.prepare(made_settings(**keys)) for keys in (SINGLE["fewer steps"], POINTS, MADE["steps"])
    )
    n_train = (demo_cells.obs["split"] == "train").sum()
    assert (few.cells.obs["split"] == "train").sum() == n_train == steps.tokens.step_cells
    assert few.tokens.step_cells == (points.cells.obs["split"] == "train").sum()
    settings = made_settings(**MADE["steps"], batch_size=10, epochs=3)
    assert fit.optimizer_steps(settings, steps.tokens.step_cells) == 3 * -(-n_train // 10)


def test_real_validation_cells_are_beside_the_points_which_are_made_of_training_cells(demo_cells, made_settings):
    made, _, sources = make_cells(made_settings(**MADE["real validation"]), demo_cells)
    held, real = part(made, "validation"), part(demo_cells, "validation")
    assert set(real.obs_names) < set(held.obs_names)
    assert not members(held[~held.obs_names.isin(real.obs_names)]) & set(real.obs_names)
    assert set(sources) == set(part(demo_cells, "train").obs_names)


def test_a_share_is_synthetic_in_every_stratum(demo_cells, made_settings):
    made, _, sources = make_cells(made_settings(train_set="mixture", generator="nb", share=0.4), demo_cells)
    train, real = part(made, "train"), part(demo_cells, "train")
    assert train.n_obs == real.n_obs
    whole = strata(real, "dose")
    kept = whole[train.obs_names[train.obs_names.isin(real.obs_names)]].value_counts()
    assert (abs(0.6 * whole.value_counts() - kept) <= 0.5).all()
    assert list(part(made, "validation").obs_names) == list(part(demo_cells, "validation").obs_names)
    assert set(sources) == set(real.obs_names)  # nothing of the validation cells


@pytest.mark.parametrize("generator", ["copies", "nb"])
def test_padding_adds_cells_to_the_padded_classes_only(generator, demo_cells, made_settings):
    made = make_cells(made_settings(**PADDED, generator=generator, pad=21), demo_cells)[0]
    train, real = part(made, "train"), part(demo_cells, "train")
    more = train.obs["label"].value_counts() - real.obs["label"].value_counts()
    assert more.to_dict() == {"Untreated": 21, "Nutlin": 0, "Dex": 0, "BMS": 21, "SAHA": 0}
    new = train[~train.obs_names.isin(real.obs_names)]
    if generator == "copies":  # three for each of the seven doses of BMS
        doses = real.obs.loc[new.obs["member_names"][(new.obs["label"] == "BMS").to_numpy()], "dose"]
        assert doses.value_counts().to_dict() == dict.fromkeys(doses.unique(), 3)
        assert (new.X != real[new.obs["member_names"].to_list()].X).nnz == 0
    else:
        assert set(new.obs["member_names"]) == {""}


def test_cells_around_bulk_samples_look_at_untreated_cells_only(demo_cells, made_settings):
    made, _, sources = make_cells(made_settings(**MADE["around bulk"]), demo_cells)
    learnable = part(demo_cells, "train", "validation")
    assert set(sources) == set(learnable.obs_names[learnable.obs["label"] == "Untreated"])
    numbers = part(made, "train", "validation").obs["label"].value_counts()
    assert numbers.to_dict() == learnable.obs["label"].value_counts().to_dict()
    few = make_cells(made_settings(**MADE["around bulk"], synthetic_cells=3), demo_cells)[0]
    doses = demo_cells.obs.groupby("label", observed=True)["dose"].nunique()
    numbers = part(few, "train", "validation").obs["label"].value_counts()
    assert numbers.to_dict() == (3 * doses).to_dict()


def test_made_cells_are_stored_and_read_the_second_time(made_settings, monkeypatch):
    settings = made_settings(**{**POINTS, "k": 25})
    made, other = make.prepare(settings), make.prepare(settings.at(seed=1))
    assert made.tokens.key != other.tokens.key
    monkeypatch.delattr(qc, "prepare_cells")
    again = make.prepare(settings)
    assert again.tokens.dataset.to_dict() == made.tokens.dataset.to_dict()
    assert again.tokens.sources == made.tokens.sources
    pd.testing.assert_frame_equal(again.cells.obs, made.cells.obs)


def test_means_keep_their_precision_on_disk(made_settings):
    made, summed = (make.prepare(made_settings(**MADE[name])).cells for name in ("mean", "sum"))
    assert made.X.dtype == np.float64
    points = part(made, "train", "validation")
    whole = points.X.multiply(points.obs["members"].to_numpy()[:, None])
    np.testing.assert_allclose(whole.data, np.rint(whole.data), rtol=1e-12)
    assert summed.X.dtype == np.float32


def test_capped_lists_are_as_long_as_those_of_single_cells(demo_cells, made_settings, monkeypatch):
    monkeypatch.setattr(encode, "task_length", lambda _: 2000)  # longer than any list, as in a real checkpoint
    prepared = make.prepare(made_settings(**{**POINTS, "k": 25}, token_length="single_cell"))
    table = prepared.tokens.dataset.remove_columns("input_ids").to_pandas()
    vocabulary = prepared.tokens.vocabulary
    lengths = pd.Series(encode.encode(part(demo_cells, "train"), vocabulary, max_length=vocabulary.size)["length"][:])
    cut = table.loc[table["split"] != "test", "length"]
    assert cut.max() == int(lengths.median())
    assert (cut == cut.max()).mean() > 0.8  # a small stratum is one point of few cells, which may have a shorter list
    assert table.loc[table["split"] == "test", "length"].max() > lengths.median()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {**POINTS, "k": 100, "train_cells": 60, "dose_column": None},
            r"class '\w+' has 1 points, and training and validation need one each; choose a smaller k",
        ),
        ({**MADE["padded"], "padded_classes": ["BMX"]}, r"padded_classes: class 'BMX' is not .* Did you mean BMS\?"),
        ({**MADE["untreated"], "untreated_class": "DMSO"}, "untreated_class: class 'DMSO' is not one of Untreated, "),
    ],
)
def test_what_cannot_be_made_is_refused(changes, sentence, demo_cells, made_settings):
    with pytest.raises(UserError, match=sentence):
        make_cells(made_settings(**changes), demo_cells)
