"""What CONTRIBUTING.md says about adding things: its worked example is executed, and names are compared with code."""

import re

import pytest
import torch

from tuneformer import paths
from tuneformer.keys import TrainingKeys
from tuneformer.model import strategies
from tuneformer.study import load_study

TEXT = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]


@pytest.fixture
def bitfit(monkeypatch):
    """The strategy of the worked example, added as its text says."""
    namespace = dict(vars(strategies))
    exec(EXAMPLE, namespace)
    monkeypatch.setitem(strategies.STRATEGIES, "bitfit", namespace["bitfit"])
    return load_study("tiny", seeds=[0], epochs=1, min_counts=600).model_copy(update={"strategy": "bitfit"})


def test_the_worked_example_trains_biases_and_head_alone(bitfit):
    from tuneformer.cells import make
    from tuneformer.model import classifier, fit

    tokens = make.prepare(bitfit).tokens
    outcome = fit.fit_cells(bitfit, tokens)
    assert outcome.status == "ok", outcome.reason
    torch.manual_seed(bitfit.seed)
    before = dict(classifier.build(bitfit, tokens.vocabulary, tokens.classes).named_parameters())
    changed = {
        name
        for name, weight in outcome.model.named_parameters()
        if name.startswith("bert.") and "pooler" not in name and not torch.equal(weight, before[name])
    }
    biases = {name for name in before if re.search(r"^bert\.(embeddings|encoder)\..*\.bias$", name)}
    assert changed <= biases
    assert len(changed) > len(biases) / 2  # a key's bias has no gradient: softmax takes it out
    assert outcome.cost["trainable_parameters"] < sum(weight.numel() for weight in before.values()) / 10


def test_names_in_keys_are_those_of_the_code():
    from typing import get_args

    from tuneformer.cells import synthetic
    from tuneformer.model import baselines, losses

    def values(key):
        return set(get_args(TrainingKeys.model_fields[key].annotation))

    assert set(losses.LOSSES) == values("loss")
    assert {*synthetic.GENERATORS, "copies"} == values("generator")
    assert set(baselines.BASELINES) <= set(get_args(get_args(TrainingKeys.model_fields["strategy"].annotation)[1]))
