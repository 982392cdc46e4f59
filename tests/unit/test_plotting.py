"""Figures: they show the numbers they are given, say when these are simulated, and are the same bytes each time."""

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate import statistics
from tuneformer.evaluate.metrics import confusion_table
from tuneformer.report import plotting
from tuneformer.study import paths


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    plotting.set_style()
    yield
    plt.close("all")


def texts(figure):
    """Everything that is written in a figure."""
    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(plt.Text) if item.get_text()]


def test_scores_show_every_seed_and_the_interval(results):
    figure, data = plotting.strategy_scores(results, simulated=True)
    scores = results[results["metric"] == "macro_f1"]
    shown = data[data["metric"] == "macro_f1"]
    assert sorted(shown["value"]) == sorted(scores["value"])
    drugs = shown[(shown["task"] == "drugs") & (shown["arm"] == "full")]
    expected = statistics.interval(drugs["value"])
    assert drugs[["mean", "low", "high"]].drop_duplicates().to_numpy().tolist() == [
        [expected.mean, expected.low, expected.high]
    ]
    panel = figure.axes[2]  # second row: macro-F1; first column: drugs
    drawn = [line.get_xdata() for line in panel.lines if len(np.atleast_1d(line.get_xdata())) == 3]
    assert drawn[0].tolist() == drugs["value"].tolist()
    ends = panel.collections[0].get_segments()[0][:, 0]
    assert ends.tolist() == [expected.low, expected.high]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["full", "linear_probe", "random_init"]
    assert panel.yaxis_inverted()  # the first strategy of the study stands on top
    assert {"drugs", "doses", "Accuracy", "Macro-F1"} < set(texts(figure))


def test_a_figure_says_when_it_is_simulated(results):
    for simulated in (True, False):
        drawings = [
            plotting.strategy_scores(results, simulated=simulated),
            plotting.cost_and_score(results, simulated=simulated),
            *plotting.confusion_matrices(results, simulated=simulated).values(),
        ]
        for figure, _ in drawings:
            assert figure.get_suptitle().endswith("(simulated)") == simulated


def test_confusion_panels_add_up_the_seeds_and_rows_sum_to_one(results):
    drawings = plotting.confusion_matrices(results, simulated=True)
    assert list(drawings) == ["fig2_confusion_drugs", "fig2_confusion_doses"]
    figure, data = drawings["fig2_confusion_drugs"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["full", "linear_probe", "random_init"]
    assert data.groupby(["arm", "true"])["share"].sum().to_numpy() == pytest.approx(1)
    mine = results[(results["task"] == "drugs") & (results["strategy"] == "full")]
    full = data[data["arm"] == "full"].pivot(index="true", columns="predicted", values="cells")
    expected = confusion_table(mine)
    assert full.loc[expected.index, expected.columns].equals(expected.rename_axis(index="true", columns="predicted"))
    diagonal = data[(data["arm"] == "full") & (data["true"] == data["predicted"])]
    for row in diagonal.itertuples():
        assert f"{row.share:.2f}" in texts(figure)
    doses = drawings["fig2_confusion_doses"].data
    assert doses[doses["arm"] == "full"]["cells"].sum() == 120  # two of three runs finished


def test_panels_above_an_empty_place_keep_their_class_names(results):
    more = pd.concat([results, results[results["strategy"] == "full"].assign(strategy="lora")])
    figure, _ = plotting.confusion_matrices(more, simulated=True)["fig2_confusion_drugs"]
    panels = [ax for ax in figure.axes if ax.axison]
    assert len(panels) == 4
    named = [ax.xaxis.get_tick_params()["labelbottom"] for ax in panels]
    assert named == [False, True, True, True]


def test_a_class_without_cells_leaves_its_row_empty():
    counts = pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"])
    written = texts(plotting.confusion_matrix(counts, title="t"))
    assert {"0.75", "0.25"} < set(written)
    assert "nan" not in written


def test_a_failed_run_is_drawn_without_scores():
    assert "no predictions" in texts(plotting.confusion_matrix(pd.DataFrame(), title="t"))
    plotting.training_curves(pd.DataFrame(), best_epoch=None, title="t")


def test_cost_shows_each_run_that_has_a_score(results):
    figure, data = plotting.cost_and_score(results, simulated=True)
    assert len(data) == 17
    assert {"task", "arm", "seed", "macro_f1", "cost:wall_seconds", "cost:trainable_parameters"} == set(data.columns)
    assert figure.axes[0].get_xscale() == "log"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["full", "linear_probe", "random_init"]


@pytest.mark.parametrize("draw", [plotting.strategy_scores, plotting.cost_and_score])
def test_results_without_scores_are_refused(results, draw):
    failed = results[results["metric"] == "status:failed"]
    with pytest.raises(ValueError, match=r"no run of this study has finished|holds no run with both"):
        draw(failed, simulated=True)


def test_strategies_differ_in_more_than_colour():
    looks = plotting._looks(["random_init", *(f"strategy{number}" for number in range(9))])
    assert looks[0] == (plotting.CONTROL, "s")
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks[1:]}) + 1 == 10


