"""The data sets: miniatures in their exact formats, from a web server to the cells of a study."""

import dataclasses
import gzip
import hashlib
import os
import pickle
import re
from pathlib import Path

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
from file_server import FileServer
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import download, fetch, qc, sciplex, simulate, sources
from tuneformer.study import load_study

DESIGN = ["top_oligo", "drug", "dose", "dose_um", "dose_label", "treatment", "plate", "well", "replicate"]
NO_LIMITS = {"min_hash_umis": None, "min_hash_ratio": None, "max_hash_qval": None}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", False)
    with FileServer() as running:
        yield running


@pytest.fixture
def serve(server, monkeypatch):
    """Serve other files in place of those of a data set, whose checksums are pinned to theirs."""

    def replace(dataset, *contents):
        entry, served = sources.SOURCES[dataset], []
        for file, content in zip(entry.files, contents, strict=True):
            server.files[f"/{file.name}"] = content
            pinned = None if file.checksum is None else f"sha256:{hashlib.sha256(content).hexdigest()}"
            size = None if file.size is None else len(content)
            url = f"{server.url}/{file.name}"
            served.append(dataclasses.replace(file, url=url, size=size, checksum=pinned))
        monkeypatch.setitem(sources.SOURCES, dataset, dataclasses.replace(entry, files=tuple(served)))

    return replace


@pytest.fixture(scope="module")
def screen():
    """A simulated screen of 400 cells with hash statistics that all pass, on 30 genes with true-looking names."""
    adata = simulate.simulate_sciplex2(400, seed=1)[:, :30].copy()
    adata.var.index = [f"GENE{number}" for number in range(30)]
    adata.var["ensembl_id"] = [f"ENSG{number:011d}" for number in range(30)]
    adata.obs["hash_umis"], adata.obs["top_to_second_best_ratio"], adata.obs["qval"] = 100.0, 50.0, 1e-6
    return adata


def harmonised(screen, tmp_path):
    """Return the file as scPerturb writes it."""
    parts = screen.obs["top_oligo"].astype(object).str.split("_", expand=True)
    obs = screen.obs[["top_oligo", "hash_umis", "top_to_second_best_ratio"]].copy()
    obs["qval_demultiplexing"] = screen.obs["qval"]
    obs["perturbation"] = parts[0].fillna("control")  # a cell without hash, not one with vehicle
    obs["dose_value"], obs["well"] = parts[1], parts[2]
    obs["ncounts"], obs["cell_line"] = screen.X.sum(axis=1).A1, "A549"
    var = pd.DataFrame({"ensembl_id": screen.var["ensembl_id"]}, index=pd.Index(screen.var_names, name="gene_symbol"))
    ad.AnnData(screen.X.astype(np.int64), obs=obs, var=var).write_h5ad(tmp_path / "harmonised.h5ad")
    return (tmp_path / "harmonised.h5ad").read_bytes()


def geo(screen):
    """Return the four files as the authors wrote them."""
    matrix = sparse.coo_matrix(screen.X)
    lines = pd.DataFrame({"gene": matrix.col + 1, "cell": matrix.row + 1, "count": matrix.data.astype(int)})
    genes = pd.DataFrame({"id": screen.var["ensembl_id"] + ".7", "name": screen.var_names})
    cells = pd.DataFrame({"cell": screen.obs_names, "sample": "A549_Transcription_Modulators"})
    table = pd.DataFrame({"Cell": screen.obs_names, "sample": "sciPlex2", "n.umi": 9, "Size_Factor": 1.5})
    for name in ("top_oligo", "hash_umis", "pval", "qval", "top_to_second_best_ratio"):
        table[name] = screen.obs["qval" if name == "pval" else name].to_numpy()
    table = table.sample(frac=1, random_state=0)  # in an order of its own
    table.index = range(1, len(table) + 1)  # R writes row names without a name of their column
    text = table.to_csv(sep=" ", na_rep="NA", index_label=False, quoting=2)
    tables = [frame.to_csv(sep="\t", header=False, index=False) for frame in (lines, genes, cells)]
    return [gzip.compress(part.encode()) for part in (*tables, text)]


