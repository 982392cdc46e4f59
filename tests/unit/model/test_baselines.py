"""Baselines on made-up cells: known answers, independent formulas, and nothing learnt from test cells."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.base import clone
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from transformers import BertConfig, BertForMaskedLM

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.cells import make
from tuneformer.data import simulate_truth
from tuneformer.evaluate.scores import score
from tuneformer.keys import CEILING
from tuneformer.model import baselines
from tuneformer.model.classifier import build
from tuneformer.study import BASELINES as ALL
from tuneformer.study import load_study
from tuneformer.tokens.encode import Tokens, encode
from tuneformer.tokens.vocabulary import Vocabulary

CLASSES = ["b", "c", "a"]
N_GENES = 30
SIZES = {"train": 90, "validation": 30, "test": 150}
SPLIT = np.repeat(list(SIZES), list(SIZES.values()))
BASELINES = tuple(name for name in ALL if name != CEILING)  # the ceiling is for demo cells
FITTED = [name for name in BASELINES if name != "majority"]


def shuffled(rng, labels):
    """The same labels for other cells, within each part of the split."""
    for part in SIZES:
        labels[part == SPLIT] = rng.permutation(labels[part == SPLIT])
    return labels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint, 32 wide, of 30 genes, with <cls> and <eos>."""
    folder = tmp_path_factory.mktemp("checkpoint")
    genes = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(N_GENES)]})
    genes["token_id"] = np.arange(4, N_GENES + 4, dtype=np.int32)
    genes["median"] = np.linspace(1, 2, N_GENES)
    Vocabulary(genes=genes, specials={"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}, aliases={}).write(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(7)
    model = BertForMaskedLM(BertConfig(vocab_size=N_GENES + 4, max_position_embeddings=24, **sizes))
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight *= 10  # which genes a cell has outweighs where they are
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings_of(checkpoint):
    """Settings of a run on the checkpoint, with the strategy and other changes."""

    def settings(strategy, **changes):
        fixed = {"strategy": strategy, "checkpoint": str(checkpoint), "threads": 1, "device": "cpu"}
        return load_study("tiny").model_copy(update=fixed | changes)

    return settings


@pytest.fixture(scope="module")
def make_run(checkpoint):
    """Three classes alike in size; the class of a cell has `fold` times the counts in 5 genes of its own."""

    def make(*, fold=100.0, change=None, labels=None, kept=slice(None)):
        rng = np.random.default_rng(0)
        number = np.concatenate([np.arange(size) % 3 for size in SIZES.values()])
        mean = np.full((len(number), N_GENES), 0.2)
        for place in range(3):
            mean[number == place, 5 * place : 5 * place + 5] *= fold
        counts = rng.poisson(mean * rng.lognormal(0, 0.4, (len(number), 1)))
        counts[:, -1] = 1
        if change is not None:
            change(counts)
        names = np.array(CLASSES)[number]
        names = names if labels is None else labels(rng, names)
        obs = pd.DataFrame({"label": names, "split": SPLIT}, index=[f"cell{n}" for n in range(len(number))])
        vocabulary = Vocabulary.read(checkpoint)
        var = pd.DataFrame({"ensembl_id": vocabulary.genes["ensembl_id"].to_numpy()})
        var.index = var["ensembl_id"].to_list()
        cells = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)[kept].copy()
        columns = {"label": cells.obs["label"], "split": cells.obs["split"]}
        dataset = encode(cells, vocabulary, max_length=20, columns=columns)
        return SimpleNamespace(cells=cells, tokens=Tokens(dataset, vocabulary, CLASSES, "made up"))

    return make


@pytest.fixture(scope="module")
def straight(settings_of, make_run):
    """The outcomes of the baselines on classes that overlap."""
    return {name: baselines.fit(settings_of(name), make_run(fold=8)) for name in BASELINES}


def timeless(outcome):
    return outcome.history.drop(columns="seconds")


def accuracy(outcome):
    return (outcome.predictions["label"] == outcome.predictions["predicted"]).mean()


def estimators(name, shape=(90, 8)):
    """The model of every point of the grid of a baseline, by its parameters."""
    from sklearn.model_selection import ParameterGrid

    _, make_model, grid = baselines.BASELINES[name]
    for point in ParameterGrid(grid):
        yield tuple(point.values()), clone(make_model(shape, 0)).set_params(**point)


def test_each_baseline_of_a_study_can_be_fitted():
    assert tuple(baselines.BASELINES) == ALL


def test_the_ceiling_is_what_the_simulator_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = load_study("demo", task="additive", arm="bayes", demo_cells=1500, train_cells=100)
    prepared = make.prepare(settings)
    outcome = baselines.fit(settings, prepared)
    cells = outcome.predictions["cell"].tolist()
    known = simulate_truth.class_probabilities(settings, cells, outcome.classes)
    np.testing.assert_array_equal(outcome.probabilities, known)
    assert accuracy(outcome) > 0.75  # 0.89 of 4,800 cells of demo_seed 99; here some 250


def test_majority_gives_the_class_shares_of_the_training_cells(settings_of, make_run):
    labels = ["a"] * 60 + ["b"] * 20 + ["c"] * 10 + CLASSES * 60
    outcome = baselines.fit(settings_of("majority"), make_run(labels=lambda rng, names: np.array(labels)))
    assert np.array_equal(outcome.probabilities, np.tile([20 / 90, 10 / 90, 60 / 90], (150, 1)))  # order b, c, a
    assert len(outcome.history) == 1
    assert accuracy(outcome) == 1 / 3


@pytest.mark.parametrize("name", FITTED)
def test_classes_that_differ_are_told_apart(name, settings_of, make_run):
    assert accuracy(baselines.fit(settings_of(name), make_run())) == 1


@pytest.mark.parametrize("name", FITTED)
def test_permuted_labels_give_chance(name, settings_of, make_run):
    """Right by chance is 1 of 3; the bounds hold 99.99 % of the binomial numbers of cells that are right."""
    outcome = baselines.fit(settings_of(name), make_run(labels=shuffled))
    low, high = stats.binom(150, 1 / 3).ppf([0.5e-4, 1 - 0.5e-4]) / 150
    assert low <= accuracy(outcome) <= high


@pytest.mark.parametrize("name", BASELINES)
def test_the_outcome_reads_like_that_of_a_fine_tuning_run(name, settings_of, make_run, straight):
    outcome, given = straight[name], make_run(fold=8)
    assert (outcome.n_train, outcome.n_validation, outcome.n_test) == tuple(SIZES.values())
    assert (outcome.status, outcome.reason, outcome.classes, outcome.model) == ("ok", "", CLASSES, None)
    assert list(outcome.predictions) == ["cell", "label", "predicted", *(f"probability:{one}" for one in CLASSES)]
    assert list(outcome.predictions["cell"]) == list(given.cells.obs_names[120:])
    np.testing.assert_allclose(outcome.probabilities.sum(axis=1), 1, rtol=1e-12)
    assert list(outcome.history["epoch"]) == list(range(1, len(outcome.history) + 1))
    assert outcome.cost["training_cells"] == 90
    assert outcome.cost["trainable_parameters"] > 0
    assert "1 threads" in outcome.cost["device"]


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_run_gives_the_same_numbers(name, settings_of, make_run, straight):
    again = baselines.fit(settings_of(name), make_run(fold=8))
    pd.testing.assert_frame_equal(timeless(straight[name]), timeless(again), check_exact=True)
    pd.testing.assert_frame_equal(straight[name].predictions, again.predictions, check_exact=True)


@pytest.mark.parametrize("name", BASELINES)
def test_test_cells_change_nothing_but_their_own_predictions(name, settings_of, make_run, straight):
    """Other labels of the test cells: the same predictions. Other counts of them: the same model, by its log."""
    settings, expected = settings_of(name), straight[name]

    def relabel(rng, names):
        names[120:] = np.roll(names[120:], 1)
        return names

    relabelled = baselines.fit(settings, make_run(fold=8, labels=relabel))
    assert not (expected.predictions["label"] == relabelled.predictions["label"]).any()
    assert np.array_equal(expected.probabilities, relabelled.probabilities)
    assert expected.best_epoch == relabelled.best_epoch

    def recount(counts):
        counts[120:] = np.random.default_rng(1).poisson(40, counts[120:].shape)

    recounted = baselines.fit(settings, make_run(fold=8, change=recount))
    pd.testing.assert_frame_equal(timeless(expected), timeless(recounted), check_exact=True)


@pytest.mark.parametrize("name", FITTED)
def test_many_validation_cells_choose_and_do_not_train(name, settings_of, make_run, monkeypatch):
    """Here 30 are many."""

    def spoil(rng, names):
        names[90:120] = np.roll(names[90:120], 1)
        return names

    monkeypatch.setattr(baselines.fitting, "FEWEST_CHOOSING", 30)
    outcome = baselines.fit(settings_of(name), make_run(fold=8))
    assert outcome.chosen_by == "validation loss"
    spoilt = baselines.fit(settings_of(name), make_run(fold=8, labels=spoil))
    assert np.array_equal(outcome.history["train_loss"], spoilt.history["train_loss"])
    assert (outcome.history["validation_loss"] != spoilt.history["validation_loss"]).any()


@pytest.mark.parametrize("name", FITTED)
def test_the_chosen_point_has_the_lowest_loss_and_is_the_first_of_several(name, straight):
    history = straight[name].history
    assert straight[name].chosen_by == "cross-validated loss"
    assert (
        straight[name].best_epoch
        == history["epoch"][history["validation_loss"] == history["validation_loss"].min()].iloc[0]
    )


def test_few_validation_cells_are_cross_validated_with_the_training_cells():
    """Each cell judges once, in folds with every class; never more folds than cells of the smallest class."""
    for labels, n_folds in ((np.arange(120) % 3, 5), (np.repeat([0, 1], [20, 3]), 3)):
        parts = baselines.parts_of(labels, len(labels) - 1)
        judging = [judged for _, judged in parts]
        assert len(parts) == n_folds
        assert np.array_equal(np.sort(np.concatenate(judging)), np.arange(len(labels)))
        assert all(set(labels[judged]) == set(labels) for judged in judging)
    assert all(not set(fitted) & set(judged) for fitted, judged in parts)


def test_what_is_predicted_comes_from_the_chosen_point(settings_of, make_run, straight, monkeypatch):
    """Logistic regression with the C of the best row, fitted here to the training cells alone."""
    given, outcome = make_run(fold=8), straight["logistic_counts"]
    monkeypatch.setattr(baselines.fitting, "FEWEST_CHOOSING", 30)
    by_validation = baselines.fit(settings_of("logistic_counts"), given)
    features = baselines.variable_genes(settings_of("logistic_counts"), given, np.arange(90))
    strength = outcome.history.set_index("epoch")["C"][outcome.best_epoch]
    model = dict(estimators("logistic_counts"))[(strength,)].fit(features(np.arange(90)), np.arange(90) % 3)
    np.testing.assert_allclose(outcome.probabilities, model.predict_proba(features(np.arange(120, 270))), rtol=1e-6)
    loss = score(given.cells.obs["label"][90:120], model.predict_proba(features(np.arange(90, 120))), CLASSES)[
        "log_loss"
    ]
    assert by_validation.history.set_index("C")["validation_loss"][strength] == pytest.approx(loss)


def test_variable_genes_are_those_of_the_training_cells(settings_of, make_run, monkeypatch):
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 4)

    def change(counts):
        counts[90:, 20] = np.arange(len(counts) - 90) * 50  # varies, but not in the training cells

    given, train = make_run(change=change), np.arange(90)
    found = baselines.variable_genes(settings_of("knn_pca"), given, train)(np.array([3, 200]))
    counts = given.cells.X.toarray()
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 10_000)
    chosen = sorted(np.argsort(values[train].var(axis=0))[-4:])
    assert 20 not in chosen
    np.testing.assert_allclose(found, values[[3, 200]][:, chosen], rtol=1e-6)


