"""Pre-training of the demo checkpoint: a small Geneformer learns masked tokens of simulated, unperturbed cells.

In: the pre-training keys of a study. Out: a checkpoint folder (config.json, model.safetensors, vocabulary.parquet) with
``pretraining.json`` beside the weights: the command, parameters, references and loss curve that made it.
"""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import tuneformer
from tuneformer.data.simulate import simulate_corpus
from tuneformer.finetune import hardware
from tuneformer.study import paths
from tuneformer.study.params import PretrainingParams, Study
from tuneformer.study.run import fingerprint
from tuneformer.tokens.tokenizer import rank_value_encode
from tuneformer.tokens.vocabulary import Vocabulary

HELD_OUT = 1000  # cells of the corpus that are never trained on; at most a tenth of it
KEPT, RANDOM = 0.1, 0.1  # shares of the chosen tokens that stay as they are, or become any gene (Devlin et al. 2019)
EVALUATIONS = 30  # points of the loss curve ...
FIRST_STEPS = 10  # ... after the first steps, each of which is a point, so that a test can re-create them


@dataclass(frozen=True)
class Corpus:
    """Tokens of the simulated corpus.

    ``train`` and ``held_out`` are (cells, tokens) int64, padded with the pad token; `vocabulary` was fitted on the
    cells of ``train``.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Pretraining:
    """A pre-trained model, its loss curve (step, train_loss, held_out_loss; nats per token) and its references."""

    model: BertForMaskedLM
    vocabulary: Vocabulary
    curve: pd.DataFrame
    references: dict[str, float]


class MaskedTokenCollator:
    """Make a batch of cells with some tokens hidden.

    Of every token that is not padding, a share `mask_share` is to be predicted: 80 % of these become the mask token,
    10 % a random gene, 10 % stay (Devlin et al. 2019, doi:10.18653/v1/N19-1423; Geneformer masks 15 %). Other positions
    get the label -100, which the loss leaves out.
    """

    def __init__(self, vocabulary: Vocabulary, mask_share: float) -> None:
        self.pad, self.mask = vocabulary.specials["<pad>"], vocabulary.specials["<mask>"]
        self.genes = torch.as_tensor(np.sort(vocabulary.genes["token_id"].to_numpy()))
        self.mask_share = mask_share

    def __call__(self, cells: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, each (batch, length)."""
        tokens = torch.stack([cell["input_ids"] for cell in cells])
        real = tokens != self.pad
        chosen = (torch.rand(tokens.shape) < self.mask_share) & real
        fate = torch.rand(tokens.shape)
        random_genes = self.genes[torch.randint(len(self.genes), tokens.shape)]
        hidden = torch.where(fate < 1 - KEPT - RANDOM, torch.full_like(tokens, self.mask), random_genes)
        hidden = torch.where(fate >= 1 - KEPT, tokens, hidden)
        return {
            "input_ids": torch.where(chosen, hidden, tokens),
            "attention_mask": real.long(),
            "labels": torch.where(chosen, tokens, torch.full_like(tokens, -100)),
        }


