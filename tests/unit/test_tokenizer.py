"""Rank-value encoding, against a per-cell reference in exact arithmetic; and the files and tables made of it."""

import json
from fractions import Fraction

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tuneformer.data import preprocessing, simulate
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.tokens import tokenizer
from tuneformer.tokens.tokenizer import (
    TokensError,
    length_table,
    rank_value_encode,
    ranked_genes,
    task_length,
    task_vocabulary,
    tokenize,
    top_genes,
    uncut_lengths,
)
from tuneformer.tokens.vocabulary import SPECIALS_V1, Vocabulary, VocabularyError, nonzero_medians
from tuneformer.trainsets.assemble import prepare_tokens

SPECIALS_V2 = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
GENES = [f"GENE{number}" for number in range(12)]


def make_cells(counts, genes=GENES, **obs):
    counts = np.asarray(counts, dtype=np.float64)
    return ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(obs, index=[f"cell{number}" for number in range(len(counts))]),
        var=pd.DataFrame({"ensembl_id": genes}, index=[f"row{number}" for number in range(len(genes))]),
    )


def make_vocabulary(medians, *, tokens=None, specials=SPECIALS_V1, aliases=None):
    tokens = tokens or range(len(specials), len(specials) + len(medians))
    table = pd.DataFrame({"ensembl_id": list(medians), "token_id": np.array(tokens, np.int32)})
    table["median"] = [float(median) for median in medians.values()]
    return Vocabulary(genes=table, specials=specials, aliases=aliases or {})


def reference(counts, genes, medians, tokens, *, max_length, specials):
    """Encode one cell gene by gene, with exact fractions."""
    values = []
    for gene in dict.fromkeys(genes):
        count = sum(Fraction(int(number)) for number, name in zip(counts, genes, strict=True) if name == gene)
        if count > 0 and gene in medians:
            values.append((-count / medians[gene], tokens[gene]))
    ranked = [token for _, token in sorted(values)]
    if "<cls>" in specials:
        return [specials["<cls>"], *ranked[: max_length - 2], specials["<eos>"]]
    return ranked[:max_length]


@st.composite
def cases(draw):
    """Cells and a vocabulary with many ties: few different counts, medians that are multiples of 1/10."""
    specials = draw(st.sampled_from([SPECIALS_V1, SPECIALS_V2]))
    known = draw(st.lists(st.sampled_from(GENES), min_size=1, unique=True))
    medians = {gene: Fraction(draw(st.integers(1, 12)), 10) for gene in known}
    tokens = draw(st.permutations(range(len(specials), len(specials) + len(known))))
    counts = draw(st.lists(st.lists(st.integers(0, 4), min_size=12, max_size=12), min_size=1, max_size=5))
    for row in counts:  # a cell without a gene in the vocabulary is refused: another test
        row[GENES.index(known[0])] += 1
    max_length = draw(st.integers(len(specials) - 1, 15))
    return counts, medians, dict(zip(known, tokens, strict=True)), max_length, specials


@given(
    case=cases(), scale=st.sampled_from([1, 2, 3, 7, 10, 1 / 3, 1 / 7, 0.1, 1e-6, 1e4 / 2953]), chunk=st.integers(1, 6)
)
@settings(max_examples=300, deadline=None)
def test_encoding_matches_the_exact_reference_at_any_scale_of_the_cells(case, scale, chunk):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "CHUNK", chunk)
        encoded = rank_value_encode(make_cells(np.array(counts) * scale), vocabulary, max_length=max_length)
    expected = [reference(row, GENES, medians, tokens, max_length=max_length, specials=specials) for row in counts]
    assert [list(cell) for cell in encoded] == expected


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_encoding_holds_detected_vocabulary_genes_once_each_within_the_limit(case):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    for cell, row in zip(rank_value_encode(make_cells(counts), vocabulary, max_length=max_length), counts, strict=True):
        detected = {tokens[gene] for gene, count in zip(GENES, row, strict=True) if count and gene in tokens}
        room = max_length - len(specials) + 2
        genes = [token for token in cell if token not in specials.values()]
        assert len(cell) <= max_length
        assert len(genes) == len(set(genes)) == min(room, len(detected))
        assert set(genes) <= detected
        assert not {specials["<pad>"], specials["<mask>"]} & set(cell)
        if "<cls>" in specials:
            assert (cell[0], cell[-1]) == (specials["<cls>"], specials["<eos>"])


@given(case=cases(), order=st.permutations(range(12)))
@settings(max_examples=100, deadline=None)
def test_encoding_does_not_depend_on_the_order_of_genes(case, order):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    shuffled = make_cells(np.array(counts)[:, order], [GENES[place] for place in order])
    plain = rank_value_encode(make_cells(counts), vocabulary, max_length=max_length)
    for one, other in zip(plain, rank_value_encode(shuffled, vocabulary, max_length=max_length), strict=True):
        np.testing.assert_array_equal(one, other)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
