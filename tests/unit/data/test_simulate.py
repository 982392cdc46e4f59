"""Simulated cells follow the model that the module states, and the records stay theirs; so do samples and classes."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tuneformer import paths
from tuneformer.artifacts import UserError, read_json
from tuneformer.data import gene_lists, simulate, simulate_truth
from tuneformer.data.gene_lists import INSENSITIVE, SENSITIVE, simulate_gene_classes
from tuneformer.study import load_study


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


def test_the_cells_are_those_of_the_recorded_results():
    """Totals, as of 2026-11; other draws would differ by about 3 %, and rounding of another processor by far less."""
    assert simulate.simulate_sciplex2(300, seed=0).X.sum() == pytest.approx(567_268, rel=1e-3)
    assert simulate.simulate_sciplex2(300, seed=1).X.sum() == pytest.approx(612_606, rel=1e-3)
    assert simulate.simulate_corpus(300, n_types=10, seed=0).X.sum() == pytest.approx(552_910, rel=1e-3)


@pytest.fixture(scope="module", params=["additive", "interacting"])
def task(request):
    """A task of the demo study on cells of demo_seed 99, on which the constants of the simulator were fixed."""
    settings = load_study("demo", task=request.param, demo_seed=99)
    cells = simulate.simulate_sciplex2(12_000, seed=99, mechanism=request.param)
    total = cells.X.sum(axis=1).A1
    kept = cells.obs["treatment"].notna() & cells.obs["dose"].astype(str).isin(settings.select_values)
    cells = cells[kept & (total >= settings.min_counts) & (total <= settings.max_counts)].copy()
    return settings, cells, cells.obs["treatment"].astype(str).to_numpy()


def test_the_model_reads_most_of_a_cell_and_the_pool_is_large(task):
    settings, cells, _ = task
    positions = read_json(paths.ASSETS / "demo_checkpoint" / "config.json")["max_position_embeddings"]
    assert np.median(np.minimum(1, positions / cells.X.getnnz(axis=1))) >= 0.6
    assert settings.test_share * cells.n_obs >= 2_000
    assert (1 - settings.test_share) * (1 - settings.validation_share) * cells.n_obs >= 10 * settings.train_cells


def test_the_ceiling_is_calibrated_and_a_linear_model_comes_near_it_for_additive_effects_only(task):
    settings, cells, labels = task
    classes = settings.classes
    found = simulate_truth.class_probabilities(settings, cells.obs_names.tolist(), classes)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)
    chosen = np.array(classes)[found.argmax(axis=1)]
    assert 0.8 < f1_score(labels, chosen, average="macro") < 0.9
    for place, name in enumerate(classes):  # 0.03: four standard errors of a class share, wells with their own effects
        for low, high in ((0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
            at = (found[:, place] > low) & (found[:, place] <= high)
            error = 4 * np.sqrt((found[at, place] * (1 - found[at, place])).sum()) / at.sum()
            assert (labels[at] == name).mean() == pytest.approx(found[at, place].mean(), abs=error + 0.03)
    counts = cells.X.toarray()
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(values[:3000], labels[:3000])
    score = f1_score(labels[3000:], linear.predict(values[3000:]), average="macro")  # ten times the demo's cells
    assert score > 0.6 if settings.task == "additive" else score < 0.4


def test_interacting_effects_move_no_mean_and_additive_ones_do():
    drug = next(place for place, one in enumerate(simulate.DRUGS) if one.name == "Dex")
    along = simulate.drug_effects()[drug]
    shift = {}
    for mechanism in ("additive", "interacting"):
        latent = simulate.draw_latent(20_000, seed=99, mechanism=mechanism)
        treated = ((latent.wells["drug_index"] == drug) & (latent.wells["dose"] == 100)).to_numpy()[latent.well_of]
        untreated = (latent.wells["dose"] == 0).to_numpy()[latent.well_of]
        activity = latent.activity @ along / np.linalg.norm(along)
        shift[mechanism] = activity[treated].mean() - activity[untreated].mean()
    assert shift["additive"] == pytest.approx(np.linalg.norm(along), rel=0.15)
    assert abs(shift["interacting"]) < 0.15 * np.linalg.norm(
        along
    )  # six wells, sd 0.1 each: 0.04; some 600 cells: 0.07


def test_the_ceiling_knows_simulated_single_cells_only():
    settings = load_study("demo", task="additive", demo_cells=100)
    with pytest.raises(UserError, match="leave made train sets out"):
        simulate_truth.class_probabilities(settings, ["point0"], settings.classes)
    pancreas = load_study("demo_pancreas")
    with pytest.raises(UserError, match="dataset is demo_pancreas; leave the arm out"):
        simulate_truth.class_probabilities(pancreas, ["pancreas0"], ["alpha"])


def test_layout_is_that_of_the_experiment():
    wells = simulate.make_wells()
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
    shares = cells.X.toarray() / cells.X.sum(axis=1)
    untreated = (cells.obs["treatment"] == "Untreated").to_numpy()
    treated = ((cells.obs["drug"] == "Dex") & (cells.obs["dose"] == 100)).to_numpy()
    effect = simulate.drug_effects()[[drug.name for drug in simulate.DRUGS].index("Dex")]
    shift = simulate.make_universe().loadings @ effect  # expected log fold change, (genes,)
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


def test_bulk_samples_are_the_sums_of_the_wells_of_their_own_cells(monkeypatch):
    monkeypatch.setattr(simulate, "BULK_CELLS", 4000)
    counts, wells = simulate.simulate_bulk(seed=0)
    cells = simulate.simulate_sciplex2(4000, seed=simulate.BULK_SEED_STEP)
    assert len(wells) == cells.obs["well"].nunique() == 192
    for well in ("AA01", "BH12"):
        summed = cells[(cells.obs["well"] == well).to_numpy()].X.sum(axis=0).A1
        np.testing.assert_array_equal(counts[well], summed)
        assert wells.loc[well, "well"] == well
    assert (wells["treatment"] == wells["drug"].astype(str).where(wells["dose"] > 0, "Untreated")).all()


def membership(classes):
    """The program of each listed gene, its base expression, and the number of its programs."""
    universe = simulate.make_universe()
    places = pd.Index(universe.var["ensembl_id"]).get_indexer(classes.index)
    return universe.loadings[places].argmax(axis=1), universe.base[places], (universe.loadings[places] > 0).sum(axis=1)


@pytest.mark.parametrize("null", [False, True])
def test_gene_classes_are_the_same_for_a_seed_and_differ_between_seeds(null):
    first, again, other = (simulate_gene_classes(seed=seed, null=null) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    assert first.index.is_unique
    assert len(first) == gene_lists.N_LISTED
    assert set(first) == {SENSITIVE, INSENSITIVE}


def sensitive_by_program(null, seeds=range(40)):
    """Share of sensitive genes in each program of each draw, for programs with at least ten listed genes."""
    shares = []
    for seed in seeds:
        classes = simulate_gene_classes(seed=seed, null=null)
        by_program = (classes == SENSITIVE).groupby(membership(classes)[0]).agg(["mean", "size"])
        shares += by_program.loc[by_program["size"] >= 10, "mean"].tolist()
    return np.array(shares)


def test_a_quarter_of_the_programs_are_sensitive_and_so_are_nearly_all_their_genes():
    shares = sensitive_by_program(null=False)
    inside = shares > 0.5
    assert (abs(shares - 0.5) < 0.15).mean() < 0.01  # two kinds of programs, hardly one between
    assert inside.mean() == pytest.approx(0.25, abs=0.03)
    assert shares[inside].mean() == pytest.approx(gene_lists.INSIDE, abs=0.015)
    assert shares[~inside].mean() == pytest.approx(gene_lists.OUTSIDE, abs=0.01)


def test_null_classes_have_nothing_to_do_with_programs():
    shares = sensitive_by_program(null=True)
    assert shares.mean() == pytest.approx(0.2525, abs=0.01)
    assert shares.max() < 0.85  # of some 600 programs with 10 to 20 genes at 25 %


@pytest.mark.parametrize("what", [1, 2])
def test_base_expression_and_number_of_programs_do_not_tell_the_class(what):
    differences = []
    for seed in range(60):
        classes = simulate_gene_classes(seed=seed, null=False)
        values = membership(classes)[what]
        is_sensitive = (classes == SENSITIVE).to_numpy()
        differences.append((values[is_sensitive].mean() - values[~is_sensitive].mean()) / values.std())
    standard_error = np.std(differences, ddof=1) / np.sqrt(60)
    assert abs(np.mean(differences)) < 4 * standard_error + 0.02


def test_sensitive_programs_are_as_active_in_the_demo_cells_as_the_others():
    rng = np.random.default_rng(0)
    activity = simulate.cell_type_activity(simulate.CELL_LINE)
    drawn = np.array([activity[gene_lists._sensitive_programs(rng)].mean() for _ in range(400)])
    free = np.array(
        [activity[rng.choice(simulate.N_PROGRAMS, simulate.N_PROGRAMS // 4, replace=False)].mean() for _ in range(400)]
    )
    assert drawn.mean() == pytest.approx(activity.mean(), abs=4 * drawn.std() / 20)
    assert drawn.std() < 0.8 * free.std()
