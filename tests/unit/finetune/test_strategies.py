"""Plans of the strategies: which group learns in which epoch, at which rate, and what that costs."""

import pytest
import torch

from tuneformer.finetune import checkpoints, strategies
from tuneformer.study.params import ParameterError

BODY = ["embeddings", "layer_0", "layer_1"]
HEAD = ["pooler", "classifier"]


@pytest.fixture
def planned(run_settings, tokens):
    def build(**changes):
        settings = run_settings(**changes)
        model = checkpoints.load_classifier(settings, tokens.vocabulary, tokens.classes)
        return settings, model, strategies.prepare(settings, model)

    return build


def learning_by_epoch(plan, epochs):
    return [sorted(plan.learning(10 * epoch, 10 * epochs)) for epoch in range(epochs)]


@pytest.mark.parametrize("strategy", ["full", "random_init", "layerwise_lr_decay"])
def test_everything_learns_from_the_start(planned, strategy):
    _, _, plan = planned(strategy=strategy)
    assert learning_by_epoch(plan, 2) == [sorted(BODY + HEAD)] * 2


def test_linear_probe_learns_the_head_alone(planned):
    _, _, plan = planned(strategy="linear_probe")
    assert learning_by_epoch(plan, 2) == [sorted(HEAD)] * 2


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"freeze_layers": 1}, {"layer_0"}),
        ({"freeze_layers": 2, "freeze_embeddings": True}, set(BODY)),
        ({"freeze_layers": 0}, set()),
    ],
)
def test_selective_freezes_the_first_layers_and_embeddings_only_when_asked(planned, changes, frozen):
    _, _, plan = planned(strategy="selective", **changes)
    assert set(BODY + HEAD) - plan.learning(0, 10) == frozen


def test_selective_refuses_more_layers_than_there_are(planned):
    with pytest.raises(ParameterError, match="freeze_layers: 3 layers, but the checkpoint has 2"):
        planned(strategy="selective", freeze_layers=3)


def test_a_baseline_is_not_fine_tuned(planned):
    with pytest.raises(ParameterError, match=r"knn_pca is a baseline.*baseline_runs --study tiny --task drug_5class"):
        planned(strategy="knn_pca")


def test_lp_ft_has_two_phases(planned):
    _, _, plan = planned(strategy="lp_ft", epochs=4, head_share=0.5)
    assert learning_by_epoch(plan, 4) == [sorted(HEAD)] * 2 + [sorted(BODY + HEAD)] * 2
    _, _, short = planned(strategy="lp_ft", epochs=1, head_share=0.5)
    assert short.learning(4, 10) == set(HEAD)
    assert short.learning(5, 10) == {*BODY, *HEAD}


@pytest.mark.parametrize(
    ("strategy", "order"),
    [("gradual_last_to_first", BODY[::-1]), ("gradual_first_to_last", BODY)],
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


def test_lora_adds_updates_of_query_and_value_and_starts_where_the_model_was(planned, run_settings, tokens):
    torch.manual_seed(0)
    _, plain, _ = planned(strategy="full")
    torch.manual_seed(0)
    _, model, plan = planned(strategy="lora", lora_rank=4)
    assert learning_by_epoch(plan, 1) == [sorted([*HEAD, "lora"])]
    adapters = strategies.parameters_by_group(model)["lora"]
    hidden = model.config.hidden_size
    assert len(adapters) == 2 * 2 * 2  # layers x query, value x down, up
    assert sum(weight.numel() for weight in adapters.values()) == 2 * 2 * 2 * 4 * hidden
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    torch.testing.assert_close(model.eval()(**batch).logits, plain.eval()(**batch).logits)


def test_every_parameter_is_in_a_group_of_the_plan_once(planned):
    for strategy in ("full", "lora"):
        settings, model, plan = planned(strategy=strategy)
        groups = strategies.parameters_by_group(model)
        assert set(groups) == set(plan.starts)
        assert sum(map(len, groups.values())) == len(list(model.parameters()))
        optimized = [
            weight for group in strategies.optimizer_groups(settings, model, plan) for weight in group["params"]
        ]
        expected = sum(len(groups[name]) for name, start in plan.starts.items() if start != strategies.NEVER)
        assert len(optimized) == len({id(weight) for weight in optimized}) == expected


def test_schedule_table_shows_what_the_plan_does(planned):
    _, model, plan = planned(strategy="gradual_last_to_first", epochs=2)
    table = strategies.schedule_table(plan, epochs=2, model=model)
    assert list(table.index) == BODY + HEAD
    assert table.loc["classifier"].tolist() == [2 * 16 + 2, "1", "1"]
    assert table["epoch 1"].tolist() == ["–", "–", "1 from 50%", "1", "1"]
    assert table["epoch 2"].tolist() == ["1 from 50%", "1", "1", "1", "1"]


def test_flops_follow_what_learns(planned):
    _, model, _ = planned(strategy="full")
    count = {"n_tokens": 100, "n_pairs": 1000}
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # layers x (query, key, value, output; feed-forward)
    forward = 100 * 2 * weights + 2 * 1000 * 4 * 16
    assert strategies.training_flops(model, **count, learning=frozenset(HEAD)) == forward
    assert strategies.training_flops(model, **count, learning=frozenset(BODY + HEAD)) == 3 * forward
    top = strategies.training_flops(model, **count, learning=frozenset(["layer_1", *HEAD]))
    assert top == 2 * forward
