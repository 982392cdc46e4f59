"""How fetched files are checked and recorded, and pickles read; the network's own faults are in tests/faults."""

import gzip
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
import torch
from safetensors.torch import save_file

from tuneformer.data import checkpoint_files, download
from tuneformer.data.download import DownloadError, RemoteFile, fetch
from tuneformer.data.pickles import PickleError, read_pickle
from tuneformer.study import paths


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
    save_file({"weight": torch.arange(100.0)}, folder / "a.safetensors")
    datasets.Dataset.from_dict({"x": list(range(1000))}).save_to_disk(folder / "a.dataset")
    return {
        "hdf5": (folder / "a.h5ad").read_bytes(),
        "safetensors": (folder / "a.safetensors").read_bytes(),
        "arrow": next((folder / "a.dataset").glob("*.arrow")).read_bytes(),
        "gzip": gzip.compress(b"gene\tcell\tcount\n" * 100),
        "pickle": pickle.dumps({"gene": [1, 2.5, None, True, np.float64(3)]}),
        "json": json.dumps({"model_type": "bert"}).encode(),
    }


def test_content_is_read_as_what_it_should_be(folder, tmp_path):
    whole = examples(tmp_path)
    for kind, content in whole.items():
        file = RemoteFile(f"set/whole.{kind}", "http://nowhere", kind)
        file.target.parent.mkdir(exist_ok=True)
        file.target.write_bytes(content)
        assert fetch(file).is_file()
        cut = RemoteFile(f"set/cut.{kind}", "http://nowhere", kind)
        cut.target.write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(DownloadError, match=rf"cut\.{kind} is cut short or no {kind} file \("):
            fetch(cut)
        other = RemoteFile(f"set/other.{kind}", "http://nowhere", kind)
        other.target.write_bytes(whole["json" if kind != "json" else "gzip"])
        with pytest.raises(DownloadError, match=rf"other\.{kind} is cut short or no {kind} file \("):
            fetch(other)


def test_a_checked_file_is_not_read_again_until_it_changes(folder, monkeypatch):
    file = RemoteFile("file.json", "http://nowhere", "json")
    file.target.write_text("{}")
    fetch(file)
    monkeypatch.setattr(download, "_digests", lambda *_: pytest.fail("read again"))
    assert fetch(file) == file.target
    monkeypatch.undo()


def test_a_file_that_was_only_touched_is_checked_and_recorded_anew(folder):
    file = RemoteFile("file.json", "http://nowhere", "json")
    file.target.write_text("{}")
    fetch(file)
    file.target.touch()
    assert not download.is_present(file)
    fetch(file)
    assert download.is_present(file)


def test_a_newly_pinned_checksum_counts_for_files_that_are_there(folder):
    file = RemoteFile("file.json", "http://nowhere", "json")
    file.target.write_text("{}")
    fetch(file)
    pinned = RemoteFile("file.json", "http://nowhere", "json", checksum="sha256:" + "0" * 64)
    assert not download.is_present(pinned)
    with pytest.raises(DownloadError, match="checksum differs from that of its publisher"):
        fetch(pinned)


def test_a_damaged_lock_file_is_said(folder):
    (folder / "lock.json").write_text("{")
    with pytest.raises(DownloadError, match=r"lock\.json was not read .*restore it, or delete it"):
        fetch(RemoteFile("file.json", "http://nowhere", "json"))


def test_the_folder_can_lie_elsewhere(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from tuneformer.study import paths; print(paths.checkpoint_dir('Geneformer-V1-10M'))",
    ]
    environment = os.environ | {"TUNEFORMER_DOWNLOADS": str(tmp_path)}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(tmp_path / "Geneformer-V1-10M")


@pytest.mark.parametrize("name", paths.PUBLISHED)
def test_every_file_of_a_published_checkpoint_is_pinned(name):
    files = checkpoint_files.files_of(name)
    assert len(files) == 6
    for file in files:
        assert re.fullmatch("sha256:[0-9a-f]{64}", file.checksum)
        assert re.fullmatch("[0-9a-f]{40}", file.source.revision)
        assert file.source.url.startswith(
            f"https://huggingface.co/ctheodoris/Geneformer/resolve/{checkpoint_files.REVISION}/"
        )
    assert sum(file.name.endswith(".safetensors") for file in files) == 1
    assert not any(file.name.endswith(".bin") for file in files)
    assert [file.name.split("/")[0] for file in files] == [name] * 6


def test_other_checkpoints_have_nothing_to_fetch(tmp_path):
    assert checkpoint_files.files_of("demo") == []
    assert checkpoint_files.ensure(str(tmp_path)) == tmp_path
    assert checkpoint_files.ensure("demo") == paths.ASSETS / "demo_checkpoint"


def test_offline_names_the_file_of_a_checkpoint(folder):
    with pytest.raises(DownloadError, match=r"Geneformer-V1-10M/config\.json is not there, and HF_HUB_OFFLINE forbids"):
        checkpoint_files.ensure("Geneformer-V1-10M")


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
    with pytest.raises(PickleError, match=f"file\\.pkl .*({found}).*take the file from its own source"):
        read_pickle(tmp_path / "file.pkl")
