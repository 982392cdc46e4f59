"""Paths, and writes that happen whole or not at all."""

import subprocess
import sys

import pytest

from tuneformer.study import paths
from tuneformer.study.params import load_study


def test_the_root_is_the_repository():
    assert (paths.ROOT / "Snakefile").is_file()
    assert paths.ASSETS.parent.samefile(paths.ROOT / "lib" / "tuneformer")


def test_two_runs_never_share_a_folder():
    settings = load_study("demo")
    changes = [{"task": "a"}, {"train_set": "b"}, {"strategy": "lora"}, {"seed": 7}, {"study": "c"}]
    folders = [paths.run_dir(settings.model_copy(update=change)) for change in [{}, *changes]]
    assert len(set(folders)) == len(folders)
    assert all(folder.is_relative_to(paths.RUNS) for folder in folders)


def test_a_path_of_a_user_is_expanded(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/somewhere")
    assert str(paths.user_path("$SOMEWHERE/cells.h5ad")) == "/somewhere/cells.h5ad"
    assert paths.user_path("cells.h5ad") == paths.ROOT / "cells.h5ad"
    assert "~" not in str(paths.user_path("~/cells.h5ad"))


def test_runs_can_lie_elsewhere(tmp_path):
    command = [sys.executable, "-c", "from tuneformer.study import paths; print(paths.RUNS)"]
    shown = subprocess.run(command, env={"TUNEFORMER_RUNS": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == str(tmp_path)


def test_a_file_is_written_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    paths.write_text(target, "première\n")
    assert target.read_bytes() == "première\n".encode()
    paths.write_text(target, "second\n")
    assert target.read_text() == "second\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write_half():
        with paths.atomic_path(target) as partial:
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
        with paths.atomic_path(target) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [target]
