"""The set-up that cells, genes and masked tokens share: how a loss is joined, logged, and a training resumed."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import TrainerCallback

from tuneformer.model import classifier, strategies, trainer
from tuneformer.model.classifier import Cells


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.fixture
def train(run_settings, tokens):
    """Train a classifier for 20 steps; the validation scores are the step."""

    def run(steps=20, log=None, **more):
        settings = run_settings(epochs=5)
        transformers.set_seed(0)
        model = classifier.build(settings, tokens.vocabulary, tokens.classes)
        cells = Cells(tokens.dataset, 0, rows=np.arange(48), labels=np.arange(48) % 2)
        log, calls = log or trainer.Training(), []

        def validate():
            calls.append(1)
            return {"score": float(len(calls))}

        def loss(model, batch):
            return model(**batch).loss

        plan = strategies.prepare(settings, model)
        arguments = {
            "plan": plan,
            "loss": loss,
            "validate": validate,
            "steps": steps,
            "validate_at": {1, 4, 8, 20},
        } | more
        trainer.train(settings, model, cells, log, **arguments)
        return SimpleNamespace(model=model, log=log)

    return run


def test_rows_of_the_history_are_where_they_were_asked_for(train, capsys):
    run = train(who="a name")
    assert list(run.log.history) == ["epoch", "train_loss", "score", "seconds"]
    assert run.log.history["score"].tolist() == [1, 2, 3, 4]
    assert run.log.cost["optimizer_steps"] == 20
    assert (run.log.best_epoch, run.log.chosen_by) == (4, "last epoch")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a name epoch ")]
    assert len(lines) == 4
    assert "epoch 2/4: train loss 0." in lines[1]
    assert "score 2.000" in lines[1]


def test_the_best_weights_stay_or_else_the_last(train):
    last, best, first = train(), train(lowest="score"), train(validate_at={1})
    assert (best.log.best_epoch, best.log.chosen_by) == (1, "validation loss")
    once = train(steps=20, callbacks=[StopAfter(1)])
    weights = [run.model.classifier.weight for run in (last, best, first, once)]
    assert torch.equal(weights[1], weights[3])
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_the_train_loss_is_the_mean_over_the_cells_since_the_last_row(train):
    seen = []

    def loss(model, batch):
        value = model(**batch).loss
        seen.append((value.item(), len(batch["labels"])))
        return value

    history = train(loss=loss, validate_at={4, 8, 20}).log.history
    values, sizes = np.array(seen).T
    for row, part in enumerate([slice(0, 4), slice(4, 8), slice(8, 20)]):
        assert history["train_loss"][row] == pytest.approx(np.average(values[part], weights=sizes[part]), rel=1e-6)


def test_an_interrupted_training_goes_on_where_it_stopped(train, tmp_path):
    """In the middle of a pass over the cells, with the same order, dropout and history as if it had not stopped."""
    whole = train(folder=tmp_path / "whole")
    train(folder=tmp_path / "cut", callbacks=[StopAfter(11)])
    rest = train(folder=tmp_path / "cut")
    assert rest.log.cost["training_cells"] == 48
    columns = ["epoch", "train_loss", "score"]
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(weight, dict(rest.model.named_parameters())[name], rtol=1e-5, atol=1e-7)
    pd.testing.assert_frame_equal(whole.log.history[columns[:1]], rest.log.history[columns[:1]], check_exact=True)
    np.testing.assert_allclose(whole.log.history["train_loss"][:3], rest.log.history["train_loss"][:3], rtol=1e-6)


def test_a_failure_is_kept_with_what_there_was_until_then(train):
    def loss(model, batch):
        return model(**batch).loss * (float("inf") if next(steps) == 6 else 1)

    steps, log = iter(range(20)), trainer.Training()
    with log.keeping_failures("who"):
        train(loss=loss, log=log)
    assert log.status == "failed"
    assert "the loss became inf in step 7 of 20" in log.reason
    assert len(log.history) == 2
    assert log.cost["optimizer_steps"] == 6