def test_sciplex2_has_the_cell_table_of_the_simulated_screen(screen, serve, tmp_path):
    serve("sciplex2", harmonised(screen, tmp_path))
    cells = sources.load(load_study("drug_5class", dataset="sciplex2"))
    np.testing.assert_array_equal(cells.X.toarray(), screen.X.toarray())
    assert list(cells.var["ensembl_id"]) == list(screen.var["ensembl_id"])
    assert list(cells.var["symbol"]) == list(screen.var_names)
    pd.testing.assert_frame_equal(cells.obs[DESIGN], screen.obs[DESIGN], check_names=False)
    assert cells.obs["treatment"].isna().sum() == screen.obs["treatment"].isna().sum() > 0
    assert cells.uns["dataset"]["name"] == "sciplex2"
    assert cells.uns["dataset"]["simulated"] is False


def test_a_harmonised_file_without_oligos_is_read_by_its_parts(screen, serve, tmp_path):
    harmonised(screen, tmp_path)
    adata = ad.read_h5ad(tmp_path / "harmonised.h5ad")
    adata.obs = adata.obs.drop(columns="top_oligo")
    adata.write_h5ad(tmp_path / "parts.h5ad")
    serve("sciplex2", (tmp_path / "parts.h5ad").read_bytes())
    cells = sources.load(load_study("drug_5class", dataset="sciplex2"))
    pd.testing.assert_frame_equal(cells.obs[DESIGN], screen.obs[DESIGN], check_names=False)


def test_the_tables_of_geo_give_the_same_cells(screen, serve):
    serve("sciplex2_geo", *geo(screen))
    cells = sources.load(load_study("drug_5class", dataset="sciplex2_geo"))
    np.testing.assert_array_equal(cells.X.toarray(), screen.X.toarray())
    assert list(cells.obs_names) == list(screen.obs_names)
    assert list(cells.var["ensembl_id"]) == list(screen.var["ensembl_id"])
    pd.testing.assert_frame_equal(cells.obs[DESIGN], screen.obs[DESIGN], check_names=False)


def test_a_study_of_the_screen_runs_through_quality_control(screen, serve, tmp_path):
    serve("sciplex2", harmonised(screen, tmp_path))
    settings = load_study("drug_5class", dataset="sciplex2", min_counts=0, max_mito_share=1.0)
    adata = qc.prepare_cells(settings)
    known = screen.obs["treatment"].notna() & (settings.max_counts >= screen.X.sum(axis=1).A1)
    assert adata.obs["label"].value_counts().to_dict() == screen.obs["treatment"][known].value_counts().to_dict()
    assert adata.obs["split"].notna().all()


@pytest.mark.parametrize(
    ("key", "limit", "column", "values", "passing"),
    [
        ("min_hash_umis", 30, "hash_umis", [29, 30, 31], 1),
        ("min_hash_ratio", 10.0, "top_to_second_best_ratio", [9.99, 10.0, 10.01], 1),
        ("max_hash_qval", 0.01, "qval", [0.011, 0.01, 0.009], 1),
    ],
)
def test_the_hash_filters_of_the_authors(key, limit, column, values, passing):
    """hash_umis > 30, top_to_second_best_ratio > 10, qval < 0.01; a missing statistic fails."""
    good = {"hash_umis": 100.0, "top_to_second_best_ratio": 50.0, "qval": 1e-9}
    obs = pd.DataFrame([good | {column: value} for value in (*values, np.nan)])
    obs["top_oligo"] = "Nutlin_10_AA03"
    settings = load_study("drug_5class", dataset="sciplex2", **NO_LIMITS | {key: limit})
    design, failed = sciplex.label_cells(obs, settings, Path("file"))
    assert design["drug"].notna().tolist() == [False, False, True, False]
    assert design.loc[[0, 1, 3]].isna().all(axis=None)
    assert failed == {f"cells failing {key} ({limit:g})": "3"}
    assert sciplex.label_cells(obs, settings.model_copy(update={key: None}), Path("file"))[0]["drug"].notna().all()
    with pytest.raises(UserError, match=f"{key}: file has no obs column '{column}' .* set {key} to null, or take"):
        sciplex.label_cells(obs.drop(columns=column), settings, Path("file"))


