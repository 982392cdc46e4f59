"""Files from the network: fetched once, checked, kept, and never taken for what they are not.

In: a `RemoteFile`, or the name of a checkpoint. Out: the file below
``paths.DOWNLOADS``; or one sentence with the command that fetches it by hand. A file is called ``<name>.part`` until it
is known to be right, and a download that was cut goes on where it stopped. Where no checksum is published, the content
is read, and the checksum of the first download (``lock.json``) counts ever after.
"""

import errno
import functools
import gzip
import hashlib
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pyarrow as pa
import requests
from filelock import FileLock
from huggingface_hub import constants
from tqdm import tqdm

from tuneformer import paths
from tuneformer.artifacts import UserError, key, read_json, write_json
from tuneformer.data.unpickle import read_pickle

TRIES = 5  # in a row without a single new byte
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one soon
REFUSED = {401: "asks for a login", 403: "is not allowed", 404: "was not found", 410: "is gone"}
BY_HAND = "download it by hand:"
MB = 1e6
HUB = constants.ENDPOINT  # HF_ENDPOINT names a mirror

# The published checkpoints (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9; Chen et al. 2024,
# doi:10.1101/2024.08.16.608180; Apache-2.0). Size in bytes and SHA-256 are those that public projects recorded of their
# downloads at this revision.
GENEFORMER = f"{HUB}/ctheodoris/Geneformer/resolve/04c2b2e84da7c0f385c3f9ad8f3ec24bab6650e5"
FOLDERS = {"V1": "geneformer/gene_dictionaries_30m", "V2": "geneformer"}  # of the dictionaries
SHIPPED = ("demo", "mini")  # made here: of simulated cells, and of real ones
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


class _PassingError(Exception):
    """A failure that another try may mend."""


@dataclass(frozen=True)
class RemoteFile:
    """A file: its path below the downloads folder, address, size, and ``sha256:…`` or ``md5:…``; None if not known."""

    name: str
    url: str
    size: int | None = None
    checksum: str | None = None

    @property
    def target(self) -> Path:
        """Where the file is kept."""
        return paths.DOWNLOADS / self.name

    @property
    def curl(self) -> str:
        """The command that fetches it without this program."""
        return f"curl -L --create-dirs -o {self.target} '{self.url}'"


def checkpoint_files(name: str) -> list[RemoteFile]:
    """Return the files of a published checkpoint; of any other none, as there is nothing to fetch."""
    if name not in PUBLISHED:
        return []
    return [
        RemoteFile(
            f"{name}/{file}",
            f"{GENEFORMER}/{FOLDERS.get(group, group)}/{file}",
            size=None if size == "?" else int(size),
            checksum=f"sha256:{checksum}",
        )
        for group, file, size, checksum in PINNED
        if group in (name, PUBLISHED[name])
    ]


def checkpoint_path(name: str) -> Path:
    """Return where a checkpoint is, or will be: in the package if `SHIPPED`, among the downloads if published."""
    if name in PUBLISHED:
        return paths.DOWNLOADS / name
    return paths.ASSETS / f"{name}_checkpoint" if name in SHIPPED else paths.user_path(name)


def checkpoint_dir(name: str) -> Path:
    """Return the folder of a checkpoint; a published one is fetched if it is not there, and raises as `fetch`."""
    for file in checkpoint_files(name):
        fetch(file)
    return checkpoint_path(name)


def checkpoint_key(name: str) -> str:
    """Return the key of configuration and weights of a checkpoint; only a published one need not be there."""
    needed = [checkpoint_path(name) / file for file in ("config.json", "model.safetensors")]
    checksums = [file.checksum for file in checkpoint_files(name) if file.target in needed]
    for path in needed:
        if name not in PUBLISHED and not path.is_file():
            msg = (
                f"checkpoint: {paths.shown(path)} does not exist; set checkpoint to one of "
                f"{', '.join([*SHIPPED, *PUBLISHED])}, or to the folder of a Geneformer model."
            )
            raise UserError(msg)
    return key("checkpoint", checksums or [f"sha256:{file_hash(path)}" for path in needed])


