"""Tables of ranks against sorting: exact while scores are few, within the stated error when many, the same for any cut."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops import ranks
from ops.ranks import RankCounter, RankTable, cells_per_class, codes_of, merge_counts


def counted(scores, labels, classes, parts=1, exact=ranks.EXACT_SCORES):
    """The table of a corpus that is cut into parts, and the rounds that it took."""
    counter, rounds = RankCounter(classes, len(scores), exact), 0
    while counter.open is not None:
        found = []
        for values, of in zip(np.array_split(scores, parts), np.array_split(labels, parts)):
            overall = codes_of(values, np.zeros(len(values), np.int64))
            found.append(counter.open.count(np.concatenate([overall, codes_of(values[of >= 0], 1 + of[of >= 0])])))
        counter.add(*merge_counts(found))
        rounds += 1
    return counter.table(), rounds


def shares(scores):
    """By sorting: the share of scores that do not exceed each."""
    return np.searchsorted(np.sort(scores), scores, side="right") / len(scores)


DISTRIBUTIONS = {
    "normal": lambda rng, n: 30 * rng.normal(size=n) + 200,
    "heavy tails": lambda rng, n: rng.standard_cauchy(n) ** 3,
    "atoms": lambda rng, n: np.round(3 * rng.normal(size=n)),
    "one value": lambda rng, n: np.full(n, -3.0),
    "close": lambda rng, n: 1 + 1e-5 * rng.random(n),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_many_scores_are_within_the_stated_error_for_any_cut(name):
    rng = np.random.default_rng(0)
    scores, labels = DISTRIBUTIONS[name](rng, 300_000).astype(np.float32), rng.integers(-1, 4, 300_000)
    table, rounds = counted(scores, labels, 4, exact=5_000)
    other, _ = counted(scores, labels, 4, parts=7, exact=5_000)
    assert rounds <= 6
    for field in ("lows", "reached", "totals"):
        assert np.array_equal(getattr(table, field), getattr(other, field))
    assert len(table.lows) <= 2 * (ranks.OVERALL + 4 * cells_per_class(4)) + 5
    found = table.fraction(scores, np.zeros(len(scores), np.int64))
    assert np.abs(found - shares(scores)).max() <= 1 / ranks.OVERALL + 1e-7
    assert found.max() == 1
    for label in range(4):
        mine = labels == label
        error = np.abs(table.fraction(scores[mine], 1 + labels[mine]) - shares(scores[mine])).max()
        assert error <= 1 / cells_per_class(4) + 1e-7


@given(st.lists(st.tuples(st.floats(-4, 4, width=16), st.integers(-1, 2)), min_size=1, max_size=40))
def test_few_scores_are_exact_and_ties_share_the_highest(samples):
    scores, labels = np.array([s for s, _ in samples], np.float32), np.array([label for _, label in samples])
    table, rounds = counted(scores, labels, 3, parts=3)
    assert rounds == 1
    np.testing.assert_allclose(table.fraction(scores, np.zeros(len(scores), np.int64)), shares(scores), rtol=1e-6)
    within = table.fraction(scores, np.where(labels < 0, -1, 1 + labels))
    for label in range(-1, 3):
        mine = labels == label
        if label < 0:
            assert np.isnan(within[mine]).all()
        else:
            np.testing.assert_allclose(within[mine], shares(scores[mine]), rtol=1e-6)


def test_scores_of_another_corpus_are_placed_between_those_counted():
    table, _ = counted(np.array([1, 2, 2, 4], np.float32), np.array([0, 0, 0, 0]), 2)
    asked = np.array([0.5, 1, 1.5, 2, 3, 4, 9, np.nan, np.inf, -0.0], np.float32)
    expected = [0, 0.25, 0.25, 0.75, 0.75, 1, 1, np.nan, np.nan, 0]
    np.testing.assert_array_equal(table.fraction(asked, np.zeros(10, np.int64)), np.float32(expected))
    # A class that no sample has, and a label that the reference does not know.
    assert np.isnan(table.fraction(np.ones(2, np.float32), np.array([2, 7]))).all()
    stream = io.BytesIO()
    table.save(stream)
    again = RankTable.load(io.BytesIO(stream.getvalue()))
    np.testing.assert_array_equal(again.fraction(asked, np.zeros(10, np.int64)), np.float32(expected))


def test_the_lowest_score_of_a_class_does_not_fall_into_the_class_before():
    table, _ = counted(np.array([5, 6, 100, 101], np.float32), np.array([0, 0, 1, 1]), 2)
    assert table.fraction(np.array([50], np.float32), np.array([2])) == 0
