"""Files from the network: fetched once, checked, kept, and never taken for what they are not.

In: a `RemoteFile`, or as a command the name of a study. Out: the file below the downloads folder (`data/`, or
``TUNEFORMER_DOWNLOADS``), whole and checked; or a `DownloadError` that says what to do.

A file is written as ``<name>.part`` and gets its name only when its size, its checksum and its content have been
checked. A download that was cut goes on where it stopped. A file of which no checksum is known is recorded in
``lock.json`` at its first download, and checked against it ever after.
"""

import argparse
import errno
import gzip
import hashlib
import json
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import huggingface_hub
import pyarrow as pa
import requests
from filelock import FileLock
from httpx2 import HTTPError as HubTransportError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from tuneformer.data.pickles import PickleError, read_pickle
from tuneformer.data.readers import CellsError
from tuneformer.study import paths
from tuneformer.study.params import ParameterError

Kind = Literal["hdf5", "gzip", "pickle", "safetensors", "json", "arrow"]

TRIES = 5  # in a row without a single new byte
LONGEST_WAIT = 30.0  # seconds between two tries
TIMEOUT = (15, 60)  # seconds to connect, and between two pieces
PIECE = 1 << 16  # bytes
REPORT_EVERY = 5.0  # seconds between two lines of progress
BUSY = (408, 425, 429, 500, 502, 503, 504)  # answers that may be another one soon
MB = 1e6
ENDPOINT = constants.ENDPOINT  # of the Hub; HF_ENDPOINT names another
constants.HF_HUB_DISABLE_XET = True  # plain HTTP, which goes on where it was cut, and fails in ways that are known


class DownloadError(CellsError):
    """A file that could not be fetched, or is not the one it should be; the message says what to do."""


class _PassingError(Exception):
    """A failure that another try may mend."""


@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository on the Hugging Face Hub, at one revision."""

    repo: str
    path: str
    revision: str = "main"
    repo_type: Literal["model", "dataset"] = "model"

    @property
    def url(self) -> str:
        """Address of the file, for a browser or curl."""
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        return f"{ENDPOINT}/{prefix}{self.repo}/resolve/{self.revision}/{self.path}"


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be fetched.

    ``name`` is its path below the downloads folder, ``source`` an address or a `HubPath`, ``size`` in bytes,
    ``checksum`` such as ``sha256:…`` or ``md5:…``; None where it is not known.
    """

    name: str
    source: str | HubPath
    kind: Kind
    size: int | None = None
    checksum: str | None = None

    @property
    def url(self) -> str:
        """Address of the file."""
        return self.source if isinstance(self.source, str) else self.source.url

    @property
    def target(self) -> Path:
        """Where the file is kept."""
        return paths.DOWNLOADS / self.name


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a repository on the Hub whose files are asked for at the first download."""

    name: str
    source: HubPath
    kind: Kind
    size: int | None = None

    @property
    def target(self) -> Path:
        """Where the folder is kept."""
        return paths.DOWNLOADS / self.name


def fetch(remote: RemoteFile | RemoteFolder, *, wait: Callable[[float], None] = time.sleep) -> Path:
    """Return a file or folder below the downloads folder, fetching what is not there yet.

    Parameters
    ----------
    remote
        What to fetch. A file that was put in its place by hand is checked like a fetched one.
    wait
        Waits for so many seconds between two tries.

    Raises
    ------
    DownloadError
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


def is_present(remote: RemoteFile | RemoteFolder) -> bool:
    """Return whether a file, or every file of a folder, is there and is the one that was checked."""
    lock = _read_lock()
    entry = lock.get(remote.name)
    if isinstance(remote, RemoteFolder):
        return entry is not None and all(_is_unchanged(f"{remote.name}/{file}", lock) for file in entry["files"])
    return _is_unchanged(remote.name, lock) and remote.checksum in (None, *_checksums(entry))


