"""What a fine-tuned Geneformer has to beat: simple classifiers on the cells of one run.

In: a run whose strategy is a baseline, with its cells and tokens. Out: an `Outcome`, as fine-tuning gives it. Whatever
is tested, the choice of genes included, is fitted on the training cells alone. The lowest log loss chooses one point of
a small grid (of several the first, for grids begin with the simplest model): that of the validation cells where there
are at least 200, and else that of a stratified cross-validation over training and validation cells together. The test
cells are predicted once.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.sparsefuncs import incr_mean_variance_axis
from threadpoolctl import threadpool_limits

from tuneformer.artifacts import UserError
from tuneformer.data import counts
from tuneformer.model import fit as fitting
from tuneformer.model import hardware
from tuneformer.model.classifier import Batch, CellClassifier, Cells, build, predict
from tuneformer.model.frozen import Frozen
from tuneformer.model.trainer import LOWEST
from tuneformer.study import Study
from tuneformer.tokens.vocabulary import TARGET_SUM

if TYPE_CHECKING:
    from tuneformer.cells.make import Prepared
    from tuneformer.tokens.encode import Tokens

VARIABLE_GENES = 2000
CELLS = 100_000  # whose counts are in memory at once
COMPONENTS = 50
STRENGTHS = [10.0**power for power in range(-5, 3)]  # C of scikit-learn, 1 / penalty; the small ones suit 2,000 genes
NEIGHBOURS = [100, 50, 20, 10, 5, 3]
ALPHAS = [1e5, 1e4, 1e3, 1e2, 1e1, 1e0]  # penalty of ridge regression
TEMPERATURES = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
ITERATIONS = 20_000  # most of L-BFGS; the slowest fit seen on demo cells took 242
FOLDS = 5  # of the cross-validation where validation cells are few
SCORING = {"loss": "neg_log_loss", "accuracy": "accuracy", "macro_f1": "f1_macro"}
FITTED = ("coef_", "intercept_", "components_", "class_prior_")

Matrix = np.ndarray | sparse.csr_matrix
Features = Callable[[np.ndarray], Matrix]
"""From rows of the dataset to what a model reads, (cells, features)."""


class Baseline(NamedTuple):
    """How to make features, given the training cells; a model, given their shape and a seed; and the grid."""

    features: Callable[[Study, "Prepared", np.ndarray], Features]
    model: Callable[[tuple[int, int], int], Any]
    grid: dict[str, list]


def fit(settings: Study, prepared: "Prepared", frozen: Path | None = None) -> fitting.Outcome:
    """Fit the baseline of a run, and predict its test cells once. The same settings give the same numbers.

    ``history`` has one row per point of the grid, with its parameters; ``epoch`` is its number. Losses are in nats per
    cell; in the ``train_loss`` of ``knn_pca`` a cell is one of its own neighbours. In the cost,
    ``trainable_parameters`` are the fitted coefficients of the chosen point. `frozen` is as in `fit.fit_cells`.

    Raises
    ------
    UserError
        A class lacks cells, the baseline reads counts and there are only tokens, or the checkpoint cannot be used.
    """
    make_features, make_model, grid = BASELINES[settings.strategy]
    is_embedded, tokens = settings.strategy == "frozen_embedding_ridge", prepared.tokens
    make_features = functools.partial(make_features, frozen=frozen) if is_embedded else make_features
    cells = tokens.dataset.remove_columns("input_ids").to_pandas()
    labels = pd.Categorical(cells["label"], tokens.classes).codes.astype(np.int64)
    rows = fitting.rows_of_splits(settings, tokens)
    n_train, known = len(rows["train"]), np.concatenate([rows["train"], rows["validation"]])
    hardware.prepare(settings)
    with threadpool_limits(limits=settings.threads), np.errstate(invalid="ignore"):  # PCA where no gene varies: 0 / 0
        wall, cpu = time.perf_counter(), time.process_time()
        features = make_features(settings, prepared, rows["train"])
        values, parts = features(known), parts_of(labels[known], n_train)
        smallest = min(len(train) for train, _ in parts)
        model = make_model((smallest, values.shape[1]), settings.seed)
        search = GridSearchCV(model, grid, scoring=SCORING, cv=parts, refit=False, return_train_score=True)
        history = _history(search.set_params(error_score="raise").fit(values, labels[known]).cv_results_)
        best = history["validation_loss"].idxmin()
        chosen = clone(model).set_params(**search.cv_results_["params"][best])
        chosen.fit(values[:n_train], labels[rows["train"]])
        cost = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        probabilities = chosen.predict_proba(features(rows["test"]))
    cost |= {"training_cells": n_train, "trainable_parameters": _n_coefficients(chosen)}
    device = hardware.device_of(settings.device if is_embedded else "cpu")
    return fitting.Outcome(
        history=history,
        best_epoch=int(history["epoch"][best]),
        chosen_by=LOWEST if len(parts) == 1 else "cross-validated loss",
        cost=cost | hardware.used(device, "fp64"),
        classes=list(tokens.classes),
        **{f"n_{part}": len(at) for part, at in rows.items()},
        predictions=fitting.predictions_table(cells.iloc[rows["test"]], tokens.classes, probabilities),
    )


def parts_of(labels: np.ndarray, n_train: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return which cells fit and which judge a point of the grid, given the classes of training, then validation cells.

    Few validation cells cannot tell models apart: then both parts are divided anew, into as many folds as the smallest
    class has cells, at most 5, always in the same way.
    """
    is_train = np.arange(len(labels)) < n_train
    if len(labels) - n_train >= fitting.FEWEST_CHOOSING:
        return list(PredefinedSplit(np.where(is_train, -1, 0)).split())
    n_folds = min(FOLDS, np.unique(labels, return_counts=True)[1].min())
    return list(StratifiedKFold(n_folds, shuffle=True, random_state=0).split(is_train, labels))


