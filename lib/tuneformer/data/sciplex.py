"""The sci-Plex screens, with the cell table that the simulated screen has too.

In: the files of sci-Plex 2 (harmonised h5ad, or the tables of GEO) or sci-Plex 3 (harmonised h5ad). Out: AnnData with
raw counts, and ``obs`` treatment, drug, dose (% of the maximum), dose_um, dose_label, plate, well, replicate.

Sources: Srivatsan et al. 2020 (doi:10.1126/science.aax6234), GEO GSM4150377 (sci-Plex 2) and GSM4150378 (sci-Plex 3);
harmonised by scPerturb (Peidli et al. 2024, doi:10.1038/s41592-023-02144-y), Zenodo record 13350497 (version 1.4).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.data import readers
from tuneformer.data.readers import CellsError, nearest
from tuneformer.data.simulate import DRUGS
from tuneformer.study.params import Study

OLIGO = re.compile(r"^(?P<drug>[A-Za-z]+)_(?P<dose>[0-9.]+)_(?P<well>(?P<plate>[A-Z])[A-H](?P<column>[0-9]{2}))$")
MISSPELT = {"SAHA_100_E09": "SAHA_100_AE09"}  # in the authors' sample sheet: the well between AE08 and AE10
MAX_DOSE = {drug.name: drug.max_dose for drug in DRUGS}  # uM, of sci-Plex 2
MAX_DOSE_3 = 10_000.0  # nM, of every compound of sci-Plex 3
UNTREATED = "Untreated"
HASH_LIMITS = {  # key of the study: names of the obs column, and whether a value passes
    "min_hash_umis": (("hash_umis",), np.greater),
    "min_hash_ratio": (("top_to_second_best_ratio",), np.greater),
    "max_hash_qval": (("qval", "qval_demultiplexing"), np.less),
}
ROWS = 4000  # rows of a file of sci-Plex 3 that are read at once
TRIPLETS = 5_000_000  # lines of the count matrix of GEO that are read at once


def read_harmonised(path: Path, settings: Study) -> ad.AnnData:
    """Read sci-Plex 2 as scPerturb harmonised it.

    Its ``obs`` has perturbation, dose_value (% of the maximum) and well, which stand in top_oligo too, and the hash
    statistics hash_umis, top_to_second_best_ratio and qval_demultiplexing. What it calls "control" is not the vehicle
    (dose 0), but cells whose oligo it could not read; they are labelled by their oligo here, or not at all.

    Parameters
    ----------
    path
        SrivatsanTrapnell2020_sciplex2.h5ad.
    settings
        ``min_hash_umis``, ``min_hash_ratio`` and ``max_hash_qval`` are read.

    Returns
    -------
    As `label_cells`, with the other columns of ``obs``; ``var`` ensembl_id and symbol, where the counts of genes with
    the same identifier are summed.

    Raises
    ------
    CellsError
        Damaged, other columns than stated here, or an oligo that does not read ``<drug>_<dose>_<well>``.
    """
    try:
        with h5py.File(path) as file:
            obs, var = ad.io.read_elem(file["obs"]), ad.io.read_elem(file["var"])
            matrix = sparse.csr_matrix(ad.io.read_elem(file["X"]))
    except readers.UNREADABLE as error:
        raise _unreadable(path, error) from error
    if "top_oligo" not in obs:
        parts = [_column(obs, name, path).astype(object) for name in ("perturbation", "dose_value", "well")]
        known = pd.concat(parts, axis=1).notna().all(axis=1) & (parts[0] != "control")
        drug, _, well = (part.astype(str) for part in parts)
        dose = pd.to_numeric(parts[1], errors="coerce").map("{:g}".format)
        obs["top_oligo"] = (drug + "_" + dose + "_" + well).where(known)
    design, kept = label_cells(obs, settings, path)
    obs = pd.concat([design, obs[[name for name in obs if name not in design]]], axis=1)
    return _assemble(matrix, obs, _var_table(var, path), {"file": "sci-Plex 2, harmonised (scPerturb)"} | kept)


def read_geo(folder: Path, settings: Study) -> ad.AnnData:
    """Read sci-Plex 2 as it is in GEO: a table of gene, cell and count, and tables of genes, cells and hashes.

    Parameters
    ----------
    folder
        With the files of GSM4150377: UMI.count.matrix, gene.annotations, cell.annotations and pData, gzipped.
    settings
        As `read_harmonised`.

    Returns
    -------
    As `read_harmonised`; the columns of pData keep their names.

    Raises
    ------
    CellsError
        A file is damaged, the tables do not fit each other, or an oligo does not read ``<drug>_<dose>_<well>``.
    """
    matrix_file, genes_file, cells_file, hashes_file = (
        _geo_file(folder, part) for part in ("UMI.count.matrix", "gene.annotations", "cell.annotations", "pData")
    )
    try:
        genes = pd.read_csv(genes_file, sep="\t", header=None, names=["ensembl_id", "symbol"], dtype=str)
        cells = pd.read_csv(cells_file, sep="\t", header=None, usecols=[0], dtype=str)[0]
        table = pd.read_csv(hashes_file, sep=" ")
        table = table.set_index(_column(table, "Cell", hashes_file).astype(str))
        matrix = _read_triplets(matrix_file, n_cells=len(cells), n_genes=len(genes))
    except CellsError:
        raise
    except readers.UNREADABLE as error:
        raise _unreadable(folder, error) from error
    if not cells.isin(table.index).any() or table.index.has_duplicates or cells.duplicated().any():
        msg = f"{folder}: the cells of {cells_file.name} and {hashes_file.name} do not pair off; download both again."
        raise CellsError(msg)
    obs = table.reindex(cells).rename_axis(None)
    _column(obs, "top_oligo", hashes_file)
    design, kept = label_cells(obs, settings, hashes_file)
    obs = pd.concat([design, obs.drop(columns=["top_oligo", "Cell"])], axis=1)
    return _assemble(matrix, obs, genes, {"file": "sci-Plex 2, GEO GSM4150377"} | kept)


def label_cells(obs: pd.DataFrame, settings: Study, where: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read drug, dose and well of every cell from its oligo, if its hashes are as clear as the study asks for.

    The authors asked for hash_umis > 30, top_to_second_best_ratio > 10 and qval < 0.01; the limits themselves fail, as
    theirs do. A cell that fails, or has no oligo, has no value in any column, as one whose well is not known.

    Parameters
    ----------
    obs
        With ``top_oligo`` and the hash statistics of `HASH_LIMITS`.
    settings
        ``min_hash_umis``, ``min_hash_ratio`` and ``max_hash_qval``; null sets no limit.
    where
        File, for messages.

    Returns
    -------
    Table with the index of `obs`: top_oligo, drug, dose (% of the maximum), dose_um, dose_label, treatment (the drug,
    or Untreated at dose 0), plate, well, replicate; and how many cells failed each limit, as text.

    Raises
    ------
    CellsError
        A limit is set whose column is missing, or an oligo reads otherwise.
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
            raise CellsError(msg)
        passed = passes(obs[column].astype(float), limit)
        failed[f"cells failing {key} ({limit:g})"] = f"{(~passed & obs['top_oligo'].notna()).sum():,}"
        clear &= passed
    return read_oligos(obs["top_oligo"].astype(object).where(clear), where), failed


def read_oligos(oligos: pd.Series, where: Path) -> pd.DataFrame:
    """Read ``<drug>_<dose>_<well>``: dose in % of the drug's maximum, well as plate, row and column.

    Wells in columns 01, 04, 07, 10 are replicate 1, those after them 2, and the next 3. See `label_cells`.
    """
    known = oligos.dropna().astype(str).replace(MISSPELT)
    parts = known.str.extract(OLIGO)
    wrong = known[parts["drug"].isna() | ~parts["drug"].isin(MAX_DOSE)]
    if len(wrong):
        msg = (
            f"{where}: the oligo {wrong.iloc[0]!r} does not read <drug>_<dose>_<well> with one of "
            f"{', '.join(MAX_DOSE)} (such cells: {len(wrong):,}); take the file from its own source."
        )
        raise CellsError(msg)
    table = pd.DataFrame({"top_oligo": known, "drug": parts["drug"], "dose": parts["dose"].astype(float)})
    table["dose_um"] = table["dose"] / 100 * table["drug"].map(MAX_DOSE)
    table["dose_label"] = table["dose_um"].map("{:g} uM".format)
    table["treatment"] = table["drug"].where(table["dose"] > 0, UNTREATED)
    table["plate"], table["well"] = parts["plate"], parts["well"]
    table["replicate"] = ((parts["column"].astype(int) - 1) % 3 + 1).astype(float)
    return _categorical(table.reindex(oligos.index))


def read_sciplex3(path: Path, settings: Study) -> ad.AnnData:
    """Read the cells of sci-Plex 3 that a study asks for; the others stay on disk.

    The file has 799,317 cells, about 20 GB in memory. It is read `ROWS` rows at a time, and only rows with a cell that
    is selected are kept; mouse genes are left out. Hash statistics are not in the harmonised file.

    Parameters
    ----------
    path
        SrivatsanTrapnell2020_sciplex3.h5ad of version 1.4 (the labels of genes in earlier ones are shifted by one).
    settings
        ``select_column``, ``select_values``, ``label`` and ``classes`` say which cells; hash limits have to be null.

    Returns
    -------
    AnnData of the selected cells, with ``obs`` cell_line, time (hours), cell_line_time, treatment and drug (the
    compound, or Untreated), dose (% of 10 uM), dose_um, dose_label, plate, well, replicate, and what else the file has.

    Raises
    ------
    CellsError
        Damaged, another version, a hash limit is set, or no cell is selected.
    """
    limits = [key for key in HASH_LIMITS if getattr(settings, key) is not None]
    if limits:
        msg = f"{limits[0]}: {path.name} has no hash statistics; set {', '.join(HASH_LIMITS)} to null for sciplex3."
        raise CellsError(msg)
    try:
        with h5py.File(path) as file:
            var = _var_table(ad.io.read_elem(file["var"]), path)
            obs = _design_3(ad.io.read_elem(file["obs"]), path)
            rows = np.flatnonzero(_is_asked(obs, settings))
            matrix = read_rows(file["X"], rows, columns=var["ensembl_id"].str.startswith("ENSG").to_numpy())
    except CellsError:
        raise
    except readers.UNREADABLE as error:
        raise _unreadable(path, error) from error
    obs = obs.iloc[rows].copy()
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    var = var[var["ensembl_id"].str.startswith("ENSG")]
    return _assemble(matrix, obs, var, {"file": "sci-Plex 3, harmonised (scPerturb)", "cells read": f"{len(rows):,}"})


def read_rows(stored: h5py.Group, rows: np.ndarray, *, columns: np.ndarray) -> sparse.csr_matrix:
    """Read some rows and columns of a sparse matrix on disk, `ROWS` rows at a time.

    Parameters
    ----------
    stored
        A matrix by rows as anndata stores it: data, indices, indptr.
    rows
        Numbers of the rows, ascending, (kept rows,).
    columns
        Whether each column is kept, (columns,).

    Returns
    -------
    The values as float32, (kept rows, kept columns).
    """
    if stored.attrs.get("encoding-type") != "csr_matrix":
        msg = f"X is stored as {stored.attrs.get('encoding-type')}, not by rows (csr_matrix); download the file again"
        raise ValueError(msg)
    indptr = stored["indptr"][:].astype(np.int64)
    pieces = [sparse.csr_matrix((0, int(columns.sum())), dtype=np.float32)]
    for start in range(0, len(indptr) - 1, ROWS):
        stop = min(start + ROWS, len(indptr) - 1)
        kept = rows[(rows >= start) & (rows < stop)] - start
        if len(kept):
            place = slice(indptr[start], indptr[stop])
            parts = stored["data"][place].astype(np.float32), stored["indices"][place].astype(np.int32)
            block = sparse.csr_matrix(
                (*parts, indptr[start : stop + 1] - indptr[start]), shape=(stop - start, len(columns))
            )
            pieces.append(block[kept][:, columns])
    return sparse.vstack(pieces, format="csr")


def _design_3(obs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Give the cell table of sci-Plex 3 the columns of `label_cells`; a cell without compound gets no value in them."""
    compound = _column(obs, "perturbation", path).astype(object)
    compound = compound.where(compound.isna(), compound.astype(str).str.strip())
    dose = _column(obs, "dose_value", path).astype(float)
    units = _column(obs, "dose_unit", path).dropna().unique()
    if set(units) - {"nM"}:
        msg = f"{path}: doses in {', '.join(map(str, units))}, where nM is expected; take version 1.4 of the file."
        raise CellsError(msg)
    plate, well = (_column(obs, name, path).astype(object) for name in ("plate", "well"))
    table = pd.DataFrame({"drug": compound.mask(compound == "control", UNTREATED)})
    table["dose"] = (dose / MAX_DOSE_3 * 100).mask(compound == "control", 0.0)
    table["dose_um"] = table["dose"] / 100 * MAX_DOSE_3 / 1000
    table["dose_label"] = table["dose_um"].map("{:g} uM".format)
    table["treatment"] = table["drug"].where(table["dose"] > 0, UNTREATED)
    table["plate"], table["well"] = plate, plate.astype(str) + "_" + well.astype(str)
    replicate = _column(obs, "replicate", path).astype(object)
    table["replicate"] = replicate.astype(str).str.extract(r"(\d+)$")[0].astype(float)
    table.loc[compound.isna() | dose.isna() | well.isna()] = np.nan
    line = _column(obs, "cell_line", path).astype(object)
    table["cell_line"] = line
    hours = _column(obs, "time", path).astype(float)
    table["cell_line_time"] = (line.astype(str) + hours.map(" {:g} h".format)).where(line.notna() & hours.notna())
    return pd.concat([_categorical(table), obs[[name for name in obs if name not in table]]], axis=1)


