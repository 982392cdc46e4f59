"""What an answer says in plain words: verdicts as sentences, and for each task a recommendation, made by one rule.

In: rows and tasks of ``answer.json``, as `tuneformer.evaluate.compare` makes them. Out: sentences. Nothing is tested
here: a recommendation follows from the verdicts and the means alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tuneformer.evaluate.resampling import FEW_CELLS
from tuneformer.study import Study

ALPHA = 0.05
HIGHER, LOWER, SAME, UNDECIDED, WITHHELD = "higher", "lower", "same", "not decided", "withheld"
CHANCE = "chance"  # the reference of a contrast that is no arm
MOST_CONSTANT = 0.25  # share of the runs of an arm that may predict one class only, for such a verdict
LEAST_KNOWN = 0.5  # share of the genes that a checkpoint has to know for a verdict on its pre-training
MOST_SEEDS, MOST_TIMES = 100, 10  # more seeds, and times the test cells, that are asked for at most
NAMES = {"macro_f1": "macro-F1", "weighted_f1": "weighted F1", "auc": "AUC"}
PLAIN = {
    "full": "full fine-tuning",
    "linear_probe": "a linear probe",
    "logistic_counts": "logistic regression on counts",
    "logistic_ranks": "logistic regression on the ranks of genes",
    "knn_pca": "nearest neighbours",
    "frozen_embedding_ridge": "ridge regression on the untouched model's embedding",
}
SHOWN = 3  # arms that a sentence names with their differences


def sentence(row: Mapping[str, Any]) -> str:
    """Say in plain words what one contrast of `judge`, or of an answer, found."""
    arm, reference, verdict = row["arm"], row["reference"], row["verdict"]
    if not row["seeds"]:
        return f"{arm} and {reference} could not be compared: they have no finished run of the same seed."
    said = {
        HIGHER: f"{arm} scores higher than {reference}",
        LOWER: f"{arm} scores lower than {reference}",
        SAME: f"{arm} and {reference} are the same within {row['margin']:g}",
        UNDECIDED: f"Not decided between {arm} and {reference}",
        WITHHELD: f"No verdict on {arm} and {reference}, as {row['why']}",
    }[verdict]
    is_tested = not pd.isna(row["p"])
    shown = f"{row['difference']:+.3f} {score_name(row['score'])}"
    shown += f" ({row['low']:+.3f} to {row['high']:+.3f})" if is_tested else ""
    sizes = [counted(row["folds"], "fold")] if row["folds"] else []
    sizes += [counted(row["seeds"], "seed"), counted(row["cells"], "gene" if row["score"] == "auc" else "test cell")]
    sizes[-1] += f" in {counted(row['units'], 'group')}" if row["units"] < row["cells"] and not row["folds"] else ""
    if verdict == UNDECIDED and is_tested and row["p"] < ALPHA:
        sizes.append(f"p = {row['p']:.3f} alone and {row['p_holm']:.3f} among all contrasts of the study")
    return f"{said}: {shown}, {', '.join(sizes)}.{needed(row)}"


def needed(row: Mapping[str, Any]) -> str:
    """Say what would decide a contrast that is not decided; nothing about others, or where that cannot be known."""
    if row["verdict"] != UNDECIDED or pd.isna(row["p"]) or row["folds"]:
        return ""
    if pd.notna(row["more_seeds"]):
        return f" About {counted(int(row['more_seeds']), 'more seed')} would decide, if it stays so."
    has_seeds = row["seeds"] > 1
    if pd.notna(row["times_cells"]):
        said = "More seeds would not decide, about" if has_seeds else "About"
        return f" {said} {row['times_cells']:g} times the test cells would{'' if has_seeds else ' decide'}."
    if has_seeds:
        return f" Neither {MOST_SEEDS} more seeds nor {MOST_TIMES} times the test cells would decide."
    return f" Not even {MOST_TIMES} times the test cells would decide."


def recommendations(task: Mapping[str, Any]) -> list[str]:
    """Say in plain words what follows from one task of an answer for someone who wants to use it.

    Arms that declared contrasts connect are one choice. An arm is recommended if it is the only one of them that no
    contrast finds lower than another; several are if each of them is higher than another. So a wrong arm is recommended
    only if a verdict is wrong, which Holm's correction keeps to `ALPHA` a study. The control and the ceiling cannot be
    chosen; contrasts with them say what pre-training does. What is left open is said with what would decide it.
    """
    arms = {one["arm"]: one for one in task["arms"]}
    usable = {name for name, one in arms.items() if not (one["is_control"] or one["is_ceiling"])}
    asked = [one for one in task["contrasts"] if one["seeds"]]
    between = [one for one in asked if {one["arm"], one["reference"]} <= usable]
    said = [line for choice in _connected(between) for line in _choice(choice, arms)]
    if not between:
        said.append("No arm is recommended: no contrast compares two arms that could be chosen.")
    said += [_of_pretraining(one, arms) for one in asked if _control(one, arms) and one["reference"] != CHANCE]
    said += _of_chance([one for one in asked if one["reference"] == CHANCE])
    said += [sentence(one) for one in task["contrasts"] if not one["seeds"]]
    compared = {name for one in between for name in (one["arm"], one["reference"])}
    best = max((arms[name]["mean"] or 0 for name in compared), default=1)
    higher = [name for name in usable - compared if (arms[name]["mean"] or 0) > best]
    if higher:
        said.append(f"Higher means, but in no contrast, so not tested: {_listed(sorted(higher), arms)}.")
    for name, one in arms.items():
        if one["is_ceiling"] and one["mean"] is not None:
            said.append(f"No classifier can expect more than about {one['mean']:.3f} here (the ceiling, {name}).")
        if one["n_constant"] and name != "majority":
            said.append(
                f"{one['n_constant']} of {counted(one['n_runs'], 'run')} of {name} never left one class: its mean "
                "tells more of training that failed than of the method."
            )
    sizes = ", ".join(f"{name} {n:,}" for name, n in task["test_cells"].items())
    if task["left_out"]:
        few = ", ".join(task["left_out"])
        folds = "" if task["folds"] else "; with folds every cell is tested once"
        sizes += f". Left out of the judged score, with fewer than {FEW_CELLS}: {few}{folds}"
    return [*said, f"Tested on: {sizes}."]


def plainly(arm: str) -> str:
    """Return an arm in words, with its name."""
    return f"{PLAIN[arm]} ({arm})" if arm in PLAIN else arm


def _connected(between: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Divide contrasts into those that share arms, directly or by others."""
    choices: list[tuple[set[str], list[Mapping[str, Any]]]] = []
    for one in between:
        ends, own = {one["arm"], one["reference"]}, [one]
        for choice in [choice for choice in choices if choice[0] & ends]:
            choices.remove(choice)
            ends, own = ends | choice[0], [*choice[1], *own]
        choices.append((ends, own))
    return [own for _, own in choices]


