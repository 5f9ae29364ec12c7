"""Training losses: logits and labels in, one value per sample out; the mean is the training loss.

All are finite, with finite gradients, for logits up to ±1e4, and compute in float32 where logits are narrower. Tensors
or numpy arrays; the result has the dtype of `logits`. `LOSSES` lists them by name for the training command. Those that
look at the whole batch live in `ops.ranking_losses` and `ops.kde` and are exposed here.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from ops.arrays import Array, accepts_arrays
from ops.checks import check_choice, check_range, check_vector
from ops.kde import kde_bandwidth, kde_calibration_error, kde_cross_entropy
from ops.log_probs import (
    Tensor,
    entropy,
    largest_except,
    log_probabilities,
    probability_of_not,
    true_class,
)
from ops.ranking_losses import aurc, confidence_score, correctness_ranking, ranking_cross_entropy, selective_aurc

__all__ = [
    "LOSSES",
    "SAMPLE_ARGUMENTS",
    "aurc",
    "brier",
    "confidence_score",
    "correctness_ranking",
    "cross_entropy",
    "difficulty_entropy",
    "dual_focal",
    "entropy_regularized",
    "focal",
    "focal_53",
    "inverse_focal",
    "kde_bandwidth",
    "kde_calibration_error",
    "kde_cross_entropy",
    "l1_norm",
    "label_smoothing",
    "poly1",
    "ranking_cross_entropy",
    "selective_aurc",
]


@accepts_arrays
def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log-likelihood −ln p_y.

    Parameters
    ----------
    logits : (n, K) float, finite, K >= 2
    targets : (n,) int, in [0, K)

    Returns
    -------
    (n,) float, >= 0, nats

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, a label outside [0, K).

    Notes
    -----
    Cui et al. 2023, eq. 8.
    """
    return (-true_class(log_probabilities(logits), targets)).to(logits.dtype)


@accepts_arrays
def label_smoothing(logits: Array, targets: Array, smoothing: float = 0.05) -> Array:
    """Cross entropy against a label of mass 1 − ε + ε/K, ε/K for each other class.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    smoothing : float in [0, 1]
        ε, spread over all K classes, the true one included.

    Returns
    -------
    (n,) float, >= 0, nats

    Raises
    ------
    ValueError
        As `cross_entropy`, or smoothing outside [0, 1].

    Notes
    -----
    Müller et al. 2019, a baseline of Cui et al. 2023; the default is Wang et al. 2021's.
    """
    check_range("smoothing", smoothing, 0.0, 1.0)
    log_probs = log_probabilities(logits)
    log_p = true_class(log_probs, targets)
    return (-(1 - smoothing) * log_p - smoothing * log_probs.mean(dim=1)).to(logits.dtype)


@accepts_arrays
def focal(logits: Array, targets: Array, gamma: float = 2.0) -> Array:
    """Cross entropy weighted by (1 − p_y)^γ: confident samples count less. γ = 0 is cross entropy.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    gamma : float >= 0

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`, or gamma negative.

    Notes
    -----
    Zhou et al., eq. 2 (Lin et al. 2017, whose γ is the default). The gradient flows through the weight, too; some
    released baselines detach it.
    """
    check_range("gamma", gamma, 0.0, math.inf)
    log_p = true_class(log_probabilities(logits), targets)
    return (-probability_of_not(log_p).pow(gamma) * log_p).to(logits.dtype)


@accepts_arrays
def focal_53(logits: Array, targets: Array) -> Array:
    """Focal loss with γ = 5 where p_y < 0.2, else 3: FL-53, also called FLSD-53.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`.

    Notes
    -----
    Mukhoti et al. 2020; Zhou et al., §5. γ is a constant of the sample: no gradient through the choice.
    """
    log_probs = log_probabilities(logits)
    log_p = true_class(log_probs, targets)
    p = log_probs.detach().softmax(dim=1).gather(1, targets.long()[:, None]).squeeze(1)  # 1/5 is 0.2, exp(-ln 5) less
    rest = probability_of_not(log_p)
    return (-torch.where(p < 0.2, rest.pow(5), rest.pow(3)) * log_p).to(logits.dtype)


