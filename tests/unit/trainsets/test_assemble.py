"""Train sets as runs meet them: real test cells, made of no test cell, the same for a seed, and refused plainly."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.data import preprocessing
from tuneformer.data.readers import CellsError
from tuneformer.finetune import training
from tuneformer.tokens import tokenizer
from tuneformer.trainsets import assemble
from tuneformer.trainsets.pseudobulk import SEPARATOR
from tuneformer.trainsets.strata import TrainSetError, strata

MADE = [
    "single_cell_n10",
    "single_cell_k5",
    "single_cell_k5_steps",
    "pseudobulk_k5_sum",
    "pseudobulk_k5_mean",
    "pseudobulk_k5_sum_thinned",
    "pseudobulk_k5_sum_capped",
    "pseudobulk_k5_sum_boosted",
    "pseudobulk_k5_sum_steps",
    "synthetic_nb",
    "synthetic_gaussian_untreated",
    "mixture_copies_pad20",
    "mixture_nb_pad20",
    "mixture_nb_share50",
]


def part(cells, name):
    return cells[(cells.obs["split"] == name).to_numpy()]


def members(cells):
    names = cells.obs.get("member_names", pd.Series(cells.obs_names))
    return {name for text in names for name in text.split(SEPARATOR) if name}


@pytest.mark.parametrize("name", MADE)
def test_the_test_cells_are_the_real_ones_and_nothing_is_made_of_them(name, demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings(name), demo_cells)
    real, test = part(demo_cells, "test"), part(made.cells, "test")
    assert list(test.obs_names) == list(real.obs_names)
    assert (test.X != real.X).nnz == 0
    assert list(test.obs["label"]) == list(real.obs["label"])
    learnt_from = demo_cells[~demo_cells.obs_names.isin(real.obs_names)]
    assert set(made.sources) <= set(learnt_from.obs_names)
    assert members(made.cells[(made.cells.obs["split"] != "test").to_numpy()]) <= set(made.sources) | set(
        part(demo_cells, "validation").obs_names
    )
    assert made.cells.obs_names.is_unique
    assert (made.cells.obs["label"].cat.categories == demo_cells.obs["label"].cat.categories).all()
    table = pd.crosstab(made.cells.obs["label"], made.cells.obs["split"])
    assert (table[["train", "validation"]] > 0).all(axis=None)


@pytest.mark.parametrize("name", MADE)
def test_a_seed_makes_the_same_cells_and_another_seed_others(name, demo_cells, made_settings):
    first, again, other = (
        assemble.make_train_cells(made_settings(name, seed=seed, train_cells=1500), demo_cells).cells
        for seed in (0, 0, 1)
    )
    assert (first.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    assert first.shape != other.shape or (first.X != other.X).nnz > 0


def test_single_cells_are_taken_as_they_are(demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings("single_cell"), demo_cells)
    assert made.cells is demo_cells
    assert (made.step_cells, made.sources) == (None, [])


def test_the_controls_of_a_pseudobulk_differ_from_it_in_one_thing(demo_cells, made_settings):
    names = ["pseudobulk_k5_sum", "pseudobulk_k5_sum_thinned", "single_cell_k5"]
    points, thinned, singles = (assemble.make_train_cells(made_settings(name), demo_cells) for name in names)
    for control in (thinned, singles):  # as many points, of the same classes and parts, of the same groups
        for column in ("label", "split"):
            assert list(control.cells.obs[column]) == list(points.cells.obs[column])
    learning = (points.cells.obs["split"] != "test").to_numpy()
    of_points = points.cells.obs["member_names"][learning].str.split(SEPARATOR)
    of_singles = singles.cells.obs["member_names"][learning]
    assert all(one in group for one, group in zip(of_singles, of_points, strict=True))
    depth = {
        name: np.median(made.cells.obs["n_counts"][learning])
        for name, made in zip(names, (points, thinned, singles), strict=True)
    }
    assert depth["pseudobulk_k5_sum"] > 4 * depth["single_cell_k5"]
    assert depth["pseudobulk_k5_sum_thinned"] == pytest.approx(depth["single_cell_k5"], rel=0.03)


def test_few_cells_of_each_class(demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings("single_cell_n16"), demo_cells)
    table = pd.crosstab(made.cells.obs["label"], made.cells.obs["split"])
    assert (table["train"] == 16).all()
    assert (table["validation"] == 2).all()
    everything = assemble.make_train_cells(made_settings("single_cell_n100000"), demo_cells)
    assert everything.cells.n_obs == demo_cells.n_obs


def test_a_run_takes_a_smallest_number_of_steps(demo_cells, made_settings):
    settings = made_settings("single_cell_n10", batch_size=12, epochs=6, min_steps=150)
    tokens = assemble.prepare_tokens(settings)
    assert training.optimizer_steps(settings, tokens, 50) == 150
    assert training.optimizer_steps(settings.model_copy(update={"min_steps": 0}), tokens, 50) == 5 * 6
    assert training.optimizer_steps(settings.model_copy(update={"min_steps": 8}), tokens, 1) == 12  # two in each epoch


def test_steps_are_counted_by_the_other_side(demo_cells, made_settings):
    settings = made_settings("pseudobulk_k5_sum_steps", batch_size=10, epochs=3)
    tokens = assemble.prepare_tokens(settings)
    n_train = (demo_cells.obs["split"] == "train").sum()
    n_points = len(training.draw_cells(settings, tokens)["train"])
    assert training.optimizer_steps(settings, tokens, n_points) == 3 * -(-n_train // 10)
    few = made_settings("single_cell_k5_steps", batch_size=10, epochs=3)
    tokens = assemble.prepare_tokens(few)
    drawn = training.draw_cells(few, tokens)
    assert len(drawn["train"]) == n_train
    points = assemble.prepare_tokens(made_settings("pseudobulk_k5_sum"))
    n_points = len(training.draw_cells(made_settings("pseudobulk_k5_sum"), points)["train"])
    assert training.optimizer_steps(few, tokens, n_train) == 3 * -(-n_points // 10)


def test_a_boosted_validation_set_has_the_real_cells_beside_the_points(demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings("pseudobulk_k5_sum_boosted"), demo_cells)
    held, real = part(made.cells, "validation"), part(demo_cells, "validation")
    assert set(real.obs_names) < set(held.obs_names)
    assert not members(held[~held.obs_names.isin(real.obs_names)]) & set(real.obs_names)


def test_train_cells_limit_what_is_made_and_are_those_of_single_cells(demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings("synthetic_nb", train_cells=1500, seed=3), demo_cells)
    settings = made_settings("single_cell", train_cells=1500, seed=3)
    drawn = training.draw_cells(settings, assemble.prepare_tokens(settings))
    names = demo_cells.obs_names[np.concatenate([drawn["train"], drawn["validation"]])]
    assert set(made.sources) == set(names)
    with pytest.raises(CellsError, match="train_cells: 3 is less than one for each of 5 classes"):
        assemble.make_train_cells(made_settings("synthetic_nb", train_cells=3), demo_cells)


def test_a_share_is_synthetic_in_every_stratum(demo_cells, made_settings):
    settings = made_settings("mixture_nb_share40")
    made = assemble.make_train_cells(settings, demo_cells)
    train, real = part(made.cells, "train"), part(demo_cells, "train")
    assert train.n_obs == real.n_obs
    kept = strata(real, settings)[train.obs_names[train.obs_names.isin(real.obs_names)]].value_counts()
    whole = strata(real, settings).value_counts()
    assert (abs(whole - kept - 0.4 * whole) <= 0.5).all()
    assert set(part(made.cells, "validation").obs_names) == set(part(demo_cells, "validation").obs_names)


@pytest.mark.parametrize("generator", ["copies", "nb"])
def test_padding_adds_cells_to_the_padded_classes_only(generator, demo_cells, made_settings):
    made = assemble.make_train_cells(made_settings(f"mixture_{generator}_pad21"), demo_cells)
    train, real = part(made.cells, "train"), part(demo_cells, "train")
    more = train.obs["label"].value_counts() - real.obs["label"].value_counts()
    assert more.to_dict() == {"Untreated": 21, "Nutlin": 0, "Dex": 0, "BMS": 21, "SAHA": 0}
    new = train[~train.obs_names.isin(real.obs_names)]
    if generator == "copies":  # three for each of the seven doses of BMS
        doses = real.obs.loc[new.obs["member_names"][(new.obs["label"] == "BMS").to_numpy()], "dose"]
        assert doses.value_counts().to_dict() == dict.fromkeys(doses.unique(), 3)
        originals = real[new.obs["member_names"].to_list()]
        assert (new.X != originals.X).nnz == 0
    else:
        assert set(new.obs["member_names"]) == {""}


def test_tokens_are_one_folder_a_seed_and_loaded_the_second_time(demo_cells, made_settings, monkeypatch):
    settings = made_settings("pseudobulk_k25_sum")
    made = assemble.prepare_tokens(settings)
    other = assemble.prepare_tokens(settings.model_copy(update={"seed": 1}))
    assert made.provenance["fingerprint"] != other.provenance["fingerprint"]
    monkeypatch.delattr(preprocessing, "prepare_cells")
    assert assemble.prepare_tokens(settings).dataset.to_dict() == made.dataset.to_dict()


def test_capped_lists_are_as_long_as_those_of_single_cells(demo_cells, made_settings, monkeypatch):
    monkeypatch.setattr(tokenizer, "task_length", lambda _: 2000)  # longer than any list, as in a real checkpoint
    settings = made_settings("pseudobulk_k25_sum_capped")
    made = assemble.make_train_cells(settings, demo_cells)
    vocabulary = tokenizer.task_vocabulary(settings, demo_cells)
    table = assemble.tokenize(settings, made, vocabulary).to_pandas()
    lengths = tokenizer.uncut_lengths(part(demo_cells, "train"), vocabulary)
    cut = table.loc[table["split"] != "test", "length"]
    assert cut.max() == int(lengths.median())
    assert (cut == cut.max()).mean() > 0.8  # a small stratum is one point of few cells, which may have a shorter list
    assert table.loc[table["split"] == "test", "length"].max() > lengths.median()


def test_too_few_points_are_refused(demo_cells, made_settings):
    settings = made_settings("pseudobulk_k100_sum", train_cells=60, dose_column=None)
    with pytest.raises(TrainSetError, match=r"class '\w+' has 1 points, and training and validation need one each"):
        assemble.make_train_cells(settings, demo_cells)


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("mixture_nb_pad20", {"padded_classes": []}, "padded_classes is empty; name the classes that get 20 more"),
        ("mixture_nb_pad20", {"padded_classes": ["BMX"]}, "padded_classes: 'BMX' is no class of this task"),
        ("synthetic_nb_untreated", {"untreated_class": "DMSO"}, "untreated_class: 'DMSO' is no class of this task"),
    ],
)
def test_a_class_that_is_not_there_is_refused(name, changes, sentence, demo_cells, made_settings):
    with pytest.raises(TrainSetError, match=sentence):
        assemble.make_train_cells(made_settings(name, **changes), demo_cells)
