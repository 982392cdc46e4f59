"""Classes of genes from their places in cells: each token of a labelled gene is classified, in the context of its cell.

In: a study, with a list of genes of two classes. Out: a `GeneTask` (which genes, in which fold, in which cells) and,
for one strategy, seed and fold, a `FoldOutcome` with a score for every gene; kept in ``runs/<study>/<task>/genes`` and
loaded from there when nothing has changed.

Source of the method: Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9), Methods, "Geneformer fine-tuning" for
dosage-sensitive transcription factors. As there, the folds are made of genes, and the same cells are the context of
training and of test genes; the test genes stand in them without a label. Each score is therefore given twice: in the
cells that were the context in training, and in other cells, which nothing was trained on.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from tuneformer.data import checkpoint_files, gene_lists
from tuneformer.data.gene_lists import GeneListError
from tuneformer.finetune import hardware, losses, strategies, training
from tuneformer.finetune.checkpoints import copy_weights, read_config
from tuneformer.study import paths
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.run import fingerprint, training_fingerprint
from tuneformer.tokens.tokenizer import Tokens
from tuneformer.trainsets.assemble import prepare_tokens

FEWEST_CELLS = 5  # context cells in which a scored gene stands at least
CELLS = ("context", "other")  # whether a score comes from the cells of the training or from others
PARTS = ("train", "validation", "test")
CURVE_POINTS = 101  # false-positive rates at which the ROC curve of the tokens is kept


@dataclass(frozen=True)
class GeneTask:
    """Genes to be told apart, and the cells in which they are read.

    ``genes``: one row a gene that is scored: gene, class, target (1: of the positive class), token_id, context_cells
    and other_cells (in how many it stands), fold. ``classes``: negative and positive. ``counts``: how many genes of
    each class were listed, are in the vocabulary, and are scored. ``unknown``: listed genes outside the vocabulary;
    ``rare``: those in fewer than `FEWEST_CELLS` context cells. ``context`` and ``other``: rows of the cells in
    ``tokens``.
    """

    genes: pd.DataFrame
    classes: list[str]
    counts: pd.DataFrame
    unknown: list[str]
    rare: list[str]
    context: np.ndarray
    other: np.ndarray
    tokens: Tokens
    permutation: int | None = None

    @property
    def hash(self) -> str:
        """16 hex digits that change with any gene, class, fold or cell."""
        table = self.genes[["gene", "class", "token_id", "fold"]].to_csv(index=False)
        return fingerprint(table, self.classes, self.context.tolist(), self.other.tolist())


@dataclass(frozen=True)
class FoldOutcome:
    """What one fold left.

    ``scores``: one row a gene: gene, part (train, validation, test), context and other, the mean over the tokens of the
    gene of logit(positive) - logit(negative) in either set of cells, NaN without a token. ``history``: one row an
    epoch: epoch, train_loss (nats per token), validation_auc (of the validation genes), seconds. ``best_epoch``: that
    with the highest validation_auc, whose weights made the scores. ``tokens``: for either set of cells auc of the
    tokens of test genes, each token one vote, n (tokens) and curve, the true-positive rates at `CURVE_POINTS` evenly
    spaced false-positive rates. ``cost``: wall_seconds, optimizer_steps, trainable_parameters.
    """

    fingerprint: str
    scores: pd.DataFrame
    history: pd.DataFrame
    best_epoch: int
    tokens: dict[str, dict[str, Any]]
    cost: dict[str, float]


class GeneClassifier(BertPreTrainedModel):
    """BERT with dropout and a linear layer on each token, as ``BertForTokenClassification``.

    The layer is computed for chosen tokens only.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return logits (chosen tokens, classes).

        Parameters
        ----------
        input_ids, attention_mask
            Tokens and whether each is one (1) or padding (0), (batch, length).
        chosen
            Which tokens are classified, (batch, length), bool.
        """
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state  # (batch, length, hidden)
        return self.classifier(self.dropout(states[chosen])).float()


def prepare_genes(settings: Study) -> GeneTask:
    """Find the listed genes in the vocabulary and in the cells, and divide them into folds.

    ``gene_cells`` cells of the training part are the context; as many cells at most of the test part are the others.
    Both are drawn by ``split_seed``, as the folds are, so they are the same for all strategies and seeds. Folds are
    stratified by class.

    Raises
    ------
    GeneListError
        As `gene_lists.read_gene_classes`; two listed names are the same gene of the vocabulary; there are fewer
        training cells than ``gene_cells``; or a class has fewer genes left than there are folds, or than can be learnt
        and validated outside each.
    ValueError
        As `tuneformer.trainsets.assemble.prepare_tokens`.
    """
    listed = gene_lists.read_gene_classes(settings)
    tokens = prepare_tokens(settings)
    vocabulary = tokens.vocabulary
    names = vocabulary.resolve(listed.classes.index)
    gene_lists.check_classes(pd.Series(listed.classes.to_numpy(), index=names), "The list in the vocabulary's names")
    token_of = vocabulary.genes.set_index("ensembl_id")["token_id"]
    table = pd.DataFrame({"gene": names, "class": listed.classes.to_numpy(), "listed": listed.classes.index})
    table["target"] = (table["class"] == listed.positive).astype(int)
    table["token_id"] = table["gene"].map(token_of)
    in_vocabulary = table["token_id"].notna()
    context, other = _draw_cells(settings, tokens)
    for column, rows in {"context_cells": context, "other_cells": other}.items():
        found = np.bincount(_flat(tokens, rows), minlength=vocabulary.size)
        table[column] = table["token_id"].map(pd.Series(found)).fillna(0).astype(int)
    scored = in_vocabulary & (table["context_cells"] >= FEWEST_CELLS)
    classes = [listed.negative, listed.positive]
    counts = {"listed": table["class"] == table["class"], "in the vocabulary": in_vocabulary, "scored": scored}
    genes = table[scored].drop(columns="listed").reset_index(drop=True).astype({"token_id": int})
    _refuse_few(settings, genes, classes, table, in_vocabulary)
    return GeneTask(
        genes=_with_folds(settings, genes),
        classes=classes,
        counts=pd.DataFrame(
            {name: table.loc[kept, "class"].value_counts().reindex(classes) for name, kept in counts.items()}
        ).fillna(0).astype(int),
        unknown=table.loc[~in_vocabulary, "listed"].tolist(),
        rare=table.loc[in_vocabulary & ~scored, "listed"].tolist(),
        context=context,
        other=other,
        tokens=tokens,
    )  # fmt: skip


def permuted(settings: Study, task: GeneTask, number: int) -> GeneTask:
    """Return the task with the classes permuted over the genes, and folds stratified by these: a control.

    Whatever a method still finds then is not in the classes. `number` is that of the permutation.
    """
    order = np.random.default_rng([settings.split_seed, 8, number]).permutation(len(task.genes))
    classes = task.genes[["class", "target"]].iloc[order].reset_index(drop=True)
    genes = _with_folds(settings, task.genes.assign(**{name: classes[name] for name in classes}))
    return replace(task, genes=genes, permutation=number)


def parts_of(settings: Study, task: GeneTask, fold: int) -> np.ndarray:
    """Return train, validation or test for each gene: the fold is tested, a part of the others chooses the epoch.

    Of the genes outside the fold the share ``validation_share``, and two of each class at least, is for validation.
    """
    genes = task.genes
    parts = np.where(genes["fold"] == fold, "test", "train").astype(object)
    outside = np.flatnonzero(genes["fold"] != fold)
    targets = genes["target"].to_numpy()[outside]
    rarest = np.bincount(targets).min()
    n_validation = round(max(settings.validation_share, 2 / rarest) * len(outside))
    _, chosen = train_test_split(outside, test_size=n_validation, stratify=targets, random_state=settings.split_seed)
    parts[chosen] = "validation"
    return parts


def fold_table(settings: Study, task: GeneTask) -> pd.DataFrame:
    """Count the genes of each class by part, for each fold."""
    rows = [
        task.genes.assign(part=parts_of(settings, task, fold), fold=fold)[["fold", "class", "part"]]
        for fold in range(settings.gene_folds)
    ]
    table = pd.concat(rows).value_counts().unstack(["part", "class"], fill_value=0).sort_index()
    return table.reindex(columns=pd.MultiIndex.from_product([PARTS, task.classes]), fill_value=0)


def run_fold(settings: Study, task: GeneTask, fold: int) -> FoldOutcome:
    """Train on the genes outside a fold, and score all genes; the genes of the fold are its test.

    The recipe of `tuneformer.finetune.training.finetune`, with cells in random order. The loss is the mean over the
    tokens of the training genes in a batch. After each epoch the validation genes are scored, and the weights with the
    best area under their ROC curve (one mean logit a gene; of several the first) are kept.

    Parameters
    ----------
    settings
        The run, with its strategy and seed.
    task
        From `prepare_genes`, or `permuted`.
    fold
        Number of the fold, from 0.

    Raises
    ------
    ParameterError
        The strategy is a baseline, or the sampling is for cells.
    TrainingFailed
        A loss or a score is not finite.
    CheckpointError
        As `tuneformer.finetune.checkpoints.load_classifier`.
    """
    if settings.sampling != "all":
        msg = (
            f"sampling: {settings.sampling} repeats cells of rare classes, but here genes have classes; set it to all."
        )
        raise ParameterError(msg)
    current = fold_fingerprint(settings, task, fold)
    finished = _read_fold(settings, task, fold, current)
    if finished is not None:
        return finished
    outcome = _train(settings, task, fold, current)
    _write_fold(settings, task, fold, outcome)
    print(
        f"{describe(settings, task)} fold {fold + 1}/{settings.gene_folds}: AUC of tokens "
        f"{outcome.tokens['context']['auc']:.3f}, best epoch {outcome.best_epoch}, "
        f"{outcome.cost['wall_seconds']:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return outcome


def fold_fingerprint(settings: Study, task: GeneTask, fold: int) -> str:
    """Hash everything that one fold depends on."""
    whole = training_fingerprint(settings, task.tokens.provenance["fingerprint"])
    return fingerprint("genes", whole, task.hash, fold)


def describe(settings: Study, task: GeneTask) -> str:
    """Return the name of a run as progress lines show it."""
    control = "" if task.permutation is None else " (classes permuted)"
    return f"{settings.task} genes {settings.strategy}{control} seed {settings.seed}"


def load_gene_classifier(settings: Study, tokens: Tokens, classes: list[str]) -> GeneClassifier:
    """Build the classifier of a run with embeddings and encoder of its checkpoint; with ``random_init`` all are new.

    Raises
    ------
    CheckpointError
        As `tuneformer.finetune.checkpoints.load_classifier`.
    """
    folder = checkpoint_files.ensure(settings.checkpoint)
    config = read_config(folder)
    rows = config.vocab_size
    config.update(
        {
            "vocab_size": max(rows, tokens.vocabulary.size),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "pad_token_id": tokens.vocabulary.specials["<pad>"],
            "attention_probs_dropout_prob": settings.attention_dropout,
        }
    )
    config._attn_implementation = settings.attention
    model = GeneClassifier(config)
    if settings.base_strategy != "random_init":
        copy_weights(model, folder, tokens.vocabulary, rows)
    return model


def prepare_plan(settings: Study, model: GeneClassifier) -> strategies.Plan:
    """Make a classifier ready for the strategy of a run (`strategies.prepare`); its head has no pooler."""
    plan = strategies.prepare(settings, model)
    kept = [group for group in plan.starts if group != "pooler"]
    return strategies.Plan(
        starts={group: plan.starts[group] for group in kept}, factors={group: plan.factors[group] for group in kept}
    )


class Reader:
    """Cells as padded batches, on the device of the model."""

    def __init__(self, tokens: Tokens, rows: np.ndarray, device: torch.device) -> None:
        self.cells = [torch.from_numpy(cell["input_ids"]) for cell in training.read_cells(tokens, rows)]
        self.pad, self.device = tokens.vocabulary.specials["<pad>"], device

    def batch(self, rows: torch.Tensor | range) -> dict[str, torch.Tensor]:
        """Return input_ids and attention_mask, (batch, length), of some cells."""
        ids = nn.utils.rnn.pad_sequence([self.cells[row] for row in rows], batch_first=True, padding_value=self.pad)
        ids = ids.to(self.device)  # (batch, length)
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long()}

    def in_random_order(self, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Give batches without end, every cell once in each pass."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.cells), generator=generator).split(size):
                yield self.batch(rows)

    def in_order(self, size: int = training.PREDICTION_BATCH) -> Iterator[dict[str, torch.Tensor]]:
        """Give batches of all cells, once."""
        for start in range(0, len(self.cells), size):
            yield self.batch(range(start, min(start + size, len(self.cells))))


def _train(settings: Study, task: GeneTask, fold: int, current: str) -> FoldOutcome:
    start = time.perf_counter()
    hardware.prepare(settings)
    device = hardware.device_of(settings)
    uses_bf16 = hardware.trains_in_bf16(settings)
    transformers.set_seed(settings.seed)
    model = load_gene_classifier(settings, task.tokens, task.classes)
    plan = prepare_plan(settings, model)
    model.to(device)
    parts = parts_of(settings, task, fold)
    readers = {name: Reader(task.tokens, getattr(task, name), device) for name in CELLS}
    learnt = task.genes[parts == "train"]
    label_of = torch.full((model.config.vocab_size,), losses.IGNORED)
    label_of[learnt["token_id"].to_numpy()] = torch.from_numpy(learnt["target"].to_numpy())
    label_of = label_of.to(device)
    seen = learnt.groupby("target")["context_cells"].sum().reindex([0, 1]).to_numpy()  # tokens of each class
    loss_of = losses.make_loss(settings, seen)

    total = training.optimizer_steps(settings, task.tokens, len(task.context))
    optimizer = torch.optim.AdamW(strategies.optimizer_groups(settings, model, plan), fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=training.warmup_steps(settings, total), num_training_steps=total
    )
    batches = readers["context"].in_random_order(settings.batch_size, settings.seed)
    history, best, best_weights = [], -1.0, {}
    epoch_steps = total // settings.epochs
    step = 0
    for epoch in range(1, settings.epochs + 1):
        epoch_start, epoch_loss = time.perf_counter(), 0.0
        model.train()
        for _ in range(epoch_steps):
            strategies.set_learning(model, plan.learning(step, total))
            batch = next(batches)
            labels = label_of[batch["input_ids"]]
            chosen = labels != losses.IGNORED
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
                loss = loss_of(model(**batch, chosen=chosen), labels[chosen])
            if not torch.isfinite(loss):
                msg = (
                    f"{describe(settings, task)} fold {fold}: the loss became {loss.item()} in step {step + 1} of "
                    f"{total}; set a smaller learning_rate, or precision: fp32."
                )
                raise training.TrainingFailed(msg)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            epoch_loss += loss.item() / epoch_steps
            step += 1
        token_ids, logits = _token_logits(settings, model, readers["context"], task)
        means = _mean_by_gene(task, token_ids, logits)
        is_validation = parts == "validation"
        auc = float(roc_auc_score(task.genes["target"][is_validation], means[is_validation]))
        seconds = time.perf_counter() - epoch_start
        history.append({"epoch": epoch, "train_loss": epoch_loss, "validation_auc": auc, "seconds": seconds})
        if auc > best:
            best, best_epoch = auc, epoch
            weights = strategies.learning_parameters(model, plan)
            best_weights = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in strategies.learning_parameters(model, plan).items():
            weight.copy_(best_weights[name])

    scores, of_tokens = task.genes[["gene"]].assign(part=parts), {}
    for name in CELLS:
        token_ids, logits = _token_logits(settings, model, readers[name], task)
        scores[name] = _mean_by_gene(task, token_ids, logits)
        of_tokens[name] = _judge_tokens(task, parts == "test", token_ids, logits)
    cost = {
        "wall_seconds": time.perf_counter() - start,
        "optimizer_steps": total,
        "trainable_parameters": sum(w.numel() for w in strategies.learning_parameters(model, plan).values()),
    }
    return FoldOutcome(current, scores, pd.DataFrame(history), best_epoch, of_tokens, cost)


def _token_logits(
    settings: Study, model: GeneClassifier, reader: Reader, task: GeneTask
) -> tuple[np.ndarray, np.ndarray]:
    """Return token and logit(positive) - logit(negative) of each token of a scored gene, (tokens,) each."""
    scored = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    scored[task.genes["token_id"].to_numpy()] = True
    scored = scored.to(reader.device)
    uses_bf16 = hardware.trains_in_bf16(settings)
    tokens, logits = [], []
    model.eval()
    with torch.inference_mode(), torch.autocast(reader.device.type, torch.bfloat16, enabled=uses_bf16):
        for batch in reader.in_order():
            chosen = scored[batch["input_ids"]]
            both = model(**batch, chosen=chosen).double()  # (chosen tokens, 2)
            tokens.append(batch["input_ids"][chosen].cpu().numpy())
            logits.append((both[:, 1] - both[:, 0]).cpu().numpy())
    flat = np.concatenate(logits)
    if not np.isfinite(flat).all():
        msg = f"{describe(settings, task)}: the model predicts values that are not finite; set a smaller learning_rate."
        raise training.TrainingFailed(msg)
    return np.concatenate(tokens), flat


def _mean_by_gene(task: GeneTask, token_ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean value over the tokens of each gene, (genes,); NaN without a token."""
    means = pd.Series(values).groupby(token_ids).mean()
    return means.reindex(task.genes["token_id"]).to_numpy()


