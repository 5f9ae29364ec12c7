"""Sample difficulty as a training weight, and the distance to k-means centres as a second difficulty.

Sources: Cui et al. 2023, "Learning Sample Difficulty from Pre-trained Models for Reliable Prediction", eq. 10;
Sorscher et al. 2022, "Beyond neural scaling laws", for the k-means distance.
"""

from typing import Literal, NamedTuple

import numpy as np

from ops.arrays import Array, as_ndarray, is_tensor, like, namespace, to_numpy
from ops.checks import check_choice, check_count, check_matrix, check_range, check_vector

SCALES = ("none", "per_dim", "standardize", "minmax")
MINIBATCH_ROWS = 100_000  # from here on Lloyd's full passes cost more than they gain


class Reference(NamedTuple):
    """Mean, standard deviation (divided by N), minimum and maximum of the rmd that weights refer to."""

    mean: float
    std: float
    min: float
    max: float

    @classmethod
    def of(cls, rmd: Array) -> "Reference":
        """The reference that an array of rmd values, shape (n,), makes; accumulated in float64."""
        values = _finite_float64("rmd", rmd)
        return cls(float(values.mean()), float(values.std()), float(values.min()), float(values.max()))


def difficulty_weight(
    rmd: Array,
    temperature: float = 0.7,
    c: float = 1e-3,
    scale: Literal["none", "per_dim", "standardize", "minmax"] = "none",
    dim: int | None = None,
    reference: Reference | tuple[float, float, float, float] | Array | None = None,
) -> Array:
    """Weight of each sample's entropy regularisation: its scaled difficulty, exponentiated, relative to the hardest.

    Parameters
    ----------
    rmd : array of shape (n,), any float type
        Relative Mahalanobis distance, larger = harder. Finite: leave unlabelled samples out.
    temperature : float > 0
        T of eq. 10, in units of the scaled rmd. Larger = flatter.
    c : float >= 0
        Keeps the weight below 1. It is absolute: where all of exp(rmd / T) are far below `c`, so are all weights.
    scale : "none", "per_dim", "standardize" or "minmax"
        What is done to rmd first: nothing; rmd / dim; (rmd - mean) / std; (rmd - min) / (max - min).
        A spread of zero (std = 0, or max = min) divides by 1 instead, as scikit-learn's scalers do.
    dim : int, optional
        Width d of the features; needed by "per_dim" only.
    reference : optional
        Where mean, std, min, max and eq. 10's maximum come from. A tuple of four numbers (or a `Reference`) is
        (mean, std, min, max); an array or tensor of any length, four included, is rmd values of shape (m,); a list
        could be either and is refused. Default: `rmd` itself.

    Returns
    -------
    weight : array of shape (n,), the kind and float type of `rmd`
        In [0, 1]: positive by eq. 10, but exp underflows to 0 for samples far easier than the hardest.
        Larger = harder. With a `reference`, harder samples than its maximum are clipped to 1.

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, temperature <= 0, c < 0, unknown scale, no dim for "per_dim", a tuple that
        is no (mean, std, min, max).

    Notes
    -----
    Cui et al. 2023, eq. 10: s_i = exp(r_i / T) / (max_j exp(r_j / T) + c), computed as
    exp(r_i / T - logaddexp(max_j r_j / T, ln c)) in float64, so that nothing overflows. Scaling is our addition:
    on common embeddings rmd spans hundreds and without it all but a few weights are 0.
    """
    values = _finite_float64("rmd", rmd)
    _check_parameters(temperature, c, scale, dim)
    facts = _reference_facts(values, reference)
    center, spread = _center_and_spread(scale, dim, facts)
    with np.errstate(divide="ignore"):
        log_denominator = np.logaddexp((facts.max - center) / spread / temperature, np.log(np.float64(c)))
    log_weight = (values - center) / spread / temperature - log_denominator
    return _as_given(namespace(values).exp(log_weight.clip(max=0.0)), rmd)


def _check_parameters(temperature: float, c: float, scale: str, dim: int | None) -> None:
    check_range("temperature", temperature, 0.0, float("inf"), open_low=True)
    check_range("c", c, 0.0, float("inf"))
    check_choice("scale", scale, SCALES)
    if scale == "per_dim" and dim is None:
        raise ValueError("dim: scale 'per_dim' needs the width of the features")
    if scale == "per_dim":
        check_count("dim", dim)


