"""Read cells with raw counts, which stay on disk where they are in an h5ad, and say what was recognised.

In: a file of yours (an h5ad, a 10x h5, a 10x folder), or the PBMC that scanpy carries; a tokenized data set in the
official format, which has no counts. Out: AnnData with counts in ``X``, the cell table in ``obs``,
``var["ensembl_id"]`` and ``var["symbol"]``; or one sentence that says what to change.
"""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import io, sparse

from tuneformer import paths
from tuneformer.artifacts import UserError, key, made
from tuneformer.data import counts, fetch
from tuneformer.data.counts import Counts
from tuneformer.data.refusals import expanded_path, explained, nearest, read_table
from tuneformer.data.unpickle import read_pickle
from tuneformer.study import Study

ENSEMBL = re.compile(r"^ENS([A-Z]*)G[0-9]{11}(\.[0-9]+)?(_PAR_Y)?$")
VERSIONED = re.compile(r"^(ENS[A-Z]*G[0-9]{11})\.[0-9]+(_PAR_Y)?$")
MOUSE_SYMBOL = re.compile(r"^(mt-)?[A-Z][a-z][A-Za-z0-9.-]*$")  # Gapdh, mt-Nd1; human symbols are capitals: GAPDH
MOST = 0.5  # of the names have to be of a kind before all are taken to be
AUTO = ("counts", "raw", "X")  # places that counts: auto looks at, in this order; the first is a layer
SYMBOL_COLUMNS = ("symbol", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "feature_name")


def read_own(path: Path, settings: Study) -> ad.AnnData:
    """Read cells of a user's own: an h5ad, a 10x h5 or folder, or a tokenized data set, and add ``obs_table``.

    Genes that go by symbols get the Ensembl identifiers of the checkpoint's dictionary of gene names, if it has one;
    counts of genes with the same identifier are summed. Returns and raises as `read_h5ad`; ``uns["recognised"]`` says,
    as text, what the file is, where counts and gene identifiers were found, and what was done to the genes.
    """
    if paths.is_token_folder(path):
        return read_tokenized(path)
    adata = read_10x(path, settings) if path.is_dir() or _is_10x(path) else read_h5ad(path, settings)
    if not are_ensembl(adata.var["ensembl_id"]):
        dictionary = fetch.gene_names(settings.checkpoint)
        if dictionary is not None:
            symbols = adata.var["ensembl_id"].to_numpy(str)
            ids, n_mapped = to_ensembl(symbols, dictionary)
            said = {"symbols mapped": f"{n_mapped:,} of {len(symbols):,} to Ensembl identifiers"}
            genes = pd.DataFrame({"ensembl_id": ids, "symbol": symbols})
            adata = summed(adata.X, adata.obs, genes, adata.uns["recognised"] | said)
    return adata if settings.obs_table is None else _with_table(adata, settings.obs_table)


def read_h5ad(path: Path, settings: Study) -> ad.AnnData:
    """Read raw counts, cells and genes of an h5ad file; its other layers, embeddings and graphs stay on disk.

    ``counts: auto`` takes the first of ``layers["counts"]``, ``raw`` and ``X`` that holds whole numbers, none below 0.
    Without ``ensembl_id``, the first of var["ensembl_id"], the index and the other columns counts that holds Ensembl
    identifiers (at least half of its values). A gene without identifier keeps its counts, which belong to the total of
    a cell, and goes by its index name.

    Returns
    -------
    AnnData (cells, genes): ``X`` as stored, as `Counts`; ``obs`` as stored; ``var`` with ``ensembl_id``
    (without version, also the index) and ``symbol``, each gene once; ``uns["recognised"]`` as `read_own`.

    Raises
    ------
    UserError
        No such layer or column; not an h5ad; no place with raw counts; an Ensembl identifier given twice.
    """
    name = settings.counts
    with explained(path, "an h5ad file", "write it again with anndata's write_h5ad"), h5py.File(path) as file:
        places = {"X": "X", "raw": "raw/X"} | {layer: f"layers/{layer}" for layer in file.get("layers", ())}
        places = {place: where for place, where in places.items() if where in file}
        if name == "auto":
            name = _first_counts(file, places, path)
        elif name not in places:
            msg = f"{path} has no counts in {name!r}; set counts to one of: {', '.join(places)}."
            raise UserError(msg)
        table = "raw.var" if name == "raw" else "var"
        obs, var = ad.io.read_elem(file["obs"]), ad.io.read_elem(file[table.replace(".", "/")])
    genes, found = _genes(var, settings, path.name, table)
    matrix = counts_of(path, places[name], settings)
    place = name if name in ("X", "raw") else f"layers[{name!r}]"
    return summed(matrix, obs, genes, {"file": "h5ad", "counts": place, "gene identifiers": found})


