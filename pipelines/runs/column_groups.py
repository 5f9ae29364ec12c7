"""How a column group is written, found and read back.

A column group is a folder of Parquet files, one per input shard, with the same keys and the rows in shard order, so that
groups join on (shard, row) without a shuffle. Each file's schema metadata says what it was made from (`source`).
"""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute  # as pa.compute, here and in all modules that import this one
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runs import columns, storage
from pipelines.runs.errors import UserError

METADATA = b"hardset"  # the one key of ours in a file's schema metadata: JSON with `source` and the counts

FOOTER_THREADS = 32  # each footer is a round trip or two on an object store

SETTLED_S = 5.0  # a file younger than this may be replaced within the resolution of its time of modification

_SHARD_FILE = re.compile(r"(\d{6,})\.parquet")


class _Known(NamedTuple):
    """The metadata of a file as it was read, and the file's state then."""

    size: int
    mtime_ns: int
    text: bytes


# By group (URI), then by shard: what this process has read of footers. See `all_facts`.
_known: dict[str, dict[int, _Known]] = {}


def file_name(group: str, shard: int) -> str:
    """Path inside a run of the file of a column group that belongs to a shard."""
    return f"{group}/{shard:06d}.parquet"


def write(run_uri: str, group: str, shard: int, table: pa.Table, source: str, **more: Any) -> None:
    """Write one shard's file of a column group, whole or not at all; `source` and `more` facts go into its metadata."""
    write_tables(run_uri, group, shard, [table], {"source": source, **more}, table.schema)


def write_tables(
    run_uri: str,
    group: str,
    shard: int,
    tables: Iterable[pa.Table],
    told: Mapping[str, Any],
    schema: pa.Schema | None = None,
) -> int:
    """Write one shard's file from tables as they come, whole or not at all; returns its rows.

    Parameters
    ----------
    tables : iterable of Table
        Each its own row groups; one is in memory at a time.
    told : mapping
        What the file says of itself, its `source` among it: read after the last table, so that an iterator may fill it.
        The rows are added, and the source of the shard's embeddings as `embeddings`: see `check_fresh`.
    schema : Schema, optional
        Of the tables. By default that of the first, which then has to be there.
    """

    def metadata(rows: int) -> dict[bytes, bytes]:
        entry = {"rows": rows, **told}
        if group not in (columns.EMBEDDINGS, columns.QUARANTINE) and "embeddings" not in entry:
            entry["embeddings"] = (facts(run_uri, columns.EMBEDDINGS, shard) or {}).get("source")
        return {METADATA: json.dumps(entry, sort_keys=True).encode()}

    stream = iter(tables)
    if schema is None:
        first = next(stream)
        schema, stream = first.schema, itertools.chain([first], stream)
    schema = schema.remove_metadata()
    # A dictionary of vectors or scores, all different, made files of 1,000 rows a third larger and writing 7 times slower.
    repeating = [f.name for f in schema if not (pa.types.is_floating(f.type) or pa.types.is_nested(f.type))]
    uri = storage.join(run_uri, file_name(group, shard))
    return storage.write_parquet_atomic(stream, uri, schema, metadata, use_dictionary=repeating)


def facts(run_uri: str, group: str, shard: int) -> dict[str, Any] | None:
    """What a shard's file says of itself (`source`, `rows`, …), or None where there is no readable file."""
    filesystem, path = storage.open_filesystem(storage.join(run_uri, file_name(group, shard)))
    text = _footer(filesystem, path)
    return json.loads(text) if text else None


def _footer(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Our part of a file's schema metadata, empty where there is none or no readable file."""
    try:
        return (pq.read_schema(path, filesystem=filesystem).metadata or {}).get(METADATA, b"")
    except (FileNotFoundError, pa.ArrowInvalid):
        return b""


def all_facts(run_uri: str, group: str, num_shards: int) -> list[dict[str, Any] | None]:
    """`facts` of every shard, from one listing of the folder and the footers that this process has not read yet.

    A footer is read again when its file's size or time of modification has changed, or when the file was younger than
    `SETTLED_S` as it was read. About 0.3 KB of memory stay per file.
    """
    folder = storage.join(run_uri, group)
    filesystem, root = storage.open_filesystem(folder)
    files = _shard_files(filesystem, root, num_shards)
    known = _known.setdefault(folder, {})
    unread = [s for s, info in files.items() if s not in known or known[s][:2] != (info.size, info.mtime_ns)]
    settled_ns = (time.time() - SETTLED_S) * 1e9
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        texts = dict(zip(unread, pool.map(lambda shard: _footer(filesystem, files[shard].path), unread)))
    for shard, text in texts.items():
        if files[shard].mtime_ns and files[shard].mtime_ns < settled_ns:
            known[shard] = _Known(files[shard].size, files[shard].mtime_ns, text)
    found = (texts[s] if s in texts else known[s].text if s in files else b"" for s in range(num_shards))
    return [_parsed(text) if text else None for text in found]


def missing(run_uri: str, group: str, num_shards: int) -> list[int]:
    """The shards of which a group has no file, by one listing of its folder."""
    filesystem, root = storage.open_filesystem(storage.join(run_uri, group))
    there = _shard_files(filesystem, root, num_shards)
    return [shard for shard in range(num_shards) if shard not in there]


def _shard_files(filesystem: pafs.FileSystem, root: str, num_shards: int) -> dict[int, pafs.FileInfo]:
    """The files of a group by shard: on an object store a listing names a thousand per request."""
    found = {}
    for info in filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True)):
        name = _SHARD_FILE.fullmatch(info.base_name)
        if name and info.type == pafs.FileType.File and int(name.group(1)) < num_shards:
            found[int(name.group(1))] = info
    return found


