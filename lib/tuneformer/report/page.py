"""The page: of every study the question, the answer, the figures and the executed notebooks, all offline.

In: the results of this machine and of the repository, their figures, and the executed notebooks below ``runs/``. Out:
``site/index.html`` and what it links to.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

import tuneformer
from tuneformer import paths
from tuneformer.artifacts import UserError, atomic_path
from tuneformer.evaluate import telling
from tuneformer.keys import TrainingKeys
from tuneformer.model.strategies import STRATEGIES
from tuneformer.report import results as study_results
from tuneformer.report import tables
from tuneformer.report.results import Results

CAPTIONS = {
    "scores": "Test score of every arm. Ticks are runs, the diamond is their mean, the line its 95 % interval; filled "
    "where a declared contrast finds the arm higher or lower than its reference.",
    "contrasts": "The differences that the study asks about, with their 95 % intervals. Within the grey band two arms "
    "count as the same.",
    "columns": "The score by what the study varies. Faint dots are runs, lines are means with their 95 % intervals.",
    "recall": "Share of the test cells of each class that each arm finds, as a mean over the seeds.",
    "classes": "Test cells of each class. Hatched: fewer than ten, and left out of the judged score.",
    "cost": "What a run costs and what it scores. Up and to the left is better.",
}
"""By the first word of a figure's name, in the order of the page; others follow under their names."""
PIXELS = 1.75  # of a figure file per pixel of the page
BASELINES = {
    "majority": "Always the shares of the classes among the training cells.",
    "logistic_counts": "Logistic regression on the normalised counts of the most variable genes.",
    "logistic_ranks": "Logistic regression on the ranks of the genes among a cell's tokens: the very information that "
    "the fine-tuned model reads. What logistic_counts has beyond it are the genes and counts that tokens leave out.",
    "knn_pca": "Nearest neighbours in the principal components of the normalised counts.",
    "frozen_embedding_ridge": "Ridge regression on the mean embedding of a cell by the untouched pre-trained model.",
    "bayes": "The ceiling: the best that can be expected of any classifier, from knowing how the cells were simulated.",
    "expression": "Genes: logistic regression on how a gene is expressed.",
    "frozen_embedding": "Genes: logistic regression on the gene's input embedding, which no cell changes.",
    "frozen_context": "Genes: logistic regression on the gene's embedding in cells, by the untouched model.",
}


class Link(NamedTuple):
    """Text and address of a link."""

    name: str
    href: str


