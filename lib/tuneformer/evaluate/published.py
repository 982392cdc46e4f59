"""Published numbers beside ours, wherever both exist.

In: ``assets/published.csv``, the numbers of the four published studies, and the runs and predictions of one of ours.
Out: a table with the published value and our mean with its interval for the same data set, task and treatment, and a
sentence. Published numbers are of real cells; beside scores on simulated cells none is shown.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import yaml

from tuneformer import paths
from tuneformer.evaluate.compare import arm_scores
from tuneformer.evaluate.resampling import Scored, score_tasks
from tuneformer.study import CellsKeys, Study, TrainingKeys, TrainSetKeys, load_study

FILE = paths.ASSETS / "published.csv"
AGREES, HIGHER, LOWER, UNCLEAR = "agrees", "ours is higher", "ours is lower", "unclear"
HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt}  # what is said of the published study's own score
DETAILS = {"group_spread", "padded_classes", "untreated_class", "synthetic_cells", "covariance_rank"}
DETAILS |= {"bulk_counts", "bulk_samples"}
MATCHED = [name for name in TrainSetKeys.model_fields if name not in {*CellsKeys.model_fields, *DETAILS}]
MATCHED += ["freeze_layers", "loss", "sampling", "batch_size"]
"""Keys in which an arm of ours has to agree with the published treatment, beside its strategy."""
KEYS = ["task", "strategy", "keys", "metric"]
COLUMNS = ["task", "arm", "metric", "relation", "published", "trials", "mean", "low", "high", "runs", "verdict"]


def read() -> pd.DataFrame:
    """Read the published numbers, one row each.

    Returns
    -------
    ``study``: the params file that repeats it with the published settings; ``task``; ``strategy``: one, or several
    (with blanks between) over which the published value is a mean; ``keys``: those of `MATCHED` that are not at their
    default; ``trial``: its number, missing where there is one; ``metric``; ``relation``: ``=``, or ``<``, ``<=``, ``>``
    for a bound; ``value`` (0 to 1); ``source``: study and place in it; ``note``: what that leaves open.
    """
    return pd.read_csv(FILE, dtype={"trial": "Int64"}, keep_default_na=False, na_values={"trial": ""})


def compare(settings: Study, runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Set each published value beside ours for the same data set, task and treatment.

    Returns
    -------
    One row for each published value of which a study of cells has runs: task, arm, metric, relation; published, the
    mean over its trials, and trials; mean, low, high (95 % interval of `tuneformer.evaluate.compare.arm_scores`) and
    runs of ours; source, note as in `read`. ``verdict``: ``agrees`` if the published value lies in our interval, or our
    interval keeps the published bound; ``ours is higher`` or ``ours is lower`` if not; ``unclear`` if the bound lies
    within the interval, or one run gives none. No row for simulated cells.
    """
    table = read()
    datasets = {name: load_study(name).dataset for name in table["study"].unique()}
    is_asked = (table["study"].map(datasets) == settings.dataset) & table["task"].isin(predictions["task"])
    rows = []
    for _, part in table[is_asked & (settings.kind == "cells")].groupby(["study", *KEYS, "relation"], sort=False):
        row = part.iloc[0].to_dict()
        keys = yaml.safe_load(f"{{{row['keys']}}}")
        arms = [arm_of(settings, strategy, keys) for strategy in row["strategy"].split()]
        of_task = predictions[(predictions["task"] == row["task"]) & predictions["arm"].isin(arms)]
        of_class = row["metric"].partition(":")[2]
        if set(of_task["arm"]) != set(arms) or (of_class and of_class not in set(of_task["label"])):
            continue
        scored = {row["task"]: _averaged(score_tasks(of_task, row["metric"], few=0)[row["task"]], arms)}
        n_train = runs.loc[(runs["task"] == row["task"]) & runs["arm"].isin(arms), "n_train"].mean()
        for ours in arm_scores(scored, n_train={(row["task"], "ours"): n_train}).to_dict("records"):
            n_runs = len(of_task[["arm", "seed", "fold"]].drop_duplicates()) // len(arms)
            row |= {**ours, "arm": ", ".join(arms), "published": part["value"].mean(), "trials": len(part)}
            rows.append(row | {"runs": n_runs, "verdict": _verdict(row)})
    return pd.DataFrame(rows, columns=[*COLUMNS, "study", "source", "note"])


def arm_of(settings: Study, strategy: str, keys: dict[str, object]) -> str | None:
    """Return the first arm of a study with a strategy and these values of `MATCHED`, defaults for those not given."""
    wanted = {name: keys.get(name, TrainingKeys.model_fields[name].default) for name in MATCHED}
    unread = set() if strategy == "selective" else {"freeze_layers"}
    for arm in settings.arms:
        own = settings.with_arm(arm)
        if own.strategy == strategy and all(getattr(own, name) == wanted[name] for name in {*MATCHED} - unread):
            return arm
    return None


def sentence(settings: Study, table: pd.DataFrame) -> str:
    """Say how many published values `compare` found beside ours, and how many agree; or why there are none."""
    if settings.simulated:
        return f"The cells of {settings.study} are simulated, and published numbers are of real cells: none is shown."
    if table.empty:
        return f"The four published studies have no number for the cells, tasks and arms of {settings.study}."
    counts = table["verdict"].value_counts()
    said = ", ".join(f"{counts[name]} {name}" for name in (AGREES, HIGHER, LOWER, UNCLEAR) if name in counts)
    return f"Published values beside ours, {len(table)}: {said} (agrees: in our 95 % interval, or a bound it keeps)."


def _averaged(found: Scored, arms: Sequence[str]) -> Scored:
    """Return the runs of one arm, ``ours``: the mean over some arms, seed by seed."""
    seeds = found.seeds(*arms)
    columns = np.array([[found.place[arm, seed] for arm in arms] for seed in seeds], int).reshape(-1, len(arms))
    values, drawn = (scores[:, columns].mean(axis=2) for scores in (found.values, found.drawn))
    return replace(found, place={("ours", seed): at for at, seed in enumerate(seeds)}, values=values, drawn=drawn)


def _verdict(row: dict) -> str:
    """Compare our interval with a published value or bound."""
    low, high, published = row["low"], row["high"], row["published"]
    if np.isnan(low):
        return UNCLEAR
    if row["relation"] == "=":
        return HIGHER if low > published else LOWER if high < published else AGREES
    kept = {HOLDS[row["relation"]](end, published) for end in (low, high)}
    if len(kept) == 2:
        return UNCLEAR
    return AGREES if kept == {True} else LOWER if row["relation"] == ">" else HIGHER
