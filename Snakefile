# All runs of a batch, their results, figures and page:  snakemake --cores all --config study=demo
# study: a file in params/, or `default` or `all` (see lib/tuneformer/study/grid.py).
# One papermill job per run. An executed notebook is a log, kept when its job fails; what it wrote is the output.
import os
import re
import shlex
import sys

from tuneformer.study import grid, paths, train_sets
from tuneformer.study.params import NAME_PATTERN, CellsParams, TokensParams, TrainingParams, TrainSetParams, load_study
from tuneformer.study.run import WHOLE_STUDY, checkpoint_hash, executed_path, fingerprint

BATCH = config.get("study", grid.DEFAULT)
ASKED = grid.batch(BATCH)
RUNS = [run for run in ASKED if run.kind == "cells"]
WHOLE = {run.study: run for run in ASKED if run.kind != "cells"}  # studies that are one notebook, with its settings
STUDIES = list(dict.fromkeys(run.study for run in RUNS))
PARTS = {(run.study, paths.part_name(run)): run for run in ASKED}  # tasks, or folds of tasks: what has its own split
SIDES = {"study": "{study}", "task": "{part}", "fold": None}
SIDES |= {key: f"{{{key}}}" for key in ("train_set", "strategy", "seed")}
PATTERN = ASKED[0].model_copy(update=SIDES)
SINGLE_CELLS = PATTERN.model_copy(update={"train_set": "single_cell"})
TOKENS = paths.tokens_path(SINGLE_CELLS) / "tokens.json"
MADE = {"pseudobulk": "pseudobulk.csv", "synthetic": "realism.csv"}  # kinds of train sets that a notebook shows
FIGURES = executed_path("06_figures", PATTERN).with_suffix(".done")
PYTHON = shlex.quote(sys.executable)
RUN = f"{PYTHON} -m tuneformer.study.run"
NAME = NAME_PATTERN.strip("^$")


localrules:  # seconds each, so not worth a job on a cluster
    all,
    leakage,
    collect,
    figures,
    page,


wildcard_constraints:
    study=NAME,
    part=rf"{NAME}(/fold\d+)?",
    train_set=NAME,
    strategy="|".join(map(re.escape, {strategy for run in ASKED for strategy in run.strategies})),
    notebook="|".join(WHOLE_STUDY.values()),
    seed=r"-?\d+",


def parameters(section):
    """Return what a rule's results depend on, so that Snakemake makes them again when it changes."""
    return lambda wildcards: fingerprint(part_of(wildcards).section(section), part_of(wildcards).folds)


def part_of(wildcards):
    """Return the settings of a task, or of one fold of it."""
    return PARTS[wildcards.study, wildcards.part]


def asked(wildcards):
    """Return the options that name a task, and its fold where it has one."""
    run = part_of(wildcards)
    fold = "" if run.fold is None else f" --fold {run.fold}"
    return f"--study {shlex.quote(run.study)} --task {shlex.quote(run.task)}{fold}"


def checkpoint(wildcards):
    """Return the revision of the checkpoint, for the rules that read it."""
    return checkpoint_hash(part_of(wildcards).checkpoint)


def model_of(wildcards):
    """Return the options that name the one model of a study of compression; a study of genes has several."""
    run = part_of(wildcards)
    return f"--strategy {run.strategies[0]} --seed {run.seeds[0]}" if run.kind == "compression" else ""


def own_file(wildcards):
    """Return the files, or folder, of a study of own cells; one that is missing is explained by the notebook."""
    settings = part_of(wildcards)
    files = [paths.user_path(written) for written in (settings.path, settings.obs_table) if written]
    return [file for file in files if file.exists()]


def records(study=None):
    """Return what proves that the runs of the batch, or of one of its studies, have finished."""
    asked = [run for run in RUNS if study in (None, run.study)]
    strategies = [paths.run_dir(run) / "record.json" for run in asked if run.strategy in run.strategies]
    return strategies + sorted({paths.train_set_dir(run) / "baselines.done" for run in asked if run.baselines})


def cells_of(wildcards):
    """Return what a run reads: tokens of single cells are made by notebook 02, those of made cells by each run."""
    is_ours = wildcards.train_set == "single_cell" and not paths.is_tokenized(part_of(wildcards))
    pattern = TOKENS if is_ours else paths.cells_path(PATTERN)
    return str(pattern).format(**wildcards)


def seeds(wildcards):
    """Return the seeds of the batch for one train set."""
    of = (wildcards.study, wildcards.part, wildcards.train_set)
    return sorted({run.seed for run in RUNS if (run.study, paths.part_name(run), run.train_set) == of})


def shown():
    """Return the tables of the notebooks that show the made cells of the batch, one a task and kind."""
    kinds = {(run.study, paths.part_name(run), train_sets.parse(run.train_set).kind) for run in RUNS}
    return [
        paths.task_dir(PARTS[study, part]) / MADE[kind] for study, part, kind in sorted(kinds) if kind in MADE
    ]


