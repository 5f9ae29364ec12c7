"""Exact search against a naive twin in float64, its invariance to blocks, and the vote against a loop."""

import numpy as np
import pytest

from ops import neighbors
from ops.neighbors import STEP, Nearest, merged, nearest, recall, vote


def unit(rows: int, d: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def naive(queries, references, k, own=None):
    """Every pair in float64, sorted by similarity and then position."""
    positions, similarity = [], []
    for row, query in enumerate(queries):
        products = [float(query.astype(np.float64) @ other.astype(np.float64)) for other in references]
        rounded = np.round(np.array(products) / STEP) * STEP
        order = [j for j in np.lexsort((np.arange(len(references)), -rounded)) if own is None or j != own[row]][:k]
        positions.append(order)
        similarity.append(rounded[order])
    return np.array(positions), np.array(similarity)


@pytest.mark.parametrize(("rows", "k"), [(50, 5), (700, 9), (3, 1)])
def test_it_finds_what_a_naive_search_finds(rows, k):
    x = unit(rows, 6)
    found = nearest(x, x, k, own=np.arange(rows))
    positions, similarity = naive(x, x, k, np.arange(rows))
    np.testing.assert_array_equal(found.positions, positions)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-7)


def test_blocks_change_nothing(monkeypatch):
    queries, references = unit(60, 5, 1), unit(900, 5, 2)
    whole = nearest(queries, references, 7)
    monkeypatch.setattr(neighbors, "MIN_COLUMNS", 250)
    monkeypatch.setattr(neighbors, "BLOCK_VALUES", 2_000)
    monkeypatch.setattr(neighbors, "FOLD", 3)
    for part in (whole, nearest(queries[::-1], references, 7)):
        at = slice(None, None, 1 if part is whole else -1)
        blocked = nearest(queries, references, 7)
        np.testing.assert_array_equal(part.positions[at], blocked.positions)
        np.testing.assert_array_equal(part.similarity[at], blocked.similarity)


def test_many_copies_of_one_vector_come_in_the_order_of_their_positions():
    references = unit(400, 5)
    copies = np.sort(np.random.default_rng(1).permutation(400)[:90])
    references[copies] = references[copies[0]]
    found = nearest(references[copies], references, 6, own=copies)
    for row, position in enumerate(copies):
        np.testing.assert_array_equal(found.positions[row], [c for c in copies if c != position][:6])
    np.testing.assert_array_equal(found.positions, naive(references[copies], references, 6, copies)[0])


def test_vectors_without_a_direction_and_fewer_than_k():
    zeros = np.zeros((3, 4), np.float32)
    found = nearest(zeros, zeros, 5, own=np.arange(3))
    np.testing.assert_array_equal(found.positions, [[1, 2], [0, 2], [0, 1]])
    assert (found.similarity == 0).all()
    alone = nearest(zeros[:1], zeros[:1], 5, own=np.zeros(1, int))
    assert alone.positions.shape == alone.similarity.shape == (1, 0)


def test_lists_over_parts_merge_to_the_list_of_the_whole():
    queries, references = unit(20, 4, 3), unit(100, 4, 4)
    parts = [nearest(queries, references[a:b], 8, first=a) for a, b in ((0, 37), (37, 41), (41, 100))]
    both = merged(parts, 8)
    np.testing.assert_array_equal(both.positions, nearest(queries, references, 8).positions)
    nothing = Nearest(np.full((20, 2), -1), np.full((20, 2), -np.inf, np.float32))
    np.testing.assert_array_equal(merged([nothing, both], 8).positions, both.positions)


def test_recall_counts_the_neighbours_that_were_found():
    assert recall(np.array([[3, 1, 9]]), np.array([[1, 2, -1]])) == 0.5
    assert recall(np.empty((2, 0), int), np.empty((2, 0), int)) == 1.0


def naive_vote(label, labels, weights):
    shares = {}
    for other, weight in zip(labels, weights):
        if other >= 0:
            shares[other] = shares.get(other, 0.0) + max(weight, 0.0)
    total = sum(shares.values())
    if label < 0 or not total:
        return np.nan
    own = shares.pop(label, 0.0)
    return (max(shares.values(), default=0.0) - own) / total


def test_the_vote_is_the_share_of_another_label_less_that_of_ones_own():
    rng = np.random.default_rng(0)
    labels, others = rng.integers(-1, 4, 200), rng.integers(-1, 4, (200, 6))
    weights = rng.uniform(-0.2, 1, (200, 6))
    expected = [naive_vote(*sample) for sample in zip(labels, others, weights)]
    np.testing.assert_allclose(vote(labels, others, weights), expected, rtol=1e-6)


def test_a_vote_without_weights_labels_or_neighbours():
    assert vote(np.array([1]), np.array([[0, 0, 1]]), np.zeros((1, 3))) == pytest.approx(1 / 3)
    assert np.isnan(vote(np.array([-1, 1]), np.array([[0], [-1]]), np.ones((2, 1)))).all()
    assert np.isnan(vote(np.array([1]), np.empty((1, 0), int), np.empty((1, 0)))).all()


@pytest.mark.parametrize("bad", [{"k": 0}, {"references": np.ones((3, 2), np.float32)}])
def test_wrong_arguments_are_named(bad):
    arguments = {"queries": unit(3, 4), "references": unit(3, 4), "k": 1} | bad
    with pytest.raises(ValueError, match=r"^(k|queries):"):
        nearest(**arguments)
