"""Cells: centres that fit, own cells against a naive search, the recall that probes promise against counting."""

import numpy as np

from ops import cells
from ops.cells import fit_cells, nearest_cells, recall_by_probes


def clustered(rows: int, d: int = 8, clusters: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clusters, d))[rng.integers(0, clusters, rows)] * 3 + rng.standard_normal((rows, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_the_nearest_cells_are_those_of_a_naive_search(monkeypatch):
    x, centres = clustered(50), clustered(9, seed=1)
    expected = np.argsort(-(x @ centres.T), axis=1)
    for count in (1, 4, 9, 20):
        np.testing.assert_array_equal(nearest_cells(x, centres, count), expected[:, :count])
    monkeypatch.setattr(cells, "BLOCK_VALUES", 20)
    np.testing.assert_array_equal(nearest_cells(x, centres, 4), expected[:, :4])


def test_centres_lie_nearer_to_the_samples_than_random_samples_do():
    x = clustered(600)
    centres = fit_cells(x, 6)
    chosen = x[np.random.default_rng(3).choice(600, 6, replace=False)]
    assert (x @ centres.T).max(axis=1).mean() > (x @ chosen.T).max(axis=1).mean() + 0.02
    np.testing.assert_array_equal(centres, fit_cells(x, 6))
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)


def test_fewer_or_equal_samples_than_cells():
    assert fit_cells(clustered(3), 9).shape == (3, 8)
    assert np.isfinite(fit_cells(np.zeros((20, 4), np.float32), 4)).all()


def test_the_recall_of_so_many_probes_is_the_share_of_neighbours_in_those_cells():
    queries, centres = clustered(40), clustered(7, seed=2)
    homes = np.random.default_rng(0).integers(-1, 7, (40, 5))
    order = np.argsort(-(queries @ centres.T), axis=1)
    for probes, found in enumerate(recall_by_probes(queries, centres, homes), 1):
        hits = [home in order[q, :probes] for q in range(40) for home in homes[q] if home >= 0]
        assert found == np.mean(hits)
