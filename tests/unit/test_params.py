"""Studies: layers of files, types, and errors that say where and what."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneformer.study import params, paths
from tuneformer.study.params import CellsParams, ParameterError, TaskParams, TrainingParams, from_notebook, load_study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of params files: the real base, and a task to build on."""
    (tmp_path / "_base.yaml").write_text((paths.PARAMS / "_base.yaml").read_text())
    (tmp_path / "doses.yaml").write_text("label: dose_label\nclasses: [low, high]\nepochs: 99\n")
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    return tmp_path


def write(folder, text, name="mine"):
    (folder / f"{name}.yaml").write_text(text)
    return name


def test_later_layers_win(folder):
    study = write(folder, "tasks: [doses]\nepochs: 3\nclasses: [low]\n")
    settings = load_study(study, epochs=4)
    assert (settings.label, settings.classes, settings.epochs) == ("dose_label", ["low"], 4)
    assert settings.learning_rate == 5e-5  # from the base
    assert (settings.study, settings.task) == ("mine", "doses")


def test_a_task_file_sets_nothing_but_the_task(folder):
    assert load_study(write(folder, "tasks: [doses]\n")).epochs == 10
    assert load_study("doses").epochs == 99


def test_a_study_is_its_own_task_when_it_names_none(folder):
    settings = load_study(write(folder, "label: celltype\n"))
    assert (settings.task, settings.tasks, settings.label) == ("mine", ["mine"], "celltype")


def test_a_study_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_study("tiny").epochs = 4


@pytest.mark.parametrize("text", ["learning_rate: 1e-4", "learning_rate: 1.0e-4", "learning_rate: 0.0001"])
def test_yaml_reads_each_way_to_write_a_small_number(folder, text):
    assert load_study(write(folder, text)).learning_rate == 1e-4


def test_a_whole_number_is_read_where_a_real_one_is_asked_for(folder):
    assert load_study(write(folder, "max_mito_share: 1")).max_mito_share == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "params/mine.yaml: unknown key 'epoch'; the nearest valid key is 'epochs'"),
        ("epochs: 3\nepochs: 4", "mine.yaml: the key 'epochs' stands 2 times; keep one"),
        ("epochs: three", r"params/mine.yaml: epochs: Input should be a valid integer.* \(it is 'three'\)"),
        ("epochs: 3.0", "params/mine.yaml: epochs: Input should be a valid integer"),
        ("epochs: true", "params/mine.yaml: epochs: Input should be a valid integer"),
        ("epochs: 0", "params/mine.yaml: epochs: Input should be greater than 0"),
        ("strategies: [ful]", r"params/mine.yaml: strategies: 'ful' is no strategy \(did you mean 'full'"),
        ("dataset: own", "params/mine.yaml: path: dataset is own, so path must name an h5ad file"),
        ("select_values: [Nutlin]", "params/mine.yaml: select_values: needs select_column"),
        ("- epochs", "mine.yaml: expected lines of the form `key: value`, found a list"),
        ("epochs: [", "mine.yaml: while parsing"),
        ("tasks: doses", "params/mine.yaml: tasks: write a list"),
        ("tasks: [dosis]", "dosis.yaml does not exist. Did you mean doses?"),
    ],
)
def test_a_bad_file_is_one_clear_sentence(folder, text, message):
    with pytest.raises(ParameterError, match=message) as caught:
        load_study(write(folder, text))
    assert "\n" not in str(caught.value)


def test_a_bad_change_is_told_from_a_bad_file(folder):
    with pytest.raises(ParameterError, match="the changes of a run of mine: epochs:"):
        load_study(write(folder, "seed: 1"), epochs="3")
    with pytest.raises(ParameterError, match="the changes of a run of mine: unknown key 'epoch'"):
        load_study("mine", epoch=3)


def test_a_misspelt_study_or_task_is_answered_with_the_nearest(folder):
    write(folder, "tasks: [doses]")
    with pytest.raises(ParameterError, match="Did you mean doses"):
        load_study("dose")
    with pytest.raises(ParameterError, match=r"'dosis' is not a task of params/mine.yaml, which has doses"):
        load_study("mine", task="dosis")


@pytest.mark.parametrize("name", ["", "../secrets", "a b", "-rf", "_base", "é", "x" * 65, 3, None])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ParameterError, match="is not a study name"):
        load_study(name)


@given(st.text(max_size=70))
def test_only_names_that_are_safe_in_a_path_are_accepted(name):
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        return
    with pytest.raises(ParameterError, match="is not a study name"):
        load_study(name)


def test_a_notebook_gives_its_plain_values_as_parameters():
    settings = from_notebook({"study": "tiny", "epochs": 2, "_": 3, "In": [""], "Out": {}, "paths": paths})
    assert (settings.study, settings.epochs) == ("tiny", 2)


def test_a_notebook_with_a_misspelt_parameter_is_refused():
    with pytest.raises(ParameterError, match="unknown key 'learning_rat'; the nearest valid key is 'learning_rate'"):
        from_notebook({"study": "tiny", "learning_rat": 1e-4})
    with pytest.raises(ParameterError, match="has no parameter `study`"):
        from_notebook({"seed": 1})


def test_a_section_holds_its_own_keys_and_those_below():
    cells = load_study("tiny").section(CellsParams)
    assert set(TaskParams.model_fields) < set(cells)
    assert "learning_rate" not in cells
    assert set(cells) < set(load_study("tiny").section(TrainingParams))


def test_only_demo_cells_are_simulated(folder):
    assert load_study(write(folder, "dataset: demo")).simulated
    assert not load_study(write(folder, "dataset: pbmc68k")).simulated


def test_the_params_of_the_repository_are_complete():
    """Every key stands in the base with a comment, and has a field with a docstring; every file loads."""
    base = (paths.PARAMS / "_base.yaml").read_text()
    lines = [line for line in base.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9_]+: .*\S {2,}# \S.*", line) for line in lines)
    keys = set(params.read_yaml(paths.PARAMS / "_base.yaml"))
    assert keys | {"study", "task"} == set(params.Study.model_fields)
    assert all(field.description for field in params.Study.model_fields.values())
    names = [path.stem for path in paths.PARAMS.glob("*.yaml") if not path.stem.startswith("_")]
    assert {"demo", "tiny"} <= set(names)
    for name in names:
        for task in load_study(name).tasks:
            assert load_study(name, task=task).question


def test_a_reference_holds_only_for_the_study_as_its_files_state_it():
    stated = load_study("tiny").expected_macro_f1
    assert stated
    assert load_study("tiny", seed=1, threads=1).expected_macro_f1 == stated
    assert load_study("tiny", learning_rate=1e-4).expected_macro_f1 == {}
