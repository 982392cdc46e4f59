"""Classes of genes in cells, on a random checkpoint of 40 genes and 72 made-up cells."""

import dataclasses
import json

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

from tuneformer.data.gene_lists import GeneListError
from tuneformer.evaluate import gene_baselines, gene_study
from tuneformer.finetune import genes, training
from tuneformer.report import gene_figures
from tuneformer.study import paths
from tuneformer.study.params import ParameterError, load_study

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
def gene_settings(run_settings, tokens, classes, monkeypatch):
    monkeypatch.setattr(genes, "prepare_tokens", lambda _: tokens)

    def settings(**changes):
        changes["gene_classes"] = changes.get("gene_classes") or classes()
        fixed = {"gene_folds": 3, "gene_cells": 40, "gene_permutations": 2}
        fixed |= {"warmup_cap": 0.1, "strategies": ["full", "random_init"], "seeds": [0, 1]}
        return run_settings(**(fixed | changes))

    return settings


# --- which genes, in which fold ---


def test_listed_genes_are_counted_and_the_unknown_named(gene_settings):
    task = genes.prepare_genes(gene_settings())
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
    few = gene_settings(gene_cells=17)
    task = genes.prepare_genes(few)
    in_context = table.iloc[task.context]["input_ids"]
    assert set(table.iloc[task.context]["split"]) == {"train"}
    assert set(table.iloc[task.other]["split"]) == {"test"}
    assert (len(task.context), len(task.other)) == (17, 12)
    n_cells = {number: sum(number + 2 in ids for ids in in_context) for number in range(2, 38)}
    left_out = [NAMES[number] for number, n in n_cells.items() if n < genes.FEWEST_CELLS]
    assert task.rare == left_out
    assert left_out
    kept = task.genes.set_index("gene")["context_cells"]
    assert kept.to_dict() == {NAMES[number]: n for number, n in n_cells.items() if n >= genes.FEWEST_CELLS}
    assert task.counts["scored"].sum() == 36 - len(left_out)


def made_up(n_rare, n_common):
    target = np.repeat([1, 0], [n_rare, n_common])
    return pd.DataFrame(
        {"gene": [f"g{n}" for n in range(len(target))], "target": target, "token_id": range(len(target))}
    )


@options(max_examples=40)
@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 60), st.integers(0, 99))
def test_each_gene_is_tested_once_and_no_gene_is_on_two_sides(folds, more_rare, more_common, seed):
    n_rare = genes._fewest(folds) + more_rare
    study = load_study("tiny", gene_folds=folds, split_seed=seed)
    table = genes._with_folds(study, made_up(n_rare, n_rare + more_common))
    task = genes.GeneTask(table, ["a", "b"], None, [], [], None, None, None)
    tested = np.zeros(len(table), dtype=int)
    for fold in range(folds):
        parts = genes.parts_of(study, task, fold)
        assert set(parts) == {"train", "validation", "test"}
        assert ((parts == "test") == (table["fold"] == fold)).all()
        tested += parts == "test"
        for part in ("train", "validation", "test"):
            assert table["target"][parts == part].nunique() == 2, part
        shares = table.groupby("target")["fold"].apply(lambda folds_of, fold=fold: (folds_of == fold).sum())
        whole = table["target"].value_counts()
        assert (abs(shares - whole / folds) < 1).all()
    assert (tested == 1).all()


def test_folds_and_cells_are_the_same_for_each_strategy_and_seed(gene_settings):
    first = genes.prepare_genes(gene_settings())
    other = genes.prepare_genes(gene_settings(strategy="random_init", seed=5))
    assert first.hash == other.hash
    assert genes.prepare_genes(gene_settings(split_seed=1)).hash != first.hash


def test_permuted_classes_are_the_same_classes_in_another_order(gene_settings):
    task = genes.prepare_genes(gene_settings())
    drawn = [genes.permuted(gene_settings(), task, number) for number in (0, 0, 1)]
    assert drawn[0].hash == drawn[1].hash
    assert len({task.hash, drawn[0].hash, drawn[2].hash}) == 3
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
        ({"rare": NAMES[2:8]}, {"gene_folds": 7}, r"has 6 genes left, and 7 folds need 7: .* set a smaller gene_folds"),
        (
            {"rare": ["X1", "X2"], "common": ["X3"]},
            {},
            "None of the 5 listed genes is in the vocabulary; they are named",
        ),
        ({}, {"gene_cells": 49}, "49 cells were asked for as context, but the training part has 48; set fewer"),
    ],
)
def test_too_few_genes_or_cells_are_refused(gene_settings, classes, lists, changes, message):
    with pytest.raises(GeneListError, match=message):
        genes.prepare_genes(gene_settings(gene_classes=classes(**lists), **changes))


