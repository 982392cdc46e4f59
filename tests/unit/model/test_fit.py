import numpy as np
from tuneformer.model import fit
def test_it_learns_and_reports(run_settings, tokens):
    outcome = fit.fit_cells(run_settings(epochs=6), tokens)
    print(outcome.history, outcome.cost)
    assert outcome.status == "ok"
    assert list(outcome.history["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert outcome.history["validation_macro_f1"].max() > 0.9
