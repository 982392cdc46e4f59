"""A study of gene classes from end to end: strategies, baselines, and the same with permuted classes.

In: a study. Out: a `GeneStudy` with the scores of all genes by every method, and tables of how good they are: token by
token as published, and gene by gene.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.metrics import roc_curve

from tuneformer.data import preprocessing
from tuneformer.evaluate import gene_baselines
from tuneformer.evaluate.gene_scores import auc_difference, auc_interval, best_threshold, pair_auc
from tuneformer.finetune import genes
from tuneformer.finetune.genes import CELLS, CURVE_POINTS, GeneTask
from tuneformer.study.params import Study

NONE, PERMUTED = "none", "permuted"
CONTROL = "random_init"
RIVAL = "frozen_embedding"  # the baseline to which strategies are compared pair by pair: it has no context
COLUMNS = ("study", "task", "strategy", "control", "seed", "fold", "cells", "level", "metric", "value", "n")


@dataclass(frozen=True)
class GeneStudy:
    """What a study of gene classes found.

    ``scores``: one row a method, control, seed and gene, from the fold in which the gene was tested: strategy, control
    (none, permuted), seed (missing for baselines), fold, gene, class, target, ``context`` and ``other`` (score in
    either set of cells; a baseline has the first only), ``threshold``. ``folds``: one row a model that was trained:
    strategy, control, seed, fold, and for either set of cells ``auc:<cells>`` of the tokens and ``n:<cells>``.
    ``curves``: their ROC curves in the context cells, one column a row of ``folds``. ``permutations``: AUC of each
    baseline (columns) in each permutation. ``seconds``: what all of it took.
    """

    settings: Study
    task: GeneTask
    scores: pd.DataFrame
    folds: pd.DataFrame
    curves: np.ndarray
    permutations: pd.DataFrame
    seconds: float

    @property
    def strategies(self) -> list[str]:
        """The strategies, in the order of the study."""
        return list(self.settings.strategies)

    @property
    def methods(self) -> list[str]:
        """Strategies and then baselines."""
        return [*self.strategies, *gene_baselines.BASELINES]


def run_study(settings: Study) -> GeneStudy:
    """Run all strategies, seeds and folds of a study, its baselines, and the controls with permuted classes.

    The first strategy is trained again on permuted classes, with another permutation for each seed; each baseline is
    fitted to ``gene_permutations`` permutations. A fold that was trained before is loaded. Progress goes to stderr.

    Raises
    ------
    ValueError
        As `tuneformer.finetune.genes.prepare_genes`.
    ParameterError, TrainingFailed, CheckpointError
        As `tuneformer.finetune.genes.run_fold`.
    """
    start = time.perf_counter()
    task = genes.prepare_genes(settings)
    treated = [settings.treated(name) for name in settings.strategies]
    runs = [(run.model_copy(update={"seed": seed}), task) for run in treated for seed in settings.seeds]
    for seed in settings.seeds:
        runs.append((treated[0].model_copy(update={"seed": seed}), genes.permuted(settings, task, seed)))
    scores, rows, curves = [], [], []
    for run, asked in runs:
        sides = {"strategy": run.strategy, "control": _control(asked), "seed": float(run.seed)}
        for fold in range(settings.gene_folds):
            outcome = genes.run_fold(run, asked, fold)
            scores.append(_tested(asked, outcome.scores, fold).assign(**sides))
            judged = {f"{what}:{cells}": outcome.tokens[cells][what] for cells in CELLS for what in ("auc", "n")}
            rows.append({**sides, "fold": fold, **judged, **outcome.cost})
            curves.append(outcome.tokens["context"]["curve"])
    features = gene_baselines.features_of(settings, task, preprocessing.prepare_cells(settings))
    for name, values in features.items():
        table = gene_baselines.cross_validate(values, task).rename(columns={"score": "context"})
        scores.append(table.assign(strategy=name, control=NONE, seed=np.nan, other=np.nan))
    permutations = _permute(settings, task, features)
    columns = ["strategy", "control", "seed", "fold", "gene", "class", "target", *CELLS, "threshold"]
    return GeneStudy(
        settings=settings,
        task=task,
        scores=pd.concat(scores, ignore_index=True)[columns],
        folds=pd.DataFrame(rows),
        curves=np.array(curves).T,
        permutations=permutations,
        seconds=time.perf_counter() - start,
    )


def metrics_table(study: GeneStudy) -> pd.DataFrame:
    """Say how good each method is, as tidy rows with the columns `COLUMNS`.

    ``level`` token: every token of a test gene has one vote, as in the published figures; gene: every gene has one, the
    mean logit over its tokens. ``cells``: context (those of the training) or other. Rows with a fold are of one model;
    those with a seed but no fold are of one cross-validation; those with neither are of all seeds together. Metrics:
    ``auc``, at level gene `pair_auc`; ``auc:sd`` over folds and seeds; ``auc:low``, ``auc:high``, the bootstrap
    interval over genes; ``auc_minus:<method>`` with the same; ``permutation_p``, the share of permutations of a
    baseline that reach its AUC, itself counted; at the threshold ``accuracy``, ``balanced_accuracy`` and
    ``confusion:<true>:<called>`` (genes); ``genes:<which>:<class>`` (genes). For permuted baselines ``seed`` is the
    number of the permutation, and 95 % of the permutations lie between ``auc:low`` and ``auc:high``.
    """
    rows: list[dict] = []
    for (name, control), part in study.scores.groupby(["strategy", "control"], sort=False):
        rows += _gene_rows(name, control, part)
    for (name, control), part in study.folds.groupby(["strategy", "control"], sort=False):
        rows += _token_rows(name, control, part)
    rows += _difference_rows(study)
    for name in study.permutations:
        found = study.permutations[name]
        rows += [
            {"strategy": name, "control": PERMUTED, "seed": float(number), "cells": "context", "level": "gene",
             "metric": "auc", "value": value, "n": len(study.task.genes)}
            for number, value in found.items()
        ]  # fmt: skip
        observed = _mean_auc(study, name)
        p_value = (1 + (found >= observed).sum()) / (1 + len(found))
        ends = {"auc:low": found.quantile(0.025), "auc:high": found.quantile(0.975)}
        for control, metric, value in ((NONE, "permutation_p", p_value), *((PERMUTED, *end) for end in ends.items())):
            rows.append({"strategy": name, "control": control, "cells": "context", "level": "gene", "metric": metric,
                         "value": value, "n": len(found)})  # fmt: skip
    for which in study.task.counts:
        for label, number in study.task.counts[which].items():
            rows.append({"level": "gene", "metric": f"genes:{which}:{label}", "value": number, "n": number})
    table = pd.DataFrame(rows, columns=[column for column in COLUMNS if column not in ("study", "task")])
    table.insert(0, "study", study.settings.study)
    table.insert(1, "task", study.settings.task)
    return table


def answer_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Set the published measure beside the one that counts genes.

    Parameters
    ----------
    metrics
        From `metrics_table`.

    Returns
    -------
    One row a strategy or baseline: ``token AUC`` and its ``sd`` over folds; ``gene AUC`` with ``low`` and ``high``;
    ``gene AUC, other cells``; ``permuted``: the mean gene AUC with permuted classes; ``permuted, 95 %``: the range of
    95 % of the permutations, which is wider than an interval over genes, as it has other training genes each time;
    ``minus <rival>`` with its interval. NaN or empty where it was not measured.
    """
    whole = metrics[metrics["fold"].isna() & metrics["seed"].isna() & metrics["strategy"].notna()]
    rows = {}
    for name, part in whole.groupby("strategy", sort=False):
        value = part.set_index(["control", "cells", "level", "metric"])["value"]
        own = metrics[(metrics["strategy"] == name) & (metrics["control"] == PERMUTED) & metrics["fold"].isna()]
        permuted = own[(own["level"] == "gene") & (own["metric"] == "auc") & (own["cells"] == "context")]
        rows[name] = {
            "token AUC": value.get((NONE, "context", "token", "auc")),
            "sd": value.get((NONE, "context", "token", "auc:sd")),
            "gene AUC": value.get((NONE, "context", "gene", "auc")),
            "low": value.get((NONE, "context", "gene", "auc:low")),
            "high": value.get((NONE, "context", "gene", "auc:high")),
            "gene AUC, other cells": value.get((NONE, "other", "gene", "auc")),
            "permuted": permuted.loc[permuted["seed"].notna(), "value"].mean(),
            "permuted, 95 %": _range(
                *(value.get((PERMUTED, "context", "gene", f"auc:{end}")) for end in ("low", "high"))
            ),
        }
        for rival in (RIVAL, CONTROL):
            measured = [
                value.get((NONE, "context", "gene", f"auc_minus:{rival}{end}")) for end in ("", ":low", ":high")
            ]
            is_known = measured[0] is not None
            rows[name][f"minus {rival}"] = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*measured) if is_known else ""
    return pd.DataFrame.from_dict(rows, orient="index").astype(
        dict.fromkeys(("token AUC", "sd", "gene AUC", "gene AUC, other cells"), float)
    )


