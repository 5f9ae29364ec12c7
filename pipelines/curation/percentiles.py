"""Percentiles: where a score stands among all samples of a run, and within its class, as columns beside the score.

    score    a column group as it was scored, percentiles null
    count    one Ray task per handful of shards counts scores; the driver adds the counts (ops.ranks): 1 to 4 rounds
    complete one Ray task per shard reads its file and writes it again with the percentiles

The reference is every sample of the run that has the score; scored with another run's Gaussians, that run's. A file's
source names its reference, so that percentiles of a smaller corpus are redone when it grows.
"""

import io
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from ops.ranks import Cells, RankCounter, RankTable, codes_of, merge_counts
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order, write_shards

ROWS_PER_TASK = 1 << 20
SHARDS_PER_TASK = 64
Tables = dict[str, RankTable]  # by the name of the score


def file_of(group: str, name: str) -> str:
    """Path inside a run of the ranks of a score."""
    return f"percentiles/{group}.{name}.npz"


def source_of(scored: str, reference: str | None) -> str:
    """The source of a file whose scores have the source `scored`, with the percentiles of a reference."""
    return fingerprint("percentiles", scored, reference)


def what_is_left(run: Run, group: str, scored: Sequence[str], final: Sequence[str]) -> tuple[list[int], list[int]]:
    """Shards whose file of a group is not final, and those among them whose scores are missing or old as well."""
    facts = column_groups.all_facts(run.uri, group, len(final))
    pending = [shard for shard, fact in enumerate(facts) if not fact or fact["source"] != final[shard]]
    return pending, [s for s in pending if not facts[s] or _scored(facts[s]) != scored[s]]


def _scored(facts: dict) -> str:
    """The source of a file's scores, whatever its percentiles are those of."""
    return facts.get("scored", facts["source"])


def difficulty_reference(run: Run) -> str | None:
    """What identifies the reference of a run's difficulty; None without classes, or where the other run has no ranks."""
    fitted = run.stage("fit")
    if fitted is None or not fitted["classes"]:
        return None
    return fitted.get("percentiles") if "from" in fitted else fingerprint("reference", fitted["source"])


def load(run: Run, group: str, reference: str | None) -> Tables | None:
    """The ranks stored with a run, if they are those of this reference."""
    entry = run.stage(f"percentiles/{group}")
    if reference is None or entry is None or entry["source"] != reference:
        return None
    try:
        files = {name: storage.read_bytes(run.path(file_of(group, name))) for name in columns.RANKED[group]}
    except FileNotFoundError:
        return None
    return {name: RankTable.load(io.BytesIO(data)) for name, data in files.items()}


def save(run: Run, group: str, tables: Tables, reference: str, **entry: object) -> None:
    """Store ranks with a run."""
    for name, table in tables.items():
        with storage.write_atomic(run.path(file_of(group, name))) as stream:
            table.save(stream)
    run.finish_stage(f"percentiles/{group}", source=reference, **entry)


def adopt(run: Run, other: Run) -> str | None:
    """Take over the ranks of another run's difficulty; None if it has none that fit its Gaussians."""
    reference = difficulty_reference(other)
    tables = load(other, columns.DIFFICULTY, reference)
    if tables is None:
        return None
    if load(run, columns.DIFFICULTY, reference) is None:
        save(run, columns.DIFFICULTY, tables, reference, **{"from": other.uri})
    return reference


def count(run: Run, group: str, rows: Sequence[int], reference: str) -> Tables:
    """Rank tables of a scored column group, stored with the run.

    Parameters
    ----------
    run : Run
        Its files of the group hold the scores of every shard.
    group : str
    rows : sequence of int
        Rows of each shard.
    reference : str

    Notes
    -----
    Exact up to `ops.ranks.EXACT_SCORES` samples, else within the error stated there. The driver holds a few counts per cell of
    a table, however many samples: 0.8 GB at its peak for 1,000 classes (20 M scores, three rounds).
    """
    started = time.monotonic()
    names, rounds = columns.RANKED[group], 0
    counters = {name: RankCounter(len(run.classes), sum(rows)) for name in names}
    while cells := {name: counter.open for name, counter in counters.items() if counter.open is not None}:
        parts: dict[str, list] = {name: [] for name in cells}
        for found in in_order(_count_shards, _handfuls(rows), run.uri, group, len(run.classes), cells):
            for name, counts in found.items():
                parts[name].append(counts)
                if len(parts[name]) == 64:  # so that what waits is a table's size, not the corpus's
                    parts[name] = [merge_counts(parts[name])]
        for name in cells:
            counters[name].add(*merge_counts(parts[name]))
        rounds += 1
    tables = {name: counter.table() for name, counter in counters.items()}
    samples = {name: int(table.totals[0]) for name, table in tables.items()}
    save(run, group, tables, reference, samples=samples, rounds=rounds, seconds=time.monotonic() - started)
    return tables


