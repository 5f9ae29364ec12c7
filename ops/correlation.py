"""Error rate over bands of a score, and its correlation with the score.

Pearson's r, Spearman's ρ and Kendall's τ themselves are `scipy.stats.pearsonr`, `spearmanr` and `kendalltau`.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr

from ops.arrays import Array, like, to_numpy
from ops.checks import UndefinedMetricError, check_count, check_vector, check_zero_one


class ErrorBands(NamedTuple):
    """Of each band that holds a sample, in rising order: its centre, its number of samples, their error rate."""

    centre: Array
    count: Array
    error_rate: Array


class ErrorCorrelation(NamedTuple):
    """Pearson's r in [-1, 1]: of the bands' centres and error rates, and of the samples' scores and errors."""

    bands: float
    samples: float


def error_bands(score: Array, errors: Array, edges: Array | int = 10) -> ErrorBands:
    """Error rate per band of a score.

    Parameters
    ----------
    score : array of shape (n,), finite
        For example the confusion score, in bits.
    errors : array of shape (n,), 0 or 1 or bool
        1 = a model got the sample wrong.
    edges : array of shape (b + 1,), rising, or int
        Band i is [edges[i], edges[i+1]); samples outside all bands are left out. An integer b: b bands of equal width
        from the smallest to the largest score, which belongs to the last band.

    Returns
    -------
    ErrorBands
        Empty bands are left out; float64 (count: int64), of the kind of `score`.

    Raises
    ------
    ValueError
        If shapes differ, the input is empty or not finite, `edges` don't rise, or no sample lies in a band.

    Notes
    -----
    Albiero et al. 2023, Figure 2.
    """
    values, wrong = _check(score, errors)
    edges = _edges(values, edges)
    band = np.searchsorted(edges, values, side="right") - 1
    inside = (band >= 0) & (band < len(edges) - 1)
    count = np.bincount(band[inside], minlength=len(edges) - 1)
    if not inside.any():
        raise ValueError(f"edges: no score lies in [{edges[0]:.4g}, {edges[-1]:.4g}), scores of shape {values.shape}")
    filled = count > 0
    rate = np.bincount(band[inside], wrong[inside], len(count))[filled] / count[filled]
    centre = ((edges[:-1] + edges[1:]) / 2)[filled]
    return ErrorBands(*(like(x, score) for x in (centre, count[filled], rate)))


def error_correlation(score: Array, errors: Array, edges: Array | int = 10) -> ErrorCorrelation:
    """Pearson correlation of errors with a score, over bands and over samples.

    `score`, `errors` of shape (n,); parameters and errors: `error_bands`. UndefinedMetricError (a ValueError) if fewer than
    two bands are filled, or scores or error rates don't vary.

    Notes
    -----
    Albiero et al. 2023 don't say which of the two they report. Over bands r is far larger, since averaging takes the
    samples' own noise away. Each band counts once, however many samples it holds.
    """
    bands = error_bands(score, errors, edges)
    over_bands = _pearson("bands", to_numpy(bands.centre), to_numpy(bands.error_rate))
    return ErrorCorrelation(over_bands, _pearson("samples", *_check(score, errors)))


def _check(score: Array, errors: Array) -> tuple[np.ndarray, np.ndarray]:
    score, errors = to_numpy(score), to_numpy(errors)
    check_vector("score", score, finite=True)
    check_zero_one("errors", errors, len(score))
    return score.astype(np.float64), errors.astype(np.float64)


def _edges(values: np.ndarray, edges: Array | int) -> np.ndarray:
    if isinstance(edges, int | np.integer):
        check_count("edges", edges)
        edges = np.linspace(values.min(), values.max(), edges + 1)
        edges[-1] = np.nextafter(edges[-1], np.inf)
        return edges
    edges = to_numpy(edges).astype(np.float64)
    check_vector("edges", edges)
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges: expected at least two rising values, got shape {edges.shape}")
    return edges


def _pearson(over: str, x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        raise UndefinedMetricError(f"score: correlation over {over} is undefined, {len(x)} points without variation")
    return float(pearsonr(x, y).statistic)
