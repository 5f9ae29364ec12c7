"""Class-conditional and class-agnostic Gaussians of features, and the (relative) Mahalanobis distances to them.

Source: Cui et al. 2023, "Learning Sample Difficulty from Pre-trained Models for Reliable Prediction", eq. 1-7.
`GaussianStats` collects sums in one pass and merges; its `fit` gives `Gaussians`, which score.
"""

import dataclasses
import functools
import importlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple, Self

import numpy as np
import scipy.linalg
import scipy.sparse

from ops.arrays import Array, as_ndarray, like, namespace, to_numpy
from ops.checks import check_choice, check_range, check_shape
from ops.difficulty import Reference

CHUNK_ROWS = 4_096  # rows per X^T X: full speed, and half the rounding error of 16,384 rows in float32
BLOCK_VALUES = 1 << 24  # values per temporary while scoring, 64 MiB in float32
EXACT_ROWS = 16_384  # float64 products for so many rows: over fewer, the rounding of float32 doesn't average out
PILOT_ROWS = 4_096


class Distances(NamedTuple):
    """Squared Mahalanobis distances of n samples, each of shape (n,): md, md_agn >= 0; rmd = md - md_agn, larger = harder."""

    md: Array
    md_agn: Array
    rmd: Array


class Scores(NamedTuple):
    """What `Gaussians.scores` gives for n samples, each of shape (n,)."""

    md: Array
    md_agn: Array
    rmd: Array
    nearest_class: Array
    nearest_md: Array
    margin: Array


