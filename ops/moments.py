"""Count, mean and sum of squared deviations of samples that come in parts."""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """What is needed of a part to know mean and variance of the whole.

    Attributes
    ----------
    count : int or ndarray of int
        Samples, of one shape with `mean` where each element has its own.
    mean : float or ndarray of float64
    squares : float or ndarray of float64
        Sum of squared deviations from `mean`, at least 0.
    """

    count: int | np.ndarray
    mean: float | np.ndarray
    squares: float | np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        """Those of an array of shape (n, ...), along its first axis; n may be 0."""
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:]))
        values = np.asarray(rows, np.float64)
        mean = values.mean(axis=0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def merge(self, other: "Moments") -> "Moments":
        """Those of both parts together, in either order; neither is changed.

        Notes
        -----
        Chan, Golub and LeVeque 1979: sums of squares around each part's own mean lose no digits, however far from 0
        the values lie.
        """
        count = self.count + other.count
        step, total = other.mean - self.mean, np.maximum(count, 1)
        return Moments(
            count,
            self.mean + step * other.count / total,
            self.squares + other.squares + step**2 * self.count * other.count / total,
        )

    @property
    def deviation(self) -> float | np.ndarray:
        """Standard deviation, divided by N; 0 where there is no sample."""
        return np.sqrt(self.squares / np.maximum(self.count, 1))
