"""Columns of several groups beside each other: joined by row, one shard at a time, without a shuffle."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from pipelines.runs import column_groups, columns, decisions, storage
from pipelines.runs.errors import UserError
from pipelines.runs.labels import Which, decided_labels, history_of


def join(run_uri: str, shard: int, names: Iterable[str], labels: Which = "decided") -> pa.Table:
    """One shard's keys, label and the named columns ('difficulty.rmd'; 'embeddings.embedding'), joined by row.

    The rows are those of `embeddings/`; where a group lacks a row its columns are null. Columns keep their full names.
    `label` is the decided one (`labels`: or the corpus's). Of `decisions/` the one in force counts, null without any.

    Raises
    ------
    ValueError
        If the run has no such group or column.
    """
    base = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["key", "shard", "row", "label"])
    rows = base["row"].to_numpy()
    history = history_of(run_uri, shard, labels)
    decided = decided_labels(base, history).labels
    base = base.set_column(3, columns.LABEL, columns.nullable(decided))
    wanted: dict[str, list[str]] = {}
    for full in names:
        group, name = columns.split_name(full)
        wanted.setdefault(group, []).append(name)
    made_from = (column_groups.facts(run_uri, columns.EMBEDDINGS, shard) or {}).get("source")
    for group, columns_of_group in wanted.items():
        if group == columns.DECISIONS:
            found = decisions.of_rows(history, base)
            _check_names(group, columns_of_group, found.column_names)
        else:
            column_groups.check_fresh(group, shard, made_from, column_groups.facts(run_uri, group, shard))
            found = _read_named(run_uri, group, shard, columns_of_group)
        theirs = found["row"].to_numpy()
        if not np.array_equal(rows, theirs):
            at = np.searchsorted(theirs, rows).clip(max=max(0, len(theirs) - 1))
            missing = theirs[at] != rows if len(theirs) else np.ones(len(rows), bool)
            found = found.take(pa.array(at, mask=missing))
        for name in columns_of_group:
            base = base.append_column(found.schema.field(name).with_name(f"{group}.{name}"), found[name])
    return base


def _read_named(run_uri: str, group: str, shard: int, names: list[str]) -> pa.Table:
    try:
        there = column_groups.schema(run_uri, group, shard).names
    except FileNotFoundError:
        raise UserError(f"{run_uri} has no {group}/ for shard {shard}; {columns.how_to_make(group)}") from None
    _check_names(group, names, there)
    return column_groups.read(run_uri, group, shard, list(dict.fromkeys(["row", *names])))


def _check_names(group: str, names: Sequence[str], there: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            scores = ", ".join(n for n in there if n not in columns.KEYS_AND_LABEL)
            raise UserError(f"column {group}.{name}: {group}/ has no column {name!r}, it has {scores}")


def load(run_uri: str, names: Iterable[str], labels: Which = "decided") -> pa.Table:
    """Columns of a whole run as one Arrow table, for a notebook: `load(RUN, ["difficulty.rmd", "difficulty.margin"])`.

    Memory grows with the run; the stages themselves go shard by shard.
    """
    files = storage.list_files(storage.join(run_uri, columns.EMBEDDINGS), ".parquet")
    return pa.concat_tables([join(run_uri, shard, list(names), labels) for shard in range(len(files))])