def test_two_names_of_one_gene_are_found_in_the_vocabulary(gene_settings, tokens, classes, monkeypatch):
    alias = dataclasses.replace(tokens.vocabulary, aliases={"OLD": NAMES[2]})
    monkeypatch.setattr(genes, "prepare_tokens", lambda _: dataclasses.replace(tokens, vocabulary=alias))
    with pytest.raises(
        GeneListError, match=r"in the vocabulary's names: 1 genes stand in both classes .*keep one line"
    ):
        genes.prepare_genes(gene_settings(gene_classes=classes(unknown=("OLD",))))


# --- the model ---


def test_the_classifier_is_that_of_transformers(gene_settings, tokens):
    run = gene_settings()
    torch.manual_seed(0)
    ours = genes.load_gene_classifier(run, tokens, ["common", "rare"]).eval()
    stock = BertForTokenClassification(ours.config).eval()
    stock.load_state_dict(ours.state_dict())
    ids = torch.tensor([[2, 7, 9, 30], [3, 8, 0, 0]])
    mask = (ids != 0).long()
    expected = stock(ids, attention_mask=mask).logits
    chosen = torch.tensor([[False, True, False, True], [True, True, False, False]])
    torch.testing.assert_close(ours(ids, mask, chosen), expected[chosen])


def test_its_body_is_the_checkpoint_but_for_random_init(gene_settings, tokens, checkpoint):
    stored = load_file(checkpoint / "model.safetensors")
    for strategy, is_copied in {"full": True, "random_init": False}.items():
        model = genes.load_gene_classifier(gene_settings().treated(strategy), tokens, ["a", "b"])
        for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight"):
            assert torch.equal(model.state_dict()[name], stored[name]) == is_copied


