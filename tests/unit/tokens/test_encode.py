"""Rank-value encoding: per cell in exact arithmetic, in whole chunks by stable sorts, in memory and from a file."""

import json
import tempfile
from fractions import Fraction
from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.data import qc, simulate
from tuneformer.study import load_study
from tuneformer.tokens import encode
from tuneformer.tokens.encode import ranked_genes, refuse_unmapped, single_cell_tokens, task_length
from tuneformer.tokens.vocabulary import SPECIALS_V1, Vocabulary, counts_by_gene, nonzero_medians

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


def encoded(cells, vocabulary, max_length, **options):
    return encode.encode(cells, vocabulary, max_length=max_length, **options)["input_ids"][:]


def exact_reference(counts, genes, medians, tokens, *, max_length, specials):
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


def stable_reference(values, token_of):
    """Sort all cells at once by stable sorts alone, with the declared rule for ties; (stored values,)."""
    cell = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
    order = np.lexsort((-values.data, cell))
    value, token = values.data[order], token_of[values.indices[order]]
    falls = np.ones(len(value), dtype=bool)
    falls[1:] = (cell[1:] != cell[:-1]) | (value[1:] < value[:-1] * (1 - encode.TIE))
    return token[np.lexsort((token, np.cumsum(falls)))]


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
        patch.setattr(encode, "CHUNK", chunk)
        ours = encoded(make_cells(np.array(counts) * scale), vocabulary, max_length)
    options = {"max_length": max_length, "specials": specials}
    assert ours == [exact_reference(row, GENES, medians, tokens, **options) for row in counts]