def test_doses_are_shares_of_the_maximum_of_a_drug():
    oligos = pd.Series(["Nutlin_0.1_AA01", "Nutlin_50_BC11", "Dex_100_AD06", "BMS_0_BH12", np.nan], dtype=object)
    table = sciplex.read_oligos(oligos, Path("file"))
    assert table["dose_label"].tolist()[:4] == ["0.25 uM", "125 uM", "50 uM", "0 uM"]
    assert table["treatment"].tolist()[:4] == ["Nutlin", "Nutlin", "Dex", "Untreated"]
    assert table["drug"].tolist()[3] == "BMS"
    assert table["replicate"].tolist()[:4] == [1.0, 2.0, 3.0, 3.0]
    assert table["plate"].tolist()[:4] == ["A", "B", "A", "B"]
    assert table.loc[4].isna().all()
    for wrong in ("Nutlin_10", "Aspirin_10_AA01", "Nutlin_10_AA13x"):
        with pytest.raises(UserError, match=rf"file: the oligo '{wrong}' does not read <drug>_<dose>_<well>"):
            sciplex.read_oligos(pd.Series([wrong]), Path("file"))


def test_genes_with_the_same_identifier_are_summed(screen, serve, tmp_path):
    changed = screen.copy()
    changed.var["ensembl_id"] = [*changed.var["ensembl_id"][:-1], changed.var["ensembl_id"].iloc[0]]
    serve("sciplex2", harmonised(changed, tmp_path))
    cells = sources.load(load_study("drug_5class", dataset="sciplex2"))
    assert cells.n_vars == 29
    expected = screen.X[:, 0].toarray() + screen.X[:, 29].toarray()
    np.testing.assert_array_equal(cells.X[:, 0].toarray(), expected)


@pytest.mark.parametrize(
    ("part", "line", "message"),
    [
        (0, "31\t1\t2\n", "gene 31 of cell 1 is not among the 30 genes and 400 cells"),
        (0, "0\t1\t2\n", "gene 0 of cell 1 is not among"),
        (2, "cell0\tsample\n", "do not pair off; delete both"),
        (0, "what\n", "could not be read"),
    ],
)
def test_tables_of_geo_that_do_not_fit(screen, serve, part, line, message):
    files = geo(screen)
    files[part] = gzip.compress(gzip.decompress(files[part]) + line.encode())
    serve("sciplex2_geo", *files)
    with pytest.raises(UserError, match=message):
        sources.load(load_study("drug_5class", dataset="sciplex2_geo"))


# sci-Plex 3