def build(studies: Sequence[str]) -> Path:
    """Write the page: the first study heads it, the others and every further study that has results follow.

    Results of the repository that were not made here are shown as such. A study whose results cannot be read is named
    with the reason, and does not keep the others from being shown.

    Returns
    -------
    ``site/index.html``. The whole folder ``site`` is replaced, or stays as it was.

    Raises
    ------
    UserError
        The first study has no results, or one of its notebooks cannot be read.
    """
    head = study_results.read(studies[0])
    pages = Environment(
        loader=FileSystemLoader(paths.ASSETS / "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    with atomic_path(paths.SITE) as site:
        site.mkdir()
        convert = _Converter(pages)
        sections, problems = [_section(site, head, convert)], []
        for other in list(dict.fromkeys([*studies, *studies_with_results()]))[1:]:
            try:
                sections.append(_section(site, study_results.read(other), convert))
            except UserError as error:
                problems.append((other, str(error)))
        text = pages.get_template("index.html.j2").render(
            first=sections[0],
            others=sections[1:],
            problems=problems,
            strategies={name: one.__doc__.splitlines()[0].replace("``", "") for name, one in STRATEGIES.items()},
            baselines=BASELINES,
            version=tuneformer.__version__,
        )
        (site / "index.html").write_text(text, encoding="utf-8")
        style = (paths.ASSETS / "page" / "style.css").read_text(encoding="utf-8")
        light, dark = (
            HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")
            for name in ("default", "github-dark")
        )
        colors = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
        (site / "style.css").write_text(f"{style}\n{colors}", encoding="utf-8")
    return paths.SITE / "index.html"


def studies_with_results() -> list[str]:
    """List the studies that have an answer, made here or in the repository."""
    found = [*paths.RUNS.glob("*/results/answer.json"), *paths.RESULTS.glob("*/answer.json")]
    return sorted({(path.parent.parent if path.parent.name == "results" else path.parent).name for path in found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.page", description=main.__doc__)
    parser.add_argument("study", nargs="+", help="a file in params/, without .yaml; the first heads the page")
    try:
        print(build(parser.parse_args(arguments).study))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class _Converter:
    """Turns executed notebooks into pages; one exporter serves all, as starting it costs more than a page."""

    def __init__(self, pages: Environment) -> None:
        self.page = pages.get_template("notebook.html.j2")
        hidden = {f"exclude_{name}": True for name in ("anchor_links", "input_prompt", "output_prompt")}
        self.exporter = HTMLExporter(template_name="basic", mathjax_url="", require_js_url="", **hidden)

    def write(self, notebook: Path, target: Path, *, name: str, root: str, simulated: bool) -> None:
        """Write `notebook` as the page `target`; `root` leads from it to the folder of the site."""
        try:
            content = nbformat.read(notebook, as_version=4)
        except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
            msg = f"{paths.shown(notebook)} is not a readable notebook; delete it and run `make report` again."
            raise UserError(msg) from error
        body, _ = self.exporter.from_notebook_node(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.page.render(body=body, name=name, root=root, simulated=simulated), encoding="utf-8")


def _section(site: Path, found: Results, convert: _Converter) -> dict[str, Any]:
    """Copy a study's files into the site and return what the template shows of it."""
    answer, study = found.answer, found.settings.study
    target = site / "results" / study
    target.mkdir(parents=True)
    for name in ("runs.csv", "answer.json", "study.yaml"):
        shutil.copyfile(found.folder / name, target / name)
    shown = {"What was asked": tables.contrasts(answer), "Every arm, best first": tables.arms(answer, found.runs)}
    shown["Beside the score (means over the runs, all classes)"] = tables.beside(answer, found.runs)
    failed = int((found.runs["status"] != "ok").sum())
    return {
        "name": study,
        "question": answer["question"],
        "simulated": answer["simulated"],
        "demo_checkpoint": found.settings.checkpoint == "demo",
        "here": found.is_of_this_machine,
        "answers": {
            task["task"]: (task["recommendation"], [telling.sentence(one) for one in task["contrasts"]])
            for task in answer["tasks"]
        },
        "rule": answer["rule"],
        "tables": {title: _by_task(table) for title, table in shown.items()},
        "keys": _varied(found.settings.arms),
        "finished": f"{len(found.runs)} runs, {failed or 'none'} of them failed.",
        "figures": _figures(site, found),
        **_notebooks(site, found, convert),
    }


def _by_task(table: Any) -> dict[str, Any]:
    """Return a table of text for the template: its columns, and its rows by task."""
    if table.empty:
        return {}
    columns = [name for name in table if name != "Task"]
    return {
        "columns": columns,
        "tasks": {task: rows[columns].to_numpy().tolist() for task, rows in table.groupby("Task", sort=False)},
    }


def _varied(arms: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Return the keys in which the arms of a study differ, each with its one line of meaning."""
    names = {key for own in arms.values() for key in own or {}}
    return {key: field.description or "" for key, field in TrainingKeys.model_fields.items() if key in names}


def _figures(site: Path, found: Results) -> list[dict[str, Any]]:
    """Copy the figures of a study; those made here come with the table that they were drawn from."""
    study = found.settings.study
    source = paths.RUNS / study / "figures" if found.is_of_this_machine else paths.FIGURES / study
    order, figures = list(CAPTIONS), []

    def place(file: Path) -> tuple[int, str]:
        first = file.stem.split("_")[0]
        return order.index(first) if first in order else len(order), file.stem

    for file in sorted(source.glob("*.png"), key=place):
        links = {}
        for ending in ("png", "pdf", "csv"):
            if file.with_suffix(f".{ending}").is_file():
                copy = site / "figures" / study / f"{file.stem}.{ending}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.with_suffix(f".{ending}"), copy)
                links[ending] = quote(str(copy.relative_to(site)))
        first, _, rest = file.stem.partition("_")
        caption = CAPTIONS.get(first, file.stem) + (f" Task: {rest}." if rest and first in order else "")
        width = int.from_bytes(file.read_bytes()[16:20], "big")  # where the PNG format keeps it
        figures.append({"caption": caption, "width": round(width / PIXELS), "links": links})
    return figures


def _notebooks(site: Path, found: Results, convert: _Converter) -> dict[str, Any]:
    """Convert the executed notebooks of a study: steps of the study and its tasks, and the jobs by task and arm."""
    study, steps, jobs = found.settings.study, [], {}
    for notebook in sorted((paths.RUNS / study).rglob("*.ipynb")):
        inside = notebook.relative_to(paths.RUNS / study)
        *folders, _ = inside.parts
        name = " / ".join([*folders, notebook.stem])
        target = site / "notebooks" / study / inside.with_suffix(".html")
        root = "../" * (2 + len(folders))
        convert.write(notebook, target, name=f"{study} / {name}", root=root, simulated=found.answer["simulated"])
        address = quote(str(target.relative_to(site)))
        if len(folders) > 1:  # task, arm
            jobs.setdefault(folders[0], {}).setdefault(folders[1], []).append(Link(notebook.stem, address))
        else:
            steps.append(Link(name, address))
    return {"steps": steps, "jobs": jobs}


if __name__ == "__main__":
    sys.exit(main())
