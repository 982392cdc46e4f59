# All jobs of a batch, their results, figures and page:  make report STUDY=demo, which calls Snakemake (tuneformer.batch)
# study: a file in params/, or `default` or `all` (tuneformer.study.batch). A job is one papermill run of notebook 05 for
# one arm of one task, all its seeds and folds. An executed notebook is a log, kept when its job fails.
import shlex
import sys
import time

from tuneformer import paths, run
from tuneformer.artifacts import key
from tuneformer.data import fetch
from tuneformer.keys import CellsKeys, NAME_PATTERN, TokensKeys, TrainingKeys, TrainSetKeys
from tuneformer.study import batch, jobs, load_study

os.environ.setdefault(run.BATCH_START, str(time.time()))  # jobs say how much time is left
STUDIES = batch(config.get("study", "default"))
ASKED = {study: load_study(study) for study in STUDIES}
JOBS = [job for study in STUDIES if ASKED[study].kind == "cells" for job in jobs(study)]
TASKS = {(study, task): load_study(study, task=task) for study in STUDIES for task in ASKED[study].tasks}
BY_PLACE = {(job.study, job.task, job.arm, paths.part_name(job)): job for job in JOBS}
SHOWN = {"pseudobulk": "03_pseudobulk", "synthetic": "04_synthetic", "mixture": "04_synthetic"}  # train set: notebook
RESULTS = paths.RUNS / "{study}" / "results" / "answer.json"
FIGURES = paths.RUNS / "{study}" / "06_figures.done"
DONE = str(paths.RUNS / "{study}" / "{task}" / "NOTEBOOK.done")
EXECUTED = str(paths.RUNS / "{study}" / "{task}" / "NOTEBOOK.ipynb")
JOB = paths.RUNS / "{study}" / "{task}" / "{arm}" / "{part}.csv"
PYTHON = shlex.quote(sys.executable)
NAME = NAME_PATTERN.strip("^$")


localrules:  # seconds each, so not worth a job on a cluster
    all,
    collect,
    figures,
    page,


wildcard_constraints:
    study=NAME,
    task=NAME,
    arm=NAME,
    part=r"seeds[\d_-]+",
    notebook="|".join(run.WHOLE_STUDY.values()),


def parameters(section):
    """Return what a rule's results depend on, so that Snakemake makes them again when it changes."""
    return lambda wildcards: key(TASKS[wildcards.study, wildcards.task].keys(section))


def own_file(wildcards):
    """Return the files, or folder, of a study of own cells; one that is missing is explained by the notebook."""
    settings = TASKS[wildcards.study, wildcards.task]
    files = [paths.user_path(written) for written in (settings.path, settings.obs_table) if written]
    return [file for file in files if file.exists()]


def job_of(wildcards):
    """Return the settings of a job."""
    return BY_PLACE[wildcards.study, wildcards.task, wildcards.arm, wildcards.part]


def weights(wildcards):
    """Return the key of the checkpoint of a job, so that other weights in its folder have the job done again."""
    return fetch.checkpoint_key(job_of(wildcards).checkpoint)


def gpu(settings):
    """Return the GPU that a job on a cluster asks for; a profile names it with `config: [gres=gpu:1]`."""
    return str(config.get("gres", "gpu:1")) if settings.device == "cuda" else ""


def tables(study):
    """Return what proves that the jobs of a study have finished."""
    settings = ASKED[study]
    if settings.kind == "cells":
        return [str(JOB).format(study=study, task=job.task, arm=job.arm, part=paths.part_name(job))
                for job in JOBS if job.study == study]
    name = run.WHOLE_STUDY[settings.kind]
    return [DONE.replace("NOTEBOOK", name).format(study=study, task=task) for task in settings.tasks]


def tokens_of(settings):
    """Return what proves that the cells of a task are tokens: notebook 01 is enough where others made these."""
    return DONE.replace("NOTEBOOK", "01_qc" if paths.is_tokenized(settings) else "02_tokenize")


def tokens(wildcards):
    """Return what a job reads."""
    return tokens_of(TASKS[wildcards.study, wildcards.task])