@pytest.mark.parametrize(
    ("strategy", "frozen"),
    [
        ("full", set()),
        ("linear_probe", {"embeddings", "layer_0", "layer_1"}),
        ("selective_freeze1", {"layer_0"}),
        ("random_init", set()),
    ],
)
def test_only_what_the_strategy_says_learns(gene_settings, tokens, strategy, frozen, monkeypatch):
    run = gene_settings(epochs=1, warmup_steps=0).treated(strategy)
    task = genes.prepare_genes(run)
    kept = []
    load = genes.load_gene_classifier

    def watched(*arguments):
        model = load(*arguments)
        kept.append((model, {name: weight.detach().clone() for name, weight in model.named_parameters()}))
        return model

    monkeypatch.setattr(genes, "load_gene_classifier", watched)
    genes.run_fold(run, task, 0)
    ((model, before),) = kept
    moved = {
        genes.strategies.group_of(name)
        for name, weight in model.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert moved == {"embeddings", "layer_0", "layer_1", "classifier"} - frozen


def test_the_classes_of_test_genes_change_nothing_in_training(gene_settings):
    """Scores of all genes are the same when the classes in the tested fold are turned round."""
    run = gene_settings()
    task = genes.prepare_genes(run)
    first = genes.run_fold(run, task, 0)
    tested = task.genes["fold"] == 0
    turned = task.genes.assign(target=task.genes["target"].where(~tested, 1 - task.genes["target"]))
    turned["class"] = turned["target"].map(dict(enumerate(task.classes)))
    other_task = dataclasses.replace(task, genes=turned)
    same_split = genes.parts_of(run, task, 0)
    assert (genes.parts_of(run, other_task, 0) == same_split).all()
    other = genes.run_fold(run, other_task, 0)
    assert other.fingerprint != first.fingerprint
    pd.testing.assert_frame_equal(first.scores, other.scores)
    pd.testing.assert_frame_equal(first.history.drop(columns="seconds"), other.history.drop(columns="seconds"))
    assert other.tokens["context"]["auc"] == pytest.approx(1 - first.tokens["context"]["auc"], abs=1e-12)


def test_scores_are_means_over_tokens_and_the_published_area_is_over_tokens(gene_settings, monkeypatch):
    run = gene_settings(epochs=1)
    task = genes.prepare_genes(run)
    seen = []
    logits_of = genes._token_logits

    def watched(*arguments):
        seen.append(logits_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(genes, "_token_logits", watched)
    outcome = genes.run_fold(run, task, 1)
    by_cells = dict(zip(genes.CELLS, seen[-2:], strict=True))
    for cells, (token_ids, logits) in by_cells.items():
        rows = getattr(task, cells)
        expected = [t for ids in task.tokens.dataset.select(rows)["input_ids"][:] for t in ids if 4 <= t < 40]
        assert sorted(token_ids) == sorted(expected)
        for gene in task.genes.itertuples():
            own = logits[token_ids == gene.token_id]
            score = outcome.scores.set_index("gene").loc[gene.gene, cells]
            assert score == pytest.approx(own.mean(), abs=1e-12) if len(own) else np.isnan(score)
        test_genes = task.genes[task.genes["fold"] == 1].set_index("token_id")["target"]
        kept = np.isin(token_ids, test_genes.index)
        area = roc_auc_score(test_genes.loc[token_ids[kept]], logits[kept])
        assert outcome.tokens[cells]["auc"] == pytest.approx(area, abs=1e-12)
        assert outcome.tokens[cells]["n"] == kept.sum()
        assert np.trapezoid(outcome.tokens[cells]["curve"], dx=0.01) == pytest.approx(area, abs=0.02)


def test_the_best_epoch_is_chosen_by_validation_genes_and_its_weights_score(gene_settings, monkeypatch):
    run = gene_settings(epochs=4)
    task = genes.prepare_genes(run)
    outcome = genes.run_fold(run, task, 0)
    history = outcome.history
    assert outcome.best_epoch == history["epoch"][history["validation_auc"].idxmax()]
    table = task.genes.merge(outcome.scores, on="gene")
    of_validation = table[table["part"] == "validation"]
    area = roc_auc_score(of_validation["target"], of_validation["context"])
    assert area == pytest.approx(history["validation_auc"].max(), abs=1e-12)


def test_a_token_that_gives_the_class_away_is_learnt(gene_settings, tokens, monkeypatch):
    """Rare genes stand only in cells that begin with token 2, common ones only in those with token 3."""
    rng = np.random.default_rng(0)
    content = tokens.dataset.to_dict()
    sides = {"a": np.arange(4, 4 + RARE), "b": np.arange(4 + RARE, 40)}
    content["input_ids"] = [
        [2 if label == "a" else 3, *map(int, rng.permutation(sides[label])[:11])] for label in content["label"]
    ]
    told = dataclasses.replace(tokens, dataset=type(tokens.dataset).from_dict(content))
    monkeypatch.setattr(genes, "prepare_tokens", lambda _: told)
    run = gene_settings(epochs=20, learning_rate=1e-2, batch_size=8)
    task = genes.prepare_genes(run)
    scores = pd.concat([gene_study._tested(task, genes.run_fold(run, task, fold).scores, fold) for fold in range(3)])
    assert gene_study._auc_of(scores, "context") > 0.95
    assert gene_study._auc_of(scores.dropna(subset=["other"]), "other") > 0.95


# --- kept, loaded, refused ---


def test_a_finished_fold_is_loaded_and_a_changed_one_is_not(gene_settings, monkeypatch):
    run = gene_settings()
    task = genes.prepare_genes(run)
    first = genes.run_fold(run, task, 0)
    again = genes.run_fold(run, task, 0)
    assert again.cost == first.cost  # the seconds too: it was not trained again
    pd.testing.assert_frame_equal(again.scores, first.scores)
    pd.testing.assert_frame_equal(again.history, first.history)
    assert again.tokens == first.tokens
    monkeypatch.setattr(genes, "_train", lambda *_: pytest.fail("was trained"))
    for other_run, other_task, fold in (
        (run.model_copy(update={"learning_rate": 1e-3}), task, 0),
        (run.model_copy(update={"seed": 1}), task, 0),
        (run, genes.permuted(run, task, 0), 0),
        (run, task, 1),
    ):
        with pytest.raises(pytest.fail.Exception, match="was trained"):
            genes.run_fold(other_run, other_task, fold)
    assert genes.run_fold(run.model_copy(update={"threads": 2}), task, 0).cost == first.cost


def test_a_fold_without_its_last_file_is_trained_again(gene_settings):
    run = gene_settings()
    task = genes.prepare_genes(run)
    first = genes.run_fold(run, task, 0)
    (paths.task_dir(run) / "genes" / "full" / "seed0" / "fold0" / "outcome.json").unlink()
    again = genes.run_fold(run, task, 0)
    assert again.cost["wall_seconds"] != first.cost["wall_seconds"]
    pd.testing.assert_frame_equal(again.scores, first.scores)  # and gives the same


def test_a_loss_that_is_no_number_ends_the_fold(gene_settings):
    run = gene_settings(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(training.TrainingFailed, match=r"fold 0: the loss became .* set a smaller learning_rate|finite"):
        genes.run_fold(run, genes.prepare_genes(run), 0)


def test_sampling_of_cells_is_refused(gene_settings):
    run = gene_settings(sampling="upsampled")
    with pytest.raises(ParameterError, match="here genes have classes; set it to all"):
        genes.run_fold(run, genes.prepare_genes(run), 0)


# --- baselines and the whole study ---


def test_baselines_score_test_genes_by_the_others_alone(gene_settings):
    task = genes.prepare_genes(gene_settings())
    rng = np.random.default_rng(0)
    features = rng.normal(size=(36, 4)) + task.genes["target"].to_numpy()[:, None]
    first = gene_baselines.cross_validate(features, task)
    tested = (task.genes["fold"] == 1).to_numpy()
    turned = task.genes.assign(target=np.where(tested, 1 - task.genes["target"], task.genes["target"]))
    other = gene_baselines.cross_validate(features, dataclasses.replace(task, genes=turned))
    np.testing.assert_array_equal(first["score"][tested], other["score"][tested])
    np.testing.assert_array_equal(first["threshold"][tested], other["threshold"][tested])
    assert not np.array_equal(first["score"][~tested], other["score"][~tested])
    moved = features + 100 * tested[:, None]  # nor do the features of test genes enter what is fitted
    np.testing.assert_array_equal(
        gene_baselines.cross_validate(moved, task)["threshold"][tested], first["threshold"][tested]
    )
    assert gene_study._auc_of(first, "score") > 0.8


def test_the_context_baseline_is_the_mean_state_of_the_gene(gene_settings, tokens):
    run = gene_settings()
    task = genes.prepare_genes(run)
    embedding, context = gene_baselines._embeddings(run, task)
    model = genes.load_gene_classifier(run, tokens, task.classes).eval()
    gene = task.genes.iloc[5]
    weight = model.bert.embeddings.word_embeddings.weight[gene["token_id"]]
    np.testing.assert_array_equal(embedding[5], weight.detach().double())
    states = []
    for ids in tokens.dataset.select(task.context)["input_ids"][:]:
        if gene["token_id"] in ids:
            states.append(model.bert(torch.tensor([ids])).last_hidden_state[0, ids.index(gene["token_id"])])
    np.testing.assert_allclose(context[5], torch.stack(states).mean(dim=0).detach().numpy(), atol=1e-5)


@pytest.fixture
def study(gene_settings, monkeypatch, tmp_path):
    """The whole study, with made-up features in place of expression."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    rng = np.random.default_rng(0)

    def features_of(run, task, cells):
        return {name: rng.normal(size=(len(task.genes), 3)) for name in gene_baselines.BASELINES}

    monkeypatch.setattr(gene_study.gene_baselines, "features_of", features_of)
    monkeypatch.setattr(gene_study.preprocessing, "prepare_cells", lambda _: None)
    return gene_study.run_study(gene_settings(epochs=1, gene_folds=2, gene_permutations=2))


def test_a_study_scores_each_gene_once_by_each_method_and_seed(study):
    own = study.scores[study.scores["control"] == "none"]
    sizes = own.groupby(["strategy", "seed"], dropna=False).agg(n=("gene", "size"), unique=("gene", "nunique"))
    assert len(sizes) == 2 * 2 + 3
    assert (sizes == 36).all(axis=None)
    assert len(study.folds) == study.curves.shape[1] == (2 * 2 + 2) * 2
    assert study.permutations.shape == (2, 3)
    assert set(study.scores.loc[study.scores["control"] == "permuted", "strategy"]) == {"full"}


def test_the_table_of_a_study_says_what_the_scores_say(study):
    table = gene_study.metrics_table(study)
    assert tuple(table.columns) == gene_study.COLUMNS
    keys = ["strategy", "control", "seed", "fold", "cells", "level", "metric"]
    assert not table.duplicated(keys).any()
    chosen = table[(table["strategy"] == "full") & (table["control"] == "none") & (table["cells"] == "context")]
    whole = chosen[chosen["seed"].isna() & chosen["fold"].isna()].set_index(["level", "metric"])["value"]
    per_fold = study.folds[(study.folds["strategy"] == "full") & (study.folds["control"] == "none")]["auc:context"]
    assert whole["token", "auc"] == pytest.approx(per_fold.mean(), abs=1e-12)
    assert whole["token", "auc:sd"] == pytest.approx(per_fold.std(ddof=1), abs=1e-12)
    by_seed = chosen[(chosen["level"] == "gene") & (chosen["metric"] == "auc") & chosen["fold"].isna()].dropna(
        subset=["seed"]
    )
    assert whole["gene", "auc"] == pytest.approx(by_seed["value"].mean(), abs=1e-12)
    assert whole["gene", "auc:low"] <= whole["gene", "auc"] <= whole["gene", "auc:high"]
    counts = chosen[chosen["metric"].str.startswith("confusion:")]
    assert counts["value"].sum() == 2 * 36
    confusion = gene_study.confusion(study, "full")
    assert confusion.to_numpy().sum() == 72
    assert confusion.loc["rare", "rare"] == counts.loc[counts["metric"] == "confusion:rare:rare", "value"].sum()
    for name in study.permutations:
        p = table[(table["strategy"] == name) & (table["metric"] == "permutation_p")]["value"].item()
        auc = table[(table["strategy"] == name) & (table["control"] == "none") & table["fold"].isna()]
        auc = auc[auc["metric"] == "auc"]["value"].iloc[0]
        assert p == (1 + (study.permutations[name] >= auc).sum()) / 3


def test_the_answer_has_one_row_a_method(study):
    answer = gene_study.answer_table(gene_study.metrics_table(study))
    assert list(answer.index) == ["full", "random_init", *gene_baselines.BASELINES]
    assert answer["gene AUC"].between(0, 1).all()
    assert answer.loc["full", "minus random_init"].count(",") == 1
    assert answer.loc["random_init", "minus random_init"] == ""
    assert answer["permuted"].notna().tolist() == [True, False, True, True, True]


def test_the_surest_genes_come_from_both_ends(study):
    table = gene_study.confident_genes(study, "full", n=5)
    assert len(table) == 10
    assert table["gene"].is_unique
    assert table["rank"].is_monotonic_decreasing
    own = study.scores[(study.scores["strategy"] == "full") & (study.scores["control"] == "none")]
    first = table.iloc[0]
    ranks = []
    for _, rows in own[own["fold"] == first["fold"]].groupby("seed"):
        ranks.append((rows["context"] <= rows.set_index("gene")["context"][first["gene"]]).mean())
    assert first["rank"] == pytest.approx(np.mean(ranks), abs=1e-12)
    is_rare = table["class"] == "rare"
    assert table["right"].tolist() == [*is_rare[:5], *~is_rare[5:]]


def test_results_are_written_whole_and_hold_the_scores(study):
    table = gene_study.metrics_table(study)
    metrics_path, scores_path = gene_figures.write_results(study, table)
    assert metrics_path.name == "genes.csv"
    read = pd.read_csv(metrics_path)
    np.testing.assert_allclose(read["value"], table["value"], rtol=1e-12)
    scores = pd.read_csv(scores_path)
    assert tuple(scores.columns) == gene_figures.SCORE_COLUMNS
    assert len(scores) == 36 * 7
    first = metrics_path.read_bytes(), scores_path.read_bytes()
    gene_figures.write_results(study, table)
    assert (metrics_path.read_bytes(), scores_path.read_bytes()) == first


def test_the_figures_show_the_numbers_of_the_table(study):
    table = gene_study.metrics_table(study)
    drawings = gene_figures.draw_all(study, table)
    assert list(drawings) == ["fig1_auc", "fig2_roc", "fig3_confusion"]
    points = drawings["fig1_auc"].data
    full = points[(points["strategy"] == "full") & (points["control"] == "none") & (points["level"] == "gene")]
    assert len(full) == 2
    assert full["mean"].iloc[0] == pytest.approx(full["value"].mean(), abs=1e-12)
    roc = drawings["fig2_roc"].data
    curve = roc[(roc["level"] == "token")]
    areas = study.folds[(study.folds["strategy"] == "full") & (study.folds["control"] == "none")]["auc:context"]
    assert np.trapezoid(curve["mean"], curve["false_positive_rate"]) == pytest.approx(areas.mean(), abs=0.02)
    assert "(simulated)" in drawings["fig2_roc"].figure.get_suptitle()
    assert drawings["fig3_confusion"].data["genes"].sum() == 72


def test_what_a_fold_keeps_is_plain_json(gene_settings):
    run = gene_settings(epochs=1)
    genes.run_fold(run, genes.prepare_genes(run), 0)
    stored = json.loads((paths.task_dir(run) / "genes" / "full" / "seed0" / "fold0" / "outcome.json").read_text())
    assert set(stored) == {"fingerprint", "history", "best_epoch", "tokens", "cost"}
    assert len(stored["tokens"]["context"]["curve"]) == genes.CURVE_POINTS
