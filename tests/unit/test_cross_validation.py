"""What folds say together: against scores of all cells at once, scipy, scikit-learn, and by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score, roc_curve

from tuneformer.evaluate import cross_validation as cv
from tuneformer.evaluate.comparisons import compare_tasks, holm, resampled_t_test

CLASSES = np.array(["alpha", "beta", "t_cell"])
N = 300


def made_up(arms=("full", "lora"), seeds=(0, 1), folds=5, accuracy=(0.9, 0.7)):
    """Metrics and predictions of arms that are right with so much chance; 200 alpha, 93 beta and 7 T cells."""
    rng = np.random.default_rng(0)
    labels = np.repeat(CLASSES, [200, 93, 7])
    fold_of = rng.permutation(N) % folds
    predictions, metrics = [], []
    for arm, right in zip(arms, accuracy, strict=True):
        for seed in seeds:
            predicted = np.where(rng.uniform(size=N) < right, labels, rng.choice(CLASSES, N))
            names = {"task": "types", "train_set": "single_cell", "strategy": arm, "seed": seed}
            table = pd.DataFrame({"fold": fold_of, "label": labels, "predicted": predicted})
            table["cell"] = [f"cell{number}" for number in range(N)]
            predictions.append(table.assign(**names))
            for fold, part in table.groupby("fold"):
                scores = {
                    "accuracy": accuracy_score(part["label"], part["predicted"]),
                    "macro_f1": f1_score(part["label"], part["predicted"], average="macro"),
                    "cost:wall_seconds": 1.0,
                }
                sizes = {"fold": float(fold), "n_train": 200, "n_test": len(part)}
                metrics += [names | sizes | {"metric": key, "value": value} for key, value in scores.items()]
    return pd.DataFrame(metrics), pd.concat(predictions, ignore_index=True)


@pytest.fixture(scope="module")
def study():
    return made_up()


def test_scores_of_folds_and_of_all_cells(study):
    metrics, predictions = study
    table = cv.fold_table(metrics, predictions).set_index(["arm", "metric"])
    assert list(table.index) == [(arm, name) for arm in ("full", "lora") for name in ("accuracy", "macro_f1")]
    for (arm, metric), row in table.iterrows():
        of_arm = predictions[predictions["strategy"] == arm]
        pooled = [
            accuracy_score(cells["label"], cells["predicted"])
            if metric == "accuracy"
            else f1_score(cells["label"], cells["predicted"], average="macro")
            for _, cells in of_arm.groupby("seed")
        ]
        values = metrics[(metrics["strategy"] == arm) & (metrics["metric"] == metric)]
        by_fold = values.pivot(index="fold", columns="seed", values="value").mean(axis=1)
        assert row["pooled"] == pytest.approx(np.mean(pooled), rel=1e-12)
        assert (row["mean"], row["sd"]) == pytest.approx((by_fold.mean(), np.std(by_fold, ddof=1)), rel=1e-12)
        assert (row["folds"], row["seeds"]) == (5, 2)


def test_a_run_that_failed_leaves_its_seed_out_of_what_is_pooled(study):
    metrics, predictions = study
    lost = {"strategy": "full", "seed": 1, "fold": 2}
    kept = [rows[~(rows[list(lost)] == pd.Series(lost)).all(axis=1)] for rows in study]
    table = cv.fold_table(*kept).set_index(["arm", "metric"])
    first = predictions[(predictions["strategy"] == "full") & (predictions["seed"] == 0)]
    assert table.loc[("full", "accuracy"), "pooled"] == accuracy_score(first["label"], first["predicted"])
    no_seed = predictions[~((predictions["strategy"] == "full") & (predictions["fold"] == 2))]
    assert np.isnan(cv.fold_table(metrics, no_seed).set_index(["arm", "metric"]).loc[("full", "macro_f1"), "pooled"])
    assert set(cv.class_table(no_seed)["arm"]) == {"lora"}


def test_a_cell_that_is_tested_twice_is_refused(study):
    metrics, predictions = study
    again = pd.concat([predictions, predictions[:1].assign(fold=7)])
    with pytest.raises(
        cv.FoldError, match=r"^types, single_cell, full, seed 0: cell 'cell0' is tested in more than one"
    ):
        cv.fold_table(metrics, again)


def test_accuracy_of_classes_is_their_recall_with_the_interval_of_one_seed(study):
    _, predictions = study
    one = predictions[(predictions["seed"] == 0) & (predictions["strategy"] == "full")]
    table = cv.class_table(one)
    assert table["label"].tolist() == ["alpha", "beta", "t_cell"]
    assert table["cells"].tolist() == [200, 93, 7]
    recall = recall_score(one["label"], one["predicted"], average=None, labels=CLASSES)
    np.testing.assert_allclose(table["accuracy"], recall, rtol=1e-12)
    for row in table.itertuples():
        exact = stats.binomtest(round(row.accuracy * row.cells), row.cells).proportion_ci(0.95, method="wilson")
        assert (row.low, row.high) == pytest.approx((exact.low, exact.high), rel=1e-12)
    both = cv.class_table(predictions[predictions["strategy"] == "full"])
    assert both["cells"].tolist() == [200, 93, 7]
    expected = [
        np.mean(
            [
                (c["predicted"] == name)[c["label"] == name].mean()
                for _, c in predictions[predictions["strategy"] == "full"].groupby("seed")
            ]
        )
        for name in CLASSES
    ]
    np.testing.assert_allclose(both["accuracy"], expected, rtol=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 1), (3, 40)])
def test_wilson_is_that_of_scipy_at_the_ends_too(right, n):
    exact = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert cv.wilson(right / n, n) == pytest.approx((exact.low, exact.high), rel=1e-12, abs=1e-15)


def test_pairs_are_compared_by_the_test_for_overlapping_folds():
    metrics, _ = made_up(arms=("full", "lora", "lp_ft"), accuracy=(0.9, 0.7, 0.85))
    table = cv.compare_folds(metrics)
    assert len(table) == 6
    for metric, pairs in table.groupby("metric"):
        rows = metrics[metrics["metric"] == metric]
        np.testing.assert_allclose(pairs["p_holm"], holm(pairs["p"]), rtol=1e-12)
        for row in pairs.itertuples():
            by_fold = {
                arm: rows[rows["strategy"] == arm].groupby("fold")["value"].mean().to_numpy() for arm in (row.a, row.b)
            }
            expected = resampled_t_test(by_fold[row.a] - by_fold[row.b], n_train=200, n_test=60)
            found = (row.difference, row.low, row.high, row.p)
            assert found == pytest.approx((expected.difference, expected.low, expected.high, expected.p), rel=1e-12)
            assert row.score_a - row.score_b == pytest.approx(row.difference, rel=1e-12)
            assert row.folds == 5
    assert table.loc[table["metric"] == "accuracy", "a"].tolist() == ["full", "full", "lp_ft"]


def test_only_common_folds_and_seeds_are_compared(study):
    metrics, _ = study
    kept = metrics[(metrics["strategy"] == "full") | (metrics["fold"] == 3) & (metrics["seed"] == 1)]
    row = cv.compare_folds(kept).set_index("metric").loc["accuracy"]
    assert row["folds"] == 1
    assert np.isnan([row["low"], row["high"], row["p"], row["p_holm"]]).all()
    of_fold = metrics[(metrics["fold"] == 3) & (metrics["seed"] == 1) & (metrics["metric"] == "accuracy")]
    values = of_fold.set_index("strategy")["value"]
    assert row["difference"] == pytest.approx(values["full"] - values["lora"])


def test_a_study_without_folds_gives_empty_tables(study):
    metrics, predictions = (rows.assign(fold=np.nan) for rows in study)
    assert cv.fold_table(metrics, predictions).empty
    assert cv.class_table(predictions).empty
    assert cv.compare_folds(metrics).empty


# --- ROC


def scores(n=3000, digits=9, seed=0):
    rng = np.random.default_rng(seed)
    numbers = rng.choice(3, n, p=[0.7, 0.27, 0.03])
    odds = np.exp(rng.normal(size=(n, 3)) + 1.2 * np.eye(3)[numbers])
    table = pd.DataFrame(
        (odds / odds.sum(axis=1, keepdims=True)).round(digits), columns=cv.PROBABILITY + CLASSES.astype(object)
    )
    return table.assign(label=CLASSES[numbers], cell=[f"cell{number}" for number in range(n)])


@pytest.mark.parametrize("digits", [9, 1])
def test_the_roc_of_a_class_is_that_of_scikit_learn(digits):
    table = scores(digits=digits)
    curves = cv.roc_curves(table)
    assert list(curves["label"].unique()) == [*CLASSES, "macro average"]
    areas = curves.drop_duplicates("label").set_index("label")["auc"]
    for name in CLASSES:
        is_class, values = table["label"] == name, table[cv.PROBABILITY + name]
        assert areas[name] == pytest.approx(roc_auc_score(is_class, values), rel=1e-12)
        part = curves[curves["label"] == name]
        assert 2 <= len(part) <= 200
        whole = set(zip(*roc_curve(is_class, values)[:2], strict=True))
        assert set(zip(part["fpr"], part["tpr"], strict=True)) <= whole
        assert part[["fpr", "tpr"]].iloc[[0, -1]].to_numpy().tolist() == [[0, 0], [1, 1]]
        assert np.trapezoid(part["tpr"], part["fpr"]) == pytest.approx(areas[name], abs=2e-3)
    assert areas["macro average"] == pytest.approx(areas[CLASSES].mean(), rel=1e-12)
    average = curves[curves["label"] == "macro average"]
    assert len(average) <= 200
    assert average[["fpr", "tpr"]].apply(lambda column: column.is_monotonic_increasing).all()
    assert np.trapezoid(average["tpr"], average["fpr"]) == pytest.approx(areas["macro average"], abs=5e-3)


def test_perfect_and_useless_ranking():
    table = scores(n=200)
    for name in CLASSES:
        table[cv.PROBABILITY + name] = (table["label"] == name).astype(float)
    perfect = cv.roc_curves(table)
    assert (perfect["auc"] == 1).all()
    assert perfect.loc[perfect["label"] == "alpha", ["fpr", "tpr"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 1]]
    average = perfect[perfect["label"] == "macro average"]
    assert (average["tpr"].iloc[1:] == 1).all()
    table[cv.PROBABILITY + CLASSES.astype(object)] = 1 / 3
    assert (cv.roc_curves(table)["auc"] == 0.5).all()


def test_a_class_without_cells_has_no_curve():
    table = scores()
    assert list(cv.roc_curves(table[table["label"] != "t_cell"])["label"].unique()) == [
        "alpha",
        "beta",
        "macro average",
    ]
    assert cv.roc_curves(table[table["label"] == "alpha"]).empty


def test_sentences_hold_treatments_against_the_first_and_count_rare_cells(study):
    metrics, predictions = study
    (first, rare) = cv.sentences(metrics, predictions)["types"]
    pair = cv.compare_folds(metrics).query("metric == 'macro_f1'").iloc[0]
    assert pair["p"] < 0.05
    assert first == (
        f"Beside full, {pair['score_a']:.3f} over 5 folds, macro-F1 is clearly lower with lora "
        f"({-pair['difference']:+.3f})."
    )
    t_cells = predictions[predictions["label"] == "t_cell"]
    found = (t_cells["label"] == t_cells["predicted"]).groupby(t_cells["strategy"]).mean()
    best = "lora the most" if found["lora"] > found["full"] else ", the most of all treatments"
    assert rare.startswith(f"Of the cells of the 1 classes with fewer than 50 cells, full finds {found['full']:.0%}")
    assert best in rare


def test_treatments_that_are_alike_are_not_clearly_different_and_baselines_stand_beside():
    metrics, predictions = made_up(arms=("full", "selective", "majority"), accuracy=(0.8, 0.8, 0.3))
    against, baselines, rare = cv.sentences(metrics, predictions)["types"]
    assert against.endswith("macro-F1 is not clearly different with selective.")
    assert "the best baseline is majority" in baselines
    assert "the best baseline, majority," in rare


def test_one_treatment_has_nothing_to_be_compared_with():
    assert cv.sentences(*made_up(arms=("full",), accuracy=(0.9,))) == {}


def test_an_arm_that_failed_in_a_fold_stops_neither_sentences_nor_comparisons(study):
    lost = {"strategy": "full", "seed": 0, "fold": 2}
    metrics, predictions = (rows[~(rows[list(lost)] == pd.Series(lost)).all(axis=1)] for rows in made_up(seeds=(0,)))
    text = " ".join(cv.sentences(metrics, predictions)["types"])
    assert "Beside full" in text
    assert "nan" not in text
    only_lora = compare_tasks(predictions.assign(fingerprint=""), samples=20)
    assert only_lora.empty
    assert len(compare_tasks(made_up()[1].assign(fingerprint=""), samples=20)) == 2  # accuracy and macro-F1
