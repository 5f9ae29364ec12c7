"""The space of a run's neighbours, and samples of its vectors taken evenly over the run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ops.whitening import Moments, Whitening
from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order, merged_parts


def whitening_of(run: Run) -> Whitening:
    """The whitening by mean and covariance of all embeddings of a run, labelled or not."""
    embedded = run.embedding_facts()
    first = next(shard for shard, facts in enumerate(embedded) if facts["rows"])
    batch = next(column_groups.iter_batches(run.uri, columns.EMBEDDINGS, first, ["embedding"]))
    # Rounded to float32, so that a feature which is the same in every sample differs from it by nothing.
    pilot = columns.vectors(batch["embedding"]).astype(np.float64).mean(axis=0).astype(np.float32).astype(np.float64)
    items = [(shard,) for shard in range(len(embedded))]
    total = None
    for part, _ in merged_parts(_moments, items, run.uri, pilot, merge=Moments.merge):
        total = part if total is None else total.merge(part)
    return total.whitening(pilot)


def _moments(shard: int, run_uri: str, pilot: np.ndarray) -> Moments:
    """Ray task: the moments of a shard's embeddings."""
    batches = column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, ["embedding"])
    total = Moments(0, np.zeros(len(pilot)), np.zeros((len(pilot), len(pilot))))
    for batch in batches:
        total = total.merge(Moments.of(columns.vectors(batch["embedding"]), pilot))
    return total


def even_sample(run: Run, embedded: Sequence[dict[str, Any]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` samples, evenly spaced over the run however it is cut: their shard and row (n, 2), embeddings (n, d)."""
    total = sum(facts["rows"] for facts in embedded)
    step = max(1, -(-total // most))
    offsets = np.cumsum([0, *(facts["rows"] for facts in embedded)])[:-1]
    items = [(shard, int(-offset % step)) for shard, offset in enumerate(offsets)]
    places, vectors = zip(*in_order(_every, items, run.uri, step))
    return np.concatenate(places), np.concatenate(vectors)


def _every(shard: int, first: int, run_uri: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Ray task: every `step`-th sample of a shard."""
    table = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row", "embedding"])
    rows = table["row"].to_numpy()[first::step]
    return np.stack([np.full_like(rows, shard), rows], axis=1), columns.vectors(table["embedding"])[first::step]