def whole():
    """Return what proves that the notebooks of studies that are one notebook have run."""
    return [paths.task_dir(run) / f"{WHOLE_STUDY[run.kind]}.done" for run in WHOLE.values()]


rule all:
    input:
        whole(),
        records(),  # asked for by name: metrics.csv is committed, so it is there before any run
        shown(),
        expand(paths.results_dir("{study}") / "metrics.csv", study=STUDIES),
        expand(FIGURES, study=STUDIES),
        paths.SITE / "index.html",


rule page:
    input:
        expand(paths.results_dir("{study}") / "metrics.csv", study=STUDIES),
        expand(FIGURES, study=STUDIES),
        shown(),
        whole(),
    output:
        paths.SITE / "index.html",
    params:
        study=ASKED[0].study,
    shell:
        "{PYTHON} -m tuneformer.report.readme {params.study:q} && {PYTHON} -m tuneformer.report.html {params.study:q}"


rule qc:
    input:
        own_file,
    output:
        paths.cells_path(PATTERN),
    params:
        asked=asked,
        fingerprint=parameters(CellsParams),
    log:
        executed_path("01_qc", PATTERN),
    shell:
        "{RUN} 01_qc {params.asked}"


rule tokenize:
    input:
        paths.cells_path(PATTERN),
    output:
        TOKENS,
    params:
        asked=asked,
        fingerprint=parameters(TokensParams),
        checkpoint=checkpoint,
    log:
        executed_path("02_tokenize", SINGLE_CELLS),
    shell:
        "{RUN} 02_tokenize {params.asked}"


rule pseudobulk:
    input:
        paths.cells_path(PATTERN),
    output:
        paths.task_dir(PATTERN) / "pseudobulk.csv",
    params:
        asked=asked,
        fingerprint=parameters(TrainSetParams),
        checkpoint=checkpoint,
    log:
        executed_path("03_pseudobulk", PATTERN),
    shell:
        "{RUN} 03_pseudobulk {params.asked}"


rule synthetic:
    input:
        paths.cells_path(PATTERN),
    output:
        paths.task_dir(PATTERN) / "realism.csv",
    params:
        asked=asked,
        fingerprint=parameters(TrainSetParams),
        checkpoint=checkpoint,
    log:
        executed_path("04_synthetic", PATTERN),
    shell:
        "{RUN} 04_synthetic {params.asked}"


rule finetune:
    input:
        cells_of,
    output:
        # update: Snakemake deletes neither the record nor the executed notebook before the job, so that a run that ended
        # just when the batch was killed is loaded; the job itself deletes a record that is not of this very run.
        update(paths.run_dir(PATTERN) / "record.json"),
    params:
        asked=asked,
        fingerprint=parameters(TrainingParams),
        checkpoint=checkpoint,
    threads: 1
    shell:
        "{RUN} 05_finetune_strategies {params.asked}"
        " --train-set {wildcards.train_set:q} --strategy {wildcards.strategy:q} --seed {wildcards.seed:q}"
        " -p threads {threads}"


rule baselines:
    input:
        cells_of,
    output:
        touch(paths.train_set_dir(PATTERN) / "baselines.done"),
    params:
        asked=asked,
        fingerprint=parameters(TrainingParams),
        checkpoint=checkpoint,
        baselines=lambda wildcards: part_of(wildcards).baselines,
        seeds=seeds,
    shell:
        "{PYTHON} -m tuneformer.report.baseline_runs {params.asked}"
        " --train-set {wildcards.train_set:q} --seeds {params.seeds}"


rule whole_study:
    input:
        TOKENS,
    output:
        touch(paths.task_dir(PATTERN) / "{notebook}.done"),
    params:
        asked=asked,
        model=model_of,
        fingerprint=lambda wildcards: fingerprint(part_of(wildcards).model_dump()),
        checkpoint=checkpoint,
    log:
        paths.task_dir(PATTERN) / "{notebook}.ipynb",
    threads: os.cpu_count()  # nothing runs beside what measures speed; Snakemake takes no more than it was given
    shell:
        "{RUN} {wildcards.notebook} {params.asked} {params.model}"


rule leakage:
    input:
        lambda wildcards: records(wildcards.study),
    output:
        touch(paths.RUNS / "{study}" / "leakage.done"),
    shell:
        "{PYTHON} -m tuneformer.evaluate.leakage {wildcards.study:q}"


rule collect:
    input:
        lambda wildcards: records(wildcards.study),
        paths.RUNS / "{study}" / "leakage.done",
    output:
        paths.results_dir("{study}") / "metrics.csv",
    shell:
        "{PYTHON} -m tuneformer.report.records {wildcards.study:q}"


rule figures:
    input:
        paths.results_dir("{study}") / "metrics.csv",
    output:
        touch(FIGURES),
    log:
        executed_path("06_figures", PATTERN),
    shell:
        "{RUN} 06_figures --study {wildcards.study:q}"
