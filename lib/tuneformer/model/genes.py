"""Classes of genes from their places in cells: each token of a labelled gene is classified, in the context of its cell.

In: a study and its `GeneTask`. Out: one row per arm, seed and fold, and a score for every gene from the fold in which
it was tested.

Source of the method: Theodoris et al. 2023 (doi:10.1038/s41586-023-06139-9), Methods, "Geneformer fine-tuning" for
dosage-sensitive transcription factors. As there, the folds are made of genes, and the same cells are the context of
training and of test genes; the test genes are in them without a label. Each score is therefore given twice: in the
cells that were the context in training, and in other cells, which nothing was trained on.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from tuneformer import paths
from tuneformer.artifacts import UserError, key, made, read_json, write_json
from tuneformer.data import fetch, qc
from tuneformer.model import gene_baselines, hardware, losses, strategies
from tuneformer.model.classifier import Batch, Cells, build
from tuneformer.model.fit import optimizer_steps
from tuneformer.model.gene_baselines import best_threshold, cross_validate, pair_auc
from tuneformer.model.gene_task import PARTS, GeneTask, parts_of, permuted
from tuneformer.model.trainer import Training, TrainingFailed, train
from tuneformer.study import BASELINES, GENE_BASELINES, GenesKeys, Study, TrainingKeys

VERSION = "genes.1"
PERMUTED = "_permuted"  # ending of the name of the control whose classes are permuted
CURVE = np.linspace(0, 1, 101)  # false-positive rates at which the ROC curve of the tokens is kept


class Fold(NamedTuple):
    """What one fold left: its row of ``runs.csv``, its test genes, the epochs, and the ROC curve of their tokens."""

    row: dict[str, Any]
    predictions: pd.DataFrame
    history: pd.DataFrame
    curve: np.ndarray | None


@dataclass(frozen=True)
class GeneRuns:
    """All folds of all arms of a study.

    ``runs``: rows of ``runs.csv``, one per arm, seed and fold of genes, with ``auc`` and ``auc_other`` (one vote per
    gene, in context and other cells), ``token_auc`` (one vote per token, as published), ``accuracy`` and
    ``balanced_accuracy`` at the threshold. ``predictions``: rows of ``predictions.parquet``; a gene is a ``cell`` of
    it, with ``score`` and ``score_other``, the logit of the positive class. ``history``: one row per epoch. ``curves``:
    true-positive rates at `CURVE` by arm, one row per fold and seed. ``relearnt``: AUC of the baselines
    (columns), learnt anew from permuted classes, one row per permutation.
    """

    runs: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame
    curves: dict[str, np.ndarray]
    relearnt: pd.DataFrame


class GeneClassifier(BertPreTrainedModel):
    """BERT with dropout and a linear layer on each token, as ``BertForTokenClassification``, for chosen tokens only."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return logits (chosen tokens, classes); all arguments are (batch, length), `chosen` of them bool."""
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state  # (batch, length, hidden)
        return self.classifier(self.dropout(states[chosen])).float()


def methods(settings: Study) -> list[Study]:
    """Return the arms of a study that can tell genes apart; a study of cells gets the baselines of genes as well."""
    arms = [settings.with_arm(arm) for arm in settings.arms]
    arms = [arm for arm in arms if arm.strategy not in BASELINES]
    if settings.kind != "genes":
        arms += [settings.model_copy(update={"arm": name, "strategy": name}) for name in GENE_BASELINES]
    return arms


def run_study(settings: Study, task: GeneTask) -> GeneRuns:
    """Run all arms of a study over all seeds and folds; the first fine-tuned arm also learns permuted classes.

    Each seed has another permutation. A baseline depends on no seed, so it is fitted once, and once for each of
    ``gene_permutations`` permutations. What was finished before is loaded.
    """
    arms = methods(settings)
    tuned = [(arm, task) for arm in arms if not arm.is_baseline]
    tuned = [(arm.at(seed=seed), one) for arm, one in tuned for seed in settings.seeds]
    control = [(arm, permuted(settings, task, arm.seed)) for arm, _ in tuned[: len(settings.seeds)]]
    folds = [run_fold(arm, one, fold) for arm, one in tuned + control for fold in range(settings.gene_folds)]
    relearnt, curves = {}, {}
    for arm in (arm.at(seed=settings.seeds[0]) for arm in arms if arm.is_baseline):
        found, relearnt[arm.arm] = fit_baseline(arm, task)
        folds += found
    for fold in folds:
        if fold.curve is not None:
            curves.setdefault(fold.row["arm"], []).append(fold.curve)
    runs = pd.DataFrame([fold.row for fold in folds])
    predictions, history = (pd.concat([fold[place] for fold in folds], ignore_index=True) for place in (1, 2))
    curves = {arm: np.array(found) for arm, found in curves.items()}
    return GeneRuns(runs, predictions, history, curves, pd.DataFrame(relearnt))


