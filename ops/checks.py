"""Checks of arguments, shared by every operator: the message names the argument, what was found and what is expected.

They work on numpy, torch and cupy arrays alike. Broadcasting is never silent: a (n, 1) against a (n,) is an error.
"""

import math
import operator

from ops.arrays import Array, is_tensor

ROWS = 65_536  # rows of probabilities looked at together, so that sums in float64 cost no memory


class UndefinedMetricError(ValueError):
    """The data leave the metric undefined (only one outcome, no spread); the arguments themselves are fine."""


def check_matrix(name: str, x: Array, columns: int | str = "K", *, finite: bool = False) -> None:
    """`x` must be a non-empty array of shape (n, `columns`), a string for any number: see `check_real`."""
    check_shape(name, x, ("n", columns))
    check_real(name, x, finite=finite)


def check_vector(name: str, x: Array, length: int | str = "n", *, finite: bool = False) -> None:
    """`x` must be a non-empty array of shape (`length`,), a string for any number: see `check_real`."""
    check_shape(name, x, (length,))
    check_real(name, x, finite=finite)


def check_labels(name: str, labels: Array, length: int, num_classes: int, *, lowest: int = 0) -> None:
    """`labels` must be integers of shape (`length`,) in [`lowest`, `num_classes`)."""
    check_shape(name, labels, (length,))
    if _kind(labels) != "integer":
        raise ValueError(f"{name}: expected integers, got dtype {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < lowest or high >= num_classes:
        found = low if low < lowest else high
        raise ValueError(f"{name}: values must lie in [{lowest}, {num_classes}), found {found}")


def check_probabilities(name: str, probs: Array) -> None:
    """`probs` must be of shape (n, K), entries in [0, 1], rows that sum to 1.

    One tolerance for every dtype, 0.01 on the sums: rounding to bfloat16 moves a row by up to 0.004.
    """
    check_shape(name, probs, ("n", "K"))
    _check_numbers(name, probs)
    for start in range(0, probs.shape[0], ROWS):
        block = probs[start : start + ROWS]
        low, high = _extremes(block)
        if low != low:
            raise ValueError(f"{name}: contains NaN (shape {tuple(probs.shape)})")
        if low < 0 or high > 1 + 1e-6:
            raise ValueError(f"{name}: probabilities must lie in [0, 1], found {low if low < 0 else high} (logits?)")
        worst = float(abs(_row_sums(block) - 1).max())
        if worst > 0.01:
            raise ValueError(f"{name}: each row must sum to 1, shape {tuple(probs.shape)}, one is off by {worst:.3g}")


def check_zero_one(name: str, x: Array, length: int | str = "n") -> None:
    """`x` must be a non-empty array of shape (`length`,), a string for any number, of zeros and ones (or booleans)."""
    check_vector(name, x, length)
    if not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(f"{name}: expected only 0 and 1 (or booleans), shape {tuple(x.shape)}")


def check_real(name: str, x: Array, *, finite: bool = False) -> None:
    """`x`, of any shape but empty, must be real numbers, none NaN; with `finite`, nor infinite. By extremes: no temporary."""
    _check_numbers(name, x)
    low, high = _extremes(x)
    if low != low:  # NaN reaches the extremes, and is the one value that differs from itself
        raise ValueError(f"{name}: contains NaN (shape {tuple(x.shape)})")
    if finite and (low == -math.inf or high == math.inf):
        raise ValueError(f"{name}: contains infinity (shape {tuple(x.shape)})")


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """`value` must be one number in [low, high], or in (low, high] with `open_low`."""
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several
        number = None
    if number is None:
        raise ValueError(f"{name}: expected one number, got {value!r}")
    if not (low <= number <= high) or (open_low and number == low):
        raise ValueError(f"{name}: must lie in {'(' if open_low else '['}{low}, {high}], got {value}")


def check_count(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """`value` must be a whole number of at least `low`, and at most `high` if that is given."""
    try:
        fits = not isinstance(value, bool) and low <= operator.index(value) <= (value if high is None else high)
    except TypeError:
        fits = False
    if not fits:
        limits = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {limits}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def check_shape(name: str, x: Array, expected: tuple[int | str, ...]) -> None:
    """`x` must be a non-empty array of this shape; a string in `expected` stands for any length."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise ValueError(f"{name}: expected an array of shape {_spell(expected)}, got {type(x).__name__}")
    shape = tuple(shape)
    fits = len(shape) == len(expected) and all(isinstance(e, str) or s == e for s, e in zip(shape, expected))
    if not fits:
        raise ValueError(f"{name}: expected shape {_spell(expected)}, got {shape}")
    if 0 in shape:
        raise ValueError(f"{name}: is empty, shape {shape}")


def _spell(expected: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, expected))}{',' if len(expected) == 1 else ''})"


def _check_numbers(name: str, x: Array) -> None:
    if _kind(x) is None:
        raise ValueError(f"{name}: expected real numbers, got dtype {x.dtype}")


def _kind(x: Array) -> str | None:
    """ "integer", "bool" or "float", by dtype; None for what is no real number."""
    if is_tensor(x):
        if x.dtype.is_floating_point:
            return "float"
        return None if x.dtype.is_complex else "bool" if str(x.dtype) == "torch.bool" else "integer"
    return {"i": "integer", "u": "integer", "b": "bool", "f": "float"}.get(x.dtype.kind)


def _extremes(x: Array) -> tuple[float, float]:
    x = x.detach() if is_tensor(x) else x
    return float(x.min()), float(x.max())


def _row_sums(x: Array) -> Array:
    """Sum of each row of (n, K), (n,) float64."""
    if not is_tensor(x):
        return x.sum(axis=1, dtype="float64")
    import torch

    return x.sum(dim=1, dtype=torch.float64)
