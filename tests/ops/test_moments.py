"""Moments of parts merge to those of the whole."""

import numpy as np
import pytest

from ops.moments import Moments


@pytest.mark.parametrize("offset", [0.0, 1e9])
@pytest.mark.parametrize("cuts", [(), (0,), (1, 2), (7, 7, 30), (10, 20, 39)])
def test_parts_merge_to_the_whole(offset, cuts):
    x = np.random.default_rng(0).normal(size=(40, 3)) + offset
    whole = Moments.of(np.zeros((0, 3)))
    for part in np.split(x, cuts):
        whole = whole.merge(Moments.of(part))
    assert whole.count == 40
    np.testing.assert_allclose(whole.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(whole.deviation, (x - offset).std(axis=0), rtol=1e-6)
    swapped = Moments.of(x[10:]).merge(Moments.of(x[:10]))
    np.testing.assert_allclose(swapped.squares, whole.squares, rtol=1e-6)


def test_counts_of_each_element():
    left = Moments(np.array([2, 0, 1]), np.array([1.0, 0.0, 5.0]), np.array([2.0, 0.0, 0.0]))
    right = Moments(np.array([1, 0, 0]), np.array([4.0, 0.0, 0.0]), np.zeros(3))
    merged = left.merge(right)
    np.testing.assert_allclose(merged.mean, [2.0, 0.0, 5.0])
    np.testing.assert_allclose(merged.squares, [8.0, 0.0, 0.0])
    assert merged.deviation[1] == 0
