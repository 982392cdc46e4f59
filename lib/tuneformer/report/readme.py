"""The answer in the README, written from the results of the demo studies, so that no number in it is typed by hand.

In: ``results/<study>/metrics.csv`` of ``demo`` and, where they are there, the results of the studies of `FOLLOWING`.
Out: the part of ``README.md`` between the two answer marks, replaced.
"""

import argparse
import re
import sys

import pandas as pd

from tuneformer.evaluate import comparisons, cross_validation, statistics, trainset_effects
from tuneformer.report import other_kinds, records
from tuneformer.study import paths
from tuneformer.study.params import load_study

STUDY = "demo"
FOLLOWING = {
    "demo_pseudobulk": "fig4_{}_against_k",
    "demo_synthetic": "fig6_{}_per_class",
    "demo_mixture": "fig6_{}_per_class",
    "demo_bulk": "fig6_{}_per_class",
    "demo_learning_curve": "fig9_{}_learning_curve",
    "demo_pancreas": "fig11_{}_class_accuracy",
    "demo_pancreas_technology": "fig11_{}_class_accuracy",
    "demo_gene_dosage": "fig1_auc",
    "demo_gene_dosage_null": "fig1_auc",
    "demo_compress": "fig1_pareto",
}
"""Simulated studies whose main findings follow the answer, and the figure of each that the README links to."""
MARK = " *"
NOTE = (
    r"\* cannot be told apart from the best of its column: test cells and seeds drawn again, corrected for the number "
    "of pairs. With few seeds little can be told apart."
)
FINDINGS = 3  # sentences of a task: the first ones are its main findings
BEGIN, END = "<!-- answer: begin -->", "<!-- answer: end -->"


class ReadmeError(ValueError):
    """A README without the place for the answer; the message says what to put back."""


def answer(metrics: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Return the answer as Markdown: a headline, a sentence per task, one table and one figure.

    Parameters
    ----------
    metrics
        Rows of the demo study's ``metrics.csv``.
    predictions
        From `tuneformer.report.records.read_predictions` of the demo study.

    Returns
    -------
    The text between the marks. The table has a row per strategy and a column per task: mean macro-F1 on the test cells
    with its 95 % interval over seeds, marked where it cannot be told apart from the best; time and trainable parameters
    are means over all runs of the strategy.
    """
    judged = statistics.verdicts(metrics)
    table = statistics.answer_table(metrics)
    lines = [
        f"**{statistics.headline(judged)}** *All numbers below are from simulated cells: they show what the code does,"
    ]
    lines[0] += " not biology.*"
    lines += [f"- `{task}`: {text}" for task, text in statistics.sentences(judged).items()]
    tasks = list(dict.fromkeys(table["task"]))
    shown = statistics.readable(table).set_index(["Strategy", "Task"])["Macro-F1 (95 % interval)"].unstack()
    first = table[table["task"] == tasks[0]].set_index("strategy")
    cost = table.groupby("strategy")[["seconds", "parameters"]].mean()
    header = [
        "strategy",
        *(f"{task}, macro-F1 (simulated)" for task in tasks),
        "training time (s)",
        "parameters that learn",
    ]
    ranks = comparisons.indistinguishable(comparisons.compare_tasks(predictions))
    ranks = ranks[(ranks["metric"] == "macro_f1") & ranks["like_best"]]
    marked = set(zip(ranks["arm"], ranks["task"], strict=True))
    rows = [
        [
            f"`{name}`",
            *(shown.loc[name, task] + (MARK if (name, task) in marked else "") for task in tasks),
            f"{cost.seconds[name]:.1f}",
            f"{cost.parameters[name]:,.0f}",
        ]
        for name in first.index
    ]
    body = [header, ["---"] * len(header), *rows]
    grid = ["| " + " | ".join(cells) + " |" for cells in body]
    figure = f"![Scores per strategy on simulated cells; each point is a seed](figures/{STUDY}/fig1_scores.png)"
    return "\n".join([lines[0], "", *lines[1:], "", *grid, "", NOTE, "", figure])


def findings(study: str) -> str:
    """Return the main findings of a study as Markdown that unfolds: its question, sentences per task, and a link.

    Parameters
    ----------
    study
        A key of `FOLLOWING`; it has results.
    """
    settings = load_study(study)
    table = other_kinds.table_path(settings)
    if settings.kind != "cells":
        said = other_kinds.summary(settings)
        found = {settings.task: [said.headline, *said.sentences]}
    elif settings.folds:
        found = cross_validation.sentences(records.read_metrics(study), records.read_predictions(study))
    else:
        found = trainset_effects.sentences(records.read_metrics(study))
    lines = [f"- `{task}`: {' '.join(texts[:FINDINGS])}" for task, texts in found.items()]
    figure = f"figures/{study}/{FOLLOWING[study].format(settings.tasks[0])}.png"
    end = f"[Figure]({figure}) · [numbers](results/{study}/{table.name}) · `make report STUDY={study}`"
    head = f"<details><summary><b>{settings.question}</b></summary>"
    return "\n".join([head, "", *lines, "", end, "", "</details>"])


def block() -> str:
    """Return the text between the marks, from the results that are there.

    Raises
    ------
    RecordError
        The demo study has no results.
    """
    parts = [answer(records.read_metrics(STUDY), records.read_predictions(STUDY))]
    parts += [findings(study) for study in FOLLOWING if other_kinds.table_path(load_study(study)).is_file()]
    return "\n\n".join(parts)


def update() -> None:
    """Replace the answer in ``README.md`` by that of the results.

    Raises
    ------
    ReadmeError
        The README has lost its marks.
    RecordError
        The demo study has no results.
    """
    path = paths.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        msg = f"README.md has lost its marks for the answer; put the lines {BEGIN} and {END} back."
        raise ReadmeError(msg)
    written = f"{BEGIN}\n{block()}\n{END}"
    paths.write_text(path, pattern.sub(lambda _: written, text))


def main(arguments: list[str] | None = None) -> int:
    """Write the README's answer after a study of it has run; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.readme", description=main.__doc__)
    parser.add_argument("study", help="the study that has run; one that is not in the README leaves it as it is")
    if parser.parse_args(arguments).study not in (STUDY, *FOLLOWING):
        return 0
    try:
        update()
    except (ReadmeError, records.RecordError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
