"""How fetched files are checked and recorded, and pickles read; the network's own faults are in tests/faults."""

import gzip
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys

import anndata as ad
import datasets
import numpy as np
import pytest

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch as download
from tuneformer.data.fetch import RemoteFile, fetch
from tuneformer.data.unpickle import read_pickle


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A downloads folder of this test, and no network."""
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


def examples(folder):
    """Return one whole file of each kind."""
    ad.AnnData(np.eye(100, dtype=np.float32)).write_h5ad(folder / "a.h5ad")
    datasets.Dataset.from_dict({"x": list(range(1000))}).save_to_disk(folder / "a.dataset")
    return {
        "h5ad": (folder / "a.h5ad").read_bytes(),
        "arrow": next((folder / "a.dataset").glob("*.arrow")).read_bytes(),
        "gz": gzip.compress(b"gene\tcell\tcount\n" * 100),
        "pickle": pickle.dumps({"gene": [1, 2.5, None, True, np.float64(3)]}),
        "json": json.dumps({"model_type": "bert"}).encode(),
    }


def test_content_is_read_as_what_it_should_be(folder, tmp_path):
    whole = examples(tmp_path)
    for kind, content in whole.items():
        file = RemoteFile(f"set/whole.{kind}", "http://nowhere")
        file.target.parent.mkdir(exist_ok=True)
        file.target.write_bytes(content)
        assert fetch(file).is_file()
        cut = RemoteFile(f"set/cut.{kind}", "http://nowhere")
        cut.target.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(UserError, match=rf"cut\.{kind} is cut short or no \.{kind} file \("):
            fetch(cut)
        other = RemoteFile(f"set/other.{kind}", "http://nowhere")
        other.target.write_bytes(whole["json" if kind != "json" else "gz"])
        with pytest.raises(UserError, match=rf"other\.{kind} is cut short or no \.{kind} file \("):
            fetch(other)


def test_a_checked_file_is_not_read_again_until_it_changes(folder, monkeypatch):
    file = RemoteFile("file.json", "http://nowhere")
    file.target.write_text("{}")
    fetch(file)
    monkeypatch.setattr(download, "_digest", lambda *_: pytest.fail("read again"))
    assert fetch(file) == file.target
    monkeypatch.undo()


def test_a_file_that_was_only_touched_is_checked_and_recorded_anew(folder):
    file = RemoteFile("file.json", "http://nowhere")
    file.target.write_text("{}")
    fetch(file)
    file.target.touch()
    assert not download.is_present(file)
    fetch(file)
    assert download.is_present(file)


def test_a_newly_pinned_checksum_counts_for_files_that_are_there(folder):
    file = RemoteFile("file.json", "http://nowhere")
    file.target.write_text("{}")
    fetch(file)
    pinned = RemoteFile("file.json", "http://nowhere", checksum="sha256:" + "0" * 64)
    assert not download.is_present(pinned)
    with pytest.raises(UserError, match="checksum differs from that of its publisher"):
        fetch(pinned)


def test_a_damaged_lock_file_is_said(folder):
    (folder / "lock.json").write_text("{")
    with pytest.raises(UserError, match=r"lock\.json cannot be read .*delete it"):
        fetch(RemoteFile("file.json", "http://nowhere"))


def test_the_folder_can_lie_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from tuneformer.data import fetch; print(fetch.checkpoint_path('Geneformer-V1-10M'))",
    ]
    environment = os.environ | {"TUNEFORMER_DOWNLOADS": str(tmp_path)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(tmp_path / "Geneformer-V1-10M")


@pytest.mark.parametrize("name", download.PUBLISHED)
def test_every_file_of_a_published_checkpoint_is_pinned(name):
    files = download.checkpoint_files(name)
    assert len(files) == 6
    for file in files:
        assert re.fullmatch("sha256:[0-9a-f]{64}", file.checksum)
        assert re.match("https://huggingface.co/ctheodoris/Geneformer/resolve/[0-9a-f]{40}/", file.url)
    assert sum(file.name.endswith(".safetensors") for file in files) == 1
    assert not any(file.name.endswith(".bin") for file in files)
    assert [file.name.split("/")[0] for file in files] == [name] * 6


def test_other_checkpoints_have_nothing_to_fetch(tmp_path):
    assert download.checkpoint_files("demo") == []
    assert download.checkpoint_dir(str(tmp_path)) == tmp_path
    assert download.checkpoint_dir("demo") == paths.ASSETS / "demo_checkpoint"


def test_offline_names_the_file_of_a_checkpoint(folder):
    with pytest.raises(UserError, match=r"Geneformer-V1-10M/config\.json is not there, and HF_HUB_OFFLINE forbids"):
        download.checkpoint_dir("Geneformer-V1-10M")


def test_the_key_of_a_checkpoint_follows_its_weights_and_that_of_a_published_one_is_pinned(tmp_path, folder):
    with pytest.raises(
        UserError, match=r"^checkpoint: .*config\.json does not exist; set checkpoint to one of demo, mini"
    ):
        download.checkpoint_key(str(tmp_path))
    keys = {download.checkpoint_key(name) for name in ("demo", *download.PUBLISHED)}
    assert len(keys) == 4
    for content in ("{}", '{"layers": 1}'):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_text(content)
        keys.add(download.checkpoint_key(str(tmp_path)))
    assert len(keys) == 6


# pickles


def test_plain_content_of_a_pickle_comes_back(tmp_path):
    content = {"a": [1, 2.5, None, True, {"b": "c"}], 3: np.int64(4), "x": np.float32(0.5), "y": np.bool_(False)}
    for protocol in (3, 4, 5):
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert read_pickle(tmp_path / "file.pkl") == content


def test_a_pickle_that_contains_itself_is_read(tmp_path):
    content = [1]
    content.append(content)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content))
    assert read_pickle(tmp_path / "file.pkl")[1][1][0] == 1


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": (1, 2)}, "holds a tuple"),
        ([{1, 2}], "holds a set"),
        ({"a": b"bytes"}, "asks for _codecs.encode|holds a bytes"),
        ({(1, 2): "a"}, "holds a tuple"),
        ({"a": [np.arange(3)]}, r"asks for numpy\._?core\.multiarray\._reconstruct"),
        ({"a": np.datetime64("2020-01-01")}, "holds a datetime64"),
        (print, r"asks for builtins\.print"),
        ({"a": 1j}, r"asks for builtins\.complex"),
    ],
)
def test_anything_else_in_a_pickle_is_named_and_refused(tmp_path, content, found):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"file\\.pkl .*({found}).*take the file from its own source"):
        read_pickle(tmp_path / "file.pkl")


def test_a_large_file_is_hashed_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(download, "LARGE", 3)
    path = tmp_path / "large"
    path.write_text("content")
    first = download.file_hash(path)
    assert first == hashlib.sha256(b"content").hexdigest()
    digest = download._digest
    monkeypatch.setattr(download, "_digest", lambda *_: pytest.fail("read again"))
    assert download.file_hash(path) == first
    monkeypatch.setattr(download, "_digest", digest)
    path.write_text("other content")
    assert download.file_hash(path) != first
