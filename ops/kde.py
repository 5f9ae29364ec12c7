"""Calibration error by kernel density estimation, differentiable: a regulariser for training.

Public names are exposed by `ops.losses`. Everything here is computed in float64: log densities of a thousand nats and
more are exponentiated.
"""

import math

import torch
from torch.nn.functional import one_hot

from ops.arrays import Array, accepts_arrays, as_tensor
from ops.checks import check_choice, check_labels, check_range
from ops.log_probs import Tensor, log_probabilities, true_class

KINDS = ("canonical", "marginal", "top_label")


@accepts_arrays
def kde_calibration_error(
    logits: Array, targets: Array, bandwidth: float | None = None, p: float = 1, kind: str = "canonical"
) -> Array:
    """Calibration error to the power p, by leave-one-out kernel density estimation. A scalar with a gradient.

    Parameters
    ----------
    logits : (n, K) float, n >= 2
    targets : (n,) int, in [0, K)
    bandwidth : float > 0, optional
        Kernel width b; None takes the leave-one-out choice on this batch (`kde_bandwidth`).
    p : float >= 1
    kind : {"canonical", "marginal", "top_label"}
        The whole vector against the label (Dirichlet kernels), each class against its own probability (Beta kernels),
        or the confidence against being right (Beta kernels).

    Returns
    -------
    scalar float, >= 0: mean over samples, summed over classes, of |Ê[y | f] − f|^p. No p-th root is taken.

    Raises
    ------
    ValueError
        Wrong shape, fewer than two samples, NaN or infinity, a label outside [0, K), an option outside its range.

    Notes
    -----
    Popordanoska et al. 2022; Zhou et al., eq. 8 for the quantity. Kernels are centred on the other samples with
    parameters α = f_j / b + 1. Ê is a softmax over neighbours of the log kernel, so it stays finite for any K and for
    probabilities of 0 and 1; the reference divides by max(density, 1e-10). The gradient flows through the kernels, too
    (one released training code drops it). O(n² K) time; memory O(n² + nK) canonical and top_label, O(n² K) marginal.
    """
    check_choice("kind", kind, KINDS)
    check_range("p", p, 1.0, math.inf)
    log_probs = log_probabilities(logits, torch.float64)
    check_labels("targets", targets, *logits.shape)
    _check_neighbours(logits)
    width = _leave_one_out_bandwidth(log_probs.detach(), kind) if bandwidth is None else _checked_width(bandwidth)
    true = one_hot(targets.long(), logits.shape[1]).to(log_probs.dtype)
    gap = _expected_label(log_probs, true, width, kind)
    return gap.abs().pow(p).sum(dim=1).mean().to(logits.dtype)


def _expected_label(log_probs: Tensor, true: Tensor, width: float, kind: str) -> Tensor:
    """Ê[y | f] − f: (n, K), or (n, 1) for the top label."""
    probs = log_probs.exp()
    if kind == "canonical":
        return _neighbour_weights(_dirichlet_log_kernel(log_probs, width)) @ true - probs
    log_complement = _log_complement(log_probs)
    if kind == "top_label":
        top = log_probs.argmax(dim=1, keepdim=True)
        log_probs, log_complement, true = (x.gather(1, top) for x in (log_probs, log_complement, true))
    columns = zip(log_probs.unbind(1), log_complement.unbind(1), true.unbind(1))
    expected = [_neighbour_weights(_beta_log_kernel(lp, lq, width)) @ y for lp, lq, y in columns]
    return torch.stack(expected, dim=1) - log_probs.exp()


def _neighbour_weights(log_kernel: Tensor) -> Tensor:
    """Row-normalised kernel (n, n) with each sample left out of its own estimate."""
    return _leave_out(log_kernel).softmax(dim=1)


def _leave_out(log_kernel: Tensor) -> Tensor:
    own = torch.eye(len(log_kernel), dtype=torch.bool, device=log_kernel.device)
    return log_kernel.masked_fill(own, -torch.inf)


def _dirichlet_log_kernel(log_probs: Tensor, width: float) -> Tensor:
    """Log density (n, n) at sample i (row) of the Dirichlet centred on sample j (column)."""
    excess = log_probs.exp() / width  # α − 1
    log_normaliser = torch.lgamma(excess + 1).sum(dim=1) - math.lgamma(1 / width + log_probs.shape[1])
    return log_probs @ excess.T - log_normaliser


def _beta_log_kernel(log_p: Tensor, log_q: Tensor, width: float) -> Tensor:
    """Log density (n, n) at p_i of the Beta centred on p_j; log_q is ln(1 − p)."""
    a, b = log_p.exp() / width, log_q.exp() / width  # α − 1, β − 1
    log_normaliser = torch.lgamma(a + 1) + torch.lgamma(b + 1) - math.lgamma(1 / width + 2)
    return torch.outer(log_p, a) + torch.outer(log_q, b) - log_normaliser


