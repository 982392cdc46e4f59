"""Whether test cells had a part in what is tested on them: checks that stop a run, not a note.

In: the cells and tokens of a run before its training, and what it left afterwards. Out: nothing if all is well;
otherwise one sentence with what is wrong, how often, an example, and what to do.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import counts, qc
from tuneformer.study import Study
from tuneformer.tokens import encode

if TYPE_CHECKING:
    from anndata import AnnData

    from tuneformer.cells.make import Prepared
    from tuneformer.model.fit import Outcome
    from tuneformer.tokens.encode import Tokens

Faults = Iterator[tuple[str, Iterable[str], str]]
"""What is wrong, the names of the cells (or groups, genes) of which it is, and what to do."""


def refuse_leaks(prepared: "Prepared", settings: Study) -> None:
    """Check the cells of a run before it is trained.

    Every real cell is in the part that the split gave it; each test cell of the split is there once and nothing else is
    tested; no group of ``group_by`` is divided. No test cell has the very counts (or, without counts, tokens) of a cell
    for training or validation. Made cells are made of known cells that are not tested. Genes are ranked by the medians
    of the checkpoint or of the training cells.

    Raises
    ------
    UserError
        The first check that fails.
    """
    cells = qc.prepare_cells(settings)
    table = prepared.tokens.dataset.select_columns(["cell", "label", "split"]).to_pandas()
    _refuse(_of_split(cells.obs, settings), settings, paths.task_dir(settings))
    faults = (
        _of_parts(table, cells.obs, prepared),
        _of_sources(table, cells.obs, prepared.tokens.sources, settings),
        _of_values(table, prepared),
        _of_vocabulary(prepared.tokens, settings, cells),
    )
    _refuse(chain(*faults), settings, paths.task_dir(settings))


def refuse_unfair(outcome: "Outcome", prepared: "Prepared", settings: Study) -> None:
    """Check what a run left, unless it failed: each test cell is predicted once, validation alone chose the model.

    UserError if a check fails.
    """
    if outcome.status == "ok":
        table = prepared.tokens.dataset.select_columns(["cell", "label", "split"]).to_pandas()
        tested = table[table["split"] == "test"].set_index("cell")["label"]
        _refuse(_of_outcome(outcome, tested), settings, paths.run_dir(settings))


def _refuse(faults: Faults, settings: Study, folder: Path) -> None:
    for what, names, remedy in faults:
        if len(names := list(names)):
            remedy = remedy or f"delete {paths.shown(folder)} and run the study again"
            where = f"{settings.study} {settings.task} {settings.arm} seed {settings.seed}"
            msg = f"{where}: {what} ({len(names):,}, such as {names[0]}); {remedy}."
            raise UserError(msg)


def _of_split(obs: pd.DataFrame, settings: Study) -> Faults:
    """Check the split of a task."""
    yield "cell names that occur more than once", obs.index[obs.index.duplicated()], "make obs_names unique"
    if settings.group_by is not None:
        part = obs["split"].astype(str)
        if settings.fold is not None:  # validation may be single cells of the training groups
            part = part.where(part == "test", "train")
        parts = part.groupby(obs[settings.group_by].astype(str)).nunique()
        yield f"groups of {settings.group_by!r} in more than one part of the split", parts.index[parts > 1], ""


def _of_parts(table: pd.DataFrame, obs: pd.DataFrame, prepared: "Prepared") -> Faults:
    """Check which cells are in which part of a run."""
    part, label = obs["split"].astype(str), obs["label"].astype(str)
    real = table[table["cell"].isin(part.index)].set_index("cell")
    tested = table.loc[table["split"] == "test", "cell"]
    both = set(tested) & set(table.loc[table["split"] != "test", "cell"])
    yield "test cells that are trained or validated on", sorted(both), ""
    moved = real.index[real["split"] != part[real.index]]
    yield "cells in another part than the split gave them", moved, ""
    yield "cells with another label than after quality control", real.index[real["label"] != label[real.index]], ""
    yield "test cells that are tested more than once", tested[tested.duplicated()], ""
    yield "test cells of the split that are not tested", part.index[part == "test"].difference(tested), ""
    yield "tested cells that are not real cells", tested[~tested.isin(part.index)], ""
    if prepared.cells is not None:
        names = prepared.cells.obs_names.to_numpy()
        is_other = names != table["cell"].to_numpy() if len(names) == len(table) else np.ones(len(names), bool)
        yield "cells whose counts and tokens are not in the same row", names[is_other], ""


def _of_sources(table: pd.DataFrame, obs: pd.DataFrame, sources: list[str], settings: Study) -> Faults:
    """Check the real cells that made cells were made from."""
    names = pd.Index(sources)
    is_test = obs["split"].astype(str) == "test"
    yield "test cells that made cells are made of", names[names.isin(obs.index[is_test])], ""
    yield "sources of made cells that are no cells of the task", names[~names.isin(obs.index)], ""
    made = table.loc[~table["cell"].isin(obs.index), "cell"]
    if not sources and settings.train_set != "bulk":  # samples of another experiment are made of no cell
        yield "made cells of unknown sources", made, ""


def _of_values(table: pd.DataFrame, prepared: "Prepared") -> Faults:
    """Look for test cells with the very counts, or tokens, of a cell that is trained or validated on."""
    if prepared.cells is not None:
        what, known = "counts", prepared.cells.obs.get("counts_hash")  # quality control has read them all
        parts = (counts.hashes(values) for _, values in counts.chunks(prepared.cells)) if known is None else [known]
    else:
        what, lists = "tokens", prepared.tokens.dataset.select_columns(["input_ids"]).with_format("arrow")
        batches = (batch["input_ids"].combine_chunks() for batch in lists.iter(counts.CELLS))
        parts = (counts.list_hashes(ids.offsets.to_numpy(), ids.values.to_numpy()) for ids in batches)
    hashes = np.concatenate(list(parts))
    is_test = (table["split"] == "test").to_numpy()
    learnt = np.setdiff1d(hashes[~is_test], [0])
    same = table["cell"][is_test][np.isin(hashes[is_test], learnt)]
    yield f"test cells with the {what} of a cell that is trained on", same, "drop repeated cells before the split"


def _of_vocabulary(tokens: "Tokens", settings: Study, cells: "AnnData") -> Faults:
    """Check by which medians genes are ranked."""
    expected = encode.task_vocabulary(settings, cells)
    if tokens.vocabulary.hash != expected.hash:
        used, right = (one.genes.set_index("ensembl_id")["median"] for one in (tokens.vocabulary, expected))
        other = used.index.union(right.index)
        other = other[used.reindex(other).to_numpy() != right.reindex(other).to_numpy()]
        source = "the checkpoint" if settings.vocabulary == "checkpoint" else "the training cells"
        names = list(other) or ["a special token or an alias"]
        yield f"genes of the vocabulary that are not those of {source}", names, ""


def _of_outcome(outcome: "Outcome", tested: pd.Series) -> Faults:
    """Check the predictions of a run, and its choice of an epoch."""
    predicted = outcome.predictions.set_index("cell")["label"]
    known = predicted[predicted.index.isin(tested.index)]
    yield "test cells that are predicted more than once", predicted.index[predicted.index.duplicated()], ""
    yield "test cells that are not predicted", tested.index.difference(predicted.index), ""
    yield "predicted cells that are no test cells", predicted.index.difference(tested.index), ""
    yield "test cells with another class than in the tokens", known.index[known != tested[known.index]], ""
    if len(outcome.history):
        loss, kept = outcome.history.set_index("epoch")["validation_loss"], outcome.best_epoch
        is_last = outcome.chosen_by == "last epoch"
        if kept != loss.index[-1] if is_last else loss.get(kept) != loss.min():
            right = loss.index[-1] if is_last else loss.idxmin()
            yield f"a tested epoch that its rule ({outcome.chosen_by}) did not choose", [f"{kept}, not {right}"], ""
