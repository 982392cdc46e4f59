"""Fine-tuning strategies by value: which parts of the model learn from when on, and at which learning rate.

In: a study and its classifier. Out: a `Plan`, the same classifier prepared for it (adapters of ``lora``), and the table
of groups and epochs that a notebook shows.
"""

import math
from collections.abc import Set
from dataclasses import dataclass

import pandas as pd
from torch import nn

from tuneformer.finetune.checkpoints import CellClassifier
from tuneformer.study.params import ParameterError, Study
from tuneformer.study.treatments import BASELINES

HEAD = ("pooler", "classifier")
NEVER = math.inf


@dataclass(frozen=True)
class Plan:
    """When and how fast each parameter group learns, in the order in which a cell passes through the groups.

    ``starts``: share of the optimizer steps after which the group begins to learn (0: from the start, `NEVER`: frozen);
    ``factors``: what the learning rate is multiplied by.
    """

    starts: dict[str, float]
    factors: dict[str, float]

    def learning(self, step: int, total_steps: int) -> frozenset[str]:
        """Return the groups that learn in a step, counted from 0."""
        return frozenset(
            group for group, start in self.starts.items() if start != NEVER and step >= round(start * total_steps)
        )


def prepare(settings: Study, model: CellClassifier) -> Plan:
    """Make a classifier ready for the strategy of a run, and return the plan.

    - ``full``, ``random_init``: everything learns.
    - ``linear_probe``: only the new head (pooler and classifier).
    - ``selective``: everything but the first ``freeze_layers`` encoder layers, as the official ``freeze_layers`` does;
      with ``freeze_embeddings`` not the embeddings either.
    - ``lp_ft``: the head for ``head_share`` of the epochs, then everything (Kumar et al. 2022, arXiv:2202.10054).
    - ``gradual_last_to_first``: the head, then one block more at a time from the last layer down to the embeddings,
      evenly over the epochs (Howard & Ruder 2018, arXiv:1801.06146).
    - ``gradual_first_to_last``: the same from the embeddings up.
    - ``layerwise_lr_decay``: everything, each layer at ``layer_decay`` times the learning rate of the one above it.
    - ``lora``: the head, and low-rank updates of the query and value matrices of all layers, which are added to the
      model here (Hu et al. 2021, arXiv:2106.09685).

    Stages begin with an epoch where there are enough epochs, else within one.

    Parameters
    ----------
    settings
        The run.
    model
        Its classifier; ``lora`` changes it in place.

    Raises
    ------
    ParameterError
        ``freeze_layers`` is larger than the number of encoder layers, or the strategy is a baseline.
    """
    if settings.strategy in BASELINES:
        msg = (
            f"strategy: {settings.strategy} is a baseline, which is fitted and not fine-tuned; run "
            f"python -m tuneformer.report.baseline_runs --study {settings.study} --task {settings.task} "
            f"--train-set {settings.train_set} --seeds {settings.seed}."
        )
        raise ParameterError(msg)
    body = ["embeddings", *(f"layer_{number}" for number in range(model.config.num_hidden_layers))]
    starts = dict.fromkeys([*body, *HEAD], 0.0)
    factors = dict.fromkeys([*body, *HEAD], 1.0)
    strategy = settings.base_strategy
    match strategy:
        case "linear_probe":
            starts |= dict.fromkeys(body, NEVER)
        case "selective":
            layers = body[1:]
            if settings.freeze_layers > len(layers):
                msg = (
                    f"freeze_layers: {settings.freeze_layers} layers, but the checkpoint has {len(layers)}; set fewer."
                )
                raise ParameterError(msg)
            starts |= dict.fromkeys(layers[: settings.freeze_layers], NEVER)
            starts |= {"embeddings": NEVER} if settings.freeze_embeddings else {}
        case "lp_ft":
            starts |= dict.fromkeys(body, _stage_start(settings.head_share, settings.epochs, n_stages=2))
        case "gradual_last_to_first" | "gradual_first_to_last":
            order = body if strategy == "gradual_first_to_last" else body[::-1]
            n_stages = len(order) + 1
            for stage, group in enumerate(order, start=1):
                starts[group] = _stage_start(stage / n_stages, settings.epochs, n_stages=n_stages)
        case "layerwise_lr_decay":
            factors |= {group: settings.layer_decay**depth for depth, group in enumerate(body[::-1], start=1)}
        case "lora":
            _add_adapters(settings, model)
            starts = dict.fromkeys(body, NEVER) | dict.fromkeys(["lora", *HEAD], 0.0)
            factors["lora"] = 1.0
    return Plan(starts=starts, factors={group: factors[group] for group in starts})