def write_sciplex3(path, n_cells=600, **changes):
    """Write a miniature as scPerturb writes it (version 1.4): three lines, compounds, human and mouse genes."""
    rng = np.random.default_rng(3)
    obs = pd.DataFrame({"cell_line": rng.choice(["A549", "K562", "MCF7"], n_cells)})
    obs["perturbation"] = rng.choice(["Dacinostat (LAQ824) ", "Nutlin-3", "Belinostat", "control"], n_cells)
    obs["dose_value"] = rng.choice([10.0, 100.0, 1000.0, 10000.0], n_cells)
    obs.loc[obs["perturbation"] == "control", "dose_value"] = 0.0
    obs["dose_unit"], obs["time"] = "nM", rng.choice([24.0, 72.0], n_cells)
    obs["plate"], obs["well"] = rng.choice(["plate1", "plate30"], n_cells), rng.choice(["A1", "H12"], n_cells)
    obs["replicate"] = np.where(obs["plate"] == "plate1", "rep1", "rep2")
    obs.loc[:9, ["cell_line", "perturbation", "dose_value", "plate", "well", "replicate"]] = np.nan  # without hash
    obs.index = [f"cell{number}" for number in range(n_cells)]
    obs = obs.astype(dict.fromkeys(obs.select_dtypes(object), "category"))
    ids = [f"ENSG{number:011d}" for number in range(20)] + [f"ENSMUSG{number:011d}" for number in range(5)]
    var = pd.DataFrame({"ensembl_id": ids}, index=pd.Index([f"G{number}" for number in range(25)], name="gene_symbol"))
    counts = sparse.random(n_cells, 25, density=0.3, format="csr", random_state=3)
    counts.data = np.ceil(counts.data * 5)
    adata = ad.AnnData(counts.astype(np.int64), obs=obs.assign(**changes), var=var)
    adata.write_h5ad(path)
    return adata


def sciplex3_study(**changes):
    settings = {"label": "treatment", "classes": [], "dose_column": None} | NO_LIMITS | changes
    return load_study("tiny", dataset="sciplex3", **settings)


def test_sciplex3_reads_a_cell_line_and_its_compounds(serve, tmp_path):
    whole = write_sciplex3(tmp_path / "cells.h5ad")
    serve("sciplex3", (tmp_path / "cells.h5ad").read_bytes())
    classes = ["Untreated", "Nutlin-3", "Dacinostat (LAQ824)"]
    cells = sources.load(sciplex3_study(select_column="cell_line", select_values=["K562"], classes=classes))
    asked = (whole.obs["cell_line"] == "K562") & (whole.obs["perturbation"] != "Belinostat")
    assert list(cells.obs_names) == list(whole.obs_names[asked])
    np.testing.assert_array_equal(cells[:].X.toarray(), whole.X[asked.to_numpy()][:, :20].toarray())
    assert set(cells.obs["treatment"]) == set(classes)
    assert list(cells.obs["cell_line"].cat.categories) == ["K562"]
    treated = whole.obs[asked & (whole.obs["perturbation"] != "control")]
    mine = cells.obs.loc[treated.index]
    np.testing.assert_allclose(mine["dose"], treated["dose_value"] / 100)  # 10,000 nM is 100 %
    np.testing.assert_allclose(mine["dose_um"], treated["dose_value"] / 1000)
    assert set(mine["dose_label"]) == {"0.01 uM", "0.1 uM", "1 uM", "10 uM"}
    assert set(cells.obs["well"]) == {"plate1_A1", "plate1_H12", "plate30_A1", "plate30_H12"}
    assert (mine["replicate"] == treated["replicate"].astype(str).str[-1].astype(float)).all()
    assert set(cells.obs["cell_line_time"]) == {"K562 24 h", "K562 72 h"}
    late = sources.load(sciplex3_study(select_column="time", select_values=["72.0"], label="dose", classes=["100.0"]))
    assert set(late.obs["time"]) == {72.0}
    assert set(late.obs["dose"]) == {100.0}
    everything = sources.load(sciplex3_study())
    assert everything.n_obs == 590  # all but those without hash


def test_of_cells_that_are_not_selected_no_value_is_read(tmp_path, monkeypatch):
    """The file is larger than the memory of many machines."""
    whole = write_sciplex3(tmp_path / "cells.h5ad", n_cells=1000)
    read = []
    getitem = h5py.Dataset.__getitem__

    def watched(stored, place, *rest, **keywords):
        value = getitem(stored, place, *rest, **keywords)
        if stored.name == "/X/data":
            read.append(len(value))
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    classes = ["Nutlin-3", "Untreated"]
    cells = sciplex.read_sciplex3(
        tmp_path / "cells.h5ad", sciplex3_study(select_column="cell_line", select_values=["MCF7"], classes=classes)
    )
    asked = (whole.obs["cell_line"] == "MCF7") & whole.obs["perturbation"].isin(["Nutlin-3", "control"])
    assert 0 < cells.n_obs == asked.sum()
    assert not read
    np.testing.assert_array_equal(cells[:].X.toarray(), whole.X[asked.to_numpy()][:, :20].toarray())
    assert 0 < sum(read) < whole.X.nnz


