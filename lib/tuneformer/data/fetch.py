"""Files from the network: fetched once, checked, kept, and never taken for what they are not.

In: a `RemoteFile`, a checkpoint's name, or as a command the name of a study. Out: the file below ``paths.DOWNLOADS``,
whole and checked; or one sentence with the command that fetches it by hand. A file is called ``<name>.part`` until size,
checksum and content are known to be right, and a download that was cut goes on where it stopped. Where no checksum is
published, that of the first download counts ever after (``lock.json``).
"""

import argparse
import errno
import functools
import gzip
import hashlib
import json
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import pyarrow as pa
import requests
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tuneformer import paths
from tuneformer.artifacts import UserError, key, read_json, write_json
from tuneformer.data.unpickle import read_pickle

TRIES = 5  # in a row without a single new byte
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one soon
REFUSED = {401: "asks for a login", 403: "is not allowed", 404: "was not found", 410: "is gone"}
MB = 1e6
ENDPOINT = constants.ENDPOINT  # of the Hugging Face Hub; HF_ENDPOINT names another

# The published checkpoints (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9; Chen et al. 2024,
# doi:10.1101/2024.08.16.608180; Apache-2.0). Size in bytes and SHA-256 are those that public projects recorded of their
# downloads at this revision.
REPOSITORY, REVISION = "ctheodoris/Geneformer", "04c2b2e84da7c0f385c3f9ad8f3ec24bab6650e5"
FOLDERS = {"V1": "geneformer/gene_dictionaries_30m", "V2": "geneformer"}  # of the dictionaries
PUBLISHED = {"Geneformer-V1-10M": "V1", "Geneformer-V2-104M": "V2", "Geneformer-V2-316M": "V2"}
GENE_NAMES = "gene_name_id_dict*.pkl"
PINNED = [
    line.split()
    for line in """\
Geneformer-V1-10M config.json 565 9cf69ca3bdb0215c4188b54c451b6f02adfe68b8f66011a57d0f32845133fd4b
Geneformer-V1-10M model.safetensors 41183536 a5e33a757431643b3697de7ef6127950cdc49e06e58d4266b3a3ab191b683f14
Geneformer-V2-104M config.json ? 467d4492f0dd53b4d60afffe20812db484ca1cf9fdbeb6a6e060e93564f70859
Geneformer-V2-104M model.safetensors 417571156 fff5cba29ddd8792991fa77b4872246fbe548a178cebda3775cdc72b67780e7f
Geneformer-V2-316M config.json 591 2cc4af3442644e84af71814a607b61c958d7b4e5ebde6791ab77b5f534ac6f6e
Geneformer-V2-316M model.safetensors 1265455076 965ceccea81953d362081ef3843560a0e4fef88d396c28017881f1e94b1246f3
V1 token_dictionary_gc30M.pkl 788424 ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1
V1 gene_median_dictionary_gc30M.pkl 940965 b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39
V1 gene_name_id_dict_gc30M.pkl 1117117 55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c
V1 ensembl_mapping_dict_gc30M.pkl 584125 eac0fb0b3007267871b6305ac0003ceba19d4f28d85686cb9067ecf142787869
V2 token_dictionary_gc104M.pkl 425590 67c445f4385127adfc48dcc072320cd65d6822829bf27dd38070e6e787bc597f
V2 gene_median_dictionary_gc104M.pkl 1512661 a51c53f6a771d64508dfaf61529df70e394c53bd20856926117ae5d641a24bf5
V2 gene_name_id_dict_gc104M.pkl 1660882 fabfa0c2f49c598c59ae432a32c3499a5908c033756c663b5e0cddf58deea8e1
V2 ensembl_mapping_dict_gc104M.pkl 3957652 0819bcbd869cfa14279449b037eb9ed1d09a91310e77bd1a19d927465030e95c
""".splitlines()
]

Kind = Literal["hdf5", "gzip", "pickle", "safetensors", "json", "arrow"]


class _PassingError(Exception):
    """A failure that another try may mend."""


