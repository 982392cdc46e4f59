"""What a fine-tuned Geneformer has to beat: simple models of the same cells, and of one row of numbers per gene.

In: a run whose strategy is a baseline, with its cells and tokens; or genes and the cells in which they are read. Out:
an `Outcome`, as fine-tuning gives it; or a score per gene. Whatever is fitted, the choice of genes included, is fitted
on the training cells alone. The validation cells choose one point of a small grid, by the rule that chooses the epoch
in fine-tuning: the highest macro-F1; of several the lowest log loss, then the first, for grids begin with the simplest
model. The test cells are predicted once.
"""

import platform
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from scipy import sparse
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.sparsefuncs import mean_variance_axis
from threadpoolctl import threadpool_limits

from tuneformer.artifacts import UserError
from tuneformer.cells.make import Prepared
from tuneformer.model import classifier, fit as fitting, hardware
from tuneformer.study import Study
from tuneformer.tokens.encode import Tokens
from tuneformer.tokens.vocabulary import TARGET_SUM, gene_ids

if TYPE_CHECKING:
    import anndata as ad

    from tuneformer.model.genes import GeneTask

VARIABLE_GENES = 2000
COMPONENTS = 50
STRENGTHS = [10.0**power for power in range(-5, 3)]  # C of scikit-learn, 1 / penalty; the small ones suit 2,000 genes
NEIGHBOURS = [100, 50, 20, 10, 5, 3]
ALPHAS = [1e5, 1e4, 1e3, 1e2, 1e1, 1e0]  # penalty of ridge regression
TEMPERATURES = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
ITERATIONS = 20_000  # most of L-BFGS; the slowest fit seen on demo cells took 242
GENE_STRENGTHS = [1e-4, 1e-3, 1e-2, 1e-1, 1e0]
INNER_FOLDS = 4
SCORING = {"loss": "neg_log_loss", "accuracy": "accuracy", "macro_f1": "f1_macro"}

Matrix = np.ndarray | sparse.csr_matrix
Features = Callable[[np.ndarray], Matrix]
"""From rows of the dataset to what a model reads, (cells, features)."""


class Baseline(NamedTuple):
    """How to make features, from the training cells; how to make a model of features of a shape; which grid."""

    features: Callable[[Study, Prepared, np.ndarray], Features]
    model: Callable[[tuple[int, int], int], Any]
    grid: dict[str, list]


def fit(settings: Study, prepared: Prepared) -> fitting.Outcome:
    """Fit the baseline of a run, and predict its test cells once. The same settings give the same numbers.

    Returns
    -------
    The outcome. ``history`` has one row per point of the grid, with its parameters; ``epoch`` is its number. Losses are
    in nats per cell; in the ``train_loss`` of ``knn_pca`` a cell is one of its own neighbours. In its cost,
    ``trainable_parameters`` are the fitted coefficients of the chosen point.

    Raises
    ------
    UserError
        The baseline reads counts and there are only tokens; the checkpoint or the device cannot be used.
    """
    make_features, make_model, grid = BASELINES[settings.strategy]
    tokens = prepared.tokens
    table = tokens.dataset.select_columns(["cell", "label", "split"]).to_pandas()
    labels = pd.Categorical(table["label"], tokens.classes).codes.astype(np.int64)
    train, validation, test = (np.flatnonzero(table["split"] == part) for part in fitting.SPLITS)
    known = np.concatenate([train, validation])
    learnt, chosen_by = slice(len(train)), np.repeat([-1, 0], [len(train), len(validation)])
    hardware.prepare(settings)
    with threadpool_limits(limits=settings.threads), np.errstate(invalid="ignore"):  # PCA where no gene varies: 0 / 0
        wall, cpu = time.perf_counter(), time.process_time()
        features = make_features(settings, prepared, train)
        values = features(known)
        model = make_model((len(train), values.shape[1]), settings.seed)
        cv = PredefinedSplit(chosen_by)
        search = GridSearchCV(model, grid, scoring=SCORING, cv=cv, refit=False, return_train_score=True)
        found = search.set_params(error_score="raise").fit(values, labels[known]).cv_results_
        history = _history(found)
        best = history.sort_values(["validation_macro_f1", "validation_loss"], ascending=[False, True]).index[0]
        chosen = clone(model).set_params(**found["params"][best]).fit(values[learnt], labels[train])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        probabilities = chosen.predict_proba(features(test))
    cost = {"wall_seconds": wall, "cpu_seconds": cpu, "training_cells": len(train)}
    cost["trainable_parameters"] = _n_coefficients(chosen)
    return fitting.Outcome(
        status="ok",
        reason="",
        history=history,
        best_epoch=int(best) + 1,
        cost=cost | _device(settings),
        classes=list(tokens.classes),
        n_train=len(train),
        n_validation=len(validation),
        n_test=len(test),
        predictions=fitting.predictions_table(tokens, test, probabilities),
        model=None,
    )


