"""From the name of a train set to the tokens that a model is trained and tested on.

In: a run's settings, and the quality-controlled cells of its task. Out: made cells (or the single cells themselves) for
training and validation beside the real test cells, and their tokens, written to ``<train_set>/tokens_seed<k>``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pandas as pd
from scipy import sparse

from tuneformer.data import bulk, catalog, preprocessing, splits
from tuneformer.study import paths, train_sets
from tuneformer.study.params import Study
from tuneformer.tokens import official, tokenizer
from tuneformer.tokens.tokenizer import Tokens
from tuneformer.tokens.vocabulary import Vocabulary
from tuneformer.trainsets import mixture, pseudobulk, synthetic
from tuneformer.trainsets.strata import TrainSetError, strata

if TYPE_CHECKING:
    import anndata as ad


@dataclass(frozen=True)
class TrainCells:
    """What a run is trained and tested on.

    ``cells``: AnnData with ``obs`` label, split, n_counts; the test cells are always the real ones. ``step_cells``: the
    number of cells by which the optimizer steps are counted, where it is not that of the training cells. ``sources``:
    names of the real cells that made cells were made from; empty for single cells and for bulk samples.
    """

    cells: "ad.AnnData"
    step_cells: int | None
    sources: list[str]


def prepare_tokens(settings: Study) -> Tokens:
    """Load the tokens of a run's train set, or make and write them if there are none for these very parameters.

    Cells that others tokenized (`tuneformer.tokens.official`) are taken as they are.

    Raises
    ------
    TrainSetError
        The train set cannot be made of these cells (see `make_train_cells`).
    ValueError
        As `tuneformer.data.preprocessing.prepare_cells` and `tuneformer.tokens.tokenizer.tokenize`.
    """
    found = tokenizer.read_tokens(settings)
    if found is not None:
        return found
    cells = preprocessing.prepare_cells(settings)
    made = make_train_cells(settings, cells)
    vocabulary = tokenizer.task_vocabulary(settings, cells)
    if preprocessing.has_no_counts(cells):
        dataset = official.read_dataset(settings, cells, vocabulary, catalog.source_path(settings))
    else:
        dataset = tokenize(settings, made, vocabulary)
    return tokenizer.write_tokens(
        settings, made.cells, vocabulary, dataset, step_cells=made.step_cells, sources=made.sources
    )


def tokenize(settings: Study, made: TrainCells, vocabulary: Vocabulary) -> datasets.Dataset:
    """Make the tokens of a train set; in a ``_capped`` one the made cells are cut to the length of single cells.

    Parameters
    ----------
    settings
        The run.
    made
        From `make_train_cells`.
    vocabulary
        Of the task. Medians are those of the real training cells for every train set, so that the test cells have the
        same tokens in all of them.

    Raises
    ------
    TokensError, VocabularyError
        As `tuneformer.tokens.tokenizer.tokenize`, or the checkpoint knows too few of the genes.
    """
    longest = tokenizer.task_length(settings)
    if settings.vocabulary == "checkpoint":
        tokenizer.refuse_unmapped(made.cells, vocabulary)
    if not paths.is_made(settings):
        return tokenizer.tokenize(made.cells, vocabulary, max_length=longest, carry=tokenizer.carried(settings))
    if train_sets.parse(settings.train_set).control != "capped":
        return tokenizer.tokenize(made.cells, vocabulary, max_length=longest)
    real = preprocessing.prepare_cells(settings)
    cap = single_cell_length(real[(real.obs["split"] == "train").to_numpy()], vocabulary, max_length=longest)
    is_test = (made.cells.obs["split"] == "test").to_numpy()
    parts = [(made.cells[~is_test], cap), (made.cells[is_test], longest)]
    return datasets.concatenate_datasets(
        [tokenizer.tokenize(part, vocabulary, max_length=length) for part, length in parts]
    )


def single_cell_length(cells: "ad.AnnData", vocabulary: Vocabulary, *, max_length: int) -> int:
    """Return the median number of tokens of single cells, after the cut at `max_length`."""
    return int(tokenizer.uncut_lengths(cells, vocabulary).clip(upper=max_length).median())


def make_train_cells(settings: Study, cells: "ad.AnnData") -> TrainCells:
    """Make what a run is trained on.

    ``train_cells`` limits the single cells that everything is made of; they are drawn with the seed of the run, and are
    those that a run on ``single_cell`` with this seed is trained on. Pseudo-bulk and synthetic train sets are made of
    the training and validation cells together, and one of nine points (`validation_share`) goes to validation, as in
    the bulk thesis; mixtures and ``_boosted`` ones are made of the training cells and keep the real validation cells.
    With ``bulk`` the points are bulk samples of another experiment, so that nothing of the cells is trained on; of
    each class one sample of nine, one at least, goes to validation. ``synthetic_<generator>_bulk`` cells are drawn
    around the means of these samples, with the variation of the untreated training and validation cells; there are as
    many of each class as it has such cells, spread evenly over its doses, or ``synthetic_cells`` of each class and
    dose.

    Parameters
    ----------
    settings
        The run; ``train_set`` and ``seed`` decide what is made.
    cells
        As `tuneformer.data.preprocessing.prepare_cells` makes them.

    Raises
    ------
    TrainSetError
        A class is left with fewer than two points, or as the module that makes the cells.
    CellsError
        `train_cells` cannot be drawn, or the bulk samples cannot be used (`tuneformer.data.bulk.load_bulk`).
    """
    said = train_sets.parse(settings.train_set)
    if not paths.is_made(settings):
        return TrainCells(cells, None, [])
    part = _drawn(settings, cells)
    if said.amount == "n":
        part |= _few_of_each_class(settings, cells, part, said.number)
        kept = np.sort(np.concatenate(list(part.values())))
        return TrainCells(cells[kept].copy(), None, list(cells.obs_names[part["train"]]))
    real = {name: cells[rows] for name, rows in part.items()}
    pool = cells[np.sort(np.concatenate([part["train"], part["validation"]]))]
    if said.kind == "mixture":
        train = mixture.make(real["train"], settings, rng=np.random.default_rng([settings.seed, 3]))
        made = _joined([(train, "train"), (real["validation"], "validation"), (real["test"], "test")], cells)
        return TrainCells(made, None, list(real["train"].obs_names))
    if said.kind == "single_cell" and said.control == "steps":
        whole = _joined([(real[name], name) for name in splits.PARTS], cells)
        steps = _pseudobulk(settings, pool, said)
        n_points = int((_point_split(steps, settings) == "train").sum())
        return TrainCells(whole, n_points, list(pool.obs_names))
    if said.is_bulk:
        samples = bulk.load_bulk(settings, cells)
        points, sources = (samples, []) if said.kind == "bulk" else _around_samples(settings, pool, samples, said)
        points.obs["member_names"] = ""
        split = _point_split(points, settings)
        parts = [(points[(split == name).to_numpy()], name) for name in ("train", "validation")]
        return TrainCells(_joined([*parts, (real["test"], "test")], cells), None, sources)
    source = real["train"] if said.control == "boosted" else pool
    points = _synthetic(settings, source, said) if said.kind == "synthetic" else _pseudobulk(settings, source, said)
    split = _point_split(points, settings)
    parts = [(points[(split == name).to_numpy()], name) for name in ("train", "validation")]
    if said.control == "boosted":
        parts.append((real["validation"], "validation"))
    made = _joined([*parts, (real["test"], "test")], cells)
    step_cells = len(part["train"]) if said.control == "steps" else None
    return TrainCells(made, step_cells, list(source.obs_names))


def _drawn(settings: Study, cells: "ad.AnnData") -> dict[str, np.ndarray]:
    """Return the rows of the single cells of each part that a run may use."""
    return splits.draw_cells(
        cells.obs[["label", "split"]],
        train_cells=settings.train_cells,
        validation_share=settings.validation_share,
        seed=settings.seed,
    )


def _few_of_each_class(
    settings: Study, cells: "ad.AnnData", part: dict[str, np.ndarray], number: int
) -> dict[str, np.ndarray]:
    """Draw at most `number` training cells of each class, and validation cells in proportion, one at least."""
    rng = np.random.default_rng([settings.seed, 5])
    share = settings.validation_share / (1 - settings.validation_share)
    drawn = {}
    for name, most in {"train": number, "validation": max(1, round(number * share))}.items():
        labels = cells.obs["label"].iloc[part[name]]
        by_class = [part[name][rng.permutation(np.flatnonzero(labels == one))[:most]] for one in labels.cat.categories]
        drawn[name] = np.sort(np.concatenate(by_class))
    return drawn


def _pseudobulk(settings: Study, source: "ad.AnnData", said: train_sets.TrainSet) -> "ad.AnnData":
    """Make pseudo-bulk points, or one single cell of each group where the groups are a control only."""
    stratum = strata(source, settings)
    how = said.aggregation or "sum"
    rng = np.random.default_rng([settings.seed, 1, said.k, train_sets.AGGREGATIONS.index(how)])
    groups = pseudobulk.group_cells(stratum, k=said.k, spread=settings.group_spread, rng=rng)
    options = {"strata": stratum, "name": settings.train_set}
    if said.control not in ("points", "thinned"):
        return pseudobulk.aggregate(source, groups, how=how, k=said.k, **options)
    singles = pseudobulk.one_per_group(source, groups, rng=rng, **options)
    if said.control == "points":
        return singles
    points = pseudobulk.aggregate(source, groups, how=how, k=said.k, **options)
    return pseudobulk.thin(points, singles.obs["n_counts"].to_numpy(), rng=rng)


def _synthetic(settings: Study, source: "ad.AnnData", said: train_sets.TrainSet) -> "ad.AnnData":
    stratum = strata(source, settings)
    numbers = stratum.value_counts(sort=False)
    if settings.synthetic_cells is not None:
        numbers[numbers > 0] = settings.synthetic_cells
    made = synthetic.generate(
        source,
        strata=stratum,
        numbers=numbers,
        generator=said.generator,
        reference=mixture.untreated(source, settings) if said.control == "untreated" else None,
        rank=settings.covariance_rank,
        rng=np.random.default_rng([settings.seed, 2]),
        name=settings.train_set,
    )
    made.obs["member_names"] = ""  # it is made of the moments of all sources, and of no cell in particular
    return made


def _around_samples(
    settings: Study, pool: "ad.AnnData", samples: "ad.AnnData", said: train_sets.TrainSet
) -> tuple["ad.AnnData", list[str]]:
    """Make synthetic cells around bulk samples; return them and the names of the cells that said how cells vary."""
    doses = settings.dose_column if settings.dose_column in samples.obs else None
    stratum = strata(samples, settings.model_copy(update={"dose_column": doses}))
    reference = mixture.untreated(pool, settings)
    depth = float(pool.obs["n_counts"][reference].mean())
    points = synthetic.sample_points(samples, stratum, depth=depth)
    of_class = points.obs["label"].astype(str)
    numbers = {}
    for name, size in pool.obs["label"].value_counts(sort=False).items():
        own = list(points.obs_names[of_class == name])
        numbers |= {one: size // len(own) + (place < size % len(own)) for place, one in enumerate(own)}
    if settings.synthetic_cells is not None:
        numbers = dict.fromkeys(numbers, settings.synthetic_cells)
    made = synthetic.generate(
        pool,
        strata=stratum,
        numbers=pd.Series(numbers, dtype=int),
        generator=said.generator,
        reference=reference,
        rank=settings.covariance_rank,
        rng=np.random.default_rng([settings.seed, 2]),
        name=settings.train_set,
        points=points,
    )
    return made, list(pool.obs_names[reference])


def _point_split(points: "ad.AnnData", settings: Study) -> pd.Series:
    """Give points to train and validation, class by class, at random by the seed of the run."""
    rng = np.random.default_rng([settings.seed, 4])
    split = pd.Series("train", index=points.obs_names)
    for label, rows in points.obs.groupby("label", observed=False):
        if len(rows) < 2:
            remedy = "choose a smaller k, or give the class more cells"
            if settings.train_set == "bulk":
                remedy = "add a sample, or draw cells around the one (synthetic_nb_bulk)"
            msg = (
                f"{settings.train_set}: class {label!r} has {len(rows)} points, and training and validation need one "
                f"each; {remedy}."
            )
            raise TrainSetError(msg)
        n_validation = max(1, round(settings.validation_share * len(rows)))
        split[rows.index[rng.permutation(len(rows))[:n_validation]]] = "validation"
    return split


def _joined(parts: list[tuple["ad.AnnData", str]], cells: "ad.AnnData") -> "ad.AnnData":
    """Put cells of several kinds below each other, each with its split; genes and classes are those of `cells`."""
    import anndata

    columns = ["label", "n_counts", "members", "member_names"]
    obs = [
        part.obs.assign(
            split=split,
            members=part.obs.get("members", 1),
            member_names=part.obs.get("member_names", pd.Series(part.obs_names, index=part.obs_names)),
        )[[*columns, "split"]].astype({"label": str})
        for part, split in parts
    ]
    table = pd.concat(obs)
    table["label"] = table["label"].astype(cells.obs["label"].dtype)
    table["split"] = table["split"].astype(pd.CategoricalDtype(list(splits.PARTS)))
    counts = sparse.vstack([sparse.csr_matrix(part.X) for part, _ in parts], format="csr")
    return anndata.AnnData(counts, obs=table, var=cells.var)
