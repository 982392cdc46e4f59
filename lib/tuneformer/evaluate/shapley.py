"""Why pseudo-bulk scores lower: the fall divided over what differs from single cells, whatever is changed first.

In: predictions of arms in which some of the factors are changed. Out: one row per factor: its Shapley share of the
fall, and its effect as the first and as the last change, with intervals for other seeds and test cells.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.artifacts import UserError
from tuneformer.evaluate.resampling import Estimate, Scored, score_tasks
from tuneformer.study import Study, TrainingKeys

FACTORS = ("fewer steps", "fewer points", "averaging", "depth")
COMBINATIONS = 12  # of the 16, those with averaging where depth is changed
WHOLE = "together"
FREE = {"train_set", "k", "aggregation", "depth", "points", "steps_of"}
"""Keys in which arms of the factorial differ; in all others they agree with the arm on single cells."""
Changed = Mapping[str, frozenset[str]]
"""The factors that are changed in each arm."""


def pseudobulk_factors(settings: Study) -> dict[int, dict[str, frozenset[str]]]:
    """Find the factorial between single cells and sums of k cells among the arms of a study, by k.

    A single cell read k times as deeply is not in the data, so depth can change only where k cells are added up: 12 of
    the 16 combinations can be made. A k without all of them is left out: one way alone would decide who is to blame.
    """
    keys = {arm: settings.with_arm(arm).keys(TrainingKeys) for arm in settings.arms}
    starts = [arm for arm, own in keys.items() if (own["train_set"], own["steps_of"]) == ("single_cell", "own")]
    found: dict[int, dict[str, frozenset[str]]] = {}
    for arm, own in keys.items():
        is_alike = starts and all(own[key] == keys[starts[0]][key] for key in own if key not in FREE)
        if is_alike and own["k"] is not None and own["aggregation"] in ("sum", "one_cell"):
            found.setdefault(own["k"], {starts[0]: frozenset()})[arm] = _changed(own)
    return {k: arms for k, arms in sorted(found.items()) if len(set(arms.values())) == COMBINATIONS}


def shapley_shares(
    predictions: pd.DataFrame | Mapping[str, Scored], factors: Changed, *, score: str = "macro_f1"
) -> pd.DataFrame:
    """Divide the fall from the arm with nothing changed to that with everything changed over the factors.

    The effect of a factor is by how much the score falls when it is changed as well, as a mean over the orders in which
    all can be changed one by one (Shapley 1953). An order of which some step has no arm does not count, as with depth
    before averaging (Faigle and Kern 1992, International Journal of Game Theory 21:249). The effects add up to the
    fall. Each is a sum of weighted arms, so its interval is that of a difference (`Scored.combination`): 95 %, of this
    row alone.

    Returns
    -------
    For each task one row per factor, and `WHOLE`: ``effect`` and ``share`` of the fall (missing where the interval of
    the fall has 0 in it), ``first`` and ``last`` (the effect as the earliest and as the latest possible change), each
    with ``_low`` and ``_high``, and ``seeds``.

    Raises
    ------
    UserError
        In no order all changes have their arms; or as `tuneformer.evaluate.resampling.score_tasks`.
    """
    orders, arm_of = _orders(factors), {changed: arm for arm, changed in factors.items()}
    if not orders:
        msg = "Some arm is lacking on every way from no changed factor to all; give each step of one order an arm."
        raise UserError(msg)
    scored = score_tasks(predictions, score) if isinstance(predictions, pd.DataFrame) else predictions
    whole = {arm_of[frozenset()]: 1.0, arm_of[frozenset(orders[0])]: -1.0}
    ways = {WHOLE: dict.fromkeys(("effect", "first", "last"), whole)}
    ways |= {factor: _ways(orders, factor, arm_of) for factor in orders[0]}
    rows = []
    for task, found in scored.items():
        fall = found.combination(whole)
        is_clear = abs(fall.value) > _half(fall)
        for factor, weights in ways.items():
            row: dict[str, Any] = {"task": task, "factor": factor}
            for name, of_arms in weights.items():
                row |= _with_interval(name, found.combination(of_arms))
            share = row["effect"] / fall.value if is_clear else np.nan
            rest = {arm: weights["effect"].get(arm, 0) - share * whole.get(arm, 0) for arm in factors}  # delta method
            error = found.combination(rest).error / abs(fall.value) if factor != WHOLE else 0.0
            row |= _with_interval("share", Estimate(share, error, fall.df))
            rows.append(row | {"seeds": len(found.seeds(*factors))})
    return pd.DataFrame(rows)


def _changed(own: Mapping[str, Any]) -> frozenset[str]:
    """Return the factors that are changed in an arm."""
    is_sum = own["train_set"] == "pseudobulk" and own["aggregation"] == "sum"
    has_few_points = own["train_set"] == "pseudobulk" and own["points"] == "own"
    has_few_steps = own["steps_of"] == "pseudobulk" or (has_few_points and own["steps_of"] == "own")
    is_changed = (has_few_steps, has_few_points, is_sum, is_sum and own["depth"] == "own")
    return frozenset(factor for factor, is_so in zip(FACTORS, is_changed, strict=True) if is_so)


def _orders(factors: Changed) -> list[tuple[str, ...]]:
    """Return the orders in which all factors can be changed one by one, with an arm after every step."""
    names = sorted(frozenset().union(*factors.values()), key=[*FACTORS, *frozenset().union(*factors.values())].index)
    there = set(factors.values())
    return [order for order in permutations(names) if all({*order[:n]} in there for n in range(len(names) + 1))]


def _ways(orders: Sequence[tuple[str, ...]], factor: str, arm_of: Mapping[frozenset[str], str]) -> dict[str, dict]:
    """Return the weights of the arms in the mean effect of a factor, and in that as the first and the last change."""
    places = [order.index(factor) for order in orders]
    chosen = {"effect": set(places), "first": {min(places)}, "last": {max(places)}}
    ways = {}
    for name, allowed in chosen.items():
        weights: dict[str, float] = {}
        steps = [(order, place) for order, place in zip(orders, places, strict=True) if place in allowed]
        for order, place in steps:
            for end, sign in ((place, 1), (place + 1, -1)):
                arm = arm_of[frozenset(order[:end])]
                weights[arm] = weights.get(arm, 0) + sign / len(steps)
        ways[name] = weights
    return ways


def _half(estimate: Estimate) -> float:
    """Return half the width of a 95 % interval."""
    return float(stats.t.ppf(0.975, estimate.df) * estimate.error)


def _with_interval(name: str, estimate: Estimate) -> dict[str, float]:
    half = _half(estimate)
    return {name: estimate.value, f"{name}_low": estimate.value - half, f"{name}_high": estimate.value + half}