def test_rank_features_are_one_minus_place_by_length(settings_of, make_run):
    def change(counts):
        counts[:90, 7] = 0

    given, rows = make_run(change=change), np.array([100, 5])
    found = baselines.rank_features(settings_of("logistic_ranks"), given, np.arange(90))(rows).toarray()
    assert found.shape == (2, N_GENES - 1)  # gene 7 is in no training cell; <cls> and <eos> are no genes
    for row, cell in enumerate(rows):
        genes = given.tokens.dataset[int(cell)]["input_ids"][1:-1]
        expected = dict.fromkeys(range(4, N_GENES + 4), 0.0) | {g: 1 - r / len(genes) for r, g in enumerate(genes)}
        del expected[7 + 4]
        np.testing.assert_allclose(found[row], list(expected.values()))


def test_logistic_regression_is_at_the_optimum_of_the_penalised_likelihood(settings_of, make_run):
    """Where the gradient of |w|^2 / 2 + C sum(log loss) is zero, w = C sum((y - p) x), and the mean of y - p is 0."""
    features = baselines.variable_genes(settings_of("logistic_counts"), make_run(fold=5), np.arange(90))(np.arange(90))
    labels, scaled = np.arange(90) % 3, StandardScaler().fit_transform(features)
    for (strength,), model in list(estimators("logistic_counts"))[:5]:
        predicted = model.fit(features, labels).predict_proba(features)
        residual = np.eye(3)[labels] - predicted
        np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-4)
        logits, expected = np.log(predicted), scaled @ (strength * residual.T @ scaled).T
        centred = [values - values.mean(axis=1, keepdims=True) for values in (logits, expected)]
        centred = [values - values.mean(axis=0) for values in centred]  # without the intercepts
        np.testing.assert_allclose(*centred, atol=0.01 * np.abs(centred[1]).max())
        assert baselines._n_coefficients(model) == 3 * N_GENES + 3


