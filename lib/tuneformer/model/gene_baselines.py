"""What a classifier of genes in cells has to beat: logistic regression on one row of features per gene.

In: a `GeneTask`. Out: features of its genes, made without their classes, and for each gene the score of a model that
was fitted on the genes of the other folds; and what scores of genes are judged by.

- ``expression``: how strongly, how often, how variably and at which rank a gene is expressed in the context cells.
- ``frozen_embedding``: the checkpoint's embedding of the gene, before it has seen any cell.
- ``frozen_context``: the mean of the checkpoint's last hidden states of the gene in the context cells.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.sparsefuncs import mean_variance_axis

from tuneformer.model.baselines import frozen_model
from tuneformer.model.classifier import Cells
from tuneformer.study import Study
from tuneformer.tokens.vocabulary import TARGET_SUM, counts_by_gene, gene_ids

if TYPE_CHECKING:
    import anndata as ad

    from tuneformer.model.gene_task import GeneTask

STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1, 1e0]  # C of scikit-learn, 1 / penalty: the strongest penalty first
INNER_FOLDS = 4
DRAWS = 9999  # permutations of the classes of test genes


def expression_features(settings: Study, task: "GeneTask", cells: "ad.AnnData") -> np.ndarray:
    """Describe how genes are expressed in the context cells of their task, by raw counts of these and other cells.

    Returns
    -------
    (genes, 6): mean and sd of ln(1 + counts per 10,000); share of the cells with a count; ln of variance / mean of the
    counts per 10,000; share of the cells with the gene among their tokens; its mean place there (0: first, 1: last).
    """
    context = task.tokens.dataset.select(task.context)
    part = cells[context["cell"][:]].to_memory()
    codes = pd.Index(task.genes["gene"]).get_indexer(task.tokens.vocabulary.resolve(gene_ids(part)))
    totals = np.asarray(part.X.sum(axis=1)).ravel()
    scaled = sparse.diags(TARGET_SUM / totals) @ counts_by_gene(part, codes, len(task.genes))
    mean, variance = mean_variance_axis(scaled, axis=0)
    log_mean, log_variance = mean_variance_axis(scaled.log1p(), axis=0)
    tokens = context.to_pandas()["input_ids"]
    place = pd.Series(np.concatenate([np.arange(len(ids)) / len(ids) for ids in tokens]))
    place = place.groupby(np.concatenate(tokens)).mean().loc[task.genes["token_id"]]
    detected, in_tokens = scaled.getnnz(axis=0) / part.n_obs, task.genes["context_cells"] / part.n_obs
    return np.column_stack([log_mean, np.sqrt(log_variance), detected, np.log(variance / mean), in_tokens, place])


def gene_embeddings(settings: Study, task: "GeneTask", cells: Any) -> np.ndarray:
    """Return the checkpoint's embedding of each gene, before it has seen any cell, (genes, hidden)."""
    model, _ = frozen_model(settings, task.tokens)
    return (
        model.bert.embeddings.word_embeddings.weight.detach()[task.genes["token_id"].to_numpy()].double().cpu().numpy()
    )


@torch.inference_mode()
def gene_states(settings: Study, task: "GeneTask", cells: Any) -> np.ndarray:
    """Return the mean of the checkpoint's last hidden states of each gene over the context cells, (genes, hidden)."""
    model, bf16 = frozen_model(settings, task.tokens)
    bert = model.bert
    gene_of = torch.full((bert.config.vocab_size,), -1)
    gene_of[task.genes["token_id"].to_numpy()] = torch.arange(len(task.genes))
    sums = torch.zeros(len(task.genes), bert.config.hidden_size, dtype=torch.float64, device=bert.device)
    pad = task.tokens.vocabulary.specials["<pad>"]
    with torch.autocast(bert.device.type, torch.bfloat16, enabled=bf16):
        for _, batch in Cells(task.tokens.dataset, pad, rows=task.context).sorted_batches(bert.device):
            genes = gene_of.to(bert.device)[batch["input_ids"]]  # (batch, length)
            states = bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            sums.index_add_(0, genes[genes >= 0], states[genes >= 0].double())
    return sums.cpu().numpy() / task.genes["context_cells"].to_numpy()[:, None]


FEATURES = {
    "expression": expression_features,
    "frozen_embedding": gene_embeddings,
    "frozen_context": gene_states,
}