def _choice(between: Sequence[Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Recommend one of the arms that some contrasts connect, or say what keeps the study from it."""
    lost = {(_loser(one), _winner(one)): _loss(one) for one in between if one["verdict"] in (HIGHER, LOWER)}
    losers = {loser for loser, _ in lost}
    best = [
        name for name in arms if name not in losers and any(name in (one["arm"], one["reference"]) for one in between)
    ]
    if len(best) == 1:
        own = [f"{plainly(loser)} scored lower ({text})" for (loser, winner), text in lost.items() if winner == best[0]]
        more = f", and so did {len(own) - SHOWN} more" if len(own) > SHOWN else ""
        others = [f"{loser} scored lower than {winner}" for loser, winner in lost if winner != best[0]]
        return [f"Use {plainly(best[0])}: {', '.join(own[:SHOWN])}{more}{'; ' * bool(others)}{', '.join(others)}."]
    winners = {winner for _, winner in lost}
    said = [f"Use {' or '.join(map(plainly, best))}; no contrast tells which."] if best and {*best} <= winners else []
    for verdict in (UNDECIDED, SAME, WITHHELD):
        found = [one for one in between if one["verdict"] == verdict and not {one["arm"], one["reference"]} & losers]
        said += [_pair(one) for one in found] if len(found) <= SHOWN else [_many(found, [*arms])]
    for loser in dict.fromkeys(loser for loser, _ in lost):
        winners = [f"{winner} ({text})" for (one, winner), text in lost.items() if one == loser]
        said.append(f"{loser} scored lower than {', '.join(winners)}.")
    return said


def _many(found: Sequence[Mapping[str, Any]], order: Sequence[str]) -> str:
    """Say in one sentence what several contrasts found alike; that with one arm, if they have one in common."""
    ends = [{one["arm"], one["reference"]} for one in found]
    common = next(iter(set.intersection(*ends)), None)
    names = ", ".join(sorted(set.union(*ends) - {common}, key=order.index))
    margin, verdict = found[0]["margin"], found[0]["verdict"]
    if verdict == SAME:
        return f"The same{f' as {common}' if common else ''} within {margin:g}: {names}."
    why = f" ({found[0]['why']})" if verdict == WITHHELD else ""
    return f"{'No verdict' if why else 'Not decided'}{why}, {f'against {common}' if common else 'among'}: {names}."


def _pair(one: Mapping[str, Any]) -> str:
    """Say in one sentence why neither of two arms is recommended."""
    arm, reference = plainly(one["arm"]), plainly(one["reference"])
    if one["verdict"] == WITHHELD:
        return f"No verdict on {arm} and {reference}: {one['why']}."
    if one["verdict"] == SAME:
        return f"{arm} and {reference} score the same within {one['margin']:g}: take the cheaper."
    return f"Not decided between {arm} and {reference} ({_difference(one)} for {one['arm']}).{needed(one)}"


def _of_pretraining(one: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what a contrast with the control found."""
    control = _control(one, arms)
    other = one["arm"] if one["reference"] == control else one["reference"]
    if one["verdict"] == WITHHELD:
        return f"No verdict on pre-training ({other} against {control}): {one['why']}."
    if one["verdict"] == SAME:
        return f"Pre-training changes little: {other} and {control} score the same within {one['margin']:g}."
    if one["verdict"] == UNDECIDED:
        sides = f"{one['arm']} against {one['reference']}: {_difference(one)}"
        return f"Whether pre-training pays is not decided ({sides}).{needed(one)}"
    pays = "pays" if _winner(one) == other else "does harm here"
    return f"Pre-training {pays}: {_loser(one)} scored lower than {_winner(one)} ({_loss(one)})."


def _of_chance(asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which arms are better than chance."""
    better = [one["arm"] for one in asked if one["verdict"] == HIGHER]
    others = [one["arm"] for one in asked if one["verdict"] != HIGHER]
    said = [f"Better than chance: {', '.join(better) or 'none'}."] if asked else []
    return said + ([f"Not shown to be better than chance: {', '.join(others)}."] if others else [])


def _control(one: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the one side of a contrast that is the control, or None."""
    found = [name for name in (one["arm"], one["reference"]) if name in arms and arms[name]["is_control"]]
    return found[0] if len(found) == 1 else None


def _listed(names: Sequence[str], arms: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{plainly(name)} {arms[name]['mean']:.3f}" for name in names)


def _winner(one: Mapping[str, Any]) -> str:
    return one["arm"] if one["verdict"] == HIGHER else one["reference"]


def _loser(one: Mapping[str, Any]) -> str:
    return one["reference"] if one["verdict"] == HIGHER else one["arm"]


def _loss(one: Mapping[str, Any]) -> str:
    """Write by how much the loser scored lower, with the interval."""
    sign = -1 if one["verdict"] == HIGHER else 1
    ends = sorted(sign * one[name] for name in ("low", "high"))
    return f"{sign * one['difference']:+.3f}, {ends[0]:+.3f} to {ends[1]:+.3f}"


def _difference(one: Mapping[str, Any]) -> str:
    if pd.isna(one["low"]):
        return f"{one['difference']:+.3f}"
    return f"{one['difference']:+.3f}, {one['low']:+.3f} to {one['high']:+.3f}"


def score_name(score: str) -> str:
    """Return a score as sentences name it."""
    return NAMES.get(score) or score.replace(":", " of ").replace("_", " ")


def counted(number: int, what: str) -> str:
    """Write a number of things: 1 seed, 2 seeds."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def rule_of(settings: Study, n: int, *, has_folds: bool, n_seeds: int) -> str:
    """Say in one sentence how a study is judged."""
    units = f"groups of {settings.group_by}" if settings.group_by else "test cells"
    how = f"for other seeds and other {units} (two crossed random factors, paired by seed)"
    if settings.kind == "compression" and n_seeds == 1:
        how = f"for other {units} and this very model (bootstrap)"
    elif has_folds:
        how = "over folds, seeds averaged (corrected resampled t test of Nadeau and Bengio)"
    return (
        f"Arm and reference are compared on the same cells, {how}: higher or lower if p < {ALPHA} after Holm over all "
        f"{counted(n, 'declared contrast')} of the study; if not, the same within {settings.margin:g} "
        f"{score_name(settings.score)} if two one-sided tests against that margin say so, corrected likewise. Classes "
        f"with fewer than {FEW_CELLS} test cells are left out of a mean over classes."
    )
