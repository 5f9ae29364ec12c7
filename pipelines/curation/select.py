"""Select: a rule over one score column -> rows -> a subset of webdataset shards with the original bytes.

The k hardest of N samples are found exactly without gathering N scores anywhere: three passes over the column histogram
the bits of the float32 scores (a distributed radix select), so the driver holds (classes × 2,048) counts.
Ties are taken in shard order.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ops.ranks import sortable
from pipelines.corpus.shards import write_subset_shard
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.progress import Progress
from pipelines.runs.record import Run, Shard, fingerprint
from pipelines.runs.tasks import in_order, merged_parts

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the three passes over 32 bits, highest first
MANIFEST_SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.LABEL,
        pa.field("score", pa.float32()),
        pa.field("sha256", pa.string(), metadata={"meaning": "of the image's encoded bytes"}),
        pa.field("url", pa.string(), metadata={"meaning": "the shard that it comes from"}),
        pa.field("subset_shard", pa.string()),
        pa.field("subset_key", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which samples: the `count` (or, a float, the fraction) with the highest score, or with the lowest.

    With `per_class` the count or fraction is one of each class. Samples without a score are never selected.
    """

    by: str
    count: int | float
    lowest: bool = False
    per_class: bool = False

    def __post_init__(self) -> None:
        columns.split_name(self.by, "--by")
        if self.count <= 0 or (isinstance(self.count, float) and self.count > 1):
            raise ValueError(
                f"count {self.count}: expected a fraction in (0, 1], a float, or a whole number of samples"
            )

    def __str__(self) -> str:
        amount = f"{100 * self.count:g} %" if isinstance(self.count, float) else f"{self.count:,}"
        where = " of each class" if self.per_class else ""
        return f"{amount}{where} with the {'lowest' if self.lowest else 'highest'} {self.by}"

    def wanted(self, available: np.ndarray) -> np.ndarray:
        """How many samples to take of each class, given how many have a score: of a fraction at least one."""
        if isinstance(self.count, float):
            return np.minimum(np.maximum(np.round(self.count * available).astype(np.int64), 1), available)
        return np.minimum(self.count, available)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Per class: take every sample whose sortable score exceeds `key`, and the first `ties` of those that equal it."""

    key: np.ndarray
    ties: np.ndarray


def _scored(shard: int, run_uri: str, rule: Rule) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Rows of a shard that have a score, their sortable scores and their class (0 without per_class)."""
    group, name = columns.split_name(rule.by)
    kept = [n for n in ("key", "shard", "row", "label") if n in column_groups.schema(run_uri, group, shard).names]
    table = column_groups.read(run_uri, group, shard, [*kept, name])
    table = table.select(kept).append_column("score", table[name].cast(pa.float32()))
    table = table.filter(pa.compute.is_finite(table["score"].fill_null(np.nan)))
    keys = sortable(table["score"].to_numpy(), rule.lowest)
    if not rule.per_class:
        return table, keys, np.zeros(len(keys), np.int64)
    labels = table["label"] if "label" in table.column_names else _labels_of(table, shard, run_uri)
    classes = columns.labels_or_minus_one(labels)
    return table.filter(pa.array(classes >= 0)), keys[classes >= 0], classes[classes >= 0]


def _labels_of(table: pa.Table, shard: int, run_uri: str) -> pa.ChunkedArray:
    """Labels of rows of a group that has none, from the embeddings (a merge by row: both are in shard order)."""
    known = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["row", "label"])
    at = np.searchsorted(known["row"].to_numpy(), table["row"].to_numpy())
    return known["label"].take(pa.array(at))


def _histogram(
    shard: int, run_uri: str, rule: Rule, num_classes: int, prefix: np.ndarray, shift: int, bits: int
) -> np.ndarray:
    """Ray task: (classes, 2**bits) counts of the next digit among scores that share their class's prefix."""
    _, keys, classes = _scored(shard, run_uri, rule)
    above = shift + bits
    alike = (keys.astype(np.uint64) >> np.uint64(above)) == prefix[classes]
    digit = (keys[alike].astype(np.int64) >> shift) & ((1 << bits) - 1)
    return np.bincount(classes[alike] * (1 << bits) + digit, minlength=num_classes << bits).reshape(num_classes, -1)