@dataclass(frozen=True)
class RemoteFile:
    """A file: path below the downloads folder, address, what it holds; ``sha256:…`` or ``md5:…``, None if not known."""

    name: str
    url: str
    kind: Kind
    size: int | None = None
    checksum: str | None = None

    @property
    def target(self) -> Path:
        """Where the file is kept."""
        return paths.DOWNLOADS / self.name

    @property
    def by_hand(self) -> str:
        """The command that fetches it without this program."""
        return f"curl -L --create-dirs -o {self.target} '{self.url}'"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a data set on the Hub, whose files are listed at the first download."""

    name: str
    repo: str
    path: str
    size: None = None

    @property
    def target(self) -> Path:
        """Where the folder is kept."""
        return paths.DOWNLOADS / self.name

    @property
    def by_hand(self) -> str:
        """How to fetch it without this program."""
        return f"put the files of {ENDPOINT}/datasets/{self.repo}/tree/main/{self.path} into {self.target}"


Remote = RemoteFile | RemoteFolder


def hub_url(repo: str, path: str, revision: str) -> str:
    """Return the address of a file on the Hub; the name of a repository of data begins with ``datasets/``."""
    return f"{ENDPOINT}/{repo}/resolve/{revision}/{path}"


def checkpoint_files(name: str) -> list[RemoteFile]:
    """Return the files of a published checkpoint; of any other none, as there is nothing to fetch."""
    version = PUBLISHED.get(name)
    kinds: dict[str, Kind] = {".json": "json", ".safetensors": "safetensors", ".pkl": "pickle"}
    return [
        RemoteFile(
            f"{name}/{file}",
            hub_url(REPOSITORY, f"{FOLDERS.get(group, group)}/{file}", REVISION),
            kinds[Path(file).suffix],
            size=None if size == "?" else int(size),
            checksum=f"sha256:{checksum}",
        )
        for group, file, size, checksum in PINNED
        if version is not None and group in (name, version)
    ]


def checkpoint_path(name: str) -> Path:
    """Return where a checkpoint is, or will be: ``demo`` in the package, a published one among the downloads."""
    if name in PUBLISHED:
        return paths.DOWNLOADS / name
    return paths.ASSETS / "demo_checkpoint" if name == "demo" else paths.user_path(name)


def checkpoint_dir(name: str) -> Path:
    """Return the folder of a checkpoint; a published one is fetched if it is not there, and raises as `fetch`."""
    for file in checkpoint_files(name):
        fetch(file)
    return checkpoint_path(name)


def checkpoint_key(name: str) -> str:
    """Return the key of configuration and weights of a checkpoint; a published one need not be there.

    Raises
    ------
    UserError
        A file is missing.
    """
    needed = ("config.json", "model.safetensors")
    pinned = [file.checksum for file in checkpoint_files(name) if file.name.endswith(needed)]
    absent = [path for file in needed if not (path := checkpoint_path(name) / file).is_file()]
    if absent and not pinned:
        published = ", ".join(PUBLISHED)
        msg = (
            f"checkpoint: {paths.shown(absent[0])} does not exist; set checkpoint to demo, to a published one "
            f"({published}) or to the folder of a Geneformer model."
        )
        raise UserError(msg)
    return key("checkpoint", *(pinned or [f"sha256:{file_hash(checkpoint_path(name) / file)}" for file in needed]))


def gene_names(checkpoint: str) -> Path | None:
    """Return a checkpoint's dictionary of gene symbols, fetched if it is published; None where it has none."""
    for file in checkpoint_files(checkpoint):
        if file.target.match(GENE_NAMES):
            return fetch(file)
    return next(iter(sorted(checkpoint_path(checkpoint).glob(GENE_NAMES))), None)


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Return the hash of a file, which is read again only when its size or time has changed."""
    state = path.stat()
    return _digest(path, algorithm, state.st_size, state.st_mtime_ns)


def fetch(remote: Remote, *, wait: Callable[[float], None] = time.sleep) -> Path:
    """Return a file or folder below the downloads folder, fetching what is not there yet.

    A file that was put in its place by hand is checked like a fetched one. `wait` waits for so many seconds between two
    tries.

    Raises
    ------
    UserError
        It cannot be fetched (no network, offline, refused, disk full), or what came is not what it should be.
    """
    if is_present(remote):
        return remote.target
    paths.DOWNLOADS.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.DOWNLOADS / ".lock"):
        for file in _listed(remote, wait) if isinstance(remote, RemoteFolder) else [remote]:
            if not is_present(file):
                _fetch_file(file, wait)
    return remote.target


def is_present(remote: Remote) -> bool:
    """Return whether a file, or every file of a folder, is there and is the one that was checked."""
    lock = _read_lock()
    entry = lock.get(remote.name)
    if entry is None:
        return False
    if isinstance(remote, RemoteFolder):
        return all(_is_unchanged(f"{remote.name}/{file}", lock) for file in entry["files"])
    algorithm, _, digest = (remote.checksum or "").partition(":")
    return _is_unchanged(remote.name, lock) and entry.get(algorithm, "") == digest


def content_key(remote: Remote) -> str:
    """Return the checksum by which the content of a file or folder is known: the pinned one, else the recorded one.

    Raises
    ------
    UserError
        The checksum is not pinned, and the file was not fetched yet.
    """
    if isinstance(remote, RemoteFile) and remote.checksum is not None:
        return remote.checksum
    lock = _read_lock()
    if remote.name not in lock:
        msg = (
            f"{remote.target} was not downloaded yet, and its checksum is not known before; fetch it by "
            "`python -m tuneformer.data.fetch` and the name of the study."
        )
        raise UserError(msg)
    if isinstance(remote, RemoteFile):
        return f"sha256:{lock[remote.name]['sha256']}"
    return key(*((file, lock[f"{remote.name}/{file}"]["sha256"]) for file in lock[remote.name]["files"]))


def _fetch_file(file: RemoteFile, wait: Callable[[float], None]) -> None:
    """Check a file that is there, or fetch, check and name it."""
    if file.target.is_file():
        _record(file.name, _checked(file, file.target))
        return
    _refuse_offline(file)
    file.target.parent.mkdir(parents=True, exist_ok=True)
    part = file.target.with_name(f"{file.target.name}.part")
    tag = part.with_name(f"{part.name}.tag")  # the version of which `part` is a part
    try:
        _with_patience(lambda: _transfer(file, part, tag), file, part, wait)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        msg = (
            f"The disk is full: {file.target.name} could not be written to {file.target.parent} "
            f"({shutil.disk_usage(file.target.parent).free / MB:.0f} MB free); make room, or set TUNEFORMER_DOWNLOADS to "
            "a folder on another disk, and start again: the download goes on where it stopped."
        )
        raise UserError(msg) from error
    try:
        entry = _checked(file, part)
    except UserError:
        part.unlink()
        raise
    finally:
        tag.unlink(missing_ok=True)
    part.replace(file.target)
    _record(file.name, entry)
    print(f"{file.name}: complete and checked ({entry['size'] / MB:.1f} MB)", file=sys.stderr, flush=True)


def _with_patience(
    transfer: Callable[[], Any], remote: Remote, part: Path | None, wait: Callable[[float], None]
) -> Any:
    """Try again after passing failures, as long as new bytes come, and then `TRIES` times."""
    failures, before = 0, 0
    while True:
        try:
            return transfer()
        except _PassingError as error:
            after = part.stat().st_size if part and part.is_file() else 0
            failures = 1 if after > before else failures + 1
            before = after
            if failures >= TRIES:
                msg = (
                    f"{_address(remote)} could not be fetched ({error}, {failures} times); start again later, or by "
                    f"hand: {remote.by_hand}"
                )
                raise UserError(msg) from error
            wait(2.0 ** (failures - 1))


@contextmanager
def _answer(remote: Remote, url: str, headers: dict[str, str]) -> Iterator[requests.Response]:
    """Give the answer of a server; raise `_PassingError` for what may pass, and a `UserError` for what will not."""
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            status = answer.status_code
            if status in BUSY:
                msg = f"the server answered {status}"
                raise _PassingError(msg)
            if status not in (200, 206, 416):
                msg = f"{url} {REFUSED.get(status, 'failed')} (the server answered {status}); by hand: {remote.by_hand}"
                raise UserError(msg)
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise UserError(_web_page(remote))
            yield answer
    except requests.Timeout as error:
        msg = "no answer in time"
        raise _PassingError(msg) from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        msg = "the connection failed or was cut"
        raise _PassingError(msg) from error
    except requests.RequestException as error:  # an OSError, which must not be taken for one of the disk
        msg = f"{url} could not be fetched ({error}); by hand: {remote.by_hand}"
        raise UserError(msg) from error


def _transfer(file: RemoteFile, part: Path, tag: Path) -> None:
    """Fetch a file into `part`, going on where `part` ends if it is of the same version."""
    start = part.stat().st_size if part.is_file() and tag.is_file() else 0
    if start and start == file.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text(encoding="utf-8")}
    with _answer(file, file.url, headers) as answer:
        span = answer.headers.get("Content-Range", "")
        if answer.status_code == 416 and span.endswith(f"/{start}"):
            return  # `part` was complete
        if answer.status_code == 416 or (answer.status_code == 206 and not span.startswith(f"bytes {start}-")):
            part.unlink(missing_ok=True)
            msg = "the server has another version of the file"
            raise _PassingError(msg)
        start = start if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _refuse_size(file, part, start, total)
        version = answer.headers.get("ETag", "W/")
        version = answer.headers.get("Last-Modified", "") if version.startswith("W/") else version
        tag.write_text(version, encoding="utf-8") if version else tag.unlink(missing_ok=True)
        with part.open("ab" if start else "wb") as out:
            _copy(answer.iter_content(PIECE), out, tqdm(desc=file.name, initial=start, total=total, unit="B"))


def _copy(pieces: Iterator[bytes], out: Any, bar: tqdm) -> None:
    with bar:
        for piece in pieces:
            out.write(piece)
            out.flush()
            bar.update(len(piece))


def _refuse_size(file: RemoteFile, part: Path, start: int, total: int | None) -> None:
    """Refuse a file of another size than it should have, or for which the disk has no room."""
    if total is not None and file.size not in (None, total):
        msg = (
            f"{file.url} has {total:,} bytes on the server, but should have {file.size:,}: it is another version, or not "
            f"the file; by hand: {file.by_hand}"
        )
        raise UserError(msg)
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        msg = (
            f"{file.target.name} needs {(total - start) / MB:.0f} MB in {part.parent}, where {free / MB:.0f} MB are "
            "free; make room, or set TUNEFORMER_DOWNLOADS to a folder on another disk."
        )
        raise UserError(msg)
