"""Quality control: from raw counts to the labelled, split cells of one task.

In: cells with raw counts and a study's limits. Out: the kept cells with ``obs`` label, n_counts and split, written to
``runs/<study>/<task>/cells.h5ad``; or a `CellsError` that says what to change.
"""

import json

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.data import catalog, gene_symbols, splits
from tuneformer.data.readers import CellsError, nearest, refuse_unset
from tuneformer.study import paths
from tuneformer.study.params import CellsParams, Study
from tuneformer.study.run import fingerprint

RULES = ("label", "min_counts", "max_counts", "max_mito_share")
COUNT_BASELINES = ("logistic_counts", "knn_pca")  # those that read counts and not tokens
FEW_CELLS = 10  # of a class, on average: below, the label column names cells or measures them


def check_cells(adata: ad.AnnData, settings: Study) -> None:
    """Refuse cells that the study cannot use.

    Raises
    ------
    CellsError
        No cells or genes; a cell name or a gene identifier stands twice; the genes are not human; an obs column of the
        task is missing, or that of the classes holds measurements or names of cells; ``X`` holds text, missing,
        infinite, negative or, unless ``fractional_counts``, fractional values (normalised cells), or no count at all.
        A tokenized data set has no genes and no counts to check, and nothing that reads counts can be asked of it.
    """
    if not adata.n_obs or not (adata.n_vars or has_no_counts(adata)):
        msg = f"The data set has {adata.n_obs} cells and {adata.n_vars} genes; choose a file that has both."
        raise CellsError(msg)
    for what, names in {"cell name": adata.obs_names, "gene identifier": pd.Index(adata.var["ensembl_id"])}.items():
        if names.has_duplicates:
            first = names[names.duplicated()][0]
            msg = f"The {what} {first!r} stands {(names == first).sum()} times; make every {what} unique."
            raise CellsError(msg)
    _refuse_other_species(adata)
    for key in ("label", "select_column", "dose_column", "group_by"):
        column = getattr(settings, key)
        if column is not None and column not in adata.obs:
            refuse_unset(key, column)
            remedy = nearest(column, adata.obs.columns)
            if adata.obs.columns.empty:
                remedy = (
                    "as they have none at all, set obs_table to a csv or tsv with one, cell names in the first column"
                )
            msg = f"{key}: the cells have no obs column {column!r}; {remedy}."
            raise CellsError(msg)
    _refuse_no_classes(adata.obs[settings.label], settings)
    if has_no_counts(adata):
        _refuse_count_readers(settings)
    else:
        _check_counts(adata, settings)


def has_no_counts(adata: ad.AnnData) -> bool:
    """Return whether the cells were tokenized by others, so that labels and groups are all that is known of them."""
    return adata.n_vars == 0 and "length" in adata.obs


def qc_flags(adata: ad.AnnData, settings: Study) -> pd.DataFrame:
    """Measure every cell and say which rules it fails.

    Returns
    -------
    One row a cell: ``n_counts`` (sum of its raw counts), ``n_genes`` (genes with a count), ``mito_share`` (0 to 1; NaN
    where no gene symbol begins with `mito_prefix`, or the cell has no count), and for every rule of `RULES`, named as
    its key in the params file, whether the cell fails it. A cell without a value in the label, selection,
    dose or group column fails ``label``. Of a tokenized cell the total count is not known (NaN), and ``n_genes`` is the
    number of its tokens.

    Source of the rules: the theses on sciplex2 (drug and dose known, 500 to 12,000 counts, at most 50 % mitochondrial).
    """
    n_counts = np.asarray(adata.X.sum(axis=1), dtype=float).ravel()
    mito = adata.var["symbol"].astype(str).str.upper().str.startswith(settings.mito_prefix.upper()).to_numpy()
    mito_counts = np.asarray(adata.X[:, mito].sum(axis=1), dtype=float).ravel()
    needed = [settings.label, settings.select_column, settings.dose_column, settings.group_by]
    max_counts = np.inf if settings.max_counts is None else settings.max_counts
    flags = pd.DataFrame(
        {"n_counts": n_counts, "n_genes": np.asarray((adata.X != 0).sum(axis=1)).ravel()}, index=adata.obs_names
    )
    if has_no_counts(adata):
        flags["n_counts"], flags["n_genes"] = np.nan, adata.obs["length"]
    flags["mito_share"] = np.nan
    if mito.any():
        flags["mito_share"] = np.divide(mito_counts, n_counts, out=np.full_like(n_counts, np.nan), where=n_counts > 0)
    flags["label"] = adata.obs[[column for column in needed if column]].isna().any(axis=1)
    flags["min_counts"] = flags["n_counts"] < settings.min_counts
    flags["max_counts"] = flags["n_counts"] > max_counts
    flags["max_mito_share"] = flags["mito_share"] > settings.max_mito_share
    return flags


