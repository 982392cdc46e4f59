"""A fine-tuned model made smaller in several ways, each saved, loaded by a process of its own and measured there.

In: a run and its tokens. Out: for each variant its files, their size, memory, cells per second and its predictions of
the test cells. All on the CPU, which is what a small model is for.

A variant is a name:

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
- ``onnx``, ``onnx_int8``: exported for onnxruntime, and its dynamic quantization (weights of linear layers and
  embeddings, and inputs of linear layers).

Nothing is trained again after it was made smaller, and no cell is looked at to make it so.
"""

import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import BertConfig

from tuneformer.finetune import compressed, hardware, losses, training
from tuneformer.finetune.checkpoints import CellClassifier
from tuneformer.study import grid, paths
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.run import fingerprint, training_fingerprint
from tuneformer.tokens.tokenizer import Tokens

REFERENCE = "fp32"
ONNX = ("onnx", "onnx_int8")
PUBLISHED = (REFERENCE, "bf16", "int8_dynamic", "int8_weights", "heads_12of24", "neurons_256of512", "layers_3of6")


@dataclass(frozen=True)
class Measured:
    """What was measured of one variant.

    ``file_bytes``: of the files that are needed to load it. ``zipped_bytes``: of the same files, each compressed
    (zlib). ``import_memory_mb``, ``peak_memory_mb``, ``rates``, ``reference_rates``: see
    `tuneformer.finetune.deployed.main`.
    ``predictions``: of the test cells: cell, label, ``probability:<class>``, and group where groups are held out.
    """

    fingerprint: str
    file_bytes: int
    zipped_bytes: int
    import_memory_mb: float
    peak_memory_mb: float
    rates: dict[int, list[float]]
    reference_rates: dict[int, list[float]]
    device: str
    predictions: pd.DataFrame


def fine_tuned(settings: Study, tokens: Tokens) -> CellClassifier:
    """Load the model of a run with the weights of its best epoch, or train it and save it in the run's folder.

    Raises
    ------
    ParameterError
        The strategy is ``lora``, whose adapters are no part of the model.
    TrainingFailed
        The run diverges or lacks memory.
    """
    if settings.base_strategy == "lora":
        msg = "strategy: lora keeps its updates beside the model, and 08_compress has no use for them; take another."
        raise ParameterError(msg)
    folder = paths.run_dir(settings) / "model"
    current = training_fingerprint(settings, tokens.provenance["fingerprint"])
    if _stored_fingerprint(folder / "run.json") == current:
        return compressed.read_model(folder)
    model = _train(settings, tokens)
    with paths.atomic_path(folder) as partial:
        compressed.write_model(model, partial)
        paths.write_text(partial / "run.json", json.dumps({"fingerprint": current}) + "\n")
    return compressed.read_model(folder)


def variants(settings: Study, model: CellClassifier) -> list[str]:
    """Name the variants that a study asks for; heads and neurons are rounded, and every layer keeps one of each."""
    config = model.config
    n_heads, n_layers, n_neurons = config.num_attention_heads, config.num_hidden_layers, config.intermediate_size
    all_heads = n_heads * n_layers
    named = [REFERENCE]
    for kind in settings.compressions:
        match kind:
            case "pruned":
                named += [f"pruned_{share:.0%}".removesuffix("%") for share in settings.pruned_shares]
            case "heads":
                counts = [min(round(share * all_heads), all_heads - n_layers) for share in settings.pruned_shares]
                named += [f"heads_{n}of{all_heads}" for n in counts if n]
            case "neurons":
                counts = [min(round(share * n_neurons), n_neurons - 1) for share in settings.pruned_shares]
                named += [f"neurons_{n}of{n_neurons}" for n in counts if n]
            case "layers":
                named += [f"layers_{n}of{n_layers}" for n in range(1, n_layers)]
            case _:
                named.append(kind)
    return list(dict.fromkeys(named))


