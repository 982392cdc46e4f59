"""Read cells with raw counts, without ever holding a dense copy of them, and say what was recognised.

In: a file of yours (an h5ad, a 10x h5, a 10x folder), or the PBMC that scanpy carries; a tokenized data set in the
official format, which has no counts. Out: AnnData with sparse counts in ``X``, the cell table in ``obs``,
``var["ensembl_id"]`` and ``var["symbol"]``; or a `CellsError` that says what to change.
"""

import difflib
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import io, sparse

from tuneformer.data import gene_symbols
from tuneformer.data.pickles import PickleError
from tuneformer.study import paths

if TYPE_CHECKING:
    from tuneformer.study.params import Study

VERSIONED = re.compile(r"^(ENS[A-Z]*G[0-9]{11})\.[0-9]+(_PAR_Y)?$")
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
MAKE_VARIABLES = ("DATA", "LABEL")  # what make hands on to params/own_data.yaml
ROWS = 4000  # rows of a dense file that are read at once
AUTO = ("counts", "raw", "X")  # places that counts: auto looks at, in this order; the first is a layer
SYMBOL_COLUMNS = ("symbol", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "feature_name")
UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError)


class CellsError(ValueError):
    """Cells that cannot be used; the message says what is wrong, where, and what to do."""


def read_own(settings: "Study", path: Path) -> ad.AnnData:
    """Read cells of a user's own, in any of the forms that are recognised, and say what was recognised.

    Parameters
    ----------
    settings
        ``counts``, ``ensembl_id``, ``symbol``, ``obs_table`` and ``checkpoint`` are read. Genes that are named by
        symbols get the Ensembl identifiers of the checkpoint's dictionary of gene names, if it has one; counts of
        genes that have the same one are summed.
    path
        An h5ad, a 10x h5 (Cell Ranger), a folder with ``matrix.mtx``, ``features.tsv`` (or ``genes.tsv``) and
        ``barcodes.tsv``, each plain or gzipped, or a tokenized data set (see `read_tokenized`).

    Returns
    -------
    As `read_h5ad_counts`. ``uns["recognised"]``: what the file is, where counts and gene identifiers were found, and
    what was done to the genes, as text.

    Raises
    ------
    CellsError
        As `read_h5ad_counts`; the file is none of these; or the table of cells cannot be used.
    """
    path = Path(path)
    if paths.is_token_folder(path):
        return read_tokenized(path)
    options = {"ensembl_id": settings.ensembl_id, "symbol": settings.symbol}
    if path.is_dir() or _is_10x(path):
        if settings.counts not in ("auto", "X"):
            msg = f"{path} has no counts in {settings.counts!r}, but one matrix; set counts to X or auto."
            raise CellsError(msg)
        adata = read_10x(path, **options)
    else:
        adata = read_h5ad_counts(path, counts=settings.counts, **options)
    names = paths.checkpoint_dir(settings.checkpoint)
    if not gene_symbols.are_ensembl(adata.var["ensembl_id"]) and gene_symbols.dictionary_of(names) is not None:
        adata = _with_ensembl(adata, names)
    if settings.obs_table is not None:
        adata = _join_table(adata, settings.obs_table)
    return adata


