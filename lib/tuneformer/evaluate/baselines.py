"""What a fine-tuned Geneformer has to beat: simple classifiers on the cells of one run.

In: a run whose ``strategy`` names a baseline, its cells and their tokens. Out: an `Outcome`, as fine-tuning gives it.

- ``majority``: every cell gets the class shares of the training cells.
- ``logistic_counts``: logistic regression with an L2 penalty on standardised variable genes (`variable_genes`).
- ``logistic_ranks``: the same on the tokens that Geneformer reads, as a bag of ranks (`rank_features`).
- ``knn_pca``: the nearest neighbours among the training cells in 50 principal components of the variable genes.
- ``frozen_embedding_ridge``: ridge regression on embeddings by the untouched checkpoint (`cell_embeddings`).

Whatever is fitted, the choice of genes included, is fitted on the training cells of the run, and not again with the
validation cells. These choose one point of a small grid, by the rule that chooses the epoch in fine-tuning: the highest
macro-F1; of several the one with the lowest log loss, and then the first, for the grids begin with the simplest model.
The test cells are predicted once, by the point that was chosen.
"""

import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.utils.sparsefuncs import mean_variance_axis
from threadpoolctl import threadpool_limits

from tuneformer.finetune import checkpoints, hardware, training
from tuneformer.finetune.collator import CellCollator
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.run import training_fingerprint
from tuneformer.study.treatments import BASELINES
from tuneformer.tokens.tokenizer import Tokens
from tuneformer.tokens.vocabulary import TARGET_SUM

if TYPE_CHECKING:
    import anndata as ad


VARIABLE_GENES = 2000
COMPONENTS = 50
STRENGTHS = (
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1e0,
    1e1,
    1e2,
)  # C of scikit-learn: 1 / penalty; the small ones suit 2,000 genes
NEIGHBOURS = (100, 50, 20, 10, 5, 3)
ALPHAS = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0)  # penalty of ridge regression
TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
ITERATIONS = 20_000  # most of L-BFGS; the slowest fit seen on demo cells took 242

Matrix = np.ndarray | sparse.csr_matrix
Features = Callable[[np.ndarray], Matrix]
"""From rows of the dataset to what a model reads, (cells, features)."""


class Candidate(NamedTuple):
    """One point of a grid: its parameters, the fitted model (features to probabilities), and how much was fitted."""

    parameters: dict[str, float]
    predict: Callable[[Matrix], np.ndarray]
    n_coefficients: int