def find_cut(run: Run, rule: Rule) -> tuple[Cut, np.ndarray]:
    """The exact cut of a rule, and how many samples of each class it takes."""
    num_classes = max(1, len(run.classes)) if rule.per_class else 1
    shards = [(shard,) for shard in range(len(run.shards))]
    prefix, left, wanted = np.zeros(num_classes, np.uint64), None, None
    for shift, bits in DIGITS:
        shared = (run.uri, rule, num_classes, prefix, shift, bits)
        counts = sum(part for part, _ in merged_parts(_histogram, shards, *shared, merge=np.add))
        if left is None:
            wanted = rule.wanted(counts.sum(axis=1))
            left = wanted.copy()
        # Descending: how many samples have this digit or a higher one.
        reached = counts[:, ::-1].cumsum(axis=1)
        place = (reached < left[:, None]).sum(axis=1).clip(max=counts.shape[1] - 1)
        before = np.where(place > 0, np.take_along_axis(reached, (place - 1).clip(0)[:, None], 1)[:, 0], 0)
        left = left - before
        prefix = (prefix << np.uint64(bits)) | (counts.shape[1] - 1 - place).astype(np.uint64)
    return Cut(prefix.astype(np.uint32), left), wanted


def _take(keys: np.ndarray, classes: np.ndarray, cut: Cut, ties_before: np.ndarray) -> np.ndarray:
    """Which rows of a shard a cut takes, given how many ties of each class earlier shards hold."""
    ties = keys == cut.key[classes]
    order = np.zeros(len(keys), np.int64)
    for label in np.unique(classes[ties]):
        mine = ties & (classes == label)
        order[mine] = ties_before[label] + np.arange(mine.sum())
    return (keys > cut.key[classes]) | (ties & (order < cut.ties[classes]))


