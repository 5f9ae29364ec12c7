"""The confusion score: label-free difficulty from an ensemble of small models over their training epochs.

Source: Albiero et al. 2023, eq. 1-3. Accumulates an epoch at a time, any subset of rows at a time, in one float per
sample and statistic: N x K probabilities are never held.
"""

import math

import numpy as np
import torch

from ops.arrays import Array, as_tensor, is_tensor, to_numpy
from ops.checks import check_count, check_labels, check_probabilities, check_shape
from ops.moments import Moments

BLOCK_VALUES = 1 << 20  # float64 values per temporary, 8 MiB


class ConfusionScore:
    """Mean over epochs of the entropy, in bits, of the ensemble-averaged class probabilities.

    Parameters
    ----------
    num_samples : int >= 1
        N; rows of `update` are positions in [0, N).

    Notes
    -----
    Albiero et al. 2023, eq. 1-3: p_t = mean over members, s_t = -Σ_j p_t^j log p_t^j, s = mean over epochs. The paper
    leaves the base open; its plotted range (scores above 7 with 1000 classes, whose entropy is at most 6.9 nats) needs
    base 2. 0 log 0 = 0. Needs no label.
    """

    def __init__(self, num_samples: int):
        check_count("num_samples", num_samples)
        self.num_samples = int(num_samples)
        self._epochs = np.zeros(self.num_samples, np.int64)
        self._mean = np.zeros(self.num_samples)
        self._squares = np.zeros(self.num_samples)  # squared deviations from the mean
        self._device: torch.device | None = None  # where the last update came from; None = no tensor

    def update(self, probs: Array, rows: Array) -> None:
        """Add one epoch of some samples.

        Parameters
        ----------
        probs : array or tensor of shape (M, n, K), any float type
            Each of M members' class probabilities, in [0, 1], rows sum to 1. All members of an epoch at once; M and K
            may differ from call to call.
        rows : integer array of shape (n,), in [0, N), no position twice
            Which samples these are.

        Raises
        ------
        ValueError
            Wrong shape, no probabilities, a row outside [0, N), or one given twice. Nothing is added then.

        Notes
        -----
        Memory beyond the input: blocks of 8 MiB, taken where `probs` is.
        """
        tensor = as_tensor("probs", probs)
        check_shape("probs", tensor, ("M", "n", "K"))
        rows = to_numpy(rows)
        check_labels("rows", rows, tensor.shape[1], self.num_samples)
        if len(np.unique(rows)) != len(rows):
            raise ValueError(f"rows: {len(rows) - len(np.unique(rows))} of {len(rows)} are given twice in one epoch")
        entropy = entropy_of_mean(tensor)
        self._device = probs.device if is_tensor(probs) else None
        self._epochs[rows] += 1
        step = entropy - self._mean[rows]
        self._mean[rows] += step / self._epochs[rows]
        self._squares[rows] += step * (entropy - self._mean[rows])

    def merge(self, other: "ConfusionScore") -> "ConfusionScore":
        """Both parts together, whatever the rows and epochs of each; neither is changed.

        Raises
        ------
        ValueError
            If they are over different numbers of samples.
        """
        if self.num_samples != other.num_samples:
            raise ValueError(f"other: is over {other.num_samples} samples, this one over {self.num_samples}")
        merged = ConfusionScore(self.num_samples)
        merged._device = self._device or other._device
        parts = (Moments(part._epochs, part._mean, part._squares) for part in (self, other))
        merged._epochs, merged._mean, merged._squares = next(parts).merge(next(parts))
        return merged

    def score(self, rows: Array | None = None) -> Array:
        """Confusion of each sample, larger = harder.

        Parameters
        ----------
        rows : integer array of shape (n,), optional
            Only these samples.

        Returns
        -------
        bits : (N,) or (n,) float64, in [0, log2 K]; a tensor if the last update was one, else numpy

        Raises
        ------
        ValueError
            If samples were never updated, with their number; or a row is outside [0, N).
        """
        return self._give(self._mean, rows)

    def spread(self, rows: Array | None = None) -> Array:
        """Standard deviation over epochs (divided by their number) of each sample's entropy, (N,) or (n,) bits; else as `score`."""
        return self._give(np.sqrt(self._squares / np.maximum(self._epochs, 1)), rows)

    @property
    def epochs(self) -> np.ndarray:
        """How often each sample was updated, (N,) int64."""
        return self._epochs.copy()

    def _give(self, values: np.ndarray, rows: Array | None) -> Array:
        chosen = np.arange(self.num_samples) if rows is None else to_numpy(rows)
        check_labels("rows", chosen, len(chosen), self.num_samples)
        missing = int((self._epochs[chosen] == 0).sum())
        if missing:
            raise ValueError(f"score: {missing} of {len(chosen)} samples were never updated (their `epochs` is 0)")
        return values[chosen] if self._device is None else torch.from_numpy(values[chosen]).to(self._device)


def entropy_of_mean(probs: Array) -> np.ndarray:
    """Entropy in bits of the probabilities averaged over members.

    Parameters
    ----------
    probs : array or tensor of shape (M, n, K), any float type
        In [0, 1], rows sum to 1 within 0.01.

    Returns
    -------
    bits : ndarray of shape (n,), float64, in [0, log2 K]

    Raises
    ------
    ValueError
        Wrong shape, NaN, values outside [0, 1], rows that don't sum to 1.

    Notes
    -----
    Albiero et al. 2023, eq. 1 and 2. Averages before the entropy: the mean of the members' entropies is smaller.
    """
    tensor = as_tensor("probs", probs).detach()
    check_shape("probs", tensor, ("M", "n", "K"))
    step = max(1, BLOCK_VALUES // tensor.shape[2])
    blocks = [_block_entropy(tensor[:, start : start + step]) for start in range(0, tensor.shape[1], step)]
    return torch.cat(blocks).cpu().numpy()


def _block_entropy(probs: torch.Tensor) -> torch.Tensor:
    mean = torch.zeros(probs.shape[1:], dtype=torch.float64, device=probs.device)
    for member in probs:
        member = member.double()
        check_probabilities("probs", member)
        mean += member
    mean /= len(probs)
    return _bits(mean)


def epoch_entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the members' mean probabilities, for every sample and epoch: `entropy_of_mean` on logits.

    Parameters
    ----------
    logits : tensor of shape (n, T, M, K), float
        Of M members at T epochs; unchecked.

    Returns
    -------
    entropies : tensor of shape (n, T), of the float type of `logits`
        In bits, in [0, log2 K]. Higher = more confusing. Their mean over T is the confusion score.
    """
    return _bits(torch.softmax(logits, dim=3).mean(dim=2))


def _bits(probs: torch.Tensor) -> torch.Tensor:
    """Entropy of the last axis; rounding can make a probability exceed 1 by a hair, and its entropy fall below 0."""
    return torch.special.entr(probs).sum(dim=-1).clamp_(min=0) / math.log(2)
