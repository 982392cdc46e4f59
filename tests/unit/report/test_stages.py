"""Figures of single notebooks: every cell or point that they are given is shown, and what is simulated is said."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.report import figures, stages
from tuneformer.study import load_study


@pytest.fixture(autouse=True)
def _style():
    plt.switch_backend("agg")
    figures.set_style()
    yield
    plt.close("all")


@pytest.fixture
def flags():
    """Measures of 200 cells, some of which fail a rule or two."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"n_counts": rng.lognormal(7.5, 1, 200), "mito_share": rng.beta(2, 8, 200)})
    table["n_genes"] = table["n_counts"] * 0.4
    table["label"], table["min_counts"] = np.arange(200) % 10 == 0, table["n_counts"] < 500
    return table


@pytest.fixture
def settings():
    return load_study("tiny", classes=["a", "b"])


def labels_of(flags):
    return pd.Series(np.where(flags["label"], None, np.array(list("abcab") * 40)), flags.index, dtype=object)


def test_quality_control_shows_classes_limits_and_rules(flags, settings):
    violins = stages.qc_violins(flags, labels_of(flags), settings)
    names = [text.get_text() for text in violins.axes[0].get_yticklabels()]
    assert names == ["a", "b", "other class", "no label"]
    assert len(violins.axes[0].lines) - len(violins.axes[1].lines) == 1  # two limits of counts, one of the share
    scatter = stages.qc_scatter(flags, settings)
    assert sum(len(points.get_offsets()) for points in scatter.axes[0].collections) == len(flags)
    assert [text.get_text() for text in scatter.legends[0].get_texts()][1] == "fails label (20)"
    assert all("(simulated)" in figure.get_suptitle() for figure in (violins, scatter))


def test_without_mitochondrial_genes_there_is_one_panel(flags, settings):
    flags["mito_share"] = np.nan
    drawn = (stages.qc_violins(flags, labels_of(flags), settings), stages.qc_scatter(flags, settings))
    for figure in drawn:
        assert len(figure.axes) == 1
        figure.canvas.draw()  # no warning or error of an empty panel


def test_tokens_without_counts_say_so(flags, settings):
    flags[["n_counts", "n_genes", "mito_share"]] = np.nan
    for figure in (stages.qc_violins(flags, labels_of(flags), settings), stages.qc_scatter(flags, settings)):
        assert "has no counts" in figure.texts[0].get_text()


def test_real_cells_are_not_called_simulated(flags, settings):
    real = settings.model_copy(update={"dataset": "pbmc68k"})
    drawn = (stages.qc_violins(flags, labels_of(flags), real), stages.qc_scatter(flags, real))
    assert not any("simulated" in figure.get_suptitle() for figure in drawn)


def test_loss_curve_shows_its_references():
    curve = pd.DataFrame({"step": [1, 2], "train_loss": [6.0, 5.0], "held_out_loss": [6.1, 5.2]})
    figure = stages.loss_curve(curve, {"uniform": 6.9, "gene frequency": 6.2}, title="Loss")
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[2:]] == [6.9, 6.2]
    assert {"uniform", "gene frequency"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_points_against_k_show_medians_and_the_cut():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"k": np.repeat([1, 2, 10], 30), "kind": np.repeat(["single cells", *["pseudo-bulk"] * 2], 30)}
    )
    for place, column in enumerate(stages.POINTS, start=1):
        table[column] = rng.integers(1, 50, 90) * table["k"] * place
    figure = stages.points_against_k(table, max_length=64, simulated=True)
    medians = table.groupby("k")["counts"].median()
    shown = np.concatenate([line.get_ydata() for line in figure.axes[1].lines if line.get_marker() in "Do"])
    assert sorted(shown[np.isfinite(shown)]) == pytest.approx(sorted(medians), rel=0.01)  # medians of logarithms
    assert figure.axes[3].lines[-1].get_ydata()[0] == 64
    assert figure.get_suptitle().endswith("(simulated)")


def cells(n, rng):
    counts = sparse.csr_matrix(rng.poisson(np.geomspace(0.05, 20, 60), (n, 60)).astype("float32"))
    return ad.AnnData(counts, obs=pd.DataFrame(index=[f"cell{k}" for k in range(n)]))


def test_made_cells_have_a_column_each_beside_the_real_ones():
    rng = np.random.default_rng(0)
    made = {"gaussian": cells(80, rng), "nb": cells(90, rng)}
    figure = stages.realism_panels(cells(100, rng), made, seed=0, simulated=True)
    assert len(figure.axes) == 2 * len(stages.REALISM)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["gaussian", "nb"]
    components = figure.axes[-1].collections
    assert [len(points.get_offsets()) for points in components] == [80, 80]  # as many of each as the smallest set has
    figure.canvas.draw()


def test_the_dotted_line_joins_the_variants_that_none_beats_in_both():
    runs = pd.DataFrame({"arm": ["fp32", "int8", "pruned", "onnx"], "file_bytes": [4e6, 1e6, 2e6, 4.1e6]})
    runs["speed:1"], runs["macro_f1"] = [1.0, 0.8, 1.0, 1.5], [0.9, 0.8, 0.5, 0.9]
    figure = stages.pareto(runs, simulated=True)
    size, speed = (ax.lines[0].get_xdata().tolist() for ax in figure.axes)
    assert size == [1.0, 4.0]
    assert speed == [1.5]
    assert {"fp32", "onnx"} <= {text.get_text() for text in figure.legends[0].get_texts()}
