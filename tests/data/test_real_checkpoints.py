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
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM

from tuneformer.data import checkpoint_files, download, gene_symbols
from tuneformer.finetune import checkpoints, training
from tuneformer.study import paths, run
from tuneformer.study.params import load_study
from tuneformer.tokens.tokenizer import Tokens
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


@pytest.mark.parametrize("name", paths.PUBLISHED)
def test_parameters_agree_with_the_published_number_and_the_size_of_the_file(name):
    """A file of weights is 4 bytes a parameter and a header; that of V1 has numbers of positions too, 8 bytes each."""
    with torch.device("meta"):
        model = BertForMaskedLM(config_of(name))
    number = sum(weight.numel() for weight in model.parameters())
    assert number == pytest.approx(PARAMETERS[name], rel=0.01)
    _, files = checkpoint_files.MODELS[name]
    positions = 8 * 2048 if name == "Geneformer-V1-10M" else 0
    header = files["model.safetensors"][0] - 4 * number - positions
    assert 110 < header / len(list(model.parameters())) < 125  # bytes for name, type, shape and place of a tensor


def test_the_pinned_dictionaries_are_the_real_ones():
    data = Path(os.environ["TUNEFORMER_DATA"])
    for folder, files in checkpoint_files.DICTIONARIES.items():
        for name, (size, checksum) in files.items():
            here = "geneformer_v1" if folder == checkpoint_files.V1 else "geneformer_v2"
            content = (data / here / name.replace("104M", "95M")).read_bytes()  # the same bytes under their former name
            assert len(content) == size
            assert hashlib.sha256(content).hexdigest() == checksum


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Put a checkpoint of the shape of a published one where its download would be, and pin its checksums."""
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)  # nothing may be asked for
    run.checkpoint_hash.cache_clear()

    def place(name):
        folder = paths.checkpoint_dir(name)
        torch.manual_seed(0)
        BertForMaskedLM(config_of(name)).save_pretrained(folder)
        dictionaries, _ = checkpoint_files.MODELS[name]
        version = "geneformer_v1" if dictionaries == checkpoint_files.V1 else "geneformer_v2"
        for file in checkpoint_files.DICTIONARIES[dictionaries]:
            source = Path(os.environ["TUNEFORMER_DATA"]) / version / file.replace("104M", "95M")
            shutil.copyfile(source, folder / file)
        own = {}
        for file in ("config.json", "model.safetensors"):
            with (folder / file).open("rb") as handle:
                own[file] = (None, hashlib.file_digest(handle, "sha256").hexdigest())
        monkeypatch.setitem(checkpoint_files.MODELS, name, (dictionaries, own))
        return folder

    yield place
    shutil.rmtree(tmp_path / "downloads", ignore_errors=True)  # hundreds of megabytes
    run.checkpoint_hash.cache_clear()


def tokens_of(vocabulary, length):
    """Return 8 cells for training, 2 for validation and 2 for the test, with random genes of the vocabulary."""
    rng = np.random.default_rng(0)
    cells = [
        [
            *vocabulary.begins_with,
            *rng.choice(vocabulary.genes["token_id"], length, replace=False),
            *vocabulary.ends_with,
        ]
        for _ in range(12)
    ]
    rows = {
        "input_ids": [[int(token) for token in cell] for cell in cells],
        "cell": [f"cell{number}" for number in range(12)],
        "label": ["a", "b"] * 6,
        "split": ["train"] * 8 + ["validation"] * 2 + ["test"] * 2,
        "length": [len(cell) for cell in cells],
    }
    return Tokens(datasets.Dataset.from_dict(rows), vocabulary, ["a", "b"], {"fingerprint": "made up"})


@pytest.mark.parametrize("name", ["Geneformer-V1-10M", "Geneformer-V2-104M"])
def test_one_step_from_a_checkpoint_of_the_published_shape(name, placed):
    folder = placed(name)
    vocabulary = Vocabulary.read(checkpoint_files.ensure(name))
    assert (folder / FILE).is_file()  # read from the pickles once, and kept
    kept = Vocabulary.read(folder)
    assert kept.hash == vocabulary.hash
    assert len(kept) == SHAPES[name][0]["vocab_size"] == kept.size
    assert bool(kept.begins_with) == name.startswith("Geneformer-V2")
    genes, report = gene_symbols.to_ensembl(["INS", "GAPDH"], folder)
    assert list(genes) == ["ENSG00000254647", "ENSG00000111640"]
    assert report.mapped == 2
    settings = load_study(
        "tiny",
        checkpoint=name,
        strategy="full",
        train_cells=None,
        epochs=1,
        batch_size=8,
        min_steps=0,
        warmup_steps=0,
        learning_rate=1e-3,
        precision="fp32",
        device="cpu",
        threads=1,
    )
    model = checkpoints.load_classifier(settings, kept, ["a", "b"])
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for key in (checkpoints.GENES, f"bert.encoder.layer.{SHAPES[name][1] - 1}.output.dense.weight"):
            assert torch.equal(dict(model.named_parameters())[key], stored.get_tensor(key))
    del model
    outcome = training.finetune(settings, tokens_of(kept, length=24))
    assert outcome.cost["optimizer_steps"] == 1
    assert np.isfinite(outcome.history["train_loss"]).all()
    assert outcome.cost["total_parameters"] == pytest.approx(PARAMETERS[name], rel=0.02)


def test_weights_that_were_changed_are_not_taken(placed):
    folder = placed("Geneformer-V1-10M")
    checkpoint_files.ensure("Geneformer-V1-10M")
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\1")
    with pytest.raises(download.DownloadError, match=r"model\.safetensors is not the right file: its checksum differs"):
        checkpoint_files.ensure("Geneformer-V1-10M")
