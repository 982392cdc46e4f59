"""The answer in the README, written from the results of the demo study, so that no number in it is typed by hand.

In: ``results/demo/metrics.csv``. Out: the part of ``README.md`` between the two answer marks, replaced.
"""

import argparse
import re
import sys

import pandas as pd

from tuneformer.evaluate import statistics
from tuneformer.report import records
from tuneformer.study import paths

STUDY = "demo"
BEGIN, END = "<!-- answer: begin -->", "<!-- answer: end -->"


class ReadmeError(ValueError):
    """A README without the place for the answer; the message says what to put back."""


def answer(metrics: pd.DataFrame) -> str:
    """Return the answer as Markdown: a headline, a sentence per task, one table and one figure.

    Parameters
    ----------
    metrics
        Rows of the demo study's ``metrics.csv``.

    Returns
    -------
    The text between the marks. The table has a row per strategy and a column per task: mean macro-F1 on the test cells
    with its 95 % interval over seeds; time and trainable parameters are means over all runs of the strategy.
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
    rows = [
        [f"`{name}`", *shown.loc[name, tasks], f"{cost.seconds[name]:.1f}", f"{cost.parameters[name]:,.0f}"]
        for name in first.index
    ]
    body = [header, ["---"] * len(header), *rows]
    grid = ["| " + " | ".join(cells) + " |" for cells in body]
    figure = f"![Scores per strategy on simulated cells; each point is a seed](figures/{STUDY}/fig1_scores.png)"
    return "\n".join([lines[0], "", *lines[1:], "", *grid, "", figure])


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
    block = f"{BEGIN}\n{answer(records.read_metrics(STUDY))}\n{END}"
    paths.write_text(path, pattern.sub(lambda _: block, text))


def main(arguments: list[str] | None = None) -> int:
    """Write the README's answer after the demo study has run; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.readme", description=main.__doc__)
    parser.add_argument("study", help="the study that has run; any but demo leaves the README as it is")
    if parser.parse_args(arguments).study != STUDY:
        return 0
    try:
        update()
    except (ReadmeError, records.RecordError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
