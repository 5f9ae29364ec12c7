"""Intervals of proportions from a person's looks: closed forms, other people's numbers, coverage by simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest

from ops.review import allocate, look_order, stratified_rate, wilson_interval


@pytest.mark.parametrize(("errors", "looked"), [(0, 1), (0, 20), (3, 20), (20, 20), (81, 263)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_equals_scipy(errors, looked, level):
    theirs = binomtest(errors, looked).proportion_ci(level, "wilson")
    assert wilson_interval(errors, looked, level) == pytest.approx(
        (errors / looked, theirs.low, theirs.high), abs=1e-12
    )


def test_without_a_look_everything_is_possible():
    rate = wilson_interval(0, 0)
    assert np.isnan(rate.rate)
    assert rate[1:] == (0, 1)
    assert stratified_rate([10, 10], [0, 0], [0, 0]) == (
        0.5,
        pytest.approx(0.5 - np.sqrt(0.125)),
        pytest.approx(0.5 + np.sqrt(0.125)),
    )


def test_one_stratum_is_the_plain_interval():
    assert stratified_rate([1000], [7], [50]) == pytest.approx(wilson_interval(7, 50), abs=1e-12)


def test_the_rate_weighs_strata_by_size():
    assert stratified_rate([900, 100], [1, 9], [10, 10]).rate == pytest.approx(0.9 * 0.1 + 0.1 * 0.9)


@pytest.mark.parametrize("rates", [[0.5, 0.05, 0.01], [0.9, 0.4, 0.1], [0.3, 0.0, 0.0]])
def test_the_interval_covers_the_truth_as_often_as_it_says(rates):
    sizes = np.array([1000, 3000, 6000])
    truth = float(sizes @ rates / sizes.sum())
    looks = allocate(sizes, rates, 100)
    drawn = np.random.default_rng(0).binomial(looks, rates, size=(2000, 3))
    intervals = [stratified_rate(sizes, errors, looks) for errors in drawn]
    assert np.mean([low <= truth <= high for _, low, high in intervals]) >= 0.94
    assert np.mean([rate for rate, _, _ in intervals]) == pytest.approx(truth, abs=0.005)


def test_stratified_looks_say_as_much_as_three_times_as_many_plain_ones():
    # Error rates by tenth of label_error as a good score leaves them: most errors are in the first two tenths.
    sizes, rates = np.full(10, 1000), np.array([0.95, 0.1, 0.02, 0.01, 0, 0, 0, 0, 0, 0])
    looks = allocate(sizes, rates, 100)
    shares, seen = sizes / sizes.sum(), np.maximum(looks, 1)
    stratified = np.sum(shares**2 * rates * (1 - rates) / seen)
    plain = rates.mean() * (1 - rates.mean()) / 300
    assert stratified < plain


def test_looks_follow_size_times_deviation():
    looks = allocate([1000, 1000, 1000], [0.5, 0.1, 0.0], 200)
    expected = np.sqrt([0.25, 0.09, 0.02 * 0.98])
    np.testing.assert_allclose(looks, 200 * expected / expected.sum(), atol=1)


def test_a_plan_never_asks_for_more_than_there_is():
    assert allocate([3, 0, 10], [0.5, 0.5, 0.0], 12).tolist() == [3, 0, 9]
    assert allocate([3, 2], [0.5, 0.5], 50).tolist() == [3, 2]
    assert allocate([3, 2], [0.5, 0.5], 0).tolist() == [0, 0]


def test_every_beginning_of_the_order_is_spread_over_the_strata():
    looks = np.array([60, 30, 10])
    order = look_order(looks)
    assert np.bincount(order).tolist() == looks.tolist()
    assert sorted(order[:3]) == [0, 1, 2]
    for beginning in (10, 25, 50, 80):
        np.testing.assert_allclose(np.bincount(order[:beginning], minlength=3), looks * beginning / 100, atol=1.6)


def test_mistakes():
    with pytest.raises(ValueError, match="errors 3"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="level 1"):
        wilson_interval(1, 2, level=1)
    with pytest.raises(ValueError, match="strata"):
        stratified_rate([1, 2], [0], [1])
    with pytest.raises(ValueError, match="at least one sample"):
        stratified_rate([0], [0], [0])
