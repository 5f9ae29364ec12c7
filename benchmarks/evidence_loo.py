"""Do leave-one-out margins find wrong labels better, and where do rare classes stand?

    python benchmarks/evidence_loo.py CIFAR10_TRAIN.npz FEATURES.npy [ROWS.npy] [FEATURES.npy ROWS.npy …]

CIFAR10_TRAIN.npz holds labels of CIFAR-10N (`clean`, `worst`, `aggregate`); each FEATURES.npy (n, d) the embeddings of its
images, of those in ROWS.npy (n,) where they are not all. Prints Markdown and writes it to benchmarks/evidence_loo.md.
"""

import datetime
import os
import platform
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from ops.gaussian import Gaussians, GaussianStats
from ops.ranks import RankSketch

SIZES = (1_500, 5_000, 10_000, 50_000)
LABELS = ("worst", "aggregate")
SEEDS, WIDE = 3, 512  # one cut where features are wider


def fitted(features: np.ndarray, labels: np.ndarray, shrinkage: str) -> Gaussians | None:
    stats = GaussianStats(int(labels.max()) + 1, features.shape[1]).update(features, labels)
    try:
        return stats.fit(shrinkage, (features, labels) if shrinkage == "auto" else None)
    except ValueError:  # singular
        return None


def found(features: np.ndarray, labels: np.ndarray, wrong: np.ndarray) -> dict[str, tuple[float, float]]:
    """AUROC and average precision of margin for wrong labels: in-sample and left out, without shrinkage, with OAS, with auto."""
    rows = {}
    for shrinkage in ("none", "oas", "auto"):
        model = fitted(features, labels, shrinkage)
        for left_out in (False, True) if model is not None else ():
            margin = model.scores(features.astype(np.float64), labels, fitted=left_out).margin
            if np.isfinite(margin).all():
                name = f"{shrinkage}, {'left out' if left_out else 'in-sample'}"
                rows[name] = (roc_auc_score(wrong, margin), average_precision_score(wrong, margin))
    return rows


def label_errors(features: np.ndarray, truth: np.ndarray, given: np.ndarray, size: int) -> list[str]:
    seeds = 1 if size == len(features) or features.shape[1] > WIDE else SEEDS
    runs = []
    for seed in range(seeds):
        rows = np.sort(np.random.default_rng(seed).permutation(len(features))[:size])
        runs.append(found(features[rows], given[rows], truth[rows] != given[rows]))
    cells = []
    for name in ("none, in-sample", "oas, in-sample", "none, left out", "auto, in-sample", "auto, left out"):
        values = np.array([run[name] for run in runs if name in run])
        cells.append(" / ".join(f"{v:.3f}" for v in values.mean(axis=0)) if len(values) == seeds else "singular")
    return cells


def long_tail(features: np.ndarray, truth: np.ndarray) -> list[list[str]]:
    """Mean percentile rank of each class by rmd and by rmd_loo, classes of 1 to 500 clean samples."""
    sizes = np.unique(np.geomspace(1, 500, 10).round().astype(int))
    sizes = np.concatenate([sizes, np.full(10 - len(sizes), 500)])
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(np.flatnonzero(truth == k))[:n] for k, n in enumerate(sizes)])
    x, y = features[rows], truth[rows]
    model = fitted(x, y, "auto")
    scores = model.scores(x.astype(np.float64), y, fitted=True)
    ranks = []
    for values in (scores.rmd, scores.rmd_loo):
        sketch = RankSketch()
        sketch.add(values)
        ranks.append(sketch.table().fraction(values))
    told = []
    for k, n in enumerate(sizes):
        by = [r[y == k][np.isfinite(r[y == k])] for r in ranks]
        told.append([str(n), *(f"{r.mean():.2f}" if len(r) else "null" for r in by)])
    return told


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def main(corpus: str, *files: str) -> None:
    labels = np.load(corpus, allow_pickle=False)
    truth, errors, tails = labels["clean"].astype(np.int64), [], []
    for features_file, rows_file in zip(files[::2], [*files[1::2], ""]):
        features = np.load(features_file).astype(np.float32)
        rows = np.load(rows_file)[: len(features)] if rows_file else np.arange(len(features))
        for name in LABELS:
            given = labels[name].astype(np.int64)[rows]
            for size in [size for size in SIZES if size <= len(features)]:
                what = [Path(features_file).stem, str(features.shape[1]), name, f"{size:,}"]
                errors.append(what + label_errors(features, truth[rows], given, size))
        tails.append(
            f"{Path(features_file).stem}:\n\n" + table(["samples", "rmd", "rmd_loo"], long_tail(features, truth[rows]))
        )
    head = [
        "features",
        "d",
        "labels",
        "N",
        "none, in-sample",
        "oas, in-sample",
        "none, left out",
        "auto, in-sample",
        "auto, left out",
    ]
    text = f"""# What leaving a sample out changes

{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), numpy {np.__version__}.
Written by `benchmarks/evidence_loo.py`.

## Wrong labels found by margin

AUROC / average precision of "the human label differs from the clean one" on CIFAR-10N; up to {SEEDS} random cuts of each size, their mean.
Before: margin in-sample, without shrinkage where the covariance allowed it, else OAS. Now: auto, left out.

{table(head, errors)}

## A long tail

Clean labels, classes of 1 to 500 samples: mean percentile rank (1 = hardest) of each class by rmd and by rmd_loo.

{chr(10).join(tails)}
"""
    print(text)
    Path(__file__).with_name("evidence_loo.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
