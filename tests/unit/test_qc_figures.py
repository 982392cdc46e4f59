"""The figures of 01_qc: one panel for each measure there is, every cell shown, and "simulated" where it is due."""

import matplotlib.pyplot as plt
import pytest

from tuneformer.data import preprocessing, simulate
from tuneformer.report import plotting
from tuneformer.study.params import load_study


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cells():
    return simulate.simulate_sciplex2(400, seed=0)


def draw(cells, settings):
    flags = preprocessing.qc_flags(cells, settings)
    return (
        flags,
        plotting.qc_violins(flags, cells.obs[settings.label], settings),
        plotting.qc_scatter(flags, settings),
    )


def test_classes_limits_and_rules_are_shown(cells):
    settings = load_study("demo", task="nutlin_2class")
    flags, violins, scatter = draw(cells, settings)
    names = [text.get_text() for text in violins.axes[0].get_yticklabels()]
    assert names == ["0 uM", "25 uM", "other class", "no label"]
    assert len(violins.axes[0].lines) - len(violins.axes[1].lines) == 1  # two limits of counts, one of the share
    assert sum(len(points.get_offsets()) for points in scatter.axes[0].collections) == len(flags)
    labels = [text.get_text() for text in scatter.legends[0].get_texts()]
    assert labels[1] == f"fails label ({flags['label'].sum()})"
    assert all("(simulated)" in figure.get_suptitle() for figure in (violins, scatter))


def test_without_mitochondrial_genes_there_is_one_panel(cells):
    settings = load_study("tiny", mito_prefix="none", max_counts=None)
    _, violins, scatter = draw(cells, settings)
    assert len(violins.axes) == len(scatter.axes) == 1
    scatter.canvas.draw()  # no warning or error of an empty panel


def test_real_cells_are_not_called_simulated(cells):
    _, violins, scatter = draw(cells, load_study("pbmc_facs", label="treatment"))
    assert not any("simulated" in figure.get_suptitle() for figure in (violins, scatter))