def shown():
    """Return the notebooks that show the cells of the studies, and the made cells where there are some."""
    found = []
    for (name, task), settings in TASKS.items():
        kinds = {(own or {}).get("train_set", settings.train_set) for own in settings.arms.values()}
        notebooks = {SHOWN[kind] for kind in kinds if kind in SHOWN}
        found += [DONE.replace("NOTEBOOK", one).format(study=name, task=task) for one in sorted(notebooks)]
        found.append(tokens_of(settings).format(study=name, task=task))
    return found


rule all:
    input:
        paths.SITE / "index.html",


rule page:
    input:
        shown(),
        expand(FIGURES, study=STUDIES),
    output:
        paths.SITE / "index.html",
    params:
        studies=STUDIES,
    shell:
        "{PYTHON} -m tuneformer.report.page {params.studies:q}"


rule qc:
    input:
        own_file,
    output:
        touch(DONE.replace("NOTEBOOK", "01_qc")),
    params:
        key=parameters(CellsKeys),
    log:
        EXECUTED.replace("NOTEBOOK", "01_qc"),
    shell:
        "{PYTHON} -m tuneformer.run 01_qc {wildcards.study:q} -p task {wildcards.task:q}"


rule tokenize:
    input:
        DONE.replace("NOTEBOOK", "01_qc"),
    output:
        touch(DONE.replace("NOTEBOOK", "02_tokenize")),
    params:
        key=parameters(TokensKeys),
    log:
        EXECUTED.replace("NOTEBOOK", "02_tokenize"),
    shell:
        "{PYTHON} -m tuneformer.run 02_tokenize {wildcards.study:q} -p task {wildcards.task:q}"


rule made_cells:
    input:
        DONE.replace("NOTEBOOK", "02_tokenize"),
    output:
        touch(DONE.replace("NOTEBOOK", "{number}_{made}")),
    wildcard_constraints:
        number="03|04",
        made="pseudobulk|synthetic",
    params:
        key=parameters(TrainSetKeys),
    log:
        EXECUTED.replace("NOTEBOOK", "{number}_{made}"),
    shell:
        "{PYTHON} -m tuneformer.run {wildcards.number}_{wildcards.made} {wildcards.study:q} -p task {wildcards.task:q}"


rule job:
    input:
        tokens,
    output:
        # update: Snakemake deletes nothing before the job, so that one that ended just when the batch was killed is loaded.
        update(JOB),
    params:
        key=lambda wildcards: key(job_of(wildcards).keys(TrainingKeys), job_of(wildcards).seeds, weights(wildcards)),
        seeds=lambda wildcards: str(job_of(wildcards).seeds),
    threads: 1
    resources:
        gres=lambda wildcards: gpu(job_of(wildcards)),
    shell:
        "{PYTHON} -m tuneformer.run 05_finetune_strategies {wildcards.study:q} -p task {wildcards.task:q}"
        " -p arm {wildcards.arm:q} -p seeds {params.seeds:q} -p threads {threads}"


rule whole_study:
    input:
        tokens,
    output:
        touch(DONE.replace("NOTEBOOK", "{notebook}")),
    params:
        key=lambda wildcards: key(TASKS[wildcards.study, wildcards.task].model_dump()),
    log:
        EXECUTED.replace("NOTEBOOK", "{notebook}"),
    # all that Snakemake was given, so that nothing runs beside what measures speed; on a cluster what the profile says
    threads: workflow.resource_settings.cores or 1
    resources:
        gres=lambda wildcards: gpu(TASKS[wildcards.study, wildcards.task]),
    shell:
        "{PYTHON} -m tuneformer.run {wildcards.notebook:q} {wildcards.study:q} -p task {wildcards.task:q}"


rule collect:
    input:
        lambda wildcards: tables(wildcards.study),
    output:
        update(RESULTS),  # notebooks 07 and 08 write the answer of their study themselves
    shell:
        "{PYTHON} -m tuneformer.report.results collect {wildcards.study:q}"


rule figures:
    input:
        RESULTS,
    output:
        touch(FIGURES),
    log:
        paths.RUNS / "{study}" / "06_figures.ipynb",
    shell:
        "{PYTHON} -m tuneformer.run 06_figures {wildcards.study:q}"
