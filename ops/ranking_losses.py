"""Losses that weight a sample by the rank of its confidence in the batch: AURC, selective AURC, correctness ranking.

Public names are exposed by `ops.losses`.
"""

import math

import torch
from torch.nn import functional

from ops.arrays import Array, accepts_arrays
from ops.checks import check_choice, check_range, check_vector
from ops.log_probs import Tensor, entropy, largest_except, log_probabilities, true_class

CONFIDENCE_SCORES = ("msp", "entropy", "margin")
DEFAULT_BINS = 64


def confidence_score(log_probs: Tensor, csf: str) -> Tensor:
    """Confidence (n,) in [0, 1], higher = safer, differentiable (Zhou et al., App. A, Tab. 1).

    "msp": max p. "entropy": 1 − H/ln K (the paper's negative entropy, shifted and scaled onto [0, 1]).
    "margin": largest minus second largest probability.
    """
    check_choice("csf", csf, CONFIDENCE_SCORES)
    if csf == "entropy":
        return 1 - entropy(log_probs) / math.log(log_probs.shape[1])
    top = log_probs.argmax(dim=1)
    largest = log_probs.gather(1, top[:, None]).squeeze(1).exp()
    return largest if csf == "msp" else largest - largest_except(log_probs, top).exp()


@accepts_arrays
def aurc(logits: Array, targets: Array, csf: str = "msp", weighting: str = "harmonic") -> Array:
    """Cross entropy weighted by the rank of each sample's confidence: area under the risk–coverage curve.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    csf : {"msp", "entropy", "margin"}
        The confidence that ranks.
    weighting : {"harmonic", "log"}
        The finite-sample form of −ln(1 − G), r = 1 the least confident of n:
        "harmonic" ψ(n+1) − ψ(n−r+1), or "log" −ln(1 − r/(n+1)).

    Returns
    -------
    (n,) float, >= 0, nats; the mean is the batch's AURC.

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, a label outside [0, K), an unknown name.

    Notes
    -----
    Zhou et al., eq. 7, which with the empirical CDF r/n is infinite at the top rank; both forms are estimators of the
    same group's AsymptoticAURC code. No gradient through ranks and weights. Ties rank in batch order. Here the ranking
    takes softmax(logits); the released training code takes the softmax twice. O(nK + n log n).
    """
    check_choice("weighting", weighting, ("harmonic", "log"))
    log_probs = log_probabilities(logits)
    cross_entropy = -true_class(log_probs, targets)
    order = confidence_score(log_probs.detach(), csf).argsort(stable=True)
    weight = torch.empty_like(cross_entropy)
    weight[order] = _rank_weights(len(order), weighting, logits.device).to(weight.dtype)
    return (weight * cross_entropy).to(logits.dtype)


def _rank_weights(n: int, weighting: str, device: torch.device) -> Tensor:
    """Weights (n,) of ranks 1 … n, least confident first; float64, for low ranks are differences of large numbers."""
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    if weighting == "log":
        return -torch.log1p(-rank / (n + 1))
    return torch.digamma(rank.new_tensor(n + 1)) - torch.digamma(n + 1 - rank)


@accepts_arrays
def selective_aurc(
    logits: Array,
    targets: Array,
    csf: str = "msp",
    coverage: float = 0.75,
    nu: float = 0.3,
    edges: Array | None = None,
) -> Array:
    """Cross entropy weighted by a smoothed rank inside the low-confidence region: the AU loss.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    csf : {"msp", "entropy", "margin"}
        Confidence s, in [0, 1]. A setting made for negative entropy in nats becomes ν / ln K, edges 1 + e / ln K.
    coverage : float in (0, 1]
        Share of the batch treated as low-confidence; τ is this quantile of s. The paper's κ.
    nu : float > 0
        Width of the sigmoid that smooths each bin's step, in units of s. The weight's gradient, which lowers the
        confidence of all samples below τ, grows as 1/ν: at 0.1 and less a new classifier hardly learns.
    edges : (M+1,) float, strictly increasing, optional
        Bin edges; 64 equal bins on [0, 1] by default. Bins are [lo, hi); a score outside counts in the nearest bin.

    Returns
    -------
    (n,) float, >= 0, nats; the mean is the training loss.

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, a label outside [0, K), an unknown csf, an option outside its range.

    Notes
    -----
    Zhou et al., eq. 19–23 and 36: Ĝ(s) = 1/n Σ_m h_m σ((s − c_m)/ν); β = −C ln(1 − Ĝ(min(s, τ))), C = 1/Ĝ(τ).
    The gradient flows through Ĝ(s) for s < τ, not through h, τ or C. The released code differs: no C, Ĝ clamped, a
    gradient through τ, one histogram for a whole epoch. −ln(1 − Ĝ) is computed without cancellation at either end.
    Defaults: coverage is CIFAR-10's (App. E.2); its ν = 0.1 belongs to that code's softmax of softmax, whose largest
    values lie in [1/K, e/(e + K − 1)], and is some 0.7 here. O(nM + nK) time and memory.
    """
    check_range("coverage", coverage, 0.0, 1.0, open_low=True)
    check_range("nu", nu, 0.0, math.inf, open_low=True)
    log_probs = log_probabilities(logits)
    cross_entropy = -true_class(log_probs, targets)
    score = confidence_score(log_probs, csf)
    edges = _bin_edges(edges, score)
    tau = _quantile(score.detach(), coverage)
    centres, mass = (edges[:-1] + edges[1:]) / 2, _bin_mass(score.detach(), edges)
    log_survival = _log_survival(torch.where(score < tau, score, tau), centres, mass, nu)
    cdf_at_tau = -torch.expm1(_log_survival(tau[None], centres, mass, nu))
    return (-log_survival / cdf_at_tau * cross_entropy).to(logits.dtype)


