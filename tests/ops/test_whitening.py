"""Whitened directions against the definition in float64, their invariance, and covariances that have no inverse."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.covariance import oas

from ops.whitening import fit_whitening


def features(rows: int, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, d)) @ rng.standard_normal((d, d)) + rng.uniform(5, 9, d)


def fitted(x):
    return fit_whitening(x.mean(axis=0), np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1]), len(x))


def test_it_is_the_inverse_root_of_the_covariance_then_unit_length():
    x = features(200)
    z = (x - x.mean(axis=0)) @ scipy.linalg.inv(scipy.linalg.sqrtm(np.cov(x.T, bias=True))).real
    whitening = fitted(x)
    np.testing.assert_allclose(whitening.apply(x), z / np.linalg.norm(z, axis=1, keepdims=True), atol=1e-6)
    assert whitening.shrinkage == 0
    assert whitening.rank == 6


def test_similarities_do_not_change_with_the_units_of_the_features():
    x = features(100)
    other = x @ np.random.default_rng(5).standard_normal((6, 6)) + 3
    ours, theirs = fitted(x).apply(x), fitted(other).apply(other)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=2e-6)


def test_few_samples_are_shrunk_as_scikit_learn_does():
    x = features(9)
    assert fitted(x).shrinkage == pytest.approx(oas(x)[1])


def test_a_feature_without_variance_has_no_weight():
    x = features(100)
    x[:, 2] = 7.25
    whitening = fitted(x)
    assert whitening.rank == 5
    np.testing.assert_allclose(whitening.matrix[2], 0, atol=1e-12)
    moved = x.copy()
    moved[:, 2] += 100
    np.testing.assert_allclose(whitening.apply(moved), whitening.apply(x), atol=1e-7)


@pytest.mark.parametrize("rows", [1, 4])
def test_equal_samples_have_no_direction(rows):
    x = np.full((rows, 3), 0.7, np.float32)
    whitening = fitted(x.astype(np.float64))
    assert whitening.rank == 0
    assert not whitening.apply(x).any()


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="covariance"):
        fit_whitening(np.zeros(2), np.full((2, 2), np.nan), 5)
    with pytest.raises(ValueError, match="features"):
        fitted(features(50)).apply(np.zeros((3, 5)))
