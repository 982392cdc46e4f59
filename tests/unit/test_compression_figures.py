"""Table, sentences and figure of compressed variants, from made-up measurements of 40 cells."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from tuneformer.evaluate import comparisons, compression_table
from tuneformer.finetune.compression import Measured
from tuneformer.report import compression_figures, plotting
from tuneformer.study import paths
from tuneformer.study.params import load_study

CLASSES = ["x", "y", "z"]
VARIANTS = ("fp32", "int8_weights", "pruned_50", "onnx")


def predictions(wrong, rng):
    labels = np.resize(CLASSES, 40)
    predicted = labels.copy()
    for row in wrong:
        predicted[row] = CLASSES[(CLASSES.index(labels[row]) + 1) % 3]
    table = pd.DataFrame({"cell": [f"cell{n}" for n in range(40)], "label": labels})
    for name in CLASSES:
        table[f"probability:{name}"] = np.where(predicted == name, 0.8, 0.1) + rng.random(40) * 0.01
    return table


@pytest.fixture
def settings():
    return load_study("tiny")


@pytest.fixture
def measured():
    rng = np.random.default_rng(0)
    wrong = {"fp32": range(6), "int8_weights": [*range(5), 30], "pruned_50": range(25), "onnx": range(6)}
    sizes = {"fp32": 1_000_000, "int8_weights": 260_000, "pruned_50": 1_000_000, "onnx": 1_020_000}
    rates = {
        "fp32": [100.0] * 4,
        "int8_weights": [90.0, 80.0, 60.0, 70.0],
        "pruned_50": [100.0] * 4,
        "onnx": [150.0] * 4,
    }
    memory = {"fp32": (450.0, 500.0), "int8_weights": (450.0, 480.0), "pruned_50": (450.0, 501.0), "onnx": (50.0, 90.0)}
    return {
        name: Measured(
            fingerprint=f"print of {name}",
            file_bytes=sizes[name],
            zipped_bytes=sizes[name] // 2,
            import_memory_mb=memory[name][0],
            peak_memory_mb=memory[name][1],
            rates={1: rates[name]},
            reference_rates={1: [100.0, 100.0, 50.0, 100.0]},
            device="cpu of the test",
            predictions=predictions(wrong[name], rng),
        )
        for name in VARIANTS
    }


@pytest.fixture
def table(settings, measured):
    return compression_table.compression_table(settings, measured)


def number(table, variant, metric, column="value"):
    rows = table[(table["variant"] == variant) & (table["metric"] == metric)]
    assert len(rows) == 1
    return rows[column].item()


def test_the_table_holds_what_was_measured(table):
    assert list(table["variant"].unique()) == list(VARIANTS)
    assert list(table) == list(compression_table.COLUMNS)
    assert table.groupby("variant").size().unique().tolist() == [11]
    assert number(table, "int8_weights", "file_bytes") == 260_000
    assert number(table, "int8_weights", "model_memory_mb") == 30
    assert [number(table, "int8_weights", "cells_per_second:1", key) for key in ("value", "low", "high")] == [
        75,
        67.5,
        82.5,
    ]
    ratios = [0.9, 0.8, 1.2, 0.7]  # of neighbours, not of medians
    assert number(table, "int8_weights", "speed:1") == pytest.approx(np.median(ratios))
    assert number(table, "int8_weights", "speed:1", "low") == pytest.approx(np.percentile(ratios, 25))
    assert set(table["n_test"]) == {40}
    assert set(table.loc[table["variant"] == "onnx", "fingerprint"]) == {"print of onnx"}


def test_scores_and_agreement_are_those_of_the_predictions(table, measured):
    chosen = {name: found.predictions.iloc[:, 2:].to_numpy().argmax(axis=1) for name, found in measured.items()}
    labels = np.resize([0, 1, 2], 40)
    for name in VARIANTS:
        assert number(table, name, "accuracy") == pytest.approx((chosen[name] == labels).mean())
        f1 = f1_score(labels, chosen[name], average="macro")
        assert number(table, name, "macro_f1") == pytest.approx(f1)
        own = f1_score(labels, chosen["fp32"], average="macro")
        assert number(table, name, "macro_f1_difference") == pytest.approx(f1 - own)
    assert number(table, "int8_weights", "agreement") == pytest.approx(38 / 40)
    assert number(table, "pruned_50", "agreement") == pytest.approx(21 / 40)
    assert [number(table, "onnx", "agreement", key) for key in ("value", "low", "high")] == [1, 1, 1]


def test_intervals_are_percentiles_of_paired_draws(table, measured):
    """The accuracy of int8_weights differs from that of fp32 in two cells, one won and one lost."""
    weights, _ = comparisons.draw_weights(
        pd.Index(measured["fp32"].predictions["cell"]), None, comparisons.SAMPLES, np.random.default_rng(0)
    )
    change = np.zeros(40)
    change[[5, 30]] = 1, -1
    expected = np.quantile(weights @ change / 40, [0.025, 0.975])
    found = [number(table, "int8_weights", "accuracy_difference", key) for key in ("low", "high")]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] < 0 < found[1]
    for name in ("fp32", "onnx"):  # the same classes in every draw
        keys = ("value", "low", "high")
        assert [number(table, name, "macro_f1_difference", key) for key in keys] == [0, 0, 0]


def test_whole_groups_are_drawn_where_groups_are_held_out(settings, measured):
    group = np.repeat(["g", "h"], 20)
    for found in measured.values():
        found.predictions["group"] = group
    table = compression_table.compression_table(settings, measured)
    chosen = measured["pruned_50"].predictions.iloc[:, 2:5].to_numpy().argmax(axis=1)
    right = chosen == np.resize([0, 1, 2], 40)
    found = [number(table, "pruned_50", "accuracy", key) for key in ("low", "high")]
    np.testing.assert_allclose(found, sorted([right[:20].mean(), right[20:].mean()]))  # of two, one is drawn twice


def test_front_holds_what_no_other_beats():
    points = {"a": (1, 0.5), "b": (2, 0.5), "c": (2, 0.6), "d": (3, 0.7), "e": (3, 0.7), "f": (4, 0.65)}
    rows = [(name, *pair) for name, (x, y) in points.items() for pair in (("file_bytes", x), ("macro_f1", y))]
    table = pd.DataFrame(rows, columns=["variant", "metric", "value"])
    assert compression_table.front(table, "file_bytes", smaller=True) == ["a", "c", "d", "e"]
    assert compression_table.front(table, "file_bytes", smaller=False) == ["d", "e", "f"]


def test_sentences_name_the_smallest_and_the_fastest_that_are_not_clearly_worse(table):
    assert compression_table.clearly_worse(table) == ["pruned_50"]
    worse, small, fast, memory = compression_table.sentences(table)
    assert worse == "Clearly worse than fp32 in macro-F1: pruned_50."
    assert small.startswith("Of the others int8_weights has the smallest file: 0.26 MB, 26% of fp32; difference")
    start = (
        "On one thread onnx is the fastest of them, 1.50 times as fast as fp32; difference in macro-F1 +0.000 (+0.000"
    )
    assert fast.startswith(start)
    assert memory == (
        "The process that takes the least memory is that of onnx, 90 MB; that of fp32 takes 500 MB, 90% of them before "
        "the model is loaded."
    )


def test_readers_see_one_row_a_variant(table):
    shown = compression_table.readable(table)
    assert list(shown.index) == list(VARIANTS)
    assert shown.loc["int8_weights", ["File (MB)", "Zipped (MB)", "Process (MB)", "… by model (MB)"]].tolist() == [
        "0.26", "0.13", "480", "30",
    ]  # fmt: skip
    assert shown.loc["int8_weights", ["Cells/s, 1 thread", "Times fp32, 1", "Same prediction"]].tolist() == [
        "75", "0.85", "95.0%",
    ]  # fmt: skip
    assert shown.loc["fp32", "Difference (95 % interval)"] == "+0.000 (+0.000 to +0.000)"


def test_the_table_is_written_with_the_results(table, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    assert compression_table.write_table(settings, table) == "results/tiny/compression.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tiny" / "compression.csv"), table, check_dtype=False)


def test_the_figure_shows_every_variant_once_in_each_panel(table):
    plotting.set_style()
    drawing = compression_figures.pareto(table, simulated=True)
    assert drawing.figure.get_suptitle() == "Compressed variants of one model (simulated)"
    assert list(drawing.data["variant"]) == list(VARIANTS)
    assert list(drawing.data["kind"]) == ["fp32", "int8_weights", "pruned", "onnx"]
    for ax, (metric, unit) in zip(drawing.figure.axes, {"file_bytes": 1e6, "speed:1": 1}.items(), strict=True):
        drawn = np.concatenate([points.get_offsets() for points in ax.collections if hasattr(points, "get_sizes")
                                and len(points.get_sizes())])  # fmt: skip
        expected = drawing.data[[metric, "macro_f1"]].to_numpy() / [unit, 1]
        np.testing.assert_allclose(sorted(map(tuple, drawn)), sorted(map(tuple, expected)))
    worst = drawing.data.set_index("variant").loc["pruned_50"]
    fp32 = number(table, "fp32", "macro_f1")
    assert worst["high"] == pytest.approx(fp32 + number(table, "pruned_50", "macro_f1_difference", "high"))
    assert worst["low"] < worst["macro_f1"] < worst["high"]
    plt.close(drawing.figure)
