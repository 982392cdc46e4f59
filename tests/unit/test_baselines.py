"""Baselines on made-up cells: known answers, independent formulas, and nothing learnt from test cells."""

import dataclasses
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from transformers import BertConfig, BertForMaskedLM

from tuneformer.evaluate import baselines
from tuneformer.evaluate.metrics import score_run
from tuneformer.finetune import checkpoints, training
from tuneformer.study import paths, run
from tuneformer.study.params import ParameterError, load_study
from tuneformer.tokens.tokenizer import Tokens, tokenize
from tuneformer.tokens.vocabulary import Vocabulary

CLASSES = ["b", "c", "a"]
N_GENES = 30
SIZES = {"train": 90, "validation": 30, "test": 150}
FITTED = [name for name in baselines.BASELINES if name != "majority"]


class Run(NamedTuple):
    """Cells of a task, and their tokens."""

    cells: ad.AnnData
    tokens: Tokens


def shuffled(rng, labels):
    """The same labels for other cells, within each part of the split."""
    split = np.repeat(list(SIZES), list(SIZES.values()))
    for part in SIZES:
        labels[split == part] = rng.permutation(labels[split == part])
    return labels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint, 32 wide, of 30 genes, with <cls> and <eos>."""
    folder = tmp_path_factory.mktemp("checkpoint")
    genes = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(N_GENES)]})
    genes["token_id"] = np.arange(4, N_GENES + 4, dtype=np.int32)
    genes["median"] = np.linspace(1, 2, N_GENES)
    specials = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    Vocabulary(genes=genes, specials=specials, aliases={}).write(folder)
    config = BertConfig(
        vocab_size=N_GENES + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(7)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight *= 10  # which genes a cell has outweighs where they stand
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings_of(checkpoint):
    """Settings of a run on the checkpoint, with the strategy and other changes."""

    def settings(strategy, **changes):
        fixed = {"checkpoint": str(checkpoint), "train_cells": None, "threads": 1, "device": "cpu"}
        return load_study("tiny", strategy=strategy, **(fixed | changes))

    return settings


@pytest.fixture(scope="module")
def make_run(checkpoint):
    """Three classes alike in size; the class of a cell has `fold` times the counts in 5 genes of its own."""

    def make(*, fold=100.0, change=None, labels=None):
        rng = np.random.default_rng(0)
        number = np.concatenate([np.arange(size) % 3 for size in SIZES.values()])
        mean = np.full((len(number), N_GENES), 0.2)
        for place in range(3):
            mean[number == place, 5 * place : 5 * place + 5] *= fold
        counts = rng.poisson(mean * rng.lognormal(0, 0.4, (len(number), 1)))
        counts[:, -1] = 1
        if change is not None:
            change(counts)
        split = np.repeat(list(SIZES), list(SIZES.values()))
        names = np.array(CLASSES)[number]
        names = names if labels is None else labels(rng, names)
        obs = pd.DataFrame({"label": names, "split": split}, index=[f"cell{n}" for n in range(len(number))])
        vocabulary = Vocabulary.read(checkpoint)
        var = pd.DataFrame({"ensembl_id": vocabulary.genes["ensembl_id"].to_numpy()})
        cells = ad.AnnData(
            sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var.set_index("ensembl_id", drop=False)
        )
        dataset = tokenize(cells, vocabulary, max_length=20)
        return Run(cells, Tokens(dataset, vocabulary, CLASSES, {"fingerprint": "made up"}))

    return make


@pytest.fixture(scope="module")
def straight(settings_of, make_run):
    """The outcomes of the baselines on classes that overlap."""
    return {name: baselines.fit_baseline(settings_of(name), *make_run(fold=8)) for name in baselines.BASELINES}


def timeless(outcome):
    return outcome.history.drop(columns="seconds")


def accuracy(outcome):
    return score_run(outcome).set_index("metric")["value"]["accuracy"]


def test_each_baseline_has_a_method():
    assert tuple(baselines._METHODS) == baselines.BASELINES


def test_majority_gives_the_class_shares_of_the_training_cells(settings_of, make_run):
    labels = ["a"] * 60 + ["b"] * 20 + ["c"] * 10 + CLASSES * 60
    outcome = baselines.fit_baseline(settings_of("majority"), *make_run(labels=lambda rng, names: np.array(labels)))
    assert np.array_equal(outcome.probabilities, np.tile([20 / 90, 10 / 90, 60 / 90], (150, 1)))  # order b, c, a
    assert len(outcome.history) == 1
    assert accuracy(outcome) == 1 / 3


@pytest.mark.parametrize("name", FITTED)
def test_classes_that_differ_are_told_apart(name, settings_of, make_run):
    outcome = baselines.fit_baseline(settings_of(name), *make_run())
    assert accuracy(outcome) == 1


@pytest.mark.parametrize("name", FITTED)
def test_permuted_labels_give_chance(name, settings_of, make_run):
    """Right by chance is 1 of 3; the bounds hold 99.99 % of the binomial numbers of cells that are right."""
    outcome = baselines.fit_baseline(settings_of(name), *make_run(labels=shuffled))
    low, high = stats.binom(150, 1 / 3).ppf([0.5e-4, 1 - 0.5e-4]) / 150
    assert low <= accuracy(outcome) <= high


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_the_outcome_reads_like_that_of_a_fine_tuning_run(name, settings_of, make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = settings_of(name, train_cells=45)
    given = make_run(fold=8)
    outcome = baselines.fit_baseline(settings, *given)
    drawn = training.draw_cells(settings, given.tokens)
    assert (outcome.n_train, outcome.n_validation, outcome.n_test) == tuple(map(len, drawn.values())) == (45, 6, 150)
    assert (outcome.status, outcome.reason, outcome.classes) == ("ok", "", CLASSES)
    assert outcome.fingerprint == run.training_fingerprint(settings, "made up")
    assert list(outcome.predictions) == ["cell", "label", *(f"probability:{one}" for one in CLASSES)]
    assert list(outcome.predictions["cell"]) == list(given.cells.obs_names[120:])
    np.testing.assert_allclose(outcome.probabilities.sum(axis=1), 1, rtol=1e-12)
    assert list(outcome.history["epoch"]) == list(range(1, len(outcome.history) + 1))
    assert outcome.cost["training_cells"] == 45
    assert outcome.cost["trainable_parameters"] > 0
    assert "1 threads" in outcome.cost["device"]
    training.write_outcome(settings, outcome)
    loaded = training.read_outcome(settings, outcome.fingerprint)
    pd.testing.assert_frame_equal(loaded.history, outcome.history)
    pd.testing.assert_frame_equal(loaded.predictions, outcome.predictions)
    assert loaded.cost == outcome.cost


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_the_same_run_in_any_order_of_the_cells_gives_the_same_numbers(name, settings_of, make_run):
    settings = settings_of(name, train_cells=45)
    cells, tokens = make_run(fold=8)
    first = baselines.fit_baseline(settings, cells, tokens)
    cells.obs = cells.obs.drop(columns=["label", "split"])  # both are read from the tokens
    again = baselines.fit_baseline(settings, cells[::-1], tokens)
    pd.testing.assert_frame_equal(timeless(first), timeless(again), check_exact=True)
    pd.testing.assert_frame_equal(first.predictions, again.predictions, check_exact=True)
    if name != "majority":
        other = baselines.fit_baseline(settings_of(name, train_cells=45, seed=1), cells, tokens)
        assert not np.allclose(first.probabilities, other.probabilities)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_test_cells_change_nothing_but_their_own_predictions(name, settings_of, make_run, straight):
    """Other labels of the test cells: the same predictions. Other counts of them: the same model, by its log."""
    settings, expected = settings_of(name), straight[name]

    def relabel(rng, names):
        names[120:] = np.roll(names[120:], 1)
        return names

    relabelled = baselines.fit_baseline(settings, *make_run(fold=8, labels=relabel))
    assert not (expected.predictions["label"] == relabelled.predictions["label"]).any()
    assert np.array_equal(expected.probabilities, relabelled.probabilities)
    assert expected.best_epoch == relabelled.best_epoch

    def recount(counts):
        counts[120:] = np.random.default_rng(1).poisson(40, counts[120:].shape)

    recounted = baselines.fit_baseline(settings, *make_run(fold=8, change=recount))
    pd.testing.assert_frame_equal(timeless(expected), timeless(recounted), check_exact=True)


@pytest.mark.parametrize("name", FITTED)
def test_validation_cells_choose_and_do_not_train(name, settings_of, make_run, straight):
    def spoil(rng, names):
        names[90:120] = np.roll(names[90:120], 1)
        return names

    spoilt = baselines.fit_baseline(settings_of(name), *make_run(fold=8, labels=spoil))
    assert np.array_equal(straight[name].history["train_loss"], spoilt.history["train_loss"])
    assert (straight[name].history["validation_macro_f1"] != spoilt.history["validation_macro_f1"]).any()


def test_the_highest_macro_f1_then_the_lowest_loss_then_the_first_is_chosen():
    labels = np.array([0, 1, 1])

    def points(*rows):
        for number, (right, sure) in enumerate(rows):
            guess = np.where(np.arange(3) < right, labels, 1 - labels)
            probabilities = np.where(guess[:, None] == [0, 1], sure, 1 - sure)
            yield baselines.Candidate({"n": number}, lambda _, given=probabilities: given, 1)

    known = dict.fromkeys(["train", "validation"], (np.zeros((3, 1)), labels))
    history, best, chosen = baselines._choose(points((1, 0.9), (2, 0.6), (2, 0.7), (2, 0.7), (1, 0.9)), known)
    assert (best, chosen.parameters) == (3, {"n": 2})
    assert history["validation_accuracy"].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3])
    assert history["validation_loss"][2] == pytest.approx(-(2 * np.log(0.7) + np.log(0.3)) / 3)
    # two of three right: F1 of class 0 and of class 1 are both 2 / 3
    assert history["validation_macro_f1"][2] == pytest.approx(2 / 3)


def test_variable_genes_are_those_of_the_training_cells(settings_of, make_run, monkeypatch):
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 4)

    def change(counts):
        counts[90:, 20] = np.arange(len(counts) - 90) * 50  # varies, but not in the training cells

    cells, tokens = make_run(change=change)
    train = np.arange(90)
    found = baselines.variable_genes(settings_of("knn_pca"), cells, tokens, train)(np.array([3, 200]))
    counts = cells.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 10_000)
    chosen = sorted(np.argsort(values[train].var(axis=0))[-4:])
    assert 20 not in chosen
    np.testing.assert_allclose(found, values[[3, 200]][:, chosen], rtol=1e-6)


def test_rank_features_are_one_minus_place_by_length(settings_of, make_run):
    def change(counts):
        counts[:90, 7] = 0

    cells, tokens = make_run(change=change)
    rows = np.array([100, 5])
    found = baselines.rank_features(settings_of("logistic_ranks"), cells, tokens, np.arange(90))(rows).toarray()
    assert found.shape == (2, N_GENES - 1)  # gene 7 is in no training cell; <cls> and <eos> are no genes
    for row, cell in enumerate(rows):
        genes = tokens.dataset[int(cell)]["input_ids"][1:-1]
        expected = dict.fromkeys(range(4, N_GENES + 4), 0.0) | {g: 1 - r / len(genes) for r, g in enumerate(genes)}
        del expected[7 + 4]
        np.testing.assert_allclose(found[row], list(expected.values()))


def test_logistic_regression_is_at_the_optimum_of_the_penalised_likelihood(settings_of, make_run):
    """Where the gradient of |w|^2 / 2 + C sum(log loss) is zero, w = C sum((y - p) x), and the mean of y - p is 0."""
    cells, tokens = make_run(fold=5)
    features = baselines.variable_genes(settings_of("logistic_counts"), cells, tokens, np.arange(90))(np.arange(90))
    labels = np.arange(90) % 3
    scaled = StandardScaler().fit_transform(features)
    for candidate in list(baselines._standardised_logistic(features, labels, 0))[:5]:
        residual = np.eye(3)[labels] - candidate.predict(features)
        np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-4)
        weights = candidate.parameters["C"] * residual.T @ scaled
        logits = np.log(candidate.predict(features))
        expected = scaled @ weights.T
        centred = [values - values.mean(axis=1, keepdims=True) for values in (logits, expected)]
        centred = [values - values.mean(axis=0) for values in centred]  # without the intercepts
        np.testing.assert_allclose(*centred, atol=0.01 * np.abs(centred[1]).max())
        assert candidate.n_coefficients == 3 * N_GENES + 3


def test_neighbours_share_with_one_that_belongs_to_all_classes():
    """With as many components as features, distances are those between the cells themselves."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(90, 8)), rng.normal(size=(40, 8))
    labels = np.arange(90) % 3
    candidates = {one.parameters["neighbours"]: one for one in baselines._neighbours(train, labels, 0)}
    assert list(candidates) == [90, 50, 20, 10, 5, 3]  # 90 training cells have no 100 near ones
    near = np.argsort(((test[:, None] - train) ** 2).sum(axis=2), axis=1)[:, :5]
    counts = np.stack([(labels[near] == place).sum(axis=1) for place in range(3)], axis=1)
    np.testing.assert_allclose(candidates[5].predict(test), (counts + 1 / 3) / 6)
    np.testing.assert_allclose(candidates[90].predict(test), 1 / 3)


