"""The official format: a tokenized data set enters at fine-tuning, and our tokens suit the official classifier."""

import re

import datasets
import numpy as np
import pandas as pd
import pytest

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import fetch, qc
from tuneformer.study import load_study
from tuneformer.tokens import export, official
from tuneformer.tokens.encode import single_cell_tokens
from tuneformer.tokens.vocabulary import Vocabulary

DISEASES = ["dcm", "hcm", "nf"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


@pytest.fixture(scope="module")
def demo():
    return Vocabulary.read(fetch.checkpoint_dir("demo"))


@pytest.fixture(scope="module")
def framed(demo):
    """Return a vocabulary like that of Geneformer V2."""
    specials = {"<pad>": 0, "<mask>": 1, "<cls>": demo.size, "<eos>": demo.size + 1}
    return Vocabulary(genes=demo.genes, specials=specials, aliases={})


@pytest.fixture
def hearts(demo):
    """Return rows as in human_dcm_hcm_nf.dataset: 240 cells, 4 individuals with each of three diseases."""
    rng = np.random.default_rng(0)
    tokens = demo.genes["token_id"].to_numpy()
    rows = []
    for number in range(240):
        length, disease = int(rng.integers(20, 200)), DISEASES[number % 3]
        individual = f"{disease}{number // 3 % 4}"
        rows.append([rng.permutation(tokens)[:length].tolist(), length, "Cardiomyocyte1", individual, disease])
    return pd.DataFrame(rows, columns=["input_ids", "length", "cell_type", "individual", "disease"])


@pytest.fixture
def folder(tmp_path):
    """Write rows in the official format; return the folder."""

    def write(rows):
        datasets.Dataset.from_dict(rows.to_dict("list")).save_to_disk(tmp_path / "heart.dataset")
        return tmp_path / "heart.dataset"

    return write


def read(path, vocabulary, *, max_length=192, cells=range(240)):
    cells = [f"row{row}" for row in cells]
    return official.read_dataset(path, cells, vocabulary, max_length=max_length, columns={"label": ["x"] * len(cells)})


def study(path, **changes):
    asked = {"dataset": "own", "path": str(path), "checkpoint": "demo", "folds": 0, "select_column": None}
    return load_study("cardiomyopathy_strategies", **(asked | {"select_values": [], "group_by": None} | changes))


def test_a_task_on_such_cells_keeps_their_tokens_and_splits_by_individual(folder, hearts):
    settings = study(folder(hearts), group_by="individual", select_column="cell_type", select_values=["Cardiomyocyte1"])
    assert paths.is_tokenized(settings)
    cells, tokens = qc.prepare_cells(settings), single_cell_tokens(settings)
    assert cells.shape == (240, 0)
    assert cells.obs.groupby("individual", observed=True)["split"].nunique().max() == 1
    assert tokens.classes == DISEASES
    made = tokens.dataset.to_pandas()
    assert list(made["label"]) == list(hearts["disease"])
    assert list(made["group"]) == list(hearts["individual"])
    assert list(made["split"]) == list(cells.obs["split"])
    assert [list(ids) for ids in made["input_ids"]] == [ids[:192] for ids in hearts["input_ids"]]
    assert made["length"].tolist() == hearts["length"].clip(upper=192).tolist()
    assert tokens.dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))


def test_a_selection_takes_the_tokens_of_its_rows(folder, hearts):
    hearts["cell_type"] = np.where(np.arange(240) % 5 == 0, "Fibroblast", "Cardiomyocyte1")
    options = {"select_column": "cell_type", "select_values": ["Fibroblast"], "classes": ["nf", "dcm"]}
    made = single_cell_tokens(study(folder(hearts), **options)).dataset.to_pandas()
    expected = hearts[(hearts["cell_type"] == "Fibroblast") & hearts["disease"].isin(["nf", "dcm"])]
    assert list(made["cell"]) == [f"row{number}" for number in expected.index]
    assert [list(ids) for ids in made["input_ids"]] == [ids[:192] for ids in expected["input_ids"]]


