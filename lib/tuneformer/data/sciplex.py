"""The sci-Plex screens, with the cell table that the simulated screen has too.

In: the files of sci-Plex 2 (harmonised h5ad, or the tables of GEO) or sci-Plex 3 (harmonised h5ad). Out: AnnData with
raw counts, and ``obs`` treatment, drug, dose (% of the maximum), dose_um, dose_label, plate, well, replicate.

Sources: Srivatsan et al. 2020 (doi:10.1126/science.aax6234), GEO GSM4150377 (sci-Plex 2) and GSM4150378 (sci-Plex 3);
harmonised by scPerturb (Peidli et al. 2024, doi:10.1038/s41592-023-02144-y), Zenodo record 13350497 (version 1.4).
"""

import re
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import readers
from tuneformer.data.counts import Counts
from tuneformer.data.refusals import explained, nearest, require_column, require_values
from tuneformer.data.simulate import DRUGS
from tuneformer.study import Study

OLIGO = re.compile(r"^(?P<drug>[A-Za-z]+)_(?P<dose>[0-9.]+)_(?P<well>(?P<plate>[A-Z])[A-H](?P<column>[0-9]{2}))$")
MISSPELT = {"SAHA_100_E09": "SAHA_100_AE09"}  # in the authors' sample sheet: the well between AE08 and AE10
MAX_DOSE = {drug.name: drug.max_dose for drug in DRUGS}  # uM, of sci-Plex 2
MAX_DOSE_3 = 10.0  # uM, of every compound of sci-Plex 3
UNTREATED = "Untreated"
HASH_LIMITS = {  # key of the study: names of the obs column, and whether a value passes
    "min_hash_umis": (("hash_umis",), np.greater),
    "min_hash_ratio": (("top_to_second_best_ratio",), np.greater),
    "max_hash_qval": (("qval", "qval_demultiplexing"), np.less),
}
TRIPLETS = 5_000_000  # lines of the count matrix of GEO that are read at once
AGAIN = "delete it and start again, to have it downloaded anew"


def read_harmonised(path: Path, settings: Study) -> ad.AnnData:
    """Read sci-Plex 2 as scPerturb harmonised it.

    What it calls "control" is not the vehicle (dose 0), but cells whose oligo it could not read; they are labelled by
    their oligo here, or not at all. Hash limits as `label_cells`; genes with the same identifier are summed.
    A damaged file, or one with other columns than expected, is a UserError.
    """
    with explained(path, "sci-Plex", AGAIN), h5py.File(path) as file:
        obs, var = ad.io.read_elem(file["obs"]), ad.io.read_elem(file["var"])
        matrix = sparse.csr_matrix(ad.io.read_elem(file["X"]))
    if "top_oligo" not in obs:
        drug, dose, well = (_column(obs, name, path).astype(object) for name in ("perturbation", "dose_value", "well"))
        known = drug.notna() & dose.notna() & well.notna() & (drug != "control")
        dose = pd.to_numeric(dose, errors="coerce").map("{:g}".format)
        obs["top_oligo"] = (drug.astype(str) + "_" + dose + "_" + well.astype(str)).where(known)
    design, failed = label_cells(obs, settings, path)
    obs = design.join(obs.drop(columns=design.columns, errors="ignore"))
    return _assembled(matrix, obs, _var_table(var, path), {"file": "sci-Plex 2, harmonised (scPerturb)"} | failed)


def read_geo(folder: Path, settings: Study) -> ad.AnnData:
    """Read sci-Plex 2 as it is in GEO: gzipped tables of counts (gene, cell, count), genes, cells and hashes (pData).

    Hash limits as `label_cells`; the columns of pData keep their names. Files that are missing, damaged or do not fit
    each other are a UserError.
    """
    parts = ("UMI.count.matrix", "gene.annotations", "cell.annotations", "pData")
    found = [sorted(folder.glob(f"GSM4150377_sciPlex2_*{part}*.gz")) for part in parts]
    for part, files in zip(parts, found, strict=True):
        if len(files) != 1:
            msg = f"{folder} has {len(files)} files GSM4150377_sciPlex2_*{part}*.gz, where one is needed; {AGAIN}."
            raise UserError(msg)
    matrix_file, genes_file, cells_file, hashes_file = (files[0] for files in found)
    with explained(folder, "sci-Plex", AGAIN):
        genes = pd.read_csv(genes_file, sep="\t", header=None, names=["ensembl_id", "symbol"], dtype=str)
        cells = pd.read_csv(cells_file, sep="\t", header=None, usecols=[0], dtype=str)[0]
        table = pd.read_csv(hashes_file, sep=" ")
        table = table.set_index(_column(table, "Cell", hashes_file).astype(str))
        matrix = _read_triplets(matrix_file, n_cells=len(cells), n_genes=len(genes))
    if not cells.isin(table.index).any() or table.index.has_duplicates or cells.duplicated().any():
        pair = f"{cells_file.name} and {hashes_file.name}"
        msg = f"{folder}: the cells of {pair} do not pair off; delete both and start again."
        raise UserError(msg)
    obs = table.reindex(cells).rename_axis(None)
    _column(obs, "top_oligo", hashes_file)
    design, failed = label_cells(obs, settings, hashes_file)
    obs = design.join(obs.drop(columns=["top_oligo", "Cell"]))
    return _assembled(matrix, obs, genes, {"file": "sci-Plex 2, GEO GSM4150377"} | failed)