def counts_of(path: Path, place: str, settings: Study) -> Counts:
    """Return the counts at a place of an h5ad; a matrix by columns is written by rows once, beside the task's cells."""
    if not counts.is_by_columns(path, place):
        return Counts(path, place)
    number = key("by_rows", fetch.file_hash(path), place)
    folder = made(
        paths.by_rows_dir(settings),
        number,
        lambda partial: counts.write_by_rows(path, place, partial / counts.BY_ROWS),
    )
    return Counts(folder / counts.BY_ROWS, origin=place)


def read_10x(path: Path, settings: Study) -> ad.AnnData:
    """Read the gene expression of a 10x h5 or folder (matrix, features, barcodes); ``obs`` has no column.

    Returns and raises as `read_h5ad`; a file without gene expression is a UserError too.
    """
    if settings.counts not in ("auto", "X"):
        msg = f"{path} has no counts in {settings.counts!r}, but one matrix; set counts to X or auto."
        raise UserError(msg)
    with explained(path, "10x data", "copy it again from the output of Cell Ranger"):
        adata = _read_10x_folder(path) if path.is_dir() else _read_10x_h5(path)
    if "feature_types" in adata.var:
        adata = adata[:, (adata.var["feature_types"] == "Gene Expression").to_numpy()]
    if not adata.n_vars:
        msg = f"{path} has no features of the type Gene Expression; choose a file that has."
        raise UserError(msg)
    genes, found = _genes(adata.var, settings, path.name, "features")
    kind = "10x folder" if path.is_dir() else "10x h5"
    recognised = {"file": kind, "counts": "its matrix", "gene identifiers": found}
    return summed(sparse.csr_matrix(adata.X), adata.obs[[]].copy(), genes, recognised)


def read_tokenized(path: Path) -> ad.AnnData:
    """Read the cell table of a tokenized data set in the official Geneformer format (a ``.dataset`` folder).

    Returns
    -------
    AnnData (cells, 0): there are no counts. ``obs`` has every column with one value per cell, and ``length``; cells are
    named by the column ``cell`` if it is there, else by their row.

    Raises
    ------
    UserError
        The folder is damaged, or has no ``input_ids``.
    """
    import datasets  # takes a second, and other data sets do without it

    with explained(path, "a tokenized data set", "copy the whole folder again"):
        stored = datasets.load_from_disk(str(path))
    if not isinstance(stored, datasets.Dataset) or "input_ids" not in stored.column_names:
        msg = (
            f"{path} is no tokenized data set: it needs one table with a column input_ids, as the tokenizer writes it."
        )
        raise UserError(msg)
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
    matrix = sparse.csr_matrix((len(obs), 0), dtype=np.float32)
    return ad.AnnData(matrix, obs=obs.rename_axis(None), var=var, uns={"recognised": recognised})


def read_pbmc68k() -> ad.AnnData:
    """Recover the raw counts of the 700 PBMC that scanpy carries in its package (no download; Zheng et al. 2017).

    `scanpy.datasets.pbmc68k_reduced` holds log(1 + 10,000 count / total) of 765 highly variable genes. Lost for good
    are the other genes (about 80 % of the counts) and Ensembl identifiers: ``var["ensembl_id"]`` holds symbols.

    Returns AnnData (700, 765): ``obs["bulk_labels"]``, the cell type by similarity to sorted cells, and
    ``obs["n_counts_all_genes"]``, the total over all genes of the original data.
    """
    from scanpy.datasets import pbmc68k_reduced  # takes seconds, and other data sets do without it

    cells = pbmc68k_reduced()
    totals, names = cells.obs["n_counts"].to_numpy(), cells.raw.var_names.to_numpy(str)
    obs = cells.obs[["bulk_labels"]].assign(n_counts_all_genes=totals).rename_axis("cell")
    genes = pd.DataFrame({"ensembl_id": names, "symbol": names}, index=pd.Index(names, name="gene"))
    return ad.AnnData(recover_counts(cells.raw.X, totals=totals), obs=obs, var=genes)


def recover_counts(values: sparse.spmatrix, *, totals: np.ndarray) -> sparse.csr_matrix:
    """Turn log(1 + 10,000 count / total) back into counts, taking the smallest value of a cell as a count of 1.

    Quotients must be whole numbers (0.25 is the largest distance accepted; 0.11 the largest in pbmc68k), and imply the
    recorded `totals` (cells,) to 0.5 %; else, and for a cell without values, a UserError is raised.
    """
    scaled = sparse.csr_matrix(values, dtype=np.float64).expm1()
    scaled.eliminate_zeros()
    stored = np.diff(scaled.indptr)
    fault = ""
    if not stored.all():
        fault = f"{(stored == 0).sum()} cells have no value from which counts could be recovered"
    else:
        unit = np.minimum.reduceat(scaled.data, scaled.indptr[:-1])  # (cells,)
        counts = scaled.data / np.repeat(unit, stored)
        distance, wrong = np.abs(counts - counts.round()).max(), ~np.isclose(10_000 / unit, totals, rtol=0.005)
        if distance > 0.25:
            fault = f"The recovered counts are not whole numbers (off by {distance:.2f} at most)"
        elif wrong.any():
            fault = f"The recovered counts of {wrong.sum()} cells do not fit their recorded total"
    if fault:
        msg = f"{fault}; only log-normalised counts with at least one count of 1 in each cell can be turned back."
        raise UserError(msg)
    return sparse.csr_matrix((counts.round().astype(np.float32), scaled.indices, scaled.indptr), shape=scaled.shape)