def fit_baseline(settings: Study, cells: "ad.AnnData", tokens: Tokens) -> training.Outcome:
    """Fit the baseline of a run, and predict its test cells once. Nothing is written.

    The same settings give the same numbers. Other than by the draw of the cells, only ``knn_pca`` (principal components
    by random projections) and ``frozen_embedding_ridge`` (genes that the checkpoint does not know have random
    embeddings, as in fine-tuning) depend on the seed.

    Parameters
    ----------
    settings
        The run; ``strategy`` names the baseline.
    cells
        Raw counts of the cells, in any order. Classes and split are read from `tokens`.
    tokens
        The same cells, matched by name, as `tuneformer.trainsets.assemble.prepare_tokens` makes them; a fine-tuning run
        with this seed is trained, validated and tested on the same ones.

    Returns
    -------
    The outcome. ``history`` has one row a point of the grid, with its parameters; ``epoch`` is its number, and
    ``best_epoch`` that of the chosen one. Losses are in nats per cell; in the ``train_loss`` of ``knn_pca`` a cell is
    one of its own neighbours. Its cost: ``wall_seconds`` and ``cpu_seconds`` (features and the whole grid, without the
    test cells), ``training_cells``, ``trainable_parameters`` (fitted coefficients of the chosen point),
    ``peak_memory_mb`` (of the process), ``peak_gpu_memory_mb`` (on a GPU), ``device``.

    Raises
    ------
    TrainingDataError
        A class has no cells to train, validate or test on, or a cell of the tokens is not among `cells`.
    CellsError
        ``train_cells`` is smaller than the number of classes.
    CheckpointError, ParameterError
        The checkpoint or the device cannot be used, or ``strategy`` is no baseline.
    """
    if settings.strategy not in BASELINES:
        msg = f"strategy: {settings.strategy} is no baseline; set it to one of {', '.join(BASELINES)}."
        raise ParameterError(msg)
    make_features, make_candidates = _METHODS[settings.strategy]
    drawn = training.draw_cells(settings, tokens)
    number = {name: place for place, name in enumerate(tokens.classes)}
    labels = tokens.dataset.select_columns(["label"]).to_pandas()["label"].map(number).to_numpy()
    hardware.prepare(settings)
    with threadpool_limits(limits=settings.threads):
        wall, cpu = time.perf_counter(), time.process_time()
        features = make_features(settings, cells, tokens, drawn["train"])
        known = {split: (features(drawn[split]), labels[drawn[split]]) for split in ("train", "validation")}
        history, best, chosen = _choose(make_candidates(*known["train"], settings.seed), known)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        probabilities = chosen.predict(features(drawn["test"]))
    predictions = pd.DataFrame(tokens.dataset.select_columns(["cell", "label"])[drawn["test"]])
    for place, name in enumerate(tokens.classes):
        predictions[training.PROBABILITY + name] = probabilities[:, place]
    return training.Outcome(
        status="ok",
        reason="",
        fingerprint=training_fingerprint(settings, tokens.provenance["fingerprint"]),
        classes=list(tokens.classes),
        history=history,
        best_epoch=best,
        cost={
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "training_cells": len(drawn["train"]),
            "trainable_parameters": chosen.n_coefficients,
            **_device(settings),
        },
        n_train=len(drawn["train"]),
        n_validation=len(drawn["validation"]),
        n_test=len(drawn["test"]),
        predictions=predictions,
    )


def variable_genes(settings: Study, cells: "ad.AnnData", tokens: Tokens, train: np.ndarray) -> Features:
    """Prepare ln(1 + counts per 10,000) of the 2,000 genes that vary most over the training cells.

    "Most" is the plain variance of these values. The logarithm has already taken out most of the growth of the variance
    with the mean, and other than dispersion in bins of expression (scanpy's ``highly_variable_genes``) it is defined
    for any number of genes and cells. A cell is divided by the sum of all its genes, those outside the vocabulary
    included; one without a count in the chosen genes is a row of zeros.

    Parameters
    ----------
    settings, cells, tokens
        As `fit_baseline`.
    train
        Rows of the training cells in the dataset of `tokens`.

    Returns
    -------
    Features: dense, (cells, genes), in the order of the genes of `cells`; all genes if there are fewer.

    Raises
    ------
    TrainingDataError
        A cell of the tokens is not among `cells`.
    """
    names = tokens.dataset.select_columns(["cell"]).to_pandas()["cell"]
    places = cells.obs_names.get_indexer(names)
    if (places < 0).any():
        msg = (
            f"{(places < 0).sum()} of the {len(names)} cells of the tokens are not among the given cells, such as "
            f"{names[places < 0].iloc[0]}; give the cells that the tokens were made of."
        )
        raise training.TrainingDataError(msg)
    counts = sparse.csr_matrix(cells.X)

    def log_normalised(rows: np.ndarray) -> sparse.csr_matrix:
        return (normalize(counts[places[rows]].astype(np.float64), norm="l1") * TARGET_SUM).log1p()

    _, variances = mean_variance_axis(log_normalised(train), axis=0)
    genes = np.sort(np.argsort(-variances, kind="stable")[:VARIABLE_GENES])
    return lambda rows: log_normalised(rows)[:, genes].toarray()


