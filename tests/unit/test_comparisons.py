"""Paired comparisons: against scikit-learn, scipy, statsmodels and closed forms, and by simulation where none has them.

The simulations count how often a test finds a difference at 5 % where there is none. `BOUNDS` holds the shares that 400
data sets give with a probability of 99.9 % if the true share is 5 %; the seeds are fixed.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from statsmodels.stats.multitest import multipletests

from tuneformer.evaluate import comparisons, metrics

DATA_SETS = 400
BOUNDS = tuple(share / DATA_SETS for share in stats.binom.interval(0.999, DATA_SETS, 0.05))  # 0.02 to 0.09
CLASSES = ["Nutlin", "Dex", "SAHA"]  # not in the order of the alphabet


def table_of(labels, predicted, classes=CLASSES, cells=None):
    """Predictions of one run from class numbers; the predicted class has the probability 0.6."""
    classes = np.asarray(classes)
    cells = [f"cell{number}" for number in range(len(labels))] if cells is None else cells
    table = pd.DataFrame({"cell": cells, "label": classes[labels]})
    for number, name in enumerate(classes):
        table[f"probability:{name}"] = np.where(np.asarray(predicted) == number, 0.6, 0.4 / (len(classes) - 1))
    return table


def runs_of(rng, *, arms=("full", "lora"), seeds=5, cells=120, skill=0.6, arm_by_cell=0.0):
    """Predictions of arms that are equally good, on cells of unequal difficulty."""
    labels = rng.integers(3, size=cells)
    chance = np.clip(rng.normal(skill, 0.2, cells), 0.05, 0.95)
    found = {}
    for arm in arms:
        own = np.clip(chance + rng.normal(0, arm_by_cell, cells), 0.02, 0.98)
        found[arm] = {seed: table_of(labels, guess(rng, labels, own)) for seed in range(seeds)}
    return found


def guess(rng, labels, chance):
    """Class numbers that are right with the given chance."""
    wrong = (labels + rng.integers(1, 3, len(labels))) % 3
    return np.where(rng.random(len(labels)) < chance, labels, wrong)


def one_hot(predicted):
    return np.eye(3)[predicted]


def mean_probability(labels, probabilities, weights):
    """A score of one's own: the weighted mean probability of the first class."""
    return weights @ probabilities[:, 0] / weights.sum(axis=1)


# --- scores of many samples at once


@pytest.mark.parametrize(
    ("score", "of_sklearn"), [(comparisons.accuracy, accuracy_score), (comparisons.macro_f1, None)]
)
def test_weighted_scores_are_those_of_scikit_learn(score, of_sklearn):
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(4, size=12), rng.integers(4, size=12)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=50)  # some samples lack a class
    found = score(labels, np.eye(5)[predicted], weights)  # the fifth class is neither present nor predicted
    for share, row in zip(found, weights, strict=True):
        true, guessed = np.repeat(labels, row), np.repeat(predicted, row)
        expected = (
            accuracy_score(true, guessed)
            if of_sklearn
            else f1_score(true, guessed, labels=np.unique(true), average="macro")
        )
        assert share == pytest.approx(expected)


def test_the_first_scores_are_those_of_the_records():
    runs = runs_of(np.random.default_rng(1), seeds=1)
    for name, score in comparisons.SCORES.items():
        for row in comparisons.bootstrap_scores(runs, score=score).runs.itertuples():
            table = runs[row.arm][row.seed]
            stated = metrics.score(table["label"], table.filter(like="probability:").to_numpy(), CLASSES)
            assert row.value == pytest.approx(stated.set_index("metric").loc[name, "value"])


def test_all_runs_are_scored_on_the_same_drawn_cells_whatever_their_order():
    rng = np.random.default_rng(2)
    labels, predicted = rng.integers(3, size=30), rng.integers(3, size=30)
    table = table_of(labels, predicted)
    shuffled = table.sample(frac=1, random_state=0)[table.columns[::-1]]
    found = comparisons.bootstrap_scores({"full": {0: table}, "lora": {0: shuffled}}, samples=20)
    assert found.drawn[:, 0].std() > 0
    np.testing.assert_array_equal(found.drawn[:, 0], found.drawn[:, 1])


