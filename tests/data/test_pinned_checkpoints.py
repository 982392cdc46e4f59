"""The pinned dictionaries are the real ones; weights that were changed are not taken for the published ones."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)


def real(file):
    """Return the real dictionary of this name; those of V2 are there under their former name."""
    version = "geneformer_v1" if "30M" in file else "geneformer_v2"
    return Path(os.environ["TUNEFORMER_DATA"]) / version / file.replace("104M", "95M")


def test_the_pinned_dictionaries_are_the_real_ones():
    dictionaries = [row for row in fetch.PINNED if row[1].endswith(".pkl")]
    assert len(dictionaries) == 8
    for _, file, size, checksum in dictionaries:
        content = real(file).read_bytes()
        assert len(content) == int(size)
        assert hashlib.sha256(content).hexdigest() == checksum


def test_weights_that_were_changed_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", True)  # nothing may be asked for
    name = "Geneformer-V1-10M"
    folder = tmp_path / name
    folder.mkdir()
    pinned = []
    for group, file, *rest in fetch.PINNED:
        if group == "V1":
            shutil.copyfile(real(file), folder / file)
        elif group == name:
            (folder / file).write_text("{}")
            rest = ["2", hashlib.sha256(b"{}").hexdigest()]
        pinned.append([group, file, *rest])
    monkeypatch.setattr(fetch, "PINNED", pinned)
    assert fetch.checkpoint_dir(name) == folder
    assert fetch.gene_names(name) == folder / "gene_name_id_dict_gc30M.pkl"
    (folder / "model.safetensors").write_text("[]")
    with pytest.raises(UserError, match=r"model\.safetensors is not the right file: its checksum differs"):
        fetch.checkpoint_dir(name)
