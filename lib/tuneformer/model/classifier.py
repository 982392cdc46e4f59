"""A cell classifier on top of a Geneformer: built from a checkpoint, read and written, and asked for predictions.

In: a checkpoint (config.json, model.safetensors), the vocabulary and classes of a task, and tokens. Out: a
`CellClassifier` with a new head; `Cells`, the batches of a memory-mapped dataset; and the folder of a fitted model.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import tuneformer
from tuneformer.artifacts import UserError, atomic_path, read_json, write_json
from tuneformer.data import fetch
from tuneformer.model import attention as attention  # registers itself with transformers
from tuneformer.model import hardware, losses, strategies
from tuneformer.paths import shown
from tuneformer.tokens.encode import column
from tuneformer.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    import datasets

    from tuneformer.study import Study

GENES = "bert.embeddings.word_embeddings.weight"
POOLED = ("first", "mean")
BODY = ("bert.embeddings.", "bert.encoder.")
PREDICTION_TOKENS = 2**16  # of a batch, padding included; without gradients that takes little memory

Batch = dict[str, Any]
"""Tensors, and of packed cells also ``lengths``, numbers that stay on the CPU."""
Model = TypeVar("Model", bound=PreTrainedModel)


class CellClassifier(BertForSequenceClassification):
    """BERT with a pooler, dropout and a linear layer on top, as `transformers` has it; ``config.pooling`` may be mean.

    With ``first`` the pooler reads the first token, with ``mean`` the mean over the tokens that are not padding.
    """

    # The loss below is a mean over the batch. Unless told so, the Trainer of transformers 5.23 takes it for a sum and
    # multiplies loss and gradient by gradient_accumulation_steps.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        states: torch.Tensor | None = None,
        depth: int = 0,
        **packing: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (batch, classes) and, given `labels` (batch,), the mean cross-entropy (nats per cell).

        `input_ids` and `attention_mask` (1 for a token, 0 for padding) are (batch, length); or the cells are packed, as
        `Cells` gives them. `states` are what the first `depth` parts of the body (embeddings, layers) make of the
        cells, so that only the others run (`encode`).
        """
        if attention_mask is None:
            pooled = self.encode({"input_ids": input_ids, "states": states, **packing}, depth)
        else:
            output = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            pooled = mean_state(output, attention_mask) if self.config.pooling == "mean" else output[:, 0]
        pooled = self.bert.pooler(pooled.unsqueeze(1))  # the pooler reads position 0
        logits = self.classifier(self.dropout(pooled)).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def encode(self, batch: Batch, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Run a part of the body on packed cells: 0 the embeddings, n layer n - 1, and after the last the pooling.

        Returns states (1, tokens, hidden) after part `stop` - 1, or with None what the head reads, (cells, hidden).
        Where `start` is not 0, the ``states`` of the batch are taken to be those before it.
        """
        layers = self.bert.encoder.layer
        states, packing = batch.get("states"), {"lengths": batch["lengths"], "bounds": batch["bounds"]}
        if start == 0:
            places = batch["position_ids"]
            states = self.bert.embeddings(batch["input_ids"], torch.zeros_like(places), places)
        for layer in layers[max(start - 1, 0) : None if stop is None else stop - 1]:
            states = layer(states, None, **packing)
        if stop is not None or start > len(layers):
            return states
        return pooled(states, batch["bounds"], self.config.pooling)


def pooled(states: torch.Tensor, bounds: torch.Tensor, how: str) -> torch.Tensor:
    """Return the first state or the mean state of each packed cell, (cells, hidden)."""
    if how == "first":
        return states[0, bounds[:-1]]
    return torch.segment_reduce(states[0], "mean", lengths=bounds.diff(), axis=0, unsafe=True)


def mean_state(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of states (batch, length, hidden) over the tokens that are not padding, (batch, hidden)."""
    mask = attention_mask.unsqueeze(-1).to(states.dtype)  # (batch, length, 1)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def build(settings: "Study", vocabulary: Vocabulary, classes: list[str], kind: type[Model] = CellClassifier) -> Model:
    """Build the classifier of a run with a new head, and the body of its checkpoint if the strategy's plan says so.

    Embeddings of genes and special tokens are copied by name, so that a vocabulary fitted on other cells is served;
    genes that the checkpoint does not know keep new embeddings. Encoder layers, positions and the normalisation are
    copied whole. New weights depend on torch's random state alone, so a seed gives the same head to every strategy.
    `kind` may be another BERT whose names begin with ``bert.``.

    Raises
    ------
    UserError
        The checkpoint cannot be fetched or read, or its weights are not those of a ``BertForMaskedLM``.
    """
    folder = fetch.checkpoint_dir(settings.checkpoint)
    config = read_config(folder)
    rows = config.vocab_size
    config.update(
        {
            "vocab_size": max(rows, vocabulary.size),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "pad_token_id": vocabulary.specials["<pad>"],
            "attention_probs_dropout_prob": settings.attention_dropout,
            "pooling": settings.pooling,
            "loss": settings.loss,
            "tokens_per_cell": settings.max_length or config.max_position_embeddings,
            "trained_in_bf16": False,
        }
    )
    config._attn_implementation = settings.attention
    model = kind(config)
    if strategies.plan_of(settings, config.num_hidden_layers).pretrained:
        copy_weights(model, folder, vocabulary, rows)
    return model


def read_config(folder: Path) -> BertConfig:
    """Read the configuration of a checkpoint; UserError if there is none, or it is not that of a BERT."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{shown(path)} cannot be read; set checkpoint to demo or to the folder of a Geneformer model."
        raise UserError(msg) from error
    if values.get("model_type") != "bert":
        msg = (
            f"{shown(path)} describes a model of type {values.get('model_type')!r}, but Geneformer is a bert; set "
            "checkpoint to the folder of a Geneformer model."
        )
        raise UserError(msg)
    return BertConfig.from_dict(values)


def copy_weights(model: PreTrainedModel, folder: Path, vocabulary: Vocabulary, rows: int) -> None:
    """Copy embeddings and encoder from the checkpoint, whose config.json says `rows` embeddings, into `model`."""
    path, stored = folder / "model.safetensors", read_weights(folder)
    own = {name: weight for name, weight in model.named_parameters() if name.startswith(BODY)}
    missing = [name for name in own if name not in stored]
    if missing:
        msg = (
            f"{shown(path)} lacks {len(missing)} of the {len(own)} weights of the encoder, such as {missing[0]} (it "
            f"has {next(iter(stored), 'none')}); save the model as a BertForMaskedLM, whose names begin with bert."
        )
        raise UserError(msg)
    expected = {name: tuple(weight.shape) for name, weight in own.items()} | {GENES: (rows, model.config.hidden_size)}
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape:
            msg = (
                f"{shown(path)}: {name} has shape {tuple(stored[name].shape)}, but config.json beside it says {shape}; "
                "take both files from the same source."
            )
            raise UserError(msg)
    theirs = Vocabulary.read(folder)
    if theirs.size > rows:
        msg = (
            f"{shown(folder)}: the vocabulary has tokens up to {theirs.size - 1}, but the model only {rows} "
            "embeddings; take the vocabulary that belongs to the model."
        )
        raise UserError(msg)
    tables = [
        pd.concat([side.genes.set_index("ensembl_id")["token_id"], pd.Series(side.specials, dtype="int32")])
        for side in (theirs, vocabulary)
    ]
    source, target = torch.from_numpy(pd.concat(tables, axis=1, join="inner").to_numpy("int64").T.copy())
    with torch.no_grad():
        for name, weight in own.items():
            if name != GENES:
                weight.copy_(stored[name])
        own[GENES][target] = stored[GENES][source].to(own[GENES].dtype)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read ``model.safetensors``; UserError if it is missing or damaged."""
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{shown(path)} cannot be read ({error}); copy it again from its source, or make it again."
        raise UserError(msg) from error


class Cells(torch.utils.data.Dataset):
    """Cells of a memory-mapped dataset, read batch by batch; nothing but their lengths and labels is in memory.

    Parameters
    ----------
    dataset
        With the columns ``input_ids`` and ``length``.
    rows
        Rows of the dataset; a row may be given more than once. None takes all.
    labels
        Number of the class of each of `rows`; goes into the batches.
    packed
        Whether the cells of a batch lie one after the other, as ``attention: auto`` reads them, instead of padded.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        pad: int,
        *,
        rows: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        packed: bool = False,
    ) -> None:
        self.table = dataset.select_columns(["input_ids"]).with_format("arrow")
        self.rows = np.arange(len(dataset)) if rows is None else np.asarray(rows)
        self.lengths = column(dataset, "length").to_numpy()[self.rows]
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.pad, self.packed = pad, packed

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.rows)

    def __getitems__(self, places: list[int] | np.ndarray) -> Batch:
        """Return the cells at some places as a batch, padded on the right to the longest of them, or packed.

        input_ids int32 and attention_mask int64, (batch, length), and, if there are any, labels int64, (batch,).
        Packed: input_ids and position_ids int32, (1, tokens); bounds int32, (batch + 1,); lengths and places, lists.
        """
        tokens = self.table[self.rows[places]]["input_ids"].combine_chunks()
        if self.packed:
            return self._packed(places, tokens)
        mask = np.arange(self.lengths[places].max()) < self.lengths[places][:, None]
        ids = np.full(mask.shape, self.pad, dtype=np.int32)
        ids[mask] = tokens.flatten().to_numpy()  # row after row
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if self.labels is not None:
            batch["labels"] = self.labels[places]
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def only(self, places: np.ndarray) -> "Cells":
        """Return some of the cells."""
        part = copy.copy(self)
        part.rows, part.lengths = self.rows[places], self.lengths[places]
        part.labels = None if self.labels is None else self.labels[places]
        return part

    def _packed(self, places: list[int] | np.ndarray, tokens: Any) -> Batch:
        lengths = self.lengths[places]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], lengths).astype(np.int32)
        ids = tokens.flatten().to_numpy().astype(np.int32)
        batch = {"input_ids": ids[None], "position_ids": position[None], "bounds": bounds.astype(np.int32)}
        if self.labels is not None:
            batch["labels"] = self.labels[places]
        batch = {name: torch.from_numpy(values) for name, values in batch.items()}
        return batch | {"lengths": lengths.tolist(), "places": np.asarray(places).tolist()}

    def sorted_batches(self, device: torch.device, most: int = PREDICTION_TOKENS) -> Iterator[tuple[Any, Batch]]:
        """Give all cells once in batches of similar length: the places of each batch, and the batch on a device.

        A batch has at most so many tokens, padding included, and one cell at least.
        """
        order, stop = np.argsort(self.lengths, kind="stable"), 0
        while stop < len(order):
            start, ascending = stop, self.lengths[order[stop : stop + most]]
            fits = ascending * np.arange(1, len(ascending) + 1) <= most
            stop = start + max(1, len(fits) if fits.all() else int(fits.argmin()))
            yield order[start:stop], to_device(self.__getitems__(order[start:stop]), device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device; the copy to a GPU does not wait."""
    if device.type == "cuda":
        batch = {name: one.pin_memory() if torch.is_tensor(one) else one for name, one in batch.items()}
    return {name: one.to(device, non_blocking=True) if torch.is_tensor(one) else one for name, one in batch.items()}


@torch.inference_mode()
def predict(
    model: nn.Module,
    cells: Cells,
    *,
    bf16: bool,
    forward: Callable[[Batch], torch.Tensor] | None = None,
) -> np.ndarray:
    """Predict cells without dropout, in batches of similar length.

    Parameters
    ----------
    model
        On its device; it is left in evaluation mode.
    forward
        From a batch to (batch, columns); None gives the logits of a `CellClassifier`.

    Returns
    -------
    (cells, columns), float64, in the order of `cells`.
    """
    model.eval()
    device = next(model.parameters()).device
    parts, places = [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for chosen, batch in cells.sorted_batches(device):
            batch.pop("labels", None)
            values = forward(batch) if forward else model(**batch).logits
            parts.append(values.double().cpu().numpy())
            places.append(chosen)
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]


@dataclass(frozen=True)
class Fitted:
    """A fine-tuned model with all that predictions on new cells need; ``card`` says how it was made."""

    model: CellClassifier
    vocabulary: Vocabulary
    classes: list[str]
    card: dict[str, Any]

    def predict(self, dataset: "datasets.Dataset") -> np.ndarray:
        """Return the probability of each class, (cells, classes).

        `dataset` has the columns input_ids and length, made with the model's vocabulary and ``card["max_length"]``.
        bf16 is used if the model was trained in it and the hardware computes it natively.
        """
        device = hardware.device_of("auto")
        cells = Cells(dataset, self.vocabulary.specials["<pad>"], packed=True)
        bf16 = self.card["bf16"] and hardware.uses_bf16(device, "auto")
        logits = predict(self.model.to(device), cells, bf16=bf16)
        return losses.probabilities(torch.from_numpy(logits), self.card["loss"]).numpy()


def save(folder: Path, model: CellClassifier, vocabulary: Vocabulary, classes: list[str], card: dict[str, Any]) -> None:
    """Write a fitted model: config.json, model.safetensors, vocabulary.parquet and model.json, whole or not at all.

    transformers reads the folder as it is (``AutoModelForSequenceClassification.from_pretrained``); such a model pools
    the first token. Adapters of ``lora`` are merged into the model first, in place. model.json has what `card` says
    about the run, and ``classes``, ``max_length``, ``pooling``, ``loss``, ``bf16`` and ``versions``.
    """
    strategies.merge_adapters(model)
    config = model.config
    card = card | {"classes": classes, "max_length": config.tokens_per_cell, "pooling": config.pooling}
    card |= {"loss": config.loss, "bf16": config.trained_in_bf16}
    card["versions"] = {"tuneformer": tuneformer.__version__, "torch": torch.__version__}
    card["versions"]["transformers"] = transformers.__version__
    transformers.utils.logging.disable_progress_bar()  # one of a second, on stderr
    with atomic_path(folder) as partial:
        partial.mkdir()
        model.save_pretrained(partial)
        vocabulary.write(partial)
        write_json(partial / "model.json", card)


def load(folder: Path) -> Fitted:
    """Read what `save` wrote; UserError if a file is missing or damaged."""
    card = read_json(folder / "model.json")
    config = read_config(folder)
    config._attn_implementation = "auto"
    model = CellClassifier(config)
    model.load_state_dict(read_weights(folder))
    return Fitted(model.eval(), Vocabulary.read(folder), card["classes"], card)