def test_groups_are_drawn_whole():
    cells = pd.Index([f"c{number}" for number in range(6)])
    groups = pd.Series(["w1", "w1", "w1", "w2", "w3", "w3"], index=cells)[::-1]
    weights, n_units = comparisons.draw_weights(cells, groups, 500, np.random.default_rng(0))
    assert n_units == 3
    assert (weights[:, :3] == weights[:, [0]]).all()
    assert (weights[:, 4] == weights[:, 5]).all()
    assert (weights[:, [0, 3, 4]].sum(axis=1) == 3).all()
    assert weights[:, 0].mean() == pytest.approx(1, abs=3 * np.sqrt(2 / 3 / 500))  # 3 standard errors


# --- the difference of two arms


def test_where_only_seeds_vary_it_is_the_paired_t_test():
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 6))
    labels = np.zeros(10, int)
    runs = {"full": {}, "lora": {}}
    for arm, values in (("full", a), ("lora", b)):
        for seed, value in enumerate(values):
            table = table_of(labels, labels)
            table[f"probability:{CLASSES[0]}"] = value  # the same for all cells, so that other cells change nothing
            runs[arm][seed] = table
    row = comparisons.compare(runs, score=mean_probability, samples=50).iloc[0]
    sign = 1 if row["a"] == "full" else -1
    expected = stats.ttest_rel(sign * a, sign * b)
    interval = expected.confidence_interval(0.95)
    assert (row["difference"], row["p"]) == pytest.approx((sign * (a - b).mean(), expected.pvalue))
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))


def test_where_only_cells_vary_it_is_the_paired_t_test_over_cells():
    rng = np.random.default_rng(4)
    labels = rng.integers(3, size=80)
    first, second = guess(rng, labels, np.full(80, 0.7)), guess(rng, labels, np.full(80, 0.6))
    runs = {
        "full": {seed: table_of(labels, first) for seed in range(3)},
        "lora": {seed: table_of(labels, second) for seed in range(3)},
    }
    row = comparisons.compare(runs, score=comparisons.accuracy, samples=20000).iloc[0]
    sign = 1 if row["a"] == "full" else -1
    expected = stats.ttest_rel(sign * (first == labels), sign * (second == labels)).confidence_interval(0.95)
    width = (row["high"] - row["low"]) / (expected.high - expected.low)
    assert width == pytest.approx(1, abs=0.015)  # 3 standard errors of a standard deviation of 20,000 samples
    assert row["difference"] == pytest.approx(sign * ((first == labels).mean() - (second == labels).mean()))


def test_the_variance_is_that_of_two_crossed_random_factors():
    """Mean squares by seed, by cell and of the rest, from the closed form, in place of 20,000 drawn test sets."""
    rng = np.random.default_rng(5)
    n_seeds, n_cells = 6, 8  # so few cells that (u - 1) / u matters
    x = rng.normal(0, 1, (n_seeds, 1)) + rng.normal(0, 1, n_cells) + rng.normal(0, 1, (n_seeds, n_cells)) + 1
    weights, n_units = comparisons.draw_weights(pd.RangeIndex(n_cells), None, 20000, rng)
    found = comparisons.crossed_difference(x.mean(axis=1), weights @ x.T / n_cells, n_units)

    rest = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0) + x.mean()
    by_seeds = n_cells * x.mean(axis=1).var(ddof=1)
    by_cells = n_seeds * x.mean(axis=0).var(ddof=1)
    both = (rest**2).sum() / ((n_seeds - 1) * (n_cells - 1))
    assert min(by_seeds, by_cells) > both
    variance = (by_seeds + by_cells - both) / x.size
    df = (by_seeds + by_cells - both) ** 2 / (
        by_seeds**2 / (n_seeds - 1) + by_cells**2 / (n_cells - 1) + both**2 / ((n_seeds - 1) * (n_cells - 1))
    )
    assert found.difference == pytest.approx(x.mean())
    assert found.df == pytest.approx(df, rel=0.06)
    assert found.high - found.difference == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(variance), rel=0.03)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(x.mean()) / np.sqrt(variance), df), rel=0.1)


def test_p_is_below_5_percent_exactly_where_the_interval_excludes_zero():
    table = comparisons.compare(runs_of(np.random.default_rng(6), arms="abcdefgh", seeds=4, arm_by_cell=0.2))
    assert len(table) == 28
    excludes = (table["low"] > 0) | (table["high"] < 0)
    assert ((table["p"] < 0.05) == excludes).all()
    assert 0 < excludes.sum() < 28
    assert (table["score_a"] >= table["score_b"]).all()
    assert table["difference"].to_numpy() == pytest.approx((table["score_a"] - table["score_b"]).to_numpy())


