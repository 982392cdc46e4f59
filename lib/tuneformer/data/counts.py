"""Counts that stay on disk: a few cells in memory at a time, however many there are.

In: a matrix, cells by genes, in an HDF5 file (by rows, by columns or dense), or AnnData of any layout. Out: `Counts`,
which AnnData takes as its ``X`` and which reads the rows that are asked for; chunks of cells; and files by rows.
"""

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from anndata.abc import CSRDataset
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data.refusals import explained

CELLS = 2000  # in memory at once
VALUES = 20_000_000  # of a dense matrix, or of a matrix by columns, in memory at once
APART = 32  # rows; what lies between rows that are closer is read with them, in one piece
FEW_VALUES = 10  # cells with at most so many genes may agree by chance
BAND = 5000  # cells whose entries are sorted in memory at once
BY_ROWS = "counts.h5"  # name of a file with one matrix as its X
AGAIN = "write it again with anndata's write_h5ad"

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and values of some entries of a matrix."""


class Counts(CSRDataset):
    """A matrix in an HDF5 file, by rows or dense, of which ``counts[rows]`` are read as a CSR matrix without zeros.

    Taking rows, summing columns and changing the type are only noted, and done to what is read. That the file has
    changed or is gone since it was first opened, or is damaged, is a UserError.
    """

    format, backend = "csr", "hdf5"

    def __init__(self, path: Path, place: str = "X", *, origin: str | None = None) -> None:
        self.path, self.place, self.origin = Path(path), place, origin or place
        self._state = _state(self.path)
        with self._opened() as stored:
            self._bounds = None
            if isinstance(stored, h5py.Group):
                on_disk = ad.io.sparse_dataset(stored)
                self._size, self.dtype = on_disk.shape, on_disk.dtype
                self._bounds = stored["indptr"][:].astype(np.int64)  # where the rows begin
                if len(self._bounds) != self._size[0] + 1 or (np.diff(self._bounds) < 0).any():
                    msg = "its indptr falls, or is not that of its shape"
                    raise ValueError(msg)
            else:
                self._size, self.dtype = stored.shape, stored.dtype
        self._rows = np.arange(self._size[0])
        self._codes = None

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self._rows), self._size[1] if self._codes is None else self._n_genes

    def taken(self, rows: np.ndarray) -> "Counts":
        """Return some rows, by their places."""
        taken = copy.copy(self)
        taken._rows = self._rows[rows]
        return taken

    def summed(self, codes: np.ndarray, n_genes: int) -> "Counts":
        """Return `n_genes` columns, each the sum of the columns with its code; those with -1 are left out."""
        summed = copy.copy(self)
        summed._codes = np.asarray(codes)
        if self._codes is not None:
            summed._codes = np.where(self._codes >= 0, summed._codes[self._codes], -1)
        summed._n_genes = n_genes
        return summed

    def astype(self, dtype: Any) -> "Counts":
        """Return the same values as another type."""
        changed = copy.copy(self)
        changed.dtype = np.dtype(dtype)
        return changed

    def copy(self) -> "Counts":
        """Return itself, since nothing changes it."""
        return self

    def to_memory(self) -> sparse.csr_matrix:
        """Read everything."""
        return self[:]

    def notes(self) -> dict[str, Any]:
        """Return the place in the source and what was done to it, for `with_notes`."""
        codes = {} if self._codes is None else {"codes": self._codes, "n_genes": self._n_genes}
        return {"place": self.origin, "rows": self._rows, "dtype": self.dtype.str} | codes

    def with_notes(self, notes: dict[str, Any]) -> "Counts":
        """Return the rows, columns and type that `notes` of counts of the same place say."""
        counts = self.taken(notes["rows"]).astype(notes["dtype"])
        return counts.summed(notes["codes"], int(notes["n_genes"])) if "codes" in notes else counts

    def __getitem__(self, index: Any) -> sparse.csr_matrix:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        wanted, places = np.unique(np.atleast_1d(self._rows[rows]), return_inverse=True)
        with self._opened() as stored:
            most = CELLS if self._bounds is not None else max(1, VALUES // max(self._size[1], 1))
            is_end = (np.diff(wanted) > APART) | (np.diff(wanted // most) > 0)
            pieces = np.split(wanted, np.flatnonzero(is_end) + 1) if len(wanted) else ()
            parts = [self._piece(stored, rows) for rows in pieces]
        parts = parts or [sparse.csr_matrix((0, self._size[1]), dtype=self.dtype)]
        read = parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
        if self._codes is not None:
            read = read @ gather(self._codes, self._n_genes, read.dtype)
        read = read.astype(self.dtype, copy=False)
        read = read if np.array_equal(places.ravel(), np.arange(len(wanted))) else read[places.ravel()]
        if isinstance(columns, slice) and columns == slice(None):
            return read
        return read[:, np.ravel(columns) if isinstance(columns, np.ndarray) else columns]

    def _piece(self, stored: h5py.Group | h5py.Dataset, rows: np.ndarray) -> sparse.csr_matrix:
        """Read rows that lie close together in the file, rising and each once."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        if self._bounds is None:
            return sparse.csr_matrix(stored[first:last][rows - first])
        bounds = self._bounds[first : last + 1]
        values, genes = (stored[name][bounds[0] : bounds[-1]] for name in ("data", "indices"))
        piece = sparse.csr_matrix((values, genes, bounds - bounds[0]), shape=(last - first, self._size[1]))
        piece.check_format(full_check=True)
        piece = piece if len(rows) == last - first else piece[rows - first]
        piece.eliminate_zeros()
        return piece

    @contextmanager
    def _opened(self) -> Iterator[h5py.Group | h5py.Dataset]:
        """Open the file; its errors become one sentence."""
        if self._state is None or _state(self.path) != self._state:
            what = "has changed since its cells were read" if self.path.is_file() else "is gone"
            msg = f"{self.path} {what}; put it back as it was, or start again with 01_qc."
            raise UserError(msg)
        with explained(f"{self.path}: {self.place}", "counts", AGAIN), h5py.File(self.path) as file:
            yield file[self.place]


