"""Group distributionally robust optimisation: training on the groups in proportion to how badly they do.

Source: Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts", algorithm 1, which Albiero et al.
2023 use with confusion scores as groups. Three things, kept apart: the loss (`GroupDRO.loss`), the adversarial weights
(`AdversarialWeights`) and what a person wants to see (`GroupStatistics`).
"""

import warnings
from collections.abc import Callable, Sequence

import torch

from ops.arrays import Array, as_tensor, is_tensor
from ops.checks import check_labels, check_range, check_shape, check_vector, check_zero_one

Tensor = torch.Tensor
Reduce = Callable[[Tensor], Tensor]
MEMORY = 0.1  # share of the newest batch in the running mean of a group's loss, as in the released code


class GroupDRO:
    """The robust loss of a batch: group losses weighted by adversarial weights that follow them.

    Parameters
    ----------
    group_counts : (G,) int
        Samples of each group in the training set (not in a batch).
    step_size : float >= 0
        η of the exponentiated gradient ascent on the weights.
    adjustment : float >= 0, or one per group
        C: C / √n_g is added to each group's loss for the weights' step, as small groups generalise worse.
        As in the released code (and the golden cases made by it), it is off for all groups if any C is 0; a warning
        says so.
    normalize_loss : bool
        Whether the group losses are divided by their sum before the step.
    reduce : callable, optional
        For training on several ranks: takes a float64 CPU tensor and returns its sum over ranks, e.g. by
        `torch.distributed.all_reduce`. Weights and the value of the loss are then those of the whole batch, equal on
        all ranks; see Notes for the gradient.

    Raises
    ------
    ValueError
        Wrong shape, negative counts, step or adjustment, an adjusted group without samples.

    Notes
    -----
    Per step, with L_g the mean loss of group g in the batch (0 if absent): q_g ∝ q_g exp(η (L_g + C/√n_g)), then
    the loss Σ_g q_g (L_g + C/√n_g), q without gradient. q starts uniform, and is kept as logarithms: it neither overflows nor gets
    stuck at 0. An absent group's q changes by the adjustment and by normalisation alone. The returned value contains
    the adjustment, the reported group losses never do (the released code adds it in place).

    Ranks: each differentiates W Σ_g q_g S_g / n_g, with W ranks, S_g its own sum of losses and n_g the group's samples
    over all ranks. Averaged over ranks, as DistributedDataParallel does, that is the gradient of the whole batch's loss.
    """

    def __init__(
        self,
        group_counts: Array | Sequence[int],
        step_size: float = 0.01,
        adjustment: float | Array | Sequence[float] = 0.0,
        normalize_loss: bool = False,
        *,
        reduce: Reduce | None = None,
    ):
        counts = _group_counts(group_counts)
        check_range("step_size", step_size, 0.0, float("inf"))
        self.num_groups, self.normalize_loss, self.reduce = len(counts), normalize_loss, reduce
        self.margins = _margins(adjustment, counts)
        self.adversary = AdversarialWeights(self.num_groups, step_size)
        self.statistics = GroupStatistics(self.num_groups)

    @property
    def weights(self) -> Tensor:
        """q, the adversarial weights: (G,) float64 on the CPU, >= 0, sum 1."""
        return self.adversary.weights

    def loss(self, per_sample_losses: Array, groups: Array, correct: Array | None = None) -> Array:
        """Update the weights with this batch, then return its loss under them.

        Parameters
        ----------
        per_sample_losses : (n,) float, finite
        groups : (n,) int, in [0, G)
        correct : (n,) of 0 and 1, optional
            Where the classifier is right: for the statistics only.

        Returns
        -------
        scalar tensor (numpy scalar for numpy input), differentiable with respect to `per_sample_losses`

        Raises
        ------
        ValueError
            Wrong shape, NaN or infinity, a group outside [0, G).
        """
        if not is_tensor(per_sample_losses):
            return self.loss(as_tensor("per_sample_losses", per_sample_losses), groups, correct).numpy()[()]
        groups = as_tensor("groups", groups, per_sample_losses.device)
        correct = None if correct is None else as_tensor("correct", correct, per_sample_losses.device)
        self._check(per_sample_losses, groups, correct)
        sums = _sum_by_group(per_sample_losses, groups, self.num_groups)
        facts = [sums.detach(), _sum_by_group(torch.ones_like(groups, dtype=sums.dtype), groups, self.num_groups)]
        if correct is not None:
            facts.append(_sum_by_group(correct.to(sums.dtype), groups, self.num_groups))
        (total, counts, *right), ranks = self._over_ranks(torch.stack(facts))
        means = total / counts.clamp(min=1)
        self.statistics.update(total, counts, *right)
        self.adversary.update(self._normalized(means + self.margins))
        return self._robust(sums, means, counts, ranks).to(per_sample_losses.dtype)

    def _check(self, losses: Tensor, groups: Tensor, correct: Tensor | None) -> None:
        check_vector("per_sample_losses", losses, finite=True)
        if not losses.is_floating_point():
            raise ValueError(f"per_sample_losses: expected floats, got dtype {losses.dtype}")
        check_labels("groups", groups, len(losses), self.num_groups)
        if correct is not None:
            check_zero_one("correct", correct, len(losses))

    def _over_ranks(self, facts: Tensor) -> tuple[Tensor, float]:
        """`facts` (., G) summed over ranks, float64 on the CPU, and the number of ranks."""
        facts = facts.to("cpu", torch.float64)
        if self.reduce is None:
            return facts, 1.0
        flat = self.reduce(torch.cat([facts.flatten(), torch.ones(1, dtype=torch.float64)]))
        return flat[:-1].view_as(facts), float(flat[-1])

    def _normalized(self, adjusted: Tensor) -> Tensor:
        total = adjusted.sum()
        return adjusted / total if self.normalize_loss and total != 0 else adjusted

    def _robust(self, sums: Tensor, means: Tensor, counts: Tensor, ranks: float) -> Tensor:
        """The loss of the batch over all ranks, with the gradient of this rank's part of it."""
        share = (self.weights * ranks / counts.clamp(min=1)).to(sums)
        own = (share * sums).sum()
        whole = (self.weights * (means + self.margins)).sum().to(own)
        return own + (whole - own).detach()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on: weights and statistics, CPU tensors of shape (G,) or (4, G)."""
        return {"log_weights": self.adversary.log_weights.clone(), **self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`, its tensors of shape (G,) or (4, G).

        Raises
        ------
        ValueError
            If an entry is missing, or belongs to another number of groups.
        """
        expected = self.state_dict()
        for name, value in expected.items():
            if name not in state:
                raise ValueError(f"state: {name} is missing, found {sorted(state)}")
            check_shape(f"state[{name!r}]", state[name], tuple(value.shape))
        self.adversary.log_weights = state["log_weights"].to("cpu", torch.float64).clone()
        self.statistics.load_state_dict(state)


