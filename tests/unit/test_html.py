"""The page: the answer comes first, every link leads somewhere on this disk, nothing is loaded from elsewhere."""

import re
from html.parser import HTMLParser
from typing import get_args
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tuneformer.report import html, plotting, records
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.study.train_sets import FORMS, parse
from tuneformer.study.treatments import Baseline, Loss, Sampling, Strategy
from tuneformer.study.treatments import parse as parse_treatment

LOADS = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "formaction", "manifest"}
REMOTE = re.compile(r"^\s*([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """Reads a page: what it loads, what it links to, its text, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.words, self.tags, self.images = [], [], [], [], [], []
        self.styles, self.inside = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.inside = tag if tag in ("style", "script") else None
        self.ids += [given["id"]] if "id" in given else []
        self.images += [given] if tag == "img" else []
        self.styles += [given["style"]] if given.get("style") else []
        self.links += [given["href"]] if tag == "a" and "href" in given else []
        self.loads += [value for name, value in given.items() if name in LOADS and value]
        self.loads += [given["href"]] if tag != "a" and given.get("href") else []

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        (self.styles if self.inside else self.words).append(data)

    @property
    def text(self):
        """The words of the page, spaces joined."""
        return " ".join(" ".join(self.words).split())

    def remote(self):
        """What would be fetched from the net: an address that is loaded, or one in a style or a script."""
        fetches = re.compile(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(", re.IGNORECASE)
        return [address for address in self.loads if REMOTE.match(address)] + [
            style for style in self.styles if fetches.search(style)
        ]


def executed(path, *outputs):
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=1, outputs=list(outputs))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Fine-tune\n\nA $cost$."), cell])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def site(tmp_path, monkeypatch, results):
    """Results, figures and executed notebooks of the study tiny, in folders of their own."""
    for name in ("RUNS", "RESULTS", "FIGURES", "SITE"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    paths.write_text(paths.RESULTS / "tiny" / "metrics.csv", results.to_csv(index=False))
    drawing = plotting.Drawing(Figure(figsize=(2, 1)), results.head())
    plotting.save_figures({"fig1_scores": drawing, "fig2_confusion_drugs": drawing}, "tiny")
    table = {"text/html": "<table><tr><td>0.5</td></tr></table>", "text/plain": "0.5"}
    output = nbformat.v4.new_output("display_data", data=table)
    warning = nbformat.v4.new_output("stream", name="stderr", text="epoch 1")
    executed(paths.RUNS / "tiny" / "06_figures.ipynb", output)
    settings = load_study("tiny")
    executed(paths.task_dir(settings) / "01_qc.ipynb", output)
    for seed in (0, 1):
        run = load_study("tiny", seed=seed)
        executed(paths.run_dir(run) / "05_finetune_strategies.ipynb", output, warning)
    return tmp_path / "site"


def pages(site):
    return {file: Page(file.read_text()) for file in site.rglob("*.html")}


def test_nothing_is_loaded_from_the_net(site):
    html.build("tiny")
    found = pages(site)
    assert len(found) == 5
    for page in found.values():
        assert page.remote() == []
        assert "script" not in page.tags
    style = (site / "style.css").read_text()
    assert not re.search(r"url\(|@import|//", style)


def test_the_check_sees_what_would_be_loaded():
    """Otherwise the test above could not fail."""
    loading = [
        '<script src="https://cdn.org/a.js"></script>',
        '<link rel="stylesheet" href="//cdn.org/a.css">',
        '<img src="http://cdn.org/a.png">',
        "<style>@import 'a.css'</style>",
        '<p style="background: url(https://cdn.org/a.png)">',
        "<script>fetch('https://cdn.org')</script>",
    ]
    assert all(Page(text).remote() for text in loading)
    assert not Page('<a href="https://doi.org/10.1038/s41586-023-06139-9">paper</a><img src="a.png">').remote()


def test_every_link_leads_somewhere(site):
    html.build("tiny")
    for file, page in pages(site).items():
        for address in page.links + page.loads:
            if address == "data:,":
                continue
            assert not urlsplit(address).scheme, address
            target = file.parent / unquote(urlsplit(address).path) if urlsplit(address).path else file
            assert target.is_file(), f"{file.name} links to {address}"


def test_the_question_and_the_answer_come_first(site, results):
    assert html.build("tiny") == site / "index.html"
    page = Page((site / "index.html").read_text())
    text = page.text
    order = [
        load_study("tiny").question,
        "simulated cells",
        "Answer",
        "drugs full has the highest mean macro-F1 of the strategies over 3 seeds",
        "Every strategy, best first",
        "How to read this",
        "More figures",
        "Notebooks",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    raw = (site / "index.html").read_text()
    assert raw.index("fig1_scores.png") < raw.index("<table") < raw.index("fig2_confusion_drugs.png")
    assert "18 runs, 1 of them failed." in text
    assert "2 of 3" in text


def test_pictures_can_be_read_without_seeing_them(site):
    html.build("tiny")
    page = Page((site / "index.html").read_text())
    assert len(page.images) == 2
    assert all(len(image["alt"]) > 40 and int(image["width"]) > 100 for image in page.images)


def test_real_cells_are_not_called_simulated(site, results):
    paths.write_text(paths.RESULTS / "pbmc68k" / "metrics.csv", results.assign(study="pbmc68k").to_csv(index=False))
    html.build("pbmc68k")
    text = Page((site / "index.html").read_text()).text
    head = text[: text.index("Answer")]
    assert "real cells" in head
    assert "simulated cells" not in head
    assert "simulated checkpoint" in head


def test_other_studies_with_results_follow(site, results):
    paths.write_text(paths.RESULTS / "demo" / "metrics.csv", results.assign(study="demo").to_csv(index=False))
    html.build("tiny")
    text = Page((site / "index.html").read_text()).text
    assert (
        text.index(load_study("tiny").question) < text.index("Other studies") < text.index(load_study("demo").question)
    )
    assert "make report STUDY=demo" in text  # its notebooks are not here
    assert (site / "results" / "demo" / "metrics.csv").is_file()


def test_executed_notebooks_become_pages_with_their_outputs(site):
    html.build("tiny")
    folder = site / "notebooks" / "tiny" / "drug_5class" / "single_cell" / "full" / "seed0"
    page = Page((folder / "05_finetune_strategies.html").read_text())
    assert "Fine-tune" in page.text
    assert "0.5" in page.text
    assert "epoch 1" in page.text
    assert "simulated cells" in page.text
    assert "Traceback" not in page.text
    index = Page((site / "index.html").read_text())
    assert "notebooks/tiny/drug_5class/single_cell/full/seed1/05_finetune_strategies.html" in index.links
    assert "notebooks/tiny/06_figures.html" in index.links


def test_names_cannot_become_markup(site, results):
    hostile = results.replace({"task": {"drugs": "<script>alert(1)</script>"}})
    paths.write_text(paths.RESULTS / "tiny" / "metrics.csv", hostile.to_csv(index=False))
    html.build("tiny")
    page = Page((site / "index.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_a_new_page_replaces_the_old_one_whole(site):
    html.build("tiny")
    (site / "notebooks" / "tiny" / "old.html").write_text("old")
    before = {file.relative_to(site): file.read_bytes() for file in site.rglob("*") if file.is_file()}
    html.build("tiny")
    after = {file.relative_to(site): file.read_bytes() for file in site.rglob("*") if file.is_file()}
    assert before.keys() - after.keys() == {file for file in before if file.name == "old.html"}
    assert all(before[file] == content for file, content in after.items())


def test_what_is_missing_is_said_in_one_sentence_and_the_old_page_stays(site, capsys):
    html.build("tiny")
    before = (site / "index.html").read_bytes()
    assert html.main(["demo"]) == 2
    assert "demo/metrics.csv does not exist; run `make report STUDY=demo`" in capsys.readouterr().err
    (paths.RUNS / "tiny" / "06_figures.ipynb").write_text('{"cells": [')
    assert html.main(["tiny"]) == 2
    said = capsys.readouterr().err
    assert "06_figures.ipynb is not a readable notebook" in said
    assert said.count("\n") == 1
    assert (site / "index.html").read_bytes() == before


def test_results_without_a_study_are_refused(site, results):
    paths.write_text(paths.RESULTS / "gone" / "metrics.csv", results.to_csv(index=False))
    with pytest.raises(records.RecordError, match="results/gone belongs to no study"):
        html.build("tiny")


def on_train_sets(results, strategies):
    """Rows of a study that trains the same strategies on single cells and on pseudo-bulk, with the same scores."""
    rows = results[results["strategy"].isin(strategies)].assign(study="demo_pseudobulk")
    made = rows.assign(train_set="pseudobulk_k5_sum", fingerprint="bulk" + rows["fingerprint"])
    return pd.concat([rows, made])


def test_a_study_on_train_sets_says_what_these_did(site, results):
    metrics = on_train_sets(results, ["full"])
    paths.write_text(paths.RESULTS / "demo_pseudobulk" / "metrics.csv", metrics.to_csv(index=False))
    drawing = plotting.Drawing(Figure(figsize=(2, 1)), results.head())
    plotting.save_figures({"fig4_drug_5class_against_k": drawing}, "demo_pseudobulk")
    html.build("tiny")
    text = Page((site / "index.html").read_text()).text
    mine = text[text.index(load_study("demo_pseudobulk").question) :]
    order = [
        "drugs: what the model was trained on",
        "Trained on pseudo-bulk (sum) instead of single cells",
        "not clearly different for k = 5: +0.000 (+0.000 to +0.000)",
        "models trained on pseudo-bulk, in drug_5class, against the number k",
        "Every train set and strategy, best first",
    ]
    places = [mine.index(part) for part in order]
    assert places == sorted(places)
    assert "highest mean macro-F1" not in mine  # one strategy: there is none to be ahead of
    assert "What the train sets are" in text
    assert "Clearly lower or higher" in text


def test_strategies_of_such_a_study_are_judged_on_single_cells(site, results):
    metrics = on_train_sets(results, ["full", "random_init"])
    better = metrics["value"].where(metrics["train_set"] == "single_cell", 2 * metrics["value"])
    paths.write_text(
        paths.RESULTS / "demo_pseudobulk" / "metrics.csv", metrics.assign(value=better).to_csv(index=False)
    )
    html.build("tiny")
    text = Page((site / "index.html").read_text()).text
    mine = text[text.index(load_study("demo_pseudobulk").question) :]
    scores = results[(results["strategy"] == "full") & (results["metric"] == "macro_f1")]
    mean = scores.loc[scores["task"] == "drugs", "value"].mean()
    assert f"full has the highest mean macro-F1 of the strategies over 3 seeds, {mean:.3f}" in mine
    assert "drugs: what the model was trained on full: Trained on pseudo-bulk" in mine


def test_a_page_of_strategies_alone_does_not_speak_of_train_sets(site):
    html.build("tiny")
    text = Page((site / "index.html").read_text()).text
    assert "Every strategy, best first" in text
    assert "train set" not in text.lower()


@pytest.mark.parametrize(
    ("stem", "task"),
    [
        ("fig2_confusion_drug_5class", "drug_5class"),
        ("fig4_drug_5class_against_k", "drug_5class"),
        ("fig5_nutlin_2class_full_decomposition", "nutlin_2class_full"),
        ("fig6_drug_5class_per_class", "drug_5class"),
        ("fig7_drug_5class_share", "drug_5class"),
        ("fig8_drug_5class_confusion", "drug_5class"),
    ],
)
def test_captions_name_the_task(stem, task):
    caption = html._caption(stem)
    assert f"in {task}," in caption or f"in {task}:" in caption


def test_a_figure_without_a_caption_has_its_name():
    assert html._caption("fig99_more") == "fig99_more"
    assert html._caption("overview") == "overview"


def test_every_form_of_train_set_is_explained():
    filled = {"<k>": "2", "<n>": "9", "<p>": "9", "<generator>": "nb", "<sum|mean|approx_mean>": "sum"}
    explained = []
    for name in html.TRAIN_SETS:
        example = name.replace("…_untreated", "synthetic_nb_untreated").replace("…", "pseudobulk_k2_sum")
        for placeholder, value in filled.items():
            example = example.replace(placeholder, value)
        explained.append(example)
    kinds = {(one.kind, one.control, one.amount, one.generator == "copies") for one in map(parse, explained)}
    assert len(kinds) == len(html.TRAIN_SETS) == 16
    assert len(FORMS) == 8  # a new form needs a line in html.TRAIN_SETS, and an example here


def test_every_part_of_a_name_is_explained():
    explained = {
        parse_treatment("selective" + part.replace("<n>", "2")).keys.popitem() for part in html.PARTS_OF_A_NAME
    }
    losses = {("loss", name) for name in get_args(Loss) if name != "cross_entropy"}
    samplings = {("sampling", name) for name in get_args(Sampling) if name != "all"}
    assert explained == losses | samplings | {("freeze_layers", 2), ("batch_size", 2)}


def test_every_strategy_is_explained():
    assert list(html.STRATEGIES) == list(get_args(Strategy))
    assert list(html.BASELINES) == list(get_args(Baseline))


def test_a_table_that_a_notebook_left_for_a_study_of_another_kind_is_no_result(site):
    paths.write_text(paths.RESULTS / "demo" / "compression.csv", "study\n")
    html.build("tiny")
    assert 'id="demo"' not in (site / "index.html").read_text()
