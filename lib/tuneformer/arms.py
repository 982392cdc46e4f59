"""Arms: what a study compares, each a name and the keys that differ, and the contrasts between them.

In: the mappings `arms` and `contrasts` of a params file, where {key} in a name stands for each value of a list. Out:
one entry per arm and per contrast; or one sentence that says which of them cannot be used, and why.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from tuneformer import keys
from tuneformer.artifacts import UserError
from tuneformer.params import refuse_unknown, require_choice

if TYPE_CHECKING:
    from tuneformer.study import Study

BRACES = re.compile(r"{([^{}]*)}")
TAKEN = re.compile(r"cells|made|frozen|by_rows|tokens.*", re.IGNORECASE)
"""Names of the other folders of a task, as in `tuneformer.paths`."""
METHOD = "|".join(sorted((*keys.STRATEGIES, *keys.BASELINES, *keys.GENE_BASELINES), key=len, reverse=True))
KEYS = list(dict.fromkeys(key for section in keys.SECTIONS for key in section.model_fields))
SAID = re.compile(rf"^(?:{METHOD})(?![A-Za-z0-9])|{keys.CONTROL}")
"""What the name of an arm says about its strategy: it begins with one, or has the control's name in it."""
FITTED = frozenset(keys.TrainingKeys.model_fields) - {*keys.TokensKeys.model_fields, "strategy"} | {"steps_of"}
"""Keys of fine-tuning, which a baseline does not read."""
READ_BY: dict[str, tuple[str, Set[str]]] = {
    "freeze_layers": ("strategy", {"selective"}),
    "freeze_embeddings": ("strategy", {"selective"}),
    "head_share": ("strategy", {"lp_ft"}),
    "layer_decay": ("strategy", {"layerwise_lr_decay"}),
    "lora_rank": ("strategy", {"lora"}),
    "lora_alpha": ("strategy", {"lora"}),
    "focal_gamma": ("loss", {"focal"}),
    "focal_alpha": ("loss", {"focal"}),
    "cells_per_class": ("train_set", {"single_cell"}),
    "k": ("train_set", {"pseudobulk", "single_cell"}),
    "aggregation": ("train_set", {"pseudobulk"}),
    "depth": ("train_set", {"pseudobulk"}),
    "points": ("train_set", {"pseudobulk"}),
    "token_length": ("train_set", {"pseudobulk"}),
    "validation_cells": ("train_set", {"pseudobulk"}),
    "steps_of": ("train_set", {"pseudobulk", "single_cell"}),
    "group_spread": ("train_set", {"pseudobulk", "single_cell"}),
    "generator": ("train_set", {"synthetic", "mixture"}),
    "variances": ("train_set", {"synthetic"}),
    "means": ("train_set", {"synthetic"}),
    "pad": ("train_set", {"mixture"}),
    "share": ("train_set", {"mixture"}),
    "padded_classes": ("train_set", {"mixture"}),
    "synthetic_cells": ("train_set", {"synthetic"}),
    "covariance_rank": ("train_set", {"synthetic", "mixture"}),
}
"""Which value of which other key makes a key matter: an arm that sets one where nothing reads it is refused."""


class Contrast(NamedTuple):
    """One declared question: by how much `arm` scores higher than `reference`."""

    contrast: str
    reference: str
    arm: str


