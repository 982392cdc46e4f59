"""The published setting beside the tuned one: means, intervals and paired differences against scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tuneformer.evaluate.tuning_table import comparison, readable
from tuneformer.study import paths

PUBLISHED = {
    ("doses", "full"): [0.50, 0.60, 0.55],
    ("doses", "selective"): [0.40, None, 0.50],
    ("doses", "lora"): [0.30, 0.30, 0.30],
    ("drugs", "full"): [0.70, 0.75, 0.80],
}
TUNED = {
    ("doses", "full"): [0.58, 0.61, 0.66],
    ("doses", "selective"): [0.45, 0.50, None],
    ("doses", "lora"): [None, None, None],
}


@pytest.fixture
def params(tmp_path, monkeypatch):
    """A study and its tuned copy: rates of their own for two strategies."""
    (tmp_path / "_base.yaml").write_text((paths.PARAMS / "_base.yaml").read_text())
    own = "tasks: [doses, drugs]\nlearning_rate: 1e-3\nfreeze_layers: 2\n"
    (tmp_path / "mine.yaml").write_text(own)
    (tmp_path / "mine_tuned.yaml").write_text(
        own.replace("layers: 2", "layers: 1") + "learning_rates: {full: 4e-3, selective: 2e-4}\n"
    )
    for task in ("doses", "drugs"):
        (tmp_path / f"{task}.yaml").write_text("label: dose\n")
    monkeypatch.setattr(paths, "PARAMS", tmp_path)


def metrics_of(study, scores):
    rows = []
    for (task, strategy), values in scores.items():
        for seed, value in enumerate(values):
            run = {"study": study, "task": task, "train_set": "single_cell", "strategy": strategy, "seed": seed}
            if value is None:
                rows.append(run | {"metric": "status:failed", "value": 1.0})
            else:
                rows += [run | {"metric": "accuracy", "value": 0.9}, run | {"metric": "macro_f1", "value": value}]
    return pd.DataFrame(rows)


def test_both_settings_stand_side_by_side(params):
    table = comparison(metrics_of("mine", PUBLISHED), metrics_of("mine_tuned", TUNED))
    assert list(zip(table["task"], table["strategy"], strict=True)) == list(TUNED)  # drugs was not tuned
    assert list(table["learning_rate"]) == [1e-3, 1e-3, 1e-3]
    assert list(table["tuned_learning_rate"]) == [4e-3, 2e-4, 1e-3]
    assert table["freeze_layers"].tolist() == [pd.NA, 2, pd.NA]
    assert table["tuned_freeze_layers"].tolist() == [pd.NA, 1, pd.NA]
    full = table.iloc[0]
    for prefix, scores in {"": PUBLISHED, "tuned_": TUNED}.items():
        values = scores["doses", "full"]
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = full[[f"{prefix}macro_f1", f"{prefix}low", f"{prefix}high"]].tolist()
        assert found == pytest.approx([np.mean(values), expected.low, expected.high])
    paired = stats.ttest_rel(TUNED["doses", "full"], PUBLISHED["doses", "full"]).confidence_interval(0.95)
    found = full[["difference", "difference_low", "difference_high", "pairs"]].tolist()
    assert found == pytest.approx([0.2 / 3, paired.low, paired.high, 3])


def test_runs_that_failed_leave_what_is_known(params):
    table = comparison(metrics_of("mine", PUBLISHED), metrics_of("mine_tuned", TUNED)).set_index("strategy")
    one = table.loc["selective"]
    assert (one["seeds"], one["tuned_seeds"], one["pairs"]) == (2, 2, 1)
    assert one["tuned_macro_f1"] == pytest.approx(0.475)
    assert one["difference"] == pytest.approx(0.05)  # seed 0, which both have
    assert np.isnan(one["difference_low"])
    none = table.loc["lora"]
    assert (none["tuned_seeds"], none["pairs"]) == (0, 0)
    assert none[["tuned_macro_f1", "tuned_low", "difference", "difference_high"]].isna().all()
    assert none["macro_f1"] == pytest.approx(0.3)


def test_baselines_are_left_out_and_nothing_in_common_is_an_empty_table(params):
    simple = {("doses", "logistic_counts"): [0.6, 0.6, 0.6]}
    table = comparison(metrics_of("mine", PUBLISHED | simple), metrics_of("mine_tuned", TUNED | simple))
    assert "logistic_counts" not in set(table["strategy"])
    nothing = comparison(metrics_of("mine", simple), metrics_of("mine_tuned", simple))
    assert nothing.empty
    assert list(nothing.columns) == list(table.columns)


def test_the_table_for_readers_is_rounded_and_empty_without_a_tuned_copy(params):
    metrics, tuned = metrics_of("mine", PUBLISHED), metrics_of("mine_tuned", TUNED)
    shown = readable(comparison(metrics, tuned))
    assert shown.index.tolist() == list(TUNED)
    full = shown.loc["doses", "full"]
    assert (full["One rate for all: rate"], full["Tuned: rate"]) == ("0.001", "0.004")
    assert full["Difference (95 % interval)"].startswith("+0.067 (")
    assert shown.loc[("doses", "lora"), "Tuned: macro-F1"] == "-"
    assert readable(comparison(metrics, tuned[:0])).empty
