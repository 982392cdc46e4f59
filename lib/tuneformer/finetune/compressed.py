"""A classifier with smaller weights: int8 layers, and reading back a model whose matrices were made smaller.

In: a `CellClassifier`. Out: ``config.json`` and ``model.safetensors``, from which the same model is built again without
ever holding the weights that it had before.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tuneformer.finetune.checkpoints import CellClassifier, CheckpointError, read_config

LARGEST = 127  # of int8, symmetric around 0


class Int8Linear(nn.Module):
    """Linear layer with int8 weights and one scale an output; the input stays float, or becomes int8 row by row.

    With ``activations`` the product is one of int8 matrices, with exact int32 sums. Else the weights are made float
    again at each use: the file and the memory are smaller, the arithmetic is the same and takes a step more.

    ``torch._int_mm`` is not public, but it is what torchao's int8 layers call too. The public route in torch itself,
    ``torch.ao.quantization.quantize_dynamic``, is deprecated and announced to be removed.

    Parameters
    ----------
    weight
        (outputs, inputs), int8.
    scale
        What an int8 step of an output's weights is worth, (outputs,).
    bias
        (outputs,).
    activations
        Whether the input is made int8, too.
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
    """Embedding with int8 rows and one scale a row, made float when looked up.

    Parameters
    ----------
    weight
        (rows, width), int8.
    scale
        What an int8 step of a row is worth, (rows,).
    """

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
    """Read what `write_model` wrote, ready to predict.

    The model is built without memory first. Which matrices are smaller, int8 or bf16 is seen from the stored ones.

    Raises
    ------
    CheckpointError
        A file is missing or damaged.
    """
    config = read_config(folder)
    config._attn_implementation = "sdpa"
    path = folder / "model.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read ({error}); delete its folder, and it is made again."
        raise CheckpointError(msg) from error
    with torch.device("meta"):
        model = CellClassifier(config)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                model.set_submodule(
                    name, _like_stored(name, module, stored, getattr(config, "int8_activations", False))
                )
    model.load_state_dict(stored, assign=True)
    places = torch.arange(config.max_position_embeddings).unsqueeze(0)
    model.bert.embeddings.position_ids, model.bert.embeddings.token_type_ids = places, torch.zeros_like(places)
    return model.eval()


def _like_stored(name: str, module: nn.Module, stored: dict[str, torch.Tensor], activations: bool) -> nn.Module:
    """Return a layer of the size and kind that was stored; its weights come later."""
    weight = stored[f"{name}.weight"].to("meta")
    is_linear = isinstance(module, nn.Linear)
    if weight.dtype == torch.int8:
        scale = weight.new_empty(len(weight), dtype=torch.float32)
        return Int8Linear(weight, scale, scale, activations=activations) if is_linear else Int8Embedding(weight, scale)
    return nn.Linear(weight.shape[1], weight.shape[0]) if is_linear else module
