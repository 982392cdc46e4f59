"""A published checkpoint in miniature: from the Hub to a classifier, once; then without network."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from file_server import FileServer
from safetensors.torch import load_file, save_file

from tuneformer.data import checkpoint_files, download
from tuneformer.finetune import checkpoints
from tuneformer.study import paths, run
from tuneformer.tokens.vocabulary import FILE, Vocabulary

NAME = "Geneformer-V1-10M"


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A server with the checkpoint of these tests at the place of a published one, with dictionaries as pickles."""
    vocabulary = Vocabulary.read(checkpoint)
    tokens = dict(vocabulary.specials) | dict(
        zip(*vocabulary.genes[["ensembl_id", "token_id"]].T.to_numpy(), strict=True)
    )
    medians = dict.fromkeys(vocabulary.genes["ensembl_id"], np.float64(1.0))
    contents = {
        "token_dictionary_gc30M.pkl": pickle.dumps({name: int(token) for name, token in tokens.items()}),
        "gene_median_dictionary_gc30M.pkl": pickle.dumps(medians),
        "gene_name_id_dict_gc30M.pkl": pickle.dumps({"INS": "ENSG00000000001"}),
        "ensembl_mapping_dict_gc30M.pkl": pickle.dumps({"OLD": "ENSG00000000002"}),
    }
    own = {name: (checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with FileServer() as server:

        def publish():
            pinned = {}
            for folder, files in ((checkpoint_files.V1, contents), (NAME, own)):
                prefix = f"/{checkpoint_files.REPOSITORY}/resolve/{checkpoint_files.REVISION}/{folder}"
                server.files |= {f"{prefix}/{name}": content for name, content in files.items()}
                pinned[folder] = {
                    name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
                }
            monkeypatch.setitem(checkpoint_files.DICTIONARIES, checkpoint_files.V1, pinned[checkpoint_files.V1])
            monkeypatch.setitem(checkpoint_files.MODELS, NAME, (checkpoint_files.V1, pinned[NAME]))

        server.own, server.publish = own, publish
        publish()
        monkeypatch.setattr(download, "ENDPOINT", server.url)
        monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
        yield server


def load(run_settings, tokens):
    torch.manual_seed(3)
    return checkpoints.load_classifier(run_settings(checkpoint=NAME), tokens.vocabulary, tokens.classes)


def test_a_checkpoint_by_name_is_fetched_once_and_then_offline(hub, run_settings, tokens, checkpoint, monkeypatch):
    model = load(run_settings, tokens)
    torch.manual_seed(3)
    local = checkpoints.load_classifier(run_settings(), tokens.vocabulary, tokens.classes)
    for (name, weight), other in zip(model.named_parameters(), local.parameters(), strict=True):
        assert torch.equal(weight, other), name
    folder = paths.checkpoint_dir(NAME)
    assert len(list(folder.glob("*.pkl"))) == 4
    number = len(hub.requests)
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    load(run_settings, tokens)
    assert len(hub.requests) == number
    assert run.checkpoint_hash(NAME)
    assert Vocabulary.read(folder).aliases == {"OLD": "ENSG00000000002"}


def test_the_dictionaries_are_read_once_and_kept_as_a_table(hub, checkpoint, monkeypatch):
    folder = checkpoint_files.ensure(NAME)
    first = Vocabulary.read(folder)
    assert (folder / FILE).is_file()
    monkeypatch.setattr("tuneformer.tokens.vocabulary.read_pickle", lambda _: pytest.fail("a pickle was read again"))
    assert Vocabulary.read(folder).hash == first.hash


def test_dictionaries_of_a_folder_of_a_user_are_left_as_they_are(hub, tmp_path):
    folder = checkpoint_files.ensure(NAME)
    folder.rename(tmp_path / "mine")
    Vocabulary.read(tmp_path / "mine")
    assert not (tmp_path / "mine" / FILE).exists()


def test_weights_with_another_prefix_are_refused(hub, run_settings, tokens, checkpoint):
    """Else the encoder would stay random, and transformers would only warn."""
    stored = load_file(checkpoint / "model.safetensors")
    save_file({name.replace("bert.", "model."): weight for name, weight in stored.items()}, checkpoint / "renamed")
    hub.own["model.safetensors"] = (checkpoint / "renamed").read_bytes()
    hub.publish()
    message = (
        r"lacks \d+ of the \d+ weights of the encoder, such as bert\.embeddings\..*; save the model as a BertForMask"
    )
    with pytest.raises(checkpoints.CheckpointError, match=message):
        load(run_settings, tokens)


def test_weights_that_are_not_the_pinned_ones_are_refused(hub, run_settings, tokens):
    path = f"/{checkpoint_files.REPOSITORY}/resolve/{checkpoint_files.REVISION}/{NAME}/model.safetensors"
    hub.files[path] = hub.files[path][:-4] + b"\0\0\0\1"
    with pytest.raises(download.DownloadError, match="its checksum differs from that of its publisher"):
        load(run_settings, tokens)
    assert not (paths.checkpoint_dir(NAME) / "model.safetensors").exists()
