"""Strata: the sets of cells that are never mixed when cells are made from cells, which are class within dose.

In: the cells of a task. Out: the stratum of each cell.
"""

from typing import TYPE_CHECKING

import pandas as pd

from tuneformer.data.readers import nearest
from tuneformer.study.params import Study

if TYPE_CHECKING:
    import anndata as ad


class TrainSetError(ValueError):
    """Cells of which no train set can be made; the message says why and what to do."""


def strata(cells: "ad.AnnData", settings: Study) -> pd.Series:
    """Return the stratum of every cell: its class, or ``class @ dose`` where the study names a dose column.

    Parameters
    ----------
    cells
        As `tuneformer.data.preprocessing.prepare_cells` makes them.
    settings
        ``dose_column`` is read.

    Returns
    -------
    Categorical indexed by cell, categories in the order of classes and rising doses.

    Raises
    ------
    TrainSetError
        A class without cells, no column of that name, or a cell without dose.
    """
    label = cells.obs["label"]
    empty = [name for name, number in label.value_counts(sort=False).items() if not number]
    if empty:
        msg = f"Class {empty[0]!r} has no cells to make others from; leave it out of classes, or give it cells."
        raise TrainSetError(msg)
    column = settings.dose_column
    if column is None:
        return pd.Series(label.astype(str).astype(pd.CategoricalDtype(list(label.cat.categories))), name="stratum")
    if column not in cells.obs:
        msg = f"dose_column: the cells have no obs column {column!r}; {nearest(column, cells.obs.columns)}."
        raise TrainSetError(msg)
    dose = cells.obs[column]
    if dose.isna().any():
        first = dose.index[dose.isna()][0]
        msg = f"dose_column: {dose.isna().sum()} cells have no {column!r} (first: {first}); drop them first."
        raise TrainSetError(msg)
    frame = pd.DataFrame({"label": label, "dose": dose.to_numpy()}, index=label.index)
    order = frame.drop_duplicates().sort_values(["label", "dose"])
    names = {(row.label, row.dose): f"{row.label} @ {_text(row.dose)}" for row in order.itertuples()}
    values = [names[pair] for pair in zip(frame["label"], frame["dose"], strict=True)]
    dtype = pd.CategoricalDtype(list(dict.fromkeys(names.values())))
    return pd.Series(values, index=label.index, name="stratum").astype(dtype)


def shared_columns(cells: "ad.AnnData", strata: pd.Series) -> pd.DataFrame:
    """Return the obs columns with one value in each stratum, such as label and dose, which made cells take over."""
    columns = cells.obs.drop(columns=["n_counts", "mito_share"], errors="ignore")
    fixed = columns.groupby(strata.to_numpy(), observed=True).nunique(dropna=False).eq(1).all()
    return columns.loc[:, fixed]


def _text(dose: object) -> str:
    return f"{dose:g}" if isinstance(dose, float) else str(dose)
