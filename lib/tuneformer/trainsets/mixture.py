"""Mixtures: real training cells beside synthetic ones, or beside copies of themselves.

In: the real training cells of a run, and the name of its train set. Out: cells to train on: more than before (padding,
as in the bulk thesis), or as many as before with a share of them synthetic.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.data.readers import nearest
from tuneformer.study import train_sets
from tuneformer.study.params import Study
from tuneformer.trainsets import synthetic
from tuneformer.trainsets.strata import TrainSetError, strata

if TYPE_CHECKING:
    import anndata as ad


def make(cells: "ad.AnnData", settings: Study, *, rng: np.random.Generator) -> "ad.AnnData":
    """Make the training cells of a mixture.

    ``pad<n>``: n cells more for each class of ``padded_classes``, spread evenly over its doses; ``copies`` are real
    cells drawn again, the control that synthetic ones have to beat. ``share<p>``: in each class and dose p % of the
    cells, drawn at random, are replaced by synthetic ones.

    Source: A. Kuźnicki, bachelor thesis, TU Delft 2024, section 3.2 (padding with 700 cells, 100 per dose).

    Parameters
    ----------
    cells
        Real training cells.
    settings
        The run; its ``train_set`` says which mixture.
    rng
        Of the draw.

    Returns
    -------
    Real and made cells with ``obs`` label, n_counts, members and member_names (the real cell itself, or of which
    a copy was made; empty for synthetic cells).

    Raises
    ------
    TrainSetError
        ``padded_classes`` is empty or names no class; or as `tuneformer.trainsets.synthetic.generate`.
    """
    said = train_sets.parse(settings.train_set)
    stratum = strata(cells, settings)
    if said.amount == "share":
        numbers = (stratum.value_counts(sort=False) * said.number / 100).round().astype(int)
        order = pd.Series(rng.permutation(cells.n_obs), index=cells.obs_names)
        place = order.groupby(stratum.to_numpy(), observed=True).rank(method="first")
        kept = cells[(place > stratum.map(numbers).astype(int)).to_numpy()]
        return _below(kept, _synthetic(cells, stratum, numbers, settings, said.generator, rng))
    numbers = padding(stratum, cells.obs["label"], settings, said.number)
    if said.generator == "copies":
        return _below(cells, _copies(cells, stratum, numbers, settings.train_set, rng))
    return _below(cells, _synthetic(cells, stratum, numbers, settings, said.generator, rng))


def padding(stratum: pd.Series, label: pd.Series, settings: Study, number: int) -> pd.Series:
    """Spread `number` more cells of each padded class evenly over its strata; the first ones take the remainder.

    Returns
    -------
    Number of cells by stratum, only of the padded classes.

    Raises
    ------
    TrainSetError
        ``padded_classes`` is empty or names no class.
    """
    if not settings.padded_classes:
        msg = f"{settings.train_set}: padded_classes is empty; name the classes that get {number} more cells each."
        raise TrainSetError(msg)
    classes = list(label.cat.categories)
    numbers = {}
    for name in settings.padded_classes:
        if name not in classes:
            msg = f"padded_classes: {name!r} is no class of this task; {nearest(name, classes)}."
            raise TrainSetError(msg)
        own = list(stratum[label == name].cat.remove_unused_categories().cat.categories)
        numbers |= {one: number // len(own) + (place < number % len(own)) for place, one in enumerate(own)}
    return pd.Series(numbers, dtype=int)


def untreated(cells: "ad.AnnData", settings: Study) -> np.ndarray:
    """Return which cells are of ``untreated_class``, (cells,).

    Raises
    ------
    TrainSetError
        That is no class of the task.
    """
    classes = list(cells.obs["label"].cat.categories)
    if settings.untreated_class not in classes:
        msg = f"untreated_class: {settings.untreated_class!r} is no class of this task, which has {', '.join(classes)}."
        raise TrainSetError(msg)
    return (cells.obs["label"] == settings.untreated_class).to_numpy()


def _synthetic(
    cells: "ad.AnnData",
    stratum: pd.Series,
    numbers: pd.Series,
    settings: Study,
    generator: str,
    rng: np.random.Generator,
) -> "ad.AnnData":
    return synthetic.generate(
        cells,
        strata=stratum,
        numbers=numbers[numbers > 0],
        generator=generator,
        reference=None,
        rank=settings.covariance_rank,
        rng=rng,
        name=settings.train_set,
    )


def _copies(
    cells: "ad.AnnData", stratum: pd.Series, numbers: pd.Series, name: str, rng: np.random.Generator
) -> "ad.AnnData":
    import anndata

    rows = np.concatenate([rng.choice(np.flatnonzero(stratum == one), number) for one, number in numbers.items()])
    obs = cells.obs.iloc[rows].assign(member_names=cells.obs_names[rows])
    obs.index = [f"{name}_{number:05d}" for number in range(len(rows))]
    return anndata.AnnData(cells.X[rows], obs=obs, var=cells.var)


def _below(real: "ad.AnnData", made: "ad.AnnData") -> "ad.AnnData":
    """Put made cells below real ones."""
    import anndata

    columns = ["label", "n_counts", "members", "member_names"]
    whole = real.obs.assign(members=1, member_names=list(real.obs_names))[columns]
    new = made.obs.assign(members=1, member_names=made.obs.get("member_names", ""))[columns]
    obs = pd.concat([whole.astype({"label": str}), new.astype({"label": str})])
    obs["label"] = obs["label"].astype(real.obs["label"].dtype)
    return anndata.AnnData(sparse.vstack([real.X, made.X], format="csr"), obs=obs, var=real.var)
