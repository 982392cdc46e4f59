"""What frozen layers make of a cell, computed once: for all steps, epochs, seeds, rates, arms and folds of a task.

In: a model whose first parts do not learn, and its cells. Out: their states after the last frozen layer or, where the
whole body is frozen, what the head reads. They are kept in a folder that only grows: ``states.bin`` holds the states of
one cell after the other, ``index.bin`` one record a cell (a hash of its tokens, first row, rows), written after its
states are on the disk. So a job that is killed leaves no cell that seems done, and the folder's name is a hash of the
frozen weights and of the arithmetic. Without dropout the gradients are those of the whole model, to the rounding of
batches of another shape; with dropout, the frozen part alone is without it.
"""

import hashlib
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tuneformer.artifacts import key
from tuneformer.model import strategies

if TYPE_CHECKING:
    from tuneformer.model.classifier import Batch, CellClassifier, Cells

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
        self.filled: dict[tuple[int, int], _Rows | None] = {}  # by cells and depth
        self.hashes: dict[int, np.ndarray] = {}
        self.stores: dict[int, _Store] = {}
        self.body: list[list[torch.nn.Parameter]] = []  # of the one model; weights stay what they are in a training

    def inputs(self, model: "CellClassifier", cells: "Cells", batch: "Batch") -> "Batch":
        """Return a batch of packed cells with the states that are known of it instead of its tokens."""
        self.body = self.body or body_of(model)
        depth = depth_of(self.body)
        if depth < 2 or "places" not in batch:  # the embeddings alone cost nothing
            return batch
        if (id(cells), depth) not in self.filled:
            self.filled[id(cells), depth] = self._filled(model, cells, depth)
        rows = self.filled[id(cells), depth]
        if rows is None:
            return batch
        found = rows.read(batch["places"])
        states = found if depth > model.config.num_hidden_layers else found[None]
        device = batch["bounds"].device
        return {**batch, "input_ids": None, "states": states.to(device, non_blocking=True), "depth": depth}

    def _filled(self, model: "CellClassifier", cells: "Cells", depth: int) -> "_Rows | None":
        """Return where the states of all of some cells are; None if they do not fit."""
        if not self.most:
            return None
        if id(cells) not in self.hashes:
            self.hashes[id(cells)] = hashes_of(cells)
        if depth not in self.stores:
            self.stores[depth] = self._store(model, depth)
        store = self.stores[depth]
        return store.rows_of(self.hashes[id(cells)]) if self._fill(store, model, cells, depth) else None

    def _store(self, model: "CellClassifier", depth: int) -> "_Store":
        digest = hashlib.sha256()
        for name, weight in model.named_parameters():
            if strategies.part_of(name) in ("embeddings", *(f"layer_{number}" for number in range(depth - 1))):
                digest.update(weight.detach().float().cpu().numpy().tobytes())
        config = model.config
        pooling = config.pooling if depth > config.num_hidden_layers else ""
        how = [model.device.type, self.bf16, config._attn_implementation, depth, pooling, config.layer_norm_eps]
        name = key("frozen.1", digest.hexdigest(), config.num_attention_heads, config.hidden_act, *how)
        return _Store(self.folder / name, config.hidden_size)

    def _fill(self, store: "_Store", model: "CellClassifier", cells: "Cells", depth: int) -> bool:
        """Compute what the store lacks of some cells; return whether all of them fit."""
        from filelock import FileLock

        hashes, is_pooled = self.hashes[id(cells)], depth > model.config.num_hidden_layers
        store.refresh()
        if all(one in store.places for one in hashes):
            return True
        with FileLock(self.folder / ".lock"):  # another job may be at it: what it leaves is not computed again
            store.repair()
            first = {one: place for place, one in enumerate(hashes) if one not in store.places}
            places = np.array(list(first.values()), dtype=int)
            rows = len(places) if is_pooled else int(cells.lengths[places].sum())
            used = sum(path.stat().st_size for path in self.folder.glob("*/states.bin"))
            if used + rows * store.width * 4 > self.most:
                size = f"{(used + rows * store.width * 4) / 1e9:.1f} GB, and frozen_cache_gb allows {self.most / 1e9:g}"
                print(f"frozen layers run in each step: their states would take {size}", file=sys.stderr, flush=True)
                return False
            self._compute(store, model, cells, places, depth)
        return True

    @torch.no_grad()
    def _compute(self, store: "_Store", model: "CellClassifier", cells: "Cells", places: Any, depth: int) -> None:
        was_training, part = model.training, cells.only(places)
        model.eval()
        stop = None if depth > model.config.num_hidden_layers else depth
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            for chosen, batch in part.sorted_batches(model.device):
                states = model.encode(batch, 0, stop).float().cpu().reshape(-1, store.width).numpy()
                lengths = np.ones(len(chosen), int) if stop is None else part.lengths[chosen]
                store.append(self.hashes[id(cells)][places[chosen]], states, lengths)
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
        """Write the states of cells, (rows, width), and then that they are there."""
        start = self.states.stat().st_size // (self.width * 4)
        starts = start + np.cumsum(rows) - rows
        records = np.array(list(zip(cells.tolist(), starts, rows, strict=True)), RECORD)
        for path, content in ((self.states, states), (self.index, records)):
            with path.open("ab") as file:
                file.write(content.tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.refresh()

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


def hashes_of(cells: "Cells") -> np.ndarray:
    """Return a hash of the tokens of each cell, (cells,) bytes: the same tokens have the same states."""
    found = []
    for start in range(0, len(cells), 10_000):
        lists = cells.table[cells.rows[start : start + 10_000]]["input_ids"].combine_chunks()
        values, bounds = lists.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lists.value_lengths())])
        pairs = pairwise(bounds)
        found += [hashlib.blake2b(values[a:b].tobytes(), digest_size=8).hexdigest().encode() for a, b in pairs]
    return np.array(found, dtype=object)
