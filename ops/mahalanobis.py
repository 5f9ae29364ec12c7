"""Gaussians that share a covariance, and the (relative) Mahalanobis distances to them.

Source: Cui et al. 2023, "Learning Sample Difficulty from Pre-trained Models for Reliable Prediction", eq. 5-7.
`ops.gaussian` fits them.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np
import scipy.linalg

from ops.arrays import Array, as_ndarray, like, namespace, to_numpy
from ops.checks import check_labels, check_shape
from ops.difficulty import Reference
from ops.shrinkage import PerCovariance

BLOCK_ROWS = 4_096
BLOCK_VALUES = 1 << 24  # values per temporary while scoring, 64 MiB in float32


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
        """K."""
        return len(self.counts)

    @property
    def dim(self) -> int:
        """d."""
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
        x = checked_features(features, self.dim)
        y = self._checked_labels(labels, x, unlabelled=False)
        p = self._projection(x)
        md, md_agn = _empty(x), _empty(x)
        for rows, z in self._blocks(x, p, 2 * self.dim):
            md[rows] = _squared_norm(z - p.centers[y[rows]])
            md_agn[rows] = _to_background(z, p)
        return Distances(*_finite(features, md, md_agn, md - md_agn))

    def agnostic_distances(self, features: Array) -> Array:
        """Squared Mahalanobis distance of each sample to the background alone (eq. 7 without its minus), shape (n,), >= 0.

        Parameters and errors as in `distances`; needs no labels.
        """
        x = checked_features(features, self.dim)
        p = self._projection(x)
        md_agn = _empty(x)
        for rows, z in self._blocks(x, p, self.dim):
            md_agn[rows] = _to_background(z, p)
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
        x = checked_features(features, self.dim)
        p = self._projection(x)
        md = namespace(x).empty((len(x), self.num_classes), precision_of(x))
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
        x = checked_features(features, self.dim)
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
    def _whitening(self) -> tuple[np.ndarray, np.ndarray]:
        """V (d, d) and 1/w (d,) of Σ_agn v = w Σ v, in float64."""
        within = self.covariance_agn if self.covariance is None else self.covariance
        w, v = scipy.linalg.eigh(self.covariance_agn, within)
        return v, 1 / w

    @functools.cached_property
    def _projections(self) -> dict:
        return {}

    def _projection(self, x: Array) -> "_Projection":
        """The whitening in the precision and place of `x`."""
        key = (namespace(x).__name__, precision_of(x), str(getattr(x, "device", "")))
        if key not in self._projections:
            v, inverse_w = self._whitening
            # rounded, so that subtracting it costs no digits however far the mean; what was rounded off goes to the centres
            origin = self.mean.astype(precision_of(x))
            absent = self.counts == 0
            centers = np.where(absent[:, None], 0.0, (self.class_means - origin) @ v)
            norms = np.where(absent, np.inf, _squared_norm(centers))
            arrays = (origin, v, inverse_w, (self.mean - origin) @ v, centers, norms)
            here = (namespace(x).asarray(a, precision_of(x)) for a in arrays)
            self._projections[key] = _Projection(*here)
        return self._projections[key]

    def _blocks(self, x: Array, p: "_Projection", values_per_row: int) -> Iterator[tuple[slice, Array]]:
        """Row slices and z = V^T (x - origin) of each, so long that temporaries stay within `BLOCK_VALUES`."""
        step = max(1, min(BLOCK_ROWS, BLOCK_VALUES // values_per_row))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            yield rows, (x[rows].astype(precision_of(x), copy=False) - p.origin) @ p.v

    def _need_classes(self) -> None:
        if not self.num_classes:
            raise ValueError("these Gaussians were fitted without labels: there is md_agn only (agnostic_distances)")

    def _checked_labels(self, labels: Array, x: Array, *, unlabelled: bool) -> Array:
        if not (unlabelled and not self.num_classes):
            self._need_classes()
        y = checked_labels(labels, x, self.num_classes, unlabelled=unlabelled)
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
    """The whitening from an origin close to the mean: V (d, d), 1/w (d,), what mean (d,) and class means (K, d) become."""

    origin: Array
    v: Array
    inverse_w: Array
    background: Array
    centers: Array
    norms: Array  # squared, of the centers; infinite for absent classes


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


def precision_of(x: Array) -> np.dtype:
    """What we calculate in for `x` of any shape: float32 for float16 and float32, else float64."""
    return np.dtype(np.float32) if x.dtype in (np.float16, np.float32) else np.dtype(np.float64)


def checked_features(features: Array, dim: int) -> Array:
    """`features` as an ndarray of shape (n, d), numpy or cupy; ValueError if they are of another shape or no real numbers."""
    x = as_ndarray(features)
    check_shape("features", x, ("n", dim))
    if x.dtype.kind not in "fiu":
        raise ValueError(f"features: expected real numbers, got dtype {x.dtype}")
    return x


def checked_labels(labels: Array, x: Array, num_classes: int, *, unlabelled: bool) -> Array:
    """`labels` (n,) as int64 in the library of `x`; ValueError outside [0, K), or [-1, K) with `unlabelled`."""
    y = as_ndarray(labels)
    check_labels("labels", y, len(x), num_classes, lowest=-1 if unlabelled else 0)
    y = y if namespace(y) is namespace(x) else to_numpy(y)
    return namespace(x).asarray(y, np.int64)


def _empty(x: Array) -> Array:
    return namespace(x).empty(len(x), precision_of(x))


def _squared_norm(z: Array) -> Array:
    return (z * z).sum(axis=-1)


def _finite(features: Array, *results: Array) -> list[Array]:
    """The results as the kind of `features`; NaN or infinity can only come from it, and one pass over (n,) is cheap."""
    if not all(bool(namespace(result).isfinite(result).all()) for result in results):
        raise ValueError(
            f"features: contains NaN, infinity, or values too large for their type (shape {tuple(features.shape)})"
        )
    return [like(result, features) for result in results]


def _to_background(z: Array, p: _Projection) -> Array:
    return (z - p.background) ** 2 @ p.inverse_w


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
    md_agn, labelled = _to_background(z, p), y >= 0
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