@given(case=cases(), layout=st.sampled_from([sparse.csr_matrix, sparse.csc_matrix, np.asarray]), picked=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_backed_file_of_any_layout_has_the_tokens_of_the_exact_reference(case, layout, picked):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    cells = make_cells(counts)
    cells.X = layout(np.array(counts, dtype=float))
    rows = np.arange(len(counts))[::-1] if picked else slice(None)
    with tempfile.TemporaryDirectory() as folder:
        cells.write_h5ad(Path(folder) / "cells.h5ad")
        backed = ad.read_h5ad(Path(folder) / "cells.h5ad", backed="r")
        ours = encoded(backed[rows] if picked else backed, vocabulary, max_length)
        backed.file.close()
    options = {"max_length": max_length, "specials": specials}
    assert ours == [exact_reference(row, GENES, medians, tokens, **options) for row in np.array(counts)[rows]]


@given(
    seed=st.integers(0, 2**32), width=st.integers(1, 400), levels=st.integers(1, 30), jitter=st.sampled_from([0, 1e-13])
)
@settings(max_examples=150, deadline=None)
def test_ranking_is_bit_identical_to_stable_sorts(seed, width, levels, jitter):
    """Long cells, ties in long runs, and values that agree within the tolerance one by one, but not end to end."""
    rng = np.random.default_rng(seed)
    values = sparse.random_array((6, width), density=0.8, format="csr", rng=rng)
    values.data = rng.integers(1, levels + 1, values.nnz) / 7 * (1 + jitter * rng.integers(0, 40, values.nnz))
    token_of = rng.permutation(np.arange(2, width + 2, dtype=np.int32)) * (2**31 // (width + 4))
    ours = encode._ranked(values, token_of)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, stable_reference(values, token_of))


def test_simulated_cells_are_ranked_as_by_stable_sorts():
    cells = simulate.simulate_sciplex2(300, seed=0)
    vocabulary = Vocabulary.fit(cells)
    codes, table = vocabulary.codes(cells), vocabulary.genes
    values = counts_by_gene(cells, codes, len(table))
    values.data /= table["median"].to_numpy()[values.indices]
    expected = stable_reference(values, table["token_id"].to_numpy(np.int32))
    ours = encode.encode(cells, vocabulary, max_length=2000).with_format("numpy")["input_ids"][:]
    np.testing.assert_array_equal(np.concatenate(ours), expected)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_encoding_holds_detected_vocabulary_genes_once_each_within_the_limit(case):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    for cell, row in zip(encoded(make_cells(counts), vocabulary, max_length), counts, strict=True):
        detected = {tokens[gene] for gene, count in zip(GENES, row, strict=True) if count and gene in tokens}
        room = max_length - len(specials) + 2
        genes = [token for token in cell if token not in specials.values()]
        assert len(cell) <= max_length
        assert len(genes) == len(set(genes)) == min(room, len(detected))
        assert set(genes) <= detected
        if "<cls>" in specials:
            assert (cell[0], cell[-1]) == (specials["<cls>"], specials["<eos>"])


@given(case=cases(), order=st.permutations(range(12)))
@settings(max_examples=100, deadline=None)
def test_encoding_does_not_depend_on_the_order_of_genes(case, order):
    counts, medians, tokens, max_length, specials = case
    vocabulary = make_vocabulary(medians, tokens=list(tokens.values()), specials=specials)
    shuffled = make_cells(np.array(counts)[:, order], [GENES[place] for place in order])
    assert encoded(make_cells(counts), vocabulary, max_length) == encoded(shuffled, vocabulary, max_length)


@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
@settings(max_examples=100, deadline=None)
def test_v2_sums_the_counts_of_names_of_one_gene(first, second):
    first[0] += 1
    names = [f"old{number}" for number in range(12)]
    aliases = {f"OLD{number}": gene for number, gene in enumerate(GENES)}
    medians = {gene: Fraction(1 + number % 4) for number, gene in enumerate(GENES)}
    vocabulary = make_vocabulary(medians, specials=SPECIALS_V2, aliases=aliases)
    both = make_cells([first + second], [gene.lower() for gene in GENES] + names)
    assert encoded(both, vocabulary, 20) == encoded(make_cells([np.add(first, second)]), vocabulary, 20)


def test_ties_are_in_the_order_of_tokens():
    vocabulary = make_vocabulary({"GENE0": 0.3, "GENE1": 0.1, "GENE2": 0.2, "GENE3": 0.1}, tokens=[9, 5, 7, 3])
    counts = np.array([[3, 1, 2, 1] + 8 * [0], [3, 1, 2, 2] + 8 * [0]])
    assert encoded(make_cells(counts), vocabulary, 10) == [[3, 5, 7, 9], [3, 5, 7, 9]]
    assert 3 / 0.3 == 1 / 0.1  # a tie in float64 too ...
    assert 3 * (1 / 7) / 0.3 > 1 / 7 / 0.1  # ... but not at another scale of the cell
    assert encoded(make_cells(counts * (1 / 7)), vocabulary, 10) == [[3, 5, 7, 9], [3, 5, 7, 9]]


def test_a_small_difference_is_no_tie():
    vocabulary = make_vocabulary({"GENE0": 1.0, "GENE1": 1.0 - 1e-9})
    assert encoded(make_cells([[1, 1] + 10 * [0]]), vocabulary, 5) == [[3, 2]]


@pytest.fixture
def small():
    """Six cells of two classes, their V2 vocabulary, and the tokens with at most five of them per cell."""
    counts = np.zeros((6, 12))
    counts[:, 0] = 1
    counts[:3, 1], counts[3:, 2] = 3, 4
    counts[0, 3:] = 2
    cells = make_cells(counts, label=pd.Categorical(["b", "b", "b", "a", "a", "a"]), well=[1, 1, 2, 2, 3, 3])
    cells.var["symbol"] = ["GENE0", "one", "two", "three", *GENES[4:]]
    vocabulary = make_vocabulary(dict.fromkeys(GENES, 1.0), specials=SPECIALS_V2)
    columns = {"label": cells.obs["label"], "group": cells.obs["well"]}
    return cells, vocabulary, {"max_length": 5, "columns": columns}


@pytest.mark.parametrize("kind", ["dense", "int32", "csc"])
@pytest.mark.parametrize("backed", [False, True])
def test_however_counts_are_stored_the_tokens_are_the_same(small, tmp_path, monkeypatch, kind, backed):
    cells, vocabulary, options = small
    expected = encode.encode(cells, vocabulary, **options).to_dict()
    monkeypatch.setattr(encode, "CHUNK", 4)
    cells.X = {"dense": cells.X.toarray(), "int32": cells.X.astype(np.int32), "csc": cells.X.tocsc()}[kind]
    if backed:
        cells.write_h5ad(tmp_path / "cells.h5ad")
        cells = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert encode.encode(cells, vocabulary, **options).to_dict() == expected
    rows = np.array([4, 0, 2])
    some = {"max_length": 5, "columns": {"label": cells.obs["label"].iloc[rows]}}
    assert encode.encode(cells[rows], vocabulary, **some)["input_ids"][:] == [
        expected["input_ids"][row] for row in rows
    ]


def test_the_dataset_has_the_columns_of_the_contract(small):
    cells, vocabulary, options = small
    dataset = encode.encode(cells, vocabulary, **options)
    assert dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))
    assert dataset.to_dict() == {
        "input_ids": [[2, 5, 7, 8, 3]] + 2 * [[2, 5, 4, 3]] + 3 * [[2, 6, 4, 3]],
        "length": [5, 4, 4, 4, 4, 4],
        "cell": list(cells.obs_names),
        "label": ["b", "b", "b", "a", "a", "a"],
        "group": ["1", "1", "2", "2", "3", "3"],
    }


