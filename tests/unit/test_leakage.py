"""The leakage gate: a small study on disk that is clean, and the same study with one leak planted at a time."""

import json
import shutil

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest

from tuneformer.data import preprocessing, splits
from tuneformer.evaluate import leakage
from tuneformer.study import grid, paths, run
from tuneformer.tokens import tokenizer
from tuneformer.tokens.vocabulary import Vocabulary
from tuneformer.trainsets import assemble

N_CELLS, N_GENES, N_WELLS = 120, 40, 12
STUDY = """
label: drug
dataset: own
path: {folder}/own.h5ad
group_by: well
test_share: 0.2
validation_share: 0.2
min_counts: 1
max_counts: null
max_mito_share: 1.0
checkpoint: {folder}/checkpoint
vocabulary: fit
train_sets: [single_cell, pseudobulk_k2_sum]
strategies: [full, linear_probe]
baselines: [knn_pca]
seeds: [0, 1]
train_cells: 40
"""
F1 = [0.5, 0.7, 0.7]  # validation macro-F1 of the three epochs: epoch 2 is the first of the best
LOSS = [1.0, 0.8, 0.6]  # and point 3 of a baseline's grid the better one of two


def write_checkpoint(folder):
    """What is read of a checkpoint here: its positions, its vocabulary, and any weights."""
    folder.mkdir()
    genes = pd.DataFrame({"ensembl_id": [f"ENSG{number:011d}" for number in range(N_GENES)]})
    genes["token_id"] = np.arange(2, N_GENES + 2, dtype=np.int32)
    genes["median"] = 1.0
    Vocabulary(genes=genes, specials={"<pad>": 0, "<mask>": 1}, aliases={}).write(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 24}')
    (folder / "model.safetensors").write_text("weights")


def write_own_cells(path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(index=[f"cell {number}" for number in range(N_CELLS)])  # a name may hold a space
    obs["drug"] = np.tile(["Dex", "Nutlin"], N_CELLS // 2)
    obs["well"] = [f"W{number * N_WELLS // N_CELLS:02d}" for number in range(N_CELLS)]
    var = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(N_GENES + 1)])  # the checkpoint lacks the last
    counts = rng.poisson(rng.gamma(2, 3, N_GENES + 1), (N_CELLS, N_GENES + 1)).astype(np.float32)
    ad.AnnData(counts, obs=obs, var=var).write_h5ad(path)