def run_fold(settings: Study, task: GeneTask, fold: int) -> Fold:
    """Train on the genes outside a fold, and score all genes; the genes of the fold are its test.

    The recipe of `fit.fit_cells`, with cells in random order. The loss is the mean over the tokens of the training
    genes in a batch. After each epoch the validation genes are scored, which shows how training goes; the weights after
    the last one are kept (a fold has too few validation genes to choose by), with the threshold that is best for the
    validation genes. A fold that diverged or lacked memory has no predictions and another status than ``ok``.

    Raises
    ------
    UserError
        The sampling is for cells, or as `classifier.build`.
    """
    if settings.sampling != "all":
        msg = (
            f"sampling: {settings.sampling} repeats cells of rare classes, but here genes have classes; set it to all."
        )
        raise UserError(msg)
    arm = settings.arm + (PERMUTED if task.permutation is not None else "")
    settings = settings.model_copy(update={"arm": arm, "fold": fold})
    folder = paths.arm_dir(settings) / f"genes_seed{settings.seed}_fold{fold}"
    made(folder, fold_key(settings, task), lambda partial: _train(settings, task, partial))
    row, history = read_json(folder / "row.json"), pd.DataFrame()
    if len((folder / "history.csv").read_text()) > 1:
        history = pd.read_csv(folder / "history.csv").assign(**_place(settings))
    return Fold(row, pd.read_parquet(folder / "predictions.parquet"), history, np.load(folder / "curve.npy"))


def fold_key(settings: Study, task: GeneTask) -> str:
    """Return the key of everything that one fold, or one baseline, depends on."""
    parameters = settings.keys(TrainingKeys) | settings.keys(GenesKeys)
    del parameters["device"], parameters["threads"]
    return key(VERSION, parameters, settings.seed, settings.fold, task.key, fetch.checkpoint_key(settings.checkpoint))


def fit_baseline(settings: Study, task: GeneTask) -> tuple[list[Fold], np.ndarray]:
    """Score each gene by a logistic regression of the genes in the other folds, on one row of features per gene.

    Returns
    -------
    The folds, and the AUC with each of ``gene_permutations`` permutations of the classes, learnt anew each time.
    """

    def make(folder: Path) -> None:
        features = gene_baselines.FEATURES[settings.strategy](settings, task, qc.prepare_cells(settings))
        np.save(folder / "features.npy", features)
        null = []
        for number in range(settings.gene_permutations):
            other = permuted(settings, task, number).genes
            null.append(pair_auc(cross_validate(features, other)["score"], other["target"], other["fold"]))
        np.save(folder / "null.npy", null)
        print(f"{settings.task} genes {settings.arm}: {len(null)} permutations", file=sys.stderr, flush=True)

    folder = made(paths.arm_dir(settings) / "genes", fold_key(settings.at(fold=None), task), make)
    start = time.perf_counter()
    table = cross_validate(np.load(folder / "features.npy"), task.genes, with_threshold=True)
    cost = {"wall_seconds": (time.perf_counter() - start) / settings.gene_folds}
    table = task.genes.join(table).assign(score_other=np.nan)
    folds = []
    for fold, rows in table.groupby("fold"):
        own = settings.at(fold=fold)
        counts = {"n_train": len(table) - len(rows), "n_validation": 0, "n_test": len(rows), "best_epoch": None}
        row, predictions = _judged(own, task, rows, Training(cost=cost), counts | {"key": fold_key(own, task)})
        folds.append(Fold(row, predictions, pd.DataFrame(), None))
    return folds, np.load(folder / "null.npy")