@settings(max_examples=100, deadline=None)
def test_v2_sums_the_counts_of_names_of_one_gene(first, second):
    first[0] += 1
    names = [f"old{number}" for number in range(12)]
    aliases = {f"OLD{number}": gene for number, gene in enumerate(GENES)}
    medians = {gene: Fraction(1 + number % 4) for number, gene in enumerate(GENES)}
    vocabulary = make_vocabulary(medians, specials=SPECIALS_V2, aliases=aliases)
    both = make_cells([first + second], [gene.lower() for gene in GENES] + names)
    summed = make_cells([np.add(first, second)])
    encoded, expected = (rank_value_encode(cells, vocabulary, max_length=20) for cells in (both, summed))
    np.testing.assert_array_equal(encoded[0], expected[0])


def test_ties_stand_in_the_order_of_tokens():
    vocabulary = make_vocabulary({"GENE0": 0.3, "GENE1": 0.1, "GENE2": 0.2, "GENE3": 0.1}, tokens=[9, 5, 7, 3])
    counts = [[3, 1, 2, 1] + 8 * [0], [3, 1, 2, 2] + 8 * [0]]
    encoded = rank_value_encode(make_cells(counts), vocabulary, max_length=10)
    assert [list(cell) for cell in encoded] == [[3, 5, 7, 9], [3, 5, 7, 9]]
    assert 3 / 0.3 == 1 / 0.1  # a tie in float64 too ...
    assert 3 * (1 / 7) / 0.3 > 1 / 7 / 0.1  # ... but not at another scale of the cell
    encoded = rank_value_encode(make_cells(np.array(counts) * (1 / 7)), vocabulary, max_length=10)
    assert [list(cell) for cell in encoded] == [[3, 5, 7, 9], [3, 5, 7, 9]]


def test_a_small_difference_is_no_tie():
    vocabulary = make_vocabulary({"GENE0": 1.0, "GENE1": 1.0 - 1e-9})
    assert list(rank_value_encode(make_cells([[1, 1] + 10 * [0]]), vocabulary, max_length=5)[0]) == [3, 2]


def test_dense_and_integer_counts_give_the_same_tokens():
    vocabulary = make_vocabulary({gene: 1 + number % 3 for number, gene in enumerate(GENES)})
    cells = make_cells(np.random.default_rng(0).poisson(1, (4, 12)) + np.eye(4, 12))
    expected = rank_value_encode(cells, vocabulary, max_length=8)
    for matrix in (cells.X.toarray(), cells.X.astype(np.int32), cells.X.tocsc()):
        other = ad.AnnData(matrix, obs=cells.obs, var=cells.var)
        for one, two in zip(expected, rank_value_encode(other, vocabulary, max_length=8), strict=True):
            np.testing.assert_array_equal(one, two)


def test_cells_without_a_known_gene_are_refused():
    vocabulary = make_vocabulary({"GENE0": 1.0})
    with pytest.raises(
        TokensError, match=r"2 of 3 cells have no gene in the vocabulary \(first: cell1\); .* like GENE0"
    ):
        rank_value_encode(make_cells(np.eye(3, 12)), vocabulary, max_length=5)


def test_a_limit_without_room_is_refused():
    vocabulary = make_vocabulary({"GENE0": 1.0}, specials=SPECIALS_V2)
    with pytest.raises(TokensError, match="max_length is 2, which leaves no room"):
        rank_value_encode(make_cells(np.eye(1, 12)), vocabulary, max_length=2)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_what_is_no_count_is_refused(bad):
    counts = np.ones((1, 12))
    counts[0, 3] = bad
    with pytest.raises(VocabularyError, match="negative or missing values"):
        rank_value_encode(make_cells(counts), make_vocabulary({"GENE0": 1.0}), max_length=5)


@pytest.fixture
def small():
    """Six cells of two classes, their V2 vocabulary, and the tokens with at most five of them a cell."""
    counts = np.zeros((6, 12))
    counts[:, 0] = 1
    counts[:3, 1], counts[3:, 2] = 3, 4
    counts[0, 3:] = 2
    labels = pd.Categorical(["b", "b", "b", "a", "a", "a"], categories=["b", "a"])
    cells = make_cells(counts, label=labels, split=["train"] * 4 + ["validation", "test"], well=[1, 1, 2, 2, 3, 3])
    cells.var["symbol"] = ["GENE0", "one", "two", "three", *GENES[4:]]
    vocabulary = make_vocabulary(dict.fromkeys(GENES, 1.0), specials=SPECIALS_V2)
    carry = tokenizer.CARRIED | {"group": "well"}
    return cells, vocabulary, tokenize(cells, vocabulary, max_length=5, carry=carry)


