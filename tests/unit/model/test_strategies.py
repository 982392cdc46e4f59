"""Plans of the strategies: which group learns when, at which rate, from which weights, and what that costs."""

import copy
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file

from tuneformer import study
from tuneformer.artifacts import UserError
from tuneformer.model import classifier, fit, strategies
from tuneformer.model.strategies import NEVER, STRATEGIES, Plan

BODY = ["embeddings", "layer_0", "layer_1"]
HEAD = ["pooler", "classifier"]


@pytest.fixture
def planned(run_settings, tokens):
    def build(**changes):
        settings = run_settings(**changes)
        model = classifier.build(settings, tokens.vocabulary, tokens.classes)
        return settings, model, strategies.prepare(settings, model)

    return build


def bitfit(settings, body):
    """Train the biases and the head only (Ben Zaken et al. 2022, arXiv:2106.10199)."""
    return Plan(starts=dict.fromkeys(body, NEVER), groups={"biases": r"\.bias$"})


@pytest.fixture
def with_bitfit(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "bitfit", bitfit)


def learning_by_epoch(plan, epochs):
    return [sorted(plan.learning(10 * epoch, 10 * epochs)) for epoch in range(epochs)]


def groups_of(model, plan):
    groups = {}
    for name, weight in model.named_parameters():
        groups.setdefault(plan.group_of(name), {})[name] = weight
    return groups


def test_the_strategies_are_those_that_results_are_recorded_of():
    """A study takes its names from here, and a renamed strategy would orphan the recorded results."""
    names = "full linear_probe selective lp_ft gradual_last_to_first gradual_first_to_last layerwise_lr_decay lora"
    assert list(STRATEGIES) == [*names.split(), "random_init"] == list(study.STRATEGIES)


def test_reading_a_study_does_not_import_torch():
    code = "import sys, tuneformer.model.strategies; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_says_in_one_sentence_what_it_does(strategy):
    assert STRATEGIES[strategy].__name__ == strategy
    assert len(STRATEGIES[strategy].__doc__.splitlines()) <= 2


def test_no_two_strategies_do_the_same(run_settings):
    settings = run_settings(epochs=8, layer_decay=0.5)
    plans = {name: STRATEGIES[name](settings, BODY) for name in STRATEGIES}
    for one, other in combinations(plans, 2):
        assert plans[one] != plans[other], (one, other)
    full, control = plans["full"], plans["random_init"]
    assert (full.starts, full.factors, full.groups) == (control.starts, control.factors, control.groups)
    assert [name for name, plan in plans.items() if not plan.pretrained] == ["random_init"]


