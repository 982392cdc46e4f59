"""What is made once: keys, whole-or-nothing writes, and the one cache."""

import hashlib
import subprocess
import sys
import time

import pytest

from tuneformer import artifacts
from tuneformer.artifacts import UserError, atomic_path, key, made, read_json, stored_key, write_json, write_text


def test_a_key_is_of_the_values_not_of_their_order():
    assert key({"a": 1, "b": [2, None]}) == key({"b": [2, None], "a": 1})
    assert len(key()) == 16
    assert len({key(*parts) for parts in [(), (1,), (1, 2), ("1",), ([1],), (1.5,), (True,), (None,)]}) == 8


def test_a_key_is_the_same_tomorrow(monkeypatch):
    """A changed hash would have every finished run done again."""
    monkeypatch.setattr("tuneformer.__version__", "1.2.3")
    text = '["1.2.3","cells",{"seed":0,"share":0.1}]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert key("cells", {"share": 0.1, "seed": 0}) == expected == "aef1a27b811efb45"


def test_a_key_has_the_package_version(monkeypatch):
    before = key("cells")
    monkeypatch.setattr("tuneformer.__version__", "0.0.0")
    assert key("cells") != before


def test_a_key_refuses_what_has_no_canonical_form(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        key(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        key(tmp_path)


def count(folder):
    """Make a folder that says how often it was made."""

    def make(partial):
        assert list(partial.iterdir()) == []
        counter = folder.parent / "counter"
        number = int(counter.read_text()) + 1 if counter.exists() else 1
        counter.write_text(str(number))
        (partial / "content").write_text(f"made {number}")

    return make


def test_a_thing_is_made_once(tmp_path):
    folder = tmp_path / "new" / "cells"
    assert stored_key(folder) is None
    for _ in range(2):
        assert made(folder, "one", count(folder)) == folder
        assert (folder / "content").read_text() == "made 1"
    assert stored_key(folder) == "one"


def test_it_is_made_again_when_its_key_changes(tmp_path):
    folder = tmp_path / "cells"
    made(folder, "one", count(folder))
    (folder / "left-over").touch()
    made(folder, "two", count(folder))
    assert (folder / "content").read_text() == "made 2"
    assert not (folder / "left-over").exists()
    made(folder, "one", count(folder))
    assert (folder / "content").read_text() == "made 3"


def test_a_folder_without_a_key_is_not_whole(tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    (folder / "content").write_text("half")
    made(folder, "one", count(folder))
    assert (folder / "content").read_text() == "made 1"


@pytest.mark.parametrize("had_one", [False, True])
def test_nothing_is_made_by_half(tmp_path, had_one):
    folder = tmp_path / "cells"
    if had_one:
        made(folder, "one", count(folder))

    def fail(partial):
        (partial / "content").write_text("half")
        msg = "out of memory"
        raise MemoryError(msg)

    with pytest.raises(MemoryError, match="out of memory"):
        made(folder, "two", fail)
    assert stored_key(folder) == ("one" if had_one else None)
    assert folder.exists() == had_one
    made(folder, "two", count(folder))  # and the lock is free again
    assert stored_key(folder) == "two"


WAIT_AND_MAKE = """
import os, sys, time
from pathlib import Path
from tuneformer.artifacts import made

folder = Path(sys.argv[1])

def make(partial):
    time.sleep(0.5)
    (partial / str(os.getpid())).touch()

(folder.parent / f"ready{os.getpid()}").touch()
while not (folder.parent / "go").exists():
    time.sleep(0.01)
made(folder, "one", make)
"""


def test_two_processes_make_it_once(tmp_path):
    folder = tmp_path / "cells"
    command = [sys.executable, "-c", WAIT_AND_MAKE, folder]
    processes = [subprocess.Popen(command) for _ in range(2)]
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len([file for file in folder.iterdir() if file.name != "key"]) == 1
    assert stored_key(folder) == "one"


def test_a_file_is_written_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    write_text(target, "première\n")
    assert target.read_bytes() == "première\n".encode()
    write_text(target, "second\n")
    assert target.read_text() == "second\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half():
        with atomic_path(target) as partial:
            partial.write_text("ha")
            msg = "disk full"
            raise OSError(msg)

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "tokens"
    for content in ("one", "two"):
        with atomic_path(target) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target = tmp_path / "tokens"
    target.mkdir()
    (target / "old").touch()

    def write():
        with atomic_path(target) as partial:
            partial.mkdir()
            monkeypatch.setattr(artifacts.Path, "replace", refuse)

    def refuse(*_):
        msg = "disk gone"
        raise OSError(msg)

    with pytest.raises(OSError, match="disk gone"):
        write()
    assert [path.name for path in target.iterdir()] == ["old"]


def test_json_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "answer.json"
    write_json(path, {"score": 0.1 + 0.2, "low": None})
    assert read_json(path) == {"score": 0.1 + 0.2, "low": None}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": float("nan")})
    assert read_json(path)["low"] is None


@pytest.mark.parametrize("content", [None, "", "{", "\xff"])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "answer.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"answer.json cannot be read \(.*\); delete it and run the command that makes"):
        read_json(path)