def content_hash(remote: RemoteFile | RemoteFolder) -> str:
    """Return the SHA-256 by which the content of a fetched file is known; of a folder, that of its files' hashes.

    A file whose checksum is pinned is known by it, whether it is there or not.

    Raises
    ------
    DownloadError
        The checksum is not pinned, and the file was not fetched yet.
    """
    if isinstance(remote, RemoteFile) and remote.checksum is not None:
        return remote.checksum
    lock = _read_lock()
    if remote.name not in lock:
        msg = (
            f"{remote.target} was not downloaded yet, and its checksum is not known before; fetch it by python -m "
            "tuneformer.data.download and the name of the study."
        )
        raise DownloadError(msg)
    if isinstance(remote, RemoteFile):
        return f"sha256:{lock[remote.name]['sha256']}"
    text = "\n".join(f"{lock[f'{remote.name}/{file}']['sha256']} {file}" for file in lock[remote.name]["files"])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _fetch_file(file: RemoteFile, wait: Callable[[float], None]) -> None:
    """Check a file that is there, or fetch, check and name it."""
    if file.target.is_file():
        entry = _check(file, file.target)
        _record(file.name, entry)
        return
    _refuse_offline(file)
    file.target.parent.mkdir(parents=True, exist_ok=True)
    part = file.target.with_name(f"{file.target.name}.part")
    transfer = _from_address if isinstance(file.source, str) else _from_hub
    try:
        _with_patience(lambda: transfer(file, part), file, part, wait)
        entry = _check(file, part)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(file.target.parent).free
        msg = (
            f"The disk is full: {file.target.name} could not be written to {file.target.parent} ({free / MB:.0f} MB "
            "free); make room, or set TUNEFORMER_DOWNLOADS to a folder on another disk, and start again: the download "
            "goes on where it stopped."
        )
        raise DownloadError(msg) from error
    part.replace(file.target)
    _validator_of(part).unlink(missing_ok=True)
    _record(file.name, entry)
    _say(f"{file.name}: complete and checked ({file.target.stat().st_size / MB:.1f} MB)")


def _with_patience(transfer: Callable[[], None], file: RemoteFile, part: Path, wait: Callable[[float], None]) -> None:
    """Try again after passing failures, as long as new bytes come, and then `TRIES` times."""
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            transfer()
        except _PassingError as error:
            after = part.stat().st_size if part.is_file() else 0
            failures = 1 if after > before else failures + 1
            if failures >= TRIES:
                msg = (
                    f"{file.url} could not be fetched ({error}, {TRIES} times); start again later, or {_by_hand(file)}."
                )
                raise DownloadError(msg) from error
            pause = min(2.0 ** (failures - 1), LONGEST_WAIT)
            _say(f"{file.name}: {error}; next try in {pause:.0f} s")
            wait(pause)
        else:
            return


def _from_address(file: RemoteFile, part: Path) -> None:
    """Fetch a file from a web address into `part`, going on where `part` ends if it is of the same file."""
    validator = _validator_of(part)
    start = part.stat().st_size if part.is_file() and validator.is_file() else 0
    if start and start == file.size:
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text(encoding="utf-8")}
    try:
        with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status_code == requests.codes.requested_range_not_satisfiable and whole == str(start):
                return  # `part` was complete
            start = _checked_start(file, answer, start, part)
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            _check_room(file, part, start, total)
            tag = answer.headers.get("ETag", "")
            tag = answer.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
            if tag:
                validator.write_text(tag, encoding="utf-8")
            else:
                validator.unlink(missing_ok=True)
            with part.open("ab" if start else "wb") as out:
                _copy(answer.iter_content(PIECE), out, file, start, total)
    except requests.Timeout as error:
        msg = "no answer in time"
        raise _PassingError(msg) from error
    except requests.RequestException as error:  # an OSError, which must not be taken for one of the disk
        if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            msg = "the connection failed or was cut"
            raise _PassingError(msg) from error
        msg = f"{file.url} could not be fetched ({error}); {_by_hand(file)}."
        raise DownloadError(msg) from error


def _checked_start(file: RemoteFile, answer: requests.Response, start: int, part: Path) -> int:
    """Return the byte at which the answer begins; refuse an answer that is not the file."""
    status = answer.status_code
    if status in BUSY:
        msg = f"the server answered {status}"
        raise _PassingError(msg)
    stale = status == requests.codes.partial_content and not answer.headers.get("Content-Range", "").startswith(
        f"bytes {start}-"
    )
    if stale or status == requests.codes.requested_range_not_satisfiable:
        part.unlink(missing_ok=True)
        msg = "the server has another version of the file"
        raise _PassingError(msg)
    if status not in (requests.codes.ok, requests.codes.partial_content):
        what = {401: "asks for a login", 403: "is not allowed", 404: "was not found", 410: "is gone"}.get(
            status, "failed"
        )
        msg = f"{file.url} {what} (the server answered {status}); {_by_hand(file)}."
        raise DownloadError(msg)
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError(_web_page(file))
    return start if status == requests.codes.partial_content else 0


def _check_room(file: RemoteFile, part: Path, start: int, total: int | None) -> None:
    """Refuse a file of another size than it should have, or for which the disk has no room."""
    if total is not None and file.size is not None and total != file.size:
        msg = (
            f"{file.url} has {total:,} bytes on the server, but should have {file.size:,}: it is another version, "
            f"or not the file; {_by_hand(file)}."
        )
        raise DownloadError(msg)
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        msg = (
            f"{file.target.name} needs {(total - start) / MB:.0f} MB in {part.parent}, where {free / MB:.0f} MB are "
            "free; make room, or set TUNEFORMER_DOWNLOADS to a folder on another disk."
        )
        raise DownloadError(msg)


