"""A small table of results that several tests read."""

import numpy as np
import pandas as pd
import pytest

from tuneformer.evaluate.metrics import score
from tuneformer.report.records import COLUMNS

CLASSES = ["Untreated", "Nutlin", "Dex"]
SKILL = {"full": 1.5, "linear_probe": 1.0, "random_init": 0.3}


@pytest.fixture
def results():
    """Rows of metrics.csv: two tasks, three strategies, three seeds; one run failed."""
    rng = np.random.default_rng(0)
    rows = []
    for task in ("drugs", "doses"):
        for strategy, skill in SKILL.items():
            for seed in range(3):
                labels = rng.integers(len(CLASSES), size=60)
                odds = np.exp(rng.normal(size=(60, 3)) + skill * np.eye(3)[labels])
                scores = score(np.array(CLASSES)[labels], odds / odds.sum(axis=1, keepdims=True), CLASSES)
                costs = {"cost:wall_seconds": skill * 10 + seed, "cost:trainable_parameters": int(1000 * skill)}
                table = pd.concat([scores, pd.DataFrame({"metric": list(costs), "value": list(costs.values())})])
                if (task, strategy, seed) == ("doses", "full", 1):
                    table = pd.DataFrame({"metric": ["status:failed"], "value": [1.0]})
                run = {"task": task, "train_set": "single_cell", "strategy": strategy, "seed": seed, "fold": np.nan}
                run |= {"study": "tiny", "dataset": "demo", "n_train": 100, "n_test": 60}
                rows.append(table.assign(**run, fingerprint=f"{task}{strategy}{seed}"))
    return pd.concat(rows, ignore_index=True)[list(COLUMNS)]
