"""The amount of shrinkage that predicts best what was left out: every amount of a grid from one eigenbasis.

For the pooled within-class covariance: the smallest leave-one-out log-loss of the class posterior. For the class-agnostic
covariance: the largest leave-one-out Gaussian log-likelihood. `ops.leave_one_out` takes samples out; nothing is fitted again.
"""

import dataclasses
from typing import Self

import numpy as np

from ops.arrays import Array, as_ndarray, namespace
from ops.checks import check_shape
from ops.leave_one_out import class_distances, gram_of, own_distance, removal, removal_tolerance, squared_between
from ops.mahalanobis import BLOCK_ROWS, BLOCK_VALUES, Gaussians, checked_labels, precision_of
from ops.shrinkage import Correlations, PerCovariance, shrink_to_diagonal

GRID = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95)


@dataclasses.dataclass(frozen=True, eq=False)
class ShrinkageCurve:
    """Sums over left-out rows for each amount of `GRID`, in nats; two parts of a corpus add up.

    Attributes
    ----------
    within : ndarray of shape (S,), float64
        Log-loss of the class posterior. Smaller = better; infinite where an amount leaves a covariance singular.
    agnostic : ndarray of shape (S,), float64
        Negative Gaussian log-likelihood, but for a constant. Smaller = better.
    rows_within, rows_agnostic : int
        Rows that each sum is over: a sample that is alone in its class counts for the second one only.
    """

    within: np.ndarray
    agnostic: np.ndarray
    rows_within: int
    rows_agnostic: int

    @classmethod
    def empty(cls) -> Self:
        """The curve of no rows."""
        return cls(np.zeros(len(GRID)), np.zeros(len(GRID)), 0, 0)

    def __add__(self, other: "ShrinkageCurve") -> "ShrinkageCurve":
        return ShrinkageCurve(
            self.within + other.within,
            self.agnostic + other.agnostic,
            self.rows_within + other.rows_within,
            self.rows_agnostic + other.rows_agnostic,
        )


