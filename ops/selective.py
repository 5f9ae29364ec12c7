"""When may a classifier be believed: confidence scores, selective prediction, failure detection, separability.

Confidence: higher = safer. Errors: 1 = wrong; correct: 1 = right. Arrays or tensors of any float dtype; everything is
computed in float64, scalars come back as Python floats, curves as float64 arrays of the kind of the first argument.
Rates are fractions in [0, 1].
"""

from typing import NamedTuple

import numpy as np
from scipy.special import entr, xlogy

from ops.arrays import Array, like, to_numpy
from ops.checks import (
    UndefinedMetricError,
    check_choice,
    check_probabilities,
    check_range,
    check_vector,
    check_zero_one,
)

CONFIDENCES = ("msp", "entropy", "margin")


class RiskCoverage(NamedTuple):
    """Risk (error rate) of the most confident `coverage` of the samples; arrays (n,), coverage rising to 1."""

    coverage: Array
    risk: Array


class AccuracyRejection(NamedTuple):
    """Accuracy after rejecting the least confident; arrays of one length, `kept` counts samples."""

    rejection_rate: Array
    kept: Array
    accuracy: Array


class DetectionMetrics(NamedTuple):
    """How well confidence tells right predictions from wrong ones; each in [0, 1]."""

    fpr95: float
    auroc: float
    aupr_success: float
    aupr_error: float


class OperatingPoint(NamedTuple):
    """False-positive rate at a threshold; positive = confidence >= threshold."""

    fpr: float
    threshold: float


class TrueRates(NamedTuple):
    """Fractions of right predictions trusted, and of wrong ones distrusted."""

    tpr: float
    tnr: float


class Separability(NamedTuple):
    """Distances between two normal distributions, >= 0; higher = better separated."""

    kl: float
    bhattacharyya: float


def confidence(probs: Array, kind: str = "msp") -> Array:
    """Confidence score of each row of probabilities.

    Parameters
    ----------
    probs : array of shape (n, K), any float dtype
        Class probabilities; rows sum to 1.
    kind : {"msp", "entropy", "margin"}
        "msp": the largest probability, in [1/K, 1]. "entropy": 1 − H/ln K, in [0, 1] (H in nats, 0 ln 0 = 0).
        "margin": largest minus second largest, in [0, 1].

    Returns
    -------
    array of shape (n,), float64
        Higher = safer. With K = 1 all three are 1.

    Raises
    ------
    ValueError
        If `probs` is empty, holds NaN or isn't a distribution, or `kind` is unknown.

    Notes
    -----
    Zhou et al., Appendix Table 1; the entropy is rescaled to [0, 1] as their released code does.
    """
    array = to_numpy(probs)
    check_probabilities("probs", array)
    check_choice("kind", kind, CONFIDENCES)
    if kind == "entropy":
        score = _negative_entropy(array)
    elif kind == "msp" or array.shape[1] == 1:
        score = array.max(axis=1).astype(np.float64)
    else:
        second, first = np.partition(array, -2, axis=1)[:, -2:].T.astype(np.float64)
        score = first - second
    return like(np.clip(score, 0, 1), probs)


def risk_coverage_curve(confidence: Array, errors: Array) -> RiskCoverage:
    """Error rate among the k most confident samples, for k = 1 … n.

    Parameters
    ----------
    confidence : array of shape (n,), any float dtype
        Higher = safer; may be infinite, not NaN.
    errors : array of shape (n,), 0 or 1 or bool
        1 = the prediction is wrong.

    Returns
    -------
    RiskCoverage
        `coverage` k/n and `risk` in [0, 1]. Ties in confidence keep the order of the input.

    Raises
    ------
    ValueError
        If shapes differ, the input is empty or holds NaN, or `errors` isn't 0 or 1.

    Notes
    -----
    El-Yaniv and Wiener 2010. No errors: risk 0 throughout; all errors: 1 throughout.
    """
    scores, errors = _check("errors", confidence, errors)
    counts = np.arange(1, len(errors) + 1)
    risk = np.cumsum(_by_confidence(scores, errors)) / counts
    return RiskCoverage(like(counts / len(errors), confidence), like(risk, confidence))


