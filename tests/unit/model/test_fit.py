"""What a run does with weights, cells and failures, on a random checkpoint of 2 layers and 72 made-up cells."""

import functools
import json
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from transformers import Trainer, TrainerCallback, TrainingArguments

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.model import classifier, fit, hardware, losses, strategies, trainer
from tuneformer.model.classifier import Cells
from tuneformer.tokens.encode import Tokens
from tuneformer.tokens.vocabulary import Vocabulary


class Watch(TrainerCallback):
    """Copies the weights before every step and after the last, and the norm of each step's gradient."""

    def __init__(self):
        self.weights, self.norms = [], []

    def on_step_begin(self, args, state, control, **_):
        self.weights.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})

    on_train_end = on_step_begin

    def on_pre_optimizer_step(self, args, state, control, **_):
        gradients = [weight.grad.norm() for weight in self.model.parameters() if weight.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.stack(gradients)).item())


@pytest.fixture
def watched(monkeypatch):
    """Watch the next training; has its plan, too."""
    watch = Watch()

    def train(*args, **arguments):
        watch.model, watch.plan, watch.order = args[1], arguments["plan"], list(arguments["sampler"])
        return trainer.train(*args, **arguments, callbacks=[watch])

    monkeypatch.setattr(fit, "train", train)
    return watch


def bitfit(settings, body):
    return strategies.Plan(starts=dict.fromkeys(body, strategies.NEVER), groups={"biases": r"\.bias$"})


