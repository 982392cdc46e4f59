"""Studies that are one notebook: what the page says of them is what their tables hold."""

import pandas as pd
import pytest

from tuneformer.evaluate import gene_baselines
from tuneformer.report import html, other_kinds
from tuneformer.study import paths
from tuneformer.study.params import load_study


def genes(monkeypatch, answers):
    """Let a study of genes have these answers."""
    monkeypatch.setattr(other_kinds.gene_study, "answer_table", lambda _: answers)
    return other_kinds._on_genes(answers)


def row(auc, half, permuted=0.5):
    return {"token AUC": auc - 0.05, "sd": 0.02, "gene AUC": auc, "low": auc - half, "high": auc + half,
            "gene AUC, other cells": auc, "permuted": permuted}  # fmt: skip


def test_genes_are_told_apart_only_where_the_interval_says_so(monkeypatch):
    baseline = gene_baselines.BASELINES[0]
    answers = pd.DataFrame({"full": row(0.7, 0.1), "lora": row(0.55, 0.1), baseline: row(0.6, 0.05)}).T
    headline, said = genes(monkeypatch, answers)
    assert headline.startswith("2 of 3 methods clearly tell the classes apart")
    assert said[0] == (
        "Of the strategies full has the highest AUC over genes, 0.700 (0.600 to 0.800); of the baselines, which see "
        f"one row a gene, {baseline}, 0.600 (0.550 to 0.650)."
    )
    assert "the AUC of full is 0.650 ± 0.020 over folds" in said[1]
    assert "0.500 to 0.500" in said[2]


def test_where_nothing_is_found_none_is_said(monkeypatch):
    headline, _ = genes(monkeypatch, pd.DataFrame({"full": row(0.5, 0.1)}).T)
    assert headline.startswith("None of 1 methods clearly tell")


@pytest.mark.parametrize("study", ["demo_compress", "demo_gene_dosage", "demo_gene_dosage_null"])
def test_the_committed_tables_have_a_section_of_the_page(study, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SITE", tmp_path / "site")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    settings = load_study(study)
    found = other_kinds.summary(settings)
    assert len(found.table) == found.table.iloc[:, 0].nunique()
    html.build(study)
    page = (tmp_path / "site" / "index.html").read_text()
    assert found.headline in page
    assert (tmp_path / "site" / "results" / study / other_kinds.TABLES[settings.kind]).is_file()
    assert f"figures/{study}/fig1" in page


def test_their_figures_have_captions_of_their_own():
    for study in ("demo_compress", "demo_gene_dosage"):
        for file in (paths.FIGURES / study).glob("*.png"):
            assert html._caption(file.stem) == html.CAPTIONS_BY_NAME[file.stem]
