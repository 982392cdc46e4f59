"""The README: only tables between marks are written anew, and its claims are those of the published answers."""

import re

import pandas as pd
import pytest

from tuneformer import paths
from tuneformer.artifacts import read_json
from tuneformer.report import readme
from tuneformer.report.readme import checked_claims, readme_block, with_numbers

REPOSITORY = paths.ROOT


@pytest.fixture
def published(results, write):
    """The answer of the study as the repository has it."""
    write(results, paths.RESULTS / "small")
    return results.answer["tasks"][0]["contrasts"]


def test_the_table_has_a_row_per_arm_and_a_column_per_task(results):
    lines = readme_block(results.answer, results.runs).splitlines()
    assert lines[0] == "| Macro-F1 (95 % interval) | drugs, simulated cells | doses, simulated cells |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| `{arm['arm']}`" for arm in results.answer["tasks"][0]["arms"]
    ]
    best = results.answer["tasks"][0]["arms"][0]
    assert f"{best['mean']:.3f} ({best['low']:.3f} to {best['high']:.3f})" in lines[2]


def test_only_the_tables_of_the_study_are_written_anew(results):
    text = (
        "before\n<!-- numbers: small -->\nold\n<!-- end -->\nbetween\n"
        "<!-- numbers: small contrasts -->\nold\n<!-- end -->\n<!-- numbers: other -->\nkept\n<!-- end -->\nafter\n"
    )
    new = with_numbers(text, results.answer, results.runs)
    assert "old" not in new
    assert new.startswith("before\n<!-- numbers: small -->\n| Macro-F1")
    assert "| pre-training | full | random_init |" in new
    assert new.endswith("<!-- numbers: other -->\nkept\n<!-- end -->\nafter\n")
    assert with_numbers(new, results.answer, results.runs) == new


def test_the_recommendation_is_a_line_per_task(results):
    lines = readme_block(results.answer, results.runs, what="recommendation").splitlines()
    assert [line.split(":")[0] for line in lines] == ["- `drugs`", "- `doses`"]
    assert all("Pre-training pays" in line and "Tested on" in line for line in lines)


def test_a_readme_without_marks_stays_as_it_is(results):
    assert with_numbers("no marks\n", results.answer, results.runs) == "no marks\n"


def test_claims_that_the_answer_makes_too_are_accepted(published):
    difference = published[0]["difference"]
    text = (
        f"Pre-training pays: {difference:+.2f}. <!-- claim: small drugs pre-training higher {difference:+.2f} -->\n"
        "It does not beat counts. <!-- claim: small drugs linear model not decided -->\n"
        "Two cells are as good as one. <!-- claim: small drugs pseudo-bulk of 2 same -->\n"
    )
    assert checked_claims(text) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("<!-- claim: small drugs pre-training same -->", "the answer says higher"),
        ("<!-- claim: small drugs linear model higher -->", "the answer says not decided"),
        ("<!-- claim: small drugs training higher -->", "there is no such task and contrast"),
        ("<!-- claim: small dogs pre-training higher -->", "there is no such task and contrast"),
        ("<!-- claim: gone drugs pre-training higher -->", "results/gone/answer.json cannot be read"),
        ("+0.01 <!-- claim: small drugs pre-training higher +0.01 -->", "the answer's difference is +"),
        (
            "<!-- claim: small drugs pre-training clearly -->",
            "with a verdict of higher, lower, same, not decided, withheld",
        ),
        ("<!-- claim:small drugs pre-training higher -->", "a claim is not written as"),
        ("<!-- claim: small drugs\npre-training higher -->", "a claim is not written as"),
    ],
)
def test_a_claim_that_disagrees_is_named(published, line, problem):
    problems = checked_claims(f"Prose. {line}\n")
    assert len(problems) == 1
    assert problem in problems[0]


def test_a_number_that_the_sentence_does_not_show_is_named(published):
    number = f"{published[0]['difference']:+.3f}"
    problems = checked_claims(f"It pays: +0.1. <!-- claim: small drugs pre-training higher {number} -->")
    assert problems == [
        f"<!-- claim: small drugs pre-training higher {number} -->: the sentence does not show {number}"
    ]


def test_the_readme_of_the_repository_says_what_its_results_say():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert checked_claims(text) == []
    for found in readme.NUMBERS.finditer(text):
        folder = REPOSITORY / "results" / found["study"]
        runs = pd.read_csv(folder / "runs.csv", float_precision="round_trip")
        what = found["what"] or "arms"
        assert found["table"] == readme_block(read_json(folder / "answer.json"), runs, what=what), found["study"]


def test_the_readme_of_the_repository_links_to_what_is_there():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (REPOSITORY / target).exists(), target
