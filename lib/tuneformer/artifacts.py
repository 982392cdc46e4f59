"""What is made once: keys, whole-or-nothing writes, and the one cache of the project.

In: what a thing depends on, and a function that makes it. Out: the thing on disk, made only when its key has changed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tuneformer

_REMEMBERED: dict[str, tuple[str, Any]] = {}


class UserError(ValueError):
    """Something that a user can mend; the message is one sentence that says what, where, and what to do."""


def key(*parts: Any) -> str:
    """Hash everything that a thing depends on: name and version of its stage, parameters, keys of inputs.

    Returns the first 16 hexadecimal digits of the SHA-256 of the package's version and the parts as canonical JSON
    (sorted keys, no spaces). A part that JSON cannot hold is a TypeError; NaN or infinity a ValueError.
    """
    text = json.dumps([tuneformer.__version__, *parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored_key(folder: Path) -> str | None:
    """Return the key of what a folder holds; None if it holds nothing whole."""
    path = Path(folder) / "key"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def made(folder: Path, key: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that was made of the inputs that `key` stands for, making it if need be.

    `make` fills an empty folder, which then replaces `folder`; when it raises, `folder` stays as it was. Two processes
    that ask for the same folder make it once: the second waits for the first.
    """
    from filelock import FileLock

    folder = Path(folder)
    if stored_key(folder) != key:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if stored_key(folder) != key:
                with atomic_path(folder) as partial:
                    partial.mkdir()
                    make(partial)
                    (partial / "key").write_text(key + "\n", encoding="utf-8")
    return folder


def remembered(what: str, key: str, make: Callable[[], Any]) -> Any:
    """Return what this process made last of the inputs that `key` stands for; it must not be changed."""
    if _REMEMBERED.get(what, ("",))[0] != key:
        _REMEMBERED.pop(what, None)  # so that two are not in memory at once
        _REMEMBERED[what] = key, make()
    return _REMEMBERED[what][1]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; move it onto `target` when the block ends without an error.

    Works for a file or a folder. A reader sees the old thing or the new one, never half of either; after an error the
    temporary path is removed and `target` is as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    partial = scratch / target.name
    try:
        yield partial
        _flush_to_disk(partial)
        replaced = scratch / "replaced"
        if partial.is_dir() and target.exists():
            target.rename(replaced)
        try:
            partial.replace(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` atomically, as UTF-8."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, content: Any) -> None:
    """Write `content` to `target` atomically as JSON, in which NaN is not allowed."""
    write_text(target, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; one that is missing or no JSON is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{os.path.relpath(path)} cannot be read ({error}); delete it and run the command that makes it again."
        raise UserError(msg) from error


def _flush_to_disk(path: Path) -> None:
    """Force `path` (a file, or every file of a folder) out of the system's buffers."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