def _train(settings: Study, task: GeneTask, folder: Path) -> None:
    """Train one fold, and write what it left into an empty folder."""
    parts, pad = parts_of(settings, task, settings.fold), task.tokens.vocabulary.specials["<pad>"]
    cells = {name: Cells(task.tokens.dataset, pad, rows=getattr(task, name)) for name in ("context", "other")}
    device = hardware.prepare(settings)
    bf16 = hardware.uses_bf16(device, settings.precision)
    transformers.set_seed(settings.seed)
    model = build(settings, task.tokens.vocabulary, task.classes, GeneClassifier)
    plan = strategies.prepare(settings, model)
    learnt = task.genes[parts == "train"]
    label_of = torch.full((model.config.vocab_size,), losses.IGNORED)
    label_of[learnt["token_id"].to_numpy()] = torch.from_numpy(learnt["target"].to_numpy())
    label_of = label_of.to(device)
    n_tokens = learnt.groupby("target")["context_cells"].sum().reindex([0, 1])
    criterion = losses.make_loss(settings, n_tokens.to_numpy())
    losses.start_at_base_rate(model.classifier.bias, settings, n_tokens.to_numpy())
    target, is_validation, is_test = task.genes["target"].to_numpy(), parts == "validation", parts == "test"

    def loss(model: GeneClassifier, batch: Batch) -> torch.Tensor:
        labels = label_of[batch["input_ids"]]  # (batch, length)
        chosen = labels != losses.IGNORED
        return criterion(model(batch["input_ids"], batch["attention_mask"], chosen), labels[chosen])

    def means(name: str) -> tuple[np.ndarray, pd.DataFrame]:
        logits = token_logits(model, cells[name], task, bf16)
        return logits.groupby("token_id")["logit"].mean().reindex(task.genes["token_id"]).to_numpy(), logits

    def validate() -> dict[str, float]:
        return {"validation_auc": float(roc_auc_score(target[is_validation], means("context")[0][is_validation]))}

    log, who = Training(), f"{settings.task} genes {settings.arm} seed {settings.seed} fold {settings.fold}"
    more = {f"n_{part}": int((parts == part).sum()) for part in PARTS} | {"key": fold_key(settings, task)}
    rows, curve = task.genes[:0], np.full(len(CURVE), np.nan)
    order = torch.utils.data.RandomSampler(cells["context"], generator=torch.Generator().manual_seed(settings.seed))
    steps = optimizer_steps(settings, len(cells["context"]))
    epochs = range(steps // settings.epochs, steps + 1, steps // settings.epochs)
    with log.keeping_failures(who):
        train(
            settings, model, cells["context"], log, plan=plan, loss=loss, validate=validate, steps=steps,
            validate_at=epochs, sampler=order, who=who,
        )  # fmt: skip
        (scores, of_context), (others, of_others) = means("context"), means("other")
        threshold = best_threshold(scores[is_validation], target[is_validation])
        rows = task.genes.assign(score=scores, score_other=others, threshold=threshold)[is_test]
        more["token_auc"], curve = _token_roc(rows, of_context)
        more["token_auc_other"], _ = _token_roc(rows, of_others)
    row, predictions = _judged(
        settings, task, rows, log, more | {"best_epoch": log.best_epoch, "chosen_by": log.chosen_by}
    )
    write_json(folder / "row.json", row)
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    log.history.to_csv(folder / "history.csv", index=False)
    np.save(folder / "curve.npy", curve)


@torch.inference_mode()
def token_logits(model: GeneClassifier, cells: Cells, task: GeneTask, bf16: bool) -> pd.DataFrame:
    """Return ``token_id`` and ``logit`` (positive - negative) of each token of a scored gene, one row per token."""
    scored = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    scored[task.genes["token_id"].to_numpy()] = True
    scored, tokens, logits = scored.to(model.device), [], []
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for _, batch in cells.sorted_batches(model.device):
            chosen = scored[batch["input_ids"]]
            both = model(**batch, chosen=chosen).double()  # (chosen tokens, 2)
            tokens.append(batch["input_ids"][chosen].cpu().numpy())
            logits.append((both[:, 1] - both[:, 0]).cpu().numpy())
    table = pd.DataFrame({"token_id": np.concatenate(tokens), "logit": np.concatenate(logits)})
    if not np.isfinite(table["logit"]).all():
        msg = "the model predicts values that are not finite; set a smaller learning_rate, or precision: fp32."
        raise TrainingFailed(msg)
    return table


def _token_roc(genes: pd.DataFrame, logits: pd.DataFrame) -> tuple[float | None, np.ndarray]:
    """Return area and curve over the tokens of genes, each token with a vote, as the published figures have it."""
    table = logits.merge(genes[["token_id", "target"]], on="token_id")
    if table["target"].nunique() < 2:
        return None, np.full(len(CURVE), np.nan)
    false, true, _ = roc_curve(table["target"], table["logit"])
    return float(roc_auc_score(table["target"], table["logit"])), np.interp(CURVE, false, true)


def _judged(
    settings: Study, task: GeneTask, rows: pd.DataFrame, log: Training, more: dict[str, Any]
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the row of ``runs.csv`` and the predictions of the test genes of one fold, given their scores."""
    row = {"study": settings.study, **_place(settings), **settings.arm_keys()}
    row |= {"status": log.status, "reason": log.reason, **more}
    if rows.empty:
        return row | log.cost, pd.DataFrame()
    called = (rows["score"] > rows["threshold"]).astype(int)
    for name in ("score", "score_other"):
        area = pair_auc(rows[name], rows["target"], rows["fold"])
        row[name.replace("score", "auc")] = None if np.isnan(area) else area
    row["accuracy"] = float((called == rows["target"]).mean())
    row["balanced_accuracy"] = float(balanced_accuracy_score(rows["target"], called))
    positive = expit(rows["score"])
    predictions = pd.DataFrame(
        {
            "cell": rows["gene"],
            "label": rows["class"],
            "predicted": np.array(task.classes)[called],
            "probability": np.where(called, positive, 1 - positive).round(3),
            "score": rows["score"],
            "score_other": rows["score_other"],
        }
    )
    return row | log.cost, predictions.assign(**_place(settings))


def _place(settings: Study) -> dict[str, Any]:
    return {"task": settings.task, "arm": settings.arm, "seed": settings.seed, "fold": settings.fold}
