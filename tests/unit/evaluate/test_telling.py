"""What an answer says in words: what its verdicts say, and nothing else; not decided never reads as the same."""

import numpy as np
import pytest

from tuneformer.evaluate import telling
from tuneformer.evaluate.telling import recommendations

MARGIN = 0.03


def row_of(**changes):
    row = {"reference": "random_init", "arm": "full", "difference": 0.0621, "low": 0.01, "high": 0.1142, "p": 0.02}
    row |= {"p_holm": 0.04, "verdict": "higher", "seeds": 3, "cells": 1600, "units": 1600, "folds": 0}
    row |= {"score": "macro_f1", "margin": 0.03, "why": None, "more_seeds": None, "times_cells": None}
    return row | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "full scores higher than random_init: +0.062 macro-F1 (+0.010 to +0.114), 3 seeds, 1,600 test cells."),
        (
            {"verdict": "lower", "difference": -0.0621, "low": -0.1142, "high": -0.01, "units": 8},
            "full scores lower than random_init: -0.062 macro-F1 (-0.114 to -0.010), 3 seeds, 1,600 test cells in 8 "
            "groups.",
        ),
        (
            {"verdict": "same", "difference": 0.002, "low": -0.008, "high": 0.012, "folds": 5, "units": 5, "seeds": 1},
            "full and random_init are the same within 0.03: +0.002 macro-F1 (-0.008 to +0.012), 5 folds, 1 seed, 1,600 "
            "test cells.",
        ),
        (
            {"verdict": "not decided", "p_holm": 0.12, "score": "recall:SAHA", "more_seeds": 4},
            "Not decided between full and random_init: +0.062 recall of SAHA (+0.010 to +0.114), "
            "3 seeds, 1,600 test cells, p = 0.020 alone and 0.120 among all contrasts of the study. About 4 more seeds "
            "would decide, if it stays so.",
        ),
        (
            {"verdict": "not decided", "p": None, "p_holm": None, "low": None, "high": None, "seeds": 1},
            "Not decided between full and random_init: +0.062 macro-F1, 1 seed, 1,600 test cells.",
        ),
        (
            {"verdict": "not decided", "p": np.nan, "difference": np.nan, "seeds": 0},
            "full and random_init could not be compared: they have no finished run of the same seed.",
        ),
    ],
)
def test_a_contrast_is_said_in_plain_words(changes, said):
    assert telling.sentence(row_of(**changes)) == said


def test_what_would_decide_is_said_of_what_is_not_decided_alone():
    asked = row_of(verdict="not decided", times_cells=2.5)
    assert telling.needed(asked) == " More seeds would not decide, about 2.5 times the test cells would."
    assert telling.needed(asked | {"more_seeds": 1}) == " About 1 more seed would decide, if it stays so."
    assert telling.needed(asked | {"times_cells": None}).startswith(" Neither 100 more seeds nor 10 times the test")
    assert telling.needed(asked | {"seeds": 1}) == " About 2.5 times the test cells would decide."  # one model
    for other in ({"verdict": "higher"}, {"verdict": "withheld"}, {"folds": 5}, {"p": None}):
        assert telling.needed(asked | other) == ""


def task_of(*contrasts, left_out=None, folds=0, constant=None, **means):
    """A task of an answer: contrasts as (reference, arm, verdict), and arms with their means, best first."""
    arms = []
    for name, mean in sorted(means.items(), key=lambda one: -one[1]):
        one = {"arm": name, "mean": mean, "low": mean - 0.02, "high": mean + 0.02, "n_runs": 5, "n_failed": 0}
        one |= {"is_control": name == "random_init", "is_ceiling": name == "bayes", "is_baseline": "logistic" in name}
        arms.append(one | {"n_constant": (constant or {}).get(name, 0)})
    rows = []
    for reference, arm, verdict in contrasts:
        difference = means.get(arm, 0) - means.get(reference, 0.5)
        row = row_of(reference=reference, arm=arm, verdict=verdict, difference=difference, more_seeds=4, folds=folds)
        why = "the checkpoint knows 12% of the genes" if verdict == "withheld" else None
        rows.append(row | {"low": difference - 0.04, "high": difference + 0.04, "why": why})
    cells = {"Dex": 90, "Nutlin": 40} | (left_out or {})
    return {"arms": arms, "contrasts": rows, "test_cells": cells, "left_out": left_out or {}, "folds": folds}


