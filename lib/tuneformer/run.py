"""One notebook for one job of a study, executed by papermill.

In: the name of a notebook and of a study, and the keys that differ. Out: the executed notebook beside what it wrote,
and one line on how it went; as a command, one sentence and an exit code above 0 when it could not be done.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.params import read_value
from tuneformer.study import Study, jobs, load_study

TRAINING = "05_finetune_strategies"
WHOLE_STUDY = {"genes": "07_gene_dosage", "compression": "08_compress"}
"""The one notebook of a study of another kind than cells."""


class RunError(RuntimeError):
    """A notebook that did not run to its end; the message says where it stopped and why."""


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook in its own folder; write its executed copy to `output`, also when it ends in a `RunError`."""
    import papermill  # seconds of import that a finished job need not pay
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
    """Run a notebook for one job; a job of notebook 05 that is finished already is loaded, without a kernel.

    `changes` (``study`` included) are injected below the parameters cell, and make the job that `settings` state.
    Returns one line that says what was done, how well the arm did and how long it took. A cell that raised, a kernel
    that died, or a job without rows is a `RunError`.
    """
    start = time.perf_counter()
    output = paths.executed_path(notebook.stem, settings)
    if notebook.stem != TRAINING:
        execute(notebook, output, changes)
        return f"{paths.shown(output)}: {time.perf_counter() - start:.0f} s"
    from tuneformer.evaluate import runs

    rows = runs.finished_job(settings) if output.is_file() else None
    took = "loaded"
    if rows is None:
        runs.job_path(settings).unlink(missing_ok=True)
        execute(notebook, output, changes)
        took = f"{time.perf_counter() - start:.0f} s"
        rows = runs.finished_job(settings)
    if rows is None:
        msg = f"{paths.shown(output)} ended without the rows of this job, which its last section has to write."
        raise RunError(msg)
    asked = jobs(settings.study)
    finished = sum(runs.job_path(job).is_file() for job in asked)
    failed = int((rows["status"] != "ok").sum())
    judged = f"macro-F1 {rows['macro_f1'].mean():.3f}" if failed < len(rows) else "no run succeeded"
    judged += f" ({failed} of {len(rows)} runs failed)" if failed else ""
    return f"{settings.study} [{finished}/{len(asked)}] {settings.task} {settings.arm}: {judged}, {took}"


def main(arguments: list[str] | None = None) -> int:
    """Run one notebook for one job of a study."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.run", description=main.__doc__)
    parser.add_argument("notebook", type=Path, help="such as 05_finetune_strategies, or the path of a notebook")
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a key that differs")
    given = parser.parse_args(arguments)
    notebook = given.notebook if given.notebook.suffix else paths.NOTEBOOKS / f"{given.notebook}.ipynb"
    try:
        if not notebook.is_file():
            known = ", ".join(sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb")))
            msg = f"{paths.shown(notebook)} does not exist; the notebooks are {known}."
            raise UserError(msg)
        changes = {key: read_value(value) for key, value in given.p}
        settings = load_study(given.study, **changes)
        place = {"study": given.study, "task": settings.task} | ({"arm": settings.arm} if "05" in notebook.stem else {})
        line = run_notebook(notebook.resolve(), settings, {**changes, **place})
    except (UserError, RunError) as error:
        print(f"{notebook.stem} {given.study}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    sys.stdout.write(line + "\n")  # a whole line, also when others write at the same time
    return 0


if __name__ == "__main__":
    sys.exit(main())
