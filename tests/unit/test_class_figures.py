"""Figures of a cross-validation hold the numbers of its tables, and its text tables are rounded from them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate import cross_validation
from tuneformer.report import class_figures, plotting

ARMS = {"full": 0.9, "selective_freeze2_focal": 0.85, "full_dice_upsampled": 0.6, "logistic_counts": 0.8}
SIZES = {"t_cell": 7, "beta": 90, "alpha": 203}
FOLDS = 5


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    plotting.set_style()
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def study():
    """Metrics, predictions and ROC curves of four arms and one seed."""
    rng = np.random.default_rng(0)
    labels = np.repeat(list(SIZES), list(SIZES.values()))
    fold_of = np.arange(len(labels)) % FOLDS
    metrics, predictions, curves = [], [], []
    for arm, right in ARMS.items():
        names = {"task": "types", "train_set": "single_cell", "strategy": arm}
        predicted = np.where(rng.uniform(size=len(labels)) < right, labels, rng.choice(list(SIZES), len(labels)))
        cells = pd.DataFrame({"fold": fold_of, "label": labels, "predicted": predicted, "seed": 0, **names})
        cells["cell"] = [f"cell{number}" for number in range(len(labels))]
        predictions.append(cells)
        for fold in range(FOLDS):
            sizes = {"seed": 0, "fold": float(fold), "n_train": 200, "n_test": 60}
            for metric in ("accuracy", "macro_f1"):
                value = right - 0.02 * (metric == "macro_f1") + 0.03 * rng.normal()
                metrics.append(names | sizes | {"metric": metric, "value": value})
        odds = np.exp(rng.normal(size=(len(labels), 3)) + 3 * right * (labels[:, None] == list(SIZES)))
        scores = pd.DataFrame(odds, columns=[f"probability:{name}" for name in SIZES])
        curves.append(cross_validation.roc_curves(scores.assign(label=labels)).assign(**names))
    return pd.DataFrame(metrics), pd.concat(predictions), pd.concat(curves)


def test_the_drawings_of_a_task_and_their_titles(study):
    drawn = class_figures.drawings(*study, simulated=True)
    assert list(drawn) == ["fig10_types_folds", "fig11_types_class_accuracy", "fig12_types_roc"]
    for drawing in drawn.values():
        assert drawing.figure.get_suptitle().endswith("(simulated)")
        assert len(drawing.data)
    metrics, predictions, roc = study
    assert list(class_figures.drawings(metrics, predictions, roc[:0], simulated=False)) == list(drawn)[:2]
    without = [rows.assign(fold=np.nan) for rows in (metrics, predictions)]
    assert class_figures.drawings(*without, roc, simulated=False) == {}
    assert class_figures.tables(*without) == {}


def test_points_are_the_folds_and_bars_the_pooled_scores(study):
    metrics, predictions, _ = study
    drawing = class_figures.fold_scores(metrics, predictions, title="types", simulated=False)
    assert drawing.figure.get_suptitle() == "types: 5-fold cross-validation"
    table = cross_validation.fold_table(metrics, predictions).set_index(["arm", "metric"])
    for ax, metric in zip(drawing.figure.axes, ("accuracy", "macro_f1"), strict=True):
        lines = ax.get_lines()
        assert len(lines) == 3 * len(ARMS)
        for place, arm in enumerate(ARMS):
            points, mean, pooled = lines[3 * place : 3 * place + 3]
            values = metrics[(metrics["strategy"] == arm) & (metrics["metric"] == metric)].sort_values("fold")["value"]
            np.testing.assert_array_equal(points.get_xdata(), values)
            assert (np.diff(points.get_ydata()) > 0).all()
            assert np.abs(points.get_ydata() - place).max() < 0.25
            assert mean.get_xdata()[0] == pytest.approx(table.loc[(arm, metric), "mean"])
            assert pooled.get_xdata()[0] == pytest.approx(table.loc[(arm, metric), "pooled"])
        assert lines[-1].get_ydata()[0] == 3
    assert [text.get_text() for text in drawing.figure.axes[0].get_yticklabels()] == list(ARMS)


def test_the_heat_map_has_the_largest_class_on_top_and_its_cells_beside_it(study):
    classes = cross_validation.class_table(study[1])
    drawing = class_figures.class_accuracy(classes, title="types", simulated=False)
    ax = drawing.figure.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["alpha (203)", "beta (90)", "t_cell (7)"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [text.get_text() for text in ax.get_xticklabels()] == list(ARMS)
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    for row in classes.itertuples():
        place = (list(ARMS).index(row.arm) + 0.5, ["alpha", "beta", "t_cell"].index(row.label) + 0.5)
        assert shown[place] == f"{row.accuracy:.2f}"


def test_every_class_has_its_curve_in_every_panel(study):
    roc = study[2].assign(arm=study[2]["strategy"])
    drawing = class_figures.roc_panels(roc, title="types", simulated=False)
    panels = [ax for ax in drawing.figure.axes if ax.get_lines()]
    assert len(panels) == len(ARMS)
    for ax, arm in zip(panels, ARMS, strict=True):
        area = roc.loc[(roc["arm"] == arm) & (roc["label"] == "macro average"), "auc"].iloc[0]
        assert ax.get_title(loc="left") == f"{arm}\nmacro AUC {area:.3f}"
        assert {line.get_label() for line in ax.get_lines()} == {*SIZES, "macro average"}
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert labels == [*SIZES, "macro average"]


def test_fourteen_classes_look_different():
    labels = [f"class {number}" for number in range(14)]
    rows = [{"arm": "full", "label": label, "fpr": x, "tpr": x, "auc": 0.5} for label in labels for x in (0, 1)]
    rows += [{"arm": "full", "label": "macro average", "fpr": x, "tpr": x, "auc": 0.5} for x in (0, 1)]
    drawing = class_figures.roc_panels(pd.DataFrame(rows), title="types", simulated=False)
    looks = [(line.get_color(), str(line.get_linestyle())) for line in drawing.figure.axes[0].get_lines()[:14]]
    assert len(set(looks)) == 14


def test_the_text_tables_are_rounded_from_the_numbers(study):
    metrics, predictions, _ = study
    scores, classes, pairs = class_figures.tables(metrics, predictions).values()
    number = cross_validation.fold_table(metrics, predictions).set_index(["arm", "metric"]).loc[("full", "accuracy")]
    text = f"{number['mean']:.3f} ± {number['sd']:.3f}; {number['pooled']:.3f}"
    assert scores.loc[("types", "full"), "Accuracy"] == text
    rare = cross_validation.class_table(predictions).set_index(["arm", "label"]).loc[("full", "t_cell")]
    expected = f"{rare['accuracy']:.3f} ({rare['low']:.3f} to {rare['high']:.3f})"
    assert classes.loc[("types", "t_cell", 7), "full"] == expected
    assert list(classes.columns) == list(ARMS)
    found = cross_validation.compare_folds(metrics)
    assert len(pairs) == 2 * (len(ARMS) - 1)
    best = found.iloc[0]
    shown = pairs.loc[("types", "Accuracy", best["a"], best["b"])]
    assert shown["difference (95 % interval)"].startswith(f"{best['difference']:+.3f} (")
    worst = found[(found["a"] == best["a"]) & (found["metric"] == "accuracy")].iloc[-1]
    assert worst["p_holm"] < 0.05
    assert pairs.loc[("types", "Accuracy", worst["a"], worst["b"]), "p (Holm, all pairs)"] in (
        "< 0.001",
        f"{worst['p_holm']:.3f}",
    )