def aurc(confidence: Array, errors: Array, ties: str = "stable") -> float:
    """Area under the risk–coverage curve: the mean of its n risks, in [0, 1]. Lower is better.

    Parameters
    ----------
    confidence, errors
        As `risk_coverage_curve`, with its errors.
    ties : {"stable", "average"}
        "stable": tied samples count in the order of the input, as released code has it. "average": the expected value
        over all orders of tied samples, which doesn't depend on the order of the input.

    Notes
    -----
    Geifman et al. 2019; Zhou et al., eq. 7. A mean over prefixes, not a trapezoid. No errors: 0; all errors: 1; n = 1: the error.
    """
    check_choice("ties", ties, ("stable", "average"))
    scores, errors = _check("errors", confidence, errors)
    return _mean_prefix_risk(_by_confidence(scores, _share_ties(scores, errors) if ties == "average" else errors))


def optimal_aurc(errors: Array) -> float:
    """The `aurc` of a confidence that ranks every error (n,) last, the least possible with n samples; in [0, 1]."""
    errors = to_numpy(errors)
    check_zero_one("errors", errors)
    return _mean_prefix_risk(np.sort(errors.astype(np.float64)))


def excess_aurc(confidence: Array, errors: Array, ties: str = "stable") -> float:
    """AURC above that of a perfect ranking with the same error rate r: aurc − (r + (1 − r) ln(1 − r)).

    `confidence`, `errors` of shape (n,); parameters and errors: `aurc`. A float of at least 0; no errors: 0; all errors: 0.
    Lower is better.

    Notes
    -----
    Geifman et al. 2019. The formula is the limit of `optimal_aurc` for large n, and below it: a perfect ranking of few
    samples keeps a small positive value (1e-4 for one error in 60).
    """
    check_choice("ties", ties, ("stable", "average"))
    rate = float(_check("errors", confidence, errors)[1].mean())
    return max(0.0, aurc(confidence, errors, ties) - float(rate + xlogy(1 - rate, 1 - rate)))


def augrc(confidence: Array, errors: Array) -> float:
    """Area under the generalised risk–coverage curve, in [0, 1/2]: the mean risk of undetected failures.

    The generalised risk at coverage k/n is (errors among the k most confident) / n. Parameters and errors:
    `risk_coverage_curve`. Lower is better; no errors: 0, all errors: 1/2.

    Notes
    -----
    Traub et al. 2024: equals (1 − AUROC)·a·(1 − a) + (1 − a)²/2 with accuracy a. Trapezoid from (0, 0), tied samples
    share their errors: independent of the order of the input.
    """
    scores, errors = _check("errors", confidence, errors)
    undetected = np.cumsum(_by_confidence(scores, _share_ties(scores, errors))) / len(errors)
    return float((undetected.sum() - undetected[-1] / 2) / len(errors))


def accuracy_rejection_curve(confidence: Array, errors: Array, rates: Array | None = None) -> AccuracyRejection:
    """Accuracy of what is left after the least confident samples are rejected.

    Parameters
    ----------
    confidence, errors
        As `risk_coverage_curve`, with its errors; ties keep the order of the input.
    rates : array of shape (r,) of fractions in [0, 1), or None
        Rejection rates; None: 0, 1/n, … (n − 1)/n.

    Returns
    -------
    AccuracyRejection
        `rejection_rate` (as given), `kept` = n − ⌊rate·n⌋ >= 1 samples, and their `accuracy`.
    """
    risk = to_numpy(risk_coverage_curve(confidence, errors).risk)
    n = len(risk)
    rates = np.arange(n) / n if rates is None else to_numpy(rates).astype(np.float64)
    check_vector("rates", rates)
    if rates.min() < 0 or rates.max() >= 1:
        raise ValueError(f"rates: must lie in [0, 1), found {rates.min():.4g} to {rates.max():.4g}")
    kept = n - _whole(rates * n)
    return AccuracyRejection(*(like(x, confidence) for x in (rates, kept, 1 - risk[kept - 1])))


