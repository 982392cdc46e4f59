"""Classes of genes in cells, on a random checkpoint of 40 genes and 72 made-up cells."""

from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import BertForTokenClassification

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.model import gene_baselines, gene_task, genes, strategies
from tuneformer.model.classifier import build
from tuneformer.model.gene_baselines import cross_validate, pair_auc
from tuneformer.study import GENE_BASELINES, load_study
from tuneformer.tokens import encode

NAMES = [f"ENSG{number:011d}" for number in range(40)]
RARE = 12  # genes of the rarer class


@pytest.fixture
def classes(tmp_path):
    """Write a list: genes 2 to 13 are rare, 14 to 37 common, and two are in no vocabulary."""

    def write(rare=NAMES[2 : 2 + RARE], common=NAMES[2 + RARE : 38], unknown=("ENSG99", "ENSG98")):
        lines = [*(f"{name},rare" for name in rare), *(f"{name},common" for name in (*common, *unknown))]
        path = tmp_path / "genes.csv"
        path.write_text("\n".join(["ensembl_id,class", *lines, ""]))
        return str(path)

    return write


@pytest.fixture
def gene_settings(run_settings, tokens, classes, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "single_cell_tokens", lambda _: tokens)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def settings(**changes):
        changes["gene_classes"] = changes.get("gene_classes") or classes()
        fixed = {"gene_folds": 3, "gene_cells": 40, "gene_permutations": 2, "precision": "fp32"}
        if "strategy" in changes:
            fixed["arm"] = changes["strategy"]
        return run_settings(**(fixed | changes))

    return settings


# --- which genes, in which fold ---


def test_listed_genes_are_counted_and_the_unknown_named(gene_settings):
    task = gene_task.prepare_genes(gene_settings())
    assert task.classes == ["common", "rare"]
    assert task.counts.loc["common"].tolist() == [26, 24, 24]
    assert task.counts.loc["rare"].tolist() == [12, 12, 12]
    assert task.unknown == ["ENSG99", "ENSG98"]
    assert task.rare == []
    assert (task.genes["target"] == (task.genes["class"] == "rare")).all()
    assert task.genes["gene"].tolist() == NAMES[2:38]
    assert task.genes["token_id"].tolist() == list(range(4, 40))


def test_genes_in_too_few_context_cells_are_left_out_and_counted(gene_settings, tokens):
    table = tokens.dataset.to_pandas()
    task = gene_task.prepare_genes(gene_settings(gene_cells=17))
    in_context = table.iloc[task.context]["input_ids"]
    assert set(table.iloc[task.context]["split"]) == {"train"}
    assert set(table.iloc[task.other]["split"]) == {"test"}
    assert (len(task.context), len(task.other)) == (17, 12)
    n_cells = {number: sum(number + 2 in ids for ids in in_context) for number in range(2, 38)}
    left_out = [NAMES[number] for number, n in n_cells.items() if n < gene_task.FEWEST_CELLS]
    assert left_out
    assert task.rare == left_out
    kept = task.genes.set_index("gene")["context_cells"]
    assert kept.to_dict() == {NAMES[number]: n for number, n in n_cells.items() if n >= gene_task.FEWEST_CELLS}
    assert task.counts["scored"].sum() == 36 - len(left_out)


def made_up(n_rare, n_common):
    target = np.repeat([1, 0], [n_rare, n_common])
    names = [f"g{n}" for n in range(len(target))]
    return pd.DataFrame({"gene": names, "target": target, "token_id": range(len(target))})


@options(max_examples=40)
@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 60), st.integers(0, 99))
def test_each_gene_is_tested_once_and_no_gene_is_on_two_sides(folds, more_rare, more_common, seed):
    n_rare = gene_task._fewest(folds) + more_rare
    study = load_study("tiny", gene_folds=folds, split_seed=seed)
    table = gene_task._with_folds(study, made_up(n_rare, n_rare + more_common))
    task = gene_task.GeneTask(table, ["a", "b"], None, [], [], None, None, None)
    tested = np.zeros(len(table), dtype=int)
    for fold in range(folds):
        parts = gene_task.parts_of(study, task, fold)
        assert set(parts) == {"train", "validation", "test"}
        assert ((parts == "test") == (table["fold"] == fold)).all()
        tested += parts == "test"
        for part in gene_task.PARTS:
            assert table["target"][parts == part].nunique() == 2, part
        sizes = table.groupby("target")["fold"].apply(lambda folds_of, fold=fold: (folds_of == fold).sum())
        assert (abs(sizes - table["target"].value_counts() / folds) < 1).all()
    assert (tested == 1).all()


