"""Why does the AU loss (Zhou et al., eq. 19–23) train badly with the paper's ν, and which ν trains?

python -m benchmarks.evidence_au --train RUN --test RUN

Its gradient has two parts: cross entropy's, weighted, and that of the weight itself, which lowers the confidence of every
sample below τ and grows as 1/ν. Measured: the parts' ratio; heads over ν and coverage; without the second part; with the
released code's confidence, softmax of softmax; after some epochs of cross entropy; by SGD. Embeddings are read into memory.
"""

import argparse
import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from benchmarks.heads import arrays, encoder_of, replace_section, spread, table
from ops.calibration import TemperatureScaling, expected_calibration_error, negative_log_likelihood
from ops.losses import cross_entropy, selective_aurc
from pipelines.runs.record import Run

Loss = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]
NU = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 2.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the table: which loss, and how it is trained; `warmup` epochs of cross entropy come first."""

    name: str
    loss: Loss
    optimizer: str = "AdamW"
    lr: float = 1e-3
    warmup: int = 0


def au(nu: float = 0.1, coverage: float = 0.75) -> Loss:
    return lambda logits, targets: selective_aurc(logits, targets, coverage=coverage, nu=nu)


def detached(logits: Tensor, targets: Tensor, nu: float = 0.1) -> Tensor:
    """AU's weights as constants."""
    own = cross_entropy(logits, targets)
    weight = selective_aurc(logits.detach(), targets, nu=nu) / own.detach().clamp_min(1e-12)
    return weight * own


def softmax_twice(logits: Tensor, targets: Tensor, nu: float = 0.1) -> Tensor:
    """AU where the confidence is that of softmax(softmax(logits)), as the released configurations have it."""
    probs = logits.softmax(dim=1)
    weight = selective_aurc(probs, targets, nu=nu) / cross_entropy(probs, targets)  # of softmax(probs)
    return weight * cross_entropy(logits, targets)


def cases() -> list[Case]:
    sgd = {"optimizer": "SGD", "lr": 0.05}
    return [
        Case("cross entropy", cross_entropy),
        *(Case(f"AU, ν {nu:g}", au(nu)) for nu in NU),
        *(Case(f"AU, ν {nu:g}, coverage {c:g}", au(nu, c)) for c in (0.5, 0.9) for nu in (0.1, 0.3)),
        Case("AU, ν 0.1, its weights constant", detached),
        Case("AU, ν 0.1, softmax twice", softmax_twice),
        *(Case(f"AU, ν 0.1, after {epochs} epochs of CE", au(), warmup=epochs) for epochs in (1, 3)),
        Case("cross entropy, SGD", cross_entropy, **sgd),
        *(Case(f"AU, ν {nu:g}, SGD", au(nu), **sgd) for nu in (0.1, 0.3)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/au_loss.md"))
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train, test = standardised(arrays(asked.train), arrays(asked.test))
    text = f"{datetime.date.today()}, mlp:512 on {encoder_of(Run.open(asked.test))}, {asked.samples:,} training and "
    text += f"{len(test[1]):,} test samples, {asked.epochs} epochs, cosine, batch 128, AdamW 1e-3 or SGD 0.05 with momentum "
    text += (
        f"0.9, weight decay 5e-4, {asked.seeds} seeds\n\n"
        + ratios(train)
        + "\nin percent but for NLL (nats) and T, the temperature that the test samples want (below 1: underconfident)\n\n"
    )
    rows = []
    for case in cases():
        found = [fit(case, train, test, asked, seed) for seed in range(asked.seeds)]
        scales = {"NLL": (1.0, 3), "T": (1.0, 2)}
        rows.append([case.name, *(spread([f[m] for f in found], *scales.get(m, (100.0, 2))) for m in found[0])])
        print(rows[-1], flush=True)
    replace_section(asked.report, "tables", text + table(["loss", *found[0]], rows))


def standardised(*splits: tuple[np.ndarray, np.ndarray]) -> list[Split]:
    mean, std = splits[0][0].mean(axis=0), splits[0][0].std(axis=0)
    return [(torch.from_numpy((x - mean) / std), torch.from_numpy(y)) for x, y in splits]


def network(train: Split) -> nn.Sequential:
    return nn.Sequential(nn.Linear(train[0].shape[1], 512), nn.ReLU(), nn.Linear(512, int(train[1].max()) + 1))


def ratios(train: Split) -> str:
    """The gradient of the weights over that of the weighted cross entropy, for a new head and after an epoch of CE."""
    torch.manual_seed(0)
    model = network(train)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [ratio(model, train, nu) for nu in NU]
    for rows in torch.randperm(len(train[1])).split(128):
        step(optimizer, cross_entropy(model(train[0][rows]), train[1][rows]).mean())
    after = [ratio(model, train, nu) for nu in NU]
    rows = [[name, *(f"{r:.2f}" for r in found)] for name, found in (("new head", before), ("after an epoch", after))]
    return "norm of the gradient of AU's weights over that of the weighted CE, by ν\n\n" + table(
        ["", *map(str, NU)], rows
    )


def ratio(model: nn.Module, train: Split, nu: float, batches: int = 50) -> float:
    of_weight = of_loss = 0.0
    for rows in torch.arange(128 * batches).split(128):
        logits, targets = model(train[0][rows]).detach().requires_grad_(), train[1][rows]
        (full,) = torch.autograd.grad(selective_aurc(logits, targets, nu=nu).mean(), logits)
        (part,) = torch.autograd.grad(detached(logits, targets, nu).mean(), logits)
        of_loss, of_weight = of_loss + float(part.norm()), of_weight + float((full - part).norm())
    return of_weight / of_loss


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit(case: Case, train: Split, test: Split, asked: argparse.Namespace, seed: int) -> dict[str, float]:
    """Metrics on the test samples after the last epoch."""
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    chosen = torch.from_numpy(rng.permutation(len(train[1]))[: asked.samples])
    model = network(train)
    sgd = {"momentum": 0.9, "nesterov": True} if case.optimizer == "SGD" else {}
    optimizer = getattr(torch.optim, case.optimizer)(model.parameters(), case.lr, weight_decay=5e-4, **sgd)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked.epochs)
    for epoch in range(asked.epochs):
        right = 0
        loss = cross_entropy if epoch < case.warmup else case.loss
        for rows in chosen[torch.from_numpy(rng.permutation(len(chosen)))].split(128):
            logits, targets = model(train[0][rows]), train[1][rows]
            step(optimizer, loss(logits, targets).mean())
            right += int((logits.argmax(dim=1) == targets).sum())
        schedule.step()
    with torch.no_grad():
        logits = model(test[0]).double().numpy()
    return {"train accuracy": right / len(chosen), **measures(logits, test[1].numpy())}


def measures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    probs, temperature = softmax(logits, axis=1), TemperatureScaling().fit(logits, labels).temperature
    return {
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
        "mean confidence": float(probs.max(axis=1).mean()),
        "ECE": expected_calibration_error(probs, labels),
        "NLL": negative_log_likelihood(probs, labels),
        "T": temperature,
    }


if __name__ == "__main__":
    main()
