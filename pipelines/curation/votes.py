"""What the neighbours of a run's samples say of their labels: from the lists in `neighbors/` and the labels of now."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ops.neighbors import vote
from ops.ranks import RankSketch, RankTable
from pipelines.runs import column_groups, columns
from pipelines.runs.labels import Which, labels_of
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order, merged_parts

NEIGHBORS = "neighbors"
LISTS = ["neighbor_shard", "neighbor_row", "similarity"]


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTable:
    """The labels of a run by shard and row: 4 bytes a sample.

    Attributes
    ----------
    starts : ndarray of shape (shards + 1,), int64
        Where each shard's labels begin.
    labels : ndarray of shape (N,), int32
        −1 = none.
    """

    starts: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, run_uri: str, num_shards: int, which: Which = "decided") -> "LabelTable":
        """The labels of a run's samples, those of dropped ones left out: they vote no more."""
        parts = list(in_order(_voting_labels, [(run_uri, shard) for shard in range(num_shards)], which))
        starts = np.cumsum([0, *map(len, parts)])
        labels = np.concatenate(parts) if parts else np.empty(0, np.int32)
        return cls(starts, labels)

    def at(self, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The labels of samples; arrays of any shape."""
        return self.labels[self.starts[shards] + rows]


def _voting_labels(run_uri: str, shard: int, which: Which) -> np.ndarray:
    """Ray task: a shard's labels by row, −1 where there is no sample or it was dropped."""
    rows = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row"])["row"].to_numpy()
    labels, dropped = labels_of(run_uri, shard, which)
    table = np.full(rows.max(initial=-1) + 1, -1, np.int32)
    table[rows] = np.where(dropped, -1, labels)
    return table


def votes_of(lists: pa.Table, labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """The votes (rows,) float32 on samples with these lists and labels (rows,): see `ops.neighbors.vote`."""
    neighbors = lists["neighbor_row"].combine_chunks()
    lengths = np.diff(neighbors.offsets.to_numpy())
    width = int(lengths.max(initial=0))
    there = np.arange(width) < lengths[:, None]
    found, weight = np.full(there.shape, -1), np.zeros(there.shape)
    shards = lists["neighbor_shard"].combine_chunks().flatten().to_numpy()
    found[there] = table.at(shards, neighbors.flatten().to_numpy())
    weight[there] = lists["similarity"].combine_chunks().flatten().to_numpy()
    return vote(labels, found, weight)


def source_of(run: Run, embedded: Sequence[dict[str, Any]]) -> str | None:
    """What the lists of a run are made from; None unless every shard has one, of the embeddings that are there now.

    The votes also depend on the labels of the whole run.
    """
    found = column_groups.all_facts(run.uri, NEIGHBORS, len(embedded))
    if any(f is None for f in found) or any(f["embeddings"] != e["source"] for f, e in zip(found, embedded)):
        return None
    return fingerprint(NEIGHBORS, [f.get("lists", f["source"]) for f in found])


def of_shard(run_uri: str, shard: int, table: LabelTable, which: Which) -> np.ndarray:
    """The votes (rows,) float32 of a shard's samples, NaN where there is none."""
    lists = column_groups.read(run_uri, NEIGHBORS, shard, LISTS)
    return votes_of(lists, labels_of(run_uri, shard, which).labels, table)


def ranks(run: Run, table: LabelTable, which: Which) -> RankTable:
    """Where a vote stands among those of all samples of a run."""
    sketch = RankSketch()
    items = [(run.uri, shard) for shard in range(len(run.shards))]
    for part, _ in merged_parts(of_shard, items, table, which, merge=_joined):
        sketch.add(part)
    return sketch.table()


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one, other])