def test_a_stream_to_disk_holds_the_same_rows_and_is_a_data_set_of_its_own(small, tmp_path, monkeypatch):
    cells, vocabulary, options = small
    monkeypatch.setattr(encode, "CHUNK", 4)
    in_memory = encode.encode(cells, vocabulary, **options)
    written = encode.encode(cells, vocabulary, folder=tmp_path / "tokens", **options)
    assert written.cache_files[0]["filename"].startswith(str(tmp_path))  # memory-mapped
    assert written.features == in_memory.features
    assert datasets.load_from_disk(tmp_path / "tokens").to_dict() == in_memory.to_dict()
    other = encode.encode(cells[:2], vocabulary, max_length=5, folder=tmp_path / "other")
    assert other._fingerprint != written._fingerprint  # or datasets would take what it cached of the one for the other
    in_memory.save_to_disk(tmp_path / "saved")
    of_ours, of_theirs = ({file.name for file in (tmp_path / name).iterdir()} for name in ("tokens", "saved"))
    assert of_ours == of_theirs


def test_what_is_written_is_read_back(small, tmp_path):
    cells, vocabulary, options = small
    dataset = encode.encode(cells, vocabulary, **options)
    tokens = encode.Tokens(dataset, vocabulary, ["b", "a"], step_cells=7, sources=["cell1", "cell2"])
    encode.write(tmp_path / "made", tokens)
    (tmp_path / "made" / "key").write_text("0123\n")
    again = encode.read(tmp_path / "made")
    assert again.dataset.to_dict() == dataset.to_dict()
    assert again.vocabulary.hash == vocabulary.hash
    assert (again.classes, again.step_cells, again.sources, again.key) == (["b", "a"], 7, ["cell1", "cell2"], "0123")


def test_a_line_of_progress_says_how_fast_and_how_long(small, monkeypatch, capsys):
    cells, vocabulary, options = small
    encode.encode(cells, vocabulary, **options)
    assert capsys.readouterr().out == ""  # it is for what takes longer
    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(encode, "REPORT", -1)
    encode.encode(cells, vocabulary, **options)
    assert capsys.readouterr().out.startswith("4 of 6 cells, ")


def test_a_column_must_have_a_value_for_every_cell(small):
    cells, vocabulary, _ = small
    with pytest.raises(UserError, match=r"column 'split' has no value for 2 of 6 cells; run 01_qc"):
        encode.encode(cells, vocabulary, max_length=5, columns={"split": ["train", None, np.nan, "a", "b", "c"]})


def test_cells_without_a_known_gene_are_refused():
    message = r"2 of 3 cells have no gene in the vocabulary \(first: cell1\); .* like GENE0"
    with pytest.raises(UserError, match=message):
        encoded(make_cells(np.eye(3, 12)), make_vocabulary({"GENE0": 1.0}), 5)


def test_a_limit_without_room_is_refused():
    with pytest.raises(UserError, match="max_length is 2, which leaves no room"):
        encoded(make_cells(np.eye(1, 12)), make_vocabulary({"GENE0": 1.0}, specials=SPECIALS_V2), 2)


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf])
def test_what_is_no_count_is_refused(bad):
    counts = np.ones((1, 12))
    counts[0, 3] = bad
    with pytest.raises(UserError, match="negative or missing values"):
        encoded(make_cells(counts), make_vocabulary({"GENE0": 1.0}), 5)


def test_cells_that_are_tokens_already_are_refused():
    cells = make_cells(np.ones((3, 12)))[:, :0]
    with pytest.raises(UserError, match=r"are tokens already, .* go on with 05_finetune_strategies"):
        encoded(cells, make_vocabulary({"GENE0": 1.0}), 5)


def test_cells_of_which_half_the_detected_genes_are_unknown_are_refused():
    vocabulary = make_vocabulary({"GENE0": 1, "GENE1": 1})
    cells = make_cells([[9, 1, 1, 0], [0, 1, 0, 1], [5, 0, 0, 0]], genes=["GENE0", "GENE1", "x", "y"])
    refuse_unmapped(cells, vocabulary)  # 4 of 6, however many counts they have
    refuse_unmapped(make_cells([[1, 1, 0, 0], [0, 0, 1, 1]], genes=["GENE0", "GENE1", "x", "y"]), vocabulary)
    strange = make_cells([[9, 0, 1, 0], [0, 0, 0, 1]], genes=["GENE0", "GENE1", "x", "y"])
    with pytest.raises(UserError) as caught:
        refuse_unmapped(strange, vocabulary)
    assert str(caught.value) == (
        "The checkpoint knows 33% of the genes that a cell has, and at least 50% are needed (not known: x, y); set "
        "ensembl_id to the var column with human Ensembl identifiers, or copy Geneformer's gene_name_id_dict beside "
        "the checkpoint if genes have symbols, or set vocabulary: fit."
    )


