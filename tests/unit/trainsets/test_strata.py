"""Strata: class within dose, in a fixed order, or a sentence that says what is missing."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tuneformer.study.params import load_study
from tuneformer.trainsets.strata import TrainSetError, strata


@pytest.fixture
def cells():
    label = pd.Categorical(["Dex", "Untreated", "Dex", "Dex"], categories=["Untreated", "Dex"], ordered=True)
    obs = pd.DataFrame({"label": label, "dose": [10.0, 0.0, 0.5, 10.0]}, index=list("abcd"))
    return ad.AnnData(np.ones((4, 1)), obs=obs)


def test_a_stratum_is_a_class_at_a_dose(cells):
    found = strata(cells, load_study("tiny"))
    assert list(found) == ["Dex @ 10", "Untreated @ 0", "Dex @ 0.5", "Dex @ 10"]
    assert list(found.cat.categories) == ["Untreated @ 0", "Dex @ 0.5", "Dex @ 10"]
    assert list(found.index) == list("abcd")


def test_without_a_dose_column_it_is_the_class(cells):
    found = strata(cells, load_study("tiny", dose_column=None))
    assert list(found) == ["Dex", "Untreated", "Dex", "Dex"]
    assert list(found.cat.categories) == ["Untreated", "Dex"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda obs: obs.assign(dose=[1, np.nan, 2, 3]),
            r"dose_column: 1 cells have no 'dose' \(first: b\); drop them",
        ),
        (lambda obs: obs.drop(columns="dose"), "dose_column: the cells have no obs column 'dose'"),
        (
            lambda obs: obs.assign(label=obs["label"].cat.add_categories("BMS")),
            "Class 'BMS' has no cells to make others from; leave it out of classes",
        ),
    ],
)
def test_what_is_missing_is_said(cells, change, sentence):
    cells.obs = change(cells.obs)
    with pytest.raises(TrainSetError, match=sentence):
        strata(cells, load_study("tiny"))