def _parsed(text: bytes) -> dict[str, Any]:
    # Interned names: a million of these dictionaries share them.
    return json.loads(text, object_pairs_hook=lambda pairs: {sys.intern(name): value for name, value in pairs})


def pending(run_uri: str, group: str, sources: Sequence[str]) -> list[int]:
    """Shards whose file of a group is missing, or was made from something else than `sources` says."""
    there = all_facts(run_uri, group, len(sources))
    return [shard for shard, source in enumerate(sources) if not there[shard] or there[shard]["source"] != source]


def read(run_uri: str, group: str, shard: int, columns: list[str] | None = None) -> pa.Table:
    """One shard's rows of a column group. FileNotFoundError where the stage has not made it; OSError names a broken file."""
    filesystem, path = storage.open_filesystem(storage.join(run_uri, file_name(group, shard)))
    with _naming(group, path):
        return pq.read_table(path, columns=columns, filesystem=filesystem, partitioning=None)


def iter_batches(
    run_uri: str, group: str, shard: int, columns: list[str], batch_rows: int = 16_384
) -> Iterator[pa.RecordBatch]:
    """One shard's rows in batches, so that memory does not grow with the shard."""
    filesystem, path = storage.open_filesystem(storage.join(run_uri, file_name(group, shard)))
    with _naming(group, path), filesystem.open_input_file(path) as stream:
        yield from pq.ParquetFile(stream).iter_batches(batch_size=batch_rows, columns=columns)


@contextlib.contextmanager
def _naming(group: str, path: str) -> Iterator[None]:
    """Put a file's name, and the way out, into what Arrow says of one that it cannot read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        what = storage.first_line(error)
        raise OSError(
            f"{path} cannot be read ({what}); if it is damaged, delete it and {columns.how_to_make(group)}"
        ) from error


def check_score(run_uri: str, num_shards: int, column: str, field: str) -> list[dict[str, Any]]:
    """The facts of each shard's file of a column that holds a number per sample.

    Raises
    ------
    ValueError
        Which names `option`, if a shard lacks the group, or the group has no such column of numbers.
    """
    group, name = columns.split_name(column, field)
    found = all_facts(run_uri, group, num_shards)
    lacking = sum(fact is None for fact in found)
    if lacking:
        raise UserError(
            f"{column}: {run_uri} has no {group}/ for {lacking} of its {num_shards} shards; {columns.how_to_make(group)}",
            field,
        )
    if len({fact["together"] for fact in found if "together" in fact}) > 1:
        raise UserError(
            f"{column}: {group}/ of {run_uri} is of two makings, of which one was stopped; {columns.how_to_make(group)}",
            field,
        )
    fields = {field.name: field.type for field in schema(run_uri, group)}
    scores = [key for key, kind in fields.items() if key not in columns.KEYS_AND_LABEL and columns.is_number(kind)]
    if name not in scores:
        raise UserError(
            f"{column}: {group}/ has no column {name!r} with a number for each sample, "
            f"it has {', '.join(scores) or 'none'}",
            field,
        )
    return found


def has_values(run_uri: str, num_shards: int, column: str) -> bool:
    """Whether any sample has a value in a column of numbers; reads shard by shard until one has."""
    group, name = columns.split_name(column)
    return any(
        pa.compute.any(pa.compute.is_finite(read(run_uri, group, shard, [name])[name])).as_py()
        for shard in range(num_shards)
    )


def schema(run_uri: str, group: str, shard: int = 0) -> pa.Schema:
    """Schema of a column group, read from one shard's file."""
    filesystem, path = storage.open_filesystem(storage.join(run_uri, file_name(group, shard)))
    with _naming(group, path):
        return pq.read_schema(path, filesystem=filesystem)


def check_fresh(group: str, shard: int, embeddings_source: str | None, found: dict[str, Any] | None) -> None:
    """ValueError if a group's file was made from embeddings that have been replaced since (its fact `embeddings`)."""
    if found and found.get("embeddings", embeddings_source) != embeddings_source:
        raise UserError(f"{group}/: shard {shard} was embedded again since; {columns.how_to_make(group)}")


def check_group_fresh(group: str, embedded: Sequence[dict[str, Any]], run_uri: str) -> None:
    """`check_fresh` of all shards of a run, of which `embedded` are the facts of the embeddings."""
    for shard, (ours, theirs) in enumerate(zip(embedded, all_facts(run_uri, group, len(embedded)))):
        check_fresh(group, shard, ours["source"], theirs)