def test_what_sciplex3_refuses(tmp_path):
    file = tmp_path / "cells.h5ad"
    write_sciplex3(file)
    with pytest.raises(
        UserError, match=r"min_hash_ratio: cells\.h5ad has no hash statistics; set min_hash_umis, min_h"
    ):
        sciplex.read_sciplex3(file, sciplex3_study(min_hash_ratio=10.0))
    with pytest.raises(
        UserError, match=r"select_values: no cell has 'K526' in obs column 'cell_line'.*did you mean 'K562'"
    ):
        sciplex.read_sciplex3(file, sciplex3_study(select_column="cell_line", select_values=["K526"]))
    with pytest.raises(UserError, match=r"classes: no selected cell has one of them in 'treatment'"):
        sciplex.read_sciplex3(file, sciplex3_study(classes=["Aspirin"]))
    write_sciplex3(file, dose_unit="uM")
    with pytest.raises(UserError, match=r"doses in uM, where nM is expected"):
        sciplex.read_sciplex3(file, sciplex3_study())
    adata = write_sciplex3(file)
    adata.var["ensembl_id"] = ["id gene_short_name", *adata.var["ensembl_id"][:-1]]
    adata.write_h5ad(file)
    with pytest.raises(UserError, match="gene 1 is called like a header, so that all names of genes are shifted"):
        sciplex.read_sciplex3(file, sciplex3_study())


# pancreas, cardiomyopathy, and what is needed


def test_pancreas_counts_and_symbols(serve, tmp_path):
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(1.0, (60, 4)) * 0.5)
    obs = pd.DataFrame({"celltype": ["alpha", "beta"] * 30, "tech": ["smartseq2", "inDrop3"] * 30})
    obs.index = [f"c{number}" for number in range(60)]
    adata = ad.AnnData(rng.normal(size=(60, 4)), obs=obs, var=pd.DataFrame(index=["INS", "GCG", "SST", "LOST"]))
    adata.layers["counts"] = counts
    adata.write_h5ad(tmp_path / "pancreas.h5ad")
    serve("pancreas", (tmp_path / "pancreas.h5ad").read_bytes())
    model = tmp_path / "model"
    model.mkdir()
    names = {"INS": "ENSG00000254647", "GCG": "ENSG00000115263", "SST": "ENSG00000157005"}
    (model / "gene_name_id_dict_gc.pkl").write_bytes(pickle.dumps(names))
    settings = load_study("tiny", dataset="pancreas", label="celltype", checkpoint=str(model), fractional_counts=True)
    cells = sources.load(settings)
    np.testing.assert_array_equal(cells[:].X.toarray(), counts.toarray())
    assert cells.obs["tech"].unique().tolist() == ["smartseq2", "inDrop"]  # the batches of inDrop are one technology
    assert cells.obs["batch"].unique().tolist() == ["smartseq2", "inDrop3"]
    assert list(cells.var["ensembl_id"]) == [*names.values(), "LOST"]
    assert list(cells.var["symbol"]) == ["INS", "GCG", "SST", "LOST"]
    before = sources.source_key(settings)
    (model / "gene_name_id_dict_gc.pkl").write_bytes(pickle.dumps(names | {"LOST": "ENSG00000000001"}))
    assert sources.source_key(settings) != before


