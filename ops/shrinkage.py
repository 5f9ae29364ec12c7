"""Shrinkage of the two covariances towards a multiple of the identity, where there are too few samples for their width."""

from typing import NamedTuple

import numpy as np

from ops.checks import check_choice, check_range


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


def amounts_of(shrinkage: str | float, within: np.ndarray, agnostic: np.ndarray, n: int, well: bool) -> PerCovariance:
    """How much to shrink each covariance (d, d) of n samples; `well` = conditioned so that "auto" leaves them alone."""
    if not isinstance(shrinkage, str):
        return PerCovariance(float(shrinkage), float(shrinkage))
    if shrinkage == "none" or (shrinkage == "auto" and well):
        return PerCovariance(0.0, 0.0)
    return PerCovariance(_oas_amount(within, n), _oas_amount(agnostic, n))


def _oas_amount(covariance: np.ndarray, n: int) -> float:
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
    """The eigenvalues (d,) of a covariance after `shrink`."""
    return (1 - amount) * eigenvalues + amount * eigenvalues.mean()