def own_hash(settings: "Study", path: Path) -> str:
    """Return 16 hex digits that change with any file from which `read_own` makes the cells."""
    path = Path(path)
    used = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    used = [file for file in used if not file.name.startswith("cache-")]  # which datasets leaves beside a data set
    if settings.obs_table is not None:
        used.append(expanded_path("obs_table", settings.obs_table))
    names = gene_symbols.dictionary_of(paths.checkpoint_dir(settings.checkpoint))
    stats = {file: file.stat() for file in [*used, *filter(None, [names])]}
    digests = [_digest(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


@functools.cache
def _digest(file: Path, _size: int, _time: int) -> str:
    """Hash a file; again only when its size or time has changed."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def expanded_path(key: str, written: str) -> Path:
    """Return a path that the params file states for `key`: variables expanded, relative to the repository.

    Raises
    ------
    CellsError
        A $VARIABLE is not set, or there is nothing at this path.
    """
    refuse_unset(key, written)
    path = paths.user_path(written)
    if not path.exists():
        msg = f"{key}: {path} does not exist; set it to an h5ad file with raw counts."
        if key != "path":
            msg = f"{key}: {path} does not exist; set it to a file that does, or to null."
        raise CellsError(msg)
    return path


def refuse_unset(key: str, written: str) -> None:
    """Raise if the value of a parameter names a $VARIABLE that is not set, or empty."""
    unset = [name for pair in VARIABLE.findall(written) for name in pair if name and not os.environ.get(name)]
    if unset:
        remedy = f"type export {unset[0]}=/folder/of/the/data before you start"
        if unset[0] in MAKE_VARIABLES:
            remedy = "say it to make, as in make report STUDY=own_data DATA=cells.h5ad LABEL=celltype"
        what = "path" if "path" in key or "table" in key else "name"
        msg = (
            f"{key}: {written} needs the variable {unset[0]}, which is not set; {remedy}, or write the whole {what} "
            "into the params file."
        )
        raise CellsError(msg)


def read_h5ad_counts(path: Path, *, counts: str, ensembl_id: str | None, symbol: str | None) -> ad.AnnData:
    """Read raw counts, cells and genes of an h5ad file; its other layers, embeddings and graphs stay on disk.

    Parameters
    ----------
    path
        The h5ad file.
    counts
        Where the raw counts are: ``X``, ``raw``, or the name of a layer; ``auto`` takes the first of
        ``layers["counts"]``, ``raw`` and ``X`` that holds whole numbers, none below 0.
    ensembl_id
        var column of the gene identifiers (with ``raw``: of ``raw.var``). None takes the first of ``ensembl_id``, the
        index and the other columns that holds Ensembl identifiers (at least half of its values); without any,
        ``ensembl_id``, else the index.
    symbol
        var column of the gene symbols; None takes the first of `SYMBOL_COLUMNS` that is there, else the index.

    Returns
    -------
    AnnData (cells, genes): ``X`` as stored, as a sparse matrix by rows; ``obs`` as stored; ``var`` with ``ensembl_id``
    (without version, also the index) and ``symbol``; ``uns["recognised"]`` as `read_own`. A gene without identifier
    keeps its counts, which belong to the total of a cell, and goes by its index name. Genes that are the same without
    their version are summed.

    Raises
    ------
    CellsError
        No such file, layer or column; not an h5ad; no place with raw counts; an Ensembl identifier that stands twice.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path} does not exist; set path in the params file to an h5ad file with raw counts."
        raise CellsError(msg)
    try:
        with h5py.File(path) as file:
            places = _places(file)
            if counts == "auto":
                counts, matrix = _first_counts(file, path)
            elif counts not in places:
                msg = f"{path} has no counts in {counts!r}; set counts to one of: {', '.join(places)}."
                raise CellsError(msg)
            else:
                matrix = _read_sparse(file[places[counts]])
            obs = ad.io.read_elem(file["obs"])
            var = ad.io.read_elem(file["raw/var" if counts == "raw" else "var"])
    except CellsError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} could not be read as an h5ad file ({reason}); write it again with anndata's write_h5ad."
        raise CellsError(msg) from error
    found = counts if counts in ("X", "raw") else f"layers[{counts!r}]"
    where = f"{path.name}: {'raw.var' if counts == 'raw' else 'var'}"
    genes = _genes(var, ensembl_id, symbol, where)
    recognised = {"file": "h5ad", "counts": found, "gene identifiers": _where_from(var, ensembl_id, where)}
    return summed(matrix, obs, genes, recognised)


