"""Which cells are trained on, which validate, and which are tested.

In: the class of every cell, shares and a seed. Out: "train", "validation" or "test" for every cell, the same on every
machine and for every run of a study, because the draw hashes seed and name and knows nothing of the training seed.
"""

import hashlib

import numpy as np
import pandas as pd

from tuneformer.artifacts import UserError

MOST_VALIDATION = 3  # times its share that whole groups may take of the cells of a fold
PARTS = ("train", "validation", "test")


def assign_split(
    labels: pd.Series, *, test_share: float, validation_share: float, seed: int, groups: pd.Series | None = None
) -> pd.Series:
    """Split cells into train, validation and test, stratified by class.

    Without groups, each class gives ``round(test_share n)`` of its n cells to the test set and
    ``round(validation_share m)`` of its remaining m to validation, but one at least; 0 takes none. With groups,
    groups are set aside whole, in random order, as long as each one brings the classes nearer to their shares; every
    class is in each part, but the shares are only as close as the groups allow.

    Parameters
    ----------
    labels
        Class of every cell, indexed by unique cell names; (cells,).
    groups
        Group (well, donor) of every cell, in the order of `labels`; None splits by cell.

    Returns
    -------
    Categorical of `PARTS`, indexed as `labels`; it does not depend on the order of the cells.

    Raises
    ------
    UserError
        A cell name is not unique; a class or group is missing; a class is too small, or in too few groups, to be in all
        parts.
    """
    labels = _checked(labels)
    if groups is not None:
        return _by_group(labels, groups.astype(object), test_share, validation_share, seed)
    tested, validated = [], []
    for name, cells in labels.groupby(labels, sort=False):
        n_test = max(1, round(test_share * len(cells)))
        n_validation = max(validation_share > 0, round(validation_share * (len(cells) - n_test)))
        if n_test + n_validation >= len(cells):
            msg = (
                f"Class {name!r} has {len(cells)} cells after quality control, too few for a test share of "
                f"{test_share:.3g} and a validation share of {validation_share:.3g}; leave it out of classes, or "
                "change the shares."
            )
            raise UserError(msg)
        drawn = _in_random_order(cells.index, seed)
        tested += drawn[:n_test]
        validated += drawn[n_test : n_test + n_validation]
    return _parts(labels.index, labels.index.isin(tested), labels.index.isin(validated))


def assign_fold(
    labels: pd.Series, *, folds: int, fold: int, validation_share: float, seed: int, groups: pd.Series | None = None
) -> pd.Series:
    """Split cells into train, validation and test for one fold of a k-fold cross-validation.

    Over the folds, every cell is a test cell once. Without groups, the cells of each class are dealt out in random
    order, so that its test cells in two folds differ by one at most; validation cells are drawn anew for each fold.

    With groups, whole groups are dealt out, those with the largest share of some class first, each to the fold that has
    least of the group's classes: a class may be missing from the test cells of a fold, not from its other cells.
    Validation takes whole groups too, as `assign_split` does, if that is possible in all folds without taking more than
    `MOST_VALIDATION` times its share; else it takes single cells of the training groups, in all folds.

    Parameters and Returns as `assign_split`.

    Raises
    ------
    UserError
        As `assign_split`; a class is too small for so many folds; there are fewer groups than folds, or a class is in
        the test groups of one fold only.
    """
    if not 0 <= fold < folds:
        msg = f"fold: {fold} is not one of {folds} folds, which are 0 to {folds - 1}."
        raise UserError(msg)
    labels = _checked(labels)
    validation = None
    if groups is None:
        is_test = _deal_cells(labels, folds, seed) == fold
    else:
        groups = groups.astype(object)
        fold_of, validation = _deal_groups(labels, groups, folds, validation_share, seed)
        is_test = groups.map(fold_of).to_numpy() == fold
    if validation is not None:
        return _parts(labels.index, is_test, groups.isin(validation[fold]).to_numpy())
    rest, drawn = labels[~is_test], []
    for name, cells in rest.groupby(rest):
        n = max(1, round(validation_share * len(cells)))
        if n >= len(cells):
            msg = (
                f"Class {name!r} has {len(cells)} cells outside the test cells of a fold, too few for a validation "
                f"share of {validation_share:.3g}; leave it out of classes, or change folds or validation_share."
            )
            raise UserError(msg)
        drawn += _in_random_order(cells.index, f"{seed}:{fold}")[:n]
    return _parts(labels.index, is_test, labels.index.isin(drawn))


