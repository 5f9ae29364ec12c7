"""What do fitting and scoring Gaussians cost? The fit against one XᵀX, one-product scoring against two inverses.

    python benchmarks/bench_gaussian.py

prints Markdown and writes it to benchmarks/gaussian.md. float32, one thread; about a minute. Times are CPU times, so
that other work on the machine doesn't count.
"""

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import threadpoolctl

from ops.gaussian import Gaussians, GaussianStats

ROWS, DIM, CLASSES = 200_000, 512, 100
REPEATS = 2


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ROWS)
    scales = np.geomspace(1, 0.02, DIM, dtype=np.float32)  # condition number 2,500, as of common encoders
    rotation = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    features = rng.standard_normal((ROWS, DIM), np.float32) + rng.standard_normal((CLASSES, DIM), np.float32)[labels]
    return (features * scales) @ rotation + np.float32(0.5), labels


def seconds(function: Callable[[], object]) -> float:
    """CPU time, the best of a few runs."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def two_inverses(model: Gaussians, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """rmd by eq. 5-7 as written: a d x d product for each of the two quadratic forms."""
    within, agnostic = (np.linalg.inv(c).astype(np.float32) for c in (model.covariance, model.covariance_agn))
    own = features - model.class_means.astype(np.float32)[labels]
    all_ = features - model.mean.astype(np.float32)
    return np.einsum("nd,nd->n", own @ within, own) - np.einsum("nd,nd->n", all_ @ agnostic, all_)


def to_every_class(model: Gaussians, features: np.ndarray) -> np.ndarray:
    """md to all classes by the inverse, a d x d product for each, as common implementations do."""
    within = np.linalg.inv(model.covariance).astype(np.float32)
    offsets = (features - mean for mean in model.class_means.astype(np.float32))
    return np.stack([np.einsum("nd,nd->n", x @ within, x) for x in offsets], axis=1)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fitting(features: np.ndarray, labels: np.ndarray) -> str:
    def update(x: np.ndarray) -> GaussianStats:
        return GaussianStats(CLASSES, DIM).update(x, labels)

    stats, doubles = update(features), features.astype(np.float64)
    timed = {
        "one XᵀX (the floor)": lambda: features.T @ features,
        "`GaussianStats.update`, float32": lambda: update(features),
        "`GaussianStats.update`, float64": lambda: update(doubles),
        "`GaussianStats.fit`": lambda: stats.fit("auto"),
        "`GaussianStats.merge`": lambda: stats.merge(stats),
    }
    times = {name: seconds(function) for name, function in timed.items()}
    floor = next(iter(times.values()))
    return table(["", "seconds", "of the floor"], [[name, f"{t:.3f}", f"{t / floor:.2f}"] for name, t in times.items()])


def scoring(features: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    model = GaussianStats(CLASSES, DIM).update(features, labels).fit()
    model.agnostic_distances(features[:1])  # the eigenproblem, solved once per model
    few = ROWS // 25
    timed = {
        "`distances`: one product": (lambda: model.distances(features, labels), 1),
        "rmd by two inverses": (lambda: two_inverses(model, features, labels), 1),
        "`scores`: nearest class and margin too": (lambda: model.scores(features, labels), 1),
        f"md to {CLASSES} classes by the inverse, {CLASSES} products": (
            lambda: to_every_class(model, features[:few]),
            25,
        ),
    }
    times = {name: times_rows * seconds(function) for name, (function, times_rows) in timed.items()}
    floor = next(iter(times.values()))
    rows = [[name, f"{t:.2f}", f"{1e6 * t / ROWS:.1f}", f"{t / floor:.1f}"] for name, t in times.items()]
    return table(["", "seconds", "µs per row", "relative"], rows), accuracy(model, features, labels)


def accuracy(model: Gaussians, features: np.ndarray, labels: np.ndarray) -> str:
    x, y = features[:2000], labels[:2000]
    exact = model.distances(x.astype(np.float64), y).rmd
    one = np.abs(model.distances(x, y).rmd - exact).max() / exact.std()
    two = np.abs(two_inverses(model, x, y) - exact).max() / exact.std()
    return (
        f"Largest error of rmd in float32, in its standard deviations: one product {one:.1e}, two inverses {two:.1e}."
    )


def main() -> None:
    threadpoolctl.threadpool_limits(1)  # CPU time of one thread is what repeats
    features, labels = embeddings()
    score_table, errors = scoring(features, labels)
    text = f"""# What fitting and scoring Gaussians costs

{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), of which one thread is used;
numpy {np.__version__}, scipy {scipy.__version__}. N = {ROWS:,}, d = {DIM}, K = {CLASSES}, float32;
CPU time, best of {REPEATS}. Written by `benchmarks/bench_gaussian.py`.

## Fitting

The first 16,384 rows take their products in float64; over many rows the cost nears the floor.

{fitting(features, labels)}

## Scoring

The last row of the table is measured on a 25th of the rows.

{score_table}

{errors}
"""
    print(text)
    Path(__file__).with_name("gaussian.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
