"""How well a given label fits, in [0, 1], lower = more likely wrong: the convention of cleanlab's label quality scores."""

import numpy as np
from scipy.special import expit, softmax

from ops.arrays import Array, like, to_numpy


def label_quality_of_margin(margin: Array) -> Array:
    """Probability of the given class against the nearest other one, of the class-conditional Gaussians.

    Parameters
    ----------
    margin : array of shape (n,), any float type
        md(label) − min over other classes of md, squared distances; NaN where there is no label.

    Returns
    -------
    quality : array of shape (n,), float64, in [0, 1], the kind of `margin`
        Below 0.5 where the features sit nearer another class. NaN stays.

    Notes
    -----
    With equal priors and one covariance the densities are exp(−md / 2) up to a factor, so p(y) / (p(y) + p(other)) is
    σ(−margin / 2). The order is that of −margin.
    """
    return like(expit(-to_numpy(margin).astype(np.float64) / 2), margin)


def normalized_margin(logits: Array, labels: Array) -> Array:
    """(p(label) − the largest other probability + 1) / 2, of a classifier.

    Parameters
    ----------
    logits : array of shape (n, K), any float type
    labels : array of shape (n,), int
        In [0, K); below 0 where there is none.

    Returns
    -------
    quality : array of shape (n,), float64, in [0, 1], the kind of `logits`
        Below 0.5 where another class is more probable; NaN without a label.

    Raises
    ------
    ValueError
        If a label is K or above, shapes differ, or there is one class only.

    Notes
    -----
    Northcutt et al. 2021, "normalized margin".
    """
    scores, given = to_numpy(logits).astype(np.float64), to_numpy(labels)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"logits: expected shape (n, K) with K >= 2, got {scores.shape}")
    if given.shape != scores.shape[:1] or given.max(initial=-1) >= scores.shape[1]:
        found = f"up to {given.max(initial=-1)}, shape {given.shape}"
        raise ValueError(f"labels: expected values below {scores.shape[1]}, shape {scores.shape[:1]}; found {found}")
    probs = softmax(scores, axis=1)
    rows = np.flatnonzero(given >= 0)
    own = np.full(len(given), np.nan)
    own[rows] = probs[rows, given[rows]]
    probs[rows, given[rows]] = -np.inf
    return like((own - probs.max(axis=1) + 1) / 2, logits)