def test_the_dataset_has_the_columns_of_the_contract(small, tmp_path):
    cells, _, dataset = small
    assert dataset.column_names == ["input_ids", "length", "cell", "label", "split", "group"]
    assert list(dataset["input_ids"]) == [[2, 5, 7, 8, 3]] + 2 * [[2, 5, 4, 3]] + 3 * [[2, 6, 4, 3]]
    assert list(dataset["length"]) == [5, 4, 4, 4, 4, 4]
    assert list(dataset["cell"]) == list(cells.obs_names)
    assert list(dataset["label"]) == ["b", "b", "b", "a", "a", "a"]
    assert list(dataset["split"]) == ["train"] * 4 + ["validation", "test"]
    assert list(dataset["group"]) == ["1", "1", "2", "2", "3", "3"]
    dataset.save_to_disk(tmp_path / "tokens")
    assert datasets.load_from_disk(tmp_path / "tokens").to_dict() == dataset.to_dict()


def test_a_carried_column_must_be_there_for_every_cell(small):
    cells, vocabulary, _ = small
    del cells.obs["split"]
    with pytest.raises(TokensError, match=r"obs\['split'\] is missing for all cells; run 01_qc"):
        tokenize(cells, vocabulary, max_length=5)
    cells.obs["split"] = ["train", None, "test", "test", "test", "test"]
    with pytest.raises(TokensError, match=r"obs\['split'\] is missing for some cells"):
        tokenize(cells, vocabulary, max_length=5)


def test_the_share_in_the_vocabulary_counts_genes_and_counts(small):
    cells, _, _ = small
    cells = make_cells(cells.X.toarray()[:, :4] * [1, 1, 1, 0], GENES[:4])
    table = tokenizer.vocabulary_share(cells, make_vocabulary({"GENE0": 1.0, "GENE2": 1.0, "GENE3": 1.0}))
    assert table.loc["genes with a count"].tolist() == [3, 2, 2 / 3]
    assert table.loc["counts"].tolist() == [27, 18, 18 / 27]


def test_cells_of_which_half_the_detected_genes_are_unknown_are_refused():
    vocabulary = make_vocabulary({"GENE0": 1, "GENE1": 1})
    cells = make_cells([[9, 1, 1, 0], [0, 1, 0, 1], [5, 0, 0, 0]], genes=["GENE0", "GENE1", "x", "y"])
    tokenizer.refuse_unmapped(cells, vocabulary)  # 4 of 6, however many counts they have
    tokenizer.refuse_unmapped(make_cells([[1, 1, 0, 0], [0, 0, 1, 1]], genes=["GENE0", "GENE1", "x", "y"]), vocabulary)
    strange = make_cells([[9, 0, 1, 0], [0, 0, 0, 1]], genes=["GENE0", "GENE1", "x", "y"])
    with pytest.raises(TokensError) as caught:
        tokenizer.refuse_unmapped(strange, vocabulary)
    assert str(caught.value) == (
        "The checkpoint knows 33% of the genes that a cell has, and at least 50% are needed (not known: x, y); set "
        "ensembl_id to the var column with human Ensembl identifiers, or copy Geneformer's gene_name_id_dict beside "
        "the checkpoint if genes have symbols, or set vocabulary: fit."
    )


def test_lengths_before_the_cut_are_told_by_class_in_their_order(small):
    cells, vocabulary, _ = small
    assert uncut_lengths(cells, vocabulary).to_dict() == dict(zip(cells.obs_names, [13, 4, 4, 4, 4, 4], strict=True))
    table = length_table(cells, vocabulary, max_length=4)
    assert table.index.tolist() == ["b", "a", "all"]
    assert table.loc["b"].tolist() == [3, 4, 4, 13, 1 / 3]
    assert table.loc["all"].tolist() == [6, 4, 4, 13, 1 / 6]


def test_a_cell_is_explained_gene_by_gene(small):
    cells, _, _ = small
    vocabulary = make_vocabulary({"GENE1": 2.0, "GENE3": 0.5, "GENE0": 1.0}, specials=SPECIALS_V2)
    table = ranked_genes(cells, vocabulary, cell="cell0", n=2)
    assert table.columns.tolist() == ["gene", "count", "median", "count / median", "token_id"]
    assert table.to_numpy().tolist() == [["three", 2, 0.5, 4, 5], ["one", 3, 2, 1.5, 4]]