@accepts_arrays
def inverse_focal(logits: Array, targets: Array, gamma: float = 1.0) -> Array:
    """Cross entropy weighted by (1 + p_y)^γ: confident samples count more.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    gamma : float >= 0
        From about 3.5 the loss grows with p_y in places (the paper advises against 4 and more).

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`, or gamma negative.

    Notes
    -----
    Zhou et al., eq. 3; default from App. E.1. The released code clamps p_y to [1e-9, 1 − 1e-9] in the weight. The
    derivative printed in App. C.2 has the wrong sign on its first term.
    """
    check_range("gamma", gamma, 0.0, math.inf)
    log_p = true_class(log_probabilities(logits), targets)
    return (-(1 + log_p.exp()).pow(gamma) * log_p).to(logits.dtype)


@accepts_arrays
def dual_focal(logits: Array, targets: Array, gamma: float = 5.0, variant: str = "equation") -> Array:
    """Cross entropy weighted by (1 − p_y + p_j)^γ, j the competitor.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    gamma : float >= 0
    variant : {"equation", "released"}
        "equation": p_j is the largest probability of a wrong class; at a tie the gradient goes to the lowest index.
        "released": p_j is the largest probability strictly below p_y (0 if there is none), as the public code has it:
        a misclassified sample loses its competitor.

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`, gamma negative, or an unknown variant.

    Notes
    -----
    Zhou et al., eq. 33 (Tao et al. 2023); default from App. E.1, ResNet-50. Eq. 34–35 describe "released" with p_j = 0
    for p_y < p_j; the code in fact takes the next smaller probability.
    """
    check_range("gamma", gamma, 0.0, math.inf)
    check_choice("variant", variant, ("equation", "released"))
    log_probs = log_probabilities(logits)
    log_p = true_class(log_probs, targets)
    if variant == "equation":
        competitor = largest_except(log_probs, targets).exp()
    else:
        competitor = _largest_below(log_probs.exp(), log_p.exp())
    return (-(probability_of_not(log_p) + competitor).pow(gamma) * log_p).to(logits.dtype)


def _largest_below(probs: Tensor, bound: Tensor) -> Tensor:
    """Largest probability (n,) of each row strictly below `bound` (n,), 0 where there is none."""
    return probs.where(probs < bound[:, None], 0.0).max(dim=1).values


@accepts_arrays
def entropy_regularized(logits: Array, targets: Array, alpha: float = 0.1) -> Array:
    """Cross entropy − α H(p): a bonus for uncertain predictions.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    alpha : float >= 0

    Returns
    -------
    (n,) float, nats, >= −α ln K

    Raises
    ------
    ValueError
        As `cross_entropy`, or alpha negative.

    Notes
    -----
    Pereyra et al. 2017; Cui et al. 2023, eq. 9 with s = 1, default from its Tab. 5. H in nats, 0 log 0 = 0.
    """
    check_range("alpha", alpha, 0.0, math.inf)
    log_probs = log_probabilities(logits)
    return (-true_class(log_probs, targets) - alpha * entropy(log_probs)).to(logits.dtype)


@accepts_arrays
def l1_norm(logits: Array, targets: Array, alpha: float = 0.05) -> Array:
    """Cross entropy + α Σ_k |logit_k|.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    alpha : float >= 0

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`, or alpha negative.

    Notes
    -----
    Wang et al. 2021 (a baseline of Cui et al. 2023), as released: the sum over classes, not divided by K;
    the subgradient at 0 is 0.
    """
    check_range("alpha", alpha, 0.0, math.inf)
    log_probs = log_probabilities(logits)
    norm = logits.to(log_probs.dtype).abs().sum(dim=1)
    return (-true_class(log_probs, targets) + alpha * norm).to(logits.dtype)


