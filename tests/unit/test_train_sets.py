"""Names of train sets: each form is read, anything else is refused with the forms."""

import pytest

from tuneformer.study import paths
from tuneformer.study.params import ParameterError, load_study
from tuneformer.study.train_sets import TrainSet, parse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single_cell", TrainSet("single_cell")),
        ("single_cell_n30", TrainSet("single_cell", amount="n", number=30)),
        ("single_cell_k5", TrainSet("single_cell", k=5, control="points")),
        ("single_cell_k25_steps", TrainSet("single_cell", k=25, control="steps")),
        ("pseudobulk_k10_approx_mean", TrainSet("pseudobulk", k=10, aggregation="approx_mean")),
        ("pseudobulk_k2_sum_thinned", TrainSet("pseudobulk", k=2, aggregation="sum", control="thinned")),
        ("synthetic_gaussian", TrainSet("synthetic", generator="gaussian")),
        ("synthetic_gaussian_full", TrainSet("synthetic", generator="gaussian_full")),
        ("synthetic_nb_copula_untreated", TrainSet("synthetic", generator="nb_copula", control="untreated")),
        ("mixture_nb_share50", TrainSet("mixture", generator="nb", amount="share", number=50)),
        ("mixture_copies_pad700", TrainSet("mixture", generator="copies", amount="pad", number=700)),
        ("bulk", TrainSet("bulk")),
        ("synthetic_nb_copula_bulk", TrainSet("synthetic", generator="nb_copula", control="bulk")),
    ],
)
def test_a_name_says_all(name, expected):
    assert parse(name) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pseudobulk_k5", "'pseudobulk_k5' is no train set; the forms are single_cell, "),
        ("pseudobulk_k5_median", "is no train set"),
        ("single_cell_k5_thinned", "is no train set"),
        ("synthetic_vae", "is no train set"),
        ("mixture_nb", "is no train set"),
        ("pseudobulk_k1_sum", "k is the number of cells in a group and must be 2 or more"),
        ("mixture_nb_share100", "a share is a whole percentage from 1 to 99"),
        ("mixture_nb_pad0", "any other number of cells at least 1"),
        ("pseudobulk_k5_mean_thinned", "only sums are counts that can be thinned; write pseudobulk_k5_sum_thinned"),
        ("mixture_copies_share50", "copies can pad"),
    ],
)
def test_anything_else_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        parse(name)


def test_a_study_with_an_unknown_train_set_is_refused_before_it_starts():
    with pytest.raises(ParameterError, match=r"a run of tiny: train_sets: 'bulks' is no train set|tiny.*'bulks' is no"):
        load_study("tiny", train_sets=["bulks"])


@pytest.mark.parametrize("path", sorted(paths.PARAMS.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_the_quick_train_sets_of_a_study_are_in_its_grid(path):
    study = load_study(path.stem)
    assert set(study.quick_train_sets) <= set(study.train_sets)
    assert len(study.tasks) == 1 or not study.expected_macro_f1, "a run's reference belongs to one task"