class ShrinkageSearch:
    """The estimates of a fit, ready to be tried with every amount of shrinkage towards their diagonals.

    Parameters
    ----------
    class_means : ndarray of shape (K, d)
    counts : ndarray of shape (K,)
    mean : ndarray of shape (d,)
    within, agnostic : ndarray of shape (d, d)
        Covariances, divided by N.
    num_samples : int
        N.
    live : bool ndarray of shape (d,)
        Features that vary within classes; the others get no weight.
    eps : float
        Of the coarsest precision that features came in.

    Raises
    ------
    ValueError
        If no feature varies within classes.

    Notes
    -----
    Two eigenproblems of width d, once. A measured row costs two (1, d)(d, d) products and S (1, d)(d, K) ones.
    """

    def __init__(
        self,
        class_means: np.ndarray,
        counts: np.ndarray,
        mean: np.ndarray,
        within: np.ndarray,
        agnostic: np.ndarray,
        num_samples: int,
        live: np.ndarray,
        eps: float,
    ):
        if not live.any():
            raise ValueError(
                f"fit: features don't vary within classes (rank 0 of d = {len(mean)}, N = {num_samples}, "
                f"{int((counts > 0).sum())} classes); some classes need several different samples"
            )
        self.class_means, self.counts, self.mean = class_means, counts, mean
        self.within, self.agnostic, self.num_samples, self.live, self.eps = within, agnostic, num_samples, live, eps
        # One class alone: the two covariances are one, and there is no posterior to judge by.
        self.several = int((counts > 0).sum()) > 1
        self._agnostic = Correlations.of(agnostic, live, num_samples)
        self._within = Correlations.of(within, live, num_samples) if self.several else self._agnostic

    def measure(self, features: Array, labels: Array | None = None) -> ShrinkageCurve:
        """How well each amount of shrinkage predicts rows that the estimates were made of, each left out of them.

        Parameters
        ----------
        features : array of shape (n, d) or (n, R, d), any float type
            Rows that were fitted on; of R views of a sample all are left out, and the first is predicted.
        labels : integer array of shape (n,), or None if there are no classes
            In [-1, K); rows of -1 were not fitted on and are skipped.
        """
        x = as_ndarray(features)
        x = x[:, None] if x.ndim == 2 else x
        check_shape("features", x, ("n", "R", len(self.mean)))
        if len(self.counts):
            y = checked_labels(labels, x, len(self.counts), unlabelled=True)
            x, y = x[y >= 0], y[y >= 0]
        else:
            y = namespace(x).zeros(len(x), np.int64)
        curve = ShrinkageCurve.empty()
        step = max(1, min(BLOCK_ROWS, BLOCK_VALUES // (3 * x.shape[1] * (len(self.mean) + len(self.counts)))))
        for start in range(0, len(x), step):
            curve += self._measure_block(x[start : start + step], y[start : start + step])
        return curve

    def _measure_block(self, x: Array, y: Array) -> ShrinkageCurve:
        precision = precision_of(x)
        origin = self.mean.astype(precision)  # subtracting it costs no digits, however far the mean
        centred = x.astype(precision, copy=False) - namespace(x).asarray(origin)
        centred -= namespace(x).asarray(self.mean - origin, precision)
        agnostic, rows = self._likelihoods(centred), len(x)
        if not self.several:
            return ShrinkageCurve(agnostic, agnostic, rows, rows)
        within, used = self._log_losses(centred, y)
        return ShrinkageCurve(within, agnostic, used, rows)

    def _likelihoods(self, centred: Array) -> np.ndarray:
        """Summed negative log-likelihood (S,) of the first views, but for d/2 ln 2π and the features' units."""
        xp, (rows, views, _) = namespace(centred), centred.shape
        z = centred @ xp.asarray(self._agnostic.directions, centred.dtype)
        usable = [at for at, amount in enumerate(GRID) if self._agnostic.regular(amount, self.eps)]
        shrunk = np.stack([self._agnostic.shrunk(GRID[at]) for at in usable])
        inverse = xp.asarray(1 / shrunk, centred.dtype)
        counts, fitted = xp.full(rows, self.num_samples), xp.ones(rows, bool)
        grams = [[(z[:, i] * z[:, j]) @ inverse.T for j in range(views)] for i in range(views)]
        grams = xp.stack([xp.stack(row) for row in grams]).transpose(3, 2, 0, 1)  # (S, rows, views, views)
        losses = np.full(len(GRID), np.inf)
        for at, values, gram in zip(usable, shrunk, grams):
            out = removal(gram, counts, (1 - GRID[at]) / self.num_samples, fitted, _tolerance(values, gram))
            distance = own_distance(gram, out) + out.log_det
            total = float(xp.where(out.defined, distance, np.inf).sum(dtype=np.float64))
            losses[at] = (total + rows * np.log(values).sum()) / 2
        return losses

    def _log_losses(self, centred: Array, y: Array) -> tuple[np.ndarray, int]:
        """Summed log-loss (S,) of the first views' classes, and the rows that count: those not alone in their class."""
        xp, (_, views, _) = namespace(centred), centred.shape
        counts = xp.asarray(self.counts)
        together = counts[y] > views
        centred, y = centred[together], y[together]
        losses = np.full(len(GRID), np.inf)
        if not len(y):
            return np.zeros(len(GRID)), 0
        present = self.counts > 0
        with np.errstate(divide="ignore"):
            log_prior = xp.asarray(np.log(self.counts / self.num_samples), centred.dtype)
        directions = self._within.directions
        z = centred @ xp.asarray(directions, centred.dtype)
        means = np.where(present[:, None], (self.class_means - self.mean) @ directions, 0.0)
        for at, amount in enumerate(GRID):
            if not self._within.regular(amount, self.eps):
                continue
            shrunk = self._within.shrunk(amount)
            root = 1 / np.sqrt(shrunk)
            centers = xp.asarray(means * root, centred.dtype)
            norms = xp.where(xp.asarray(present), (centers * centers).sum(axis=1), np.inf)
            deviations = z * xp.asarray(root, centred.dtype) - centers[y][:, None]
            gram = gram_of(deviations)
            fitted = xp.ones(len(y), bool)
            out = removal(gram, counts[y], (1 - amount) / self.num_samples, fitted, _tolerance(shrunk, gram))
            logits = class_distances(deviations, gram, y, centers, squared_between(y, centers, norms), out)
            logits[xp.arange(len(y)), y] = own_distance(gram, out)
            logits *= -0.5
            logits += log_prior
            losses[at] = float(xp.where(out.defined, _log_loss(logits, y), np.inf).sum(dtype=np.float64))
        return losses, len(y)

    def fit(self, curve: ShrinkageCurve | None = None) -> Gaussians:
        """The Gaussians with the best amounts of a curve over all measured rows; without, or where it tells nothing, by OAS."""
        amounts = PerCovariance(
            self._amount(
                self._within, None if curve is None else curve.within, 0 if curve is None else curve.rows_within
            ),
            self._amount(self._agnostic, None if curve is None else curve.agnostic, 1),
        )
        if not self.several:
            amounts = PerCovariance(amounts.agnostic, amounts.agnostic)
        spectra = [basis.shrunk(s) for basis, s in zip((self._within, self._agnostic), amounts)]
        rank = min(_rank(basis.values, self.eps) for basis in (self._within, self._agnostic))
        shrunk = [
            shrink_to_diagonal(covariance, s, self.live) for covariance, s in zip((self.within, self.agnostic), amounts)
        ]
        return Gaussians(
            class_means=self.class_means,
            counts=self.counts,
            mean=self.mean,
            covariance=(shrunk[0] if self.several else shrunk[1]) if len(self.counts) else None,
            covariance_agn=shrunk[1],
            rank=rank,
            condition=max(float(values[-1] / values[0]) for values in spectra),
            shrinkage=amounts,
            num_samples=self.num_samples,
            target="diagonal",
            curve=None if curve is None else _means(curve),
        )

    def _amount(self, basis: Correlations, losses: np.ndarray | None, rows: int) -> float:
        if losses is not None and rows and np.isfinite(losses).any():
            return GRID[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]
        return next((s for s in (basis.oas, *GRID) if s >= basis.oas and basis.regular(s, self.eps)), GRID[-1])


def _tolerance(shrunk: np.ndarray, gram: Array) -> float:
    """What counts as 0 of 1 - g q: the rounding of q in a space of these eigenvalues."""
    return removal_tolerance(len(shrunk), shrunk[-1] / shrunk[0], gram.dtype)


def _log_loss(logits: Array, y: Array) -> Array:
    xp, rows = namespace(logits), namespace(logits).arange(len(y))
    top = logits.max(axis=1, keepdims=True)
    return xp.log(xp.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[rows, y]


def _rank(values: np.ndarray, eps: float) -> int:
    return int((values > np.sqrt(len(values)) * eps * values[-1]).sum())


def _means(curve: ShrinkageCurve) -> np.ndarray:
    """Amounts, mean log-loss, mean negative log-likelihood, (3, S)."""
    return np.stack([GRID, curve.within / max(1, curve.rows_within), curve.agnostic / max(1, curve.rows_agnostic)])