def test_neighbours_share_with_one_that_belongs_to_all_classes():
    """With as many components as features, distances are those between the cells themselves."""
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(90, 8)), rng.normal(size=(40, 8)), np.arange(90) % 3
    models = {k: model.fit(train, labels) for (k,), model in estimators("knn_pca")}
    near = np.argsort(((test[:, None] - train) ** 2).sum(axis=2), axis=1)[:, :5]
    counts = np.stack([(labels[near] == place).sum(axis=1) for place in range(3)], axis=1)
    np.testing.assert_allclose(models[5].predict_proba(test), (counts + 1 / 3) / 6)
    np.testing.assert_allclose(models[100].predict_proba(test), 1 / 3)  # 90 training cells have no 100 near ones


def test_ridge_on_classes_is_the_closed_form_and_decides_like_a_ridge_classifier():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(2, 3, (60, 4)), np.arange(60) % 3
    features[:, 0] += labels
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    targets = np.eye(3)[labels]
    for (alpha, temperature), model in estimators("frozen_embedding_ridge"):
        found = model.fit(features, labels).predict_proba(features)
        weights = np.linalg.solve(scaled.T @ scaled + alpha * np.eye(4), scaled.T @ (targets - targets.mean(axis=0)))
        odds = np.exp((scaled @ weights + targets.mean(axis=0)) / temperature)
        np.testing.assert_allclose(found, odds / odds.sum(axis=1, keepdims=True))
        decided = RidgeClassifier(alpha=alpha).fit(scaled, labels).predict(scaled)
        assert np.array_equal(found.argmax(axis=1), decided)


