"""What the variants of a compressed model are worth: size, memory, speed and score, each beside the uncompressed model.

In: what `tuneformer.finetune.compression.measure` measured. Out: one long table, the same for readers, the variants
that no other beats, and the answer in sentences.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from tuneformer.evaluate import comparisons
from tuneformer.evaluate.statistics import CONFIDENCE, with_interval
from tuneformer.finetune.compression import REFERENCE, Measured
from tuneformer.finetune.training import PROBABILITY
from tuneformer.study import paths
from tuneformer.study.params import Study

RATE, SPEED = "cells_per_second:", "speed:"
COLUMNS = ("study", "task", "train_set", "strategy", "seed", "variant", "metric", "value", "low", "high")
COLUMNS += ("n_test", "device", "fingerprint")
QUARTILES = (25, 75)


def compression_table(settings: Study, measured: Mapping[str, Measured]) -> pd.DataFrame:
    """Put together what was measured of each variant.

    Test cells (or whole groups of them) are drawn again with replacement, the same for every variant, and a variant is
    compared with `REFERENCE` on each draw. There is one model, so the intervals are about other test cells, not about
    other seeds.

    Returns
    -------
    One row a variant and metric: study, task, train_set, strategy, seed, variant, metric, value, low, high, n_test,
    device, fingerprint. The metrics:

    - ``file_bytes``, ``zipped_bytes``;
    - ``peak_memory_mb`` of the whole process, and ``model_memory_mb``, what loading and predicting added to it;
    - ``cells_per_second:<threads>``, and ``speed:<threads>``: times as fast as `REFERENCE`, by turns in one process
      (median; low and high are the quartiles of the repetitions);
    - ``accuracy``, ``macro_f1``, and their difference to `REFERENCE`, ``accuracy_difference``, ``macro_f1_difference``;
    - ``agreement``: share of the test cells for which it predicts the same class as `REFERENCE`.

    Low and high of the scores are 95 % percentile intervals over the draws.
    """
    rows = []
    for name, found in measured.items():
        rows += [(name, key, getattr(found, key)) for key in ("file_bytes", "zipped_bytes", "peak_memory_mb")]
        rows.append((name, "model_memory_mb", found.peak_memory_mb - found.import_memory_mb))
        for threads, rates in found.rates.items():
            ratios = np.divide(rates, found.reference_rates[threads])
            for metric, numbers in {RATE: rates, SPEED: ratios}.items():
                rows.append((name, f"{metric}{threads}", np.median(numbers), *np.percentile(numbers, QUARTILES)))
    rows += _scores({name: found.predictions for name, found in measured.items()})
    table = pd.DataFrame(rows, columns=["variant", "metric", "value", "low", "high"])
    table["variant"] = pd.Categorical(table["variant"], list(measured))
    table = table.sort_values("variant", kind="stable", ignore_index=True).astype({"variant": str, "value": float})
    keys = {key: getattr(settings, key) for key in ("study", "task", "train_set", "strategy", "seed")}
    table = table.assign(**keys, n_test=len(measured[REFERENCE].predictions))
    for key in ("device", "fingerprint"):
        table[key] = table["variant"].map({name: getattr(found, key) for name, found in measured.items()})
    return table[list(COLUMNS)]


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a variant and one column a metric."""
    return table.pivot(index="variant", columns="metric", values="value").loc[table["variant"].unique()]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text for a reader, one row a variant; MB are 10**6 bytes."""
    values = wide(table)
    shown = pd.DataFrame(index=values.index.rename("Variant"))
    for title, metric in {"File (MB)": "file_bytes", "Zipped (MB)": "zipped_bytes"}.items():
        shown[title] = [f"{number / 1e6:.2f}" for number in values[metric]]
    shown["Process (MB)"] = [f"{number:.0f}" for number in values["peak_memory_mb"]]
    shown["… by model (MB)"] = [f"{number:.0f}" for number in values["model_memory_mb"]]
    for rate in [metric for metric in table["metric"].unique() if metric.startswith(RATE)]:
        threads = rate.removeprefix(RATE)
        shown[f"Cells/s, {threads} thread{'s' * (threads != '1')}"] = [f"{number:,.0f}" for number in values[rate]]
        shown[f"Times {REFERENCE}, {threads}"] = [f"{number:.2f}" for number in values[f"{SPEED}{threads}"]]
    shown["Macro-F1"] = [f"{score:.3f}" for score in values["macro_f1"]]
    shown["Difference (95 % interval)"] = _intervals(table, "macro_f1_difference", sign="+")
    shown["Same prediction"] = [f"{share:.1%}" for share in values["agreement"]]
    return shown


def front(table: pd.DataFrame, metric: str, *, smaller: bool) -> list[str]:
    """Return the variants on the Pareto front: no other has as good a macro-F1 and a better `metric`, or the reverse.

    Parameters
    ----------
    table
        From `compression_table`.
    metric
        What it costs or gives, beside the macro-F1.
    smaller
        Whether less of it is better.
    """
    values = wide(table)
    cost, score = values[metric] * (1 if smaller else -1), values["macro_f1"]
    beaten = [((cost <= c) & (score >= s) & ((cost < c) | (score > s))).any() for c, s in zip(cost, score, strict=True)]
    return list(values.index[~np.array(beaten)])


def clearly_worse(table: pd.DataFrame) -> list[str]:
    """Return the variants whose macro-F1 is below that of `REFERENCE` with the whole 95 % interval."""
    rows = table[(table["metric"] == "macro_f1_difference") & (table["high"] < 0)]
    return list(rows["variant"])


def sentences(table: pd.DataFrame) -> list[str]:
    """Say which variant is smallest, which fastest, and what the memory goes to; those clearly worse are left out."""
    values, worse = wide(table), clearly_worse(table)
    kept = values.drop(index=[*worse, REFERENCE], errors="ignore")
    own = values.loc[REFERENCE]
    said = []
    if worse:
        said.append(f"Clearly worse than {REFERENCE} in macro-F1: {', '.join(worse)}.")
    if len(kept):
        intervals = dict(zip(values.index, _intervals(table, "macro_f1_difference", sign="+"), strict=True))
        small = kept["file_bytes"].idxmin()
        said.append(
            f"Of the others {small} has the smallest file: {kept.loc[small, 'file_bytes'] / 1e6:.2f} MB, "
            f"{kept.loc[small, 'file_bytes'] / own['file_bytes']:.0%} of {REFERENCE}; difference in macro-F1 "
            f"{intervals[small]}."
        )
        fast = kept[f"{SPEED}1"].idxmax()
        said.append(
            f"On one thread {fast} is the fastest of them, {kept.loc[fast, f'{SPEED}1']:.2f} times as fast as "
            f"{REFERENCE}; difference in macro-F1 {intervals[fast]}."
        )
    lean, before = values["peak_memory_mb"].idxmin(), own["peak_memory_mb"] - own["model_memory_mb"]
    said.append(
        f"The process that takes the least memory is that of {lean}, {values.loc[lean, 'peak_memory_mb']:.0f} MB; that "
        f"of {REFERENCE} takes {own['peak_memory_mb']:.0f} MB, {before / own['peak_memory_mb']:.0%} of them before the "
        "model is loaded."
    )
    return said


def write_table(settings: Study, table: pd.DataFrame) -> str:
    """Write ``results/<study>/compression.csv``; return its path below the repository."""
    target = paths.results_dir(settings.study) / "compression.csv"
    paths.write_text(target, table.to_csv(index=False, lineterminator="\n"))
    return f"results/{settings.study}/{target.name}"


def _intervals(table: pd.DataFrame, metric: str, *, sign: str) -> list[str]:
    rows = table[table["metric"] == metric]
    return [with_interval(*row, sign=sign) for row in rows[["value", "low", "high"]].itertuples(index=False)]


def _scores(predictions: dict[str, pd.DataFrame]) -> list[tuple[str, str, float, float, float]]:
    """Return variant, metric, value, low and high of all scores."""
    first = predictions[REFERENCE]
    groups = first.set_index("cell")["group"] if "group" in first else None
    classes = [column for column in first if column.startswith(PROBABILITY)]
    chosen = first[classes].idxmax(axis=1).str.removeprefix(PROBABILITY)
    rows = []
    for metric, score in {**comparisons.SCORES, "agreement": comparisons.accuracy}.items():
        runs = {
            name: {0: part.assign(label=chosen) if metric == "agreement" else part}
            for name, part in predictions.items()
        }
        drawn = comparisons.bootstrap_scores(runs, score=score, groups=groups)
        own = list(predictions).index(REFERENCE)
        for place, (name, value) in enumerate(zip(drawn.runs["arm"], drawn.runs["value"], strict=True)):
            rows.append((name, metric, value, *_percentiles(drawn.drawn[:, place])))
            if metric != "agreement":
                change = drawn.drawn[:, place] - drawn.drawn[:, own]
                difference = value - drawn.runs["value"][own]
                rows.append((name, f"{metric}_difference", difference, *_percentiles(change)))
    return rows


def _percentiles(values: np.ndarray) -> np.ndarray:
    outside = (1 - CONFIDENCE) / 2
    return np.quantile(values, [outside, 1 - outside])