def _reference_facts(values: Array, reference: tuple | Array | None) -> Reference:
    if reference is None:
        return Reference.of(values)
    if isinstance(reference, list):
        raise ValueError(
            "reference: a list is ambiguous; pass a tuple (mean, std, min, max), or rmd values as an array"
        )
    if not isinstance(reference, tuple):
        return Reference.of(reference)
    if len(reference) != 4:
        raise ValueError(
            f"reference: a tuple is (mean, std, min, max), got {len(reference)} values; pass rmd values as an array"
        )
    facts = Reference(*(float(value) for value in reference))
    if not np.isfinite(facts).all() or facts.std < 0 or facts.min > facts.max:
        raise ValueError(f"reference: expected finite (mean, std >= 0, min, max >= min), got {tuple(facts)}")
    return facts


def _center_and_spread(scale: str, dim: int | None, facts: Reference) -> tuple[float, float]:
    """What scaling subtracts, and what it then divides by."""
    if scale == "per_dim":
        return 0.0, float(dim)
    if scale == "standardize":
        return facts.mean, facts.std or 1.0
    if scale == "minmax":
        return facts.min, (facts.max - facts.min) or 1.0
    return 0.0, 1.0


def kmeans_difficulty(features: Array, k: int | None = None, seed: int = 0, *, centers: Array | None = None) -> Array:
    """Euclidean distance (not squared) of each sample to its nearest k-means centre; larger = harder.

    Parameters
    ----------
    features : array of shape (n, d), any float type
    k : int, optional
        Fit this many centres on `features`: scikit-learn's KMeans (k-means++, one start), from 100,000 rows on
        MiniBatchKMeans.
    seed : int
        Of the fit.
    centers : array of shape (k, d), optional
        Centres to use as they are, never refitted. Give either `k` or `centers`.

    Returns
    -------
    distance : array of shape (n,), >= 0, the kind of `features`; float32 for float16 and bfloat16, else its type

    Raises
    ------
    ValueError
        Wrong shapes, NaN, k outside [1, n], both or neither of `k` and `centers`.

    Notes
    -----
    Sorscher et al. 2022. scikit-learn finds the nearest centre; its distance is taken again from the difference,
    as the expanded form ||x||² - 2xc + ||c||² loses the digits of a sample close to its centre. Runs on the host.
    """
    from sklearn.metrics import pairwise_distances_argmin  # seconds to import, which weights need not wait for

    x = _checked_features(features)
    if (k is None) == (centers is None):
        raise ValueError("k, centers: give exactly one of them")
    used = fit_centers(x, k, seed) if centers is None else _given_centers(centers, x)
    nearest = pairwise_distances_argmin(x, used)
    distance = np.concatenate(
        [np.linalg.norm(x[i : i + 8192] - used[nearest[i : i + 8192]], axis=1) for i in range(0, len(x), 8192)]
    )
    return like(distance.astype(x.dtype), features)


def fit_centers(features: Array, k: int, seed: int = 0) -> np.ndarray:
    """k-means centres of `features`, shape (k, d): what `kmeans_difficulty` takes as `centers`.

    Raises
    ------
    ValueError
        Wrong shape, NaN, or k outside [1, n].
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    x = _checked_features(features)
    check_count("k", k, 1, len(x))
    kind = KMeans if len(x) < MINIBATCH_ROWS else MiniBatchKMeans
    options = {} if kind is KMeans else {"batch_size": 4096}
    return kind(n_clusters=k, n_init=1, random_state=seed, **options).fit(x).cluster_centers_


def _given_centers(centers: Array, x: np.ndarray) -> np.ndarray:
    centers = to_numpy(centers)
    check_matrix("centers", centers, x.shape[1])
    return centers.astype(x.dtype)


def _checked_features(features: Array) -> np.ndarray:
    """(n, d) on the host, in float32 or float64."""
    x = to_numpy(features)
    check_matrix("features", x, "d")
    return x.astype({"f4": np.float32, "f2": np.float32}.get(x.dtype.str[1:], np.float64), copy=False)


def _finite_float64(name: str, x: Array) -> Array:
    array = as_ndarray(x)
    check_vector(name, array, finite=True)
    return array.astype(np.float64)


def _as_given(values: Array, reference: Array) -> Array:
    """float64 `values` in the float type and kind of `reference` (integers become float64)."""
    result = like(values, reference)
    if is_tensor(reference):
        return result.to(reference.dtype) if reference.dtype.is_floating_point else result
    kind = getattr(reference, "dtype", np.dtype(np.float64))
    return result.astype(kind) if kind.kind == "f" else result
