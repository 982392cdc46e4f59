"""What the page says of a study that is one notebook: genes (07) or compression (08).

In: the table that the notebook left in ``results/<study>``. Out: the answer in sentences, and the table for readers.
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tuneformer.evaluate import compression_table, gene_baselines, gene_study
from tuneformer.evaluate.statistics import MISSING, with_interval
from tuneformer.study import paths
from tuneformer.study.params import Study

TABLES = {"cells": "metrics.csv", "genes": "genes.csv", "compression": "compression.csv"}
"""The file in ``results/<study>`` that holds the numbers of a study of each kind."""


class Summary(NamedTuple):
    """The answer of a study: its first sentence, the others, and what was compared as a table of text."""

    headline: str
    sentences: list[str]
    table: pd.DataFrame


def table_path(settings: Study) -> Path:
    """Return the file with the numbers of a study."""
    return paths.results_dir(settings.study) / TABLES[settings.kind]


def summary(settings: Study) -> Summary:
    """Sum up a study of genes or of compression from its table."""
    table = pd.read_csv(table_path(settings))
    if settings.kind == "compression":
        worse, variants = compression_table.clearly_worse(table), table["variant"].nunique() - 1
        verb = "is" if len(worse) == 1 else "are"
        headline = f"{len(worse) or 'None'} of {variants} compressed models {verb} clearly worse than the whole one."
        return Summary(headline, compression_table.sentences(table), compression_table.readable(table).reset_index())
    answers = gene_study.answer_table(table)
    return Summary(*_on_genes(answers), _readable_genes(answers))


def _on_genes(answers: pd.DataFrame) -> tuple[str, list[str]]:
    """Say how well genes are told apart, by gene and by token, by models and baselines, and with permuted classes."""
    is_baseline = answers.index.isin(gene_baselines.BASELINES)
    tuned, baselines = answers[~is_baseline], answers[is_baseline]
    best = tuned.loc[tuned["gene AUC"].idxmax()]
    found = (answers["low"] > 0.5).sum()
    headline = f"{found or 'None'} of {len(answers)} methods clearly tell{'s' if found == 1 else ''} the classes apart"
    headline += " (95 % interval of the AUC over genes)."
    said = [f"Of the strategies {best.name} has the highest AUC over genes, {_auc(best)}."]
    if len(baselines):
        rival = baselines.loc[baselines["gene AUC"].idxmax()]
        said[0] = f"{said[0][:-1]}; of the baselines, which see one row a gene, {rival.name}, {_auc(rival)}."
    by_token = f"{best['token AUC']:.3f} ± {best['sd']:.3f}"
    said.append(f"Counted by token, as published, the AUC of {best.name} is {by_token} over folds.")
    permuted = answers["permuted"].dropna()
    if len(permuted):
        low, high = permuted.min(), permuted.max()
        said.append(f"With classes permuted over the genes, the mean AUC of the methods is {low:.3f} to {high:.3f}.")
    return headline, said


def _readable_genes(answers: pd.DataFrame) -> pd.DataFrame:
    shown = pd.DataFrame({"Method": answers.index})
    shown["AUC over genes (95 % interval)"] = [_auc(row) for _, row in answers.iterrows()]
    tokens = zip(answers["token AUC"], answers["sd"], strict=True)
    shown["AUC over tokens (sd over folds)"] = [MISSING if pd.isna(a) else f"{a:.3f} ({sd:.3f})" for a, sd in tokens]
    for title in ("gene AUC, other cells", "permuted"):
        shown[title[0].upper() + title[1:]] = [MISSING if pd.isna(x) else f"{x:.3f}" for x in answers[title]]
    return shown


def _auc(row: pd.Series) -> str:
    return with_interval(row["gene AUC"], row["low"], row["high"])
