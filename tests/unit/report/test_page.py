"""The page: the answer comes first, every link leads somewhere on this disk, nothing is loaded from elsewhere."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from matplotlib.figure import Figure

from tuneformer import paths
from tuneformer.evaluate.telling import recommendations
from tuneformer.keys import BASELINES, GENE_BASELINES, STRATEGIES
from tuneformer.report import figures, page

LOADS = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "formaction", "manifest"}
REMOTE = re.compile(r"^\s*([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
FETCHES = re.compile(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|import\(", re.IGNORECASE)


class Page(HTMLParser):
    """Reads a page: what it loads, what it links to, its text, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.words, self.tags, self.images = [], [], [], [], []
        self.styles, self.inside = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.inside = tag if tag in ("style", "script") else None
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
        addresses = [address for address in self.loads if REMOTE.match(address)]
        return addresses + [style for style in self.styles if FETCHES.search(style)]


def executed(path, *outputs):
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=1, outputs=list(outputs))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Fine-tune\n\nA $cost$."), cell])
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def site(results, write):
    """Results, figures and executed notebooks of the study, in folders of their own."""
    write(results, paths.RUNS / "small" / "results")
    for name in ("scores", "recall_drugs"):
        figures.save(Figure(figsize=(2, 1)), results.settings, name, results.runs.head())
    table = {"text/html": "<table><tr><td>0.5</td></tr></table>", "text/plain": "0.5"}
    output = nbformat.v4.new_output("display_data", data=table)
    executed(paths.RUNS / "small" / "06_figures.ipynb", output)
    executed(paths.RUNS / "small" / "drugs" / "01_qc.ipynb", output)
    warning = nbformat.v4.new_output("stream", name="stderr", text="epoch 1")
    for arm in ("full", "random_init"):
        executed(paths.RUNS / "small" / "drugs" / arm / "seeds0-2.ipynb", output, warning)
    return paths.SITE


def index(site):
    return Page((site / "index.html").read_text())


def test_nothing_is_loaded_from_the_net(site):
    page.build(["small"])
    found = [Page(file.read_text()) for file in site.rglob("*.html")]
    assert len(found) == 5
    for one in found:
        assert one.remote() == []
        assert "script" not in one.tags
    assert not re.search(r"url\(|@import|//", (site / "style.css").read_text())


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
    page.build(["small"])
    for file in site.rglob("*.html"):
        one = Page(file.read_text())
        for address in one.links + one.loads:
            if address == "data:,":
                continue
            assert not urlsplit(address).scheme, address
            target = file.parent / unquote(urlsplit(address).path) if urlsplit(address).path else file
            assert target.is_file(), f"{file.name} links to {address}"


