"""Fair tuning: a learning rate for every strategy of a study, found on validation cells at the same budget.

In: a study. Out: ``params/<study>_tuned.yaml``, the same study with the rates that were found, to be run like any
other; every trial is a row of ``results/<study>_tuned/trials.csv``.

Every strategy gets as many trials, of as many optimizer steps, as every other: each rate of one grid x tasks x seeds.
``selective`` also varies ``freeze_layers``, within the same number of trials (see `candidates`). A trial is scored by
the validation macro-F1 of its best epoch; the test cells are taken away before a trial begins. A study has one rate for
each strategy and not one for each task, so a setting is judged by its mean score over tasks and seeds, the quantity by
which a study compares strategies. The seeds are none of those that the study reports.
"""

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

import tuneformer
from tuneformer.data import splits
from tuneformer.finetune import checkpoints, hardware, training
from tuneformer.study import params, paths
from tuneformer.study.params import ParameterError, Study, load_study, read_yaml
from tuneformer.study.run import fingerprint, training_fingerprint
from tuneformer.tokens.tokenizer import Tokens
from tuneformer.trainsets import assemble

FACTORS = (1 / 10, 1 / 3, 3, 10)  # of the study's learning_rate, which is tried too
SEEDS = (1000, 1001, 1002)
NOT_REPEATED = ("task", "quick_train_sets", "expected_macro_f1", "expected_mean_macro_f1", "expected_tolerance")
"""Keys of a study that its tuned copy does not have: references of its own runs, and what is run by default."""
SETTING = ["strategy", "learning_rate", "freeze_layers"]
COLUMNS = (
    "study",
    "task",
    "train_set",
    *SETTING,
    "seed",
    "validation_macro_f1",
    "best_epoch",
    "optimizer_steps",
    "n_train",
    "n_validation",
    "status",
    "reason",
    "seconds",
    "fingerprint",
)


class TuningError(RuntimeError):
    """Trials that cannot go on, or of which none can be chosen; the message says what to do."""


def tune(
    study: str,
    *,
    task: str | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] = SEEDS,
    jobs: int = 1,
) -> pd.DataFrame:
    """Make the trials of a study, or load those that are finished, and write the study with the best of them.

    Parameters
    ----------
    study
        Name of a file in ``params/``, without ``.yaml``.
    task
        Tune on this task alone, and for it alone; None tunes for all tasks of the study together.
    rates, seeds
        As `trials`.
    jobs
        Trials made at the same time, each by a process of one thread. The numbers do not depend on it.

    Returns
    -------
    As `choose`. ``results/<study>_tuned/trials.csv`` and ``params/<study>_tuned.yaml`` are written.

    Raises
    ------
    ValueError
        The study, its cells or its checkpoint cannot be used, or a rate is not above 0.
    TuningError
        Memory ran out, or every setting of a strategy diverged.
    """
    plan = trials(study, task=task, rates=rates, seeds=seeds)
    table = run_trials(plan, jobs=jobs)
    chosen = choose(table)
    paths.write_text(paths.results_dir(f"{study}_tuned") / "trials.csv", _csv(table))
    text = study_text(plan[0], table, chosen, command=_command(study, task=task, rates=rates, seeds=seeds))
    paths.write_text(paths.PARAMS / f"{study}_tuned.yaml", text)
    return chosen


def trials(
    study: str, *, task: str | None = None, rates: Sequence[float] | None = None, seeds: Sequence[int] = SEEDS
) -> list[Study]:
    """List the trials of a study: tasks x strategies x settings of `candidates` x seeds.

    Parameters
    ----------
    study, task
        As `tune`.
    rates
        Learning rates to try; None tries that of the study, and `FACTORS` times it.
    seeds
        Seeds of every setting.

    Returns
    -------
    The settings of each trial. All are on the train set that the study names first, on one thread, and for all epochs:
    ``early_stop`` would give some strategies fewer steps than others.

    Raises
    ------
    ParameterError
        The study cannot be used or has folds, or a rate is not above 0.
    """
    if load_study(study).folds:
        msg = (
            f"params/{study}.yaml: folds: what validates in one fold is tested in another; tune a study with folds: 0."
        )
        raise ParameterError(msg)
    listed = []
    for name in [task] if task else load_study(study).tasks:
        first = load_study(study, task=name)
        changes = {"train_set": first.train_sets[0], "early_stop": None, "threads": 1, "learning_rates": {}}
        for strategy in first.strategies:
            settings = load_study(study, task=name, strategy=strategy).model_copy(update=changes)
            for setting in candidates(settings, rates):
                listed += [settings.model_copy(update=setting | {"seed": seed}) for seed in dict.fromkeys(seeds)]
    return listed