def test_the_same_call_gives_the_same_table():
    runs = runs_of(np.random.default_rng(7), seeds=2)
    pd.testing.assert_frame_equal(comparisons.compare(runs), comparisons.compare(runs))
    assert comparisons.compare(runs, seed=1)["p"].item() != comparisons.compare(runs)["p"].item()


def test_equal_predictions_do_not_differ():
    runs = runs_of(np.random.default_rng(8), arms=["full"], seeds=3)
    row = comparisons.compare(runs | {"lora": runs["full"]}).iloc[0]
    assert (row["difference"], row["low"], row["high"], row["p"], row["p_holm"]) == (0, 0, 0, 1, 1)


def test_only_shared_seeds_are_paired_and_one_seed_is_no_evidence():
    runs = runs_of(np.random.default_rng(9), arms=["full", "lora", "lp_ft"], seeds=4)
    runs["lora"] = {seed: runs["lora"][seed] for seed in (1, 3)}
    runs["lp_ft"] = {0: runs["lp_ft"][0]}
    table = comparisons.compare(runs)
    seeds = {frozenset((row.a, row.b)): row for row in table.itertuples()}
    assert seeds[frozenset(("full", "lora"))].seeds == 2
    pair = seeds[frozenset(("full", "lora"))]
    sign = 1 if pair.a == "full" else -1
    expected = comparisons.compare({"full": {seed: runs["full"][seed] for seed in (1, 3)}, "lora": runs["lora"]})
    assert pair.difference == pytest.approx(sign * expected["difference"].item() * (-1) ** (expected["a"][0] == "lora"))
    alone, apart = seeds[frozenset(("full", "lp_ft"))], seeds[frozenset(("lora", "lp_ft"))]
    assert (alone.seeds, apart.seeds) == (1, 0)
    assert np.isnan([alone.p, alone.low, alone.p_holm, apart.p, apart.difference]).all()
    assert pair.p_holm == pair.p  # pairs that cannot be tested do not count


# --- false positives where nothing differs


def find_differences(
    draw, *, score=comparisons.macro_f1, samples=200, groups=None, test=comparisons.crossed_difference
):
    """Share of data sets in which the test finds a difference at 5 %; `draw` gives labels and two lists of guesses."""
    found = 0
    for number in range(DATA_SETS):
        rng = np.random.default_rng(number)
        labels, first, second = draw(rng)
        weights, n_units = comparisons.draw_weights(pd.RangeIndex(len(labels)), groups, samples, rng)
        weights = np.vstack([np.ones(len(labels)), weights])
        of_a, of_b = ([score(labels, one_hot(run), weights) for run in arm] for arm in (first, second))
        scores = np.subtract(of_a, of_b).T  # (1 + samples, seeds)
        found += test(scores[0], scores[1:], n_units).p < 0.05
    return found / DATA_SETS


def draw_of(*, seeds=5, cells=100, by_seed=0.0, by_cell=0.0, by_group=0.0, group_of=None):
    """Draw data sets of two arms that are equally good for cells and seeds without end, but not for the ones drawn.

    The logit of a right prediction has, beside a difficulty that both arms share, terms of the arm and seed, of the arm
    and cell, and of the arm and group, with these standard deviations.
    """

    def draw(rng):
        labels = rng.integers(3, size=cells)
        difficulty = rng.normal(0.5, 1, cells)
        arms = []
        for _ in range(2):
            logit = difficulty + rng.normal(0, by_cell, cells)
            if group_of is not None:
                logit = logit + rng.normal(0, by_group, group_of.max() + 1)[group_of]
            shifts = rng.normal(0, by_seed, seeds)
            arms.append([guess(rng, labels, 1 / (1 + np.exp(-logit - shift))) for shift in shifts])
        return labels, *arms

    return draw


def cells_alone(observed, drawn, n_units):
    """The usual paired bootstrap of mean scores, which takes the seeds for the only ones there are."""
    return comparisons.Difference(0, 0, 0, 2 * stats.norm.sf(abs(observed.mean()) / drawn.mean(axis=1).std()), 0)


