"""Many small classifier heads over the same features, trained and evaluated together in batched products.

A head is linear, or has one hidden layer of ReLU units. The confusion score needs members × epochs of them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ops.checks import check_matrix
from ops.confusion import epoch_entropies

BLOCK_BYTES = 32 << 20  # of logits that one product gives
State = dict[str, torch.Tensor]  # one head: "0.weight" (out, in), "0.bias" (out,), with a hidden layer also "1.…"


class HeadEnsemble(nn.Module):
    """P heads that are trained side by side; each is initialised from its own seed, as `nn.Linear` would be.

    Parameters
    ----------
    seeds : sequence of int
        One per head. A head's initial weights depend on its seed alone, not on its neighbours.
    width, num_classes : int
        d and K.
    hidden : int, optional
        Units of the hidden layer; None: linear heads.
    """

    def __init__(self, seeds: Sequence[int], width: int, num_classes: int, hidden: int | None = None):
        super().__init__()
        sizes = [(width, num_classes)] if hidden is None else [(width, hidden), (hidden, num_classes)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for inside, outside in sizes:
            drawn = [torch.rand((inside + 1, outside), generator=g).mul_(2).sub_(1) for g in generators]
            stacked = torch.stack(drawn) / math.sqrt(inside)
            self.weights.append(nn.Parameter(stacked[:, :-1].contiguous()))
            self.biases.append(nn.Parameter(stacked[:, -1:].contiguous()))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (P, n, K) of features (P, n, d): every head has rows of its own."""
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            features = torch.baddbmm(bias, features.relu() if depth else features, weight)
        return features

    def head(self, index: int) -> State:
        """One head's tensors, in the layout of `nn.Linear`; copies."""
        state = {}
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            state[f"{depth}.weight"] = weight[index].detach().T.contiguous().cpu()
            state[f"{depth}.bias"] = bias[index, 0].detach().clone().cpu()
        return state

    @torch.no_grad()
    def load_head(self, index: int, state: State) -> None:
        """Put tensors that `head` gave in the place of head `index`."""
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            weight[index].copy_(state[f"{depth}.weight"].T)
            bias[index, 0].copy_(state[f"{depth}.bias"])

    def losses(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy (P, n) and whether the prediction is right (P, n), of features (P, n, d) and targets (P, n)."""
        logits = self(features)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        return loss, logits.detach().argmax(dim=2) == targets


class PackedHeads:
    """T × M trained heads of one form, evaluated on the same rows in one product.

    Parameters
    ----------
    heads : sequence of T sequences of M states
        As `HeadEnsemble.head` gives them, all of one form.
    device : str
        Where the product is computed.

    Raises
    ------
    ValueError
        If the heads are not of one form.
    """

    def __init__(self, heads: Sequence[Sequence[State]], device: str = "cpu"):
        self.num_epochs, self.num_members = len(heads), len(heads[0])
        flat = [state for epoch in heads for state in epoch]
        forms = {tuple((name, tuple(tensor.shape)) for name, tensor in sorted(state.items())) for state in flat}
        if len(forms) != 1 or any(len(epoch) != self.num_members for epoch in heads):
            raise ValueError(f"heads: expected T × M heads of one form, found {len(forms)} forms")
        self.width, self.device = flat[0]["0.weight"].shape[1], device
        first = torch.cat([state["0.weight"] for state in flat])  # (P·h, d) or (P·K, d)
        self.first = (first.T.contiguous().to(device), torch.cat([state["0.bias"] for state in flat]).to(device))
        self.second = None
        if "1.weight" in flat[0]:
            weight = torch.stack([state["1.weight"].T for state in flat])  # (P, h, K)
            self.second = (weight.to(device), torch.stack([state["1.bias"] for state in flat])[:, None].to(device))
        self.num_classes = len(flat[0]["1.bias" if self.second else "0.bias"])

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, T, M, K) of features (n, d)."""
        check_matrix("features", features, self.width)
        x = torch.addmm(self.first[1], features.to(self.device), self.first[0])
        if self.second is not None:
            hidden = x.relu_().view(len(x), self.num_epochs * self.num_members, -1).transpose(0, 1)
            x = torch.baddbmm(self.second[1], hidden, self.second[0]).transpose(0, 1)
        return x.reshape(len(x), self.num_epochs, self.num_members, self.num_classes)


class HeadEntropies:
    """Per-epoch entropies of T × M trained heads, blocked so that what a product gives fits a cache.

    Parameters
    ----------
    heads, device
        As for `PackedHeads`.
    rows : int, optional
        At most so many rows in a product. Does not affect results beyond rounding.

    Notes
    -----
    One product for all T × M heads where K is small. Where their logits of 512 rows exceed the block, a product takes the
    members of some epochs only: with fewer rows it would wait for its weights.
    """

    def __init__(self, heads: Sequence[Sequence[State]], device: str = "cpu", rows: int | None = None):
        outputs = len(heads[0]) * max(len(tensor) for tensor in heads[0][0].values() if tensor.ndim == 1)
        step = max(1, BLOCK_BYTES // (4 * 512 * outputs))
        self.products = [PackedHeads(heads[start : start + step], device) for start in range(0, len(heads), step)]
        self.rows = rows_per_product(min(step, len(heads)) * outputs)
        self.rows = self.rows if rows is None else min(rows, self.rows)

    @torch.no_grad()
    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Entropies (n, T) in bits, on the CPU, of features (n, d)."""
        parts = [
            torch.cat([epoch_entropies(product.logits(part)) for product in self.products], dim=1).cpu()
            for part in features.split(self.rows)
        ]
        return torch.cat(parts)


def rows_per_product(num_outputs: int) -> int:
    """How many rows keep `num_outputs` float32 logits per row within a block."""
    return int(np.clip(BLOCK_BYTES // (4 * num_outputs), 1, 8192))