def read_10x(path: Path, *, ensembl_id: str | None, symbol: str | None) -> ad.AnnData:
    """Read the gene expression of a 10x file: an h5 of Cell Ranger, or a folder with a matrix, features and barcodes.

    Parameters
    ----------
    path
        The file or folder.
    ensembl_id, symbol
        As `read_h5ad_counts`; the columns are ``gene_ids``, ``gene_symbols`` and ``feature_types``.

    Returns
    -------
    As `read_h5ad_counts`; ``obs`` has the barcodes as index and no column.

    Raises
    ------
    CellsError
        A file is missing or damaged, the numbers of rows do not fit, or there is no gene expression in it.
    """
    path = Path(path)
    try:
        adata = _read_10x_folder(path) if path.is_dir() else _read_10x_h5(path)
    except CellsError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} could not be read as 10x data ({reason}); copy it again from the output of Cell Ranger."
        raise CellsError(msg) from error
    if "feature_types" in adata.var:
        is_gene = (adata.var["feature_types"] == "Gene Expression").to_numpy()
        if not is_gene.any():
            msg = f"{path} has no features of the type Gene Expression; choose a file that has."
            raise CellsError(msg)
        adata = adata[:, is_gene]
    where = f"{path.name}: features"
    genes = _genes(adata.var, ensembl_id, symbol, where)
    recognised = {
        "file": "10x folder" if path.is_dir() else "10x h5",
        "counts": "its matrix",
        "gene identifiers": _where_from(adata.var, ensembl_id, where),
    }
    return summed(sparse.csr_matrix(adata.X), adata.obs[[]].copy(), genes, recognised)


def read_tokenized(path: Path) -> ad.AnnData:
    """Read the cell table of a tokenized data set in the official Geneformer format (a ``.dataset`` folder).

    Returns
    -------
    AnnData (cells, 0): there are no counts. ``obs`` has every column with one value a cell, and ``length``; cells are
    named by the column ``cell`` if it is there, else by their row. ``uns["recognised"]`` says so.

    Raises
    ------
    CellsError
        The folder is damaged, or has no ``input_ids``.
    """
    import datasets  # takes a second, and other data sets do without it

    try:
        stored = datasets.load_from_disk(str(path))
    except (*UNREADABLE, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} could not be read as a tokenized data set ({reason}); copy the whole folder again."
        raise CellsError(msg) from error
    if not isinstance(stored, datasets.Dataset) or "input_ids" not in stored.column_names:
        msg = (
            f"{path} is no tokenized data set: it needs one table with a column input_ids; give that of the tokenizer."
        )
        raise CellsError(msg)
    plain = [name for name, kind in stored.features.items() if isinstance(kind, (datasets.Value, datasets.ClassLabel))]
    obs = stored.select_columns(plain).to_pandas()
    for name in plain:
        if isinstance(stored.features[name], datasets.ClassLabel):
            obs[name] = stored.features[name].int2str(obs[name])
    if "length" not in obs:
        ids = stored.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"].combine_chunks()
        obs["length"] = np.diff(ids.offsets.to_numpy())
    obs.index = obs["cell"].astype(str) if "cell" in obs else [f"row{number}" for number in range(len(obs))]
    var = pd.DataFrame({"ensembl_id": [], "symbol": []}, index=pd.Index([], dtype=str), dtype=str)
    recognised = {"file": "tokenized data set (official format)", "counts": "none: the cells are tokens already"}
    adata = ad.AnnData(sparse.csr_matrix((len(obs), 0), dtype=np.float32), obs=obs.rename_axis(None), var=var)
    adata.uns["recognised"] = recognised
    return adata


def read_pbmc68k() -> ad.AnnData:
    """Recover the raw counts of the 700 PBMC that scanpy carries in its package (no download).

    `scanpy.datasets.pbmc68k_reduced` holds log(1 + 10,000 count / total) of 765 highly variable genes, rounded to three
    decimals. In every cell the smallest value is a count of 1, so dividing by it gives the counts back. The quotients
    must be whole numbers (0.25 is the largest distance accepted, 0.11 the largest that occurs), and the total that they
    imply must be the ``n_counts`` that scanpy recorded, to 0.5 %.

    Lost for good: the genes that were not highly variable (about 80 % of the counts), the cells removed by the authors'
    quality control, and Ensembl identifiers: ``var["ensembl_id"]`` holds gene symbols, so that a study of these cells
    needs ``vocabulary: fit``.

    Returns
    -------
    AnnData (700, 765): counts in ``X`` (CSR, float32); ``obs["bulk_labels"]``, the cell type by similarity to sorted
    cells; ``obs["n_counts_all_genes"]``, the total over all genes of the original data.

    Raises
    ------
    CellsError
        The counts cannot be recovered, because scanpy changed the data set.

    Source: Zheng et al. 2017 (doi:10.1038/ncomms14049).
    """
    from scanpy.datasets import pbmc68k_reduced  # takes seconds, and other data sets do without it

    cells = pbmc68k_reduced()
    counts = recover_counts(cells.raw.X, totals=cells.obs["n_counts"].to_numpy())
    obs = cells.obs[["bulk_labels"]].copy()
    obs["n_counts_all_genes"] = cells.obs["n_counts"].to_numpy()
    names = cells.raw.var_names.to_numpy(str)
    genes = pd.DataFrame({"ensembl_id": names, "symbol": names}, index=pd.Index(names, name="gene"))
    return ad.AnnData(counts, obs=obs.rename_axis("cell"), var=genes)


