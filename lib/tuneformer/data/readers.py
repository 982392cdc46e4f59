"""Read cells with raw counts, without ever holding a dense copy of them.

In: an h5ad file, or the PBMC that scanpy carries. Out: AnnData with sparse counts in ``X``, the cell table in ``obs``,
``var["ensembl_id"]`` and ``var["symbol"]``; or a `CellsError` that says what to change.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

VERSIONED = re.compile(r"^(ENS[A-Z]*G[0-9]{11})\.[0-9]+(_PAR_Y)?$")
ROWS = 4000  # rows of a dense file that are read at once


class CellsError(ValueError):
    """Cells that cannot be used; the message says what is wrong, where, and what to do."""


def read_h5ad_counts(path: Path, *, counts: str, ensembl_id: str | None, symbol: str | None) -> ad.AnnData:
    """Read raw counts, cells and genes of an h5ad file; its other layers, embeddings and graphs stay on disk.

    Parameters
    ----------
    path
        The h5ad file.
    counts
        Where the raw counts are: ``X``, ``raw``, or the name of a layer.
    ensembl_id
        var column of the gene identifiers (with ``raw``: of ``raw.var``); None takes ``ensembl_id``, else the index.
    symbol
        var column of the gene symbols; None takes ``symbol``, else the index.

    Returns
    -------
    AnnData (cells, genes): ``X`` as stored, as a sparse matrix by rows; ``obs`` as stored; ``var`` with ``ensembl_id``
    (without version, also the index) and ``symbol``. A gene without identifier keeps its counts, which belong to the
    total of a cell, and goes by its index name.

    Raises
    ------
    CellsError
        No such file, layer or column; not an h5ad; a gene identifier that stands twice, or does so once its version
        is cut off.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path} does not exist; set path in the params file to an h5ad file with raw counts."
        raise CellsError(msg)
    try:
        with h5py.File(path) as file:
            places = _places(file)
            if counts not in places:
                msg = f"{path} has no counts in {counts!r}; set counts to one of: {', '.join(places)}."
                raise CellsError(msg)
            matrix = _read_sparse(file[places[counts]])
            obs = ad.io.read_elem(file["obs"])
            var = ad.io.read_elem(file["raw/var" if counts == "raw" else "var"])
    except CellsError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} could not be read as an h5ad file ({reason}); write it again with anndata's write_h5ad."
        raise CellsError(msg) from error
    where = f"{path.name}: {'raw.var' if counts == 'raw' else 'var'}"
    ids = _gene_column(var, ensembl_id, "ensembl_id", where)
    symbols = _gene_column(var, symbol, "symbol", where)
    genes = pd.DataFrame({"ensembl_id": resolve_versions(ids, where), "symbol": symbols.to_numpy(str)})
    return ad.AnnData(matrix, obs=obs, var=genes.set_index("ensembl_id", drop=False).rename_axis("gene"))


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
    Identifiers, (genes,), each of which stands once.

    Raises
    ------
    CellsError
        An identifier stands twice, before or after its version is cut off.
    """
    ids = ids.astype(str)
    twice = ids[ids.duplicated(keep=False)]
    if len(twice):
        first = twice.iloc[0]
        msg = (
            f"{where}: the gene identifier {first} stands {(ids == first).sum()} times (identifiers that do: "
            f"{twice.nunique()}); sum the counts of each or keep one."
        )
        raise CellsError(msg)
    resolved = ids.str.replace(VERSIONED, r"\1", regex=True)
    clash = resolved.duplicated(keep=False)
    if clash.any():
        first = resolved[clash].iloc[0]
        versions = " and ".join(ids[resolved == first])
        msg = (
            f"{where}: {versions} are the same gene without their version (such genes: "
            f"{resolved[clash].nunique()}); sum the counts of each or keep one version."
        )
        raise CellsError(msg)
    return resolved.to_numpy(str)


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


def _read_sparse(stored: h5py.Group | h5py.Dataset) -> sparse.csr_matrix:
    """Read a matrix by rows: a sparse one as it is, a dense one piece by piece."""
    if isinstance(stored, h5py.Dataset):
        pieces = [sparse.csr_matrix(stored[start : start + ROWS]) for start in range(0, max(len(stored), 1), ROWS)]
        return sparse.vstack(pieces, format="csr")
    return sparse.csr_matrix(ad.io.read_elem(stored))


def _gene_column(var: pd.DataFrame, column: str | None, default: str, where: str) -> pd.Series:
    """Return a var column by the rule of the parameters `ensembl_id` and `symbol`; the index where it has no text."""
    index = var.index.astype(str).to_series().reset_index(drop=True)
    if column is None and default not in var:
        return index
    if (column or default) not in var:
        msg = f"{where} has no column {column!r} for {default}; {nearest(column, var.columns)}."
        raise CellsError(msg)
    values = var[column or default].reset_index(drop=True)
    absent = values.isna() | (values.astype(str).str.strip() == "")
    return values.astype(str).mask(absent, index)
