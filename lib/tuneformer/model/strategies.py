"""Fine-tuning strategies: which parts of the model learn, from when on, and at which learning rate.

In: the settings of a run and its model. Out: a `Plan`. A strategy is one function that returns what differs from "all
parts learn from the first step at the full rate", and a name in `STRATEGIES`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tuneformer.artifacts import UserError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from tuneformer.study import Study

HEAD = ("pooler", "classifier")
NEVER = math.inf


@dataclass(frozen=True)
class Plan:
    """When and how fast each group of parameters learns: ``embeddings``, ``layer_<n>``, and the parts of the head.

    ``starts``: share of the optimizer steps after which a group begins to learn (0: from the start; `NEVER`: frozen).
    ``factors``: on the learning rate. ``groups``: more groups, each with the regular expression of the names of the
    parameters that belong to it and to no other. ``adapters``: arguments of peft's ``LoraConfig``, which adds them.
    ``pretrained``: whether the body starts from the weights of the checkpoint; `classifier.build` reads it.
    """

    starts: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, Any] | None = None
    pretrained: bool = True

    def group_of(self, name: str) -> str:
        """Return the group of a parameter, such as ``layer_0`` for bert.encoder.layer.0.output.dense.weight."""
        own = (group for group, pattern in self.groups.items() if re.search(pattern, name))
        return next(own, part_of(name))

    def learning(self, step: int, total_steps: int) -> frozenset[str]:
        """Return the groups that learn in a step, counted from 0."""
        return frozenset(
            group for group, start in self.starts.items() if start != NEVER and step >= round(start * total_steps)
        )


def full(settings: "Study", body: list[str]) -> Plan:
    """Let everything learn from the first step on."""
    return Plan()


def random_init(settings: "Study", body: list[str]) -> Plan:
    """Do as ``full``, but take nothing from the checkpoint except the architecture: the control."""
    return Plan(pretrained=False)


def linear_probe(settings: "Study", body: list[str]) -> Plan:
    """Let only the new head learn; embeddings and encoder stay as pre-training left them."""
    return Plan(starts=_frozen(body))


def selective(settings: "Study", body: list[str]) -> Plan:
    """Freeze the first layers, as the official ``freeze_layers``; with ``freeze_embeddings`` the embeddings too."""
    first = ["embeddings"] * settings.freeze_embeddings + body[1 : 1 + settings.freeze_layers]
    if settings.freeze_layers >= len(body):
        msg = f"freeze_layers: {settings.freeze_layers} layers, but the checkpoint has {len(body) - 1}; set fewer."
        raise UserError(msg)
    return Plan(starts=_frozen(first))


def lp_ft(settings: "Study", body: list[str]) -> Plan:
    """Train the head for ``head_share`` of the epochs, then everything (Kumar et al. 2022, arXiv:2202.10054)."""
    return Plan(starts=dict.fromkeys(body, _stage_start(settings.head_share, settings.epochs, n_stages=2)))


def gradual_last_to_first(settings: "Study", body: list[str]) -> Plan:
    """Thaw one block at a time, from the head and last layer down (Howard & Ruder 2018, arXiv:1801.06146)."""
    return Plan(starts=_one_by_one(body[::-1], settings.epochs))


def gradual_first_to_last(settings: "Study", body: list[str]) -> Plan:
    """Train the head, then thaw one block at a time, from the embeddings up."""
    return Plan(starts=_one_by_one(body, settings.epochs))


def layerwise_lr_decay(settings: "Study", body: list[str]) -> Plan:
    """Let everything learn, each layer at ``layer_decay`` times the learning rate of the layer above it."""
    return Plan(factors={group: settings.layer_decay**depth for depth, group in enumerate(body[::-1], start=1)})


def lora(settings: "Study", body: list[str]) -> Plan:
    """Train the head and low-rank updates of all query and value matrices (Hu et al. 2021, arXiv:2106.09685)."""
    adapters = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "target_modules": ["query", "value"]}
    return Plan(starts=_frozen(body), groups={"lora": r"\.lora_"}, adapters=adapters)


STRATEGIES: dict[str, Callable[["Study", list[str]], Plan]] = {
    "full": full,
    "linear_probe": linear_probe,
    "selective": selective,
    "lp_ft": lp_ft,
    "gradual_last_to_first": gradual_last_to_first,
    "gradual_first_to_last": gradual_first_to_last,
    "layerwise_lr_decay": layerwise_lr_decay,
    "lora": lora,
    "random_init": random_init,
}
"""Name to function: from the settings and the groups of the body, the embeddings first, to the plan."""


def plan_of(settings: "Study", n_layers: int) -> Plan:
    """Return what the strategy of a run says about a model of so many encoder layers; UserError if it is unknown."""
    if settings.strategy not in STRATEGIES:
        msg = f"strategy: {settings.strategy} is no way to fine-tune; set it to one of {', '.join(STRATEGIES)}."
        raise UserError(msg)
    return STRATEGIES[settings.strategy](settings, ["embeddings", *(f"layer_{n}" for n in range(n_layers))])


def prepare(settings: "Study", model: "nn.Module") -> Plan:
    """Make a model ready for the strategy of a run, and return the whole plan: start and factor of each of its groups.

    Groups come in the order in which a cell passes through them, the strategy's own before the head. The model is a
    BERT with any head; ``lora`` adds its adapters to it, in place.

    Raises
    ------
    UserError
        The strategy freezes more layers than there are, or names a group without parameters.
    """
    plan = plan_of(settings, model.config.num_hidden_layers)
    if plan.adapters:
        import peft

        peft.inject_adapter_in_model(peft.LoraConfig(**plan.adapters), model)
    names = [name for name, _ in model.named_parameters()]
    parts, present = list(dict.fromkeys(map(part_of, names))), set(map(plan.group_of, names))
    n_body = 1 + model.config.num_hidden_layers
    known = [*parts[:n_body], *plan.groups, *parts[n_body:]]
    missing = {*plan.starts, *plan.factors} - {*known, *HEAD} | plan.groups.keys() - present
    if missing:
        msg = f"strategy: {settings.strategy} names the group {min(missing)}, but no parameter of the model is in it."
        raise UserError(msg)
    groups = [group for group in known if group in present]
    starts = {group: plan.starts.get(group, 0.0) for group in groups}
    return replace(plan, starts=starts, factors={group: plan.factors.get(group, 1.0) for group in groups})


def merge_adapters(model: "nn.Module") -> None:
    """Add the updates of ``lora`` to the matrices that they update, in place: the model has its own layers again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def learning_parameters(model: "nn.Module", plan: Plan) -> dict[str, "nn.Parameter"]:
    """Return the named parameters that learn at any time."""
    return {name: weight for name, weight in model.named_parameters() if plan.starts[plan.group_of(name)] != NEVER}


