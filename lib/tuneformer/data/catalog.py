"""Which cells a study means, and what is known of the data sets that can be downloaded.

In: a study (`dataset` and, for your own file, `path`). Out: its cells with raw counts, and a hash of their source.
"""

import functools
import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import anndata as ad

from tuneformer.data import checkpoint_files, gene_symbols, readers, sciplex, simulate
from tuneformer.data.download import HubPath, RemoteFile, RemoteFolder, content_hash, fetch
from tuneformer.data.gene_symbols import DICTIONARY
from tuneformer.data.simulate_pancreas import simulate_pancreas
from tuneformer.study import paths
from tuneformer.study.params import Study
from tuneformer.study.run import fingerprint

ZENODO = "https://zenodo.org/records/13350497/files"
GEO = "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM4150nnn/GSM4150377/suppl/GSM4150377_sciPlex2"
SRIVATSAN = "Srivatsan et al. 2020, doi:10.1126/science.aax6234"
GENECORPUS = "ctheodoris/Genecorpus-30M"
EXAMPLES = "example_input_files"
SCIPLEX_COLUMNS = ("treatment", "drug", "dose", "dose_um", "dose_label", "plate", "well", "replicate")
HASHES = ("top_oligo", "hash_umis", "top_to_second_best_ratio")


@dataclass(frozen=True)
class Dataset:
    """A data set that can be downloaded: whose it is, under what licence, where it is, and what it provides.

    ``columns`` are obs columns that a task can name. Checksums are the publisher's (Zenodo), or those that several
    public projects recorded of their downloads (figshare). Of a file without one none is known; it is recorded when the
    file is first downloaded (`tuneformer.data.download`).
    """

    title: str
    citation: str
    licence: str
    files: tuple[RemoteFile | RemoteFolder, ...]
    columns: tuple[str, ...]
    genes: str


