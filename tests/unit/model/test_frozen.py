"""What frozen layers make of a cell: the same gradients as the whole model, made once, whole or not at all."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tuneformer import paths
from tuneformer.model import baselines, classifier, fit, frozen, strategies
from tuneformer.model.classifier import CellClassifier, Cells
from tuneformer.model.frozen import Frozen


@pytest.fixture(autouse=True)
def no_dropout(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))


@pytest.fixture
def made(monkeypatch):
    """Count the cells whose frozen states are computed."""
    compute, counts = Frozen._compute, []
    monkeypatch.setattr(
        Frozen,
        "_compute",
        lambda *args: counts.append(len(args[4])) or compute(*args),  # store, model, cells, places
    )
    return counts


CASES = [
    ("linear_probe", {}, 3),
    ("linear_probe", {"pooling": "mean"}, 3),
    ("selective", {"freeze_embeddings": True}, 2),
]


@pytest.mark.parametrize(("strategy", "changes", "depth"), CASES)
def test_gradients_are_those_of_the_whole_model(run_settings, tokens, tmp_path, strategy, changes, depth):
    """In fp32; batches of another shape are added up in another order: 1e-5 is about a hundred roundings."""
    settings = run_settings(strategy=strategy, **changes)
    torch.manual_seed(0)
    model = classifier.build(settings, tokens.vocabulary, tokens.classes)
    plan = strategies.prepare(settings, model)
    strategies.set_learning(model, plan, plan.learning(0, 10))
    assert frozen.depth_of(frozen.body_of(model)) == depth
    cells = Cells(tokens.dataset, 0, labels=np.arange(72) % 2, packed=True)
    below = Frozen(tmp_path / "frozen", 1e9, bf16=False)
    found = []
    for whole in (True, False):
        batch = cells.__getitems__([3, 40, 41, 70])
        labels = batch.pop("labels")
        batch = batch if whole else below.inputs(model, cells, batch)
        assert ("states" in batch) != whole
        loss = cross_entropy(model(**batch).logits, labels)
        learning = [weight for weight in model.parameters() if weight.requires_grad]
        found.append(torch.autograd.grad(loss, learning, allow_unused=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["linear_probe", "selective", "lp_ft", "gradual_last_to_first", "lora", "full"])
def test_a_run_learns_the_same_with_and_without(run_settings, tokens, tmp_path, strategy):
    """Four epochs in fp32, so that each stage has steps; rounding grows by the steps: 1e-3."""
    settings = run_settings(strategy=strategy, freeze_embeddings=True, epochs=4, precision="fp32")
    whole, kept = fit.fit_cells(settings, tokens), fit.fit_cells(settings, tokens, tmp_path / "frozen")
    np.testing.assert_allclose(whole.probabilities, kept.probabilities, atol=1e-3)
    np.testing.assert_allclose(whole.history["validation_loss"], kept.history["validation_loss"], atol=1e-3)
    assert (tmp_path / "frozen").exists() == (strategy not in ("lora", "full"))


def test_seeds_rates_and_arms_share_it(run_settings, tokens, tmp_path, made):
    for changes in ({}, {"seed": 1}, {"learning_rate": 1e-3}, {"strategy": "lp_ft"}):
        fit.fit_cells(run_settings(**{"strategy": "linear_probe", **changes}), tokens, tmp_path / "frozen")
    assert sum(made) == 72
    probe = run_settings(strategy="linear_probe", pooling="mean")
    fit.fit_cells(probe, tokens, tmp_path / "frozen")
    ridge, prepared = run_settings(strategy="frozen_embedding_ridge"), SimpleNamespace(tokens=tokens, cells=None)
    kept, whole = (baselines.fit(ridge, prepared, folder) for folder in (tmp_path / "frozen", None))
    assert sum(made) == 72
    np.testing.assert_allclose(kept.probabilities, whole.probabilities, atol=1e-4)  # the same arithmetic


def test_other_weights_share_nothing(run_settings, tokens, tmp_path, made):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = CellClassifier(classifier.build(run_settings(), tokens.vocabulary, tokens.classes).config)
        strategies.set_learning(model, strategies.plan_of(run_settings(strategy="linear_probe"), 2), {"classifier"})
        cells = Cells(tokens.dataset, 0, packed=True)
        Frozen(tmp_path / "frozen", 1e9, bf16=False).inputs(model, cells, cells.__getitems__([0]))
    assert made == [72, 72]


def test_a_killed_job_leaves_no_cell_that_seems_done(tmp_path):
    """It was killed after its states, in the middle of its record, or before."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(9, 4)).astype(np.float32)
    store = frozen._Store(tmp_path, 4)
    store.append(np.array([b"a" * 16, b"b" * 16], object), states[:5], np.array([2, 3]))
    for path, rest in ((store.states, b"x" * 37), (store.index, b"c" * 20)):
        with path.open("ab") as file:
            file.write(rest)
    again = frozen._Store(tmp_path, 4)
    assert set(again.places) == {b"a" * 16, b"b" * 16}
    again.repair()
    again.append(np.array([b"c" * 16], object), states[5:], np.array([4]))
    again.refresh()
    store.refresh()  # another job sees it
    for one in (store, again, frozen._Store(tmp_path, 4)):
        read = one.rows_of(np.array([b"a" * 16, b"c" * 16], object)).read([1, 0]).numpy()
        assert np.array_equal(read, np.concatenate([states[5:], states[:2]]))


def test_above_its_size_nothing_is_kept_and_it_is_said(run_settings, tokens, tmp_path, capsys):
    settings = run_settings(strategy="linear_probe", frozen_cache_gb=1e-7)
    outcome = fit.fit_cells(settings, tokens, tmp_path / "frozen")
    assert outcome.status == "ok"
    assert "their states would take 0.0 GB, and frozen_cache_gb allows 1e-07" in capsys.readouterr().err
    assert sum(path.stat().st_size for path in (tmp_path / "frozen").glob("*/states.bin")) == 0


def test_two_processes_fill_it_at_once(run_settings, tokens, tmp_path, monkeypatch):
    """Both read right states, and no cell is computed twice, as the second waits and reads what the first has made."""
    settings = run_settings(strategy="linear_probe", precision="fp32")
    monkeypatch.syspath_prepend(paths.ROOT)  # where the new processes find this file
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs = [pool.submit(filled_by, settings, tokens, tmp_path / "frozen") for _ in range(2)]
        found = [job.result(timeout=120) for job in jobs]
    model = classifier.build(settings, tokens.vocabulary, tokens.classes).eval()
    with torch.no_grad():
        expected = model.encode(Cells(tokens.dataset, 0, packed=True).__getitems__(np.arange(72)))
    for states in found:
        np.testing.assert_allclose(states, expected, atol=1e-5)  # batches of another shape: some hundred roundings
    (index,) = tmp_path.glob("frozen/*/index.bin")
    assert index.stat().st_size == 72 * frozen.RECORD.itemsize


def filled_by(settings, tokens, folder):
    """Fill the folder in a process of its own, and return what it has of each cell."""
    torch.manual_seed(0)
    model = classifier.build(settings, tokens.vocabulary, tokens.classes).requires_grad_(False)
    cells = Cells(tokens.dataset, 0, packed=True)
    below = Frozen(folder, 1e9, bf16=False)
    return below.inputs(model, cells, cells.__getitems__(np.arange(72)))["states"].numpy()
