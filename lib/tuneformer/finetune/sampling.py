"""Which training cells a classifier sees how often, where classes differ in size.

In: the classes of the *training* cells. Out: rows of them, repeated or drawn. Nothing here may see a validation or test
cell: a cell repeated before the split would stand on both sides of it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def upsampled(rows: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Repeat cells of the rarer classes until each class has as many as the largest.

    Parameters
    ----------
    rows
        Rows of the training cells, (cells,).
    labels
        Class of each of them, (cells,).
    rng
        Of the draw.

    Returns
    -------
    All `rows`, then rows of the rarer classes, drawn with replacement: (classes x size of the largest,).
    """
    rows, labels = np.asarray(rows), np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    drawn = [
        rng.choice(rows[labels == name], counts.max() - count, replace=True)
        for name, count in zip(classes, counts, strict=True)
    ]
    return np.concatenate([rows, *drawn])


class BalancedSampler(Sampler[int]):
    """Draw a class, each equally likely, and then one of its cells; as many draws an epoch as there are cells.

    Parameters
    ----------
    labels
        Class of each training cell, (cells,).
    seed
        Of a generator that is the sampler's own: what else is random in a run does not change its draws.
    """

    def __init__(self, labels: np.ndarray, *, seed: int) -> None:
        _, class_of, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
        self.by_class = torch.from_numpy(np.argsort(class_of, kind="stable"))  # cells, class after class
        self.size = torch.from_numpy(counts)
        self.start = self.size.cumsum(0) - self.size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the draws of an epoch."""
        return len(self.by_class)

    def __iter__(self) -> Iterator[int]:
        """Give the cells of the next epoch."""
        chosen = torch.randint(len(self.size), (len(self),), generator=self.generator)
        place = torch.randint(2**62, (len(self),), generator=self.generator) % self.size[chosen]
        yield from self.by_class[self.start[chosen] + place].tolist()
