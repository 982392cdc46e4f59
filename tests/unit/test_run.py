"""One papermill run: its fingerprint, what is loaded, and what is said when something goes wrong."""

import hashlib
import json
import time

import nbformat
import pytest

from tuneformer.study import paths, run
from tuneformer.study.params import ParameterError, load_study


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint of a few bytes in place of the shipped one."""
    monkeypatch.setattr(paths, "ASSETS", tmp_path)
    folder = tmp_path / "demo_checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    run.checkpoint_hash.cache_clear()
    yield folder
    run.checkpoint_hash.cache_clear()


def test_a_fingerprint_is_of_the_values_not_of_their_order():
    assert run.fingerprint({"a": 1, "b": [2, None]}) == run.fingerprint({"b": [2, None], "a": 1})
    assert len(run.fingerprint()) == 16
    assert len({run.fingerprint(*parts) for parts in [(), (1,), (1, 2), ("1",), ([1],), (1.5,), (True,), (None,)]}) == 8


def test_a_fingerprint_is_the_same_tomorrow(monkeypatch):
    """A changed hash would have every finished run done again."""
    monkeypatch.setattr("tuneformer.__version__", "1.2.3")
    text = '["1.2.3","cells",{"seed":0,"share":0.1}]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert run.fingerprint("cells", {"share": 0.1, "seed": 0}) == expected == "aef1a27b811efb45"


def test_a_fingerprint_has_the_package_version(monkeypatch):
    before = run.fingerprint("cells")
    monkeypatch.setattr("tuneformer.__version__", "0.0.0")
    assert run.fingerprint("cells") != before


def test_a_fingerprint_refuses_what_has_no_canonical_form():
    with pytest.raises(ValueError, match="JSON"):
        run.fingerprint(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        run.fingerprint(paths.ROOT)


def test_what_changes_the_result_changes_the_fingerprint_of_a_run(checkpoint):
    settings = load_study("tiny")
    changes = [{"seed": 1}, {"strategy": "lora"}, {"train_set": "mixture"}, {"learning_rate": 0.1}, {"min_counts": 1}]
    prints = {run.training_fingerprint(settings.model_copy(update=change), "tokens") for change in [{}, *changes]}
    prints.add(run.training_fingerprint(settings, "other tokens"))
    (checkpoint / "model.safetensors").write_text("other weights")
    run.checkpoint_hash.cache_clear()
    prints.add(run.training_fingerprint(settings, "tokens"))
    assert len(prints) == len(changes) + 3


def test_what_does_not_change_the_result_does_not_change_it(checkpoint):
    settings = load_study("tiny")
    other = settings.model_copy(
        update={"threads": 1, "question": "?", "seeds": [5], "expected_macro_f1": {"full": 0.5}}
    )
    assert run.training_fingerprint(settings, "tokens") == run.training_fingerprint(other, "tokens")


def test_a_missing_checkpoint_is_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ParameterError, match=r"checkpoint: .*model.safetensors does not exist; set checkpoint to"):
        run.checkpoint_hash("demo")


def test_each_executed_notebook_has_a_place_of_its_own():
    names = ["00_pretrain", "01_qc", "02_tokenize", "05_finetune_strategies", "06_figures"]
    settings = load_study("tiny")
    places = [run.executed_path(name, settings) for name in names]
    assert len(set(places)) == len(names)
    assert places[3].parent == paths.run_dir(settings)


def test_a_finished_run_is_loaded_and_a_changed_one_is_not(repository):
    assert repository.run("02_tokenize").returncode == 0
    first = repository.run("05_finetune_strategies", "--strategy", "full", "--seed", "0")
    assert first.stdout.startswith("tiny [1/4] drug_5class single_cell full seed 0: macro-F1 0.500, "), first.stderr
    start = time.perf_counter()
    again = repository.run("05_finetune_strategies", "--strategy", "full", "--seed", "0", "-p", "threads", "1")
    assert again.stdout == "tiny [1/4] drug_5class single_cell full seed 0: macro-F1 0.500, loaded\n"
    assert time.perf_counter() - start < 10
    assert [line.split()[0] for line in repository.diary()] == ["tokenize", "begin", "end"]
    changed = repository.run("05_finetune_strategies", "--strategy", "full", "-p", "learning_rate", "1e-2")
    assert changed.returncode == 0
    assert len(repository.diary()) == 5
    other = repository.run("05_finetune_strategies", "--strategy", "lora", "-p", "epochs", "1")
    assert other.stdout.startswith("drug_5class single_cell lora seed 0: macro-F1")  # not a run of the grid


def test_the_executed_notebook_shows_its_parameters(repository):
    assert repository.run("01_qc", "--task", "drug_5class").stdout.startswith("tiny/drug_5class 01_qc: ")
    executed = nbformat.read(repository.root / "runs" / "tiny" / "drug_5class" / "01_qc.ipynb", as_version=4)
    injected = [cell.source for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert 'task = "drug_5class"' in injected[0]
    assert 'study = "tiny"' in injected[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["05_finetune"], 2, "notebooks/05_finetune.ipynb does not exist; the notebooks are 01_qc, 02_tokenize, 05_"),
        (["01_qc", "--task", "drug_5clas"], 2, "'drug_5clas' is not a task of params/tiny.yaml"),
        (["01_qc", "--strategy", "ful"], 2, "strategy: 'ful' is no strategy (did you mean 'full'?)"),
        (["01_qc", "-p", "epoch", "3"], 2, "unknown key 'epoch'; the nearest valid key is 'epochs'"),
        (["05_finetune_strategies", "--strategy", "full"], 1, "raised ValueError: the loss is not a number (see runs/"),
    ],
)
def test_what_goes_wrong_is_one_line(repository, arguments, code, message):
    (repository.root / "fail-full").touch()
    ended = repository.run(*arguments)
    assert ended.returncode == code
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not repository.record("full").exists()


def test_a_record_of_something_else_is_not_taken(repository):
    repository.run("02_tokenize")
    repository.run("05_finetune_strategies", "--strategy", "full")
    record = repository.record("full")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "of another run"}))
    assert "loaded" not in repository.run("05_finetune_strategies", "--strategy", "full").stdout
    assert [line.split()[0] for line in repository.diary()].count("end") == 2
