"""Arms: templates with braces, keys that are read or refused, names that say what they mean, and contrasts."""

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneformer import paths
from tuneformer.arms import expand, expand_contrasts
from tuneformer.artifacts import UserError
from tuneformer.keys import NAME_PATTERN
from tuneformer.study import ARM_KEYS, BASELINES, GENE_BASELINES, NAMED, STRATEGIES, load_study


def expanded(templates):
    return expand(templates, "params/mine.yaml", ARM_KEYS, NAMED["cells"])


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Load a study ``mine`` with these arms, and keys of the study itself."""
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    (tmp_path / "mine.yaml").write_text("label: treatment\n")

    def loaded(arms, **keys):
        study = load_study("mine", arms=arms, **keys)
        return {arm: study.with_arm(arm) for arm in study.arms}

    return loaded


def test_braces_make_the_product_of_the_lists():
    template = {
        "pseudobulk_k{k}_{aggregation}": {"train_set": "pseudobulk", "k": [2, 25], "aggregation": ["sum", "mean"]}
    }
    assert expanded(template) == {
        f"pseudobulk_k{k}_{how}": {"train_set": "pseudobulk", "k": k, "aggregation": how}
        for k, how in product([2, 25], ["sum", "mean"])
    }  # fmt: skip


@pytest.mark.parametrize(
    ("templates", "arms"),
    [
        ({"lora": None}, {"lora": {"strategy": "lora"}}),
        ({"lora": {"lora_rank": 4}}, {"lora": {"strategy": "lora", "lora_rank": 4}}),
        ({"knn_pca": None}, {"knn_pca": {"strategy": "knn_pca"}}),
        ({"{loss}": {"loss": ["focal", "dice"]}}, {"focal": {"loss": "focal"}, "dice": {"loss": "dice"}}),
        ({"{strategy}": {"strategy": ["full", "lora"]}}, {name: {"strategy": name} for name in ("full", "lora")}),
        ({"full_lr{learning_rate}": {"learning_rate": [2e-4, 6.7e-4, 0.02]}},
         {f"full_lr{text}": {"learning_rate": float(text)} for text in ("0.0002", "0.00067", "0.02")}),
        ({"batch{batch_size}": {"batch_size": 4}}, {"batch4": {"batch_size": 4}}),  # one value
        ({"pad": {"padded_classes": ["BMS", "Dex"], "pad": 5}}, {"pad": {"padded_classes": ["BMS", "Dex"], "pad": 5}}),
        ({3: {"loss": "dice"}}, {"3": {"loss": "dice"}}),
    ],
)  # fmt: skip
def test_an_arm_is_a_name_and_the_keys_that_differ(templates, arms):
    assert expanded(templates) == arms


@given(
    st.dictionaries(
        st.sampled_from(["k", "batch_size", "epochs", "lora_rank"]),
        st.lists(st.integers(2, 10**6), min_size=1, max_size=4, unique=True),
        min_size=1,
    )
)
def test_a_template_gives_each_combination_one_name(lists):
    arms = expanded({"-".join(["x", *(f"{{{key}}}" for key in lists)]): lists})
    assert sorted(arms.values(), key=str) == sorted(
        (dict(zip(lists, values, strict=True)) for values in product(*lists.values())), key=str
    )
    assert all(re.fullmatch(NAME_PATTERN, name) for name in arms)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({}, "arms: write one `name: {key: value}` per arm; there is none"),
        (["full"], "arms: write one"),
        ({"full": "lora"}, r"arm full: write the keys that differ as \{key: value\} \(it is 'lora'\)"),
        ({"full": {"epoch": 3}}, "arm full: unknown key 'epoch'; the nearest valid key is 'epochs'"),
        ({"k{kk}": {"k": 3}}, "unknown key 'kk'; the nearest valid key is 'k'"),
        ({"a{}": None}, "unknown key ''"),
        ({"k": {"k": [2, 5]}}, r"arm k: k lists 2 values, so the name has to hold \{k\}"),
        ({"x{k}": {"k": []}}, r"arm x\{k\}: the name has \{k\}, so k needs a value or a list of them"),
        ({"x{k}": {"loss": "dice"}}, r"arm x\{k\}: the name has \{k\}, so k needs a value"),
        ({"x{k}": {"k": [2, 2]}}, "the arm 'x2' is there already"),
        ({"x{k}": {"k": [2]}, "x2": None}, "the arm 'x2' is there already"),
        ({"a b": None}, "'a b' is not a name"),
        ({"../a": None}, "is not a name"),
        ({"x{k": {"k": 2}}, "is not a name"),
        ({"x" * 65: None}, "is not a name"),
        ({"{loss}": {"loss": ["a/b"]}}, "'a/b' is not a name"),
        ({"tokens": None}, "another folder .* has the name 'tokens'"),
        ({"frozen": None}, "another folder .* has the name 'frozen'"),
        ({"x": {"strategy": "ful"}}, "arm x: strategy 'ful' is not one of .*Did you mean full"),
        ({"x": {"strategy": "expression"}}, "strategy 'expression' is not one of"),  # of another kind of study
    ],
)
def test_an_arm_that_cannot_be_is_one_clear_sentence(templates, message):
    with pytest.raises(UserError, match=message) as caught:
        expanded(templates)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("params/mine.yaml: arm")


@pytest.mark.parametrize(
    "key", ["dataset", "label", "test_share", "split_seed", "folds", "seeds", "device", "gene_folds"]
)
def test_all_arms_share_cells_split_and_seeds(key):
    with pytest.raises(UserError, match=f"arm full: all arms of a study share {key}"):
        expanded({"full": {key: 1}})


@pytest.mark.parametrize(
    ("arm", "keys", "message"),
    [
        ("full", {"freeze_layers": 1}, "freeze_layers needs strategy: selective, and this arm has full"),
        ("lora", {"freeze_embeddings": True}, "freeze_embeddings needs strategy: selective"),
        ("full", {"head_share": 0.1}, "head_share needs strategy: lp_ft"),
        ("full", {"layer_decay": 0.1}, "layer_decay needs strategy: layerwise_lr_decay"),
        ("full", {"lora_rank": 4}, "lora_rank needs strategy: lora"),
        ("full", {"loss": "dice", "focal_gamma": 1.0}, "focal_gamma needs loss: focal, and this arm has dice"),
        ("knn_pca", {"loss": "focal"}, "loss is for fine-tuning, and knn_pca is a baseline"),
        ("majority", {"learning_rate": 0.1}, "learning_rate is for fine-tuning"),
        ("majority", {"k": 5, "steps_of": "pseudobulk"}, "steps_of is for fine-tuning"),
        ("x", {"train_set": "synthetic", "k": 5}, "k needs train_set: pseudobulk or single_cell"),
        ("x", {"k": 5}, "arm x: k: single cells are in no groups"),
        ("x", {"train_set": "pseudobulk"}, "train_set: .*|k: pseudo-bulk needs the mean number of cells"),
        ("x", {"train_set": "pseudobulk", "k": 1}, "k: Input should be greater than or equal to 2"),
        ("x", {"train_set": "pseudobulk", "k": 5, "cells_per_class": 3}, "cells_per_class needs train_set: single_"),
        ("x", {"aggregation": "mean"}, "aggregation needs train_set: pseudobulk"),
        ("x", {"train_set": "pseudobulk", "k": 5, "aggregation": "median"}, "aggregation: Input should be 'sum'"),
        ("x", {"train_set": "pseudobulk", "k": 5, "aggregation": "mean", "depth": "single_cell"},
         "depth: only sums are counts that can be thinned"),
        ("x", {"train_set": "pseudobulk", "k": 5, "steps_of": "pseudobulk"}, "steps_of: these are its own steps"),
        ("x", {"generator": "nb"}, "generator needs train_set: mixture or synthetic"),
        ("x", {"train_set": "synthetic", "generator": "vae"}, "generator: Input should be 'gaussian'"),
        ("x", {"train_set": "synthetic", "generator": "copies"}, "generator: copies can pad a mixture"),
        ("x", {"train_set": "mixture", "generator": "copies", "share": 0.5}, "generator: copies can pad a mixture"),
        ("x", {"train_set": "mixture"}, "a mixture needs either pad"),
        ("x", {"train_set": "mixture", "pad": 5, "share": 0.5, "padded_classes": ["a"]}, "pad: a mixture needs either"),
        ("x", {"train_set": "mixture", "pad": 0}, "pad: Input should be greater than 0"),
        ("x", {"train_set": "mixture", "share": 1.0}, "share: Input should be less than 1"),
        ("x", {"train_set": "mixture", "pad": 5}, "padded_classes: pad needs the classes to pad"),
        ("x", {"means": "bulk"}, "means needs train_set: synthetic|means: only synthetic cells"),
        ("x", {"train_set": "synthetic", "means": "bulk"}, "bulk_counts: the samples are needed"),
        ("x", {"train_set": "bulk"}, "bulk_counts: the samples are needed"),
        ("x", {"train_set": "bulks"}, "train_set: Input should be 'single_cell'"),
    ],
)  # fmt: skip
def test_an_arm_that_sets_what_it_does_not_read_is_refused(loaded, arm, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        loaded({arm: keys})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arms", "keys"),
    [
        ({"selective": {"freeze_layers": 1}, "full": None}, {}),
        ({"full": None, "selective": None}, {"freeze_layers": 1}),  # of the study, for the arms that read it
        ({"x": {"loss": "focal", "focal_gamma": 1.0}}, {}),
        ({"x": {"train_set": "pseudobulk", "k": 5}, "single_cell": None}, {"group_spread": 0.1}),
        ({"x": {"train_set": "pseudobulk", "k": 5, "depth": "single_cell", "token_length": "single_cell",
                "validation_cells": "real", "steps_of": "single_cell"}}, {}),
        ({"x": {"k": 5, "steps_of": "pseudobulk"}}, {}),
        ({"majority": {"train_set": "pseudobulk", "k": 5}}, {}),
        ({"majority": {"cells_per_class": 5}, "linear_probe": {"max_length": 64, "vocabulary": "fit"}}, {}),
        ({"x": {"train_set": "mixture", "generator": "copies", "pad": 5}}, {"padded_classes": ["a"]}),
        ({"x": {"train_set": "synthetic", "means": "bulk", "variances": "untreated"}}, {"bulk_counts": "demo"}),
    ],
)  # fmt: skip
def test_an_arm_may_set_what_it_reads(loaded, arms, keys):
    assert list(loaded(arms, **keys)) == list(arms)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("random_init_focal", {"loss": "focal"}, "random_init"),  # or the control would be pre-trained
        ("focal_random_init", {"loss": "focal"}, "random_init"),
        ("random_init", {"strategy": "full"}, "random_init"),
        ("lora_r4", {}, "lora"),
        ("full_batch4", {"strategy": "lora"}, "full"),
        ("frozen_embedding_ridge_2", {"strategy": "majority"}, "frozen_embedding_ridge"),
        ("majority-2", {}, "majority"),
    ],
)
def test_a_name_that_says_another_strategy_is_refused(loaded, name, keys, said):
    with pytest.raises(UserError, match=f"arm {name}: the name says {said}, and the strategy is "):
        loaded({name: keys})
    arms = loaded({name: {**keys, "strategy": said}})
    assert arms[name].strategy == said
    assert arms[name].is_control == (said == "random_init")


def test_every_strategy_and_baseline_is_an_arm_by_its_name_alone(loaded):
    for kind, names in NAMED.items():
        arms = loaded(dict.fromkeys(names), kind=kind)
        assert {arm: settings.strategy for arm, settings in arms.items()} == {name: name for name in names}
    assert {*NAMED["cells"], *NAMED["genes"]} == {*STRATEGIES, *BASELINES, *GENE_BASELINES}


ARMS = expanded(
    {
        "single_cell": None,
        "pseudobulk_k{k}_{aggregation}": {"train_set": "pseudobulk", "k": [2, 10], "aggregation": ["sum", "mean"]},
        "steps_k{k}": {"k": [2, 5, 10], "steps_of": "pseudobulk"},
        "lr{learning_rate}": {"learning_rate": [0.001]},
    }
)


@pytest.mark.parametrize(
    ("name", "pair", "expected"),
    [
        ("fall", ["single_cell", "steps_k5"], [("fall", "single_cell", "steps_k5")]),
        (
            "steps",
            ["single_cell", "steps_k{k}"],
            [(f"steps, k = {k}", "single_cell", f"steps_k{k}") for k in (2, 5, 10)],
        ),
        (  # the same k on both sides
            "points",
            ["steps_k{k}", "pseudobulk_k{k}_sum"],
            [(f"points, k = {k}", f"steps_k{k}", f"pseudobulk_k{k}_sum") for k in (2, 10)],
        ),
        (
            "mean, {k} cells",
            ["pseudobulk_k{k}_sum", "pseudobulk_k{k}_mean"],
            [(f"mean, {k} cells", f"pseudobulk_k{k}_sum", f"pseudobulk_k{k}_mean") for k in (2, 10)],
        ),
        (
            "{k} cells",
            ["single_cell", "pseudobulk_k{k}_{aggregation}"],
            [
                (f"{k} cells, aggregation = {how}", "single_cell", f"pseudobulk_k{k}_{how}")
                for k in (2, 10)
                for how in ("sum", "mean")
            ],
        ),
        (  # not with itself
            "how",
            ["pseudobulk_k2_sum", "pseudobulk_k2_{aggregation}"],
            [("how", "pseudobulk_k2_sum", "pseudobulk_k2_mean")],
        ),
        ("rate", ["single_cell", "lr{learning_rate}"], [("rate", "single_cell", "lr0.001")]),
    ],
)  # fmt: skip
def test_contrasts_pair_arms_with_the_same_values(name, pair, expected):
    assert expand_contrasts({name: pair}, ARMS, "mine.yaml") == expected


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("x", ["single_cel", "steps_k5"], "arm 'single_cel' is not one of .*Did you mean single_cell"),
        ("x", ["single_cell", "stepz_k{k}"], r"arm 'stepz_k\{k\}' is not one of"),
        ("x", ["single_cell"], r"write \[reference, arm\] \(it has 1 names\)"),
        (
            "x",
            ["single_cell", "single_cell"],
            "single_cell and single_cell have no pair of different arms with the same",
        ),
        ("x {loss}", ["single_cell", "steps_k5"], r"neither of its arms has \{loss\} in the name"),
    ],
)
def test_a_contrast_that_cannot_be_is_refused(name, pair, message):
    with pytest.raises(UserError, match=f"mine.yaml: contrast '{re.escape(name)}': {message}"):
        expand_contrasts({name: pair}, ARMS, "mine.yaml")
