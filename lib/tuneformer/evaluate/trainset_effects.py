"""What the cells that a model was trained on did to its scores: pseudo-bulk, synthetic cells, mixtures, and controls.

In: rows of ``metrics.csv``. Out: tables of scores and of differences paired by seed, with 95 % t intervals over seeds,
and what they say in sentences. A train set that the study does not have, or whose runs failed, is left out.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from tuneformer.evaluate import learning_curves, statistics
from tuneformer.evaluate.learning_curves import BASELINE
from tuneformer.evaluate.statistics import SCORES, with_interval
from tuneformer.study.train_sets import AGGREGATIONS, GENERATORS, parse
from tuneformer.study.treatments import BASELINES

PARTS = ("fewer steps", "fewer points", "averaging", "depth and length")
WHOLE = "whole fall"
FOLLOW_UPS = {
    "boosted": "With single cells added to the validation set",
    "steps": "With as many optimizer steps as all single cells would get",
    "capped": "With token lists cut to the length of single cells",
}
ALONE = "This study compares no pseudo-bulk, synthetic cells or mixtures."

_RUNS = ["task", "strategy"]
_KEYS = [*_RUNS, "metric"]
_RECALL = "recall:"
_JUDGED = "macro_f1"
_VERDICTS = ("clearly lower", "clearly higher", "not clearly different", "known for one seed only, without a verdict,")


def strategy_rows(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in which strategies are compared: all single cells, or the most of a learning curve, or all."""
    names = pd.Series(metrics["train_set"].unique())
    few = names[[parse(name).amount == "n" for name in names]]
    most = max(few, key=lambda name: parse(name).number, default=None)
    chosen = BASELINE if BASELINE in set(names) else most
    return metrics if chosen is None else metrics[metrics["train_set"] == chosen]