def _copy(pieces: Any, out: Any, file: RemoteFile, start: int, total: int | None) -> None:
    """Write what arrives, with a line of progress now and then."""
    done, begun = start, time.monotonic()
    reported = begun
    of = "" if total is None else f" of {total / MB:.0f}"
    _say(f"{file.name}: {'fetching' if not start else f'going on at {start / MB:.0f} MB of'} {file.url}")
    for piece in pieces:
        out.write(piece)
        out.flush()
        done += len(piece)
        now = time.monotonic()
        if now - reported >= REPORT_EVERY:
            _say(f"{file.name}: {done / MB:.0f}{of} MB, {(done - start) / MB / (now - begun):.1f} MB/s")
            reported = now


def _from_hub(file: RemoteFile, part: Path) -> None:
    """Fetch a file of the Hugging Face Hub by its own client, which keeps and resumes half a file itself."""
    source = file.source
    try:
        fetched = huggingface_hub.hf_hub_download(
            source.repo,
            source.path,
            repo_type=source.repo_type,
            revision=source.revision,
            local_dir=paths.DOWNLOADS / ".hub",
            endpoint=ENDPOINT,
        )
    except (HubTransportError, OSError) as error:
        raise _hub_failure(file, error) from error
    Path(fetched).replace(part)


def _hub_failure(file: RemoteFile | RemoteFolder, error: Exception) -> Exception:
    """Return what to raise for a failure of the Hub's client: to try again, to give up, or the disk's own error."""
    reason = " ".join(str(error).split())[:200]
    url = file.source.url
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in BUSY:
            return _PassingError(f"the server answered {status}")
        return DownloadError(f"{url} was refused (the server answered {status}); {_by_hand(file)}.")
    if isinstance(error, LocalEntryNotFoundError):  # its client has tried often enough
        return DownloadError(f"{url} cannot be reached; start again later, or {_by_hand(file)}.")
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if "Consistency check failed" in reason:
        return _PassingError("the connection was cut")
    if isinstance(error, HubTransportError) or "connection" in reason.lower():
        return _PassingError("the connection failed or was cut")
    return DownloadError(f"{url} could not be fetched ({reason}); {_by_hand(file)}.")


def _listed(folder: RemoteFolder, wait: Callable[[float], None]) -> list[RemoteFile]:
    """Return the files of a folder on the Hub: those of its first download, else those that the Hub names now.

    The commit that the revision stands for is recorded with them, and used ever after.
    """
    entry = _read_lock().get(folder.name)
    if entry is None:
        _refuse_offline(folder)
        entry = {}
        _with_patience(lambda: entry.update(_ask_for_files(folder)), folder, folder.target, wait)
        _record(folder.name, entry)
    source = folder.source
    return [
        RemoteFile(
            f"{folder.name}/{name}",
            HubPath(source.repo, f"{source.path}/{name}", entry["revision"], source.repo_type),
            "json" if name.endswith(".json") else folder.kind,
            size=size,
        )
        for name, size in entry["files"].items()
    ]


def _ask_for_files(folder: RemoteFolder) -> dict[str, Any]:
    """Ask the Hub for the names and sizes of the files of a folder, and the commit they belong to."""
    source, api = folder.source, huggingface_hub.HfApi(endpoint=ENDPOINT)
    try:
        commit = api.repo_info(source.repo, revision=source.revision, repo_type=source.repo_type).sha
        tree = list(
            api.list_repo_tree(source.repo, source.path, recursive=True, revision=commit, repo_type=source.repo_type)
        )
    except (HubTransportError, OSError) as error:
        raise _hub_failure(folder, error) from error
    files = {
        entry.path.removeprefix(f"{source.path}/"): entry.size
        for entry in tree
        if isinstance(entry, huggingface_hub.hf_api.RepoFile)
    }
    return {"revision": commit, "files": files}


def _check(file: RemoteFile, path: Path) -> dict[str, Any]:
    """Check size, checksum and content of a file at `path`; a fetched one that fails is removed.

    Returns
    -------
    Its entry in the lock file.
    """
    try:
        with path.open("rb") as handle:
            if handle.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
                raise DownloadError(_web_page(file))
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            msg = f"{path} has {size:,} bytes, but should have {file.size:,}; {_again(file)}."
            raise DownloadError(msg)
        entry = {"size": size, "modified": path.stat().st_mtime_ns, "source": file.url} | _digests(path, file.checksum)
        known = _read_lock().get(file.name)
        for expected in filter(None, [file.checksum, known and f"sha256:{known['sha256']}"]):
            if expected not in _checksums(entry):
                where = "lock.json of its first download" if expected != file.checksum else "its publisher"
                msg = f"{path} is not the right file: its checksum differs from that of {where}; {_again(file)}."
                raise DownloadError(msg)
        _check_content(file, path)
    except DownloadError:
        if path != file.target:
            path.unlink()
            _validator_of(path).unlink(missing_ok=True)
        raise
    return entry


