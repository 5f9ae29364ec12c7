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
from ops.leave_one_out import (
    Removal,
    class_distances,
    gain,
    gram_of,
    own_distance,
    removal,
    removal_tolerance,
    squared_between,
)
from ops.shrinkage import PerCovariance

BLOCK_ROWS = 1_024  # whose temporaries stay in the second-level cache
BLOCK_VALUES = 1 << 24  # values per temporary while scoring, 64 MiB in float32


class Distances(NamedTuple):
    """Squared Mahalanobis distances of n samples, each of shape (n,): md, md_agn >= 0; rmd = md - md_agn, larger = harder."""

    md: Array
    md_agn: Array
    rmd: Array


class Scores(NamedTuple):
    """What `Gaussians.scores` gives for n samples, each of shape (n,): see there."""

    md: Array
    md_agn: Array
    rmd: Array
    nearest_class: Array
    nearest_md: Array
    margin: Array
    md_loo: Array
    rmd_loo: Array


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
        Pooled within-class covariance, divided by N, shrunk as `shrinkage` says. A feature whose variance here is 0 has
        no weight in any distance.
    covariance_agn : ndarray of shape (d, d), float64
        Total covariance, divided by N, shrunk as `shrinkage` says.
    rank : int
        Of the within-class covariance before shrinkage (the class-agnostic one's is no smaller), in [0, d].
    condition : float
        Condition number, the larger of the two covariances', after shrinkage. With the target "diagonal", rank and
        condition are those of the correlation matrices of the features that have weight.
    shrinkage : PerCovariance
        Amounts used, in [0, 1]; 0 = none.
    num_samples : int
        N, the samples fitted on.
    class_names : tuple of str, optional
    reference : Reference, optional
        Mean, std, min, max of rmd over the samples fitted on, for `difficulty_weight` in another run.
    target : "identity" or "diagonal"
        What was shrunk towards: tr(Σ)/d I, or diag(Σ).
    curve : ndarray of shape (3, S), float64, optional
        What `fit("auto", rows)` chose from: amounts; mean leave-one-out log-loss of the class posterior in nats; mean
        leave-one-out negative log-likelihood of the class-agnostic Gaussian in nats, but for a constant.
    source : str, optional
        What the caller says that these were made from.
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
    target: str = "identity"
    curve: np.ndarray | None = None
    source: str | None = None

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

    def scores(
        self,
        features: Array,
        labels: Array | None = None,
        *,
        fitted: Array | bool = False,
        views: Array | None = None,
    ) -> Scores:
        """Everything that the score stage writes, from one d x d product and one with the class means.

        Parameters
        ----------
        features : array of shape (n, d), any float type, finite
        labels : integer array of shape (n,), in [-1, K), optional
            -1 = no label. None = all without.
        fitted : bool, or bool array of shape (n,)
            Which samples these Gaussians were fitted on, with these labels: each is left out of the Gaussians that
            judge it. Rows without a label never were.
        views : array of shape (n, R - 1, d), optional
            The other views of each sample, where the Gaussians were fitted on R views: all are left out together.

        Returns
        -------
        Scores of arrays of shape (n,), the kind of `features`; floats in float32 for float16, else in its type
            md, md_agn, rmd : as `distances` gives them. Without a label md is NaN and rmd refers to the nearest class.
            md_loo, rmd_loo : the same with the sample left out of both Gaussians; where it wasn't fitted on, equal to
            md and rmd. NaN where nobody else vouches for the class: it has no other sample, or the covariance is
            singular without this one.
            nearest_class : int64, argmin over classes of md with the sample left out, the first one of equals.
            nearest_md : that md, >= 0.
            margin : md_loo - min over the other classes of their md with the sample left out. Positive = the sample
            sits nearer another class, a candidate for a wrong label. NaN where md_loo is, or without another class.
            Fitted on one class only: rmd = rmd_loo = 0, as both Gaussians are one.
            Fitted without labels: all but md_agn are NaN, nearest_class is -1.

        Raises
        ------
        ValueError
            Wrong shapes, a label outside [-1, K) or of a class without samples, NaN or infinity.

        Notes
        -----
        Exactly what a fit without the sample gives, with the divisor N, the amount s of shrinkage and its target kept (see
        `ops.leave_one_out`): at s = 0, N / (N - 1) times the refit's. No refit: O(d² + K d) per sample.
        """
        x = checked_features(features, self.dim)
        xp = namespace(x)
        y = xp.full(len(x), -1) if labels is None else self._checked_labels(labels, x, unlabelled=True)
        left_out = xp.broadcast_to(xp.asarray(as_ndarray(fitted), bool), (len(x),)) & (y >= 0)
        others = None if views is None else _checked_views(views, x)
        p, parts = self._projection(x), []
        count = 1 if others is None else 1 + others.shape[1]
        for rows, z in self._blocks(x, p, 2 * count * (self.dim + self.num_classes)):
            more = None if others is None else _projected(others[rows], p)
            parts.append(_score_block(z, more, y[rows], left_out[rows], p))
        columns = [xp.concatenate(column) for column in zip(*parts)]
        _finite(features, columns[1])
        return Scores(*(like(column, features) for column in columns))

    def save(self, path: str | Path | IO[bytes]) -> None:
        """Write to `path`, taken literally, or to a binary file object: npz without pickles, the same bytes each time."""
        arrays = {name: getattr(self, name) for name in _STORED if getattr(self, name) is not None}
        for name in ("class_names", "source"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(getattr(self, name), dtype=str)
        if self.target != "identity":  # which is what files without this entry mean
            arrays["target"] = np.array(self.target)
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
        """V (d, r) and 1/w (r,) of Σ_agn v = w Σ v over the r features that have weight, in float64."""
        within = self.covariance_agn if self.covariance is None else self.covariance
        variances = within.diagonal()
        live = variances > 0
        # Powers of two change no digit, and keep features of 1e-20 and of 1e15 in the same matrix apart from underflow.
        scale = np.exp2(-np.rint(np.log2(variances[live]) / 2))
        agnostic, within = (m[np.ix_(live, live)] * scale[:, None] * scale for m in (self.covariance_agn, within))
        w, directions = scipy.linalg.eigh(agnostic, within)
        v = np.zeros((self.dim, len(w)), order="F")
        v[live] = scale[:, None] * directions
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
            centers = np.vstack([centers, np.zeros(len(inverse_w))])  # of the label -1
            arrays = (origin, v, inverse_w, (self.mean - origin) @ v, centers, norms)
            here = (namespace(x).asarray(a, precision_of(x)) for a in arrays)
            amounts = PerCovariance(*((1 - s) / self.num_samples for s in self.shrinkage))
            tolerance = removal_tolerance(self.dim, self.condition, precision_of(x))
            single = int((~absent).sum()) == 1
            counts = namespace(x).asarray(np.append(self.counts, 0))
            self._projections[key] = _Projection(*here, counts, self.num_samples, amounts, tolerance, single)
        return self._projections[key]

    def _blocks(self, x: Array, p: "_Projection", values_per_row: int) -> Iterator[tuple[slice, Array]]:
        """Row slices and z = V^T (x - origin) of each, so long that temporaries stay within `BLOCK_VALUES`."""
        step = max(1, min(BLOCK_ROWS, BLOCK_VALUES // values_per_row))
        for start in range(0, len(x), step):
            rows = slice(start, min(start + step, len(x)))
            yield rows, _projected(x[rows], p)

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
    """The whitening from an origin close to the mean, in one precision and place, and what leaving a sample out needs."""

    origin: Array  # (d,)
    v: Array  # (d, r)
    inverse_w: Array  # (r,)
    background: Array  # (r,), of the mean
    centers: Array  # (K + 1, r), of the class means; the last one, of the label -1, is the origin
    norms: Array  # (K,), squared, of the centers; infinite for absent classes
    counts: Array  # (K + 1,)
    num_samples: int
    amounts: PerCovariance  # (1 - s) / N of the two covariances
    tolerance: float
    single: bool  # one class alone has samples


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
    "curve",
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
    fields |= {name: str(arrays[name]) for name in ("target", "source") if name in arrays}
    fields["curve"] = arrays.get("curve")
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


def _checked_views(views: Array, x: Array) -> Array:
    """(n, R - 1, d) in the library of `x`."""
    others = as_ndarray(views)
    check_shape("views", others, (len(x), "R - 1", x.shape[1]))
    if others.dtype.kind not in "fiu":
        raise ValueError(f"views: expected real numbers, got dtype {others.dtype}")
    return namespace(x).asarray(others if namespace(others) is namespace(x) else to_numpy(others))


def _projected(x: Array, p: _Projection) -> Array:
    """z = V^T (x - origin) of rows (..., d)."""
    return (x.astype(p.v.dtype, copy=False) - p.origin) @ p.v


def _to_background(z: Array, p: _Projection) -> Array:
    return (z - p.background) ** 2 @ p.inverse_w


def _to_all_classes(z: Array, p: _Projection) -> Array:
    md = z @ p.centers[:-1].T
    md *= -2
    md += p.norms
    md += _squared_norm(z)[:, None]
    return md.clip(min=0)


def _score_block(z: Array, views: Array | None, y: Array, fitted: Array, p: _Projection) -> tuple[Array, ...]:
    """The columns of `Scores` for one block of projected rows (b, r), their other views (b, R - 1, r) and labels (b,).

    The product over all classes only finds who is nearest; distances are then taken from differences, exactly.
    """
    xp, nan, labelled = namespace(z), z.dtype.type(np.nan), y >= 0
    md_agn = _to_background(z, p)
    if not len(p.norms):
        none = xp.full_like(md_agn, nan)
        return none, md_agn, none, y, none, none, none, none
    points = z[:, None] if views is None else xp.concatenate([z[:, None], views], axis=1)
    deviations = points - p.centers[y][:, None]
    gram = gram_of(deviations)
    out = removal(gram, p.counts[y], p.amounts.within, fitted, p.tolerance)
    md = gram[:, 0, 0]
    md_loo = own_distance(gram, out) if bool(fitted.any()) else md
    other, other_md = _nearest_other(z, y, deviations, gram, out, p)
    comparable = labelled & out.defined
    own_nearest = comparable & ((md_loo < other_md) | ((md_loo == other_md) & (y < other)))
    nearest = xp.where(own_nearest, y, other)
    nearest_md = xp.where(own_nearest, md_loo, other_md)
    margin = xp.where(comparable & xp.isfinite(other_md), md_loo - other_md, nan)
    md_agn_loo = _background_left_out(points, md_agn, fitted, p)
    rmd = xp.where(labelled, md, nearest_md) - md_agn
    rmd_loo = xp.where(labelled, md_loo, nearest_md) - md_agn_loo
    if p.single:
        nearest, rmd, rmd_loo = xp.where(labelled, y, other), rmd * 0, rmd_loo * 0
        nearest_md = xp.where(labelled, md_loo, other_md)
    without = xp.where(labelled, md, nan)
    return without, md_agn, rmd, nearest, nearest_md, margin, xp.where(labelled, md_loo, nan), rmd_loo


def _nearest_other(
    z: Array, y: Array, deviations: Array, gram: Array, out: Removal, p: _Projection
) -> tuple[Array, Array]:
    """The nearest class but one's own (b,), and the squared distance to it, the sample left out; infinite without one."""
    xp, rows = namespace(z), namespace(z).arange(len(z))
    centers = p.centers[:-1]
    to_classes = class_distances(deviations, gram, y, centers, squared_between(y, centers, p.norms), out)
    to_classes[rows[y >= 0], y[y >= 0]] = np.inf
    other = to_classes.argmin(axis=1)
    alone = xp.isinf(to_classes[rows, other])
    offset = z - centers[other]
    products = xp.einsum("brd,bd->br", deviations, offset)[:, :, None]
    distance = xp.einsum("bd,bd->b", offset, offset) + gain(products, out)[:, 0]
    return other, xp.where(alone, xp.inf, distance).astype(z.dtype)


def _background_left_out(points: Array, md_agn: Array, fitted: Array, p: _Projection) -> Array:
    """Squared distance (b,) of the first view to the class-agnostic Gaussian without the sample."""
    xp = namespace(points)
    if not bool(fitted.any()):
        return md_agn
    if points.shape[1] == 1:
        gram = md_agn[:, None, None]
    else:
        deviations = (points - p.background) * xp.sqrt(p.inverse_w)
        gram = gram_of(deviations)
    out = removal(gram, xp.full(len(points), p.num_samples), p.amounts.agnostic, fitted, p.tolerance)
    return xp.where(fitted, own_distance(gram, out), md_agn)