def _log_complement(log_probs: Tensor) -> Tensor:
    """ln(1 − p) (n, K), finite: for the likeliest class summed over the others, for p near 1 loses every digit."""
    top = log_probs.argmax(dim=1, keepdim=True)
    others = log_probs.scatter(1, top, -torch.inf)
    return torch.log1p(-others.exp()).scatter(1, top, others.logsumexp(dim=1, keepdim=True))


@accepts_arrays
def kde_cross_entropy(
    logits: Array,
    targets: Array,
    bandwidth: float | None = None,
    lam: float = 0.3,
    p: float = 1,
    kind: str = "canonical",
) -> Array:
    """Cross entropy per sample plus `lam` times the batch's KDE calibration error: KDE-XE.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    bandwidth, p, kind
        As `kde_calibration_error`.
    lam : float >= 0
        λ; 0.3 for CIFAR-10, 0.5 for CIFAR-100 (Zhou et al., App. E.1).

    Returns
    -------
    (n,) float, >= 0; the scalar is added to each sample, so the mean is CE + λ KDE. A batch of one has no neighbours
    to estimate from: plain cross entropy.

    Raises
    ------
    ValueError
        As `kde_calibration_error`.

    Notes
    -----
    Popordanoska et al. 2022. The released code of Zhou et al. adds the term without its gradient.
    """
    check_range("lam", lam, 0.0, math.inf)
    cross_entropy = -true_class(log_probabilities(logits), targets)
    if len(cross_entropy) == 1:
        return cross_entropy.to(logits.dtype)
    return (cross_entropy + lam * kde_calibration_error(logits, targets, bandwidth, p, kind)).to(logits.dtype)


def kde_bandwidth(logits: Array, kind: str = "canonical") -> float:
    """Kernel width with the largest leave-one-out likelihood, among twenty from 1e-5 to 1.

    Parameters
    ----------
    logits : (n, K) float, n >= 2
    kind : {"canonical", "marginal", "top_label"}
        Whose densities: of the whole vector, summed over each class's, or of the confidence.

    Returns
    -------
    float in [1e-5, 1]

    Raises
    ------
    ValueError
        Wrong shape, fewer than two samples, NaN or infinity, an unknown kind.

    Notes
    -----
    Popordanoska et al. 2022 with its grid, and its density Σ_j k(f_i; f_j, b) / ((n − 1) b), whose extra b favours
    narrow kernels (Dirichlet and Beta are normalised without it; one other released code drops it). The reference
    returns −1 where no log likelihood is positive; here the largest counts whatever its sign. O(20 n² K).
    """
    check_choice("kind", kind, KINDS)
    log_probs = log_probabilities(as_tensor("logits", logits).detach(), torch.float64)
    _check_neighbours(log_probs)
    return _leave_one_out_bandwidth(log_probs, kind)


def _leave_one_out_bandwidth(log_probs: Tensor, kind: str) -> float:
    grid = torch.cat([torch.logspace(-5, -1, 15, dtype=torch.float64), torch.linspace(0.2, 1, 5, dtype=torch.float64)])
    likelihood = [_leave_one_out_likelihood(log_probs, width, kind) for width in grid.tolist()]
    return grid[int(torch.stack(likelihood).argmax())].item()


def _leave_one_out_likelihood(log_probs: Tensor, width: float, kind: str) -> Tensor:
    """Sum over samples (and classes, if marginal) of the log density, up to the constant ln(n − 1)."""
    if kind == "canonical":
        return _log_density(_dirichlet_log_kernel(log_probs, width), width)
    log_complement = _log_complement(log_probs)
    if kind == "top_label":
        top = log_probs.argmax(dim=1, keepdim=True)
        log_probs, log_complement = log_probs.gather(1, top), log_complement.gather(1, top)
    columns = zip(log_probs.unbind(1), log_complement.unbind(1))
    return sum(_log_density(_beta_log_kernel(lp, lq, width), width) for lp, lq in columns)


def _log_density(log_kernel: Tensor, width: float) -> Tensor:
    return (_leave_out(log_kernel).logsumexp(dim=1) - math.log(width)).sum()


def _check_neighbours(logits: Tensor) -> None:
    if len(logits) < 2:
        raise ValueError(f"logits: leave-one-out needs at least 2 samples, got shape {tuple(logits.shape)}")


def _checked_width(bandwidth: float) -> float:
    check_range("bandwidth", bandwidth, 0.0, math.inf, open_low=True)
    return float(bandwidth)
