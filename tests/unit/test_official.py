"""The official format: a tokenized data set enters at fine-tuning, and our tokens suit the official classifier."""

import re

import datasets
import numpy as np
import pandas as pd
import pytest

from tuneformer.data import preprocessing, readers
from tuneformer.data.readers import CellsError
from tuneformer.evaluate import baselines, leakage
from tuneformer.finetune import training
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.tokens import official, tokenizer
from tuneformer.tokens.tokenizer import TokensError
from tuneformer.tokens.vocabulary import Vocabulary
from tuneformer.trainsets import assemble

DISEASES = ["dcm", "hcm", "nf"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


@pytest.fixture(scope="module")
def demo():
    return Vocabulary.read(paths.checkpoint_dir("demo"))


@pytest.fixture
def hearts(demo):
    """Return rows as in human_dcm_hcm_nf.dataset: 240 cells, 4 individuals of each of three diseases."""
    rng = np.random.default_rng(0)
    tokens = demo.genes["token_id"].to_numpy()
    marks = np.array_split(tokens[:90], 3)  # a disease has its own genes at the top
    rows = []
    for number in range(240):
        disease = number % 3
        length = int(rng.integers(20, 200))
        top, rest = rng.permutation(marks[disease]), rng.permutation(tokens[90:])
        ids = np.concatenate([top, rest])[:length]
        individual = f"{DISEASES[disease]}{number // 3 % 4}"
        rows.append([ids.tolist(), length, "Cardiomyocyte1", individual, 50 + number % 4, DISEASES[disease]])
    return pd.DataFrame(rows, columns=["input_ids", "length", "cell_type", "individual", "age", "disease"])


@pytest.fixture
def study(tmp_path):
    """Write rows in the official format; return the settings of a study on them."""

    def write(rows, **changes):
        path = tmp_path / "heart.dataset"
        datasets.Dataset.from_dict(rows.to_dict("list")).save_to_disk(path)
        asked = {
            "path": str(path),
            "label": "disease",
            "vocabulary": "checkpoint",
            "baselines": ["majority", "logistic_ranks", "frozen_embedding_ridge"],
            "train_cells": None,
            "threads": 1,
        }
        return load_study("pbmc_facs", **(asked | changes))

    return write


def test_cells_are_split_by_individual_and_keep_their_tokens(study, hearts):
    settings = study(hearts, group_by="individual", select_column="cell_type", select_values=["Cardiomyocyte1"])
    cells = preprocessing.prepare_cells(settings)
    assert cells.shape == (240, 0)
    assert cells.obs.groupby("individual", observed=True)["split"].nunique().max() == 1
    assert pd.crosstab(cells.obs["disease"], cells.obs["split"]).to_numpy().all()
    assert preprocessing.prepare_cells(settings).obs["split"].equals(cells.obs["split"])  # as read again
    tokens = assemble.prepare_tokens(settings)
    made = tokens.dataset.to_pandas()
    assert tokens.classes == DISEASES
    assert list(made["label"]) == list(hearts["disease"])
    assert list(made["group"]) == list(hearts["individual"])
    for given, ids in zip(hearts["input_ids"], made["input_ids"], strict=True):
        assert list(ids) == given[:128]  # the positions of the demo checkpoint
    assert made["length"].tolist() == hearts["length"].clip(upper=128).tolist()
    assert tokens.dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))


def test_a_study_of_tokens_is_known_by_its_folder(study, hearts, tmp_path):
    assert paths.is_tokenized(study(hearts))
    assert paths.is_tokenized(load_study("tiny", dataset="cardiomyopathy"))
    assert not paths.is_tokenized(load_study("tiny"))
    assert not paths.is_tokenized(load_study("pbmc_facs", path=str(tmp_path / "cells.h5ad")))


