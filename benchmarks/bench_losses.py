"""What do the losses cost? Selective AURC, O(nM), against the sorting form; each loss against cross entropy.

    python benchmarks/bench_losses.py

prints Markdown and writes it to benchmarks/losses.md. Forward and backward, float32, one thread; about a minute. Times
are CPU times, so that other work on the machine doesn't count.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ops.losses import LOSSES, aurc, cross_entropy, dual_focal, selective_aurc

CLASSES = 10  # few, so that the weights and not the softmax are what is timed
SIZES = [2**power for power in range(8, 21, 2)]
BATCH, WIDE = 4096, 1000
SPECIAL = ("difficulty_entropy", "kde_cross_entropy")


def random_batch(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits.requires_grad_(), torch.randint(0, classes, (n,), generator=generator)


def seconds(loss: Callable[..., torch.Tensor], logits: torch.Tensor, targets: torch.Tensor, **options) -> float:
    """CPU time of a forward and backward pass, the median after one to warm up."""
    times = []
    while len(times) < 4 or (sum(times) < 0.5 and len(times) < 200):
        logits.grad = None
        start = time.process_time()
        loss(logits, targets, **options).mean().backward()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaling() -> str:
    rows = []
    for n in SIZES:
        logits, targets = random_batch(n, CLASSES)
        plain = seconds(cross_entropy, logits, targets)
        sorting = seconds(aurc, logits, targets)
        binned = [seconds(selective_aurc, logits, targets, edges=torch.linspace(0, 1, m + 1)) for m in (16, 64)]
        rows.append([f"2^{n.bit_length() - 1}", *(f"{1e3 * t:.2f}" for t in (plain, sorting, *binned))])
    return table(["n", "cross entropy", "aurc (sorts)", "selective_aurc, M = 16", "selective_aurc, M = 64"], rows)


def contenders() -> list[tuple[str, Callable[..., torch.Tensor], dict]]:
    """Every loss of the registry once: what to print, the function, its options. The slowest one last."""
    per_sample = torch.linspace(0, 1, BATCH)
    plain = [(f"`{name}`", loss, {}) for name, loss in LOSSES.items() if name == loss.__name__ and name not in SPECIAL]
    return [
        ("`torch.nn.functional.cross_entropy` (no checks)", torch.nn.functional.cross_entropy, {}),
        *plain,
        ("`dual_focal`, released", dual_focal, {"variant": "released"}),
        ("`difficulty_entropy`", LOSSES["difficulty_entropy"], {"weight": per_sample}),
        ("`correctness_ranking`", LOSSES["correctness_ranking"], {"correctness": per_sample}),
        ("`kde_cross_entropy`, bandwidth given", LOSSES["kde_cross_entropy"], {"bandwidth": 0.05}),
    ]


def relative_costs() -> str:
    logits, targets = random_batch(BATCH, WIDE)
    reference = seconds(cross_entropy, logits, targets)
    rows = [
        [label, *cost(seconds(loss, logits, targets, **options), reference)] for label, loss, options in contenders()
    ]
    return table(["loss", "ms", "relative"], rows)


def cost(time_s: float, reference_s: float) -> list[str]:
    return [f"{1e3 * time_s:.1f}", f"{time_s / reference_s:.2f}"]


def main() -> None:
    torch.set_num_threads(1)
    conditions = (
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), of which one thread is used; torch "
        f"{torch.__version__}, float32, forward + backward, median CPU time. Written by `benchmarks/bench_losses.py`."
    )
    text = f"""# What the losses cost

{conditions}

## Selective AURC, O(nM), against the form that sorts

Milliseconds per batch of n samples, {CLASSES} classes.
Both grow linearly here: a CPU sorts a batch faster than it takes M sigmoids per sample.
What the bins buy is a weight with a gradient, not time.

{scaling()}

## Each loss against cross entropy

A batch of {BATCH} × {WIDE}, default options. The checks of shapes, labels and NaN are included.

{relative_costs()}
"""
    print(text)
    Path(__file__).with_name("losses.md").write_text(text)


if __name__ == "__main__":
    main()