def no_features(settings: Study, prepared: "Prepared", train: np.ndarray) -> Features:
    """Prepare nothing: (cells, 0)."""
    return lambda rows: np.empty((len(rows), 0))


def variable_genes(settings: Study, prepared: "Prepared", train: np.ndarray) -> Features:
    """Prepare ln(1 + counts per 10,000) of the 2,000 genes with the largest variance over the training cells.

    The logarithm has taken out most of the growth of the variance with the mean, and unlike dispersion in bins of
    expression (scanpy's ``highly_variable_genes``) the plain variance is defined for any number of genes and cells.
    """
    if prepared.cells is None:
        msg = f"strategy: {settings.strategy} reads counts, and this data set has tokens only; leave the arm out."
        raise UserError(msg)

    def log_normalised(rows: np.ndarray) -> Iterator[sparse.csr_matrix]:
        for _, values in counts.chunks(prepared.cells[rows], CELLS):
            yield (normalize(values.astype(np.float64), norm="l1") * TARGET_SUM).log1p()

    mean, variance, n = np.zeros(prepared.cells.n_vars), np.zeros(prepared.cells.n_vars), 0
    for values in log_normalised(train):
        mean, variance, n = incr_mean_variance_axis(values, axis=0, last_mean=mean, last_var=variance, last_n=n)
    genes = np.sort(np.argsort(-variance, kind="stable")[:VARIABLE_GENES])
    return lambda rows: np.concatenate([values[:, genes].toarray() for values in log_normalised(rows)])


def rank_features(settings: Study, prepared: "Prepared", train: np.ndarray) -> Features:
    """Prepare a bag of ranks: of n genes in the tokens of a cell, the one at place r (from 0) has the value 1 - r / n.

    Absent genes have 0. Special tokens are not genes, and genes that no training cell has are left out.
    """
    vocabulary, dataset = prepared.tokens.vocabulary, prepared.tokens.dataset.select_columns("input_ids")

    def ranks(rows: np.ndarray) -> sparse.csr_matrix:
        lists = dataset.with_format("arrow")[rows]["input_ids"].combine_chunks()
        tokens, cell = lists.flatten().to_numpy(), np.repeat(np.arange(len(rows)), lists.value_lengths())
        is_gene = ~np.isin(tokens, list(vocabulary.specials.values()))
        tokens, cell = tokens[is_gene], cell[is_gene]
        n_genes = np.bincount(cell, minlength=len(rows))
        place = np.arange(len(cell)) - (np.cumsum(n_genes) - n_genes)[cell]
        return sparse.csr_matrix((1 - place / n_genes[cell], (cell, tokens)), (len(rows), vocabulary.size))

    seen = np.flatnonzero(ranks(train).getnnz(axis=0))
    return lambda rows: ranks(rows)[:, seen]


def cell_embeddings(settings: Study, prepared: "Prepared", train: np.ndarray, frozen: Path | None = None) -> Features:
    """Prepare embeddings by the checkpoint as it is: the mean of its last hidden states over the tokens of a cell.

    In the folder `frozen` they are those that ``linear_probe`` reads, too.
    """
    settings = settings.model_copy(update={"attention": "auto", "pooling": "mean"})
    model, bf16 = frozen_model(settings, prepared.tokens)
    below, pad = Frozen(frozen, settings.frozen_cache_gb * 1e9, bf16=bf16), prepared.tokens.vocabulary.specials["<pad>"]

    def embeddings(rows: np.ndarray) -> np.ndarray:
        cells = Cells(prepared.tokens.dataset, pad, rows=rows, packed=True)

        def embed(batch: Batch) -> torch.Tensor:
            batch = below.inputs(model, cells, batch)
            return model.encode(batch, batch.get("depth", 0))

        return predict(model, cells, bf16=bf16, forward=embed)

    return embeddings