def _bin_edges(edges: Array | None, score: Tensor) -> Tensor:
    """The checked edges in the dtype of `score`, 64 equal bins on [0, 1] by default."""
    if edges is None:
        return torch.linspace(0, 1, DEFAULT_BINS + 1, dtype=score.dtype, device=score.device)
    check_vector("edges", edges, finite=True)
    if len(edges) < 2 or bool((edges[1:] <= edges[:-1]).any()):
        raise ValueError(f"edges: expected at least 2 strictly increasing values, shape {tuple(edges.shape)}")
    return edges.detach().to(score)


def _quantile(x: Tensor, share: float) -> Tensor:
    """Quantile with linear interpolation, in O(n) and for any n (torch.quantile sorts, and refuses n > 2^24)."""
    position = share * (len(x) - 1)
    below = int(position)
    low = x.kthvalue(below + 1).values
    high = x.kthvalue(min(below + 2, len(x))).values
    return low + (high - low) * (position - below)


def _bin_mass(score: Tensor, edges: Tensor) -> Tensor:
    """Share (M,) of the scores in each bin [e_m, e_m+1), the end bins open outwards, so that it sums to 1."""
    num_bins = len(edges) - 1
    index = (torch.bucketize(score, edges, right=True) - 1).clamp(0, num_bins - 1)
    return torch.bincount(index, minlength=num_bins).to(score.dtype) / len(score)


def _log_survival(score: Tensor, centres: Tensor, mass: Tensor, nu: float) -> Tensor:
    """ln(1 − Ĝ(s)) at each score, accurate where Ĝ is near 0 and where it is near 1.

    Above the bins' median the sum gives 1 − Ĝ itself, below it Ĝ; neither then exceeds 3/4.
    """
    median = centres[int((mass.cumsum(0) < 0.5).sum().clamp_max(len(mass) - 1))]
    upper = score > median
    slope = torch.where(upper, -1.0, 1.0).to(score.dtype) / nu
    # in logarithms: dividing by a tail that is nearly 0 would lose the gradient
    log_tail = (functional.logsigmoid((score[:, None] - centres) * slope[:, None]) + mass.log()).logsumexp(dim=1)
    log_tail = log_tail.clamp_min(math.log(torch.finfo(log_tail.dtype).tiny))
    return torch.where(upper, log_tail, torch.log1p(-log_tail.exp()))


@accepts_arrays
def correctness_ranking(logits: Array, correctness: Array, csf: str = "msp") -> Array:
    """Hinge on neighbours of the batch whose confidences aren't ordered like their past correctness. A scalar.

    Parameters
    ----------
    logits : (n, K) float
    correctness : (n,) float, in [0, 1]
        How often each sample was classified correctly in earlier epochs, (count − min) / (max − min) over the data set.
    csf : {"msp", "entropy", "margin"}

    Returns
    -------
    scalar float, >= 0, to be added to the mean cross entropy (`ranking_cross_entropy`).

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, a correctness outside [0, 1], an unknown csf.

    Notes
    -----
    Moon et al. 2020 (CRL), as in Cui et al. 2023, Tab. 7: mean over pairs (i, i+1 mod n), in batch order, of
    max(0, −t (κ_i − κ_j) + |c_i − c_j|), t = sign(c_i − c_j); equal pairs count as 0 in the mean. No gradient to c.
    The released code's entropy score is −H / 2.302585 (or 4.605170), here 1 − H/ln K.
    """
    return _ranking(log_probabilities(logits), correctness, csf).to(logits.dtype)


def _ranking(log_probs: Tensor, correctness: Tensor, csf: str) -> Tensor:
    check_vector("correctness", correctness, len(log_probs))
    low, high = float(correctness.min()), float(correctness.max())
    if low < 0 or high > 1:
        raise ValueError(f"correctness: must lie in [0, 1], found {low if low < 0 else high} (counts not normalised?)")
    score = confidence_score(log_probs, csf)
    correctness = correctness.detach().to(score)
    difference = correctness - correctness.roll(-1)
    hinge = difference.abs() - difference.sign() * (score - score.roll(-1))
    return hinge.clamp_min(0).mean()


@accepts_arrays
def ranking_cross_entropy(
    logits: Array, targets: Array, correctness: Array, csf: str = "msp", strength: float = 1.0
) -> Array:
    """Cross entropy per sample plus `strength` times the batch's correctness ranking: the objective of CRL.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    correctness : (n,) float, in [0, 1]
    csf : {"msp", "entropy", "margin"}
    strength : float >= 0

    Returns
    -------
    (n,) float, >= 0; the scalar ranking term is added to each sample, so the mean is CE + strength · ranking.

    Raises
    ------
    ValueError
        As `correctness_ranking`, and a label outside [0, K).
    """
    check_range("strength", strength, 0.0, math.inf)
    log_probs = log_probabilities(logits)
    cross_entropy = -true_class(log_probs, targets)
    return (cross_entropy + strength * _ranking(log_probs, correctness, csf)).to(logits.dtype)
