"""What tuning changed: the published setting, one learning rate for all strategies, beside the tuned one.

In: rows of ``metrics.csv`` of a study and of its tuned copy (`tuneformer.finetune.tuning`). Out: one row per task and
strategy with both means, their 95 % intervals over seeds, and the difference paired by seed.
"""

import numpy as np
import pandas as pd

from tuneformer.evaluate.statistics import Interval, interval, with_interval
from tuneformer.study.params import load_study
from tuneformer.study.treatments import BASELINES

_KEYS = ["task", "train_set", "strategy"]
_SIDE = ["learning_rate", "freeze_layers", "macro_f1", "low", "high", "seeds"]
_PAIRED = ["difference", "difference_low", "difference_high", "pairs"]
_COLUMNS = [*_KEYS, *_SIDE, *(f"tuned_{name}" for name in _SIDE), *_PAIRED]
_UNKNOWN = Interval(np.nan, np.nan, np.nan, np.nan, 0)


def comparison(metrics: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Set the test macro-F1 of a study beside that of its tuned copy.

    Both are scored on the same test cells, and runs of one seed share training cells, head and order, so differences
    are paired by seed.

    Parameters
    ----------
    metrics, tuned
        Rows of ``metrics.csv`` of the study and of ``<study>_tuned``; none where it has no tuned copy.

    Returns
    -------
    One row for each task, train set and strategy of which both have runs, in the order of `metrics`; baselines, which
    are tuned in either, are left out. Of the study: ``learning_rate``, ``freeze_layers`` (missing but for
    ``selective``), ``macro_f1``, ``low``, ``high`` (95 % interval) and ``seeds``; the same of its copy as
    ``tuned_...``; ``difference`` (tuned - published), ``difference_low``, ``difference_high`` and ``pairs``, the number
    of seeds that both have. NaN where no run has a score, or one seed gives no interval.

    Raises
    ------
    ParameterError
        The params file of one of the two studies is missing or cannot be used.
    """
    sides = [_scores(metrics), _scores(tuned)]
    names = [table["study"].iloc[0] for table in (metrics, tuned) if len(table)]
    rows = [
        dict(zip(_KEYS, key, strict=True)) | _row(key, [side[key] for side in sides], names)
        for key in sides[0]
        if key in sides[1]
    ]
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"freeze_layers": "Int64", "tuned_freeze_layers": "Int64"})


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return `comparison` as text for a reader: rounded, with intervals."""
    pairs = {"One rate for all": "", "Tuned": "tuned_"}
    shown = table[["task", "strategy"]].rename(columns={"task": "Task", "strategy": "Strategy"})
    for title, prefix in pairs.items():
        shown[f"{title}: rate"] = [f"{rate:.3g}" for rate in table[f"{prefix}learning_rate"]]
        values = table[[f"{prefix}macro_f1", f"{prefix}low", f"{prefix}high"]]
        shown[f"{title}: macro-F1"] = [with_interval(*row) for row in values.itertuples(index=False)]
    paired = table[["difference", "difference_low", "difference_high"]].itertuples(index=False)
    shown["Difference (95 % interval)"] = [with_interval(*row, sign="+") for row in paired]
    return shown.set_index(["Task", "Strategy"])


def _scores(metrics: pd.DataFrame) -> dict[tuple[str, str, str], pd.Series]:
    """Return the macro-F1 by seed of each task, train set and strategy; empty where all runs failed."""
    rows = metrics[~metrics["strategy"].isin(BASELINES)]
    return {
        key: part[part["metric"] == "macro_f1"].set_index("seed")["value"].dropna()
        for key, part in rows.groupby(_KEYS, sort=False)
    }


def _row(key: tuple[str, str, str], scores: list[pd.Series], names: list[str]) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = {}
    for prefix, name, values in zip(("", "tuned_"), names, scores, strict=True):
        settings = load_study(name, task=key[0], strategy=key[2])
        depth = settings.freeze_layers if settings.base_strategy == "selective" else None
        found = _interval(values)
        side = [settings.peak_learning_rate, depth, found.mean, found.low, found.high, found.n]
        row |= {f"{prefix}{column}": value for column, value in zip(_SIDE, side, strict=True)}
    published, tuned = scores
    found = _interval((tuned - published).dropna())
    return row | dict(zip(_PAIRED, [found.mean, found.low, found.high, found.n], strict=True))


def _interval(values: pd.Series) -> Interval:
    return interval(values) if len(values) else _UNKNOWN
