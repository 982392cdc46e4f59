"""Areas under ROC curves over genes: against scikit-learn, brute force, and models that are learnt anew."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from tuneformer.model import gene_baselines
from tuneformer.model.gene_baselines import best_threshold, chance_aucs, cross_validate, pair_auc


def genes(seed, n=60, folds=3, shift=1.0):
    rng = np.random.default_rng(seed)
    target = (rng.uniform(size=n) < 0.3).astype(int)
    return rng.normal(size=n) + shift * target, target, rng.integers(folds, size=n)


def as_predictions(scores, target, fold, seed=0):
    names = [f"g{number}" for number in range(len(target))]
    label = np.array(["common", "rare"])[target]
    return pd.DataFrame({"cell": names, "label": label, "seed": seed, "fold": fold, "score": scores})


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
    expected = np.mean(points) if points else np.nan
    assert pair_auc(scores, target, fold) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_with_one_fold_it_is_the_area_under_the_roc_curve():
    scores, target, _ = genes(0)
    assert pair_auc(scores, target, np.zeros(60)) == pytest.approx(roc_auc_score(target, scores), abs=1e-12)


def test_shifts_between_folds_change_nothing():
    scores, target, fold = genes(1)
    shifted = scores + 10 * fold
    assert pair_auc(shifted, target, fold) == pair_auc(scores, target, fold)
    assert abs(roc_auc_score(target, shifted) - roc_auc_score(target, scores)) > 0.05  # pooled, it would


def test_chance_is_the_area_of_permuted_classes_widened_for_the_folds_it_shares():
    """Brute force: permute the classes within folds, score, and widen by sqrt(1 + J / (J - 1)); two seeds."""
    (a, target, fold), (b, _, _) = genes(3), genes(4)
    found = chance_aucs(pd.concat([as_predictions(a, target, fold), as_predictions(b, target, fold, seed=1)]), "rare")
    rng, drawn = np.random.default_rng(5), []
    for _ in range(800):
        other = target.copy()
        for one in range(3):
            other[fold == one] = rng.permutation(other[fold == one])
        drawn.append((pair_auc(a, other, fold) + pair_auc(b, other, fold)) / 2)
    assert found.mean() == pytest.approx(0.5, abs=0.003)  # 9,999 draws: three standard errors
    assert found.std() == pytest.approx(np.std(drawn) * np.sqrt(1 + 3 / 2), rel=0.08)  # 800 draws: 2.5 % each


@pytest.mark.parametrize(("n_genes", "n_features", "folds"), [(120, 6, 5), (90, 30, 3)])
def test_chance_is_no_narrower_than_models_that_are_learnt_anew(n_genes, n_features, folds, monkeypatch):
    """With nothing to find, models that are learnt anew spread no more than what is called chance."""
    monkeypatch.setattr(gene_baselines, "STRENGTHS", [1e-2])
    monkeypatch.setattr(gene_baselines, "INNER_FOLDS", 2)
    rng, reached = np.random.default_rng(0), []
    for _ in range(50):
        target = rng.permutation(np.repeat([1, 0], [n_genes // 4, n_genes - n_genes // 4]))
        split = StratifiedKFold(folds, shuffle=True, random_state=0).split(target, target)
        fold = np.empty(n_genes, dtype=int)
        for number, (_, tested) in enumerate(split):
            fold[tested] = number
        table = pd.DataFrame({"target": target, "fold": fold})
        scores = cross_validate(rng.normal(size=(n_genes, n_features)), table)["score"].to_numpy()
        found = chance_aucs(as_predictions(scores, target, fold), "rare")
        reached.append((pair_auc(scores, target, fold) - 0.5) / found.std())
    assert np.std(reached) < 1.15  # 50 models: the standard error of the spread is 0.1
    assert np.mean(np.array(reached) > 1.645) <= 0.1


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=20).filter(
        lambda rows: len({side for _, side in rows}) == 2
    )
)
def test_no_threshold_is_better_than_the_best(rows):
    scores, target = np.array([float(score) for score, _ in rows]), np.array([int(side) for _, side in rows])
    best = balanced_accuracy_score(target, scores > best_threshold(scores, target))
    others = [balanced_accuracy_score(target, scores > cut) for cut in np.arange(-0.5, 7, 0.5)]
    assert best == pytest.approx(max(others), abs=1e-12)


def test_the_threshold_is_half_way_between_two_scores():
    assert best_threshold(np.array([0.0, 1.0, 3.0, 4.0, np.nan]), np.array([0, 0, 1, 1, 1])) == 2.0
