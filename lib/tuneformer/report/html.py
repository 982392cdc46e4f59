"""The page: what was asked, the answer, the figures and every executed notebook, all offline.

In: ``results/``, ``figures/`` and the executed notebooks below ``runs/``. Out: ``site/index.html`` and what it links
to.
"""

import argparse
import re
import shutil
import sys
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

import tuneformer
from tuneformer.evaluate import cross_validation, statistics, trainset_effects
from tuneformer.report import other_kinds, records
from tuneformer.study import paths
from tuneformer.study.params import ParameterError, Study, load_study

CAPTIONS = {
    "fig1": "Accuracy and macro-F1 on the test cells, per strategy and task. Small points are seeds, diamonds their "
    "mean, lines the 95 % interval of the mean; the dotted line is the mean without pre-training.",
    "fig2": "What became of the test cells of each class, in {}: a row sums to 1, the cells of all seeds added up. "
    "The diagonal is the recall of a class.",
    "fig3": "What a strategy costs against what it scores. Up and to the left is better.",
    "fig4": "Accuracy and macro-F1 of models trained on pseudo-bulk, in {}, against the number k of cells behind a "
    "point: the three aggregations, single cells that are fewer or get fewer steps, and pseudo-bulk with one thing "
    "changed. The dotted line is the mean of all single cells.",
    "fig5": "What the fall from single cells to pseudo-bulk (sum) is made of, in {}: fewer optimizer steps, fewer "
    "points, the averaging itself, and depth with length. The parts are steps of one path from one to the other, in "
    "this order, and add up to the whole fall; left of the line a part is a gain.",
    "fig6": "Macro-F1 and the recall of each class by train set, in {}: the difference to all single cells, paired by "
    "seed, with its 95 % interval. Filled points are clear differences.",
    "fig7": "Accuracy and macro-F1 when a share of the training cells is replaced by synthetic ones, in {}, from real "
    "cells alone (0 %) to synthetic cells alone (100 %).",
    "fig8": "What became of the test cells of each class, in {}, by what the model was trained on: a row sums to 1, "
    "the cells of all seeds added up.",
    "fig9": "Accuracy and macro-F1 in {}, against the number of training cells of each class, for every strategy and "
    "baseline (dashed): what to do with so many labelled cells.",
    "fig10": "Accuracy and macro-F1 of each treatment in {}: small points are folds, the diamond is their mean, the "
    "black bar the score of all cells pooled, each predicted by the one model that did not see it.",
    "fig11": "Share of the cells of each class that are found, in {}, over all folds; classes from the largest to the "
    "smallest.",
    "fig12": "Each class against the rest, in {}: true and false positive rate over all thresholds of the probability, "
    "cells of all folds together, and their average.",
}
CAPTIONS_BY_NAME = {
    "fig1_auc": "How well genes of two classes are told apart, by token as published and by gene: models blue, "
    "baselines that see one row a gene orange, with the 95 % interval over genes; grey: with permuted classes.",
    "fig2_roc": "True and false positive rate of genes, by token and by gene: mean over folds and seeds, and one "
    "standard deviation around it.",
    "fig3_confusion": "What became of the genes of each class, over all folds, at a threshold that the training genes "
    "chose.",
    "fig1_pareto": "Size on disk and speed of the compressed models against their macro-F1, with the 95 % interval of "
    "the difference to the whole model. Along the dotted line, none is better in both.",
}
FIGURE_NAME = re.compile(
    r"(fig\d+)_(?:confusion_)?(.*?)(?:_against_k|_decomposition|_per_class|_share|_confusion|_learning_curve|_folds|_class_accuracy|_roc)?"
)
PIXELS = 1.75  # of a figure file per pixel of the page
STRATEGIES = {
    "full": "Everything learns from the first step.",
    "linear_probe": "Only the new head learns; the pre-trained model is a fixed feature extractor.",
    "selective": "The first layers stay as they were pre-trained, the others learn (Geneformer's freeze_layers).",
    "lp_ft": "First only the head, then everything (linear probing, then fine-tuning).",
    "gradual_last_to_first": "First the head, then one layer more at a time, from the last to the first.",
    "gradual_first_to_last": "First the head, then one layer more at a time, from the first to the last.",
    "layerwise_lr_decay": "Everything learns, and lower layers learn more slowly.",
    "lora": "The pre-trained weights stay; small low-rank updates of the attention and the head learn.",
    "random_init": "Control: the same model without pre-training, everything learns.",
}
PARTS_OF_A_NAME = {
    "_freeze<n>": "selective: the first n encoder layers stay as they were pre-trained.",
    "_batch<n>": "n cells per optimizer step.",
    "_weighted": "Cross-entropy, each class weighted by the inverse of its number of training cells.",
    "_balanced_softmax": "Cross-entropy of logits to which training adds the log of the class shares.",
    "_focal": "Cross-entropy in which cells that are classified well count less.",
    "_dice": "One minus the overlap (soft dice) of predicted and true cells of each class.",
    "_bce": "Binary cross-entropy of each class against the rest.",
    "_upsampled": "Training cells of rare classes repeated until all classes are as large; takes more optimizer steps.",
    "_balanced": "As many training cells an epoch as before, drawn so that each class is equally likely.",
}
BASELINES = {
    "majority": "Always the shares of the classes among the training cells.",
    "logistic_counts": "Logistic regression on the normalised counts of the most variable genes.",
    "logistic_ranks": "Logistic regression on the ranks of the genes, which is what Geneformer reads.",
    "knn_pca": "Nearest neighbours in the principal components of the normalised counts.",
    "frozen_embedding_ridge": "Ridge regression on the mean embedding of a cell by the untouched pre-trained model.",
}
TRAIN_SETS = {
    "single_cell": "All training cells.",
    "single_cell_n<n>": "At most n cells of each class.",
    "single_cell_k<k>": "Control, fewer points: one cell of each group of about k cells.",
    "single_cell_k<k>_steps": "Control, fewer steps: all cells, but only the optimizer steps that N/k points get.",
    "pseudobulk_k<k>_<sum|mean|approx_mean>": "Points that aggregate groups of about k cells of one class and dose.",
    "…_thinned": "The same with counts thinned to the depth of single cells.",
    "…_capped": "The same with token lists cut to the median length of single cells.",
    "…_boosted": "The same with single cells added to the validation set.",
    "…_steps": "Pseudo-bulk with as many optimizer steps as all single cells would get.",
    "synthetic_<generator>": "Only cells drawn from a model of each class and dose, fitted to the training cells.",
    "…_untreated": "The same with the variances of untreated cells, which is what one has beside a bulk sample.",
    "mixture_<generator>_pad<n>": "All training cells and n synthetic ones more of each padded class.",
    "mixture_copies_pad<n>": "Control: all training cells, and n of them more of each padded class, drawn again.",
    "mixture_<generator>_share<p>": "As many cells as before, p % of them synthetic.",
    "bulk": "The samples of a bulk count table, each a training point.",
    "synthetic_<generator>_bulk": "Cells drawn around bulk samples; untreated single cells say how cells vary.",
}