def test_the_only_arm_that_is_not_beaten_is_recommended():
    task = task_of(
        ("logistic_counts", "full", "lower"), ("linear_probe", "full", "higher"),
        logistic_counts=0.6, full=0.5, linear_probe=0.3, knn_pca=0.4,
    )  # fmt: skip
    assert recommendations(task) == [
        "Use logistic regression on counts (logistic_counts): full fine-tuning (full) scored lower (-0.100, -0.140 to "
        "-0.060); linear_probe scored lower than full.",
        "Tested on: Dex 90, Nutlin 40.",
    ]


def test_two_arms_that_are_not_beaten_leave_the_choice_open():
    open_ = recommendations(task_of(("a", "b", "not decided"), ("a", "c", "lower"), a=0.5, b=0.52, c=0.3))
    assert open_[0] == (
        "Not decided between b and a (+0.020, -0.020 to +0.060 for b). About 4 more seeds would decide, if it stays so."
    )
    assert open_[1] == "c scored lower than a (-0.200, -0.240 to -0.160)."
    assert not any("same" in line or line.startswith("Use") for line in open_)
    alike = recommendations(task_of(("a", "b", "same"), a=0.5, b=0.5))
    assert alike[0] == "b and a score the same within 0.03: take the cheaper."


def test_several_arms_that_each_beat_another_are_recommended_together():
    said = recommendations(task_of(("a", "c", "lower"), ("b", "c", "lower"), a=0.5, b=0.52, c=0.3))
    assert said[0] == "Use b or a; no contrast tells which."
    assert said[1].startswith("c scored lower than a (-0.200, -0.240 to -0.160), b (")


def test_many_contrasts_with_one_arm_are_said_together():
    found = [("fp32", f"v{number}", "same") for number in range(4)] + [("fp32", "w", "not decided")]
    said = recommendations(task_of(*found, fp32=0.5, w=0.49, **{f"v{number}": 0.5 for number in range(4)}))
    assert said[0].startswith("Not decided between w and fp32")
    assert said[1] == "The same as fp32 within 0.03: v0, v1, v2, v3."


def test_contrasts_that_share_no_arm_are_choices_of_their_own():
    said = recommendations(task_of(("a1", "b1", "lower"), ("a2", "b2", "higher"), a1=0.5, b1=0.4, a2=0.6, b2=0.7))
    assert [line.split(":")[0] for line in said] == ["Use a1", "Use b2", "Tested on"]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("higher", "Pre-training pays: random_init scored lower than full (-0.050, -0.090 to -0.010)."),
        ("same", "Pre-training changes little: full and random_init score the same within 0.03."),
        (
            "not decided",
            "Whether pre-training pays is not decided (full against random_init: +0.050, +0.010 to +0.090). About 4 "
            "more seeds would decide, if it stays so.",
        ),
        ("withheld", "No verdict on pre-training (full against random_init): the checkpoint knows 12% of the genes."),
    ],
)
def test_the_control_is_never_recommended_and_says_what_pretraining_does(verdict, said):
    found = recommendations(task_of(("random_init", "full", verdict), full=0.5, random_init=0.45))
    assert found[:2] == ["No arm is recommended: no contrast compares two arms that could be chosen.", said]
    harm = recommendations(task_of(("random_init", "full", "lower"), full=0.4, random_init=0.6))
    assert harm[1].startswith("Pre-training does harm here: full scored lower than random_init")
    assert not any("Use" in line for line in harm)


def test_the_ceiling_is_no_arm_to_choose_and_uncompared_means_are_named():
    said = recommendations(task_of(("a", "b", "lower"), ("bayes", "a", "lower"), a=0.5, b=0.4, bayes=0.9, lora=0.6))
    assert said[0].startswith("Use a")
    assert "Higher means, but in no contrast, so not tested: lora 0.600." in said
    assert "No classifier can expect more than about 0.900 here (the ceiling, bayes)." in said


def test_small_classes_and_runs_that_never_left_one_class_are_said():
    task = task_of(
        ("a", "b", "lower"), a=0.5, b=0.1, majority=0.1, left_out={"rare": 3}, constant={"b": 3, "majority": 5}
    )
    said = recommendations(task)
    assert said[1].startswith("3 of 5 runs of b never left one class")
    assert not any("majority" in line for line in said)
    assert said[-1] == (
        "Tested on: Dex 90, Nutlin 40, rare 3. Left out of the judged score, with fewer than 10: rare; with folds "
        "every cell is tested once."
    )


def test_genes_are_compared_with_chance():
    said = recommendations(
        task_of(("chance", "a", "higher"), ("chance", "random_init", "not decided"), a=0.7, random_init=0.5)
    )
    assert "Better than chance: a." in said
    assert "Not shown to be better than chance: random_init." in said
    assert not any("re-training" in line for line in said)
