"""From the settings of a run to its cells and tokens: the one entry for everything that is trained and tested.

In: a study resolved for one arm, seed and fold. Out: the single cells of the run, which are rows of those of the task;
or made cells for training and validation beside the real test cells, drawn once and stored with their tokens.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd

from tuneformer import artifacts, paths
from tuneformer.artifacts import UserError
from tuneformer.cells import mixture, pseudobulk, synthetic
from tuneformer.data import bulk, counts, qc, splits
from tuneformer.data.qc import FILE
from tuneformer.params import require_choice
from tuneformer.study import Study, TrainSetKeys
from tuneformer.tokens import encode
from tuneformer.tokens.encode import Tokens

VERSION = "made.1"


@dataclass(frozen=True)
class Prepared:
    """The cells of one run: training, validation and test.

    ``cells``: raw counts (float64 where points are means), which are read from disk when ``X`` is asked for, ``obs``
    label, split, n_counts; None where others tokenized the cells. ``tokens``: their tokens, row by row.
    """

    cells: ad.AnnData | None
    tokens: Tokens


def prepare(settings: Study) -> Prepared:
    """Return exactly the cells of one run, with their tokens; made cells are made if they are not there yet.

    Raises as `make_cells`, `qc.prepare_cells` and `encode.single_cell_tokens`.
    """
    if settings.train_set == "single_cell":
        return _single_cells(settings)
    folder = artifacts.made(paths.made_dir(settings), made_key(settings), lambda partial: _write(settings, partial))
    return Prepared(counts.read_cells(folder / FILE)[:], encode.read(folder))


def made_key(settings: Study) -> str:
    """Return the key of everything that the made cells of a run and their tokens depend on."""
    reads_bulk = settings.train_set == "bulk" or settings.means == "bulk"
    inputs = qc.cells_key(settings), encode.tokens_key(settings), bulk.source_hash(settings) if reads_bulk else None
    return artifacts.key(VERSION, settings.keys(TrainSetKeys), settings.seed, *inputs)


def draw(settings: Study, obs: pd.DataFrame) -> dict[str, np.ndarray]:
    """Draw the single cells of a run, with its seed: at most ``train_cells``, and ``cells_per_class`` of each class.

    Validation cells are reduced in proportion (one per class at least); all test cells stay. Returns the rows of `obs`
    (label and split of all cells), ascending, for train, validation and test.
    """
    share, most = settings.validation_share, settings.cells_per_class
    part = splits.draw_cells(obs, train_cells=settings.train_cells, validation_share=share, seed=settings.seed)
    if most is None:
        return part
    rng = np.random.default_rng([settings.seed, 5])
    for name, number in {"train": most, "validation": max(1, round(most * share / (1 - share)))}.items():
        labels = obs["label"].iloc[part[name]]
        places = [rng.permutation(np.flatnonzero(labels == one))[:number] for one in labels.cat.categories]
        part[name] = np.sort(part[name][np.concatenate(places)])
    return part


def make_cells(settings: Study, cells: ad.AnnData, folder: Path) -> tuple[ad.AnnData, int | None, list[str]]:
    """Make what a run is trained on, if that is not single cells, and write it to `FILE` in a folder.

    Everything is made of the single cells that a run on single cells with this seed is trained on (`draw`). Pseudo-bulk
    and synthetic cells are made of training and validation cells together, and one point of nine (``validation_share``)
    goes to validation, as in the bulk thesis. Mixtures, and pseudo-bulk with ``validation_cells: real``, are made of
    the training cells only and have the real validation cells, pseudo-bulk beside its validation points. Points that
    share cells (``points: single_cell``) are made of the training and of the validation cells, each by themselves.
    ``bulk`` is samples of another experiment, so that nothing of the cells is trained on.

    Returns
    -------
    The cells, with ``obs`` label, split, n_counts, members (number of cells) and member_names; the number of cells by
    which optimizer steps are counted, where it is not that of the training cells; and the names of the real cells that
    they are made of (none for bulk samples).

    Raises
    ------
    UserError
        A class is left with fewer than two points, or as the module that makes the cells.
    """
    part = draw(settings, cells.obs)
    real = {name: cells[rows] for name, rows in part.items()}
    with_real = settings.train_set == "mixture" or settings.validation_cells == "real"
    source = real["train"] if with_real else _learnable(cells, part)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if settings.train_set == "mixture":
            stratum, used, rng = pseudobulk.strata(source, settings.dose_column), source, [settings.seed, 3]
            made = mixture.make(source, stratum, settings, rng=np.random.default_rng(rng), folder=Path(scratch))
            parts = [(one, "train") for one in made]
        elif settings.points == "single_cell":
            names, used = ("train", "validation"), _learnable(cells, part)
            parts = [(_pseudobulk(settings, real[name], Path(scratch), name)[0], name) for name in names]
        else:
            points, used = POINTS[settings.train_set](settings, source, Path(scratch))
            split = split_points(points.obs["label"], settings)
            parts = [(points[(split == name).to_numpy()], name) for name in ("train", "validation")]
        if with_real:
            parts.append((real["validation"], "validation"))
        _write_joined([*parts, (real["test"], "test")], cells, folder / FILE)
    step_cells = len(part["train"]) if settings.steps_of == "single_cell" else None
    if settings.steps_of == "pseudobulk":
        step_cells = n_points(settings, _learnable(cells, part))
    return counts.read_cells(folder / FILE), step_cells, list(used.obs_names)


def split_points(labels: pd.Series, settings: Study) -> pd.Series:
    """Give points to train and validation, at random by the seed; a class with fewer than two is a UserError."""
    rng = np.random.default_rng([settings.seed, 4])
    split = pd.Series("train", index=labels.index)
    for label, rows in labels.groupby(labels, observed=False):
        if len(rows) < 2:
            remedy = "choose a smaller k, or give the class more cells"
            if settings.train_set == "bulk":
                remedy = "add a sample, or draw cells around the one (train_set: synthetic, means: bulk)"
            needed = "and training and validation need one each"
            msg = f"{settings.arm}: class {label!r} has {len(rows)} points, {needed}; {remedy}."
            raise UserError(msg)
        n_validation = max(1, round(settings.validation_share * len(rows)))
        split[rows.index[rng.permutation(len(rows))[:n_validation]]] = "validation"
    return split


def n_points(settings: Study, source: ad.AnnData) -> int:
    """Return how many pseudo-bulk points of so many cells are trained on, where each cell is in one group."""
    _, groups, _ = _groups(settings, source)
    return int((split_points(source.obs["label"].groupby(groups).first(), settings) == "train").sum())


def _learnable(cells: ad.AnnData, part: dict[str, np.ndarray]) -> ad.AnnData:
    """Return the cells for training and validation."""
    return cells[np.sort(np.concatenate([part["train"], part["validation"]]))]


def _single_cells(settings: Study) -> Prepared:
    """Take rows of the single cells of the task."""
    cells = qc.prepare_cells(settings)
    tokens = encode.single_cell_tokens(settings, cells)
    part = draw(settings, cells.obs)
    rows = np.sort(np.concatenate(list(part.values())))
    step_cells = n_points(settings, _learnable(cells, part)) if settings.steps_of == "pseudobulk" else None
    if len(rows) < cells.n_obs:
        tokens, cells = dataclasses.replace(tokens, dataset=tokens.dataset.select(rows)), cells[rows]
    tokens = dataclasses.replace(tokens, step_cells=step_cells)
    return Prepared(None if qc.has_no_counts(cells) else cells[:], tokens)


def _write(settings: Study, folder: Path) -> None:
    """Make the cells of a run, and write them with their tokens."""
    cells = qc.prepare_cells(settings)
    real = encode.single_cell_tokens(settings, cells)
    made, step_cells, names = make_cells(settings, cells, folder)
    longest = cap = encode.task_length(settings)
    if settings.token_length == "single_cell":  # noqa: S105 (no password)
        table = real.dataset.select_columns(["length", "split"]).to_pandas()
        cap = int(table.loc[table["split"] == "train", "length"].median())
    is_test = (made.obs["split"] == "test").to_numpy()
    parts = [
        encode.encode(part, real.vocabulary, max_length=length, columns=dict(part.obs[["label", "split"]]))
        for part, length in ((made[~is_test], cap), (made[is_test], longest))
    ]
    dataset = datasets.concatenate_datasets(parts)
    encode.write(folder, dataclasses.replace(real, dataset=dataset, step_cells=step_cells, sources=names))


def _groups(settings: Study, source: ad.AnnData) -> tuple[pd.Series, np.ndarray, np.random.Generator]:
    """Return strata and groups of the cells, and the generator that drew them."""
    stratum = pseudobulk.strata(source, settings.dose_column)
    number = {"mean": 1, "approx_mean": 2}.get(settings.aggregation, 0)  # so that the three have other groups
    rng = np.random.default_rng([settings.seed, 1, settings.k, number])
    return stratum, pseudobulk.group_cells(stratum, k=settings.k, spread=settings.group_spread, rng=rng), rng


def _pseudobulk(settings: Study, source: ad.AnnData, folder: Path, part: str = "") -> tuple[ad.AnnData, ad.AnnData]:
    """Make pseudo-bulk points, or draw one single cell of each group; return also the cells that they are made of."""
    stratum, groups, rng = _groups(settings, source)
    options = {"strata": stratum, "name": f"{settings.train_set}{part}", "folder": folder}
    if settings.points == "single_cell":
        sizes = {"k": settings.k, "spread": settings.group_spread}
        groups, options["members"] = pseudobulk.sharing_groups(stratum, **sizes, rng=rng)
    if settings.aggregation == "one_cell":
        return pseudobulk.one_per_group(source, groups, rng=rng, **options), source
    points = pseudobulk.aggregate(source, groups, how=settings.aggregation, k=settings.k, **options)
    if settings.depth == "single_cell":
        depths = pseudobulk.one_per_group(source, groups, rng=rng, **options).obs["n_counts"].to_numpy()
        points = pseudobulk.thin(points, depths, rng=rng, folder=folder)
    return points, source


def _synthetic(settings: Study, source: ad.AnnData, folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Draw synthetic cells around means of single cells or of bulk samples; return also the cells that were used.

    There are as many of each stratum as it has single cells. Bulk samples have the doses of another experiment, over
    which the cells of a class are spread evenly; how cells vary is then known from untreated single cells only.
    """
    reference = points = None
    if settings.variances == "untreated" or settings.means == "bulk":
        require_choice(settings.untreated_class, source.obs["label"].cat.categories, "untreated_class", "class")
        reference = (source.obs["label"] == settings.untreated_class).to_numpy()
    if settings.means == "bulk":
        samples = bulk.load_bulk(settings, source)
        stratum = pseudobulk.strata(samples, settings.dose_column if settings.dose_column in samples.obs else None)
        depth = float(source.obs["n_counts"][reference].mean())
        points = pseudobulk.sample_points(samples, stratum, depth=depth)
        sizes = source.obs["label"].value_counts(sort=False).to_dict()
        numbers = mixture.spread(points.obs["stratum"], points.obs["label"], sizes)
    else:
        stratum = pseudobulk.strata(source, settings.dose_column)
        numbers = stratum.value_counts(sort=False)
    if settings.synthetic_cells is not None:
        numbers[:] = settings.synthetic_cells
    made = synthetic.generate(
        source,
        strata=stratum,
        numbers=numbers,
        generator=settings.generator,
        reference=reference,
        rank=settings.covariance_rank,
        rng=np.random.default_rng([settings.seed, 2]),
        name=settings.train_set,
        points=points,
        folder=folder,
    )
    return made, source if points is None else source[reference]


def _bulk(settings: Study, source: ad.AnnData, folder: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Take the samples of a bulk table, which are made of none of the cells."""
    samples = bulk.load_bulk(settings, source)
    samples.obs["member_names"] = ""
    return samples, source[:0]


POINTS = {"pseudobulk": _pseudobulk, "synthetic": _synthetic, "bulk": _bulk}


def _write_joined(parts: list[tuple[ad.AnnData, str]], cells: ad.AnnData, path: Path) -> None:
    """Write cells of several kinds below each other, each with its split; genes and classes are those of `cells`."""
    table = pd.concat(
        part.obs.assign(
            label=part.obs["label"].astype(str),
            split=split,
            members=part.obs.get("members", 1),
            member_names=part.obs.get("member_names", part.obs_names.to_series()),
        )[["label", "n_counts", "members", "member_names", "split"]]
        for part, split in parts
    )
    table["label"] = table["label"].astype(cells.obs["label"].dtype)
    table["split"] = table["split"].astype(cells.obs["split"].dtype)
    ad.AnnData(obs=table, var=cells.var).write_h5ad(path, convert_strings_to_categoricals=False)
    counts.write(path, (values for part, _ in parts for _, values in counts.chunks(part)))