def qc_table(flags: pd.DataFrame, settings: Study) -> pd.DataFrame:
    """Count the cells that each rule drops.

    Returns
    -------
    Rows: one for each rule of `RULES`, then kept and all. Columns: the limit, the number of cells, and how many of them
    no other rule would have dropped.
    """
    failed = flags[list(RULES)]
    alone = failed[failed.sum(axis=1) == 1]
    limits = ["known", *(getattr(settings, rule) for rule in RULES[1:])]
    rows = [
        (f"fails {rule}", "none" if limit is None else f"{limit}", failed[rule].sum(), alone[rule].sum())
        for rule, limit in zip(RULES, limits, strict=True)
    ]
    rows += [("kept", "", (~failed.any(axis=1)).sum(), ""), ("all", "", len(flags), "")]
    return pd.DataFrame(rows, columns=["cells", "limit", "number", "by this rule alone"]).set_index("cells")


def keep_cells(adata: ad.AnnData, flags: pd.DataFrame) -> ad.AnnData:
    """Drop the cells that fail a rule.

    Returns
    -------
    A copy of the other cells with ``obs["n_counts"]`` and ``obs["mito_share"]``, and ``X`` as float32.

    Raises
    ------
    CellsError
        Every cell fails.
    """
    kept = ~flags[list(RULES)].any(axis=1).to_numpy()
    if not kept.any():
        most = flags[list(RULES)].sum().idxmax()
        msg = (
            f"Quality control drops all {len(flags)} cells, {flags[most].sum()} of them by {most} (median count of a "
            f"cell: {flags['n_counts'].median():g}); change the limits in the params file."
        )
        raise CellsError(msg)
    adata = adata[kept].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    adata.obs["n_counts"] = flags.loc[kept, "n_counts"].to_numpy()
    adata.obs["mito_share"] = flags.loc[kept, "mito_share"].to_numpy()
    return adata


def select_task_cells(adata: ad.AnnData, settings: Study) -> ad.AnnData:
    """Select the cells of the task and give them their class.

    Returns
    -------
    A copy of the cells with one of `select_values` in `select_column` and one of `classes` in the label column, with
    ``obs["label"]``, a categorical whose categories are the classes in their order. Where `classes` is empty, all
    classes with `min_class_cells` or more are kept; ``uns["recognised"]`` says which are left out.

    Raises
    ------
    CellsError
        A selected value or class has no cell, or fewer than two classes are left.
    """
    selected = np.ones(adata.n_obs, dtype=bool)
    if settings.select_column is not None:
        values = adata.obs[settings.select_column].astype(str)
        _refuse_absent("select_values", settings.select_values, settings.select_column, values)
        selected = values.isin(settings.select_values).to_numpy()
    labels = adata.obs[settings.label].astype(str)
    sizes = labels[selected].value_counts()
    classes = settings.classes or sorted(sizes.index[sizes >= settings.min_class_cells])
    _refuse_absent("classes", classes, settings.label, labels[selected])
    if not classes:
        msg = (
            f"min_class_cells: no class of obs column {settings.label!r} has {settings.min_class_cells} cells (the "
            f"largest has {sizes.max()}); set it to less."
        )
        raise CellsError(msg)
    if len(classes) < 2:
        msg = f"obs column {settings.label!r} has one class, {classes[0]!r}; set label to a column with two or more."
        raise CellsError(msg)
    kept = selected & labels.isin(classes).to_numpy()
    adata = adata[kept].copy()
    adata.obs["label"] = pd.Categorical(labels[kept], categories=classes, ordered=True)
    small = [] if settings.classes else sorted(set(sizes.index) - set(classes))
    if small:
        shown = f"{len(small)} of less than {settings.min_class_cells} cells: {', '.join(small)}"
        adata.uns["recognised"] = {**adata.uns.get("recognised", {}), "classes left out": shown}
    return adata


