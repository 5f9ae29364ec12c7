"""Squared Mahalanobis distances of a sample to Gaussians that were fitted without it, in closed form.

A Gaussian of n rows among N has the covariance Σ_s = (1 - s) Σ + s T. A sample that was fitted on as R views e_r = x_r - μ
(R = 1: no augmented views) is taken out of the mean and of N Σ; the divisor N, s and T stay. With u = Σ_r e_r,

    N Σ₋ = N Σ - Σ_r e_r e_rᵀ - u uᵀ / (n - R)              x - μ₋ = e + u / (n - R)

With a = (1 - s) / N, E the rows e_r and M = I + 1 1ᵀ / (n - R), the shrunk covariance loses a Eᵀ M E, and by Woodbury's identity

    Σ_s₋⁻¹ = Σ_s⁻¹ + a Σ_s⁻¹ Eᵀ S⁻¹ E Σ_s⁻¹,      S = M⁻¹ - a E Σ_s⁻¹ Eᵀ,      M⁻¹ = I - 1 1ᵀ / n

an R x R system per sample; for R = 1 it is Sherman and Morrison's. Arrays here are in a basis in which Σ_s is the identity.
"""

from typing import NamedTuple

import numpy as np

from ops.arrays import Array, namespace


class Removal(NamedTuple):
    """What the removal of b samples from one Gaussian takes.

    Attributes
    ----------
    factor : array of shape (b, R, R)
        F with F Fᵀ = a S⁻¹; zero where nothing is taken out, or where that is undefined.
    shift : array of shape (b,)
        1 / (n - R): the share of u that the mean moves by; zero where nothing is taken out.
    log_det : array of shape (b,)
        log det Σ_s₋ - log det Σ_s.
    defined : array of shape (b,), bool
        False where the Gaussian has no other row, or its covariance without the sample is singular.
    """

    factor: Array
    shift: Array
    log_det: Array
    defined: Array


def removal(gram: Array, counts: Array, a: float, fitted: Array, tolerance: float) -> Removal:
    """Prepare taking b samples out of the Gaussian that each was fitted into.

    Parameters
    ----------
    gram : array of shape (b, R, R)
        E Σ_s⁻¹ Eᵀ of each sample.
    counts : array of shape (b,)
        n, the rows of its Gaussian, views counted.
    a : float
        (1 - s) / N.
    fitted : bool array of shape (b,)
        Whether the sample was fitted on; nothing is taken out of the others.
    tolerance : float
        1 - g q, the share of det Σ_s that is left, counts as 0 up to here.
    """
    xp, views = namespace(gram), gram.shape[1]
    others = fitted & (counts > views)
    share = xp.where(others, 1 / xp.maximum(counts, 1), 0).astype(gram.dtype)
    shift = xp.where(others, 1 / xp.maximum(counts - views, 1), 0).astype(gram.dtype)
    left = 1 - views * share  # the smallest eigenvalue of M⁻¹, and its determinant
    if views == 1:
        eigenvalues, vectors = (left - a * gram[:, 0, 0])[:, None], xp.ones_like(gram)
    else:
        eigenvalues, vectors = xp.linalg.eigh(xp.eye(views, dtype=gram.dtype) - share[:, None, None] - a * gram)
    regular = eigenvalues[:, 0] > tolerance * left
    taken = fitted & regular
    eigenvalues = xp.where(taken[:, None], eigenvalues, 1)
    factor = vectors * xp.where(taken[:, None], xp.sqrt(a / eigenvalues), 0)[:, None, :]
    log_det = xp.where(taken, xp.log(eigenvalues).sum(axis=1) - xp.log(left), 0)
    return Removal(factor, shift, log_det, ~fitted | (others & regular))


def removal_tolerance(dim: int, condition: float, precision: np.dtype) -> float:
    """Up to where 1 - g q is rounding: d times eps of the arithmetic, or of float64 times the condition number."""
    return dim * max(float(np.finfo(precision).eps), float(np.finfo(np.float64).eps) * condition)


def own_distance(gram: Array, out: Removal) -> Array:
    """Squared distance (b,) of the first view to the Gaussian without the sample; NaN where that is undefined.

    For R = 1 and q = gram: (n / (n - 1))² q / (1 - g q) with g = a n / (n - 1).
    """
    xp = namespace(gram)
    weights = xp.repeat(out.shift[:, None], gram.shape[1], axis=1)
    weights[:, 0] += 1
    projected = (gram @ weights[:, :, None])[:, :, 0]
    distance = (weights * projected).sum(axis=1) + gain(projected[:, :, None], out)[:, 0]
    return xp.where(out.defined, distance, np.nan)


def gain(products: Array, out: Removal) -> Array:
    """How much further a point is by the smaller covariance, (b, K): `products` (b, R, K) are E Σ_s⁻¹ f of its offsets f."""
    if products.shape[1] == 1:
        scaled = products[:, 0] * out.factor[:, :, 0]
        scaled *= scaled
        return scaled
    return ((out.factor.swapaxes(1, 2) @ products) ** 2).sum(axis=1)


def squared_between(labels: Array, centers: Array, norms: Array) -> Array:
    """|μ_y - μ_k|² (b, K) between the class of each label (b,) and every class; |μ_k|² for a label of -1.

    `norms` (K,) are |μ_k|², infinite for a class without rows. One product over the classes that occur.
    """
    xp = namespace(centers)
    seen, at = xp.unique(labels, return_inverse=True)
    table = centers[seen] @ centers.T
    table *= -2
    table += norms[seen][:, None]
    table[seen < 0] = 0
    table += norms
    return table[at]


def gram_of(deviations: Array) -> Array:
    """E Eᵀ (b, R, R) of deviations (b, R, d)."""
    if deviations.shape[1] == 1:
        alone = deviations[:, 0]
        return (alone * alone).sum(axis=1)[:, None, None]
    return deviations @ deviations.swapaxes(1, 2)


def class_distances(
    deviations: Array, gram: Array, labels: Array, centers: Array, between: Array, out: Removal
) -> Array:
    """Squared distances of each sample's first view to every class, the sample taken out of its own class and of Σ.

    Parameters
    ----------
    deviations : array of shape (b, R, d)
        e_r of each sample from the mean of its class; from the origin for a label of -1.
    gram : array of shape (b, R, R)
    labels : integer array of shape (b,)
        In [-1, K).
    centers : array of shape (K, d)
        Class means.
    between : array of shape (b, K)
        |μ_y - μ_k|², infinite for a class without rows; |μ_k|² for a label of -1.
    out : Removal

    Returns
    -------
    distances : array of shape (b, K)
        The column of the sample's own label is not meant: see `own_distance`. Never below 0.

    Notes
    -----
    One product (b R, d) (d, K): the offset f_k = e_1 + μ_y - μ_k has e_r f_k = e_r e_1 + e_r μ_y - e_r μ_k.
    """
    xp, (rows, views, _) = namespace(deviations), deviations.shape
    products = (deviations.reshape(rows * views, -1) @ centers.T).reshape(rows, views, -1)
    own = products[xp.arange(rows), :, labels] * (labels >= 0)[:, None]  # e_r μ_y
    products *= -1
    products += (gram[:, :, 0] + own)[:, :, None]
    distances = 2 * products[:, 0]
    distances += between
    distances -= gram[:, 0, 0][:, None]
    distances = distances.clip(min=0)
    distances += gain(products, out)
    return distances
