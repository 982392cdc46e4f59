"""A fine-tuned model made smaller in several ways, each saved, loaded by a process of its own and measured there.

In: a run and its tokens. Out: for each variant its files, their size, memory, cells per second and its predictions of
the test cells. All on the CPU, which is what a small model is for. Nothing is trained again after it was made smaller,
and no cell is looked at to make it so. A variant is a name:

- ``fp32``: the model as it was trained; what the others are compared with.
- ``bf16``: all weights, and the arithmetic, in bfloat16.
- ``int8_dynamic``: weights and inputs of linear layers in int8; embeddings stay fp32, as in dynamic quantization of
  torch.
- ``int8_weights``: weights of linear layers and embeddings in int8, arithmetic in fp32.
- ``pruned_<p>``: the smallest p % of all weights of linear layers and embeddings set to 0 (Han et al. 2015,
  arXiv:1506.02626).
- ``heads_<n>of<all>``: n attention heads removed, those whose values and outputs are the smallest map.
- ``neurons_<n>of<all>``: n neurons removed from the feed-forward part of each layer, those with the smallest weights.
- ``layers_<n>of<all>``: the top n encoder layers dropped (Sajjad et al. 2023, arXiv:2004.03844).
- ``onnx``, ``onnx_int8``: exported for onnxruntime, and its dynamic quantization.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig

from tuneformer import paths
from tuneformer.artifacts import UserError, key, made, read_json, write_json
from tuneformer.model import losses
from tuneformer.model.classifier import CellClassifier
from tuneformer.study import CompressionKeys, Study, TrainingKeys

if TYPE_CHECKING:
    from tuneformer.tokens.encode import Tokens

VERSION = "compress.1"
REFERENCE = "fp32"
ONNX = ("onnx", "onnx_int8")
PUBLISHED = (REFERENCE, "bf16", "int8_dynamic", "int8_weights", "heads_12of24", "neurons_256of512", "layers_3of6")
LARGEST = 127  # of int8, symmetric around 0


class Int8Linear(nn.Module):
    """Linear layer with int8 weights and one scale per output; the input stays float, or becomes int8 row by row.

    With ``activations`` the product is one of int8 matrices, with exact int32 sums. Otherwise the weights are made
    float again at each use: file and memory are smaller, the arithmetic is the same and takes a step more.

    ``torch._int_mm`` is not public, but it is what torchao's int8 layers call too. The public route in torch itself,
    ``torch.ao.quantization.quantize_dynamic``, is deprecated and announced to be removed.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, activations: bool) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = nn.Buffer(weight), nn.Buffer(scale), nn.Buffer(bias)
        self.activations = activations

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return (..., outputs) of inputs (..., inputs)."""
        if not self.activations:
            return nn.functional.linear(inputs, self.weight * self.scale.unsqueeze(1), self.bias)
        rows, steps = rounded(inputs.flatten(end_dim=-2))
        sums = torch._int_mm(rows, self.weight.t())  # (rows, outputs), int32
        outputs = sums * steps.unsqueeze(1) * self.scale + self.bias
        return outputs.unflatten(0, inputs.shape[:-1])


class Int8Embedding(nn.Module):
    """Embedding with int8 rows (rows, width) and one scale per row, made float when looked up."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (..., width) of row numbers (...)."""
        return self.weight[ids] * self.scale[ids].unsqueeze(-1)


def rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a matrix to whole steps, of which its largest value has 127.

    Returns
    -------
    The steps, (rows, columns) int8, and the size of a step in each row, (rows,); no value moves by more than half.
    """
    steps = matrix.abs().amax(dim=1).clamp(min=torch.finfo(matrix.dtype).tiny) / LARGEST
    return (matrix / steps.unsqueeze(1)).round().clamp(-LARGEST, LARGEST).to(torch.int8), steps


def quantize(model: CellClassifier, *, activations: bool, embeddings: bool) -> None:
    """Make the linear layers of a model int8, in place; with `embeddings` those too."""
    model.config.int8_activations = activations
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight, scale = rounded(module.weight.detach())
            model.set_submodule(name, Int8Linear(weight, scale, module.bias.detach(), activations=activations))
        elif embeddings and isinstance(module, nn.Embedding):
            model.set_submodule(name, Int8Embedding(*rounded(module.weight.detach())))


def write_model(model: CellClassifier, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.to_json_file(folder / "config.json", use_diff=True)
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "model.safetensors")


def read_model(folder: Path) -> CellClassifier:
    """Read what `write_model` wrote, ready to predict; UserError if a file is damaged.

    The model is built without memory first. Which matrices are smaller, int8 or bf16 is seen from the stored ones.
    """
    config = BertConfig.from_json_file(folder / "config.json")
    config._attn_implementation = "sdpa"
    path = folder / "model.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{paths.shown(path)} cannot be read ({error}); delete its folder, and it is made again."
        raise UserError(msg) from error
    with torch.device("meta"):
        model = CellClassifier(config)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                activations = getattr(config, "int8_activations", False)
                model.set_submodule(name, _like_stored(module, stored[f"{name}.weight"].to("meta"), activations))
    model.load_state_dict(stored, assign=True)
    places = torch.arange(config.max_position_embeddings).unsqueeze(0)
    model.bert.embeddings.position_ids, model.bert.embeddings.token_type_ids = places, torch.zeros_like(places)
    return model.eval()


def fine_tuned(settings: Study, tokens: "Tokens") -> CellClassifier:
    """Load the model of a run with the weights of its best epoch, or train and save it; UserError if the run fails."""

    def train(folder: Path) -> None:
        from tuneformer.model import fit  # the process that measures a variant need not load what trains

        outcome = fit.fit_cells(settings, tokens)
        if outcome.status != "ok":
            msg = f"{settings.task} {settings.arm} seed {settings.seed}: {outcome.reason}"
            raise UserError(msg)
        write_model(outcome.model.cpu().float(), folder)

    return read_model(made(_folder(settings) / "model", _key(settings, tokens), train))


def variants(settings: Study, model: CellClassifier) -> list[str]:
    """Name the variants that a study asks for; heads and neurons are rounded, and every layer keeps one of each."""
    config = model.config
    n_layers, n_neurons = config.num_hidden_layers, config.intermediate_size
    n_heads = config.num_attention_heads * n_layers
    heads, neurons = (
        [min(round(share * n_all), most) for share in settings.pruned_shares]
        for n_all, most in ((n_heads, n_heads - n_layers), (n_neurons, n_neurons - 1))
    )
    of_kind = {
        "pruned": [f"pruned_{share * 100:.0f}" for share in settings.pruned_shares],
        "heads": [f"heads_{n}of{n_heads}" for n in heads if n],
        "neurons": [f"neurons_{n}of{n_neurons}" for n in neurons if n],
        "layers": [f"layers_{n}of{n_layers}" for n in range(1, n_layers)],
    }
    named = [name for kind in settings.compressions for name in of_kind.get(kind, [kind])]
    return list(dict.fromkeys([REFERENCE, *named]))


def measure(settings: Study, tokens: "Tokens", model: CellClassifier) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make, save and measure the variants of a model; those that were measured before are loaded.

    Every variant is loaded from its files by a new process (`tuneformer.model.deployed`), which predicts the same
    batches of the same test cells.

    Returns
    -------
    Rows of ``runs.csv``, one per variant, the reference first: ``arm`` is the variant; ``file_bytes`` of all files that
    are needed to load it, and ``zipped_bytes`` of the same, each compressed; ``peak_memory_mb`` of the whole process
    and ``model_memory_mb``, what loading and predicting added to it; ``cells_per_second:<threads>``, and
    ``speed:<threads>``, times as fast as the reference by turns in one process (medians, with the quartiles as
    ``speed_low`` and ``speed_high``). And predictions: arm, cell, label, predicted, ``probability:<class>`` and, where
    groups are held out, group.
    """
    table = tokens.dataset.to_pandas()
    cells = table[table["split"] == "test"].sort_values("length", kind="stable", ignore_index=True)
    rows = [torch.as_tensor(ids) for ids in cells["input_ids"]]
    timed = np.linspace(0, len(rows) - 1, min(settings.benchmark_cells, len(rows))).round().astype(int)  # all lengths
    names = [name for name in ("cell", "label", "group") if name in cells]
    found, predictions = [], []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "cells.npz"
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokens.vocabulary.specials["<pad>"])
        np.savez(file, ids=ids.numpy().astype(np.int64), lengths=cells["length"].to_numpy(), timed=timed)
        for name in variants(settings, model):
            number = key(_key(settings, tokens), name, _benchmark(settings))

            def make(folder: Path, name: str = name) -> None:
                _write_and_measure(settings, model, name, folder, file)

            folder = made(_folder(settings) / name, number, make)
            logits = torch.from_numpy(np.load(folder / "logits.npy")).double()
            found.append(_row(settings, name, read_json(folder / "measured.json")) | {"key": number})
            predictions.append(_predictions(settings, model, cells[names], logits).assign(arm=name))
            line = f"{name}: {found[-1]['file_bytes'] / 1e6:.2f} MB, {found[-1]['cells_per_second:1']:.0f} cells/s"
            print(line, file=sys.stderr, flush=True)
    return pd.DataFrame(found).assign(n_test=len(cells)), pd.concat(predictions, ignore_index=True)


