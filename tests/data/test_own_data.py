"""Own data as people have them: real cells with gene symbols, as 10x files, by make's variables, plate by plate."""

import gzip
import os
from pathlib import Path

import anndata as ad
import anndata.utils
import pandas as pd
import pytest
from scipy import io, sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import qc, readers, sources
from tuneformer.study import load_study

pytestmark = pytest.mark.skipif(
    "TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data"
)

VERSIONS = ["geneformer_v1", "geneformer_v2"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


@pytest.fixture(scope="module")
def folder():
    return Path(os.environ["TUNEFORMER_DATA"])


@pytest.fixture(scope="module")
def pbmc(folder):
    return ad.read_h5ad(folder / "pbmc_facs_raw.h5ad")[::12].copy()


@pytest.fixture
def own(monkeypatch):
    """Return the settings of the study own_data as `make report STUDY=own_data DATA=... LABEL=...` has them."""

    def study(path, label="celltype", **changes):
        monkeypatch.setenv("DATA", str(path))
        monkeypatch.setenv("LABEL", label)
        return load_study("own_data", **changes)

    return study


def test_the_template_takes_real_cells_as_they_are(own, folder):
    cells = qc.prepare_cells(own(folder / "pbmc_facs_raw.h5ad"))
    assert cells.obs["label"].nunique() == 10
    assert cells.uns["recognised"] == {
        "file": "h5ad",
        "counts": "X",
        "gene identifiers": "Ensembl identifiers in var['ensembl_id']",
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_symbols_are_mapped_to_the_identifiers_that_the_cells_have(own, folder, pbmc, tmp_path, version):
    names = anndata.utils.make_index_unique(pd.Index(pbmc.var["symbol"].astype(str)))
    named = ad.AnnData(pbmc.X, obs=pbmc.obs, var=pd.DataFrame(index=names))
    named.write_h5ad(tmp_path / "symbols.h5ad")
    settings = own(tmp_path / "symbols.h5ad", checkpoint=str(folder / version))
    adata = readers.read_own(tmp_path / "symbols.h5ad", settings)
    assert adata[:].X.sum() == pbmc.X.sum()
    native = pd.Series(pbmc.var["ensembl_id"].astype(str).to_numpy(), index=pbmc.var["symbol"].astype(str))
    mapped = adata.var[adata.var["ensembl_id"].str.match(readers.ENSEMBL)]
    assert len(mapped) > 0.75 * pbmc.n_vars  # the dictionaries have 78 % of these names
    both = mapped[mapped["symbol"].isin(native.index[~native.index.duplicated(keep=False)])]
    assert (both["ensembl_id"].to_numpy() == native[both["symbol"]].to_numpy()).mean() > 0.98


def test_a_10x_folder_of_real_cells_with_labels_in_a_table(own, pbmc, tmp_path):
    (tmp_path / "filtered").mkdir()
    io.mmwrite(tmp_path / "matrix.mtx", sparse.coo_matrix(pbmc.X.T.astype(int)))
    features = pbmc.var[["ensembl_id", "symbol"]].astype(str).assign(kind="Gene Expression")
    texts = {
        "matrix.mtx": (tmp_path / "matrix.mtx").read_text(),
        "features.tsv": features.to_csv(sep="\t", header=False, index=False),
        "barcodes.tsv": "".join(f"{name}\n" for name in pbmc.obs_names),
    }
    for name, text in texts.items():
        (tmp_path / "filtered" / f"{name}.gz").write_bytes(gzip.compress(text.encode(), 1))
    pbmc.obs[["celltype"]].to_csv(tmp_path / "labels.csv")
    made = qc.prepare_cells(own(tmp_path / "filtered", obs_table=str(tmp_path / "labels.csv")))[:].to_memory()
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    expected = qc.prepare_cells(own(tmp_path / "cells.h5ad"))
    assert (made.X != expected[:].X).nnz == 0
    assert list(made.var["ensembl_id"]) == list(expected.var["ensembl_id"])
    assert list(made.obs["label"]) == list(expected.obs["label"])
    assert made.obs["split"].equals(expected.obs["split"])


def test_normalised_real_cells_are_refused(own, pbmc, tmp_path):
    normalised = pbmc.copy()
    normalised.X = normalised.X.log1p()
    normalised.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(
        UserError, match=r"^cells.h5ad has no raw counts in X: there are values that are no whole numbers"
    ):
        qc.prepare_cells(own(tmp_path / "cells.h5ad"))
    normalised.layers["counts"] = pbmc.X
    normalised.write_h5ad(tmp_path / "cells.h5ad")
    cells = qc.prepare_cells(own(tmp_path / "cells.h5ad"))
    assert cells.uns["recognised"]["counts"] == "layers['counts']"


@pytest.mark.parametrize(
    ("column", "message"), [("n_counts", "it measures or names cells"), ("batch", "has one class")]
)
def test_labels_that_are_no_classes_are_refused(own, pbmc, tmp_path, column, message):
    pbmc.obs.assign(batch="x").to_csv(tmp_path / "obs.csv")
    pbmc.write_h5ad(tmp_path / "cells.h5ad")
    settings = own(tmp_path / "cells.h5ad", label=column, obs_table=str(tmp_path / "obs.csv"))
    with pytest.raises(UserError, match=message):
        qc.prepare_cells(settings)


def test_cell_lines_hold_out_each_plate_once_and_doublets_are_removed_or_kept():
    settings = load_study("cell_lines")
    cells = sources.load(settings)
    qc.check_cells(cells, settings)
    cells = qc.keep_cells(cells, qc.qc_flags(cells, settings))
    both = qc.select_task_cells(cells, settings.model_copy(update={"select_values": ["SNG", "DBL"]}))
    assert both.obs["demuxlet_cls"].value_counts().to_dict() == {"SNG": 571, "DBL": 338}
    tested = []
    for fold in range(3):
        singlets = qc.select_task_cells(cells, settings)
        obs = qc.split_cells(singlets, load_study("cell_lines", fold=fold)).obs
        is_test = obs["split"] == "test"
        (plate,) = obs["batch"][is_test].unique()
        assert is_test.sum() == (obs["batch"] == plate).sum()
        assert pd.crosstab(obs["label"], obs["split"]).to_numpy().min() > 0
        tested.append(plate)
    assert len(obs) == 571
    assert sorted(tested) == ["p1", "p2", "p3"]
