"""Whether test cells had a part in what is tested on them: a check that fails a batch, not a note.

In: the cells, tokens and finished runs of a study. Out: a list of `Finding`, empty if all is well; as a command, one
line that counts what was checked, or one sentence a finding and an exit code above 0.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from tuneformer.data import splits
from tuneformer.study import grid, paths, train_sets
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.run import finished_record
from tuneformer.study.treatments import BASELINES
from tuneformer.tokens import tokenizer
from tuneformer.tokens.vocabulary import Vocabulary
from tuneformer.trainsets import pseudobulk

if TYPE_CHECKING:
    from tuneformer.tokens.tokenizer import Tokens

FEW_TOKENS = 10  # lists up to this length may agree by chance
CHOSEN_BY = "validation_macro_f1"


class LeakageError(ValueError):
    """Something that is tested had a part in the training; the message names the first finding and their number."""


@dataclass(frozen=True)
class Finding:
    """What is wrong and where, how often, one example, and what to do; as text, one sentence."""

    what: str
    where: str
    number: int
    example: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.number:,}, such as {self.example}); {self.remedy}."


@dataclass
class Checked:
    """What `check_study` looked at: runs of the grid, those that have finished or failed, folders of tokens, tasks."""

    asked: int
    runs: int = 0
    failed: int = 0
    tokens: int = 0
    tasks: int = 0


def refuse_leaks(findings: Iterable[Finding]) -> None:
    """Raise if there is a finding.

    Raises
    ------
    LeakageError
        There is one; the message is the first, and says how many there are.
    """
    findings = list(findings)
    if findings:
        others = f" (the first of {len(findings)} findings)" if len(findings) > 1 else ""
        msg = f"{findings[0]}{others}"
        raise LeakageError(msg)


def check_cells(settings: Study, cells: "ad.AnnData") -> list[Finding]:
    """Check the split of a task: no cell stands twice, and no group that is held out whole is in two parts.

    Parameters
    ----------
    settings
        ``group_by`` is read.
    cells
        As `tuneformer.data.preprocessing.prepare_cells` makes them.
    """
    where = f"{settings.study} {paths.part_name(settings)}"
    findings = []
    twice = cells.obs_names[cells.obs_names.duplicated()].unique()
    if len(twice):
        what, remedy = "cell names that stand more than once", "make obs_names unique and run 01_qc again"
        findings.append(Finding(what, where, len(twice), twice[0], remedy))
    if settings.group_by is not None:
        part = pd.Series(cells.obs["split"].astype(str).to_numpy(), index=cells.obs[settings.group_by].astype(str))
        if settings.fold is not None:  # validation may be single cells of the training groups
            part = part.where(part == "test", "train")
        parts = part.groupby(level=0).unique()
        divided = parts[parts.map(len) > 1]
        if len(divided):
            what = f"groups of {settings.group_by!r} in more than one part of the split"
            example = f"{divided.index[0]} in {' and '.join(sorted(divided.iloc[0]))}"
            remedy = f"delete {paths.shown(paths.cells_path(settings))} and run 01_qc again, which keeps groups whole"
            findings.append(Finding(what, where, len(divided), example, remedy))
    return findings


def check_points(points: "ad.AnnData", cells: "ad.AnnData", where: str) -> list[Finding]:
    """Check that no point for training or validation is made of test cells.

    Parameters
    ----------
    points
        Made cells with ``obs["member_names"]`` (`tuneformer.trainsets.pseudobulk.member_names` reads it). Rows whose
        ``obs["split"]`` is test, if there is such a column, are test cells and no points.
    cells
        The real cells, with ``obs["split"]``.
    where
        Name of the train set, for the findings.
    """
    if "split" in points.obs:
        points = points[(points.obs["split"] != "test").to_numpy()]
    of_point = pd.Series(pseudobulk.member_names(points), index=points.obs_names).explode().dropna()
    by_member = pd.Series(of_point.index, index=of_point.to_numpy(str))
    return _check_sources(by_member.index, cells, where, {name: f" in {point}" for name, point in by_member.items()})


def check_tokens(
    settings: Study, cells: "ad.AnnData", tokens: "Tokens", *, sources: Iterable[str], vocabulary: Vocabulary
) -> list[Finding]:
    """Check the tokens of one train set.

    The tokens are made of these cells. Every real cell is in the part that the split gave it, and each test cell of the
    split is there once and nothing else is tested. No test cell has the same tokens as one that is trained or validated
    on (lists of more than `FEW_TOKENS`). Made cells were made of cells that are known and not tested. The medians by
    which genes are ranked are those of the checkpoint or of the training cells.

    Parameters
    ----------
    settings
        A run on this train set.
    cells
        Real cells of the task; of ``X`` nothing is read.
    tokens
        From `tuneformer.tokens.tokenizer.read_tokens`.
    sources
        Names of the real cells that made cells were made from, from ``sources.txt`` beside the tokens.
    vocabulary
        As `tuneformer.tokens.tokenizer.task_vocabulary` makes it of `cells`.
    """
    where = paths.shown(paths.tokens_path(settings))
    table = token_table(tokens)
    findings = []
    stated = json.loads(cells.uns["provenance"])["fingerprint"]
    if stated != tokens.provenance["cells"]:
        example = f"{tokens.provenance['cells']} where {paths.shown(paths.cells_path(settings))} has {stated}"
        remedy = "they cannot be checked: delete them and run 02_tokenize again"
        findings.append(Finding("tokens of other cells", where, len(table), example, remedy))
    sources = list(sources)
    findings += _check_parts(cells, table, where)
    findings += _check_sources(sources, cells, where, {})
    made = table.loc[~table["cell"].isin(cells.obs_names), "cell"]
    is_bulk = train_sets.parse(settings.train_set).kind == "bulk"  # samples of another experiment, made of no cell
    if len(made) and not sources and not is_bulk:
        what, remedy = (
            "made cells of unknown sources",
            "sources.txt is missing or empty: delete the tokens and run again",
        )
        findings.append(Finding(what, where, len(made), made.iloc[0], remedy))
    findings += _check_sequences(tokens, table, where)
    return findings + _check_vocabulary(settings, tokens.vocabulary, vocabulary, where)


def check_run(
    settings: Study,
    table: pd.DataFrame,
    drawn: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    predictions: pd.DataFrame,
) -> list[Finding]:
    """Check that a finished run was not chosen by its test cells, and tested every one of them once.

    The cells that it was trained on and those that chose its best epoch are not tested. The best epoch, or point of a
    baseline's grid, is the one of highest validation macro-F1; of several the first, for a baseline the one of lowest
    validation loss.

    Parameters
    ----------
    settings
        The run.
    table
        Cell, label and split of its tokens, from `token_table`.
    drawn
        Rows of `table` for train, validation and test, from `tuneformer.data.splits.draw_cells`.
    record
        Its record: ``history`` and ``best_epoch``.
    predictions
        Its predictions of test cells: columns cell and label.
    """
    where = f"{settings.study} {grid.describe(settings)}"
    findings = []
    tested = table["cell"].iloc[drawn["test"]]
    for part, use in {"train": "it was trained on", "validation": "chose its best epoch"}.items():
        both = tested[tested.isin(table["cell"].iloc[drawn[part]])]
        if len(both):
            remedy = "delete its tokens and run it again"
            findings.append(Finding(f"test cells that {use}", where, len(both), both.iloc[0], remedy))
    remedy = "delete its folder and run it again"
    predicted = predictions["cell"]
    faults = {
        "test cells that were predicted more than once": predicted[predicted.duplicated()],
        "test cells that were not predicted": tested[~tested.isin(predicted)],
        "predicted cells that are no test cells": predicted[~predicted.isin(tested)],
    }
    known = predictions.drop_duplicates("cell").merge(table.iloc[drawn["test"]], on="cell", suffixes=("", "_of_cell"))
    faults["test cells with another class than in the tokens"] = known["cell"][known["label"] != known["label_of_cell"]]
    findings += [Finding(what, where, len(at), at.iloc[0], remedy) for what, at in faults.items() if len(at)]
    return findings + _check_choice(settings, record, where)


def check_study(study: str) -> tuple[list[Finding], Checked]:
    """Check every finished run of a study's grid, its tokens and its cells; each file is read once.

    Raises
    ------
    ParameterError
        The study cannot be used.
    """
    runs = grid.runs(study)
    findings, checked = [], Checked(asked=len(runs))
    for _, of_task in groupby(runs, key=paths.part_name):
        finished = [(run, record) for run in of_task if (record := finished_record(run)) is not None]
        if finished:
            findings += _check_task(finished, checked)
    return findings, checked


def token_table(tokens: "Tokens") -> pd.DataFrame:
    """Return cell, label and split of tokens, one row each."""
    return tokens.dataset.select_columns(["cell", "label", "split"]).to_pandas()


def main(arguments: list[str] | None = None) -> int:
    """Check a study for leakage; end with 1 and one sentence a finding, or with 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.evaluate.leakage", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    study = parser.parse_args(arguments).study
    try:
        findings, checked = check_study(study)
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    if not checked.runs:
        where = paths.shown(paths.RUNS / study)
        print(f"Study {study} has no finished run in {where}, so there is nothing to check.", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"leakage: {finding}", file=sys.stderr)
    if findings:
        return 1
    print(
        f"Study {study}: no leakage in {checked.runs} of {checked.asked} runs ({checked.failed} failed), "
        f"{checked.tokens} folders of tokens, {checked.tasks} tasks"
    )
    return 0


