"""Cells: centres that cut a set of unit vectors into parts, so that a search looks into a few parts only."""

import numpy as np

from ops.checks import check_count, check_shape

ROUNDS = 8  # of k-means: more moved the recall by less than its error
BLOCK_VALUES = 1 << 23  # similarities in memory at once, 32 MiB


def fit_cells(sample: np.ndarray, cells: int, seed: int = 0) -> np.ndarray:
    """Centres of a sample of unit vectors by spherical k-means.

    Parameters
    ----------
    sample : ndarray of shape (m, d), float32, rows of length 1 or 0
    cells : int >= 1
        C; fewer come back where the sample has fewer rows.
    seed : int
        Of the rows that k-means starts from.

    Returns
    -------
    centres : ndarray of shape (min(C, m), d), float32, rows of length 1 or 0
        The same for the same sample: one process, fixed rounds.

    Raises
    ------
    ValueError
        Wrong shape or C < 1.
    """
    check_shape("sample", sample, ("m", "d"))
    check_count("cells", cells)
    cells = min(cells, len(sample))
    start = np.random.default_rng(seed).choice(len(sample), cells, replace=False)
    centres = sample[np.sort(start)].copy()
    for _ in range(ROUNDS):
        own = nearest_cells(sample, centres, 1)[:, 0]
        order = np.argsort(own, kind="stable")
        counts = np.bincount(own, minlength=cells)
        filled = np.flatnonzero(counts)
        starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]])
        sums = np.add.reduceat(sample[order], starts, axis=0, dtype=np.float64)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres[filled] = np.where(length > 0, sums / np.where(length > 0, length, 1), 0)
    return centres


def nearest_cells(vectors: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
    """The cells nearest to each vector, nearest first; the first is its own.

    Parameters
    ----------
    vectors : ndarray of shape (n, d), float32
    centres : ndarray of shape (C, d), float32
    count : int >= 1

    Returns
    -------
    cells : ndarray of shape (n, min(count, C)), int32
    """
    count = min(count, len(centres))
    result = np.empty((len(vectors), count), np.int32)
    rows = max(1, BLOCK_VALUES // len(centres))
    for start in range(0, len(vectors), rows):
        similarity = vectors[start : start + rows] @ centres.T
        if count == 1:
            result[start : start + rows, 0] = similarity.argmax(axis=1)
            continue
        part = np.argpartition(similarity, -count, axis=1)[:, -count:] if count < len(centres) else None
        part = np.broadcast_to(np.arange(len(centres)), similarity.shape) if part is None else part
        order = np.lexsort((part, -np.take_along_axis(similarity, part, axis=1)), axis=1)
        result[start : start + rows] = np.take_along_axis(part, order, axis=1)
    return result


def recall_by_probes(queries: np.ndarray, centres: np.ndarray, homes: np.ndarray) -> np.ndarray:
    """The recall that a search in the nearest 1, 2, … C cells would have.

    Parameters
    ----------
    queries : ndarray of shape (m, d), float32
    centres : ndarray of shape (C, d), float32
    homes : integer array of shape (m, k)
        The own cell of each of the exact neighbours of each query; −1 = there is none.

    Returns
    -------
    recall : ndarray of shape (C,), float64
        In [0, 1], not decreasing: entry p is the share of the neighbours whose own cell is among a query's p + 1 nearest.
    """
    cells = len(centres)
    counts = np.zeros(cells, np.int64)
    rows = max(1, BLOCK_VALUES // cells)
    for start in range(0, len(queries), rows):
        similarity, home = queries[start : start + rows] @ centres.T, homes[start : start + rows]
        order = np.argsort(-similarity, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(cells), order.shape), axis=1)
        ranks = np.take_along_axis(rank, np.maximum(home, 0), axis=1)[home >= 0]
        counts += np.bincount(ranks, minlength=cells)
    total = counts.sum()
    return np.cumsum(counts) / total if total else np.ones(cells)