def split_cells(adata: ad.AnnData, settings: Study) -> ad.AnnData:
    """Give the cells of a task ``obs["split"]``, in a cross-validation that of its fold.

    See `splits.assign_split` and `splits.assign_fold_split`; returns `adata`, changed in place.
    """
    options = {
        "validation_share": settings.validation_share,
        "seed": settings.split_seed,
        "groups": None if settings.group_by is None else adata.obs[settings.group_by],
    }
    if settings.fold is None:
        split = splits.assign_split(adata.obs["label"], test_share=settings.test_share, **options)
    else:
        split = splits.assign_fold_split(adata.obs["label"], folds=settings.folds, fold=settings.fold, **options)
    adata.obs["split"] = split
    return adata


def class_table(adata: ad.AnnData) -> pd.DataFrame:
    """Count cells by class, with their sum; and by dose (columns, % of the maximum) where obs has numeric doses."""
    if not pd.api.types.is_numeric_dtype(adata.obs.get("dose", pd.Series(dtype=str))):
        table = adata.obs["label"].value_counts(sort=False).to_frame("cells")
    else:
        table = pd.crosstab(adata.obs["label"], adata.obs["dose"])
        table.columns = [f"{dose:g}" for dose in table.columns]
        table["all"] = table.sum(axis=1)
        table = table.rename_axis(columns="dose (%)")
    table.index = table.index.astype(object)
    table.loc["all"] = table.sum()
    return table.rename_axis(index="class")


def cells_fingerprint(settings: Study) -> str:
    """Return the fingerprint of the cells that a study asks for: its parameters, fold and the source of its cells."""
    fold = [] if settings.fold is None else [settings.folds, settings.fold]
    return fingerprint(settings.section(CellsParams), catalog.source_hash(settings), *fold)


def write_cells(adata: ad.AnnData, settings: Study) -> dict:
    """Write the split cells to `paths.cells_path`, whole or not at all.

    Returns
    -------
    What is written to ``uns["provenance"]`` as JSON text: fingerprint, dataset (name), simulated, data (hash of the
    source), split (hash), n_cells, n_genes, and what was recognised in own data.
    """
    source = adata.uns["dataset"]
    provenance = {
        "fingerprint": cells_fingerprint(settings),
        "dataset": source["name"],
        "simulated": source["simulated"],
        "data": source["hash"],
        "split": splits.split_hash(adata.obs["split"]),
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        **adata.uns.get("recognised", {}),
    }
    adata.uns["provenance"] = json.dumps(provenance)
    with paths.atomic_path(paths.cells_path(settings)) as partial:
        adata.write_h5ad(partial, compression="gzip")
    return provenance


def prepare_cells(settings: Study) -> ad.AnnData:
    """Return the quality-controlled, split cells of a study: from `paths.cells_path` if they are there, else made.

    Returns
    -------
    AnnData (cells, genes): raw counts in ``X`` (CSR, float32); ``var`` ensembl_id, symbol; ``obs`` label (ordered
    categorical), n_counts, mito_share, split, and the columns of the source; ``uns["provenance"]`` as `write_cells`.

    Raises
    ------
    CellsError
        As the steps it is made of.
    """
    path = paths.cells_path(settings)
    if path.is_file():
        adata = ad.read_h5ad(path)
        if json.loads(adata.uns["provenance"])["fingerprint"] == cells_fingerprint(settings):
            return adata
    adata = catalog.load_cells(settings)
    check_cells(adata, settings)
    adata = keep_cells(adata, qc_flags(adata, settings))
    adata = split_cells(select_task_cells(adata, settings), settings)
    write_cells(adata, settings)
    return adata


