"""Ranks among very many scores: exact while they are few, within a stated error from bounded tables when they are not.

A table of ranks is counted over parts of a corpus in any order and cut: the counts are whole numbers, and what is counted
next depends on their sums only, so the table is the same to the last bit however the corpus is divided.
"""

import dataclasses
from typing import IO

import numpy as np

EXACT_SCORES = 1 << 20  # so many scores are kept one by one: 24 MB
OVERALL = 1 << 16  # above that, ranks among all are within 1 / OVERALL of the exact ones
PER_CLASS = (256, 1024)  # and within a class 1 / (2**20 / classes), but within these bounds
FIRST_BITS = 12  # sign, exponent and three bits of the mantissa


def sortable(scores: np.ndarray, lowest: bool = False) -> np.ndarray:
    """float32 scores (n,) as uint32 (n,) in the same order (reversed with `lowest`), so that bits can be selected on."""
    bits = (np.ascontiguousarray(scores, np.float32) + 0.0).view(np.uint32)  # + 0.0: -0.0 equals 0.0
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return ~keys if lowest else keys


def codes_of(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Group and score as one uint64 that sorts by group, then by score; scores (n,) finite, groups (n,) of at least 0."""
    return groups.astype(np.uint64) << np.uint64(32) | sortable(scores).astype(np.uint64)


@dataclasses.dataclass(frozen=True)
class RankTable:
    """Empirical distribution functions of a score, one per group (group 0: all samples; 1 + label: a class).

    Attributes
    ----------
    lows : ndarray of shape (L,), uint64
        Lowest code (`codes_of`) of each cell, ascending. While scores are few each cell is one value.
    reached : ndarray of shape (L,), int64
        Scores of the cell's group in this cell and those below.
    totals : ndarray of shape (G,), int64
        Scores of each group.
    """

    lows: np.ndarray
    reached: np.ndarray
    totals: np.ndarray

    def fraction(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Share of the counted scores of its group that do not exceed a score.

        Parameters
        ----------
        scores : ndarray of shape (n,), float32
        groups : ndarray of shape (n,), int
            Below 0 for a sample of no group.

        Returns
        -------
        fraction : ndarray of shape (n,), float32, in [0, 1]
            1 for the highest score counted; equal scores share the fraction of the last of them. NaN where the score is
            not finite, or the group unknown or empty. Within 1 / `OVERALL` (group 0) or 1 / `cells_per_class` (a class)
            of the exact value above `EXACT_SCORES` scores, exact below.
        """
        groups = np.asarray(groups, np.int64)
        known = np.isfinite(scores) & (groups >= 0) & (groups < len(self.totals))
        known[known] = self.totals[groups[known]] > 0
        found = np.full(len(scores), np.nan, np.float32)
        mine, codes = groups[known], codes_of(scores[known], groups[known])
        at = np.searchsorted(self.lows, codes, side="right") - 1
        lowest = np.searchsorted(self.lows, mine.astype(np.uint64) << np.uint64(32))  # the first cell of the group
        found[known] = np.where(at < lowest, 0, self.reached[at.clip(0)]) / self.totals[mine]
        return found

    def save(self, stream: IO[bytes]) -> None:
        """Write as npz; no pickle inside."""
        np.savez_compressed(stream, lows=self.lows, reached=self.reached, totals=self.totals)

    @classmethod
    def load(cls, stream: IO[bytes]) -> "RankTable":
        """Read what `save` wrote."""
        with np.load(stream, allow_pickle=False) as arrays:
            return cls(arrays["lows"], arrays["reached"], arrays["totals"])


@dataclasses.dataclass(frozen=True)
class Cells:
    """Cells of codes that are to be divided: lowest code (m,) uint64, ascending; bits of a cell and of its parts, (m,)."""

    lows: np.ndarray
    bits: np.ndarray
    part_bits: np.ndarray

    def count(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest codes (p,) uint64, ascending, of the parts that codes (n,) uint64 fall into, and how many fall into each."""
        at = np.searchsorted(self.lows, codes, side="right") - 1
        inside = (at >= 0) & (((codes - self.lows[at.clip(0)]) >> self.bits[at.clip(0)].astype(np.uint64)) == 0)
        parts = self.part_bits[at[inside]].astype(np.uint64)
        return np.unique(codes[inside] >> parts << parts, return_counts=True)


def cells_per_class(num_classes: int) -> int:
    """How finely ranks within a class are kept when scores are many; bounds the table to 25 MB up to 1,024 classes."""
    return int(np.clip(EXACT_SCORES // max(1, num_classes), *PER_CLASS))


class RankCounter:
    """Divides cells of scores until none holds more than its share: `open` says what to count, `add` takes the counts.

    Parameters
    ----------
    num_classes : int
    num_scores : int
        How many scores there are at most, for a first cut.
    exact : int
        So many scores are told apart one by one.

    Notes
    -----
    A cell is divided while it holds more than 1 / (2 cells) of its group, into about as many parts as that needs; at 32 bits
    it is one value. So a round keeps O(cells) counts per group, and two to four rounds are enough.
    """

    def __init__(self, num_classes: int, num_scores: int, exact: int = EXACT_SCORES):
        groups = num_classes + 1
        self.exact, self.thin = exact, num_scores > exact
        self.cells = np.full(groups, cells_per_class(num_classes))
        self.cells[0] = OVERALL
        self.totals: np.ndarray | None = None
        self._done: list[tuple[np.ndarray, np.ndarray]] = []
        part_bits = 32 - FIRST_BITS if self.thin else 0
        lows = np.arange(groups, dtype=np.uint64) << np.uint64(32)
        self.open: Cells | None = Cells(lows, np.full(groups, 32), np.full(groups, part_bits))

    def add(self, lows: np.ndarray, counts: np.ndarray) -> None:
        """Take the counts of all parts of the open cells, as `Cells.count` gives them (p,), summed over the corpus.

        Decides what to divide next.
        """
        assert self.open is not None, "nothing is open"
        part_bits = self.open.part_bits[np.searchsorted(self.open.lows, lows, side="right") - 1]
        groups = (lows >> np.uint64(32)).astype(np.int64)
        if self.totals is None:
            self.totals = np.bincount(groups, counts, minlength=len(self.cells)).astype(np.int64)
        parts = counts * 2 * self.cells[groups] / self.totals[groups]
        divide = (part_bits > 0) & (counts > 1) & (parts > 1)
        self._done.append((lows[~divide], counts[~divide]))
        if not divide.any():
            self.open = None
            return
        left = part_bits[divide]
        bits = np.minimum(np.maximum(np.ceil(np.log2(parts[divide])).astype(np.int64), 4), left)
        few = counts[divide].sum() <= self.exact
        self.open = Cells(lows[divide], left, np.zeros_like(left) if few else left - bits)

    def table(self) -> RankTable:
        """The table, once nothing is open any more."""
        assert self.open is None and self.totals is not None, "cells are still to be counted"
        lows, counts = (np.concatenate(parts) for parts in zip(*self._done))
        order = np.argsort(lows, kind="stable")
        lows, counts = lows[order], counts[order].astype(np.int64)
        groups = (lows >> np.uint64(32)).astype(np.int64)
        before = np.concatenate([[0], np.cumsum(self.totals)])[groups]
        reached = np.cumsum(counts) - before
        if self.thin:
            lows, reached = _thinned(lows, reached, groups, self.totals, 2 * self.cells)
        return RankTable(lows, reached, self.totals)


def _thinned(
    lows: np.ndarray, reached: np.ndarray, groups: np.ndarray, totals: np.ndarray, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring cells whose ends lie within the same 1 / cells of their group become one."""
    step = np.stack([groups, (reached - 1) * cells[groups] // totals[groups]])
    first = np.concatenate([[True], (np.diff(step) != 0).any(axis=0)])
    last = np.concatenate([first[1:], [True]])
    return lows[first], reached[last]


def merge_counts(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of parts of a corpus as those of the whole: distinct codes (m,) uint64, ascending, and their sums (m,) int64."""
    codes, counts = (np.concatenate(arrays) for arrays in zip(*parts))
    distinct, inverse = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(inverse, counts, minlength=len(distinct)).astype(np.int64)