def _check_task(finished: list[tuple[Study, dict[str, Any]]], checked: Checked) -> list[Finding]:
    """Check the finished runs of one task, and count them in `checked`."""
    first = finished[0][0]
    path = paths.cells_path(first)
    checked.tasks += 1
    checked.runs += len(finished)
    checked.failed += sum(record["status"] != "ok" for _, record in finished)
    if not path.is_file():
        remedy = "the split cannot be checked: run 01_qc again"
        return [Finding("runs without their cells", paths.shown(path), len(finished), grid.describe(first), remedy)]
    cells = ad.read_h5ad(path, backed=None if first.vocabulary == "fit" else "r")
    vocabulary = tokenizer.task_vocabulary(first, cells)
    findings = check_cells(first, cells)
    for folder, runs in groupby(sorted(finished, key=_folder), key=_folder):
        runs = list(runs)
        tokens = tokenizer.read_tokens(runs[0][0])
        checked.tokens += 1
        if tokens is None:
            what, remedy = "runs whose tokens are of other parameters", "they cannot be checked: run the study again"
            findings.append(Finding(what, paths.shown(folder), len(runs), grid.describe(runs[0][0]), remedy))
            continue
        listed = folder / "sources.txt"
        sources = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
        findings += check_tokens(runs[0][0], cells, tokens, sources=sources, vocabulary=vocabulary)
        table = token_table(tokens)
        findings += [finding for run, record in runs for finding in _check_finished(run, record, table)]
    if cells.isbacked:
        cells.file.close()
    return findings