def set_learning(model: "nn.Module", plan: Plan, groups: Set[str]) -> None:
    """Let exactly the parameters of `groups` learn; the others get no gradient, so the optimizer leaves them alone."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(plan.group_of(name) in groups)


def optimizer_groups(settings: "Study", model: "nn.Module", plan: Plan) -> list[dict[str, Any]]:
    """Return the parameters that ever learn as AdamW takes them, each group at its learning rate.

    Biases and the weights of normalisations do not decay, as in the Trainer of transformers.
    """
    joined: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in learning_parameters(model, plan).items():
        rate = settings.learning_rate * plan.factors[plan.group_of(name)]
        joined.setdefault((rate, settings.weight_decay if weight.ndim > 1 else 0.0), []).append(weight)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in joined.items()]


def schedule_table(plan: Plan, *, epochs: int, model: "nn.Module") -> "pd.DataFrame":
    """Show for each group its number of ``parameters`` and, in ``epoch 1`` and on, the factor on the learning rate.

    ``–`` where the group is frozen, ``from 50%`` where it begins within the epoch.
    """
    import pandas as pd

    sizes = dict.fromkeys(plan.starts, 0)
    for name, weight in model.named_parameters():
        sizes[plan.group_of(name)] += weight.numel()
    table = pd.DataFrame({"parameters": sizes})
    for epoch in range(epochs):
        table[f"epoch {epoch + 1}"] = [_shown(plan, group, epoch, epochs) for group in plan.starts]
    return table


def training_flops(model: "nn.Module", plan: Plan, *, n_tokens: int, n_pairs: int, learning: Set[str]) -> float:
    """Estimate the floating-point operations of training steps (a multiplication and an addition count as two).

    Per token and weight of an encoder layer: 2 forward, 2 for the gradient of the layer's input wherever something in
    or below the layer learns, 2 for the gradient of a learning weight. Attention scores and sums: 4 x width per pair of
    tokens forward, twice that backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, where all weights learn).
    Embeddings are looked up, the head reads one position per cell, adapters are small: all three are left out.

    `n_tokens` and `n_pairs`: tokens, and pairs of tokens of the same cell, that passed while the groups `learning`
    learnt; padding included.
    """
    flops, reached = 0.0, False
    for part, weights in groupby(model.named_parameters(), key=lambda named: part_of(named[0])):
        in_part = [(name, weight, plan.group_of(name) in learning) for name, weight in weights]
        reached = reached or any(learns for *_, learns in in_part)
        if part.startswith("layer_"):
            flops += n_pairs * model.config.hidden_size * 4 * (1 + 2 * reached)
            for name, weight, learns in in_part:
                if weight.ndim == 2 and "lora_" not in name:
                    flops += n_tokens * weight.numel() * 2 * (1 + reached + learns)
    return flops


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: embeddings, layer_<n>, pooler, or its first word."""
    words = name.removeprefix("bert.").split(".")
    return f"layer_{words[2]}" if words[0] == "encoder" else words[0]


def _frozen(groups: Iterable[str]) -> dict[str, float]:
    """Return starts of groups that never learn."""
    return dict.fromkeys(groups, NEVER)


def _one_by_one(order: list[str], epochs: int) -> dict[str, float]:
    """Return starts at which the groups of `order` follow the head one by one, evenly over the epochs."""
    n = len(order) + 1
    return {group: _stage_start(stage / n, epochs, n_stages=n) for stage, group in enumerate(order, start=1)}


def _stage_start(share: float, epochs: int, *, n_stages: int) -> float:
    """Return the share of the steps after which a stage begins: a whole epoch if each stage can have one."""
    if epochs < n_stages:
        return share
    return min(max(1, round(share * epochs)), epochs - 1) / epochs


def _shown(plan: Plan, group: str, epoch: int, epochs: int) -> str:
    waits = round(plan.starts[group] * epochs - epoch, 6)  # epochs
    factor = f"{plan.factors[group]:.3g}"
    return "–" if waits >= 1 else factor if waits <= 0 else f"{factor} from {waits:.0%}"