def test_training_curves_mark_the_epoch_that_was_kept():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_loss": [3, 2, 1],
            "validation_loss": [3, 2, 2],
            "validation_macro_f1": [0.1, 0.3, 0.2],
        }
    )
    figure = plotting.training_curves(history, best_epoch=2, title="Run (simulated)")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["train loss", "validation loss", "kept: epoch 2"]
    assert right.lines[0].get_ydata().tolist() == [0.1, 0.3, 0.2]
    assert right.lines[-1].get_xdata() == [2, 2]


def test_loss_curve_shows_its_references():
    curve = pd.DataFrame({"step": [1, 2], "train_loss": [6.0, 5.0], "held_out_loss": [6.1, 5.2]})
    figure = plotting.loss_curve(curve, {"uniform": 6.9, "gene frequency": 6.2}, title="Loss")
    heights = [line.get_ydata()[0] for line in figure.axes[0].lines[2:]]
    assert heights == [6.9, 6.2]
    assert {"uniform", "gene frequency", "held-out cells"} < set(texts(figure))


DRAW = """
import sys, pandas as pd
from pathlib import Path
from tuneformer.report import plotting
from tuneformer.study import paths
paths.FIGURES = Path(sys.argv[1])
plotting.set_style()
data = pd.read_csv(sys.argv[2], float_precision="round_trip")
plotting.save_figures({"fig1_scores": plotting.strategy_scores(data, simulated=True)}, "tiny")
"""


def test_saved_files_are_the_same_bytes_in_another_process_at_another_time(results, tmp_path, monkeypatch):
    results.to_csv(tmp_path / "metrics.csv", index=False)
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "700000000"}
    command = [sys.executable, "-c", DRAW, str(tmp_path / "there"), str(tmp_path / "metrics.csv")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "here")
    plotting.save_figures({"fig1_scores": plotting.strategy_scores(results, simulated=True)}, "tiny")
    here, there = (tmp_path / name / "tiny" for name in ("here", "there"))
    assert sorted(file.name for file in there.iterdir()) == [f"fig1_scores.{kind}" for kind in ("csv", "pdf", "png")]
    for file in there.iterdir():
        assert file.read_bytes() == (here / file.name).read_bytes(), file.name


def test_saving_returns_the_files_and_draws_the_csv_exactly(results, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    drawing = plotting.strategy_scores(results, simulated=True)
    files = plotting.save_figures({"fig1_scores": drawing}, "tiny")
    assert files == [f"figures/tiny/fig1_scores.{kind}" for kind in ("png", "pdf", "csv")]
    stored = pd.read_csv(tmp_path / "tiny" / "fig1_scores.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(stored, drawing.data, check_exact=True)
    assert (tmp_path / "tiny" / "fig1_scores.pdf").read_bytes().startswith(b"%PDF")
    assert b"Date" not in (tmp_path / "tiny" / "fig1_scores.pdf").read_bytes()


def test_an_interrupted_save_leaves_the_old_figure(results, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    drawing = plotting.strategy_scores(results, simulated=True)
    plotting.save_figure(*drawing, "tiny", "fig1_scores")
    before = (tmp_path / "tiny" / "fig1_scores.png").read_bytes()

    def interrupted(partial, **_):
        partial.write_bytes(b"half a pic")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing.figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plotting.save_figure(*drawing, "tiny", "fig1_scores")
    assert (tmp_path / "tiny" / "fig1_scores.png").read_bytes() == before
    assert len(list((tmp_path / "tiny").iterdir())) == 3


def test_confidence_curves_show_bins_with_cells_and_survive_a_failed_run():
    reliability = pd.DataFrame({"confidence": [np.nan, 0.55, 0.9], "accuracy": [np.nan, 0.5, 0.8]})
    coverage = pd.DataFrame({"coverage": [0.5, 1.0], "accuracy": [0.8, 0.65]})
    figure = plotting.confidence_curves(reliability, coverage, title="full on drugs")
    diagonal, shown = figure.axes[0].lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert shown.get_xydata().tolist() == [[0.55, 0.5], [0.9, 0.8]]
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[0.5, 0.8], [1.0, 0.65]]
    assert "full on drugs" in texts(figure)
    empty = plotting.confidence_curves(reliability[:0], coverage[:0], title="failed")
    assert len(empty.axes[0].lines[1].get_xdata()) == 0


def test_baselines_have_a_colour_of_their_own(results):
    baseline = results[results["strategy"] == "linear_probe"].assign(strategy="knn_pca")
    figure = plotting.strategy_scores(pd.concat([results, baseline]), simulated=True).figure
    assert any("Orange: baselines." in text for text in texts(figure))
    assert not any("Orange" in text for text in texts(plotting.strategy_scores(results, simulated=True).figure))
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert colors == {plotting.PALETTE[0], plotting.PALETTE[1], plotting.CONTROL}


def test_of_many_confusion_matrices_only_those_that_matter_are_drawn(results):
    rows = results[(results["task"] == "drugs") & (results["strategy"] == "full")]
    more = [rows.assign(strategy=f"full_batch{size}") for size in range(1, 14)]
    many = pd.concat([results[results["task"] == "drugs"], *more])
    is_best = (many["strategy"] == "full_batch7") & (many["metric"] == "macro_f1")
    many.loc[is_best, "value"] = 2.0
    figure = plotting.confusion_matrices(many, simulated=True)["fig2_confusion_drugs"].figure
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["full_batch7", "full", "random_init"]
