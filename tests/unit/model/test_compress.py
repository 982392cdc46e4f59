"""What making a small random model smaller does to it: against brute force, and back from disk."""

import copy
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from torch import nn

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.evaluate import compare
from tuneformer.model import classifier, compress, deployed, fit, memory, variants

IN_TORCH = ["fp32", "bf16", "int8_dynamic", "int8_weights", "pruned_50", "heads_2of4", "neurons_20of32", "layers_1of2"]


@pytest.fixture
def model(run_settings, tokens):
    torch.manual_seed(3)
    return classifier.build(run_settings(), tokens.vocabulary, tokens.classes).eval()


@pytest.fixture
def batch():
    rng = np.random.default_rng(5)
    ids = rng.integers(2, 42, size=(7, 19))
    lengths = np.array([19, 4, 7, 1, 19, 12, 9])
    return ids, (np.arange(19) < lengths[:, None]).astype(np.int64)


def logits(model, batch):
    with torch.inference_mode():
        return model(*map(torch.from_numpy, batch)).logits


def written(model, name, tmp_path):
    folder = tmp_path / name
    variants.write_variant(model, name, folder)
    return folder


# --- int8 ---


def test_rounding_is_to_the_nearest_of_255_steps_of_each_row():
    matrix = torch.tensor([[1.0, -0.5, 0.004, 0.0], [-127.0, 63.4, 63.6, 1.0], [0.0, 0.0, 0.0, 0.0]])
    whole, steps = variants.rounded(matrix)
    assert whole.tolist() == [[127, -64, 1, 0], [-127, 63, 64, 1], [0, 0, 0, 0]]  # -63.5 to the even -64
    torch.testing.assert_close(steps[:2], torch.tensor([1 / 127, 1.0]))
    random = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole, steps = variants.rounded(random)
    moved = (whole * steps.unsqueeze(1) - random).abs()
    assert (moved <= steps.unsqueeze(1) * 0.50001).all()
    assert whole.abs().amax(dim=1).unique().tolist() == [127]


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_int8_layer_is_the_product_of_whole_numbers(shape):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(24, 9)
    inputs = torch.randn(shape, generator=generator)
    weight, scale = variants.rounded(linear.weight.detach())
    dynamic = variants.Int8Linear(weight, scale, linear.bias.detach(), activations=True)(inputs)
    rows, steps = variants.rounded(inputs.reshape(-1, 24))
    sums = rows.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    expected = sums * steps.numpy()[:, None].astype(float) * scale.numpy() + linear.bias.detach().numpy()
    np.testing.assert_allclose(dynamic.reshape(-1, 9).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert dynamic.shape == (*shape[:-1], 9)
    only = variants.Int8Linear(weight, scale, linear.bias.detach(), activations=False)(inputs)
    dequantized = weight.numpy() * scale.numpy()[:, None]
    np.testing.assert_allclose(
        only.numpy(), inputs.numpy() @ dequantized.T + linear.bias.detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_what_is_int8_is_what_the_name_says(model):
    kinds = {}
    for name in ("int8_dynamic", "int8_weights"):
        smaller = variants.compress(model, name)
        kinds[name] = {type(module) for module in smaller.modules()}
        assert nn.Linear not in kinds[name]
        activations = {module.activations for module in smaller.modules() if isinstance(module, variants.Int8Linear)}
        assert activations == {name == "int8_dynamic"}
    assert nn.Embedding in kinds["int8_dynamic"]
    assert nn.Embedding not in kinds["int8_weights"]
    assert variants.Int8Embedding in kinds["int8_weights"]


# --- pruning ---


def test_pruning_zeroes_the_smallest_weights_of_all_matrices_together(model):
    before = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    smaller = variants.compress(model, "pruned_30")
    after = [module.weight for module in smaller.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    flat_before, flat_after = (torch.cat([part.detach().flatten() for part in parts]) for parts in (before, after))
    n_zero = round(0.3 * len(flat_before))
    limit = flat_before.abs().sort().values[n_zero - 1]
    assert torch.equal(flat_after, torch.where(flat_before.abs() <= limit, 0, flat_before))
    assert abs(int((flat_after == 0).sum()) - n_zero) <= 1
    assert all(parameter.is_leaf for parameter in smaller.parameters())


def test_a_removed_head_is_one_whose_output_is_zeroed(model, batch):
    smaller = variants.compress(model, "heads_2of4")
    size, sums = 8, {}
    zeroed = copy.deepcopy(model)
    for place, layer in enumerate(model.bert.encoder.layer):
        out, value = layer.attention.output.dense.weight.detach(), layer.attention.self.value.weight.detach()
        for head in range(2):
            part = slice(head * size, (head + 1) * size)
            sums[place, head] = float((out[:, part].double() @ value[part].double()).square().sum())
    gone, left = [], [2, 2]
    for place, head in sorted(sums, key=sums.get):
        if len(gone) < 2 and left[place] > 1:
            gone.append((place, head))
            left[place] -= 1
    for place, head in gone:
        zeroed.bert.encoder.layer[place].attention.output.dense.weight.data[:, head * size : (head + 1) * size] = 0
    torch.testing.assert_close(logits(smaller, batch), logits(zeroed, batch), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(smaller, batch), logits(model, batch), atol=1e-6)
    assert [layer.attention.self.query.out_features for layer in smaller.bert.encoder.layer] == [size, size]
    assert [layer.attention.output.dense.in_features for layer in smaller.bert.encoder.layer] == [size, size]


def test_removed_neurons_are_those_with_the_smallest_weights_however_these_are_scaled(model, batch):
    for layer in model.bert.encoder.layer:  # the same function: ReLU passes a positive factor on
        factors = torch.linspace(0.01, 100, 32)
        layer.intermediate.dense.weight.data *= factors.unsqueeze(1)
        layer.intermediate.dense.bias.data *= factors
        layer.output.dense.weight.data /= factors
    smaller, zeroed = variants.compress(model, "neurons_20of32"), copy.deepcopy(model)
    for layer in zeroed.bert.encoder.layer:
        into, out = layer.intermediate.dense, layer.output.dense
        incoming = torch.cat([into.weight, into.bias.unsqueeze(1)], dim=1).detach().numpy()
        norms = np.sqrt((incoming**2).sum(axis=1) * (out.weight.detach().numpy() ** 2).sum(axis=0))
        out.weight.data[:, torch.from_numpy(np.argsort(norms)[:20])] = 0
    torch.testing.assert_close(logits(smaller, batch), logits(zeroed, batch), rtol=1e-4, atol=1e-6)
    assert {layer.intermediate.dense.out_features for layer in smaller.bert.encoder.layer} == {12}


def test_dropped_layers_are_the_top_ones(model, batch):
    smaller = variants.compress(model, "layers_1of2")
    assert len(smaller.bert.encoder.layer) == smaller.config.num_hidden_layers == 1
    ids, mask = map(torch.from_numpy, batch)
    with torch.inference_mode():
        hidden = model.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        expected = model.classifier(model.bert.pooler(hidden))
    torch.testing.assert_close(logits(smaller, batch), expected, rtol=1e-5, atol=1e-6)
    assert model.config.num_hidden_layers == 2


def test_heads_and_neurons_are_rounded_and_every_layer_keeps_one(run_settings, model):
    every = ["bf16", "pruned", "heads", "neurons", "layers", "onnx"]
    named = compress.variants(run_settings(compressions=every, pruned_shares=[0.3, 0.5, 0.99]), model)
    expected = ["fp32", "bf16", "pruned_30", "pruned_50", "pruned_99", "heads_1of4", "heads_2of4"]
    expected += ["neurons_10of32", "neurons_16of32", "neurons_31of32", "layers_1of2", "onnx"]
    assert named == expected


# --- files ---


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_a_variant_predicts_bit_for_bit_the_same_after_loading(name, pooling, model, batch, tmp_path):
    model.config.pooling = pooling
    loaded = variants.read_model(written(model, name, tmp_path))
    assert torch.equal(logits(loaded, batch), logits(variants.compress(model, name), batch))
    assert not loaded.training
    again = deployed.load(tmp_path / name, threads=1)(*batch)
    assert np.array_equal(again, logits(loaded, batch).numpy())


def test_what_the_files_weigh(model, tmp_path):
    folders = {name: written(model, name, tmp_path) for name in IN_TORCH}
    weights = {name: (folder / "model.safetensors").stat().st_size for name, folder in folders.items()}
    n_all = sum(weight.numel() for weight in model.parameters())
    header = weights["fp32"] - 4 * n_all
    assert 0 < header < 6000
    assert abs(weights["bf16"] - 2 * n_all - header) < 100
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    n_linear, n_scales = (
        sum(f(module) for module in linear) for f in (lambda m: m.weight.numel(), lambda m: len(m.bias))
    )
    assert abs(weights["int8_dynamic"] - (4 * n_all - 3 * n_linear + 4 * n_scales) - header) < 100 * len(linear)
    assert weights["pruned_50"] == weights["fp32"]  # zeros take as much room as other numbers ...
    assert compress.zipped_bytes(folders["pruned_50"]) < 0.7 * compress.zipped_bytes(folders["fp32"])  # until zipped
    for name in ("int8_weights", "heads_2of4", "neurons_20of32", "layers_1of2"):
        assert weights[name] < weights["fp32"]
    assert compress.file_bytes(folders["fp32"]) == sum(file.stat().st_size for file in folders["fp32"].iterdir())
    assert sorted(file.name for file in folders["fp32"].iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_export_predicts_what_the_model_does_and_needs_no_torch(pooling, model, batch, tmp_path):
    model.config.pooling = pooling
    folder = written(model, "onnx", tmp_path)
    predict = deployed.load(folder, threads=1)
    for part in (slice(None), slice(0, 1)):
        cells = tuple(array[part] for array in batch)
        np.testing.assert_allclose(predict(*cells), logits(model, cells).numpy(), rtol=1e-4, atol=1e-6)
    assert np.array_equal(deployed.load(folder, threads=1)(*batch), predict(*batch))
    content = (folder / "model.onnx").read_bytes()
    assert b".py" not in content  # no stack of the machine that exported it
    onnx.checker.check_model(folder / "model.onnx")
    code = f"""
import sys, numpy as np
from pathlib import Path
from tuneformer.model import deployed, memory
ones = np.ones((2, 5), dtype=np.int64)
print(deployed.load(Path({str(folder)!r}), threads=1)(ones, ones).shape)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "(2, 2)\n"), child.stderr


def test_int8_export_is_smaller_and_close(model, batch, tmp_path):
    for weight in model.parameters():  # a checkpoint of random weights gives logits of almost 0
        weight.data *= 3
    full, int8 = written(model, "onnx", tmp_path), tmp_path / "int8"
    shutil.copytree(full, int8)
    variants.quantize_export(int8 / "model.onnx")
    assert [file.name for file in int8.iterdir()] == ["model.onnx"]
    operators = {node.op_type for node in onnx.load(int8 / "model.onnx").graph.node}
    assert "MatMulInteger" in operators
    ours, theirs = (deployed.load(folder, threads=1)(*batch) for folder in (int8, full))
    error = np.abs(ours - theirs).max()
    assert 0 < error < 0.1 * np.abs(theirs).max()
    assert compress.file_bytes(int8) < compress.file_bytes(full)


def test_a_damaged_file_is_named(model, tmp_path):
    folder = written(model, "fp32", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"fp32/model.safetensors cannot be read .*make it again\."):
        variants.read_model(folder)


# --- a process of its own ---


def test_batches_are_cut_to_their_longest_cell():
    ids = np.arange(15).reshape(3, 5)
    first, second = deployed.batches(ids, np.array([2, 3, 5]), 2)
    assert first[0].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert first[1].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second[0].tolist() == [[10, 11, 12, 13, 14]]
    assert second[1].tolist() == [[1, 1, 1, 1, 1]]


def test_speed_is_that_of_the_repetitions_after_the_warm_up(monkeypatch):
    clock = iter([0, 100, 0, 50, 0, 2, 0, 4, 0, 5, 0, 10])  # start and end: warm-ups, then two repetitions by turns
    monkeypatch.setattr(deployed.time, "perf_counter", lambda: next(clock))
    work = [(np.zeros((3, 2)), None), (np.zeros((1, 2)), None)]
    calls = []
    predictors = {name: lambda ids, mask, name=name: calls.append((name, len(ids))) for name in ("a", "b")}
    assert deployed.rates(predictors, work, 2) == {"a": [2, 4 / 5], "b": [1, 4 / 10]}
    assert calls == [("a", 3), ("a", 1), ("b", 3), ("b", 1)] * 3


def test_peak_memory_is_not_inherited_from_the_process_before():
    ballast = np.ones(50_000_000)  # 400 MB, which ru_maxrss would count for the child as well
    code = "from tuneformer.model.memory import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(child.stdout) < 200
    assert memory.peak_memory() > ballast.nbytes / 1e6


# --- runs ---


@pytest.fixture
def settings_of(run_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return run_settings


def test_the_model_of_a_run_predicts_what_the_run_predicted_and_is_trained_once(settings_of, tokens, monkeypatch):
    settings = settings_of(epochs=3, precision="fp32")
    outcome = fit.fit_cells(settings, tokens)
    model = compress.fine_tuned(settings, tokens)
    test = tokens.dataset.filter(lambda row: row["split"] == "test")
    for ids, expected in zip(test["input_ids"][:], outcome.probabilities, strict=True):
        with torch.inference_mode():
            found = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)).logits.softmax(dim=1)[0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(fit, "fit_cells", None)
    again = compress.fine_tuned(settings, tokens)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    with pytest.raises(TypeError):  # other parameters: it would be trained
        compress.fine_tuned(settings_of(epochs=2, precision="fp32"), tokens)


def test_a_run_that_fails_is_one_sentence(settings_of, tokens):
    with pytest.raises(UserError, match=r"^drug_5class full seed 0: the loss became .* set a smaller learning_rate"):
        compress.fine_tuned(settings_of(learning_rate=1e30, warmup_steps=0), tokens)


def test_adapters_of_lora_are_part_of_the_model(settings_of, tokens):
    model = compress.fine_tuned(settings_of(strategy="lora", arm="lora"), tokens)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_variants_are_measured_once_each(settings_of, tokens, model, monkeypatch):
    asked = {"benchmark_cells": 10, "benchmark_batch": 5, "benchmark_repeats": 2, "threads": 2}
    settings = settings_of(compressions=["onnx"], **asked)
    runs, predictions = compress.measure(settings, tokens, model)
    runs = runs.set_index("arm")
    assert list(runs.index) == ["fp32", "onnx"]
    assert (runs[["cells_per_second:1", "cells_per_second:2", "speed:1", "model_memory_mb"]] > 0).all(axis=None)
    assert (runs["file_bytes"] > runs["zipped_bytes"]).all()
    assert (runs["speed_low:1"] <= runs["speed:1"]).all()
    assert (runs["n_test"] == 12).all()
    before = runs["peak_memory_mb"] - runs["model_memory_mb"]
    assert before["fp32"] > 3 * before["onnx"] > 60  # a process that runs ONNX never loads torch
    shown = predictions.set_index("cell")
    cells = dict(zip(tokens.dataset["cell"][:], tokens.dataset["input_ids"][:], strict=True))
    columns = ["probability:a", "probability:b"]
    for cell, row in shown[shown["arm"] == "fp32"].iterrows():
        ids = torch.as_tensor(cells[cell]).unsqueeze(0)
        with torch.inference_mode():
            expected = model(ids, torch.ones_like(ids)).logits.softmax(dim=1)[0]
        np.testing.assert_allclose(row[columns].to_numpy(float), expected.numpy(), rtol=1e-4)
    by_arm = [part[columns].to_numpy() for _, part in predictions.groupby("arm")]
    np.testing.assert_allclose(*by_arm, rtol=1e-4)

    monkeypatch.setattr(compress.subprocess, "run", None)
    again, _ = compress.measure(settings, tokens, model)
    assert again.set_index("arm")["speed:1"].equals(runs["speed:1"])
    with pytest.raises(TypeError):  # it would be measured again
        compress.measure(settings_of(compressions=["onnx"], **asked | {"benchmark_cells": 5}), tokens, model)


def test_a_variant_that_cannot_be_loaded_leaves_nothing(settings_of, tokens, model, monkeypatch):
    def write_rubbish(_model, _name, folder):
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text("rubbish")

    monkeypatch.setattr(compress, "write_variant", write_rubbish)
    settings = settings_of(compressions=[])
    sentence = r"^drug_5class full: the variant fp32 could not be loaded and measured: .*[Pp]rotobuf"
    with pytest.raises(UserError, match=sentence):
        compress.measure(settings, tokens, model)
    assert not (paths.arm_dir(settings) / "compressed_seed0" / "fp32").exists()


def test_the_answer_compares_each_variant_with_the_model_as_it_was(settings_of):
    """A variant that predicts the same is the same; one that is wrong everywhere is lower."""
    labels = np.tile(["a", "b"], 60)
    rng = np.random.default_rng(0)
    own = np.where(rng.random(120) < 0.8, labels, np.where(labels == "a", "b", "a"))
    called = {"fp32": own, "bf16": own, "pruned_90": np.full(120, "a")}
    settings = settings_of(kind="compression")
    runs = pd.DataFrame(
        {"task": settings.task, "arm": list(called), "strategy": "full", "seed": 0, "status": "ok", "n_train": 48}
    ).assign(fold=None)
    place = {"task": settings.task, "seed": 0, "fold": None, "label": labels, "cell": [f"c{n}" for n in range(120)]}
    predictions = pd.concat([pd.DataFrame({**place, "arm": arm, "predicted": of}) for arm, of in called.items()])
    (task,) = compare.answer(settings, runs, predictions)["tasks"]
    assert {(one["reference"], one["arm"]): one["verdict"] for one in task["contrasts"]} == {
        ("fp32", "bf16"): "same",
        ("fp32", "pruned_90"): "lower",
    }