def test_cardiomyopathy_is_a_tokenized_data_set_of_the_hub(serve, tmp_path):
    rows = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "cell_type": ["Cardiomyocyte1", "Fibroblast1"],
        "individual": ["1447", "1600"],
        "disease": ["nf", "hcm"],
        "length": [3, 2],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "official.dataset")
    folder = tmp_path / "official.dataset"
    (data,) = folder.glob("*.arrow")
    (folder / "state.json").write_text((folder / "state.json").read_text().replace(data.name, "dataset.arrow"))
    data.rename(folder / "dataset.arrow")
    names = [Path(file.name).name for file in sources.SOURCES["cardiomyopathy"].files]
    assert sorted(names) == sorted(file.name for file in folder.iterdir())
    serve("cardiomyopathy", *((folder / name).read_bytes() for name in names))
    settings = load_study("tiny", dataset="cardiomyopathy", label="disease", group_by="individual", dose_column=None)
    cells = sources.load(settings)
    assert cells.obs["disease"].tolist() == ["nf", "hcm"]
    assert cells.obs["individual"].tolist() == ["1447", "1600"]
    assert sources.source_path(settings) == paths.DOWNLOADS / "cardiomyopathy" / "human_dcm_hcm_nf.dataset"
    assert datasets.load_from_disk(sources.source_path(settings))["input_ids"][:] == rows["input_ids"]
    assert re.fullmatch("[0-9a-f]{16}", cells.uns["dataset"]["hash"])


def test_the_simulated_pancreas_is_a_data_set():
    settings = load_study("tiny", dataset="demo_pancreas", label="celltype", demo_cells=300, dose_column=None)
    cells = sources.load(settings)
    assert cells.n_obs == 300
    said = {"name": "demo_pancreas", "simulated": True, "hash": sources.source_key(settings)}
    assert said.items() <= cells.uns["dataset"].items()
    assert sources.source_key(settings) != sources.source_key(load_study("tiny", demo_cells=300))
    assert sources.remote_files(settings) == []


def test_a_pinned_source_is_known_before_it_is_fetched(server):
    known = [{"dataset": name, "checkpoint": "Geneformer-V1-10M"} for name in ("sciplex2", "sciplex3", "pancreas")]
    known.append({"dataset": "pancreas", "checkpoint": "Geneformer-V2-104M"})  # other names of genes
    assert len({sources.source_key(load_study("tiny", **changes)) for changes in known}) == 4
    assert server.requests == []
    with pytest.raises(UserError, match="was not downloaded yet, and its checksum is not known before"):
        sources.source_key(load_study("tiny", dataset="cardiomyopathy"))


def test_what_a_study_needs(server):
    settings = load_study(
        "tiny",
        dataset="sciplex2",
        checkpoint="Geneformer-V1-10M",
        gene_classes=str(paths.DOWNLOADS / "dosage_genes" / "dosage_sensitivity_TFs.pickle"),
    )
    assert [remote.name for remote in sources.remote_files(settings)] == [
        "Geneformer-V1-10M/config.json",
        "Geneformer-V1-10M/model.safetensors",
        "Geneformer-V1-10M/token_dictionary_gc30M.pkl",
        "Geneformer-V1-10M/gene_median_dictionary_gc30M.pkl",
        "Geneformer-V1-10M/gene_name_id_dict_gc30M.pkl",
        "Geneformer-V1-10M/ensembl_mapping_dict_gc30M.pkl",
        "sciplex2/SrivatsanTrapnell2020_sciplex2.h5ad",
        "dosage_genes/dosage_sensitivity_TFs.pickle",
    ]
    assert sources.remote_files(load_study("tiny")) == []


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_entry_says_whose_it_is_and_where(name):
    entry = sources.SOURCES[name]
    assert entry.title
    assert "doi:10." in entry.citation or not entry.files
    assert entry.licence
    for file in entry.files:
        assert file.name.startswith(f"{name}/")
        assert file.url.startswith("https://")
        assert file.checksum is None or re.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum)


