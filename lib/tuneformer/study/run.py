"""One run of one notebook: its fingerprint, whether it is finished already, and its execution by papermill.

In: a notebook and the settings of a run. Out: the executed notebook beside what it wrote, and a line on how it went.
"""

import argparse
import functools
import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import tuneformer
from tuneformer.study import grid, paths
from tuneformer.study.params import ParameterError, Study, TrainingParams, load_study, read_value

TRAINING = "05_finetune_strategies"
"""The notebook that trains; only its runs are many, and only they end in a record."""
WHOLE_STUDY = {"genes": "07_gene_dosage", "compression": "08_compress"}
"""The one notebook of a study of another kind than cells."""


class RunError(RuntimeError):
    """A notebook that did not run to its end; the message says where it stopped and why."""


def fingerprint(*parts: Any) -> str:
    """Hash everything a result depends on.

    Parameters
    ----------
    parts
        Values that JSON can hold: sections of a study, hashes of data, vocabulary and split. The package version is
        always added.

    Returns
    -------
    The first 16 hexadecimal digits of the SHA-256 of the parts as canonical JSON (sorted keys, no spaces).

    Raises
    ------
    TypeError
        A part that JSON cannot hold.
    ValueError
        A part that holds NaN or infinity, which have no canonical form.
    """
    text = json.dumps([tuneformer.__version__, *parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_fingerprint(settings: Study, tokens: str) -> str:
    """Hash everything that one fine-tuning run depends on.

    `threads` is left out: the number of CPU threads changes the time a run takes, and its numbers only by rounding.

    Parameters
    ----------
    settings
        The run.
    tokens
        Fingerprint of its tokens, which stands for cells, split and vocabulary.
    """
    parameters = settings.section(TrainingParams)
    del parameters["threads"]
    return fingerprint(
        parameters, settings.train_set, settings.strategy, settings.seed, tokens, checkpoint_hash(settings.checkpoint)
    )


@functools.cache
def checkpoint_hash(name: str) -> str:
    """Hash the configuration and the weights of a checkpoint, which is its revision.

    Raises
    ------
    ParameterError
        The checkpoint has no ``config.json`` or no ``model.safetensors``.
    """
    digest = hashlib.sha256()
    for file in ("config.json", "model.safetensors"):
        path = paths.checkpoint_dir(name) / file
        if not path.is_file():
            msg = (
                f"checkpoint: {path} does not exist; set checkpoint to demo, to a published name or to the folder of a "
                "Geneformer model; published ones come by `python -m tuneformer.data.download <study>`."
            )
            raise ParameterError(msg)
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def finished_record(settings: Study) -> dict[str, Any] | None:
    """Return the record of a fine-tuning run if the run is finished and nothing that it depends on has changed."""
    tokens = _read_json(paths.tokens_path(settings) / "tokens.json")
    record = _read_json(paths.run_dir(settings) / "record.json")
    if tokens is None or record is None:
        return None
    current = record.get("fingerprint") == training_fingerprint(settings, tokens["fingerprint"])
    return record if current else None


def executed_path(notebook: str, settings: Study) -> Path:
    """Return where the executed copy of a notebook goes: beside the things that it wrote.

    Parameters
    ----------
    notebook
        Its name, without folder and ending.
    settings
        The run.
    """
    folders = {
        "00": paths.RUNS / settings.study,
        "01": paths.task_dir(settings),
        "02": paths.train_set_dir(settings),
        "03": paths.task_dir(settings),
        "04": paths.task_dir(settings),
        "05": paths.run_dir(settings),
        "06": paths.RUNS / settings.study,
        "07": paths.task_dir(settings),
        "08": paths.task_dir(settings),
    }
    return folders[notebook[:2]] / f"{notebook}.ipynb"


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook in its own folder with `parameters`, and write its executed copy to `output`.

    Raises
    ------
    RunError
        A cell raised, or the kernel died; the message says which cell, why, and where to look.
    """
    import papermill  # seconds of import that a finished run need not pay
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of keys that from_notebook checks better
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters=parameters,
            cwd=notebook.parent,
            kernel_name="python3",
            progress_bar=False,
            config=Config(KernelManager={"transport_encryption": "auto"}),  # else each kernel warns that it has none
        )
    except papermill.PapermillExecutionError as error:
        msg = f"cell [{error.exec_count}] raised {error.ename}: {error.evalue} (see {paths.shown(output)})"
        raise RunError(msg) from error
    except DeadKernelError as error:
        msg = f"the kernel died, as when memory runs out (see {paths.shown(output)}); run fewer jobs at a time."
        raise RunError(msg) from error


def run_notebook(notebook: Path, settings: Study, changes: dict[str, Any]) -> str:
    """Run a notebook for one run of a study; a fine-tuning run that is finished already is loaded, without a kernel.

    Parameters
    ----------
    notebook
        The notebook's file.
    settings
        The run, as `changes` make it.
    changes
        What is injected below the parameters cell, ``study`` included.

    Returns
    -------
    One line that says what was done, how well the model did and how long it took.

    Raises
    ------
    RunError
        A cell raised, the kernel died, or a fine-tuning run wrote no record; the message says where to look.
    """
    start = time.perf_counter()
    output = executed_path(notebook.stem, settings)
    trains = notebook.stem == TRAINING
    if trains:
        record = finished_record(settings)
        if record is not None and output.is_file():
            return progress_line(settings, record, took="loaded")
        (paths.run_dir(settings) / "record.json").unlink(missing_ok=True)
    execute(notebook, output, changes)
    took = f"{time.perf_counter() - start:.0f} s"
    if not trains:
        return f"{output.parent.relative_to(paths.RUNS)} {notebook.stem}: {took}"
    record = finished_record(settings)
    if record is None:
        msg = f"{paths.shown(output)} ended without the record of this run, which its last section has to write."
        raise RunError(msg)
    return progress_line(settings, record, took=took)


def progress_line(settings: Study, record: dict[str, Any], *, took: str) -> str:
    """Return the line that a batch shows for a finished run.

    Parameters
    ----------
    settings
        The run.
    record
        Its record.
    took
        How long it took, or that it was loaded.

    Returns
    -------
    Such as ``demo [12/45] drug_5class single_cell full seed 0: macro-F1 0.573, 8 s``: so many of all runs of the study
    are finished. A run outside the grid has no such numbers, a failed one its status in place of a score.
    """
    is_ok = record["status"] == "ok"
    judged = f"macro-F1 {record['metrics']['macro_f1']:.3f}" if is_ok else record["status"]
    runs = grid.runs(settings.study)
    finished = sum(finished_record(run) is not None for run in runs)
    is_asked = grid.describe(settings) in map(grid.describe, runs)
    position = f"{settings.study} [{finished}/{len(runs)}] " if is_asked else ""
    return f"{position}{grid.describe(settings)}: {judged}, {took}"


def main(arguments: list[str] | None = None) -> int:
    """Run one notebook for one run of a study; what went wrong is said in one sentence, with an exit code above 0."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.study.run", description=main.__doc__)
    parser.add_argument("notebook", type=Path, help="such as 05_finetune_strategies, or the path of a notebook")
    parser.add_argument("--study", required=True, help="name of a file in params/, without .yaml")
    parser.add_argument("--task")
    parser.add_argument("--train-set")
    parser.add_argument("--strategy")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--fold", type=int)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="any other key")
    given = vars(parser.parse_args(arguments))
    notebook = given.pop("notebook")
    extra = {key: read_value(value) for key, value in given.pop("p")}
    changes = {key: value for key, value in given.items() if value is not None} | extra
    if not notebook.suffix:
        notebook = paths.NOTEBOOKS / f"{notebook}.ipynb"
    try:
        if not notebook.is_file():
            known = ", ".join(sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
            msg = f"{paths.shown(notebook)} does not exist; the notebooks are {known}."
            raise ParameterError(msg)
        settings = load_study(changes["study"], **{key: changes[key] for key in changes if key != "study"})
        changes.setdefault("task", settings.task)
        sys.stdout.write(run_notebook(notebook.resolve(), settings, changes) + "\n")  # whole lines, also beside others
    except ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{notebook.stem} {grid.describe(settings)}: {error}", file=sys.stderr)
        return 1
    return 0


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
