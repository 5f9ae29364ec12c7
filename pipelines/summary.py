"""What is in a run: counts, what is done and pending, quantiles of every score, why samples were left out."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus.loss import loss_of
from pipelines.corpus.shardlist import evenly
from pipelines.runs import column_groups, columns, decisions, storage
from pipelines.runs.record import Run

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
MOST_VALUES = 2_000_000  # quantiles of more rows than this are those of evenly spaced shards
MOST_QUARANTINES = 10_000  # shards whose quarantine is read, evenly spaced: each is a round trip on an object store
NESTED = ("predictions", "trust")  # hold a column group per name; neighbors/against too, beside neighbors/ itself


def summarize(run: Run) -> dict[str, Any]:
    """What `hardset inspect` shows of a run as it is, JSON-able."""
    embedded = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards))
    rows = sum(f["rows"] for f in embedded if f)
    left_out = sum(f["left_out"] for f in embedded if f)
    loss = loss_of(f for f in embedded if f)
    stages = {name: entry for name, entry in run.stages().items() if name != "plan"}
    return {
        "run": run.uri,
        "encoder": run.config.encoder,
        "width": run.config.width,
        "label": run.config.label,
        "exif": "applied" if run.config.exif == "apply" else "ignored",
        "classes": len(run.classes),
        "shards": {"listed": len(run.shards), "embedded": sum(f is not None for f in embedded)},
        "samples": rows + left_out,
        "rows": rows,
        "left_out": left_out,
        "lost": {"certain": loss.certain, "estimated": loss.estimated, "bytes": loss.bytes},
        "bad_fraction": loss.fraction(rows),
        "apart": sum(f.get("apart", 0) for f in embedded if f),
        "without_end_mark": sum(not f.get("end_mark", True) for f in embedded if f),
        "rotated": sum(f.get("rotated", 0) for f in embedded if f),
        "quarantine": quarantine_reasons(run),
        "decisions": decisions.count(run),
        "neighbors": {name: entry for name, entry in stages.items() if name.partition("/")[0] == "neighbors"},
        "groups": {name: group_summary(run, name) for name in groups_of(run)},
        "stages": stages,
        "subsets": [name.removeprefix("select/") for name in stages if name.startswith("select/")],
    }


def groups_of(run: Run) -> list[str]:
    """The column groups that this run has, `predictions/NAME` and `trust/NAME` included."""
    found = storage.list_folders(run.uri)
    names = [name for name in found if name not in (*NESTED, columns.QUARANTINE, columns.DECISIONS)]
    outers = [outer for outer in NESTED if outer in found] + (["neighbors/against"] if "neighbors" in found else [])
    names += [f"{outer}/{name}" for outer in outers for name in storage.list_folders(run.path(*outer.split("/")))]
    return [name for name in sorted(names) if any(column_groups.all_facts(run.uri, name, len(run.shards)))]


def group_summary(run: Run, group: str) -> dict[str, Any]:
    """Shards done and the quantiles of each float column of a group."""
    found = {shard: f for shard, f in enumerate(column_groups.all_facts(run.uri, group, len(run.shards))) if f}
    done = list(found)
    fields = column_groups.schema(run.uri, group, done[0])
    names = [f.name for f in fields if pa.types.is_floating(f.type) and "percentile_of" not in columns.about(f)]
    step = 1 + sum(f["rows"] for f in found.values()) // MOST_VALUES
    taken = {name: [] for name in names}
    for shard in done[::step]:
        table = column_groups.read(run.uri, group, shard, names)
        for name in names:
            taken[name].append(table[name].drop_null().to_numpy())
    return {
        "shards": len(done),
        "quantiles": {name: _quantiles(np.concatenate(values)) for name, values in taken.items()},
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values.astype(np.float64), QUANTILES)
    return {f"{q:g}": float(v) for q, v in zip(QUANTILES, found)} | {"mean": float(values.mean(dtype=np.float64))}


def quarantine_reasons(run: Run, examples: int = 1) -> dict[str, dict[str, Any]]:
    """Count, one example and the first `examples` of them by reason, digits in a reason made alike, the most frequent first.

    Of a run where more than `MOST_QUARANTINES` shards have entries, those of so many are counted.
    """
    counts: Counter[str] = Counter()
    first: dict[str, list[dict[str, Any]]] = {}
    found = column_groups.all_facts(run.uri, columns.QUARANTINE, len(run.shards))
    shards = [shard for shard, facts in enumerate(found) if facts and facts["rows"]]
    for shard in [shards[place] for place in evenly(len(shards), MOST_QUARANTINES)]:
        for entry in column_groups.read(run.uri, columns.QUARANTINE, shard).to_pylist():
            reason = re.sub(r"\d+", "#", entry["reason"])
            counts[reason] += 1
            if counts[reason] <= examples:
                first.setdefault(reason, []).append(entry)
    return {
        reason: {"count": count, "example": first[reason][0], "examples": first[reason]}
        for reason, count in counts.most_common(50)
    }