def _count_taken(shard: int, run_uri: str, rule: Rule, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Ray task: per class, a shard's samples above the cut and exactly on it."""
    _, keys, classes = _scored(shard, run_uri, rule)
    above, on = keys > cut.key[classes], keys == cut.key[classes]
    return np.bincount(classes[above], minlength=len(cut.key)), np.bincount(classes[on], minlength=len(cut.key))


def _selected(shard: int, run_uri: str, rule: Rule, cut: Cut, ties_before: np.ndarray) -> pa.Table:
    """The rows of a shard that a rule selects, under the first columns of the manifest."""
    table, keys, classes = _scored(shard, run_uri, rule)
    rows = pa.array(_take(keys, classes, cut, ties_before))
    if "label" not in table.column_names:
        table = table.append_column("label", _labels_of(table, shard, run_uri))
    return table.filter(rows).select(["key", "shard", "row", "label", "score"])


def write_subset(
    output: int, members: list[tuple[int, Shard, np.ndarray]], run_uri: str, rule: Rule, cut: Cut, name: str
) -> pa.Table:
    """Ray task: one subset shard from consecutive input shards; returns its part of the manifest."""
    tar_name = f"{name}-{output:06d}.tar"
    chosen = [(shard, _selected(number, run_uri, rule, cut, ties)) for number, shard, ties in members]
    sources = [
        (shard, table["shard"][0].as_py(), table["row"].to_pylist()) for shard, table in chosen if table.num_rows
    ]
    written = write_subset_shard(sources, storage.join(run_uri, "subsets", name, tar_name))
    table = pa.concat_tables([table for _, table in chosen])
    if [w.source_key for w in written] != table["key"].to_pylist():
        raise StageFailed(f"{tar_name}: a shard changed since it was embedded; run the same curate command again")
    url_of = {number: shard.url for number, shard, _ in members}
    table = table.append_column("sha256", pa.array([w.sha256 for w in written], pa.string()))
    table = table.append_column("url", pa.array([url_of[s] for s in table["shard"].to_pylist()], pa.string()))
    table = table.append_column("subset_shard", pa.array([tar_name] * table.num_rows, pa.string()))
    return table.append_column("subset_key", pa.array([w.key for w in written], pa.string())).cast(MANIFEST_SCHEMA)


def select(run: Run, rule: Rule, name: str = "hard", samples_per_shard: int = 1000) -> dict:
    """Write the subset `name` of a run: shards, manifest.parquet, uids.npy and a dataset card.

    Raises
    ------
    ValueError
        If the column is not there, or the name is not a plain folder name.
    """
    columns.check_name("--name", name)
    source = fingerprint("subset", dataclasses.asdict(rule), _column_sources(run, rule.by), samples_per_shard)
    before = run.stage(f"select/{name}")
    if before and before["source"] == source and storage.exists(run.path("subsets", name, "manifest.parquet")):
        return before | {"path": run.path("subsets", name), "skipped": True}
    started = time.monotonic()
    cut, wanted = find_cut(run, rule)
    if not wanted.sum():
        if rule.per_class and not run.classes:
            raise ValueError("--per-class: this run has no labels")
        raise ValueError(f"--by {rule.by}: no sample has a score there, nothing to select")
    storage.remove_tree(run.path("subsets", name))
    outputs = list(_plan_outputs(run, rule, cut, samples_per_shard))
    progress = Progress(f"select {name}", len(outputs))
    uids = []
    manifest = storage.write_atomic(run.path("subsets", name, "manifest.parquet"))
    with manifest as stream, pq.ParquetWriter(stream, MANIFEST_SCHEMA) as writer:
        for part in in_order(write_subset, outputs, run.uri, rule, cut, name):
            writer.write_table(part)
            uids += [digest[:32] for digest in part["sha256"].to_pylist()]
            progress.shard(part.num_rows)
    write_uids(run.path("subsets", name, "uids.npy"), uids)
    entry = {
        "source": source,
        "rule": str(rule),
        "samples": len(uids),
        "shards": len(outputs),
        "seconds": time.monotonic() - started,
    }
    storage.write_text_atomic(run.path("subsets", name, "README.md"), _card(run, rule, name, entry, wanted))
    run.finish_stage(f"select/{name}", **entry)
    return entry | {"path": run.path("subsets", name), "skipped": False}


def _plan_outputs(run: Run, rule: Rule, cut: Cut, samples_per_shard: int) -> Iterator[tuple[int, list]]:
    """Group consecutive input shards until a subset shard holds about the wanted number of samples."""
    ties = np.zeros_like(cut.ties)
    output, members, held = 0, [], 0
    counts = in_order(_count_taken, [(shard,) for shard in range(len(run.shards))], run.uri, rule, cut)
    for number, (shard, (above, on)) in enumerate(zip(run.shards, counts)):
        taken = above.sum() + np.clip(cut.ties - ties, 0, on).sum()
        if taken:
            members.append((number, shard, ties.copy()))
            held += taken
        ties = ties + on
        if held >= samples_per_shard:
            yield output, members
            output, members, held = output + 1, [], 0
    if members:
        yield output, members


def _column_sources(run: Run, column: str) -> list[str]:
    facts = column_groups.check_score(run.uri, len(run.shards), column, "--by")
    column_groups.check_group_fresh(columns.split_name(column)[0], run.embedding_facts(), run.uri)
    return [fact["source"] for fact in facts]


def write_uids(uri: str, uids: Sequence[str]) -> None:
    """DataComp's subset file: a sorted array of the two unsigned 64-bit halves of each uid of 32 hexadecimal digits."""
    halves = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], dtype="u8,u8")
    halves.sort()
    with storage.write_atomic(uri) as stream:
        np.save(stream, halves)


def _card(run: Run, rule: Rule, name: str, entry: dict, wanted: np.ndarray) -> str:
    """A dataset card: what this subset is, how it was made, how to read it."""
    per_class = ""
    if rule.per_class:
        rows = "\n".join(f"| {run.classes[label]} | {count} |" for label, count in enumerate(wanted.tolist()))
        per_class = f"\n| class | samples |\n|---|---|\n{rows}\n"
    last, usable = entry["shards"] - 1, sum(f["rows"] for f in run.embedding_facts())
    pattern = f"{name}-{{000000..{last:06d}}}.tar" if last else f"{name}-000000.tar"
    return f"""---
tags: [webdataset, hard-subset]
---
# {name}: {entry["samples"]:,} samples, {rule}

Selected by hardset from {len(run.shards)} shards ({usable:,} usable samples), encoder `{run.config.encoder}`,
labels from `{run.config.label}`. The members of every sample are the original bytes.
{per_class}
| file | what |
|---|---|
| `{pattern}` | webdataset shards |
| `manifest.parquet` | per sample: key, shard and row in the run, label, score, sha256 of the image, where it came from |
| `uids.npy` | the first 128 bits of each sha256, sorted, as `u8,u8` (DataComp's subset format) |

```python
import webdataset
for sample in webdataset.WebDataset("{pattern}", shardshuffle=False).decode("pil"):
    ...
```

Rule: `{json.dumps(dataclasses.asdict(rule))}`; made from `{entry["source"]}`.
"""