def _is_asked(obs: pd.DataFrame, settings: Study) -> np.ndarray:
    """Return which cells the task of a study selects."""
    asked = obs[_named(obs, "label", settings.label)].notna()
    if settings.classes:
        asked &= obs[settings.label].isin(settings.classes)
    if settings.select_column is not None:
        values = obs[_named(obs, "select_column", settings.select_column)]
        absent = [value for value in settings.select_values if not (values == value).any()]
        if absent:
            msg = (
                f"select_values: no cell has {absent[0]!r} in {settings.select_column!r}; "
                f"{nearest(absent[0], values.dropna().unique())}."
            )
            raise CellsError(msg)
        asked &= values.isin(settings.select_values)
    if not asked.any():
        msg = f"classes: no selected cell has one of them in {settings.label!r}; change classes or select_values."
        raise CellsError(msg)
    return asked.to_numpy()


def _named(obs: pd.DataFrame, key: str, column: str) -> str:
    if column not in obs:
        msg = f"{key}: the cells have no obs column {column!r}; {nearest(column, obs.columns)}."
        raise CellsError(msg)
    return column


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
            raise CellsError(msg)
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
        raise CellsError(msg)
    return pd.DataFrame({"ensembl_id": ids, "symbol": symbols})


def _assemble(matrix: sparse.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame, said: Mapping[str, str]) -> ad.AnnData:
    """Make the AnnData: identifiers without version, counts of genes with the same identifier summed."""
    if matrix.shape != (len(obs), len(var)):
        msg = f"The counts have the shape {matrix.shape}, but there are {len(obs):,} cells and {len(var):,} genes."
        raise CellsError(msg)
    var = var.assign(ensembl_id=var["ensembl_id"].str.replace(readers.VERSIONED, r"\1", regex=True))
    return readers.summed(matrix.astype(np.float32), obs.rename_axis("cell"), var.reset_index(drop=True), dict(said))


def _categorical(table: pd.DataFrame) -> pd.DataFrame:
    """Make every column with text a category, as anndata stores it."""
    for name in table.select_dtypes(exclude="number"):
        table[name] = table[name].astype("category")
    return table


def _column(table: pd.DataFrame, name: str, path: Path) -> pd.Series:
    if name not in table:
        msg = f"{path} has no column {name!r}; {nearest(name, table.columns)}, or take the file from its own source."
        raise CellsError(msg)
    return table[name]


def _geo_file(folder: Path, part: str) -> Path:
    found = sorted(folder.glob(f"GSM4150377_sciPlex2_*{part}*.gz"))
    if len(found) != 1:
        msg = (
            f"{folder} has {len(found)} files GSM4150377_sciPlex2_*{part}*.gz, where one is needed; download it again."
        )
        raise CellsError(msg)
    return found[0]


def _unreadable(path: Path, error: Exception) -> CellsError:
    reason = " ".join(str(error).split())[:200]
    return CellsError(f"{path} could not be read ({reason}); delete it and start again, to have it downloaded anew.")
