"""Scores of the runs of a task on its test cells and on test cells drawn again, and what they say of a mean.

In: rows of ``predictions.parquet``. Out: `Scored`, and from it the estimate of a score, or of a difference of two, with
the standard error for other seeds and test cells, or over folds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from tuneformer.artifacts import UserError

SAMPLES = 2000  # bootstrap samples: the standard error that they give is right within 2 %
CHUNK = 250  # samples drawn at a time, so that many test cells fit into memory
FEW_CELLS = 10  # a class with fewer test cells decides nothing
MEANS = ("macro_f1", "balanced_accuracy")  # scores in which a small class counts as much as a large one


class Estimate(NamedTuple):
    """A mean or a mean difference, its standard error, and the degrees of freedom of that; NaN where not known."""

    value: float = np.nan
    error: float = np.nan
    df: float = np.nan


@dataclass(frozen=True)
class Scored:
    """The runs of one task: those that failed, and seeds without all folds, are not among them.

    ``place``: column of each (arm, seed). ``values``: scores, (folds, runs), one row without folds. ``drawn``: scores
    on drawn cells, the same for every run, (samples, runs); no rows with folds. ``cells``: test cells by class.
    ``n_units``: number of cells or groups that were drawn from, or of folds. ``folds``: their number, or 0. ``floor``:
    what one more error in the smallest class (or the class that is scored) does to the score; no standard error is
    taken as smaller, for a few cells without an error do not show that there are none. ``left_out``: `few_cells`.
    """

    place: dict[tuple[str, int], int]
    values: np.ndarray
    drawn: np.ndarray
    cells: dict[str, int]
    n_units: int
    folds: int
    floor: float
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """The number of test cells."""
        return sum(self.cells.values())

    def seeds(self, *arms: str) -> list[int]:
        """Return the seeds that all of these arms have."""
        return sorted(set.intersection(*({seed for name, seed in self.place if name == arm} for arm in arms)))

    def estimate(
        self,
        arm: str,
        reference: str | None = None,
        *,
        n_train: float | None = None,
        fixed_model: bool = False,
        **planned: np.ndarray | float,
    ) -> Estimate:
        """Return the mean score of an arm, or its mean difference to a reference over the seeds that both have.

        ``n_train`` is read with folds, None takes the cells of the other folds; for the others see `crossed`.
        """
        weights = {arm: 1.0} if reference is None else {arm: 1.0, reference: -1.0}
        return self.combination(weights, n_train=n_train, fixed_model=fixed_model, **planned)

    def combination(
        self,
        weights: Mapping[str, float],
        *,
        n_train: float | None = None,
        fixed_model: bool = False,
        **planned: np.ndarray | float,
    ) -> Estimate:
        """Return the sum of some arms, each times its weight, over the seeds that all of them have."""
        seeds = self.seeds(*weights)
        if not seeds:
            return Estimate()
        columns = np.array([[self.place[arm, seed] for arm in weights] for seed in seeds])  # (seeds, arms)
        values, drawn = (scores[:, columns] @ np.array(list(weights.values())) for scores in (self.values, self.drawn))
        if self.folds:
            n_test = self.n_cells / self.folds
            return resampled_t(values.mean(axis=1), n_train or n_test * (self.folds - 1), n_test, floor=self.floor)
        return crossed(values[0], drawn, self.n_units, floor=self.floor, fixed_model=fixed_model, **planned)


NOTHING = Scored({}, np.empty((0, 0)), np.empty((0, 0)), {}, 0, 0, 0.0)


def crossed(
    observed: np.ndarray,
    drawn: np.ndarray,
    n_units: int,
    *,
    floor: float = 0.0,
    fixed_model: bool = False,
    n_seeds: np.ndarray | float | None = None,
    times_units: np.ndarray | float = 1.0,
) -> Estimate:
    """Estimate a mean over seeds that was measured on one test set, for other seeds and other test cells.

    Drawing both at once would count the chance of single predictions three times and that of few seeds too low (Owen
    2007, Annals of Applied Statistics 1:386). So the variance is put together as for two crossed random factors: by
    seeds (their variance / n), plus by cells (bootstrap variance of the mean over seeds), minus what both contain
    (bootstrap variance of the differences between seeds / n; neither is taken as less than it), with the degrees of
    freedom of such a sum (Satterthwaite 1946, Biometrics Bulletin 2:110). Where seeds make little difference the test
    is stricter than its level, for a few of them cannot show that.

    Parameters
    ----------
    observed, drawn
        Score, or difference of two, of each seed on the test cells, (seeds,), and on cells drawn again, (samples,
        seeds).
    n_units
        Number of cells, or of groups, that were drawn from.
    floor
        Smallest standard error by cells.
    fixed_model
        The question is about this very model: only the test cells are random.
    n_seeds, times_units
        Give error and degrees of freedom as they would be with so many seeds, and so many times the test cells, if mean
        and spread stayed what they are; arrays give arrays.

    Returns
    -------
    The error is NaN with fewer than two seeds (unless `fixed_model`) or units, which show no spread.
    """
    n = len(observed)
    if n_units < 2 or (n < 2 and not fixed_model):
        return Estimate(observed.mean())
    correction = n_units / (n_units - 1)  # a bootstrap variance of a mean of u units is (u - 1) / u of the right one
    deviations = drawn - drawn.mean(axis=0)
    by_cells = max(correction * deviations.mean(axis=1).var(), floor**2)
    if fixed_model:
        return Estimate(observed.mean(), np.sqrt(by_cells / times_units), n_units * times_units - 1)
    of_both = correction * deviations.var(axis=1, ddof=1).mean()  # of one seed
    of_seeds, of_cells = max(observed.var(ddof=1) - of_both, 0.0), max(by_cells - of_both / n, 0.0)
    seeds, units = n if n_seeds is None else n_seeds, n_units * times_units
    by_both = of_both / seeds / times_units
    by_seeds, by_cells = of_seeds / seeds + by_both, of_cells / times_units + by_both
    variance = by_seeds + by_cells - by_both
    parts = [(by_seeds, seeds - 1), (by_cells, units - 1), (by_both, (seeds - 1) * (units - 1))]
    uncertainty = sum(part**2 / df for part, df in parts)
    df = np.divide(variance**2, uncertainty) if np.all(uncertainty) else seeds - 1
    return Estimate(observed.mean(), np.sqrt(variance), df)


def resampled_t(values: np.ndarray, n_train: float, n_test: float, *, floor: float = 0.0) -> Estimate:
    """Estimate a mean over folds or repeated splits of the same cells, (splits,).

    The training sets of the splits overlap, so their scores are correlated: the variance of the mean of J values is
    taken as (1/J + n_test/n_train) times theirs (Nadeau and Bengio 2003, Machine Learning 52:239, section 5; for k-fold
    cross-validation Bouckaert and Frank 2004, PAKDD, 3). All seeds of a study have the same folds, so a seed is no
    further split: give means over seeds.
    """
    n = len(values)
    variance = (1 / n + n_test / n_train) * values.var(ddof=1) if n > 1 else np.nan
    return Estimate(values.mean(), np.sqrt(np.maximum(variance, floor**2)), n - 1)


def score_tasks(predictions: pd.DataFrame, score: str, *, few: int = FEW_CELLS) -> dict[str, Scored]:
    """Score the runs of every task; test cells are drawn with replacement, whole groups where they have a group.

    Classes with fewer than `few` test cells are not in a mean over classes, as `few_cells` says.

    Raises
    ------
    UserError
        A score that predicted classes do not give; a run with other test cells or labels, a cell that is tested twice,
        or one without group.
    """
    by_task = predictions.groupby("task", sort=False, observed=True)
    return {str(task): _score_task(str(task), rows, score, few) for task, rows in by_task}


def weighted_scores(
    labels: np.ndarray,
    predicted: np.ndarray,
    weights: np.ndarray,
    score: str,
    classes: Sequence[str],
    left_out: Collection[str] = (),
) -> np.ndarray:
    """Score runs on many samples of the same cells at once, by products of matrices.

    Parameters
    ----------
    labels, predicted
        Numbers of classes, (cells,) and (runs, cells).
    weights
        How often each cell is in each sample, (samples, cells).
    left_out
        Classes that are not in a mean over classes; cells of others that are called so still are wrong.

    Returns
    -------
    (samples, runs); a recall is NaN where a sample has no cell of the class.
    """
    numbers, weights = np.arange(len(classes)), weights.astype(np.float32)
    kept = np.array([name not in left_out for name in classes])
    true = labels[:, None] == numbers  # (cells, classes)
    n_true = weights @ true.astype(np.float32)  # (samples, classes)
    found = np.empty((len(weights), len(predicted)))
    for run, one in enumerate(predicted):
        called = one[:, None] == numbers
        hits, n_called = (weights @ part.astype(np.float32) for part in (true & called, called))
        found[:, run] = _score(hits, n_true, n_called, score, classes, kept)
    return found


def few_cells(cells: Mapping[str, int], score: str, least: int = FEW_CELLS) -> dict[str, int]:
    """Return the classes, with their test cells, that are too small to be in a mean over classes.

    Where fewer than two classes are large enough, none is left out: no score of such a task can be trusted.
    """
    few = {name: int(number) for name, number in cells.items() if number < least}
    return few if score in MEANS and len(cells) - len(few) > 1 else {}


def draw_units(n_units: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw cells, or groups, with replacement: how often each is in each sample, (samples, units)."""
    drawn = rng.integers(n_units, size=(samples, n_units)) + n_units * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * n_units).reshape(samples, n_units)


