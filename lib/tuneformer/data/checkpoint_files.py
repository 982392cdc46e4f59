"""The published Geneformer checkpoints: which files they are, and how they come here.

In: the name of a checkpoint. Out: its folder, with weights, configuration and dictionaries, fetched if it has to be.

Source: Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9) and Chen et al. 2024 (doi:10.1101/2024.08.16.608180);
huggingface.co/ctheodoris/Geneformer, Apache-2.0. The revision is pinned, and size and SHA-256 of every file at it; they
are those that several public projects recorded of their downloads at this revision.
"""

from pathlib import Path

from tuneformer.data.download import HubPath, RemoteFile, fetch
from tuneformer.data.gene_symbols import DICTIONARY
from tuneformer.study import paths

REPOSITORY = "ctheodoris/Geneformer"
REVISION = "04c2b2e84da7c0f385c3f9ad8f3ec24bab6650e5"
V1, V2 = "geneformer/gene_dictionaries_30m", "geneformer"

# name in the folder of the checkpoint: place in the repository, size in bytes, SHA-256
DICTIONARIES = {
    V1: {
        "token_dictionary_gc30M.pkl": (788_424, "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1"),
        "gene_median_dictionary_gc30M.pkl": (
            940_965,
            "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
        ),
        "gene_name_id_dict_gc30M.pkl": (1_117_117, "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c"),
        "ensembl_mapping_dict_gc30M.pkl": (584_125, "eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869"),
    },
    V2: {
        "token_dictionary_gc104M.pkl": (425_590, "67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f"),
        "gene_median_dictionary_gc104M.pkl": (
            1_512_661,
            "a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5",
        ),
        "gene_name_id_dict_gc104M.pkl": (1_660_882, "fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1"),
        "ensembl_mapping_dict_gc104M.pkl": (
            3_957_652,
            "0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c",
        ),
    },
}
MODELS = {
    "Geneformer-V1-10M": (
        V1,
        {
            "config.json": (565, "9cf69ca3bdb0215c4188b54c451b6f02adfe68b8f66011a57d0f32845133fd4b"),
            "model.safetensors": (41_183_536, "a5e33a757431643b3697de7ef6127950cdc49e06e58d4266b3a3ab191b683f14"),
        },
    ),
    "Geneformer-V2-104M": (
        V2,
        {
            "config.json": (None, "467d4492f0dd53b4d60afffe20812db484ca1cf9fdbeb6a6e060e93564f70859"),
            "model.safetensors": (417_571_156, "fff5cba29ddd8792991fa77b4872246fbe548a178cebda3775cdc72b67780e7f"),
        },
    ),
    "Geneformer-V2-316M": (
        V2,
        {
            "config.json": (591, "2cc4af3442644e84af71814a607b61c958d7b4e5ebde6791ab77b5f534ac6f6e"),
            "model.safetensors": (1_265_455_076, "965ceccea81953d362081ef3843560a0e4fef88d396c28017881f1e94b1246f3"),
        },
    ),
}
KINDS = {".json": "json", ".safetensors": "safetensors", ".pkl": "pickle"}


def ensure(name: str) -> Path:
    """Return the folder of a checkpoint (see `paths.checkpoint_dir`); a published one is fetched if it is not there.

    Raises
    ------
    DownloadError
        A file cannot be fetched, or is not the published one.
    """
    for file in files_of(name):
        fetch(file)
    return paths.checkpoint_dir(name)


def ensure_names(name: str) -> Path:
    """Return the folder of a checkpoint, of which only the dictionary of gene names has to be there; see `ensure`."""
    for file in files_of(name):
        if Path(file.name).match(DICTIONARY):
            fetch(file)
    return paths.checkpoint_dir(name)


def files_of(name: str) -> list[RemoteFile]:
    """Return the files of a published checkpoint; of any other none, as there is nothing to fetch."""
    if name not in MODELS:
        return []
    place, own = MODELS[name]
    listed = [(name, own), (place, DICTIONARIES[place])]
    return [
        RemoteFile(
            f"{name}/{file}",
            HubPath(REPOSITORY, f"{folder}/{file}", REVISION),
            KINDS[Path(file).suffix],
            size=size,
            checksum=f"sha256:{checksum}",
        )
        for folder, files in listed
        for file, (size, checksum) in files.items()
    ]
