"""The simulated cells follow the model that the module states, and give every quality-control rule something to do."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.data import simulate


@pytest.fixture(scope="module")
def cells():
    return simulate.simulate_sciplex2(3000, seed=0)


def test_counts_have_the_stated_mean_and_variance():
    universe = simulate.make_universe()
    n_cells, library, mito = 4000, 3000.0, 0.1
    rng = np.random.default_rng(1)
    activity = np.zeros((n_cells, simulate.N_PROGRAMS))
    counts = simulate.draw_counts(universe, activity, np.full(n_cells, library), np.full(n_cells, mito), rng).toarray()
    rate = np.exp(universe.base)
    nuclear = np.arange(simulate.N_GENES) < simulate.N_GENES - simulate.N_MITO
    share = np.where(nuclear, (1 - mito) * rate / rate[nuclear].sum(), mito * rate / rate[~nuclear].sum())
    mean = library * share
    variance = mean + universe.dispersion * mean**2
    z = (counts.mean(axis=0) - mean) / np.sqrt(variance / n_cells)
    assert abs(z.mean()) < 0.1  # standard error of the mean of 2,000 z values: 0.022
    assert 0.95 < z.std() < 1.05  # standard error 0.016
    frequent = mean > 1
    assert np.median(counts.var(axis=0)[frequent] / variance[frequent]) == pytest.approx(1, abs=0.03)


def test_dispersion_falls_with_the_mean():
    universe = simulate.make_universe()
    order = np.argsort(universe.base)
    assert (np.diff(universe.dispersion[order]) <= 0).all()


def test_same_seed_same_cells_and_another_seed_other_cells(cells):
    again = simulate.simulate_sciplex2(3000, seed=0)
    other = simulate.simulate_sciplex2(3000, seed=1)
    assert (cells.X != again.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, again.obs)
    assert (cells.X != other.X).nnz > 0
    np.testing.assert_array_equal(cells.uns["simulation"]["drug_effects"], other.uns["simulation"]["drug_effects"])


def test_layout_is_that_of_the_experiment():
    wells = simulate._make_wells()
    assert len(wells) == wells["well"].nunique() == 192
    assert (wells.groupby(["drug", "dose"]).size() == 6).all()
    assert set(wells.loc[wells["well"].str[2:].isin(["01", "04", "07", "10"]), "replicate"]) == {1}
    nutlin = wells[wells["drug"] == "Nutlin"].drop_duplicates("dose").set_index("dose")["dose_um"]
    assert nutlin[[0.1, 1.0, 10.0, 50.0]].tolist() == pytest.approx([0.25, 2.5, 25, 125])


def test_every_quality_control_rule_has_something_to_do(cells):
    total = np.asarray(cells.X.sum(axis=1)).ravel()
    mito = cells.var["symbol"].str.startswith("MT-").to_numpy()
    mito_share = np.asarray(cells[:, mito].X.sum(axis=1)).ravel() / total
    for failing in (total < 500, total > 12_000, mito_share > 0.5, cells.obs["treatment"].isna().to_numpy()):
        assert 10 < failing.sum() < 300


def test_labels_agree_with_each_other(cells):
    obs = cells.obs.dropna(subset=["drug"])
    expected = obs["drug"].astype(str) + "_" + obs["dose"].map("{:g}".format) + "_" + obs["well"].astype(str)
    assert (obs["top_oligo"].astype(str) == expected).all()
    assert (obs["treatment"].astype(str) == np.where(obs["dose"] == 0, "Untreated", obs["drug"].astype(str))).all()
    assert cells.obs.loc[cells.obs["drug"].isna()].isna().all(axis=None)


def test_a_drug_moves_the_genes_of_its_programs(cells):
    truth = cells.uns["simulation"]
    shares = cells.X.toarray() / cells.X.sum(axis=1)
    untreated = (cells.obs["treatment"] == "Untreated").to_numpy()
    treated = ((cells.obs["drug"] == "Dex") & (cells.obs["dose"] == 100)).to_numpy()
    effect = truth["drug_effects"][truth["drugs"].index("Dex")]
    shift = truth["loadings"] @ effect  # expected log fold change, (genes,)
    before, after = (np.asarray(shares[rows].mean(axis=0)).ravel() for rows in (untreated, treated))
    frequent = before > 1e-3
    change = np.log(after[frequent] / before[frequent])
    assert np.corrcoef(change, shift[frequent])[0, 1] > 0.8


def test_drugs_kill(cells):
    per_dose = cells.obs.groupby(["drug", "dose"], observed=True).size()
    assert per_dose["Nutlin", 100.0] < 0.5 * per_dose["Nutlin", 0.0]


def test_corpus_shares_genes_but_no_cell_and_no_type_with_the_demo(cells):
    corpus = simulate.simulate_corpus(500, n_types=10, seed=0)
    assert (corpus.var_names == cells.var_names).all()
    rows = {row.tobytes() for row in cells.X.toarray()}
    assert not any(row.tobytes() in rows for row in corpus.X.toarray())
    demo_type = simulate.cell_type_activity(simulate.CELL_LINE)
    assert all(not np.allclose(demo_type, simulate.cell_type_activity(number)) for number in range(300))
    assert corpus.obs["cell_type"].nunique() == 10
