"""Class-conditional and class-agnostic Gaussians of features, from sums that merge.

Source: Cui et al. 2023, "Learning Sample Difficulty from Pre-trained Models for Reliable Prediction", eq. 1-4.
`GaussianStats` collects sums in one pass; its `fit` gives `Gaussians` (`ops.mahalanobis`), which score.
"""

import importlib
from types import ModuleType
from typing import Self

import numpy as np
import scipy.sparse

from ops.arrays import Array, as_ndarray, namespace, to_numpy
from ops.checks import check_count, check_shape
from ops.mahalanobis import Gaussians, checked_features, checked_labels, precision_of
from ops.shrinkage import amounts_of, check_shrinkage, live_features, shrink, shrink_spectrum
from ops.shrinkage_search import ShrinkageSearch

CHUNK_ROWS = 4_096  # rows per X^T X: full speed, and half the rounding error of 16,384 rows in float32
EXACT_ROWS = 16_384  # float64 products for so many rows: over fewer, the rounding of float32 doesn't average out
PILOT_ROWS = 4_096
LEAST_SQUARES = 1e-28  # a sum of squares below this, in float32, has lost digits to underflow


class GaussianStats:
    """Sums over labelled features that merge exactly, from which the Gaussians of eq. 1-4 follow.

    Parameters
    ----------
    num_classes : int >= 0
        K. With 0 there are no labels, and the fit has the class-agnostic Gaussian only.
    dim : int >= 1
        d, the width of the features.
    pilot : array of shape (d,), optional
        A rough mean that the sums are taken about; it doesn't change the result beyond rounding. Parts of one fit
        that share it merge by plain addition. Default: the mean of the first rows seen.

    Attributes
    ----------
    count : int
        Rows given to `update`, the unlabelled included.

    Notes
    -----
    One pass: per chunk of 4,096 rows, X^T X about the pilot in the precision of the input (float16 in float32; the
    first 16,384 rows that an object sees in float64), summed in float64. The within-class scatter is the total minus
    the between-class scatter of the means. In a run with labels, rows without one enter neither Gaussian: both speak
    of the same samples, or rmd would compare densities of different populations. Plain host arrays: pickles in
    8 (d² + K d) bytes.
    """

    def __init__(self, num_classes: int, dim: int, *, pilot: Array | None = None):
        check_count("num_classes", num_classes, 0)
        check_count("dim", dim)
        self.num_classes, self.dim = int(num_classes), int(dim)
        self.pilot = None if pilot is None else _checked_pilot(pilot, self.dim)
        self.count = 0
        self.eps = float(np.finfo(np.float64).eps)  # of the coarsest precision that features came in
        rows = max(1, self.num_classes)  # without classes, all samples are in one nameless group
        self._counts = np.zeros(rows, np.int64)
        self._sums = np.zeros((rows, self.dim))
        self._scatter = np.zeros((self.dim, self.dim))

    @property
    def num_samples(self) -> int:
        """Rows that entered the sums: N of eq. 2 and 4."""
        return int(self._counts.sum())

    @property
    def class_counts(self) -> np.ndarray:
        """Rows of each class, (K,) int64."""
        return self._counts[: self.num_classes].copy()

    def update(self, features: Array, labels: Array | None = None) -> Self:
        """Add samples; returns self.

        Parameters
        ----------
        features : array of shape (n, d), float, finite
            numpy, cupy, or a tensor on either device; the products are taken where it is.
        labels : integer array of shape (n,), or None if num_classes is 0
            Class of each sample in [0, K); -1 = no label: the row is counted and otherwise left out.

        Raises
        ------
        ValueError
            Wrong shape, a label outside [-1, K), no labels though there are classes, NaN or infinite features.
            The statistics are then as before.
        """
        x = checked_features(features, self.dim)
        groups = self._groups(labels, x)
        pilot = self.pilot if self.pilot is not None else _pilot_mean(x[:PILOT_ROWS])
        counts, sums, scatter = _moments(x, groups, pilot, len(self._counts), max(0, EXACT_ROWS - self.count))
        self.pilot = pilot
        self.count += len(x)
        self.eps = max(self.eps, float(np.finfo(precision_of(x)).eps))
        self._counts += counts
        self._sums += sums
        self._scatter += scatter
        return self

    def _groups(self, labels: Array | None, x: Array) -> Array | None:
        """The row of the sums that each sample adds to, -1 = none; None = all to the first."""
        if self.num_classes == 0:
            if labels is not None and bool((as_ndarray(labels) >= 0).any()):
                raise ValueError(
                    "labels: these statistics have num_classes=0; pass None, or give the number of classes"
                )
            return None
        if labels is None:
            raise ValueError(f"labels: None, but num_classes is {self.num_classes}; pass -1 for rows without a label")
        return checked_labels(labels, x, self.num_classes, unlabelled=True)

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        """The statistics of both parts together; neither is changed.

        Equal to one pass over all rows up to float64 rounding, in any order and for any split (Chan et al. 1979).
        If one knows more classes, the result does.

        Raises
        ------
        ValueError
            If the widths differ, or only one part has classes.
        """
        self._check_mergeable(other)
        merged = GaussianStats(max(self.num_classes, other.num_classes), self.dim)
        merged.pilot = self.pilot if self.pilot is not None else other.pilot
        merged.count, merged.eps = self.count + other.count, max(self.eps, other.eps)
        for part in (self, other):
            merged._add(part)
        return merged

    def _check_mergeable(self, other: "GaussianStats") -> None:
        if self.dim != other.dim:
            raise ValueError(f"other: has features of width {other.dim}, these statistics {self.dim}")
        if self.count and other.count and bool(self.num_classes) != bool(other.num_classes):
            raise ValueError(
                f"other: num_classes is {other.num_classes}, here {self.num_classes}; labels on one side only"
            )

    def _add(self, part: "GaussianStats") -> None:
        rows = len(part._counts)
        self._counts[:rows] += part._counts
        self._sums[:rows] += part._sums
        self._scatter += part._scatter
        if part.pilot is None or np.array_equal(part.pilot, self.pilot):
            return
        shift, total = part.pilot - self.pilot, part._sums.sum(axis=0)
        cross = np.outer(total, shift)
        self._sums[:rows] += part._counts[:, None] * shift
        self._scatter += cross + cross.T + part.num_samples * np.outer(shift, shift)

    def fit(self, shrinkage: str | float = "none", rows: tuple[Array, Array | None] | None = None) -> Gaussians:
        """The Gaussians of eq. 2 and 4, both covariances divided by N.

        Parameters
        ----------
        shrinkage : "none", "oas", "auto" or a number s in [0, 1]
            "none": the covariances as they are. s: (1 - s) Σ + s tr(Σ)/d I, both. "oas": s by the Oracle
            Approximating Shrinkage formula, for each of the two. "auto": (1 - s) Σ + s diag(Σ), with the s of a grid that
            predicts `rows` best, each left out of the Gaussians (see `ops.shrinkage_search`); without `rows`, s by OAS.
        rows : (features, labels), optional
            Rows that were fitted on, all or a sample of them, as for `update`; features of shape (n, R, d) are R views of
            each sample. For "auto" only.

        Raises
        ------
        ValueError
            No sample; or a covariance that isn't positive definite to working precision (after shrinkage): with
            rank, d, N and the way out. "auto" raises only where no feature varies within classes.

        Notes
        -----
        OAS is that of scikit-learn (`sklearn.covariance.oas`): the class-agnostic covariance is equal to its. The
        same formula with n = N serves the pooled within-class covariance, for which it was not derived.
        Working precision: an eigenvalue counts if above sqrt(d) eps times the largest one of the class-agnostic
        covariance, eps of the coarsest precision that features came in (float32 for float16 and float32). With "auto" the
        same is asked of the correlation matrices, so that the units of features don't matter, and features that don't
        vary within classes, to that precision, have no weight.
        """
        check_shrinkage(shrinkage)
        if shrinkage == "auto":
            search = self.shrinkage_search()
            return search.fit(None if rows is None else search.measure(*rows))
        if rows is not None:
            raise ValueError(f"rows: only shrinkage 'auto' is chosen by them, not {shrinkage!r}")
        self._need_samples()
        class_means, mean, within, agnostic = self._estimates()
        spectra = [np.linalg.eigvalsh(covariance) for covariance in (within, agnostic)]
        floor = np.sqrt(self.dim) * self.eps * spectra[1][-1]
        rank = min(int((values > floor).sum()) for values in spectra)
        amounts = amounts_of(shrinkage, within, agnostic, self.num_samples)
        shrunk = [shrink_spectrum(values, s) for values, s in zip(spectra, amounts)]
        if min(values[0] for values in shrunk) <= floor:
            raise ValueError(_singular(rank, self.dim, self.num_samples, shrinkage, len(self._counts)))
        return Gaussians(
            class_means=class_means,
            counts=self.class_counts,
            mean=mean,
            covariance=shrink(within, amounts.within) if self.num_classes else None,
            covariance_agn=shrink(agnostic, amounts.agnostic),
            rank=rank,
            condition=max(float(values[-1] / values[0]) for values in shrunk),
            shrinkage=amounts,
            num_samples=self.num_samples,
        )

    def shrinkage_search(self) -> ShrinkageSearch:
        """What `fit("auto")` chooses with: rows may be measured in parts, whose curves add up, and then fitted.

        ValueError without samples, or where no feature varies within classes.
        """
        self._need_samples()
        class_means, mean, within, agnostic = self._estimates()
        moments = self._scatter.diagonal() / self.num_samples
        live = live_features(within.diagonal(), agnostic.diagonal(), moments, self.eps)
        return ShrinkageSearch(class_means, self.class_counts, mean, within, agnostic, self.num_samples, live, self.eps)

    def _need_samples(self) -> None:
        if not self.num_samples:
            raise ValueError(f"fit: none of the {self.count} rows has a label" if self.count else "fit: no rows yet")

    def _estimates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Class means (K, d), mean (d,), pooled within-class and class-agnostic covariance (d, d)."""
        n = self.num_samples
        offset = self._sums.sum(axis=0) / n  # of the mean from the pilot
        agnostic = self._scatter / n - np.outer(offset, offset)
        class_offsets = self._sums / np.maximum(self._counts, 1)[:, None]
        spread = (class_offsets - offset) * np.sqrt(self._counts / n)[:, None]
        within = agnostic - spread.T @ spread if self.num_classes else agnostic
        class_means = np.where(self._counts[:, None] > 0, self.pilot + class_offsets, 0.0)[: self.num_classes]
        return class_means, self.pilot + offset, _symmetric(within), _symmetric(agnostic)


def _checked_pilot(pilot: Array, dim: int) -> np.ndarray:
    pilot = to_numpy(pilot)
    check_shape("pilot", pilot, (dim,))
    rounded = pilot.astype(np.float32).astype(np.float64)  # exact in every precision that may subtract it
    if not np.isfinite(rounded).all():
        raise ValueError("pilot: contains NaN, infinity, or values beyond float32")
    return rounded


def _pilot_mean(x: Array) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        mean = to_numpy(x.mean(axis=0, dtype=np.float64)).astype(np.float32).astype(np.float64)
    return np.where(np.isfinite(mean), mean, 0.0)  # infinite features are found with the sums


def _moments(
    x: Array, groups: Array | None, pilot: np.ndarray, rows: int, exact: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (rows,), sums (rows, d) and scatter (d, d) about `pilot`, on the host; the first `exact` rows in float64."""
    xp, dim = namespace(x), x.shape[1]
    counts, sums, scatter = np.zeros(rows, np.int64), xp.zeros((rows, dim)), xp.zeros((dim, dim))
    for start in range(0, len(x), CHUNK_ROWS):
        group = None if groups is None else groups[start : start + CHUNK_ROWS]
        part = x[start : start + CHUNK_ROWS]
        if group is not None and bool((group < 0).any()):
            part, group = part[group >= 0], group[group >= 0]
        precision = np.dtype(np.float64) if start < exact else precision_of(x)
        part = part.astype(precision, copy=False) - xp.asarray(pilot, precision)
        counts += [len(part)] if group is None else to_numpy(xp.bincount(group, minlength=rows))
        sums += part.sum(axis=0, dtype=np.float64) if group is None else _class_sums(part, group, rows)
        scatter += _square(part)
    sums, scatter = to_numpy(sums), to_numpy(scatter)
    if not np.isfinite(np.trace(scatter)):
        raise ValueError(f"features: contains NaN, infinity, or values whose square overflows (shape {tuple(x.shape)})")
    return counts, sums, scatter