def test_the_question_and_the_answer_come_first(site):
    assert page.build(["small"]) == site / "index.html"
    text = index(site).text
    order = [
        "Which strategy tells <drugs> & doses apart?",
        "simulated cells",
        "simulated checkpoint",
        "Answer",
        "drugs Not decided between full fine-tuning (full) and logistic regression on counts (logistic_counts)",
        "About 12 more seeds would decide, if it stays so.",
        "full fine-tuning (full) score the same within 0.03: take the cheaper.",
        "Pre-training pays: random_init scored lower than full",
        "Tested on: Untreated 20, Nutlin 20, Dex 20.",
        "Each contrast in a sentence",
        "full scores higher than random_init: +",
        "pseudobulk_k2 and full are the same within 0.03",
        "pseudobulk_k10 scores lower than full",
        "What was asked",
        "Every arm, best first",
        "A difference is clear when p, corrected after Holm for 8 contrasts, is below 0.05.",
        "36 runs, 1 of them failed.",
        "What the arms differ in",
        "How to read this",
        "More figures",
        "Notebooks",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    raw = (site / "index.html").read_text()
    assert raw.index("scores.png") < raw.index("<table") < raw.index("recall_drugs.png")
    assert "2 of 3" in text  # the arm of which a run failed
    assert "not run here" not in text


def test_pictures_can_be_read_without_seeing_them(site):
    page.build(["small"])
    images = index(site).images
    assert len(images) == 2
    assert all(len(image["alt"]) > 40 and int(image["width"]) > 100 for image in images)


def test_real_cells_are_not_called_simulated(results, write):
    results.answer["simulated"] = False
    write(results, paths.RESULTS / "small")
    page.build(["small"])
    text = index(paths.SITE).text
    head = text[: text.index("Answer")]
    assert "real cells" in head
    assert "simulated checkpoint" in head
    assert head.count("simulated cells") == 1  # in the question of this study


def test_results_of_the_repository_are_shown_and_marked(site, results, write):
    (paths.PARAMS / "other.yaml").write_text((paths.PARAMS / "small.yaml").read_text())
    results.answer["question"] = "Another question?"
    write(results, paths.RESULTS / "other")
    page.build(["small"])
    text = index(site).text
    other = text[text.index("Other studies") :]
    assert other.index("Another question?") < other.index("from the repository, not run here")
    assert "make report STUDY=other" in other  # its notebooks are not here
    assert (site / "results" / "other" / "runs.csv").is_file()


def test_a_study_that_cannot_be_read_does_not_keep_the_others_from_being_shown(site, results, write):
    write(results, paths.RESULTS / "gone")  # no params/gone.yaml
    (paths.PARAMS / "half.yaml").write_text((paths.PARAMS / "small.yaml").read_text())
    write(results, paths.RESULTS / "half")
    (paths.RESULTS / "half" / "runs.csv").unlink()
    page.build(["small"])
    text = index(site).text
    assert "gone cannot be shown: params/gone.yaml does not exist." in text
    assert "half cannot be shown: results/half/runs.csv does not exist" in text


def test_a_study_without_contrasts_is_shown(results, write):
    for task in results.answer["tasks"]:
        task["contrasts"] = []
        task["recommendation"] = recommendations(task)
    write(results, paths.RESULTS / "small")
    page.build(["small"])
    text = index(paths.SITE).text
    assert "No arm is recommended: no contrast compares two arms" in text
    assert "What was asked" not in text


def test_executed_notebooks_become_pages_with_their_outputs(site):
    page.build(["small"])
    one = Page((site / "notebooks" / "small" / "drugs" / "full" / "seeds0-2.html").read_text())
    for part in ("Fine-tune", "0.5", "epoch 1", "simulated cells"):
        assert part in one.text
    links = index(site).links
    assert "notebooks/small/drugs/random_init/seeds0-2.html" in links
    assert "notebooks/small/06_figures.html" in links


def test_names_cannot_become_markup(site, results, write):
    hostile = "<script>alert(1)</script>"
    results.answer["tasks"][0]["task"] = results.answer["tasks"][0]["arms"][0]["arm"] = hostile
    results.answer["question"] = hostile
    write(results, paths.RUNS / "small" / "results")
    page.build(["small"])
    one = index(site)
    assert "script" not in one.tags
    assert one.text.count(hostile) >= 3


def test_a_new_page_replaces_the_old_one_whole(site):
    page.build(["small"])
    (site / "notebooks" / "small" / "old.html").write_text("old")
    before = {file.relative_to(site): file.read_bytes() for file in site.rglob("*") if file.is_file()}
    page.build(["small"])
    after = {file.relative_to(site): file.read_bytes() for file in site.rglob("*") if file.is_file()}
    assert before.keys() - after.keys() == {file for file in before if file.name == "old.html"}
    assert all(before[file] == content for file, content in after.items())


def test_what_is_missing_is_said_in_one_sentence_and_the_old_page_stays(site, capsys):
    page.build(["small"])
    before = (site / "index.html").read_bytes()
    (paths.PARAMS / "new.yaml").write_text("question: nothing yet\n")
    assert page.main(["new"]) == 2
    assert "new/runs.csv does not exist; run `make report STUDY=new`" in capsys.readouterr().err
    (paths.RUNS / "small" / "06_figures.ipynb").write_text('{"cells": [')
    assert page.main(["small"]) == 2
    said = capsys.readouterr().err
    assert "06_figures.ipynb is not a readable notebook" in said
    assert said.count("\n") == 1
    assert (site / "index.html").read_bytes() == before


def test_every_strategy_and_baseline_is_explained(site):
    page.build(["small"])
    words = [word.strip() for word in index(site).words]
    assert {*STRATEGIES, *BASELINES, *GENE_BASELINES} <= set(words)


def test_figures_come_in_the_order_of_the_captions_and_others_under_their_names(site, results):
    for name in ("cost", "overview", "contrasts"):
        figures.save(Figure(figsize=(2, 1)), results.settings, name)
    page.build(["small"])
    stems = [image["src"].split("/")[-1].removesuffix(".png") for image in index(site).images]
    assert stems == ["scores", "contrasts", "recall_drugs", "cost", "overview"]
    assert "Task: drugs." in index(site).text