def cross_validate(features: np.ndarray, genes: pd.DataFrame, *, with_threshold: bool = False) -> pd.DataFrame:
    """Score the genes of each fold by a penalised logistic regression of the others.

    An inner cross-validation over these others chooses the penalty with the best AUC (of several the strongest).

    Returns
    -------
    ``score``, the logit of the positive class, and `with_threshold` that above which a gene of this fold is called
    positive: the best one for the other genes, scored in the inner cross-validation. Both in the order of `genes`.
    """
    target, folds = genes["target"].to_numpy(), genes["fold"].to_numpy()
    found = pd.DataFrame(index=genes.index, columns=["score", "threshold"], dtype=float)
    options = {"scoring": "roc_auc", "solver": "newton-cholesky", "l1_ratios": (0,), "use_legacy_attributes": False}
    for fold in np.unique(folds):
        tested = folds == fold
        learnt = features[~tested], target[~tested]
        inner = StratifiedKFold(min(INNER_FOLDS, np.bincount(learnt[1]).min()), shuffle=True, random_state=int(fold))
        model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=STRENGTHS, cv=inner, **options)).fit(*learnt)
        found.loc[tested, "score"] = model.decision_function(features[tested])
        if with_threshold:
            best = make_pipeline(StandardScaler(), LogisticRegression(C=model[-1].C_, solver="newton-cholesky"))
            held_out = cross_val_predict(best, *learnt, cv=inner, method="decision_function")
            found.loc[tested, "threshold"] = best_threshold(held_out, learnt[1])
    return found


def pair_auc(scores: Any, target: Any, fold: Any) -> float:
    """Return the share of pairs (a positive and a negative gene of one fold) whose positive has the higher score.

    A tie counts one half. With one fold this is the area under the ROC curve; with several it is their mean, weighted
    by the number of pairs (the covariate-adjusted AUC of Janes and Pepe 2009, doi:10.1093/biomet/asp002, with the fold
    as the covariate). Pooled scores of all folds would also compare scores of different models, which shifts the area
    below one half when there is nothing to find. A gene with the score NaN is left out.

    Returns
    -------
    0 to 1; NaN if no fold has genes of both classes.
    """
    table = pd.DataFrame({"score": np.asarray(scores), "target": np.asarray(target), "fold": np.asarray(fold)})
    areas, n_pairs = [], []
    for _, rows in table.dropna().groupby("fold"):
        n_positive = rows["target"].sum()
        if 0 < n_positive < len(rows):
            areas.append(roc_auc_score(rows["target"], rows["score"]))
            n_pairs.append(n_positive * (len(rows) - n_positive))
    return float(np.average(areas, weights=n_pairs)) if areas else np.nan


def chance_aucs(predictions: pd.DataFrame, positive: str) -> np.ndarray:
    """Draw the AUC that the scores of an arm would have if they said nothing about the classes of the genes.

    The classes of the test genes are permuted within each fold, the same for all seeds, and the scores stay. This alone
    is too narrow: a gene that is tested in one fold is learnt from in the others, so that the folds err together.
    Deviations are therefore widened by sqrt(1 + J n_test / n_train) for J folds, as Nadeau and Bengio (2003, Machine
    Learning 52:239) widen the error of a mean over folds: with nothing to find, 3 to 4 % of logistic regressions then
    have p < .05, and 9 to 11 % without it. What it covers: which test genes have which class and, in this
    approximation, that other training genes would have given other models; not that other genes could be listed.

    Parameters
    ----------
    predictions
        Test genes of an arm: cell (the gene), label, seed, fold and score.

    Returns
    -------
    (`DRAWS`,), around one half; the same at each call.
    """
    target = predictions["label"].astype(str) == positive
    rank = predictions.groupby(["seed", "fold"], observed=True)["score"].rank()
    genes = predictions.assign(rank=rank, target=target).groupby(["fold", "cell"], observed=True)[["rank", "target"]]
    rng, won, n_pairs = np.random.default_rng(0), np.zeros(DRAWS), 0
    folds = [rows for _, rows in genes.mean().groupby("fold")]
    for rows in folds:
        n = int(rows["target"].sum())
        drawn = rng.permuted(np.tile(rows["rank"].to_numpy(), (DRAWS, 1)), axis=1)[:, :n]
        won += drawn.sum(axis=1) - n * (n + 1) / 2  # pairs won by positive genes (Mann and Whitney 1947)
        n_pairs += n * (len(rows) - n)
    return 0.5 + (won / n_pairs - 0.5) * np.sqrt(1 + len(folds) / (len(folds) - 1))


def best_threshold(scores: np.ndarray, target: np.ndarray) -> float:
    """Return the threshold with the highest balanced accuracy, half-way between two scores; of several the highest.

    Genes with a score above it are called positive. A gene with the score NaN is left out.
    """
    known = ~np.isnan(scores)
    false, true, thresholds = roc_curve(target[known], scores[known], drop_intermediate=False)
    best = int(np.argmax(true - false))
    if best == 0:
        return float(scores[known].max())  # nothing is positive
    below = scores[known][scores[known] < thresholds[best]]
    return float((thresholds[best] + below.max()) / 2) if len(below) else float(np.nextafter(thresholds[best], -np.inf))
