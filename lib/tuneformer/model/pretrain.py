"""Pre-training of the checkpoints that the package ships: a small Geneformer learns masked tokens.

In: the pre-training keys of a study, which name files of real cells or simulate some. Out: a checkpoint folder
(config.json, model.safetensors, vocabulary.parquet) with ``pretraining.json`` beside the weights: the command,
parameters, references and loss curve that made it.
"""

import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, TrainerCallback

import tuneformer
from tuneformer import paths
from tuneformer.artifacts import atomic_path, key, read_json, write_json
from tuneformer.data import fetch
from tuneformer.data.corpus import corpus_files, read_corpus
from tuneformer.data.refusals import expanded_path
from tuneformer.data.simulate import simulate_corpus
from tuneformer.data.unpickle import read_pickle
from tuneformer.model import hardware, strategies, trainer
from tuneformer.model.classifier import Batch, Cells
from tuneformer.study import PretrainingKeys, Study
from tuneformer.tokens.encode import encode
from tuneformer.tokens.vocabulary import Vocabulary

HELD_OUT = 1000  # cells, at most, of the tenth of the corpus that is never trained on, which measure the loss
MIN_CELLS = 20  # training cells that detect a gene of the vocabulary of a real corpus
KEPT, RANDOM = 0.1, 0.1  # shares of the chosen tokens that stay as they are, or become any gene (Devlin et al. 2019)
EVALUATIONS = 30  # points of the loss curve ...
FIRST_STEPS = 10  # ... after the first steps, each of which is a point, so that a test can re-create them
AT_ONCE = 128  # hidden tokens whose output is computed at once
IGNORED = -100  # label of a position that is not predicted