DATASETS = {
    "sciplex2": Dataset(
        title="sci-Plex 2: A549 cells, four drugs, eight doses; harmonised",
        citation=f"{SRIVATSAN}; Peidli et al. 2024, doi:10.1038/s41592-023-02144-y",
        licence="CC BY 4.0 (Zenodo record 13350497)",
        files=(
            RemoteFile(
                "sciplex2/SrivatsanTrapnell2020_sciplex2.h5ad",
                f"{ZENODO}/SrivatsanTrapnell2020_sciplex2.h5ad?download=1",
                "hdf5",
                size=145_178_504,
                checksum="md5:12a48293a166a859f994551653a2ad8c",
            ),
        ),
        columns=(*SCIPLEX_COLUMNS, *HASHES, "qval_demultiplexing"),
        genes="Ensembl identifiers, human",
    ),
    "sciplex2_geo": Dataset(
        title="sci-Plex 2: A549 cells, four drugs, eight doses; tables of the authors",
        citation=f"{SRIVATSAN}; GEO GSM4150377",
        licence="none stated (GEO)",
        files=tuple(
            RemoteFile(f"sciplex2_geo/GSM4150377_sciPlex2_{part}.gz", f"{GEO}_{part}.gz", "gzip")
            for part in (
                "A549_Transcription_Modulators_UMI.count.matrix",
                "A549_Transcription_Modulators_gene.annotations.txt",
                "A549_Transcription_Modulators_cell.annotations.txt",
                "pData.txt",
            )
        ),
        columns=(*SCIPLEX_COLUMNS, *HASHES, "qval"),
        genes="Ensembl identifiers with version, human",
    ),
    "sciplex3": Dataset(
        title="sci-Plex 3: A549, K562 and MCF7 cells, 188 compounds, four doses; harmonised, version 1.4",
        citation=f"{SRIVATSAN}; Peidli et al. 2024, doi:10.1038/s41592-023-02144-y",
        licence="CC BY 4.0 (Zenodo record 13350497)",
        files=(
            RemoteFile(
                "sciplex3/SrivatsanTrapnell2020_sciplex3.h5ad",
                f"{ZENODO}/SrivatsanTrapnell2020_sciplex3.h5ad?download=1",
                "hdf5",
                size=2_526_631_614,
                checksum="md5:c9e70629505d98c7ca1a837f62b14e89",
            ),
        ),
        columns=(*SCIPLEX_COLUMNS, "cell_line", "time", "cell_line_time"),
        genes="Ensembl identifiers, human and mouse (mouse genes are left out)",
    ),
    "pancreas": Dataset(
        title="Human pancreas, six technologies in nine batches, as benchmarked by scIB",
        citation="Luecken et al. 2022, doi:10.1038/s41592-021-01336-8",
        licence="see the record (figshare file 24539828)",
        files=(
            RemoteFile(
                "pancreas/human_pancreas_norm_complexBatch.h5ad",
                "https://figshare.com/ndownloader/files/24539828",
                "hdf5",
                checksum="sha256:97e6dfd65553e4d10aa3ef5d904362970a75c677c31d70fabc9234191a09db8c",
            ),
        ),
        columns=("celltype", "tech"),
        genes="symbols, human, no mitochondrial genes; counts of full-length protocols are fractions",
    ),
    "cardiomyopathy": Dataset(
        title="Heart: dilated and hypertrophic cardiomyopathy and non-failing, tokenized for V1",
        citation="Chaffin et al. 2022, doi:10.1038/s41586-022-04817-8",
        licence="see the data set's card (huggingface.co/datasets/ctheodoris/Genecorpus-30M)",
        files=(
            RemoteFolder(
                "cardiomyopathy/human_dcm_hcm_nf.dataset",
                HubPath(
                    GENECORPUS,
                    f"{EXAMPLES}/cell_classification/disease_classification/human_dcm_hcm_nf.dataset",
                    repo_type="dataset",
                ),
                "arrow",
            ),
        ),
        columns=("cell_type", "individual", "disease"),
        genes="tokens of Geneformer-V1-10M",
    ),
}
SYMBOLS = ("own", "pancreas")
"""Data sets whose genes may go by symbols, which the checkpoint's dictionary of gene names replaces."""
DOSAGE_GENES = RemoteFile(
    "dosage_genes/dosage_sensitivity_TFs.pickle",
    HubPath(
        GENECORPUS,
        f"{EXAMPLES}/gene_classification/dosage_sensitive_tfs/dosage_sensitivity_TFs.pickle",
        repo_type="dataset",
    ),
    "pickle",
)
"""Dosage-sensitive and -insensitive transcription factors (Ni et al. 2019): {class: [Ensembl identifiers]}."""


def load_cells(settings: Study) -> ad.AnnData:
    """Load the cells of a study, as they are before quality control; what is not there yet is downloaded.

    Returns
    -------
    AnnData (cells, genes): raw counts in ``X`` (sparse, by rows), ``var["ensembl_id"]``, ``var["symbol"]``,
    ``uns["dataset"]``: name, simulated (bool), hash (of the source, see `source_hash`).

    Raises
    ------
    CellsError
        The file cannot be found, fetched or read (see `tuneformer.data.readers`, `tuneformer.data.sciplex`).
    """
    for remote in _files(settings):
        fetch(remote)
    if settings.dataset in SYMBOLS:
        checkpoint_files.ensure_names(settings.checkpoint)
    adata = _read(settings)
    name = source_path(settings).stem if settings.dataset == "own" else settings.dataset
    adata.uns["dataset"] = {"name": name, "simulated": settings.simulated, "hash": source_hash(settings)}
    return adata