def test_folds_and_cells_are_the_same_for_each_arm_and_seed(gene_settings):
    first = gene_task.prepare_genes(gene_settings())
    assert first.key == gene_task.prepare_genes(gene_settings(strategy="random_init", seed=5)).key
    assert first.key != gene_task.prepare_genes(gene_settings(split_seed=1)).key


def test_permuted_classes_are_the_same_classes_in_another_order(gene_settings):
    task = gene_task.prepare_genes(gene_settings())
    drawn = [gene_task.permuted(gene_settings(), task, number) for number in (0, 0, 1)]
    assert drawn[0].key == drawn[1].key
    assert len({task.key, drawn[0].key, drawn[2].key}) == 3
    for other in drawn:
        assert other.genes["gene"].equals(task.genes["gene"])
        assert sorted(other.genes["class"]) == sorted(task.genes["class"])
        assert (other.genes["target"] == (other.genes["class"] == "rare")).all()
        assert other.genes.groupby("fold")["target"].sum().tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("lists", "changes", "message"),
    [
        (
            {"rare": NAMES[2:6]},
            {},
            r"Class 'rare' has 4 genes left, and 3 folds need 6: of 30 listed genes 2 are not in",
        ),
        ({"rare": NAMES[2:8]}, {"gene_folds": 7}, "has 6 genes left, and 7 folds need 7: .* set a smaller gene_folds"),
        (
            {"rare": ["X1", "X2"], "common": ["X3"]},
            {},
            "None of the 5 listed genes is in the vocabulary; they are named",
        ),
        ({}, {"gene_cells": 49}, "49 cells were asked for as context, but the training part has 48; set fewer"),
    ],
)
def test_too_few_genes_or_cells_are_refused(gene_settings, classes, lists, changes, message):
    with pytest.raises(UserError, match=message):
        gene_task.prepare_genes(gene_settings(gene_classes=classes(**lists), **changes))


def test_two_names_of_one_gene_are_found_in_the_vocabulary(gene_settings, tokens, classes, monkeypatch):
    alias = replace(tokens.vocabulary, aliases={"OLD": NAMES[2]})
    monkeypatch.setattr(encode, "single_cell_tokens", lambda _: replace(tokens, vocabulary=alias))
    with pytest.raises(
        UserError, match=r"in the vocabulary's names: genes that are in both classes: 1 .*keep one line"
    ):
        gene_task.prepare_genes(gene_settings(gene_classes=classes(unknown=("OLD",))))


# --- the model ---


def gene_model(settings, tokens):
    return build(settings, tokens.vocabulary, ["common", "rare"], genes.GeneClassifier)


def test_the_classifier_is_that_of_transformers(gene_settings, tokens):
    torch.manual_seed(0)
    ours = gene_model(gene_settings(), tokens).eval()
    stock = BertForTokenClassification(ours.config).eval()
    stock.load_state_dict(ours.state_dict())
    ids = torch.tensor([[2, 7, 9, 30], [3, 8, 0, 0]])
    mask = (ids != 0).long()
    chosen = torch.tensor([[False, True, False, True], [True, True, False, False]])
    torch.testing.assert_close(ours(ids, mask, chosen), stock(ids, attention_mask=mask).logits[chosen])


@pytest.mark.parametrize(("strategy", "is_copied"), [("full", True), ("random_init", False)])
def test_its_body_is_the_checkpoint_but_for_random_init(gene_settings, tokens, checkpoint, strategy, is_copied):
    stored, model = load_file(checkpoint / "model.safetensors"), gene_model(gene_settings(strategy=strategy), tokens)
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"):
        assert torch.equal(model.state_dict()[name], stored[name]) == is_copied


