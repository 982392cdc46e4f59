"""Names of treatments: what they say, what they set in a study, and how a wrong one is refused."""

import pytest

from tuneformer.study import grid, treatments
from tuneformer.study.params import ParameterError, load_study


@pytest.mark.parametrize(
    ("name", "strategy", "keys"),
    [
        ("full", "full", {}),
        ("lp_ft", "lp_ft", {}),
        ("majority", "majority", {}),
        ("selective_freeze0", "selective", {"freeze_layers": 0}),
        ("full_balanced_softmax", "full", {"loss": "balanced_softmax"}),
        ("full_balanced", "full", {"sampling": "balanced"}),
        ("full_weighted_balanced", "full", {"loss": "weighted", "sampling": "balanced"}),
        ("full_batch128", "full", {"batch_size": 128}),
        (
            "selective_freeze4_batch64_focal_upsampled",
            "selective",
            {"freeze_layers": 4, "batch_size": 64, "loss": "focal", "sampling": "upsampled"},
        ),
        ("gradual_last_to_first_dice", "gradual_last_to_first", {"loss": "dice"}),
    ],
)
def test_a_name_says_strategy_and_keys(name, strategy, keys):
    said = treatments.parse(name)
    assert (said.strategy, said.keys) == (strategy, keys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ful_focal", "'ful_focal' is no strategy"),
        ("full_focal_batch8", "the form is <strategy>"),
        ("full_freeze2", "only selective freezes layers; write selective_freeze2"),
        ("full_batch0", "a batch needs at least one cell"),
        ("majority_focal", "is no strategy"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        treatments.parse(name)


def test_the_name_replaces_what_the_study_says():
    run = load_study("tiny", strategy="selective_freeze1_batch4_focal")
    assert (run.strategy, run.base_strategy) == ("selective_freeze1_batch4_focal", "selective")
    assert (run.freeze_layers, run.batch_size, run.loss, run.sampling) == (1, 4, "focal", "all")
    plain = load_study("tiny")
    with pytest.raises(ParameterError, match="full would inherit what selective_freeze1_batch4_focal sets"):
        run.treated("full")
    assert plain.treated("selective_freeze1_batch4_focal").freeze_layers == run.freeze_layers


def test_the_learning_rate_of_a_name_goes_before_that_of_its_strategy():
    rates = {"selective": 0.5, "selective_focal": 0.25}
    of = {name: load_study("tiny", strategy=name, learning_rates=rates) for name in ("full", "selective_dice")}
    assert of["full"].peak_learning_rate == load_study("tiny").learning_rate
    assert of["selective_dice"].peak_learning_rate == 0.5
    assert load_study("tiny", strategy="selective_focal", learning_rates=rates).peak_learning_rate == 0.25


@pytest.mark.parametrize("key", ["strategies", "learning_rates"])
def test_a_baseline_is_no_strategy_of_a_grid(key):
    value = ["full", "majority"] if key == "strategies" else {"majority": 0.1}
    with pytest.raises(ParameterError, match=f"{key}: majority is a baseline; name it in baselines"):
        load_study("tiny", **{key: value})


def test_folds_are_a_side_of_the_grid(monkeypatch):
    whole = grid.load_study
    monkeypatch.setattr(grid, "load_study", lambda name, **changes: whole(name, folds=3, **changes))
    runs = grid.runs("tiny")
    assert len(runs) == 3 * 2 * 2
    assert [run.fold for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert grid.describe(runs[-1]) == "drug_5class fold 2 single_cell linear_probe seed 1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 1}, "folds: one fold leaves nothing to train on"),
        ({"folds": 3, "fold": 3}, "fold: it has to be from 0 to 2"),
        ({"fold": 0}, "fold: it has to be null, as folds is 0"),
    ],
)
def test_a_fold_that_is_none_is_refused(changes, message):
    with pytest.raises(ParameterError, match=message):
        load_study("tiny", **changes)


def test_a_study_with_folds_without_one_is_its_first():
    assert load_study("tiny", folds=4).fold == 0
