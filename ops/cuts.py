"""Order statistics among very many keys: the exact key at a rank of each group, found from counts of bits.

The counts are those of `ops.ranks`: whole numbers that add up over parts of a corpus in any order, so that a cut is the
same however the corpus is divided, and nobody ever holds all keys.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ops.ranks import EXACT_SCORES, FIRST_BITS, Cells

KEY_BITS = 32
ROUND_BITS = 10  # of a key, counted in each round after the first


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where each group is cut, at R ranks of G groups.

    Attributes
    ----------
    keys : ndarray of shape (G, R), uint32
        The highest key on the near side of each cut.
    ties : ndarray of shape (G, R), int64
        How many of the keys that equal it lie on the near side; 0 where nothing does (rank 0).
    ranks : ndarray of shape (G, R), int64
        How many keys lie on the near side in all.
    totals : ndarray of shape (G,), int64
        Keys of each group.
    """

    keys: np.ndarray
    ties: np.ndarray
    ranks: np.ndarray
    totals: np.ndarray

    def intervals(self, keys: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """The interval (n,), 0 to R, between the cuts of its group that each key falls into; equal keys fall into one."""
        bits, ranks = np.uint64(KEY_BITS), self.keys.shape[1]
        edges = np.arange(len(self.keys), dtype=np.uint64)[:, None] << bits | self.keys  # ascending, as ranks are
        codes = groups.astype(np.uint64) << bits | keys.astype(np.uint64)
        return np.searchsorted(edges.reshape(-1), codes) - groups * ranks


class CutFinder:
    """Finds the keys at given ranks of groups: `open` says what to count, `add` takes the counts, until `open` is None.

    Parameters
    ----------
    num_groups : int
        G.
    num_keys : int
        How many keys there are at most. Up to `exact` they are counted one by one, in a single round.
    ranks : callable
        Given the number of keys of each group, shape (G,), the ranks of its cuts, shape (G, R), int64 in [0, number], ascending:
        so many of the lowest keys lie on the near side.
    exact : int

    Notes
    -----
    A round divides only the cells that hold a cut, so it keeps at most 2**10 counts per cut. Three rounds reach 32 bits.
    """

    def __init__(
        self, num_groups: int, num_keys: int, ranks: Callable[[np.ndarray], np.ndarray], exact: int = EXACT_SCORES
    ):
        self._ranks, self._exact, self._num_groups = ranks, exact, num_groups
        lows = np.arange(num_groups, dtype=np.uint64) << np.uint64(KEY_BITS)
        left = 0 if num_keys <= exact else KEY_BITS - FIRST_BITS
        self.open: Cells | None = Cells(lows, np.full(num_groups, KEY_BITS), np.full(num_groups, left))
        self.totals: np.ndarray | None = None
        self._wanted = self._low = self._before = np.zeros(0)

    def add(self, lows: np.ndarray, counts: np.ndarray) -> None:
        """Take the counts of all parts of the open cells, as `Cells.count` gives them (p,), summed over the corpus."""
        assert self.open is not None, "nothing is open"
        if self.totals is None:
            self._begin(lows, counts)
        left = int(self.open.part_bits[0])
        looked_for = self._wanted > 0
        if looked_for.any():
            self._narrow(lows, counts, looked_for)
        if left == 0 or not looked_for.any():
            self.open = None
            return
        cells = np.unique(self._low[looked_for])
        parts = counts[np.searchsorted(lows, cells)]
        bits = 0 if parts.sum() <= self._exact else left - ROUND_BITS
        self.open = Cells(cells, np.full(len(cells), left), np.full(len(cells), bits))

    def _begin(self, lows: np.ndarray, counts: np.ndarray) -> None:
        groups = (lows >> np.uint64(KEY_BITS)).astype(np.int64)
        self.totals = np.bincount(groups, counts, minlength=self._num_groups).astype(np.int64)
        self._wanted = np.asarray(self._ranks(self.totals), np.int64)
        assert (self._wanted >= 0).all() and (self._wanted <= self.totals[:, None]).all(), "a rank beyond its group"
        self._low = np.repeat(self.open.lows[:, None], self._wanted.shape[1], axis=1)
        self._before = np.zeros_like(self._wanted)

    def _narrow(self, lows: np.ndarray, counts: np.ndarray, looked_for: np.ndarray) -> None:
        """Go on from each cut's cell to the part of it that holds the cut."""
        reached = np.cumsum(counts)
        cells, wanted = self._low[looked_for], self._wanted[looked_for]
        first = np.searchsorted(lows, cells)  # of the parts of a cell
        base = reached[first] - counts[first]
        part = np.searchsorted(reached, base + wanted - self._before[looked_for])
        self._before[looked_for] += reached[part] - counts[part] - base
        self._low[looked_for] = lows[part]

    def cuts(self) -> Cuts:
        """The cuts, once nothing is open any more."""
        assert self.open is None and self.totals is not None, "cells are still to be counted"
        keys = (self._low & np.uint64(2**KEY_BITS - 1)).astype(np.uint32)
        return Cuts(keys, self._wanted - self._before, self._wanted, self.totals)


def spread_evenly(amount: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Shares of amounts, as equal as what there is allows.

    Parameters
    ----------
    amount : ndarray of shape (K,), int64
        How many to take in all, at most what there is.
    available : ndarray of shape (K, N), int64

    Returns
    -------
    shares : ndarray of shape (K, N), int64
        Of each row: the smallest ones give all they have, the others equally many; what cannot be divided goes to the
        last ones. As in coverage-centric selection (Zheng et al. 2023, algorithm 1).
    """
    shares = np.zeros_like(available)
    order = np.argsort(available, axis=1, kind="stable")
    left = np.array(amount)
    for done, column in enumerate(order.T):
        rows = np.arange(len(available))
        taken = np.minimum(available[rows, column], left // (available.shape[1] - done))
        shares[rows, column] = taken
        left = left - taken
    assert (left == 0).all(), "more wanted than there is"
    return shares