def write_run(settings):
    """What a finished run leaves that the gate reads."""
    tokens = tokenizer.read_tokens(settings)
    table = leakage.token_table(tokens)
    folder = paths.run_dir(settings)
    folder.mkdir(parents=True)
    table.loc[table["split"] == "test", ["cell", "label"]].to_parquet(folder / "predictions.parquet")
    history = [
        {"epoch": epoch, "validation_macro_f1": score, "validation_loss": loss}
        for epoch, (score, loss) in enumerate(zip(F1, LOSS, strict=True), start=1)
    ]
    best = 3 if settings.strategy == "knn_pca" else 2
    record = {"status": "ok", "history": history, "best_epoch": best}
    record["fingerprint"] = run.training_fingerprint(settings, tokens.provenance["fingerprint"])
    (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with params, data and runs of the study ``clean``."""
    folder = tmp_path_factory.mktemp("leakage")
    (folder / "params").mkdir()
    shutil.copy(paths.PARAMS / "_base.yaml", folder / "params")
    (folder / "params" / "clean.yaml").write_text(STUDY.format(folder=folder))
    write_checkpoint(folder / "checkpoint")
    write_own_cells(folder / "own.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "PARAMS", folder / "params")
        patch.setattr(paths, "RUNS", folder / "runs")
        run.checkpoint_hash.cache_clear()
        for settings in grid.runs("clean"):
            assemble.prepare_tokens(settings)
            write_run(settings)
        yield folder


@pytest.fixture
def study(made, tmp_path, monkeypatch):
    """The runs of the study, in a copy that a test may spoil: task train set strategy seed -> settings."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.setattr(paths, "PARAMS", made / "params")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return {grid.describe(settings): settings for settings in grid.runs("clean")}


FULL = "clean single_cell full seed 0"
BULK = "clean pseudobulk_k2_sum full seed 1"


def change_record(settings, **changes):
    path = paths.run_dir(settings) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_predictions(settings, change):
    path = paths.run_dir(settings) / "predictions.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def change_cells(settings, change):
    path = paths.cells_path(settings)
    cells = ad.read_h5ad(path)
    change(cells)
    cells.write_h5ad(path)


def change_tokens(settings, change):
    """Write the dataset again after `change` of its table; the provenance stays, as it would with faulty code."""
    folder = paths.tokens_path(settings)
    table = datasets.load_from_disk(folder).to_pandas()
    changed = datasets.Dataset.from_pandas(change(table), preserve_index=False)
    stated = (folder / "tokens.json").read_text()
    kept = {name: (folder / name).read_bytes() for name in ("vocabulary.parquet", "sources.txt")}
    shutil.rmtree(folder)
    changed.save_to_disk(folder)
    (folder / "tokens.json").write_text(stated)
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def first_of(settings, part):
    table = leakage.token_table(tokenizer.read_tokens(settings))
    return table.loc[table["split"] == part, "cell"].iloc[0]


def sentences():
    return [str(finding) for finding in leakage.check_study("clean")[0]]


def only_sentence():
    said = sentences()
    assert len(said) == 1, said
    return said[0]


# --- a clean study


def test_a_clean_study_passes(study, capsys):
    assert leakage.main(["clean"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Study clean: no leakage in 12 of 12 runs (0 failed), 3 folders of tokens, 1 tasks\n"
    assert printed.err == ""


def test_failed_runs_are_counted_and_have_nothing_to_check(study, capsys):
    change_record(study[FULL], status="failed", history=[], best_epoch=None)
    (paths.run_dir(study[FULL]) / "predictions.parquet").unlink()
    assert leakage.main(["clean"]) == 0
    assert "in 12 of 12 runs (1 failed)" in capsys.readouterr().out


def test_each_file_is_read_once(study, monkeypatch):
    read = []
    for module, name in ((ad, "read_h5ad"), (tokenizer, "read_tokens"), (tokenizer, "task_vocabulary")):
        of_module = getattr(module, name)
        spy = lambda *given, _of=of_module, _name=name, **options: read.append(_name) or _of(*given, **options)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    leakage.check_study("clean")
    assert sorted(read) == ["read_h5ad", *["read_tokens"] * 3, "task_vocabulary"]


def test_nothing_to_check_is_no_pass(study, capsys):
    for settings in study.values():
        (paths.run_dir(settings) / "record.json").unlink()
    assert leakage.main(["clean"]) == 2
    assert "Study clean has no finished run in" in capsys.readouterr().err
    assert leakage.main(["claen"]) == 2
    assert "claen.yaml does not exist. Did you mean clean?" in capsys.readouterr().err


# --- leaks, one at a time


def test_a_group_in_two_parts(study):
    def swap(cells):
        """Let two wells exchange a cell each, so that all else stays as it was."""
        split = cells.obs["split"].astype(str)
        for part, other in (("test", "train"), ("train", "test")):
            well = cells.obs.loc[split == part, "well"].astype(str).iloc[0]
            cells.obs["well"] = cells.obs["well"].astype(str)
            cells.obs.loc[cells.obs_names[split == other][-1], "well"] = well

    change_cells(study[FULL], swap)
    said = only_sentence()
    assert said.startswith("clean clean: groups of 'well' in more than one part of the split (2, such as W")
    assert " in test and train); delete " in said
    assert said.endswith("cells.h5ad and run 01_qc again, which keeps groups whole.")


def test_a_random_split_is_a_leak_only_where_groups_are_held_out(study):
    cells = preprocessing.prepare_cells(study[FULL])
    cells.obs["split"] = np.tile(["train", "train", "validation", "test"], N_CELLS // 4)
    (finding,) = leakage.check_cells(study[FULL], cells)
    assert (finding.number, finding.what) == (N_WELLS, "groups of 'well' in more than one part of the split")
    assert leakage.check_cells(study[FULL].model_copy(update={"group_by": None}), cells) == []


def test_a_cell_name_that_stands_twice(study):
    cells = preprocessing.prepare_cells(study[FULL])
    twice = cells[[0, *range(cells.n_obs)]]
    (finding,) = leakage.check_cells(study[FULL], twice)
    assert (finding.what, finding.number) == ("cell names that stand more than once", 1)


def test_identical_tokens_across_the_split(study):
    names = [first_of(study[FULL], "test"), first_of(study[FULL], "validation")]

    def copy(table):
        place = {name: table.index[table["cell"] == name][0] for name in names}
        table.at[place[names[0]], "input_ids"] = table.at[place[names[1]], "input_ids"]
        return table

    change_tokens(study[FULL], copy)
    n_test = len(pd.read_parquet(paths.run_dir(study[FULL]) / "predictions.parquet"))
    expected = (
        f"test cells with the tokens of a cell that is trained on, {1 / n_test:.1%} of all (1, such as {names[0]}, "
        f"which is like {names[1]}); drop repeated cells before the split."
    )
    assert only_sentence().endswith(f"single_cell/tokens: {expected}")


@pytest.mark.parametrize(("length", "found"), [(leakage.FEW_TOKENS, 0), (leakage.FEW_TOKENS + 1, 1)])
def test_short_lists_may_agree_by_chance(study, length, found):
    names = [first_of(study[FULL], "test"), first_of(study[FULL], "train")]

    def shorten(table):
        for name in names:
            table.at[table.index[table["cell"] == name][0], "input_ids"] = np.arange(2, 2 + length, dtype=np.int32)
        return table

    change_tokens(study[FULL], shorten)
    assert len(sentences()) == found


def test_a_cell_that_is_trained_on_and_tested(study):
    name = first_of(study[FULL], "test")

    def repeat(table):
        again = table[table["cell"] == name].assign(split="train")
        again["input_ids"] = [ids[::-1] for ids in again["input_ids"]]
        return pd.concat([table, again], ignore_index=True)

    change_tokens(study[FULL], repeat)
    said = sentences()
    assert f"cells in more than one part of the tokens (1, such as {name})" in said[0]
    assert f"split gave them (1, such as {name} in train for test)" in said[1]
    runs = [text for text in said if "test cells that it was trained on" in text]
    assert len(runs) == 3  # those of seed 0, which drew it
    assert f"clean {FULL}: test cells that it was trained on (1, such as {name})" in runs[0]


def test_a_cell_in_another_part_than_the_split_gave_it(study):
    name = first_of(study[FULL], "validation")
    change_tokens(study[FULL], lambda table: table.assign(split=table["split"].where(table["cell"] != name, "train")))
    expected = f"cells in another part of the tokens than the split gave them (1, such as {name} in train for valid"
    assert expected in only_sentence()


def test_a_test_cell_that_is_left_out_and_a_made_one_that_is_tested(study):
    name = first_of(study[BULK], "test")
    change_tokens(study[BULK], lambda table: table.assign(cell=table["cell"].replace(name, "made up")))
    said = sentences()
    assert f"test cells of the split that are not tested (1, such as {name})" in said[0]
    assert "tested cells that are not real cells (1, such as made up)" in said[1]


def test_a_test_cell_that_is_tested_twice(study):
    name = first_of(study[FULL], "test")
    change_tokens(study[FULL], lambda table: pd.concat([table, table[table["cell"] == name]], ignore_index=True))
    assert f"test cells that are tested more than once (1, such as {name})" in only_sentence()


def test_a_test_cell_inside_a_made_point(study):
    test, listed = first_of(study[FULL], "test"), paths.tokens_path(study[BULK]) / "sources.txt"
    listed.write_text(listed.read_text() + f"{test}\n{test}\nnobody\n")
    said = sentences()
    assert "tokens_seed1: test cells that made cells are made of (1, such as " + test in said[0]
    assert said[0].endswith("make them of training and validation cells only.")
    assert "sources of made cells that are no cells of the task (1, such as nobody)" in said[1]
    assert len(said) == 2


@pytest.mark.parametrize("missing", [True, False])
def test_made_cells_have_to_name_their_sources(study, missing):
    listed = paths.tokens_path(study[BULK]) / "sources.txt"
    if missing:
        listed.unlink()
    else:
        listed.write_text("")
    assert "made cells of unknown sources (" in only_sentence()
    assert "such as pseudobulk_k2_sum_" in only_sentence()


def test_members_of_points_are_checked_one_by_one(study):
    cells = preprocessing.prepare_cells(study[BULK])
    points = assemble.make_train_cells(study[BULK], cells).cells
    assert leakage.check_points(points, cells, "pseudobulk_k2_sum") == []
    point, test = points.obs_names[0], cells.obs_names[cells.obs["split"] == "test"][0]
    points.obs["member_names"] = points.obs["member_names"].astype(str)
    points.obs.loc[point, "member_names"] += f"\n{test}"
    (finding,) = leakage.check_points(points, cells, "pseudobulk_k2_sum")
    assert (finding.what, finding.number) == ("test cells that made cells are made of", 1)
    assert finding.example == f"{test} in {point}"
    points.obs["member_names"] = ""  # as of synthetic cells, whose sources are listed elsewhere
    assert leakage.check_points(points, cells, "synthetic_nb") == []


def test_a_vocabulary_that_saw_test_cells(study):
    cells = preprocessing.prepare_cells(study[FULL])
    folder = paths.tokens_path(study[FULL])
    base = Vocabulary.read(paths.checkpoint_dir(study[FULL].checkpoint))
    Vocabulary.fit(cells, base).write(folder)  # of all cells
    said = only_sentence()
    assert "single_cell/tokens: genes of the vocabulary that are not those of the training cells (" in said
    assert "such as ENSG00000000000 with the median " in said
    base.write(folder)  # the checkpoint's, which saw no cell of this study, but is not what was asked for
    assert f"training cells ({N_GENES + 1}, such as" in only_sentence()


def test_the_vocabulary_of_the_checkpoint_has_to_be_the_checkpoints(study):
    settings = study[FULL].model_copy(update={"vocabulary": "checkpoint"})
    cells, tokens = preprocessing.prepare_cells(study[FULL]), tokenizer.read_tokens(study[FULL])
    expected = tokenizer.task_vocabulary(settings, cells)
    (finding,) = leakage.check_tokens(settings, cells, tokens, sources=[], vocabulary=expected)
    assert finding.what == "genes of the vocabulary that are not those of the checkpoint"
    other = Vocabulary(genes=expected.genes, specials=expected.specials, aliases={"old": "ENSG00000000000"})
    tokens = tokenizer.Tokens(tokens.dataset, other, tokens.classes, tokens.provenance)
    (finding,) = leakage.check_tokens(settings, cells, tokens, sources=[], vocabulary=expected)
    assert (finding.number, finding.example) == (1, "a special token or an alias")


@pytest.mark.parametrize(
    ("name", "best", "example"),
    [
        (
            FULL,
            3,
            "a tested epoch that validation did not choose (1, such as 3, where validation macro-F1 is highest in 2)",
        ),
        (FULL, 1, "a tested epoch that validation did not choose (1, such as 1, "),
        (FULL, None, "a tested epoch that validation did not choose (1, such as None, "),
        (
            "clean single_cell knn_pca seed 1",
            2,
            "a tested point of the grid that validation did not choose (1, such as 2, ",
        ),
    ],
)
def test_an_epoch_that_validation_did_not_choose(study, name, best, example):
    change_record(study[name], best_epoch=best)
    assert only_sentence().startswith(f"clean {name}: {example}")


def test_predictions_that_are_not_of_each_test_cell_once(study):
    settings = study[FULL]
    tested = pd.read_parquet(paths.run_dir(settings) / "predictions.parquet")["cell"].tolist()
    trained = first_of(settings, "train")
    cases = {
        f"test cells that were predicted more than once (1, such as {tested[0]})": lambda table: table.iloc[
            [0, *range(len(table))]
        ],
        f"test cells that were not predicted (2, such as {tested[0]})": lambda table: table.iloc[2:],
        f"predicted cells that are no test cells (1, such as {trained})": lambda table: pd.concat(
            [table, table.head(1).assign(cell=trained)], ignore_index=True
        ),
        f"test cells with another class than in the tokens (1, such as {tested[0]})": lambda table: table.assign(
            label=["?", *table["label"].iloc[1:]]
        ),
    }
    path = paths.run_dir(settings) / "predictions.parquet"
    whole = path.read_bytes()
    for example, change in cases.items():
        change_predictions(settings, change)
        assert only_sentence() == f"clean {FULL}: {example}; delete its folder and run it again."
        path.write_bytes(whole)


def test_a_draw_that_takes_test_cells_for_validation(study):
    settings = study[FULL]
    table = leakage.token_table(tokenizer.read_tokens(settings))
    rows = {part: np.flatnonzero(table["split"] == part) for part in ("train", "validation", "test")}
    record = {"history": [{"epoch": 1, "validation_macro_f1": 0.5, "validation_loss": 1.0}], "best_epoch": 1}
    predictions = table.iloc[rows["test"]]
    assert leakage.check_run(settings, table, rows, record, predictions) == []
    rows["validation"] = np.append(rows["validation"], rows["test"][:3])
    (finding,) = leakage.check_run(settings, table, rows, record, predictions)
    assert (finding.what, finding.number) == ("test cells that chose its best epoch", 3)


def test_a_run_is_checked_by_the_cells_that_it_drew(study, monkeypatch):
    drawn = {}
    draw = splits.draw_cells

    def spy(table, *, train_cells, seed, **options):
        drawn[len(table), seed] = train_cells
        return draw(table, train_cells=train_cells, seed=seed, **options)

    monkeypatch.setattr(splits, "draw_cells", spy)
    assert leakage.check_study("clean")[0] == []
    n_made = {len(tokenizer.read_tokens(settings).dataset) for settings in study.values()} - {N_CELLS}
    assert drawn == {(N_CELLS, 0): 40, (N_CELLS, 1): 40} | {key: None for key in drawn if key[0] in n_made}
    assert len(drawn) == 4


# --- what cannot be checked does not pass


def test_tokens_of_other_cells(study):
    def other(cells):
        cells.uns["provenance"] = json.dumps({"fingerprint": "another"})

    change_cells(study[FULL], other)
    said = sentences()
    assert len(said) == 3
    assert all("tokens of other cells" in text and "cells.h5ad has another" in text for text in said)


def test_missing_cells_and_predictions(study):
    (paths.run_dir(study[FULL]) / "predictions.parquet").unlink()
    assert "full/seed0: a finished run without predictions (1, such as predictions.parquet)" in only_sentence()
    paths.cells_path(study[FULL]).unlink()
    assert "cells.h5ad: runs without their cells (12, such as clean single_cell full seed 0)" in only_sentence()


def test_tokens_of_other_parameters(study, monkeypatch):
    monkeypatch.setattr(tokenizer, "read_tokens", lambda settings: None)
    said = sentences()
    assert len(said) == 3
    assert all("runs whose tokens are of other parameters (" in text for text in said)


# --- how it is said


def test_the_command_says_each_finding_in_a_line_and_fails(study, capsys):
    change_record(study[FULL], best_epoch=1)
    change_record(study[BULK], best_epoch=1)
    assert leakage.main(["clean"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[:2] for line in printed.err.splitlines()] == [
        ["leakage", f" clean {BULK}"],
        ["leakage", f" clean {FULL}"],
    ]


def test_an_error_names_the_first_finding_and_their_number():
    leakage.refuse_leaks([])
    first = leakage.Finding("test cells in points", "pseudobulk_k2_sum", 1200, "cell7", "make them again")
    sentence = r"^pseudobulk_k2_sum: test cells in points \(1,200, such as cell7\); make them again\."
    with pytest.raises(leakage.LeakageError, match=sentence + "$"):
        leakage.refuse_leaks([first])
    with pytest.raises(leakage.LeakageError, match=sentence + r" \(the first of 3 findings\)$"):
        leakage.refuse_leaks(iter([first] * 3))
