"""Losses against their formulas in numpy, their gradients against finite differences, and what must be ignored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from tuneformer.artifacts import UserError
from tuneformer.model import losses

COUNTS = np.array([60, 30, 9, 1])
NAMES = tuple(losses.LOSSES)


def make(loss, counts=COUNTS, gamma=2.0, alpha="equal"):
    return losses.make_loss(SimpleNamespace(loss=loss, focal_gamma=gamma, focal_alpha=alpha), counts)


@pytest.fixture
def batch():
    """Seven cells of three of four classes; the third class has none."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (7, 4)))
    return logits, torch.tensor([0, 0, 1, 3, 1, 0, 3])


def softmax(logits):
    e = np.exp(logits)
    return e / e.sum(axis=1, keepdims=True)


def by_formula(name, logits, labels):
    z, y = logits.numpy(), labels.numpy()
    n, n_classes = z.shape
    p, g, w = softmax(z), np.eye(n_classes)[y], COUNTS.sum() / (n_classes * COUNTS)
    cell = np.arange(n)
    if name == "cross_entropy":
        return np.mean([-np.log(p[i, y[i]]) for i in range(n)])
    if name == "weighted":
        return np.mean([-w[y[i]] * np.log(p[i, y[i]]) for i in range(n)])
    if name == "balanced_softmax":
        scaled = COUNTS * np.exp(z)
        return -np.log(scaled[cell, y] / scaled.sum(axis=1)).mean()
    if name == "focal":
        return np.mean([-((1 - p[i, y[i]]) ** 2) * np.log(p[i, y[i]]) for i in range(n)])
    if name == "dice":
        dice = [2 * (p[:, c] * g[:, c]).sum() / ((p[:, c] ** 2).sum() + g[:, c].sum()) for c in sorted(set(y))]
        return 1 - np.mean(dice)
    s = 1 / (1 + np.exp(-z))
    return -(g * np.log(s) + (1 - g) * np.log(1 - s)).sum(axis=1).mean()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_its_formula(name, batch):
    assert make(name)(*batch).item() == pytest.approx(by_formula(name, *batch), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_formula(name, batch):
    logits, labels = batch
    labels = labels.clone()
    labels[2] = losses.IGNORED
    assert torch.autograd.gradcheck(lambda z: make(name, alpha="balanced")(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_the_gradient_of_focal_at_other_gammas(gamma, batch):
    logits, labels = batch
    loss = make("focal", gamma=gamma)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_an_ignored_label_changes_nothing(name, batch):
    logits, labels = batch
    loss = make(name, alpha="balanced")
    more = torch.cat([logits, torch.full((5, 4), 30.0, dtype=logits.dtype)]).requires_grad_()
    value = loss(more, torch.cat([labels, torch.full((5,), losses.IGNORED)]))
    torch.testing.assert_close(value, loss(logits, labels), rtol=1e-12, atol=0)
    value.backward()
    assert (more.grad[7:] == 0).all()
    assert (more.grad[:7] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_ignored_labels_has_loss_and_gradient_zero(name):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = make(name, alpha="balanced")(logits, torch.full((3,), losses.IGNORED))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_logits_of_any_size_give_finite_loss_and_gradient(name, gamma):
    logits = torch.tensor([[1e4, 0.0, -1e4, 5.0], [0.0, -1e4, 1e4, 0.0], [90.0, 0, 0, 0]]).requires_grad_()
    value = make(name, gamma=gamma)(logits, torch.tensor([0, 1, 0]))
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_tokens_reshaped_by_the_caller_are_like_cells(batch):
    logits, labels = batch
    tokens = torch.stack([logits, logits.flip(0)])  # (batch, length, classes)
    values = make("weighted")(tokens.reshape(-1, 4), torch.stack([labels, labels.flip(0)]).reshape(-1))
    torch.testing.assert_close(values, make("weighted")(logits, labels), rtol=1e-12, atol=0)


def test_focal_without_focus_is_cross_entropy(batch):
    torch.testing.assert_close(make("focal", gamma=0.0)(*batch), functional.cross_entropy(*batch))
    balanced = make("focal", gamma=0.0, alpha="balanced")
    torch.testing.assert_close(balanced(*batch), make("weighted")(*batch))


def test_focal_alpha_multiplies_each_class(batch):
    logits, labels = batch
    alpha = losses.class_weights(COUNTS)
    each = [make("focal", alpha="equal")(logits[[i]], labels[[i]]) * alpha[labels[i]] for i in range(7)]
    torch.testing.assert_close(make("focal", alpha="balanced")(logits, labels), torch.stack(each).mean())


def test_equal_classes_need_no_balance(batch):
    expected = functional.cross_entropy(*batch)
    for name in ("weighted", "balanced_softmax"):
        torch.testing.assert_close(make(name, counts=np.full(4, 12))(*batch), expected)


def test_a_balanced_softmax_that_knows_only_the_prior_has_no_gradient():
    """Logits 0 are best where cells say nothing: the prior explains all (cross entropy would learn it)."""
    labels = torch.from_numpy(np.repeat(np.arange(4), COUNTS))
    logits = torch.zeros(len(labels), 4, dtype=torch.float64, requires_grad=True)
    make("balanced_softmax")(logits, labels).backward()
    torch.testing.assert_close(logits.grad.sum(dim=0), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_class_weights_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(4), COUNTS)
    weights = losses.class_weights(COUNTS).numpy()
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(4), y=labels), rtol=1e-15)
    assert weights[labels].mean() == pytest.approx(1, rel=1e-15)
    np.testing.assert_array_equal(losses.class_weights(torch.tensor(COUNTS)).numpy(), weights)


def test_parts_of_a_batch_have_the_mean_of_the_batch(batch):
    logits, labels = batch[0][:6], batch[1][:6]
    for name in ("cross_entropy", "weighted", "balanced_softmax", "focal", "bce"):
        loss = make(name, alpha="balanced")
        parts = torch.stack([loss(logits[:3], labels[:3]), loss(logits[3:], labels[3:])])
        torch.testing.assert_close(parts.mean(), loss(logits, labels), rtol=1e-12, atol=0)


def test_dice_of_perfect_and_of_wrong_predictions():
    labels = torch.tensor([0, 1, 1])
    sure = 100.0 * functional.one_hot(labels, 4).double()
    assert make("dice")(sure, labels).item() == pytest.approx(0, abs=1e-12)
    assert make("dice")(sure, 3 - labels).item() == pytest.approx(1, abs=1e-12)


def test_probabilities_sum_to_one():
    logits = torch.tensor([[0.0, 2.0, -1.0], [-200.0, -201.0, -300.0]], dtype=torch.float64)
    s = 1 / (1 + np.exp(-logits[0].numpy()))
    np.testing.assert_allclose(losses.probabilities(logits, "bce")[0], s / s.sum(), rtol=1e-12)
    far = np.exp([0.0, -1.0, -100.0])  # the sigmoid of -200 is exp(-200)
    np.testing.assert_allclose(losses.probabilities(logits, "bce")[1], far / far.sum(), rtol=1e-12)
    for name in set(NAMES) - {"bce"}:
        np.testing.assert_allclose(losses.probabilities(logits, name), softmax(logits.numpy()), rtol=1e-12)


def test_the_slope_of_bce_in_a_logit_is_as_steep_as_that_of_the_cross_entropy(batch):
    """At equal probabilities: s - g and p - g, whatever the number of classes."""
    logits, labels = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True), batch[1]
    start = torch.logit(torch.full((4,), 0.25, dtype=torch.float64))
    slopes = [torch.autograd.grad(make(name)(logits + start, labels), logits)[0] for name in ("bce", "cross_entropy")]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)


def test_bce_starts_at_the_base_rate_and_other_losses_at_zero():
    for name in NAMES:
        bias = torch.zeros(4)
        losses.start_at_base_rate(bias, SimpleNamespace(loss=name), COUNTS)
        expected = COUNTS / COUNTS.sum() if name == "bce" else np.full(4, 0.5)
        np.testing.assert_allclose(torch.sigmoid(bias), expected, rtol=1e-6)
    losses.start_at_base_rate(bias, SimpleNamespace(loss="bce"), np.array([5, 0, 2, 1]))
    assert torch.isfinite(bias).all()


@pytest.mark.parametrize("name", ["weighted", "balanced_softmax", "focal"])
def test_a_class_without_training_cells_cannot_be_weighed(name):
    with pytest.raises(UserError, match=r"^Class number 1 of 3 has no training cell.*loss: cross_entropy\.$"):
        make(name, counts=np.array([5, 0, 2]), alpha="balanced")
    make("cross_entropy", counts=np.array([5, 0, 2]))
