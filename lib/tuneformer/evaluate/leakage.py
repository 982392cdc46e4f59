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
import pyarrow as pa
from pyarrow import compute

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import counts, qc
from tuneformer.study import Study
from tuneformer.tokens import encode
from tuneformer.tokens.encode import column, places

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
    _refuse(_of_split(cells.obs, settings), settings, paths.task_dir(settings))
    run = _Run(prepared, cells.obs)
    faults = (
        _of_parts(run, cells.obs, prepared),
        _of_sources(run, cells.obs, prepared.tokens.sources, settings),
        _of_values(run, prepared),
        _of_vocabulary(prepared.tokens, settings, cells),
    )
    _refuse(chain(*faults), settings, paths.task_dir(settings))


class _Run:
    """The cells of a run by numbers, since a million of names as objects take much memory.

    ``place`` of each in the cells of the task (-1: a made cell), code of ``split`` and ``label``; ``names`` as Arrow.
    """

    def __init__(self, prepared: "Prepared", obs: pd.DataFrame) -> None:
        dataset = prepared.tokens.dataset
        self.names = column(dataset, "cell")
        self.place = places(self.names, pa.array(obs.index, pa.string()))
        self.split, self.label = (places(column(dataset, name), _classes(obs, name)) for name in ("split", "label"))
        self.is_test = self.split == _classes(obs, "split").index("test")

    def named(self, rows: np.ndarray) -> list[str]:
        """Return the names of some cells, given whether each is one of them."""
        return self.names.filter(pa.array(rows)).to_pylist() if rows.any() else []


def _classes(obs: pd.DataFrame, name: str) -> list[str]:
    return list(map(str, obs[name].cat.categories))


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
        part = obs["split"]
        if settings.fold is not None:  # validation may be single cells of the training groups
            part = part == "test"
        pairs = pd.DataFrame({"group": obs[settings.group_by], "part": part}).drop_duplicates()
        parts = pairs["group"].astype(str).value_counts(sort=False)
        yield f"groups of {settings.group_by!r} in more than one part of the split", parts.index[parts > 1], ""


def _of_parts(run: _Run, obs: pd.DataFrame, prepared: "Prepared") -> Faults:
    """Check which cells are in which part of a run."""
    is_real, real = run.place >= 0, run.place[run.place >= 0]
    tested = np.bincount(run.place[is_real & run.is_test], minlength=len(obs))
    learnt = np.bincount(run.place[is_real & ~run.is_test], minlength=len(obs))
    yield "test cells that are trained or validated on", obs.index[(tested > 0) & (learnt > 0)], ""
    for name, what, codes in (
        ("split", "cells in another part than the split gave them", run.split),
        ("label", "cells with another label than after quality control", run.label),
    ):
        is_other = np.zeros(len(run.place), dtype=bool)
        is_other[is_real] = codes[is_real] != obs[name].cat.codes.to_numpy()[real]
        yield what, run.named(is_other), ""
    yield "test cells that are tested more than once", obs.index[tested > 1], ""
    yield "test cells of the split that are not tested", obs.index[(obs["split"] == "test") & (tested == 0)], ""
    yield "tested cells that are not real cells", run.named(run.is_test & ~is_real), ""
    if prepared.cells is not None:
        names = pa.array(prepared.cells.obs_names, pa.string())
        fits = len(names) == len(run.names)
        is_other = compute.not_equal(run.names, names).to_numpy() if fits else np.ones(len(names), dtype=bool)
        yield "cells whose counts and tokens are not in the same row", names.filter(pa.array(is_other)), ""


def _of_sources(run: _Run, obs: pd.DataFrame, sources: list[str], settings: Study) -> Faults:
    """Check the real cells that made cells were made from."""
    names = pd.Index(sources)
    yield "test cells that made cells are made of", names[names.isin(obs.index[obs["split"] == "test"])], ""
    yield "sources of made cells that are no cells of the task", names[~names.isin(obs.index)], ""
    if not sources and settings.train_set != "bulk":  # samples of another experiment are made of no cell
        yield "made cells of unknown sources", run.named(run.place < 0), ""


def _of_values(run: _Run, prepared: "Prepared") -> Faults:
    """Look for test cells with the very counts, or tokens, of a cell that is trained or validated on."""
    if prepared.cells is not None:
        what, known = "counts", prepared.cells.obs.get("counts_hash")  # quality control has read them all
        parts = (counts.hashes(values) for _, values in counts.chunks(prepared.cells)) if known is None else [known]
    else:
        what, lists = "tokens", prepared.tokens.dataset.select_columns(["input_ids"]).with_format("arrow")
        batches = (batch["input_ids"].combine_chunks() for batch in lists.iter(counts.CELLS))
        parts = (counts.list_hashes(ids.offsets.to_numpy(), ids.values.to_numpy()) for ids in batches)
    hashes = np.concatenate(list(parts))
    same = run.is_test & (hashes != 0)
    same[same] = places(pa.array(hashes[same]), pa.array(hashes[~run.is_test])) >= 0
    yield (
        f"test cells with the {what} of a cell that is trained on",
        run.named(same),
        "drop repeated cells before the split",
    )


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
