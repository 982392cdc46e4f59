"""A cell classifier that starts from a pre-trained Geneformer, or from nothing.

In: a checkpoint (config.json, model.safetensors), and the vocabulary and classes of a task. Out: a
`CellClassifier` with a new head, whose encoder and gene embeddings come from the checkpoint.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from tuneformer.data import checkpoint_files
from tuneformer.study import paths
from tuneformer.study.params import Study
from tuneformer.tokens.vocabulary import Vocabulary

GENES = "bert.embeddings.word_embeddings.weight"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says where and what to do."""


class CellClassifier(BertForSequenceClassification):
    """BERT with a pooler, dropout and a linear layer on top, as `transformers` has it; ``config.pooling`` may be mean.

    With ``first`` the pooler reads the first token, with ``mean`` the mean over the tokens that are not padding.
    """

    # The loss below is a mean over the batch. Unless told so, the Trainer of transformers 5.23 takes it for a sum and
    # multiplies loss and gradient by gradient_accumulation_steps.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (batch, classes) and, given `labels` (batch,), the mean cross-entropy (nats per cell).

        Parameters
        ----------
        input_ids, attention_mask
            Tokens and whether each is one (1) or padding (0), (batch, length).
        labels
            Number of the class of each cell.
        """
        output = self.bert(input_ids, attention_mask=attention_mask)
        pooled = output.pooler_output  # (batch, hidden)
        if self.config.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # (batch, length, 1)
            mean = (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            pooled = self.bert.pooler(mean.unsqueeze(1))  # the pooler reads position 0
        logits = self.classifier(self.dropout(pooled)).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load_classifier(settings: Study, vocabulary: Vocabulary, classes: list[str]) -> CellClassifier:
    """Build the classifier of a run with weights from its checkpoint; with ``random_init`` all weights are new.

    Embeddings of genes and special tokens are copied by name, so that a vocabulary fitted on other cells is served;
    genes that the checkpoint does not know keep new embeddings. Encoder layers, positions and the normalisation are
    copied whole. Pooler and classifier are always new. New weights depend on torch's random state alone, so a seed
    gives the same head to every strategy.

    Parameters
    ----------
    settings
        ``checkpoint``, ``strategy``, ``pooling``, ``attention`` and ``attention_dropout`` are read.
    vocabulary
        Of the tokens of the task.
    classes
        Names of the classes.

    Raises
    ------
    CheckpointError
        No BERT configuration, no weights, or weights with other names or shapes than those of a ``BertForMaskedLM``.
    DownloadError
        A published checkpoint (`tuneformer.data.checkpoint_files`) is not there and cannot be fetched.
    """
    folder = checkpoint_files.ensure(settings.checkpoint)
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
        }
    )
    config._attn_implementation = settings.attention
    model = CellClassifier(config)
    if settings.strategy != "random_init":
        copy_weights(model, folder, vocabulary, rows)
    return model


def transfer_table(settings: Study, vocabulary: Vocabulary) -> pd.DataFrame:
    """Say what a run takes over from its checkpoint.

    Returns
    -------
    Rows: gene embeddings, encoder layers, pooler and classifier; columns ``from the checkpoint`` and ``new``, numbers.
    """
    folder = paths.checkpoint_dir(settings.checkpoint)
    genes = vocabulary.genes["ensembl_id"]
    available = {
        "gene embeddings": (int(genes.isin(Vocabulary.read(folder).genes["ensembl_id"]).sum()), len(genes)),
        "encoder layers": (read_config(folder).num_hidden_layers,) * 2,
        "pooler and classifier": (0, 2),
    }
    taken = {part: 0 if settings.strategy == "random_init" else known for part, (known, _) in available.items()}
    rows = {part: [taken[part], total - taken[part]] for part, (_, total) in available.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["from the checkpoint", "new"])


def read_config(folder: Path) -> BertConfig:
    """Read the configuration of a checkpoint; `CheckpointError` if there is none, or it is not that of a BERT."""
    path = folder / "config.json"
    try:
        values, _ = BertConfig.get_config_dict(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read; set checkpoint to demo or to the folder of a Geneformer model."
        raise CheckpointError(msg) from error
    if values.get("model_type") != "bert":
        msg = (
            f"{path} describes a model of type {values.get('model_type')!r}, but Geneformer is a bert; set checkpoint "
            "to the folder of a Geneformer model."
        )
        raise CheckpointError(msg)
    return BertConfig.from_dict(values)


def copy_weights(model: CellClassifier, folder: Path, vocabulary: Vocabulary, rows: int) -> None:
    """Copy embeddings and encoder from the checkpoint, whose embedding has `rows` rows, into `model`."""
    path = folder / "model.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{path} cannot be read ({error}); copy it again from the checkpoint's source."
        raise CheckpointError(msg) from error
    body = ("bert.embeddings.", "bert.encoder.")
    own = {name: weight for name, weight in model.named_parameters() if name.startswith(body)}
    missing = [name for name in own if name not in stored]
    if missing:
        msg = (
            f"{path} lacks {len(missing)} of the {len(own)} weights of the encoder, such as {missing[0]} (it has "
            f"{next(iter(stored), 'none')}); save the model as a BertForMaskedLM, whose names begin with bert."
        )
        raise CheckpointError(msg)
    expected = {name: tuple(weight.shape) for name, weight in own.items()} | {GENES: (rows, model.config.hidden_size)}
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape:
            msg = (
                f"{path}: {name} has shape {tuple(stored[name].shape)}, but config.json beside it says {shape}; take "
                "both files from the same source."
            )
            raise CheckpointError(msg)
    theirs = Vocabulary.read(folder)
    if theirs.size > rows:
        msg = (
            f"{folder}: the vocabulary has tokens up to {theirs.size - 1}, but the model only {rows} embeddings; take "
            "the vocabulary that belongs to the model."
        )
        raise CheckpointError(msg)
    source, target = _shared_tokens(theirs, vocabulary)
    with torch.no_grad():
        for name, weight in own.items():
            if name != GENES:
                weight.copy_(stored[name])
        own[GENES][target] = stored[GENES][source].to(own[GENES].dtype)


def _shared_tokens(theirs: Vocabulary, ours: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of the genes and special tokens that both know, in either vocabulary, (shared,) each."""
    tables = [
        pd.concat([vocabulary.genes.set_index("ensembl_id")["token_id"], pd.Series(vocabulary.specials, dtype="int32")])
        for vocabulary in (theirs, ours)
    ]
    shared = pd.concat(tables, axis=1, join="inner")
    return torch.as_tensor(shared.iloc[:, 0].to_numpy("int64")), torch.as_tensor(shared.iloc[:, 1].to_numpy("int64"))
