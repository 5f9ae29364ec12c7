"""What people decided about samples: the column group `decisions/`, and which decision of a sample is in force.

A shard's file holds every decision ever made about its samples, oldest first; the last one of a sample is in force. The
rest is the history, which `undo` goes back to. A decision belongs to a (key, row) of its shard: where another key stands in
that row now, because the shard was replaced, the decision is ignored.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.runs import column_groups, columns
from pipelines.runs.record import Run, fingerprint

KEEP, RELABEL, DROP = "keep", "relabel", "drop"
DECISIONS = (KEEP, RELABEL, DROP)


class Batch(NamedTuple):
    """The decisions that one `hardset decide` added."""

    source: str
    time: str
    by: tuple[str, ...]
    rows: int


def read_history(run_uri: str, shard: int) -> pa.Table:
    """Every decision about a shard's samples, oldest first; no rows where there is none."""
    try:
        return column_groups.read(run_uri, columns.DECISIONS, shard).cast(columns.DECISIONS_SCHEMA)
    except FileNotFoundError:
        return columns.DECISIONS_SCHEMA.empty_table()


def in_force(history: pa.Table) -> pa.Table:
    """The last decision of each sample, by row."""
    rows = history["row"].to_numpy()
    # np.unique takes the first of equal rows: of the reversed table, the last.
    _, last = np.unique(rows[::-1], return_index=True)
    return history.take(pa.array(len(rows) - 1 - last))


def of_rows(history: pa.Table, table: pa.Table) -> pa.Table:
    """The decision in force of each row of a table with `key` and `row`, in its order; nulls where there is none."""
    now = in_force(history)
    theirs, rows = now["row"].to_numpy(), table["row"].to_numpy()
    at = np.searchsorted(theirs, rows).clip(max=max(0, len(theirs) - 1))
    found = now.take(pa.array(at, mask=theirs[at] != rows if len(theirs) else np.ones(len(rows), bool)))
    same = pa.compute.equal(found["key"], table["key"]).fill_null(False)
    replaced = [pa.compute.if_else(same, found[name], None) for name in found.column_names if name != "row"]
    names = [name for name in found.column_names if name != "row"]
    return pa.table(dict(zip(names, replaced))).append_column("row", table["row"])


def state_of(history: pa.Table) -> str | None:
    """A hash of what is decided, whoever decided it; None where nothing is. Labels depend on nothing else."""
    now = in_force(history)
    return (
        fingerprint(*(now[name].to_pylist() for name in ("key", "row", "decision", "label"))) if now.num_rows else None
    )


def states(run: Run) -> list[str | None]:
    """`state_of` each shard, from one listing of `decisions/`."""
    found = column_groups.all_facts(run.uri, columns.DECISIONS, len(run.shards))
    return [facts and facts.get("state") for facts in found]


def decided_shards(run: Run) -> list[int]:
    """The shards about whose samples something was decided."""
    return [shard for shard, state in enumerate(states(run)) if state]


def append(run: Run, decisions: pa.Table) -> None:
    """Add decisions (DECISIONS_SCHEMA) behind those that are there; one file per shard, each replaced whole."""
    for shard in np.unique(decisions["shard"].to_numpy()).tolist():
        new = decisions.filter(pa.compute.equal(decisions["shard"], shard))
        _write(run, shard, pa.concat_tables([read_history(run.uri, shard), new]))


def batches(run: Run) -> list[Batch]:
    """What was decided by which command, in the order of time."""
    found: dict[str, tuple[set[str], int]] = {}
    for shard in _shards_with_history(run):
        for source, by in zip(*(read_history(run.uri, shard)[name].to_pylist() for name in ("source", "by"))):
            people, rows = found.get(source, (set(), 0))
            found[source] = (people | {by}, rows + 1)
    listed = [Batch(s, s.rpartition(" ")[2], tuple(sorted(people)), rows) for s, (people, rows) in found.items()]
    return sorted(listed, key=lambda batch: (batch.time, batch.source))


def undo(run: Run) -> Batch | None:
    """Remove the decisions that the last `hardset decide` added, and return what it was; None without any.

    Stopped in the middle, the next call removes the rest of the same batch.
    """
    known = batches(run)
    if not known:
        return None
    for shard in _shards_with_history(run):
        history = read_history(run.uri, shard)
        kept = history.filter(pa.compute.not_equal(history["source"], known[-1].source))
        if kept.num_rows < history.num_rows:
            _write(run, shard, kept)
    return known[-1]


def name_source(name: str, data: bytes) -> str:
    """The `source` of decisions read from a file: its name, a digest of its bytes, the time of now (UTC)."""
    return f"{name} {fingerprint(data.hex())[:12]} {datetime.now(UTC).isoformat(timespec='microseconds')}"


def count(run: Run) -> dict[str, int]:
    """How many samples are kept, relabelled and dropped, by the decisions in force."""
    found = dict.fromkeys(DECISIONS, 0)
    for shard in decided_shards(run):
        for decision in in_force(read_history(run.uri, shard))["decision"].to_pylist():
            found[decision] += 1
    return found


def _shards_with_history(run: Run) -> Iterable[int]:
    found = column_groups.all_facts(run.uri, columns.DECISIONS, len(run.shards))
    return [shard for shard, facts in enumerate(found) if facts and facts["rows"]]


def _write(run: Run, shard: int, history: pa.Table) -> None:
    source = fingerprint(columns.DECISIONS, history["source"].to_pylist(), state_of(history))
    column_groups.write(run.uri, columns.DECISIONS, shard, history, source, state=state_of(history))
