"""Checks of arguments: what passes, and that a message names the argument, what was found and what would do."""

import numpy as np
import pytest
import torch

from ops import checks
from ops.checks import check_count, check_labels, check_matrix, check_probabilities, check_range, check_zero_one

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.tensor])


@pytest.mark.parametrize("value", [0.0, 1, np.float32(0.5), torch.tensor(1.0), np.array(0.5), True])
def test_a_number_of_any_kind_is_in_its_range(value):
    check_range("x", value, 0, 1)


@pytest.mark.parametrize(
    "value", ["0.5", None, [0.5, 0.5], np.ones(2), torch.ones(2), float("nan"), -1e-9, 1.0000001, object()]
)
def test_what_is_out_of_range_or_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"x: (must lie in \[0, 1\]|expected one number), got"):
        check_range("x", value, 0, 1)


def test_an_open_end_is_refused():
    check_range("x", 1, 0, 1, open_low=True)
    with pytest.raises(ValueError, match=r"x: must lie in \(0, 1\], got 0"):
        check_range("x", 0, 0, 1, open_low=True)


def test_counts_are_whole_numbers():
    for value in (1, np.int64(3), np.uint8(5)):
        check_count("k", value, 1, 5)
    check_count("k", 10**9)
    for value in (0, 6, 2.0, "2", None, True):
        with pytest.raises(ValueError, match=r"k: expected an integer in \[1, 5\], got"):
            check_count("k", value, 1, 5)
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got 0"):
        check_count("k", 0)


@KINDS
def test_labels(kind):
    check_labels("y", kind([0, 2, -1]), 3, 3, lowest=-1)
    for values, message in [
        ([0, 3, 1], r"y: values must lie in \[0, 3\), found 3"),
        ([0, -1, 1], r"y: values must lie in \[0, 3\), found -1"),
        ([0, 1], r"y: expected shape \(3,\), got \(2,\)"),
        ([0.0, 1.0, 2.0], "y: expected integers, got dtype"),
        ([True, False, True], "y: expected integers, got dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_labels("y", kind(values), 3, 3)


@KINDS
def test_probabilities(kind, monkeypatch):
    monkeypatch.setattr(checks, "ROWS", 2)  # the last row is in another block than the first
    good = [[0.5, 0.5]] * 4
    check_probabilities("p", kind(good))
    for row, message in [
        ([0.5, float("nan")], "p: contains NaN"),
        ([1.5, -0.5], r"p: probabilities must lie in \[0, 1\], found -0.5"),
        ([1.25, 0.0], r"p: probabilities must lie in \[0, 1\], found 1.25"),
        ([0.5, 0.48], r"p: each row must sum to 1, shape \(5, 2\), one is off by 0.02"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_probabilities("p", kind([*good, row]))


@KINDS
def test_matrices_and_outcomes(kind):
    check_matrix("x", kind([[1.0, np.inf]]))
    for values, message in [
        ([[1.0, np.nan]], "x: contains NaN"),
        ([[1j, 0]], "x: expected real numbers, got dtype"),
        ([1.0], r"x: expected shape \(n, K\), got \(1,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_matrix("x", kind(values))
    for value in (np.inf, -np.inf):
        with pytest.raises(ValueError, match="x: contains infinity"):
            check_matrix("x", kind([[1.0, value]]), finite=True)
    check_zero_one("o", kind([True, False]))
    with pytest.raises(ValueError, match="o: expected only 0 and 1"):
        check_zero_one("o", kind([0, 2]))
    with pytest.raises(ValueError, match=r"x: expected an array of shape \(n, K\), got list"):
        check_matrix("x", [[1.0]])
