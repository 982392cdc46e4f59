"""One notebook for one job of a study, executed by papermill.

In: the name of a notebook and of a study, and the keys that differ. Out: the executed notebook beside what it wrote,
and one line on how it went; as a command, one sentence and an exit code above 0 when it could not be done.
"""

import argparse
import csv
import logging
import math
import os
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from tuneformer import paths
from tuneformer.artifacts import UserError
from tuneformer.params import read_value
from tuneformer.study import Study, jobs, load_study

TRAINING = "05_finetune_strategies"
BATCH_START = "TUNEFORMER_BATCH_START"
"""The environment variable in which a batch says when it began, in seconds since 1970."""
WHOLE_STUDY = {"genes": "07_gene_dosage", "compression": "08_compress"}
"""The one notebook of a study of another kind than cells."""


class RunError(RuntimeError):
    """A notebook that did not run to its end; the message says where it stopped and why."""


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook in its own folder; write its executed copy to `output`, also when it ends in a `RunError`."""
    sys.modules["rfc3987_syntax"] = None  # jsonschema takes it if it is there, to compile a grammar of addresses: 0.4 s
    import papermill  # a second that a finished job need not pay
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
    table = paths.job_table(settings)
    if output.is_file() and _is_finished(settings):
        took = "loaded"
    else:
        table.unlink(missing_ok=True)
        execute(notebook, output, changes)
        took = f"{time.perf_counter() - start:.0f} s"
    if not table.is_file():
        msg = f"{paths.shown(output)} ended without the rows of this job, which its last section has to write."
        raise RunError(msg)
    tables = [paths.job_table(job) for job in jobs(settings.study)]
    ended = [one.stat().st_mtime for one in tables if one.is_file()]
    place = f"{settings.study} [{len(ended)}/{len(tables)}] {settings.task} {settings.arm}"
    return f"{place}: {_judged(table)}, {took}{time_left(ended, len(tables) - len(ended))}"


def time_left(ended: list[float], n_left: int) -> str:
    """Say how long the jobs left will take, if they end as often as they did since the batch was started.

    `ended` are the times at which jobs of the study ended. Outside a batch, which says when it began, nothing is said.
    """
    began, now = float(os.environ.get(BATCH_START, math.inf)), time.time()
    since = sum(one >= began for one in ended)
    return f", about {max(1, round((now - began) / since * n_left / 60))} min left" if since and n_left else ""


def _is_finished(settings: Study) -> bool:
    from tuneformer.evaluate import runs  # with anndata and datasets, which a new job leaves to its kernel

    return runs.finished_job(settings) is not None


def _judged(table: Path) -> str:
    """Return how well the runs of a job did."""
    with table.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    scores = [float(row["macro_f1"]) for row in rows if row["status"] == "ok"]
    failed = f" ({len(rows) - len(scores)} of {len(rows)} runs failed)" if len(scores) < len(rows) else ""
    return (f"macro-F1 {fmean(scores):.3f}" if scores else "no run succeeded") + failed


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