def _folder(finished: tuple[Study, dict[str, Any]]) -> Any:
    return paths.tokens_path(finished[0])


def _check_finished(run: Study, record: dict[str, Any], table: pd.DataFrame) -> list[Finding]:
    if record["status"] != "ok":
        return []
    path = paths.run_dir(run) / "predictions.parquet"
    if not path.is_file():
        remedy = "it cannot be checked: delete its record.json and run it again"
        return [Finding("a finished run without predictions", paths.shown(path.parent), 1, path.name, remedy)]
    drawn = splits.draw_cells(
        table,
        train_cells=None if paths.is_made(run) else run.train_cells,
        validation_share=run.validation_share,
        seed=run.seed,
    )
    return check_run(run, table, drawn, record, pd.read_parquet(path, columns=["cell", "label"]))


def _check_parts(cells: "ad.AnnData", table: pd.DataFrame, where: str) -> list[Finding]:
    """Check which cells are in which part of the tokens."""
    remedy = "delete the tokens and run 02_tokenize again"
    part = cells.obs["split"].astype(str)
    part = part[~part.index.duplicated()]
    real = table[table["cell"].isin(part.index)]
    stated = part.reindex(real["cell"]).to_numpy()
    moved = real[real["split"].to_numpy() != stated]
    parts = table.groupby("cell")["split"].nunique()
    tested, test = table.loc[table["split"] == "test", "cell"], part.index[part == "test"]
    faults = {
        "cells in more than one part of the tokens": parts.index[parts > 1],
        "cells in another part of the tokens than the split gave them": pd.Index(
            moved["cell"] + " in " + moved["split"] + " for " + part.reindex(moved["cell"]).to_numpy()
        ),
        "test cells that are tested more than once": pd.Index(tested[tested.duplicated()].unique()),
        "test cells of the split that are not tested": test.difference(tested, sort=False),
        "tested cells that are not real cells": pd.Index(tested[~tested.isin(part.index)]),
    }
    return [Finding(what, where, len(names), str(names[0]), remedy) for what, names in faults.items() if len(names)]


