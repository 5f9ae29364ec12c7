"""What a training minimises: a loss of `ops.losses` by name, per-sample weights, groups; shared over the ranks."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ops.groupdro import GroupDRO
from ops.losses import LOSSES, SAMPLE_ARGUMENTS
from pipelines.runs.errors import UserError
from pipelines.training.groups import GroupRule

GROUP_METHODS = ("dro", "reweight", "erm")
_DATA = ("logits", "targets", "edges")  # arguments that are arrays; `edges` keep their default


@dataclasses.dataclass(frozen=True)
class LossChoice:
    """A loss and its parameters, checked: ValueError for a name, a parameter or a value that it does not take."""

    name: str = "cross_entropy"
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise UserError(f"{self.name}: expected one of {', '.join(LOSSES)}", "loss")
        known = loss_parameters(self.name)
        for name in self.params:
            if name not in known:
                takes = ", ".join(f"{k}={v.default}" for k, v in known.items()) or "none"
                raise UserError(f"{name}: {self.name} has no such parameter; it takes {takes}", "loss_params")
        try:
            # On three samples, so that a bad value is found before any work starts.
            extra = {argument: torch.rand(3)} if (argument := self.argument) else {}
            LOSSES[self.name](torch.eye(3), torch.arange(3), **extra, **self.params)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}", "loss_params") from None

    @classmethod
    def parse(cls, name: str, words: Sequence[str]) -> "LossChoice":
        """`LossChoice.parse("focal", ["gamma=3"])`."""
        known, params = loss_parameters(name) if name in LOSSES else {}, {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise UserError(f"{word}: expected NAME=VALUE, such as alpha=0.3", "loss_params")
            text = key in known and isinstance(known[key].default, str)
            try:
                params[key] = value if text else float(value)
            except ValueError:
                raise UserError(f"{word}: {value!r} is not a number", "loss_params") from None
        return cls(name, params)

    @property
    def argument(self) -> str | None:
        """The value per sample that the loss itself needs: "weight", "correctness" or none."""
        return SAMPLE_ARGUMENTS.get(self.name)

    def __call__(self, logits: Tensor, targets: Tensor, **sample_values: Tensor) -> Tensor:
        """Per-sample losses (n,)."""
        return LOSSES[self.name](logits, targets, **sample_values, **self.params)


def loss_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a loss that a person may set."""
    parameters = inspect.signature(LOSSES[name]).parameters
    return {k: p for k, p in parameters.items() if k not in _DATA and k != SAMPLE_ARGUMENTS.get(name)}


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Groups and what is done with them.

    Attributes
    ----------
    rule : GroupRule
        With numbers for edges.
    counts : tuple of int
        Training samples of each group.
    method : {"dro", "reweight", "erm"}
        dro: GroupDRO (Sagawa et al. 2020). reweight: each sample times N / (G n_g), the fair baseline. erm: groups are
        only evaluated.
    """

    rule: GroupRule
    counts: tuple[int, ...]
    method: str = "dro"
    step_size: float = 0.01
    adjustment: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in GROUP_METHODS:
            raise UserError(f"{self.method}: expected one of {', '.join(GROUP_METHODS)}", "group_method")


class Objective:
    """Logits and a batch -> the scalar to minimise.

    A column of weights is handed to a loss that has a `weight` argument (difficulty_entropy) as it is; with any other
    loss a sample's loss is multiplied by weight / mean(weight), the mean over all training samples.

    With `world` > 1 the gradient, averaged over ranks as DDP does, is that of the loss over the whole batch, and
    GroupDRO's weights follow the losses of all ranks, so they stay equal on them.
    """

    def __init__(
        self,
        loss: LossChoice,
        weights: str | None = None,
        weight_mean: float = 1.0,
        grouping: Grouping | None = None,
        world: int = 1,
        device: str = "cpu",
    ):
        self.loss, self.weights, self.weight_mean, self.grouping = loss, weights, weight_mean, grouping
        self.world, self.device = world, device
        self.dro = None
        self.factors: Tensor | None = None
        if grouping is not None and grouping.method == "dro":
            self.dro = GroupDRO(
                np.asarray(grouping.counts),
                grouping.step_size,
                grouping.adjustment,
                reduce=functools.partial(sum_over_ranks, device=device) if world > 1 else None,
            )
        elif grouping is not None and grouping.method == "reweight":
            counts = torch.tensor(grouping.counts, dtype=torch.float32)
            self.factors = counts.sum() / (len(counts) * counts)

    def __call__(
        self, logits: Tensor, labels: Tensor, values: dict[str, Tensor], correctness: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch; `values` are its columns, `correctness` (n,) the past frequency of being right."""
        losses = self.per_sample(logits, labels, values, correctness)
        if self.grouping is None or self.grouping.method == "erm":
            return losses.mean()
        groups = self.groups(values, labels)
        if self.factors is not None:
            return (losses * self.factors.to(losses)[groups]).mean()
        return self.dro.loss(losses, groups)

    def per_sample(
        self, logits: Tensor, labels: Tensor, values: dict[str, Tensor], correctness: Tensor | None = None
    ) -> Tensor:
        """Weighted per-sample losses (n,)."""
        if self.loss.argument == "weight":
            return self.loss(logits, labels, weight=values[self.weights])
        losses = self.loss(logits, labels, **({"correctness": correctness} if self.loss.argument else {}))
        return losses if self.weights is None else losses * (values[self.weights] / self.weight_mean).to(losses)

    def groups(self, values: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Group (n,) of each sample of a batch."""
        rule = self.grouping.rule
        return torch.from_numpy(rule.assign(values[rule.column].cpu().numpy(), labels.cpu().numpy())).to(labels.device)

    def check_ranks_agree(self) -> None:
        """Assert that GroupDRO's weights are equal on all ranks."""
        if self.dro is not None and self.world > 1:
            mine = self.dro.weights.to(self.device)
            first = mine.clone()
            dist.broadcast(first, src=0)
            assert torch.equal(mine, first), f"GroupDRO: this rank's weights {mine} differ from rank 0's {first}"


def sum_over_ranks(tensor: Tensor, device: str = "cpu") -> Tensor:
    """The sum of a CPU tensor over all ranks; by way of `device`, where NCCL wants it."""
    moved = tensor.to(device, copy=True)
    dist.all_reduce(moved)
    return moved.cpu()
