"""The answer of a study of genes: whether each arm is better than chance, and what the declared contrasts find.

In: rows of ``runs.csv`` and ``predictions.parquet`` from `tuneformer.model.genes`, in which a gene is a cell with a
score. Out: the content of ``answer.json``, as `compare.answer` gives it for cells; the score is the AUC over genes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.evaluate import compare
from tuneformer.evaluate.resampling import Estimate, resampled_t
from tuneformer.evaluate.telling import CHANCE, recommendations
from tuneformer.model.gene_baselines import chance_aucs, pair_auc
from tuneformer.model.genes import PERMUTED
from tuneformer.study import CONTROL, GENE_BASELINES, Contrast, Study, contrasts


def answer(
    settings: Study, runs: pd.DataFrame, predictions: pd.DataFrame, declared: Sequence[Contrast] | None = None
) -> dict[str, Any]:
    """Answer a study of genes.

    Each arm against chance is a contrast whose reference is `CHANCE`: its p value is the share of
    `gene_baselines.chance_aucs` that reach its AUC (one-sided), and it is never called the same. The same permutations
    give the interval of every arm: as far around its AUC as 95 % of them stray from one half. `declared` contrasts
    (None: those of the study) are tested over the folds of genes, seeds averaged. The control whose classes are
    permuted is an arm, and in no contrast.
    """
    positive = predictions["label"].value_counts().sort_index(ascending=False).idxmin()  # as in `gene_lists`
    table = predictions.assign(target=(predictions["label"] == positive).astype(int))
    by_arm = {str(arm): rows for arm, rows in table.groupby("arm", sort=False, observed=True)}
    folds = {arm: _by_fold(rows) for arm, rows in by_arm.items()}
    chance = {arm: chance_aucs(rows, positive) for arm, rows in by_arm.items() if not arm.endswith(PERMUTED)}
    asked = [Contrast("better than chance", CHANCE, arm) for arm in chance]
    asked += contrasts(settings) if declared is None else list(declared)
    n_genes = predictions.drop_duplicates("cell")["label"].value_counts()
    n_folds = int(predictions["fold"].nunique())
    seeds = {arm: int(rows["seed"].nunique()) for arm, rows in by_arm.items()}
    sizes = {"cells": int(n_genes.sum()), "units": n_folds, "folds": n_folds, "score": "auc", "margin": settings.margin}
    sizes |= {"why": None, "more_seeds": None, "times_cells": None}
    judged = [
        {**one._asdict(), **_judged(one, folds, chance, settings.margin), "seeds": seeds[one.arm], **sizes}
        for one in asked
        if one.arm in folds and (one.reference == CHANCE or one.reference in folds)
    ]
    arms = []
    for arm, rows in runs.groupby("arm", sort=False):
        mean = folds[arm].mean() if arm in folds else np.nan
        low, high = np.clip(_around(mean, chance[arm]), 0, 1) if arm in chance else (np.nan, np.nan)
        if arm in folds and arm not in chance:  # its classes differ from seed to seed
            low, high = compare.interval(_over_folds(folds[arm]))
        n_ok, strategy = int((rows["status"] == "ok").sum()), rows["strategy"].iloc[0]
        arms.append({"arm": arm, "mean": mean, "low": low, "high": high, "n_runs": n_ok, "n_failed": len(rows) - n_ok,
                     "n_constant": 0, "is_baseline": strategy in GENE_BASELINES,
                     "is_control": strategy == CONTROL or arm.endswith(PERMUTED), "is_ceiling": False})  # fmt: skip
    task = {"task": settings.task, "folds": n_folds, "seeds": sorted(map(int, runs["seed"].unique()))}
    task |= {"test_cells": {name: int(number) for name, number in n_genes.items()}, "left_out": {}}
    task |= {"arms": compare.plain(pd.DataFrame(arms).sort_values("mean", ascending=False))}
    task |= {"contrasts": compare.plain(compare.decided(pd.DataFrame(judged)))}
    task["recommendation"] = recommendations(task)
    head = {name: getattr(settings, name) for name in ("study", "question", "simulated", "margin")}
    rule = (
        "An arm is better than chance if its AUC over genes exceeds that with permuted classes, which also gives the "
        "interval of its score; arm and reference are "
        f"compared over folds of genes, seeds averaged (Nadeau and Bengio); p < {compare.ALPHA} after Holm over all "
        f"{len(judged)} counts, as do two one-sided tests for the same within {settings.margin:g}, corrected likewise."
    )
    fixed = {"kind": "genes", "score": "auc", "alpha": compare.ALPHA, "rule": rule, "n_contrasts": len(judged)}
    return {**head, **fixed, "tasks": [task]}


def _by_fold(rows: pd.DataFrame) -> np.ndarray:
    """Return the AUC of each fold, the mean over seeds, (folds,)."""
    places = rows.groupby(["fold", "seed"])
    found = pd.Series({place: pair_auc(part["score"], part["target"], part["fold"]) for place, part in places})
    return found.groupby(level=0).mean().to_numpy()


def _over_folds(values: np.ndarray) -> Estimate:
    return resampled_t(values, len(values) - 1, 1)


def _around(value: float, permuted: np.ndarray) -> np.ndarray:
    """Return the interval around a value whose permutations stray from one half as `permuted` do."""
    return value + 0.5 - np.quantile(permuted, [1 - compare.TAIL, compare.TAIL])


def _judged(
    one: Contrast, folds: dict[str, np.ndarray], chance: dict[str, np.ndarray], margin: float
) -> dict[str, Any]:
    """Return what one contrast found: difference, interval, p and p_same."""
    if one.reference == CHANCE:
        value = folds[one.arm].mean() - 0.5
        low, high = np.clip(_around(value, chance[one.arm]), -0.5, 0.5)
        p = compare.permutation_p(0.5 + value, chance[one.arm])
        return {"difference": value, "low": low, "high": high, "p": p, "p_same": np.nan}
    value, error, df = _over_folds(folds[one.arm] - folds[one.reference])
    half = stats.t.ppf(1 - compare.TAIL, df) * error
    row = {"difference": value, "low": max(value - half, -1.0), "high": min(value + half, 1.0)}
    p = float(2 * stats.t.sf(abs(value) / error, df)) if error else float(value == 0)
    return row | {"p": p, "p_same": float(stats.t.sf((margin - abs(value)) / max(error, 1e-12), df))}
