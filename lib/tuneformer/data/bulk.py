"""Bulk samples as training points: a table of counts, genes x samples, and a sheet that says what the samples are.

In: ``bulk_counts`` and ``bulk_samples`` of a study, and its cells. Out: AnnData of the samples with the genes and
classes of the cells; or one sentence that says what to change in which of the two files.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.artifacts import UserError, key
from tuneformer.data import simulate
from tuneformer.data.counts import chunks
from tuneformer.data.fetch import file_hash
from tuneformer.data.readers import VERSIONED
from tuneformer.data.refusals import expanded_path, nearest, read_table
from tuneformer.study import Study

DEMO = "demo"
FEWEST = 0.5  # share of the genes of the cells that the table has to hold
KEYS = ("bulk_counts", "bulk_samples")


def load_bulk(settings: Study, cells: ad.AnnData) -> ad.AnnData:
    """Load the bulk samples of a study, with the genes and classes of its cells.

    Genes are matched by ``var["ensembl_id"]`` without version, or by ``var["symbol"]`` where more agree; those that
    the table does not hold have no count, and those that the cells do not have are left out. Of ``cells.X`` only which
    genes have a count is read.

    Returns
    -------
    AnnData (samples, genes): counts in ``X`` (CSR, float64); ``var`` of `cells`; ``obs``: label (with the classes of
    `cells`), n_counts, and the dose where the sheet has doses and the study a ``dose_column``.

    Raises
    ------
    UserError
        As `read_tables`; a sample has a class that is none of the task, or a class has no sample; fewer than half of
        the genes of the cells are in the table.
    """
    counts, sheet = _demo(settings) if settings.bulk_counts == DEMO else read_tables(settings)
    classes = list(cells.obs["label"].cat.categories)
    for sample, name in sheet["class"].items():
        if name not in classes:
            choices = nearest(name, classes)
            msg = f"bulk_samples: sample {sample!r} has the class {name!r}, which the task does not; {choices}."
            raise UserError(msg)
    absent = [name for name in classes if name not in set(sheet["class"])]
    if absent:
        msg = f"bulk_samples: class {absent[0]!r} of the task has no sample; add one, or leave it out of classes."
        raise UserError(msg)
    matrix = _of_genes(counts, cells)
    obs = pd.DataFrame({"label": sheet["class"].astype(cells.obs["label"].dtype)})
    if "dose" in sheet and settings.dose_column is not None:
        obs[settings.dose_column] = sheet["dose"]
    obs["n_counts"] = np.asarray(matrix.sum(axis=1)).ravel()
    return ad.AnnData(matrix, obs=obs.set_axis([f"bulk_{name}" for name in obs.index]), var=cells.var)


def read_tables(settings: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the table and its sample sheet.

    Returns
    -------
    Counts, genes x samples, whole numbers, genes with the same identifier summed; and the sheet, indexed by sample, in
    the same order: ``class`` as text, ``dose`` if it is there.

    Raises
    ------
    UserError
        A path is not set or wrong; a file is empty or no table; a sample is given twice or in one of the files only; a
        column of the sheet is missing; a value is no whole number, or below 0; a sample has no count.
    """
    table, written = (_read(name, settings) for name in KEYS)
    for column in ("sample", "class"):
        if column not in written:
            msg = f"bulk_samples: the sheet has no column {column!r}; its first line has to name sample and class."
            raise UserError(msg)
    sheet = written.set_index(written["sample"].str.strip()).drop(columns="sample").rename_axis("sample")
    counts = table.set_index(table.columns[0]).rename_axis(index="gene", columns=None)
    names = dict(zip(KEYS, (counts.columns, sheet.index), strict=True))
    for here, other in (KEYS[::-1], KEYS):
        twice = names[other][names[other].duplicated()]
        if len(twice):
            number = (names[other] == twice[0]).sum()
            msg = f"{other}: the sample {twice[0]!r} is given {number} times; give each a name of its own."
            raise UserError(msg)
        alone = names[other].difference(names[here], sort=False)
        if len(alone):
            msg = f"{here}: the sample {alone[0]!r} of {other} is missing here; add it, or take it out there."
            raise UserError(msg)
    sheet["class"] = sheet["class"].str.strip()
    unnamed = sheet.index[sheet["class"].fillna("") == ""]
    if len(unnamed):
        msg = f"bulk_samples: sample {unnamed[0]!r} has no class; give it one, or take it out of both files."
        raise UserError(msg)
    if "dose" in sheet:
        sheet["dose"] = pd.to_numeric(sheet["dose"], errors="coerce").astype(float)
        if sheet["dose"].isna().any():
            first = sheet.index[sheet["dose"].isna()][0]
            msg = f"bulk_samples: sample {first!r} has no number as dose; give it one, 0 for none."
            raise UserError(msg)
    counts = _whole_numbers(counts[sheet.index])
    genes = counts.index.astype(str).str.replace(VERSIONED, r"\1", regex=True)
    return counts.groupby(genes, sort=False).sum(), sheet