def test_ridge_on_classes_is_the_closed_form_and_decides_like_a_ridge_classifier():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(2, 3, (60, 4)), np.arange(60) % 3
    features[:, 0] += labels
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    targets = np.eye(3)[labels]
    candidates = list(baselines._ridge(features, labels, 0))
    assert len(candidates) == len(baselines.ALPHAS) * len(baselines.TEMPERATURES)
    for candidate in candidates:
        alpha, temperature = candidate.parameters.values()
        weights = np.linalg.solve(scaled.T @ scaled + alpha * np.eye(4), scaled.T @ (targets - targets.mean(axis=0)))
        odds = np.exp((scaled @ weights + targets.mean(axis=0)) / temperature)
        np.testing.assert_allclose(candidate.predict(features), odds / odds.sum(axis=1, keepdims=True))
        decided = RidgeClassifier(alpha=alpha).fit(scaled, labels).predict(scaled)
        assert np.array_equal(candidate.predict(features).argmax(axis=1), decided)


def test_the_temperature_is_that_of_the_lowest_validation_loss(straight):
    outcome = straight["frozen_embedding_ridge"]
    kept = outcome.history.set_index("epoch").loc[outcome.best_epoch]
    same = outcome.history[outcome.history["alpha"] == kept["alpha"]]
    assert same["validation_macro_f1"].nunique() == 1
    assert kept["validation_loss"] == same["validation_loss"].min()
    assert same["validation_loss"].nunique() == len(baselines.TEMPERATURES)


