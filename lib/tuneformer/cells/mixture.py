"""Mixtures: real training cells beside synthetic ones, or beside copies of themselves.

In: the real training cells of a run and their strata. Out: the real and the made cells to train on: more than before
(padding, as in the bulk thesis), or as many as before with a share of them synthetic.
"""

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from tuneformer.cells import synthetic
from tuneformer.params import require_choice
from tuneformer.study import Study


def make(
    cells: ad.AnnData, strata: pd.Series, settings: Study, *, rng: np.random.Generator, folder: Path | None = None
) -> tuple[ad.AnnData, ad.AnnData]:
    """Make the training cells of a mixture: the real cells that stay, and the made cells.

    ``pad``: so many more cells of each of ``padded_classes``, spread evenly over its doses; ``copies`` are real cells
    drawn again, the control that synthetic ones have to beat. ``share``: in each class and dose, this share of the
    cells, drawn at random, is replaced by synthetic ones.

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 3.2 (padding with 700 cells, 100 per dose).

    One of ``padded_classes`` that is no class of the task is a UserError; else raises as `synthetic.generate`.
    """
    kept = cells
    if settings.pad is not None:
        for name in settings.padded_classes:
            require_choice(name, cells.obs["label"].cat.categories, "padded_classes", "class")
        numbers = spread(strata, cells.obs["label"], dict.fromkeys(settings.padded_classes, settings.pad))
    else:
        numbers = (strata.value_counts(sort=False) * settings.share).round().astype(int)
        order = pd.Series(rng.permutation(cells.n_obs), index=cells.obs_names)
        place = order.groupby(strata.to_numpy(), observed=True).rank(method="first")
        kept = cells[(place > strata.map(numbers).astype(int)).to_numpy()]
    if settings.generator == "copies":
        return kept, _copies(cells, strata, numbers, settings.train_set, rng)
    return kept, synthetic.generate(
        cells,
        strata=strata,
        numbers=numbers,
        generator=settings.generator,
        reference=None,
        rank=settings.covariance_rank,
        rng=rng,
        name=settings.train_set,
        folder=folder,
    )


def spread(strata: pd.Series, labels: pd.Series, numbers: Mapping[str, int]) -> pd.Series:
    """Spread the `numbers` of cells of classes evenly over their strata, the first ones taking the remainder.

    `strata` and `labels` are those of each cell, (cells,). Returns the number by stratum, of these classes only.
    """
    spread = {}
    for name, number in numbers.items():
        own = strata[labels == name].cat.remove_unused_categories().cat.categories
        spread |= {one: number // len(own) + (place < number % len(own)) for place, one in enumerate(own)}
    return pd.Series(spread, dtype=int)


def _copies(
    cells: ad.AnnData, strata: pd.Series, numbers: pd.Series, name: str, rng: np.random.Generator
) -> ad.AnnData:
    """Draw cells of each stratum with replacement, under names of their own."""
    rows = np.concatenate([rng.choice(np.flatnonzero(strata == one), number) for one, number in numbers.items()])
    obs = cells.obs.iloc[rows].assign(members=1, member_names=cells.obs_names[rows])
    obs.index = [f"{name}_{number:05d}" for number in range(len(rows))]
    return ad.AnnData(cells[rows].X, obs=obs, var=cells.var)