def measure(settings: Study, tokens: Tokens, model: CellClassifier) -> dict[str, Measured]:
    """Make, save and measure the variants of a model; those that were measured before are loaded.

    Every variant is loaded from its files by a new process (`tuneformer.finetune.deployed`), which predicts the same
    batches of the same test cells.

    Parameters
    ----------
    settings
        The run: ``compressions``, ``pruned_shares``, ``benchmark_cells``, ``benchmark_batch``, ``benchmark_repeats``,
        and ``threads`` (null: all cores) beside one.
    tokens
        Of the run.
    model
        From `fine_tuned`.

    Returns
    -------
    Name of the variant to what was measured, `REFERENCE` first.
    """
    drawn = training.draw_cells(settings, tokens)["test"]
    columns = [name for name in ("cell", "label", "length", "group") if name in tokens.dataset.column_names]
    cells = pd.DataFrame(tokens.dataset.select(drawn).select_columns(columns)[:])
    order = np.argsort(cells["length"].to_numpy(), kind="stable")
    rows = [torch.as_tensor(cell["input_ids"]) for cell in training.read_cells(tokens, drawn[order])]
    n_timed = min(settings.benchmark_cells, len(rows))
    timed = np.linspace(0, len(rows) - 1, n_timed).round().astype(int)  # of all lengths
    current = training_fingerprint(settings, tokens.provenance["fingerprint"])
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "cells.npz"
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokens.vocabulary.specials["<pad>"])
        np.savez(file, ids=ids.numpy(), lengths=cells["length"].to_numpy()[order], timed=timed)
        for name in variants(settings, model):
            folder = paths.run_dir(settings) / "variants" / name
            key = fingerprint(name, current, _benchmark(settings))
            stored = _stored_fingerprint(folder / "measured.json") == key
            if not stored:
                _write_and_measure(settings, model, name, folder, file, key=key, cells=cells.iloc[order])
            found[name] = _read(folder)
            _progress(settings, name, found[name], "loaded" if stored else "measured")
    return found


def compress(model: CellClassifier, name: str) -> CellClassifier:
    """Return a smaller copy of a model: any variant but those for onnxruntime.

    Parameters
    ----------
    model
        As `fine_tuned` returns it, in fp32.
    name
        The variant.
    """
    model = copy.deepcopy(model).eval()
    kind, _, size = name.partition("_")
    match kind:
        case "bf16":
            model.to(torch.bfloat16)
        case "int8":
            compressed.quantize(model, activations=size == "dynamic", embeddings=size == "weights")
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
        compressed.write_model(compress(model, name), folder)
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
    """Make an exported model int8, in place: `quantize_dynamic` of onnxruntime, one scale an output."""
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

    Geneformer-V1-10M (vocabulary 25,426) is built with random weights and written to files. BERT-base is only computed,
    4 bytes a weight, 1 in linear layers that are int8: it is the model of the tutorial from which a report took its
    "438 to 181". Both with a classification head of two classes. Nothing is downloaded, and nothing is predicted.

    Returns
    -------
    model, variant, megabytes (10**6 bytes), embeddings (their share of the weights of the model), how.
    """
    v1 = _architecture(vocab_size=25_426, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
                       intermediate_size=512, max_position_embeddings=2048)  # fmt: skip
    model, share = CellClassifier(v1), _embedding_share(v1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in PUBLISHED:
            write_variant(model, name, Path(scratch) / name)
            rows.append(("Geneformer-V1-10M", name, file_bytes(Path(scratch) / name) / 1e6, share, "random weights"))
    bert = _architecture(vocab_size=30_522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                         intermediate_size=3072, max_position_embeddings=512)  # fmt: skip
    with torch.device("meta"):
        model = CellClassifier(bert)
    n_all = sum(weight.numel() for weight in model.parameters())
    n_linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    for name, n_bytes in {REFERENCE: 4 * n_all, "int8_dynamic": 4 * n_all - 3 * n_linear}.items():
        rows.append(("BERT-base", name, n_bytes / 1e6, _embedding_share(bert), "computed"))
    return pd.DataFrame(rows, columns=["model", "variant", "megabytes", "embeddings", "how"])


def _architecture(**sizes: int) -> BertConfig:
    config = BertConfig(hidden_act="relu", num_labels=2, pad_token_id=0, **sizes)
    config.pooling = "first"
    return config


def _embedding_share(config: BertConfig) -> float:
    """Return which share of the weights of a model lies in its embeddings."""
    with torch.device("meta"):
        model = CellClassifier(config)
    n_embedded = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return n_embedded / sum(weight.numel() for weight in model.parameters())


def file_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def zipped_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder, each compressed by zlib; zeros take little room there."""
    return sum(len(zlib.compress(file.read_bytes())) for file in folder.iterdir())