def _check_sources(names: Iterable[str], cells: "ad.AnnData", where: str, within: Mapping[str, str]) -> list[Finding]:
    """Check the real cells that made cells come from; `within` says in which made cell a name stands."""
    part = cells.obs["split"].astype(str)
    names = pd.Index(names).unique()
    faults = {
        "test cells that made cells are made of": names[names.isin(part.index[part == "test"])],
        "sources of made cells that are no cells of the task": names[~names.isin(part.index)],
    }
    remedy = "make them of training and validation cells only"
    return [
        Finding(what, where, len(found), f"{found[0]}{within.get(found[0], '')}", remedy)
        for what, found in faults.items()
        if len(found)
    ]


def _check_sequences(tokens: "Tokens", table: pd.DataFrame, where: str) -> list[Finding]:
    """Find test cells with the very tokens of another cell that is trained or validated on."""
    ids = tokens.dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"].combine_chunks()
    flat, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
    lists = np.array([flat[begin:end].tobytes() for begin, end in pairwise(offsets)], dtype=object)
    is_test, is_long = (table["split"] == "test").to_numpy(), np.diff(offsets) > FEW_TOKENS
    names = table["cell"].to_numpy()
    learnt = dict(zip(lists[~is_test & is_long], names[~is_test & is_long], strict=True))
    same = [(name, learnt[key]) for key, name in zip(lists[is_test], names[is_test], strict=True) if key in learnt]
    if not same:
        return []
    what = f"test cells with the tokens of a cell that is trained on, {len(same) / is_test.sum():.1%} of all"
    example = f"{same[0][0]}, which is like {same[0][1]}"
    return [Finding(what, where, len(same), example, "drop repeated cells before the split")]


def _check_vocabulary(settings: Study, used: Vocabulary, expected: Vocabulary, where: str) -> list[Finding]:
    if used.hash == expected.hash:
        return []
    source = "the checkpoint" if settings.vocabulary == "checkpoint" else "the training cells"
    tables = [vocabulary.genes.set_index("ensembl_id")[["token_id", "median"]] for vocabulary in (used, expected)]
    both = tables[0].join(tables[1], how="outer", lsuffix="_used")
    other = both[(both["median_used"] != both["median"]) | (both["token_id_used"] != both["token_id"])]
    example = "a special token or an alias"
    if len(other):
        gene = other.iloc[0]
        example = f"{other.index[0]} with the median {gene['median_used']:.4g} in place of {gene['median']:.4g}"
    what = f"genes of the vocabulary that are not those of {source}"
    return [Finding(what, where, max(1, len(other)), example, "delete the tokens and run 02_tokenize again")]


def _check_choice(settings: Study, record: Mapping[str, Any], where: str) -> list[Finding]:
    """Check that validation cells alone chose the epoch, or the point of the grid, that was tested."""
    history = pd.DataFrame(record["history"])
    best = history[history[CHOSEN_BY] == history[CHOSEN_BY].max()]
    is_baseline = settings.strategy in BASELINES
    chosen = best.loc[best["validation_loss"].idxmin() if is_baseline else best.index[0], "epoch"]
    if record["best_epoch"] == chosen:
        return []
    kind = "point of the grid" if is_baseline else "epoch"
    example = f"{record['best_epoch']}, where validation macro-F1 is highest in {chosen:.0f}"
    what = f"a tested {kind} that validation did not choose"
    return [Finding(what, where, 1, example, "delete its folder and run it again")]


if __name__ == "__main__":
    sys.exit(main())
