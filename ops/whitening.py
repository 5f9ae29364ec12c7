"""Whitened directions: the space in which neighbours live.

z = Σ_agn^(-1/2) (x − μ), divided by its length: two samples are near where they deviate from the corpus in the same way,
each direction measured in its own standard deviation.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from ops.checks import check_shape

CHUNK_ROWS = 8_192
ROWS_PER_DIRECTION = (
    4  # fewer samples than this times d: the smallest eigenvalues are mostly noise, see `fit_whitening`
)


class Moments(NamedTuple):
    """Sums of samples about a pilot mean: how many, their sum (d,) and their scatter (d, d), float64."""

    count: int
    total: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, pilot: np.ndarray) -> "Moments":
        """Of features (n, d), any float type, about `pilot` (d,)."""
        d = len(pilot)
        count, total, scatter = 0, np.zeros(d), np.zeros((d, d))
        for start in range(0, len(features), CHUNK_ROWS):
            x = features[start : start + CHUNK_ROWS].astype(np.float64) - pilot
            count, total, scatter = count + len(x), total + x.sum(axis=0), scatter + x.T @ x
        return cls(count, total, scatter)

    def merge(self, other: "Moments") -> "Moments":
        """Of both together; the pilot is the same."""
        return Moments(*(ours + theirs for ours, theirs in zip(self, other)))

    def whitening(self, pilot: np.ndarray) -> "Whitening":
        """The whitening that these samples give; ValueError without any."""
        if not self.count:
            raise ValueError("features: no sample to take a mean of")
        offset = self.total / self.count
        covariance = self.scatter / self.count - np.outer(offset, offset)
        return fit_whitening(pilot + offset, (covariance + covariance.T) / 2, self.count)


@dataclasses.dataclass(frozen=True, eq=False)
class Whitening:
    """A fitted whitening.

    Attributes
    ----------
    mean : ndarray of shape (d,), float64
    matrix : ndarray of shape (d, d), float64
        Σ_agn^(-1/2), symmetric; zero along directions in which the samples do not vary.
    rank : int
        Directions that vary, in [0, d].
    shrinkage : float
        Amount s of (1 − s) Σ + s tr(Σ)/d I, in [0, 1]; 0 where there are enough samples.
    """

    mean: np.ndarray
    matrix: np.ndarray
    rank: int
    shrinkage: float

    def apply(self, features: np.ndarray) -> np.ndarray:
        """The unit vectors of samples.

        Parameters
        ----------
        features : ndarray of shape (n, d), any float type, finite

        Returns
        -------
        directions : ndarray of shape (n, d), float32
            Each row of length 1; zeros for a sample at the mean.

        Raises
        ------
        ValueError
            If the features have another width.
        """
        check_shape("features", features, ("n", len(self.mean)))
        directions = np.empty(features.shape, np.float32)
        for start in range(0, len(features), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            z = (features[rows].astype(np.float64) - self.mean) @ self.matrix
            length = np.sqrt(np.einsum("ij,ij->i", z, z))
            directions[rows] = z / np.where(length > 0, length, 1.0)[:, None]
        return directions


def fit_whitening(mean: np.ndarray, covariance: np.ndarray, count: int) -> Whitening:
    """The whitening of samples with this mean and total covariance.

    Parameters
    ----------
    mean : ndarray of shape (d,)
    covariance : ndarray of shape (d, d)
        Σ_agn, divided by N, label-free.
    count : int >= 1
        N, the samples that they were taken over.

    Returns
    -------
    Whitening

    Raises
    ------
    ValueError
        Wrong shapes, no sample, or values that are not finite.

    Notes
    -----
    With N >= 4 d it is exactly Σ_agn^(-1/2). With fewer samples the whole of a small sample is nearly equidistant after
    exact whitening, so Σ is shrunk towards tr(Σ)/d I by the Oracle Approximating Shrinkage amount (Chen et al. 2010, as
    scikit-learn computes it). A direction whose standard deviation is below the rounding of float32 features is dropped.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    check_shape("mean", mean, ("d",))
    check_shape("covariance", covariance, (len(mean), len(mean)))
    if count < 1 or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"covariance: expected finite values of at least one sample, got {count} samples")
    values, vectors = np.linalg.eigh(covariance)
    square = float(mean @ mean) + max(float(values.sum()), 0.0)  # mean squared length of the samples
    floor = max((4 * np.finfo(np.float32).eps) ** 2 * square, np.finfo(np.float64).eps * len(mean) * values[-1])
    shrinkage = 0.0 if count >= ROWS_PER_DIRECTION * len(mean) else oas_amount(values, count)
    shrunk = (1 - shrinkage) * values + shrinkage * values.mean()
    varies = values > floor
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, shrunk, 1.0)), 0.0)
    return Whitening(mean, (vectors * scale) @ vectors.T, int(varies.sum()), float(shrinkage))


def oas_amount(eigenvalues: np.ndarray, count: int) -> float:
    """Oracle Approximating Shrinkage amount in [0, 1] of a covariance with these eigenvalues (d,) of N samples."""
    d, trace = len(eigenvalues), float(eigenvalues.sum())
    alpha, mu = float(np.mean(eigenvalues**2)) / d, trace / d
    denominator = (count + 1.0) * (alpha - mu**2 / d)
    return 1.0 if denominator <= 0 else min(1.0, (alpha + mu**2) / denominator)