def variable_genes(settings: Study, prepared: Prepared, train: np.ndarray) -> Features:
    """Prepare ln(1 + counts per 10,000) of the 2,000 genes with the largest variance over the training cells.

    The logarithm has taken out most of the growth of the variance with the mean, and unlike dispersion in bins of
    expression (scanpy's ``highly_variable_genes``) the plain variance is defined for any number of genes and cells.
    """
    if prepared.cells is None:
        msg = f"strategy: {settings.strategy} reads counts, and this data set has tokens only; leave the arm out."
        raise UserError(msg)
    counts = sparse.csr_matrix(prepared.cells.X)

    def log_normalised(rows: np.ndarray) -> sparse.csr_matrix:
        return (normalize(counts[rows].astype(np.float64), norm="l1") * TARGET_SUM).log1p()

    _, variances = mean_variance_axis(log_normalised(train), axis=0)
    genes = np.sort(np.argsort(-variances, kind="stable")[:VARIABLE_GENES])
    return lambda rows: log_normalised(rows)[:, genes].toarray()


def rank_features(settings: Study, prepared: Prepared, train: np.ndarray) -> Features:
    """Prepare a bag of ranks: of n genes in the tokens of a cell, the one at place r (from 0) has the value 1 - r / n.

    Absent genes have 0. Special tokens are not genes, and genes that no training cell has are left out.
    """
    tokens = prepared.tokens
    specials = list(tokens.vocabulary.specials.values())

    def ranks(rows: np.ndarray) -> sparse.csr_matrix:
        genes = [ids[~np.isin(ids, specials)] for ids in fitting.read_ids(tokens.dataset, rows)]
        values = [1 - np.arange(len(ids)) / len(ids) for ids in genes]
        ends = np.cumsum([0, *map(len, genes)])
        shape = (len(rows), tokens.vocabulary.size)
        return sparse.csr_matrix((np.concatenate(values), np.concatenate(genes), ends), shape=shape)

    seen = np.flatnonzero(ranks(train).getnnz(axis=0))
    return lambda rows: ranks(rows)[:, seen]


def cell_embeddings(settings: Study, prepared: Prepared, train: np.ndarray) -> Features:
    """Prepare embeddings by the checkpoint as it is: the mean of its last hidden states over the tokens of a cell."""

    def embed(rows: np.ndarray) -> np.ndarray:
        parts, means = [], []
        for part, _, mask, states in hidden_states(settings, prepared.tokens, rows):
            parts.append(part)
            means.append((states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True))  # (batch, hidden)
        embeddings = torch.cat(means).cpu().numpy()
        return embeddings[np.argsort(np.concatenate(parts))]

    return embed


