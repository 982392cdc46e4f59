"""What a classifier of genes in cells has to beat: logistic regression that sees one row a gene.

In: a `GeneTask` and its cells. Out: features of the genes, made without their classes, and for each gene the score that
a model gave it that was fitted on the genes of the other folds.

- ``expression``: how strongly, how often, how variably and at which rank a gene is expressed in the context cells.
- ``frozen_embedding``: the checkpoint's embedding of the gene, before it has seen any cell.
- ``frozen_context``: the mean of the checkpoint's last hidden states of the gene in the context cells.

Each is standardised and fitted with an L2 penalty that an inner cross-validation over the training genes chooses.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import transformers
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.sparsefuncs import mean_variance_axis

from tuneformer.evaluate.gene_scores import best_threshold, pair_auc
from tuneformer.finetune import genes, hardware
from tuneformer.finetune.genes import GeneTask
from tuneformer.study.params import Study
from tuneformer.tokens.vocabulary import TARGET_SUM, gene_ids

if TYPE_CHECKING:
    import anndata as ad

BASELINES = ("expression", "frozen_embedding", "frozen_context")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1e0)  # C of scikit-learn: 1 / penalty, the strongest first
INNER_FOLDS = 4


def features_of(settings: Study, task: GeneTask, cells: "ad.AnnData") -> dict[str, np.ndarray]:
    """Return the features of each baseline, (genes, features); classes are not read."""
    embedding, context = _embeddings(settings, task)
    return {
        "expression": expression_features(task, cells).to_numpy(),
        "frozen_embedding": embedding,
        "frozen_context": context,
    }


def expression_features(task: GeneTask, cells: "ad.AnnData") -> pd.DataFrame:
    """Describe how the genes are expressed in the context cells.

    Parameters
    ----------
    task
        The genes, and the context cells by name.
    cells
        Raw counts of these and other cells.

    Returns
    -------
    Per gene: ``mean`` and ``sd`` of ln(1 + counts per 10,000); ``detected``: share of the cells with a count;
    ``dispersion``: ln of variance / mean of the counts per 10,000; ``in_tokens``: share of the cells with the gene
    among their tokens; ``rank``: its mean place there (0: first, 1: last).
    """
    names = task.tokens.dataset.select(task.context)["cell"][:]
    part = cells[names]
    scaled = normalize(sparse.csr_matrix(part.X, dtype=np.float64), norm="l1") * TARGET_SUM
    codes = pd.Index(task.genes["gene"]).get_indexer(task.tokens.vocabulary.resolve(gene_ids(part)))
    known = np.flatnonzero(codes >= 0)  # identifiers of one gene are added up
    shape = (part.n_vars, len(task.genes))
    scaled = scaled @ sparse.csr_matrix((np.ones(len(known)), (known, codes[known])), shape=shape)
    mean, variance = mean_variance_axis(scaled, axis=0)
    log_mean, log_variance = mean_variance_axis(scaled.log1p(), axis=0)
    rows = [np.asarray(ids) for ids in task.tokens.dataset.select(task.context)["input_ids"][:]]
    rank = pd.Series(np.concatenate([np.arange(len(ids)) / len(ids) for ids in rows]))
    rank = rank.groupby(np.concatenate(rows)).mean()
    return pd.DataFrame(
        {
            "mean": log_mean,
            "sd": np.sqrt(log_variance),
            "detected": scaled.getnnz(axis=0) / part.n_obs,
            "dispersion": np.log(variance / mean),
            "in_tokens": task.genes["context_cells"].to_numpy() / part.n_obs,
            "rank": rank.loc[task.genes["token_id"]].to_numpy(),
        },
        index=pd.Index(task.genes["gene"]),
    )


def cross_validate(features: np.ndarray, task: GeneTask) -> pd.DataFrame:
    """Score each gene by a model of the genes in the other folds.

    Parameters
    ----------
    features
        (genes, features), in the order of ``task.genes``.
    task
        Classes and folds.

    Returns
    -------
    One row a gene: gene, class, target, fold, ``score`` (logit of the positive class) and ``threshold``, above which
    a gene of this fold is called positive: the best one for the training genes, scored in the inner cross-validation.
    """
    target, folds = task.genes["target"].to_numpy(), task.genes["fold"].to_numpy()
    score, threshold = np.empty(len(target)), np.empty(len(target))
    for fold in np.unique(folds):
        tested = folds == fold
        strength, inner = _choose_strength(features[~tested], target[~tested], fold)
        model = _logistic(strength).fit(features[~tested], target[~tested])
        score[tested] = model.decision_function(features[tested])
        threshold[tested] = best_threshold(inner, target[~tested])
    return task.genes[["gene", "class", "target", "fold"]].assign(score=score, threshold=threshold)


def _choose_strength(features: np.ndarray, target: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Return the strength with the best inner AUC (of several the smallest), and its scores of the held-out genes."""
    n_inner = min(INNER_FOLDS, np.bincount(target).min())
    split = StratifiedKFold(n_inner, shuffle=True, random_state=int(seed))
    inner = np.empty(len(target), dtype=int)
    scores = {strength: np.empty(len(target)) for strength in STRENGTHS}
    for number, (learnt, held_out) in enumerate(split.split(features, target)):
        inner[held_out] = number
        for strength in STRENGTHS:
            model = _logistic(strength).fit(features[learnt], target[learnt])
            scores[strength][held_out] = model.decision_function(features[held_out])
    best = max(STRENGTHS, key=lambda strength: (pair_auc(scores[strength], target, inner), -strength))
    return best, scores[best]


def _logistic(strength: float) -> LogisticRegression:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver="newton-cholesky"))


def _embeddings(settings: Study, task: GeneTask) -> tuple[np.ndarray, np.ndarray]:
    """Return each gene's embedding in the untouched checkpoint, and its mean last hidden state, (genes, hidden)."""
    device = hardware.device_of(settings)
    transformers.set_seed(settings.split_seed)  # for genes that the checkpoint does not know
    model = genes.load_gene_classifier(settings.treated("full"), task.tokens, task.classes).to(device).eval()
    tokens = torch.from_numpy(task.genes["token_id"].to_numpy()).to(device)
    embedding = model.bert.embeddings.word_embeddings.weight[tokens].detach().double().cpu().numpy()
    row_of = torch.full((model.config.vocab_size,), -1, device=device)
    row_of[tokens] = torch.arange(len(tokens), device=device)
    sums = torch.zeros(len(tokens), model.config.hidden_size, dtype=torch.float64, device=device)
    uses_bf16 = hardware.trains_in_bf16(settings)
    reader = genes.Reader(task.tokens, task.context, device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
        for batch in reader.in_order():
            rows = row_of[batch["input_ids"]]  # (batch, length)
            states = model.bert(**batch).last_hidden_state  # (batch, length, hidden)
            sums.index_add_(0, rows[rows >= 0], states[rows >= 0].double())
    return embedding, sums.cpu().numpy() / task.genes["context_cells"].to_numpy()[:, None]