def source_hash(settings: Study) -> str:
    """Return 16 hex digits that change when the cells before quality control change, without loading them.

    Of a small draw of the simulator, number and seed (demo, demo_pancreas), of the file that scanpy carries (pbmc68k),
    of the files (own), of the pinned or recorded checksums (downloads).

    Raises
    ------
    CellsError
        As `load_cells`.
    """
    if settings.simulated:
        return fingerprint(_draw_hash(settings.dataset), settings.demo_cells, settings.demo_seed)
    if settings.dataset == "pbmc68k":
        package = Path(find_spec("scanpy").origin).parent
        return _file_hash(package / "datasets" / "10x_pbmc68k_reduced.h5ad")
    if settings.dataset == "own":
        checkpoint_files.ensure_names(settings.checkpoint)
        return readers.own_hash(settings, source_path(settings))
    names = [_names_hash(settings.checkpoint)] if settings.dataset in SYMBOLS else []
    return fingerprint(*map(content_hash, _files(settings)), *names)


def source_path(settings: Study) -> Path | None:
    """Return the file or folder that holds the cells of a study; None where they are simulated, or carried by scanpy.

    Raises
    ------
    CellsError
        The data set is your own, and a $VARIABLE in ``path`` is not set, or there is nothing there.
    """
    if settings.dataset == "own":
        return readers.expanded_path("path", settings.path)
    files = _files(settings)
    return None if not files else files[0].target if len(files) == 1 else files[0].target.parent


def needed(settings: Study) -> list[RemoteFile | RemoteFolder]:
    """Return what a study needs from the network, there already or not: checkpoint, cells, list of genes."""
    is_list = settings.gene_classes != "demo" and paths.user_path(settings.gene_classes) == DOSAGE_GENES.target
    return [*checkpoint_files.files_of(settings.checkpoint), *_files(settings), *([DOSAGE_GENES] if is_list else [])]


def _names_hash(checkpoint: str) -> str | None:
    """Return the hash of a checkpoint's dictionary of gene names, which is pinned for a published one."""
    pinned = [file.checksum for file in checkpoint_files.files_of(checkpoint) if Path(file.name).match(DICTIONARY)]
    names = None if pinned else gene_symbols.dictionary_of(paths.checkpoint_dir(checkpoint))
    return pinned[0] if pinned else names and _file_hash(names)


def _files(settings: Study) -> tuple[RemoteFile | RemoteFolder, ...]:
    return DATASETS[settings.dataset].files if settings.dataset in DATASETS else ()


def _read(settings: Study) -> ad.AnnData:
    """Read or draw the cells of a study, whose files are there."""
    path = source_path(settings)
    if settings.simulated:
        return _draw(settings.dataset, settings.demo_cells, settings.demo_seed)
    if settings.dataset == "pbmc68k":
        return readers.read_pbmc68k()
    if settings.dataset == "sciplex2":
        return sciplex.read_harmonised(path, settings)
    if settings.dataset == "sciplex2_geo":
        return sciplex.read_geo(path, settings)
    if settings.dataset == "sciplex3":
        return sciplex.read_sciplex3(path, settings)
    if settings.dataset == "pancreas":
        return _read_pancreas(settings, path)
    return readers.read_own(settings, path)


def _read_pancreas(settings: Study, path: Path) -> ad.AnnData:
    """Read the pancreas of scIB, whose ``tech`` numbers the batches of inDrop; these go to ``obs["batch"]``."""
    adata = readers.read_own(settings.model_copy(update={"counts": "counts", "obs_table": None}), path)
    adata.obs["batch"] = adata.obs["tech"]
    adata.obs["tech"] = adata.obs["tech"].astype(str).str.replace(r"^(inDrop)\d$", r"\1", regex=True).astype("category")
    return adata


def _draw(dataset: str, n_cells: int, seed: int) -> ad.AnnData:
    """Draw simulated cells."""
    draw = simulate.simulate_sciplex2 if dataset == "demo" else simulate_pancreas
    return draw(n_cells, seed=seed)


@functools.cache
def _draw_hash(dataset: str) -> str:
    """Hash what the simulator draws for a few cells: another model, other constants or other random numbers show."""
    adata = _draw(dataset, 64 if dataset == "demo" else 128, 0)
    text = adata.obs.to_csv(lineterminator="\n")
    return hashlib.sha256(adata.X.toarray().tobytes() + text.encode()).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
