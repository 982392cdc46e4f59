"""What a classifier takes over from a checkpoint, and which checkpoints are refused."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneformer.finetune import checkpoints, strategies
from tuneformer.finetune.collator import CellCollator
from tuneformer.tokens.vocabulary import Vocabulary


def load(settings, tokens):
    torch.manual_seed(3)
    return checkpoints.load_classifier(settings, tokens.vocabulary, tokens.classes)


def test_encoder_and_embeddings_come_from_the_checkpoint_and_the_head_is_new(run_settings, tokens, checkpoint):
    model = load(run_settings(), tokens)
    stored = load_file(checkpoint / "model.safetensors")
    own = dict(model.named_parameters())
    for name, weight in own.items():
        if strategies.group_of(name) not in strategies.HEAD:
            assert torch.equal(weight, stored[name]), name
    assert model.config.num_labels == 2
    assert model.config.id2label == {0: "a", 1: "b"}


def test_random_init_takes_nothing_but_the_shape(run_settings, tokens, checkpoint):
    model = load(run_settings(strategy="random_init"), tokens)
    pretrained = load(run_settings(), tokens)
    for name, weight in model.named_parameters():
        other = dict(pretrained.named_parameters())[name]
        assert weight.shape == other.shape
        if weight.ndim > 1 and strategies.group_of(name) not in strategies.HEAD:
            assert not torch.equal(weight, other), name
        if strategies.group_of(name) in strategies.HEAD:
            assert torch.equal(weight, other), name


def test_embeddings_are_copied_by_gene_and_new_genes_start_anew(run_settings, tokens, checkpoint):
    theirs = tokens.vocabulary.genes
    genes = pd.DataFrame({"ensembl_id": [theirs["ensembl_id"][4], "ENSG_NEW"], "median": 1.0})
    genes["token_id"] = pd.array([2, 99], dtype="int32")
    vocabulary = Vocabulary(
        genes=genes[["ensembl_id", "token_id", "median"]], specials=tokens.vocabulary.specials, aliases={}
    )
    torch.manual_seed(3)
    model = checkpoints.load_classifier(run_settings(), vocabulary, tokens.classes)
    stored = load_file(checkpoint / "model.safetensors")[checkpoints.GENES]
    own = model.bert.embeddings.word_embeddings.weight
    assert own.shape[0] == 100
    assert torch.equal(own[2], stored[theirs["token_id"][4]])
    assert torch.equal(own[:2], stored[:2])
    assert not torch.isin(own[99], stored).any()
    table = checkpoints.transfer_table(run_settings(), vocabulary)
    assert table.loc["gene embeddings"].tolist() == [1, 1]
    assert table.loc["encoder layers"].tolist() == [2, 0]
    assert checkpoints.transfer_table(run_settings(strategy="random_init"), vocabulary).iloc[:, 0].sum() == 0


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_does_not_change_a_prediction_and_pooling_reads_what_it_says(run_settings, tokens, pooling):
    model = load(run_settings(pooling=pooling), tokens).eval()
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    collate = CellCollator(pad=0)
    cell = [{"input_ids": short, "labels": 0}]
    alone = model(**collate(cell))
    together = model(**collate([*cell, {"input_ids": long, "labels": 1}]))
    torch.testing.assert_close(alone.logits[0], together.logits[0])
    hidden = model.bert(torch.tensor([short])).last_hidden_state
    read = hidden[:, 0] if pooling == "first" else hidden.mean(dim=1)
    expected = model.classifier(torch.tanh(model.bert.pooler.dense(read)))
    torch.testing.assert_close(alone.logits, expected)
    torch.testing.assert_close(alone.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0])))


def test_first_pooling_is_the_stock_model(run_settings, tokens):
    from transformers import BertForSequenceClassification

    model = load(run_settings(pooling="first"), tokens).eval()
    stock = BertForSequenceClassification(model.config).eval()
    stock.load_state_dict(model.state_dict())
    batch = CellCollator(pad=0)([{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [9, 4], "labels": 0}])
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss)


def test_weights_under_another_prefix_are_refused(run_settings, tokens, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    save_file({f"model.{name}": weight for name, weight in weights.items()}, checkpoint / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"lacks 37 of the 37 .* begin with bert\.$"):
        load(run_settings(), tokens)


def test_a_missing_layer_is_refused(run_settings, tokens, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if ".layer.1." not in name}, checkpoint / "model.safetensors"
    )
    with pytest.raises(checkpoints.CheckpointError, match=r"lacks 16 of the 37 .* bert\.encoder\.layer\.1\."):
        load(run_settings(), tokens)


def test_weights_of_another_width_are_refused(run_settings, tokens, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(checkpoints.CheckpointError, match=r"has shape \(32, 16\), but config\.json .* \(64, 16\)"):
        load(run_settings(), tokens)


def test_a_vocabulary_that_is_too_large_is_refused(run_settings, tokens, checkpoint):
    vocabulary = tokens.vocabulary
    genes = pd.concat([vocabulary.genes, vocabulary.genes.tail(1).assign(ensembl_id="ENSG_X", token_id=200)])
    genes = genes.astype({"token_id": "int32"}).reset_index(drop=True)
    Vocabulary(genes=genes, specials=vocabulary.specials, aliases={}).write(checkpoint)
    with pytest.raises(checkpoints.CheckpointError, match="tokens up to 200, but the model only"):
        load(run_settings(), tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "gpt2"}', "type 'gpt2', but Geneformer is a bert"),
        ("{", "cannot be read; set checkpoint to demo"),
    ],
)
def test_a_config_of_something_else_is_refused(run_settings, tokens, checkpoint, content, message):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        load(run_settings(), tokens)


def test_damaged_or_missing_weights_are_refused(run_settings, tokens, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        load(run_settings(), tokens)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        load(run_settings(), tokens)