def naive_product(observed, drawn, n_units):
    """Seeds and cells drawn at once, and a normal quantile."""
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(observed), size=drawn.shape)
    deviation = np.take_along_axis(drawn, seeds, axis=1).mean(axis=1).std()
    return comparisons.Difference(0, 0, 0, 2 * stats.norm.sf(abs(observed.mean()) / deviation), 0)


@pytest.mark.parametrize(
    ("score", "options"),
    [
        (comparisons.macro_f1, {"by_seed": 0.4}),
        (comparisons.accuracy, {"by_seed": 0.3, "by_cell": 1.0}),
        (comparisons.macro_f1, {"by_seed": 1.5, "seeds": 3}),
    ],
)
def test_false_positives_are_as_rare_as_stated(score, options):
    assert BOUNDS[0] <= find_differences(draw_of(**options), score=score) <= BOUNDS[1]


def test_with_little_effect_of_seeds_the_test_is_strict_and_not_blind():
    assert find_differences(draw_of()) <= BOUNDS[1]
    assert find_differences(draw_of(seeds=2, by_seed=0.4)) <= BOUNDS[1]

    def differ(rng):
        labels, first, _ = draw_of(by_seed=0.1)(rng)
        return labels, first, [guess(rng, labels, np.full(len(labels), 0.4)) for _ in first]

    assert find_differences(differ) > 0.8  # 0.6 of the cells right against 0.4


def test_what_the_simpler_bootstraps_would_do():
    """Cells alone find too many differences; cells and seeds drawn at once too few, or too many with few seeds."""
    assert find_differences(draw_of(by_seed=0.4), test=cells_alone) > 2 * BOUNDS[1]
    assert find_differences(draw_of(by_seed=0.8, seeds=3), test=naive_product) > BOUNDS[1]
    assert find_differences(draw_of(), test=naive_product) < BOUNDS[0]


def test_whole_groups_have_to_be_drawn_where_cells_of_a_group_are_alike():
    group_of = np.repeat(np.arange(20), 8)
    draw = draw_of(cells=160, by_seed=0.2, by_group=1.0, group_of=group_of)
    assert BOUNDS[0] <= find_differences(draw, groups=pd.Series(group_of)) <= BOUNDS[1]
    assert find_differences(draw) > 2 * BOUNDS[1]


# --- several pairs


def test_holm_on_the_worked_example_of_demsar():
    """Demšar 2006, JMLR 7:1, section 3.2.2: C4.5 against three variants; two differ from it at 5 %, one does not."""
    ranks = np.array([1.964, 2.893, 2.000])  # C4.5+m+cf, C4.5+cf, C4.5+m; C4.5 itself has 3.143
    p_values = 2 * stats.norm.sf((3.143 - ranks) / np.sqrt(4 * 5 / (6 * 14)))
    assert p_values.round(3).tolist() == [0.016, 0.608, 0.019]
    adjusted = comparisons.holm(p_values)
    assert (adjusted < 0.05).tolist() == [True, False, True]
    assert adjusted == pytest.approx([3 * p_values[0], p_values[1], 3 * p_values[0]])


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        p_values = rng.random(n) ** 3
        assert comparisons.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    with_missing = comparisons.holm([0.03, np.nan, 0.01])
    assert with_missing[[0, 2]] == pytest.approx([0.03, 0.02])
    assert np.isnan(with_missing[1])
    assert comparisons.holm([]).size == 0


def test_holm_keeps_the_family_free_of_false_positives():
    """All pairs of four arms that do not differ, with normal scores of 5 seeds: is any pair found?"""
    rng = np.random.default_rng(1)
    a, b = np.triu_indices(4, 1)
    scores = rng.normal(size=(DATA_SETS, 4, 5)) + rng.normal(size=(DATA_SETS, 1, 5))
    p_values = stats.ttest_rel(scores[:, a], scores[:, b], axis=2).pvalue
    adjusted = np.array([comparisons.holm(row) for row in p_values])
    assert (adjusted < 0.05).any(axis=1).mean() <= BOUNDS[1]
    assert (p_values < 0.05).any(axis=1).mean() > 2 * BOUNDS[1]


