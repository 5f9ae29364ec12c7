"""The column group: the lists of a shard's samples, what each is a duplicate of, and the vote on its label."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.curation.votes import LabelTable, votes_of
from pipelines.neighbors.ids import ids_of, shards_and_rows
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.executor import Output, Task
from pipelines.runs.labels import labels_of

SAME, IDENTICAL = "same", "identical"

SCHEMA = pa.schema(
    [
        *columns.KEYS,
        pa.field("neighbor_shard", pa.list_(pa.int32())),
        pa.field("neighbor_row", pa.list_(pa.int64())),
        pa.field(
            "similarity",
            pa.list_(pa.float32()),
            metadata={
                "meaning": "inner product of the whitened embeddings, of length 1, of the sample and each neighbour",
                "direction": "larger = nearer",
                "unit": "cosine in [-1, 1]",
            },
        ),
        columns.score_field("neighbors.vote"),
        columns.score_field("neighbors.density"),
        pa.field("duplicate_of_shard", pa.int32()),
        pa.field("duplicate_of_row", pa.int64()),
        columns.score_field("neighbors.duplicate_similarity"),
        pa.field(
            "duplicate_kind",
            pa.string(),
            metadata={"meaning": "identical: the same bytes; same: one picture, changed; null: no duplicate"},
        ),
    ]
)


class Duplicates(NamedTuple):
    """Samples that are a duplicate, sorted by id (m,): of which one, how well the pictures fit, whether bytes are the same."""

    ids: np.ndarray
    of: np.ndarray
    correlation: np.ndarray
    identical: np.ndarray


class WriteLists:
    """Worker: the file of a shard, from what the search found, or from itself where only labels have changed."""

    def __init__(
        self,
        run_uri: str,
        group: str,
        found: str | None,
        blocks: np.ndarray | None,
        duplicates: Duplicates | None,
        labels: LabelTable | None,
        lists: Sequence[str],
        told: dict[str, Any],
    ):
        self.run_uri, self.group, self.found, self.blocks = run_uri, group, found, blocks
        self.duplicates, self.labels, self.lists, self.told = duplicates, labels, lists, told

    def run(self, task: Task) -> Output:
        """The lists of a shard; see `pipelines.runs.executor`."""
        if self.found is None:
            table = column_groups.read(self.run_uri, self.group, task.shard)
        else:
            table = self._found(task.shard)
        known = (column_groups.facts(self.run_uri, self.group, task.shard) or {}) if self.found is None else self.told
        facts = {name: known.get(name) for name in ("k", "against", "duplicates")}
        if self.found is not None:
            facts["duplicates"] = table.num_rows - table["duplicate_of_row"].null_count
        return Output(self._with_vote(table, task.shard), facts | {"lists": self.lists[task.shard]})

    def _found(self, shard: int) -> pa.Table:
        keys = column_groups.read(self.run_uri, columns.EMBEDDINGS, shard, ["key", "shard", "row"])
        table = self.lists_of(shard)
        assert table.num_rows == keys.num_rows, f"shard {shard}: {table.num_rows} lists of {keys.num_rows} samples"
        neighbors, similarity = columns.vectors(table["neighbor"]), columns.vectors(table["similarity"])
        there = neighbors >= 0
        lengths = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
        shards, rows = shards_and_rows(neighbors[there])
        count = there.sum(axis=1)
        mean = np.where(there, similarity, 0).sum(axis=1) / np.where(count > 0, count, 1)
        data = {
            "neighbor_shard": pa.ListArray.from_arrays(lengths, shards),
            "neighbor_row": pa.ListArray.from_arrays(lengths, rows),
            "similarity": pa.ListArray.from_arrays(lengths, similarity[there]),
            "vote": pa.nulls(keys.num_rows, pa.float32()),
            "density": pa.array(mean.astype(np.float32), mask=count == 0),
        } | self._duplicates(ids_of(shard, keys["row"].to_numpy()))
        data = {name: keys[name] for name in keys.column_names} | data
        return pa.table({name: data[name] for name in SCHEMA.names}).cast(SCHEMA)

    def lists_of(self, shard: int) -> pa.Table:
        """What the groups found for the shard's samples, in the order of their rows."""
        block = int(self.blocks[shard])
        at = int(np.flatnonzero(self.blocks == block).searchsorted(shard))
        batches = []
        for uri in storage.list_files(storage.join(self.found, f"{block:06d}"), ".arrow"):
            filesystem, path = storage.open_filesystem(uri)
            with filesystem.open_input_file(path) as stream:
                batches.append(pa.ipc.open_file(stream).get_batch(at))
        return pa.Table.from_batches(batches).sort_by("row").combine_chunks()

    def _duplicates(self, ids: np.ndarray) -> dict[str, pa.Array]:
        known = self.duplicates
        if not len(known.ids):
            fields = (field for field in SCHEMA if field.name.startswith("duplicate_"))
            return {field.name: pa.nulls(len(ids), field.type) for field in fields}
        at = np.searchsorted(known.ids, ids).clip(max=len(known.ids) - 1)
        none = known.ids[at] != ids
        shards, rows = shards_and_rows(known.of[at])
        return {
            "duplicate_of_shard": pa.array(shards, mask=none),
            "duplicate_of_row": pa.array(rows, mask=none),
            "duplicate_similarity": pa.array(known.correlation[at], mask=none),
            "duplicate_kind": pa.array(np.where(known.identical[at], IDENTICAL, SAME), mask=none),
        }

    def _with_vote(self, table: pa.Table, shard: int) -> pa.Table:
        if self.labels is None:
            return table
        votes = votes_of(table, labels_of(self.run_uri, shard).labels, self.labels)
        at = table.schema.get_field_index("vote")
        return table.set_column(at, SCHEMA.field("vote"), columns.nullable(votes))
