"""Random numbers that belong to a sample, the same on every machine and in every cut of a corpus."""

import numpy as np


def uniform(seed: int, shard: int, rows: np.ndarray, stream: int = 0) -> np.ndarray:
    """A number in [0, 1) for each row of a shard: a hash of all four (splitmix64).

    Parameters
    ----------
    seed, shard, stream : int
        At least 0. Numbers of two streams have nothing to do with each other.
    rows : ndarray of shape (n,), int
        At least 0.

    Returns
    -------
    numbers : ndarray of shape (n,), float64
    """
    mixed = np.random.SeedSequence([seed, shard, stream]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + mixed
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