def test_the_family_of_a_table_is_free_of_false_positives():
    """The same for `compare` itself, in 60 data sets: at most 10 of them with a probability of 99.95 % at 5 %."""
    highest = stats.binom.ppf(0.9995, 60, 0.05)
    tables = [
        comparisons.compare(runs_of(np.random.default_rng(number), arms="abcd", seeds=3, cells=60), samples=100)
        for number in range(60)
    ]
    assert sum((table["p_holm"] < 0.05).any() for table in tables) <= highest


# --- repeated splits


def test_without_test_cells_the_resampled_test_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 10))
    found = comparisons.resampled_t_test(a - b, n_train=90, n_test=0)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.df, found.difference) == pytest.approx((expected.pvalue, 9, (a - b).mean()))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_the_correction_is_the_factor_of_nadeau_and_bengio():
    """15 splits of 9 : 1 widen the interval by sqrt((1/15 + 1/9) / (1/15)) = 1.633."""
    differences = np.random.default_rng(1).normal(size=15)
    plain = comparisons.resampled_t_test(differences, n_train=90, n_test=0)
    corrected = comparisons.resampled_t_test(differences, n_train=90, n_test=10)
    assert (corrected.high - corrected.low) / (plain.high - plain.low) == pytest.approx(np.sqrt(8 / 3))
    with pytest.raises(comparisons.ComparisonError, match=r"1 split\(s\) say nothing"):
        comparisons.resampled_t_test([0.1], n_train=90, n_test=10)


def test_repeated_splits_of_the_same_cells_need_the_correction():
    """Two equally good features, a nearest-mean classifier on each, 20 random splits of 100 cells into 80 and 20."""
    rng = np.random.default_rng(2)
    p_values = {0: [], 20: []}
    for _ in range(DATA_SETS):
        labels = np.repeat([-1, 1], 50)
        features = rng.normal(0, 1, (2, 100)) + 0.5 * labels
        order = rng.permuted(np.tile(np.arange(100), (20, 1)), axis=1)
        train, test = order[:, :80], order[:, 80:]  # (splits, cells)
        accuracies = []
        for feature in features:
            ups, downs = ((feature[train] * (labels[train] == sign)).sum(axis=1) for sign in (1, -1))
            n_up = (labels[train] == 1).sum(axis=1)
            up, down = ups / n_up, downs / (80 - n_up)
            middle, direction = (up + down) / 2, np.sign(up - down)
            predicted = np.sign(feature[test] - middle[:, None]) * direction[:, None]
            accuracies.append((predicted == labels[test]).mean(axis=1))
        for n_test in p_values:
            found = comparisons.resampled_t_test(accuracies[0] - accuracies[1], n_train=80, n_test=n_test)
            p_values[n_test].append(found.p)
    assert BOUNDS[0] <= np.mean(np.array(p_values[20]) < 0.05) <= BOUNDS[1]
    assert np.mean(np.array(p_values[0]) < 0.05) > 4 * BOUNDS[1]


# --- where the variance comes from


def scores_of(layout):
    """Rows strategy, seed, value of an array (strategies, seeds)."""
    return pd.DataFrame(
        [
            {"strategy": f"s{arm}", "seed": seed, "value": value}
            for arm, row in enumerate(layout)
            for seed, value in enumerate(row)
        ]
    )


def test_variance_shares_by_hand():
    """Sums of effects, without a rest: the components are the variances of the effects."""
    strategy, seed = np.array([0.0, 0.3, 0.6]), np.array([0.0, 0.1, 0.2, 0.3])
    found = comparisons.variance_shares(scores_of(strategy[:, None] + seed))
    expected = np.array([strategy.var(ddof=1), seed.var(ddof=1), 0])
    assert found.index.tolist() == ["strategy", "seed", "strategy x seed"]
    assert found["variance"].to_numpy() == pytest.approx(expected)
    assert found["share"].to_numpy() == pytest.approx(expected / expected.sum())


def test_a_negative_component_is_set_to_zero_and_said_to_be():
    found = comparisons.variance_shares(scores_of([[0.0, 1.0], [1.0, 0.0]]))  # all rest: mean squares 0, 0 and 1
    assert found["clipped"].tolist() == [True, True, False]
    assert found["share"].tolist() == [0, 0, 1]
    assert found.loc["strategy x seed", "variance"] == 1


