"""What can go wrong on the way of a file from the network, and what is left behind."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
from file_server import FileServer
from scipy import sparse

from tuneformer.data import download
from tuneformer.data.download import DownloadError, HubPath, RemoteFile, RemoteFolder, fetch
from tuneformer.study import paths

PIECES = 1 << 14  # bytes that the Hub's client takes at a time
GZIPPED = gzip.compress(np.random.default_rng(0).bytes(600_000))  # does not shrink: a download of many pieces


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, and a downloads folder of this test."""
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    with FileServer(files={"/file.gz": GZIPPED}) as running:
        monkeypatch.setattr(download, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def waits():
    return []


def remote(server, **known):
    return RemoteFile("set/file.gz", f"{server.url}/file.gz", "gzip", **known)


def refusal(file, waits=None):
    """Return the one sentence of a refused download, and check that nothing stands under the file's name."""
    with pytest.raises(DownloadError) as caught:
        fetch(file, wait=(waits if waits is not None else []).append)
    message = str(caught.value)
    assert message.endswith((".", "stopped.")) or "curl -L" in message
    assert "\n" not in message
    return message


def test_a_file_is_fetched_once_and_recorded(server, waits):
    file = remote(server)
    assert not download.is_present(file)
    assert fetch(file).read_bytes() == GZIPPED
    assert download.is_present(file)
    assert fetch(file) == file.target
    assert server.requests == [("GET", "/file.gz", None)]
    assert sorted(path.name for path in file.target.parent.iterdir()) == ["file.gz"]
    entry = json.loads((paths.DOWNLOADS / "lock.json").read_text())["set/file.gz"]
    assert entry["size"] == len(GZIPPED)
    assert download.content_hash(file) == f"sha256:{entry['sha256']}"


def test_a_cut_connection_is_taken_up_where_it_was_cut(server, waits):
    server.faults = ["cut"]
    assert fetch(remote(server), wait=waits.append).read_bytes() == GZIPPED
    first, second = server.ranges()
    assert first is None
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert start > len(GZIPPED) // 4
    assert waits == [1.0]


def test_half_a_file_of_another_version_is_not_continued(server, waits):
    server.faults = ["cut", 404]
    refusal(remote(server), waits)
    server.files["/file.gz"] = gzip.compress(b"another version")
    assert fetch(remote(server)).read_bytes() == server.files["/file.gz"]
    assert server.ranges()[-1] is not None


def test_without_a_tag_of_the_version_the_file_is_fetched_anew(server, waits):
    server.tags = False
    server.faults = ["cut"]
    assert fetch(remote(server), wait=waits.append).read_bytes() == GZIPPED
    assert server.ranges() == [None, None]


def test_a_complete_part_is_not_fetched_again(server):
    file = remote(server)
    file.target.parent.mkdir(parents=True)
    part = file.target.with_name("file.gz.part")
    part.write_bytes(GZIPPED)
    part.with_name("file.gz.part.tag").write_text(f'"{hashlib.sha256(GZIPPED).hexdigest()}"')
    assert fetch(file).read_bytes() == GZIPPED
    assert server.requests == [("GET", "/file.gz", f"bytes={len(GZIPPED)}-")]
    assert sorted(path.name for path in file.target.parent.iterdir()) == ["file.gz"]


def test_a_busy_server_is_asked_again(server, waits):
    server.faults = [503, 503, None]
    assert fetch(remote(server), wait=waits.append).read_bytes() == GZIPPED
    assert waits == [1.0, 2.0]


def test_a_server_that_stays_busy_is_given_up(server, waits):
    server.faults = [503] * 20
    message = refusal(remote(server), waits)
    assert message == (
        f"{server.url}/file.gz could not be fetched (the server answered 503, 5 times); start again later, or download "
        f"it by hand: curl -L --create-dirs -o {paths.DOWNLOADS}/set/file.gz '{server.url}/file.gz'."
    )
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_a_connection_that_is_always_cut_is_given_up(server, waits):
    server.tags = False
    server.faults = ["cut"] * 20
    assert "the connection failed or was cut, 5 times" in refusal(remote(server), waits)
    assert len(server.requests) == 5


def test_no_server_at_all(server, waits):
    file = RemoteFile("set/file.gz", "http://127.0.0.1:9/file.gz", "gzip")
    assert "127.0.0.1:9/file.gz could not be fetched (the connection failed or was cut, 5 times)" in refusal(file)


@pytest.mark.parametrize(
    ("status", "what"), [(404, "was not found"), (401, "asks for a login"), (403, "is not allowed"), (202, "failed")]
)
def test_a_refusal_is_final(server, waits, status, what):
    server.faults = [status]
    assert f"/file.gz {what} (the server answered {status}); download it by hand: curl" in refusal(
        remote(server), waits
    )
    assert waits == []


def test_a_login_page_is_not_the_file(server, waits):
    server.faults = ["login"]
    assert "/file.gz gave a web page (a login or an error) instead of the file" in refusal(remote(server), waits)
    server.files["/file.gz"] = b"  <html>said to be a file</html>"
    assert "gave a web page" in refusal(remote(server), waits)
    assert not list(paths.DOWNLOADS.glob("set/*"))


def test_a_wrong_checksum_is_refused_and_the_file_removed(server):
    file = remote(server, checksum="md5:" + "0" * 32)
    assert "is not the right file: its checksum differs from that of its publisher; delete" in refusal(file)
    assert not list(paths.DOWNLOADS.glob("set/*"))
    assert "set/file.gz" not in download._read_lock()


def test_a_wrong_size_is_refused_before_the_download(server):
    message = refusal(remote(server, size=5))
    assert f"has {len(GZIPPED):,} bytes on the server, but should have 5: it is another version" in message


def test_a_file_that_ends_too_early_is_refused_by_its_content(server, tmp_path):
    server.files["/file.gz"] = GZIPPED[:-20]
    assert "is cut short or no gzip file" in refusal(remote(server))
    ad.AnnData(sparse.csr_matrix(np.eye(300, dtype=np.float32))).write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    for damaged in (content[: len(content) // 2], b"gene,cell,count\n"):
        server.files["/cells.h5ad"] = damaged
        file = RemoteFile("set/cells.h5ad", f"{server.url}/cells.h5ad", "hdf5")
        assert "is cut short or no hdf5 file" in refusal(file)
    server.files["/cells.h5ad"] = content
    assert fetch(file).read_bytes() == content


def test_a_file_that_is_not_the_recorded_one_is_refused(server):
    """No checksum is published: that of the first download counts ever after."""
    file = remote(server)
    fetch(file).unlink()
    server.files["/file.gz"] = gzip.compress(b"the publisher changed it")
    assert "checksum differs from that of lock.json of its first download" in refusal(file)
    file.target.write_bytes(gzip.compress(b"somebody changed it here"))
    with pytest.raises(DownloadError, match=r"differs from that of lock\.json"):
        fetch(file)
    assert file.target.is_file()  # what a user put there is not deleted


def test_a_file_put_there_by_hand_is_checked_and_taken(server):
    file = remote(server)
    file.target.parent.mkdir(parents=True)
    file.target.write_bytes(GZIPPED)
    assert fetch(file) == file.target
    assert server.requests == []
    assert download.is_present(file)


def test_offline_says_what_is_missing(server, monkeypatch):
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    message = refusal(remote(server))
    assert message.startswith(f"{paths.DOWNLOADS}/set/file.gz is not there, and HF_HUB_OFFLINE forbids to fetch it")
    assert server.requests == []
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    fetch(remote(server))
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert fetch(remote(server)).is_file()


def test_a_full_disk_is_said_and_the_part_is_kept(server):
    file = remote(server)
    file.target.parent.mkdir(parents=True)
    part = file.target.with_name("file.gz.part")
    part.symlink_to("/dev/full")  # every write fails as on a full disk
    message = refusal(file)
    assert message.startswith("The disk is full: file.gz could not be written to ")
    assert "set TUNEFORMER_DOWNLOADS to a folder on another disk" in message
    part.unlink()
    assert fetch(file).read_bytes() == GZIPPED


def test_a_disk_without_room_is_said_before_the_download(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "file.gz needs 1 MB in" in refusal(remote(server))


def test_other_errors_of_the_disk_are_not_called_full(server, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(download, "_copy", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(remote(server))


def test_killed_halfway_leaves_a_part_and_no_file(server, tmp_path):
    """The process is killed while it writes; the next one goes on from there."""
    server.files["/file.gz"] = GZIPPED
    script = (
        "import os, signal\n"
        "from tuneformer.data import download\n"
        "copy = download._copy\n"
        "def half(pieces, out, *rest):\n"
        "    def some():\n"
        "        for number, piece in enumerate(pieces):\n"
        "            if number == 4:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield piece\n"
        "    copy(some(), out, *rest)\n"
        "download._copy = half\n"
        f"download.fetch(download.RemoteFile('set/file.gz', '{server.url}/file.gz', 'gzip'))\n"
    )
    environment = os.environ | {"TUNEFORMER_DOWNLOADS": str(paths.DOWNLOADS)}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL
    file = remote(server)
    assert not file.target.exists()
    size = file.target.with_name("file.gz.part").stat().st_size
    assert 0 < size < len(GZIPPED)
    assert fetch(file).read_bytes() == GZIPPED
    assert server.ranges()[-1] == f"bytes={size}-"


# The Hub: its own client fetches, and the same checks follow.


@pytest.fixture
def hub(server, monkeypatch):
    """A file and a folder on the Hub; the client's own second of waiting is left out."""
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setattr(download.constants, "DOWNLOAD_CHUNK_SIZE", PIECES)
    server.files["/someone/model/resolve/1234567/weights/config.json"] = b'{"model_type": "bert"}'
    return server


def hub_file(**known):
    return RemoteFile("model/config.json", HubPath("someone/model", "weights/config.json", "1234567"), "json", **known)


def test_a_file_of_the_hub(hub):
    assert fetch(hub_file(size=22)).read_bytes() == b'{"model_type": "bert"}'
    assert download.is_present(hub_file())
    number = len(hub.requests)
    fetch(hub_file())
    assert len(hub.requests) == number


def test_a_file_of_the_hub_that_is_cut_is_taken_up(hub, waits):
    hub.files["/someone/model/resolve/1234567/weights/model.gz"] = GZIPPED
    hub.faults = ["cut"]
    file = RemoteFile("model/model.gz", HubPath("someone/model", "weights/model.gz", "1234567"), "gzip")
    assert fetch(file, wait=waits.append).read_bytes() == GZIPPED
    first, second = hub.ranges()
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) == len(GZIPPED) // 2 // PIECES * PIECES


def test_faults_of_the_hub(hub, waits):
    hub.faults = [503, 503]
    assert fetch(hub_file(), wait=waits.append).is_file()
    assert waits == [1.0, 2.0]
    shutil.rmtree(paths.DOWNLOADS)
    wrong = hub_file(checksum="sha256:" + "0" * 64)
    assert "checksum differs from that of its publisher" in refusal(wrong)
    absent = RemoteFile("model/no.json", HubPath("someone/model", "weights/no.json", "1234567"), "json")
    message = refusal(absent)
    assert "/someone/model/resolve/1234567/weights/no.json was refused (the server answered 404)" in message


def test_a_hub_that_cannot_be_reached(hub, waits, monkeypatch):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setattr(download, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(hub_file(), waits)
    assert message.startswith("http://127.0.0.1:9/someone/model/resolve/1234567/weights/config.json cannot be reached")
    assert waits == []  # its client has waited


def test_a_folder_of_the_hub_is_kept_at_its_first_commit(hub, monkeypatch):
    folder = RemoteFolder(
        "set/cells.dataset", HubPath("someone/corpus", "examples/cells.dataset", repo_type="dataset"), "gzip"
    )
    prefix = f"/datasets/someone/corpus/resolve/{'c0ffee' * 6}c0ff/examples/cells.dataset/"
    hub.files |= {f"{prefix}state.json": b"{}", f"{prefix}part.gz": GZIPPED}
    assert not download.is_present(folder)
    with pytest.raises(DownloadError, match="was not downloaded yet"):
        download.content_hash(folder)
    assert sorted(path.name for path in fetch(folder).iterdir()) == ["part.gz", "state.json"]
    assert download.is_present(folder)
    assert download._read_lock()["set/cells.dataset"]["revision"] == "c0ffee" * 6 + "c0ff"
    before = download.content_hash(folder)
    (folder.target / "part.gz").unlink()
    assert not download.is_present(folder)
    fetch(folder)
    assert sum(path.startswith("/api/") for _, path, _ in hub.requests) == 2  # the list is asked for once
    assert download.content_hash(folder) == before
    (folder.target / "part.gz").unlink()
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to fetch it" in refusal(folder)
