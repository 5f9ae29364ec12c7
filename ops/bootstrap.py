"""Percentile bootstrap intervals of metrics of samples."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ops.arrays import Array
from ops.checks import UndefinedMetricError, check_count, check_range, check_real


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def bootstrap_interval(
    metric: Callable[..., float], *arrays: Array, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a metric of samples.

    Parameters
    ----------
    metric : function of as many arrays -> float
        Of this module or `ops.calibration`; fix further options with a lambda.
    arrays : arrays whose first axis has one length n
        Resampled together, with replacement.
    level : float in (0, 1]
        Share of the replicates inside.
    replicates, seed : int
        Resamples, at least 1, and their seed: equal seeds resample equal rows, so differences between models with the
        same n are paired.

    Returns
    -------
    Interval
        Order statistics of the replicates (no interpolation, so an infinite NLL stays infinite). One sample, or a
        metric that doesn't vary: an interval of width 0.

    Raises
    ------
    UndefinedMetricError (a ValueError)
        If the metric is undefined on more than half of the replicates; fewer are left out.
    ValueError
        If lengths differ or n is 0, and whatever `metric` raises.

    Notes
    -----
    By hand because `scipy.stats.bootstrap` takes no (n, K) beside an (n,) and no replicate without a value.
    """
    return joint_bootstrap_intervals(
        lambda *rows: [metric(*rows)], *arrays, level=level, replicates=replicates, seed=seed
    )[0]


def joint_bootstrap_intervals(
    metrics: Callable[..., Sequence[float]],
    *arrays: Array,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> list[Interval]:
    """`bootstrap_interval` of each of several metrics that one function returns (`detection_metrics`), at the cost of one."""
    check_range("level", level, 0, 1, open_low=True)
    check_count("replicates", replicates)
    n = _common_length(arrays)
    random = np.random.default_rng(seed)
    values = [_metrics_or_none(metrics, arrays, random.integers(0, n, n)) for _ in range(replicates)]
    defined = [value for value in values if value is not None]
    if 2 * len(defined) < replicates or not defined:
        raise UndefinedMetricError(f"metric: undefined on {len(values) - len(defined)} of {replicates} resamples")
    tails = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.quantile(np.stack(defined), tails, axis=0, method="inverted_cdf")
    return [Interval(float(low), float(high)) for low, high in bounds.T]


def _common_length(arrays: tuple[Array, ...]) -> int:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"arrays: expected one common length of at least 1, got {lengths}")
    return lengths[0]


def _metrics_or_none(
    metrics: Callable[..., Sequence[float]], arrays: tuple[Array, ...], rows: np.ndarray
) -> np.ndarray | None:
    try:
        values = np.asarray([float(value) for value in metrics(*(array[rows] for array in arrays))])
    except UndefinedMetricError:
        return None
    check_real("metric", values)
    return values
