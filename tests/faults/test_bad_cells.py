"""Cells that cannot be used: each is refused with one sentence that says what, where, and what to do."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import qc, sources
from tuneformer.study import load_study

OWN = {"dataset": "own", "label": "celltype", "classes": [], "dose_column": None, "max_mito_share": 0.2}
GENES = [f"ENSG{number:011d}" for number in range(20)]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


@pytest.fixture
def cells():
    """Return 60 good cells of two types from six donors."""
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(60, (60, 20)).astype(np.float32))
    obs = pd.DataFrame({"celltype": ["T", "B"] * 30, "donor": [f"d{number // 10}" for number in range(60)]})
    obs.index = [f"cell{number}" for number in range(60)]
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame({"ensembl_id": GENES}, index=GENES))


@pytest.fixture
def prepare(tmp_path):
    """Return the own-data path: write the cells to an h5ad and prepare it as study pbmc_facs would."""

    def write_and_prepare(adata, **changes):
        path = tmp_path / "cells.h5ad"
        adata.write_h5ad(path)
        return qc.prepare_cells(load_study("tiny", **OWN | {"path": str(path), "min_counts": 0} | changes))

    return write_and_prepare


def refusal(function, *args, **keywords):
    """Return the message of a `UserError`, which must be one sentence, and leave nothing behind."""
    with pytest.raises(UserError) as caught:
        function(*args, **keywords)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+\.", message)
    assert not re.search(r"[a-z)]\. [A-Z]", message)
    assert len(message) < 420
    assert not list(paths.RUNS.rglob("cells.h5ad"))
    return message


def with_value(adata, value, dtype=np.float32):
    counts = adata.X.astype(dtype).toarray()
    counts[3, 5] = value
    adata.X = sparse.csr_matrix(counts)
    return adata


def test_good_cells_pass(cells, prepare):
    adata = prepare(cells, group_by="donor")
    assert adata.n_obs == 60
    assert adata.obs.groupby("donor", observed=True)["split"].nunique().max() == 1


@pytest.mark.parametrize(
    ("value", "what"),
    [(2.5, "fractional"), (-1, "negative"), (np.nan, r"missing \(NaN\)"), (np.inf, "infinite")],
)
def test_values_that_are_no_counts(cells, prepare, value, what):
    message = refusal(prepare, with_value(cells, value))
    assert re.match(
        rf"X holds {what} values \(1 of them; the first is \S+ for gene {GENES[5]} in cell cell3\), so these are not "
        r"raw counts; set counts to raw or to the layer with raw counts\.$",
        message,
    )


def test_normalised_cells(cells, prepare):
    cells.layers["umi"] = cells.X.copy()
    cells.X = np.log1p(cells.X)
    assert "X holds fractional values" in refusal(prepare, cells)
    assert prepare(cells, counts="umi").n_obs == 60


def test_normalised_cells_in_double_precision_that_single_would_round(cells, prepare):
    assert "fractional values (1 of them" in refusal(prepare, with_value(cells, 60 + 1e-9, np.float64))


def test_no_counts_at_all(cells, prepare):
    cells.X = sparse.csr_matrix(cells.shape, dtype=np.float32)
    assert refusal(prepare, cells).startswith("X holds no count at all; set counts to")


def test_truth_values_are_no_counts(cells, prepare):
    cells.X = cells.X > 50
    assert refusal(prepare, cells).startswith("X holds bool values, not numbers; set counts to")


@pytest.mark.parametrize("shape", [(0, 20), (60, 0)])
def test_no_cells_or_genes(cells, prepare, shape):
    message = refusal(prepare, cells[: shape[0], : shape[1]].copy())
    assert message == f"The data set has {shape[0]} cells and {shape[1]} genes; choose a file that has both."


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_cell_name_twice(cells, prepare):
    cells.obs_names = ["cell0", "cell0", *cells.obs_names[2:]]
    assert refusal(prepare, cells) == "The cell name 'cell0' is given 2 times; make every cell name unique."


def test_a_gene_twice(cells, prepare):
    cells.var["ensembl_id"] = [*GENES[:-1], GENES[0]]
    assert refusal(prepare, cells) == (
        f"cells.h5ad: var: the gene identifier {GENES[0]} is given 2 times (identifiers given more than once: "
        "1); sum the counts of each or keep one."
    )
    cells.var["ensembl_id"] = GENES[0]
    settings = load_study("tiny", path="cells.h5ad", **OWN)
    assert refusal(qc.check_cells, cells, settings).startswith(f"The gene identifier '{GENES[0]}' is given 20")


@pytest.mark.parametrize(("key", "column"), [("label", "cell_type"), ("select_column", "Donor"), ("group_by", "well")])
def test_an_obs_column_that_is_not_there(cells, prepare, key, column):
    message = refusal(prepare, cells, **{key: column})
    assert message.startswith(f"{key}: the cells have no obs column {column!r}; ")
    assert "; choose one of: celltype, donor" in message


def test_cells_without_any_column_as_in_a_10x_file(cells, prepare, tmp_path):
    labels = cells.obs[["celltype"]].copy()
    cells.obs = cells.obs[[]]
    assert refusal(prepare, cells) == (
        "label: the cells have no obs column 'celltype'; there are none at all: set obs_table to a csv or tsv with "
        "one, cell names in the first column."
    )
    labels.to_csv(tmp_path / "labels.csv")
    assert prepare(cells, obs_table=str(tmp_path / "labels.csv")).n_obs == 60


def test_a_misspelt_column_gets_a_hint(cells, prepare):
    assert "(did you mean 'celltype'?)." in refusal(prepare, cells, label="cell_type")


@pytest.mark.parametrize("key", ["ensembl_id", "symbol"])
def test_a_var_column_that_is_not_there(cells, prepare, key):
    message = refusal(prepare, cells, **{key: "gene"})
    assert message == f"cells.h5ad: var has no column 'gene' for {key}; choose one of: ensembl_id."


def test_a_layer_that_is_not_there(cells, prepare):
    cells.layers["umi"] = cells.X.copy()
    message = refusal(prepare, cells, counts="umis")
    assert message.endswith("cells.h5ad has no counts in 'umis'; set counts to one of: X, umi.")


def test_a_class_that_is_not_there(cells, prepare):
    assert refusal(prepare, cells, classes=["T", "NK"]) == (
        "classes: no cell has 'NK' in obs column 'celltype' after quality control; choose one of: B, T."
    )


def test_a_class_that_quality_control_empties(cells, prepare):
    counts = cells.X.toarray()
    counts[(cells.obs["celltype"] == "B").to_numpy(), 1:] = 0
    cells.X = sparse.csr_matrix(counts)
    message = refusal(prepare, cells, min_counts=500, classes=["B", "T"])
    assert message.startswith("classes: no cell has 'B' in obs column 'celltype' after quality control")


def test_a_selection_that_is_not_there(cells, prepare):
    message = refusal(prepare, cells, select_column="donor", select_values=["d11"])
    assert message.startswith("select_values: no cell has 'd11' in obs column 'donor'")
    assert "(did you mean 'd1'?)" in message


def test_one_class_only(cells, prepare):
    cells.obs["celltype"] = "T"
    assert (
        refusal(prepare, cells) == "obs column 'celltype' has one class, 'T'; set label to a column with two or more."
    )


def test_mouse_genes(cells, prepare):
    advice = (
        ", and Geneformer knows human genes only; replace them by their one-to-one human orthologs (Ensembl BioMart "
        "lists them) and drop the others."
    )
    mouse = [f"ENSMUSG{number:011d}" for number in range(20)]
    cells.var = pd.DataFrame({"ensembl_id": mouse}, index=mouse)
    assert refusal(prepare, cells) == f"The genes are those of mouse (such as {mouse[0]}){advice}"
    names = ["Gapdh", "mt-Nd1", *(f"Abc{number}" for number in range(18))]
    cells.var = pd.DataFrame(index=names)
    assert refusal(prepare, cells) == f"The genes are those of mouse or rat (such as Gapdh){advice}"


def test_a_label_that_measures_or_names_cells(cells, prepare):
    cells.obs["celltype"] = np.linspace(0, 1, 60)
    assert refusal(prepare, cells) == (
        "label: obs column 'celltype' has 60 different values for 60 cells, so it measures or names cells and holds no "
        "classes; set label to a column with few classes, or name them in classes."
    )


def test_a_label_variable_that_is_not_set(cells, prepare, monkeypatch):
    monkeypatch.setenv("LABEL", "")
    message = refusal(prepare, cells, label="$LABEL")
    assert message == (
        "label: $LABEL needs the variable LABEL, which is not set; say it to make, as in make report STUDY=own_data "
        "DATA=cells.h5ad LABEL=celltype, or write the whole name into the params file."
    )
    monkeypatch.setenv("LABEL", "celltype")
    assert prepare(cells, label="$LABEL").obs["label"].nunique() == 2


def test_normalised_cells_where_counts_are_looked_for(cells, prepare):
    cells.X = np.log1p(cells.X)
    assert refusal(prepare, cells, counts="auto") == (
        "cells.h5ad has no raw counts in X: there are values that are no whole numbers, as after normalisation; give "
        "the cells before that, or fractional_counts: true where counts are fractions by their protocol."
    )


def test_fractions_that_are_asked_for(cells, prepare):
    assert "X holds negative values" in refusal(prepare, with_value(cells.copy(), -2.5), fractional_counts=True)
    assert prepare(with_value(cells, 2.5), fractional_counts=True)["cell3", GENES[5]].X[0, 0] == 2.5


def test_classes_that_are_all_too_small(cells, prepare):
    message = refusal(prepare, cells, min_class_cells=31)
    assert message == (
        "min_class_cells: no class of obs column 'celltype' has 31 cells (the largest has 30); set it to less."
    )


def test_labels_that_are_all_missing(cells, prepare):
    cells.obs["celltype"] = pd.Categorical([None] * 60, categories=["T"])
    assert refusal(prepare, cells).startswith("Quality control drops all 60 cells, 60 of them by label")


def test_limits_that_drop_every_cell(cells, prepare):
    message = refusal(prepare, cells, min_counts=100_000)
    assert message.startswith("Quality control drops all 60 cells, 60 of them by min_counts (median count of a cell: 1")


def test_a_class_too_small_for_the_split(cells, prepare):
    cells.obs["celltype"] = ["T"] * 58 + ["B"] * 2
    assert refusal(prepare, cells).startswith("Class 'B' has 2 cells after quality control, too few for a test share")


def test_too_few_groups_for_the_split(cells, prepare):
    cells.obs["donor"] = ["d1", "d1", "d2", "d2"] * 15
    assert refusal(prepare, cells, group_by="donor").startswith("Class 'B' is in 2 groups of 'donor'")


def test_no_such_file():
    settings = load_study("tiny", path="/nowhere/cells.h5ad", **OWN)
    expected = "path: /nowhere/cells.h5ad does not exist; set it to an h5ad file with raw counts."
    assert refusal(qc.prepare_cells, settings) == expected


def test_a_variable_that_is_not_set(monkeypatch):
    monkeypatch.delenv("TUNEFORMER_DATA", raising=False)
    settings = load_study("tiny", path="$TUNEFORMER_DATA/pbmc_facs_raw.h5ad", **OWN)
    assert refusal(qc.prepare_cells, settings) == (
        "path: $TUNEFORMER_DATA/pbmc_facs_raw.h5ad needs the variable TUNEFORMER_DATA, which is not set; type export "
        "TUNEFORMER_DATA=/folder/of/the/data before you start, or write the whole path into the params file."
    )


def test_a_file_that_is_no_h5ad(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_text("gene,cell,count\n")
    settings = load_study("tiny", path=str(path), **OWN)
    assert "could not be read as an h5ad file" in refusal(sources.load, settings)


def test_a_file_that_ends_too_early(cells, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    path.write_bytes(path.read_bytes()[:4000])
    settings = load_study("tiny", path=str(path), **OWN)
    assert "could not be read as an h5ad file" in refusal(sources.load, settings)


def test_an_interrupted_write_leaves_the_old_cells(cells, prepare, monkeypatch):
    prepare(cells)
    (stored,) = paths.RUNS.rglob("cells.h5ad")
    before, files = stored.read_bytes(), sorted(stored.parent.iterdir())

    def full_disk(self, path, **keywords):
        path.write_bytes(b"half a file")
        msg = "No space left on device"
        raise OSError(msg)

    monkeypatch.setattr(ad.AnnData, "write_h5ad", full_disk)
    with pytest.raises(OSError, match="No space left"):
        qc.prepare_cells(load_study("tiny", **OWN, path=str(paths.RUNS.parent / "cells.h5ad"), min_counts=1))
    assert stored.read_bytes() == before
    assert sorted(stored.parent.iterdir()) == files


def test_arms_that_read_counts_of_cells_that_have_none(tmp_path):
    import datasets

    rows = {"input_ids": [[5, 6, 7]] * 40, "celltype": ["T", "B"] * 20}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "cells.dataset")
    fixed = {**OWN, "path": str(tmp_path / "cells.dataset")}
    good = load_study("tiny", **fixed).model_copy(update={"arms": {"full": {}}})
    assert qc.prepare_cells(good).shape == (40, 0)
    faults = {
        "vocabulary: fit takes medians from counts": ({"vocabulary": "fit"}, "set it to checkpoint"),
        "strategy knn_pca reads counts": ({"arm": "knn_pca"}, "leave the arm out"),
        "train_set pseudobulk is made of counts": ({"train_set": "pseudobulk", "k": 5}, "leave the arm out"),
        "steps_of pseudobulk makes groups of counts": ({"steps_of": "pseudobulk", "k": 5}, "leave the arm out"),
    }
    for what, (changes, remedy) in faults.items():
        arm = changes.get("arm", "full")
        settings = load_study("tiny", **fixed, **changes).model_copy(update={"arms": {"full": {}}})
        with pytest.raises(UserError) as caught:  # though the cells are stored already
            qc.prepare_cells(settings)
        assert str(caught.value) == (
            f"arm {arm}: {what}, and the cells of this study are tokens already, without counts; {remedy}."
        )