def _handfuls(rows: Sequence[int]) -> Iterator[tuple[list[int]]]:
    """Consecutive shards, so many that a task is worth its start."""
    shards, held = [], 0
    for shard, number in enumerate(rows):
        shards.append(shard)
        held += number
        if held >= ROWS_PER_TASK or len(shards) == SHARDS_PER_TASK:
            yield (shards,)
            shards, held = [], 0
    if shards:
        yield (shards,)


def _count_shards(
    shards: list[int], run_uri: str, group: str, num_classes: int, cells: dict[str, Cells]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ray task: per score, the parts of open cells that samples of these shards fall into, and how many."""
    counted: dict[str, list] = {name: [] for name in cells}
    for shard in shards:
        scores = column_groups.read(run_uri, group, shard, list(cells))
        labels = _labels(run_uri, shard)
        for name, open_cells in cells.items():
            counted[name].append(open_cells.count(_codes(_values(scores[name]), labels)))
    return {name: merge_counts(parts) for name, parts in counted.items()}


def _codes(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Codes of the finite scores among all samples, and, where there is a label, among those of its class."""
    there, classed = np.isfinite(scores), np.isfinite(scores) & (labels >= 0)
    overall = codes_of(scores[there], np.zeros(there.sum(), np.int64))
    return np.concatenate([overall, codes_of(scores[classed], 1 + labels[classed])])


def _labels(run_uri: str, shard: int) -> np.ndarray:
    return columns.labels_or_minus_one(column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["label"])["label"])


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return column.fill_null(np.nan).to_numpy()


def complete(run: Run, group: str, shards: Sequence[int], sources: Sequence[str], tables: Tables | None) -> None:
    """Write the group's files of these shards again, with their percentiles; `sources` of all shards, as it will be."""
    if shards:
        items = [(shard, sources[shard]) for shard in shards]
        shared, embedded = (run.uri, group, tables), run.embedding_facts()
        write_shards(f"percentiles of {group}", _complete_shard, items, *shared, embedded=embedded)


def _complete_shard(shard: int, source: str, run_uri: str, group: str, tables: Tables | None) -> int:
    """Ray task: one shard's scores, read and written again with their percentiles; returns its rows."""
    facts = column_groups.facts(run_uri, group, shard)
    assert facts is not None, f"{group}/ of shard {shard} is gone"
    kept = {name: value for name, value in facts.items() if name not in ("source", "rows")} | {"scored": _scored(facts)}
    table = with_percentiles(column_groups.read(run_uri, group, shard), group, _labels(run_uri, shard), tables)
    column_groups.write(run_uri, group, shard, table, source, **kept)
    return table.num_rows


def with_percentiles(table: pa.Table, group: str, labels: np.ndarray, tables: Tables | None) -> pa.Table:
    """A shard's scores with their percentile columns filled in; null where there is no score, class or reference."""
    table = table.cast(pa.schema([columns.known_field(group, field) for field in table.schema]))
    for name in columns.RANKED[group]:
        scores = _values(table[name])
        groups = (np.zeros(len(scores), np.int64), np.where(labels >= 0, 1 + labels, -1))
        for field, of in zip(columns.percentile_fields(f"{group}.{name}"), groups):
            missing = np.full(len(scores), np.nan, np.float32)
            values = missing if tables is None else tables[name].fraction(scores, of)
            column = pa.array(values, mask=np.isnan(values))
            at = table.schema.get_field_index(field.name)
            table = table.append_column(field, column) if at < 0 else table.set_column(at, field, column)
    return table
