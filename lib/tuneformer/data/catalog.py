"""Which cells a study means.

In: a study (`dataset` and, for your own file, `path`). Out: its cells with raw counts, and a hash of their source.
"""

import functools
import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

import anndata as ad

from tuneformer.data import readers, simulate
from tuneformer.data.readers import CellsError
from tuneformer.study import paths
from tuneformer.study.params import Study
from tuneformer.study.run import fingerprint

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def load_cells(settings: Study) -> ad.AnnData:
    """Load the cells of a study, as they are before quality control.

    Returns
    -------
    AnnData (cells, genes): raw counts in ``X`` (sparse, by rows), ``var["ensembl_id"]``, ``var["symbol"]``,
    ``uns["dataset"]``: name, simulated (bool), hash (of the source, see `source_hash`).

    Raises
    ------
    CellsError
        The file cannot be found or read (see `readers.read_h5ad_counts`), or the data set has no loader.
    """
    source = {"name": settings.dataset, "simulated": settings.simulated, "hash": source_hash(settings)}
    if settings.dataset == "demo":
        adata = simulate.simulate_sciplex2(settings.demo_cells, seed=settings.demo_seed)
    elif settings.dataset == "pbmc68k":
        adata = readers.read_pbmc68k()
    else:
        adata = readers.read_h5ad_counts(
            own_path(settings), counts=settings.counts, ensembl_id=settings.ensembl_id, symbol=settings.symbol
        )
        source["name"] = own_path(settings).stem
    adata.uns["dataset"] = source
    return adata


def source_hash(settings: Study) -> str:
    """Return 16 hex digits that change when the cells before quality control change, without loading them.

    Of a small draw of the simulator, number and seed (demo), of the file that scanpy carries (pbmc68k), of the file
    (own).

    Raises
    ------
    CellsError
        As `load_cells`.
    """
    if settings.dataset == "demo":
        return fingerprint(_draw_hash(), settings.demo_cells, settings.demo_seed)
    if settings.dataset == "pbmc68k":
        package = Path(find_spec("scanpy").origin).parent
        return _file_hash(package / "datasets" / "10x_pbmc68k_reduced.h5ad")
    return _file_hash(own_path(settings))


@functools.cache
def _draw_hash() -> str:
    """Hash what the simulator draws for a few cells: another model, other constants or other random numbers show."""
    adata = simulate.simulate_sciplex2(64, seed=0)
    text = adata.obs.to_csv(lineterminator="\n")
    return hashlib.sha256(adata.X.toarray().tobytes() + text.encode()).hexdigest()[:16]


def own_path(settings: Study) -> Path:
    """Return the h5ad file of a study: variables expanded, relative to the repository.

    Raises
    ------
    CellsError
        A $VARIABLE is not set, there is no such file, or the data set is one that cannot be downloaded yet.
    """
    if settings.dataset == "sciplex2":
        msg = (
            "dataset: sciplex2 cannot be downloaded yet; get SrivatsanTrapnell2020_sciplex2.h5ad from Zenodo record "
            "13350497, and set dataset: own and path to the file."
        )
        raise CellsError(msg)
    unset = [name for pair in _VARIABLE.findall(settings.path) for name in pair if name and name not in os.environ]
    if unset:
        msg = (
            f"path: {settings.path} needs the variable {unset[0]}, which is not set; type "
            f"export {unset[0]}=/folder/of/the/data before you start, or write the whole path into the params file."
        )
        raise CellsError(msg)
    path = paths.user_path(settings.path)
    if not path.is_file():
        msg = f"path: {path} does not exist; set it to an h5ad file with raw counts."
        raise CellsError(msg)
    return path


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