def rank_features(settings: Study, cells: "ad.AnnData", tokens: Tokens, train: np.ndarray) -> Features:
    """Prepare a bag of ranks: of n genes in the tokens of a cell, the one at place r (from 0) has the value 1 - r / n.

    Absent genes have 0. Special tokens are no genes, and genes that no training cell has are left out.

    Parameters
    ----------
    settings, cells, tokens, train
        As `variable_genes`.

    Returns
    -------
    Features: sparse, (cells, genes).
    """
    specials = list(tokens.vocabulary.specials.values())

    def ranks(rows: np.ndarray) -> sparse.csr_matrix:
        lists = [cell["input_ids"] for cell in training.read_cells(tokens, rows)]
        genes = [ids[~np.isin(ids, specials)] for ids in lists]
        values = [1 - np.arange(len(ids)) / len(ids) for ids in genes]
        ends = np.cumsum([0, *map(len, genes)])
        shape = (len(rows), tokens.vocabulary.size)
        return sparse.csr_matrix((np.concatenate(values), np.concatenate(genes), ends), shape=shape)

    seen = np.flatnonzero(ranks(train).getnnz(axis=0))
    return lambda rows: ranks(rows)[:, seen]


def cell_embeddings(settings: Study, tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """Embed cells by the checkpoint as it is: the mean of its last hidden states over the tokens of a cell.

    Special tokens count, padding does not, as in fine-tuning with ``pooling: mean``. No dropout; bf16 where fine-tuning
    uses it.

    Parameters
    ----------
    settings
        ``checkpoint``, ``seed``, ``device`` and ``precision`` are read.
    tokens
        Of the task.
    rows
        Rows of the dataset of `tokens`.

    Returns
    -------
    Embeddings, (cells, hidden), float64.

    Raises
    ------
    CheckpointError, ParameterError
        The checkpoint or the device cannot be used.
    """
    device = hardware.device_of(settings)
    transformers.set_seed(settings.seed)  # genes that the checkpoint does not know start as they do in fine-tuning
    bert = checkpoints.load_classifier(settings, tokens.vocabulary, tokens.classes).bert.to(device).eval()
    cells = training.read_cells(tokens, rows)
    collate = CellCollator(tokens.vocabulary.specials["<pad>"])
    order = np.argsort([len(cell["input_ids"]) for cell in cells], kind="stable")
    embeddings = np.empty((len(cells), bert.config.hidden_size))
    uses_bf16 = hardware.trains_in_bf16(settings)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
        for start in range(0, len(cells), training.PREDICTION_BATCH):
            part = order[start : start + training.PREDICTION_BATCH]
            batch = collate([cells[row] for row in part])
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            states = bert(ids, attention_mask=mask).last_hidden_state.double()  # (batch, length, hidden)
            mean = (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            embeddings[part] = mean.cpu().numpy()
    return embeddings


def _choose(
    candidates: Iterator[Candidate], known: dict[str, tuple[Matrix, np.ndarray]]
) -> tuple[pd.DataFrame, int, Candidate]:
    """Judge the points of a grid; return one row each, the number of the best one (from 1), and the best one."""
    history: list[dict[str, float]] = []
    best, chosen = (-np.inf, -np.inf), None
    start = time.perf_counter()
    for number, candidate in enumerate(candidates, start=1):
        features, labels = known["validation"]
        probabilities = candidate.predict(features)
        predicted = probabilities.argmax(axis=1)
        row = {
            "epoch": number,
            **candidate.parameters,
            "train_loss": _log_loss(candidate.predict(known["train"][0]), known["train"][1]),
            "validation_loss": _log_loss(probabilities, labels),
            "validation_accuracy": float((predicted == labels).mean()),
            "validation_macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=np.nan)),
            "seconds": time.perf_counter() - start,
        }
        history.append(row)
        judged = (row["validation_macro_f1"], -row["validation_loss"])
        if judged > best:
            best, chosen, place = judged, candidate, number
        start = time.perf_counter()
    return pd.DataFrame(history), place, chosen


def _log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -ln(probability of the true class), nats per cell."""
    likelihood = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(float).tiny)
    return float(-np.log(likelihood).mean())


def _nothing(settings: Study, cells: "ad.AnnData", tokens: Tokens, train: np.ndarray) -> Features:
    return lambda rows: np.empty((len(rows), 0))


def _embeddings(settings: Study, cells: "ad.AnnData", tokens: Tokens, train: np.ndarray) -> Features:
    return partial(cell_embeddings, settings, tokens)


def _majority(features: Matrix, labels: np.ndarray, seed: int) -> Iterator[Candidate]:
    model = DummyClassifier(strategy="prior").fit(features, labels)
    yield Candidate({}, model.predict_proba, model.class_prior_.size)


def _logistic(features: Matrix, labels: np.ndarray, seed: int) -> Iterator[Candidate]:
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(features, labels)
        yield Candidate({"C": strength}, model.predict_proba, model.coef_.size + model.intercept_.size)


def _standardised_logistic(features: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Candidate]:
    scaler = StandardScaler().fit(features)  # a constant gene becomes 0
    for candidate in _logistic(scaler.transform(features), labels, seed):
        yield candidate._replace(predict=partial(_scaled, scaler, candidate.predict))


def _scaled(scaler: StandardScaler, predict: Callable[[Matrix], np.ndarray], features: np.ndarray) -> np.ndarray:
    return predict(scaler.transform(features))


def _neighbours(features: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Candidate]:
    pca = PCA(min(COMPONENTS, *features.shape), random_state=seed)
    with np.errstate(invalid="ignore"):  # where no gene varies, the shares of the variance are 0 / 0
        coordinates = pca.fit_transform(features)
    for k in sorted({min(k, len(labels)) for k in NEIGHBOURS}, reverse=True):
        model = make_pipeline(pca, KNeighborsClassifier(k).fit(coordinates, labels))
        yield Candidate({"neighbours": k}, partial(_neighbour_shares, model), pca.components_.size)


def _neighbour_shares(model: Pipeline, features: np.ndarray) -> np.ndarray:
    """Return the class shares of k neighbours and one more, which belongs to all classes alike.

    Laplace's correction: no class has the probability 0, whose log loss would be infinite, and none overtakes another.
    """
    shares, k = model.predict_proba(features), model[-1].n_neighbors
    return (k * shares + 1 / shares.shape[1]) / (k + 1)


def _ridge(features: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[Candidate]:
    targets = np.eye(labels.max() + 1)[labels]
    for alpha in ALPHAS:
        model = make_pipeline(StandardScaler(), Ridge(alpha, solver="svd")).fit(features, targets)
        fitted = model[-1].coef_.size + model[-1].intercept_.size
        for temperature in TEMPERATURES:
            parameters = {"alpha": alpha, "temperature": temperature}
            yield Candidate(parameters, partial(_tempered, model, temperature), fitted)


def _tempered(model: Pipeline, temperature: float, features: np.ndarray) -> np.ndarray:
    """Return softmax(values / temperature) of the values that were regressed on 1 for the true class, 0 for the others.

    A ridge classifier has no probabilities of its own. The temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2)
    is a parameter of the grid: it does not change the most probable class, so the log loss on the validation cells
    decides between the temperatures of one model.
    """
    return softmax(model.predict(features) / temperature, axis=1)


def _device(settings: Study) -> dict[str, str | float]:
    """Return the device, as the cost of a run says it, and the peaks of memory: embeddings are computed by torch."""
    device = torch.device("cpu")
    if settings.strategy == "frozen_embedding_ridge":
        device = hardware.device_of(settings)
        name = training.device_name(device, bf16=hardware.trains_in_bf16(settings))
    else:
        processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        name = f"{processor}, {torch.get_num_threads()} threads, fp64"
    return {"device": name, **hardware.peak_memory(device)}


_METHODS = MappingProxyType(
    {
        "majority": (_nothing, _majority),
        "logistic_counts": (variable_genes, _standardised_logistic),
        "logistic_ranks": (rank_features, _logistic),
        "knn_pca": (variable_genes, _neighbours),
        "frozen_embedding_ridge": (_embeddings, _ridge),
    }
)
