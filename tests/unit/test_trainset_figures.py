"""Figures of train sets: only what a study allows, the numbers that are in their tables, and the signs as they are."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from tuneformer.evaluate import trainset_effects
from tuneformer.report import plotting, trainset_figures
from tuneformer.study import paths

CLASSES = ["Untreated", "BMS"]
PSEUDOBULK = {
    "single_cell": 0.8,
    "single_cell_k5_steps": 0.7,
    "single_cell_k5": 0.66,
    "pseudobulk_k5_sum_thinned": 0.5,
    "pseudobulk_k5_sum": 0.6,
    "pseudobulk_k5_mean": 0.6,
    "pseudobulk_k5_approx_mean": 0.6,
    "pseudobulk_k25_sum": 0.5,
    "pseudobulk_k5_sum_boosted": 0.6,
}
MIXTURE = {
    "single_cell": 0.7,
    "mixture_copies_pad9": 0.7,
    "mixture_nb_pad9": 0.8,
    "mixture_nb_share50": 0.7,
    "synthetic_nb": 0.5,
    "synthetic_nb_untreated": 0.4,
}


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    plotting.set_style()
    yield
    plt.close("all")


def made_up(levels, *, strategy="full", task="drugs", seeds=3):
    """Rows of metrics.csv: recalls about `levels`, 100 cells of each of two classes, a little noise for each seed."""
    rng = np.random.default_rng(0)
    rows = []
    for train_set, level in levels.items():
        for seed in range(seeds):
            right = np.clip(np.rint(100 * (level + rng.normal(0, 0.01, 2))), 0, 100)
            confusion = np.array([[right[0], 100 - right[0]], [100 - right[1], right[1]]])
            found = {"accuracy": right.mean() / 100}
            found["macro_f1"] = np.mean(2 * right / (confusion.sum(axis=0) + 100))
            found |= {f"recall:{name}": value / 100 for name, value in zip(CLASSES, right, strict=True)}
            found |= {
                f"confusion:{a}:{b}": confusion[i, j] for i, a in enumerate(CLASSES) for j, b in enumerate(CLASSES)
            }
            found |= {"cost:wall_seconds": 2.0 + seed, "cost:trainable_parameters": 100.0}
            run = {"task": task, "train_set": train_set, "strategy": strategy, "seed": seed, "n_train": 90}
            run["fingerprint"] = f"{task}{train_set}{strategy}{seed}"
            rows += [run | {"metric": metric, "value": value} for metric, value in found.items()]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def bulk():
    """Figures of a pseudo-bulk study."""
    plotting.set_style()
    return trainset_figures.drawings(made_up(PSEUDOBULK), simulated=True)


@pytest.fixture(scope="module")
def mixed():
    """Figures of a study of mixtures and synthetic cells."""
    plotting.set_style()
    return trainset_figures.drawings(made_up(MIXTURE), simulated=True)


def texts(figure):
    """Everything that is written in a figure."""
    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(plt.Text) if item.get_text()]


def test_a_study_gets_the_figures_that_its_train_sets_allow(results, bulk, mixed):
    assert trainset_figures.drawings(results, simulated=True) == {}
    assert list(bulk) == [
        "fig4_drugs_against_k",
        "fig5_drugs_decomposition",
        "fig6_drugs_per_class",
        "fig8_drugs_confusion",
    ]
    assert list(mixed) == ["fig6_drugs_per_class", "fig7_drugs_share", "fig8_drugs_confusion"]
    controls = made_up({"single_cell": 0.8, "single_cell_k5": 0.7, "single_cell_n10": 0.6})
    both = ["fig4_drugs_against_k", "fig9_drugs_learning_curve"]
    assert list(trainset_figures.drawings(controls, simulated=True)) == both


def test_several_strategies_get_a_figure_each():
    levels = {"single_cell": 0.8, "single_cell_k5": 0.7}
    both = pd.concat([made_up(levels), made_up(levels, strategy="lora")])
    names = ["fig4_drugs_full_against_k", "fig4_drugs_lora_against_k"]
    assert list(trainset_figures.drawings(both, simulated=True)) == names
    one = pd.concat([made_up(levels), made_up({"single_cell": 0.8}, strategy="majority")])
    assert list(trainset_figures.drawings(one, simulated=True)) == ["fig4_drugs_against_k"]


def test_a_figure_says_when_it_is_simulated(bulk, mixed):
    for figure, _ in [*bulk.values(), *mixed.values()]:
        assert figure.get_suptitle().startswith("drugs: ")
        assert figure.get_suptitle().endswith("(simulated)")
    real = trainset_figures.drawings(made_up({"single_cell": 0.8, "mixture_nb_share50": 0.7}), simulated=False)
    for figure, _ in real.values():
        assert "simulated" not in " ".join(texts(figure))


def test_no_text_leaves_the_figure_and_no_title_runs_into_the_next(bulk, mixed):
    fewest = {"single_cell": 0.8, "pseudobulk_k5_sum": 0.7, "synthetic_nb": 0.6}
    small = trainset_figures.drawings(made_up(fewest), simulated=True)
    for name, (figure, _) in [*bulk.items(), *mixed.items(), *small.items()]:
        figure.canvas.draw()
        frame = figure.get_window_extent()
        titles = [ax._left_title for ax in figure.axes if ax.get_title(loc="left")]
        boxes = [title.get_window_extent() for title in titles]
        for text in [*titles, figure._suptitle, *filter(None, [figure._supxlabel])]:
            box = text.get_window_extent()
            assert box.x0 >= frame.x0, (name, text)
            assert box.x1 <= frame.x1, (name, text)
        for place, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[place + 1 :]), name


def test_scores_against_k_are_the_means_of_the_seeds(bulk):
    metrics = made_up(PSEUDOBULK)
    figure, data = bulk["fig4_drugs_against_k"]
    expected = metrics[metrics["metric"] == "macro_f1"].groupby("train_set")["value"].mean()
    shown = data[data["metric"] == "macro_f1"].set_index("train_set")
    assert shown["mean"].to_dict() == pytest.approx(expected.to_dict())
    aggregations, controls, changed = figure.axes[3:6]  # the second row: macro-F1
    lines = {line.get_label(): line for line in aggregations.lines}
    assert lines["sum"].get_ydata().tolist() == pytest.approx(expected[["pseudobulk_k5_sum", "pseudobulk_k25_sum"]])
    assert lines["single cells"].get_xydata().tolist() == [[1, pytest.approx(expected["single_cell"])]]
    assert {"N/k single cells", "steps of N/k single cells", "sum, as on the left"} <= {
        line.get_label() for line in controls.lines
    }
    assert {"sum, thinned", "sum, boosted"} <= {line.get_label() for line in changed.lines}
    assert aggregations.get_xscale() == "log"
    assert [label.get_text() for label in aggregations.get_xticklabels()] == ["1", "5", "25"]


def test_lines_keep_near_their_k(bulk):
    figure, _ = bulk["fig4_drugs_against_k"]
    for line in figure.axes[3].lines:
        if line.get_label() in ("sum", "mean", "approx mean"):
            assert np.abs(np.log(line.get_xdata()[0] / 5)) < np.log(1.3)


def test_changed_lines_can_be_told_apart():
    changes = ("capped", "boosted", "steps")
    names = [f"pseudobulk_k5_{name}_{change}" for name in ("sum", "mean", "approx_mean") for change in changes]
    metrics = made_up({"single_cell": 0.8, **dict.fromkeys([*names, "pseudobulk_k5_sum_thinned"], 0.7)})
    figure, _ = trainset_figures.against_k(metrics, title="drugs", simulated=True)
    changed = [line for ax in figure.axes[:2] for line in ax.lines if ", " in line.get_label()]
    assert len({(line.get_color(), line.get_marker()) for line in changed}) == len(changed) == 10


def test_parts_of_the_fall_keep_their_sign(bulk):
    figure, data = bulk["fig5_drugs_decomposition"]
    panel = figure.axes[1]  # macro-F1 at k = 5
    part = data[data["metric"] == "macro_f1"].set_index("part")
    assert [bar.get_width() for bar in panel.patches] == pytest.approx(part["fall"].tolist())
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["fewer steps", "fewer points", "averaging", "depth and length", "whole fall"]
    gain = panel.patches[names.index("depth and length")]
    assert gain.get_width() < 0
    assert to_rgba(gain.get_facecolor()[:3]) == to_rgba(trainset_figures.HIGHER)
    assert to_rgba(panel.patches[0].get_facecolor()[:3]) == to_rgba(trainset_figures.LOWER)
    ends = [segment[:, 0].tolist() for segment in panel.collections[0].get_segments()]
    assert ends == [pytest.approx([row.low, row.high]) for row in part.itertuples()]
    assert "k = 5" in texts(figure)


def test_recalls_are_drawn_as_differences_and_clear_ones_are_filled(mixed):
    metrics = made_up(MIXTURE)
    figure, data = mixed["fig6_drugs_per_class"]
    panels = [ax for ax in figure.axes if ax.axison]
    shown = ["mixture_copies_pad9", "mixture_nb_pad9", "synthetic_nb", "synthetic_nb_untreated"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == shown  # the share has a figure of its own
    assert set(data["train_set"]) == set(metrics["train_set"])
    recall = metrics[metrics["metric"] == "recall:BMS"].pivot(index="seed", columns="train_set", values="value")
    points = [line for line in panels[2].lines if line.get_marker() in ("o", "D")]
    assert panels[2].get_title(loc="left") == f"BMS, single cells {recall['single_cell'].mean():.2f}"
    drawn = {(shown[round(line.get_ydata()[0])], line.get_marker()): line for line in points}
    difference = (recall["synthetic_nb"] - recall["single_cell"]).mean()
    assert drawn["synthetic_nb", "o"].get_xdata()[0] == pytest.approx(difference)
    assert drawn["synthetic_nb", "o"].get_markerfacecolor() == trainset_figures.LOWER
    to_copies = (recall["mixture_nb_pad9"] - recall["mixture_copies_pad9"]).mean()
    assert drawn["mixture_nb_pad9", "D"].get_xdata()[0] == pytest.approx(to_copies)
    assert drawn["mixture_nb_pad9", "o"].get_markerfacecolor() == trainset_figures.HIGHER
    assert drawn["mixture_copies_pad9", "o"].get_markerfacecolor() == "white"
    assert any("padding with copies" in text for text in texts(figure))


def test_of_the_aggregations_one_stands_for_all_in_the_recalls(bulk):
    figure, _ = bulk["fig6_drugs_per_class"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["pseudobulk_k5_sum", "pseudobulk_k25_sum"]


def test_shares_begin_at_single_cells(mixed):
    figure, data = mixed["fig7_drugs_share"]
    means = data[data["metric"] == "accuracy"].set_index("percent")["mean"]
    assert means.index.tolist() == [0, 50, 100]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["nb"].get_xydata().tolist() == [[50, pytest.approx(means[50])], [100, pytest.approx(means[100])]]
    assert lines["single cells"].get_xydata().tolist() == [[0, pytest.approx(means[0])]]


def test_confusions_are_those_of_the_asked_train_sets_in_their_order():
    metrics = made_up(MIXTURE)
    asked = ["synthetic_nb", "single_cell"]
    figure, data = trainset_figures.confusions(metrics, asked, title="drugs", simulated=True)
    assert [ax.get_title(loc="left") for ax in figure.axes] == asked
    assert data["train_set"].drop_duplicates().tolist() == asked
    assert data.groupby(["train_set", "true"])["share"].sum().to_numpy() == pytest.approx(1)
    row = data[(data["train_set"] == "synthetic_nb") & (data["true"] == "BMS") & (data["predicted"] == "BMS")]
    recall = metrics[(metrics["train_set"] == "synthetic_nb") & (metrics["metric"] == "recall:BMS")]["value"].mean()
    assert row["share"].item() == pytest.approx(recall)
    assert trainset_figures.confusions(metrics, asked[:1], title="drugs", simulated=True) is None


def test_confusions_leave_controls_out(bulk, mixed):
    def shown(drawn):
        return drawn["fig8_drugs_confusion"].data["train_set"].drop_duplicates().tolist()

    assert shown(bulk) == ["single_cell", "pseudobulk_k5_sum", "pseudobulk_k25_sum"]
    assert shown(mixed) == ["single_cell", "synthetic_nb"]
    many = [f"pseudobulk_k{k}_sum" for k in (2, 5, 10, 25, 100)]
    assert trainset_figures._that_matter(many) == ["single_cell", "pseudobulk_k2_sum", "pseudobulk_k100_sum"]


def test_strategies_are_drawn_on_single_cells_and_only_when_there_are_several(results):
    names = ["fig1_scores", "fig2_confusion_drugs", "fig2_confusion_doses", "fig3_cost"]
    assert list(trainset_figures.strategy_drawings(results, simulated=True)) == names
    assert trainset_figures.strategy_drawings(made_up(MIXTURE), simulated=True) == {}
    levels = {"single_cell": 0.8, "single_cell_k5": 0.7}
    both = pd.concat([made_up(levels), made_up(levels, strategy="lora")])
    drawn = trainset_figures.strategy_drawings(both, simulated=True)
    assert drawn["fig1_scores"].data["arm"].drop_duplicates().tolist() == ["full", "lora"]


def test_tables_say_what_the_effects_say(results):
    assert trainset_figures.tables(results) == {}
    metrics = made_up(PSEUDOBULK)
    tables = trainset_figures.tables(metrics)
    assert list(tables) == [
        "Score against k",
        "Parts of the fall at each k; negative is a gain",
        "Changed train sets against the unchanged",
        "Spread between sum, mean and approximate mean",
        "Recall, and its difference to single cells",
    ]
    assert all(table.columns.name == title for title, table in tables.items())
    against_k = tables["Score against k"].loc[("drugs", "Macro-F1")]
    assert against_k.columns.tolist() == [1, 5, 25]
    assert against_k.loc["N/k single cells", 25] == "-"
    decline = trainset_effects.decline(metrics).set_index(["metric", "train_set"])
    row = decline.loc[("macro_f1", "pseudobulk_k25_sum")]
    assert against_k.loc["sum", 25] == f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    gain = tables["Parts of the fall at each k; negative is a gain"].loc[("drugs", "Macro-F1", "depth and length"), 5]
    assert gain.startswith("-0.")
    recall = tables["Recall, and its difference to single cells"].loc["drugs"]
    assert recall.columns.tolist() == CLASSES
    assert "; " not in recall.loc["single_cell", "BMS"]
    assert "; -0." in recall.loc["pseudobulk_k25_sum", "BMS"]


def test_tables_of_mixtures():
    tables = trainset_figures.tables(made_up(MIXTURE))
    copies = tables["Difference of recall to padding with copies"]
    assert copies.index.tolist() == [("drugs", "mixture_nb_pad9")]
    assert copies.loc[("drugs", "mixture_nb_pad9"), "BMS"].startswith("+0.")
    assert tables["Score against the share of synthetic cells (%)"].columns.tolist() == [0, 50, 100]


def test_saved_files_are_the_same_bytes_each_time(tmp_path, monkeypatch):
    metrics = made_up(MIXTURE)
    contents = []
    for name in ("first", "second"):
        monkeypatch.setattr(paths, "FIGURES", tmp_path / name)
        drawing = trainset_figures.share(metrics, title="drugs", simulated=True)
        plotting.save_figure(*drawing, "tiny", "fig7_drugs_share")
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name / "tiny").iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3
