"""Masked-token pre-training: masks, references and loss by their definitions, and the shipped checkpoint re-created."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BertForMaskedLM

from tuneformer import paths
from tuneformer.data.simulate import simulate_corpus
from tuneformer.model import pretrain
from tuneformer.model.classifier import Cells
from tuneformer.study import PretrainingKeys, load_study
from tuneformer.tokens.vocabulary import Vocabulary

SHIPPED = paths.ASSETS / "demo_checkpoint"


@pytest.fixture(scope="module")
def settings():
    return load_study("tiny", pretrain_cells=300, pretrain_steps=4, device="cpu")


@pytest.fixture(scope="module")
def corpus(settings):
    return pretrain.make_corpus(settings)


def cells_of(dataset):
    return Cells(dataset, 0).__getitems__(np.arange(len(dataset)))["input_ids"]


def test_corpus_is_ranks_and_held_out_cells_are_not_trained_on(settings, corpus):
    assert cells_of(corpus.train).shape == (270, settings.pretrain_length)
    assert cells_of(corpus.held_out).shape == (30, settings.pretrain_length)
    trained = {cell.numpy().tobytes() for cell in cells_of(corpus.train)}
    assert not any(cell.numpy().tobytes() in trained for cell in cells_of(corpus.held_out))


def test_noise_changes_the_counts_by_the_stated_factor_and_no_zero():
    cells = simulate_corpus(50, n_types=5, seed=0)
    noisy = pretrain.with_noise(cells, 0.3, np.random.default_rng(0))
    assert (noisy.X.indices == cells.X.indices).all()
    ratio = np.log(noisy.X.data / cells.X.data)
    assert ratio.std() == pytest.approx(0.3, abs=0.01)  # standard error 0.001
    assert ratio.mean() == pytest.approx(0, abs=0.01)
    assert (pretrain.with_noise(cells, 0.0, np.random.default_rng(0)).X != cells.X).nnz == 0


def test_hiding_takes_the_stated_shares_and_labels_nothing_else(corpus):
    torch.manual_seed(0)
    tokens = cells_of(corpus.train)
    tokens[:, 100:] = 0
    batch = pretrain.hide({"input_ids": tokens, "attention_mask": (tokens != 0).long()}, corpus.vocabulary, 0.15)
    chosen = batch["labels"] != -100
    assert not chosen[tokens == 0].any()
    assert (batch["input_ids"][~chosen] == tokens[~chosen]).all()
    assert (batch["labels"][chosen] == tokens[chosen]).all()
    assert chosen.sum() / int((tokens != 0).sum()) == pytest.approx(0.15, abs=0.01)  # standard error 0.002
    hidden = batch["input_ids"][chosen]
    assert (hidden == 1).float().mean() == pytest.approx(0.8, abs=0.03)  # standard error 0.006
    assert (hidden == tokens[chosen]).float().mean() == pytest.approx(0.1, abs=0.02)  # standard error 0.005


def test_context_free_losses_by_hand():
    genes = pd.DataFrame({"ensembl_id": ["a", "b"], "token_id": [2, 3], "median": [1.0, 1.0]})
    vocabulary = Vocabulary(genes=genes, specials={"<pad>": 0, "<mask>": 1}, aliases={})
    train, held_out = (Dataset.from_dict({"input_ids": rows}) for rows in ([[2, 3], [2, 3], [2]], [[2, 3]]))
    losses = pretrain.context_free_losses(pretrain.Corpus(train, held_out, vocabulary))
    # with half a count each: rank 1 holds a 3.5 times, b 0.5; rank 2 holds a 0.5 times, b 2.5
    assert losses["uniform"] == pytest.approx(np.log(2))
    assert losses["frequency"] == pytest.approx(-(np.log(4 / 7) + np.log(3 / 7)) / 2)
    assert losses["frequency_by_rank"] == pytest.approx(-(np.log(3.5 / 4) + np.log(2.5 / 3)) / 2)


def test_loss_on_chosen_positions_is_the_stock_loss(corpus):
    model = BertForMaskedLM.from_pretrained(SHIPPED).eval()
    batch = pretrain.hide(Cells(corpus.train, 0).__getitems__(np.arange(8)), corpus.vocabulary, 0.15)
    with torch.no_grad():
        assert pretrain.masked_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_an_interrupted_pre_training_goes_on(settings, corpus, tmp_path, capsys):
    whole = pretrain.pretrain(settings, corpus, folder=tmp_path / "whole").curve
    pretrain.pretrain(settings, corpus, folder=tmp_path / "cut", stop_after=2)
    capsys.readouterr()
    resumed = pretrain.pretrain(settings, corpus, folder=tmp_path / "cut").curve
    shown = capsys.readouterr().err
    assert "epoch 3/4" in shown
    assert "epoch 2/4" not in shown
    pd.testing.assert_frame_equal(whole[:2], resumed[:2])
    # the weights are the same, the masks drawn after the cut are not; a new start would be 0.04 higher
    np.testing.assert_allclose(whole[2:], resumed[2:], atol=0.015)


def test_the_shipped_checkpoint_is_small_and_says_how_it_was_made():
    files = list(SHIPPED.iterdir())
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert {file.name for file in files} == {
        "config.json",
        "model.safetensors",
        "pretraining.json",
        "vocabulary.parquet",
    }
    made_by = json.loads((SHIPPED / "pretraining.json").read_text())
    assert made_by["simulated"] is True
    assert "demo_pretrain" in made_by["command"]
    shipped = load_study("demo_pretrain").keys(PretrainingKeys)
    assert made_by["parameters"].items() <= shipped.items()  # keys for real cells came later
    curve, references = pretrain.read_history(SHIPPED)
    assert curve["step"].iloc[-1] > 0.99 * shipped["pretrain_steps"]  # the last point of the curve
    assert curve["held_out_loss"].iloc[-1] < min(references.values()) - 0.5


def test_the_first_steps_of_the_shipped_checkpoint_are_re_created(tmp_path):
    settings = load_study("demo_pretrain", device="cpu")
    corpus = pretrain.make_corpus(settings)
    assert corpus.vocabulary.hash == Vocabulary.read(SHIPPED).hash
    again = pretrain.pretrain(settings, corpus, folder=tmp_path, stop_after=5).curve
    shipped, references = pretrain.read_history(SHIPPED)
    # the loss falls by about 0.01 a step here; another CPU may round differently
    np.testing.assert_allclose(again["train_loss"], shipped["train_loss"][:5], atol=2e-3)
    np.testing.assert_allclose(again["held_out_loss"], shipped["held_out_loss"][:5], atol=2e-3)
    assert pretrain.context_free_losses(corpus) == pytest.approx(references)
    model = BertForMaskedLM.from_pretrained(SHIPPED)
    assert pretrain.held_out_loss(model, corpus, settings) == pytest.approx(shipped["held_out_loss"].iloc[-1], abs=2e-3)


MINI = paths.ASSETS / "mini_checkpoint"


def test_the_checkpoint_of_real_cells_is_small_and_says_how_it_was_made():
    files = {file.name: file.stat().st_size for file in MINI.iterdir()}
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "pretraining.json", "vocabulary.parquet"}
    assert sum(files.values()) < 6_000_000
    made_by = json.loads((MINI / "pretraining.json").read_text())
    assert made_by["simulated"] is False
    study = load_study("mini_pretrain").keys(PretrainingKeys)
    assert made_by["parameters"].items() <= study.items()
    curve, references = pretrain.read_history(MINI)
    assert curve["step"].iloc[-1] == study["pretrain_steps"]
    assert curve["held_out_loss"].iloc[-1] < min(references.values()) - 1
    card = (MINI / "README.md").read_text()
    for file, number in made_by["training_cells"].items():
        assert f"`{file}`" in card
        assert f"{number:,}" in card
    assert f"{sum(made_by['training_cells'].values()):,}" in card
    assert f"{curve['held_out_loss'].iloc[-1]:.2f}" in card
    assert f"{min(references.values()):.2f}" in card


def test_the_checkpoint_of_real_cells_is_read_in_single_precision_and_knows_symbols():
    model = BertForMaskedLM.from_pretrained(MINI)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    vocabulary = Vocabulary.read(MINI)
    assert model.config.vocab_size == vocabulary.size
    assert vocabulary.resolve(pd.Index(["CD3D", "ENSG00000167286", "no gene"])).tolist() == [
        "ENSG00000167286",
        "ENSG00000167286",
        "no gene",
    ]
