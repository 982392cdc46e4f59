"""Parameter files: how YAML is read, and that every file of the repository can be used."""

import re

import pytest

from tuneformer import params, paths
from tuneformer.artifacts import UserError
from tuneformer.keys import TrainingKeys
from tuneformer.study import Study, contrasts, jobs, load_study

STUDIES = sorted(path.stem for path in paths.PARAMS.glob("[!_]*.yaml"))


def read(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return params.read(path)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1.e-4"])
def test_each_way_to_write_a_small_number_is_read(tmp_path, text):
    assert read(tmp_path, f"rate: {text}\nrates: [{text}]\n") == {"rate": 1e-4, "rates": [1e-4]}
    assert params.read_value(text) == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("[0, 1]", [0, 1]), ("3", 3), ("1e", "1e"), ("{a: 1}", {"a": 1}), ("", None)]
)
def test_a_value_of_a_command_line_is_read_as_in_a_file(text, value):
    assert params.read_value(text) == value


def test_a_value_that_is_no_yaml_is_refused():
    with pytest.raises(UserError, match=r"'\[1' is no value that a params file could hold"):
        params.read_value("[1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines of the form `key: value`, found nothing"),
        ("- a", "expected lines of the form `key: value`, found a list"),
        ("a: 1\na: 2", "the key 'a' is given 2 times; keep one"),
        ("arms:\n  full:\n  full:\n", "the key 'full' is given 2 times"),
        ("a: [x, y_{z}]", "expected ',' or ']'"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_name(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"mine.yaml: .*{re.escape(message)}") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine.yaml: 'utf-8' codec can't decode"):
        params.read(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="No such file"):
        params.read(tmp_path / "other.yaml")


def test_the_base_is_what_the_keys_say():
    """`make params` writes it."""
    text = params.base_text()
    assert (paths.PARAMS / "_base.yaml").read_text(encoding="utf-8") == text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9_]+: .*\S {2,}# \S.*", line) for line in lines)
    written = params.read(paths.PARAMS / "_base.yaml")
    defaults = {key: field.default for key, field in Study.model_fields.items() if key != "study"}
    assert written == defaults


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_of_the_repository_can_be_used(name):
    """Each task and arm resolves; contrasts and figure name what there is; no arm is another under a second name."""
    study = load_study(name)
    planned = jobs(name)
    assert {(job.task, job.arm) for job in planned} == {(task, arm) for task in study.tasks for arm in study.arms}
    assert all(job.question for job in planned)
    declared = contrasts(study)
    assert len(declared) <= 13, "they share one correction, so ask for few"
    assert len({one.contrast for one in declared}) == len(declared)
    settings = [str(job.keys(TrainingKeys)) for job in planned if job.task == study.task]
    assert len(set(settings)) == len(study.arms)
    columns = {*study.arm_keys(), "macro_f1", "validation_macro_f1"}
    assert set(study.figure.values()) <= columns
    assert set(study.expected_macro_f1) <= set(study.arms)
    assert study.simulated == ("(simulated" in study.question) or name in TASKS


TASKS = {task for name in STUDIES for task in load_study(name).tasks if task != name}
"""Task files: as studies of their own they take the demo cells, and their questions hold for any cells."""


def test_the_studies_that_the_documents_name_are_there():
    assert {"tiny", "demo", "own_data", "demo_pseudobulk", "demo_rates", "sciplex2_strategies"} <= set(STUDIES)
    assert {"drug_5class", "nutlin_2class", "pancreas_types"} <= TASKS


def test_the_demo_study_asks_enough():
    runs = [run for job in jobs("demo") for run in job.runs()]
    assert len(runs) >= 40
    assert len({run.seed for run in runs}) >= 3
    assert any(run.is_control for run in runs)
    assert any(run.is_baseline for run in runs)


@pytest.mark.parametrize("name", [name for name in STUDIES if load_study(name).pretrain_output is None])
def test_a_study_of_several_strategies_has_its_control_and_a_baseline(name):
    """Published settings are repeated as they were, without what they lacked."""
    arms = [load_study(name).with_arm(arm) for arm in load_study(name).arms]
    repeats_published = load_study(name).warmup_cap is None
    is_tuning = "learning_rate" in load_study(name).figure.values()
    fine_tuned = {arm.strategy for arm in arms if not arm.is_baseline}
    if len(fine_tuned) > 1 and not repeats_published:
        assert any(arm.is_control for arm in arms)
        assert is_tuning or any(arm.is_baseline for arm in arms)