def test_a_cell_is_explained_gene_by_gene(small):
    cells, _, _ = small
    vocabulary = make_vocabulary({"GENE1": 2.0, "GENE3": 0.5, "GENE0": 1.0}, specials=SPECIALS_V2)
    table = ranked_genes(cells, vocabulary, cell="cell0", n=2)
    assert table.columns.tolist() == ["gene", "count", "median", "count / median", "token_id"]
    assert table.to_numpy().tolist() == [["three", 2, 0.5, 4, 5], ["one", 3, 2, 1.5, 4]]


# --- the tokens of a task ---


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task on a few simulated cells, with a checkpoint that knows 700 of their 900 genes."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    genes = simulate.make_universe().var["ensembl_id"][:700]
    make_vocabulary(dict.fromkeys(genes, 2.0)).write(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return {"name": "tiny", "checkpoint": str(tmp_path / "checkpoint"), "demo_cells": 400}


def test_the_tokens_of_a_task_are_those_of_its_cells_and_made_once(task, monkeypatch):
    settings = load_study(**task)
    made, cells = single_cell_tokens(settings), qc.prepare_cells(settings)
    assert made.classes == list(cells.obs["label"].cat.categories)
    assert made.dataset["cell"][:] == list(cells.obs_names)
    assert made.dataset["split"][:] == list(cells.obs["split"])
    assert max(made.dataset["length"]) == 64
    monkeypatch.delattr(encode, "encode")
    again = single_cell_tokens(settings, cells)
    assert again.dataset.to_dict() == made.dataset.to_dict()
    assert (again.classes, again.key) == (made.classes, made.key)
    assert again.key == encode.tokens_key(settings)


def test_where_groups_are_held_out_the_tokens_have_them(task):
    settings = load_study(**task, group_by="well")
    assert single_cell_tokens(settings).dataset["group"][:] == list(qc.prepare_cells(settings).obs["well"].astype(str))


def test_folds_share_their_tokens_and_differ_in_split(task, monkeypatch):
    first, second = (load_study(**task, folds=3).at(fold=fold) for fold in (0, 1))
    tokens = single_cell_tokens(first)
    monkeypatch.delattr(encode, "encode")
    other = single_cell_tokens(second)
    assert other.key == tokens.key
    assert other.dataset["input_ids"][:] == tokens.dataset["input_ids"][:]
    assert other.dataset["split"][:] == list(qc.prepare_cells(second).obs["split"]) != tokens.dataset["split"][:]
    fitted = [encode.tokens_key(load_study(**task, folds=3, vocabulary="fit").at(fold=fold)) for fold in (0, 1)]
    assert fitted[0] != fitted[1]


def test_tokens_are_made_again_when_what_they_depend_on_changes(task):
    first = single_cell_tokens(load_study(**task))
    shorter = single_cell_tokens(load_study(**task, max_length=30))
    assert (max(shorter.dataset["length"]), shorter.key == first.key) == (30, False)
    vocabulary = first.vocabulary.genes.assign(median=np.arange(1.0, 701.0))
    folder = paths.user_path(task["checkpoint"])
    Vocabulary(genes=vocabulary, specials=SPECIALS_V1, aliases={}).write(folder)
    again = single_cell_tokens(load_study(**task))
    assert again.dataset["input_ids"][0] != first.dataset["input_ids"][0]
    assert again.key != first.key


def test_an_interrupted_write_leaves_the_tokens_as_they_were(task, monkeypatch):
    first = single_cell_tokens(load_study(**task))
    monkeypatch.setattr(Vocabulary, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        single_cell_tokens(load_study(**task, max_length=30))
    folder = paths.tokens_dir(load_study(**task))
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".tokens.")] == [".tokens.lock"]
    assert encode.read(folder).key == first.key


def test_a_fitted_vocabulary_sees_training_cells_only(task):
    settings = load_study(**task, vocabulary="fit")
    cells = qc.prepare_cells(settings)
    fitted, base = encode.task_vocabulary(settings, cells), encode.task_vocabulary(load_study(**task), cells)
    train = nonzero_medians(cells[(cells.obs["split"] == "train").to_numpy()])
    medians = fitted.genes.set_index("ensembl_id")["median"]
    assert medians.to_dict() == train.to_dict() != nonzero_medians(cells).to_dict()
    known = base.genes.merge(fitted.genes, on="ensembl_id")
    assert (known["token_id_x"] == known["token_id_y"]).all()
    assert len(fitted.genes) > len(known) > 0


def test_the_limit_is_that_of_the_checkpoint(task):
    assert task_length(load_study(**task)) == 64
    assert task_length(load_study(**task, max_length=20)) == 20
    with pytest.raises(UserError, match="max_length is 65, but the checkpoint has 64 positions"):
        task_length(load_study(**task, max_length=65))
    (paths.user_path(task["checkpoint"]) / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json does not say how many positions"):
        task_length(load_study(**task))
