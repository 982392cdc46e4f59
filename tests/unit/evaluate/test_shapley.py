"""Shares of a fall: against games whose shares are known, and against the rule for differences."""

from itertools import chain, combinations

import numpy as np
import pandas as pd
import pytest

from tuneformer.artifacts import UserError
from tuneformer.evaluate.compare import judge
from tuneformer.evaluate.shapley import FACTORS, WHOLE, pseudobulk_factors, shapley_shares
from tuneformer.study import Contrast, load_study

ORDERED = [set(chosen) for n in range(5) for chosen in combinations(FACTORS, n)]
POSSIBLE = [chosen for chosen in ORDERED if "averaging" in chosen or "depth" not in chosen]


def arms_of(sets):
    return {"+".join(sorted(chosen)) or "none": frozenset(chosen) for chosen in sets}


def predictions(factors, accuracy, *, seeds=4, cells=400, noise=0.0):
    """Runs on cells of two classes, of which each gets a given share right, up to noise between seeds."""
    rng, rows = np.random.default_rng(0), []
    labels, hard = np.tile([0, 1], cells // 2), np.repeat(rng.permutation(cells // 2), 2)  # pairs of the two classes
    for seed in range(seeds):
        for arm, changed in factors.items():
            share = accuracy(changed) + rng.normal(0, noise)
            predicted = np.where(hard < round(share * cells / 2), labels, 1 - labels)
            cell = [f"cell{number}" for number in range(cells)]
            rows.append(pd.DataFrame({"arm": arm, "seed": seed, "cell": cell, "label": labels, "predicted": predicted}))
    return pd.concat(rows).assign(task="drugs", fold=np.nan).astype({"label": str, "predicted": str})  # scores: float32


def shares(factors, accuracy, **options):
    table = shapley_shares(predictions(factors, accuracy, **options), factors, score="accuracy")
    return table.set_index("factor")


def test_effects_that_add_up_are_found_whatever_the_order():
    effects = dict(zip(FACTORS, [0.1, 0.05, 0.2, 0.05], strict=True))
    found = shares(arms_of(POSSIBLE), lambda changed: 0.9 - sum(effects[name] for name in changed))
    for end in ("effect", "first", "last"):
        np.testing.assert_allclose(found.loc[list(FACTORS), end], list(effects.values()), atol=1e-6)
    np.testing.assert_allclose(found.loc[list(FACTORS), "share"], np.array(list(effects.values())) / 0.4, atol=1e-6)
    assert found.loc[WHOLE, ["effect", "first", "last", "share"]].tolist() == pytest.approx(
        [0.4, 0.4, 0.4, 1], abs=1e-6
    )


def test_what_either_of_two_causes_alone_is_shared_by_both():
    """Steps or points alone cost all of it: the path decides who seems guilty, and each has half (Shapley)."""
    found = shares(arms_of(POSSIBLE), lambda changed: 0.5 if {"fewer steps", "fewer points"} & changed else 0.9)
    assert found["effect"].to_dict() == pytest.approx(
        {WHOLE: 0.4, "fewer steps": 0.2, "fewer points": 0.2, "averaging": 0, "depth": 0}, abs=1e-6
    )
    assert found.loc["fewer steps", ["first", "last"]].tolist() == pytest.approx([0.4, 0], abs=1e-6)


def test_an_effect_of_depth_is_counted_only_behind_averaging():
    """Averaging alone wins 0.1, with depth it loses 0.3: the first is averaging's, the difference of 0.4 is depth's."""
    loss = {True: 0.3, False: -0.1}
    found = shares(arms_of(POSSIBLE), lambda changed: 0.6 - ("averaging" in changed and loss["depth" in changed]))
    assert found.loc[["averaging", "depth"], "effect"].tolist() == pytest.approx([-0.1, 0.4], abs=1e-6)
    free = shares(arms_of(ORDERED), lambda changed: 0.6 - 0.3 * ({"averaging", "depth"} <= changed))  # all 24 orders
    assert free.loc[["averaging", "depth"], "effect"].tolist() == pytest.approx([0.15, 0.15], abs=1e-6)


def test_the_effects_add_up_to_the_fall_and_its_interval_is_that_of_the_difference():
    factors = arms_of(POSSIBLE)
    table = predictions(factors, lambda changed: 0.85 - 0.1 * len(changed) ** 1.3, noise=0.03)
    found = shapley_shares(table, factors, score="accuracy").set_index("factor")
    assert found.loc[list(FACTORS), "effect"].sum() == pytest.approx(found.loc[WHOLE, "effect"], abs=1e-6)
    assert found.loc[list(FACTORS), "share"].sum() == pytest.approx(1, abs=1e-6)
    every = "+".join(sorted(FACTORS))
    (row,) = judge(table, [Contrast("fall", every, "none")], score="accuracy", margin=0.03).to_dict("records")
    names = ["effect", "effect_low", "effect_high"]
    assert found.loc[WHOLE, names].tolist() == pytest.approx([row["difference"], row["low"], row["high"]], abs=1e-6)
    assert (found["effect_low"] < found["effect"]).all()
    assert (found["first_low"] < found["first_high"]).all()
    assert (found["share_low"] < found["share_high"])[list(FACTORS)].all()


def test_no_share_of_a_fall_that_may_be_none():
    found = shares(arms_of(POSSIBLE), lambda changed: 0.8, noise=0.05)
    assert found["share"].isna().all()
    assert found["effect"].notna().all()


def test_a_factorial_without_a_way_is_refused():
    factors = arms_of([chosen for chosen in POSSIBLE if len(chosen) != 2])
    with pytest.raises(UserError, match="Some arm is lacking on every way from no changed factor to all"):
        shapley_shares(pd.DataFrame(), factors)


def test_the_demo_study_has_all_combinations_that_can_be_made():
    found = pseudobulk_factors(load_study("demo_pseudobulk"))
    assert list(found) == [10, 100]
    for arms in found.values():
        assert sorted(map(sorted, arms.values())) == sorted(map(sorted, POSSIBLE))
    assert set(chain(*found.values())) <= set(load_study("demo_pseudobulk").arms)
    assert pseudobulk_factors(load_study("demo")) == {}
