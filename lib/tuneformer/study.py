"""What a study asks, and the settings of one run.

In: ``params/<study>.yaml``, which holds only what differs from `tuneformer.keys`, and the changes of one run. Out: a
frozen `Study`, resolved for one task and one arm; or one sentence that names file, key and the nearest valid key.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import PrivateAttr, ValidationError, field_validator

from tuneformer import arms, params, paths
from tuneformer.arms import Contrast
from tuneformer.artifacts import UserError
from tuneformer.keys import (  # noqa: F401 (whoever reads a study takes its sections from here)
    BASELINES,
    CONTROL,
    GENE_BASELINES,
    STRATEGIES,
    AskedKeys,
    CellsKeys,
    CompressionKeys,
    GenesKeys,
    Name,
    PretrainingKeys,
    Section,
    TaskKeys,
    TokensKeys,
    TrainingKeys,
    TrainSetKeys,
)


class Study(AskedKeys, TrainingKeys, GenesKeys, CompressionKeys, PretrainingKeys):
    """The settings of a study, resolved for one task and one arm, and for a run of one seed and fold."""

    study: Name
    _loaded_with: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("label")
    @classmethod
    def _expanded(cls, label: str) -> str:
        return os.path.expandvars(label) or label  # params/own_data.yaml says $LABEL; without a value it stays

    @property
    def simulated(self) -> bool:
        """Whether the cells are simulated, which every document that shows their numbers has to say."""
        return self.dataset in ("demo", "demo_pancreas") and not self.pretrain_files

    @property
    def is_baseline(self) -> bool:
        """Whether the arm is a baseline, which is fitted and not fine-tuned."""
        return self.strategy in (*BASELINES, *GENE_BASELINES)

    @property
    def is_control(self) -> bool:
        """Whether the arm is the control: the same model without pre-training."""
        return self.strategy == CONTROL

    def describe(self) -> str:
        """Return the name of a run as progress lines show it."""
        fold = "" if self.fold is None else f" fold {self.fold}"
        return f"{self.task} {self.arm} seed {self.seed}{fold}"

    def keys(self, section: type[Section]) -> dict[str, Any]:
        """Return the keys of a section (such as `TokensKeys`, which has all keys before it) with their values."""
        return self.model_dump(include=set(section.model_fields))

    def arm_keys(self) -> dict[str, Any]:
        """Return strategy, train_set and every key that some arm of the study sets, with the values of this arm."""
        names = {key for own in self.arms.values() for key in own or {}}
        return {
            key: getattr(self, key) for key in TrainingKeys.model_fields if key in {"strategy", "train_set", *names}
        }

    def with_arm(self, arm: str) -> "Study":
        """Return the settings of another arm of the same task."""
        place = {key: getattr(self, key) for key in ("task", "seeds", "seed", "fold")}
        return load_study(self.study, **{**self._loaded_with, **place, "arm": arm})

    def at(self, **place: int | None) -> "Study":
        """Return the settings of another seed and fold of the same arm, such as ``at(seed=1, fold=None)``."""
        return self.model_copy(update=place)

    def runs(self) -> list["Study"]:
        """Return the settings of all runs of this arm and task: each seed, and for each seed every fold."""
        folds = range(self.folds) if self.folds else [None]
        return [self.at(seed=seed, fold=fold) for seed in self.seeds for fold in folds]

    def parts(self) -> list["Study"]:
        """Return the jobs into which this arm is divided: one, or one per ``seeds_per_job`` seeds."""
        size = self.seeds_per_job or len(self.seeds)
        chunks = [self.seeds[start : start + size] for start in range(0, len(self.seeds), size)]
        return [self.model_copy(update={"seeds": chunk, "seed": chunk[0]}) for chunk in chunks]


TASK_KEYS = frozenset(TaskKeys.model_fields)
ARM_KEYS = frozenset(TrainingKeys.model_fields) - frozenset(CellsKeys.model_fields) - {"device", "threads"}
"""Keys in which arms may differ: all of them get the same cells, task and split."""
UNDER_REFERENCE = frozenset({"task", "arm", "seed", "fold", "seeds", "threads", "device"})
"""What a run may change and still be checked against ``expected_macro_f1`` of its study."""
RESOLVED = frozenset({"arms", "tasks", "task", "arm"})
"""What `load_study` works out, and does not take as it is written."""
REAL, MAIN = "pbmc68k", "demo"
NAMED = {
    "cells": (*STRATEGIES, *BASELINES),
    "genes": (*STRATEGIES, *GENE_BASELINES),
    "compression": tuple(STRATEGIES),
}
"""By kind of study, the strategies and baselines that an arm may have; an arm of such a name needs no keys."""


def load_study(name: str, **changes: Any) -> Study:
    """Resolve a study for one task and one arm.

    Parameters
    ----------
    name
        Name of a file in ``params/``, without ``.yaml``.
    changes
        Keys that replace what the files say, such as ``task="nutlin_2class"``, ``arm="lora"`` or
        ``learning_rate=1e-4``. ``strategy="lora"`` alone asks for the arm of that name, which need not be in the file.

    Returns
    -------
    The study. Later wins: defaults, the task keys of the task's file, the study's file, the keys of the arm, `changes`.

    Raises
    ------
    UserError
        Unknown or duplicate key, wrong type, bad name, or an arm that sets a key which it does not read; the message
        names file, key and the nearest valid key.
    """
    where, on_run = f"params/{name}.yaml", f"the changes of a run of {name}"
    own = params.read(params.file_of(name))
    params.refuse_unknown(own, where, Study.model_fields)
    params.refuse_unknown(changes, on_run, Study.model_fields)
    values = {key: field.default for key, field in Study.model_fields.items()} | {"study": name}
    asked = {**own, **{key: value for key, value in changes.items() if value is not None}}
    values["tasks"] = asked.get("tasks") or [name]
    params.require_list(values["tasks"], where, "tasks")
    values["task"] = asked.get("task") or values["tasks"][0]
    params.require_choice(values["task"], values["tasks"], where, "task")
    from_task = {}
    if values["task"] != name:
        whole = params.read(params.file_of(values["task"]))
        params.refuse_unknown(whole, f"params/{values['task']}.yaml", Study.model_fields)
        from_task = {key: value for key, value in whole.items() if key in TASK_KEYS}
    if set(changes) - UNDER_REFERENCE:  # a reference holds for a study as its files state it
        changes = {"expected_macro_f1": {}, **changes}
    named = NAMED.get(str(asked.get("kind")), NAMED["cells"])
    given_arms = asked.get("arms", {arm: None for arm in values["arms"] if arm in named})
    values["arms"] = arms.expand(given_arms, where, ARM_KEYS, named)
    arm = asked.get("arm") or changes.pop("strategy", None) or next(iter(values["arms"]))
    params.require_choice(arm, dict.fromkeys([*values["arms"], *named]), where, "arm")
    own_keys = values["arms"].setdefault(arm, {"strategy": arm})
    if changes.get("strategy") and own_keys.get("strategy", changes["strategy"]) != changes["strategy"]:
        msg = f"{on_run}: the strategy of the arm {arm} is {own_keys['strategy']}; ask for another arm instead."
        raise UserError(msg)
    if "contrasts" not in own:  # those of the default that this study's arms allow
        pairs = values["contrasts"].items()
        values["contrasts"] = {name: pair for name, pair in pairs if {*pair} <= values["arms"].keys()}
    layers = {
        f"params/{values['task']}.yaml": from_task,
        where: {key: value for key, value in own.items() if key not in RESOLVED},
        f"{where}: arm {arm}": own_keys,
        on_run: {key: value for key, value in changes.items() if key not in RESOLVED},
    }
    settings = _validated({**values, "arm": arm}, layers)
    params.require_choice(settings.strategy, named, where, "strategy")
    arms.refuse_misnamed(settings, f"{where}: arm {arm}")
    arms.refuse_unread(settings, own_keys, f"{where}: arm {arm}")
    settings._loaded_with.update(changes)
    return settings


def from_notebook(namespace: Mapping[str, Any]) -> Study:
    """Resolve the study of a notebook from the plain values that its parameters cell defined.

    `namespace` is ``globals()`` directly after that cell. Every plain value (text, number, list, null) counts as a
    parameter, so that ``papermill … -p learning_rate 1e-4`` works for each key and a misspelt one is an error
    (papermill itself only warns and goes on). Raises as `load_study`; also when ``study`` is not defined.
    """
    plain = (str, int, float, bool, list, type(None))
    hidden = {"In", "Out", "exit", "quit"}
    given = {
        key: value
        for key, value in namespace.items()
        if isinstance(value, plain) and not key.startswith("_") and key not in hidden
    }
    if "study" not in given:
        msg = 'The notebook has no parameter `study`: set one in its parameters cell, such as study = "tiny".'
        raise UserError(msg)
    return load_study(given.pop("study"), **given)


def jobs(name: str) -> list[Study]:
    """List the jobs of a study: one per task, arm and part of its seeds, in the order of its params file."""
    first = load_study(name)
    return [
        part
        for task in first.tasks
        for of_task in [load_study(name, task=task)]
        for arm in first.arms
        for part in of_task.with_arm(arm).parts()
    ]


def batch(name: str) -> list[str]:
    """List the studies of a batch.

    ``default`` is `REAL` and `MAIN`, ``all`` every demo study, any other name that study.
    """
    if name == "default":
        return [REAL, MAIN]
    if name != "all":
        return [name]
    others = sorted(path.stem for path in paths.PARAMS.glob(f"{MAIN}_*.yaml"))
    return [MAIN, *(study for study in others if load_study(study).pretrain_output is None)]


def contrasts(settings: Study) -> list[Contrast]:
    """List the declared contrasts of a study, with one per value where their arms have {key} in the name."""
    return arms.expand_contrasts(settings.contrasts, settings.arms, f"params/{settings.study}.yaml")


def _validated(values: dict[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Study:
    origin: dict[str, str] = {}
    for where, content in layers.items():
        for key, value in content.items():
            values[key] = _number(key, value)
            origin[key] = where
    if values["folds"] and values["fold"] is None:
        values["fold"] = 0
    own = origin.get("study", f"params/{values['study']}.yaml")
    try:
        settings = Study.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        msg = (
            f"{origin.get(key, own)}: {key}: {first['msg'].removeprefix('Value error, ')} (it is {values.get(key)!r})."
        )
        raise UserError(msg) from None
    for key, why in arms.inconsistencies(settings):
        msg = f"{origin.get(key, own)}: {key}: {why}."
        raise UserError(msg)
    return settings


def _number(key: str, value: Any) -> Any:
    """Read a whole number as a float where the key is one (strict types would refuse ``1`` for ``1.0``)."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and "float" in str(Study.model_fields[key].annotation) else value


def main(names: list[str]) -> int:
    """Print the size of each study of a batch; end with 2 and one sentence when one cannot be used."""
    try:
        for study in batch(names[0] if names else "default"):
            asked = jobs(study)
            n_runs = sum(len(job.runs()) for job in asked)
            sides = {"arm": len(asked[0].arms), "task": len(asked[0].tasks), "run": n_runs, "job": len(asked)}
            counts = [f"{number} {what}{'' if number == 1 else 's'}" for what, number in sides.items()]
            print(f"Study {study} ({asked[0].kind}): {', '.join(counts)}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