def compress(model: CellClassifier, name: str) -> CellClassifier:
    """Return a smaller copy of a model in fp32: any variant but those for onnxruntime."""
    model = copy.deepcopy(model).eval()
    kind, _, size = name.partition("_")
    match kind:
        case "bf16":
            model.to(torch.bfloat16)
        case "int8":
            quantize(model, activations=size == "dynamic", embeddings=size == "weights")
        case "pruned":
            _zero_smallest(model, int(size) / 100)
        case "heads":
            _remove_heads(model, int(size.split("of")[0]))
        case "neurons":
            _remove_neurons(model, int(size.split("of")[0]))
        case "layers":
            model.config.num_hidden_layers -= int(size.split("of")[0])
            model.bert.encoder.layer = model.bert.encoder.layer[: model.config.num_hidden_layers]
    return model


def write_variant(model: CellClassifier, name: str, folder: Path) -> None:
    """Write the files of a variant of a model into a folder: all that is needed to load it, and nothing else."""
    if name not in ONNX:
        write_model(compress(model, name), folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    export(model, folder / "model.onnx")
    if name == "onnx_int8":
        quantize_export(folder / "model.onnx")


def export(model: CellClassifier, path: Path) -> None:
    """Write a model for onnxruntime: input_ids and attention_mask, (batch, length) int64, to logits (batch, classes).

    The exporter notes the Python stack of every operator in the file, a third of the file of a small model; these notes
    and the shapes of intermediate results, which `quantize_export` would trip over, are left out.
    """
    import logging

    import onnx

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is missing
    ids = torch.ones(3, 8, dtype=torch.int64)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2, [1] * 2 + [0] * 6])
    any_size = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings(), torch.inference_mode():
        # torch 2.13 warns of a call of its own
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        program = torch.onnx.export(
            _Logits(model).eval(),
            (ids, mask),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": any_size, "attention_mask": any_size},
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    proto.graph.ClearField("value_info")
    for node in proto.graph.node:
        node.ClearField("metadata_props")
    onnx.save(proto, path)


def quantize_export(path: Path) -> None:
    """Make an exported model int8, in place: `quantize_dynamic` of onnxruntime, one scale per output."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, shape_inference

    prepared = path.with_name("prepared.onnx")
    shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    proto = onnx.load(prepared)
    prepared.unlink()
    proto.graph.ClearField("value_info")
    quantize_dynamic(proto, path, weight_type=QuantType.QInt8, per_channel=True)


def published_sizes() -> pd.DataFrame:
    """Return what the architectures of published models weigh when they are made smaller.

    Geneformer-V1-10M is built with random weights and written to files. BERT-base is only computed, 4 bytes per weight,
    1 in linear layers that are int8: it is the model of the tutorial from which a report took its "438 to 181". Both
    with a classification head of two classes. Nothing is downloaded, and nothing is predicted.

    Returns
    -------
    model, variant, megabytes (10**6 bytes), embeddings (their share of the weights of the model), how.
    """
    model = _architecture(vocab_size=25_426, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
                          intermediate_size=512, max_position_embeddings=2048)  # fmt: skip
    share, rows = _embedding_share(model), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in PUBLISHED:
            write_variant(model, name, Path(scratch) / name)
            rows.append(("Geneformer-V1-10M", name, file_bytes(Path(scratch) / name) / 1e6, share, "random weights"))
    with torch.device("meta"):
        model = _architecture(vocab_size=30_522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                              intermediate_size=3072, max_position_embeddings=512)  # fmt: skip
    n_all = sum(weight.numel() for weight in model.parameters())
    n_linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    for name, n_bytes in {REFERENCE: 4 * n_all, "int8_dynamic": 4 * n_all - 3 * n_linear}.items():
        rows.append(("BERT-base", name, n_bytes / 1e6, _embedding_share(model), "computed"))
    return pd.DataFrame(rows, columns=["model", "variant", "megabytes", "embeddings", "how"])


def file_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def zipped_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder, each compressed by zlib; zeros take little room there."""
    return sum(len(zlib.compress(file.read_bytes())) for file in folder.iterdir())


class _Logits(nn.Module):
    """A classifier that returns nothing but its logits."""

    def __init__(self, model: CellClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask).logits


def _folder(settings: Study) -> Path:
    return paths.arm_dir(settings) / f"compressed_seed{settings.seed}"


def _key(settings: Study, tokens: "Tokens") -> str:
    """Return the key of the model of a run."""
    from tuneformer.data import fetch

    parameters = {
        name: value for name, value in settings.keys(TrainingKeys).items() if name not in ("device", "threads")
    }
    return key(VERSION, parameters, settings.seed, settings.fold, tokens.key, fetch.checkpoint_key(settings.checkpoint))


def _benchmark(settings: Study) -> dict[str, Any]:
    """Return what the numbers of a variant depend on beside its name and the model."""
    options = {"batch": settings.benchmark_batch, "threads": settings.threads or len(os.sched_getaffinity(0))}
    libraries = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    return options | {"cells": settings.benchmark_cells, "repeats": settings.benchmark_repeats} | libraries


def _write_and_measure(settings: Study, model: CellClassifier, name: str, folder: Path, cells: Path) -> None:
    """Write a variant, and what a new process measures of it, into an empty folder."""
    own = folder / "model"
    write_variant(model, name, own)
    reference = own if name == REFERENCE else _folder(settings) / REFERENCE / "model"
    options = [f"--{option}={_benchmark(settings)[option]}" for option in ("batch", "threads", "repeats")]
    command = [
        sys.executable,
        "-m",
        "tuneformer.model.deployed",
        own,
        reference,
        cells,
        folder / "logits.npy",
        *options,
    ]
    # OpenMP threads that wait have to sleep: by default they spin, and other work on the machine then halts them all
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        msg = f"{settings.task} {settings.arm}: the variant {name} could not be loaded and measured: {reason}"
        raise UserError(msg)
    sizes = {"file_bytes": file_bytes(own), "zipped_bytes": zipped_bytes(own)}
    write_json(folder / "measured.json", sizes | json.loads(done.stdout))


def _row(settings: Study, name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the row of ``runs.csv`` of a variant, without its scores."""
    row = {"study": settings.study, "task": settings.task, "arm": name, "strategy": settings.strategy}
    row |= {"seed": settings.seed, "fold": settings.fold, "status": "ok", "reason": ""}
    row |= {each: measured[each] for each in ("file_bytes", "zipped_bytes", "peak_memory_mb")}
    row["model_memory_mb"] = measured["peak_memory_mb"] - measured["import_memory_mb"]
    for threads, rates in measured["rates"].items():
        ratios = np.divide(rates, measured["reference_rates"][threads])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        row |= {f"cells_per_second:{threads}": float(np.median(rates)), f"speed:{threads}": middle}
        row |= {f"speed_low:{threads}": low, f"speed_high:{threads}": high}
    return row | {"device": torch.cpu.get_capabilities().get("cpu_name", "CPU")}


def _predictions(settings: Study, model: CellClassifier, cells: pd.DataFrame, logits: torch.Tensor) -> pd.DataFrame:
    classes = list(model.config.id2label.values())
    probabilities = losses.probabilities(logits, settings.loss).numpy()
    table = cells.assign(predicted=np.array(classes)[probabilities.argmax(axis=1)])
    return table.join(pd.DataFrame(probabilities, columns=[f"probability:{name}" for name in classes]))


def _like_stored(module: nn.Module, weight: torch.Tensor, activations: bool) -> nn.Module:
    """Return a layer of the size and kind that was stored; its weights come later."""
    is_linear = isinstance(module, nn.Linear)
    if weight.dtype == torch.int8:
        scale = weight.new_empty(len(weight), dtype=torch.float32)
        return Int8Linear(weight, scale, scale, activations=activations) if is_linear else Int8Embedding(weight, scale)
    return nn.Linear(weight.shape[1], weight.shape[0]) if is_linear else module


def _zero_smallest(model: CellClassifier, share: float) -> None:
    """Set the smallest of all weights to 0, whatever layer they are in."""
    from torch.nn.utils import prune

    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=share)
    for module, name in layers:
        prune.remove(module, name)


def _remove_heads(model: CellClassifier, n: int) -> None:
    """Remove n heads, those whose map from a token to what is added to another is smallest (Frobenius norm).

    That map is the product of the output and the value matrix, so it does not matter how its size is shared by the two.
    """
    size = model.config.hidden_size // model.config.num_attention_heads
    layers = [layer.attention for layer in model.bert.encoder.layer]
    norms = {}
    for place, layer in enumerate(layers):
        for head in range(model.config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            added = layer.output.dense.weight.detach()[:, own] @ layer.self.value.weight.detach()[own]
            norms[place, head] = added.norm().item()
    kept = {place: list(range(model.config.num_attention_heads)) for place in range(len(layers))}
    for place, head in sorted(norms, key=norms.__getitem__):
        if n and len(kept[place]) > 1:
            kept[place].remove(head)
            n -= 1
    for place, layer in enumerate(layers):
        rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept[place]])
        for name in ("query", "key", "value"):
            setattr(layer.self, name, _part(getattr(layer.self, name), outputs=rows))
        layer.output.dense = _part(layer.output.dense, inputs=rows)


def _remove_neurons(model: CellClassifier, n: int) -> None:
    """Remove n neurons of each feed-forward part: the smallest product of the norms of incoming and outgoing weights.

    With ReLU the incoming weights can be made larger by what the outgoing are made smaller, and the product stays.
    """
    for layer in model.bert.encoder.layer:
        into, out = layer.intermediate.dense, layer.output.dense
        incoming = torch.cat([into.weight, into.bias.unsqueeze(1)], dim=1).norm(dim=1)
        smallest_first = (incoming * out.weight.norm(dim=0)).argsort(stable=True)
        kept = smallest_first[n:].sort().values
        layer.intermediate.dense, layer.output.dense = _part(into, outputs=kept), _part(out, inputs=kept)


def _part(linear: nn.Linear, *, outputs: Any = slice(None), inputs: Any = slice(None)) -> nn.Linear:
    """Return a linear layer with some of the outputs, or some of the inputs, of another."""
    weight, bias = linear.weight.detach()[outputs][:, inputs], linear.bias.detach()[outputs]
    smaller = nn.Linear(weight.shape[1], weight.shape[0])
    smaller.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return smaller


def _architecture(**sizes: int) -> CellClassifier:
    config = BertConfig(hidden_act="relu", num_labels=2, pad_token_id=0, **sizes)
    config.pooling = "first"
    return CellClassifier(config)


def _embedding_share(model: CellClassifier) -> float:
    """Return which share of the weights of a model lies in its embeddings."""
    n_embedded = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return n_embedded / sum(weight.numel() for weight in model.parameters())
