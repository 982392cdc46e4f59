"""The shipped checkpoint was worth its pre-training: the committed results of study demo_transfer say so."""

from tuneformer.evaluate.statistics import paired_difference
from tuneformer.report import records
from tuneformer.study.params import load_study


def test_pre_training_beats_random_init_by_an_interval_above_zero():
    metrics = records.read_metrics("demo_transfer")
    scores = metrics[metrics["metric"] == "macro_f1"]
    asked = load_study("demo_transfer")
    assert set(scores["seed"]) == set(asked.seeds)
    assert set(scores["strategy"]) == {*asked.strategies, *asked.baselines}
    found = paired_difference(scores, "full", "random_init")
    assert found.n == len(asked.seeds) >= 5
    assert found.low > 0
