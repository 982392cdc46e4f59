"""A published checkpoint in miniature: from the Hub to a classifier, once; then without network."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from file_server import FileServer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch
from tuneformer.model import classifier
from tuneformer.tokens.vocabulary import FILE, Vocabulary

NAME = "Geneformer-V1-10M"


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A server with the checkpoint of these tests at the place of a published one, with dictionaries as pickles."""
    vocabulary = Vocabulary.read(checkpoint)
    genes = vocabulary.genes
    tokens = dict(vocabulary.specials) | dict(zip(genes["ensembl_id"], map(int, genes["token_id"]), strict=True))
    dictionaries = {
        "token_dictionary_gc30M.pkl": tokens,
        "gene_median_dictionary_gc30M.pkl": dict.fromkeys(genes["ensembl_id"], np.float64(1.0)),
        "gene_name_id_dict_gc30M.pkl": {"INS": "ENSG00000000001"},
        "ensembl_mapping_dict_gc30M.pkl": {"OLD": "ENSG00000000002"},
    }
    contents = {("V1", name): pickle.dumps(table) for name, table in dictionaries.items()}
    contents |= {(NAME, name): (checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with FileServer() as server:

        def publish(weights=None):
            pinned = []
            for (group, name), content in contents.items():
                content = weights if weights and name == "model.safetensors" else content
                server.files[f"/{fetch.FOLDERS.get(group, group)}/{name}"] = content
                pinned.append([group, name, str(len(content)), hashlib.sha256(content).hexdigest()])
            monkeypatch.setattr(fetch, "PINNED", pinned)

        server.publish = publish
        publish()
        monkeypatch.setattr(fetch, "GENEFORMER", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
        yield server


def build(settings, tokens):
    torch.manual_seed(3)
    return classifier.build(settings, tokens.vocabulary, tokens.classes)


def test_a_checkpoint_by_name_is_fetched_once_and_then_offline(hub, run_settings, tokens, monkeypatch):
    model, local = build(run_settings(checkpoint=NAME), tokens), build(run_settings(), tokens)
    for (name, weight), other in zip(model.named_parameters(), local.parameters(), strict=True):
        assert torch.equal(weight, other), name
    folder = fetch.checkpoint_path(NAME)
    assert len(list(folder.glob("*.pkl"))) == 4
    number = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    build(run_settings(checkpoint=NAME), tokens)
    assert len(hub.requests) == number
    assert Vocabulary.read(folder).aliases == {"OLD": "ENSG00000000002"}


def test_the_dictionaries_are_read_once_and_kept_as_a_table(hub, monkeypatch):
    folder = fetch.checkpoint_dir(NAME)
    first = Vocabulary.read(folder)
    assert (folder / FILE).is_file()
    monkeypatch.setattr("tuneformer.tokens.vocabulary.read_pickle", lambda _: pytest.fail("a pickle was read again"))
    assert Vocabulary.read(folder).hash == first.hash


def test_dictionaries_of_a_folder_of_a_user_are_left_as_they_are(hub, tmp_path):
    fetch.checkpoint_dir(NAME).rename(tmp_path / "mine")
    Vocabulary.read(tmp_path / "mine")
    assert not (tmp_path / "mine" / FILE).exists()


def test_weights_with_another_prefix_are_refused(hub, run_settings, tokens, checkpoint):
    """Else the encoder would stay random, and transformers would only warn."""
    stored = load_file(checkpoint / "model.safetensors")
    save_file({name.replace("bert.", "model."): weight for name, weight in stored.items()}, checkpoint / "renamed")
    hub.publish(weights=(checkpoint / "renamed").read_bytes())
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ weights of the encoder, such as bert\.embeddings\."):
        build(run_settings(checkpoint=NAME), tokens)


def test_weights_that_are_not_the_pinned_ones_are_refused(hub, run_settings, tokens):
    path = f"/{NAME}/model.safetensors"
    hub.files[path] = hub.files[path][:-4] + b"\0\0\0\1"
    with pytest.raises(UserError, match="checksum"):
        build(run_settings(checkpoint=NAME), tokens)
    assert not (fetch.checkpoint_path(NAME) / "model.safetensors").exists()