class PerCovariance(NamedTuple):
    """One number for the pooled within-class covariance and one for the class-agnostic covariance."""

    within: float
    agnostic: float


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
    num_samples : int
        Rows that entered the sums: N of eq. 2 and 4.
    class_counts : ndarray of shape (K,), int64

    Notes
    -----
    One pass: per chunk of 4,096 rows, X^T X about the pilot in the precision of the input (float16 in float32; the
    first 16,384 rows that an object sees in float64), summed in float64. The within-class scatter is the total minus
    the between-class scatter of the means. In a run with labels, rows without one enter neither Gaussian: both speak
    of the same samples, or rmd would compare densities of different populations. Plain host arrays: pickles in
    8 (d² + K d) bytes.
    """

    def __init__(self, num_classes: int, dim: int, *, pilot: Array | None = None):
        if num_classes < 0 or dim < 1:
            raise ValueError(f"num_classes, dim: expected K >= 0 and d >= 1, got {num_classes} and {dim}")
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
        return int(self._counts.sum())

    @property
    def class_counts(self) -> np.ndarray:
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
        x = _as_features("features", features, self.dim)
        groups = self._groups(labels, x)
        pilot = self.pilot if self.pilot is not None else _pilot_mean(x[:PILOT_ROWS])
        counts, sums, scatter = _moments(x, groups, pilot, len(self._counts), max(0, EXACT_ROWS - self.count))
        self.pilot = pilot
        self.count += len(x)
        self.eps = max(self.eps, float(np.finfo(_precision(x)).eps))
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
        return _labels_beside(labels, x, self.num_classes, unlabelled=True)

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

    def fit(self, shrinkage: str | float = "none") -> "Gaussians":
        """The Gaussians of eq. 2 and 4, both covariances divided by N.

        Parameters
        ----------
        shrinkage : "none", "oas", "auto" or a number s in [0, 1]
            "none": the covariances as they are. s: (1 - s) Σ + s tr(Σ)/d I, both. "oas": s by the Oracle
            Approximating Shrinkage formula, for each of the two. "auto": none where both are positive definite
            with a margin of ten over working precision, else "oas".

        Raises
        ------
        ValueError
            No sample; or a covariance that isn't positive definite to working precision (after shrinkage): with
            rank, d, N and the way out.

        Notes
        -----
        OAS is that of scikit-learn (`sklearn.covariance.oas`): the class-agnostic covariance is equal to its. The
        same formula with n = N serves the pooled within-class covariance, for which it was not derived.
        Working precision: an eigenvalue counts if above sqrt(d) eps times the largest one of the class-agnostic
        covariance, eps of the coarsest precision that features came in (float32 for float16 and float32).
        """
        _check_shrinkage(shrinkage)
        if not self.num_samples:
            raise ValueError(f"fit: none of the {self.count} rows has a label" if self.count else "fit: no rows yet")
        class_means, mean, within, agnostic = self._estimates()
        spectra = [np.linalg.eigvalsh(covariance) for covariance in (within, agnostic)]
        floor = np.sqrt(self.dim) * self.eps * spectra[1][-1]
        rank = min(int((values > floor).sum()) for values in spectra)
        amounts = _amounts(shrinkage, within, agnostic, self.num_samples, min(v[0] for v in spectra) > 10 * floor)
        shrunk = [_shrink_spectrum(values, s) for values, s in zip(spectra, amounts)]
        if min(values[0] for values in shrunk) <= floor:
            raise ValueError(_singular(rank, self.dim, self.num_samples, shrinkage, len(self._counts)))
        return Gaussians(
            class_means=class_means,
            counts=self.class_counts,
            mean=mean,
            covariance=_shrink(within, amounts.within) if self.num_classes else None,
            covariance_agn=_shrink(agnostic, amounts.agnostic),
            rank=rank,
            condition=max(float(values[-1] / values[0]) for values in shrunk),
            shrinkage=amounts,
            num_samples=self.num_samples,
        )

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


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussians:
    """K class-conditional Gaussians with one covariance, and the class-agnostic Gaussian (eq. 1-4).

    Attributes
    ----------
    class_means : ndarray of shape (K, d), float64
        Zeros for a class without samples. K = 0 if fitted without labels.
    counts : ndarray of shape (K,), int64
        Samples of each class. A class with 0 is absent: infinitely far, never nearest.
    mean : ndarray of shape (d,), float64
    covariance : ndarray of shape (d, d), float64, or None without labels
        Pooled within-class covariance, divided by N, shrunk as `shrinkage` says.
    covariance_agn : ndarray of shape (d, d), float64
        Total covariance, divided by N, shrunk as `shrinkage` says.
    rank : int
        Of the within-class covariance before shrinkage (the class-agnostic one's is no smaller), in [0, d].
    condition : float
        Condition number, the larger of the two covariances', after shrinkage.
    shrinkage : PerCovariance
        Amounts used, in [0, 1]; 0 = none.
    num_samples : int
        N, the samples fitted on.
    class_names : tuple of str, optional
    reference : Reference, optional
        Mean, std, min, max of rmd over the samples fitted on, for `difficulty_weight` in another run.
    """

    class_means: np.ndarray
    counts: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray | None
    covariance_agn: np.ndarray
    rank: int
    condition: float
    shrinkage: PerCovariance
    num_samples: int
    class_names: tuple[str, ...] | None = None
    reference: Reference | None = None

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def dim(self) -> int:
        return len(self.mean)

    def distances(self, features: Array, labels: Array) -> Distances:
        """Squared Mahalanobis distances of each sample to its labelled class and to the background, and their difference.

        Parameters
        ----------
        features : array of shape (n, d), any float type, finite
        labels : integer array of shape (n,), in [0, K)

        Returns
        -------
        Distances of arrays of shape (n,), the kind of `features`; float32 for float16, else its type
            md >= 0, md_agn >= 0, rmd = md - md_agn: dimensionless, larger = harder, negative for most samples.

        Raises
        ------
        ValueError
            Wrong shapes, a label outside [0, K) or of a class without samples, NaN or infinity, no class at all.

        Notes
        -----
        Cui et al. 2023, eq. 5-7, whose printed minus signs contradict the text, its figure 1 and eq. 10: the
        distances here are positive and large rmd = hard. One product: with V and w of the generalised eigenproblem
        Σ_agn v = w Σ v (V^T Σ V = I) and z = V^T (x - μ), md = |z - V^T(μ_y - μ)|² and md_agn = Σ z²/w.
        """
        x = self._checked(features)
        y = self._checked_labels(labels, x, unlabelled=False)
        p = self._projection(x)
        md, md_agn = _empty(x), _empty(x)
        for rows, z in self._blocks(x, p, 2 * self.dim):
            md[rows] = _squared_norm(z - p.centers[y[rows]])
            md_agn[rows] = (z * z) @ p.inverse_w
        return Distances(*_finite(features, md, md_agn, md - md_agn))

    def agnostic_distances(self, features: Array) -> Array:
        """Squared Mahalanobis distance of each sample to the background alone (eq. 7 without its minus), shape (n,), >= 0.

        Parameters and errors as in `distances`; needs no labels.
        """
        x = self._checked(features)
        p = self._projection(x)
        md_agn = _empty(x)
        for rows, z in self._blocks(x, p, self.dim):
            md_agn[rows] = (z * z) @ p.inverse_w
        return _finite(features, md_agn)[0]

    def class_distances(self, features: Array) -> Array:
        """Squared Mahalanobis distance of each sample to every class.

        Parameters
        ----------
        features : array of shape (n, d), any float type, finite

        Returns
        -------
        md : array of shape (n, K), >= 0, the kind of `features`; float32 for float16, else its type
            Infinite in the columns of classes without samples. The minimum over classes is the OOD score.

        Raises
        ------
        ValueError
            Wrong shape, NaN or infinity, no class at all.

        Notes
        -----
        |z|² - 2 z c + |c|², one product for all classes: its rounding error is that of |z|², not of the result.
        """
        self._need_classes()
        x = self._checked(features)
        p = self._projection(x)
        md = namespace(x).empty((len(x), self.num_classes), _precision(x))
        total = 0.0
        for rows, z in self._blocks(x, p, self.dim + self.num_classes):
            md[rows] = _to_all_classes(z, p)
            total = total + z.sum()
        _finite(features, namespace(x).asarray(total))
        return like(md, features)

    def scores(self, features: Array, labels: Array | None = None) -> Scores:
        """Everything that the score stage writes, from one d x d product.

        Parameters
        ----------
        features : array of shape (n, d), any float type, finite
        labels : integer array of shape (n,), in [-1, K), optional
            -1 = no label. None = all without.

        Returns
        -------
        Scores of arrays of shape (n,), the kind of `features`; floats in float32 for float16, else in its type
            md, md_agn, rmd : as `distances` gives them. Without a label md is NaN and rmd refers to the nearest class.
            nearest_class : int64, argmin over classes of md, the first one of equals.
            nearest_md : md to that class.
            margin : md(label) - min over the other classes of md. Positive = the sample sits nearer another class.
            NaN without a label or without another class.
            Fitted without labels: all but md_agn are NaN, nearest_class is -1.

        Raises
        ------
        ValueError
            Wrong shapes, a label outside [-1, K) or of a class without samples, NaN or infinity.
        """
        x = self._checked(features)
        y = namespace(x).full(len(x), -1) if labels is None else self._checked_labels(labels, x, unlabelled=True)
        p = self._projection(x)
        parts = [_score_block(z, y[rows], p) for rows, z in self._blocks(x, p, 2 * (self.dim + self.num_classes))]
        columns = [namespace(x).concatenate(column) for column in zip(*parts)]
        _finite(features, columns[1])
        return Scores(*(like(column, features) for column in columns))

    def save(self, path: str | Path | IO[bytes]) -> None:
        """Write to `path`, taken literally, or to a binary file object: npz without pickles, the same bytes each time."""
        arrays = {name: getattr(self, name) for name in _STORED if getattr(self, name) is not None}
        arrays |= {"class_names": np.array(self.class_names, dtype=str)} if self.class_names is not None else {}
        if isinstance(path, str | Path):
            with open(path, "wb") as stream:
                np.savez(stream, **arrays)
        else:
            np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | Path | IO[bytes]) -> Self:
        """Read what `save` wrote; nothing is unpickled.

        Raises
        ------
        ValueError
            If it isn't such a file, or its arrays don't fit each other.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            return cls(**_fields(arrays))
        except (KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{getattr(path, 'name', path)}: no Gaussians in it ({error!r})") from error

    def __post_init__(self) -> None:
        k, d = self.num_classes, self.dim
        expected = {"class_means": (k, d), "covariance_agn": (d, d)} | ({"covariance": (d, d)} if k else {})
        for name, shape in expected.items():
            found = np.shape(getattr(self, name))
            if found != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {found}")
        if self.class_names is not None and len(self.class_names) != k:
            raise ValueError(f"class_names: expected {k} names, got {len(self.class_names)}")

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_projections"}

    @functools.cached_property
    def _whitening(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """V (d, d), 1/w (d,) of Σ_agn v = w Σ v, and the class means seen through them (K, d), in float64."""
        within = self.covariance_agn if self.covariance is None else self.covariance
        w, v = scipy.linalg.eigh(self.covariance_agn, within)
        return v, 1 / w, (self.class_means - self.mean) @ v

    @functools.cached_property
    def _projections(self) -> dict:
        return {}

    def _projection(self, x: Array) -> "_Projection":
        """The whitening in the precision and place of `x`."""
        key = (namespace(x).__name__, _precision(x), str(getattr(x, "device", "")))
        if key not in self._projections:
            v, inverse_w, centers = self._whitening
            absent = self.counts == 0
            centers = np.where(absent[:, None], 0.0, centers)
            norms = np.where(absent, np.inf, _squared_norm(centers))
            here = (namespace(x).asarray(a, _precision(x)) for a in (self.mean, v, inverse_w, centers, norms))
            self._projections[key] = _Projection(*here)
        return self._projections[key]

    def _blocks(self, x: Array, p: "_Projection", values_per_row: int) -> Iterator[tuple[slice, Array]]:
        """Row slices and z = V^T (x - μ) of each, so long that temporaries stay within `BLOCK_VALUES`."""
        step = max(1, min(CHUNK_ROWS, BLOCK_VALUES // values_per_row))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            yield rows, (x[rows].astype(_precision(x), copy=False) - p.mean) @ p.v

    def _checked(self, features: Array) -> Array:
        return _as_features("features", features, self.dim)

    def _need_classes(self) -> None:
        if not self.num_classes:
            raise ValueError("these Gaussians were fitted without labels: there is md_agn only (agnostic_distances)")

    def _checked_labels(self, labels: Array, x: Array, *, unlabelled: bool) -> Array:
        if not (unlabelled and not self.num_classes):
            self._need_classes()
        y = _labels_beside(labels, x, self.num_classes, unlabelled=unlabelled)
        if self.num_classes:
            present = np.append(self.counts > 0, True)  # the last one is label -1
            seen = to_numpy(y)
            strangers = np.unique(seen[~present[seen]])
            if len(strangers):
                raise ValueError(f"labels: class {self._name(strangers[0])} has no sample in these Gaussians")
        return y

    def _name(self, label: int) -> str:
        return f"{label}" if self.class_names is None else f"{self.class_names[label]!r} (label {label})"


class _Projection(NamedTuple):
    mean: Array
    v: Array
    inverse_w: Array
    centers: Array
    norms: Array


_STORED = [
    "class_means",
    "counts",
    "mean",
    "covariance",
    "covariance_agn",
    "rank",
    "condition",
    "shrinkage",
    "num_samples",
    "reference",
]


def _fields(arrays: dict[str, np.ndarray]) -> dict:
    """The stored arrays as the arguments of `Gaussians`."""
    fields = {name: arrays[name] for name in ("class_means", "counts", "mean", "covariance_agn")}
    fields["covariance"] = arrays.get("covariance")
    fields["rank"], fields["num_samples"] = int(arrays["rank"]), int(arrays["num_samples"])
    fields["condition"] = float(arrays["condition"])
    fields["shrinkage"] = PerCovariance(*arrays["shrinkage"].tolist())
    if "reference" in arrays:
        fields["reference"] = Reference(*arrays["reference"].tolist())
    if "class_names" in arrays:
        fields["class_names"] = tuple(arrays["class_names"].tolist())
    return fields


def _precision(x: Array) -> np.dtype:
    """What we calculate in: float32 for float16 and float32, else float64."""
    return np.dtype(np.float32) if x.dtype in (np.float16, np.float32) else np.dtype(np.float64)


def _as_features(name: str, features: Array, dim: int) -> Array:
    x = as_ndarray(features)
    check_shape(name, x, ("n", dim))
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected real numbers, got dtype {x.dtype}")
    return x


def _labels_beside(labels: Array, x: Array, num_classes: int, *, unlabelled: bool) -> Array:
    """Checked int64 labels in the library of `x`."""
    y = as_ndarray(labels)
    lowest = -1 if unlabelled else 0
    check_shape("labels", y, (len(x),))
    if y.dtype.kind not in "iu":
        raise ValueError(f"labels: expected integers, got dtype {y.dtype}")
    low, high = int(y.min()), int(y.max())
    if low < lowest or high >= num_classes:
        raise ValueError(f"labels: values must lie in [{lowest}, {num_classes}), found {low if low < lowest else high}")
    y = y if namespace(y) is namespace(x) else to_numpy(y)
    return namespace(x).asarray(y, np.int64)


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
        precision = np.dtype(np.float64) if start < exact else _precision(x)
        part = part.astype(precision, copy=False) - xp.asarray(pilot, precision)
        counts += [len(part)] if group is None else to_numpy(xp.bincount(group, minlength=rows))
        sums += part.sum(axis=0, dtype=np.float64) if group is None else _class_sums(part, group, rows)
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            scatter += part.T @ part
    sums, scatter = to_numpy(sums), to_numpy(scatter)
    if not np.isfinite(np.trace(scatter)):
        raise ValueError(f"features: contains NaN, infinity, or values whose square overflows (shape {tuple(x.shape)})")
    return counts, sums, scatter


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


def _check_shrinkage(shrinkage: str | float) -> None:
    if isinstance(shrinkage, str):
        check_choice("shrinkage", shrinkage, ("none", "oas", "auto"))
    else:
        check_range("shrinkage", shrinkage, 0.0, 1.0)


def _amounts(shrinkage: str | float, within: np.ndarray, agnostic: np.ndarray, n: int, well: bool) -> PerCovariance:
    """How much to shrink each covariance; `well` = conditioned well enough for "auto" to leave them."""
    if not isinstance(shrinkage, str):
        return PerCovariance(float(shrinkage), float(shrinkage))
    if shrinkage == "none" or (shrinkage == "auto" and well):
        return PerCovariance(0.0, 0.0)
    return PerCovariance(_oas_amount(within, n), _oas_amount(agnostic, n))


def _oas_amount(covariance: np.ndarray, n: int) -> float:
    """Chen et al. 2010, eq. 23, without its 2/d as in scikit-learn, which offers it for raw samples only."""
    d = len(covariance)
    square, mean = np.mean(covariance**2), np.trace(covariance) / d
    denominator = (n + 1) * (square - mean**2 / d)
    return 1.0 if denominator <= 0 else float(min((square + mean**2) / denominator, 1.0))


def _shrink(covariance: np.ndarray, amount: float) -> np.ndarray:
    d = len(covariance)
    return (1 - amount) * covariance + amount * np.trace(covariance) / d * np.eye(d)


def _shrink_spectrum(eigenvalues: np.ndarray, amount: float) -> np.ndarray:
    return (1 - amount) * eigenvalues + amount * eigenvalues.mean()


def _singular(rank: int, d: int, n: int, shrinkage: str | float, num_classes: int) -> str:
    found = f"fit: the covariance isn't positive definite to working precision (rank {rank} of d = {d}, N = {n})"
    if shrinkage == "none" and rank:
        return f"{found}; use shrinkage 'auto', 'oas' or a number in (0, 1]"
    if rank:
        return f"{found} with shrinkage {shrinkage}; use more, or 'oas'"
    return f"{found}: features don't vary within classes; {num_classes} classes need several different samples each"


def _empty(x: Array) -> Array:
    return namespace(x).empty(len(x), _precision(x))


def _squared_norm(z: Array) -> Array:
    return (z * z).sum(axis=-1)


def _finite(features: Array, *results: Array) -> list[Array]:
    """The results as the kind of `features`; NaN or infinity can only come from it, and one pass over (n,) is cheap."""
    if not all(bool(namespace(result).isfinite(result).all()) for result in results):
        raise ValueError(
            f"features: contains NaN, infinity, or values too large for their type (shape {tuple(features.shape)})"
        )
    return [like(result, features) for result in results]


def _to_all_classes(z: Array, p: _Projection) -> Array:
    md = z @ p.centers.T
    md *= -2
    md += p.norms
    md += _squared_norm(z)[:, None]
    return md.clip(min=0)


def _score_block(z: Array, y: Array, p: _Projection) -> tuple[Array, ...]:
    """The columns of `Scores` for one block.

    The product over all classes only finds who is nearest; distances are then taken from differences, exactly.
    """
    xp, rows, nan = namespace(z), namespace(z).arange(len(z)), z.dtype.type(np.nan)
    md_agn, labelled = (z * z) @ p.inverse_w, y >= 0
    if not len(p.centers):
        none = xp.full_like(md_agn, nan)
        return none, md_agn, none, y, none, none
    to_classes = _to_all_classes(z, p)
    to_classes[rows[labelled], y[labelled]] = np.inf
    other = to_classes.argmin(axis=1)
    alone = labelled & xp.isinf(to_classes[rows, other])
    other_md = xp.where(alone, xp.inf, _squared_norm(z - p.centers[other])).astype(z.dtype)
    own_md = xp.where(labelled, _squared_norm(z - p.centers[y]), nan).astype(z.dtype)
    own_nearest = labelled & ((own_md < other_md) | ((own_md == other_md) & (y < other)))
    nearest = xp.where(own_nearest, y, other)
    nearest_md = xp.where(own_nearest, own_md, other_md)
    margin = xp.where(alone, nan, own_md - other_md)
    rmd = xp.where(labelled, own_md, nearest_md) - md_agn
    return own_md, md_agn, rmd, nearest, nearest_md, margin