def test_top_genes_are_told_by_class(small):
    cells, vocabulary, dataset = small
    table = top_genes(cells, vocabulary, dataset, first=2, n=2)
    assert table.to_numpy().tolist() == [
        ["b", "one", "GENE1", 1.0, 0.5],
        ["b", "GENE0", "GENE0", 2 / 3, 5 / 6],
        ["a", "GENE0", "GENE0", 1.0, 5 / 6],
        ["a", "two", "GENE2", 1.0, 0.5],
    ]
    whole = top_genes(cells, vocabulary, dataset, first=10, n=12)
    assert set(whole["ensembl_id"]) <= set(GENES)  # no special token, though the slice reaches <eos>


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task on a few simulated cells, with a checkpoint that knows 1,500 of their 2,000 genes."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    genes = simulate.make_universe().var["ensembl_id"][:1500]
    make_vocabulary(dict.fromkeys(genes, 2.0)).write(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return {"name": "tiny", "checkpoint": str(tmp_path / "checkpoint"), "demo_cells": 400}


def test_prepared_tokens_are_loaded_and_not_made_again(task, monkeypatch):
    settings = load_study(**task)
    made = prepare_tokens(settings)
    assert made.classes == settings.classes
    assert set(made.dataset["split"]) == {"train", "validation", "test"}
    assert max(made.dataset["length"]) == 64
    monkeypatch.delattr(preprocessing, "prepare_cells")
    loaded = prepare_tokens(settings)
    assert loaded.dataset.to_dict() == made.dataset.to_dict()
    assert (loaded.classes, loaded.provenance) == (made.classes, made.provenance)
    assert loaded.vocabulary.hash == made.vocabulary.hash == made.provenance["vocabulary"]


def test_prepared_tokens_hold_groups_and_hash_cells_and_split(task):
    made = prepare_tokens(load_study(**task, group_by="well"))
    cells = preprocessing.prepare_cells(load_study(**task, group_by="well"))
    assert list(made.dataset["group"]) == list(cells.obs["well"].astype(str))
    other = prepare_tokens(load_study(**task, group_by="well", split_seed=1))
    assert made.provenance["cells"] == json.loads(cells.uns["provenance"])["fingerprint"] != other.provenance["cells"]
    assert made.provenance["split"] != other.provenance["split"]


def test_tokens_are_made_again_when_what_they_depend_on_changes(task):
    first = prepare_tokens(load_study(**task))
    assert max(prepare_tokens(load_study(**task, max_length=30)).dataset["length"]) == 30
    folder = paths.checkpoint_dir(task["checkpoint"])
    genes = Vocabulary.read(folder).genes
    Vocabulary(genes=genes.assign(median=np.arange(1.0, 1501.0)), specials=SPECIALS_V1, aliases={}).write(folder)
    again = prepare_tokens(load_study(**task))
    assert again.dataset["input_ids"][0] != first.dataset["input_ids"][0]
    assert again.provenance["fingerprint"] != first.provenance["fingerprint"]
    assert again.provenance["split"] == first.provenance["split"]


def test_an_interrupted_write_leaves_the_tokens_as_they_were(task, monkeypatch):
    first = prepare_tokens(load_study(**task))
    shorter = load_study(**task, max_length=30)
    monkeypatch.setattr(Vocabulary, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare_tokens(shorter)
    folder = paths.tokens_path(load_study(**task))
    assert [path.name for path in folder.parent.iterdir()] == ["tokens"]
    assert json.loads((folder / "tokens.json").read_text()) == first.provenance


def test_a_fitted_vocabulary_sees_training_cells_only(task):
    settings = load_study(**task, vocabulary="fit")
    cells = preprocessing.prepare_cells(settings)
    fitted, base = task_vocabulary(settings, cells), task_vocabulary(load_study(**task), cells)
    train = nonzero_medians(cells[(cells.obs["split"] == "train").to_numpy()])
    medians = fitted.genes.set_index("ensembl_id")["median"]
    assert medians.to_dict() == train.to_dict() != nonzero_medians(cells).to_dict()
    known = base.genes.merge(fitted.genes, on="ensembl_id")
    assert (known["token_id_x"] == known["token_id_y"]).all()
    assert len(fitted.genes) > len(known) > 0


def test_the_limit_is_that_of_the_checkpoint(task):
    assert task_length(load_study(**task)) == 64
    assert task_length(load_study(**task, max_length=20)) == 20
    with pytest.raises(TokensError, match="max_length is 65, but the checkpoint has 64 positions"):
        task_length(load_study(**task, max_length=65))
    (paths.checkpoint_dir(task["checkpoint"]) / "config.json").write_text("{}")
    with pytest.raises(TokensError, match=r"config\.json does not say how many positions"):
        task_length(load_study(**task))


def test_checkpoints_are_found_by_name_variable_and_path(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_MODELS", str(tmp_path))
    assert paths.checkpoint_dir("demo") == paths.ASSETS / "demo_checkpoint"
    assert paths.checkpoint_dir("$MY_MODELS/v1") == tmp_path / "v1"
    assert paths.checkpoint_dir("models/v1") == paths.ROOT / "models" / "v1"