def expand(
    templates: Mapping[str, Any], where: str, allowed: Set[str], named: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Expand templates such as ``pseudobulk_k{k}: {k: [2, 5]}`` to one arm per combination of listed values.

    Parameters
    ----------
    templates
        Name of an arm, or template of names, to the keys that differ (or null).
    allowed
        Keys in which arms may differ.
    named
        Strategies and baselines: an arm of such a name has it as its strategy, unless it says another.

    Raises
    ------
    UserError
        An unknown key or one that all arms share, a list without {key} in the name or {key} without a value, or a name
        that cannot be used or is given twice.
    """
    if not isinstance(templates, Mapping) or not templates:
        msg = f"{where}: arms: write one `name: {{key: value}}` per arm; there is none."
        raise UserError(msg)
    found: dict[str, dict[str, Any]] = {}
    for template, given in templates.items():
        own = given or {}
        here = f"{where}: arm {template}"
        if not isinstance(own, Mapping):
            msg = f"{here}: write the keys that differ as {{key: value}} (it is {given!r})."
            raise UserError(msg)
        refuse_unknown(own, here, KEYS)
        shared = [key for key in own if key not in allowed]
        if shared:
            msg = f"{here}: all arms of a study share {shared[0]}; set it for the study, or make two tasks of it."
            raise UserError(msg)
        for name, chosen in _combinations(str(template), own, here):
            if not re.fullmatch(keys.NAME_PATTERN, name):
                msg = f"{here}: {name!r} is not a name: use at most 64 letters, digits, _ . and -."
                raise UserError(msg)
            if TAKEN.fullmatch(name):
                msg = f"{here}: another folder beside those of the arms has the name {name!r}; choose another name."
                raise UserError(msg)
            if name in found:
                msg = f"{here}: the arm {name!r} is there already; put what differs into its name."
                raise UserError(msg)
            if name in named:
                chosen.setdefault("strategy", name)
            if "strategy" in chosen:
                require_choice(chosen["strategy"], named, here, "strategy")
            found[name] = chosen
    return found


def expand_contrasts(
    templates: Mapping[str, list[str]], arms: Mapping[str, Mapping[str, Any]], where: str
) -> list[Contrast]:
    """Expand contrasts such as ``fewer steps: [single_cell, single_cell_k{k}_steps]`` to one per fitting arm.

    A {key} that both sides have takes the same value on both, and no arm is compared with itself; a name that stands
    for several contrasts gets the values that it does not have appended.

    Parameters
    ----------
    templates
        Name of a contrast to [reference, arm].
    arms
        Name of each arm to the keys that differ, from `expand`.

    Raises
    ------
    UserError
        A contrast that is not two different arms of the study, or fits none.
    """
    found = []
    for name, pair in templates.items():
        here = f"{where}: contrast {name!r}"
        if len(pair) != 2:
            msg = f"{here}: write [reference, arm] (it has {len(pair)} names)."
            raise UserError(msg)
        sides = [_fitting(side, arms) for side in pair]
        for side, fitting in zip(pair, sides, strict=True):
            if not fitting:
                require_choice(side, arms, here, "arm")
        pairs = [
            (reference, arm, of_reference | of_arm)
            for arm, of_arm in sides[1]
            for reference, of_reference in sides[0]
            if reference != arm and all(of_arm.get(key, value) == value for key, value in of_reference.items())
        ]
        if not pairs:
            msg = f"{here}: {pair[0]} and {pair[1]} have no pair of different arms with the same values."
            raise UserError(msg)
        places = dict.fromkeys(BRACES.findall(name))
        for key in places:
            if key not in pairs[0][2]:
                msg = f"{here}: neither of its arms has {{{key}}} in the name."
                raise UserError(msg)
        for reference, arm, values in pairs:
            unnamed = {key: value for key, value in values.items() if key not in places} if len(pairs) > 1 else {}
            title = ", ".join([_filled(name, values), *(f"{key} = {value}" for key, value in unnamed.items())])
            found.append(Contrast(title, reference, arm))
    return found


def refuse_unread(settings: "Study", own: Mapping[str, Any], where: str) -> None:
    """Raise a `UserError` if an arm sets a key that its strategy, loss or train set does not read."""
    for key in own:
        if settings.is_baseline and key in FITTED:
            msg = f"{where}: {key} is for fine-tuning, and {settings.strategy} is a baseline, which does not read it."
            raise UserError(msg)
        reader, values = READ_BY.get(key, ("", set()))
        value = getattr(settings, reader, None)
        if reader and value not in values:
            needed = " or ".join(sorted(values))
            msg = f"{where}: {key} needs {reader}: {needed}, and this arm has {value}; leave it out."
            raise UserError(msg)


def refuse_misnamed(settings: "Study", where: str) -> None:
    """Raise a `UserError` if the name of an arm says one strategy, such as random_init_focal, and it has another."""
    said = SAID.findall(settings.arm)
    if said and settings.strategy not in said:
        msg = (
            f"{where}: the name says {said[0]}, and the strategy is {settings.strategy}; write strategy: {said[0]}, "
            "or choose another name."
        )
        raise UserError(msg)


def inconsistencies(settings: "Study") -> Iterator[tuple[str, str]]:
    """Give the keys whose values do not go together, each with the reason."""
    is_made = settings.train_set != "single_cell"
    is_split_once = not (settings.folds or settings.group_by)
    rules = {
        "path": (settings.dataset == "own" and not settings.path, "dataset is own, so path must name a file"),
        "folds": (settings.folds == 1, "one fold leaves nothing to train on; set 2 or more, or 0 for one test set"),
        "fold": (
            settings.fold is not None and settings.fold >= settings.folds,
            f"it has to be from 0 to {settings.folds - 1}" if settings.folds else "it has to be null, as folds is 0",
        ),
        "select_values": (
            settings.select_column is None and bool(settings.select_values),
            "needs select_column, the obs column that holds the values",
        ),
        "seeds": (not len(set(settings.seeds)) == len(settings.seeds) > 0, "name each seed once, one at least"),
        "k": (
            (settings.train_set == "pseudobulk" or settings.steps_of == "pseudobulk") and settings.k is None,
            "pseudo-bulk needs the mean number of cells in a group; set it to 2 or more",
        ),
        "k ": (
            settings.train_set == "single_cell" and settings.k is not None and settings.steps_of != "pseudobulk",
            "single cells are in no groups; set steps_of: pseudobulk, or train_set: pseudobulk",
        ),
        "steps_of": (
            (settings.steps_of == settings.train_set and settings.points == "own")
            or settings.steps_of == settings.points == "single_cell"
            or (settings.steps_of == "upsampled" and (is_made or settings.sampling == "upsampled")),
            "these are its own steps; single_cell takes pseudobulk or upsampled, pseudobulk takes single_cell here",
        ),
        "points": (
            settings.points == "single_cell" and settings.aggregation == "one_cell",
            "one cell of each of as many groups are the single cells; set train_set: single_cell",
        ),
        "depth": (
            settings.depth == "single_cell" and settings.aggregation != "sum",
            "only sums are counts that can be thinned; set aggregation: sum",
        ),
        "generator": (
            settings.generator == "copies" and (settings.train_set != "mixture" or settings.pad is None),
            "copies can pad a mixture, and nothing else",
        ),
        "pad": (
            settings.train_set == "mixture" and (settings.pad is None) == (settings.share is None),
            "a mixture needs either pad (cells added to each padded class) or share (of cells replaced)",
        ),
        "padded_classes": (settings.pad is not None and not settings.padded_classes, "pad needs the classes to pad"),
        "validation_share": (
            settings.validation_share == 0
            and (is_made or settings.is_baseline or settings.epoch_rule != "last" or not is_split_once),
            "0 is for strategies on single cells that are split by cell, once, and keep the last epoch; set it above 0",
        ),
        "early_stop": (
            settings.early_stop is not None and settings.epoch_rule == "last",
            "the last epoch is kept, so none may be left out; set epoch_rule: validation_loss",
        ),
        "means": (
            settings.means == "bulk" and settings.train_set != "synthetic",
            "only synthetic cells are drawn around means",
        ),
        "bulk_counts": (
            (settings.train_set == "bulk" or settings.means == "bulk") and settings.bulk_counts is None,
            "the samples are needed; name a csv or tsv, or demo",
        ),
    }
    yield from ((key.strip(), why) for key, (is_wrong, why) in rules.items() if is_wrong)


def _combinations(template: str, own: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the name and keys of each combination of the values that are listed for {key} in a template."""
    places = list(dict.fromkeys(BRACES.findall(template)))
    refuse_unknown(places, where, KEYS)
    for key in places:
        if own.get(key, []) == []:
            msg = f"{where}: the name has {{{key}}}, so {key} needs a value or a list of them."
            raise UserError(msg)
    for key, value in own.items():
        is_list = "list" in str(keys.TrainingKeys.model_fields[key].annotation)
        if isinstance(value, list) and key not in places and not is_list:
            msg = f"{where}: {key} lists {len(value)} values, so the name has to hold {{{key}}}."
            raise UserError(msg)
    values = [own[key] if isinstance(own[key], list) else [own[key]] for key in places]
    for chosen in product(*values):
        given = dict(zip(places, chosen, strict=True))
        name = _filled(template, {key: _written(value) for key, value in given.items()})
        yield name, {**own, **given}


def _fitting(template: str, arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Return the arms whose name a template gives with their own keys, each with the values of its {key}."""
    found = []
    for arm, values in arms.items():
        given = {key: _written(values.get(key)) for key in BRACES.findall(template)}
        if _filled(template, given) == arm:
            found.append((arm, given))
    return found


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with each {key} replaced by its value."""
    return BRACES.sub(lambda place: values[place[1]], template)


def _written(value: Any) -> str:
    """Return a value as it stands in the name of an arm: 0.0005, 10, sum; null is all."""
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
