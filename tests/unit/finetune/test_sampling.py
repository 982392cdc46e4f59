"""Upsampling keeps every cell and adds only of rare classes; the balanced sampler draws classes equally often."""

import numpy as np
import pytest
import torch
from scipy import stats

from tuneformer.finetune.sampling import BalancedSampler, upsampled

LABELS = np.repeat(["a", "b", "c"], [40, 7, 1])


def test_upsampling_gives_every_class_the_size_of_the_largest():
    rows = np.arange(100, 148)
    drawn = upsampled(rows, LABELS, np.random.default_rng(0))
    label_of = dict(zip(rows, LABELS, strict=True))
    assert drawn[:48].tolist() == rows.tolist()
    assert {name: sum(label_of[row] == name for row in drawn) for name in "abc"} == {"a": 40, "b": 40, "c": 40}
    assert (np.unique(drawn[:48], return_counts=True)[1] == 1).all()
    assert all(label_of[row] != "a" for row in drawn[48:])


def test_upsampling_draws_evenly_and_by_the_generator():
    drawn = [upsampled(np.arange(48), LABELS, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    labels = np.repeat(["a", "b"], [8010, 10])
    times = np.bincount(upsampled(np.arange(8020), labels, np.random.default_rng(3)))[8010:] - 1
    assert times.sum() == 8000
    assert stats.chisquare(times).pvalue > 1e-3


def test_equal_classes_are_left_alone():
    assert upsampled(np.arange(4), np.array([0, 1, 0, 1]), np.random.default_rng(0)).tolist() == [0, 1, 2, 3]


def test_the_sampler_draws_classes_and_cells_within_a_class_equally_often():
    labels = np.repeat([2, 0, 5], [11900, 90, 10])
    sampler = BalancedSampler(labels, seed=0)
    drawn = np.array(list(sampler))
    assert len(drawn) == len(sampler) == 12000
    by_class = [(labels[drawn] == name).sum() for name in (2, 0, 5)]
    assert stats.chisquare(by_class).pvalue > 1e-3
    rare = np.bincount(drawn, minlength=12000)[11990:]
    assert stats.chisquare(rare).pvalue > 1e-3


def test_epochs_differ_and_the_global_generator_does_not_matter():
    def epochs(seed):
        sampler = BalancedSampler(LABELS, seed=seed)
        torch.rand(seed + 3)
        return [list(sampler), list(sampler)]

    torch.manual_seed(1)
    first = epochs(0)
    torch.manual_seed(2)
    assert epochs(0) == first
    assert first[0] != first[1]
    assert epochs(1) != first


@pytest.mark.parametrize("n", [1, 5])
def test_a_single_class_is_drawn_from(n):
    assert set(BalancedSampler(np.zeros(n), seed=0)) <= set(range(n))