@pytest.mark.parametrize(
    ("strategy", "frozen"),
    [
        ("full", set()),
        ("linear_probe", {"embeddings", "layer_0", "layer_1"}),
        ("selective", {"layer_0"}),
        ("random_init", set()),
    ],
)
def test_only_what_the_strategy_says_learns(gene_settings, strategy, frozen, monkeypatch):
    run, kept = gene_settings(epochs=1, warmup_steps=0, strategy=strategy), []

    def watched(*arguments):
        model = build(*arguments)
        kept.append((model, {name: weight.detach().clone() for name, weight in model.named_parameters()}))
        return model

    monkeypatch.setattr(genes, "build", watched)
    genes.run_fold(run, gene_task.prepare_genes(run), 0)
    ((model, before),) = kept
    plan = strategies.Plan()
    moved = {plan.group_of(name) for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"embeddings", "layer_0", "layer_1", "classifier"} - frozen


def test_the_classes_of_test_genes_change_nothing_in_training(gene_settings):
    """Scores of the tested genes are the same when their classes are turned round."""
    run = gene_settings()
    task = gene_task.prepare_genes(run)
    first = genes.run_fold(run, task, 0)
    tested = task.genes["fold"] == 0
    turned = task.genes.assign(target=task.genes["target"].where(~tested, 1 - task.genes["target"]))
    turned["class"] = turned["target"].map(dict(enumerate(task.classes)))
    other_task = replace(task, genes=turned)
    assert (gene_task.parts_of(run, other_task, 0) == gene_task.parts_of(run, task, 0)).all()
    other = genes.run_fold(run, other_task, 0)
    assert other.row["key"] != first.row["key"]
    columns = ["cell", "predicted", "probability", "score", "score_other"]
    pd.testing.assert_frame_equal(first.predictions[columns], other.predictions[columns])
    pd.testing.assert_frame_equal(first.history.drop(columns="seconds"), other.history.drop(columns="seconds"))
    for area in ("auc", "token_auc"):
        assert other.row[area] == pytest.approx(1 - first.row[area], abs=1e-12)


