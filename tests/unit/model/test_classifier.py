"""What a classifier takes over from a checkpoint, which ones are refused, and what is saved, loaded and predicted."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tuneformer.artifacts import UserError
from tuneformer.model import attention, classifier, fit, losses, strategies
from tuneformer.model.classifier import Cells
from tuneformer.tokens.vocabulary import Vocabulary


def build(settings, tokens):
    torch.manual_seed(3)
    return classifier.build(settings, tokens.vocabulary, tokens.classes)


def batch_of(*cells, labels=None):
    dataset = datasets.Dataset.from_dict({"input_ids": list(cells), "length": [len(cell) for cell in cells]})
    return Cells(dataset, 0, labels=labels).__getitems__(np.arange(len(cells)))


def is_head(name):
    return not name.startswith(classifier.BODY)


def test_encoder_and_embeddings_come_from_the_checkpoint_and_the_head_is_new(run_settings, tokens, checkpoint):
    model = build(run_settings(), tokens)
    stored = load_file(checkpoint / "model.safetensors")
    for name, weight in model.named_parameters():
        assert is_head(name) or torch.equal(weight, stored[name]), name
    assert model.config.num_labels == 2
    assert model.config.id2label == {0: "a", 1: "b"}


def test_random_init_takes_nothing_but_the_shape(run_settings, tokens):
    model = build(run_settings(strategy="random_init"), tokens)
    pretrained = dict(build(run_settings(), tokens).named_parameters())
    for name, weight in model.named_parameters():
        assert weight.shape == pretrained[name].shape
        if is_head(name):
            assert torch.equal(weight, pretrained[name]), name
        elif weight.ndim > 1:
            assert not torch.equal(weight, pretrained[name]), name


def test_embeddings_are_copied_by_gene_and_new_genes_start_anew(run_settings, tokens, checkpoint):
    theirs = tokens.vocabulary.genes
    genes = pd.DataFrame({"ensembl_id": [theirs["ensembl_id"][4], "ENSG_NEW"]})
    genes["token_id"] = pd.array([2, 99], dtype="int32")
    vocabulary = Vocabulary(genes=genes.assign(median=1.0), specials=tokens.vocabulary.specials, aliases={})
    model = classifier.build(run_settings(), vocabulary, tokens.classes)
    stored = load_file(checkpoint / "model.safetensors")[classifier.GENES]
    own = model.bert.embeddings.word_embeddings.weight
    assert own.shape[0] == 100
    assert torch.equal(own[2], stored[theirs["token_id"][4]])
    assert torch.equal(own[:2], stored[:2])
    assert not torch.isin(own[99], stored).any()


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_does_not_change_a_prediction_and_pooling_reads_what_it_says(run_settings, tokens, pooling):
    model = build(run_settings(pooling=pooling), tokens).eval()
    short, long = [5, 6, 7], [8, 9, 10, 11, 12]
    alone = model(**batch_of(short, labels=[0]))
    together = model(**batch_of(short, long, labels=[0, 1]))
    torch.testing.assert_close(alone.logits[0], together.logits[0])
    hidden = model.bert(torch.tensor([short])).last_hidden_state
    read = hidden[:, 0] if pooling == "first" else hidden.mean(dim=1)
    expected = model.classifier(torch.tanh(model.bert.pooler.dense(read)))
    torch.testing.assert_close(alone.logits, expected)
    torch.testing.assert_close(alone.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0])))


def test_first_pooling_is_the_stock_model(run_settings, tokens):
    model = build(run_settings(pooling="first"), tokens).eval()
    stock = transformers.BertForSequenceClassification(model.config).eval()
    stock.load_state_dict(model.state_dict())
    batch = batch_of([5, 6, 7], [9, 4], labels=[1, 0])
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss)


def rename(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    save_file({f"model.{name}": weight for name, weight in weights.items()}, checkpoint / "model.safetensors")


def lose_a_layer(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layer.1." not in name}
    save_file(kept, checkpoint / "model.safetensors")


def widen(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def add_a_gene(checkpoint):
    vocabulary = Vocabulary.read(checkpoint)
    more = pd.concat([vocabulary.genes, vocabulary.genes.tail(1).assign(ensembl_id="ENSG_X", token_id=200)])
    genes = more.astype({"token_id": "int32"}).reset_index(drop=True)
    Vocabulary(genes=genes, specials=vocabulary.specials, aliases={}).write(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, r"lacks 37 of the 37 .* begin with bert\.$"),
        (lose_a_layer, r"lacks 16 of the 37 .* bert\.encoder\.layer\.1\."),
        (widen, r"has shape \(32, 16\), but config\.json .* \(64, 16\)"),
        (add_a_gene, "tokens up to 200, but the model only 42 embeddings"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "'gpt2', but Geneformer is a bert",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read; set checkpoint to demo"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half a fi"), "safetensors cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(run_settings, tokens, checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UserError, match=message):
        build(run_settings(), tokens)


def test_batches_are_the_cells_padded_and_stay_small_numbers(tokens):
    """Also of a selection that is out of order, and of a cell that comes twice."""
    dataset = tokens.dataset.select([70, 3, 5, 1])
    cells = Cells(dataset, 0, rows=[3, 0, 0], labels=[1, 0, 0])
    assert len(cells) == 3
    batch = cells.__getitems__([0, 2])
    assert batch["input_ids"].dtype == torch.int32
    expected = [tokens.dataset[1]["input_ids"], tokens.dataset[70]["input_ids"]]
    for row, ids in enumerate(expected):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["input_ids"][row, len(ids) :].sum() == 0
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (batch["input_ids"].shape[1] - len(ids))
    assert batch["input_ids"].shape[1] == max(map(len, expected))
    assert batch["labels"].tolist() == [1, 0]


def test_predictions_are_in_the_order_of_the_cells_and_batches_of_similar_length(run_settings, tokens, monkeypatch):
    model, cells = build(run_settings(), tokens), Cells(tokens.dataset, 0)
    sizes = []

    def forward(batch):
        sizes.append(tuple(batch["input_ids"].shape))
        return model(**batch).logits

    monkeypatch.setattr(Cells.sorted_batches, "__defaults__", (300,))
    logits = classifier.predict(model, cells, bf16=False, forward=forward)
    assert sum(n for n, _ in sizes) == 72
    assert all(200 < n * length <= 300 for n, length in sizes[:-1])  # tokens, padding included
    assert [length for _, length in sizes] == sorted(length for _, length in sizes)
    with torch.inference_mode():
        for place in (0, 17, 71):
            torch.testing.assert_close(model(**cells.__getitems__([place])).logits[0].double().numpy(), logits[place])


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "full", "loss": "bce"},
        {"strategy": "lora", "pooling": "mean"},
        {"strategy": "selective", "precision": "bf16", "max_length": 20},
    ],
)
def test_a_saved_model_predicts_what_it_predicted_before(run_settings, tokens, tmp_path, changes, capsys):
    outcome = fit.fit_cells(run_settings(**changes), tokens)
    card = {"study": "tiny", "arm": "mine", "seed": 0}
    classifier.save(tmp_path / "model", outcome.model, tokens.vocabulary, outcome.classes, card)
    assert "Writing" not in capsys.readouterr().err  # a progress bar of transformers
    fitted = classifier.load(tmp_path / "model")
    test = tokens.dataset.filter(lambda split: split == "test", input_columns="split")
    tolerance = 1e-6 if "precision" not in changes else 5e-3
    np.testing.assert_allclose(fitted.predict(test), outcome.probabilities, atol=tolerance)
    assert fitted.classes == ["a", "b"]
    assert fitted.vocabulary.hash == tokens.vocabulary.hash
    card |= {"max_length": changes.get("max_length", 24), "pooling": changes.get("pooling", "first")}
    card |= {"loss": changes.get("loss", "cross_entropy"), "bf16": "precision" in changes}
    assert card.items() <= fitted.card.items()
    assert fitted.card["versions"]["transformers"] == transformers.__version__


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_transformers_alone_reads_a_saved_model(run_settings, tokens, tmp_path, strategy):
    outcome = fit.fit_cells(run_settings(strategy=strategy, pooling="first"), tokens)
    assert not [name for name, _ in outcome.model.named_parameters() if "lora" in name]
    classifier.save(tmp_path / "model", outcome.model, tokens.vocabulary, outcome.classes, {})
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert type(stock) is transformers.BertForSequenceClassification
    assert stock.config.id2label == {0: "a", 1: "b"}
    batch = Cells(tokens.dataset, 0, rows=np.arange(60, 72)).__getitems__(np.arange(12))
    with torch.inference_mode():
        probabilities = losses.probabilities(stock(**batch).logits, "cross_entropy")
    np.testing.assert_allclose(probabilities, outcome.probabilities, atol=1e-6)


def test_adapters_that_were_not_merged_are_merged_when_saved(run_settings, tokens, tmp_path):
    model = build(run_settings(strategy="lora"), tokens)
    strategies.prepare(run_settings(strategy="lora"), model)
    classifier.save(tmp_path / "model", model, tokens.vocabulary, tokens.classes, {})
    assert not [name for name in load_file(tmp_path / "model" / "model.safetensors") if "lora" in name]
    classifier.load(tmp_path / "model")


@pytest.mark.parametrize("lost", ["model.json", "config.json", "model.safetensors"])
def test_a_saved_model_that_lacks_a_file_is_refused(run_settings, tokens, tmp_path, lost):
    classifier.save(tmp_path / "model", build(run_settings(), tokens), tokens.vocabulary, tokens.classes, {})
    (tmp_path / "model" / lost).unlink()
    with pytest.raises(UserError, match=f"{lost} cannot be read"):
        classifier.load(tmp_path / "model")


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_packed_cells_have_the_logits_and_gradients_of_padded_ones(run_settings, tokens, pooling):
    """The attention of transformers over padded cells is the other side. In fp32 the two add up in another order.

    1e-5 is about a hundred roundings (2^-24) of values near 1; the gradients are of that size.
    """
    found = []
    for kind in ("eager", "auto"):
        torch.manual_seed(0)
        settings = run_settings(attention=kind, pooling=pooling)
        model = classifier.build(settings, tokens.vocabulary, tokens.classes).eval()
        cells = Cells(tokens.dataset, 0, labels=np.arange(72) % 2, packed=kind == "auto")
        batch = cells.__getitems__([3, 40, 41, 70, 12, 5])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        weights = {name: weight for name, weight in model.named_parameters() if "token_type" not in name}
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), list(weights.values()))
        found.append({"logits": logits.detach(), **dict(zip(weights, gradients, strict=True))})
    assert len(set(cells.lengths[[3, 40, 41, 70, 12, 5]])) > 1
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kept", [0, 1e9])
def test_attention_in_bf16_is_that_of_each_cell_in_fp32(monkeypatch, kept):
    """Two cells at a time of three that are alike, and with weights computed again; 3e-2 is eight roundings (2^-8)."""
    monkeypatch.setattr(attention, "AT_ONCE", 2 * 2 * 5**2 * 2)
    monkeypatch.setattr(attention, "KEPT", kept)
    lengths = [5, 5, 5, 7]
    torch.manual_seed(0)
    whole = [torch.randn(1, 2, 22, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    found, _ = attention.attend(None, *whole, lengths=lengths)
    cells = zip(*(one.float().split(lengths, dim=2) for one in whole), strict=True)
    expected = torch.cat([torch.nn.functional.scaled_dot_product_attention(*cell) for cell in cells], dim=2)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=3e-2)
    both = [torch.autograd.grad(value.float().square().sum(), whole) for value in (found, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=3e-2, atol=1e-1)  # sums of tens of such terms
