"""Areas under ROC curves over genes: against scikit-learn, brute force, and theory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from tuneformer.evaluate.gene_scores import auc_difference, auc_interval, best_threshold, pair_auc


def genes(seed, n=60, folds=3, shift=1.0):
    rng = np.random.default_rng(seed)
    target = (rng.uniform(size=n) < 0.3).astype(int)
    return rng.normal(size=n) + shift * target, target, rng.integers(folds, size=n)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2), st.booleans()), min_size=1, max_size=25))
def test_the_share_of_pairs_won_is_that_of_brute_force(rows):
    scores = np.array([np.nan if missing else float(score) for score, _, _, missing in rows])
    target, fold = np.array([int(row[1]) for row in rows]), np.array([row[2] for row in rows])
    points = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, is_positive, f in zip(scores, target, fold, strict=True)
        for b, is_other, g in zip(scores, target, fold, strict=True)
        if is_positive and not is_other and f == g and not np.isnan(a) and not np.isnan(b)
    ]
    found = pair_auc(scores, target, fold)
    if not points:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(np.mean(points), abs=1e-12)


def test_with_one_fold_it_is_the_area_under_the_roc_curve():
    scores, target, _ = genes(0)
    assert pair_auc(scores, target, np.zeros(60)) == pytest.approx(roc_auc_score(target, scores), abs=1e-12)


def test_shifts_between_folds_change_nothing():
    scores, target, fold = genes(1)
    shifted = scores + 10 * fold
    assert pair_auc(shifted, target, fold) == pair_auc(scores, target, fold)
    assert abs(roc_auc_score(target, shifted) - roc_auc_score(target, scores)) > 0.05  # pooled, it would


def test_the_interval_is_as_wide_as_delong_says():
    """Source of the variance: DeLong et al. 1988, equation 5."""
    rng = np.random.default_rng(2)
    positive, negative = rng.normal(1, 1, 150), rng.normal(0, 1, 350)
    won = (positive[:, None] > negative).astype(float)
    sd = np.sqrt(won.mean(axis=1).var(ddof=1) / 150 + won.mean(axis=0).var(ddof=1) / 350)
    scores, target = np.concatenate([positive, negative]), np.repeat([1, 0], [150, 350])
    found = auc_interval([scores], target, np.zeros(500))
    assert found.value == pytest.approx(won.mean(), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.06)  # 2,000 draws: 3 % of each end


def test_the_interval_holds_the_true_area_as_often_as_it_says():
    truth, held = 0.5, 0
    for seed in range(300):
        scores, target, fold = genes(seed, n=120, folds=2, shift=0.0)
        found = auc_interval([scores], target, fold)
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 300 <= 0.98  # 95 %, and two standard errors of 300 draws and of the bootstrap's bias


def test_several_seeds_are_a_mean_of_areas_not_of_scores():
    (a, target, fold), (b, _, _) = genes(3), genes(4)
    found = auc_interval([a, b], target, fold)
    assert found.value == pytest.approx((pair_auc(a, target, fold) + pair_auc(b, target, fold)) / 2, abs=1e-12)


def test_a_difference_of_the_same_scores_is_nothing_and_of_others_is_paired():
    scores, target, fold = genes(5, n=200)
    assert auc_difference([scores], [scores * 3 + 1], target, fold) == (0.0, 0.0, 0.0)
    near = scores + np.random.default_rng(0).normal(0, 0.1, 200)
    paired = auc_difference([scores], [near], target, fold)
    alone = auc_interval([scores], target, fold)
    assert paired.value == pytest.approx(alone.value - auc_interval([near], target, fold).value, abs=1e-12)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)


def test_the_intervals_are_the_same_each_time():
    assert auc_interval([genes(6)[0]], *genes(6)[1:]) == auc_interval([genes(6)[0]], *genes(6)[1:])


def test_without_a_pair_there_is_no_area():
    nothing = auc_interval([np.array([1.0, 2.0])], np.array([1, 0]), np.array([0, 1]))
    assert np.isnan(nothing).all()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=20).filter(
        lambda r: len({b for _, b in r}) == 2
    )
)
def test_no_threshold_is_better_than_the_best(rows):
    scores, target = np.array([float(score) for score, _ in rows]), np.array([int(side) for _, side in rows])
    best = balanced_accuracy_score(target, scores > best_threshold(scores, target))
    others = [balanced_accuracy_score(target, scores > cut) for cut in np.arange(-0.5, 7, 0.5)]
    assert best == pytest.approx(max(others), abs=1e-12)


def test_the_threshold_stands_between_two_scores():
    assert best_threshold(np.array([0.0, 1.0, 3.0, 4.0, np.nan]), np.array([0, 0, 1, 1, 1])) == 2.0