def hidden_states(settings: Study, tokens: Tokens, rows: np.ndarray) -> Iterator[tuple]:
    """Read cells with the checkpoint as it is: no dropout, bf16 where fine-tuning uses it.

    Yields
    ------
    For each batch: which of `rows` it holds, their tokens and mask (batch, length), and the last hidden states, (batch,
    length, hidden) float64.
    """
    device = hardware.device_of(settings)
    transformers.set_seed(settings.seed)  # genes that the checkpoint does not know start as they do in fine-tuning
    bert = classifier.build(settings, tokens.vocabulary, tokens.classes).bert.to(device).eval()
    cells = [torch.from_numpy(ids) for ids in fitting.read_ids(tokens.dataset, rows)]
    order = np.argsort([len(ids) for ids in cells], kind="stable")
    pad, uses_bf16 = tokens.vocabulary.specials["<pad>"], hardware.trains_in_bf16(settings)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
        for start in range(0, len(cells), fitting.PREDICTION_BATCH):
            part = order[start : start + fitting.PREDICTION_BATCH]
            batch = torch.nn.utils.rnn.pad_sequence([cells[row] for row in part], batch_first=True, padding_value=pad)
            ids, mask = batch.to(device), (batch != pad).long().to(device)
            yield part, ids, mask, bert(ids, attention_mask=mask).last_hidden_state.double()


class Neighbours(KNeighborsClassifier):
    """Class shares of k neighbours and one more, which belongs to all classes alike; with fewer cells, of them all.

    Laplace's correction: no class has the probability 0, whose log loss would be infinite, and none overtakes another.
    """

    def fit(self, X: np.ndarray, y: np.ndarray) -> "Neighbours":  # noqa: N803 (names of scikit-learn)
        """Fit, with no more neighbours than there are cells."""
        self.n_neighbors = min(self.n_neighbors, len(y))
        return super().fit(X, y)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return (cells, classes)."""
        shares = super().predict_proba(X)
        return (self.n_neighbors * shares + 1 / shares.shape[1]) / (self.n_neighbors + 1)


class TemperedRidge(ClassifierMixin, BaseEstimator):
    """Ridge regression on 1 for the true class and 0 for the others; probabilities are softmax(values / temperature).

    A ridge classifier has no probabilities of its own. The temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2)
    does not change the most probable class, so the log loss decides between the temperatures of one model.
    """

    def __init__(self, alpha: float = 1.0, temperature: float = 1.0) -> None:
        self.alpha, self.temperature = alpha, temperature

    def fit(self, X: np.ndarray, y: np.ndarray) -> "TemperedRidge":  # noqa: N803
        """Fit by singular values."""
        self.classes_ = np.unique(y)
        ridge = Ridge(self.alpha, solver="svd").fit(X, (y[:, None] == self.classes_).astype(float))
        self.coef_, self.intercept_ = np.atleast_2d(ridge.coef_), ridge.intercept_
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return (cells, classes)."""
        return softmax((X @ self.coef_.T + self.intercept_) / self.temperature, axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return the most probable class of each cell."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]


BASELINES = {
    "majority": Baseline(
        lambda *_: lambda rows: np.empty((len(rows), 0)), lambda *_: DummyClassifier(strategy="prior"), {}
    ),
    "logistic_counts": Baseline(
        variable_genes,
        lambda *_: make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS)),
        {"logisticregression__C": STRENGTHS},
    ),
    "logistic_ranks": Baseline(
        rank_features, lambda *_: LogisticRegression(max_iter=ITERATIONS), {"C": STRENGTHS}
    ),
    "knn_pca": Baseline(
        variable_genes,
        lambda shape, seed: make_pipeline(PCA(min(COMPONENTS, *shape), random_state=seed), Neighbours()),
        {"neighbours__n_neighbors": NEIGHBOURS},
    ),
    "frozen_embedding_ridge": Baseline(
        cell_embeddings,
        lambda *_: make_pipeline(StandardScaler(), TemperedRidge()),
        {"temperedridge__alpha": ALPHAS, "temperedridge__temperature": TEMPERATURES},
    ),
}
