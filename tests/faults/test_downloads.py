"""What can go wrong on the way of a file from the network, and what is left behind."""

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
from file_server import FileServer
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch as download
from tuneformer.data.fetch import RemoteFile, fetch

GZIPPED = gzip.compress(np.random.default_rng(0).bytes(600_000))  # does not shrink: a download of many pieces


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, and a downloads folder of this test."""
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    with FileServer(files={"/file.gz": GZIPPED}) as running:
        yield running


@pytest.fixture
def waits():
    return []


def remote(server, **known):
    return RemoteFile("set/file.gz", f"{server.url}/file.gz", **known)


def refusal(file, waits=None):
    """Return the one sentence of a refused download, and check that nothing stands under the file's name."""
    with pytest.raises(UserError) as caught:
        fetch(file, wait=(waits if waits is not None else []).append)
    message = str(caught.value)
    assert message.endswith(".") or "curl -L" in message
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
    assert download.content_key(file) == f"sha256:{entry['sha256']}"


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
        f"it by hand: curl -L --create-dirs -o {paths.DOWNLOADS}/set/file.gz '{server.url}/file.gz'"
    )
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_a_connection_that_is_always_cut_is_given_up(server, waits):
    server.tags = False
    server.faults = ["cut"] * 20
    assert "the connection failed or was cut, 5 times" in refusal(remote(server), waits)
    assert len(server.requests) == 5


def test_no_server_at_all(server, waits):
    file = RemoteFile("set/file.gz", "http://127.0.0.1:9/file.gz")
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
    assert "is cut short or no .gz file" in refusal(remote(server), waits)
    assert not list(paths.DOWNLOADS.glob("set/*"))


def test_a_wrong_checksum_is_refused_and_the_file_removed(server):
    file = remote(server, checksum="md5:" + "0" * 32)
    assert "is not the right file: its checksum differs from that of its publisher; delete" in refusal(file)
    assert not list(paths.DOWNLOADS.glob("set/*"))
    assert "set/file.gz" not in download._read_lock()


def test_a_wrong_size_is_refused_before_the_download(server):
    message = refusal(remote(server, size=5))
    assert f"has {len(GZIPPED):,} bytes on the server, but should have 5; download it by hand: curl" in message


def test_a_file_that_ends_too_early_is_refused_by_its_content(server, tmp_path):
    server.files["/file.gz"] = GZIPPED[:-20]
    assert "is cut short or no .gz file" in refusal(remote(server))
    ad.AnnData(sparse.csr_matrix(np.eye(300, dtype=np.float32))).write_h5ad(tmp_path / "cells.h5ad")
    content = (tmp_path / "cells.h5ad").read_bytes()
    for damaged in (content[: len(content) // 2], b"gene,cell,count\n"):
        server.files["/cells.h5ad"] = damaged
        file = RemoteFile("set/cells.h5ad", f"{server.url}/cells.h5ad")
        assert "is cut short or no .h5ad file" in refusal(file)
    server.files["/cells.h5ad"] = content
    assert fetch(file).read_bytes() == content


def test_a_file_that_is_not_the_recorded_one_is_refused(server):
    """No checksum is published: that of the first download counts ever after."""
    file = remote(server)
    fetch(file).unlink()
    server.files["/file.gz"] = gzip.compress(b"the publisher changed it")
    assert "checksum differs from that of lock.json of its first download" in refusal(file)
    file.target.write_bytes(gzip.compress(b"somebody changed it here"))
    with pytest.raises(UserError, match=r"differs from that of lock\.json"):
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
    assert message.startswith(f"{paths.DOWNLOADS}/set/file.gz is not there, and HF_HUB_OFFLINE forbids fetching it")
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
    assert message.startswith("The disk is full: file.gz cannot be written to ")
    assert "set TUNEFORMER_DOWNLOADS to a folder on another disk" in message
    part.unlink()
    assert fetch(file).read_bytes() == GZIPPED


def test_a_disk_without_room_is_said_before_the_download(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert refusal(remote(server)).startswith("The disk is full: 1 MB of file.gz cannot be written to ")
    assert not list(paths.DOWNLOADS.rglob("*.gz*"))


def test_other_errors_of_the_disk_are_not_called_full(server, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(download, "tqdm", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(remote(server))


def test_killed_halfway_leaves_a_part_and_no_file(server, tmp_path):
    """The process is killed while it writes; the next one goes on from there."""
    server.files["/file.gz"] = GZIPPED
    script = (
        "import os, signal\n"
        "from tuneformer.data import fetch\n"
        "class Bar(fetch.tqdm):\n"
        "    def update(self, n):\n"
        "        super().update(n)\n"
        "        if self.n > 200_000:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "fetch.tqdm = Bar\n"
        f"fetch.fetch(fetch.RemoteFile('set/file.gz', '{server.url}/file.gz'))\n"
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


# The Hub, which sends requests for large files on to another host


@pytest.fixture
def weights(server):
    """A file of the Hub."""
    server.files["/someone/model/resolve/1234567/model.safetensors"] = GZIPPED
    checksum = f"sha256:{hashlib.sha256(GZIPPED).hexdigest()}"
    url = f"{server.url}/someone/model/resolve/1234567/model.safetensors"
    return RemoteFile("model/model.safetensors", url, len(GZIPPED), checksum)


def test_a_large_file_of_the_hub_is_taken_up_on_the_host_that_has_it(server, weights, waits):
    server.faults = [None, "cut"]
    assert fetch(weights, wait=waits.append).read_bytes() == GZIPPED
    assert [path.split("/")[1] for _, path, _ in server.requests] == ["someone", "cdn"] * 2
    assert server.ranges()[:2] == [None, None]
    assert server.ranges()[2] == server.ranges()[3] != None  # noqa: E711
    assert waits == [1.0]
    number = len(server.requests)
    fetch(weights)
    assert len(server.requests) == number


def test_faults_of_the_hub(server, weights, waits):
    server.faults = [503, 503]
    assert fetch(weights, wait=waits.append).is_file()
    assert waits == [1.0, 2.0]
    absent = RemoteFile("model/no.json", f"{server.url}/someone/model/resolve/1234567/no.json")
    assert "/someone/model/resolve/1234567/no.json was not found (the server answered 404)" in refusal(absent)