def test_the_command_fetches_what_a_study_needs(server, serve, screen, tmp_path, monkeypatch, capsys):
    serve("sciplex2", harmonised(screen, tmp_path))
    monkeypatch.setattr("tuneformer.data.download.jobs", lambda _: [load_study("tiny", dataset="sciplex2")])
    assert download.main(["anything"]) == 0
    target = paths.DOWNLOADS / "sciplex2" / "SrivatsanTrapnell2020_sciplex2.h5ad"
    assert target.is_file()
    assert "complete and checked" in capsys.readouterr().err
    target.unlink()
    server.files.clear()
    assert download.main(["anything"]) == 2
    assert "was not found (the server answered 404)" in capsys.readouterr().err


def test_without_network_the_command_says_how_to_fetch_all_files_by_hand(server, monkeypatch, capsys):
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", True)
    settings = load_study("tiny", dataset="sciplex2", checkpoint="Geneformer-V1-10M")
    monkeypatch.setattr("tuneformer.data.download.jobs", lambda _: [settings, settings])
    assert download.main(["anything"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "HF_HUB_OFFLINE forbids fetching it" in lines[0]
    assert lines[1] == "All that is missing, by hand:"
    assert lines[2:] == [file.curl for file in sources.remote_files(settings)]
    assert len(lines) == 9
    assert lines[-1] == (
        f"curl -L --create-dirs -o {paths.DOWNLOADS}/sciplex2/SrivatsanTrapnell2020_sciplex2.h5ad "
        f"'{sources.ZENODO}/SrivatsanTrapnell2020_sciplex2.h5ad?download=1'"
    )


def test_the_demo_needs_no_network_and_own_data_are_looked_for_first(monkeypatch, capsys):
    monkeypatch.setattr(fetch, "fetch", lambda file: pytest.fail(f"fetches {file.name}"))
    assert download.main(["tiny"]) == 0
    own = load_study("tiny", dataset="own", path="/nowhere/cells.h5ad", checkpoint="Geneformer-V1-10M")
    monkeypatch.setattr("tuneformer.data.download.jobs", lambda _: [own])
    assert download.main(["anything"]) == 2
    assert "path: /nowhere/cells.h5ad does not exist" in capsys.readouterr().err


# the side files of sci-Plex 2, which are real

real = pytest.mark.skipif("TUNEFORMER_DATA" not in os.environ, reason="TUNEFORMER_DATA names no folder of real data")


@real
def test_the_sample_sheet_of_sciplex2_is_read_whole():
    sheet = Path(os.environ["TUNEFORMER_DATA"]) / "sciplex2_hashSampleSheet.txt"
    oligos = pd.read_csv(sheet, sep="\t", header=None, usecols=[0])[0]
    table = sciplex.read_oligos(oligos, sheet)
    assert len(table) == 192
    assert table.notna().all(axis=None)
    assert table["well"].is_unique  # AE09 is misspelt in the sheet
    rows = table["well"].astype(str).str[1:]
    assert (pd.crosstab(rows, table["plate"]) == 1).all(axis=None)
    assert sorted(set(rows)) == [f"{row}{column:02d}" for row in "ABCDEFGH" for column in range(1, 13)]
    wells = pd.crosstab(table["drug"], table["dose"])
    assert (wells == 6).all(axis=None)
    assert list(wells.columns) == list(simulate.DOSES)
    copies = table.groupby(["drug", "dose"], observed=True)[["plate", "replicate"]].agg(lambda values: len(set(values)))
    assert (copies["replicate"] == 3).all()


@real
def test_doses_agree_with_the_viability_of_the_authors():
    table = pd.read_csv(Path(os.environ["TUNEFORMER_DATA"]) / "sciplex2_viability_ctg.csv", lineterminator="\r")
    assert len(table) == 192
    expected = table["dose"] / 100 * table["treatment"].map(sciplex.MAX_DOSE)
    np.testing.assert_allclose(table["real_dose"], expected)
