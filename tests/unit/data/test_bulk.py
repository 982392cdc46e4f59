"""Bulk samples: the two files are read or refused plainly, genes are matched, and points are made of them alone."""

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer.artifacts import UserError
from tuneformer.data import bulk, simulate
from tuneformer.study import load_study

GENES = [f"ENSG{number:011d}" for number in range(4)]
COUNTS = np.array([[1, 0, 5, 2], [0, 3, 0, 7], [10, 0, 20, 0], [4, 4, 4, 4]])  # (genes, samples)
SAMPLES = ["s1", "s2", "s3", "s4"]


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
        return bulk.load_bulk(load_study("tiny").model_copy(update=settings), cells)

    return write_and_load


def refusal(function, *args, **keywords):
    with pytest.raises(UserError) as caught:
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
        "bulk_counts: the sample 's1' is given 2 times; give each a name of its own.",
    ),
    "twice in the sheet": (
        lambda counts, sheet: (counts, pd.concat([sheet, sheet[:1]])),
        "bulk_samples: the sample 's1' is given 2 times; give each a name of its own.",
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
    assert message.startswith("bulk_samples: this arm is made of bulk samples; set bulk_counts to a table of")
    assert "nowhere.csv does not exist" in refusal(load, *tables, bulk_counts=str(tmp_path / "nowhere.csv"))
    (tmp_path / "bad.csv").write_text("a,b\n1,2,3\n")
    assert "bad.csv could not be read as a table" in refusal(load, *tables, bulk_counts=str(tmp_path / "bad.csv"))


def test_the_hash_follows_both_files(load, tables, tmp_path):
    load(*tables)
    files = {"bulk_counts": str(tmp_path / "counts.csv"), "bulk_samples": str(tmp_path / "sheet.csv")}
    settings = load_study("tiny").model_copy(update=files)
    hashes = [bulk.source_hash(settings)]
    for name in files.values():
        with Path(name).open("a") as file:
            file.write("\n")
        hashes.append(bulk.source_hash(settings))
    demo = [load_study("tiny", bulk_counts="demo", demo_seed=seed) for seed in (0, 0, 1)]
    hashes += [bulk.source_hash(one) for one in demo]
    assert len(set(hashes)) == 5
    assert hashes[3] == hashes[4]


def test_simulated_samples_are_those_of_the_task(monkeypatch):
    monkeypatch.setattr(simulate, "BULK_CELLS", 5000)
    counts, wells = simulate.simulate_bulk(seed=0)
    settings = load_study("tiny", bulk_counts="demo", classes=["Dex", "Untreated"], dose_column="dose")
    var = pd.DataFrame({"ensembl_id": counts.index, "symbol": "?"}, index=counts.index)
    label = pd.Categorical(["Dex", "Untreated"], categories=["Dex", "Untreated"])
    cells = ad.AnnData(
        sparse.csr_matrix(np.ones((2, len(var)))), obs=pd.DataFrame({"label": label}, index=["c1", "c2"]), var=var
    )
    samples = bulk.load_bulk(settings, cells)
    asked = wells[wells["treatment"].isin(["Dex", "Untreated"])]
    assert list(samples.obs_names) == [f"bulk_{name}" for name in asked.index]
    np.testing.assert_array_equal(samples.X.toarray(), counts[asked.index].to_numpy().T)
    assert samples.obs["dose"].tolist() == asked["dose"].tolist()
    with pytest.raises(UserError, match="demo means simulated samples, but dataset is pbmc68k"):
        bulk.load_bulk(settings.model_copy(update={"dataset": "pbmc68k"}), cells)
