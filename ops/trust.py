"""Losses for an oracle that predicts whether a classifier's prediction can be trusted.

Source: Luo et al. 2021, "Learning to Predict Trustworthiness with Steep Slope Loss", eq. 4-8. The oracle gives one
number z per sample; the confidence is sigmoid(z), and a prediction is trusted if z > 0. `TRUST_LOSSES` lists them by
name for the trust command.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from ops.arrays import Array, accepts_arrays
from ops.checks import check_matrix, check_range, check_vector, check_zero_one

Tensor = torch.Tensor


@accepts_arrays
def steep_slope(z: Array, correct: Array, alpha_pos: float = 1.0, alpha_neg: float = 3.0) -> Array:
    """Steep slope loss: two slides that fall towards +inf for correct predictions and towards -inf for wrong ones.

    Parameters
    ----------
    z : (n,) float, finite
        Signed distance to the oracle's hyperplane; larger = more trustworthy.
    correct : (n,) of 0 and 1, or bool
        o of eq. 2: 1 where the classifier is right.
    alpha_pos, alpha_neg : float > 0
        Slope of the slide of correct and of wrong predictions; above about 40 the loss overflows float32.

    Returns
    -------
    (n,) float, in [0, exp(α) − exp(−α)]

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, `correct` other than 0 and 1, a slope <= 0.

    Notes
    -----
    Luo et al. 2021, eq. 8, with the signs of the released code, its text and its figure: exp(−α⁺ z / (1 + |z|)) − exp(−α⁺)
    where correct, exp(+α⁻ z / (1 + |z|)) − exp(−α⁻) where wrong. As printed, the two are the other way round and would
    push correct predictions to −inf.
    """
    x, positive = _inputs(z, correct)
    check_range("alpha_pos", alpha_pos, 0.0, float("inf"), open_low=True)
    check_range("alpha_neg", alpha_neg, 0.0, float("inf"), open_low=True)
    alpha = torch.where(positive, x.new_tensor(alpha_pos), x.new_tensor(alpha_neg))
    toward = torch.where(positive, x, -x)  # positive = on the right side
    # exp(-a s) - exp(-a) = exp(-a) (exp(a (1 - s)) - 1) keeps its digits down to 0, with 1 - s from 1 / (1 + |z|)
    rest = torch.where(toward > 0, 1 / (1 + toward.abs()), 1 - functional.softsign(toward))
    return (torch.exp(-alpha) * torch.expm1(alpha * rest)).to(z.dtype)


@accepts_arrays
def trust_cross_entropy(z: Array, correct: Array) -> Array:
    """Binary cross entropy −o ln σ(z) − (1 − o) ln(1 − σ(z)).

    Parameters
    ----------
    z : (n,) float, finite
    correct : (n,) of 0 and 1, or bool
        1 where the classifier is right.

    Returns
    -------
    (n,) float, >= 0, nats

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, `correct` other than 0 and 1.

    Notes
    -----
    Luo et al. 2021, eq. 4. Their released code broadcasts (n, 1) against (n,) and so pulls every sample to the batch's
    mean of o; here it is per sample.
    """
    x, positive = _inputs(z, correct)
    return functional.softplus(torch.where(positive, -x, x)).to(z.dtype)


@accepts_arrays
def trust_focal(z: Array, correct: Array, gamma: float = 2.0) -> Array:
    """Binary focal loss: cross entropy times (1 − p)^γ, p the probability of what is the case.

    Parameters
    ----------
    z : (n,) float, finite
    correct : (n,) of 0 and 1, or bool
        1 where the classifier is right.
    gamma : float >= 0
        0 is cross entropy.

    Returns
    -------
    (n,) float, >= 0, nats

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, `correct` other than 0 and 1, gamma < 0.

    Notes
    -----
    Luo et al. 2021, eq. 5 (not the released code, which broadcasts as its cross entropy does). In logarithms, so that
    neither value nor gradient is lost where p is 0 or 1.
    """
    x, positive = _inputs(z, correct)
    check_range("gamma", gamma, 0.0, float("inf"))
    away = torch.where(positive, -x, x)
    return (torch.exp(gamma * functional.logsigmoid(away)) * functional.softplus(away)).to(z.dtype)


@accepts_arrays
def tcp(z: Array, true_class_prob: Array) -> Array:
    """True class probability regression (σ(z) − p_y)².

    Parameters
    ----------
    z : (n,) float, finite
    true_class_prob : (n,) float, in [0, 1]
        The classifier's probability of the TRUE class.

    Returns
    -------
    (n,) float, in [0, 1]

    Raises
    ------
    ValueError
        Wrong shape, NaN or infinity, empty, a probability outside [0, 1].

    Notes
    -----
    Luo et al. 2021, eq. 6 writes f(x); both released codes (ConfidNet and theirs) take the sigmoid, as here. The
    threshold of trust is then 1/K on the negative side, not 1/2.
    """
    x = _distance(z)
    check_vector("true_class_prob", true_class_prob, len(z))
    _same_device("true_class_prob", true_class_prob, z)
    low, high = float(true_class_prob.min()), float(true_class_prob.max())
    if low < 0 or high > 1:
        raise ValueError(f"true_class_prob: values must lie in [0, 1], found {low if low < 0 else high}")
    return (torch.sigmoid(x) - true_class_prob.to(x.dtype)).square().to(z.dtype)


@accepts_arrays
def signed_distance(features: Array, weight: Array, bias: float | Array = 0.0) -> Array:
    """Signed distance of each sample to the oracle's hyperplane, (xᵀw + b) / ‖w‖.

    Parameters
    ----------
    features : (n, d) float
    weight : (d,) float, not all zero
    bias : number, or array of one

    Returns
    -------
    (n,) float, unbounded, in units of the features; larger = more trustworthy

    Raises
    ------
    ValueError
        Wrong shape, NaN, empty, a zero weight, a bias of more than one value.

    Notes
    -----
    Luo et al. 2021, eq. 7. The released code divides by ‖w‖ + 1e-7; here the norm is exact and zero is an error.
    """
    check_matrix("features", features, "d")
    check_vector("weight", weight, features.shape[1])
    norm = torch.linalg.vector_norm(weight)
    if not bool((norm > 0) & norm.isfinite()):
        raise ValueError(f"weight: its norm must be positive and finite, got {float(norm)}")
    if isinstance(bias, Tensor) and bias.numel() != 1:
        raise ValueError(f"bias: expected one number, got shape {tuple(bias.shape)}")
    bias = float(bias) if not isinstance(bias, Tensor) else bias.reshape(())
    if not bool(torch.as_tensor(bias).isfinite()):
        raise ValueError("bias: must be finite")
    return (features @ weight.to(features.dtype) + bias) / norm.to(features.dtype)


TRUST_LOSSES: dict[str, Callable[..., Array]] = {
    "steep_slope": steep_slope,
    "cross_entropy": trust_cross_entropy,
    "focal": trust_focal,
    "tcp": tcp,
}


def _inputs(z: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """z in at least float32, and which samples are positive."""
    x = _distance(z)
    check_zero_one("correct", correct, len(z))
    _same_device("correct", correct, z)
    return x, correct == 1


def _distance(z: Tensor) -> Tensor:
    check_vector("z", z, finite=True)
    if not z.is_floating_point():
        raise ValueError(f"z: expected floats, got dtype {z.dtype}")
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _same_device(name: str, x: Tensor, z: Tensor) -> None:
    if x.device != z.device:
        raise ValueError(f"{name}: is on {x.device}, z on {z.device}")
