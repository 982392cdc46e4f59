"""A random checkpoint of 2 layers and 40 genes, and 72 made-up cells of two classes that differ in one token."""

from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from tuneformer.study import load_study
from tuneformer.tokens.encode import Tokens
from tuneformer.tokens.vocabulary import Vocabulary

N_GENES = 40


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder: 16 wide, 24 positions."""
    genes = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(N_GENES)]})
    genes["token_id"] = np.arange(2, N_GENES + 2, dtype=np.int32)
    genes["median"] = 1.0
    vocabulary = Vocabulary(genes=genes, specials={"<pad>": 0, "<mask>": 1}, aliases={})
    config = BertConfig(
        vocab_size=vocabulary.size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        hidden_act="relu",
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
    )
    torch.manual_seed(7)
    BertForMaskedLM(config).save_pretrained(tmp_path / "checkpoint")
    vocabulary.write(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def run_settings(checkpoint):
    """Settings of a run on the checkpoint; 48 training cells make 4 steps per epoch."""
    fixed = {"checkpoint": str(checkpoint), "learning_rate": 1e-2, "epochs": 2, "batch_size": 12, "threads": 1}
    fixed |= {"freeze_layers": 1}

    def settings(**changes):
        return load_study("tiny").model_copy(update=fixed | {"arm": changes.get("strategy", "full")} | changes)

    return settings


@pytest.fixture
def tokens(checkpoint):
    """24 cells of each class for training, 6 for validation, 6 for the test; 8 to 20 tokens."""
    rng = np.random.default_rng(0)
    label = np.tile(["a", "b"], 36)
    genes = [rng.permutation(np.arange(4, N_GENES + 2))[: rng.integers(7, 20)] for _ in label]
    rows = {
        "input_ids": [[2 if name == "a" else 3, *map(int, cell)] for name, cell in zip(label, genes, strict=True)],
        "cell": [f"cell{number}" for number in range(len(label))],
        "label": list(label),
        "split": list(np.repeat(["train", "validation", "test"], [48, 12, 12])),
    }
    rows["length"] = [len(cell) for cell in rows["input_ids"]]
    return Tokens(datasets.Dataset.from_dict(rows), Vocabulary.read(checkpoint), ["a", "b"])


@pytest.fixture
def relabelled():
    """Give the test cells other labels."""

    def relabel(tokens, names):
        table = tokens.dataset.to_dict()
        is_test = [split == "test" for split in table["split"]]
        table["label"] = [names[label] if test else label for label, test in zip(table["label"], is_test, strict=True)]
        return replace(tokens, dataset=datasets.Dataset.from_dict(table, tokens.dataset.features))

    return relabel