def recover_counts(values: sparse.spmatrix, *, totals: np.ndarray) -> sparse.csr_matrix:
    """Turn log(1 + 10,000 count / total) back into counts, taking the smallest value of a cell as a count of 1.

    Parameters
    ----------
    values
        Log-normalised values, (cells, genes).
    totals
        Recorded total count of every cell, (cells,), against which the result is checked.

    Raises
    ------
    CellsError
        A cell has no value, does not give whole numbers, or does not give its recorded total.
    """
    scaled = sparse.csr_matrix(values, dtype=np.float64).expm1()
    scaled.eliminate_zeros()
    stored = np.diff(scaled.indptr)
    advice = "only log-normalised counts with at least one count of 1 in each cell can be turned back"
    if not stored.all():
        msg = f"{(stored == 0).sum()} cells have no value from which counts could be recovered; {advice}."
        raise CellsError(msg)
    unit = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])  # (cells,)
    counts = scaled.data / np.repeat(unit, stored)
    distance = np.abs(counts - counts.round()).max()
    if distance > 0.25:
        msg = f"The recovered counts are not whole numbers (off by {distance:.2f} at most); {advice}."
        raise CellsError(msg)
    wrong = ~np.isclose(10_000 / unit, totals, rtol=0.005)
    if wrong.any():
        msg = f"The recovered counts of {wrong.sum()} cells do not fit their recorded total; {advice}."
        raise CellsError(msg)
    return sparse.csr_matrix((counts.round().astype(np.float32), scaled.indices, scaled.indptr), shape=scaled.shape)