class _MaskedTokenTrainer(Trainer):
    """HF Trainer that computes the output over the vocabulary only where a token is predicted: same loss, less work."""

    def compute_loss(
        self, model: BertForMaskedLM, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        labels = inputs["labels"]
        hidden = model.bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        predicted = labels != -100
        logits = model.cls(hidden[predicted])  # (predicted tokens, vocabulary)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[predicted])
        return (loss, {"loss": loss}) if return_outputs else loss


class _LossCurve(TrainerCallback):
    """Add the held-out loss to the log, say how far the training is, and stop early when asked to."""

    def __init__(self, corpus: Corpus, settings: Study, stop_after: int | None) -> None:
        self.corpus, self.settings, self.stop_after = corpus, settings, stop_after

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        held_out = held_out_loss(kwargs["model"], self.corpus, self.settings)
        state.log_history[-1]["held_out_loss"] = held_out  # kept in the trainer's state, so that it survives a resume
        print(
            f"step {state.global_step}/{state.max_steps}: train loss {logs['loss']:.3f}, held-out loss {held_out:.3f}",
            file=sys.stderr,
            flush=True,
        )

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= FIRST_STEPS:
            control.should_log = True
        if self.stop_after is not None and state.global_step >= self.stop_after:
            control.should_training_stop = True


def make_corpus(settings: Study) -> Corpus:
    """Simulate the corpus, fit the vocabulary and the non-zero medians on its training cells, and encode it.

    Before they are ranked, the counts are multiplied by log-normal noise (``rank_noise``). Most genes of a cell have a
    count of one or two, and the order of genes with the same count follows from their medians alone: without the noise
    a model finds a hidden gene by the medians of its neighbours, and learns nothing about the cell.
    """
    cells = simulate_corpus(settings.pretrain_cells, n_types=settings.pretrain_types, seed=settings.pretrain_seed)
    n_held_out = min(HELD_OUT, cells.n_obs // 10)
    train, held_out = cells[:-n_held_out], cells[-n_held_out:]
    vocabulary = Vocabulary.fit(train, base=None)
    rng = np.random.default_rng([settings.pretrain_seed, 3])
    noisy = [_with_noise(part, settings.rank_noise, rng) for part in (train, held_out)]
    encoded = [_encode(part, vocabulary, settings.pretrain_length) for part in noisy]
    return Corpus(train=encoded[0], held_out=encoded[1], vocabulary=vocabulary)


def context_free_losses(corpus: Corpus) -> dict[str, float]:
    """Return the loss (nats per token) of predicting held-out tokens without looking at the rest of the cell.

    Returns
    -------
    ``uniform``: every gene alike; ``frequency``: how often a gene is a token in the training cells;
    ``frequency_by_rank``: how often it stands at that rank. A model below the smallest of them has learnt from context.
    """
    size = len(corpus.vocabulary.genes)
    pad = corpus.vocabulary.specials["<pad>"]
    row_of = np.zeros(corpus.vocabulary.size, dtype=np.int64)
    row_of[corpus.vocabulary.genes["token_id"].to_numpy()] = np.arange(size)
    length = corpus.train.shape[1]
    counts = np.full((length, size), 0.5)  # half a count each, so that an unseen gene is not impossible
    train = corpus.train.numpy()
    cell, rank = np.nonzero(train != pad)
    np.add.at(counts, (rank, row_of[train[cell, rank]]), 1)
    held_out = corpus.held_out.numpy()
    cell, rank = np.nonzero(held_out != pad)
    gene = row_of[held_out[cell, rank]]
    overall = counts.sum(axis=0) / counts.sum()
    by_rank = counts / counts.sum(axis=1, keepdims=True)
    return {
        "uniform": float(np.log(size)),
        "frequency": float(-np.log(overall[gene]).mean()),
        "frequency_by_rank": float(-np.log(by_rank[rank, gene]).mean()),
    }


@torch.no_grad()
def held_out_loss(model: BertForMaskedLM, corpus: Corpus, settings: Study) -> float:
    """Return the masked-token loss (nats per token) on the held-out cells, with the same masks at every call."""
    was_training, state = model.training, torch.get_rng_state()
    model.eval()
    torch.manual_seed(settings.pretrain_seed)
    collate = MaskedTokenCollator(corpus.vocabulary, settings.mask_share)
    total, n_tokens = 0.0, 0
    for start in range(0, len(corpus.held_out), 250):
        batch = collate([{"input_ids": cell} for cell in corpus.held_out[start : start + 250]])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        predicted = batch["labels"] != -100
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = model.cls(hidden[predicted]).float()
        total += torch.nn.functional.cross_entropy(logits, batch["labels"][predicted], reduction="sum").item()
        n_tokens += int(predicted.sum())
    torch.set_rng_state(state)
    model.train(was_training)
    return total / n_tokens


def pretrain(settings: Study, corpus: Corpus, *, folder: Path, stop_after: int | None = None) -> Pretraining:
    """Pre-train a small Geneformer by masked-token learning; resumes from `folder` when it was interrupted.

    Parameters
    ----------
    settings
        The keys of `PretrainingParams`, ``device`` and ``threads`` are read.
    corpus
        From `make_corpus`.
    folder
        Where the trainer keeps its state (about 3 MB), in a folder named by the fingerprint of the run, so that an
        interrupted run goes on from there.
    stop_after
        Stop after this many steps of the same schedule; used to check that the first steps are reproduced.

    Notes
    -----
    Geneformer's architecture (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9): BERT with ReLU, dropout 0.02,
    rank as position, 15 % masked tokens, AdamW with a linear schedule. Only the sizes differ.
    """
    folder = folder / fingerprint(settings.section(PretrainingParams), corpus.vocabulary.hash)
    hardware.prepare(settings)
    transformers.set_seed(settings.pretrain_seed)
    config = BertConfig(
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
    model = BertForMaskedLM(config)
    model.set_attn_implementation(settings.attention)
    for layer in model.bert.encoder.layer:  # trained with the study's attention dropout, saved with the published one
        layer.attention.self.dropout.p = settings.attention_dropout
    every = max(1, settings.pretrain_steps // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.pretrain_steps,
        per_device_train_batch_size=settings.pretrain_batch,
        learning_rate=settings.pretrain_learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=settings.pretrain_steps // 20,
        logging_steps=every,
        save_steps=10 * every,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=settings.device == "cpu",
        seed=settings.pretrain_seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = _MaskedTokenTrainer(
        model=model,
        args=arguments,
        data_collator=MaskedTokenCollator(corpus.vocabulary, settings.mask_share),
        train_dataset=[{"input_ids": cell} for cell in corpus.train],
        callbacks=[_LossCurve(corpus, settings, stop_after)],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]  # that file is written last
    trainer.train(resume_from_checkpoint=str(max(whole, key=_step)) if whole else None)
    rows = [
        {"step": row["step"], "train_loss": row["loss"], "held_out_loss": row["held_out_loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return Pretraining(model.cpu(), corpus.vocabulary, pd.DataFrame(rows), context_free_losses(corpus))


def output_folder(settings: Study) -> Path:
    """Return where the checkpoint of a study is written: ``pretrain_output``, or ``runs/<study>/pretrained``."""
    own = paths.RUNS / settings.study / "pretrained"
    return paths.ROOT / settings.pretrain_output if settings.pretrain_output else own


def save_checkpoint(result: Pretraining, settings: Study, *, folder: Path) -> None:
    """Write the checkpoint folder: weights as safetensors, vocabulary with medians, and how it was made."""
    made_by = {
        "simulated": True,
        "command": (
            f"papermill notebooks/00_pretrain.ipynb runs/00_pretrain.ipynb --cwd notebooks -p study {settings.study}"
        ),
        "parameters": settings.section(PretrainingParams),
        "references": result.references,
        "loss_curve": result.curve.to_dict(orient="list"),
        "versions": {
            "tuneformer": tuneformer.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    with paths.atomic_path(folder) as partial:
        partial.mkdir()
        result.model.save_pretrained(partial)
        result.vocabulary.write(partial)
        (partial / "pretraining.json").write_text(json.dumps(made_by, indent=1) + "\n", encoding="utf-8")


def read_history(folder: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the loss curve and the context-free references of a checkpoint made by `save_checkpoint`."""
    made_by = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))
    return pd.DataFrame(made_by["loss_curve"]), made_by["references"]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _with_noise(cells: ad.AnnData, noise: float, rng: np.random.Generator) -> ad.AnnData:
    """Return the cells with every count multiplied by exp(normal(0, `noise`))."""
    counts = cells.X.copy()
    counts.data = counts.data * rng.lognormal(0, noise, len(counts.data))
    return ad.AnnData(counts, obs=cells.obs, var=cells.var)


def _encode(cells: ad.AnnData, vocabulary: Vocabulary, length: int) -> torch.Tensor:
    """Return the tokens of `cells` as one padded matrix, (cells, length)."""
    tokens = torch.full((cells.n_obs, length), vocabulary.specials["<pad>"])
    for row, encoded in enumerate(rank_value_encode(cells, vocabulary, max_length=length)):
        tokens[row, : len(encoded)] = torch.as_tensor(np.asarray(encoded, dtype=np.int64))
    return tokens
