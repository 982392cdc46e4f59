"""Bulk samples: the two files are read or refused plainly, genes are matched, and points are made of them alone."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.data import bulk, preprocessing, simulate, simulate_bulk
from tuneformer.data.readers import CellsError
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.tokens import tokenizer
from tuneformer.trainsets import assemble, synthetic
from tuneformer.trainsets.strata import TrainSetError, strata

GENES = [f"ENSG{number:011d}" for number in range(4)]
COUNTS = np.array([[1, 0, 5, 2], [0, 3, 0, 7], [10, 0, 20, 0], [4, 4, 4, 4]])  # (genes, samples)
SAMPLES = ["s1", "s2", "s3", "s4"]
CELLS = 5000


@pytest.fixture
def cells():
    """Return four single cells of two classes with the same genes, in another order."""
    label = pd.Categorical(["B", "A", "B", "A"], categories=["B", "A"], ordered=True)
    var = pd.DataFrame({"ensembl_id": GENES[::-1], "symbol": ["G3", "G2", "G1", "G0"]}, index=GENES[::-1])
    obs = pd.DataFrame({"label": label}, index=[f"c{number}" for number in range(4)])
    return ad.AnnData(sparse.csr_matrix(np.ones((4, 4))), obs=obs, var=var)


@pytest.fixture
def tables():
    counts = pd.DataFrame(COUNTS, index=pd.Index(GENES, name="gene"), columns=SAMPLES)
    sheet = pd.DataFrame({"sample": SAMPLES, "class": ["A", "B", "A", "B"], "dose": [0, 1, 0, 0.5]})
    return counts, sheet


@pytest.fixture
def load(tmp_path, cells):
    """Write both files and load them."""

    def write_and_load(counts, sheet, *, separator=",", **changes):
        ending = {",": "csv", "\t": "tsv"}[separator]
        files = {"bulk_counts": tmp_path / f"counts.{ending}", "bulk_samples": tmp_path / f"sheet.{ending}"}
        counts.to_csv(files["bulk_counts"], sep=separator)
        sheet.to_csv(files["bulk_samples"], sep=separator, index=False)
        settings = {"dose_column": "dose_um", **{key: str(file) for key, file in files.items()}, **changes}
        return bulk.load_bulk(load_study("tiny", train_set="bulk", **settings), cells)

    return write_and_load


def refusal(function, *args, **keywords):
    with pytest.raises(CellsError) as caught:
        function(*args, **keywords)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+\.", message)
    assert not re.search(r"[a-z)]\. [A-Z]", message)
    return message


@pytest.mark.parametrize("separator", [",", "\t"])
def test_samples_get_the_genes_and_classes_of_the_cells(load, tables, cells, separator):
    made = load(*tables, separator=separator)
    np.testing.assert_array_equal(made.X.toarray(), COUNTS.T[:, ::-1])
    assert list(made.obs_names) == ["bulk_s1", "bulk_s2", "bulk_s3", "bulk_s4"]
    assert list(made.obs["label"]) == ["A", "B", "A", "B"]
    assert list(made.obs["label"].cat.categories) == ["B", "A"]
    assert made.obs["dose_um"].tolist() == [0, 1, 0, 0.5]
    assert made.obs["n_counts"].tolist() == COUNTS.sum(axis=0).tolist()
    pd.testing.assert_frame_equal(made.var, cells.var)


def test_the_order_of_the_sheet_and_columns_beside_do_not_matter(load, tables):
    counts, sheet = tables
    made = load(counts[SAMPLES[::-1]], sheet.assign(batch="x"), dose_column=None)
    assert made["bulk_s2"].X.toarray().tolist() == [COUNTS.T[1, ::-1].tolist()]
    assert list(made.obs.columns) == ["label", "n_counts"]


def test_genes_are_matched_by_symbol_or_without_version_and_those_of_one_gene_summed(load, tables):
    counts, sheet = tables
    named = load(counts.set_axis(["G0", "G1", "G2", "LOST"]), sheet)
    np.testing.assert_array_equal(named.X.toarray(), np.column_stack([np.zeros(4), *COUNTS[[2, 1, 0]]]))
    versions = load(counts.set_axis([f"{GENES[0]}.1", f"{GENES[0]}.2", GENES[2], GENES[3]]), sheet)
    np.testing.assert_array_equal(versions.X[:, 3].toarray().ravel(), COUNTS[:2].sum(axis=0))


def changed(frame, place, value):
    frame = frame.astype(object)
    frame.loc[place] = value
    return frame


FAULTS = {
    "a fraction": (
        lambda counts, sheet: (changed(counts, (GENES[2], "s3"), 2.5), sheet),
        f"bulk_counts: the value '2.5' of gene {GENES[2]} in sample s3 is no whole number (1 such values); give raw "
        "counts, estimated ones rounded.",
    ),
    "below 0": (
        lambda counts, sheet: (changed(counts, (GENES[0], "s1"), -1), sheet),
        f"bulk_counts: the value '-1' of gene {GENES[0]} in sample s1 is negative (1 such values); give raw counts, "
        "estimated ones rounded.",
    ),
    "text": (
        lambda counts, sheet: (changed(counts, (GENES[0], "s1"), "?"), sheet),
        f"bulk_counts: the value '?' of gene {GENES[0]} in sample s1 is no number (1 such values); give raw counts, "
        "estimated ones rounded.",
    ),
    "no counts": (
        lambda counts, sheet: (counts.assign(s2=0), sheet),
        "bulk_counts: sample 's2' has no count; take it out of both files.",
    ),
    "twice in the table": (
        lambda counts, sheet: (counts.set_axis(["s1", "s1", "s3", "s4"], axis=1), sheet),
        "bulk_counts: the sample 's1' stands 2 times; give each a name of its own.",
    ),
    "twice in the sheet": (
        lambda counts, sheet: (counts, pd.concat([sheet, sheet[:1]])),
        "bulk_samples: the sample 's1' stands 2 times; give each a name of its own.",
    ),
    "only in the table": (
        lambda counts, sheet: (counts, sheet[1:]),
        "bulk_samples: the sample 's1' of bulk_counts is missing here; add it, or take it out there.",
    ),
    "only in the sheet": (
        lambda counts, sheet: (counts.drop(columns="s4"), sheet),
        "bulk_counts: the sample 's4' of bulk_samples is missing here; add it, or take it out there.",
    ),
    "unknown class": (
        lambda counts, sheet: (counts, sheet.assign(**{"class": ["A", "B", "a", "B"]})),
        "bulk_samples: sample 's3' has the class 'a', which the task does not; choose one of: B, A.",
    ),
    "class without sample": (
        lambda counts, sheet: (counts, sheet.assign(**{"class": "B"})),
        "bulk_samples: class 'A' of the task has no sample; add one, or leave it out of classes.",
    ),
    "no class": (
        lambda counts, sheet: (counts, sheet.assign(**{"class": ["A", "", "A", "B"]})),
        "bulk_samples: sample 's2' has no class; give it one, or take it out of both files.",
    ),
    "no dose": (
        lambda counts, sheet: (counts, sheet.assign(dose=["0", "high", "0", "1"])),
        "bulk_samples: sample 's2' has no number as dose; give it one, 0 for none.",
    ),
    "no column": (
        lambda counts, sheet: (counts, sheet.rename(columns={"class": "group"})),
        "bulk_samples: the sheet has no column 'class'; its first line has to name sample and class.",
    ),
    "other genes": (
        lambda counts, sheet: (counts.set_axis([GENES[0], "x", "y", "z"]), sheet),
        f"bulk_counts: 25% of the genes of the cells are in the table, whose genes are named like {GENES[0]!r} and "
        f"those of the cells like {GENES[3]!r}; name at least half of them alike.",
    ),
    "empty": (
        lambda counts, sheet: (counts[:0], sheet),
        "bulk_counts: counts.csv has no values below its header; write a csv or tsv with genes as rows and samples as "
        "columns.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used(load, tables, fault):
    spoil, message = FAULTS[fault]
    assert refusal(load, *spoil(*tables)) == message


def test_files_that_are_not_there(load, tables, tmp_path):
    message = refusal(load, *tables, bulk_samples=None)
    assert message.startswith("bulk_samples: the train set bulk is made of bulk samples; set bulk_counts to a table of")
    assert "nowhere.csv does not exist" in refusal(load, *tables, bulk_counts=str(tmp_path / "nowhere.csv"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2,3\n")
    assert "bad.csv could not be read as a table" in refusal(load, *tables, bulk_counts=str(tmp_path / "bad.csv"))


def test_the_hash_follows_both_files(load, tables, tmp_path):
    load(*tables)
    files = {"bulk_counts": str(tmp_path / "counts.csv"), "bulk_samples": str(tmp_path / "sheet.csv")}
    settings = load_study("tiny", train_set="bulk", **files)
    hashes = [bulk.source_hash(settings)]
    for name in files.values():
        with Path(name).open("a") as file:
            file.write("\n")
        hashes.append(bulk.source_hash(settings))
    demo = [load_study("tiny", bulk_counts="demo", demo_seed=seed) for seed in (0, 0, 1)]
    hashes += [bulk.source_hash(one) for one in demo]
    assert len(set(hashes)) == 5
    assert hashes[3] == hashes[4]


@pytest.fixture(scope="module")
def demo():
    """Return simulated samples and wells of seed 0, of fewer cells than usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate_bulk, "CELLS", CELLS)
        return simulate_bulk.simulate_bulk(seed=0)