def _square(part: Array) -> Array:
    """X^T X (d, d); in float64 where a feature's squares leave the range of float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite in float64 either is found with the sums
        product = part.T @ part
        if part.dtype == np.float32:
            squares = product.diagonal()
            tiny = squares < LEAST_SQUARES  # or a feature that is 0 throughout
            if not bool((squares < np.inf).all()) or (bool(tiny.any()) and bool((part[:, tiny] != 0).any())):
                part = part.astype(np.float64)
                product = part.T @ part
    return product


def _class_sums(x: Array, group: Array, rows: int) -> Array:
    """Sum of the rows of each group, as a product with a sparse one-hot matrix."""
    sparse = _sparse(namespace(x))
    ends = namespace(x).arange(len(x) + 1)
    one_hot = sparse.csr_matrix((namespace(x).ones(len(x), x.dtype), group, ends), shape=(len(x), rows))
    return one_hot.T @ x


def _sparse(xp: ModuleType) -> ModuleType:
    return scipy.sparse if xp is np else importlib.import_module("cupyx.scipy.sparse")


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2


def _singular(rank: int, d: int, n: int, shrinkage: str | float, num_classes: int) -> str:
    found = f"fit: the covariance isn't positive definite to working precision (rank {rank} of d = {d}, N = {n})"
    if shrinkage == "none" and rank:
        return f"{found}; use shrinkage 'auto', 'oas' or a number in (0, 1]"
    if rank:
        return f"{found} with shrinkage {shrinkage}; use more, or 'oas'"
    return f"{found}: features don't vary within classes; {num_classes} classes need several different samples each"