def risk_at_coverage(confidence: Array, errors: Array, coverage: float) -> float:
    """Error rate among the ⌈coverage·n⌉ most confident samples, in [0, 1]; `coverage` in (0, 1].

    `confidence`, `errors` of shape (n,); parameters and errors: `risk_coverage_curve`.
    """
    check_range("coverage", coverage, 0, 1, open_low=True)
    risk = to_numpy(risk_coverage_curve(confidence, errors).risk)
    kept = len(risk) - int(_whole(np.asarray((1 - coverage) * len(risk))))
    return float(risk[max(kept, 1) - 1])


def detection_metrics(confidence: Array, correct: Array) -> DetectionMetrics:
    """Misclassification (or out-of-distribution) detection by a confidence score.

    Parameters
    ----------
    confidence : array of shape (n,), any float dtype
        Higher = safer; may be infinite, not NaN. Only its order matters.
    correct : array of shape (n,), 0 or 1 or bool
        1 = the prediction is right (or the sample is in distribution): the positives.

    Returns
    -------
    DetectionMetrics
        `fpr95`: share of wrong predictions accepted at the highest threshold that accepts at least 95 % of the right
        ones (lower is better). `auroc` (1/2 = chance). `aupr_success`: average precision with right as positive.
        `aupr_error`: with wrong as positive and the negated confidence. Ties are handled as scikit-learn does.

    Raises
    ------
    UndefinedMetricError (a ValueError)
        If all predictions are right, or all wrong: none of the four is defined.
    ValueError
        If shapes differ, the input is empty or holds NaN, or `correct` isn't 0 or 1.

    Notes
    -----
    From scikit-learn. Luo et al. 2021 negate the confidence for AUPR-error in the text but not in the released code,
    where lower is then better; here it is negated. Other released code has four more rules for FPR95.
    """
    # Seconds to import, which the curves need not wait for.
    from sklearn.metrics import average_precision_score, roc_auc_score

    ranks, correct = _ranks(*_check_outcomes(confidence, correct))
    return DetectionMetrics(
        fpr95=_operating_point(ranks, correct, 0.95)[0],
        auroc=float(roc_auc_score(correct, ranks)),
        aupr_success=float(average_precision_score(correct, ranks)),
        aupr_error=float(average_precision_score(1 - correct, -ranks)),
    )


def fpr_at_tpr(confidence: Array, correct: Array, tpr: float = 0.95) -> OperatingPoint:
    """False-positive rate and threshold where the true-positive rate first reaches `tpr`, in (0, 1].

    `confidence`, `correct` of shape (n,); parameters and errors: `detection_metrics`. Accept where confidence >= threshold.
    """
    check_range("tpr", tpr, 0, 1, open_low=True)
    scores, correct = _check_outcomes(confidence, correct)
    fpr, rank = _operating_point(*_ranks(scores, correct), tpr)
    return OperatingPoint(fpr, float(np.unique(scores)[int(rank)]))


def true_rates(confidence: Array, correct: Array, threshold: float = 0.5) -> TrueRates:
    """Rates of right decisions when predictions above `threshold` are trusted.

    tpr: share of right predictions with confidence > threshold; tnr: share of wrong ones with confidence < threshold.
    A confidence equal to the threshold counts for neither. `confidence`, `correct` of shape (n,); parameters and errors:
    `detection_metrics`.

    Notes
    -----
    Luo et al. 2021, released code: strict on both sides (their text has <= for the untrustworthy). The threshold is
    1/2 for a sigmoid output, 0 for a signed distance, 1/K for a true-class probability.
    """
    scores, correct = _check_outcomes(confidence, correct)
    right = correct == 1
    return TrueRates(float((scores[right] > threshold).mean()), float((scores[~right] < threshold).mean()))


def separability(a: Array, b: Array) -> Separability:
    """How far apart two samples of confidences lie, taken as normal distributions.

    Parameters
    ----------
    a, b : arrays of shape (n,) and (m,), n, m >= 2
        For example the confidences of right and of wrong predictions. Order doesn't matter.

    Returns
    -------
    Separability
        `kl`: mean of the two Kullback–Leibler divergences, nats, >= 0. `bhattacharyya`: distance, >= 0.

    Raises
    ------
    UndefinedMetricError (a ValueError)
        If either has fewer than two values or no spread.

    Notes
    -----
    Luo et al. 2021, with unbiased standard deviations (n − 1) as in the released code, and with the factor 2 in the
    divergence's denominator that the released code lacks (it gives 1/2 for equal distributions).
    """
    return gaussian_separability(*_moments("a", a), *_moments("b", b))