def test_the_temperature_is_that_of_the_lowest_validation_loss(straight):
    outcome = straight["frozen_embedding_ridge"]
    kept = outcome.history.set_index("epoch").loc[outcome.best_epoch]
    same = outcome.history[outcome.history["alpha"] == kept["alpha"]]
    assert np.ptp(same["validation_macro_f1"]) < 1e-12
    assert kept["validation_loss"] == same["validation_loss"].min()
    assert same["validation_loss"].nunique() == len(baselines.TEMPERATURES)


def test_embeddings_are_those_of_one_cell_at_a_time(settings_of, make_run):
    settings, given = settings_of("frozen_embedding_ridge", precision="fp32"), make_run()
    rows = np.array([150, 3, 40, *range(160, 270)])
    found = baselines.cell_embeddings(settings, given, np.arange(90))(rows)
    assert len({len(given.tokens.dataset[int(row)]["input_ids"]) for row in rows}) > 1
    full = settings.model_copy(update={"strategy": "full"})
    bert = build(full, given.tokens.vocabulary, given.tokens.classes).bert.eval()
    assert found.shape == (113, 32)
    for embedding, row in zip(found, rows, strict=True):
        ids = torch.tensor([given.tokens.dataset[int(row)]["input_ids"]])
        with torch.no_grad():
            states = bert(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        np.testing.assert_allclose(embedding, states[0].mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_one_training_cell_of_each_class_is_enough(name, settings_of, make_run):
    outcome = baselines.fit(settings_of(name), make_run(kept=[0, 1, 2, 90, 91, 92, *range(120, 270)]))
    assert (outcome.n_train, outcome.n_validation) == (3, 3)
    assert np.isfinite(outcome.history.to_numpy(float)).all()
    found = score(outcome.predictions["label"], outcome.probabilities, CLASSES)
    assert np.isfinite([found["log_loss"], found["macro_auroc"]]).all()


@pytest.mark.parametrize("name", BASELINES)
def test_a_class_with_one_training_cell_has_a_probability(name, settings_of, make_run):
    def rare(rng, names):
        names[2:90] = np.array(["b", "c"])[np.arange(88) % 2]
        names[:2] = ["a", "b"]
        return names

    assert (baselines.fit(settings_of(name), make_run(labels=rare)).probabilities > 0).all()


@pytest.mark.parametrize("name", BASELINES)
def test_genes_that_never_vary_and_cells_without_counts_in_variable_genes(name, settings_of, make_run, monkeypatch):
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 20)

    def empty(counts):
        counts[[0, 95, 130]] = 0
        counts[[0, 95, 130], -1] = 1

    def constant(counts):
        counts[:] = 2

    for change in (empty, constant):
        outcome = baselines.fit(settings_of(name), make_run(change=change))
        assert np.isfinite(outcome.probabilities).all()
    if name != "majority":  # cells that are all alike get the same probabilities
        np.testing.assert_allclose(outcome.probabilities, outcome.probabilities[:1].repeat(150, axis=0), atol=1e-6)


def test_a_class_without_cells_and_tokens_without_counts_are_refused(settings_of, make_run):
    with pytest.raises(UserError, match="Class 'b' has no test cells"):
        baselines.fit(settings_of("majority"), make_run(kept=slice(120)))
    without = make_run()
    without.cells = None
    with pytest.raises(UserError, match="logistic_counts reads counts, and this data set has tokens only; leave the"):
        baselines.fit(settings_of("logistic_counts"), without)
    assert accuracy(baselines.fit(settings_of("logistic_ranks"), without)) == 1