def _score(
    hits: np.ndarray, true: np.ndarray, called: np.ndarray, score: str, classes: Sequence[str], kept: np.ndarray
) -> np.ndarray:
    """Return a score, (samples,), from numbers of cells, (samples, classes)."""
    name, _, of_class = score.partition(":")
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = hits / true
        f1 = np.where(true > 0, 2 * hits / (true + called), np.nan)  # a sample may lack a class
    if score == "accuracy":
        return hits.sum(axis=1) / true.sum(axis=1)
    if score in MEANS:
        return np.nanmean((f1 if score == "macro_f1" else recall)[:, kept], axis=1)
    if score == "weighted_f1":
        return np.nansum(f1 * true, axis=1) / true.sum(axis=1)
    if name == "recall" and of_class in classes:
        return recall[:, list(classes).index(of_class)]
    msg = (
        f"The score {score!r} cannot be judged from predicted classes; set score to accuracy, macro_f1, "
        f"balanced_accuracy, weighted_f1 or recall:<class>, with a class of the task ({', '.join(classes)})."
    )
    raise UserError(msg)


def _score_task(task: str, rows: pd.DataFrame, score: str, few: int) -> Scored:
    rows = rows.astype(dict.fromkeys(["arm", "cell", "label", "predicted"], str))
    n_folds = rows["fold"].nunique()
    if n_folds:
        rows = rows[rows.groupby(["arm", "seed"])["fold"].transform("nunique") == n_folds]
    if rows.empty:
        return NOTHING
    twice = rows[rows.duplicated(["arm", "seed", "cell"])]
    if len(twice):
        first = twice.iloc[0]
        msg = f"{task}, {first.arm}, seed {first.seed}: the cell {first.cell!r} is tested more than once; run it again."
        raise UserError(msg)
    classes = np.unique(rows[["label", "predicted"]])
    rows["number"] = pd.Index(classes).get_indexer(rows["predicted"])
    predicted = rows.pivot(index=["arm", "seed"], columns="cell", values="number")
    cells = rows.drop_duplicates("cell").set_index("cell").loc[predicted.columns]
    lacking = predicted.isna().sum(axis=1)
    if lacking.any() or len(rows.drop_duplicates(["cell", "label"])) > len(cells):
        arm, seed = lacking.idxmax()
        what = f"{arm}, seed {seed}, lacks test cells of other runs" if lacking.any() else "the labels of a cell differ"
        msg = f"{task}: {what}; only runs on the same test cells can be compared, so run the study again."
        raise UserError(msg)
    units = np.arange(len(cells))
    if "group" in cells and cells["group"].notna().any():
        units, _ = pd.factorize(cells["group"])
        if units.min() < 0:
            first = cells.index[units < 0][0]
            msg = f"{task}: {(units < 0).sum()} test cells have no group, such as {first!r}; run the study again."
            raise UserError(msg)
    runs = pd.Index(classes).get_indexer(cells["label"]), predicted.to_numpy(int)
    counts, n_units = cells["label"].value_counts(), n_folds or int(units.max()) + 1
    left_out = few_cells(counts.to_dict(), score, few)
    parts = pd.get_dummies(cells["fold"]).to_numpy().T if n_folds else np.ones((1, len(cells)))
    rng = np.random.default_rng(0)
    weights = (draw_units(n_units, CHUNK, rng)[:, units] for _ in range(0 if n_folds else SAMPLES // CHUNK))
    values, *drawn = (weighted_scores(*runs, part, score, classes, left_out) for part in (parts, *weights))
    values, drawn = values[~np.isnan(values[:, 0])], np.vstack([values[:0], *drawn])
    drawn = drawn[~np.isnan(drawn[:, 0])]  # without a cell of the class whose recall is asked for, in every run
    of_class, kept = score.partition(":")[2], counts.drop(list(left_out))
    floor = 1 / (counts.get(of_class, 1) if of_class else len(kept) * kept.min())
    place = {run: number for number, run in enumerate(predicted.index)}
    return Scored(place, values, drawn, counts.to_dict(), n_units, n_folds, floor, left_out)