def gaussian_separability(mean_a: float, std_a: float, mean_b: float, std_b: float) -> Separability:
    """`separability` of two normal distributions given by their moments; standard deviations > 0, else ValueError."""
    kl = (gaussian_kl(mean_a, std_a, mean_b, std_b) + gaussian_kl(mean_b, std_b, mean_a, std_a)) / 2
    variance = std_a**2 + std_b**2
    return Separability(
        float(kl), float((mean_a - mean_b) ** 2 / (4 * variance) + np.log(variance / (2 * std_a * std_b)) / 2)
    )


def gaussian_kl(mean_a: float, std_a: float, mean_b: float, std_b: float) -> float:
    """KL(a ‖ b) = ln(σ_b/σ_a) + (σ_a² + (μ_a − μ_b)²)/(2σ_b²) − 1/2, nats, >= 0; ValueError unless σ > 0."""
    for name, std in (("std_a", std_a), ("std_b", std_b)):
        check_range(name, float(std), 0, np.inf, open_low=True)
    return float(np.log(std_b / std_a) + (std_a**2 + (mean_a - mean_b) ** 2) / (2 * std_b**2) - 0.5)


def _check(name: str, confidence: Array, outcomes: Array) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 vectors of one length; `outcomes`, called `name`, of zeros and ones."""
    confidence, outcomes = to_numpy(confidence), to_numpy(outcomes)
    check_vector("confidence", confidence)
    check_zero_one(name, outcomes, len(confidence))
    return confidence.astype(np.float64), outcomes.astype(np.float64)


def _check_outcomes(confidence: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    confidence, correct = _check("correct", confidence, correct)
    if correct.min() == correct.max():
        all_are = "right" if correct[0] else "wrong"
        raise UndefinedMetricError(f"correct: undefined, all {len(correct)} predictions are {all_are}; both are needed")
    return confidence, correct


def _negative_entropy(probs: np.ndarray, block: int = 1 << 18) -> np.ndarray:
    """1 − H/ln K of each row; 1 if K = 1. `block` entries are held in float64 at a time."""
    if probs.shape[1] == 1:
        return np.ones(len(probs))
    step = max(1, block // probs.shape[1])
    entropies = [entr(probs[i : i + step].astype(np.float64)).sum(axis=1) for i in range(0, len(probs), step)]
    return 1 - np.concatenate(entropies) / np.log(probs.shape[1])


def _by_confidence(confidence: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` in falling order of confidence, ties in input order."""
    return values[np.argsort(-confidence, kind="stable")]


def _share_ties(confidence: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value replaced by the mean over the samples of equal confidence."""
    group = np.unique(confidence, return_inverse=True)[1]
    return (np.bincount(group, values) / np.bincount(group))[group]


def _mean_prefix_risk(errors: np.ndarray) -> float:
    return float((np.cumsum(errors) / np.arange(1, len(errors) + 1)).mean())


def _whole(x: np.ndarray) -> np.ndarray:
    """⌊x⌋, where 28.999999999999996 (0.29 · 100) is 29."""
    return np.floor(x + 1e-9).astype(np.int64)


def _ranks(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence as dense ranks, so that scikit-learn takes infinite ones too."""
    return np.unique(confidence, return_inverse=True)[1], correct


def _operating_point(scores: np.ndarray, correct: np.ndarray, tpr: float) -> tuple[float, float]:
    """False-positive rate and score at the first threshold with at least `tpr`."""
    # collinear points are kept: dropping them moves the threshold
    from sklearn.metrics import roc_curve

    false_rates, true_rates, thresholds = roc_curve(correct, scores, drop_intermediate=False)
    first = int(np.argmax(true_rates >= tpr))
    return float(false_rates[first]), float(thresholds[first])


def _moments(name: str, values: Array) -> tuple[float, float]:
    """Mean and unbiased standard deviation."""
    values = to_numpy(values)
    check_vector(name, values)
    values = values.astype(np.float64)
    if len(values) < 2 or values.min() == values.max():
        raise UndefinedMetricError(f"{name}: no spread, needs two different values, shape {values.shape}")
    return float(values.mean()), float(values.std(ddof=1))