def test_cells_are_found_by_their_names_where_they_have_some(folder, hearts, demo):
    path = folder(hearts.assign(cell=[f"barcode{row}" for row in range(240)]))
    found = official.read_dataset(path, ["barcode7", "barcode3"], demo, max_length=192, columns={})
    assert found["input_ids"][:] == [hearts["input_ids"][row][:192] for row in (7, 3)]


def test_tokens_of_another_vocabulary_are_refused(folder, hearts, demo):
    for wrong in (60_000, demo.specials["<pad>"], -1):
        hearts.at[7, "input_ids"] = [2, wrong, 3]
        message = rf"heart\.dataset: 1 of [\d,]+ tokens are not in the vocabulary of the checkpoint \(such as {wrong}\)"
        with pytest.raises(UserError, match=message):
            read(folder(hearts), demo)
    hearts.at[7, "input_ids"] = []
    with pytest.raises(UserError, match=r": 1 cells have no token; leave them out\.$"):
        read(folder(hearts), demo)


def test_the_tokens_of_the_other_version_are_refused(folder, hearts, demo, framed):
    with pytest.raises(UserError, match="240 of 240 cells do not begin with <cls> and end with <eos>"):
        read(folder(hearts), framed)
    hearts["input_ids"] = [[5, *ids[:20], 6] for ids in hearts["input_ids"]]
    message = "every cell begins with token 5 and ends with 6, like the <cls> and <eos> of Geneformer V2"
    with pytest.raises(UserError, match=message):
        read(folder(hearts), demo)


def test_version_2_keeps_both_special_tokens_when_cut(folder, hearts, framed):
    begin, end = framed.specials["<cls>"], framed.specials["<eos>"]
    hearts["input_ids"] = [[begin, *ids, end] for ids in hearts["input_ids"]]
    for given, ids in zip(hearts["input_ids"], read(folder(hearts), framed, max_length=50)["input_ids"], strict=True):
        assert ids == (given if len(given) <= 50 else [*given[:49], end])


def test_tokens_are_read_in_pieces(folder, hearts, demo, monkeypatch):
    path = folder(hearts)
    whole = read(path, demo).to_dict()
    monkeypatch.setattr(official, "CHUNK", 7)
    assert read(path, demo).to_dict() == whole


def test_our_tokens_suit_the_official_classifier(tmp_path):
    """`Classifier.prepare_data` refuses a column label, filters by columns, renames the state key, numbers classes."""
    settings = load_study("tiny", group_by="well")
    tokens = single_cell_tokens(settings)
    path = export.write_dataset(settings, tokens.dataset, tmp_path / "ours.dataset")
    ours = datasets.load_from_disk(path)
    assert set(ours.column_names) == {"input_ids", "length", "cell", "treatment", "split", "well"}
    assert ours.features["length"].dtype == "int64"
    assert ours.features["treatment"].dtype == "string"
    assert ours["length"][:] == [len(ids) for ids in ours["input_ids"]]
    known = ours.filter(lambda cell: cell["split"] in ["train", "validation"])
    numbers = {name: number for number, name in enumerate(tokens.classes)}
    labelled = known.rename_column("treatment", "label").map(lambda cell: {"label": numbers[cell["label"]]})
    assert labelled.features["label"].dtype == "int64"
    assert labelled["label"][:5] == [numbers[name] for name in known["treatment"][:5]]
    back = official.read_dataset(path, ours["cell"][:3], tokens.vocabulary, max_length=192, columns={})
    assert back["input_ids"][:] == ours["input_ids"][:3]  # and they can come back in


@pytest.mark.parametrize(
    ("label", "column"), [("treatment", "treatment"), ("label", "cell_state"), ("split", "cell_state")]
)
def test_a_reserved_name_is_not_used(label, column):
    assert export.state_column(load_study("tiny", label=label)) == column


def test_the_command_writes_a_folder_or_says_what_is_wrong(tmp_path, capsys):
    assert export.main(["tiny", str(tmp_path / "out.dataset")]) == 0
    assert re.search(r"out\.dataset: [\d,]+ cells, classes in the column 'treatment'", capsys.readouterr().out)
    assert datasets.load_from_disk(tmp_path / "out.dataset").num_rows > 1000
    assert export.main(["tinny", str(tmp_path / "out.dataset")]) == 2
    assert "Did you mean tiny?" in capsys.readouterr().err
