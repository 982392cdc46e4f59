"""Which cells a study means: one row per data set, with its reader and the files that it needs.

In: the settings of a study. Out: its cells with raw counts, and a key of their source that is known without loading.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import key
from tuneformer.data import fetch, readers, sciplex, simulate
from tuneformer.data.fetch import RemoteFile
from tuneformer.data.refusals import expanded_path
from tuneformer.data.simulate_pancreas import simulate_pancreas
from tuneformer.study import Study

ZENODO = "https://zenodo.org/records/13350497/files"
GEO = "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM4150nnn/GSM4150377/suppl"
GENECORPUS = f"{fetch.HUB}/datasets/ctheodoris/Genecorpus-30M/resolve/main/example_input_files"
HEART = "cell_classification/disease_classification/human_dcm_hcm_nf.dataset"
SRIVATSAN = "Srivatsan et al. 2020, doi:10.1126/science.aax6234"
SCPERTURB = f"{SRIVATSAN}; harmonised by Peidli et al. 2024, doi:10.1038/s41592-023-02144-y"
DOSAGE_GENES = RemoteFile(
    "dosage_genes/dosage_sensitivity_TFs.pickle",
    f"{GENECORPUS}/gene_classification/dosage_sensitive_tfs/dosage_sensitivity_TFs.pickle",
)
"""Dosage-sensitive and -insensitive transcription factors (Ni et al. 2019): {class: [Ensembl identifiers]}."""


@dataclass(frozen=True)
class Source:
    """A data set: what it is, whose, under what licence, how it is read, and the files to fetch.

    ``read`` takes the path of `source_path` and the settings. Checksums are the publisher's (Zenodo), or those that
    several public projects recorded of their downloads (figshare).
    """

    title: str
    citation: str
    licence: str
    read: Callable[[Path, Study], ad.AnnData]
    files: tuple[RemoteFile, ...] = ()
    has_symbols: bool = False  # genes may go by symbols, which the checkpoint's dictionary of gene names replaces


def _read_files(path: Path, settings: Study) -> ad.AnnData:
    """Read cells of one's own; of several files the genes that all have, and ``obs["file"]`` says from which."""
    files = [path, *_more_files(settings)]
    if len(files) == 1:
        return readers.read_own(path, settings)
    parts = {file.stem: readers.read_own(file, settings) for file in files}
    for part in parts.values():
        part.X = sparse.csr_matrix(part.X[:])  # joined in memory: their genes differ
    cells = ad.concat(parts, join="inner", label="file", index_unique="-", merge="first")
    cells.uns["recognised"] = parts[path.stem].uns["recognised"] | {"files": ", ".join(parts)}
    return cells


def _read_pancreas(path: Path, settings: Study) -> ad.AnnData:
    """Read the pancreas of scIB, whose ``tech`` numbers the batches of inDrop; these go to ``obs["batch"]``."""
    adata = readers.read_own(path, settings.model_copy(update={"counts": "counts", "obs_table": None}))
    adata.obs["batch"] = adata.obs["tech"]
    adata.obs["tech"] = adata.obs["tech"].astype(str).str.replace(r"^(inDrop)\d$", r"\1", regex=True).astype("category")
    return adata