def confident_genes(study: GeneStudy, strategy: str, *, n: int = 10) -> pd.DataFrame:
    """List the genes with the highest and the lowest score; each was scored by models that did not learn its class.

    Models differ in how far they spread their logits, so a gene is ranked among the test genes of its fold, seed by
    seed; where two genes have the same mean rank, the mean logit decides.

    Returns
    -------
    `n` genes of either end, highest first: gene, class, fold, ``rank`` (share of the test genes of the fold with this
    score or a lower one, mean over seeds), ``probability`` of the positive class (of the mean logit over tokens and
    seeds), ``right``: whether the gene is of the class of its end, ``context_cells``.
    """
    part = study.scores[(study.scores["strategy"] == strategy) & (study.scores["control"] == NONE)]
    part = part.assign(rank=part.groupby(["seed", "fold"], dropna=False)["context"].rank(pct=True))
    table = part.groupby(["gene", "class", "target", "fold"], sort=False)[["rank", "context"]].mean().reset_index()
    table = table.sort_values(["rank", "context"], ascending=False)
    ends = pd.concat([table.head(n).assign(called=1), table.tail(n).assign(called=0)])
    ends["right"] = ends["target"] == ends["called"]
    ends["probability"] = expit(ends["context"])
    ends = ends.merge(study.task.genes[["gene", "context_cells"]], on="gene")
    return ends[["gene", "class", "fold", "rank", "probability", "right", "context_cells"]]