def _judge_tokens(task: GeneTask, is_test: np.ndarray, token_ids: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Judge the tokens of the test genes, each by itself, as the published figures do."""
    target_of = task.genes[is_test].set_index("token_id")["target"]
    kept = np.isin(token_ids, target_of.index)
    targets, scores = target_of.loc[token_ids[kept]].to_numpy(), logits[kept]
    if len(np.unique(targets)) < 2:
        return {"auc": np.nan, "n": len(targets), "curve": []}
    false, true, _ = roc_curve(targets, scores)
    curve = np.interp(np.linspace(0, 1, CURVE_POINTS), false, true)
    return {"auc": float(roc_auc_score(targets, scores)), "n": len(targets), "curve": curve.round(6).tolist()}


def _draw_cells(settings: Study, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Draw the context cells from the training part, and the others from the test part; rows, ascending."""
    split = np.asarray(tokens.dataset["split"][:])
    rng = np.random.default_rng([settings.split_seed, 9])
    available = {part: np.flatnonzero(split == part) for part in ("train", "test")}
    if len(available["train"]) < settings.gene_cells:
        msg = (
            f"gene_cells: {settings.gene_cells} cells were asked for as context, but the training part has "
            f"{len(available['train'])}; set fewer."
        )
        raise GeneListError(msg)
    drawn = {part: rows[rng.permutation(len(rows))[: settings.gene_cells]] for part, rows in available.items()}
    return np.sort(drawn["train"]), np.sort(drawn["test"])


def _flat(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """Return the tokens of some cells one after the other; a gene stands in a cell at most once."""
    return np.concatenate([[], *(cell["input_ids"] for cell in training.read_cells(tokens, rows))]).astype(np.int64)


def _with_folds(settings: Study, genes: pd.DataFrame) -> pd.DataFrame:
    """Give each gene its fold, stratified by class."""
    folds = np.empty(len(genes), dtype=int)
    split = StratifiedKFold(settings.gene_folds, shuffle=True, random_state=settings.split_seed)
    for number, (_, tested) in enumerate(split.split(genes, genes["target"])):
        folds[tested] = number
    return genes.assign(fold=folds)


def _refuse_few(
    settings: Study, genes: pd.DataFrame, classes: list[str], table: pd.DataFrame, in_vocabulary: pd.Series
) -> None:
    """Raise if a class has too few genes for the folds."""
    if not in_vocabulary.any():
        msg = (
            f"None of the {len(table)} listed genes is in the vocabulary; they are named like "
            f"{table['listed'].iloc[0]}: list Ensembl ids, or take the checkpoint that belongs to these names."
        )
        raise GeneListError(msg)
    sizes = genes["class"].value_counts().reindex(classes, fill_value=0)
    fewest = _fewest(settings.gene_folds)
    if sizes.min() < fewest:
        n_unknown = int((~in_vocabulary).sum())
        msg = (
            f"Class {sizes.idxmin()!r} has {sizes.min()} genes left, and {settings.gene_folds} folds need {fewest}: of "
            f"{len(table)} listed genes {n_unknown} are not in the vocabulary and "
            f"{int(in_vocabulary.sum()) - len(genes)} stand in fewer than {FEWEST_CELLS} of the {settings.gene_cells} "
            "context cells; list more genes, or set a smaller gene_folds or a larger gene_cells."
        )
        raise GeneListError(msg)


def _fewest(folds: int) -> int:
    """Return how many genes a class needs, so that outside each fold two can be learnt and two choose the epoch."""
    number = max(folds, 5)
    while number - -(-number // folds) < 4:
        number += 1
    return number


def _folder(settings: Study, task: GeneTask, fold: int) -> Any:
    name = settings.strategy if task.permutation is None else f"{settings.strategy}_permuted{task.permutation}"
    return paths.task_dir(settings) / "genes" / name / f"seed{settings.seed}" / f"fold{fold}"


def _read_fold(settings: Study, task: GeneTask, fold: int, current: str) -> FoldOutcome | None:
    folder = _folder(settings, task, fold)
    content, scores = folder / "outcome.json", folder / "scores.parquet"
    if not content.is_file() or not scores.is_file():
        return None
    stored = json.loads(content.read_text(encoding="utf-8"))
    if stored["fingerprint"] != current:
        return None
    stored["history"] = pd.DataFrame(stored["history"])
    return FoldOutcome(**stored, scores=pd.read_parquet(scores))


def _write_fold(settings: Study, task: GeneTask, fold: int, outcome: FoldOutcome) -> None:
    folder = _folder(settings, task, fold)
    (folder / "outcome.json").unlink(missing_ok=True)
    with paths.atomic_path(folder / "scores.parquet") as partial:
        outcome.scores.to_parquet(partial, index=False)
    content = {key: value for key, value in vars(outcome).items() if key != "scores"}
    content["history"] = outcome.history.to_dict(orient="list")
    paths.write_text(folder / "outcome.json", json.dumps(content, indent=1) + "\n")
