"""Figures show the numbers they are given and judge nothing; they say what is simulated; their bytes are stable."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from tuneformer import paths
from tuneformer.evaluate.scores import confusion
from tuneformer.report import figures, run_figures, tables


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    figures.set_style()
    yield
    plt.close("all")


def texts(figure):
    """Everything that is written in a figure."""
    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(plt.Text) if item.get_text()]


def named_positions(ax):
    return {label.get_text(): place for label, place in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}


def diamonds(ax):
    """The means that a panel shows: place on y, to value and whether the marker is filled."""
    found = {}
    for line in ax.lines:
        if line.get_marker() == "D":
            filled = line.get_markerfacecolor() != "white"
            points = zip(line.get_ydata(), line.get_xdata(), strict=True)
            found |= {float(y): (float(x), filled) for y, x in points if np.isfinite(x)}
    return found


DRAWN = {
    "arm_scores": figures.arm_scores,
    "contrast_differences": figures.contrast_differences,
    "by_columns": figures.by_columns,
    "class_recalls": lambda results: figures.class_recalls(results, "drugs"),
    "cost_and_score": figures.cost_and_score,
    "class_sizes": figures.class_sizes,
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_says_when_it_is_simulated(results, name):
    assert DRAWN[name](results).get_suptitle().endswith(" (simulated)")
    results.answer["simulated"] = False
    assert "simulated" not in DRAWN[name](results).get_suptitle()


def test_scores_show_every_run_and_the_means_of_the_answer(results):
    figure = figures.arm_scores(results)
    for ax, task in zip(figure.axes, results.answer["tasks"], strict=True):
        names, shown = named_positions(figure.axes[0]), diamonds(ax)
        assert [*names] == [arm["arm"] for arm in results.answer["tasks"][0]["arms"]]
        for arm in task["arms"]:
            assert shown[names[arm["arm"]]][0] == pytest.approx(arm["mean"])
        ticks = np.concatenate([dots.get_offsets()[:, 0] for dots in ax.collections])
        scores = results.runs.loc[results.runs["task"] == task["task"], "macro_f1"].dropna()
        assert sorted(ticks) == pytest.approx(sorted(scores))
    assert figure.axes[0].yaxis_inverted() or figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]
    assert {"drugs", "doses", "Macro-F1", "fine-tuned", "control", "baseline"} <= set(texts(figure))


def test_only_what_the_answer_calls_higher_or_lower_is_filled(results):
    def filled(figure):
        names = {place: name for name, place in named_positions(figure.axes[0]).items()}
        return {names[place] for place, (_, is_filled) in diamonds(figure.axes[0]).items() if is_filled}

    assert filled(figures.arm_scores(results)) == {"full", "pseudobulk_k10"}
    for task in results.answer["tasks"]:
        for contrast in task["contrasts"]:
            contrast["verdict"] = "not decided"
    assert filled(figures.arm_scores(results)) == set()


def test_contrasts_show_difference_interval_and_margin(results):
    figure = figures.contrast_differences(results)
    ends = [
        sorted(np.ravel(line.get_xdata()))
        for line in figure.axes[0].lines
        if line.get_marker() in ("None", "")
        and len(set(np.ravel(line.get_ydata()))) == 1
        and len(line.get_xdata()) == 2
    ]
    for one in results.answer["tasks"][0]["contrasts"]:
        assert any(np.allclose(pair, [one["low"], one["high"]]) for pair in ends)
    words = set(texts(figure))
    assert {"pre-training: full - random_init", "higher", "lower", "same", "not decided"} <= words
    assert "Lines: 95 % interval. Grey band: within 0.03, which counts as the same." in words


def test_a_contrast_that_could_not_be_compared_is_left_empty(results):
    for task in results.answer["tasks"]:
        task["contrasts"][0] |= {"difference": None, "low": None, "high": None, "verdict": "not decided"}
    assert "pre-training: full - random_init" in texts(figures.contrast_differences(results))


def test_columns_that_are_numbers_give_lines_and_arms_without_one_are_horizontal(results):
    figure = figures.by_columns(results)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "10"]
    lines = [line for line in ax.lines if list(line.get_xdata()) == [2, 10]]
    means = {arm["arm"]: arm["mean"] for arm in results.answer["tasks"][0]["arms"]}
    assert lines[0].get_ydata().tolist() == pytest.approx([means["pseudobulk_k2"], means["pseudobulk_k10"]])
    words = set(texts(figure))
    assert {"arm full", "arm logistic_counts", "Macro-F1", "Cells behind a point (k)"} <= words
    assert "Faint: runs. Lines and marks: means, with the 95 % interval." in words


def test_arms_that_differ_in_more_than_the_columns_have_lines_of_their_own(results):
    """Or a line would go through arms that cannot be compared."""
    runs = results.runs.assign(aggregation="sum", depth="own", steps_of="own")
    runs["aggregation"] = runs["aggregation"].mask(runs["arm"] == "pseudobulk_k2", "mean")
    steps = runs[runs["arm"] == "pseudobulk_k10"].assign(arm="steps", train_set="single_cell", steps_of="pseudobulk")
    thinned = runs[runs["arm"] == "pseudobulk_k10"].assign(arm="thinned", depth="single_cell")
    found = tables.lines_of(pd.concat([runs, steps, thinned]), "k", "aggregation")
    lines = dict(zip(found.index, found["line"], strict=True))
    assert lines["pseudobulk_k2"] == "mean"
    assert lines["pseudobulk_k10"] == "sum"
    assert lines["thinned"] == "sum, depth: single_cell"
    assert lines["steps"] == "train_set: single_cell, steps_of: pseudobulk"  # which aggregates nothing
    assert found["k"].dropna().to_dict() == {"pseudobulk_k2": 2, "pseudobulk_k10": 10, "steps": 10, "thinned": 10}


def test_an_arm_that_does_not_read_the_column_is_horizontal(results):
    runs = results.runs.assign(generator="gaussian")
    runs["train_set"] = runs["train_set"].replace("pseudobulk", "synthetic")
    found = tables.lines_of(runs, "generator", None)["generator"]
    assert found.dropna().index.tolist() == ["pseudobulk_k2", "pseudobulk_k10"]


def test_a_column_that_is_not_judged_has_no_interval(results):
    settings = results.settings.model_copy(update={"figure": {"x": "k", "y": "accuracy"}})
    changed = type(results)(**{**vars(results), "settings": settings})
    assert "Faint: runs. Lines and marks: means." in texts(figures.by_columns(changed))


def test_columns_of_names_give_points(results):
    settings = results.settings.model_copy(update={"figure": {"x": "strategy", "hue": "train_set"}})
    figure = figures.by_columns(type(results)(**{**vars(results), "settings": settings}))
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == ["full", "linear\nprobe", "random\ninit", "logistic\ncounts"]
    assert {"single_cell", "pseudobulk, k: 2", "pseudobulk, k: 10"} <= set(texts(figure))


def test_recalls_are_those_of_the_predictions_with_the_size_of_each_class(results):
    results.answer["tasks"][0]["test_cells"]["Dex"] = 7
    figure = figures.class_recalls(results, "drugs")
    words = texts(figure)
    own = results.predictions.astype(str).query("task == 'drugs' and arm == 'full' and label == 'Nutlin'")
    assert f"{(own['predicted'] == 'Nutlin').mean():.2f}" in words
    assert "Nutlin\n20 cells" in words
    assert "Dex *\n7 cells" in words
    assert any("fewer than 10 test cells" in word for word in words)


def test_sizes_of_classes_are_written_and_those_left_out_are_hatched(results):
    results.answer["tasks"][0] |= {"test_cells": {"Untreated": 150, "Dex": 43, "rare": 7}, "left_out": {"rare": 7}}
    figure = figures.class_sizes(results)
    assert {"Untreated", " 150 (75%)", " 7 (4%)", " 30 (50%)"} <= set(texts(figure))
    assert [bar.get_hatch() for bar in figure.axes[0].patches] == [None, None, "///"]


def test_a_class_that_is_left_out_is_not_in_the_ticks_either(results):
    results.answer["tasks"][0]["left_out"] = {"Dex": 7}
    judged = results.judged
    rows = results.predictions.query("task == 'drugs' and arm == 'full' and seed == 0")
    kept = ["Untreated", "Nutlin"]
    expected = f1_score(rows["label"], rows["predicted"], labels=kept, average="macro")
    assert results.runs[["task", "arm", "seed"]].iloc[0].tolist() == ["drugs", "full", 0]
    assert judged["macro_f1"].iloc[0] == pytest.approx(expected)
    assert judged["macro_f1"].isna().tolist() == results.runs["macro_f1"].isna().tolist()


def test_the_ceiling_is_a_dashed_line_and_no_arm(results):
    for task in results.answer["tasks"]:
        one = {**task["arms"][0], "arm": "bayes", "mean": 0.91, "is_ceiling": True, "is_baseline": False}
        task["arms"].insert(0, one)
    bayes = results.runs[results.runs["arm"] == "full"].assign(arm="bayes", strategy="bayes")
    results = type(results)(**{**vars(results), "runs": pd.concat([results.runs, bayes], ignore_index=True)})
    for figure, place in ((figures.arm_scores(results), "get_xdata"), (figures.by_columns(results), "get_ydata")):
        for ax in figure.axes:
            (line,) = [line for line in ax.lines if line.get_label() == "ceiling (Bayes)"]
            assert (line.get_linestyle(), getattr(line, place)()[0]) == ("--", 0.91)
        words = texts(figure)
        assert "ceiling (Bayes)" in words
        assert not {"bayes", "arm bayes"} & set(words)
    assert "bayes" not in texts(figures.cost_and_score(results))
    assert tables.arms(results.answer, results.runs)["Arm"][0] == "bayes (ceiling)"


def test_all_cells_are_a_point_of_a_learning_curve(results):
    runs = results.runs[results.runs["arm"].isin(["full", "linear_probe", "random_init", "logistic_counts"])]
    runs = runs.assign(cells_per_class=runs["arm"].map({"full": 10, "linear_probe": 30}), train_set="single_cell")
    found = tables.lines_of(runs.assign(n_train=300), "cells_per_class", None)
    assert found["cells_per_class"].to_dict() == {
        "full": 10,
        "linear_probe": 30,
        "random_init": 100,
        "logistic_counts": 100,
    }


def test_cost_shows_each_run_that_has_a_score(results):
    figure = figures.cost_and_score(results)
    assert len(figure.axes) == 4
    for ax in figure.axes:
        assert ax.get_xscale() == "log"
    points = np.concatenate([dots.get_offsets() for dots in figure.axes[0].collections])
    mine = results.runs[(results.runs["task"] == "drugs")]
    assert sorted(points[:, 0]) == pytest.approx(sorted(mine["wall_seconds"]))
    assert set(results.runs["arm"]) <= set(texts(figure))


def test_training_curves_have_a_line_per_run_and_mark_the_epochs_that_were_kept(results):
    history = results.history[(results.history["task"] == "drugs") & (results.history["arm"] == "full")]
    figure = run_figures.training_curves(history.assign(best_epoch=2), title="full (simulated)")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["train loss", "validation loss"]
    assert sum(list(line.get_xdata()) == [1, 2, 3] for line in left.lines) == 2 * 3
    assert right.lines[0].get_ydata().tolist() == [0.3, 0.6, 0.5]
    marks = np.concatenate([dots.get_offsets() for dots in right.collections])
    assert marks.tolist() == [[2, 0.6]] * 3


def test_what_a_failed_job_left_is_drawn_without_numbers():
    run_figures.training_curves(pd.DataFrame(), title="t")
    run_figures.confidence_curves(pd.DataFrame(), title="t")
    run_figures.roc_curves(pd.DataFrame(columns=["label"]), title="t")
    none = pd.DataFrame(columns=["label", "predicted"])  # as `runs.read_predictions` reads it
    assert "no predictions" in texts(run_figures.confusion(confusion(none, ["a", "b"]), "t"))


def test_a_row_of_a_confusion_matrix_sums_to_one():
    table = confusion(pd.DataFrame({"label": list("aaaab"), "predicted": list("aaabb")}), ["a", "b", "c"])
    written = texts(run_figures.confusion(table, "t"))
    assert {"0.75", "0.25", "1.00"} < set(written)
    assert not any("nan" in word for word in written)


@pytest.fixture
def probabilities():
    labels = np.array(list("abab") * 10)
    right = np.where(np.arange(40) % 5 == 0, 0.2, 0.9)
    of_a = np.where(labels == "a", right, 1 - right)
    return pd.DataFrame({"label": labels, "probability:a": of_a, "probability:b": 1 - of_a})


def test_confidence_curves_show_bins_and_coverage(probabilities):
    left, right = run_figures.confidence_curves(probabilities, title="t").axes
    shown = next(line for line in left.lines if line.get_marker() == "o")
    assert shown.get_xdata() == pytest.approx([0.8, 0.9])
    assert shown.get_ydata() == pytest.approx([0.0, 1.0])
    heights = left.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.8 - 1.96 * np.sqrt(0.8 * 0.2 / 8))  # 8 cells, each binomial
    assert right.lines[0].get_ydata()[-1] == pytest.approx(0.8)


def test_roc_curves_leave_out_classes_without_test_cells(probabilities):
    words = texts(run_figures.roc_curves(probabilities.assign(**{"probability:c": 0.0}), title="t"))
    assert any(word.startswith("a (AUC") for word in words)
    assert not any(word.startswith("c (AUC") for word in words)


def test_arms_differ_in_colour_and_the_control_is_grey():
    palette = figures._palette(["random_init", *(f"arm{number}" for number in range(9))])
    assert palette["random_init"] == figures.CONTROL
    assert len(set(palette.values())) == 10


DRAW = """
import sys, pickle
from pathlib import Path
from tuneformer import paths
from tuneformer.report import figures, run_figures, tables
paths.RUNS = Path(sys.argv[1])
figures.set_style()
results = pickle.loads(Path(sys.argv[2]).read_bytes())
figures.save(figures.arm_scores(results), results.settings, "scores", results.runs)
"""


def test_saved_files_are_the_same_bytes_in_another_process_at_another_time(results, tmp_path, monkeypatch):
    parts = SimpleNamespace(settings=results.settings, runs=results.runs, judged=results.judged, answer=results.answer)
    (tmp_path / "results").write_bytes(pickle.dumps(parts))
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "700000000"}
    command = [sys.executable, "-c", DRAW, str(tmp_path / "there"), str(tmp_path / "results")]
    subprocess.run(command, check=True, env=environment, cwd=paths.ASSETS)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "here")
    files = figures.save(figures.arm_scores(results), results.settings, "scores", results.runs)
    assert files == [f"here/small/figures/scores.{kind}" for kind in ("png", "pdf", "csv")]
    here, there = (tmp_path / name / "small" / "figures" for name in ("here", "there"))
    assert sorted(file.name for file in there.iterdir()) == ["scores.csv", "scores.pdf", "scores.png"]
    for file in there.iterdir():
        assert file.read_bytes() == (here / file.name).read_bytes(), file.name
    assert (here / "scores.pdf").read_bytes().startswith(b"%PDF")
    assert b"Date" not in (here / "scores.pdf").read_bytes()


def test_an_interrupted_save_leaves_the_old_figure(results, monkeypatch):
    figure = plt.figure(figsize=(2, 1))
    figures.save(figure, results.settings, "scores")
    folder = paths.RUNS / "small" / "figures"
    before = (folder / "scores.png").read_bytes()

    def interrupted(partial, **_):
        partial.write_bytes(b"half a pic")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        figures.save(figure, results.settings, "scores")
    assert (folder / "scores.png").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["scores.pdf", "scores.png"]
