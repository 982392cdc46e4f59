"""What ``README.md`` may say: generated tables between marks, and prose whose claims are checked.

A table is written between ``<!-- numbers: STUDY -->`` (arms), ``<!-- numbers: STUDY contrasts -->`` or ``<!-- numbers:
STUDY recommendation -->`` (what to do, by task) and ``<!-- end -->``. A sentence written by hand carries, on its line,
``<!-- claim: STUDY TASK CONTRAST VERDICT [DIFFERENCE] -->``: `checked_claims` compares verdict and difference with the
published ``answer.json``.
"""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from tuneformer import paths
from tuneformer.artifacts import UserError, read_json
from tuneformer.report import tables

NUMBERS = re.compile(
    r"(<!-- numbers: (?P<study>\S+)(?: (?P<what>contrasts|recommendation))? -->\n)(?P<table>.*?)(<!-- end -->)",
    re.DOTALL,
)
CLAIM = re.compile(r"<!-- claim: (.*?)-->", re.DOTALL)
VERDICTS = "higher|lower|same|not decided|withheld"
PARTS = re.compile(
    rf"(?P<study>\S+) (?P<task>\S+) (?P<contrast>.+?) (?P<verdict>{VERDICTS})(?: (?P<number>[-+]?\d\.\d+))?"
)


def readme_block(answer: Mapping[str, Any], runs: pd.DataFrame, *, what: str = "arms") -> str:
    """Return part of an answer as Markdown: a row per arm and a column per task, a row per contrast, or what to do."""
    if what == "recommendation":
        return "".join(f"- `{task['task']}`: {' '.join(task['recommendation'])}\n" for task in answer["tasks"])
    if what == "contrasts":
        return tables.markdown(tables.contrasts(answer)) + "\n"
    long = tables.arms(answer, runs)
    score = next(name for name in long if "interval" in name)
    note = ", simulated cells" if answer["simulated"] else ""
    wide = long.pivot(index="Arm", columns="Task", values=score)
    wide = wide.loc[long["Arm"].unique(), long["Task"].unique()].fillna(tables.MISSING)
    wide.columns = [f"{task}{note}" for task in wide.columns]
    wide.index = [f"`{arm}`" for arm in wide.index]
    return tables.markdown(wide.rename_axis(index=f"{score}").reset_index()) + "\n"


def with_numbers(text: str, answer: Mapping[str, Any], runs: pd.DataFrame) -> str:
    """Return the README with every table of one study written anew; all else stays as it is."""

    def written(found: re.Match[str]) -> str:
        if found["study"] != answer["study"]:
            return found[0]
        return found[1] + readme_block(answer, runs, what=found["what"] or "arms") + found[5]

    return NUMBERS.sub(written, text)


def checked_claims(text: str) -> list[str]:
    """Return what the README claims and the published answers do not say; [] if all is well.

    Parameters
    ----------
    text
        Of the README. A claim's difference is compared at the decimals it has, and the line has to show it too.
    """
    problems = []
    for line in text.splitlines():
        prose = CLAIM.sub("", line)
        for claim in CLAIM.findall(line):
            problem = _problem(claim.strip(), prose)
            problems += [f"<!-- claim: {claim.strip()} -->: {problem}"] if problem else []
    if text.count("<!-- claim") != sum(len(CLAIM.findall(line)) for line in text.splitlines()):
        problems += ["a claim is not written as <!-- claim: STUDY TASK CONTRAST VERDICT [DIFFERENCE] --> on one line"]
    return problems


def _problem(claim: str, prose: str) -> str | None:
    """Say what is wrong with one claim, if anything."""
    parts = PARTS.fullmatch(claim)
    if parts is None:
        return f"write STUDY TASK CONTRAST VERDICT [DIFFERENCE], with a verdict of {VERDICTS.replace('|', ', ')}"
    try:
        answer = read_json(paths.RESULTS / parts["study"] / "answer.json")
    except UserError as error:
        return str(error)
    of_task = [one for task in answer["tasks"] if task["task"] == parts["task"] for one in task["contrasts"]]
    found = [one for one in of_task if one["contrast"] == parts["contrast"]]
    if not found:
        return "there is no such task and contrast in the answer"
    if found[0]["verdict"] != parts["verdict"]:
        return f"the answer says {found[0]['verdict']}"
    if number := parts["number"]:
        decimals = len(number.split(".")[1])
        if round(found[0]["difference"], decimals) != float(number):
            return f"the answer's difference is {found[0]['difference']:+.{decimals}f}"
        if number.lstrip("+-") not in prose:
            return f"the sentence does not show {number}"
    return None