def draw_cells(
    table: pd.DataFrame, *, train_cells: int | None, validation_share: float, seed: int
) -> dict[str, np.ndarray]:
    """Choose the cells of a run: at most `train_cells`, stratified by class; validation in proportion; all test cells.

    `table` has the columns label and split, one row per cell; `validation_share` is that of the cells outside the test
    set. Returns rows of `table`, ascending, for each of `PARTS`. Fewer `train_cells` than classes is a UserError.
    """
    rows = {part: np.flatnonzero(table["split"] == part) for part in PARTS}
    if train_cells is None:
        return rows
    n_classes = table["label"].nunique()
    if train_cells < n_classes:
        msg = f"train_cells: {train_cells} is less than one for each of {n_classes} classes; set more."
        raise UserError(msg)
    n_validation = round(train_cells * validation_share / (1 - validation_share))
    rng = np.random.default_rng(seed)
    for part, n in {"train": train_cells, "validation": max(n_validation, n_classes)}.items():
        labels = table["label"].iloc[rows[part]].astype(str)
        rows[part] = rows[part][draw_stratified(labels.to_numpy(), n, rng)]
    return rows


def draw_stratified(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` of the cells, every class by its share and at least once; return their places, ascending."""
    if n >= len(labels):
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * n / len(labels)
    take = np.maximum(1, np.floor(exact)).astype(int)
    for place in np.argsort(take - exact, kind="stable")[: max(0, n - take.sum())]:
        take[place] += 1
    while take.sum() > n:
        take[take.argmax()] -= 1
    chosen = [
        rng.choice(np.flatnonzero(labels == name), size, replace=False)
        for name, size in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def split_key(split: pd.Series) -> str:
    """Return 16 hex digits that name this split: which cell is in which part, in any order."""
    text = "\n".join(sorted(f"{part}\t{name}" for name, part in split.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(labels: pd.Series) -> pd.Series:
    """Return the classes as objects, or refuse cells without name or class of their own."""
    labels = labels.astype(object)
    if labels.index.has_duplicates:
        first = labels.index[labels.index.duplicated()][0]
        msg = f"The cell name {first!r} is given more than once; make obs_names unique."
        raise UserError(msg)
    if labels.isna().any():
        msg = f"{labels.isna().sum()} cells have no class and cannot be split; drop them first."
        raise UserError(msg)
    return labels


def _parts(index: pd.Index, is_test: np.ndarray, in_validation: np.ndarray) -> pd.Series:
    part = np.where(is_test, "test", np.where(in_validation, "validation", "train"))
    return pd.Series(part, index=index, name="split").astype(pd.CategoricalDtype(list(PARTS)))


def _by_group(labels: pd.Series, groups: pd.Series, test_share: float, validation_share: float, seed: int) -> pd.Series:
    counts = _count_groups(labels, groups, seed)
    few = (counts > 0).sum()
    if few.min() < len(PARTS):
        msg = (
            f"Class {few.idxmin()!r} is in {few.min()} groups of {groups.name!r}, and train, validation and test need "
            "one whole group each; leave the class out of classes, or set group_by: null."
        )
        raise UserError(msg)
    test = _take_groups(counts, test_share, leave=2)
    validation = _take_groups(counts.drop(index=test), validation_share, leave=1)
    for taken in (test, validation):
        absent = counts.columns[counts.loc[taken].sum() == 0]
        if len(absent):
            msg = (
                f"No whole groups of {groups.name!r} were found that put class {absent[0]!r} into train, validation "
                "and test; try another split_seed, leave the class out of classes, or set group_by: null."
            )
            raise UserError(msg)
    return _parts(labels.index, groups.isin(test).to_numpy(), groups.isin(validation).to_numpy())


def _count_groups(labels: pd.Series, groups: pd.Series, seed: int) -> pd.DataFrame:
    """Count cells, (groups, classes), groups in random order."""
    if groups.isna().any():
        msg = f"{groups.isna().sum()} cells have no group in {groups.name!r}; drop them, or set group_by: null."
        raise UserError(msg)
    counts = pd.crosstab(groups.to_numpy(), labels.to_numpy())
    return counts.loc[_in_random_order(counts.index, seed)]


def _deal_cells(labels: pd.Series, folds: int, seed: int) -> np.ndarray:
    """Return the fold in which each cell is tested, (cells,); a class goes on in the fold where the last one ended."""
    fold_of = pd.Series(0, index=labels.index)
    start = 0
    for name, cells in labels.groupby(labels):
        n_rest = len(cells) - -(-len(cells) // folds)
        if len(cells) < folds or n_rest < 2:
            msg = (
                f"Class {name!r} has {len(cells)} cells after quality control, too few for {folds} folds (each needs a "
                "test cell, and beside it a training and a validation cell); leave it out of classes, or change folds."
            )
            raise UserError(msg)
        fold_of[_in_random_order(cells.index, seed)] = np.arange(start, start + len(cells)) % folds
        start += len(cells)
    return fold_of.to_numpy()


def _deal_groups(
    labels: pd.Series, groups: pd.Series, folds: int, validation_share: float, seed: int
) -> tuple[dict, list[list] | None]:
    """Return the fold in which each group is tested, and the validation groups of each fold (None: single cells)."""
    counts = _count_groups(labels, groups, seed)
    if len(counts) < folds:
        msg = (
            f"{groups.name!r} has {len(counts)} groups, and {folds} folds need one whole group each; set folds to "
            f"{len(counts)} or less, or group_by: null."
        )
        raise UserError(msg)
    shares = (counts / counts.sum()).to_numpy()  # of the cells of a class
    held = np.zeros((folds, counts.shape[1]))  # the share of each class that each fold has
    sizes = np.zeros(folds)
    fold_of = np.zeros(len(counts), dtype=int)
    for place in np.argsort(-shares.max(axis=1), kind="stable"):
        overlap = held @ shares[place]  # what the fold adds to the sum of squares of the folds' shares
        best = np.lexsort([sizes, overlap])[0]
        fold_of[place] = best
        held[best] += shares[place]
        sizes[best] += counts.iloc[place].sum()
    validation, whole = [], True
    for fold in range(folds):
        rest = counts[fold_of != fold]
        absent = counts.columns[rest.sum() == 0]
        if len(absent):
            msg = (
                f"Class {absent[0]!r} is in no group of {groups.name!r} but those tested in fold {fold} of {folds}, so "
                "nothing could be trained on; leave the class out of classes, or set group_by: null."
            )
            raise UserError(msg)
        taken = _take_groups(rest, validation_share, leave=1)
        n_most = MOST_VALIDATION * validation_share * rest.to_numpy().sum()
        whole &= bool(counts.loc[taken].sum().all()) and counts.loc[taken].to_numpy().sum() <= n_most
        validation.append(taken)
    return dict(zip(counts.index, fold_of, strict=True)), validation if whole else None


def _take_groups(counts: pd.DataFrame, share: float, *, leave: int) -> list:
    """Take groups in order while they help, leaving at least `leave` groups of every class.

    A group helps if afterwards fewer classes are absent, or as many and the relative squared distance of the taken
    cells of all classes to `share` of them is smaller.
    """
    taken: list = []
    target = share * counts.sum().to_numpy()  # (classes,)
    cells = np.zeros(len(target))
    left = (counts > 0).sum().to_numpy()  # groups of every class
    distance = (len(target), float(len(target)))
    for _ in range(2):  # the second pass sees groups that could only help once others were taken
        for group, row in zip(counts.index, counts.to_numpy(), strict=True):
            after = cells + row
            new = (int((after == 0).sum()), float((((after - target) / target) ** 2).sum()))
            if group not in taken and new < distance and (left - (row > 0) >= leave).all():
                taken.append(group)
                cells, distance, left = after, new, left - (row > 0)
    return taken


def _in_random_order(names: pd.Index, seed: int | str) -> list:
    """Sort names by the hash of seed and name: a random order that does not depend on the given one."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