def test_scores_are_means_over_tokens_and_the_published_area_is_over_tokens(gene_settings, monkeypatch):
    run, seen, logits_of = gene_settings(epochs=1), [], genes.token_logits
    task = gene_task.prepare_genes(run)

    def watched(*arguments):
        seen.append(logits_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(genes, "token_logits", watched)
    outcome = genes.run_fold(run, task, 1)
    of_test = task.genes[task.genes["fold"] == 1].set_index("gene")
    for cells, score, area, logits in zip(
        ("context", "other"), ("score", "score_other"), ("token_auc", "token_auc_other"), seen[-2:], strict=True
    ):
        rows = getattr(task, cells)
        expected = [t for ids in task.tokens.dataset.select(rows)["input_ids"][:] for t in ids if 4 <= t < 40]
        assert sorted(logits["token_id"]) == sorted(expected)
        means = logits.groupby("token_id")["logit"].mean()
        found = outcome.predictions.set_index("cell")[score]
        np.testing.assert_allclose(found, means.reindex(of_test.loc[found.index, "token_id"]), atol=1e-12)
        kept = logits.merge(of_test, on="token_id")
        assert outcome.row[area] == pytest.approx(roc_auc_score(kept["target"], kept["logit"]), abs=1e-12)
    assert np.trapezoid(outcome.curve, genes.CURVE) == pytest.approx(outcome.row["token_auc"], abs=0.02)
    target = (outcome.predictions["label"] == "rare").astype(int)
    assert outcome.row["auc"] == pytest.approx(roc_auc_score(target, outcome.predictions["score"]), abs=1e-12)
    right = (outcome.predictions["label"] == outcome.predictions["predicted"]).mean()
    assert outcome.row["accuracy"] == pytest.approx(right)


def test_the_last_epoch_is_kept(gene_settings):
    run = gene_settings(epochs=4)
    outcome = genes.run_fold(run, gene_task.prepare_genes(run), 0)
    assert len(outcome.history) == 4
    assert (outcome.row["best_epoch"], outcome.row["chosen_by"]) == (4, "last epoch")


def test_a_token_that_gives_the_class_away_is_learnt(gene_settings, tokens, monkeypatch):
    """Rare genes are only in cells that begin with token 2, common ones only in those with token 3."""
    rng, content = np.random.default_rng(0), tokens.dataset.to_dict()
    sides = {"a": np.arange(4, 4 + RARE), "b": np.arange(4 + RARE, 40)}
    content["input_ids"] = [
        [2 if label == "a" else 3, *map(int, rng.permutation(sides[label])[:11])] for label in content["label"]
    ]
    content["length"] = [12] * len(content["label"])
    told = replace(tokens, dataset=datasets.Dataset.from_dict(content))
    monkeypatch.setattr(encode, "single_cell_tokens", lambda _: told)
    run = gene_settings(epochs=20, learning_rate=1e-2, batch_size=8)
    task = gene_task.prepare_genes(run)
    scores = pd.concat([genes.run_fold(run, task, fold).predictions for fold in range(3)])
    for name in ("score", "score_other"):
        assert pair_auc(scores[name], (scores["label"] == "rare").astype(int), scores["fold"]) > 0.95


# --- kept, failed, refused ---


def test_a_finished_fold_is_loaded_and_a_changed_one_is_not(gene_settings, monkeypatch):
    run = gene_settings()
    task = gene_task.prepare_genes(run)
    first = genes.run_fold(run, task, 0)
    again = genes.run_fold(run, task, 0)
    assert again.row == first.row  # the seconds too: it was not trained again
    pd.testing.assert_frame_equal(again.predictions, first.predictions)
    monkeypatch.setattr(genes, "_train", lambda *_: pytest.fail("was trained"))
    for other_run, other_task, fold in (
        (run.model_copy(update={"learning_rate": 1e-3}), task, 0),
        (run.at(seed=1), task, 0),
        (run, gene_task.permuted(run, task, 0), 0),
        (run, task, 1),
    ):
        with pytest.raises(pytest.fail.Exception, match="was trained"):
            genes.run_fold(other_run, other_task, fold)
    assert genes.run_fold(run.model_copy(update={"threads": 2}), task, 0).row == first.row


def test_a_loss_that_is_no_number_is_a_row(gene_settings):
    run = gene_settings(learning_rate=1e30, warmup_steps=0)
    found = genes.run_fold(run, gene_task.prepare_genes(run), 0)
    assert found.row["status"] == "failed"
    assert "set a smaller learning_rate" in found.row["reason"]
    assert len(found.predictions) == 0


def test_sampling_of_cells_is_refused(gene_settings):
    run = gene_settings(sampling="upsampled")
    with pytest.raises(UserError, match="here genes have classes; set it to all"):
        genes.run_fold(run, gene_task.prepare_genes(run), 0)


# --- baselines and the whole study ---


def test_baselines_score_test_genes_by_the_others_alone(gene_settings):
    table = gene_task.prepare_genes(gene_settings()).genes
    features = np.random.default_rng(0).normal(size=(36, 4)) + table["target"].to_numpy()[:, None]
    first = cross_validate(features, table, with_threshold=True)
    tested = (table["fold"] == 1).to_numpy()
    turned = table.assign(target=np.where(tested, 1 - table["target"], table["target"]))
    other = cross_validate(features, turned, with_threshold=True)
    pd.testing.assert_frame_equal(first[tested], other[tested], check_exact=True)
    assert not np.array_equal(first["score"][~tested], other["score"][~tested])
    moved = cross_validate(features + 100 * tested[:, None], table, with_threshold=True)
    assert np.array_equal(moved["threshold"][tested], first["threshold"][tested])  # nor do features of test genes enter
    assert pair_auc(first["score"], table["target"], table["fold"]) > 0.8


def test_frozen_features_are_embeddings_and_mean_states_of_the_gene(gene_settings, tokens):
    run = gene_settings()
    task = gene_task.prepare_genes(run)
    found = {name: gene_baselines.FEATURES[name](run, task, None) for name in ("frozen_embedding", "frozen_context")}
    model, gene = gene_model(run, tokens).eval(), task.genes.iloc[5]
    weight = model.bert.embeddings.word_embeddings.weight[gene["token_id"]]
    np.testing.assert_array_equal(found["frozen_embedding"][5], weight.detach().double())
    states = []
    for ids in tokens.dataset.select(task.context)["input_ids"][:]:
        if gene["token_id"] in ids:
            states.append(model.bert(torch.tensor([ids])).last_hidden_state[0, ids.index(gene["token_id"])])
    np.testing.assert_allclose(found["frozen_context"][5], torch.stack(states).mean(dim=0).detach().numpy(), atol=1e-5)


def test_expression_features_are_those_of_plain_arrays(gene_settings, tokens):
    import anndata as ad
    from scipy import sparse

    task = gene_task.prepare_genes(gene_settings())
    counts = np.random.default_rng(0).poisson(1.5, (72, 41)).astype(np.float32)  # gene 40 is a second name of gene 5
    var = pd.DataFrame({"ensembl_id": [*NAMES, "OLD"]}, index=[*NAMES, "OLD"])
    cells = ad.AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=tokens.dataset["cell"][:]), var=var)
    named = replace(task, tokens=replace(tokens, vocabulary=replace(tokens.vocabulary, aliases={"OLD": NAMES[5]})))
    found = gene_baselines.expression_features(gene_settings(), named, cells)
    own = counts[task.context]
    summed = own[:, :40].copy()
    summed[:, 5] += own[:, 40]
    values = summed / own.sum(axis=1, keepdims=True) * 10_000
    for row in (0, 3):  # 3: gene 5
        value = values[:, row + 2]
        expected = [
            np.log1p(value).mean(),
            np.log1p(value).std(),
            (value > 0).mean(),
            np.log(value.var() / value.mean()),
        ]
        np.testing.assert_allclose(found[row, :4], expected, rtol=1e-5)
        places = [
            ids.index(row + 4) / len(ids)
            for ids in tokens.dataset.select(task.context)["input_ids"][:]
            if row + 4 in ids
        ]
        np.testing.assert_allclose(found[row, 4:], [len(places) / 40, np.mean(places)], rtol=1e-6)