def test_variance_components_are_unbiased():
    rng = np.random.default_rng(0)
    sd = {"strategy": 2.0, "seed": 1.0, "strategy x seed": 1.5}
    layouts = (
        rng.normal(0, sd["strategy"], (4000, 3, 1))
        + rng.normal(0, sd["seed"], (4000, 1, 8))
        + rng.normal(0, sd["strategy x seed"], (4000, 3, 8))
    )
    for name, values in comparisons._components(layouts).items():
        error = values.std() / np.sqrt(len(values))
        assert values.mean() == pytest.approx(sd[name] ** 2, abs=4 * error)
        assert error < 0.1


def test_variance_shares_need_a_complete_layout_of_two_by_two():
    rows = scores_of([[0.1, 0.2, 0.3], [0.2, 0.2, 0.5], [0.5, 0.1, 0.9]])
    whole = comparisons.variance_shares(rows[rows["seed"] < 2])
    lacking = comparisons.variance_shares(rows.drop(index=8))  # the last strategy has no seed 2
    pd.testing.assert_frame_equal(whole, lacking)
    with pytest.raises(comparisons.ComparisonError, match="1 strategies share 3 seeds"):
        comparisons.variance_shares(rows[rows["strategy"] == "s0"])


def test_the_choice_of_test_cells_is_told_from_strategies_and_seeds():
    """Accuracies with known components, over 30 data sets; each estimate within 4 standard errors of the truth."""
    n_cells, arms, seeds = 80, 4, 4
    truth = {"strategy": 0.10**2, "seed": 0.05**2, "strategy x seed": 0.05**2}
    estimates = []
    for number in range(30):
        rng = np.random.default_rng(number)
        chance = 0.5 + rng.normal(0, 0.10, (arms, 1)) + rng.normal(0, 0.05, seeds) + rng.normal(0, 0.05, (arms, seeds))
        labels = np.zeros(n_cells, int)
        runs = {
            f"s{arm}": {seed: table_of(labels, rng.random(n_cells) >= chance[arm, seed]) for seed in range(seeds)}
            for arm in range(arms)
        }
        found = comparisons.variance_shares_with_cells(runs, score=comparisons.accuracy, samples=200)
        plain = comparisons.bootstrap_scores(runs, score=comparisons.accuracy, samples=2).runs
        without = comparisons.variance_shares(plain.rename(columns={"arm": "strategy"}))
        assert found["share"].sum() == pytest.approx(1)
        assert found.loc["strategy x seed", "variance"] < without.loc["strategy x seed", "variance"]
        estimates.append(found["variance"])
    table = pd.DataFrame(estimates)
    error = table.std() / np.sqrt(len(table))
    for name, variance in truth.items():
        assert table[name].mean() == pytest.approx(variance, abs=4 * error[name])
    expected = 0.25 - sum(truth.values())  # mean of p (1 - p)
    assert table["test cells"].mean() == pytest.approx(expected / n_cells, abs=4 * error["test cells"])


# --- the answer


def pair(a, b, score_a, score_b, p_holm, task="drugs"):
    return {
        "task": task,
        "metric": "macro_f1",
        "a": a,
        "b": b,
        "score_a": score_a,
        "score_b": score_b,
        "p_holm": p_holm,
    }


def test_arms_are_ranked_and_grouped_with_those_they_cannot_be_told_from():
    rows = [
        pair("full", "lora", 0.8, 0.7, 0.2),
        pair("full", "lp_ft", 0.8, 0.6, 0.01),
        pair("lora", "lp_ft", 0.7, 0.6, 0.05),
        pair("lora", "full", 0.9, 0.5, np.nan, task="doses"),
    ]
    found = comparisons.indistinguishable(pd.DataFrame(rows))
    assert found["arm"].tolist() == ["full", "lora", "lp_ft", "lora", "full"]
    assert found["rank"].tolist() == [1, 2, 3, 1, 2]
    assert found["like"].tolist() == [["lora"], ["full", "lp_ft"], ["lora"], ["full"], ["lora"]]
    assert found["like_best"].tolist() == [True, True, False, True, True]
    assert found["score"].tolist() == [0.8, 0.7, 0.6, 0.9, 0.5]


