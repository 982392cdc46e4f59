"""What a run does with weights, cells and failures, on a random checkpoint of 2 layers and 60 made-up cells."""

import functools
import json
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from tuneformer.data import splits
from tuneformer.data.readers import CellsError
from tuneformer.finetune import checkpoints, hardware, strategies, training
from tuneformer.study import paths
from tuneformer.study.params import ParameterError
from tuneformer.study.treatments import Strategy


def cells_of(tokens, settings):
    drawn = training.draw_cells(settings, tokens)
    return {split: training.read_cells(tokens, rows) for split, rows in drawn.items()}


class Watch(TrainerCallback):
    """Copies the weights before every step, and after the last."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in kwargs["model"].named_parameters()})

    on_train_end = on_step_begin


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_only_the_groups_of_the_plan_move_in_each_step(strategy, run_settings, tokens):
    settings = run_settings(strategy=strategy, epochs=4, warmup_steps=0, weight_decay=0.1, freeze_layers=1)
    trainer = training.make_trainer(settings, tokens, cells_of(tokens, settings), training.RunLog())
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    n_steps = len(watch.weights) - 1
    assert n_steps == trainer.state.max_steps == 16
    for step, (before, after) in enumerate(zip(watch.weights, watch.weights[1:], strict=False)):
        moved = {strategies.group_of(name) for name in before if not torch.equal(before[name], after[name])}
        expected = trainer.plan.learning(step, n_steps)
        assert moved == expected, f"step {step}"


def test_the_head_starts_the_same_for_every_strategy(run_settings, tokens):
    heads = []
    for strategy in ("full", "lora", "random_init"):
        settings = run_settings(strategy=strategy)
        trainer = training.make_trainer(settings, tokens, cells_of(tokens, settings), training.RunLog())
        torch.manual_seed(len(strategy))  # as if the strategy had drawn other numbers by then
        order = list(trainer._get_train_sampler())
        heads.append((trainer.model.classifier.weight.detach(), trainer.model.bert.pooler.dense.weight.detach(), order))
    for classifier, pooler, order in heads[1:]:
        assert torch.equal(classifier, heads[0][0])
        assert torch.equal(pooler, heads[0][1])
        assert order == heads[0][2]


def test_same_run_twice_gives_the_same_numbers(run_settings, tokens):
    settings = run_settings()
    first = training.finetune(settings, tokens)
    (paths.run_dir(settings) / "outcome.json").unlink()
    second = training.finetune(settings, tokens)
    timeless = [name for name in first.history if name != "seconds"]
    pd.testing.assert_frame_equal(first.history[timeless], second.history[timeless], check_exact=True)
    pd.testing.assert_frame_equal(first.predictions, second.predictions, check_exact=True)
    other = training.finetune(run_settings(seed=1), tokens)
    assert not np.allclose(other.probabilities, first.probabilities)


def test_it_learns_and_reports(run_settings, tokens):
    outcome = training.finetune(run_settings(epochs=6), tokens)
    assert outcome.status == "ok"
    assert list(outcome.history["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert outcome.history["validation_macro_f1"].max() > 0.9  # the classes differ in one token
    assert (outcome.n_train, outcome.n_test) == (48, 12)
    assert list(outcome.predictions.columns) == ["cell", "label", "probability:a", "probability:b"]
    np.testing.assert_allclose(outcome.probabilities.sum(axis=1), 1)
    right = outcome.predictions["label"] == np.array(outcome.classes)[outcome.probabilities.argmax(axis=1)]
    assert right.mean() > 0.9
    assert outcome.cost["optimizer_steps"] == 6 * 4
    assert outcome.cost["trainable_parameters"] == outcome.cost["total_parameters"]
    assert outcome.cost["flops"] > 0


def test_best_epoch_is_chosen_by_validation_and_the_test_set_is_predicted_once(run_settings, tokens, monkeypatch):
    settings = run_settings(epochs=3)
    test_tokens = {tuple(cell["input_ids"]) for cell in cells_of(tokens, settings)["test"]}
    scores = iter([0.2, 0.9, 0.9])
    calls, weights = [], []

    def probabilities(self, cells):
        is_test = {tuple(cell["input_ids"]) for cell in cells} == test_tokens
        calls.append("test" if is_test else "validation")
        weights.append(self.model.classifier.weight.detach().clone())
        return np.full((len(cells), 2), 0.5)

    monkeypatch.setattr(training.ClassifierTrainer, "probabilities", probabilities)
    monkeypatch.setattr(training, "f1_score", lambda *args, **kwargs: next(scores))
    outcome = training.finetune(settings, tokens)
    assert calls == ["validation"] * 3 + ["test"]
    assert outcome.best_epoch == 2
    assert torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[3], weights[2])


def test_early_stop(run_settings, tokens, monkeypatch):
    scores = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(training, "f1_score", lambda *args, **kwargs: next(scores))
    outcome = training.finetune(run_settings(epochs=4, early_stop=2), tokens)
    assert len(outcome.history) == 3
    assert outcome.best_epoch == 1
    assert outcome.cost["optimizer_steps"] == 12


def test_labels_of_test_cells_do_not_change_the_choice(run_settings, tokens, swap_test_labels):
    settings = run_settings(epochs=3)
    straight = training.finetune(settings, tokens)
    swapped = training.finetune(settings, swap_test_labels(tokens))
    assert straight.fingerprint != swapped.fingerprint
    assert straight.best_epoch == swapped.best_epoch
    assert np.array_equal(straight.probabilities, swapped.probabilities)


def test_accumulated_gradients_give_the_same_step(run_settings, tokens):
    """With accepts_loss_kwargs unset, transformers 5.23 multiplies loss and gradient by gradient_accumulation_steps."""
    settings = run_settings(epochs=1, warmup_steps=0)
    norms = {}
    for accumulate in (1, 4):
        trainer = training.make_trainer(
            settings, tokens, cells_of(tokens, settings), training.RunLog(), accumulate=accumulate
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        norms[accumulate] = _first_gradient_norm(trainer)
    assert norms[4] == pytest.approx(norms[1], rel=1e-3)


def _first_gradient_norm(trainer):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [weight.grad for weight in trainer.model.parameters()]
            norms.append(torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients])).item())

    trainer.args.max_grad_norm = 0.0
    trainer.order = torch.Generator().manual_seed(0)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.add_callback(Norm())
    trainer.train()
    return norms[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_kept_as_a_failure(run_settings, tokens, monkeypatch, capsys):
    forward = checkpoints.CellClassifier.forward
    steps = []

    @functools.wraps(forward)  # the Trainer reads the names of its arguments
    def diverging(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            steps.append(1)
            output.logits = output.logits * (float("nan") if len(steps) == 6 else 1)
        return output

    monkeypatch.setattr(checkpoints.CellClassifier, "forward", diverging)
    settings = run_settings(epochs=3)
    outcome = training.finetune(settings, tokens)
    assert len(steps) == 6
    assert outcome.status == "failed"
    assert "the loss became nan in step 6 of 12; set a smaller learning_rate" in outcome.reason
    assert outcome.reason in capsys.readouterr().err
    assert len(outcome.history) == 1
    assert outcome.predictions.empty
    assert outcome.cost["optimizer_steps"] == 5
    assert not (paths.run_dir(settings) / "outcome.json").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_lack_of_memory_is_kept_as_such(run_settings, tokens, monkeypatch, error):
    monkeypatch.setattr(training.ClassifierTrainer, "training_step", _raise(error))
    outcome = training.finetune(run_settings(), tokens)
    assert outcome.status == "out-of-memory"
    assert "smaller batch_size" in outcome.reason


def test_another_error_is_no_outcome_and_an_interrupted_run_leaves_none(run_settings, tokens, monkeypatch):
    settings = run_settings()
    training.finetune(settings, tokens)
    changed = run_settings(learning_rate=2e-3)
    for error in (KeyboardInterrupt(), ZeroDivisionError()):
        with monkeypatch.context() as patch:
            patch.setattr(training.ClassifierTrainer, "training_step", _raise(error))
            with pytest.raises(type(error)):
                training.finetune(changed, tokens)
        assert list(paths.run_dir(settings).iterdir()) == []
    assert training.finetune(changed, tokens).status == "ok"
    assert list(paths.run_dir(settings).glob("checkpoint-*")) == []


def _raise(error):
    def training_step(*args, **kwargs):
        raise error

    return training_step


def test_same_fingerprint_is_loaded_and_another_is_trained(run_settings, tokens, monkeypatch):
    settings = run_settings()
    trained = training.finetune(settings, tokens)
    monkeypatch.setattr(training, "_train", _raise(AssertionError("trained again")))
    loaded = training.finetune(settings, tokens)
    assert loaded.cost == trained.cost
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    pd.testing.assert_frame_equal(loaded.predictions, trained.predictions)
    assert json.loads((paths.run_dir(settings) / "outcome.json").read_text())["fingerprint"] == trained.fingerprint
    with pytest.raises(AssertionError, match="trained again"):
        training.finetune(run_settings(learning_rate=2e-3), tokens)


def test_an_outcome_without_its_predictions_is_trained_again(run_settings, tokens):
    settings = run_settings()
    training.finetune(settings, tokens)
    (paths.run_dir(settings) / "predictions.parquet").unlink()
    assert len(training.finetune(settings, tokens).predictions) == 12


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 500, "warmup_cap": 0.1}, 10),
        ({"warmup_steps": 4, "warmup_cap": 0.1}, 4),
        ({"warmup_steps": 500, "warmup_cap": None}, 500),
    ],
)
def test_warmup_is_capped(run_settings, changes, expected):
    assert training.warmup_steps(run_settings(**changes), 100) == expected


def test_learning_rate_rises_for_the_capped_steps_only(run_settings, tokens):
    settings = run_settings(epochs=5, warmup_steps=500, warmup_cap=0.1, learning_rate=1e-3)
    trainer = training.make_trainer(settings, tokens, cells_of(tokens, settings), training.RunLog())
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0
    assert np.argmax(rates) == 2
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 1e-4


def test_cells_are_drawn_by_class_and_seed(run_settings, tokens):
    drawn = training.draw_cells(run_settings(train_cells=12, validation_share=0.2), tokens)
    assert [len(drawn[split]) for split in training.SPLITS] == [12, 3, 12]
    table = training.cells_table(tokens, drawn)
    assert list(table["train"]) == [6, 6, 12]
    again = training.draw_cells(run_settings(train_cells=12, validation_share=0.2, strategy="lora"), tokens)
    other = training.draw_cells(run_settings(train_cells=12, validation_share=0.2, seed=1), tokens)
    assert np.array_equal(drawn["train"], again["train"])
    assert not np.array_equal(drawn["train"], other["train"])
    assert np.array_equal(drawn["test"], other["test"])
    everything = training.draw_cells(run_settings(train_cells=10_000), tokens)
    assert len(everything["train"]) == 48


@pytest.mark.parametrize("n", [4, 7, 20, 49])
def test_draw_keeps_every_class(n):
    labels = np.repeat(["a", "b", "c", "d"], [26, 20, 3, 1])
    chosen = splits.draw_stratified(labels, n, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == n
    assert set(labels[chosen]) == {"a", "b", "c", "d"}


def test_a_class_without_cells_is_refused(run_settings, tokens, swap_test_labels):
    with pytest.raises(training.TrainingDataError, match=r"Class 'a' has no test cells"):
        training.finetune(run_settings(), swap_test_labels(tokens, {"a": "b", "b": "b"}))
    with pytest.raises(CellsError, match=r"train_cells: 1 is less than one for each of 2 classes"):
        training.finetune(run_settings(train_cells=1), tokens)


def test_a_gpu_that_is_not_there_is_refused(run_settings, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="torch finds no GPU"):
        training.finetune(run_settings(device="cuda"), tokens)
    assert hardware.device_of(run_settings(device="auto")).type == "cpu"


def test_bf16_trains_where_asked_for(run_settings, tokens):
    outcome = training.finetune(run_settings(precision="bf16", epochs=6), tokens)
    assert outcome.status == "ok"
    assert outcome.cost["device"].endswith("bf16")
    assert outcome.history["validation_macro_f1"].max() > 0.9