def group_of(name: str) -> str:
    """Return the parameter group of a parameter of a `CellClassifier`, such as ``layer_0``."""
    if ".lora_" in name:
        return "lora"
    if name.startswith("bert.encoder.layer."):
        return f"layer_{name.split('.')[3]}"
    return "classifier" if name.startswith("classifier.") else name.split(".")[1]


def parameters_by_group(model: CellClassifier) -> dict[str, dict[str, nn.Parameter]]:
    """Return the named parameters of each group."""
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        groups.setdefault(group_of(name), {})[name] = weight
    return groups


def learning_parameters(model: CellClassifier, plan: Plan) -> dict[str, nn.Parameter]:
    """Return the named parameters that learn at any time."""
    groups = parameters_by_group(model)
    learning = [group for group, start in plan.starts.items() if start != NEVER]
    return {name: weight for group in learning for name, weight in groups[group].items()}


def set_learning(model: CellClassifier, groups: Set[str]) -> None:
    """Let exactly the parameters of `groups` learn; the others get no gradient, so the optimizer leaves them alone."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(group_of(name) in groups)


def optimizer_groups(settings: Study, model: CellClassifier, plan: Plan) -> list[dict]:
    """Return the parameters that ever learn as AdamW takes them, each group at its learning rate.

    Biases and the weights of normalisations do not decay, as in the Trainer of transformers.
    """
    listed = []
    for name, weight in learning_parameters(model, plan).items():
        decay = settings.weight_decay if weight.ndim > 1 else 0.0
        rate = settings.peak_learning_rate * plan.factors[group_of(name)]
        listed.append({"params": [weight], "lr": rate, "weight_decay": decay})
    return _joined(listed)


def schedule_table(plan: Plan, *, epochs: int, model: CellClassifier) -> pd.DataFrame:
    """Show which groups learn in which epoch.

    Returns
    -------
    One row a group, in the order of the model. ``parameters``: how many it has. ``epoch 1`` and on: the factor on the
    learning rate, ``–`` where the group is frozen, ``from 50%`` where it begins within the epoch.
    """
    groups = parameters_by_group(model)
    table = pd.DataFrame({"parameters": {group: _size(groups[group]) for group in plan.starts}})
    for epoch in range(epochs):
        table[f"epoch {epoch + 1}"] = [_shown(plan, group, epoch, epochs) for group in plan.starts]
    return table


def training_flops(model: CellClassifier, *, n_tokens: int, n_pairs: int, learning: Set[str]) -> float:
    """Estimate the floating-point operations of training steps (a multiplication and an addition count as two).

    Per token and weight of an encoder layer: 2 forward, 2 for the gradient of the layer's input wherever something in
    or below the layer learns, 2 for the gradient of a learning weight. Attention scores and sums: 4 x width per pair of
    tokens forward, twice that backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, where all weights learn).
    Embeddings are looked up, the head reads one position a cell, adapters are small: all three are left out.

    Parameters
    ----------
    model
        The classifier.
    n_tokens
        Tokens that passed, padding included.
    n_pairs
        Pairs of tokens of the same cell, padding included.
    learning
        The groups that learnt.
    """
    flops = 0.0
    reached = bool({"embeddings", "lora"} & learning)
    for group, weights in parameters_by_group(model).items():
        if not group.startswith("layer_"):
            continue
        learns = group in learning
        reached = reached or learns
        n_weights = _size({name: weight for name, weight in weights.items() if weight.ndim == 2})
        flops += n_tokens * n_weights * 2 * (1 + reached + learns)
        flops += n_pairs * model.config.hidden_size * 4 * (1 + 2 * reached)
    return flops


def _stage_start(share: float, epochs: int, *, n_stages: int) -> float:
    """Return the share of the steps after which a stage begins: a whole epoch if each stage can have one."""
    if epochs < n_stages:
        return share
    return min(max(1, round(share * epochs)), epochs - 1) / epochs


def _shown(plan: Plan, group: str, epoch: int, epochs: int) -> str:
    waits = round(plan.starts[group] * epochs - epoch, 6)  # epochs
    if waits >= 1:
        return "–"
    factor = f"{plan.factors[group]:.3g}"
    return factor if waits <= 0 else f"{factor} from {waits:.0%}"


def _size(weights: dict[str, nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights.values())


def _joined(listed: list[dict]) -> list[dict]:
    """Join optimizer groups with the same options."""
    joined: dict[tuple[float, float], dict] = {}
    for group in listed:
        same = joined.setdefault((group["lr"], group["weight_decay"]), group | {"params": []})
        same["params"] += group["params"]
    return list(joined.values())


def _add_adapters(settings: Study, model: CellClassifier) -> None:
    import peft  # only this strategy needs it

    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=["query", "value"], lora_dropout=0.0
    )
    peft.inject_adapter_in_model(config, model)