def resolve_versions(ids: pd.Series, where: str) -> np.ndarray:
    """Cut the version off Ensembl gene identifiers (ENSG00000141510.17 becomes ENSG00000141510).

    Parameters
    ----------
    ids
        Gene identifiers as text, (genes,); those of another form stay as they are.
    where
        File and table, for the message.

    Returns
    -------
    Identifiers, (genes,); one can stand more than once if its versions did.

    Raises
    ------
    CellsError
        An Ensembl identifier stands twice.
    """
    ids = ids.astype(str)
    twice = ids[ids.duplicated(keep=False) & ids.str.match(gene_symbols.ENSEMBL)]
    if len(twice):
        first = twice.iloc[0]
        msg = (
            f"{where}: the gene identifier {first} stands {(ids == first).sum()} times (identifiers that do: "
            f"{twice.nunique()}); sum the counts of each or keep one."
        )
        raise CellsError(msg)
    return ids.str.replace(VERSIONED, r"\1", regex=True).to_numpy(str)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "choose one of ..." with a hint at the choice most like `name`, for error messages."""
    choices = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f"choose one of: {shown or 'none, there is no other'}{hint}"


def _places(file: h5py.File) -> dict[str, str]:
    """Return where counts may be in the file: the value of the parameter, and the path in the file."""
    places = {"X": "X", "raw": "raw/X"} | {layer: f"layers/{layer}" for layer in file.get("layers", ())}
    return {name: place for name, place in places.items() if place in file}


def _first_counts(file: h5py.File, path: Path) -> tuple[str, sparse.csr_matrix]:
    """Return the first place of `AUTO` that holds raw counts, and its matrix."""
    places = _places(file)
    for name in AUTO:
        if name in places:
            matrix = _read_sparse(file[places[name]])
            if _are_counts(matrix.data):
                return name, matrix
    looked = ", ".join(name if name != "counts" else 'layers["counts"]' for name in AUTO if name in places)
    others = [name for name in places if name not in AUTO]
    advice = f"set counts to the layer that has them ({', '.join(others)})" if others else "give the cells before that"
    msg = (
        f"{path.name} has no raw counts in {looked or 'it'}: there are values that are no whole numbers, as after "
        f"normalisation; {advice}, or fractional_counts: true where counts are fractions by their protocol."
    )
    raise CellsError(msg)


def _are_counts(values: np.ndarray) -> bool:
    """Return whether values are whole numbers, none below 0 and not all 0."""
    if values.dtype.kind not in "iuf" or not values.any():
        return False
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all())


def _read_sparse(stored: h5py.Group | h5py.Dataset) -> sparse.csr_matrix:
    """Read a matrix by rows: a sparse one as it is, a dense one piece by piece."""
    if isinstance(stored, h5py.Dataset):
        pieces = [sparse.csr_matrix(stored[start : start + ROWS]) for start in range(0, max(len(stored), 1), ROWS)]
        return sparse.vstack(pieces, format="csr")
    return sparse.csr_matrix(ad.io.read_elem(stored))


def _is_10x(path: Path) -> bool:
    """Return whether a file is an h5 of Cell Ranger: a group ``matrix``, or before version 3 one for each genome."""
    try:
        with h5py.File(path) as file:
            groups = [group for group in file.values() if isinstance(group, h5py.Group)]
            return "obs" not in file and any("barcodes" in group for group in groups)
    except OSError:  # no HDF5, or a damaged one, which the reader of h5ad explains
        return False


def _read_10x_h5(path: Path) -> ad.AnnData:
    from scanpy import read_10x_h5  # takes seconds, and other data sets do without it

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # symbols; genes go by their identifiers
        adata = read_10x_h5(path, gex_only=False)
    adata.var = adata.var.rename_axis("gene_symbols").reset_index().set_index("gene_ids", drop=False).rename_axis(None)
    return adata


def _read_10x_folder(path: Path) -> ad.AnnData:
    """Read matrix, features (genes before Cell Ranger 3) and barcodes, each plain or gzipped."""
    features = _the_file(path, "features.tsv", "genes.tsv")
    table = pd.read_csv(features, sep="\t", header=None, dtype=str, keep_default_na=False)
    names = ["gene_ids", "gene_symbols", "feature_types"][: table.shape[1]]
    var = table.iloc[:, : len(names)].set_axis(names, axis=1)
    barcodes = pd.read_csv(_the_file(path, "barcodes.tsv"), sep="\t", header=None, dtype=str, keep_default_na=False)[0]
    matrix = sparse.csr_matrix(io.mmread(_the_file(path, "matrix.mtx")).T)  # the file has genes by cells
    if matrix.shape != (len(barcodes), len(var)):
        msg = (
            f"{path}: the matrix has {matrix.shape[1]} features and {matrix.shape[0]} barcodes, but the tables list "
            f"{len(var)} and {len(barcodes)}; take the three files from the same folder of Cell Ranger."
        )
        raise CellsError(msg)
    obs = pd.DataFrame(index=pd.Index(barcodes.to_numpy(str)))
    return ad.AnnData(matrix, obs=obs, var=var.set_index("gene_ids", drop=False).rename_axis(None))


def _the_file(folder: Path, *names: str) -> Path:
    """Return the first of these files, plain or gzipped, that is in the folder."""
    for name in names:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    msg = (
        f"{folder} has no {' or '.join(names)} (or .gz); set path to an h5ad, a 10x h5, or a folder with matrix.mtx, "
        "features.tsv and barcodes.tsv."
    )
    raise CellsError(msg)


def _genes(var: pd.DataFrame, ensembl_id: str | None, symbol: str | None, where: str) -> pd.DataFrame:
    """Return identifiers without version and symbols of the genes."""
    ids = _gene_column(var, _id_column(var, ensembl_id), "ensembl_id", where)
    known = next((name for name in SYMBOL_COLUMNS if name in var), None)
    symbols = _gene_column(var, symbol or known, "symbol", where)
    return pd.DataFrame({"ensembl_id": resolve_versions(ids, where), "symbol": symbols.to_numpy(str)})


def _id_column(var: pd.DataFrame, ensembl_id: str | None) -> str | None:
    """Return the var column with the gene identifiers by the rule of `read_h5ad_counts`; None for the index."""
    if ensembl_id is not None:
        return ensembl_id
    stated = ["ensembl_id"] if "ensembl_id" in var else []
    others = [name for name in var if name not in stated]
    for column in [*stated, None, *others]:
        values = var.index.to_series() if column is None else var[column]
        if not pd.api.types.is_numeric_dtype(values) and gene_symbols.are_ensembl(values):
            return column
    return next(iter(stated), None)


def _gene_column(var: pd.DataFrame, column: str | None, key: str, where: str) -> pd.Series:
    """Return a var column as text, or the index; the index too where the column has no text."""
    index = var.index.astype(str).to_series().reset_index(drop=True)
    if column is None:
        return index
    if column not in var:
        msg = f"{where} has no column {column!r} for {key}; {nearest(column, var.columns)}."
        raise CellsError(msg)
    values = var[column].reset_index(drop=True)
    absent = values.isna() | (values.astype(str).str.strip() == "")
    return values.astype(str).mask(absent, index)


def _where_from(var: pd.DataFrame, ensembl_id: str | None, where: str) -> str:
    """Say where the gene identifiers were found, and of what kind they are."""
    column = _id_column(var, ensembl_id)
    values = var.index.to_series() if column is None else var[column]
    kind = "Ensembl identifiers" if gene_symbols.are_ensembl(values) else "gene symbols"
    table = where.partition(": ")[2]
    return f"{kind} in {f'the index of {table}' if column is None else f'{table}[{column!r}]'}"


def summed(matrix: sparse.csr_matrix, obs: pd.DataFrame, genes: pd.DataFrame, recognised: dict[str, str]) -> ad.AnnData:
    """Make the AnnData; the counts of genes that have the same identifier are summed, which is noted."""
    first = ~genes["ensembl_id"].duplicated()
    if not first.all():
        codes, ids = pd.factorize(genes["ensembl_id"])
        ones = np.ones(len(codes), dtype=matrix.dtype)
        gather = sparse.csr_matrix((ones, (np.arange(len(codes)), codes)), shape=(len(codes), len(ids)))
        matrix, genes = sparse.csr_matrix(matrix @ gather), genes[first]
        recognised = recognised | {"genes summed": f"{(~first).sum():,}, which have the identifier of another one"}
    adata = ad.AnnData(matrix, obs=obs, var=genes.set_index("ensembl_id", drop=False).rename_axis("gene"))
    adata.uns["recognised"] = recognised
    return adata


def _with_ensembl(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    """Give genes that are named by symbols the Ensembl identifiers of a checkpoint's dictionary."""
    symbols = adata.var["ensembl_id"].to_numpy(str)
    try:
        ids, report = gene_symbols.to_ensembl(symbols, folder)
    except PickleError as error:
        raise CellsError(str(error)) from error
    recognised = adata.uns["recognised"] | {"symbols mapped": str(report)}
    genes = pd.DataFrame({"ensembl_id": ids, "symbol": symbols})
    return summed(adata.X, adata.obs, genes, recognised)


