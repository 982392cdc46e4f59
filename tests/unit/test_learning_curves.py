"""The score against the number of labelled cells: means, intervals and what is said of them, on made-up scores."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate import learning_curves, trainset_effects
from tuneformer.report import plotting, trainset_figures

SIZES = {"single_cell_n10": 20, "single_cell_n100": 200}


@pytest.fixture
def curve_metrics():
    """Two classes; full is 0.1 below the linear model with 10 cells of a class, and 0.1 above it with 100."""
    rows = []
    for name, n_train in SIZES.items():
        for strategy, ahead in {
            "full": -0.1 if n_train == 20 else 0.1,
            "logistic_counts": 0.0,
            "majority": -0.4,
        }.items():
            for seed in range(3):
                run = {"task": "drugs", "train_set": name, "strategy": strategy, "seed": seed, "n_train": n_train}
                run["fingerprint"] = f"{name}{strategy}{seed}"
                score = 0.6 + ahead + 0.01 * seed
                values = {"accuracy": score, "macro_f1": score, "recall:a": score, "recall:b": score}
                rows += [run | {"metric": metric, "value": value} for metric, value in values.items()]
    return pd.DataFrame(rows)


def test_the_curve_has_a_point_for_each_number_of_cells(curve_metrics):
    curve = learning_curves.learning_curve(curve_metrics)
    full = curve[(curve["strategy"] == "full") & (curve["metric"] == "macro_f1")]
    assert full["cells"].tolist() == [10, 100]
    np.testing.assert_allclose(full["mean"], [0.51, 0.71])
    assert (full["n"] == 3).all()
    half = 4.302653 * 0.01 / np.sqrt(3)  # t of 2 degrees of freedom, sd 0.01
    np.testing.assert_allclose(full["high"] - full["mean"], half, rtol=1e-5)


def test_all_cells_belong_to_the_curve_only_beside_fewer(curve_metrics):
    alone = curve_metrics.assign(train_set="single_cell")
    assert learning_curves.rows_of(alone).empty
    assert len(learning_curves.rows_of(pd.concat([curve_metrics, alone]))) == 2 * len(curve_metrics)
    assert learning_curves.learning_curve(alone).empty
    assert learning_curves.sentences(alone) == {}


def test_it_is_said_what_is_best_and_whether_the_linear_model_is_beaten(curve_metrics):
    few, many = learning_curves.sentences(curve_metrics)["drugs"]
    assert few.startswith("With 10 cells of each class logistic_counts scores highest, 0.610 (")
    assert few.endswith("of the strategies full, which loses to logistic_counts: -0.100 (-0.100 to -0.100).")
    assert many.startswith("With 100 cells of each class full scores highest, 0.710 (")
    assert "which beats logistic_counts: +0.100" in many
    assert trainset_effects.sentences(curve_metrics)["drugs"] == [few, many]


def test_strategies_are_compared_where_the_curve_ends(curve_metrics):
    assert set(trainset_effects.strategy_rows(curve_metrics)["train_set"]) == {"single_cell_n100"}


def test_one_figure_shows_it_and_no_other_figure_of_train_sets(curve_metrics):
    plotting.set_style()
    drawings = trainset_figures.drawings(curve_metrics, simulated=True)
    assert list(drawings) == ["fig9_drugs_learning_curve"]
    drawing = drawings["fig9_drugs_learning_curve"]
    assert drawing.figure.get_suptitle() == "drugs: score against labelled cells (simulated)"
    styles = {line.get_label(): line.get_linestyle() for line in drawing.figure.axes[0].lines}
    assert styles == {"full": "-", "logistic_counts": "--", "majority": "--"}
    np.testing.assert_allclose(drawing.figure.axes[1].lines[0].get_ydata(), [0.51, 0.71])