def test_a_selection_takes_the_tokens_of_its_rows(study, hearts):
    hearts["cell_type"] = np.where(np.arange(240) % 5 == 0, "Fibroblast", "Cardiomyocyte1")
    settings = study(hearts, select_column="cell_type", select_values=["Fibroblast"], classes=["nf", "dcm"])
    made = assemble.prepare_tokens(settings).dataset.to_pandas()
    expected = hearts[(hearts["cell_type"] == "Fibroblast") & hearts["disease"].isin(["nf", "dcm"])]
    assert list(made["cell"]) == [f"row{number}" for number in expected.index]
    assert [list(ids) for ids in made["input_ids"]] == [ids[:128] for ids in expected["input_ids"]]


def test_a_run_and_its_baselines_learn_from_such_tokens_without_leakage(study, hearts):
    settings = study(hearts, group_by="individual", epochs=2, strategy="linear_probe", seed=0, pooling="mean")
    tokens, cells = assemble.prepare_tokens(settings), preprocessing.prepare_cells(settings)
    outcome = training.finetune(settings, tokens)
    assert outcome.status == "ok"
    assert outcome.n_test == (cells.obs["split"] == "test").sum()
    scores = {}
    for name in settings.baselines:
        found = baselines.fit_baseline(settings.model_copy(update={"strategy": name}), cells, tokens)
        classes = found.predictions.filter(like="probability:").to_numpy().argmax(axis=1)
        scores[name] = (np.array(found.classes)[classes] == found.predictions["label"]).mean()
    assert scores["logistic_ranks"] == 1.0  # each disease has genes of its own
    assert scores["majority"] < 0.5
    vocabulary = tokenizer.task_vocabulary(settings, cells)
    assert leakage.check_cells(settings, cells) == []
    assert leakage.check_tokens(settings, cells, tokens, sources=[], vocabulary=vocabulary) == []


def refusal(function, *args):
    with pytest.raises((TokensError, CellsError)) as caught:
        function(*args)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+\.", message)
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"baselines": ["majority", "logistic_counts", "knn_pca"]},
            "baselines: logistic_counts and knn_pca read counts, and the cells of this study are tokens already, "
            "without counts; leave that out.",
        ),
        (
            {"train_sets": ["single_cell", "pseudobulk_k5_sum"]},
            "train_sets: pseudobulk_k5_sum is made of counts, and the cells of this study are tokens already, without "
            "counts; leave that out.",
        ),
        (
            {"vocabulary": "fit"},
            "vocabulary: fit takes medians from counts, and the cells of this study are tokens already, without "
            "counts; set it to checkpoint.",
        ),
    ],
)
def test_what_reads_counts_is_refused(study, hearts, changes, message):
    assert refusal(preprocessing.prepare_cells, study(hearts, **changes)) == message


def test_tokens_of_another_vocabulary_are_refused(study, hearts, demo):
    hearts.at[7, "input_ids"] = [2, 60_000, 3]
    message = refusal(assemble.prepare_tokens, study(hearts))
    assert re.search(
        r"heart.dataset: 1 of [\d,]+ tokens are not in the vocabulary of the checkpoint \(such as 60000\)", message
    )
    hearts.at[7, "input_ids"] = [2, demo.specials["<pad>"], 3]
    assert "(such as 0); set checkpoint to the model for which" in refusal(assemble.prepare_tokens, study(hearts))
    hearts.at[7, "input_ids"] = []
    assert refusal(assemble.prepare_tokens, study(hearts)).endswith(": 1 cells have no token; leave them out.")


def test_the_tokens_of_the_other_version_are_refused(study, hearts, demo):
    framed = [[5, *ids[:20], 6] for ids in hearts["input_ids"]]
    message = refusal(assemble.prepare_tokens, study(hearts.assign(input_ids=framed)))
    assert "every cell begins with token 5 and ends with 6, like the <cls> and <eos> of Geneformer V2" in message


