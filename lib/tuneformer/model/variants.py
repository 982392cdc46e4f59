"""What is done to a fine-tuned model to make it smaller, and how the result is written and read back.

In: a `CellClassifier` in fp32 and the name of a variant. Out: a smaller copy, or the files that are needed to load it.
Nothing is trained again, and no cell is looked at. A variant is a name:

- ``fp32``: the model as it was trained. ``bf16``: all weights, and the arithmetic, in bfloat16.
- ``int8_dynamic``: weights and inputs of linear layers in int8; embeddings stay fp32, as in dynamic quantization of
  torch. ``int8_weights``: weights of linear layers and embeddings in int8, arithmetic in fp32.
- ``pruned_<p>``: the smallest p % of all weights of linear layers and embeddings set to 0 (Han et al. 2015,
  arXiv:1506.02626).
- ``heads_<n>of<all>``: n attention heads removed, those whose values and outputs are the smallest map.
- ``neurons_<n>of<all>``: n neurons removed from the feed-forward part of each layer, those with the smallest weights.
- ``layers_<n>of<all>``: the top n encoder layers dropped (Sajjad et al. 2023, arXiv:2004.03844).
- ``onnx``, ``onnx_int8``: exported for onnxruntime, and its dynamic quantization.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tuneformer.model.classifier import CellClassifier, read_config, read_weights

ONNX = ("onnx", "onnx_int8")
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
    config, stored = read_config(folder), read_weights(folder)
    config._attn_implementation = "sdpa"
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


class _Logits(nn.Module):
    """A classifier that returns nothing but its logits."""

    def __init__(self, model: CellClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask).logits


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