def _check_content(file: RemoteFile, path: Path) -> None:
    """Refuse a file that is cut short or of another kind, by reading it as what it should be."""
    try:
        if file.kind == "hdf5":
            h5py.File(path).close()
        elif file.kind == "gzip":
            with gzip.open(path) as handle:
                while handle.read(1 << 20):
                    pass
        elif file.kind == "pickle":
            read_pickle(path)
        elif file.kind == "safetensors":
            with safe_open(path, framework="np"):
                pass
        elif file.kind == "json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            with pa.memory_map(str(path)) as handle, pa.ipc.open_stream(handle) as stream:
                for _ in stream:
                    pass
    except (OSError, EOFError, ValueError, zlib.error, PickleError, SafetensorError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} is cut short or no {file.kind} file ({reason}); {_again(file)}."
        raise DownloadError(msg) from error


def _digests(path: Path, checksum: str | None) -> dict[str, str]:
    """Return the SHA-256 of a file, and its MD5 if that is what is known of it; the file is read once."""
    digests = {"sha256": hashlib.sha256()}
    if checksum is not None and checksum.startswith("md5:"):
        digests["md5"] = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            for digest in digests.values():
                digest.update(piece)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _checksums(entry: dict[str, Any]) -> list[str]:
    return [f"{name}:{entry[name]}" for name in ("sha256", "md5") if name in entry]


def _is_unchanged(name: str, lock: dict[str, Any]) -> bool:
    """Return whether a file is there with the size and time of change that it had when it was checked."""
    path, entry = paths.DOWNLOADS / name, lock.get(name)
    if entry is None or not path.is_file():
        return False
    state = path.stat()
    return (state.st_size, state.st_mtime_ns) == (entry["size"], entry["modified"])


def _read_lock() -> dict[str, Any]:
    """Return what was recorded of every fetched file: size, time of change, source, checksums."""
    path = paths.DOWNLOADS / "lock.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} was not read ({error}); restore it, or delete it to have the files checked and recorded anew."
        raise DownloadError(msg) from error


def _record(name: str, entry: dict[str, Any]) -> None:
    """Write the entry of a file into the lock file."""
    lock = dict(sorted((_read_lock() | {name: entry}).items()))
    paths.write_text(paths.DOWNLOADS / "lock.json", json.dumps(lock, indent=2) + "\n")


def _validator_of(part: Path) -> Path:
    """Return where the tag of the version of which `part` is a part is kept."""
    return part.with_name(f"{part.name}.tag")


def _refuse_offline(remote: RemoteFile | RemoteFolder) -> None:
    """Raise if the user said that there is no network."""
    if constants.is_offline_mode():
        msg = f"{remote.target} is not there, and HF_HUB_OFFLINE forbids to fetch it; unset it, or {_by_hand(remote)}."
        raise DownloadError(msg)


def _web_page(file: RemoteFile) -> str:
    return f"{file.url} gave a web page (a login or an error) instead of the file; {_by_hand(file)}."


def _again(file: RemoteFile) -> str:
    """Return the remedy for a file that is not what it should be."""
    return f"delete {file.target} if it is there and start again, or {_by_hand(file)}"


def _by_hand(remote: RemoteFile | RemoteFolder) -> str:
    """Return how to fetch without this program."""
    if isinstance(remote, RemoteFolder):
        return f"download the folder {remote.source.path} of {remote.source.repo} by hand into {remote.target}"
    return f"download it by hand: curl -L --create-dirs -o {remote.target} '{remote.url}'"


def _say(line: str) -> None:
    """Show a line of progress."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Fetch what a study needs: its checkpoint, its cells, its list of genes; say so if a file of yours is missing."""
    from tuneformer.data import catalog  # which knows the files of a study, and imports this module
    from tuneformer.study import grid

    parser = argparse.ArgumentParser(prog="python -m tuneformer.data.download", description=main.__doc__)
    parser.add_argument("batch", help="name of a file in params/, without .yaml; or default, or all")
    try:
        studies = {run.study: run for run in grid.batch(parser.parse_args(arguments).batch)}
        for settings in studies.values():
            catalog.source_path(settings)
            for remote in catalog.needed(settings):
                fetch(remote)
    except (CellsError, ParameterError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
