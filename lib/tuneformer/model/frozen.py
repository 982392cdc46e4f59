"""What frozen layers make of a cell, computed once: for all steps, epochs, seeds, rates, arms and folds of a task.

In: a model whose first parts do not learn, and its cells. Out: their states after the last frozen layer or, where the
whole body is frozen, what a head reads (first token and mean). They are kept in a folder that only grows:
``states.bin`` holds the states of one cell after the other, ``index.bin`` one record a cell (a hash of the embeddings
of its genes, first row, rows), written after its states are on the disk. So a job that is killed leaves no cell that
seems done, and the folder's name is a hash of the frozen layers and of the arithmetic. Without dropout the gradients
are those of the whole model, to the rounding of batches of another shape; with dropout, the frozen part alone is
without it.
"""

import hashlib
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tuneformer.artifacts import key
from tuneformer.model import strategies
from tuneformer.model.classifier import GENES, POOLED, Batch, CellClassifier, Cells, pooled

RECORD = np.dtype([("cell", "S16"), ("start", "<i8"), ("rows", "<i8")])


def body_of(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Return the weights of each part of the body, from the embeddings up."""
    return [list(part.parameters()) for part in (model.bert.embeddings, *model.bert.encoder.layer)]


def depth_of(body: list[list[torch.nn.Parameter]]) -> int:
    """Return how many parts of the body, from the embeddings up, do not learn now: at most 1 + layers."""
    learn = (any(weight.requires_grad for weight in part) for part in body)
    return next((depth for depth, learns in enumerate(learn) if learns), len(body))


class Frozen:
    """States of the cells of a task below what learns, kept in a folder and read from it.

    Parameters
    ----------
    folder
        Of the task; None keeps nothing, and the model runs whole.
    most
        Largest size of the folder, in bytes. What would be larger is computed in each step, as if nothing was frozen.
    """

    def __init__(self, folder: Path | None, most: float, *, bf16: bool) -> None:
        self.folder, self.most, self.bf16 = folder, most if folder else 0, bf16
        self.filled: dict[tuple[Cells, int], _Rows | None] = {}
        self.hashes: dict[Cells, np.ndarray] = {}
        self.genes: np.ndarray | None = None  # hash of the embedding of each gene
        self.stores: dict[int, _Store] = {}
        self.body: list[list[torch.nn.Parameter]] = []  # of the one model; weights stay what they are in a training

    def inputs(self, model: CellClassifier, cells: Cells, batch: Batch) -> Batch:
        """Return a batch of packed cells with the states that are known of it instead of its tokens."""
        self.body = self.body or body_of(model)
        depth = depth_of(self.body)
        if depth < 2 or "places" not in batch:  # the embeddings alone cost nothing
            return batch
        if (cells, depth) not in self.filled:
            self.filled[cells, depth] = self._filled(model, cells, depth)
        rows = self.filled[cells, depth]
        if rows is None:
            return batch
        found = rows.read(batch["places"])
        states = found if depth > model.config.num_hidden_layers else found[None]
        device = batch["bounds"].device
        return {**batch, "input_ids": None, "states": states.to(device, non_blocking=True), "depth": depth}

    def _filled(self, model: CellClassifier, cells: Cells, depth: int) -> "_Rows | None":
        """Return where the states of all of some cells are; None if they do not fit."""
        if not self.most:
            return None
        if cells not in self.hashes:
            self.genes = hashes_of_genes(model) if self.genes is None else self.genes
            self.hashes[cells] = hashes_of(cells, self.genes)
        if depth not in self.stores:
            self.stores[depth] = self._store(model, depth)
        store = self.stores[depth]
        if not self._fill(store, model, cells, depth):
            return None
        rows = store.rows_of(self.hashes[cells])
        if depth > model.config.num_hidden_layers:
            rows = _Rows(rows.memory, rows.start + POOLED.index(model.config.pooling), np.ones_like(rows.rows))
        return rows

    def _store(self, model: CellClassifier, depth: int) -> "_Store":
        digest = hashlib.sha256()
        for name, weight in model.named_parameters():
            part = strategies.part_of(name)
            if part in ("embeddings", *(f"layer_{number}" for number in range(depth - 1))) and name != GENES:
                digest.update(weight.detach().float().cpu().numpy().tobytes())
        config = model.config
        how = [model.device.type, self.bf16, config._attn_implementation, depth, config.layer_norm_eps]
        name = key("frozen.2", digest.hexdigest(), config.num_attention_heads, config.hidden_act, *how)
        return _Store(self.folder / name, config.hidden_size)

    def _fill(self, store: "_Store", model: CellClassifier, cells: Cells, depth: int) -> bool:
        """Compute what the store lacks of some cells; return whether all of them fit."""
        from filelock import FileLock

        hashes, is_pooled = self.hashes[cells], depth > model.config.num_hidden_layers
        store.refresh()
        if all(one in store.places for one in hashes):
            return True
        with FileLock(self.folder / ".lock"):  # another job may be at it: what it leaves is not computed again
            store.repair()
            first = {one: place for place, one in enumerate(hashes) if one not in store.places}
            places = np.array(list(first.values()), dtype=int)
            rows = len(POOLED) * len(places) if is_pooled else int(cells.lengths[places].sum())
            used = sum(path.stat().st_size for path in self.folder.glob("*/states.bin"))
            if used + rows * store.width * 4 > self.most:
                size = f"{(used + rows * store.width * 4) / 1e9:.1f} GB, and frozen_cache_gb allows {self.most / 1e9:g}"
                print(f"frozen layers run in each step: their states would take {size}", file=sys.stderr, flush=True)
                return False
            self._compute(store, model, cells, places, depth)
            store.refresh()
        return True

    @torch.no_grad()
    def _compute(self, store: "_Store", model: CellClassifier, cells: Cells, places: Any, depth: int) -> None:
        was_training, part = model.training, cells.only(places)
        model.eval()
        is_pooled = depth > model.config.num_hidden_layers
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            for chosen, batch in part.sorted_batches(model.device):
                states, lengths = model.encode(batch, 0, depth), part.lengths[chosen]
                if is_pooled:
                    states = torch.stack([pooled(states, batch["bounds"], how) for how in POOLED], dim=1)
                    lengths = np.full(len(chosen), len(POOLED))
                states = states.float().cpu().reshape(-1, store.width).numpy()
                store.append(self.hashes[cells][places[chosen]], states, lengths)
        model.train(was_training)


class _Store:
    """One folder of states, (rows, width) float32, and where those of each cell are."""

    def __init__(self, folder: Path, width: int) -> None:
        self.states, self.index, self.width = folder / "states.bin", folder / "index.bin", width
        self.places: dict[bytes, tuple[int, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.states.touch()
        self.index.touch()
        self.refresh()

    def refresh(self) -> None:
        """Read what others have added."""
        whole = self.index.stat().st_size // RECORD.itemsize
        records = np.fromfile(self.index, RECORD, count=whole)[len(self.places) :]
        self.places |= {cell: (start, rows) for cell, start, rows in records.tolist()}
        shape = (max((start + rows for start, rows in self.places.values()), default=0), self.width)
        self.memory = np.memmap(self.states, np.float32, "r", shape=shape) if self.places else None

    def repair(self) -> None:
        """Cut off what a killed job began to write; for the owner of the lock."""
        self.refresh()
        end = max((start + rows for start, rows in self.places.values()), default=0)
        os.truncate(self.states, end * self.width * 4)
        os.truncate(self.index, len(self.places) * RECORD.itemsize)

    def append(self, cells: np.ndarray, states: np.ndarray, rows: np.ndarray) -> None:
        """Write the states of cells, (rows, width), and then that they are there; `refresh` reads them."""
        start = self.states.stat().st_size // (self.width * 4)
        starts = start + np.cumsum(rows) - rows
        records = np.array(list(zip(cells.tolist(), starts, rows, strict=True)), RECORD)
        for path, content in ((self.states, states), (self.index, records)):
            with path.open("ab") as file:
                file.write(content.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def rows_of(self, cells: np.ndarray) -> "_Rows":
        """Return where the states of cells are."""
        return _Rows(self.memory, *np.array([self.places[cell] for cell in cells]).T)


class _Rows(NamedTuple):
    """Where the states of some cells are in a memory-mapped (rows, width)."""

    memory: np.ndarray
    start: np.ndarray
    rows: np.ndarray

    def read(self, places: list[int]) -> torch.Tensor:
        """Return the states of the cells at some places, one below the other."""
        start, rows = self.start[places], self.rows[places]
        within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        return torch.from_numpy(self.memory[np.repeat(start, rows) + within])


def hashes_of_genes(model: CellClassifier) -> np.ndarray:
    """Return a hash of the embedding of each gene, (genes,) bytes: one that no seed changed has the same states."""
    weights = model.get_parameter(GENES).detach().float().cpu().numpy()
    return np.array([hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in weights], "V8")


def hashes_of(cells: Cells, genes: np.ndarray) -> np.ndarray:
    """Return a hash of the embeddings of each cell, (cells,) bytes, from those of the genes."""
    found = []
    for start in range(0, len(cells), 10_000):
        lists = cells.table[cells.rows[start : start + 10_000]]["input_ids"].combine_chunks()
        values, bounds = genes[lists.flatten().to_numpy()], np.concatenate([[0], np.cumsum(lists.value_lengths())])
        pairs = pairwise(bounds)
        found += [hashlib.blake2b(values[a:b].tobytes(), digest_size=8).hexdigest().encode() for a, b in pairs]
    return np.array(found, dtype=object)