KEYS_OF_AN_ARM = [
    {},
    {"arm": "pretrained_full", "loss": "focal", "sampling": "upsampled", "batch_size": 6, "freeze_layers": 2},
    {"arm": "random_init", "loss": "weighted", "learning_rate": 1e-4, "pooling": "mean", "freeze_embeddings": True},
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("keys", KEYS_OF_AN_ARM)
def test_training_begins_with_the_checkpoint_except_in_the_control(
    strategy, keys, run_settings, tokens, checkpoint, monkeypatch
):
    """Whatever an arm is called and whatever else it sets, its strategy alone decides."""
    begun = []
    monkeypatch.setattr(fit, "train", lambda settings, model, *_, **__: begun.append(copy.deepcopy(model)))
    fit.fit_cells(run_settings(strategy=strategy, **keys), tokens)
    stored, same = load_file(checkpoint / "model.safetensors"), {}
    for name, weight in begun[0].named_parameters():
        if name.startswith(classifier.BODY) and ".lora_" not in name and weight.ndim == 2:
            same[name] = torch.equal(weight, stored[name.replace("base_layer.", "")])
    assert len(same) == 3 + 2 * 6  # embeddings of genes, places and types; query, key, value, output, feed-forward
    assert set(same.values()) == {strategy != "random_init"}


@pytest.mark.parametrize("plan", [Plan(groups={"norms": "LayerNormal"}), Plan(starts={"layer_7": 0.5})])
def test_a_strategy_that_names_a_group_without_parameters_is_refused(plan, planned, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "typo", lambda settings, body: plan)
    with pytest.raises(UserError, match=r"strategy: typo names the group (norms|layer_7), but no parameter"):
        planned(strategy="typo")


@pytest.mark.parametrize("strategy", ["full", "random_init", "layerwise_lr_decay"])
def test_everything_learns_from_the_start(planned, strategy):
    _, _, plan = planned(strategy=strategy)
    assert learning_by_epoch(plan, 2) == [sorted(BODY + HEAD)] * 2


def test_linear_probe_learns_the_head_alone(planned):
    _, _, plan = planned(strategy="linear_probe")
    assert learning_by_epoch(plan, 2) == [sorted(HEAD)] * 2


@pytest.mark.parametrize(
    ("changes", "frozen_groups"),
    [
        ({"freeze_layers": 1}, {"layer_0"}),
        ({"freeze_layers": 2, "freeze_embeddings": True}, set(BODY)),
        ({"freeze_layers": 0}, set()),
    ],
)
def test_selective_freezes_the_first_layers_and_embeddings_only_when_asked(planned, changes, frozen_groups):
    _, _, plan = planned(strategy="selective", **changes)
    assert set(BODY + HEAD) - plan.learning(0, 10) == frozen_groups


def test_selective_refuses_more_layers_than_there_are(planned):
    with pytest.raises(UserError, match="freeze_layers: 3 layers, but the checkpoint has 2"):
        planned(strategy="selective", freeze_layers=3)


def test_lp_ft_has_two_phases(planned):
    _, _, plan = planned(strategy="lp_ft", epochs=4, head_share=0.5)
    assert learning_by_epoch(plan, 4) == [sorted(HEAD)] * 2 + [sorted(BODY + HEAD)] * 2
    _, _, short = planned(strategy="lp_ft", epochs=1, head_share=0.5)
    assert short.learning(4, 10) == set(HEAD)
    assert short.learning(5, 10) == {*BODY, *HEAD}


@pytest.mark.parametrize(
    ("strategy", "order"), [("gradual_last_to_first", BODY[::-1]), ("gradual_first_to_last", BODY)]
)
@pytest.mark.parametrize("epochs", [4, 8])
def test_gradual_adds_one_block_at_a_time(planned, strategy, order, epochs):
    _, _, plan = planned(strategy=strategy, epochs=epochs)
    stages = learning_by_epoch(plan, epochs)[:: epochs // 4]
    assert stages == [sorted([*HEAD, *order[:number]]) for number in range(4)]


@pytest.mark.parametrize("strategy", ["gradual_last_to_first", "gradual_first_to_last"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10])
def test_gradual_ends_with_everything_however_few_the_epochs(planned, strategy, epochs):
    _, _, plan = planned(strategy=strategy, epochs=epochs)
    n_steps = 4 * epochs
    assert plan.learning(0, n_steps) == set(HEAD)
    assert plan.learning(n_steps - 1, n_steps) == {*BODY, *HEAD}


def test_layerwise_decay_falls_from_the_head_to_the_embeddings(planned):
    settings, model, plan = planned(strategy="layerwise_lr_decay", layer_decay=0.5, learning_rate=1e-3)
    assert plan.factors == {"embeddings": 0.125, "layer_0": 0.25, "layer_1": 0.5, "pooler": 1, "classifier": 1}
    rates = {group["lr"] for group in strategies.optimizer_groups(settings, model, plan)}
    assert rates == {1e-3, 5e-4, 2.5e-4, 1.25e-4}


def test_lora_adds_updates_of_query_and_value_and_starts_where_the_model_was(planned):
    torch.manual_seed(0)
    _, plain, _ = planned(strategy="full")
    torch.manual_seed(0)
    _, model, plan = planned(strategy="lora", lora_rank=4)
    assert learning_by_epoch(plan, 1) == [sorted([*HEAD, "lora"])]
    adapters = groups_of(model, plan)["lora"]
    assert len(adapters) == 2 * 2 * 2  # layers x query, value x down, up
    assert sum(weight.numel() for weight in adapters.values()) == 2 * 2 * 2 * 4 * model.config.hidden_size
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    torch.testing.assert_close(model.eval()(**batch).logits, plain.eval()(**batch).logits)


def test_merged_adapters_leave_a_plain_model_with_the_same_predictions(planned):
    _, model, plan = planned(strategy="lora")
    for weight in groups_of(model, plan)["lora"].values():
        torch.nn.init.normal_(weight)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    before = model.eval()(**batch).logits
    strategies.merge_adapters(model)
    _, plain, _ = planned(strategy="full")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(model(**batch).logits, before)


def test_every_parameter_is_in_a_group_of_the_plan_once(planned, with_bitfit):
    for strategy in STRATEGIES:
        settings, model, plan = planned(strategy=strategy)
        groups = groups_of(model, plan)
        assert set(groups) == set(plan.starts) == set(plan.factors)
        optimized = [
            weight for group in strategies.optimizer_groups(settings, model, plan) for weight in group["params"]
        ]
        expected = sum(len(groups[name]) for name, start in plan.starts.items() if start != NEVER)
        assert len(optimized) == len({id(weight) for weight in optimized}) == expected


def test_biases_and_normalisations_do_not_decay(planned):
    settings, model, plan = planned(weight_decay=0.1)
    for group in strategies.optimizer_groups(settings, model, plan):
        assert {weight.ndim for weight in group["params"]} == ({2} if group["weight_decay"] else {1})


def test_a_new_strategy_is_one_function(planned, with_bitfit):
    _, model, plan = planned(strategy="bitfit")
    assert list(plan.starts) == [*BODY, "biases", *HEAD]
    learnt = set(strategies.learning_parameters(model, plan))
    assert learnt == {name for name, _ in model.named_parameters() if name.endswith(".bias")} | {
        "bert.pooler.dense.weight",
        "classifier.weight",
    }
    table = strategies.schedule_table(plan, epochs=1, model=model)
    assert table["epoch 1"].tolist() == ["–", "–", "–", "1", "1", "1"]


def test_schedule_table_shows_what_the_plan_does(planned):
    _, model, plan = planned(strategy="gradual_last_to_first", epochs=2)
    table = strategies.schedule_table(plan, epochs=2, model=model)
    assert list(table.index) == BODY + HEAD
    assert table.loc["classifier"].tolist() == [2 * 16 + 2, "1", "1"]
    assert table["parameters"].sum() == sum(weight.numel() for weight in model.parameters())
    assert table["epoch 1"].tolist() == ["–", "–", "1 from 50%", "1", "1"]
    assert table["epoch 2"].tolist() == ["1 from 50%", "1", "1", "1", "1"]


def test_flops_follow_what_learns(planned, with_bitfit):
    def flops(strategy, learning=None):
        _, model, plan = planned(strategy=strategy)
        learning = plan.learning(0, 1) if learning is None else frozenset(learning)
        return strategies.training_flops(model, plan, n_tokens=100, n_pairs=1000, learning=learning)

    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # layers x (query, key, value, output; feed-forward)
    forward = 100 * 2 * weights + 2 * 1000 * 4 * 16
    assert flops("linear_probe") == forward
    assert flops("full") == 3 * forward
    assert flops("full", ["layer_1", *HEAD]) == 2 * forward
    back = forward + 100 * 2 * weights + 2 * 1000 * 8 * 16  # gradients of inputs, but of no matrix
    assert flops("lora") == flops("bitfit") == back
