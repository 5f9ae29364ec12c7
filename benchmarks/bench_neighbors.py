"""How fast exact search is beside one product, and what search by cells finds for how much arithmetic.

    python benchmarks/bench_neighbors.py speed --rows 20000
    python benchmarks/bench_neighbors.py cells --rows 1e6

`speed` times, one after the other and twice, the product of blocks alone, `ops.neighbors.nearest`, and the same search by torch's
topk, by numpy's argpartition and, where they are installed, by faiss and usearch. `cells` draws a mixture of 500 clusters, each with
24 directions of its own in 256 dimensions, whitens it, and counts for 1,000 queries what the stage's choice of probes finds.
"""

import argparse
import importlib.util
import time

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ops.cells import fit_cells, nearest_cells, recall_by_probes
from ops.neighbors import nearest
from ops.whitening import Moments
from pipelines.neighbors.stage import CELL_SAMPLE, RECALL, SAMPLED

D, K, CLUSTERS, DIRECTIONS, BLOCK = 256, 30, 500, 24, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "cells"))
    parser.add_argument("--rows", type=float, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        {"speed": speed, "cells": cells}[options.what](int(options.rows), options.threads)


def speed(rows: int, threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((rows, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ways = {"product": _product, "nearest": _nearest, "torch topk": _topk, "argpartition": _argpartition}
    ways |= {name: way for name, way in (("faiss", _faiss), ("usearch", _usearch)) if importlib.util.find_spec(name)}
    for _ in range(2):
        seconds = {name: _timed(way, x, threads) for name, way in ways.items()}
        print({name: f"{s:.2f} s = {s / seconds['product']:.2f} products" for name, s in seconds.items()}, flush=True)


def _timed(way, x: np.ndarray, threads: int) -> float:
    started = time.perf_counter()
    way(x, threads)
    return time.perf_counter() - started


def _product(x: np.ndarray, threads: int) -> None:
    out = np.empty((BLOCK, len(x)), np.float32)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        np.matmul(rows, x.T, out=out[: len(rows)])


def _nearest(x: np.ndarray, threads: int) -> None:
    nearest(x, x, K, own=np.arange(len(x)))


def _topk(x: np.ndarray, threads: int) -> None:
    tensor = torch.from_numpy(x)
    for start in range(0, len(x), BLOCK):
        torch.topk(tensor[start : start + BLOCK] @ tensor.T, K + 1, dim=1)


def _argpartition(x: np.ndarray, threads: int) -> None:
    for start in range(0, len(x), BLOCK):
        np.argpartition(x[start : start + BLOCK] @ x.T, len(x) - K - 1, axis=1)


def _faiss(x: np.ndarray, threads: int) -> None:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(D)
    index.add(x)
    index.search(x, K + 1)


def _usearch(x: np.ndarray, threads: int) -> None:
    from usearch.index import MetricKind, search

    search(x, x, K + 1, MetricKind.IP, exact=True, threads=threads)


def cells(rows: int, threads: int) -> None:
    x = whitened_mixture(rows)
    count = round(2 * np.sqrt(rows))
    centres = fit_cells(x[:: max(1, rows // (CELL_SAMPLE * count))], count)
    own = nearest_cells(x, centres, 1)[:, 0]
    queries = np.arange(0, rows, rows // SAMPLED)[:SAMPLED]
    homes = own[nearest(x[queries], x, K, own=queries).positions]
    probes = int(np.searchsorted(recall_by_probes(x[queries[::2]], centres, homes[::2]), RECALL)) + 1
    measured = recall_by_probes(x[queries[1::2]], centres, homes[1::2])[probes - 1]
    searched = np.bincount(own, minlength=count)[nearest_cells(x[queries[1::2]], centres, probes)].sum(axis=1).mean()
    # Of N² d multiplications: rows looked into, filing, choosing cells, k-means, and the sample's exact search.
    share = searched / rows + 2 * count / rows + 8 * CELL_SAMPLE * (count / rows) ** 2 + SAMPLED / rows
    print(
        f"N {rows:,}, {count:,} cells, {probes} probes: recall {measured:.3f}, {searched:,.0f} rows of each query, "
        f"1/{1 / share:.0f} of the arithmetic of exact search"
    )


def whitened_mixture(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, D)).astype(np.float32)
    bases = rng.standard_normal((CLUSTERS, DIRECTIONS, D)).astype(np.float32) / np.float32(np.sqrt(DIRECTIONS))
    cluster, x = rng.integers(0, CLUSTERS, rows), np.empty((rows, D), np.float32)
    order = np.argsort(cluster, kind="stable")
    for number, of_it in enumerate(np.split(order, np.searchsorted(cluster[order], np.arange(1, CLUSTERS)))):
        inside = rng.standard_normal((len(of_it), DIRECTIONS)).astype(np.float32) @ bases[number]
        x[of_it] = centres[number] + inside + 0.2 * rng.standard_normal((len(of_it), D)).astype(np.float32)
    pilot = x[:1000].mean(axis=0, dtype=np.float64)
    whitening = Moments.of(x[:: max(1, rows // 100_000)], pilot).whitening(pilot)
    return whitening.apply(x)


if __name__ == "__main__":
    main()
