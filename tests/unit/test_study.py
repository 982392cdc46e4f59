"""Studies: layers of files, arms, seeds and folds, and errors that say where and what."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneformer import params, paths
from tuneformer.artifacts import UserError
from tuneformer.keys import CellsKeys, TaskKeys, TokensKeys, TrainingKeys, TrainSetKeys
from tuneformer.study import batch, contrasts, from_notebook, jobs, load_study, main

ARMS = """
tasks: [doses, drugs]
arms:
  full:
  rare_focal: {strategy: selective, freeze_layers: 1, loss: focal}
  pseudobulk_k{k}: {train_set: pseudobulk, k: [5, 10]}
  knn_pca:
seeds: [0, 4, 7]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a study ``mine`` into a folder of params files that has two tasks, and return its name."""
    (tmp_path / "doses.yaml").write_text("label: dose_label\nclasses: [low, high]\nepochs: 99\n")
    (tmp_path / "drugs.yaml").write_text("label: drug\n")
    monkeypatch.setattr(paths, "PARAMS", tmp_path)

    def write(text, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(text)
        return name

    return write


def test_later_layers_win(write):
    settings = load_study(write("tasks: [doses]\nepochs: 3\nclasses: [low]\narms: {lora: {batch_size: 7}}\n"), epochs=4)
    assert (settings.label, settings.classes, settings.epochs) == ("dose_label", ["low"], 4)
    assert (settings.strategy, settings.batch_size) == ("lora", 7)
    assert settings.learning_rate == 5e-5  # the default
    assert (settings.study, settings.task, settings.arm) == ("mine", "doses", "lora")


def test_a_task_file_sets_nothing_but_the_task(write):
    assert load_study(write("tasks: [doses]\n")).epochs == 10
    assert load_study("doses").epochs == 99


def test_a_study_is_its_own_task_when_it_names_none(write):
    settings = load_study(write("label: celltype\n"))
    assert (settings.task, settings.tasks, settings.label) == ("mine", ["mine"], "celltype")


def test_task_and_arm_are_the_first_where_none_is_asked_for(write):
    """So that it is enough to change `study` in a notebook."""
    settings = from_notebook({"study": write(ARMS), "task": None, "arm": None})
    assert (settings.task, settings.label, settings.arm) == ("doses", "dose_label", "full")
    assert load_study("mine", task="drugs").label == "drug"


def test_a_strategy_alone_asks_for_its_arm(write):
    write(ARMS)
    assert load_study("mine", strategy="knn_pca").arm == "knn_pca"
    lora = load_study("mine", strategy="lora")  # no arm of the file
    assert (lora.arm, lora.strategy) == ("lora", "lora")
    assert lora.with_arm("full").strategy == "full"
    assert lora.with_arm("lora").strategy == "lora"
    with pytest.raises(UserError, match=r"'lorra' is not one of full, .*Did you mean lora"):
        load_study("mine", strategy="lorra")


@pytest.mark.parametrize("arm", ["full", "rare_focal"])
def test_an_arm_is_not_given_another_strategy(write, arm):
    with pytest.raises(UserError, match=f"the strategy of the arm {arm} is .*; ask for another arm"):
        load_study(write(ARMS), arm=arm, strategy="lora")


def test_changes_hold_for_every_arm_and_seed(write):
    settings = load_study(write(ARMS), task="drugs", epochs=2, seeds=[4], seed=4)
    other = settings.with_arm("pseudobulk_k10")
    assert (other.task, other.epochs, other.seeds, other.seed, other.k) == ("drugs", 2, [4], 4, 10)
    assert other.with_arm("full").model_dump() == settings.model_dump()


def test_a_study_says_what_kind_of_arm_it_has(write):
    study = load_study(write(ARMS))
    assert [arm for arm in study.arms if study.with_arm(arm).is_baseline] == ["knn_pca"]
    assert not any(study.with_arm(arm).is_control for arm in study.arms)
    assert load_study("mine", strategy="random_init").is_control


def test_the_keys_of_arms_are_the_columns_of_the_results(write):
    study = load_study(write(ARMS))
    assert study.arm_keys() == {
        "train_set": "single_cell",
        "k": None,
        "strategy": "full",
        "freeze_layers": 2,
        "loss": "cross_entropy",
    }
    assert study.with_arm("pseudobulk_k5").arm_keys()["k"] == 5


def test_a_job_is_one_arm_of_one_task_with_all_its_seeds(write):
    asked = jobs(write(ARMS))
    places = [(job.task, job.arm) for job in asked]
    arms = ["full", "rare_focal", "pseudobulk_k5", "pseudobulk_k10", "knn_pca"]
    assert places == [(task, arm) for task in ("doses", "drugs") for arm in arms]
    assert all(job.seeds == [0, 4, 7] for job in asked)
    assert [(job.label, job.k) for job in asked[-3:]] == [("drug", 5), ("drug", 10), ("drug", None)]
    for job in asked:
        assert (
            job.model_dump() == load_study("mine", task=job.task, arm=job.arm).model_dump()
        )  # what its notebook resolves


def test_a_job_can_have_some_of_the_seeds(write):
    asked = jobs(write(f"{ARMS}seeds_per_job: 2\n"))
    assert len(asked) == 20
    assert [(job.arm, job.seeds, job.seed) for job in asked[:3]] == [
        ("full", [0, 4], 0),
        ("full", [7], 7),
        ("rare_focal", [0, 4], 0),
    ]
    assert asked[1].with_arm("knn_pca").seeds == [7]


def test_a_run_is_one_seed_or_one_fold_of_a_seed(write):
    places = [(run.seed, run.fold) for run in load_study(write(ARMS)).runs()]
    assert places == [(0, None), (4, None), (7, None)]
    folded = load_study("mine", folds=2)
    assert folded.fold == 0  # without one, the first
    places = [(run.seed, run.fold) for run in folded.runs()]
    assert places == [(0, 0), (0, 1), (4, 0), (4, 1), (7, 0), (7, 1)]


def test_the_contrasts_of_the_defaults_are_those_that_the_arms_allow(write):
    pairs = {study: load_study(study).contrasts for study in ("doses", write("arms: {full: , random_init: }\n"))}
    assert pairs["doses"] == {"pre-training": ["random_init", "full"], "linear model": ["logistic_counts", "full"]}
    assert pairs["mine"] == {"pre-training": ["random_init", "full"]}
    assert contrasts(load_study("mine")) == [("pre-training", "random_init", "full")]
    assert contrasts(load_study(write("arms: {lora: }\n"))) == []


def test_the_arms_of_the_defaults_are_those_of_the_kind(write):
    for kind, number in {"cells": 10, "genes": 5, "compression": 5}.items():
        study = load_study(write(f"kind: {kind}\n"))
        assert len(study.arms) == number
        assert all(study.with_arm(arm).strategy == arm for arm in study.arms)


def test_arms_can_be_changed_as_any_key_can(write):
    study = load_study(write(ARMS), arms={"lora_r{lora_rank}": {"strategy": "lora", "lora_rank": [2, 4]}})
    assert list(study.arms) == ["lora_r2", "lora_r4"]
    assert study.with_arm("lora_r4").lora_rank == 4


def test_a_study_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_study("tiny").epochs = 4


def test_a_whole_number_is_read_where_a_real_one_is_asked_for(write):
    settings = load_study(write("max_mito_share: 1\narms: {full_lr{learning_rate}: {learning_rate: [1, 0.5]}}\n"
                                .replace("full_lr{learning_rate}", "'full_lr{learning_rate}'")))  # fmt: skip
    assert (settings.max_mito_share, settings.learning_rate, settings.arm) == (1.0, 1.0, "full_lr1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "params/mine.yaml: unknown key 'epoch'; the nearest valid key is 'epochs'"),
        ("epochs: 3\nepochs: 4", "mine.yaml: the key 'epochs' is given 2 times; keep one"),
        ("epochs: three", r"params/mine.yaml: epochs: Input should be a valid integer.* \(it is 'three'\)"),
        ("epochs: 3.0", "params/mine.yaml: epochs: Input should be a valid integer"),
        ("epochs: true", "params/mine.yaml: epochs: Input should be a valid integer"),
        ("epochs: 0", "params/mine.yaml: epochs: Input should be greater than 0"),
        ("kind: cell", "params/mine.yaml: kind: Input should be 'cells'"),
        ("arms: {full: {epochs: 0}}", "params/mine.yaml: arm full: epochs: Input should be greater than 0"),
        ("arms: {mine: {strategy: ful}}", "arm mine: strategy 'ful' is not one of .*Did you mean full"),
        ("strategy: expression\narms: {mine: }", "params/mine.yaml: strategy 'expression' is not one of full"),
        ("contrasts: {x: full}", "params/mine.yaml: contrasts: Input should be a valid list"),
        ("dataset: own", "params/mine.yaml: path: dataset is own, so path must name a file"),
        ("select_values: [Nutlin]", "params/mine.yaml: select_values: needs select_column"),
        ("seeds: []", "params/mine.yaml: seeds: name each seed once, one at least"),
        ("seeds: [1, 0, 1]", "params/mine.yaml: seeds: name each seed once"),
        ("folds: 1", "params/mine.yaml: folds: one fold leaves nothing to train on"),
        ("folds: 3\nfold: 3", "params/mine.yaml: fold: it has to be from 0 to 2"),
        ("fold: 0", "params/mine.yaml: fold: it has to be null, as folds is 0"),
        ("- epochs", "mine.yaml: expected lines of the form `key: value`, found a list"),
        ("", "mine.yaml: expected lines of the form `key: value`, found nothing"),
        ("epochs: [", "mine.yaml: while parsing"),
        ("tasks: doses", "params/mine.yaml: tasks: write a list"),
        ("tasks: [doses, doses]", "params/mine.yaml: tasks names 'doses' more than once"),
        ("tasks: [dosis]", "dosis.yaml does not exist. Did you mean doses?"),
        ("tasks: [bad]", "params/bad.yaml: unknown key 'labels'; the nearest valid key is 'label'"),
        ("tasks: [doses]\ntask: drugs", "params/mine.yaml: task 'drugs' is not one of doses"),
        ("arm: lorra", "params/mine.yaml: arm 'lorra' is not one of .*Did you mean lora"),
    ],
)
def test_a_bad_file_is_one_clear_sentence(write, text, message):
    write("labels: [x]\n", name="bad")
    with pytest.raises(UserError, match=message) as caught:
        load_study(write(text))
    assert "\n" not in str(caught.value)


def test_a_bad_change_is_told_from_a_bad_file(write):
    with pytest.raises(UserError, match="the changes of a run of mine: epochs:"):
        load_study(write("seed: 1"), epochs="3")
    with pytest.raises(UserError, match="the changes of a run of mine: unknown key 'epoch'"):
        load_study("mine", epoch=3)


def test_a_misspelt_study_or_task_is_answered_with_the_nearest(write):
    write("tasks: [doses]")
    with pytest.raises(UserError, match="Did you mean doses"):
        load_study("dose")
    with pytest.raises(UserError, match=r"task 'dosis' is not one of doses\. Did you mean doses"):
        load_study("mine", task="dosis")


@pytest.mark.parametrize("name", ["", "../secrets", "a b", "-rf", "_base", "é", "x" * 65, 3, None, ["tiny"]])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(UserError, match="is not a study name"):
        load_study(name)


@given(st.text(max_size=70))
def test_only_names_that_are_safe_in_a_path_are_accepted(name):
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        return
    with pytest.raises(UserError, match="is not a study name"):
        load_study(name)


def test_a_notebook_gives_its_plain_values_as_parameters():
    settings = from_notebook({"study": "tiny", "epochs": 2, "_": 3, "In": [""], "Out": {}, "paths": paths})
    assert (settings.study, settings.epochs) == ("tiny", 2)


def test_a_notebook_with_a_misspelt_parameter_is_refused():
    with pytest.raises(UserError, match="unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"):
        from_notebook({"study": "tiny", "learning_rat": 1e-4})
    with pytest.raises(UserError, match="has no parameter `study`"):
        from_notebook({"seed": 1})


def test_a_section_has_its_own_keys_and_those_before_it():
    sections = [TaskKeys, CellsKeys, TrainSetKeys, TokensKeys, TrainingKeys]
    held = [set(load_study("tiny").keys(section)) for section in sections]
    assert all(before < after for before, after in pairwise(held))
    assert "learning_rate" in held[-1] - held[-2]
    assert not {"seed", "seeds", "question", "arms"} & held[-1]


def test_only_demo_cells_are_simulated(write):
    simulated = {name: load_study(write(f"dataset: {name}")).simulated for name in ("demo", "demo_pancreas", "pbmc68k")}
    assert simulated == {"demo": True, "demo_pancreas": True, "pbmc68k": False}


def test_a_label_is_expanded_from_the_environment(write, monkeypatch):
    monkeypatch.setenv("LABEL", "celltype")
    assert load_study(write("label: $LABEL\n")).label == "celltype"
    monkeypatch.delenv("LABEL")
    assert load_study("mine").label == "$LABEL"


def test_a_reference_holds_only_for_the_study_as_its_files_state_it(write):
    write(f"{ARMS}expected_macro_f1: {{full: 0.5}}\n")
    assert load_study("mine", task="drugs", seed=1, threads=1).expected_macro_f1 == {"full": 0.5}
    assert load_study("mine", learning_rate=1e-4).expected_macro_f1 == {}
    assert load_study("mine", learning_rate=1e-4).with_arm("knn_pca").expected_macro_f1 == {}


def test_a_batch_is_one_study_or_all_demo_studies(write):
    for name, text in {"demo": "", "demo_more": "", "demo_made": "pretrain_output: here\n", "other": ""}.items():
        write(f"arms: {{full: }}\n{text}", name=name)
    assert batch("default") == ["pbmc68k", "demo"]
    assert batch("all") == ["demo", "demo_more"]
    assert batch("other") == ["other"]


def test_the_command_counts_the_runs_or_says_what_is_wrong(write, capsys):
    assert main([write(ARMS)]) == 0
    assert capsys.readouterr().out == "Study mine (cells): 5 arms, 2 tasks, 30 runs, 10 jobs\n"
    assert main(["mien"]) == 2
    assert "Did you mean mine?" in capsys.readouterr().err


def test_reading_a_study_does_not_change_its_file(write):
    before = params.read(params.file_of(write(ARMS)))
    load_study("mine", arm="pseudobulk_k5")
    assert params.read(params.file_of("mine")) == before
