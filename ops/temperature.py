"""softmax(logits / T) of numpy arrays: its values, its entropy, and the T of least negative log-likelihood.

Works in float64 on blocks of rows, whatever the dtype of the logits: an N x K copy is never made.
"""

from collections.abc import Callable, Iterator

import numpy as np

BOUNDS = (1e-3, 1e3)  # of T
BLOCK = 1 << 18  # entries of an N x K matrix worked on at a time: 2 MiB in float64, which stay in the cache


def row_blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix of shape (n, width), `BLOCK` entries each."""
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def by_rows(array: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of float64 blocks of the rows of `array` (n, K), put together again."""
    blocks = (np.ascontiguousarray(array[rows], dtype=np.float64) for rows in row_blocks(*array.shape))
    return np.concatenate([function(block) for block in blocks] or [np.empty(array.shape)])


def softmax_at(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T) of a float64 block (n, K)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    # two logits that differ by a rounding error must not become a tie, or the prediction could change
    scaled = np.where(shifted < 0, np.minimum(shifted / temperature, -1e-15), 0.0)
    weights = np.exp(scaled)
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(logits: np.ndarray) -> np.ndarray:
    """Entropy (n,) of softmax(logits), logits (n, K) in float64; in nats, at least 0."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    return np.maximum(np.log(total) - (weights * shifted).sum(axis=1) / total, 0)


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T within `BOUNDS` of least NLL, for logits (n, K) and labels (n,).

    The derivative by 1/T never falls, so its sign at T = 1 names the side.
    """
    slope = _slope(logits, labels, 1.0)
    if slope == 0:
        return 1.0
    bound = BOUNDS[0] if slope < 0 else BOUNDS[1]
    temperature = bound
    if np.sign(_slope(logits, labels, bound)) == -np.sign(slope):
        from scipy.optimize import brentq  # half a second, which no other use waits for

        root = brentq(lambda log: _slope(logits, labels, np.exp(log)), 0.0, np.log(bound), xtol=1e-11, rtol=1e-11)
        temperature = float(np.exp(root))
    # T = 1 is kept where it is as good: the minimum is flat to rounding error there
    return temperature if _nll(logits, labels, temperature) < _nll(logits, labels, 1.0) else 1.0


def _blocks_at_label(logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float64 blocks (m, K) of logits less their row's maximum, and the values (m,) at the label."""
    for rows in row_blocks(*logits.shape):
        block = logits[rows].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        yield block, block[np.arange(len(block)), labels[rows]]


def _slope(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Derivative of the summed NLL by 1/T: Σ E_p[z] − z_label."""
    total = 0.0
    for block, own in _blocks_at_label(logits, labels):
        weights = np.exp(block / temperature)
        total += float(((weights * block).sum(axis=1) / weights.sum(axis=1) - own).sum())
    return total


def _nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Summed NLL of softmax(logits / temperature)."""
    blocks = _blocks_at_label(logits, labels)
    return sum(float((np.log(np.exp(b / temperature).sum(axis=1)) - own / temperature).sum()) for b, own in blocks)
