"""ops.ranks against sorting."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ops.ranks import RankSketch, RankTable, sortable


def sketched(scores, size, portion=100):
    sketch = RankSketch(size)
    for start in range(0, len(scores), portion):
        sketch.add(scores[start : start + portion])
    return sketch.table()


def shares(known, scores):
    return np.searchsorted(np.sort(known), scores, side="right") / len(known)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32)), st.integers(1, 50))
def test_few_scores_have_the_ranks_of_sorting(scores, portion):
    table = sketched(scores, 300, portion)
    np.testing.assert_allclose(table.fraction(scores), shares(scores, scores), rtol=1e-6)
    assert table.fraction(scores).max() == 1 and table.count == len(scores)
    q = np.linspace(0, 1, 7)
    np.testing.assert_array_equal(table.quantile(q), np.quantile(scores, q, method="inverted_cdf"))


@pytest.mark.parametrize("order", ["random", "sorted", "reversed", "far"])
@pytest.mark.parametrize("portion", [7, 5000])
def test_many_scores_are_within_the_stated_error(order, portion):
    scores = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    scores = {"random": scores, "sorted": np.sort(scores), "reversed": np.sort(scores)[::-1], "far": scores + 1000}[
        order
    ]
    size = 2000
    table = sketched(scores, size, portion)
    assert table.count == len(scores) and len(table.values) < 8 * size
    error = np.abs(table.fraction(scores) - shares(scores, scores)).max()
    assert error < np.log2(len(scores) / size) / size


def test_what_is_no_number_has_no_rank():
    table = sketched(np.array([1, np.nan, 2, np.inf], np.float32), 10)
    assert table.count == 2
    np.testing.assert_array_equal(table.fraction(np.array([0.5, 1, 3, np.nan, -np.inf])), [0, 0.5, 1, np.nan, np.nan])
    nothing = RankSketch().table()
    assert np.isnan(nothing.fraction(np.zeros(2))).all()
    with pytest.raises(ValueError, match="no score"):
        nothing.quantile([0.5])


def test_save_and_load_with_the_source():
    table, stream = sketched(np.arange(10, dtype=np.float32), 4), io.BytesIO()
    table.save(stream, "made from this")
    again, source = RankTable.load(io.BytesIO(stream.getvalue()))
    assert source == "made from this"
    np.testing.assert_array_equal(again.values, table.values)
    np.testing.assert_array_equal(again.reached, table.reached)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, st.integers(1, 100), elements=st.floats(width=32, allow_nan=False)))
def test_sortable_keeps_the_order(scores):
    order = np.argsort(scores, kind="stable")
    assert (np.diff(sortable(scores[order]).astype(np.int64)) >= 0).all()
    assert (np.diff(sortable(scores[order], lowest=True).astype(np.int64)) <= 0).all()