def gene_names(checkpoint: str) -> Path | None:
    """Return a checkpoint's dictionary of gene symbols, fetched if it is published; None where it has none."""
    for file in checkpoint_files(checkpoint):
        if file.target.match(GENE_NAMES):
            return fetch(file)
    return next(iter(sorted(checkpoint_path(checkpoint).glob(GENE_NAMES))), None)


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Return the hash of a file, which is read again only when its size or time has changed."""
    return _digest(path, algorithm, path.stat().st_size, path.stat().st_mtime_ns)


def fetch(file: RemoteFile, *, wait: Callable[[float], None] = time.sleep) -> Path:
    """Return a file below the downloads folder, fetching it if it is not there yet.

    A file that was put in its place by hand is checked like a fetched one. `wait` waits so many seconds between tries.

    Raises
    ------
    UserError
        It cannot be fetched (no network, offline, refused, disk full), or what came is not what it should be.
    """
    if not is_present(file):
        paths.DOWNLOADS.mkdir(parents=True, exist_ok=True)
        with FileLock(paths.DOWNLOADS / ".lock"):
            if file.target.is_file():
                _record(file, _checked(file, file.target))
            elif not is_present(file):
                _fetch(file, wait)
    return file.target


def is_present(file: RemoteFile) -> bool:
    """Return whether a file is there with the size and time that it had when it was checked."""
    entry = _read_lock().get(file.name)
    if entry is None or not file.target.is_file():
        return False
    state = file.target.stat()
    algorithm, _, digest = (file.checksum or "").partition(":")
    return (state.st_size, state.st_mtime_ns, digest) == (entry["size"], entry["modified"], entry.get(algorithm, ""))


def content_key(file: RemoteFile) -> str:
    """Return the checksum by which a file is known: the pinned one, else that of its first download."""
    if file.checksum is not None:
        return file.checksum
    entry = _read_lock().get(file.name)
    if entry is None:
        msg = (
            f"{file.target} was not downloaded yet, and its checksum is not known before; fetch it by "
            "`python -m tuneformer.data.download` and the name of the study."
        )
        raise UserError(msg)
    return f"sha256:{entry['sha256']}"


def _fetch(file: RemoteFile, wait: Callable[[float], None]) -> None:
    """Fetch, check and name a file that is not there."""
    if constants.is_offline_mode():
        msg = f"{file.target} is not there, and HF_HUB_OFFLINE forbids fetching it; unset it, or {BY_HAND} {file.curl}"
        raise UserError(msg)
    file.target.parent.mkdir(parents=True, exist_ok=True)
    part = file.target.with_name(f"{file.target.name}.part")
    try:
        _transfer_patiently(file, part, wait)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(_disk_full(file)) from error
    try:
        entry = _checked(file, part)
    except UserError:
        part.unlink()
        raise
    finally:
        _tag(part).unlink(missing_ok=True)
    part.replace(file.target)
    _record(file, entry)
    print(f"{file.name}: complete and checked ({entry['size'] / MB:.1f} MB)", file=sys.stderr, flush=True)


def _transfer_patiently(file: RemoteFile, part: Path, wait: Callable[[float], None]) -> None:
    """Try again after passing failures, as long as new bytes come, and then `TRIES` times."""
    failures, before = 0, 0
    while failures < TRIES:
        try:
            return _transfer(file, part)
        except _PassingError as error:
            after = part.stat().st_size if part.is_file() else 0
            failures = 1 if after > before else failures + 1
            before, last = after, error
        if failures < TRIES:
            wait(2.0 ** (failures - 1))
    msg = f"{file.url} could not be fetched ({last}, {failures} times); start again later, or {BY_HAND} {file.curl}"
    raise UserError(msg) from last


def _transfer(file: RemoteFile, part: Path) -> None:
    """Fetch a file into `part`, going on where `part` ends if it is of the same version."""
    start = part.stat().st_size if part.is_file() and _tag(part).is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": _tag(part).read_text(encoding="utf-8")}
    with _answer(file, headers) as answer:
        span, is_part = answer.headers.get("Content-Range", ""), answer.status_code == 206
        if answer.status_code == 416 and span.endswith(f"/{start}"):
            return  # `part` was complete
        if answer.status_code == 416 or (is_part and not span.startswith(f"bytes {start}-")):
            part.unlink(missing_ok=True)
            msg = "the server has another version of the file"
            raise _PassingError(msg)
        start = start if is_part else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if total is not None and file.size not in (None, total):
            msg = f"{file.url} has {total:,} bytes on the server, but should have {file.size:,}; {BY_HAND} {file.curl}"
            raise UserError(msg)
        if total is not None and total - start > shutil.disk_usage(part.parent).free:
            raise UserError(_disk_full(file, total - start))
        version = answer.headers.get("ETag", "W/")
        version = answer.headers.get("Last-Modified", "") if version.startswith("W/") else version
        _tag(part).unlink(missing_ok=True)
        if version:  # else another version could not be told, and nothing is continued
            _tag(part).write_text(version, encoding="utf-8")
        with (
            part.open("ab" if start else "wb") as out,
            tqdm(desc=file.name, initial=start, total=total, unit="B", unit_scale=True, mininterval=5) as bar,
        ):
            for piece in answer.iter_content(1 << 16):
                out.write(piece)
                out.flush()
                bar.update(len(piece))


@contextmanager
def _answer(file: RemoteFile, headers: dict[str, str]) -> Iterator[requests.Response]:
    """Give the answer of a server; raise `_PassingError` for what may pass, and a `UserError` for what will not."""
    try:
        with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            status = answer.status_code
            if status in BUSY:
                msg = f"the server answered {status}"
                raise _PassingError(msg)
            if status not in (200, 206, 416):
                what = f"{REFUSED.get(status, 'failed')} (the server answered {status})"
                msg = f"{file.url} {what}; {BY_HAND} {file.curl}"
                raise UserError(msg)
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                msg = f"{file.url} gave a web page (a login or an error) instead of the file; {BY_HAND} {file.curl}"
                raise UserError(msg)
            yield answer
    except requests.RequestException as error:  # an OSError, which must not be taken for one of the disk
        if isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
            msg = "the connection failed or was cut"
            raise _PassingError(msg) from error
        msg = f"{file.url} could not be fetched ({error}); {BY_HAND} {file.curl}"
        raise UserError(msg) from error


def _checked(file: RemoteFile, path: Path) -> dict[str, Any]:
    """Check size, checksum and content of a file at `path`; return its entry in the lock file."""
    state = path.stat()
    known = f"sha256:{_read_lock().get(file.name, {}).get('sha256')}"
    algorithm, _, expected = (file.checksum or known).partition(":")
    digest = file_hash(path, algorithm)
    if file.size not in (None, state.st_size):
        fault = f"has {state.st_size:,} bytes, but should have {file.size:,}"
    elif expected not in ("None", digest):
        source = "its publisher" if file.checksum else "lock.json of its first download"
        fault = f"is not the right file: its checksum differs from that of {source}"
    else:
        fault = "" if file.checksum else _content_fault(path, file.target.suffix)
    if fault:
        msg = f"{path} {fault}; delete {file.target} if it is there and start again, or {BY_HAND} {file.curl}"
        raise UserError(msg)
    return {"size": state.st_size, "modified": state.st_mtime_ns, "source": file.url, algorithm: digest}


def _content_fault(path: Path, suffix: str) -> str:
    """Read a file as what it should be; say what is wrong if it is cut short or of another kind."""
    try:
        if suffix == ".gz":
            with gzip.open(path) as handle, Path(os.devnull).open("wb") as nowhere:
                shutil.copyfileobj(handle, nowhere)
        elif suffix == ".arrow":
            with pa.memory_map(str(path)) as handle, pa.ipc.open_stream(handle) as stream:
                for _ in stream:
                    pass
        elif suffix == ".h5ad":
            h5py.File(path).close()
        else:
            {".pickle": read_pickle, ".json": read_json}[suffix](path)
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        return f"is cut short or no {suffix} file ({' '.join(str(error).split())[:200]})"
    return ""


@functools.cache
def _digest(path: Path, algorithm: str, _size: int, _time: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def _read_lock() -> dict[str, Any]:
    """Return what was recorded of every fetched file: size, time of change, source, checksum."""
    path = paths.DOWNLOADS / "lock.json"
    return read_json(path) if path.is_file() else {}


def _record(file: RemoteFile, entry: dict[str, Any]) -> None:
    write_json(paths.DOWNLOADS / "lock.json", dict(sorted((_read_lock() | {file.name: entry}).items())))


def _tag(part: Path) -> Path:
    """Return where the version of which `part` is a part is noted."""
    return part.with_name(f"{part.name}.tag")


def _disk_full(file: RemoteFile, needed: int | None = None) -> str:
    free = shutil.disk_usage(file.target.parent).free / MB
    size = "" if needed is None else f" {needed / MB:.0f} MB of"
    return (
        f"The disk is full:{size} {file.target.name} cannot be written to {file.target.parent} ({free:.0f} MB free); "
        "make room, or set TUNEFORMER_DOWNLOADS to a folder on another disk, and start again: the download goes on "
        "where it stopped."
    )