class Link(NamedTuple):
    """Text and address of a link."""

    name: str
    href: str


def build(study: str) -> Path:
    """Write the page of a study, with a section for every other study that has results.

    Parameters
    ----------
    study
        The study that heads the page: name of a file in ``params/``, without ``.yaml``.

    Returns
    -------
    ``site/index.html``. The whole folder ``site`` is replaced.

    Raises
    ------
    RecordError
        The study has no results, some results belong to no study, or a notebook below ``runs/`` cannot be read.
    ParameterError
        A study with results cannot be used.
    """
    if load_study(study).kind == "cells":
        records.read_metrics(study)
    tables = other_kinds.TABLES.values()
    known = sorted({path.parent.name for path in paths.RESULTS.glob("*/*.csv") if path.name in tables})
    for name in known:
        if not (paths.PARAMS / f"{name}.yaml").is_file():
            msg = f"results/{name} belongs to no study: restore params/{name}.yaml, or delete results/{name}."
            raise records.RecordError(msg)
    known = [name for name in known if other_kinds.table_path(load_study(name)).is_file()]  # notebooks leave others
    pages = Environment(
        loader=FileSystemLoader(paths.ASSETS / "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    with paths.atomic_path(paths.SITE) as site:
        site.mkdir()
        convert = _Converter(pages)
        first, *others = [_section(site, name, convert) for name in [study, *(name for name in known if name != study)]]
        index = pages.get_template("index.html.j2")
        text = index.render(
            first=first,
            others=others,
            strategies=list(STRATEGIES.items()),
            parts=list(PARTS_OF_A_NAME.items()),
            baselines=list(BASELINES.items()),
            train_sets=list(TRAIN_SETS.items()) if any(study["effects"] for study in [first, *others]) else [],
            version=tuneformer.__version__,
        )
        (site / "index.html").write_text(text, encoding="utf-8")
        style = (paths.ASSETS / "page" / "style.css").read_text(encoding="utf-8")
        colors = HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")
        (site / "style.css").write_text(f"{style}\n{colors}\n", encoding="utf-8")
    return paths.SITE / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """Write the page of a study; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.html", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    try:
        print(build(parser.parse_args(arguments).study))
    except (records.RecordError, ParameterError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class _Converter:
    """Turns executed notebooks into pages; one exporter serves all, as starting it costs more than a page."""

    def __init__(self, pages: Environment) -> None:
        self.page = pages.get_template("notebook.html.j2")
        self.exporter = HTMLExporter(
            template_name="basic",
            mathjax_url="",
            require_js_url="",
            exclude_anchor_links=True,
            exclude_input_prompt=True,
            exclude_output_prompt=True,
        )

    def write(self, notebook: Path, target: Path, *, name: str, root: str, simulated: bool) -> None:
        """Write `notebook` as the page `target`; `root` leads from it to the folder of the site."""
        try:
            content = nbformat.read(notebook, as_version=4)
        except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
            msg = f"{notebook} is not a readable notebook; delete it and run `make report` again."
            raise records.RecordError(msg) from error
        body, _ = self.exporter.from_notebook_node(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.page.render(body=body, name=name, root=root, simulated=simulated), encoding="utf-8")


def _section(site: Path, study: str, convert: _Converter) -> dict[str, Any]:
    """Copy a study's files into the site and return what the template shows of it."""
    settings = load_study(study)
    folder = site / "results" / study
    folder.mkdir(parents=True)
    numbers = other_kinds.table_path(settings)
    shutil.copyfile(numbers, folder / numbers.name)
    return {
        "name": study,
        "question": settings.question,
        "simulated": settings.simulated,
        "demo_checkpoint": settings.checkpoint == "demo",
        "figures": _figures(site, study),
        "metrics": f"results/{study}/{numbers.name}",
        **(_on_grid(settings) if settings.kind == "cells" else _on_notebook(settings)),
        **_notebook_links(site, study, convert, simulated=settings.simulated),
    }


def _on_notebook(settings: Study) -> dict[str, Any]:
    """Return what the template shows of a study that is one notebook."""
    found = other_kinds.summary(settings)
    return {
        "headline": found.headline,
        "answers": [(settings.kind, " ".join(found.sentences))],
        "effects": [],
        "what": "Every method" if settings.kind == "genes" else "Every variant",
        "columns": list(found.table.columns),
        "tables": [(settings.task, found.table.astype(str).to_numpy().tolist())],
        "finished": f"{len(found.table)} rows.",
    }


def _on_grid(settings: Study) -> dict[str, Any]:
    """Return what the template shows of the runs of a study."""
    study, metrics = settings.study, records.read_metrics(settings.study)
    table = statistics.answer_table(metrics)
    shown = statistics.readable(table)
    tables = [(task, rows.drop(columns="Task").to_numpy().tolist()) for task, rows in shown.groupby("Task", sort=False)]
    judged = statistics.verdicts(trainset_effects.strategy_rows(metrics))
    answers = statistics.sentences(judged) if trainset_effects.compares_strategies(metrics) else {}
    if settings.folds:
        said = cross_validation.sentences(metrics, records.read_predictions(study))
        answers = {task: " ".join(said.get(task, [text])) for task, text in answers.items()}
    runs, failed = int(table["runs"].sum()), int(table["failed"].sum())
    return {
        "headline": statistics.headline(judged),
        "answers": list(answers.items()),
        "effects": list(trainset_effects.sentences(metrics).items()),
        "what": "Every strategy, best first",
        "columns": [column for column in shown.columns if column != "Task"],
        "tables": tables,
        "finished": f"{runs} runs, {failed} of them failed." if failed else f"{runs} runs, none failed.",
    }


def _figures(site: Path, study: str) -> list[dict[str, str]]:
    source, target = paths.figures_dir(study), site / "figures" / study
    if source.is_dir():
        shutil.copytree(source, target)
    figures = []
    for file in sorted(target.glob("*.png"), key=_place):
        address = f"figures/{study}/{quote(file.stem)}"
        files = {kind: f"{address}.{kind}" for kind in ("png", "pdf", "csv")}
        width = int.from_bytes(file.read_bytes()[16:20], "big")  # where the PNG format keeps it
        figures.append({"caption": _caption(file.stem), "width": round(width / PIXELS), **files})
    return figures


def _place(file: Path) -> tuple[int, str]:
    """Return what figures are sorted by: their number, then their name."""
    number = re.match(r"fig(\d+)", file.stem)
    return (int(number[1]) if number else 0, file.stem)


def _caption(figure: str) -> str:
    """Return the caption of a figure, which names its task; a figure that has none is called by its name."""
    if figure in CAPTIONS_BY_NAME:
        return CAPTIONS_BY_NAME[figure]
    named = FIGURE_NAME.fullmatch(figure)
    return CAPTIONS.get(named[1], figure).format(named[2]) if named else figure


def _notebook_links(site: Path, study: str, convert: _Converter, *, simulated: bool) -> dict[str, Any]:
    """Convert the executed notebooks of a study; steps are listed, runs are sorted by task, strategy and seed."""
    steps, runs = [], []
    for notebook in sorted((paths.RUNS / study).rglob("*.ipynb")):
        inside = notebook.relative_to(paths.RUNS / study)
        target = site / "notebooks" / study / inside.with_suffix(".html")
        *folders, _ = inside.parts
        name = " / ".join([*folders, notebook.stem])
        root = "../" * (2 + len(folders))
        convert.write(notebook, target, name=f"{study} / {name}", root=root, simulated=simulated)
        address = quote(str(target.relative_to(site)))
        if len(folders) == 4:  # task, train set, strategy, seed: see paths.run_dir
            group, strategy, seed = " / ".join(folders[:2]), folders[2], folders[3]
            runs.append((group, strategy, Link(seed, address)))
        else:
            steps.append(Link(name, address))
    grouped = [
        (group, [(strategy, [run[2] for run in part]) for strategy, part in groupby(rows, key=lambda run: run[1])])
        for group, rows in groupby(runs, key=lambda run: run[0])
    ]
    return {"steps": steps, "runs": grouped}


if __name__ == "__main__":
    sys.exit(main())