class AdversarialWeights:
    """q over G groups, moved towards those with the larger loss by exponentiated gradient ascent."""

    def __init__(self, num_groups: int, step_size: float):
        self.step_size = step_size
        self.log_weights = torch.full((num_groups,), 1 / num_groups, dtype=torch.float64).log()

    @property
    def weights(self) -> Tensor:
        """(G,) float64, >= 0, sum 1."""
        return self.log_weights.exp()

    def update(self, group_losses: Tensor) -> None:
        """q_g ∝ q_g exp(η L_g), L (G,) float64."""
        self.log_weights = torch.log_softmax(self.log_weights + self.step_size * group_losses, dim=0)


class GroupStatistics:
    """Per-group sums since the last `reset`, and a running mean loss that forgets.

    Attributes
    ----------
    counts : (G,) float64
        Samples seen.
    running_loss : (G,) float64
        Mean loss of the batches, each new one with weight 0.1; 0 for a group never seen.
    """

    def __init__(self, num_groups: int):
        self.running_loss = torch.zeros(num_groups, dtype=torch.float64)
        self._seen = torch.zeros(num_groups, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        """Begin an epoch: the sums become 0, the running loss stays."""
        self.counts, self._losses, self._judged, self._correct = torch.zeros(
            4, len(self.running_loss), dtype=torch.float64
        )

    def update(self, losses: Tensor, counts: Tensor, correct: Tensor | None = None) -> None:
        """Add a batch's per-group sum of losses, number of samples and number of correct ones, (G,) float64 each."""
        present = (counts > 0).double()
        newest = torch.where(self._seen > 0, MEMORY, 1.0) * present
        self.running_loss = self.running_loss + newest * (losses / counts.clamp(min=1) - self.running_loss)
        self._seen = torch.maximum(self._seen, present)
        self.counts, self._losses = self.counts + counts, self._losses + losses
        if correct is not None:
            self._judged, self._correct = self._judged + counts, self._correct + correct

    @property
    def mean_loss(self) -> Tensor:
        """(G,) float64 mean loss per sample since the last reset, without adjustment; NaN for an absent group."""
        return self._losses / self.counts

    @property
    def accuracy(self) -> Tensor:
        """(G,) float64 in [0, 1], over the samples whose correctness was given; NaN without any."""
        return self._correct / self._judged

    def state_dict(self) -> dict[str, Tensor]:
        """Running loss and who was seen, (G,) each, and the four sums (4, G)."""
        sums = torch.stack([self.counts, self._losses, self._judged, self._correct])
        return {"running_loss": self.running_loss.clone(), "seen": self._seen.clone(), "sums": sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from tensors of the shapes that `state_dict` gives; unchecked."""
        loaded = {name: state[name].to("cpu", torch.float64).clone() for name in ("running_loss", "seen", "sums")}
        self.running_loss, self._seen = loaded["running_loss"], loaded["seen"]
        self.counts, self._losses, self._judged, self._correct = loaded["sums"]


def _sum_by_group(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(G,) sums, in float32 at least."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    zeros = torch.zeros(num_groups, dtype=values.dtype, device=values.device)
    return zeros.index_add(0, groups.long(), values)


def _group_counts(group_counts: Array | Sequence[int]) -> Tensor:
    counts = as_tensor("group_counts", group_counts).to("cpu", torch.float64)
    check_vector("group_counts", counts)
    if bool((counts < 0).any()):
        raise ValueError(f"group_counts: must not be negative, found {counts.min():g}")
    return counts


def _margins(adjustment: float | Array | Sequence[float], counts: Tensor) -> Tensor:
    """C / √n_g of each group, (G,) float64."""
    c = as_tensor("adjustment", adjustment).to("cpu", torch.float64)
    if c.ndim:
        check_vector("adjustment", c, len(counts))
    if not bool((c >= 0).all()):
        raise ValueError(f"adjustment: must not be negative, found {c.min():g}")
    c = c.expand_as(counts)
    if not bool((c > 0).all()):
        if bool((c > 0).any()):
            warnings.warn("adjustment: one of its values is 0, which turns it off for all groups", stacklevel=3)
        return torch.zeros_like(counts)
    if bool((counts == 0).any()):
        raise ValueError(
            f"group_counts: group {int(counts.argmin())} has no sample, its adjustment C / sqrt(n) is infinite"
        )
    return c / counts.sqrt()