def test_embeddings_are_those_of_one_cell_at_a_time(settings_of, make_run, monkeypatch):
    monkeypatch.setattr(training, "PREDICTION_BATCH", 7)
    settings, (_, tokens) = settings_of("frozen_embedding_ridge", precision="fp32"), make_run()
    rows = np.array([150, 3, 40, *range(200, 230)])
    found = baselines.cell_embeddings(settings, tokens, rows)
    assert len({len(tokens.dataset[int(row)]["input_ids"]) for row in rows}) > 1
    bert = checkpoints.load_classifier(settings, tokens.vocabulary, tokens.classes).bert.eval()
    assert found.shape == (33, 32)
    for embedding, row in zip(found, rows, strict=True):
        ids = torch.tensor([tokens.dataset[int(row)]["input_ids"]])
        with torch.no_grad():
            states = bert(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        np.testing.assert_allclose(embedding, states[0].mean(dim=0), atol=1e-5)
    assert np.array_equal(found, baselines.cell_embeddings(settings, tokens, rows))


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_one_training_cell_of_each_class_is_enough(name, settings_of, make_run):
    outcome = baselines.fit_baseline(settings_of(name, train_cells=3), *make_run())
    assert (outcome.n_train, outcome.n_validation) == (3, 3)
    assert np.isfinite(outcome.history.to_numpy()).all()
    assert np.isfinite(score_run(outcome).set_index("metric")["value"][["log_loss", "macro_auroc"]]).all()


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_a_class_with_one_training_cell_has_a_probability(name, settings_of, make_run):
    def rare(rng, names):
        names[2:90] = np.array(["b", "c"])[np.arange(88) % 2]
        names[:2] = ["a", "b"]
        return names

    outcome = baselines.fit_baseline(settings_of(name), *make_run(labels=rare))
    assert (outcome.probabilities > 0).all()


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_genes_that_never_vary_and_cells_without_counts_in_variable_genes(name, settings_of, make_run, monkeypatch):
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 20)

    def empty(counts):
        counts[[0, 95, 130]] = 0
        counts[[0, 95, 130], -1] = 1

    def constant(counts):
        counts[:] = 2

    for change in (empty, constant):
        outcome = baselines.fit_baseline(settings_of(name), *make_run(change=change))
        assert np.isfinite(outcome.probabilities).all()
    if name != "majority":  # cells that are all alike get the shares of the classes, but for the nearest neighbours
        np.testing.assert_allclose(outcome.probabilities, outcome.probabilities[:1].repeat(150, axis=0), atol=1e-6)


def test_cells_that_are_not_there_and_strategies_that_are_no_baseline_are_refused(settings_of, make_run):
    cells, tokens = make_run()
    with pytest.raises(training.TrainingDataError, match=r"2 of the 270 cells .* such as cell268; give the cells that"):
        baselines.fit_baseline(settings_of("logistic_counts"), cells[:-2], tokens)
    with pytest.raises(ParameterError, match="strategy: full is no baseline; set it to one of majority, logistic_"):
        baselines.fit_baseline(settings_of("full"), cells, tokens)
    without = dataclasses.replace(tokens, dataset=tokens.dataset.select(range(120)))
    with pytest.raises(training.TrainingDataError, match="Class 'b' has no test cells"):
        baselines.fit_baseline(settings_of("majority"), cells, without)