def frozen_model(settings: Study, tokens: "Tokens") -> tuple[CellClassifier, bool]:
    """Return the checkpoint as it is, on its device, without dropout; and whether to use it in bf16."""
    device = hardware.prepare(settings)
    transformers.set_seed(settings.seed)  # genes that the checkpoint does not know start as they do in fine-tuning
    model = build(settings.model_copy(update={"strategy": "full"}), tokens.vocabulary, tokens.classes)
    return model.to(device).eval().requires_grad_(False), hardware.uses_bf16(device, settings.precision)


def true_probabilities(settings: Study, prepared: "Prepared", train: np.ndarray) -> Features:
    """Prepare what a classifier that knows the simulator says, (cells, classes): see `simulate_truth`."""
    from tuneformer.data.simulate_truth import class_probabilities

    names = prepared.tokens.dataset.select_columns(["cell"]).to_pandas()["cell"].to_numpy()
    return lambda rows: class_probabilities(settings, names[rows].tolist(), prepared.tokens.classes)


class _Given(ClassifierMixin, BaseEstimator):
    """Probabilities as they are given; nothing is fitted."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> "_Given":
        self.classes_ = np.arange(X.shape[1])
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X.argmax(axis=1)


class _Neighbours(KNeighborsClassifier):
    """Class shares of k neighbours and one more, which belongs to all classes alike; of fewer cells, all are near.

    Laplace's correction: no class has the probability 0, whose log loss would be infinite, and none overtakes another.
    """

    def fit(self, X: np.ndarray, y: np.ndarray) -> "_Neighbours":
        self.n_neighbors = min(self.n_neighbors, len(y))
        return super().fit(X, y)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        shares = super().predict_proba(X)
        return (self.n_neighbors * shares + 1 / shares.shape[1]) / (self.n_neighbors + 1)


class _TemperedRidge(ClassifierMixin, BaseEstimator):
    """Ridge regression on 1 for the true class and 0 for the others; probabilities are softmax(values / temperature).

    A ridge classifier has no probabilities of its own. The temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2)
    does not change the most probable class, so the log loss decides between the temperatures of one model.
    """

    def __init__(self, alpha: float = 1.0, temperature: float = 1.0) -> None:
        self.alpha, self.temperature = alpha, temperature

    def fit(self, X: np.ndarray, y: np.ndarray) -> "_TemperedRidge":
        self.classes_ = np.unique(y)
        ridge = Ridge(self.alpha, solver="svd").fit(X, (y[:, None] == self.classes_).astype(float))
        self.coef_, self.intercept_ = ridge.coef_, ridge.intercept_
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return softmax((X @ self.coef_.T + self.intercept_) / self.temperature, axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(X).argmax(axis=1)]


def _logistic() -> LogisticRegression:
    return LogisticRegression(max_iter=ITERATIONS)


BASELINES = {
    "majority": Baseline(no_features, lambda *_: DummyClassifier(strategy="prior"), {}),
    "logistic_counts": Baseline(
        variable_genes, lambda *_: make_pipeline(StandardScaler(), _logistic()), {"logisticregression__C": STRENGTHS}
    ),
    "logistic_ranks": Baseline(rank_features, lambda *_: _logistic(), {"C": STRENGTHS}),
    "knn_pca": Baseline(
        variable_genes,
        lambda shape, seed: make_pipeline(PCA(min(COMPONENTS, *shape), random_state=seed), _Neighbours()),
        {"_neighbours__n_neighbors": NEIGHBOURS},
    ),
    "frozen_embedding_ridge": Baseline(
        cell_embeddings,
        lambda *_: make_pipeline(StandardScaler(), _TemperedRidge()),
        {"_temperedridge__alpha": ALPHAS, "_temperedridge__temperature": TEMPERATURES},
    ),
    "bayes": Baseline(true_probabilities, lambda *_: _Given(), {}),
}


def _history(found: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return one row per point of a grid, in the words of a fine-tuning run."""
    table = pd.DataFrame([{name.split("__")[-1]: value for name, value in one.items()} for one in found["params"]])
    table = table.assign(train_loss=-found["mean_train_loss"], validation_loss=-found["mean_test_loss"])
    for score in ("accuracy", "macro_f1"):
        table[f"validation_{score}"] = found[f"mean_test_{score}"]
    table["seconds"] = found["mean_fit_time"] + found["mean_score_time"]
    table.insert(0, "epoch", np.arange(1, len(table) + 1))
    return table


def _n_coefficients(model: Any) -> int:
    steps = [step for _, step in model.steps] if hasattr(model, "steps") else [model]
    return int(sum(np.size(getattr(step, name)) for step in steps for name in FITTED if hasattr(step, name)))
