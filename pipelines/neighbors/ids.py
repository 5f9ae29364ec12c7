"""One number for each sample of a run, in the order of shard and row."""

import numpy as np

ROW_BITS = 40


def ids_of(shards: np.ndarray | int, rows: np.ndarray) -> np.ndarray:
    """The numbers (n,) int64 of samples, given their shards and rows."""
    return (np.asarray(shards, np.int64) << ROW_BITS) | np.asarray(rows, np.int64)


def shards_and_rows(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shards, int32, and rows, int64, of numbers of any shape."""
    return (ids >> ROW_BITS).astype(np.int32), ids & ((1 << ROW_BITS) - 1)