def confusion(study: GeneStudy, strategy: str) -> pd.DataFrame:
    """Count genes by class (rows) and called class (columns), summed over seeds."""
    part = study.scores[(study.scores["strategy"] == strategy) & (study.scores["control"] == NONE)]
    called = (part["context"] > part["threshold"]).astype(int).map(dict(enumerate(study.task.classes)))
    table = pd.crosstab(part["class"], called)
    return table.reindex(index=study.task.classes, columns=study.task.classes, fill_value=0)


def gene_curves(study: GeneStudy, strategy: str) -> np.ndarray:
    """Return the gene-level ROC curve of each fold and seed, (`CURVE_POINTS`, curves), as ``GeneStudy.curves``."""
    part = study.scores[(study.scores["strategy"] == strategy) & (study.scores["control"] == NONE)]
    grid = np.linspace(0, 1, CURVE_POINTS)
    curves = []
    for _, rows in part.groupby(["seed", "fold"], dropna=False):
        false, true, _ = roc_curve(rows["target"], rows["context"])
        curves.append(np.interp(grid, false, true))
    return np.array(curves).T


def token_curves(study: GeneStudy, strategy: str) -> np.ndarray:
    """Return the token-level ROC curve of each fold and seed, (`CURVE_POINTS`, curves)."""
    chosen = (study.folds["strategy"] == strategy) & (study.folds["control"] == NONE)
    return study.curves[:, chosen.to_numpy()]


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None else f"{low:.3f} to {high:.3f}"


def _control(task: GeneTask) -> str:
    return NONE if task.permutation is None else PERMUTED


def _tested(task: GeneTask, scores: pd.DataFrame, fold: int) -> pd.DataFrame:
    """Return the scores of the genes of a fold, with the threshold that its validation genes gave."""
    table = task.genes[["gene", "class", "target", "fold"]].merge(scores, on="gene", validate="1:1")
    chosen = table["part"] == "validation"
    threshold = best_threshold(table["context"][chosen].to_numpy(), table["target"][chosen].to_numpy())
    return table[table["part"] == "test"].assign(threshold=threshold, fold=fold)