def varied(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of those strategies that a task trains on more than one train set, and of the linear baseline."""
    metrics = metrics[~metrics["strategy"].isin({*BASELINES} - {statistics.LINEAR})]
    return metrics[metrics.groupby(_RUNS)["train_set"].transform("nunique") > 1]


def compares_strategies(metrics: pd.DataFrame) -> bool:
    """Return whether `strategy_rows` hold something to compare; not so where the study varies the train set alone."""
    fine_tuned = strategy_rows(metrics[~metrics["strategy"].isin(BASELINES)])
    return metrics["train_set"].nunique() == 1 or statistics.with_arms(fine_tuned)["arm"].nunique() > 1


def needs_name(strategy: str, metrics: pd.DataFrame) -> bool:
    """Return whether a result has to name its strategy: a baseline, or one of several fine-tuning strategies."""
    return strategy in BASELINES or len(set(metrics["strategy"]) - set(BASELINES)) > 1


def series(train_set: str) -> str:
    """Return the name of the line to which a train set belongs when k varies, such as ``sum, thinned``."""
    said = parse(train_set)
    if said.kind == "single_cell":
        return {None: "single cells", "points": "N/k single cells", "steps": "steps of N/k single cells"}[said.control]
    return ", ".join(filter(None, [said.aggregation, said.control]))


def first_aggregation(train_sets: Iterable[str]) -> str | None:
    """Return the aggregation that stands for all three, which are the same to the model: the first the study has."""
    used = {said.aggregation for said in map(parse, train_sets) if said.control is None}
    return next((name for name in AGGREGATIONS if name in used), None)


def scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over seeds of every score and recall of every train set.

    Returns
    -------
    task, strategy, metric (accuracy, macro_f1, recall:<class>), train_set; mean, sd, low, high (95 % interval) and n,
    the number of seeds. NaN where one seed gives no interval.
    """
    rows = [
        {**keys, "train_set": name, **statistics.interval(values, overlap=overlap)._asdict()}
        for keys, by_seed, overlap in _groups(metrics)
        for name, values in by_seed.items()
        if values.notna().any()
    ]
    return pd.DataFrame(rows, columns=[*_KEYS, "train_set", "mean", "sd", "low", "high", "n"])


def differences(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return what a train set scores beyond another one, paired by seed.

    Every train set is compared with all single cells; a changed one (boosted, capped, steps, thinned, untreated) also
    with the unchanged one; one padded with synthetic cells also with one padded with copies of real cells.

    Returns
    -------
    task, strategy, metric (as `scores`), train_set, against; difference (score of train_set - score of against), low,
    high (95 % interval) and n, the number of seeds that both have.
    """
    rows = [
        {**keys, "train_set": name, "against": against, **_difference(by_seed[name], by_seed[against], overlap)}
        for keys, by_seed, overlap in _groups(metrics)
        for name in by_seed
        for against in _controls(name)
        if against in by_seed and (by_seed[name] - by_seed[against]).notna().any()
    ]
    return pd.DataFrame(rows, columns=[*_KEYS, "train_set", "against", "difference", "low", "high", "n"])


def decline(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and macro-F1 against k, the mean number of cells behind a point.

    Returns
    -------
    The columns of `scores`, with series (see `series`), k (1 for all single cells), and difference, difference_low,
    difference_high to all single cells. Empty for tasks and strategies without a train set that has a k.
    """
    table = _beside_baseline(metrics, scores(metrics))
    table = table[table["metric"].isin(SCORES)]
    k = [1 if name == BASELINE else parse(name).k for name in table["train_set"]]
    table = table.assign(k=pd.array(k, dtype="Int64")).dropna(subset="k")
    table.insert(3, "series", [series(name) for name in table["train_set"]])
    table.insert(4, "k", table.pop("k").astype(int))
    varies = table.groupby(_RUNS)["k"].transform("max") > 1
    return table[varies].reset_index(drop=True)


def decomposition(metrics: pd.DataFrame) -> pd.DataFrame:
    """Divide the fall from single cells to pseudo-bulk (sum) at each k into four parts that add up to it.

    The parts are the steps of one path, each of which changes one thing::

        single_cell             all N cells, all steps
          - fewer steps ->      single_cell_k<k>_steps         all N cells, the steps of N/k points
          - fewer points ->     single_cell_k<k>               N/k cells, the steps of N/k points
          - averaging ->        pseudobulk_k<k>_sum_thinned    N/k groups at the depth of single cells
          - depth and length -> pseudobulk_k<k>_sum            N/k groups at full depth, with longer token lists

    A path's parts depend on its order: had the points been taken before the steps, both parts could be others, because
    what one thing costs depends on the rest. Only the whole does not.

    Returns
    -------
    task, strategy, metric, k, part (`PARTS`, then `WHOLE`), fall (score before - score after; negative is a gain), low,
    high (95 % interval of the mean over seeds) and n, the number of seeds that all five train sets have: the same seeds
    for each part, so that the parts add up. A k that misses one of the five is left out.
    """
    rows = []
    for keys, by_seed, overlap in _groups(metrics):
        if keys["metric"] not in SCORES:
            continue
        for k in sorted({said.k for said in map(parse, by_seed) if said.k}):
            path = [
                BASELINE,
                f"single_cell_k{k}_steps",
                f"single_cell_k{k}",
                f"pseudobulk_k{k}_sum_thinned",
                f"pseudobulk_k{k}_sum",
            ]
            if not set(path) <= set(by_seed):
                continue
            complete = by_seed[path].dropna()
            if complete.empty:
                continue
            stages = [*zip(PARTS, path[:-1], path[1:], strict=True), (WHOLE, path[0], path[-1])]
            for part, before, after in stages:
                found = _difference(complete[before], complete[after], overlap)
                rows.append({**keys, "k": k, "part": part, "fall": found.pop("difference"), **found})
    return pd.DataFrame(rows, columns=[*_KEYS, "k", "part", "fall", "low", "high", "n"])


def aggregations(metrics: pd.DataFrame) -> pd.DataFrame:
    """Compare the spread between sum, mean and approximate mean with the spread between seeds.

    For the same groups the three give the same tokens, so they can differ only by the draw of the groups and by noise
    in training. The test is an analysis of variance with the seeds as blocks.

    Returns
    -------
    task, strategy, metric, k; between (standard deviation of the three means), expected (what noise alone leads to),
    seeds (standard deviation between the seeds of one aggregation), p, and n, the number of seeds that all three have.
    One row per k that has all three and at least two such seeds. p is 1 where the three agree in every seed.
    """
    rows = []
    for keys, by_seed, _ in _groups(metrics):
        if keys["metric"] not in SCORES:
            continue
        for k in sorted({said.k for said in map(parse, by_seed) if said.k}):
            names = [f"pseudobulk_k{k}_{name}" for name in AGGREGATIONS]
            values = by_seed.reindex(columns=names).dropna()
            if len(values) > 1:
                rows.append({**keys, "k": k, **_blocked_test(values), "n": len(values)})
    return pd.DataFrame(rows, columns=[*_KEYS, "k", "between", "expected", "seeds", "p", "n"])


def compared(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return `scores` with their `differences` beside them.

    Returns
    -------
    The columns of `scores`, then against and difference, difference_low, difference_high. A train set has a row per
    comparison of `differences`, that with `BASELINE` first; without any, one row with NaN.
    """
    pairs = differences(metrics).rename(columns={"low": "difference_low", "high": "difference_high"})
    return scores(metrics).merge(pairs.drop(columns="n"), on=[*_KEYS, "train_set"], how="left")


def per_class(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the recall of each class for every train set, and its differences paired by seed.

    Returns
    -------
    task, strategy, class, train_set, recall, and the other columns of `compared`.
    """
    table = compared(metrics)
    table = table[table["metric"].str.startswith(_RECALL)].rename(columns={"mean": "recall"})
    table.insert(2, "class", table.pop("metric").str.removeprefix(_RECALL))
    return table.reset_index(drop=True)


def shares(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and macro-F1 against the percentage of the training cells that are synthetic.

    Returns
    -------
    The columns of `scores`, with generator, percent (0: all single cells; 100: synthetic cells alone), and difference,
    difference_low, difference_high to all single cells. Only generators of which the study has a share between.
    """
    table = _beside_baseline(metrics, scores(metrics))
    table = table[table["metric"].isin(SCORES)]
    said = [parse(name) for name in table["train_set"]]
    mixed = [one.number if one.amount == "share" else np.nan for one in said]
    parts = []
    for generator in GENERATORS:
        percent = pd.Series(mixed, index=table.index).where([one.generator == generator for one in said])
        percent = percent.mask(table["train_set"] == BASELINE, 0).mask(
            table["train_set"] == f"synthetic_{generator}", 100
        )
        part = table.assign(generator=generator, percent=percent).dropna(subset="percent")
        varies = part.groupby(_RUNS)["percent"].transform(lambda values: values.between(1, 99).any())
        parts.append(part[varies.astype(bool)].sort_values([*_KEYS, "percent"], kind="stable"))
    found = pd.concat(parts, ignore_index=True)
    for place, column in enumerate(["generator", "percent"]):
        found.insert(3 + place, column, found.pop(column))
    return found.astype({"percent": int})


def sentences(metrics: pd.DataFrame) -> dict[str, list[str]]:
    """Say in words what the train sets did, task by task, the main finding first; {} where there is nothing to compare.

    Clear means that the 95 % interval of the paired difference does not include zero. The score is macro-F1.
    """
    said = learning_curves.sentences(metrics)
    metrics = varied(metrics[~learning_curves.has_few(metrics)])
    for (task, strategy), rows in metrics.groupby(_RUNS, sort=False):
        texts = _of_one_strategy(rows)
        said.setdefault(task, []).extend(
            [f"{strategy}: {text}" for text in texts] if needs_name(strategy, metrics) else texts
        )
    return {task: texts for task, texts in said.items() if texts}


def lines(metrics: pd.DataFrame) -> list[str]:
    """Return `sentences` as one list, each with its task; `ALONE` where there is nothing to compare."""
    return [f"{task}: {text}" for task, texts in sentences(metrics).items() for text in texts] or [ALONE]


def _groups(metrics: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame, float]]:
    """Yield task, strategy and metric with the values, (runs, train sets), in the order of the rows, and the overlap.

    A run is a seed, or a seed and fold; for the overlap of folds see `statistics.interval`.
    """
    is_score = metrics["metric"].isin(SCORES) | metrics["metric"].str.startswith(_RECALL)
    for key, rows in metrics[is_score].groupby(_KEYS, sort=False):
        by_run = statistics.by_run(rows, "train_set")[list(dict.fromkeys(rows["train_set"]))]
        yield dict(zip(_KEYS, key, strict=True)), by_run, statistics.overlap(rows)


def _controls(name: str) -> list[str]:
    """Return the train sets with which `name` is compared."""
    said = parse(name)
    against = [] if name == BASELINE else [BASELINE]
    if said.kind != "single_cell" and said.control:
        against.append(name.removesuffix(f"_{said.control}"))
    if said.amount == "pad" and said.generator != "copies":
        against.append(f"mixture_copies_pad{said.number}")
    return against


def _difference(a: pd.Series, b: pd.Series, overlap: float) -> dict[str, float]:
    found = statistics.interval(a - b, overlap=overlap)
    return {"difference": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _beside_baseline(metrics: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Add the differences to all single cells to rows of `scores`."""
    pairs = differences(metrics)
    pairs = pairs[pairs["against"] == BASELINE].drop(columns=["against", "n"])
    pairs = pairs.rename(columns={"low": "difference_low", "high": "difference_high"})
    return table.merge(pairs, on=[*_KEYS, "train_set"], how="left")


def _blocked_test(values: pd.DataFrame) -> dict[str, float]:
    """Test whether columns differ by more than noise; `values` is (seeds, columns)."""
    seeds, columns = values.shape
    means = values.mean()
    left = values.sub(values.mean(axis=1), axis=0).sub(means - means.mean(), axis=1)  # (seeds, columns)
    noise = float((left**2).to_numpy().sum() / ((seeds - 1) * (columns - 1)))
    found = {"between": means.std(), "expected": np.sqrt(noise / seeds), "seeds": np.sqrt(values.var().mean())}
    if (values.nunique(axis=1) == 1).all():
        return found | {"between": 0.0, "expected": 0.0, "p": 1.0}
    ratio = seeds * means.var() / noise if noise > 0 else np.inf
    return found | {"p": float(stats.f.sf(ratio, columns - 1, (seeds - 1) * (columns - 1)))}


def _of_one_strategy(metrics: pd.DataFrame) -> list[str]:
    """Return the sentences on one task and one strategy."""
    means = scores(metrics)
    means = means[means["metric"] == _JUDGED].set_index("train_set")
    pairs = differences(metrics)
    judged = pairs[pairs["metric"] == _JUDGED].reset_index(drop=True)
    said = pd.DataFrame([vars(parse(name)) for name in judged["train_set"]], columns=list(vars(parse(BASELINE))))
    judged = judged.join(said)
    to_baseline = judged[judged["against"] == BASELINE]
    return [
        *_on_bulk(means, to_baseline),
        *_on_pseudobulk(metrics, means, judged, to_baseline),
        *_on_mixtures(pairs, judged, to_baseline),
        *_on_synthetic(metrics, means, judged, to_baseline),
    ]


def _on_bulk(means: pd.DataFrame, to_baseline: pd.DataFrame) -> Iterator[str]:
    is_bulk = (to_baseline["kind"] == "bulk") | (to_baseline["control"] == "bulk")
    beside = to_baseline["control"] == "untreated"  # the same synthetic cells around the means of single cells
    rows = to_baseline[is_bulk | beside] if is_bulk.any() else to_baseline[is_bulk]
    yield from _compared(
        f"Trained on bulk samples, or on synthetic cells alone, instead of single cells{_score_of(means, BASELINE)}",
        rows,
        "{train_set}",
    )


def _on_pseudobulk(
    metrics: pd.DataFrame, means: pd.DataFrame, judged: pd.DataFrame, to_baseline: pd.DataFrame
) -> Iterator[str]:
    bulk = judged[judged["kind"] == "pseudobulk"].sort_values("k", kind="stable")
    name = first_aggregation(metrics["train_set"].unique())
    plain = bulk[(bulk["against"] == BASELINE) & (bulk["aggregation"] == name) & bulk["control"].isna()]
    yield from _compared(
        f"Trained on pseudo-bulk ({name}) instead of single cells{_score_of(means, BASELINE)}", plain, "k = {k:.0f}"
    )
    parts = decomposition(metrics)
    yield from _on_parts(parts[parts["metric"] == _JUDGED])
    for control, text in FOLLOW_UPS.items():
        changed = bulk[(bulk["control"] == control) & (bulk["against"] != BASELINE)]
        yield from _compared(f"{text}, against the same without it", changed, "k = {k:.0f} {aggregation}")
    spread = aggregations(metrics)
    yield from _on_aggregations(spread[spread["metric"] == _JUDGED])


def _on_parts(parts: pd.DataFrame) -> Iterator[str]:
    if parts.empty:
        return
    last = parts[parts["k"] == parts["k"].max()]
    texts = {row.part: with_interval(row.fall, row.low, row.high) for row in last.itertuples()}
    whole = texts.pop(WHOLE)
    listed = ", ".join(f"{part} {text}" for part, text in texts.items())
    yield f"At k = {last['k'].iloc[0]} the whole fall, {whole}, divides into {listed}; a negative part is a gain."
    if parts["low"].isna().any():
        return
    for word, is_clear in {"cost": parts["low"] > 0, "gain": parts["high"] < 0}.items():
        clear = parts[is_clear & (parts["part"] != WHOLE)]
        at = {part: _listed(clear.loc[clear["part"] == part, "k"]) for part in PARTS}
        said = "; ".join(f"{part} at k = {ks}" for part, ks in at.items() if ks)
        yield f"Over the {_counted(parts['k'].nunique(), 'value')} of k, a clear {word}: {said or 'no part at any k'}."


def _on_aggregations(spread: pd.DataFrame) -> Iterator[str]:
    if spread.empty:
        return
    widest = spread.loc[spread["between"].idxmax()]
    corrected = min(1.0, spread["p"].min() * len(spread))  # Bonferroni: the smallest of several p
    verdict = "more than noise explains" if corrected < 1 - statistics.CONFIDENCE else "no more than noise explains"
    yield (
        f"Sum, mean and approximate mean differ {verdict}: smallest p over {_counted(len(spread), 'value')} of k, "
        f"corrected for their number, {corrected:.2f}. The standard deviation of the three means is largest at "
        f"k = {widest['k']}, {widest['between']:.3f}; noise alone leads to {widest['expected']:.3f}, and the seeds of "
        f"one aggregation differ by {widest['seeds']:.3f}."
    )


def _on_synthetic(
    metrics: pd.DataFrame, means: pd.DataFrame, judged: pd.DataFrame, to_baseline: pd.DataFrame
) -> Iterator[str]:
    plain = to_baseline[(to_baseline["kind"] == "synthetic") & to_baseline["control"].isna()]
    yield from _compared(
        f"Trained on synthetic cells alone instead of single cells{_score_of(means, BASELINE)}", plain, "{generator}"
    )
    generators = [f"synthetic_{name}" for name in GENERATORS if f"synthetic_{name}" in means.index]
    if len(generators) > 1:
        best, second = means.loc[generators, "mean"].sort_values(ascending=False, kind="stable").index[:2]
        runs = metrics[metrics["metric"] == _JUDGED]
        values = statistics.by_run(runs, "train_set")
        if (values[best] - values[second]).notna().any():
            lead = _difference(values[best], values[second], statistics.overlap(runs))
            how = "it leads" if lead["low"] > 0 else "it has no clear lead over"
            shown = with_interval(lead["difference"], lead["low"], lead["high"], sign="+")
            yield (
                f"Of the generators, {parse(best).generator} scores highest{_score_of(means, best)}; "
                f"{how} {parse(second).generator}: {shown}."
            )
    untreated = judged[(judged["control"] == "untreated") & (judged["against"] != BASELINE)]
    yield from _compared(
        "With variances from untreated cells only, against variances from the labelled cells", untreated, "{generator}"
    )


def _on_mixtures(pairs: pd.DataFrame, judged: pd.DataFrame, to_baseline: pd.DataFrame) -> Iterator[str]:
    padded = judged[judged["amount"] == "pad"]
    to_copies = padded[padded["against"] != BASELINE]
    label = "{generator} +{number:.0f}"
    yield from _compared("Padded with synthetic cells instead of copies of real cells", to_copies, label)
    yield from _compared("Padded instead of left alone", padded[padded["against"] == BASELINE], label)
    for generator in GENERATORS:
        share = to_baseline[(to_baseline["amount"] == "share") & (to_baseline["generator"] == generator)]
        share = share.sort_values("number", kind="stable")
        yield from _compared(f"With a share of the cells replaced by {generator} cells", share, "{number:.0f} %")
    recalls = pairs[pairs["metric"].str.startswith(_RECALL) & pairs["train_set"].isin(padded["train_set"])]
    against_copies = recalls["against"] != BASELINE
    yield from _on_recalls("copies of real cells", recalls[against_copies])
    yield from _on_recalls("no padding", recalls[~against_copies])


def _on_recalls(against: str, recalls: pd.DataFrame) -> Iterator[str]:
    known = recalls.dropna(subset=["low", "high"])
    if known.empty:
        return
    clear = known[(known["low"] > 0) | (known["high"] < 0)]
    items = ", ".join(
        f"{row.metric.removeprefix(_RECALL)} with {row.train_set} "
        f"{with_interval(row.difference, row.low, row.high, sign='+')}"
        for row in clear.itertuples()
    )
    yield (
        f"Recall of a class, padded against {against}: clearly other in {len(clear)} of "
        f"{_counted(len(known), 'comparison')} (chance alone makes one in twenty){': ' if items else ''}{items}."
    )


def _compared(subject: str, rows: pd.DataFrame, label: str) -> Iterator[str]:
    """Say which of the differences in `rows` are clear; `label` names a row by its columns."""
    if rows.empty:
        return
    found: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for row in rows.itertuples():
        shown = with_interval(row.difference, row.low, row.high, sign="+")
        found[_verdict(row)].append(f"{label.format(**row._asdict())}: {shown}")
    said = "; ".join(f"{verdict} for {', '.join(items)}" for verdict, items in found.items() if items)
    yield f"{subject}, macro-F1 is {said}."


def _verdict(row: Any) -> str:
    lower, higher, unclear, alone = _VERDICTS
    if np.isnan(row.low):
        return alone
    return lower if row.high < 0 else higher if row.low > 0 else unclear


def _score_of(means: pd.DataFrame, train_set: str) -> str:
    if train_set not in means.index:
        return ""
    row = means.loc[train_set]
    return f", {with_interval(row['mean'], row['low'], row['high'])}"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
