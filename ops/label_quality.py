"""How well a given label fits, in [0, 1], lower = more likely wrong: the convention of cleanlab's label quality scores."""

import numpy as np
from scipy.special import expit, softmax


def label_quality_of_margin(margin: np.ndarray) -> np.ndarray:
    """Probability of the given class against the nearest other one, of the class-conditional Gaussians.

    Parameters
    ----------
    margin : ndarray of shape (n,)
        md(label) − min over other classes of md, squared distances; NaN where there is no label.

    Returns
    -------
    quality : ndarray of shape (n,), float64, in [0, 1]
        Below 0.5 where the features sit nearer another class. NaN stays.

    Notes
    -----
    With equal priors and one covariance the densities are exp(−md / 2) up to a factor, so p(y) / (p(y) + p(other)) is
    σ(−margin / 2). The order is that of −margin.
    """
    return expit(-np.asarray(margin, np.float64) / 2)


def normalized_margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(p(label) − the largest other probability + 1) / 2, of a classifier.

    Parameters
    ----------
    logits : ndarray of shape (n, K)
    labels : ndarray of shape (n,), int
        In [0, K); below 0 where there is none.

    Returns
    -------
    quality : ndarray of shape (n,), float64, in [0, 1]
        Below 0.5 where another class is more probable; NaN without a label.

    Raises
    ------
    ValueError
        If a label is K or above, or there is one class only.

    Notes
    -----
    Northcutt et al. 2021, "normalized margin".
    """
    num_classes = logits.shape[1]
    if num_classes < 2 or labels.max(initial=-1) >= num_classes:
        raise ValueError(f"labels up to {labels.max(initial=-1)} for logits of {num_classes} classes")
    probs = softmax(logits.astype(np.float64), axis=1)
    rows = np.flatnonzero(labels >= 0)
    given = np.full(len(labels), np.nan)
    given[rows] = probs[rows, labels[rows]]
    probs[rows, labels[rows]] = -np.inf
    return (given - probs.max(axis=1) + 1) / 2