@pytest.fixture
def study(gene_settings, monkeypatch):
    """A whole study of one epoch, two folds and two seeds, with made-up features in place of real ones."""
    rng = np.random.default_rng(0)
    made = {name: lambda run, task, cells: rng.normal(size=(36, 3)) for name in GENE_BASELINES}
    monkeypatch.setattr(gene_baselines, "FEATURES", made)
    monkeypatch.setattr(genes.qc, "prepare_cells", lambda _: None)
    run = gene_settings(epochs=1, gene_folds=2, kind="cells", seeds=[0, 1])
    monkeypatch.setattr(
        genes, "methods", lambda _: [run.model_copy(update={"arm": name, "strategy": name}) for name in
                                     ("full", "random_init", *GENE_BASELINES)]
    )  # fmt: skip
    task = gene_task.prepare_genes(run)
    return run, task, genes.run_study(run, task)


def test_a_study_scores_each_gene_once_by_each_arm_and_seed(study):
    run, task, found = study
    arms = {"full": 4, "random_init": 4, "full_permuted": 4, **dict.fromkeys(GENE_BASELINES, 2)}
    assert found.runs["arm"].value_counts().to_dict() == arms
    sizes = found.predictions.groupby(["arm", "seed"])["cell"].agg(["size", "nunique"])
    assert len(sizes) == 3 * 2 + 3
    assert (sizes == 36).all(axis=None)
    assert {arm: curves.shape for arm, curves in found.curves.items()} == {
        arm: (4, len(genes.CURVE)) for arm in ("full", "random_init", "full_permuted")
    }
    assert (found.history.groupby("arm").size() == 4).all()
    assert found.relearnt.shape == (2, 3)
    again = genes.run_study(run, task)
    pd.testing.assert_frame_equal(found.relearnt, again.relearnt)
    pd.testing.assert_frame_equal(found.runs.drop(columns="wall_seconds"), again.runs.drop(columns="wall_seconds"))


def test_arms_that_do_not_classify_genes_are_left_out_and_baselines_of_genes_added():
    assert [arm.arm for arm in genes.methods(load_study("tiny"))] == [
        "full", "linear_probe", "random_init", *GENE_BASELINES
    ]  # fmt: skip
    asked = load_study("demo_gene_dosage")
    assert [arm.arm for arm in genes.methods(asked)] == list(asked.arms)
