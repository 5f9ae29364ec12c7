"""What miscalibrates a small network (Guo et al. 2017): depth, width, batch normalisation, weight decay, and training on.

python -m benchmarks.evidence_miscalibration --train RUN --test RUN --out FOLDER

Fully connected networks on embeddings; ECE and NLL on the test run, before and after the temperature that is fitted on a
tenth of the training run held out. One seed per point, three for the epochs. Embeddings are read into memory.
"""

import argparse
import datetime
import json
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from benchmarks.heads import arrays, encoder_of, replace_section, spread, table
from ops.calibration import (
    TemperatureScaling,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_curve,
)
from ops.losses import cross_entropy
from pipelines.evaluation import figures
from pipelines.runs.record import Run

BASE = {"depth": 2, "width": 256, "norm": False, "weight_decay": 0.0}
SWEEPS = {
    "depth": (0, 1, 2, 4),
    "width": (16, 64, 256, 1024),
    "norm": (False, True),
    "weight_decay": (0.0, 1e-4, 1e-3, 1e-2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder for the figures and the numbers")
    parser.add_argument("--report", type=Path, default=Path("benchmarks/miscalibration.md"))
    parser.add_argument("--epochs", type=int, default=20)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train, test = arrays(asked.train), arrays(asked.test)
    rows, found = [], {}
    for name, values in SWEEPS.items():
        for value in values:
            curve, _ = fit(train, test, asked.epochs, seed=0, **BASE | {name: value})
            rows.append([name, str(value), *cells([curve[-1]])])
            found[f"{name}={value}"] = curve
            print(name, value, curve[-1], flush=True)
    curves = [fit(train, test, asked.epochs, seed=seed, **BASE) for seed in range(3)]
    found["seeds"] = [curve for curve, _ in curves]
    draw(asked.out, [curve for curve, _ in curves], curves[0][1], test[1])
    (asked.out / "results.json").write_text(json.dumps(found, indent=1))
    epochs = [[str(e + 1), *cells([curve[e] for curve, _ in curves])] for e in epochs_shown(asked.epochs)]
    head = ["accuracy", "train accuracy", "ECE", "NLL", "T", "ECE after", "NLL after"]
    text = (
        f"{datetime.date.today()}, {encoder_of(Run.open(asked.test))}; base {BASE}, SGD 0.05, momentum 0.9, batch 128, "
    )
    text += f"cosine, {asked.epochs} epochs; in percent but for NLL (nats) and T\n\n"
    text += table(["what", "value", *head], rows) + "\nthe base over epochs, three seeds\n\n"
    replace_section(asked.report, "tables", text + table(["epoch", *head], epochs))


def network(d: int, classes: int, depth: int, width: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Linear(width if number else d, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else d, classes))


def fit(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    epochs: int,
    seed: int,
    depth: int,
    width: int,
    norm: bool,
    weight_decay: float,
) -> tuple[list[dict], np.ndarray]:
    """The metrics after each epoch, and the test logits at the end."""
    rng, _ = np.random.default_rng(seed), torch.manual_seed(seed)
    held = rng.random(len(train[1])) < 0.1
    x, y = (torch.from_numpy(part[~held]) for part in train)
    mean, std = x.mean(dim=0), x.std(dim=0)
    model = network(x.shape[1], int(y.max()) + 1, depth, width, norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve, logits = [], np.zeros(0)
    for _ in range(epochs):
        model.train()
        right = 0
        for rows in torch.from_numpy(rng.permutation(len(y))).split(128):
            out = model((x[rows] - mean) / std)
            optimizer.zero_grad()
            cross_entropy(out, y[rows]).mean().backward()
            optimizer.step()
            right += int((out.argmax(dim=1) == y[rows]).sum())
        schedule.step()
        model.eval()
        with torch.no_grad():
            held_logits, logits = (
                model((torch.from_numpy(part) - mean) / std).double().numpy() for part in (train[0][held], test[0])
            )
        temperature = TemperatureScaling().fit(held_logits, train[1][held]).temperature
        curve.append({"train_accuracy": right / len(y), **measures(logits, test[1], temperature)})
    return curve, logits


def measures(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, float]:
    before, after = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    return {
        "accuracy": float((logits.argmax(axis=1) == labels).mean()),
        "ece": expected_calibration_error(before, labels),
        "nll": negative_log_likelihood(before, labels),
        "temperature": temperature,
        "ece_after": expected_calibration_error(after, labels),
        "nll_after": negative_log_likelihood(after, labels),
    }


def cells(found: list[dict]) -> list[str]:
    percent = [(m, 100.0, 2) for m in ("accuracy", "train_accuracy", "ece")]
    shown = [*percent, ("nll", 1.0, 3), ("temperature", 1.0, 2), ("ece_after", 100.0, 2), ("nll_after", 1.0, 3)]
    return [spread([entry[m] for entry in found], scale, digits) for m, scale, digits in shown]


def epochs_shown(epochs: int) -> list[int]:
    return sorted({min(e, epochs) - 1 for e in (1, 2, 3, 5, 8, 12, 16, 20, 30)})


def draw(out: Path, curves: list[list[dict]], logits: np.ndarray, labels: np.ndarray) -> None:
    """NLL and error over epochs; reliability before and after the temperature of the last one."""
    epochs = list(range(1, len(curves[0]) + 1))
    mean = {m: [float(np.mean([c[e][m] for c in curves])) for e in range(len(epochs))] for m in ("nll", "accuracy")}
    series = {"NLL, nats": (epochs, mean["nll"]), "error": (epochs, [1 - a for a in mean["accuracy"]])}
    figure = figures.lines(series, "epoch", "on the test run", "NLL rises while the error does not")
    (out / "epochs.png").write_bytes(figures.png(figure))
    for name, temperature in (("before", 1.0), ("after", curves[0][-1]["temperature"])):
        probs = softmax(logits / temperature, axis=1)
        count, accuracy, confidence = reliability_curve(probs, labels)
        curve = np.stack([count, count * accuracy, count * confidence], axis=1)
        ece = expected_calibration_error(probs, labels)
        (out / f"reliability-{name}.png").write_bytes(figures.png(figures.reliability_diagram(curve, name, ece)))


if __name__ == "__main__":
    main()
