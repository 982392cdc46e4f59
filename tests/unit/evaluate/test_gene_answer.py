"""The answer of a study of genes, from made-up scores."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tuneformer.evaluate import compare, gene_answer, telling
from tuneformer.model import gene_baselines
from tuneformer.model.gene_baselines import chance_aucs, pair_auc
from tuneformer.study import Contrast, load_study

N, FOLDS = 200, 5
SKILL = {"full": 1.2, "random_init": 0.0, "frozen_embedding": 1.2, "full_permuted": 0.0}


@pytest.fixture(scope="module")
def found():
    """Scores of 200 genes by four arms, and the rows of their runs; the baseline has one seed."""
    rng = np.random.default_rng(0)
    label = np.repeat(["rare", "common"], [60, N - 60])
    fold, noise = np.arange(N) % FOLDS, rng.normal(size=N)
    tables, rows = [], []
    for arm, skill in SKILL.items():
        strategy = arm.removesuffix("_permuted")
        for seed in range(1 if arm == "frozen_embedding" else 3):
            own = noise if strategy in ("full", "frozen_embedding") and skill else rng.normal(size=N)
            scores = skill * (label == "rare") + own + rng.normal(0, 0.1, N)
            table = pd.DataFrame({"cell": [f"g{n}" for n in range(N)], "label": label, "score": scores, "fold": fold})
            tables.append(table.assign(task="drug_5class", arm=arm, seed=seed))
            row = {"task": "drug_5class", "arm": arm, "strategy": strategy, "seed": seed, "status": "ok"}
            rows += [{**row, "fold": number} for number in range(FOLDS)]
    return pd.DataFrame(rows), pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def answer(found):
    asked = [Contrast("pre-training", "random_init", "full"), Contrast("context", "frozen_embedding", "full")]
    return gene_answer.answer(load_study("tiny"), *found, [*asked, Contrast("linear model", "logistic_counts", "full")])


def test_arms_are_scored_over_folds_with_the_mean_of_their_seeds(found, answer):
    arms = {one["arm"]: one for one in answer["tasks"][0]["arms"]}
    assert {name: (one["is_baseline"], one["is_control"]) for name, one in arms.items()} == {
        "full": (False, False),
        "random_init": (False, True),
        "frozen_embedding": (True, False),
        "full_permuted": (False, True),
    }
    rows = found[1][found[1]["arm"] == "full"].assign(target=lambda table: (table["label"] == "rare").astype(int))
    areas = [pair_auc(part["score"], part["target"], part["fold"]) for _, part in rows.groupby(["seed", "fold"])]
    assert arms["full"]["mean"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert 0.5 < arms["full"]["low"] < arms["full"]["mean"] < arms["full"]["high"] < 1
    assert (arms["full"]["n_runs"], arms["frozen_embedding"]["n_runs"]) == (15, 5)


def test_each_arm_is_tested_against_chance_and_the_permuted_control_is_not(found, answer):
    rows = {one["arm"]: one for one in answer["tasks"][0]["contrasts"] if one["reference"] == "chance"}
    assert {arm: row["verdict"] for arm, row in rows.items()} == {
        "full": "higher",
        "random_init": "not decided",
        "frozen_embedding": "higher",
    }
    own = found[1][found[1]["arm"] == "random_init"]
    arms = {one["arm"]: one["mean"] for one in answer["tasks"][0]["arms"]}
    assert rows["random_init"]["p"] == pytest.approx((chance_aucs(own, "rare") >= arms["random_init"]).mean(), abs=5e-3)
    assert all(row["p_same"] is None for row in rows.values())


def test_declared_contrasts_are_corrected_resampled_t_tests_over_folds(found, answer):
    rows = {one["contrast"]: one for one in answer["tasks"][0]["contrasts"] if one["reference"] != "chance"}
    assert set(rows) == {"pre-training", "context"}  # an arm that tells no genes apart is left out
    assert rows["pre-training"]["verdict"] == "higher"
    areas = {}
    for (arm, _), part in found[1].groupby(["arm", "fold"]):
        target = (part["label"] == "rare").astype(int)
        seeds = [pair_auc(one["score"], target[one.index], one["fold"]) for _, one in part.groupby("seed")]
        areas.setdefault(arm, []).append(np.mean(seeds))
    for name, reference in {"pre-training": "random_init", "context": "frozen_embedding"}.items():
        difference = np.subtract(areas["full"], areas[reference])
        error = np.sqrt((1 / FOLDS + 1 / (FOLDS - 1)) * difference.var(ddof=1))
        assert rows[name]["difference"] == pytest.approx(difference.mean(), rel=1e-4)
        assert rows[name]["p"] == pytest.approx(2 * stats.t.sf(abs(difference.mean()) / error, FOLDS - 1), rel=1e-4)
    p_values = [one["p"] for one in answer["tasks"][0]["contrasts"]]
    corrected = [one["p_holm"] for one in answer["tasks"][0]["contrasts"]]
    np.testing.assert_allclose(compare.holm(p_values), corrected, rtol=1e-4)


def test_the_answer_has_the_form_of_all_answers(answer):
    assert (answer["kind"], answer["score"], answer["n_contrasts"]) == ("genes", "auc", 5)
    assert answer["tasks"][0]["test_cells"] == {"common": 140, "rare": 60}
    said = answer["tasks"][0]["recommendation"]
    assert "Better than chance: full, frozen_embedding." in said
    assert any(line.startswith("Pre-training pays: random_init scored lower than full") for line in said)
    for one in answer["tasks"][0]["contrasts"]:
        assert telling.sentence(one)


def test_the_interval_of_an_arm_comes_from_permutations_and_covers_its_auc(monkeypatch):
    """Scores of fixed skill, whose AUC is Phi(1.2 / sqrt 2) = 0.802: of 60 sets of 200 genes at least 92 % cover it."""
    monkeypatch.setattr(gene_baselines, "DRAWS", 999)
    settings, hits, rng = load_study("tiny"), 0, np.random.default_rng(3)
    row = {"task": "drug_5class", "arm": "full", "strategy": "full", "seed": 0, "status": "ok", "fold": 0}
    for _ in range(60):
        label = np.repeat(["rare", "common"], [60, N - 60])
        table = pd.DataFrame({"cell": range(N), "label": label, "fold": np.arange(N) % FOLDS, "seed": 0})
        table["score"] = rng.normal(size=N) + 1.2 * (label == "rare")
        found = gene_answer.answer(settings, pd.DataFrame([row]), table.assign(task="drug_5class", arm="full"), [])
        (arm,), (against,) = found["tasks"][0]["arms"], found["tasks"][0]["contrasts"]
        hits += arm["low"] <= stats.norm.cdf(1.2 / np.sqrt(2)) <= arm["high"]
        assert (arm["low"] - 0.5, arm["high"] - 0.5) == pytest.approx((against["low"], against["high"]), abs=1e-5)
        assert (arm["low"] > 0.5) == (against["p"] < 0.025)
    assert hits / 60 >= 0.92
