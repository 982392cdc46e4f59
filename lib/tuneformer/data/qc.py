"""Quality control: from raw counts to the labelled, split cells of one task.

In: cells with raw counts and a study's limits. Out: the kept cells with ``obs`` label, n_counts, mito_share and split;
or one sentence that says what to change. What is stored once per task is the table of the cells and, if the source is
an h5ad, which of its rows they are; counts of another source are stored too. Counts are read once, a few cells at a
time.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from tuneformer import paths
from tuneformer.artifacts import UserError, key, made, read_json, remembered, write_json
from tuneformer.data import counts, readers, sources, splits
from tuneformer.data.refusals import require_column, require_values
from tuneformer.study import CellsKeys, Study

RULES = ("label", "min_counts", "max_counts", "max_mito_share")
COUNT_BASELINES = ("logistic_counts", "knn_pca")  # those that read counts and not tokens
FEW_CELLS = 10  # of a class, on average: below, the label column names cells or measures them
FILE = "cells.h5ad"
REMEDY = "set counts to raw or to the layer with raw counts"


def prepare_cells(settings: Study, cells: ad.AnnData | None = None, flags: pd.DataFrame | None = None) -> ad.AnnData:
    """Return the quality-controlled, split cells of a study: from `paths.cells_dir` if they are there, else made.

    Give what `sources.load` and `qc_flags` returned as `cells` and `flags` where they are at hand.

    Returns
    -------
    AnnData (cells, genes): raw counts in ``X`` (`counts.Counts`, float32: of ``cells[rows]`` these rows are read);
    ``var`` ensembl_id, symbol; ``obs`` label (ordered categorical), n_counts, mito_share, counts_hash, split (of the
    fold of `settings`), and the columns of the source;
    ``uns["provenance"]``: key, dataset, simulated, data (key of the source), split (its key), n_cells, n_genes, and
    what was recognised in own data.

    Raises
    ------
    UserError
        As the steps it is made of; an arm reads counts, and the cells are tokens already.
    """

    def make(folder: Path) -> None:
        loaded = sources.load(settings) if cells is None else cells
        check_cells(loaded, settings)
        measured = qc_flags(loaded, settings) if flags is None else flags
        kept = keep_genes(keep_cells(loaded, measured), settings)
        kept = select_task_cells(kept, settings)
        split_cells(kept.copy(), settings)  # cells that cannot be split are not stored
        counts.write_cells(folder / FILE, kept)

    if paths.is_tokenized(settings):
        _refuse_count_readers(settings)
    number = cells_key(settings)
    made(paths.cells_dir(settings), cells_key(settings.at(fold=None)), make)
    return remembered("cells", f"{paths.cells_dir(settings)} {number}", lambda: _read(settings, number)).copy()


def _read(settings: Study, number: str) -> ad.AnnData:
    """Read the stored cells of a task, and their split, which is drawn once and kept beside them."""
    folder = paths.cells_dir(settings)
    adata = counts.read_cells(
        folder / FILE, lambda place: readers.counts_of(sources.source_path(settings), place, settings)
    )
    stored = folder / f"split_{number}.json"
    if not stored.is_file():
        split = split_cells(adata, settings).obs["split"]
        text = "".join(map(str, split.cat.codes))
        write_json(stored, {"parts": list(splits.PARTS), "key": splits.split_key(split), "cells": text})
    split = read_json(stored)
    codes = np.frombuffer(split["cells"].encode(), dtype=np.int8) - ord("0")
    adata.obs["split"] = pd.Categorical.from_codes(codes, split["parts"])
    source = adata.uns["dataset"]
    adata.uns["provenance"] = {
        "key": number,
        "dataset": source["name"],
        "simulated": bool(source["simulated"]),
        "data": source["hash"],
        "split": split["key"],
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        **adata.uns.get("recognised", {}),
    }
    return adata


def cells_key(settings: Study) -> str:
    """Return the key of everything that cells and split depend on: parameters, fold and the source of the cells."""
    return key("cells.2", settings.keys(CellsKeys), settings.fold, sources.source_key(settings))


def check_cells(adata: ad.AnnData, settings: Study) -> None:
    """Refuse cells that the study cannot use.

    Raises
    ------
    UserError
        No cells or genes; a cell name or a gene identifier is not unique; the genes are not human; an obs column of the
        task is missing, or that of the classes holds measurements or names of cells. (`qc_flags` reads the counts.)
    """
    if not adata.n_obs or not (adata.n_vars or has_no_counts(adata)):
        msg = f"The data set has {adata.n_obs} cells and {adata.n_vars} genes; choose a file that has both."
        raise UserError(msg)
    for what, names in {"cell name": adata.obs_names, "gene identifier": pd.Index(adata.var["ensembl_id"])}.items():
        if names.has_duplicates:
            first = names[names.duplicated()][0]
            msg = f"The {what} {first!r} is given {(names == first).sum()} times; make every {what} unique."
            raise UserError(msg)
    found = readers.foreign_species(adata.var["ensembl_id"], adata.var["symbol"])
    if found is not None:
        msg = (
            f"The genes are those of {found[0]} (such as {found[1]}), and Geneformer knows human genes only; replace "
            "them by their one-to-one human orthologs (Ensembl BioMart lists them) and drop the others."
        )
        raise UserError(msg)
    for name in ("label", "select_column", "dose_column", "group_by"):
        require_column(adata.obs, name, getattr(settings, name))
    labels = adata.obs[settings.label].dropna()
    number = labels.nunique()
    if not settings.classes and number > 2 and len(labels) < FEW_CELLS * number:
        msg = (
            f"label: obs column {settings.label!r} has {number:,} different values for {len(labels):,} cells, so it "
            "measures or names cells and holds no classes; set label to a column with few classes, or name them in "
            "classes."
        )
        raise UserError(msg)


def has_no_counts(adata: ad.AnnData) -> bool:
    """Return whether the cells were tokenized by others, so that labels and groups are all that is known of them."""
    return adata.n_vars == 0 and "length" in adata.obs


def qc_flags(adata: ad.AnnData, settings: Study) -> pd.DataFrame:
    """Measure every cell and say which rules it fails, in one pass over the counts.

    Source of the rules: the theses on sciplex2 (drug and dose known, 500 to 12,000 counts, at most 50 % mitochondrial).

    Returns
    -------
    One row per cell: ``n_counts``, ``n_genes`` (with a count), ``mito_share`` (0 to 1; NaN where no gene symbol begins
    with `mito_prefix`, or the cell has no count), and for every rule of `RULES`, named as its key in the params file,
    whether the cell fails it. A cell without a value in the label, selection, dose or group column fails ``label``. Of
    a tokenized cell n_counts is NaN, and ``n_genes`` is the number of its tokens. ``counts_hash`` is the same for two
    cells with the same counts.

    Raises
    ------
    UserError
        ``X`` holds text, missing, infinite, negative or, unless ``fractional_counts``, fractional values (normalised
        cells), or no count at all.
    """
    if has_no_counts(adata):
        flags = pd.DataFrame({"n_counts": np.nan, "n_genes": adata.obs["length"], "mito_share": np.nan})
        flags["counts_hash"] = np.uint64(0)
    else:
        flags = _measured(adata, settings)
    needed = [settings.label, settings.select_column, settings.dose_column, settings.group_by]
    flags["label"] = adata.obs[[column for column in needed if column]].isna().any(axis=1)
    flags["min_counts"] = flags["n_counts"] < settings.min_counts
    flags["max_counts"] = flags["n_counts"] > (np.inf if settings.max_counts is None else settings.max_counts)
    flags["max_mito_share"] = flags["mito_share"] > settings.max_mito_share
    return flags


def keep_cells(adata: ad.AnnData, flags: pd.DataFrame) -> ad.AnnData:
    """Return the cells that fail no rule, with ``obs`` n_counts, mito_share, counts_hash, and ``X`` as float32.

    That every cell fails is a UserError.
    """
    kept = ~flags[list(RULES)].any(axis=1).to_numpy()
    if not kept.any():
        most = flags[list(RULES)].sum().idxmax()
        msg = (
            f"Quality control drops all {len(flags)} cells, {flags[most].sum()} of them by {most} (median count of a "
            f"cell: {flags['n_counts'].median():g}); change the limits in the params file."
        )
        raise UserError(msg)
    adata = counts.taken(adata, np.flatnonzero(kept))
    adata.X = adata.X.astype(np.float32)
    adata.obs[["n_counts", "mito_share"]] = flags.loc[kept, ["n_counts", "mito_share"]].to_numpy(float)
    adata.obs["counts_hash"] = flags.loc[kept, "counts_hash"].to_numpy()
    return adata


def keep_genes(adata: ad.AnnData, settings: Study) -> ad.AnnData:
    """Return the cells with the genes whose symbol matches ``only_genes``; UserError if none does."""
    if settings.only_genes is None:
        return adata
    kept = adata.var["symbol"].astype(str).str.match(settings.only_genes).to_numpy()
    if not kept.any():
        msg = (
            f"only_genes: no gene symbol matches {settings.only_genes!r} (symbols like {adata.var['symbol'].iloc[0]})."
        )
        raise UserError(msg)
    return counts.taken_genes(adata, kept)


def select_task_cells(adata: ad.AnnData, settings: Study) -> ad.AnnData:
    """Select the cells of the task and give them their class.

    Returns
    -------
    A copy of the cells with one of `select_values` in `select_column` and one of `classes` in the label column, with
    ``obs["label"]``, a categorical whose categories are the classes in their order. Where `classes` is empty, all
    classes with `min_class_cells` or more are kept; ``uns["recognised"]`` says which are left out.

    Raises
    ------
    UserError
        A selected value or class has no cell, or fewer than two classes are left.
    """
    when = " after quality control"
    selected = np.ones(adata.n_obs, dtype=bool)
    if settings.select_column is not None:
        values = adata.obs[settings.select_column].astype(str)
        require_values("select_values", settings.select_values, settings.select_column, values, when)
        selected = values.isin(settings.select_values).to_numpy()
    labels = adata.obs[settings.label].astype(str)
    sizes = labels[selected].value_counts()
    classes = settings.classes or sorted(sizes.index[sizes >= settings.min_class_cells])
    require_values("classes", classes, settings.label, labels[selected], when)
    if not classes:
        msg = (
            f"min_class_cells: no class of obs column {settings.label!r} has {settings.min_class_cells} cells (the "
            f"largest has {sizes.max()}); set it to less."
        )
        raise UserError(msg)
    if len(classes) < 2:
        msg = f"obs column {settings.label!r} has one class, {classes[0]!r}; set label to a column with two or more."
        raise UserError(msg)
    kept = selected & labels.isin(classes).to_numpy()
    adata = counts.taken(adata, np.flatnonzero(kept))
    adata.obs["label"] = pd.Categorical(labels[kept], categories=classes, ordered=True)
    small = [] if settings.classes else sorted(set(sizes.index) - set(classes))
    if small:
        shown = f"{len(small)} of less than {settings.min_class_cells} cells: {', '.join(small)}"
        adata.uns["recognised"] = {**adata.uns.get("recognised", {}), "classes left out": shown}
    return adata


def split_cells(adata: ad.AnnData, settings: Study) -> ad.AnnData:
    """Give the cells of a task ``obs["split"]``, with folds that of the fold of `settings`; `adata` is changed."""
    groups = None if settings.group_by is None else adata.obs[settings.group_by]
    options = {"validation_share": settings.validation_share, "seed": settings.split_seed, "groups": groups}
    if settings.fold is None:
        adata.obs["split"] = splits.assign_split(adata.obs["label"], test_share=settings.test_share, **options)
    else:
        fold = {"folds": settings.folds, "fold": settings.fold}
        adata.obs["split"] = splits.assign_fold(adata.obs["label"], **fold, **options)
    return adata


def _measured(adata: ad.AnnData, settings: Study) -> pd.DataFrame:
    """Take total, genes, mitochondrial share and hash of each cell from its counts; refuse values that are no counts.

    The sentence is about the first kind of fault that there is anywhere, and names the first such value.
    """
    where = "the recovered counts" if settings.dataset == "pbmc68k" else settings.counts
    if adata.X.dtype.kind not in "iuf":
        msg = f"{where} holds {adata.X.dtype} values, not numbers; {REMEDY}."
        raise UserError(msg)
    mito = adata.var["symbol"].astype(str).str.upper().str.startswith(settings.mito_prefix.upper()).to_numpy()
    is_fault = {"missing (NaN)": np.isnan, "infinite": np.isinf, "negative": lambda data: data < 0}
    if not settings.fractional_counts:
        is_fault["fractional"] = lambda data: data != np.floor(data)
    number, first, parts = dict.fromkeys(is_fault, 0), {}, []
    for part, values in counts.chunks(adata):
        for what, test in is_fault.items():
            wrong = test(values.data)
            number[what] += int(wrong.sum())
            if number[what] and what not in first:
                at = int(wrong.argmax())
                cell = adata.obs_names[part.start + np.searchsorted(values.indptr, at, side="right") - 1]
                first[what] = values.data[at], adata.var["ensembl_id"].iloc[values.indices[at]], cell
        total, of_mito = (np.asarray(one.sum(axis=1)).ravel() for one in (values, values[:, mito]))
        columns = {"n_counts": total, "n_genes": values.getnnz(axis=1), "mito": of_mito}
        parts.append(pd.DataFrame(columns | {"counts_hash": counts.hashes(values)}))
    if first:
        what = next(what for what in is_fault if what in first)
        value, gene, cell = first[what]
        msg = (
            f"{where} holds {what} values ({number[what]} of them; the first is {value:g} for gene {gene} in cell "
            f"{cell}), so these are not raw counts; {REMEDY}."
        )
        raise UserError(msg)
    flags = pd.concat(parts).set_axis(adata.obs_names)
    if not flags["n_genes"].any():
        msg = f"{where} holds no count at all; {REMEDY}."
        raise UserError(msg)
    share = flags.pop("mito") / flags["n_counts"] * 100 / 100  # percent first, as scanpy has it: the same rounding
    flags.insert(2, "mito_share", share if mito.any() else np.nan)
    return flags


def _refuse_count_readers(settings: Study) -> None:
    """Refuse arms that read counts, where the cells are tokens already."""
    this = {name: getattr(settings, name) for name in ("strategy", "train_set", "steps_of", "vocabulary")}
    for arm, own in {**settings.arms, settings.arm: this}.items():
        asked = {"strategy": "", "train_set": "single_cell", "steps_of": "own", "vocabulary": ""} | own
        faults = {
            f"strategy {asked['strategy']} reads counts": asked["strategy"] in COUNT_BASELINES,
            f"train_set {asked['train_set']} is made of counts": asked["train_set"] != "single_cell",
            "steps_of pseudobulk makes groups of counts": asked["steps_of"] == "pseudobulk",
            "vocabulary: fit takes medians from counts; set it to checkpoint": asked["vocabulary"] == "fit",
        }
        for what, is_wrong in faults.items():
            if is_wrong:
                fault, _, remedy = what.partition("; ")
                msg = (
                    f"arm {arm}: {fault}, and the cells of this study are tokens already, without counts; "
                    f"{remedy or 'leave the arm out'}."
                )
                raise UserError(msg)