def summed(
    matrix: sparse.csr_matrix | Counts, obs: pd.DataFrame, genes: pd.DataFrame, recognised: dict[str, str]
) -> ad.AnnData:
    """Make the AnnData; the counts of genes that have the same identifier are summed, which is noted."""
    first = ~genes["ensembl_id"].duplicated()
    if not first.all():
        codes, ids = pd.factorize(genes["ensembl_id"])
        if isinstance(matrix, Counts):
            matrix = matrix.summed(codes, len(ids))
        else:
            matrix = sparse.csr_matrix(matrix @ counts.gather(codes, len(ids), matrix.dtype))
        genes = genes[first]
        recognised = recognised | {"genes summed": f"{(~first).sum():,}, which have the identifier of another one"}
    var = genes.set_index("ensembl_id", drop=False).rename_axis("gene")
    return ad.AnnData(matrix, obs=obs, var=var, uns={"recognised": recognised})


def to_ensembl(symbols: Iterable[str], dictionary: Path) -> tuple[np.ndarray, int]:
    """Replace gene symbols by the Ensembl identifiers of Geneformer's dictionary of gene names.

    A symbol is looked up as it is, and else in capitals (no two symbols of the official dictionaries differ in case
    only). What is not found stays as it is: its counts belong to the total of a cell. Returns the identifiers,
    (genes,), of which several can be the same; and how many symbols were found.
    """
    known = read_pickle(dictionary)
    in_capitals = {name.upper(): gene for name, gene in known.items()}
    symbols = list(symbols)
    found = [known.get(name) or in_capitals.get(name.upper()) for name in symbols]
    ids = [gene or name for gene, name in zip(found, symbols, strict=True)]
    return np.array(ids, dtype=str), sum(gene is not None for gene in found)


def are_ensembl(names: pd.Series) -> bool:
    """Return whether at least half of the names are Ensembl gene identifiers, with or without version."""
    return bool(len(names)) and names.astype(str).str.match(ENSEMBL).mean() >= MOST


def foreign_species(ids: Iterable[str], symbols: Iterable[str]) -> tuple[str, str] | None:
    """Say of which species the genes are, and by which gene that was seen; None if human, or if nothing tells.

    Ensembl identifiers tell (ENSMUSG...: mouse); without them, symbols in mixed case (Gapdh, mt-Nd1) are those of mouse
    or rat.
    """
    ids, symbols = (pd.Series(list(names), dtype=str) for names in (ids, symbols))
    species = ids.str.extract(ENSEMBL)[0].dropna()
    if len(species) >= MOST * len(ids):
        foreign = species[species != ""]
        if len(foreign) <= MOST * len(species):
            return None
        return ("mouse" if foreign.iloc[0] == "MUS" else "another species", ids[foreign.index[0]])
    mouse = symbols[symbols.str.match(MOUSE_SYMBOL)]
    return ("mouse or rat", mouse.iloc[0]) if len(mouse) > MOST * len(symbols) else None


def _first_counts(file: h5py.File, places: dict[str, str], path: Path) -> str:
    """Return the first place of `AUTO` that holds raw counts."""
    looked = [name for name in AUTO if name in places]
    for name in looked:
        if _are_counts(file[places[name]]):
            return name
    shown = ", ".join(name if name != "counts" else 'layers["counts"]' for name in looked)
    others = [name for name in places if name not in AUTO]
    advice = f"set counts to the layer that has them ({', '.join(others)})" if others else "give the cells before that"
    msg = (
        f"{path.name} has no raw counts in {shown or 'it'}: there are values that are no whole numbers, as after "
        f"normalisation; {advice}, or fractional_counts: true where counts are fractions by their protocol."
    )
    raise UserError(msg)