@dataclass(frozen=True)
class Corpus:
    """Tokens of the corpus; ``vocabulary`` was fitted on the cells of ``train``."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Pretraining:
    """A pre-trained model, its loss curve (step, train_loss, held_out_loss; nats per token) and its references.

    ``training_cells``: their number, by file where they are real.
    """

    model: BertForMaskedLM
    vocabulary: Vocabulary
    curve: pd.DataFrame
    references: dict[str, float]
    training_cells: dict[str, int]


def make_corpus(settings: Study) -> Corpus:
    """Read or simulate the corpus, fit the vocabulary and the non-zero medians on its training cells, and encode it.

    Before they are ranked, the counts are multiplied by log-normal noise (``rank_noise``). Most genes of a cell have a
    count of one or two, and the order of genes with the same count follows from their medians alone: without the noise
    a model finds a hidden gene by the medians of its neighbours, and learns nothing about the cell.
    """
    if settings.pretrain_files:
        cells = read_corpus(corpus_files(settings.pretrain_files))
        train, held_out = cells[~cells.obs["held_out"]], cells[cells.obs["held_out"]]
        held_out = held_out[:: -(-held_out.n_obs // HELD_OUT)]
        vocabulary = real_vocabulary(train, settings.pretrain_medians)
    else:
        cells = simulate_corpus(settings.pretrain_cells, n_types=settings.pretrain_types, seed=settings.pretrain_seed)
        n_held_out = min(HELD_OUT, cells.n_obs // 10)
        train, held_out = cells[:-n_held_out], cells[-n_held_out:]
        vocabulary = Vocabulary.fit(train)
    rng = np.random.default_rng([settings.pretrain_seed, 3])
    parts = [with_noise(part, settings.rank_noise, rng) for part in (train, held_out)]
    return Corpus(*(encode(part, vocabulary, max_length=settings.pretrain_length) for part in parts), vocabulary)


def real_vocabulary(train: ad.AnnData, dictionaries: str | None) -> Vocabulary:
    """Return the genes that at least `MIN_CELLS` training cells detect, with tokens of their own.

    The medians are those of Geneformer's `dictionaries` where these know the gene, else those of the cells. The symbols
    of the dictionaries and of the corpus become aliases, so that data with symbols only are served too.
    """
    detected = np.bincount(train.X.indices, minlength=train.n_vars) >= MIN_CELLS
    fitted = Vocabulary.fit(ad.AnnData(train.X[:, detected], obs=train.obs, var=train.var[detected]))
    symbols = dict(zip(train.var["symbol"], train.var["ensembl_id"], strict=True))
    genes = fitted.genes
    if dictionaries is not None:
        folder = expanded_path("pretrain_medians", dictionaries, "a folder with Geneformer's dictionaries")
        official = Vocabulary.read(folder).genes.set_index("ensembl_id")["median"]
        genes = genes.assign(median=genes["ensembl_id"].map(official).fillna(genes["median"]))
        for path in folder.glob(fetch.GENE_NAMES):
            symbols |= read_pickle(path)
    known = set(genes["ensembl_id"])
    aliases = {name: gene for name, gene in symbols.items() if gene in known and name not in known}
    return Vocabulary(genes=genes, specials=fitted.specials, aliases=aliases)


def with_noise(cells: ad.AnnData, noise: float, rng: np.random.Generator) -> ad.AnnData:
    """Return the cells with every count multiplied by exp(normal(0, `noise`))."""
    counts = cells.X.copy()
    counts.data = counts.data * rng.lognormal(0, noise, len(counts.data))
    return ad.AnnData(counts, obs=cells.obs, var=cells.var)


def hide(batch: Batch, vocabulary: Vocabulary, mask_share: float) -> Batch:
    """Hide some tokens of a batch of cells, and add ``labels``: the hidden tokens, `IGNORED` elsewhere.

    Of every token that is not padding, a share `mask_share` is to be predicted: 80 % of these become the mask token,
    10 % a random gene, 10 % stay (Devlin et al. 2019, doi:10.18653/v1/N19-1423; Geneformer masks 15 %).
    """
    tokens = batch["input_ids"].long()
    genes = torch.as_tensor(np.sort(vocabulary.genes["token_id"].to_numpy())).long()
    chosen = (torch.rand(tokens.shape) < mask_share) & (batch["attention_mask"] == 1)
    fate = torch.rand(tokens.shape)
    random_genes = genes[torch.randint(len(genes), tokens.shape)]
    hidden = torch.where(fate < 1 - KEPT - RANDOM, vocabulary.specials["<mask>"], random_genes)
    hidden = torch.where(fate >= 1 - KEPT, tokens, hidden)
    labels = torch.where(chosen, tokens, IGNORED)
    return batch | {"input_ids": torch.where(chosen, hidden, tokens), "labels": labels}


def masked_loss(model: BertForMaskedLM, batch: Batch, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of the hidden tokens (nats); the output is computed for them alone: less work.

    It is computed for `AT_ONCE` tokens at a time, and again on the way back, so that the logits stay in the cache of
    the processor: with 16,000 genes those of a whole batch take most of the time of a step.
    """
    states = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    predicted = batch["labels"] != IGNORED
    hidden, labels = states[predicted], batch["labels"][predicted]

    def loss_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model.cls(hidden).float()  # (tokens, vocabulary)
        return (logits.logsumexp(dim=1) - logits.gather(1, labels.unsqueeze(1)).squeeze(1)).sum()

    parts = zip(hidden.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    total = sum(checkpoint(loss_of, *part, use_reentrant=False) for part in parts)
    return total if reduction == "sum" else total / len(labels)


@torch.no_grad()
def held_out_loss(model: BertForMaskedLM, corpus: Corpus, settings: Study) -> float:
    """Return the masked-token loss (nats per token) on the held-out cells, with the same masks at every call."""
    state = torch.get_rng_state()
    model.eval()
    torch.manual_seed(settings.pretrain_seed)
    total, n_tokens = 0.0, 0
    cells = Cells(corpus.held_out, corpus.vocabulary.specials["<pad>"])
    for places in np.split(np.arange(len(cells)), range(250, len(cells), 250)):
        batch = hide(cells.__getitems__(places), corpus.vocabulary, settings.mask_share)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        total += masked_loss(model, batch, "sum").item()
        n_tokens += int((batch["labels"] != IGNORED).sum())
    torch.set_rng_state(state)
    return total / n_tokens


def context_free_losses(corpus: Corpus) -> dict[str, float]:
    """Return the loss (nats per token) of predicting held-out tokens without looking at the rest of the cell.

    Returns
    -------
    ``uniform``: every gene alike; ``frequency``: how often a gene is a token in the training cells;
    ``frequency_by_rank``: how often at that rank. A model below the smallest of them has learnt from context.
    """
    train, held_out = (_ranks(part, corpus.vocabulary) for part in (corpus.train, corpus.held_out))
    size = len(corpus.vocabulary.genes)
    counts = np.full(
        (max(train[0].max(), held_out[0].max()) + 1, size), 0.5
    )  # half a count, so that none is impossible
    np.add.at(counts, train, 1)
    overall, by_rank = counts.sum(axis=0) / counts.sum(), counts / counts.sum(axis=1, keepdims=True)
    return {
        "uniform": float(np.log(size)),
        "frequency": float(-np.log(overall[held_out[1]]).mean()),
        "frequency_by_rank": float(-np.log(by_rank[held_out]).mean()),
    }


def pretrain(settings: Study, corpus: Corpus, *, folder: Path, stop_after: int | None = None) -> Pretraining:
    """Pre-train a small Geneformer by masked-token learning; goes on where it was interrupted, with other masks.

    Geneformer's architecture (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9): BERT with ReLU, dropout 0.02,
    rank as position, 15 % masked tokens, AdamW with a linear schedule. Only the sizes differ.

    Parameters
    ----------
    folder
        Where the state of the training is kept on the way, in a folder named by the key of the run.
    stop_after
        Stop after this many steps of the same schedule; used to check that the first steps are reproduced.
    """
    steps = settings.pretrain_steps
    run = {"learning_rate": settings.pretrain_learning_rate, "batch_size": settings.pretrain_batch}
    run |= {"warmup_steps": steps // 20, "warmup_cap": None, "seed": settings.pretrain_seed, "strategy": "full"}
    settings = settings.model_copy(update=run | {"early_stop": None})
    transformers.utils.logging.disable_progress_bar()  # bars of a second, on stderr
    hardware.prepare(settings)
    transformers.set_seed(settings.seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=corpus.vocabulary.size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.feed_forward_size,
            max_position_embeddings=settings.pretrain_length,
            hidden_act="relu",
            hidden_dropout_prob=0.02,
            attention_probs_dropout_prob=0.02,
            pad_token_id=corpus.vocabulary.specials["<pad>"],
        )
    )
    model.set_attn_implementation(settings.attention)
    for layer in model.bert.encoder.layer:  # trained with the study's attention dropout, saved with the published one
        layer.attention.self.dropout.p = settings.attention_dropout
    every, log = max(1, steps // EVALUATIONS), trainer.Training()
    points = sorted({*range(1, min(FIRST_STEPS, steps) + 1), *range(every, steps + 1, every)})
    trainer.train(
        settings,
        model,
        Cells(corpus.train, corpus.vocabulary.specials["<pad>"]),
        log,
        plan=strategies.prepare(settings, model),
        loss=masked_loss,
        validate=lambda: {"held_out_loss": held_out_loss(model, corpus, settings)},
        steps=steps,
        validate_at=points,
        collate=lambda batch: hide(batch, corpus.vocabulary, settings.mask_share),
        folder=folder / key(settings.keys(PretrainingKeys), corpus.vocabulary.hash),
        who="pre-training",
        callbacks=[_StopAfter(stop_after)] if stop_after else [],
    )
    curve = log.history[["train_loss", "held_out_loss"]]
    curve.insert(0, "step", points[: len(curve)])
    files = [cell.partition(":")[0] if settings.pretrain_files else "simulated" for cell in corpus.train["cell"]]
    return Pretraining(model.cpu(), corpus.vocabulary, curve, context_free_losses(corpus), dict(Counter(files)))


def output_folder(settings: Study) -> Path:
    """Return where the checkpoint of a study is written: ``pretrain_output``, or ``runs/<study>/pretrained``."""
    own = paths.RUNS / settings.study / "pretrained"
    return paths.ROOT / settings.pretrain_output if settings.pretrain_output else own


def save_checkpoint(result: Pretraining, settings: Study, folder: Path) -> None:
    """Write the checkpoint folder: weights as safetensors, vocabulary with medians, and how it was made.

    What is there already of another kind, such as a data card, is kept. The weights of real cells are stored in half
    precision; config.json says float32, in which they are read.
    """
    command = f"papermill notebooks/00_pretrain.ipynb runs/00_pretrain.ipynb --cwd notebooks -p study {settings.study}"
    versions = {"tuneformer": tuneformer.__version__, "torch": torch.__version__, "python": platform.python_version()}
    made_by = {
        "simulated": not settings.pretrain_files,
        "command": command,
        "parameters": settings.keys(PretrainingKeys),
        "training_cells": result.training_cells,
        "references": result.references,
        "loss_curve": result.curve.to_dict(orient="list"),
        "versions": versions | {"transformers": transformers.__version__},
    }
    cards = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    with atomic_path(folder) as partial:
        partial.mkdir()
        for name, text in cards.items():
            (partial / name).write_text(text, encoding="utf-8")
        (result.model.half() if settings.pretrain_files else result.model).save_pretrained(partial)
        write_json(partial / "config.json", read_json(partial / "config.json") | {"dtype": "float32"})
        result.vocabulary.write(partial)
        write_json(partial / "pretraining.json", made_by)


def read_history(folder: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the loss curve and the context-free references of a checkpoint made by `save_checkpoint`."""
    made_by = read_json(folder / "pretraining.json")
    return pd.DataFrame(made_by["loss_curve"]), made_by["references"]


class _StopAfter(TrainerCallback):
    """Stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.steps


def _ranks(cells: datasets.Dataset, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return place in its cell and row in ``vocabulary.genes`` of every token."""
    lists = cells.with_format("arrow")[:]["input_ids"].combine_chunks()
    lengths = np.diff(lists.offsets)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    row_of = np.zeros(vocabulary.size, dtype=np.int64)
    row_of[vocabulary.genes["token_id"].to_numpy()] = np.arange(len(vocabulary.genes))
    return place, row_of[lists.flatten().to_numpy()]