def candidates(settings: Study, rates: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """List the settings to be tried for the strategy of a run: every rate once.

    For ``selective`` each rate also has a number of frozen layers, so that there are no more settings than for any
    other strategy: numbers spread evenly from 1 to all layers but one, of which rates next to each other take one from
    the lower and one from the upper half, in an order that gives the study's own rate its own ``freeze_layers``. Rate
    and number are chosen together; the trials cannot tell what each of them does.

    Parameters
    ----------
    settings
        A run; its strategy, learning rate, ``freeze_layers`` and checkpoint are read.
    rates
        As `trials`.

    Returns
    -------
    The changes that make each setting, ascending by rate.

    Raises
    ------
    ParameterError
        A rate is not above 0.
    CheckpointError
        The checkpoint cannot be read.
    """
    tried = sorted(set(rates or [settings.learning_rate, *_around(settings.learning_rate)]))
    if not tried[0] > 0:
        msg = f"--rates: a learning rate has to be above 0 (one is {tried[0]:g})."
        raise ParameterError(msg)
    if settings.strategy != "selective":
        return [{"learning_rate": rate} for rate in tried]
    n_layers = checkpoints.read_config(paths.checkpoint_dir(settings.checkpoint)).num_hidden_layers
    spread = np.linspace(1, max(1, n_layers - 1), len(tried)).round().astype(int)
    depths = np.empty_like(spread)
    depths[0::2], depths[1::2] = np.split(spread, [-(-len(tried) // 2)])
    if settings.peak_learning_rate in tried:
        own = tried.index(settings.peak_learning_rate)
        depths = np.roll(depths, own - np.abs(depths - settings.freeze_layers).argmin())
        depths[own] = settings.freeze_layers
    return [{"learning_rate": rate, "freeze_layers": int(depth)} for rate, depth in zip(tried, depths, strict=True)]


def validate(settings: Study, tokens: Tokens) -> pd.DataFrame:
    """Fine-tune as a run would, with its training cells, steps and order, and never read the test cells.

    Parameters
    ----------
    settings
        The run.
    tokens
        Of its train set. Test cells need not be there; if they are, they are left out first.

    Returns
    -------
    One row an epoch, as ``history`` of `tuneformer.finetune.training.Outcome`.

    Raises
    ------
    TrainingFailed
        The run diverged.
    """
    tokens, drawn = _without_test(settings, tokens)
    cells = {part: training.read_cells(tokens, rows) for part, rows in drawn.items()}
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    hardware.prepare(settings)
    log = training.RunLog()
    with contextlib.redirect_stderr(io.StringIO()):  # a line for each epoch
        training.make_trainer(settings, tokens, cells, log).train()
    return pd.DataFrame(log.history)


def run_trial(settings: Study) -> dict[str, Any]:
    """Make one trial.

    Returns
    -------
    Its row of ``trials.csv``, all of `COLUMNS` but the fingerprint. A trial that diverged has status ``failed``, a
    reason and no score. ``optimizer_steps`` is its budget. ``freeze_layers`` is missing where it plays no part.

    Raises
    ------
    TuningError
        Memory ran out, which says nothing about a learning rate.
    """
    tokens = assemble.prepare_tokens(settings)
    _, drawn = _without_test(settings, tokens)
    row = {key: getattr(settings, key) for key in ("study", "task", "train_set", *SETTING, "seed")}
    if settings.strategy != "selective":
        row["freeze_layers"] = None
    n_train, n_validation = len(drawn["train"]), len(drawn["validation"])
    row |= {"n_train": n_train, "n_validation": n_validation, "status": "ok", "reason": ""}
    row |= {"optimizer_steps": training.optimizer_steps(settings, tokens, n_train)}
    start = time.perf_counter()
    try:
        scores = validate(settings, tokens)["validation_macro_f1"]
        row |= {"validation_macro_f1": scores.max(), "best_epoch": int(scores.argmax()) + 1}
    except training.TrainingFailed as failure:
        row |= {"validation_macro_f1": None, "best_epoch": None, "status": failure.status, "reason": str(failure)}
    except Exception as error:
        if not hardware.is_out_of_memory(error):
            raise
        msg = f"{_describe(row)}: memory ran out; use fewer --jobs, or a smaller batch_size or max_length."
        raise TuningError(msg) from error
    return row | {"seconds": time.perf_counter() - start}


def run_trials(plan: Sequence[Study], *, jobs: int) -> pd.DataFrame:
    """Make trials, and print a line for each; those with the same fingerprint in ``trials.csv`` are not made again.

    Returns
    -------
    `COLUMNS`, one row a trial, in the order of `plan`. ``runs/<study>/tuning/trials.csv`` holds every trial ever made,
    and is written whole after each.

    Raises
    ------
    ValueError, TuningError
        As `tune`.
    """
    path = paths.RUNS / plan[0].study / "tuning" / "trials.csv"
    rows = _read_csv(path).to_dict("records") if path.is_file() else []
    known = {row["fingerprint"] for row in rows}
    keys = _fingerprints(plan)
    waiting = {key: settings for key, settings in zip(keys, plan, strict=True) if key not in known}
    n_finished = len(plan) - len(waiting)
    print(f"{plan[0].study}: {len(plan)} trials, {n_finished} of them finished before", flush=True)
    for key, row in _made(waiting, jobs):
        rows.append(row | {"fingerprint": key})
        paths.write_text(path, _csv(_table(rows)))
        n_finished += 1
        is_ok = row["status"] == "ok"
        judged = f"validation macro-F1 {row['validation_macro_f1']:.3f}" if is_ok else row["status"]
        print(f"[{n_finished}/{len(plan)}] {_describe(row)}: {judged}, {row['seconds']:.1f} s", flush=True)
    table = _read_csv(path).set_index("fingerprint").loc[keys].reset_index()
    return table[list(COLUMNS)]


def choose(table: pd.DataFrame) -> pd.DataFrame:
    """Choose the setting of each strategy with the highest mean validation macro-F1 over tasks and seeds.

    A setting that diverged in any trial cannot be chosen. Of several with the same mean the smallest rate is taken.

    Parameters
    ----------
    table
        As `run_trials` returns it.

    Returns
    -------
    One row a strategy: ``strategy``, ``learning_rate``, ``freeze_layers`` (missing but for ``selective``),
    ``validation_macro_f1``, ``settings`` (number tried), ``trials`` and ``failed`` (of these); ``edge``, "smallest" or
    "largest" if the rate is at that end of the grid, where a better one may lie beyond, else "".

    Raises
    ------
    TuningError
        Every setting of a strategy diverged.
    """
    rows = []
    for strategy, part in table.groupby("strategy", sort=False):
        scores = part.groupby(["learning_rate", "freeze_layers"], dropna=False)["validation_macro_f1"]
        means = scores.agg(lambda values: values.mean(skipna=False))
        tried = sorted(part["learning_rate"].unique())
        if means.isna().all():
            shown = ", ".join(f"{rate:g}" for rate in tried)
            msg = f"{strategy}: every setting diverged in some trial; try smaller --rates than {shown}."
            raise TuningError(msg)
        rate, depth = means.index[int(np.nanargmax(means))]
        ends = {tried[0]: "smallest", tried[-1]: "largest"} if len(tried) > 1 else {}
        row = {"strategy": strategy, "learning_rate": rate, "freeze_layers": depth, "validation_macro_f1": means.max()}
        row |= {"settings": len(means), "trials": len(part), "failed": int((part["status"] != "ok").sum())}
        rows.append(row | {"edge": ends.get(rate, "")})
    return pd.DataFrame(rows).astype({"freeze_layers": "Int64"})


def study_text(settings: Study, table: pd.DataFrame, chosen: pd.DataFrame, *, command: str) -> str:
    """Write the params file of a tuned study: the study's own keys, the rates, and a header on how they were found.

    Parameters
    ----------
    settings
        Any trial of the study.
    table, chosen
        From `run_trials` and `choose`.
    command
        What has to be called to make the file again.
    """
    own = read_yaml(paths.PARAMS / f"{settings.study}.yaml")
    content = {key: value for key, value in own.items() if key not in NOT_REPEATED}
    content["question"] = f"With a learning rate tuned for each strategy: {settings.question or settings.study}"
    content["tasks"] = [str(task) for task in table["task"].unique()]
    content["learning_rates"] = dict(zip(chosen["strategy"], chosen["learning_rate"], strict=True))
    depth = chosen.set_index("strategy")["freeze_layers"].dropna()
    if len(depth):
        content["freeze_layers"] = int(depth.item())
    dumped = yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return "".join(f"# {line}\n" for line in _header(settings, table, chosen, command)) + dumped


def main(arguments: list[str] | None = None) -> int:
    """Tune the strategies of a study on its validation cells, and write params/<study>_tuned.yaml.

    It can be stopped at any time: the same command goes on where it stopped.
    """
    parser = argparse.ArgumentParser(prog="python -m tuneformer.finetune.tuning", description=main.__doc__)
    parser.add_argument("study", help="name of a file in params/, without .yaml")
    parser.add_argument("--task", help="tune on, and for, this task alone")
    parser.add_argument("--rates", type=float, nargs="+", help="default: 1/10, 1/3, 1, 3, 10 x the study's rate")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help=f"default: {' '.join(map(str, SEEDS))}"
    )
    parser.add_argument("--jobs", type=int, help="trials at the same time; default: one a core, or 1 on a GPU")
    given = parser.parse_args(arguments)
    try:
        on_gpu = hardware.device_of(load_study(given.study)).type == "cuda"
        jobs = given.jobs or (1 if on_gpu else os.cpu_count())
        chosen = tune(given.study, task=given.task, rates=given.rates, seeds=given.seeds, jobs=jobs)
    except ValueError as error:
        print(f"tuning of {given.study}: {error}", file=sys.stderr)
        return 2
    except TuningError as error:
        print(f"tuning of {given.study}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tuning of {given.study}: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    for line in _chosen_lines(chosen):
        print(line)
    print(paths.shown(paths.PARAMS / f"{given.study}_tuned.yaml"))
    return 0


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` reads back as it was: text such as 1e5, a number there, is quoted."""


_Dumper.add_implicit_resolver("!exponent", params.EXPONENT, list("-+0123456789"))


def _without_test(settings: Study, tokens: Tokens) -> tuple[Tokens, dict[str, np.ndarray]]:
    """Return tokens that hold no test cells, and the rows of the training and validation cells of a run in them."""
    dataset = tokens.dataset
    dataset = dataset.select(np.flatnonzero(np.array(dataset["split"][:]) != "test"))
    drawn = splits.draw_cells(
        dataset.select_columns(["label", "split"]).to_pandas(),
        train_cells=None if paths.is_made(settings) else settings.train_cells,
        validation_share=settings.validation_share,
        seed=settings.seed,
    )
    return replace(tokens, dataset=dataset), {part: drawn[part] for part in ("train", "validation")}


def _fingerprints(plan: Sequence[Study]) -> list[str]:
    """Return what each trial depends on; makes the tokens that are not there yet, before several trials would."""
    tokens: dict[Path, str] = {}
    for settings in plan:
        folder = paths.tokens_path(settings)
        if folder not in tokens:
            tokens[folder] = assemble.prepare_tokens(settings).provenance["fingerprint"]
    return [training_fingerprint(settings, tokens[paths.tokens_path(settings)]) for settings in plan]


def _made(waiting: Mapping[str, Study], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make trials, `jobs` at a time, and give the key and the row of each as it ends."""
    jobs = min(jobs, len(waiting))
    if jobs < 2:
        for key, settings in waiting.items():
            yield key, run_trial(settings)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit the threads of torch half-alive
    quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # no traceback on Ctrl-C
    with ProcessPoolExecutor(jobs, mp_context=spawn, **quietly) as pool:
        keys = {pool.submit(run_trial, settings): key for key, settings in waiting.items()}
        try:
            for future in as_completed(keys):
                yield keys[future], future.result()
        except BrokenProcessPool as error:
            msg = "a trial was killed, as when memory runs out; use fewer --jobs (the finished trials are kept)."
            raise TuningError(msg) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _around(rate: float) -> list[float]:
    return [float(f"{rate * factor:.2g}") for factor in FACTORS]


def _describe(row: Mapping[str, Any]) -> str:
    frozen = f", {row['freeze_layers']} layers frozen" if row["strategy"] == "selective" else ""
    return f"{row['task']} {row['strategy']} seed {row['seed']}, rate {row['learning_rate']:g}{frozen}"


def _table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return table.astype({"freeze_layers": "Int64", "best_epoch": "Int64", "validation_macro_f1": float})


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def _read_csv(path: Path) -> pd.DataFrame:
    types = {"fingerprint": str, "freeze_layers": "Int64", "best_epoch": "Int64", "reason": str}
    return pd.read_csv(path, dtype=types, float_precision="round_trip").fillna({"reason": ""})


def _header(settings: Study, table: pd.DataFrame, chosen: pd.DataFrame, command: str) -> Iterator[str]:
    """Yield the lines that say how the rates of a tuned study were found."""
    tasks, seeds = (", ".join(map(str, table[side].unique())) for side in ("task", "seed"))
    steps = table.groupby("task", sort=False)["optimizer_steps"].max()
    cells = f"{'simulated; ' * settings.simulated}train set {settings.train_set}"
    yield f"Made by `{command}`, not by hand."
    yield f"Learning rates found on validation cells ({cells}); no test cell was read."
    yield (
        f"Budget of every strategy: {chosen['settings'].max()} settings x tasks ({tasks}) x seeds ({seeds}) = "
        f"{chosen['trials'].max()} trials,"
    )
    yield f"of as many optimizer steps each: {', '.join(f'{task} {n}' for task, n in steps.items())}."
    yield f"Rates tried: {', '.join(f'{rate:g}' for rate in sorted(table['learning_rate'].unique()))}."
    if "selective" in set(chosen["strategy"]):
        pairs = table.loc[table["strategy"] == "selective", ["learning_rate", "freeze_layers"]].drop_duplicates()
        listed = ", ".join(f"{depth} with {rate:g}" for rate, depth in pairs.itertuples(index=False))
        yield f"freeze_layers tried (selective): {listed}."
    yield "Mean validation macro-F1 over tasks and seeds, best epoch of each trial:"
    yield from (f"  {line}" for line in _chosen_lines(chosen))
    yield f"tuneformer {tuneformer.__version__}, trials {fingerprint(sorted(table['fingerprint']))}."


def _chosen_lines(chosen: pd.DataFrame) -> Iterator[str]:
    for row in chosen.itertuples():
        frozen = f", {row.freeze_layers} layers frozen" if row.strategy == "selective" else ""
        failed = f"; {row.failed} of {row.trials} trials diverged" if row.failed else ""
        edge = f"; the {row.edge} rate tried, a better one may lie beyond" if row.edge else ""
        yield f"{row.strategy}: {row.learning_rate:g}{frozen}, {row.validation_macro_f1:.3f}{failed}{edge}"


def _command(study: str, *, task: str | None, rates: Sequence[float] | None, seeds: Sequence[int]) -> str:
    words = ["python", "-m", "tuneformer.finetune.tuning", study]
    words += ["--task", task] if task else []
    words += ["--rates", *map(str, rates)] if rates else []
    words += ["--seeds", *map(str, seeds)] if tuple(seeds) != SEEDS else []
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