def collected(rng, *, tasks=("drugs", "doses"), train_sets=("single_cell",), skills=None, group=None):
    """Rows as `results/<study>/predictions.parquet` holds them, categorical columns included."""
    parts = []
    for task in tasks:
        labels = rng.integers(3, size=60)
        for train_set in train_sets:
            for strategy, skill in (skills or {"full": 0.9, "lora": 0.88, "majority": 0.3}).items():
                for seed in range(3):
                    names = np.asarray(CLASSES)
                    predicted = names[guess(rng, labels, np.full(60, skill))]
                    part = pd.DataFrame({"cell": [f"c{n}" for n in range(60)], "label": names[labels]})
                    part = part.assign(
                        predicted=predicted, task=task, train_set=train_set, strategy=strategy, seed=seed
                    )
                    parts.append(part if group is None else part.assign(group=group))
    table = pd.concat(parts, ignore_index=True)
    return table.astype(dict.fromkeys(["task", "train_set", "strategy", "cell", "label", "predicted"], "category"))


def test_a_study_is_compared_task_by_task():
    table = comparisons.compare_tasks(collected(np.random.default_rng(0)), samples=300)
    assert list(table.columns) == ["task", "metric", *comparisons.PAIR]
    assert table.groupby(["task", "metric"], sort=False).size().to_dict() == {
        (task, metric): 3 for task in ("drugs", "doses") for metric in ("accuracy", "macro_f1")
    }
    answer = comparisons.indistinguishable(table)
    best = answer[answer["like_best"]]
    assert set(best["arm"]) == {"full", "lora"}
    assert len(best) == 8
    assert (table["units"] == 60).all()


def test_a_study_of_several_train_sets_compares_them_too():
    rows = collected(np.random.default_rng(1), tasks=["drugs"], train_sets=["single_cell", "pseudobulk_k2_sum"])
    table = comparisons.compare_tasks(rows, samples=100)
    assert len(table) == 2 * 15
    assert "pseudobulk_k2_sum, full" in set(table["a"]) | set(table["b"])


def test_held_out_groups_are_drawn_whole_in_a_study():
    group = np.repeat(["w1", "w2", "w3", "w4", "w5"], 12)
    table = comparisons.compare_tasks(collected(np.random.default_rng(2), tasks=["drugs"], group=group), samples=100)
    assert (table["units"] == 5).all()
    assert (table["cells"] == 60).all()


def test_a_task_with_one_arm_has_nothing_to_compare():
    rows = collected(np.random.default_rng(3), skills={"full": 0.9})
    table = comparisons.compare_tasks(rows)
    assert table.empty
    assert list(table.columns) == ["task", "metric", *comparisons.PAIR]
    assert comparisons.indistinguishable(table).empty


# --- what is refused


def test_what_cannot_be_compared_is_refused():
    labels = np.array([0, 1, 2, 0])
    good = table_of(labels, labels)

    def refused(other, message, **options):
        with pytest.raises(comparisons.ComparisonError, match=message):
            comparisons.compare({"full": {0: good}, "lora": {7: other}}, **options)

    refused(good.iloc[[0, 1, 2, 2]], "lora, seed 7: the predictions hold the test cell 'cell2' more than once")
    refused(good.iloc[:3], "lora, seed 7: its test cells are not those of the first run")
    refused(good.assign(cell=["a", "b", "c", "d"]), "its test cells are not those")
    refused(good.assign(label=["Dex"] * 4), "its labels are not those")
    refused(good.rename(columns={"probability:Dex": "probability:BMS"}), "its classes are not those")
    refused(good, r"1 test cells have no group \(first: cell3\)", groups=pd.Series("w", index=good["cell"][:3]))
    refused(good, "The 4 test cells are of one group", groups=pd.Series("w", index=good["cell"]))
    with pytest.raises(comparisons.ComparisonError, match="There are no predictions to compare"):
        comparisons.compare({})


def test_the_variance_of_a_study_is_divided_task_by_task():
    rows = collected(np.random.default_rng(4))
    shares = comparisons.variance_tasks(rows, samples=300)
    assert list(shares.index) == ["drugs", "doses"]
    assert list(shares.columns) == ["strategy", "seed", "strategy x seed", "test cells"]
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (shares["strategy"] > 0.8).all()  # majority is right in 30 % of the cells, the others in nine of ten
    alone = rows[rows["strategy"] == "full"]
    assert comparisons.variance_tasks(alone, samples=300).empty
    assert comparisons.variance_tasks(rows[rows["seed"] == 0], samples=300).empty
