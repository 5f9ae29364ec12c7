"""How far confidences are from the truth, and post-hoc calibration fitted on held-out logits.

Metrics take probabilities, calibrators take logits; both any float dtype, numpy or torch, and compute in float64.
Errors are fractions in [0, 1], logarithms are natural (nats).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ops.arrays import Array, like, to_numpy
from ops.checks import (
    check_choice,
    check_count,
    check_labels,
    check_matrix,
    check_probabilities,
    check_range,
    check_vector,
    check_zero_one,
)
from ops.temperature import best_temperature, by_rows, entropy, row_blocks, softmax_at

BINNINGS = ("width", "mass")
_COLUMNS = 1 << 24  # entries of an N x K matrix fetched at a time, in columns: 128 MiB in float64


class ReliabilityCurve(NamedTuple):
    """Per bin, in rising order of confidence: arrays of shape (bins,); zeros where `count` is 0."""

    count: Array
    accuracy: Array
    confidence: Array


def expected_calibration_error(probs: Array, labels: Array, bins: int = 15, binning: str = "width") -> float:
    """Expected calibration error of the predicted class (ECE).

    Parameters
    ----------
    probs : array of shape (n, K), any float dtype
        Class probabilities; rows sum to 1.
    labels : array of shape (n,), integer
        True classes, in [0, K).
    bins : int
        Number of bins, at least 1.
    binning : {"width", "mass"}
        "width": equal intervals (lo, hi], a confidence of 0 in the first. "mass": `numpy.array_split` of the
        confidences in stable ascending order; with n < bins one sample per bin. Where confidences tie, "mass"
        depends on the order of the samples; "width" never does.

    Returns
    -------
    float in [0, 1]
        Σ_b n_b/n · |accuracy_b − confidence_b|. Lower is better. Empty bins count nothing; one sample is enough.

    Raises
    ------
    ValueError
        If shapes differ, a label is outside [0, K), `probs` holds NaN or is not a distribution, or n is 0.

    Notes
    -----
    Guo et al. 2017; Zhou et al., eq. 10. Ties for the largest probability go to the lowest class.
    """
    return confidence_calibration_error(*_top_label(probs, labels), bins, binning)


def confidence_calibration_error(confidence: Array, correct: Array, bins: int = 15, binning: str = "width") -> float:
    """ECE of any confidence in [0, 1] (n,) against outcomes (n,) of 0 and 1, in [0, 1].

    For scores that are no class probabilities (a sigmoid of a trust score), and far cheaper to resample than (n, K)
    probabilities. Binning rules: `expected_calibration_error`. ValueError for other values, shapes, NaN, no sample.
    """
    gaps = _gaps(*_confidence_and_outcome(confidence, correct), bins, binning)
    return float(np.abs(gaps).sum() / len(confidence))


def confidence_reliability_curve(
    confidence: Array, correct: Array, bins: int = 15, binning: str = "width"
) -> ReliabilityCurve:
    """`reliability_curve` of any confidence in [0, 1] (n,) against outcomes (n,) of 0 and 1; errors as above."""
    curve = _reliability(*_confidence_and_outcome(confidence, correct), bins, binning)
    return ReliabilityCurve(*(like(part, confidence) for part in curve))


def maximum_calibration_error(probs: Array, labels: Array, bins: int = 15, binning: str = "width") -> float:
    """Largest |accuracy − confidence| over non-empty bins, a float in [0, 1] (Guo et al. 2017).

    `probs` of shape (n, K), `labels` (n,). Parameters, binning rules and errors: `expected_calibration_error`.
    """
    count, accuracy, confidence = _reliability(*_top_label(probs, labels), bins, binning)
    return float(np.abs(accuracy - confidence).max(where=count > 0, initial=0.0))


def classwise_calibration_error(probs: Array, labels: Array, bins: int = 15, binning: str = "width") -> float:
    """Mean over all K classes of `per_class_calibration_error`, a float in [0, 1] (cwECE; Zhou et al., eq. 12).

    Classes without a sample count too: some released code leaves them out. `probs` of shape (n, K), `labels` (n,).
    Parameters and errors: `expected_calibration_error`.
    """
    return float(to_numpy(per_class_calibration_error(probs, labels, bins, binning)).mean())


def per_class_calibration_error(probs: Array, labels: Array, bins: int = 15, binning: str = "width") -> Array:
    """Calibration error of each class's own probability, whatever class is predicted.

    Parameters
    ----------
    probs, labels, bins, binning
        As `expected_calibration_error`; the bins are made from each class's column, and with "width" a probability
        of exactly 0 falls in no bin (the first is (0, 1/bins]), as in the released code of Zhou et al.'s sources.

    Returns
    -------
    array of shape (K,), float64, in [0, 1]
        Σ_b n_b/n · |frequency_b − mean probability_b| of each class.

    Notes
    -----
    The terms of Zhou et al., eq. 12. Time O(nK) ("mass": O(nK log n)); extra memory 128 MiB, whatever K is.
    """
    array, labels_np = _check_probs(probs, labels)
    errors = np.empty(array.shape[1])
    for k, column in enumerate(_columns(array)):
        hit = labels_np == k
        if binning == "width":
            column, hit = column[column > 0], hit[column > 0]
        errors[k] = np.abs(_gaps(column, hit, bins, binning)).sum() / len(array)
    return like(errors, probs)


def reliability_curve(probs: Array, labels: Array, bins: int = 15, binning: str = "width") -> ReliabilityCurve:
    """The points of a reliability diagram of the predicted class.

    Parameters and errors: `expected_calibration_error`.

    Returns
    -------
    ReliabilityCurve
        `count` (int64), `accuracy` and mean `confidence` (float64), each (bins,), of the kind of `probs`. Where `count` is 0
        the other two are 0 and mean nothing. Width bin b is (b/bins, (b+1)/bins].
    """
    curve = _reliability(*_top_label(probs, labels), bins, binning)
    return ReliabilityCurve(*(like(values, probs) for values in curve))


def brier_score(probs: Array, labels: Array) -> float:
    """Mean over samples of Σ_k (p_k − [k = label])², in [0, 2].

    Zhou et al., eq. 24: summed over classes (some released code averages over them: 1/K of this).
    `probs` (n, K) and integer `labels` (n,); errors as in `expected_calibration_error`.
    """
    array, labels = _check_probs(probs, labels)
    total = 0.0
    for rows in row_blocks(*array.shape):
        block = array[rows].astype(np.float64)
        block[np.arange(len(block)), labels[rows]] -= 1
        total += np.einsum("ij,ij->", block, block)
    return float(total / len(array))


def negative_log_likelihood(probs: Array, labels: Array) -> float:
    """Mean of −ln p(label), in [0, inf]; inf, not clipped, if any label has probability exactly 0.

    `probs` (n, K) and integer `labels` (n,); errors as in `expected_calibration_error`.
    """
    array, labels = _check_probs(probs, labels)
    own = array[np.arange(len(array)), labels].astype(np.float64)
    with np.errstate(divide="ignore"):
        return float(-np.log(np.minimum(own, 1)).mean() + 0.0)


@dataclass
class TemperatureScaling:
    """softmax(logits / T) with the T that minimises the negative log-likelihood of held-out samples.

    Parameters
    ----------
    temperature : float or None
        T > 0, set by `fit` (or given, to restore a fitted one). T > 1 softens, T < 1 sharpens.

    Notes
    -----
    Guo et al. 2017. The NLL is convex in 1/T; its stationary point is bracketed and solved for in ln T, so T is
    positive by construction and exact to about 1e-10. It never raises the NLL of the samples it was fitted on, and
    `transform` never changes the predicted class. Where there is no finite minimum, T is a bound of [1e-3, 1e3]:
    the lower one if all samples are classified right (the NLL falls for ever as T → 0), the upper one if the logits
    speak against the labels (T → ∞). T = 1 where the NLL doesn't depend on T (constant rows, K = 1).
    Zhou et al. write that T minimises the ECE on a grid; their released code minimises the NLL, as here.
    """

    temperature: float | None = None

    def fit(self, logits: Array, labels: Array) -> "TemperatureScaling":
        """Choose T from `logits` (n, K), finite, and integer `labels` (n,) in [0, K); ValueError otherwise."""
        array, labels = _check_logits(logits), to_numpy(labels)
        check_labels("labels", labels, *array.shape)
        self.temperature = best_temperature(array, labels)
        return self

    def transform(self, logits: Array) -> Array:
        """Probabilities of shape (n, K), float64: softmax(logits / T). ValueError before `fit`."""
        array = _check_logits(logits)
        return like(by_rows(array, lambda block: softmax_at(block, _fitted(self.temperature))), logits)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings that `calibrator_from_dict` restores."""
        return {"method": "temperature", **asdict(self)}


