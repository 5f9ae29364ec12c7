"""One code path for arrays, tensors and lists: every way to hand over the same numbers gives the same result."""

import warnings

import numpy as np
import pytest
import torch

from ops.arrays import accepts_arrays, as_tensor


@accepts_arrays
def weighted(x: torch.Tensor, weight: torch.Tensor, power: float = 1.0, kind: str = "sum") -> torch.Tensor:
    """x (n,) to a power, times weight (n,)."""
    assert kind == "sum" and isinstance(weight, torch.Tensor)
    return x**power * weight


X, WEIGHT = np.arange(1.0, 6.0), np.array([0.5, 0.1, 0.2, 0.3, 0.4])
READ_ONLY = X.copy()
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    "x", [X, X.tolist(), READ_ONLY, X[::-1].copy()[::-1], X.astype(">f8"), np.repeat(X, 2)[::2]], ids=range(6)
)
def test_numpy_and_lists_come_back_as_numpy_and_unwarned(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in (WEIGHT, WEIGHT.tolist(), torch.from_numpy(WEIGHT)):
            found = weighted(x, weight, power=2)
            assert isinstance(found, np.ndarray) and found.dtype == np.float64
            np.testing.assert_array_equal(found, X**2 * WEIGHT)


def test_arguments_come_by_position_or_by_name():
    np.testing.assert_array_equal(weighted(weight=WEIGHT, x=X), weighted(X, WEIGHT))
    with pytest.raises(TypeError, match="weight"):
        weighted(X)


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT.tolist(), torch.from_numpy(WEIGHT)])
def test_a_tensor_comes_back_as_a_tensor_with_its_gradient(weight):
    x = torch.from_numpy(X).requires_grad_()
    weighted(x, weight, power=2).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * X * WEIGHT, rtol=1e-15)


@pytest.mark.parametrize("wrong", [None, ["a"], [None]])
def test_what_is_no_number_is_named(wrong):
    with pytest.raises(ValueError, match="x: expected numbers, got dtype"):
        weighted(wrong, WEIGHT)


def test_a_writable_array_is_not_copied():
    x = X.copy()
    as_tensor("x", x)[0] = 7
    assert x[0] == 7
