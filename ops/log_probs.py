"""From logits to log-probabilities, checked: the ground that every loss stands on."""

import torch

from ops.checks import check_labels, check_matrix

Tensor = torch.Tensor


def check_logits(logits: Tensor) -> None:
    """`logits` must be (n, K) finite floats, n >= 1, K >= 2.

    An infinite logit is refused like NaN: what it stands for (a masked class, a diverged model) no loss could tell.
    """
    check_matrix("logits", logits, finite=True)
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected floats, got dtype {logits.dtype}")
    if logits.shape[1] < 2:
        raise ValueError(f"logits: expected shape (n, K) with K >= 2, got {tuple(logits.shape)}")


def log_probabilities(logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Checked log softmax (n, K), finite, in `dtype`; by default that of `logits`, and at least float32."""
    check_logits(logits)
    return logits.to(dtype or torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)


def true_class(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Log-probability (n,) of each sample's label, the labels checked."""
    check_labels("targets", targets, *log_probs.shape)
    return log_probs.gather(1, targets.long()[:, None]).squeeze(1)


def probability_of_not(log_p: Tensor) -> Tensor:
    """1 − exp(log_p) (n,) without cancellation, kept above 0 so that a power of it has a finite gradient."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy (n,) in nats of each row; 0 log 0 = 0, since log_probs are finite."""
    return -(log_probs.exp() * log_probs).sum(dim=1)


def largest_except(log_probs: Tensor, excluded: Tensor) -> Tensor:
    """Largest log-probability (n,) over the classes other than `excluded` (n,); ties go to the lowest class index."""
    masked = log_probs.detach().scatter(1, excluded.long()[:, None], -torch.inf)
    return log_probs.gather(1, masked.argmax(dim=1, keepdim=True)).squeeze(1)