SOURCES = {
    "demo": Source(
        title="Simulated look-alike of sci-Plex 2",
        citation="tuneformer.data.simulate",
        licence="Apache-2.0",
        read=lambda _, settings: simulate.simulate_sciplex2(
            settings.demo_cells, seed=settings.demo_seed, mechanism=settings.demo_mechanism
        ),
    ),
    "demo_pancreas": Source(
        title="Simulated look-alike of the pancreas of six technologies",
        citation="tuneformer.data.simulate_pancreas",
        licence="Apache-2.0",
        read=lambda _, settings: simulate_pancreas(settings.demo_cells, seed=settings.demo_seed),
    ),
    "pbmc68k": Source(
        title="700 PBMC that scanpy carries, counts recovered from normalised values",
        citation="Zheng et al. 2017, doi:10.1038/ncomms14049",
        licence="see 10xgenomics.com/datasets",
        read=lambda *_: readers.read_pbmc68k(),
    ),
    "own": Source(
        title="Cells of your own",
        citation="the path of the study",
        licence="yours",
        read=_read_files,
        has_symbols=True,
    ),
    "sciplex2": Source(
        title="sci-Plex 2: A549 cells, four drugs, eight doses; harmonised",
        citation=SCPERTURB,
        licence="CC BY 4.0 (Zenodo record 13350497)",
        read=sciplex.read_harmonised,
        files=(
            RemoteFile(
                "sciplex2/SrivatsanTrapnell2020_sciplex2.h5ad",
                f"{ZENODO}/SrivatsanTrapnell2020_sciplex2.h5ad?download=1",
                size=145_178_504,
                checksum="md5:12a48293a166a859f994551653a2ad8c",
            ),
        ),
    ),
    "sciplex2_geo": Source(
        title="sci-Plex 2: A549 cells, four drugs, eight doses; tables of the authors",
        citation=f"{SRIVATSAN}; GEO GSM4150377",
        licence="none stated (GEO)",
        read=sciplex.read_geo,
        files=tuple(
            RemoteFile(f"sciplex2_geo/{file}", f"{GEO}/{file}")
            for file in (
                "GSM4150377_sciPlex2_A549_Transcription_Modulators_UMI.count.matrix.gz",
                "GSM4150377_sciPlex2_A549_Transcription_Modulators_gene.annotations.txt.gz",
                "GSM4150377_sciPlex2_A549_Transcription_Modulators_cell.annotations.txt.gz",
                "GSM4150377_sciPlex2_pData.txt.gz",
            )
        ),
    ),
    "sciplex3": Source(
        title="sci-Plex 3: A549, K562 and MCF7 cells, 188 compounds, four doses; harmonised, version 1.4",
        citation=SCPERTURB,
        licence="CC BY 4.0 (Zenodo record 13350497)",
        read=sciplex.read_sciplex3,
        files=(
            RemoteFile(
                "sciplex3/SrivatsanTrapnell2020_sciplex3.h5ad",
                f"{ZENODO}/SrivatsanTrapnell2020_sciplex3.h5ad?download=1",
                size=2_526_631_614,
                checksum="md5:c9e70629505d98c7ca1a837f62b14e89",
            ),
        ),
    ),
    "pancreas": Source(
        title="Human pancreas, six technologies in nine batches, as benchmarked by scIB; obs celltype, tech, batch",
        citation="Luecken et al. 2022, doi:10.1038/s41592-021-01336-8",
        licence="see the record (figshare file 24539828)",
        read=_read_pancreas,
        files=(
            RemoteFile(
                "pancreas/human_pancreas_norm_complexBatch.h5ad",
                "https://figshare.com/ndownloader/files/24539828",
                checksum="sha256:97e6dfd65553e4d10aa3ef5d904362970a75c677c31d70fabc9234191a09db8c",
            ),
        ),
        has_symbols=True,
    ),
    "cardiomyopathy": Source(
        title="Heart: cardiomyopathies and non-failing, tokenized for V1; obs cell_type, individual, disease",
        citation="Chaffin et al. 2022, doi:10.1038/s41586-022-04817-8",
        licence="see the data set's card (huggingface.co/datasets/ctheodoris/Genecorpus-30M)",
        read=lambda path, _: readers.read_tokenized(path),
        files=tuple(
            RemoteFile(f"cardiomyopathy/human_dcm_hcm_nf.dataset/{file}", f"{GENECORPUS}/{HEART}/{file}")
            for file in ("dataset.arrow", "dataset_info.json", "state.json")
        ),
    ),
}