def gather(codes: np.ndarray, n_genes: int, dtype: Any) -> sparse.csr_matrix:
    """Return what a matrix is multiplied by so that columns with the same code are summed; -1 leaves one out."""
    kept = np.flatnonzero(codes >= 0)
    return sparse.csr_matrix((np.ones(len(kept), dtype), (kept, codes[kept])), shape=(len(codes), n_genes))


def taken(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    """Return a copy of some cells, by their places; counts on disk stay there."""
    if not isinstance(adata.X, Counts):
        return adata[rows].copy()
    return ad.AnnData(adata.X.taken(rows), obs=adata.obs.iloc[rows].copy(), var=adata.var.copy(), uns=adata.uns.copy())


def taken_genes(adata: ad.AnnData, kept: np.ndarray) -> ad.AnnData:
    """Return a copy of the cells with some genes, given whether each is kept; counts on disk stay there."""
    if not isinstance(adata.X, Counts):
        return adata[:, kept].copy()
    values = adata.X.summed(np.where(kept, np.cumsum(kept) - 1, -1), int(kept.sum()))
    return ad.AnnData(values, obs=adata.obs.copy(), var=adata.var[kept].copy(), uns=adata.uns.copy())


def chunks(adata: ad.AnnData, cells: int | None = None) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Give the counts of a few cells at a time, by rows: their places, and the matrix.

    Whatever the layout, and whether in memory or backed by a file, also of selected cells and genes. A backed matrix by
    columns is written by rows first, into a temporary file (below TMPDIR) that is removed at the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        if adata.isbacked:
            adata = _unbacked(adata, Path(folder))
        elif getattr(adata[:1].X, "format", "csr") == "csc":
            adata = ad.AnnData(sparse.csr_matrix(adata.X), obs=adata.obs[[]])
        cells = cells or CELLS
        step = cells if sparse.issparse(adata[:1].X) else max(1, min(cells, VALUES // max(adata.n_vars, 1)))
        for start in range(0, adata.n_obs, step):
            part = slice(start, min(start + step, adata.n_obs))
            values = sparse.csr_matrix(adata[part].X)
            if not values.data.all():
                values = values.copy()
                values.eliminate_zeros()
            yield part, values


def hashes(values: sparse.csr_matrix) -> np.ndarray:
    """Return a number for each row of a matrix, as `list_hashes`."""
    values = values.sorted_indices()
    return list_hashes(values.indptr, values.indices.astype(np.int32), values.data)


def list_hashes(bounds: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Return a number for each list between two `bounds`, uint64: equal lists have equal ones, and short ones have 0.

    `parts` are what the lists are of; those of `FEW_VALUES` or less may agree by chance.
    """
    digests = (
        hashlib.blake2b(b"".join(part[start:end].tobytes() for part in parts), digest_size=8).digest()
        if end - start > FEW_VALUES
        else bytes(8)
        for start, end in pairwise(bounds.tolist())
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _unbacked(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    """Return the cells of a backed AnnData, or of a view of one, with `Counts` as ``X``."""
    path = Path(adata.filename)
    if is_by_columns(path, "X"):
        path = folder / BY_ROWS
        write_by_rows(adata.filename, "X", path)
    counts = Counts(path)
    if adata.is_view:
        codes = np.full(counts.shape[1], -1)
        codes[adata._vidx] = np.arange(adata.n_vars)
        counts = counts.taken(adata._oidx).summed(codes, adata.n_vars)
    return ad.AnnData(counts, obs=adata.obs[[]])


def is_by_columns(path: Path, place: str) -> bool:
    """Return whether a matrix is stored by columns, so that its rows cannot be read."""
    with explained(f"{path}: {place}", "counts", AGAIN), h5py.File(path) as file:
        return isinstance(file[place], h5py.Group) and ad.io.sparse_dataset(file[place]).format == "csc"


def write_by_rows(path: Path, place: str, target: Path) -> None:
    """Write a matrix that is stored by columns again, by rows."""
    with explained(f"{path}: {place}", "counts", AGAIN), h5py.File(path) as file:
        pieces = by_row(_column_entries(file[place]), ad.io.sparse_dataset(file[place]).shape)
        write(target, (piece for _, piece in pieces))


def _column_entries(stored: h5py.Group) -> Iterator[Entries]:
    """Give the entries of a matrix by columns, some columns at a time."""
    bounds, start = stored["indptr"][:], 0
    while start < len(bounds) - 1:
        stop = max(start + 1, int(np.searchsorted(bounds, bounds[start] + VALUES, side="right")) - 1)
        rows, values = (stored[name][bounds[start] : bounds[stop]] for name in ("indices", "data"))
        yield rows, np.repeat(np.arange(start, stop), np.diff(bounds[start : stop + 1])), values
        start = stop


def by_row(
    parts: Iterable[Entries], shape: tuple[int, int], *, n_cells: int | None = None, dtype: Any = None
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Sort entries that come in any order by their row, on disk; entries of the same place are summed.

    Parameters
    ----------
    shape
        Of the matrix that the entries make.
    n_cells
        How many cells the entries are of, if not as many as there are rows: it says how many are sorted at once.
    dtype
        Of the matrix, in which is summed; None: that of the values.

    Returns
    -------
    The matrix in several pieces of consecutive rows, each with the number of its first row.
    """
    n_bands = max(1, min(shape[0], -(-(n_cells or shape[0]) // BAND)))
    bounds = np.arange(n_bands + 1) * shape[0] // n_bands
    band_of = np.repeat(np.arange(n_bands, dtype=np.int16), np.diff(bounds))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(band) for band in range(n_bands)]
        kind = np.dtype([("row", np.int32), ("column", np.int32), ("value", np.float32)])
        for rows, columns, values in parts:
            if len(rows) and not 0 <= rows.min() <= rows.max() < shape[0]:
                msg = "indices are outside of the matrix"
                raise ValueError(msg)
            kind = np.dtype([("row", np.int32), ("column", np.int32), ("value", values.dtype)])
            entries = np.empty(len(rows), kind)
            band = band_of[rows]
            order = np.argsort(band, kind="stable")  # of small numbers: a radix sort
            for name, given in zip(kind.names, (rows, columns, values), strict=True):
                entries[name] = given[order]
            for number, part in enumerate(np.split(entries, np.cumsum(np.bincount(band, minlength=n_bands))[:-1])):
                with files[number].open("ab") as file:
                    part.tofile(file)
        for file, (first, last) in zip(files, pairwise(bounds), strict=True):
            entries = np.fromfile(file, kind) if file.is_file() else np.empty(0, kind)
            places = entries["row"] - first, entries["column"]
            values = entries["value"].astype(dtype or kind["value"])
            yield int(first), sparse.csr_matrix((values, places), shape=(last - first, shape[1]))
            file.unlink(missing_ok=True)


def write(path: Path, blocks: Iterable[sparse.csr_matrix]) -> None:
    """Write blocks of rows below each other, as ``X`` of the h5ad at `path`, which may be there already."""
    with h5py.File(path, "a") as file:
        for block in blocks:
            if "X" in file:
                ad.io.sparse_dataset(file["X"]).append(block)
            else:
                first = sparse.csr_matrix(block)
                first.indptr = first.indptr.astype(np.int64)  # there may be more than 2^31 values in the end
                ad.io.write_elem(file, "X", first, dataset_kwargs={"compression": "lzf"})


def collected(
    blocks: Iterable[sparse.csr_matrix], folder: Path | None
) -> tuple[sparse.csr_matrix | Counts, np.ndarray]:
    """Put blocks of rows below each other, in memory or in a new file in `folder`; return also the sum of each row."""
    totals = []

    def summed() -> Iterator[sparse.csr_matrix]:
        for block in blocks:
            totals.append(np.asarray(block.sum(axis=1, dtype=np.float64)).ravel())
            yield block

    if folder is None:
        matrix = sparse.vstack(list(summed()), format="csr")
    else:
        path = Path(tempfile.mkdtemp(dir=folder)) / BY_ROWS
        write(path, summed())
        matrix = Counts(path)
    return matrix, np.concatenate(totals)


def write_cells(path: Path, cells: ad.AnnData) -> None:
    """Write cells as an h5ad; of counts on disk only where they are."""
    if not isinstance(cells.X, Counts):
        cells.write_h5ad(path, compression="lzf")
        return
    uns = {**cells.uns, "counts": cells.X.notes()}
    ad.AnnData(obs=cells.obs, var=cells.var, uns=uns).write_h5ad(path, compression="lzf")


def read_cells(path: Path, source: Callable[[str], Counts] | None = None) -> ad.AnnData:
    """Read cells whose counts stay on disk: in `path` itself, or where it says; `source` gives those of a place."""
    with explained(path, "cells", "delete it and make it again"), h5py.File(path) as file:
        parts = {name: ad.io.read_elem(file[name]) for name in ("obs", "var", "uns")}
    notes = parts["uns"].pop("counts", None)
    return ad.AnnData(Counts(path) if notes is None else source(notes["place"]).with_notes(notes), **parts)


def _state(path: Path) -> tuple[int, int] | None:
    """Return size and time of a file; None if it is not there."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
