"""Heads of a confusion ensemble: what does one product for all of them save against a loop over them?

    python benchmarks/bench_confusion.py

prints Markdown and writes it to benchmarks/confusion.md. Float32, one thread; about a minute. Times are CPU times, so that
other work on the machine doesn't count.
"""

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ops.head_ensemble import HeadEnsemble, HeadEntropies

EPOCHS, MEMBERS = 20, 3
SHAPES = [(256, 10, 8192), (512, 100, 2048), (768, 1000, 512)]  # d, K, rows
LOOP_BATCH = 1024


def seconds(work: Callable[[], object], least: float = 0.5) -> float:
    """CPU time of a call, the median after one to warm up."""
    times = []
    while len(times) < 4 or sum(times[1:]) < least:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def loop(modules: list[list[nn.Module]], features: torch.Tensor) -> torch.Tensor:
    """The plain way: one model after the other over batches, probabilities averaged, entropy, mean over epochs."""
    scores = []
    for part in features.split(LOOP_BATCH):
        total = torch.zeros(len(part))
        for members in modules:
            mean = sum(torch.softmax(module(part), dim=1) for module in members) / len(members)
            total += torch.special.entr(mean).sum(dim=1) / math.log(2)
        scores.append(total / len(modules))
    return torch.cat(scores)


def as_module(state: dict[str, torch.Tensor]) -> nn.Module:
    layer = nn.Linear(state["0.weight"].shape[1], state["0.weight"].shape[0])
    layer.load_state_dict({"weight": state["0.weight"], "bias": state["0.bias"]})
    return layer


def scoring_row(width: int, classes: int, rows: int) -> list[str]:
    ensemble = HeadEnsemble(range(EPOCHS * MEMBERS), width, classes)
    states = [[ensemble.head(e * MEMBERS + m) for m in range(MEMBERS)] for e in range(EPOCHS)]
    together, modules = HeadEntropies(states), [[as_module(s) for s in members] for members in states]
    features = 3 * torch.randn(rows, width)
    torch.testing.assert_close(together(features).mean(dim=1), loop(modules, features), rtol=0, atol=1e-5)
    one, many = seconds(lambda: together(features)), seconds(lambda: loop(modules, features))
    product = seconds(lambda: [p.logits(x) for x in features.split(together.rows) for p in together.products])
    return [
        str(width), str(classes), f"{rows / one:,.0f}", f"{rows / many:,.0f}", f"{many / one:.2f}", f"{100 * product / one:.0f} %",
        f"{1e6 / (rows / one) / 60:.1f}",
    ]  # fmt: skip


def training_row(width: int, classes: int, _: int, batch: int = 128) -> list[str]:
    features, targets = torch.randn(MEMBERS, batch, width), torch.randint(0, classes, (MEMBERS, batch))
    together = HeadEnsemble(range(MEMBERS), width, classes)
    alone = [HeadEnsemble([seed], width, classes) for seed in range(MEMBERS)]
    work = [(together, features, targets, torch.optim.AdamW(together.parameters()))]
    single = [
        (e, features[i : i + 1], targets[i : i + 1], torch.optim.AdamW(e.parameters())) for i, e in enumerate(alone)
    ]
    batched, looped = seconds(lambda: steps(work)), seconds(lambda: steps(single))
    return [
        str(width),
        str(classes),
        f"{1e3 * batched / 20:.2f}",
        f"{1e3 * looped / 20:.2f}",
        f"{looped / batched:.2f}",
    ]


def steps(trainings: list[tuple], count: int = 20) -> None:
    for ensemble, features, targets, optimizer in trainings:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            ensemble.losses(features, targets)[0].mean(dim=1).sum().backward()
            optimizer.step()


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scoring = table(
        ["d", "K", "one product, rows/s", "loop, rows/s", "ratio", "product's share", "minutes per million rows"],
        [scoring_row(*shape) for shape in SHAPES],
    )
    training = table(
        ["d", "K", "batched, ms per step", "one by one, ms", "ratio"], [training_row(*shape) for shape in SHAPES]
    )
    text = f"""# Heads of a confusion ensemble, one product against a loop

{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, one thread of {os.cpu_count()} cores, CPU seconds.
`python benchmarks/bench_confusion.py`

Scoring: {MEMBERS} members × {EPOCHS} epochs of linear heads, softmax, mean, entropy and mean over epochs included; the loop works in
batches of {LOOP_BATCH:,} rows. Both give the same scores within 1e-5 (checked).

{scoring}

Training: one AdamW step of {MEMBERS} members, 128 rows each.

{training}
"""
    print(text)
    (Path(__file__).parent / "confusion.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