def load(settings: Study) -> ad.AnnData:
    """Load the cells of a study as they are before quality control; what is not there yet is downloaded.

    Returns
    -------
    AnnData (cells, genes): raw counts in ``X`` (sparse, by rows), ``var["ensembl_id"]``, ``var["symbol"]``,
    ``uns["dataset"]``: name, simulated (bool), title, source, licence, hash (`source_key`). Cells that others tokenized
    have no genes.

    Raises
    ------
    UserError
        The file cannot be found, fetched or read (see `tuneformer.data.readers`, `tuneformer.data.sciplex`).
    """
    source, path = SOURCES[settings.dataset], source_path(settings)
    for file in source.files:
        fetch.fetch(file)
    adata = source.read(path, settings)
    adata.uns["dataset"] = {
        "name": path.stem if settings.dataset == "own" else settings.dataset,
        "simulated": settings.simulated,
        "title": source.title,
        "source": source.citation,
        "licence": source.licence,
        "hash": source_key(settings),
    }
    return adata


def source_key(settings: Study) -> str:
    """Return a key that changes when the cells before quality control change, without loading them.

    A wrong path of own cells, or a file without a known checksum that was not fetched yet, is a UserError.
    """
    source = SOURCES[settings.dataset]
    if settings.simulated:
        return key("simulated", _draw_hash(settings.dataset), settings.demo_cells, settings.demo_seed)
    checksums = [fetch.content_key(file) for file in source.files]
    checksums += [fetch.file_hash(file) for file in _local_files(settings)]
    if source.has_symbols:
        checksums.append(_names_hash(settings.checkpoint))
    return key("source", settings.dataset, checksums)


def source_path(settings: Study) -> Path | None:
    """Return the file or folder that holds the cells of a study; None where they are simulated or carried by scanpy.

    A path of own cells with a $VARIABLE that is not set, or with nothing there, is a UserError.
    """
    if settings.dataset == "own":
        return expanded_path("path", settings.path, "an h5ad file with raw counts")
    files = SOURCES[settings.dataset].files
    return None if not files else files[0].target if len(files) == 1 else files[0].target.parent


def remote_files(settings: Study) -> list[RemoteFile]:
    """Return what a study needs from the network, there already or not: checkpoint, cells, list of genes."""
    has_list = settings.gene_classes != "demo" and paths.user_path(settings.gene_classes) == DOSAGE_GENES.target
    files = [*fetch.checkpoint_files(settings.checkpoint), *SOURCES[settings.dataset].files]
    return [*files, DOSAGE_GENES] if has_list else files


def _local_files(settings: Study) -> list[Path]:
    """Return the files on this disk that the cells of a study are made of, and that are not fetched."""
    if settings.dataset == "pbmc68k":
        return [Path(find_spec("scanpy").origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"]
    if settings.dataset != "own":
        return []
    path = source_path(settings)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not file.name.startswith("cache-")]  # which datasets leaves beside its files
    files += _more_files(settings)
    table = settings.obs_table
    return files if table is None else [*files, expanded_path("obs_table", table)]


def _more_files(settings: Study) -> list[Path]:
    return [expanded_path("more_paths", written, "h5ad files with raw counts") for written in settings.more_paths]


def _names_hash(checkpoint: str) -> str | None:
    """Return the hash of a checkpoint's dictionary of gene names, which is pinned for a published one."""
    for file in fetch.checkpoint_files(checkpoint):
        if file.target.match(fetch.GENE_NAMES):
            return file.checksum
    names = fetch.gene_names(checkpoint)
    return None if names is None else f"sha256:{fetch.file_hash(names)}"


@functools.cache
def _draw_hash(dataset: str) -> str:
    """Hash a small draw of a simulator: another model, other constants or other random numbers show."""
    adata = simulate.simulate_sciplex2(64, seed=0) if dataset == "demo" else simulate_pancreas(128, seed=0)
    return hashlib.sha256(adata.X.toarray().tobytes() + adata.obs.to_csv(lineterminator="\n").encode()).hexdigest()
