"""The votes of a run's neighbours as `score` reads them, where the run has `neighbors/`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ops.ranks import RankSketch, RankTable
from pipelines.runs import column_groups
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import merged_parts

NEIGHBORS = "neighbors"


def source_of(run: Run, embedded: Sequence[dict[str, Any]]) -> str | None:
    """What the votes of a run are made from; None unless every shard has them, of the embeddings that are there now."""
    found = column_groups.all_facts(run.uri, NEIGHBORS, len(embedded))
    if any(f is None for f in found) or any(f["embeddings"] != e["source"] for f, e in zip(found, embedded)):
        return None
    if "vote" not in column_groups.schema(run.uri, NEIGHBORS).names:
        return None
    return fingerprint(NEIGHBORS, [f["source"] for f in found])


def of_shard(run_uri: str, shard: int) -> np.ndarray:
    """The votes (rows,) float32 of a shard's samples, NaN where there is none."""
    column = column_groups.read(run_uri, NEIGHBORS, shard, ["vote"])["vote"]
    return np.asarray(column.fill_null(np.nan).to_numpy(), np.float32)


def ranks(run: Run) -> RankTable:
    """Where a vote stands among those of all samples of a run."""
    sketch = RankSketch()
    items = [(run.uri, shard) for shard in range(len(run.shards))]
    for part, _ in merged_parts(of_shard, items, merge=_joined):
        sketch.add(part)
    return sketch.table()


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one, other])
