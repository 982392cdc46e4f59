# All runs of one study, their results, figures and page:  snakemake --cores all --config study=demo
# One papermill job per run. An executed notebook is a log, kept when its job fails; what it wrote is the output.
import re
import shlex
import sys

from tuneformer.study import grid, paths
from tuneformer.study.params import NAME_PATTERN, CellsParams, TokensParams, TrainingParams, load_study
from tuneformer.study.run import checkpoint_hash, executed_path, fingerprint

STUDY = config.get("study", "demo")
RUNS = grid.runs(STUDY)
TASKS = {run.task: run for run in RUNS}
PATTERN = RUNS[0].model_copy(
    update={"task": "{task}", "train_set": "{train_set}", "strategy": "{strategy}", "seed": "{seed}"}
)
TOKENS = paths.tokens_path(PATTERN) / "tokens.json"
RECORDS = [paths.run_dir(run) / "record.json" for run in RUNS]
METRICS = paths.results_dir(STUDY) / "metrics.csv"
FIGURES = executed_path("06_figures", PATTERN).with_suffix(".done")
PYTHON = shlex.quote(sys.executable)
RUN = f"{PYTHON} -m tuneformer.study.run"


localrules:  # seconds each, so not worth a job on a cluster
    all,
    collect,
    figures,
    page,


wildcard_constraints:
    task=NAME_PATTERN.strip("^$"),
    train_set=NAME_PATTERN.strip("^$"),
    strategy="|".join(map(re.escape, RUNS[0].strategies)),
    seed=r"-?\d+",


def parameters(section):
    """Return what a rule's results depend on, so that Snakemake makes them again when it changes."""
    return lambda wildcards: fingerprint(TASKS[wildcards.task].section(section))


def checkpoint(wildcards):
    """Return the revision of the checkpoint, for the rules that read it."""
    return checkpoint_hash(TASKS[wildcards.task].checkpoint)


def own_file(wildcards):
    """Return the h5ad file of a study of own cells; a file that is missing is explained by the notebook."""
    path = TASKS[wildcards.task].path
    return [file for file in [path and paths.user_path(path)] if file and file.is_file()]


rule all:
    input:
        RECORDS,  # asked for by name: METRICS is committed, so it is there before any run
        METRICS,
        FIGURES,
        paths.SITE / "index.html",


rule page:
    input:
        METRICS,
        FIGURES,
    output:
        paths.SITE / "index.html",
    params:
        study=STUDY,
    shell:
        "{PYTHON} -m tuneformer.report.readme {params.study:q} && {PYTHON} -m tuneformer.report.html {params.study:q}"


rule qc:
    input:
        own_file,
    output:
        paths.cells_path(PATTERN),
    params:
        study=STUDY,
        fingerprint=parameters(CellsParams),
    log:
        executed_path("01_qc", PATTERN),
    shell:
        "{RUN} 01_qc --study {params.study:q} --task {wildcards.task:q}"


rule tokenize:
    input:
        paths.cells_path(PATTERN),
    output:
        TOKENS,
    params:
        study=STUDY,
        fingerprint=parameters(TokensParams),
        checkpoint=checkpoint,
    log:
        executed_path("02_tokenize", PATTERN),
    shell:
        "{RUN} 02_tokenize --study {params.study:q} --task {wildcards.task:q} -p train_set {wildcards.train_set:q}"


rule finetune:
    input:
        TOKENS,
    output:
        # update: Snakemake deletes neither the record nor the executed notebook before the job, so that a run that ended
        # just when the batch was killed is loaded; the job itself deletes a record that is not of this very run.
        update(paths.run_dir(PATTERN) / "record.json"),
    params:
        study=STUDY,
        fingerprint=parameters(TrainingParams),
        checkpoint=checkpoint,
    threads: 1
    shell:
        "{RUN} 05_finetune_strategies --study {params.study:q} --task {wildcards.task:q}"
        " --train-set {wildcards.train_set:q} --strategy {wildcards.strategy:q} --seed {wildcards.seed:q}"
        " -p threads {threads}"


rule collect:
    input:
        RECORDS,
    output:
        METRICS,
    params:
        study=STUDY,
    shell:
        "{PYTHON} -m tuneformer.report.records {params.study:q}"


rule figures:
    input:
        METRICS,
    output:
        touch(FIGURES),
    params:
        study=STUDY,
    log:
        executed_path("06_figures", PATTERN),
    shell:
        "{RUN} 06_figures --study {params.study:q}"