def _check_counts(adata: ad.AnnData, settings: Study) -> None:
    """Refuse values that are no raw counts, naming the first one."""
    values = sparse.csr_matrix(adata.X)
    where = "the recovered counts" if settings.dataset == "pbmc68k" else settings.counts
    if values.dtype.kind not in "iuf":
        msg = f"{where} holds {values.dtype} values, not numbers; set counts to raw or to the layer with raw counts."
        raise CellsError(msg)
    data = values.data
    faults = {"missing (NaN)": np.isnan(data), "infinite": np.isinf(data), "negative": data < 0}
    if not settings.fractional_counts:
        faults["fractional"] = data != np.floor(data)
    for what, wrong in faults.items():
        if wrong.any():
            first = int(np.argmax(wrong))
            cell = adata.obs_names[np.searchsorted(values.indptr, first, side="right") - 1]
            gene = adata.var["ensembl_id"].iloc[values.indices[first]]
            msg = (
                f"{where} holds {what} values ({wrong.sum()} of them; the first is {data[first]:g} for gene {gene} in "
                f"cell {cell}), so these are not raw counts; set counts to raw or to the layer with raw counts."
            )
            raise CellsError(msg)
    if not data.any():
        msg = f"{where} holds no count at all; set counts to raw or to the layer with raw counts."
        raise CellsError(msg)


def _refuse_count_readers(settings: Study) -> None:
    """Refuse what cannot be done with cells that are tokens already."""
    counting = [name for name in settings.baselines if name in COUNT_BASELINES]
    made = [name for name in dict.fromkeys([*settings.train_sets, settings.train_set]) if name != "single_cell"]
    faults = {
        f"baselines: {' and '.join(counting)} read counts": counting,
        f"train_sets: {', '.join(made)} is made of counts": made,
        "vocabulary: fit takes medians from counts": settings.vocabulary == "fit",
    }
    for what, wrong in faults.items():
        if wrong:
            remedy = "set it to checkpoint" if what.startswith("vocabulary") else "leave that out"
            msg = f"{what}, and the cells of this study are tokens already, without counts; {remedy}."
            raise CellsError(msg)


def _refuse_other_species(adata: ad.AnnData) -> None:
    found = gene_symbols.foreign_species(adata.var["ensembl_id"], adata.var["symbol"])
    if found is not None:
        msg = (
            f"The genes are those of {found[0]} (such as {found[1]}), and Geneformer knows human genes only; replace "
            "them by their one-to-one human orthologs (Ensembl BioMart lists them) and drop the others."
        )
        raise CellsError(msg)


def _refuse_no_classes(labels: pd.Series, settings: Study) -> None:
    """Refuse a label column in which nearly every cell has a value of its own."""
    number = labels.nunique()
    if not settings.classes and number > 2 and labels.notna().sum() < FEW_CELLS * number:
        msg = (
            f"label: obs column {settings.label!r} has {number:,} different values for {labels.notna().sum():,} cells, "
            "so it measures or names cells and holds no classes; set label to a column with few classes, or name them "
            "in classes."
        )
        raise CellsError(msg)


def _refuse_absent(key: str, wanted: list[str], column: str, values: pd.Series) -> None:
    """Refuse a value of a parameter that no cell has."""
    present = list(values.unique())
    for value in wanted:
        if value not in present:
            msg = (
                f"{key}: no cell is left with {value!r} in obs column {column!r} after quality control; "
                f"{nearest(value, sorted(present))}."
            )
            raise CellsError(msg)