def label_cells(obs: pd.DataFrame, settings: Study, where: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read drug, dose and well of every cell from ``top_oligo``, if its hashes are as clear as the study asks for.

    The authors asked for hash_umis > 30, top_to_second_best_ratio > 10 and qval < 0.01; the limits themselves fail, as
    theirs do, and so does a missing value. A cell that fails has no value in any column.

    Returns
    -------
    The table of `read_oligos`, and how many cells failed each limit, as text.

    Raises
    ------
    UserError
        A limit is set whose column is missing, or an oligo cannot be read.
    """
    clear, failed = obs["top_oligo"].notna(), {}
    for key, (names, passes) in HASH_LIMITS.items():
        limit = getattr(settings, key)
        if limit is None:
            continue
        column = next((name for name in names if name in obs), None)
        if column is None:
            msg = (
                f"{key}: {where} has no obs column {names[0]!r} to which a limit could apply; set {key} to null, or "
                "take the cells from GEO (dataset: sciplex2_geo)."
            )
            raise UserError(msg)
        passed = passes(obs[column].astype(float), limit)
        failed[f"cells failing {key} ({limit:g})"] = f"{(~passed & obs['top_oligo'].notna()).sum():,}"
        clear &= passed
    return read_oligos(obs["top_oligo"].astype(object).where(clear), where), failed


def read_oligos(oligos: pd.Series, where: Path) -> pd.DataFrame:
    """Read ``<drug>_<dose>_<well>``: dose in % of the drug's maximum, well as plate, row and column.

    Wells in columns 01, 04, 07, 10 are replicate 1, those after them 2, and the next 3. Where there is no oligo, no
    column has a value.
    """
    known = oligos.dropna().astype(str).replace(MISSPELT)
    parts = known.str.extract(OLIGO)
    wrong = known[parts["drug"].isna() | ~parts["drug"].isin(MAX_DOSE)]
    if len(wrong):
        msg = (
            f"{where}: the oligo {wrong.iloc[0]!r} does not read <drug>_<dose>_<well> with one of "
            f"{', '.join(MAX_DOSE)} (such cells: {len(wrong):,}); take the file from its own source."
        )
        raise UserError(msg)
    table = pd.DataFrame({"top_oligo": known, "drug": parts["drug"], "dose": parts["dose"].astype(float)})
    table = _with_treatment(table, table["drug"].map(MAX_DOSE))
    table["plate"], table["well"] = parts["plate"], parts["well"]
    table["replicate"] = ((parts["column"].astype(int) - 1) % 3 + 1).astype(float)
    return _categorical(table.reindex(oligos.index))


def read_sciplex3(path: Path, settings: Study) -> ad.AnnData:
    """Read the cells of sci-Plex 3 that a study selects; the others, and mouse genes, stay on disk.

    The whole file has 799,317 cells, about 20 GB in memory. Further columns of ``obs``: cell_line, time (hours),
    cell_line_time, and what else the file has. It has no hash statistics.

    Raises
    ------
    UserError
        Damaged, an earlier version (whose names of genes are shifted by one), a hash limit is set, or no cell is
        selected.
    """
    limits = [key for key in HASH_LIMITS if getattr(settings, key) is not None]
    if limits:
        msg = f"{limits[0]}: {path.name} has no hash statistics; set {', '.join(HASH_LIMITS)} to null for sciplex3."
        raise UserError(msg)
    with explained(path, "sci-Plex", AGAIN), h5py.File(path) as file:
        var = _var_table(ad.io.read_elem(file["var"]), path)
        obs = _design_3(ad.io.read_elem(file["obs"]), path)
        asked, is_human = _is_asked(obs, settings), var["ensembl_id"].str.startswith("ENSG").to_numpy()
    obs = obs[asked].copy()
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    recognised = {"file": "sci-Plex 3, harmonised (scPerturb)", "cells read": f"{len(obs):,}"}
    matrix = readers.counts_of(path, "X", settings).taken(np.flatnonzero(asked))
    matrix = matrix.summed(np.where(is_human, np.cumsum(is_human) - 1, -1), is_human.sum())
    return _assembled(matrix, obs, var[is_human], recognised)


def _design_3(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Give the cell table of sci-Plex 3 the columns of `read_oligos`; a cell without compound gets no value in them."""
    names = ("perturbation", "dose_value", "dose_unit", "plate", "well", "replicate", "cell_line", "time")
    compound, dose, unit, plate, well, replicate, line, hours = (
        _column(obs, name, path).astype(object) for name in names
    )
    if set(unit.dropna()) - {"nM"}:
        msg = f"{path}: doses in {', '.join(map(str, unit.dropna().unique()))}, where nM is expected; take version 1.4."
        raise UserError(msg)
    compound = compound.where(compound.isna(), compound.astype(str).str.strip())
    is_control, dose, hours = compound == "control", dose.astype(float), hours.astype(float)
    table = pd.DataFrame({"drug": compound.mask(is_control, UNTREATED)})
    table["dose"] = (dose / (MAX_DOSE_3 * 1000) * 100).mask(is_control, 0.0)
    table = _with_treatment(table, MAX_DOSE_3)
    table["plate"], table["well"] = plate, plate.astype(str) + "_" + well.astype(str)
    table["replicate"] = replicate.astype(str).str.extract(r"(\d+)$")[0].astype(float)
    table.loc[compound.isna() | dose.isna() | well.isna()] = np.nan
    table["cell_line"] = line
    table["cell_line_time"] = (line.astype(str) + hours.map(" {:g} h".format)).where(line.notna() & hours.notna())
    return _categorical(table).join(obs.drop(columns=table.columns, errors="ignore"))


def _with_treatment(table: pd.DataFrame, max_dose: pd.Series | float) -> pd.DataFrame:
    """Add the columns that follow from drug and dose (% of `max_dose`, in uM)."""
    table["dose_um"] = table["dose"] / 100 * max_dose
    table["dose_label"] = table["dose_um"].map("{:g} uM".format)
    table["treatment"] = table["drug"].where(table["dose"] > 0, UNTREATED)
    return table


def _is_asked(obs: pd.DataFrame, settings: Study) -> np.ndarray:
    """Return which cells the task of a study selects."""
    for key in ("label", "select_column"):
        require_column(obs, key, getattr(settings, key))
    asked = obs[settings.label].notna()
    if settings.classes:
        asked &= obs[settings.label].astype(str).isin(settings.classes)
    if settings.select_column is not None:
        values = obs[settings.select_column]
        require_values("select_values", settings.select_values, settings.select_column, values.dropna().astype(str))
        asked &= values.astype(str).isin(settings.select_values)  # as qc.select_task_cells compares them
    if not asked.any():
        msg = f"classes: no selected cell has one of them in {settings.label!r}; change classes or select_values."
        raise UserError(msg)
    return asked.to_numpy()


def _read_triplets(path: Path, *, n_cells: int, n_genes: int) -> sparse.csr_matrix:
    """Read lines of gene, cell and count, numbered from 1, without header; (cells, genes), float32."""
    parts = []
    names = ["gene", "cell", "count"]
    for lines in pd.read_csv(path, sep="\t", header=None, names=names, dtype=np.int32, chunksize=TRIPLETS):
        outside = ~(lines["gene"].between(1, n_genes) & lines["cell"].between(1, n_cells))
        if outside.any():
            first = lines[outside].iloc[0]
            msg = (
                f"{path}: gene {first['gene']} of cell {first['cell']} is not among the {n_genes:,} genes and "
                f"{n_cells:,} cells of the tables beside it; download all of them again."
            )
            raise UserError(msg)
        places = lines["cell"].to_numpy() - 1, lines["gene"].to_numpy() - 1
        parts.append(sparse.csr_matrix((lines["count"].to_numpy(np.float32), places), shape=(n_cells, n_genes)))
    return sum(parts[1:], start=parts[0])


def _var_table(var: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return ensembl_id and symbol of the genes of a harmonised file; a gene without identifier goes by its symbol."""
    symbols = var.index.astype(str).to_series(index=range(len(var)))
    ids = _column(var, "ensembl_id", path).reset_index(drop=True).astype(object)
    ids = ids.where(ids.notna() & (ids.astype(str).str.strip() != ""), symbols).astype(str)
    header = ids.str.contains("gene_short_name") | (symbols == "gene_short_name")
    if header.any():
        msg = (
            f"{path}: gene {header.idxmax() + 1} is called like a header, so that all names of genes are shifted by "
            "one, as in versions before 1.4; take the file of Zenodo record 13350497."
        )
        raise UserError(msg)
    return pd.DataFrame({"ensembl_id": ids, "symbol": symbols})


def _assembled(
    matrix: sparse.csr_matrix | Counts, obs: pd.DataFrame, var: pd.DataFrame, said: dict[str, str]
) -> ad.AnnData:
    """Make the AnnData: identifiers without version, counts of genes with the same identifier summed."""
    if matrix.shape != (len(obs), len(var)):
        msg = f"The counts have the shape {matrix.shape}, but there are {len(obs):,} cells and {len(var):,} genes."
        raise UserError(msg)
    var = var.assign(ensembl_id=var["ensembl_id"].str.replace(readers.VERSIONED, r"\1", regex=True))
    return readers.summed(matrix.astype(np.float32), obs.rename_axis("cell"), var.reset_index(drop=True), said)


def _categorical(table: pd.DataFrame) -> pd.DataFrame:
    """Make every column with text a category, as anndata stores it."""
    return table.astype(dict.fromkeys(table.select_dtypes(exclude="number"), "category"))


def _column(table: pd.DataFrame, name: str, path: Path) -> pd.Series:
    if name not in table:
        msg = f"{path} has no column {name!r}; {nearest(name, table.columns)}, or take the file from its own source."
        raise UserError(msg)
    return table[name]
