"""Shrinkage of the two covariances, where there are too few samples for their width.

Two targets: tr(Σ)/d I for an amount that is given or comes from the OAS formula, and diag(Σ) for "auto", which makes what is
found independent of the units of single features.
"""

from typing import NamedTuple

import numpy as np

from ops.checks import check_choice, check_range

LEAST_SHARE = 1e-12  # of a feature's variance that varies within classes: what is left of a sum of rows in float64


class PerCovariance(NamedTuple):
    """One number for the pooled within-class covariance and one for the class-agnostic covariance."""

    within: float
    agnostic: float


def check_shrinkage(shrinkage: str | float) -> None:
    """`shrinkage` must be "none", "oas", "auto" or a number in [0, 1]."""
    if isinstance(shrinkage, str):
        check_choice("shrinkage", shrinkage, ("none", "oas", "auto"))
    else:
        check_range("shrinkage", shrinkage, 0.0, 1.0)


def amounts_of(shrinkage: str | float, within: np.ndarray, agnostic: np.ndarray, n: int) -> PerCovariance:
    """How much to shrink each covariance (d, d) of n samples, for anything but "auto"."""
    if not isinstance(shrinkage, str):
        return PerCovariance(float(shrinkage), float(shrinkage))
    if shrinkage == "none":
        return PerCovariance(0.0, 0.0)
    return PerCovariance(oas_amount(within, n), oas_amount(agnostic, n))


def oas_amount(covariance: np.ndarray, n: int) -> float:
    """Chen et al. 2010, eq. 23, without its 2/d as in scikit-learn, which offers it for raw samples only."""
    d = len(covariance)
    square, mean = np.mean(covariance**2), np.trace(covariance) / d
    denominator = (n + 1) * (square - mean**2 / d)
    return 1.0 if denominator <= 0 else float(min((square + mean**2) / denominator, 1.0))


def shrink(covariance: np.ndarray, amount: float) -> np.ndarray:
    """(1 - s) Σ + s tr(Σ)/d I of a covariance (d, d), s in [0, 1]."""
    d = len(covariance)
    return (1 - amount) * covariance + amount * np.trace(covariance) / d * np.eye(d)


def shrink_spectrum(eigenvalues: np.ndarray, amount: float) -> np.ndarray:
    """The eigenvalues (d,) of a covariance after `shrink`; of a correlation matrix, also after `shrink_to_diagonal`."""
    return (1 - amount) * eigenvalues + amount * eigenvalues.mean()


def shrink_to_diagonal(covariance: np.ndarray, amount: float, live: np.ndarray) -> np.ndarray:
    """(1 - s) Σ + s diag(Σ) of a covariance (d, d), s in [0, 1]; rows and columns of features that aren't `live` (d,) zero."""
    shrunk = (1 - amount) * covariance
    np.fill_diagonal(shrunk, covariance.diagonal())
    return shrunk * np.outer(live, live)


def live_features(within: np.ndarray, agnostic: np.ndarray, second_moments: np.ndarray, eps: float) -> np.ndarray:
    """Which features vary within classes, as far as the sums can tell, (d,) bool.

    `within` and `agnostic` are their variances (d,), `second_moments` (d,) those about the pilot, from which both were taken by
    subtraction; `eps` is that of the coarsest precision that features came in. Independent of the units of the features.
    """
    least = max(LEAST_SHARE, 16 * eps)
    return (within > least * agnostic) & (agnostic > least * second_moments) & (agnostic > np.finfo(np.float64).tiny)


class Correlations(NamedTuple):
    """A covariance in units of the features' standard deviations, with its eigenvectors: one basis for every amount.

    (1 - s) Σ + s diag(Σ) has there the eigenvalues (1 - s) λ + s, and the same eigenvectors.
    """

    values: np.ndarray  # λ (r,), ascending
    directions: (
        np.ndarray
    )  # (d, r): coordinates of x are (x - μ) @ directions; rows of features that aren't live are zero
    oas: float  # the amount that the OAS formula gives towards diag(Σ)

    @classmethod
    def of(cls, covariance: np.ndarray, live: np.ndarray, n: int) -> "Correlations":
        """Of the live features of a covariance (d, d) of n samples."""
        scale = 1 / np.sqrt(covariance.diagonal()[live])
        matrix = covariance[np.ix_(live, live)] * scale[:, None] * scale
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        directions = np.zeros((len(live), len(values)))
        directions[live] = scale[:, None] * vectors
        return cls(values, directions, oas_amount(matrix, n))

    def shrunk(self, amount: float) -> np.ndarray:
        """The eigenvalues (r,) after shrinkage by s towards diag(Σ)."""
        return (1 - amount) * self.values + amount

    def regular(self, amount: float, eps: float) -> bool:
        """Whether the shrunk covariance is positive definite to working precision: see `GaussianStats.fit`."""
        values = self.shrunk(amount)
        return bool(values[0] > np.sqrt(len(values)) * eps * values[-1])