def test_simulated_samples_are_the_sums_of_wells_of_their_own_cells(demo):
    counts, wells = demo
    cells = simulate.simulate_sciplex2(CELLS, seed=simulate_bulk.SEED_STEP)
    assert len(wells) == cells.obs["well"].nunique() == 192
    for well in ("AA01", "BH12"):
        summed = cells[(cells.obs["well"] == well).to_numpy()].X.sum(axis=0).A1
        np.testing.assert_array_equal(counts[well], summed)
        assert wells.loc[well, "well"] == well
    assert (wells["treatment"] == wells["drug"].astype(str).where(wells["dose"] > 0, "Untreated")).all()


@pytest.fixture(scope="module")
def demo_cells(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        return preprocessing.prepare_cells(load_study("tiny", demo_cells=2500, train_cells=None))


@pytest.fixture
def settings(demo, tmp_path, monkeypatch):
    """Settings of a run on bulk samples, which are simulated once."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(bulk, "simulate_bulk", lambda seed: demo)

    def of(train_set, **changes):
        fixed = {"bulk_counts": "demo", "demo_cells": 2500, "train_cells": None}
        return load_study("tiny", train_set=train_set, **(fixed | changes))

    return of


def test_bulk_samples_are_the_points_and_the_test_cells_are_the_real_ones(settings, demo, demo_cells):
    made = assemble.make_train_cells(settings("bulk"), demo_cells)
    learning = made.cells[(made.cells.obs["split"] != "test").to_numpy()]
    assert sorted(learning.obs_names) == sorted(f"bulk_{name}" for name in demo[1].index)
    wells = learning.obs_names.str.removeprefix("bulk_")
    np.testing.assert_array_equal(learning.X.toarray(), demo[0][wells].to_numpy().T)
    assert list(learning.obs["label"]) == list(demo[1].loc[wells, "treatment"])
    table = pd.crosstab(learning.obs["label"], learning.obs["split"])
    assert table["validation"].tolist() == [round(n / 9) for n in table.sum(axis=1)]
    real = demo_cells[(demo_cells.obs["split"] == "test").to_numpy()]
    test = made.cells[(made.cells.obs["split"] == "test").to_numpy()]
    assert list(test.obs_names) == list(real.obs_names)
    assert (test.X != real.X).nnz == 0
    assert (made.sources, made.step_cells) == ([], None)


def test_the_seed_decides_which_samples_validate(settings, demo_cells):
    splits = [
        assemble.make_train_cells(settings("bulk", seed=seed), demo_cells).cells.obs["split"] for seed in (0, 0, 1)
    ]
    assert (splits[0] == splits[1].loc[splits[0].index]).all()
    assert set(splits[0].index[splits[0] == "validation"]) != set(splits[2].index[splits[2] == "validation"])


def test_a_class_with_one_sample_is_refused(settings, demo, demo_cells, monkeypatch):
    counts, wells = demo
    one = wells[(wells["treatment"] != "Dex") | (wells.index == wells.index[wells["treatment"] == "Dex"][0])]
    monkeypatch.setattr(bulk, "simulate_bulk", lambda seed: (counts, one))
    with pytest.raises(TrainSetError, match=r"^bulk: class 'Dex' has 1 points, .* add a sample, or draw cells around"):
        assemble.make_train_cells(settings("bulk"), demo_cells)
    made = assemble.make_train_cells(settings("synthetic_nb_bulk"), demo_cells)
    assert (made.cells.obs["label"] == "Dex").sum() == (demo_cells.obs["label"] == "Dex").sum()


@pytest.mark.parametrize("generator", ["gaussian", "nb"])
def test_synthetic_cells_are_as_many_as_single_ones_and_lie_around_the_samples(settings, demo_cells, generator):
    run = settings(f"synthetic_{generator}_bulk")
    made = assemble.make_train_cells(run, demo_cells)
    points = made.cells[(made.cells.obs["split"] != "test").to_numpy()]
    pool = demo_cells[(demo_cells.obs["split"] != "test").to_numpy()]
    assert points.obs["label"].value_counts().to_dict() == pool.obs["label"].value_counts().to_dict()
    untreated = pool[(pool.obs["label"] == "Untreated").to_numpy()]
    assert sorted(made.sources) == sorted(untreated.obs_names)
    assert (points.X.data % 1 == 0).all()
    if generator == "nb":  # its mean is that of the samples: 5 standard errors
        of = (points.obs["label"] == "Dex").to_numpy()
        samples = bulk.load_bulk(run, demo_cells)
        dex = samples[(samples.obs["label"] == "Dex").to_numpy()]
        shares = np.asarray(sparse.diags_array(1 / dex.obs["n_counts"].to_numpy()) @ dex.X.toarray())
        by_dose = pd.DataFrame(shares).groupby(dex.obs["dose"].to_numpy()).mean().mean().to_numpy()
        drawn = points.X[of].toarray()
        expected = by_dose * drawn.sum(axis=1).mean()
        top = np.argsort(-expected)[:50]
        error = drawn[:, top].std(axis=0) / np.sqrt(of.sum())
        assert (np.abs(drawn[:, top].mean(axis=0) - expected[top]) < 5 * error).all()


def test_a_number_of_synthetic_cells_is_one_of_each_class_and_dose(settings, demo_cells):
    made = assemble.make_train_cells(settings("synthetic_nb_bulk", synthetic_cells=3), demo_cells).cells
    points = made[(made.obs["split"] != "test").to_numpy()]
    assert points.obs["label"].value_counts().to_dict() == {"BMS": 21, "Dex": 21, "Nutlin": 21, "SAHA": 21} | {
        "Untreated": 3
    }


def test_the_point_of_samples_is_the_mean_of_their_shares(settings):
    counts = sparse.csr_matrix([[1.0, 3.0], [30.0, 10.0], [5.0, 5.0]])
    obs = pd.DataFrame({"label": pd.Categorical(["A", "A", "B"])}, index=["s1", "s2", "s3"])
    samples = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=["g1", "g2"]))
    stratum = strata(samples, settings("bulk").model_copy(update={"dose_column": None}))
    points = synthetic.sample_points(samples, stratum, depth=100)
    np.testing.assert_allclose(points.X.toarray(), [[50, 50], [50, 50]])
    assert points.obs["members"].tolist() == [2, 1]


def test_tokens_of_bulk_samples_are_made_again_when_the_samples_change(settings, monkeypatch):
    run = settings("bulk")
    tokens = assemble.prepare_tokens(run)
    assert tokenizer.read_tokens(run) is not None
    assert (paths.tokens_path(run) / "sources.txt").read_text() == ""
    assert set(tokens.dataset["split"]) == {"train", "validation", "test"}
    monkeypatch.setattr(bulk, "CELLS", 20_000)
    assert tokenizer.read_tokens(run) is None