def _are_counts(stored: h5py.Group | h5py.Dataset) -> bool:
    """Return whether the values of a matrix are whole numbers, none below 0 and not all 0."""
    stored = stored["data"] if isinstance(stored, h5py.Group) else stored
    if stored.dtype.kind not in "iuf":
        return False
    step, found = max(1, counts.VALUES // max(int(np.prod(stored.shape[1:])), 1)), False
    for start in range(0, len(stored), step):
        values = stored[start : start + step]
        if not (np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all()):
            return False
        found |= bool(values.any())
    return found


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
    """Read matrix, features (genes before Cell Ranger 3) and barcodes, each plain or gzipped (scanpy: not each)."""

    def the(*names: str) -> Path:
        for file in (path / f"{name}{ending}" for name in names for ending in ("", ".gz")):
            if file.is_file():
                return file
        msg = (
            f"{path} has no {' or '.join(names)} (or .gz); set path to an h5ad, a 10x h5, or a folder with matrix.mtx, "
            "features.tsv and barcodes.tsv."
        )
        raise UserError(msg)

    options = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    features = pd.read_csv(the("features.tsv", "genes.tsv"), **options).iloc[:, :3]
    features.columns = ["gene_ids", "gene_symbols", "feature_types"][: features.shape[1]]
    barcodes = pd.read_csv(the("barcodes.tsv"), **options)[0]
    matrix = sparse.csr_matrix(io.mmread(the("matrix.mtx")).T)  # the file has genes by cells
    if matrix.shape != (len(barcodes), len(features)):
        msg = (
            f"{path}: the matrix has {matrix.shape[1]} features and {matrix.shape[0]} barcodes, but the tables list "
            f"{len(features)} and {len(barcodes)}; take the three files from the same folder of Cell Ranger."
        )
        raise UserError(msg)
    obs = pd.DataFrame(index=pd.Index(barcodes.to_numpy(str)))
    return ad.AnnData(matrix, obs=obs, var=features.set_index("gene_ids", drop=False).rename_axis(None))


def _genes(var: pd.DataFrame, settings: Study, file: str, table: str) -> tuple[pd.DataFrame, str]:
    """Return identifiers (without version) and symbols of the genes, and where the identifiers were found."""
    index = var.index.astype(str).to_series().reset_index(drop=True)

    def column(name: str | None, key: str) -> pd.Series:
        if name is None:
            return index
        if name not in var:
            msg = f"{file}: {table} has no column {name!r} for {key}; {nearest(name, var.columns)}."
            raise UserError(msg)
        values = var[name].reset_index(drop=True)
        return values.astype(str).mask(values.isna() | (values.astype(str).str.strip() == ""), index)

    stated = ["ensembl_id"] if "ensembl_id" in var else []
    name = settings.ensembl_id
    if name is None:
        texts = [other for other in var if other not in stated and not pd.api.types.is_numeric_dtype(var[other])]
        places = (place for place in [*stated, None, *texts] if are_ensembl(column(place, "ensembl_id")))
        name = next(places, stated[0] if stated else None)
    ids = column(name, "ensembl_id")
    twice = ids[ids.duplicated(keep=False) & ids.str.match(ENSEMBL)]
    if len(twice):
        msg = (
            f"{file}: {table}: the gene identifier {twice.iloc[0]} is given {(ids == twice.iloc[0]).sum()} times "
            f"(identifiers given more than once: {twice.nunique()}); sum the counts of each or keep one."
        )
        raise UserError(msg)
    symbols = column(settings.symbol or next((known for known in SYMBOL_COLUMNS if known in var), None), "symbol")
    kind = "Ensembl identifiers" if are_ensembl(ids) else "gene symbols"
    where = f"the index of {table}" if name is None else f"{table}[{name!r}]"
    ids = ids.str.replace(VERSIONED, r"\1", regex=True).to_numpy(str)
    return pd.DataFrame({"ensembl_id": ids, "symbol": symbols.to_numpy(str)}), f"{kind} in {where}"


def _with_table(adata: ad.AnnData, written: str) -> ad.AnnData:
    """Give cells the columns of a csv or tsv whose first column names them; other cells have no value there."""
    path = expanded_path("obs_table", written)
    table = read_table("obs_table", path, index_col=0, dtype={0: str})  # names such as 007 stay as they are
    table.index = table.index.astype(str)
    if table.index.has_duplicates:
        first = table.index[table.index.duplicated()][0]
        msg = f"obs_table: {path.name} names the cell {first!r} more than once; keep one row per cell."
        raise UserError(msg)
    known = adata.obs_names.isin(table.index)
    if not known.any():
        names = f"{table.index[0]!r}, those of the data like {adata.obs_names[0]!r}" if len(table) else "nothing"
        msg = (
            f"obs_table: none of the cells is in {path.name}, whose first column names cells like {names}; make the "
            "names the same."
        )
        raise UserError(msg)
    obs = adata.obs.drop(columns=table.columns, errors="ignore").join(table)
    said = {"cell table": f"{known.sum():,} cells are in {path.name}"}
    return ad.AnnData(adata.X, obs=obs, var=adata.var, uns={"recognised": adata.uns["recognised"] | said})
