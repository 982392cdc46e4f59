"""The baselines of a study: fitted on the same cells as its fine-tuning runs, and recorded like them.

In: study, task, train set and seeds. Out: ``record.json`` and ``predictions.parquet`` in the folder of each run. They
take seconds, so they have no notebook each, and one process fits all of them.
"""

import argparse
import sys

from tuneformer.data import preprocessing
from tuneformer.evaluate import baselines, metrics
from tuneformer.finetune import training
from tuneformer.report import records
from tuneformer.study import paths
from tuneformer.study.params import load_study
from tuneformer.study.run import finished_record, progress_line
from tuneformer.trainsets import assemble


def make(study: str, *, task: str, train_set: str, seeds: list[int], fold: int | None = None) -> None:
    """Fit and record the baselines of one train set (and fold); those that are finished already are left as they are.

    Raises
    ------
    ValueError
        The study, the cells or the train set cannot be used; the message says why and what to do.
    """
    for seed in seeds:
        chosen = {"task": task, "train_set": train_set, "seed": seed, "fold": fold}
        settings = load_study(study, **chosen)
        cells = None
        for name in settings.baselines:
            run = load_study(study, strategy=name, **chosen)
            record = finished_record(run)
            took = "loaded"
            if record is None:
                if cells is None:
                    cells = assemble.make_train_cells(run, preprocessing.prepare_cells(run)).cells
                    tokens = assemble.prepare_tokens(run)
                (paths.run_dir(run) / "record.json").unlink(missing_ok=True)
                outcome = baselines.fit_baseline(run, cells, tokens)
                training.write_outcome(run, outcome)
                records.write_record(run, outcome, metrics.score_run(outcome))
                record, took = finished_record(run), f"{outcome.cost['wall_seconds']:.0f} s"
            sys.stdout.write(progress_line(run, record, took=took) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Fit the baselines of one train set; end with 2 and one sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tuneformer.report.baseline_runs", description=main.__doc__)
    parser.add_argument("--study", required=True, help="name of a file in params/, without .yaml")
    parser.add_argument("--task", required=True)
    parser.add_argument("--train-set", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--fold", type=int)
    given = parser.parse_args(arguments)
    try:
        make(given.study, task=given.task, train_set=given.train_set, seeds=given.seeds, fold=given.fold)
    except ValueError as error:
        print(f"baselines of {given.study} {given.task} {given.train_set}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