def test_version_2_needs_both_special_tokens_and_keeps_them_when_cut(study, hearts, demo, tmp_path):
    specials = {"<pad>": 0, "<mask>": 1, "<cls>": demo.size, "<eos>": demo.size + 1}
    second = Vocabulary(genes=demo.genes, specials=specials, aliases={})
    settings = study(hearts)
    cells = preprocessing.prepare_cells(settings)
    message = refusal(official.read_dataset, settings, cells, second, tmp_path / "heart.dataset")
    assert "240 of 240 cells do not begin with <cls> and end with <eos>" in message
    framed = [[demo.size, *ids, demo.size + 1] for ids in hearts["input_ids"]]
    settings = study(hearts.assign(input_ids=framed), max_length=50)
    read = official.read_dataset(settings, cells, second, tmp_path / "heart.dataset")
    for given, ids in zip(framed, read["input_ids"], strict=True):
        assert ids == (given if len(given) <= 50 else [*given[:49], demo.size + 1])


def test_tokens_are_read_in_pieces(study, hearts, monkeypatch):
    settings = study(hearts)
    whole = assemble.prepare_tokens(settings).dataset.to_dict()
    monkeypatch.setattr(official, "CHUNK", 7)
    cells = preprocessing.prepare_cells(settings)
    again = official.read_dataset(settings, cells, Vocabulary.read(paths.checkpoint_dir("demo")), settings.path)
    assert {name: whole[name] for name in again.column_names} == again.to_dict()


def test_tokenizing_them_again_is_refused(study, hearts, demo):
    cells = preprocessing.prepare_cells(study(hearts))
    assert "are tokens already, so there are no counts to rank" in refusal(tokenizer.vocabulary_share, cells, demo)


def test_quality_control_measures_what_there_is(study, hearts):
    settings = study(hearts)
    flags = preprocessing.qc_flags(readers.read_own(settings, settings.path), settings)
    assert flags["n_counts"].isna().all()
    assert flags["n_genes"].tolist() == hearts["length"].tolist()
    assert not flags[list(preprocessing.RULES)].any(axis=None)


def test_our_tokens_suit_the_official_classifier(tmp_path):
    """`Classifier.prepare_data` refuses a column label, filters by columns, renames the state key, numbers classes."""
    settings = load_study("tiny", demo_cells=1500, group_by="well")
    tokens = assemble.prepare_tokens(settings)
    folder = official.write_dataset(settings, tokens.dataset, tmp_path / "ours.dataset")
    ours = datasets.load_from_disk(folder)
    assert set(ours.column_names) == {"input_ids", "length", "cell", "treatment", "split", "well"}
    assert ours.features["length"].dtype == "int64"
    assert ours.features["treatment"].dtype == "string"
    assert ours["length"][:] == [len(ids) for ids in ours["input_ids"]]
    known = ours.filter(lambda cell: cell["split"] in ["train", "validation"])
    numbers = {name: number for number, name in enumerate(tokens.classes)}
    labelled = known.rename_column("treatment", "label").map(lambda cell: {"label": numbers[cell["label"]]})
    assert labelled.features["label"].dtype == "int64"
    assert labelled["label"][:5] == [numbers[name] for name in known["treatment"][:5]]
    assert paths.is_token_folder(folder)  # and it can come back in
    assert set(readers.read_tokenized(folder).obs.columns) >= {"treatment", "well", "length"}


@pytest.mark.parametrize(
    ("label", "column"), [("treatment", "treatment"), ("label", "cell_state"), ("split", "cell_state")]
)
def test_a_reserved_name_is_not_used(label, column):
    assert official.state_column(load_study("tiny", label=label)) == column


def test_the_command_writes_a_folder_or_says_what_is_missing(tmp_path, capsys):
    assert official.main(["tiny", str(tmp_path / "out.dataset")]) == 2
    assert "has no tokens of this study; make them by python -m tuneformer.study.run 02_tok" in capsys.readouterr().err
    n_cells = len(assemble.prepare_tokens(load_study("tiny")).dataset)
    assert official.main(["tiny", str(tmp_path / "out.dataset")]) == 0
    assert f"{n_cells:,} cells, classes in the column 'treatment'" in capsys.readouterr().out
    assert official.main(["tinny", str(tmp_path / "out.dataset")]) == 2
    assert "Did you mean tiny?" in capsys.readouterr().err
