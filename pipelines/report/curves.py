"""The numbers behind the report's pictures: histograms, error over difficulty, reliability, risk–coverage, agreement.

Arrays in, JSON-able lists out; nothing here is NaN.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ops.calibration import confidence_calibration_error, confidence_reliability_curve
from ops.selective import aurc, risk_coverage_curve

BARS = 60
PERCENTILES = (0, 0.1, 0.5, *range(1, 100), 99.5, 99.9, 100)  # what a value's percentile is read off in the page
CURVE_POINTS = 200
KENDALL_ROWS = 5000  # evenly spaced; its time grows with n log n for each pair


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Counts of finite values in bars of equal width, and their percentiles; None without any.

    The bars span the 0.1st to the 99.9th percentile; what lies beyond is counted in the outer ones.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    percentiles = np.percentile(values, PERCENTILES)
    low, high = percentiles[1], percentiles[-2]
    if not high > low:
        low, high = low - 0.5, low + 0.5
    counts = np.histogram(np.clip(values, low, high), BARS, (low, high))[0]
    return {
        "low": rounded(low),
        "high": rounded(high),
        "counts": counts.tolist(),
        "clipped": int(((values < low) | (values > high)).sum()),
        "percentiles": [rounded(p) for p in percentiles],
        "mean": rounded(values.mean()),
        "count": len(values),
    }


def error_by_difficulty(difficulty: np.ndarray, wrong: np.ndarray, bins: int = 10) -> list[dict[str, Any]]:
    """Share of wrong predictions in each of `bins` equally large parts, from the easiest to the hardest.

    Each part has its range of difficulty, count, error and the error's 95 % interval (Wilson 1927).
    """
    order = np.argsort(difficulty, kind="stable")
    order = order[np.isfinite(difficulty[order])]
    parts = []
    for rows in np.array_split(order, min(bins, len(order))) if len(order) else []:
        error = float(wrong[rows].mean())
        low, high = wilson(error, len(rows))
        found = {"low": difficulty[rows[0]], "high": difficulty[rows[-1]], "error": error, "from": low, "to": high}
        parts.append({name: rounded(value) for name, value in found.items()} | {"count": len(rows)})
    return parts


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` samples; within [0, 1] and not empty at 0 and 1 (Wilson 1927, eq. 4)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def outcome(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Accuracy, ECE (15 bins of equal width) and AURC of confidences in [0, 1], with their curves."""
    clipped = np.clip(confidence, 0, 1)
    return {
        "samples": len(correct),
        "accuracy": rounded(correct.mean()),
        "confidence": rounded(clipped.mean()),
        "ece": rounded(confidence_calibration_error(clipped, correct)),
        "aurc": rounded(aurc(clipped, ~correct)),
        "reliability": reliability(clipped, correct),
        "risk_coverage": risk_coverage(clipped, correct),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Count, accuracy and mean confidence of each filled bin of equal width."""
    curve = confidence_reliability_curve(confidence, correct)
    return [
        {"count": int(n), "accuracy": rounded(a), "confidence": rounded(c), "bin": number}
        for number, (n, a, c) in enumerate(zip(curve.count, curve.accuracy, curve.confidence))
        if n
    ]


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> dict[str, list[float]]:
    """Error among the most confident samples against the share of them, at evenly spaced shares."""
    curve = risk_coverage_curve(confidence, ~correct)
    at = np.unique(np.linspace(0, len(correct) - 1, CURVE_POINTS).astype(int))
    at = at[at >= min(len(correct) // 200, len(correct) - 1)]  # of the first few samples the risk is noise
    return {"coverage": [rounded(v) for v in curve.coverage[at]], "risk": [rounded(v) for v in curve.risk[at]]}


def agreement(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Spearman's ρ and Kendall's τ-b between scores, over the rows where both have a value.

    A pair without spread or with fewer than three rows is None.
    """
    names = list(scores)
    spearman = [[1.0 if a == b else None for b in names] for a in names]
    kendall = [[1.0 if a == b else None for b in names] for a in names]
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            found = _rank_agreement(scores[first], scores[second])
            spearman[i][j], kendall[i][j] = spearman[j][i], kendall[j][i] = found
    return {"names": names, "spearman": spearman, "kendall": kendall}


def _rank_agreement(a: np.ndarray, b: np.ndarray) -> tuple[float | None, float | None]:
    both = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    if len(both) < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None, None
    from scipy.stats import kendalltau, rankdata  # a second to import, which a report without a second score saves

    rho = np.corrcoef(rankdata(a[both]), rankdata(b[both]))[0, 1]
    some = both[:: -(-len(both) // KENDALL_ROWS)]
    return rounded(rho), rounded(kendalltau(a[some], b[some]).statistic)


def rounded(value: float, digits: int = 5) -> float | None:
    """A value with so many significant digits; None where it is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
