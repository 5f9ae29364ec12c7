"""The k nearest of every sample by exact search, the list that two partial lists merge to, and the vote of the neighbours.

Similarity is the inner product of unit vectors (`ops.whitening`), in [−1, 1], larger = nearer. Equal similarities are
ordered by position, and a similarity is a sum in float64 of one pair's products, rounded to `STEP`: neither depends on
how the rows are cut into blocks.
"""

from typing import NamedTuple

import numpy as np

from ops.checks import check_count, check_shape

STEP = 2.0**-22  # similarities are multiples of it: 2.4e-7, above the rounding of vectors in float32
MARGIN = 4e-6  # within which a similarity in float32 may lie on the wrong side of another
SLACK = 8  # candidates beyond k that are always compared in float64
BLOCK_VALUES = 1 << 24  # float32 products in memory at once, 64 MiB
MIN_COLUMNS = 16_384  # references per block: fewer and the product is slower
FOLD = 32  # columns whose largest product stands for them in the first selection


class Nearest(NamedTuple):
    """Neighbours of n samples, nearest first: positions (n, k) int64, −1 = none; similarity (n, k) float32, −inf there."""

    positions: np.ndarray
    similarity: np.ndarray


def nearest(
    queries: np.ndarray, references: np.ndarray, k: int, own: np.ndarray | None = None, first: int = 0
) -> Nearest:
    """The k references that are most similar to each query.

    Parameters
    ----------
    queries : ndarray of shape (n, d), float32, rows of length 1 or 0
    references : ndarray of shape (N, d), float32, rows of length 1 or 0
    k : int >= 1
    own : integer array of shape (n,), optional
        Position among the references of each query itself, which is not its own neighbour; −1 = it is not there.
    first : int
        Added to the positions that are returned.

    Returns
    -------
    Nearest
        Of min(k, N) columns, one fewer where every query is among the references and k >= N.

    Raises
    ------
    ValueError
        Wrong shapes or k < 1.

    Notes
    -----
    Exact: float32 products of blocks choose k + 8 candidates of each query, whose similarities are then summed in
    float64. Queries with more candidates within 4e-6 of the k-th (many copies of one picture) compare all of those.
    Time of one (n, d)(d, N) product and about a third more; memory 64 MiB and the block's candidates.
    """
    check_count("k", k)
    check_shape("references", references, ("N", "d"))
    check_shape("queries", queries, ("n", references.shape[1]))
    own = np.full(len(queries), -1) if own is None else np.asarray(own)
    check_shape("own", own, (len(queries),))
    width = min(k, len(references) - bool(len(own) and (own >= 0).all()))
    result = Nearest(np.full((len(queries), width), -1), np.full((len(queries), width), -np.inf, np.float32))
    if not width:
        return result
    columns = min(len(references), max(MIN_COLUMNS, len(references) // 4))
    rows = max(1, BLOCK_VALUES // columns)
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        found = _of_block(queries[block], references, width, own[block], columns)
        result.positions[block], result.similarity[block] = found.positions, found.similarity
    result.positions[result.positions >= 0] += first
    return result


def _of_block(queries: np.ndarray, references: np.ndarray, k: int, own: np.ndarray, columns: int) -> Nearest:
    count = min(k + SLACK, len(references))
    candidates = np.empty((len(queries), 0), np.int64)
    values = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(references), columns):
        products = queries @ references[start : start + columns].T
        there = np.flatnonzero((own >= start) & (own < start + products.shape[1]))
        products[there, own[there] - start] = -np.inf
        chosen, best = _largest(products, count)
        candidates = np.concatenate([candidates, chosen + start], axis=1)
        values = np.concatenate([values, best], axis=1)
        if candidates.shape[1] > count:
            kept = np.argpartition(values, -count, axis=1)[:, -count:]
            candidates, values = (np.take_along_axis(x, kept, axis=1) for x in (candidates, values))
    found = _ordered(candidates, _exact(queries, references, candidates, np.isneginf(values)), k)
    if count < len(references):
        descending = -np.sort(-values, axis=1)
        for row in np.flatnonzero(descending[:, -1] >= descending[:, k - 1] - MARGIN):
            position, similarity = _of_many(queries[row], references, k, int(own[row]), descending[row, k - 1])
            found.positions[row], found.similarity[row] = position, similarity
    return found


def _largest(products: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns (n, count) of the largest products of each row, and those products, in no order.

    The largest `count` lie in the `count` folds with the largest maxima: one pass of vectorised maxima, then a selection
    among a 32nd of the columns. `argpartition` of whole rows takes several times as long as the product itself.
    """
    rows, columns = products.shape
    folds = columns // FOLD
    if folds <= 2 * count:
        count = min(count, columns)
        chosen = np.argpartition(products, -count, axis=1)[:, -count:]
        return chosen, np.take_along_axis(products, chosen, axis=1)
    maxima = products[:, : folds * FOLD].reshape(rows, FOLD, folds).max(axis=1)
    best = np.argpartition(maxima, -count, axis=1)[:, -count:]
    candidates = (best[:, None, :] + folds * np.arange(FOLD)[:, None]).reshape(rows, -1)
    rest = np.broadcast_to(np.arange(folds * FOLD, columns), (rows, columns - folds * FOLD))
    candidates = np.concatenate([candidates, rest], axis=1)
    values = np.take_along_axis(products, candidates, axis=1)
    kept = np.argpartition(values, -count, axis=1)[:, -count:]
    return np.take_along_axis(candidates, kept, axis=1), np.take_along_axis(values, kept, axis=1)


def _exact(queries: np.ndarray, references: np.ndarray, candidates: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """Similarities (n, c) in float64, multiples of STEP; −inf where excluded."""
    result = np.empty(candidates.shape)
    rows = max(1, BLOCK_VALUES // (8 * candidates.shape[1] * max(1, references.shape[1])))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        result[block] = similarity_of_pairs(queries[block, None], references[candidates[block]])
    result[excluded] = -np.inf
    return result


def similarity_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Similarity of vectors along the last axis of arrays that broadcast: float64, a multiple of `STEP` in [−1, 1]."""
    products = np.einsum("...i,...i->...", a, b, dtype=np.float64)
    return np.clip(np.round(products / STEP) * STEP, -1.0, 1.0)


def _ordered(positions: np.ndarray, similarity: np.ndarray, k: int) -> Nearest:
    order = np.lexsort((positions, -similarity), axis=1)[:, :k]
    positions, similarity = (np.take_along_axis(x, order, axis=1) for x in (positions, similarity))
    positions = np.where(np.isneginf(similarity), -1, positions)
    return Nearest(positions, similarity.astype(np.float32))


def _of_many(query: np.ndarray, references: np.ndarray, k: int, own: int, kth: float) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a query with more references near the k-th similarity than there is slack for."""
    products = references @ query
    if own >= 0:
        products[own] = -np.inf
    candidates = np.flatnonzero(products >= kth - MARGIN)
    found = _ordered(
        candidates[None], _exact(query[None], references, candidates[None], np.zeros((1, len(candidates)), bool)), k
    )
    return found.positions[0], found.similarity[0]


def above(queries: np.ndarray, references: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs that are at least as similar as each query's floor, to within the rounding of float32.

    Parameters
    ----------
    queries, references : ndarrays of shape (n, d) and (N, d), float32, rows of length 1 or 0
    floor : array of shape (n,)

    Returns
    -------
    rows, columns : ndarrays of shape (m,), int64
        The query and the reference of each pair.
    similarity : ndarray of shape (m,), float32
        As in `nearest`.
    """
    found = []
    step = max(1, BLOCK_VALUES // len(references))
    for start in range(0, len(queries), step):
        products = queries[start : start + step] @ references.T
        rows, columns = np.nonzero(products >= (floor[start : start + step, None] - MARGIN).astype(np.float32))
        found.append((rows + start, columns))
    rows, columns = (np.concatenate(parts) for parts in zip(*found))
    similarity = np.empty(len(rows), np.float32)
    step = max(1, BLOCK_VALUES // (8 * queries.shape[1]))
    for start in range(0, len(rows), step):
        pair = slice(start, start + step)
        similarity[pair] = similarity_of_pairs(queries[rows[pair]], references[columns[pair]])
    return rows, columns, similarity


def with_pairs(lists: Nearest, rows: np.ndarray, positions: np.ndarray, similarity: np.ndarray) -> None:
    """Take pairs into the lists of n queries, in place: `rows` (m,) says whose; ties by position."""
    touched, row = np.unique(rows, return_inverse=True)
    k = lists.positions.shape[1]
    row = np.concatenate([np.repeat(np.arange(len(touched)), k), row])
    positions = np.concatenate([lists.positions[touched].ravel(), positions])
    similarity = np.concatenate([lists.similarity[touched].ravel(), similarity])
    order = np.lexsort((positions, -similarity, row))
    starts = np.searchsorted(row[order], np.arange(len(touched)))
    best = order[starts[:, None] + np.arange(k)]
    lists.positions[touched], lists.similarity[touched] = positions[best], similarity[best]


def merged(parts: list[Nearest], k: int) -> Nearest:
    """The k nearest of the same queries out of lists over different references; ties by position.

    Parameters
    ----------
    parts : list of Nearest
        Of the same n queries, with any number of columns.
    k : int >= 1

    Returns
    -------
    Nearest
        Of at most k columns.
    """
    positions = np.concatenate([part.positions for part in parts], axis=1)
    similarity = np.concatenate([part.similarity for part in parts], axis=1)
    return _ordered(positions, similarity.astype(np.float64), k)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact neighbours that were found, both positions (n, k), −1 = none; 1.0 where there are none."""
    there = exact >= 0
    hit = (exact[:, :, None] == found[:, None, :]).any(axis=2) & there
    return float(hit.sum() / there.sum()) if there.any() else 1.0


def vote(labels: np.ndarray, neighbor_labels: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """How much the neighbours speak against each sample's label.

    Parameters
    ----------
    labels : integer array of shape (n,)
        −1 = none.
    neighbor_labels : integer array of shape (n, k)
        −1 = no label, or no neighbour; such a one has no vote.
    similarity : array of shape (n, k)
        The weight of a vote; below 0 it counts 0. Where all weights are 0, each neighbour counts the same.

    Returns
    -------
    vote : ndarray of shape (n,), float32
        Weighted share of the commonest label other than one's own, less the share of one's own: in [−1, 1], larger =
        more suspicious. NaN without a label, or where no neighbour has one.
    """
    voting = neighbor_labels >= 0
    weight = np.where(voting, np.maximum(similarity, 0), 0).astype(np.float64)
    weight = np.where(weight.sum(axis=1, keepdims=True) > 0, weight, voting)
    # The weight of each neighbour's label: k² comparisons instead of n K sums, whatever the number of classes.
    same = neighbor_labels[:, :, None] == neighbor_labels[:, None, :]
    sums = np.einsum("nij,nj->ni", same, weight)
    mine = neighbor_labels == labels[:, None]
    own = (weight * mine).sum(axis=1)
    other = np.where(mine | ~voting, 0, sums).max(axis=1, initial=0)
    total = weight.sum(axis=1)
    known = (labels >= 0) & (total > 0)
    return np.where(known, (other - own) / np.where(known, total, 1), np.nan).astype(np.float32)