@pytest.mark.parametrize("strategy", [*strategies.STRATEGIES, "bitfit"])
def test_only_the_groups_of_the_plan_move_in_each_step(strategy, run_settings, tokens, watched, monkeypatch):
    monkeypatch.setitem(strategies.STRATEGIES, "bitfit", bitfit)
    settings = run_settings(strategy=strategy, epochs=4, warmup_steps=0, weight_decay=0.1, freeze_layers=1)
    fit.fit_cells(settings, tokens)
    assert len(watched.weights) == 17
    for step, (before, after) in enumerate(zip(watched.weights, watched.weights[1:], strict=False)):
        moved = {watched.plan.group_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == watched.plan.learning(step, 16), f"step {step}"


@pytest.mark.parametrize("sampling", ["all", "balanced", "upsampled"])
def test_strategies_start_from_the_same_head_and_see_the_same_cells(run_settings, tokens, watched, sampling):
    heads = []
    for strategy in ("full", "lora", "random_init"):
        watched.weights.clear()
        fit.fit_cells(run_settings(strategy=strategy, sampling=sampling), tokens)
        heads.append(
            (watched.order, [watched.weights[0][name] for name in ("classifier.weight", "bert.pooler.dense.weight")])
        )
    for order, weights in heads[1:]:
        assert order == heads[0][0]
        assert all(torch.equal(weight, first) for weight, first in zip(weights, heads[0][1], strict=True))


def test_the_same_run_twice_gives_the_same_numbers(run_settings, tokens):
    first, second = (fit.fit_cells(run_settings(), tokens) for _ in range(2))
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(first.history.drop(**drop), second.history.drop(**drop), check_exact=True)
    pd.testing.assert_frame_equal(first.predictions, second.predictions, check_exact=True)
    other = fit.fit_cells(run_settings(seed=1), tokens)
    assert not np.allclose(other.probabilities, first.probabilities)


def test_it_learns_and_reports_and_writes_nothing(run_settings, tokens, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    outcome = fit.fit_cells(run_settings(epochs=6), tokens)
    assert outcome.status == "ok"
    columns = ["epoch", "train_loss", "validation_loss", "validation_accuracy", "validation_macro_f1", "seconds"]
    assert list(outcome.history) == columns
    assert list(outcome.history["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert outcome.history["validation_macro_f1"].max() > 0.9  # the classes differ in one token
    assert (outcome.n_train, outcome.n_validation, outcome.n_test) == (48, 12, 12)
    assert list(outcome.predictions) == ["cell", "label", "predicted", "probability:a", "probability:b"]
    assert list(outcome.predictions["cell"]) == [f"cell{number}" for number in range(60, 72)]
    np.testing.assert_allclose(outcome.probabilities.sum(axis=1), 1)
    assert list(outcome.predictions["predicted"]) == ["ab"[place] for place in outcome.probabilities.argmax(axis=1)]
    assert (outcome.predictions["predicted"] == outcome.predictions["label"]).mean() > 0.9
    assert outcome.cost["optimizer_steps"] == 6 * 4
    assert outcome.cost["training_cells"] == 48
    assert outcome.cost["trainable_parameters"] == outcome.cost["total_parameters"]
    assert min(outcome.cost[name] for name in ("flops", "cells_per_second", "wall_seconds", "peak_memory_mb")) > 0
    assert isinstance(outcome.model, classifier.CellClassifier)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("drug_5class full seed 0 epoch ")]) == 6
    assert list((tmp_path / "here").iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_flops_are_counted_by_what_learnt(run_settings, tokens):
    """In batches of one cell there is no padding, and then they follow from the cells alone."""
    settings = run_settings(strategy="lp_ft", epochs=2, batch_size=1)
    lengths = np.array(tokens.dataset["length"][:48])
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # layers x (query, key, value, output; feed-forward)
    forward = lengths.sum() * 2 * weights + 2 * (lengths**2).sum() * 4 * 16
    outcome = fit.fit_cells(settings, tokens)
    assert outcome.cost["flops"] == forward + 3 * forward
    assert outcome.cost["trainable_parameters"] == outcome.cost["total_parameters"]


def losses_of(monkeypatch, *values):
    """Let the validation losses be these, epoch by epoch."""
    scores, given = fit.validation_scores, iter(values)
    replaced = lambda labels, predicted: scores(labels, predicted) | {"validation_loss": next(given)}  # noqa: E731
    monkeypatch.setattr(fit, "validation_scores", replaced)


@pytest.mark.parametrize(
    ("rule", "fewest", "losses", "kept"),
    [
        ("last", 12, (0.5, 0.2, 0.3), 3),
        ("validation_loss", 13, (0.5, 0.2, 0.3), 3),  # there are 12 validation cells
        ("validation_loss", 12, (0.5, 0.2, 0.3), 2),
        ("validation_loss", 12, (0.2, 0.2, 0.3), 2),
    ],
)
def test_the_last_epoch_is_kept_or_that_of_the_lowest_validation_loss_and_the_test_set_is_predicted_once(
    run_settings, tokens, monkeypatch, rule, fewest, losses, kept
):
    calls, weights = [], []
    monkeypatch.setattr(fit, "FEWEST_CHOOSING", fewest)
    losses_of(monkeypatch, *losses)

    def predict(model, cells, *, bf16, forward):
        calls.append(
            {48: "train", 60: "test"}.get(cells.rows[0], "validation") if cells.rows[0] != 48 else "validation"
        )
        weights.append(model.classifier.weight.detach().clone())
        return np.zeros((len(cells), 2))

    monkeypatch.setattr(classifier, "predict", predict)
    outcome = fit.fit_cells(run_settings(epochs=3, epoch_rule=rule), tokens)
    assert calls == ["validation"] * 3 + ["test"]
    assert outcome.best_epoch == kept
    assert outcome.chosen_by == ("last epoch" if kept == 3 else "validation loss")
    assert [torch.equal(weights[3], weight) for weight in weights[:3]] == [kept == epoch for epoch in (1, 2, 3)]
    assert torch.equal(outcome.model.classifier.weight, weights[kept - 1])


def test_early_stop(run_settings, tokens, monkeypatch):
    monkeypatch.setattr(fit, "FEWEST_CHOOSING", 12)
    losses_of(monkeypatch, 0.3, 0.4, 0.5, 0.1)
    outcome = fit.fit_cells(run_settings(epochs=4, epoch_rule="validation_loss", early_stop=2), tokens)
    assert len(outcome.history) == 3
    assert outcome.best_epoch == 1
    assert outcome.cost["optimizer_steps"] == 12


def test_labels_of_test_cells_do_not_change_the_choice(run_settings, tokens, relabelled):
    straight = fit.fit_cells(run_settings(epochs=3), tokens)
    swapped = fit.fit_cells(run_settings(epochs=3), relabelled(tokens, {"a": "b", "b": "a"}))
    assert list(straight.predictions["label"]) != list(swapped.predictions["label"])
    assert straight.best_epoch == swapped.best_epoch
    assert np.array_equal(straight.probabilities, swapped.probabilities)


def test_accumulated_gradients_give_the_same_step(run_settings, tokens, checkpoint, watched, monkeypatch):
    """Of any model: for most of them transformers 5.23 multiplies loss and gradient by gradient_accumulation_steps."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))
    monkeypatch.setattr(classifier.CellClassifier, "accepts_loss_kwargs", True)
    monkeypatch.setattr(fit, "order_of", lambda settings, cells: torch.utils.data.SequentialSampler(cells))
    fixed = {"epochs": 1, "warmup_steps": 0, "precision": "fp32"}
    for accumulate in (1, 4):
        arguments = functools.partial(TrainingArguments, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        monkeypatch.setattr(trainer, "TrainingArguments", arguments)
        fit.fit_cells(run_settings(**fixed, batch_size=12 // accumulate), replace(tokens, step_cells=48 // accumulate))
    assert len(watched.norms) == 4 + 4
    assert watched.norms[4] == pytest.approx(watched.norms[0], rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_trainer_of_transformers_accumulates_the_gradients_of_a_classifier(
    run_settings, tokens, tmp_path, accumulate
):
    settings, watch = run_settings(), Watch()
    torch.manual_seed(0)
    model = classifier.build(settings, tokens.vocabulary, tokens.classes).eval()
    cells = Cells(tokens.dataset, 0, rows=np.arange(12), labels=np.arange(12) % 2)
    model.train, watch.model = lambda mode=True: model, model  # no dropout
    loss = model(**cells.__getitems__(np.arange(12))).loss
    expected = torch.linalg.vector_norm(
        torch.stack([gradient.norm() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
    ).item()
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=12 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, data_collator=lambda batch: batch, train_dataset=cells, callbacks=[watch]).train()
    assert watch.norms == [pytest.approx(expected, rel=1e-4)]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_kept_as_a_failure(run_settings, tokens, monkeypatch, capsys):
    forward, steps = classifier.CellClassifier.forward, []

    def diverging(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            steps.append(1)
            output.logits = output.logits * (float("nan") if len(steps) == 6 else 1)
        return output

    monkeypatch.setattr(classifier.CellClassifier, "forward", diverging)
    outcome = fit.fit_cells(run_settings(epochs=3), tokens)
    assert len(steps) == 6
    assert outcome.status == "failed"
    assert "the loss became nan in step 6 of 12; set a smaller learning_rate" in outcome.reason
    assert outcome.reason in capsys.readouterr().err
    assert len(outcome.history) == 1
    assert outcome.predictions.empty
    assert outcome.model is None
    assert outcome.cost["optimizer_steps"] == 5


def test_predictions_that_are_not_finite_are_a_failure(run_settings, tokens, monkeypatch):
    monkeypatch.setattr(classifier, "predict", lambda model, cells, *, bf16, forward: np.full((len(cells), 2), np.inf))
    outcome = fit.fit_cells(run_settings(), tokens)
    assert outcome.status == "failed"
    assert outcome.reason.startswith("the model predicts values that are not finite")


def _raising(error):
    def training_step(*args, **kwargs):
        raise error

    return training_step


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_lack_of_memory_is_kept_as_such(run_settings, tokens, monkeypatch, error):
    monkeypatch.setattr(Trainer, "training_step", _raising(error))
    outcome = fit.fit_cells(run_settings(), tokens)
    assert outcome.status == "out-of-memory"
    assert "smaller batch_size" in outcome.reason


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_another_error_is_no_outcome(run_settings, tokens, monkeypatch, error):
    monkeypatch.setattr(Trainer, "training_step", _raising(error))
    with pytest.raises(type(error)):
        fit.fit_cells(run_settings(), tokens)


@pytest.mark.parametrize(("steps", "cap", "expected"), [(500, 0.1, 10), (4, 0.1, 4), (500, None, 500)])
def test_warmup_is_capped(run_settings, steps, cap, expected):
    assert trainer.warmup_steps(run_settings(warmup_steps=steps, warmup_cap=cap), 100) == expected


def test_the_learning_rate_rises_for_the_capped_steps_only(run_settings, tokens, monkeypatch):
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler, **_):
            rates.append(lr_scheduler.get_last_lr()[0])

    monkeypatch.setattr(fit, "train", functools.partial(trainer.train, callbacks=[Rates()]))
    fit.fit_cells(run_settings(epochs=5, warmup_steps=500, warmup_cap=0.1, learning_rate=1e-3), tokens)
    assert len(rates) == 20
    assert rates[0] == 0
    assert np.argmax(rates) == 2
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    ("changes", "step_cells", "steps", "epochs"),
    [
        ({}, None, 8, 2),
        ({"min_steps": 15}, None, 16, 2),
        ({"min_steps": 3}, None, 8, 2),
        ({}, 100, 18, 2),  # counted as if trained on 100 cells
        ({}, 12, 2, 2),
        ({"batch_size": 100}, None, 2, 2),
    ],
)
def test_the_steps_of_a_run(run_settings, tokens, changes, step_cells, steps, epochs):
    outcome = fit.fit_cells(run_settings(**changes), replace(tokens, step_cells=step_cells))
    assert outcome.cost["optimizer_steps"] == steps
    assert len(outcome.history) == epochs


def test_cells_are_counted_and_a_class_without_cells_is_refused(run_settings, tokens, relabelled):
    assert fit.cells_table(tokens).loc["all"].tolist() == [48, 12, 12]
    assert fit.cells_table(tokens).loc["a"].tolist() == [24, 6, 6]
    lacking = relabelled(tokens, {"a": "b", "b": "b"})
    with pytest.raises(UserError, match=r"Class 'a' has no test cells"):
        fit.fit_cells(run_settings(), lacking)
    grouped = run_settings(fold=0, folds=3, group_by="donor")  # a donor need not have cells of every class
    assert fit.fit_cells(grouped, lacking).n_test == 12


def test_the_group_of_a_test_cell_is_kept(run_settings, tokens):
    groups = [f"donor{number % 3}" for number in range(72)]
    outcome = fit.fit_cells(run_settings(), replace(tokens, dataset=tokens.dataset.add_column("group", groups)))
    assert list(outcome.predictions["group"]) == groups[60:]


def test_a_gpu_that_is_not_there_is_refused(run_settings, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        fit.fit_cells(run_settings(device="cuda"), tokens)
    assert hardware.device_of("auto").type == "cpu"


def test_bf16_trains_where_asked_for(run_settings, tokens):
    outcome = fit.fit_cells(run_settings(precision="bf16", epochs=6), tokens)
    assert outcome.status == "ok"
    assert outcome.cost["device"].endswith("bf16")
    assert outcome.history["validation_macro_f1"].max() > 0.9


LABELS = np.repeat([0, 1, 2], [40, 7, 1])


def test_upsampling_gives_every_class_the_size_of_the_largest():
    drawn = fit.upsampled(np.arange(100, 148), LABELS, np.random.default_rng(0))
    assert drawn[:48].tolist() == list(range(100, 148))
    assert np.bincount(LABELS[drawn - 100]).tolist() == [40, 40, 40]
    assert (LABELS[drawn[48:] - 100] != 0).all()
    again, other = (fit.upsampled(np.arange(100, 148), LABELS, np.random.default_rng(seed)) for seed in (0, 1))
    assert (again == drawn).all()
    assert (other != drawn).any()
    assert fit.upsampled(np.arange(4), LABELS[[0, 40, 1, 41]], np.random.default_rng(0)).tolist() == [0, 1, 2, 3]


def test_upsampling_draws_evenly():
    labels = np.repeat([0, 1], [8010, 10])
    times = np.bincount(fit.upsampled(np.arange(8020), labels, np.random.default_rng(3)))[8010:] - 1
    assert times.sum() == 8000
    assert stats.chisquare(times).pvalue > 1e-3


def test_only_training_cells_are_repeated(run_settings, tokens, monkeypatch):
    """12 training cells of class a are taken away, and 12 of the others are seen twice."""
    keep = [number for number in range(72) if number % 2 or number >= 24]
    few = replace(tokens, dataset=tokens.dataset.select(keep))
    seen = {}
    monkeypatch.setattr(fit, "train", lambda settings, model, data, *_, **__: seen.update(rows=data.rows))
    outcome = fit.fit_cells(run_settings(sampling="upsampled"), few)
    assert outcome.n_train == 36
    assert len(seen["rows"]) == 48
    assert set(seen["rows"]) == set(range(36))


def test_balanced_sampling_draws_classes_and_cells_within_a_class_equally_often(run_settings):
    cells = Cells.__new__(Cells)
    cells.labels = np.repeat([2, 0, 1], [11900, 90, 10])
    cells.rows = np.arange(12000)
    drawn = np.array(list(fit.order_of(run_settings(sampling="balanced"), cells)))
    assert len(drawn) == 12000
    assert stats.chisquare(np.bincount(cells.labels[drawn])).pvalue > 1e-3
    assert stats.chisquare(np.bincount(drawn, minlength=12000)[11990:]).pvalue > 1e-3


@pytest.mark.parametrize("sampling", ["all", "balanced"])
def test_the_order_differs_by_epoch_and_seed_and_not_by_other_random_numbers(run_settings, tokens, sampling):
    cells = Cells(tokens.dataset, 0, rows=np.arange(48), labels=np.arange(48) % 2)

    def epochs(seed, elsewhere):
        torch.manual_seed(elsewhere)
        order = fit.order_of(run_settings(sampling=sampling, seed=seed), cells)
        torch.rand(elsewhere)
        return [list(order), list(order)]

    first = epochs(0, 1)
    assert epochs(0, 2) == first
    assert first[0] != first[1]
    assert epochs(1, 1) != first


def test_batches_have_cells_of_similar_length_and_each_cell_once(run_settings, tokens):
    cells = Cells(tokens.dataset, 0, rows=np.arange(48), labels=np.arange(48) % 2)
    order = list(fit.order_of(run_settings(batch_size=4), cells))
    assert sorted(order) == list(range(48))
    spread = np.ptp(cells.lengths[order].reshape(-1, 4), axis=1).mean()
    assert spread < 0.6 * np.ptp(cells.lengths.reshape(-1, 4), axis=1).mean()


def test_bce_leaves_the_majority_class_because_it_starts_at_the_base_rate(run_settings, checkpoint, monkeypatch):
    """Six classes of 96 to 4 cells: with bias 0 four epochs find no second class (macro-F1 0.05 to 0.06, 4 seeds)."""
    found = {}
    for name, start in {"prior": losses.start_at_base_rate, "zero": lambda *_: None}.items():
        monkeypatch.setattr(losses, "start_at_base_rate", start)
        for seed in range(3):
            outcome = fit.fit_cells(run_settings(loss="bce", epochs=4, seed=seed), unequal_tokens(checkpoint, seed))
            table = outcome.predictions
            found[name, seed] = f1_score(table["label"], table["predicted"], average="macro")
    assert max(found["zero", seed] for seed in range(3)) < 0.1  # the majority class alone gives 2 / 7 / 6 = 0.05
    assert min(found["prior", seed] for seed in range(3)) > 0.15  # 0.22 in all of 4 seeds: two classes of six


def unequal_tokens(checkpoint, seed):
    """Cells of six classes that differ in the first token, the largest with 24 times the cells of the smallest."""
    rng, rows = np.random.default_rng(seed), []
    sizes = {"train": [96, 24, 8, 8, 4, 4], "validation": [12, 3, 1, 1, 1, 1], "test": [12] * 6}
    for split, of_split in sizes.items():
        for number in np.repeat(np.arange(6), of_split):
            genes = rng.permutation(np.arange(8, 42))[: rng.integers(7, 20)]
            rows.append({"input_ids": [2 + int(number), *map(int, genes)], "label": "abcdef"[number], "split": split})
    table = pd.DataFrame(rows).assign(cell=[f"cell{number}" for number in range(len(rows))])
    table["length"] = table["input_ids"].map(len)
    return Tokens(datasets.Dataset.from_pandas(table), Vocabulary.read(checkpoint), list("abcdef"))


@pytest.mark.parametrize("epochs", [1, 3])
def test_steps_can_be_those_of_upsampled_cells(run_settings, checkpoint, epochs):
    tokens = unequal_tokens(checkpoint, 0)
    more = [
        fit.fit_cells(run_settings(epochs=epochs, **keys), tokens).cost
        for keys in (
            {"sampling": "upsampled"},
            {"steps_of": "upsampled"},
            {"steps_of": "upsampled", "sampling": "balanced"},
        )
    ]
    assert [cost["optimizer_steps"] for cost in more] == 3 * [6 * 96 // 12 * epochs]
    assert [cost["training_cells"] for cost in more] == [6 * 96, 144, 144]


def test_without_validation_cells_the_last_epoch_is_kept_and_its_scores_are_missing(run_settings, tokens):
    kept = [place for place, split in enumerate(tokens.dataset["split"]) if split != "validation"]
    without = replace(tokens, dataset=tokens.dataset.select(kept))
    outcome = fit.fit_cells(run_settings(epochs=3, validation_share=0.0), without)
    assert (outcome.status, outcome.n_validation, outcome.best_epoch) == ("ok", 0, 3)
    assert outcome.history.filter(like="validation").isna().all(axis=None)
    same = fit.fit_cells(run_settings(epochs=3), tokens)
    pd.testing.assert_frame_equal(outcome.predictions, same.predictions, check_exact=True)
    with pytest.raises(UserError, match="Class 'a' has no validation cells"):
        fit.fit_cells(run_settings(), without)