def _join_table(adata: ad.AnnData, written: str) -> ad.AnnData:
    """Give cells the columns of a csv or tsv whose first column names them; other cells have no value there."""
    path = expanded_path("obs_table", written)
    separator = "\t" if ".tsv" in path.suffixes or ".txt" in path.suffixes else ","
    try:
        table = pd.read_csv(path, sep=separator, index_col=0)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. ")[:200]
        msg = f"obs_table: {path} could not be read as a table ({reason}); write it as csv or tsv with a header."
        raise CellsError(msg) from error
    table.index = table.index.astype(str)
    if table.index.has_duplicates:
        first = table.index[table.index.duplicated()][0]
        msg = f"obs_table: {path.name} names the cell {first!r} more than once; keep one row a cell."
        raise CellsError(msg)
    known = adata.obs_names.isin(table.index)
    if not known.any():
        names = f"{table.index[0]!r}, those of the data like {adata.obs_names[0]!r}" if len(table) else "nothing"
        msg = (
            f"obs_table: none of the cells is in {path.name}, whose first column names cells like {names}; make the "
            "names the same."
        )
        raise CellsError(msg)
    obs = adata.obs.drop(columns=table.columns, errors="ignore").join(table)
    made = ad.AnnData(adata.X, obs=obs, var=adata.var, uns=adata.uns)
    made.uns["recognised"] = {**adata.uns["recognised"], "cell table": f"{known.sum():,} cells are in {path.name}"}
    return made