@dataclass
class MetaCalibration:
    """Meta-Cal: temperature scaling where the classifier is sure, the uniform distribution elsewhere.

    A sample is kept if the entropy of softmax(logits), in nats, is below `threshold` (strict). Kept rows become
    softmax(logits / T) with T fitted on kept samples only; all others become exactly 1/K. Accuracy may fall: every
    uniform row predicts class 0.

    Parameters
    ----------
    kind : {"misclassification", "accuracy"}
        "misclassification" (MetaMis): about the fraction `alpha` of correct predictions is given up; the threshold is
        that quantile of the entropies of correctly classified samples. "accuracy" (MetaAcc): the kept samples should
        have the accuracy `accuracy`; the threshold comes from the accuracy as a function of entropy, over 20
        equal-mass bins, by isotonic regression.
    alpha, accuracy : float in [0, 1]
        The one that `kind` needs.
    seed : int
        Of the random split that `fit` draws where it isn't given one.
    threshold, temperature : float or None
        Set by `fit`.

    Notes
    -----
    Ma and Blaschko 2021, as their released code computes it, but: the split is seeded, and empty bins (tied
    entropies, or fewer than 20 samples) are left out instead of counting as accuracy 0. As there, the lowest entropy
    falls in no bin.
    """

    kind: str
    alpha: float | None = None
    accuracy: float | None = None
    seed: int = 0
    threshold: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("misclassification", "accuracy"))
        needed = "alpha" if self.kind == "misclassification" else "accuracy"
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: MetaCalibration({self.kind!r}) needs it, a fraction in [0, 1]")
        check_range(needed, getattr(self, needed), 0, 1)

    def fit(
        self, logits: Array, labels: Array, threshold_rows: Array | None = None, calibration_rows: Array | None = None
    ) -> "MetaCalibration":
        """Choose `threshold` on some rows and `temperature` on others.

        Parameters
        ----------
        logits : array of shape (n, K), finite
        labels : array of shape (n,), integer in [0, K)
        threshold_rows, calibration_rows : integer arrays, or None
            Disjoint row numbers. One that is None is what the other leaves; both None: a random tenth, at most 500
            (of the correctly classified for "misclassification"), chooses the threshold. "misclassification" only
            looks at the correctly classified among `threshold_rows`.

        Raises
        ------
        ValueError
            For bad input, and where no threshold exists (an accuracy that no entropy reaches) or no calibration row
            lies below it; the message says what would do.
        """
        array, labels = _check_logits(logits), to_numpy(labels)
        check_labels("labels", labels, *array.shape)
        correct = array.argmax(axis=1) == labels
        first, second = self._split(correct, threshold_rows, calibration_rows)
        threshold = self._threshold(by_rows(array[first], entropy), correct[first])
        kept = second[by_rows(array[second], entropy) < threshold]
        if len(kept) == 0:
            raise ValueError(f"calibration_rows: none of {len(second)} has an entropy below the threshold "
                             f"{threshold:.4g}; {self._way_out()} or give more rows")  # fmt: skip
        self.threshold, self.temperature = threshold, best_temperature(array[kept], labels[kept])
        return self

    def keeps(self, logits: Array) -> Array:
        """Which rows of `logits` (n, K) are kept: bool (n,). ValueError before `fit`."""
        return like(by_rows(_check_logits(logits), entropy) < _fitted(self.threshold), logits)

    def transform(self, logits: Array) -> Array:
        """Probabilities of shape (n, K), float64: softmax(logits / T) where kept, else 1/K. ValueError before `fit`."""
        array = _check_logits(logits)
        kept, temperature = self.keeps(array), _fitted(self.temperature)
        probs = np.full(array.shape, 1 / array.shape[1])
        probs[kept] = by_rows(array[kept], lambda block: softmax_at(block, temperature))
        return like(probs, logits)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings that `calibrator_from_dict` restores."""
        return {"method": "meta", **asdict(self)}

    def _split(
        self, correct: np.ndarray, threshold_rows: Array | None, calibration_rows: Array | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers for the threshold and for the temperature."""
        n = len(correct)
        first = None if threshold_rows is None else _check_rows("threshold_rows", threshold_rows, n)
        second = None if calibration_rows is None else _check_rows("calibration_rows", calibration_rows, n)
        if first is None and second is None:
            pool = np.flatnonzero(correct) if self.kind == "misclassification" else np.arange(n)
            size = min(500, max(1, len(pool) // 10))
            first = np.random.default_rng(self.seed).permutation(pool)[:size]
        first = np.setdiff1d(np.arange(n), second) if first is None else first
        second = np.setdiff1d(np.arange(n), first) if second is None else second
        for name, rows in (("threshold_rows", first), ("calibration_rows", second)):
            if len(rows) == 0:
                raise ValueError(f"{name}: no row left of {n} to fit on ({int(correct.sum())} classified correctly)")
        if np.intersect1d(first, second).size:
            raise ValueError("calibration_rows: shares rows with threshold_rows, the two must be disjoint")
        return first, second

    def _threshold(self, entropies: np.ndarray, correct: np.ndarray) -> float:
        if self.kind == "accuracy":
            return _threshold_at_accuracy(entropies, correct, self.accuracy)
        if not correct.any():
            raise ValueError(f"threshold_rows: none of the {len(correct)} rows is classified correctly")
        return float(np.quantile(entropies[correct], 1 - self.alpha, method="higher"))

    def _way_out(self) -> str:
        return "lower alpha" if self.kind == "misclassification" else "lower accuracy"


def calibrator_from_dict(state: dict[str, Any]) -> TemperatureScaling | MetaCalibration:
    """The calibrator that `to_dict` described."""
    state = dict(state)
    method = state.pop("method", None)
    check_choice("method", method, ("temperature", "meta"))
    return TemperatureScaling(**state) if method == "temperature" else MetaCalibration(**state)


def _check_probs(probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    probs, labels = to_numpy(probs), to_numpy(labels)
    check_probabilities("probs", probs)
    check_labels("labels", labels, *probs.shape)
    return probs, labels


def _check_logits(logits: Array) -> np.ndarray:
    logits = to_numpy(logits)
    check_matrix("logits", logits, finite=True)
    return logits


def _check_rows(name: str, rows: Array, n: int) -> np.ndarray:
    rows = to_numpy(rows)
    check_labels(name, rows, rows.size, n)
    if len(np.unique(rows)) != len(rows):
        raise ValueError(f"{name}: row numbers repeat (shape {rows.shape})")
    return rows


def _fitted(value: float | None) -> float:
    if value is None:
        raise ValueError("temperature: this calibrator isn't fitted yet; call fit(logits, labels) first")
    return value


def _columns(array: np.ndarray) -> Iterator[np.ndarray]:
    """The columns in float64, fetched several at a time: single columns of a wide matrix would read it K times."""
    n, num_classes = array.shape
    step = max(1, min(64, _COLUMNS // n))
    for start in range(0, num_classes, step):
        yield from np.ascontiguousarray(array[:, start : start + step].T, dtype=np.float64)


def _confidence_and_outcome(confidence: Array, correct: Array) -> tuple[np.ndarray, np.ndarray]:
    """Both checked, (n,) float64."""
    values, outcomes = to_numpy(confidence), to_numpy(correct)
    check_vector("confidence", values)
    check_range("confidence", float(values.min()), 0, 1)
    check_range("confidence", float(values.max()), 0, 1)
    check_zero_one("correct", outcomes, len(values))
    return values.astype(np.float64), outcomes.astype(np.float64)


def _top_label(probs: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    """Confidence, and whether the prediction is right, of each sample."""
    array, labels = _check_probs(probs, labels)
    predicted = array.argmax(axis=1)
    confidence = array[np.arange(len(array)), predicted].astype(np.float64)
    return np.minimum(confidence, 1), predicted == labels


def _bin_of(confidence: np.ndarray, bins: int, binning: str) -> np.ndarray:
    """The bin, in [0, bins), of each sample."""
    check_choice("binning", binning, BINNINGS)
    check_count("bins", bins)
    if binning == "width":
        # j/bins correctly rounded: linspace and confidence·bins put some exact edges in the wrong bin
        return np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    n = len(confidence)
    place = np.empty(n, dtype=np.intp)
    place[np.argsort(confidence, kind="stable")] = np.repeat(np.arange(bins), _split_sizes(n, bins))
    return place


def _split_sizes(n: int, parts: int) -> np.ndarray:
    """The sizes that `numpy.array_split` gives: the first n mod parts are one larger."""
    return n // parts + (np.arange(parts) < n % parts)


def _gaps(confidence: np.ndarray, hit: np.ndarray, bins: int, binning: str) -> np.ndarray:
    """Σ (hit − confidence) of each bin, (bins,)."""
    return np.bincount(_bin_of(confidence, bins, binning), weights=hit - confidence, minlength=bins)


def _reliability(confidence: np.ndarray, hit: np.ndarray, bins: int, binning: str) -> tuple[np.ndarray, ...]:
    place = _bin_of(confidence, bins, binning)
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights=values, minlength=bins) for values in (hit, confidence))
    return (count, *(total / np.maximum(count, 1) for total in sums))


def _threshold_at_accuracy(entropies: np.ndarray, correct: np.ndarray, accuracy: float, bins: int = 20) -> float:
    """The entropy below which the mean accuracy is `accuracy`, by isotonic regression over equal-mass bins."""
    cuts = np.quantile(entropies, np.linspace(0, 1, bins + 1))
    place = np.searchsorted(cuts[:-1], entropies, side="left")  # (lo, hi] is lo's number + 1; the smallest has 0
    count, hits, sums = (np.bincount(place, w, bins + 1)[1:] for w in (np.ones(len(place)), correct, entropies))
    filled = count > 0
    if not filled.any():
        raise ValueError(f"threshold_rows: all {len(place)} entropies are equal, no threshold parts them; give more")
    reached = np.cumsum(hits[filled] / count[filled]) / np.arange(1, filled.sum() + 1)
    from sklearn.isotonic import IsotonicRegression  # seconds to import, which the metrics need not wait for

    regression = IsotonicRegression(increasing=False).fit(reached, sums[filled] / count[filled])
    threshold = float(regression.predict([accuracy])[0])
    if np.isnan(threshold):
        raise ValueError(f"accuracy: no threshold reaches {accuracy} on these threshold_rows; "
                         f"it must lie in [{reached.min():.4g}, {reached.max():.4g}]")  # fmt: skip
    return threshold
