"""Cuts against sorting: exact for any keys, groups, ranks and cut of the corpus."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.cuts import CutFinder, spread_evenly
from ops.ranks import merge_counts


def found(keys, groups, num_groups, ranks, parts=1, exact=1 << 20):
    """The cuts of a corpus that is divided into parts, and the rounds that they took."""
    finder, rounds = CutFinder(num_groups, len(keys), ranks, exact), 0
    codes = groups.astype(np.uint64) << np.uint64(32) | keys.astype(np.uint64)
    while finder.open is not None:
        finder.add(*merge_counts([finder.open.count(part) for part in np.array_split(codes, parts)]))
        rounds += 1
    return finder.cuts(), rounds


def by_sorting(keys, groups, group, rank):
    """Key of a rank, and how many of its equals lie within it."""
    mine = np.sort(keys[groups == group])
    return (int(mine[rank - 1]), rank - int((mine < mine[rank - 1]).sum())) if rank else (None, 0)


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=60),
    st.integers(0, 100),
    st.sampled_from([0, 3, 1000]),
)
def test_a_cut_is_where_sorting_finds_it(samples, percent, exact):
    keys, groups = np.array([k for k, _ in samples], np.uint32), np.array([g for _, g in samples])
    cuts, rounds = found(keys, groups, 4, lambda totals: np.stack([totals * percent // 100, totals], 1), 3, exact)
    assert rounds <= 3
    for group in range(4):
        total = (groups == group).sum()
        assert cuts.totals[group] == total
        for place, rank in enumerate((total * percent // 100, total)):
            key, ties = by_sorting(keys, groups, group, rank)
            assert cuts.ties[group, place] == ties
            assert key is None or cuts.keys[group, place] == key


def test_many_keys_take_three_rounds_and_their_number_of_parts_changes_nothing():
    rng = np.random.default_rng(0)
    keys, groups = rng.integers(0, 2**32, 200_000, dtype=np.uint32), rng.integers(0, 5, 200_000)
    ranks = lambda totals: totals[:, None] * np.arange(1, 20) // 20  # noqa: E731
    cuts, rounds = found(keys, groups, 5, ranks, exact=1000)
    assert rounds <= 3
    again, once = found(keys, groups, 5, ranks, parts=17)
    assert once == 1
    assert np.array_equal(cuts.keys, again.keys) and np.array_equal(cuts.ties, again.ties)
    sizes = np.bincount(groups * 20 + cuts.intervals(keys, groups), minlength=100).reshape(5, 20)
    assert np.ptp(sizes, axis=1).max() <= 1


def test_equal_keys_fall_into_one_interval():
    keys, groups = np.repeat(np.uint32([7, 9]), [6, 2]), np.zeros(8, int)
    cuts, _ = found(keys, groups, 1, lambda totals: totals[:, None] * np.arange(1, 4) // 4)
    assert len({*cuts.intervals(keys, groups)[:6].tolist()}) == 1


@pytest.mark.parametrize(
    "amount, available, shares",
    [
        (7, [10, 10, 10], [2, 2, 3]),
        (9, [1, 10, 10], [1, 4, 4]),
        (5, [0, 2, 9], [0, 2, 3]),
        (12, [3, 4, 5], [3, 4, 5]),
        (0, [3, 0], [0, 0]),
    ],
)
def test_shares_are_as_equal_as_can_be(amount, available, shares):
    assert spread_evenly(np.array([amount]), np.array([available])).tolist() == [shares]