def source_hash(settings: Study) -> str:
    """Return a key that changes with the bulk samples, without reading them as tables."""
    if settings.bulk_counts == DEMO:
        return key("simulated bulk", simulate.BULK_CELLS, simulate.BULK_SEED_STEP, settings.demo_seed)
    return key("bulk", *(file_hash(_path(name, settings)) for name in KEYS))


def _demo(settings: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the simulated samples that belong to the task."""
    if settings.dataset != "demo":
        msg = (
            f"bulk_counts: demo means simulated samples, but dataset is {settings.dataset}; name a csv or tsv of yours."
        )
        raise UserError(msg)
    counts, wells = simulate.simulate_bulk(seed=settings.demo_seed)
    if settings.select_column is not None:
        wells = wells[wells[settings.select_column].astype(str).isin(settings.select_values)]
    sheet = pd.DataFrame({"class": wells[settings.label].astype(str), "dose": wells["dose"]})
    if settings.classes:
        sheet = sheet[sheet["class"].isin(settings.classes)]
    return counts[sheet.index], sheet


def _path(name: str, settings: Study) -> Path:
    written = getattr(settings, name)
    if written is None:
        msg = (
            f"{name}: this arm is made of bulk samples; set bulk_counts to a table of genes x samples and bulk_samples "
            "to its sample sheet."
        )
        raise UserError(msg)
    return expanded_path(name, written)


def _read(name: str, settings: Study) -> pd.DataFrame:
    """Read one of the two files as text, with the first line as names, also where one of them is given twice."""
    path = _path(name, settings)
    lines = read_table(name, path, header=None, dtype=str, keep_default_na=False)
    if len(lines) < 2 or lines.shape[1] < 2:
        what = "genes as rows and samples as columns" if name == "bulk_counts" else "the columns sample and class"
        msg = f"{name}: {path.name} has no values below its header; write a csv or tsv with {what}."
        raise UserError(msg)
    return lines.iloc[1:].set_axis(lines.iloc[0].str.strip(), axis=1).reset_index(drop=True)


def _whole_numbers(counts: pd.DataFrame) -> pd.DataFrame:
    """Turn text into counts; refuse the first value that is none."""
    values = counts.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    faults = {"no number": ~np.isfinite(values), "negative": values < 0, "no whole number": values != np.floor(values)}
    for what, wrong in faults.items():
        if wrong.any():
            gene, sample = np.argwhere(wrong)[0]
            msg = (
                f"bulk_counts: the value {counts.iloc[gene, sample]!r} of gene {counts.index[gene]} in sample "
                f"{counts.columns[sample]} is {what} ({wrong.sum()} such values); give raw counts, estimated ones "
                "rounded."
            )
            raise UserError(msg)
    empty = counts.columns[values.sum(axis=0) == 0]
    if len(empty):
        msg = f"bulk_counts: sample {empty[0]!r} has no count; take it out of both files."
        raise UserError(msg)
    return pd.DataFrame(values, index=counts.index, columns=counts.columns)


def _of_genes(counts: pd.DataFrame, cells: ad.AnnData) -> sparse.csr_matrix:
    """Return the counts of the genes of the cells, (samples, genes)."""
    counted = sum(values.getnnz(axis=0) for _, values in chunks(cells)) > 0
    places = max(
        (counts.index.get_indexer(cells.var[column].astype(str)) for column in ("ensembl_id", "symbol")),
        key=lambda found: (found[counted] >= 0).sum(),
    )
    share = (places[counted] >= 0).mean() if counted.any() else 0.0
    if share < FEWEST:
        msg = (
            f"bulk_counts: {share:.0%} of the genes of the cells are in the table, whose genes are named like "
            f"{counts.index[0]!r} and those of the cells like {cells.var['ensembl_id'].iloc[0]!r}; name at least half "
            "of them alike."
        )
        raise UserError(msg)
    values = counts.to_numpy(float).T  # (samples, genes of the table)
    return sparse.csr_matrix(np.where(places >= 0, values[:, places], 0))
