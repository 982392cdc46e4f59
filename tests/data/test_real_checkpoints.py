"""Checkpoints of the published shapes: random weights and the real dictionaries, on the path of the real checkpoints.

The published weights are not here; their architecture, sizes and dictionaries are. A folder is put where the download
would put it, with its own checksums pinned, and one optimizer step is trained from it.
"""

import hashlib
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch, readers
from tuneformer.model import classifier, fit
from tuneformer.study import load_study
from tuneformer.tokens.encode import Tokens
from tuneformer.tokens.vocabulary import FILE, Vocabulary

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)

V1 = {"vocab_size": 25_426, "max_position_embeddings": 2048, "hidden_dropout_prob": 0.02}
V2 = {"vocab_size": 20_275, "max_position_embeddings": 4096, "hidden_dropout_prob": 0.02}
SHAPES = {  # layers, width, heads, feed-forward width
    "Geneformer-V1-10M": (V1, 6, 256, 4, 512),
    "Geneformer-V2-104M": (V2, 12, 768, 12, 3072),
    "Geneformer-V2-316M": (V2, 18, 1152, 18, 4608),
}
PARAMETERS = {"Geneformer-V1-10M": 10.3e6, "Geneformer-V2-104M": 104e6, "Geneformer-V2-316M": 316e6}  # as published


def config_of(name):
    common, layers, width, heads, feed_forward = SHAPES[name]
    return BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        hidden_act="relu",
        attention_probs_dropout_prob=0.02,
        initializer_range=0.02,
        pad_token_id=0,
        **common,
    )


def real_dictionary(version, file):
    """Return where the real dictionary is: the V2 ones are here under their former name, with the same bytes."""
    return Path(os.environ["TUNEFORMER_DATA"]) / f"geneformer_{version.lower()}" / file.replace("104M", "95M")


@pytest.mark.parametrize("name", fetch.PUBLISHED)
def test_parameters_agree_with_the_published_number_and_the_size_of_the_file(name):
    """A file of weights is 4 bytes per parameter and a header; that of V1 has positions too, of 8 bytes each."""
    with torch.device("meta"):
        model = BertForMaskedLM(config_of(name))
    number = sum(weight.numel() for weight in model.parameters())
    assert number == pytest.approx(PARAMETERS[name], rel=0.01)
    size = next(int(size) for group, file, size, _ in fetch.PINNED if (group, file) == (name, "model.safetensors"))
    positions = 8 * 2048 if name == "Geneformer-V1-10M" else 0
    header = size - 4 * number - positions
    assert 110 < header / len(list(model.parameters())) < 125  # bytes for name, type, shape and place of a tensor


def test_the_pinned_dictionaries_are_the_real_ones():
    dictionaries = [pinned for pinned in fetch.PINNED if pinned[0] in fetch.FOLDERS]
    assert len(dictionaries) == 8
    for version, file, size, checksum in dictionaries:
        content = real_dictionary(version, file).read_bytes()
        assert len(content) == int(size)
        assert hashlib.sha256(content).hexdigest() == checksum


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Put a checkpoint of the shape of a published one where its download would be, and pin its checksums."""
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing may be asked for

    def place(name):
        folder = fetch.checkpoint_path(name)
        torch.manual_seed(0)
        BertForMaskedLM(config_of(name)).save_pretrained(folder)
        pinned = [entry for entry in fetch.PINNED if entry[0] == fetch.PUBLISHED[name]]
        for version, file, *_ in pinned:
            shutil.copyfile(real_dictionary(version, file), folder / file)
        own = {file: fetch.file_hash(folder / file) for file in ("config.json", "model.safetensors")}
        monkeypatch.setattr(fetch, "PINNED", [*pinned, *([name, file, "?", digest] for file, digest in own.items())])
        return folder

    yield place
    shutil.rmtree(tmp_path / "downloads", ignore_errors=True)  # hundreds of megabytes


def tokens_of(vocabulary, length):
    """Return 8 cells for training, 2 for validation and 2 for the test, with random genes of the vocabulary."""
    rng, genes = np.random.default_rng(0), vocabulary.genes["token_id"]
    cells = [
        [*vocabulary.begins_with, *map(int, rng.choice(genes, length, replace=False)), *vocabulary.ends_with]
        for _ in range(12)
    ]
    rows = {
        "input_ids": cells,
        "cell": [f"cell{number}" for number in range(12)],
        "label": ["a", "b"] * 6,
        "split": ["train"] * 8 + ["validation"] * 2 + ["test"] * 2,
        "length": [len(cell) for cell in cells],
    }
    return Tokens(datasets.Dataset.from_dict(rows), vocabulary, ["a", "b"])


@pytest.mark.parametrize("name", ["Geneformer-V1-10M", "Geneformer-V2-104M"])
def test_one_step_from_a_checkpoint_of_the_published_shape(name, placed):
    folder = placed(name)
    vocabulary = Vocabulary.read(fetch.checkpoint_dir(name))
    assert (folder / FILE).is_file()  # read from the pickles once, and kept
    kept = Vocabulary.read(folder)
    assert kept.hash == vocabulary.hash
    assert kept.size == SHAPES[name][0]["vocab_size"]
    assert bool(kept.begins_with) == name.startswith("Geneformer-V2")
    genes, n_found = readers.to_ensembl(["INS", "GAPDH"], fetch.gene_names(name))
    assert list(genes) == ["ENSG00000254647", "ENSG00000111640"]
    assert n_found == 2
    fixed = {"epochs": 1, "batch_size": 8, "min_steps": 0, "warmup_steps": 0, "learning_rate": 1e-3}
    settings = load_study("tiny", checkpoint=name, precision="fp32", device="cpu", threads=1, **fixed)
    model = classifier.build(settings, kept, ["a", "b"])
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for key in (classifier.GENES, f"bert.encoder.layer.{SHAPES[name][1] - 1}.output.dense.weight"):
            assert torch.equal(dict(model.named_parameters())[key], stored.get_tensor(key))
    del model
    outcome = fit.fit_cells(settings, tokens_of(kept, length=24))
    assert outcome.cost["optimizer_steps"] == 1
    assert np.isfinite(outcome.history["train_loss"]).all()
    assert outcome.cost["total_parameters"] == pytest.approx(PARAMETERS[name], rel=0.02)


def test_weights_that_were_changed_are_not_taken(placed):
    folder = placed("Geneformer-V1-10M")
    fetch.checkpoint_dir("Geneformer-V1-10M")
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\1")
    with pytest.raises(UserError, match=r"model\.safetensors.*checksum"):
        fetch.checkpoint_dir("Geneformer-V1-10M")
