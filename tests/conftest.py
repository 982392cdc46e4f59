"""A small repository for tests of the batch: real package, Snakefile and params; notebooks that take no time."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

from tuneformer import paths

QUICK_STEPS = '''
"""What the notebooks of this test repository call: files of the right names, and a diary of what was executed."""
import json, time
from tuneformer import paths
from tuneformer.evaluate import runs

def note(settings, step):
    with open(paths.ROOT / "diary.txt", "a") as diary:
        diary.write(f"{step} {settings.task} {settings.arm} {settings.seed} {settings.threads}\\n")

def make(settings, folder):
    note(settings, "begin")
    if (paths.ROOT / f"fail-{settings.arm}").exists():
        raise ValueError("the loss is not a number")
    while (paths.ROOT / f"hold-{settings.arm}-{settings.seed}").exists():
        time.sleep(0.05)
    failed = (paths.ROOT / f"diverge-{settings.arm}").exists()
    row = {"status": "failed", "macro_f1": None} if failed else {"status": "ok", "macro_f1": 0.5}
    (folder / "row.json").write_text(json.dumps(row | {"key": runs.run_key(settings)}))
    note(settings, "end")

def train(settings):
    runs._make = make
    runs.finish_job(settings, runs.run_job(settings))
'''


QUICK_PAPERMILL = '''
"""Executes the cells of a notebook in this very process, for tests of the batch around it: no kernel to wait for."""
import json, shutil

class PapermillExecutionError(Exception):
    def __init__(self, exec_count, error):
        self.exec_count, self.ename, self.evalue = exec_count, type(error).__name__, str(error)

def execute_notebook(notebook, output, *, parameters, **_):
    namespace = {}
    shutil.copy(notebook, output)
    for count, cell in enumerate(json.loads(notebook.read_text())["cells"], start=1):
        try:
            exec("".join(cell["source"]), namespace)
        except Exception as error:
            raise PapermillExecutionError(count, error)
        if count == 1:
            namespace.update(parameters)
'''


@dataclass
class Repository:
    """A folder with the package, the Snakefile, the params and quick notebooks."""

    root: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        """Start a command of this repository (a session of its own, so that it can be killed as a whole)."""
        environment = os.environ | {"PYTHONPATH": str(self.root / "lib"), "TUNEFORMER_RUNS": str(self.root / "runs")}
        environment |= variables
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # a test run that a shell put in the background ignores interrupts, and would hand that on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left at work."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def call(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        """Run a command of this repository to its end."""
        process = self.start(*command, **variables)
        out, err = process.communicate(timeout=900)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def run(self, notebook: str, *changes: str) -> subprocess.CompletedProcess:
        """Run one notebook of the study tiny."""
        return self.call("-m", "tuneformer.run", notebook, "tiny", *changes)

    def batch(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run the jobs of the study tiny."""
        return self.call(*self.batch_command(*arguments))

    @staticmethod
    def batch_command(*arguments: str) -> tuple[str, ...]:
        """Return the command of `batch`."""
        options = ("--cores", "2", "--config", "study=tiny", "--until", "job")
        return ("-m", "snakemake", *options, *arguments)

    def diary(self) -> list[str]:
        """Return what the notebooks have done so far: step, task, arm, seed, threads."""
        file = self.root / "diary.txt"
        return file.read_text().splitlines() if file.exists() else []

    def table(self, arm: str) -> Path:
        """Return where the rows of a job belong."""
        return self.root / "runs" / "tiny" / "drug_5class" / arm / "seeds0-1.csv"

    def run_folder(self, arm: str, seed: int) -> Path:
        """Return where a run belongs."""
        return self.root / "runs" / "tiny" / "drug_5class" / arm / f"seed{seed}"


@pytest.fixture
def repository(tmp_path):
    """Build a `Repository`."""
    root = tmp_path / "repository"
    without_assets = shutil.ignore_patterns("assets", "__pycache__", "*.egg-info")
    shutil.copytree(paths.ROOT / "lib", root / "lib", ignore=without_assets)
    for name in ("params", "profiles"):
        shutil.copytree(paths.ROOT / name, root / name)
    shutil.copy(paths.ROOT / "Snakefile", root)
    (root / "lib" / "quick_steps.py").write_text(QUICK_STEPS.replace("\\\\n", "\\n"))
    checkpoint = root / "lib" / "tuneformer" / "assets" / "demo_checkpoint"
    checkpoint.parent.mkdir()
    shutil.copytree(paths.ASSETS / "demo_checkpoint", checkpoint)
    (root / "notebooks").mkdir()
    steps = {"01_qc": "note(settings, 'qc')", "02_tokenize": "note(settings, 'tokenize')"}
    for name, call in {**steps, "05_finetune_strategies": "train(settings)"}.items():
        cells = ['study = "tiny"', "from quick_steps import *", call]
        resolve = "from tuneformer.study import from_notebook\nsettings = from_notebook(globals())"
        cells.insert(1, resolve)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    built = Repository(root)
    yield built
    built.close()


@pytest.fixture
def quick_repository(repository):
    """Build a `Repository` whose papermill starts no kernel."""
    (repository.root / "lib" / "papermill.py").write_text(QUICK_PAPERMILL)
    (repository.root / "lib" / "nbclient").mkdir()
    (repository.root / "lib" / "nbclient" / "__init__.py").touch()
    (repository.root / "lib" / "nbclient" / "exceptions.py").write_text("class DeadKernelError(RuntimeError): ...\n")
    return repository