def _permute(settings: Study, task: GeneTask, features: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the AUC of each baseline (columns) with permuted classes, one row a permutation."""
    rows = []
    for number in range(settings.gene_permutations):
        asked = genes.permuted(settings, task, number)
        tables = {name: gene_baselines.cross_validate(values, asked) for name, values in features.items()}
        rows.append({name: _auc_of(table, "score") for name, table in tables.items()})
        if (number + 1) % 25 == 0:
            print(f"baselines: {number + 1}/{settings.gene_permutations} permutations", file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def _auc_of(table: pd.DataFrame, column: str) -> float:
    return pair_auc(*(table[name].to_numpy() for name in (column, "target", "fold")))


def _arrays(part: pd.DataFrame, column: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the scores of each seed, and target and fold of the genes, all in the order of the genes' names."""
    by_seed = [rows.sort_values("gene") for _, rows in part.groupby("seed", dropna=False)]
    first = by_seed[0]
    return [rows[column].to_numpy() for rows in by_seed], first["target"].to_numpy(), first["fold"].to_numpy()


def _gene_rows(name: str, control: str, part: pd.DataFrame) -> list[dict]:
    rows = []
    for cells in CELLS:
        known = part.dropna(subset=[cells])
        if known.empty:
            continue
        sides = {"strategy": name, "control": control, "cells": cells, "level": "gene"}
        for (seed, fold), table in known.groupby(["seed", "fold"], dropna=False):
            value = _auc_of(table, cells)
            rows.append({**sides, "seed": seed, "fold": fold, "metric": "auc", "value": value, "n": len(table)})
        for seed, table in known.groupby("seed", dropna=False):
            if not np.isnan(seed):
                rows.append({**sides, "seed": seed, "metric": "auc", "value": _auc_of(table, cells), "n": len(table)})
            if control == NONE and cells == "context":
                rows += [{**sides, "seed": seed, **row, "n": len(table)} for row in _called_rows(table)]
        if control == NONE:
            found = auc_interval(*_arrays(part, cells))
            ends = {"auc": found.value, "auc:low": found.low, "auc:high": found.high}
            n_genes = known["gene"].nunique()
            rows += [{**sides, "metric": metric, "value": value, "n": n_genes} for metric, value in ends.items()]
    return rows


def _called_rows(table: pd.DataFrame) -> list[dict]:
    """Return the rows of one cross-validation at its thresholds."""
    classes = table.groupby("target")["class"].first().to_dict()
    called = (table["context"] > table["threshold"]).astype(int)
    right = called == table["target"]
    rows = [
        {"metric": "accuracy", "value": right.mean()},
        {"metric": "balanced_accuracy", "value": right.groupby(table["target"]).mean().mean()},
    ]
    counts = pd.crosstab(table["target"], called).reindex(index=[0, 1], columns=[0, 1], fill_value=0)
    return rows + [
        {"metric": f"confusion:{classes[true]}:{classes[found]}", "value": counts.loc[true, found]}
        for true in (0, 1)
        for found in (0, 1)
    ]


def _token_rows(name: str, control: str, part: pd.DataFrame) -> list[dict]:
    rows = []
    for cells in CELLS:
        sides = {"strategy": name, "control": control, "cells": cells, "level": "token"}
        values, n_tokens = part[f"auc:{cells}"], part[f"n:{cells}"]
        rows += [
            {**sides, "seed": run["seed"], "fold": run["fold"], "metric": "auc", "value": run[f"auc:{cells}"],
             "n": run[f"n:{cells}"]}
            for run in part.to_dict("records")
        ]  # fmt: skip
        rows += [
            {**sides, "metric": metric, "value": value, "n": n_tokens.sum()}
            for metric, value in {"auc": values.mean(), "auc:sd": values.std()}.items()
        ]
    return rows


def _difference_rows(study: GeneStudy) -> list[dict]:
    """Compare each strategy to the rival baseline and to the control without pre-training."""
    of = {
        name: study.scores[(study.scores["strategy"] == name) & (study.scores["control"] == NONE)]
        for name in study.methods
    }
    rows = []
    for name in study.strategies:
        for rival in (RIVAL, CONTROL):
            if rival not in of or rival == name:
                continue
            scores, target, fold = _arrays(of[name], "context")
            found = auc_difference(scores, _arrays(of[rival], "context")[0], target, fold)
            ends = {"": found.value, ":low": found.low, ":high": found.high}
            rows += [
                {"strategy": name, "control": NONE, "cells": "context", "level": "gene",
                 "metric": f"auc_minus:{rival}{end}", "value": value, "n": len(target)}
                for end, value in ends.items()
            ]  # fmt: skip
    return rows


def _mean_auc(study: GeneStudy, name: str) -> float:
    part = study.scores[(study.scores["strategy"] == name) & (study.scores["control"] == NONE)]
    return float(np.mean([_auc_of(rows, "context") for _, rows in part.groupby("seed", dropna=False)]))