def _train(settings: Study, tokens: Tokens) -> CellClassifier:
    """Train the model of a run as `tuneformer.finetune.training.finetune` does, up to the weights of the best epoch."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    hardware.prepare(settings)
    drawn = training.draw_cells(settings, tokens)
    drawn["train"] = training.training_rows(settings, tokens, drawn["train"])
    cells = {split: training.read_cells(tokens, rows) for split, rows in drawn.items()}
    trainer = training.make_trainer(settings, tokens, cells, training.RunLog())
    trainer.train()
    trainer.restore_best()
    return trainer.model.cpu().eval()


class _Logits(nn.Module):
    """A classifier that returns nothing but its logits."""

    def __init__(self, model: CellClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask).logits


def _zero_smallest(model: CellClassifier, share: float) -> None:
    """Set the smallest of all weights to 0, whatever layer they are in."""
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


def _part(linear: nn.Linear, *, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None) -> nn.Linear:
    """Return a linear layer with some of the outputs, or some of the inputs, of another."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if outputs is not None:
        weight, bias = weight[outputs], bias[outputs]
    if inputs is not None:
        weight = weight[:, inputs]
    smaller = nn.Linear(weight.shape[1], weight.shape[0])
    smaller.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return smaller


def _write_and_measure(
    settings: Study, model: CellClassifier, name: str, folder: Path, file: Path, *, key: str, cells: pd.DataFrame
) -> None:
    """Write a variant and what a new process measures of it into its folder; the folder is whole or not there."""
    with paths.atomic_path(folder) as partial:
        write_variant(model, name, partial / "model")
        logits = partial / "logits.npy"
        own = partial / "model"
        reference = own if name == REFERENCE else folder.with_name(REFERENCE) / "model"
        command = [sys.executable, "-m", "tuneformer.finetune.deployed", own, reference, file, logits]
        options = {"batch": settings.benchmark_batch, "threads": _threads(settings)}
        options["repeats"] = settings.benchmark_repeats
        command += [f"--{option}={value}" for option, value in options.items()]
        # OpenMP threads that wait shall sleep: by default they spin, and other work on the machine then halts them all
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            msg = f"{grid.describe(settings)}: the variant {name} could not be loaded and measured: {reason}"
            raise training.TrainingFailed(msg)
        probabilities = losses.probabilities(torch.from_numpy(np.load(logits)).double(), settings.loss).numpy()
        logits.unlink()
        predictions = cells.drop(columns="length").reset_index(drop=True)
        for number, label in model.config.id2label.items():
            predictions[training.PROBABILITY + label] = probabilities[:, number]
        predictions.to_parquet(partial / "predictions.parquet", index=False)
        measured = {
            "fingerprint": key,
            "file_bytes": file_bytes(partial / "model"),
            "zipped_bytes": zipped_bytes(partial / "model"),
            **json.loads(done.stdout),
            "device": torch.cpu.get_capabilities().get("cpu_name", "CPU"),
        }
        paths.write_text(partial / "measured.json", json.dumps(measured, indent=1) + "\n")


def _read(folder: Path) -> Measured:
    stored = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    for key in ("rates", "reference_rates"):
        stored[key] = {int(threads): rates for threads, rates in stored[key].items()}
    return Measured(**stored, predictions=pd.read_parquet(folder / "predictions.parquet"))


def _benchmark(settings: Study) -> dict[str, Any]:
    """Return what the numbers of a variant depend on beside its name and the model."""
    keys = ("benchmark_cells", "benchmark_batch", "benchmark_repeats")
    libraries = {name: version(name) for name in ("torch", "transformers", "onnxruntime")}
    return {key: getattr(settings, key) for key in keys} | libraries | {"threads": _threads(settings)}


def _threads(settings: Study) -> int:
    """Return the CPU threads of a run: as asked for, or all cores that this process may use."""
    return settings.threads or joblib.cpu_count()


def _stored_fingerprint(path: Path) -> str | None:
    return json.loads(path.read_text(encoding="utf-8"))["fingerprint"] if path.is_file() else None


def _progress(settings: Study, name: str, measured: Measured, how: str) -> None:
    rate = np.median(measured.rates[1])
    print(
        f"{grid.describe(settings)} {name}: {measured.file_bytes / 1e6:.2f} MB, {rate:.0f} cells/s, {how}",
        file=sys.stderr,
        flush=True,
    )
