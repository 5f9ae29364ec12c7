"""Order statistics of very many scores.

`Cells` count scores between bounds, so that a cut is found exactly in a few passes (`ops.cuts`). `RankSketch` takes one pass:
its ranks and quantiles are exact while scores are few, and within a stated error from bounded memory when they are not.
"""

import dataclasses
from typing import IO

import numpy as np

EXACT_SCORES = 1 << 20  # so many scores are kept one by one: 4 MB
FIRST_BITS = 12  # sign, exponent and three bits of the mantissa


def sortable(scores: np.ndarray, lowest: bool = False) -> np.ndarray:
    """float32 scores (n,) as uint32 (n,) in the same order (reversed with `lowest`), so that bits can be selected on."""
    bits = (np.ascontiguousarray(scores, np.float32) + 0.0).view(np.uint32)  # + 0.0: -0.0 equals 0.0
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return ~keys if lowest else keys


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


def merge_counts(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of parts of a corpus as those of the whole: distinct codes (m,) uint64, ascending, and their sums (m,) int64."""
    codes, counts = (np.concatenate(arrays) for arrays in zip(*parts))
    distinct, inverse = np.unique(codes, return_inverse=True)
    return distinct, np.bincount(inverse, counts, minlength=len(distinct)).astype(np.int64)


class RankSketch:
    """Scores as they come, of which some stand for all once there are many.

    Parameters
    ----------
    size : int
        So many scores are told apart one by one.

    Notes
    -----
    Munro and Paterson 1980; Manku, Rajagopalan and Lindsay 1998. Scores of weight 1 are gathered; whenever there are `size` of
    a weight they are sorted, and every second one goes on with twice the weight, in turn the even and the odd ones. Each time
    a rank moves by at most that weight, so that of N scores it is off by less than log2(N / size) / size of N: 1e-5 for 10⁹
    scores at the default. No chance is involved: the same scores in the same portions give the same sketch.
    """

    def __init__(self, size: int = EXACT_SCORES):
        self.size, self.count = size, 0
        self._levels: list[list[np.ndarray]] = [[]]
        self._turns = [0]

    def add(self, scores: np.ndarray) -> None:
        """Take scores (n,); those that are not finite don't count."""
        values = np.asarray(scores, np.float32)
        values = values[np.isfinite(values)]
        self.count += len(values)
        for start in range(0, len(values), self.size):
            self._put(0, values[start : start + self.size])

    def _put(self, level: int, values: np.ndarray) -> None:
        if level == len(self._levels):
            self._levels.append([])
            self._turns.append(0)
        held = self._levels[level]
        held.append(values)
        number = sum(len(part) for part in held)
        if number <= self.size:
            return
        ordered = np.sort(np.concatenate(held))
        even = number - number % 2
        self._levels[level] = [ordered[even:]]
        turn, self._turns[level] = self._turns[level], 1 - self._turns[level]
        self._put(level + 1, ordered[turn:even:2])

    def table(self) -> "RankTable":
        """The ranks of what has been taken so far."""
        parts = [np.concatenate([np.empty(0, np.float32), *held]) for held in self._levels]
        values = np.concatenate(parts)
        weights = np.concatenate([np.full(len(part), 1 << level) for level, part in enumerate(parts)])
        order = np.argsort(values, kind="stable")
        values, reached = values[order], np.cumsum(weights[order])
        last = np.append(values[1:] != values[:-1], True)[: len(values)]
        return RankTable(values[last], reached[last])


@dataclasses.dataclass(frozen=True, eq=False)
class RankTable:
    """An empirical distribution function.

    Attributes
    ----------
    values : ndarray of shape (L,), float32
        Different scores, ascending.
    reached : ndarray of shape (L,), int64
        How many scores do not exceed each.
    """

    values: np.ndarray
    reached: np.ndarray

    @property
    def count(self) -> int:
        """How many scores were counted."""
        return int(self.reached[-1]) if len(self.reached) else 0

    def fraction(self, scores: np.ndarray) -> np.ndarray:
        """Percentile rank: the share of the counted scores that do not exceed each of `scores` (n,).

        Returns
        -------
        fraction : ndarray of shape (n,), float32, in [0, 1]
            1 for the highest score counted; equal scores share the rank of the last of them. NaN where the score is not
            finite, or nothing was counted. Exact up to the size of the sketch, else within the error stated there.
        """
        found = np.full(len(scores), np.nan, np.float32)
        known = np.isfinite(scores)
        if self.count:
            at = np.searchsorted(self.values, np.asarray(scores, np.float32)[known], side="right")
            found[known] = np.append(0, self.reached)[at] / self.count
        return found

    def quantile(self, fractions: np.ndarray) -> np.ndarray:
        """The smallest score (q,) that at least each fraction (q,) of the scores, in [0, 1], do not exceed."""
        if not self.count:
            raise ValueError("fractions: no score was counted")
        wanted = np.maximum(1, np.ceil(np.asarray(fractions, np.float64) * self.count - 1e-9))
        return self.values[np.searchsorted(self.reached, wanted).clip(max=len(self.values) - 1)]

    def save(self, stream: IO[bytes], source: str) -> None:
        """Write as npz, with what it was made from; no pickle inside."""
        np.savez_compressed(stream, values=self.values, reached=self.reached, source=np.array(source))

    @classmethod
    def load(cls, stream: IO[bytes]) -> tuple["RankTable", str]:
        """What `save` wrote: the table and its source. KeyError where it is another file."""
        with np.load(stream, allow_pickle=False) as arrays:
            return cls(arrays["values"], arrays["reached"]), str(arrays["source"])
