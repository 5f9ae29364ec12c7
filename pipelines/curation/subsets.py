"""Subsets as they lie in a run: what a subset's manifest says of it, and which rows it holds.

`subsets/NAME/manifest.parquet` is the last file of a subset to appear, so a folder without one is no subset. Its metadata
say what it was made from; nothing else is believed.
"""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

MANIFEST = "manifest.parquet"
MANIFEST_SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.LABEL,
        pa.field(
            "original_label", pa.int64(), metadata={"meaning": "of the corpus, where another one was decided since"}
        ),
        pa.field("score", pa.float32()),
        pa.field("sha256", pa.string(), metadata={"meaning": "of the image's encoded bytes"}),
        pa.field("url", pa.string(), metadata={"meaning": "the shard that it comes from"}),
        pa.field("subset_shard", pa.string()),
        pa.field("subset_key", pa.string()),
    ]
)


def folder_of(run_uri: str, name: str) -> str:
    """Where a subset lies."""
    return storage.join(run_uri, "subsets", name)


def facts_of(run_uri: str, name: str) -> dict[str, Any] | None:
    """What a subset says of itself: `source`, `rule`, `samples`, `shards` …; None where there is no whole subset.

    A manifest of an older version says its `source` only: the digest of its bytes.
    """
    uri = storage.join(folder_of(run_uri, name), MANIFEST)
    filesystem, path = storage.open_filesystem(uri)
    try:
        schema = pq.read_schema(path, filesystem=filesystem)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    told = (schema.metadata or {}).get(column_groups.METADATA)
    return json.loads(told) if told else {"source": hashlib.sha256(storage.read_bytes(uri)).hexdigest()[:32]}


def check_subset(run: Run, name: str, field: str) -> dict[str, Any]:
    """The facts of a subset. UserError, which names the option's `field`, where the run has none of that name."""
    columns.check_name(field, name)
    facts = facts_of(run.uri, name)
    if facts is None:
        there = [other for other in storage.list_folders(run.path("subsets")) if facts_of(run.uri, other)]
        has = f"it has {', '.join(there)}" if there else "it has none"
        raise UserError(f"{name}: {run.uri} has no subset of that name, {has}; make it with hardset select", field)
    return facts


def rows_of(run_uri: str, name: str, shard: int) -> pa.Table:
    """key and row of a subset's samples of one shard, ascending. Reads the row groups that may hold that shard only."""
    filesystem, path = storage.open_filesystem(storage.join(folder_of(run_uri, name), MANIFEST))
    table = pq.read_table(
        path, columns=["key", "shard", "row"], filters=[("shard", "=", shard)], filesystem=filesystem, partitioning=None
    )
    return table.select(["key", "row"]).sort_by("row")


def holds(table: pa.Table, run_uri: str, name: str, shard: int) -> np.ndarray:
    """Which rows of a shard's table (key, row) a subset holds, (n,) bool.

    Raises
    ------
    UserError
        If a row has another key than the subset knows: the shard was embedded again since, with other samples.
    """
    chosen = rows_of(run_uri, name, shard)
    mine = np.isin(table["row"].to_numpy(), chosen["row"].to_numpy(), assume_unique=True)
    found = table.filter(pa.array(mine))
    known = chosen.filter(pa.compute.is_in(chosen["row"], value_set=found["row"]))
    if found["key"].to_pylist() != known["key"].to_pylist():
        raise UserError(
            f"{run_uri}: subset {name} was made before shard {shard} was embedded anew; select it again", "run"
        )
    return mine
