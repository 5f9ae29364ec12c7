"""Checks of arguments, shared by every operator: the message names the argument, what was found and what is expected.

They work on numpy, torch and cupy arrays alike. Broadcasting is never silent: a (n, 1) against a (n,) is an error.
"""

from ops.arrays import Array, as_ndarray


def check_matrix(name: str, x: Array, columns: int | None = None) -> None:
    """`x` must be a non-empty 2-D array of finite-or-infinite floats (no NaN), `columns` wide if that is given."""
    check_shape(name, x, ("n", "K" if columns is None else columns))
    check_no_nan(name, x)


def check_vector(name: str, x: Array, length: int | None = None) -> None:
    """`x` must be a non-empty 1-D array without NaN, of `length` values if that is given."""
    check_shape(name, x, ("n" if length is None else length,))
    check_no_nan(name, x)


def check_labels(name: str, labels: Array, length: int, num_classes: int) -> None:
    """`labels` must be `length` integers in [0, `num_classes`)."""
    check_shape(name, labels, (length,))
    if not _is_integer(labels):
        raise ValueError(f"{name}: expected integers, got dtype {labels.dtype}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name}: values must lie in [0, {num_classes}), found {low if low < 0 else high}")


def check_probabilities(name: str, probs: Array) -> None:
    """`probs` must be (n, K) with entries in [0, 1] and rows that sum to 1.

    One tolerance for every dtype, 0.01 on the sums: rounding to bfloat16 moves a row by up to 0.004.
    """
    check_matrix(name, probs)
    for start in range(0, probs.shape[0], 65536):  # blocks, so that float64 sums of a large matrix cost nothing
        block = as_ndarray(probs[start : start + 65536])
        low, high = float(block.min()), float(block.max())
        if low < 0 or high > 1 + 1e-6:
            raise ValueError(f"{name}: probabilities must lie in [0, 1], found {low if low < 0 else high} (logits?)")
        worst = float(abs(block.sum(axis=1, dtype="float64") - 1).max())
        if worst > 0.01:
            raise ValueError(f"{name}: each row must sum to 1, shape {tuple(probs.shape)}, one is off by {worst:.3g}")


def check_zero_one(name: str, x: Array, length: int | None = None) -> None:
    """`x` must be a non-empty 1-D array of zeros and ones (or booleans), of `length` values if that is given."""
    check_vector(name, x, length)
    if not bool(((x == 0) | (x == 1)).all()):
        raise ValueError(f"{name}: expected only 0 and 1 (or booleans), shape {tuple(x.shape)}")


def check_no_nan(name: str, x: Array) -> None:
    """NaN is an error (NaN is the one value that differs from itself)."""
    if bool((x != x).any()):
        raise ValueError(f"{name}: contains NaN (shape {tuple(x.shape)})")


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """The number `value` must lie in [low, high], or in (low, high] with `open_low`."""
    if not (low <= value <= high) or (open_low and value == low):
        raise ValueError(f"{name}: must lie in {'(' if open_low else '['}{low}, {high}], got {value}")


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


def _is_integer(x: Array) -> bool:
    kind = getattr(x.dtype, "kind", None)
    if kind is not None:
        return kind in "iu"
    return not (x.dtype.is_floating_point or x.dtype.is_complex or str(x.dtype) == "torch.bool")