@accepts_arrays
def poly1(logits: Array, targets: Array, epsilon: float = 1.0) -> Array:
    """Cross entropy + ε (1 − p_y).

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    epsilon : float >= −1

    Returns
    -------
    (n,) float, >= 0

    Raises
    ------
    ValueError
        As `cross_entropy`, or epsilon below −1 (the loss would grow with p_y).

    Notes
    -----
    Leng et al. 2022, Poly-1.
    """
    check_range("epsilon", epsilon, -1.0, math.inf)
    log_p = true_class(log_probabilities(logits), targets)
    return (-log_p - epsilon * torch.expm1(log_p)).to(logits.dtype)


@accepts_arrays
def brier(logits: Array, targets: Array) -> Array:
    """Squared distance Σ_k (p_k − 1[k = y])² of the probabilities to the one-hot label.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)

    Returns
    -------
    (n,) float, in [0, 2]

    Raises
    ------
    ValueError
        As `cross_entropy`.

    Notes
    -----
    Brier 1950; Zhou et al., eq. 24. The sum over classes, not their mean.
    """
    log_probs = log_probabilities(logits)
    true_class(log_probs, targets)
    label = functional.one_hot(targets.long(), logits.shape[1])
    return (log_probs.exp() - label).square().sum(dim=1).to(logits.dtype)


@accepts_arrays
def difficulty_entropy(logits: Array, targets: Array, weight: Array, alpha: float = 0.3) -> Array:
    """Cross entropy − α s H(p), s the sample's difficulty: hard samples may stay uncertain.

    Parameters
    ----------
    logits : (n, K) float
    targets : (n,) int, in [0, K)
    weight : (n,) float, >= 0
        s in (0, 1], larger = harder (`ops.difficulty.difficulty_weight`). A constant: it gets no gradient.
    alpha : float >= 0
        0.3 for CIFAR, 0.2 for ImageNet.

    Returns
    -------
    (n,) float, nats, >= −α s ln K

    Raises
    ------
    ValueError
        As `cross_entropy`; weight of another shape, not finite or negative; alpha negative.

    Notes
    -----
    Cui et al. 2023, eq. 9. H in nats.
    """
    check_range("alpha", alpha, 0.0, math.inf)
    log_probs = log_probabilities(logits)
    log_p = true_class(log_probs, targets)
    check_vector("weight", weight, len(logits), finite=True)
    if bool((weight < 0).any()):
        raise ValueError(f"weight: must not be negative, found {float(weight.min())}")
    return (-log_p - alpha * weight.detach().to(log_p) * entropy(log_probs)).to(logits.dtype)


# What a training job calls: LOSSES[name](logits, targets, **options) -> (n,). The options, all with a default:
#   label_smoothing smoothing · focal, inverse_focal gamma · dual_focal gamma, variant · poly1 epsilon
#   entropy_regularized, l1_norm, difficulty_entropy alpha · aurc csf, weighting · selective_aurc csf, coverage, nu, edges
#   kde_cross_entropy bandwidth, lam, p, kind · correctness_ranking csf, strength · the others none
LOSSES: dict[str, Callable[..., Array]] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": label_smoothing,
    "focal": focal,
    "focal_53": focal_53,
    "inverse_focal": inverse_focal,
    "dual_focal": dual_focal,
    "entropy_regularized": entropy_regularized,
    "l1_norm": l1_norm,
    "poly1": poly1,
    "brier": brier,
    "difficulty_entropy": difficulty_entropy,
    "aurc": aurc,
    "selective_aurc": selective_aurc,
    "kde_cross_entropy": kde_cross_entropy,
    "correctness_ranking": ranking_cross_entropy,  # cross entropy + the scalar that bears this name
}
# The names in use elsewhere.
LOSSES |= {
    "ce": cross_entropy,
    "xe": cross_entropy,
    "fl53": focal_53,
    "au": selective_aurc,
    "kde_xe": kde_cross_entropy,
    "crl": ranking_cross_entropy,
}

# Losses that need one more value per sample of the batch, shape (n,), under this argument name.
SAMPLE_ARGUMENTS: dict[str, str] = {
    "difficulty_entropy": "weight",
    "correctness_ranking": "correctness",
    "crl": "correctness",
}
