"""Scores of a run: checked by hand and against one another."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate.metrics import ScoreError, confusion_table, score

CLASSES = ["b", "a"]
# true b: 3 cells, predicted b, b, a; true a: 1 cell, predicted a
LABELS = ["b", "b", "b", "a"]
PROBABILITIES = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])


def scored(labels=LABELS, probabilities=PROBABILITIES, classes=CLASSES):
    return score(labels, probabilities, classes).set_index("metric")["value"]


def test_scores_by_hand():
    found = scored()
    assert found["accuracy"] == 3 / 4
    # F1 of b: precision 1, recall 2/3; of a: precision 1/2, recall 1
    assert found["macro_f1"] == pytest.approx((2 * 1 * (2 / 3) / (5 / 3) + 2 * 0.5 * 1 / 1.5) / 2)
    assert found["recall:b"] == pytest.approx(2 / 3)
    assert found["recall:a"] == 1
    assert found.filter(like="confusion:").to_dict() == {
        "confusion:b:b": 2,
        "confusion:b:a": 1,
        "confusion:a:b": 0,
        "confusion:a:a": 1,
    }


def test_macro_f1_counts_every_class_the_same():
    """Predicting the frequent class always is right for most cells and worthless for macro-F1."""
    always = np.tile([0.9, 0.1], (100, 1))
    found = scored(["b"] * 99 + ["a"], always)
    assert found["accuracy"] == 0.99
    assert found["macro_f1"] < 0.5
    assert found["recall:a"] == 0


def test_a_class_without_test_cells_has_no_recall_and_no_say():
    found = scored(probabilities=np.c_[PROBABILITIES, np.zeros(4)], classes=["b", "a", "rare"])
    assert np.isnan(found["recall:rare"])
    assert found["macro_f1"] == pytest.approx(scored()["macro_f1"])


def test_the_order_of_the_classes_does_not_change_the_scores():
    turned = scored(probabilities=PROBABILITIES[:, ::-1], classes=CLASSES[::-1])
    assert turned.drop(["accuracy", "macro_f1"]).to_dict() == scored().drop(["accuracy", "macro_f1"]).to_dict()
    assert turned["macro_f1"] == pytest.approx(scored()["macro_f1"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [], "probabilities": np.empty((0, 2))}, "no test cells"),
        ({"labels": LABELS[:3]}, r"shape \(4, 2\), expected \(3, 2\)"),
        ({"classes": ["b", "a", "c"]}, r"expected \(4, 3\)"),
        ({"labels": ["b", "b", "b", "z"]}, "no class of this run: z"),
        ({"probabilities": PROBABILITIES * np.nan}, "4 of 4 test cells are negative, NaN"),
        ({"probabilities": PROBABILITIES * 3}, "do not sum to 1"),
        ({"probabilities": np.array([[1.5, -0.5], *PROBABILITIES[1:]])}, "1 of 4 test cells are negative"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, sentence):
    with pytest.raises(ScoreError, match=sentence):
        scored(**change)


def test_confusion_table_adds_up_runs_and_keeps_the_order():
    rows = score(LABELS, PROBABILITIES, CLASSES)
    table = confusion_table(rows)
    assert table.index.tolist() == table.columns.tolist() == CLASSES
    assert table.to_numpy().tolist() == [[2, 1], [0, 1]]
    assert confusion_table(pd.concat([rows, rows])).to_numpy().tolist() == [[4, 2], [0, 2]]


def test_class_names_may_hold_the_separator():
    classes = ["CD4+:naive", "CD4+"]
    table = confusion_table(score(["CD4+", "CD4+:naive"], np.eye(2)[::-1], classes))
    assert table.to_numpy().tolist() == [[1, 0], [0, 1]]


def test_confusion_table_of_failed_runs_is_empty():
    assert confusion_table(pd.DataFrame({"metric": ["status:failed"], "value": [1.0]})).empty
