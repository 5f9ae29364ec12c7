"""Every column name and schema of a run directory, and how a column group is written, found and read back.

A column group is a folder of Parquet files, one per input shard, with the same keys and the rows in shard order, so that
groups join on (shard, row) without a shuffle. Each file's schema metadata says what it was made from (`source`).
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import storage

EMBEDDINGS, DIFFICULTY, QUARANTINE = "embeddings", "difficulty", "quarantine"
KEYS = (pa.field("key", pa.string()), pa.field("shard", pa.int32()), pa.field("row", pa.int64()))
LABEL = pa.field("label", pa.int64())
KEYS_AND_LABEL = (*(field.name for field in KEYS), LABEL.name)
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


class Score(NamedTuple):
    """What a score column's Arrow field metadata says of it."""

    meaning: str
    direction: str
    unit: str
    source: str


_CUI, _SQUARED = "Cui et al. 2023", "squared distance, dimensionless"
_MEMBERS = "Albiero et al. 2023"
# Every score column. Of percentiles see `percentile_fields`.
SCORES = {
    "difficulty.md": Score(
        "squared Mahalanobis distance to the labelled class", "larger = harder", _SQUARED, f"{_CUI}, eq. 6"
    ),
    "difficulty.md_agn": Score(
        "squared Mahalanobis distance to the class-agnostic Gaussian", "larger = harder", _SQUARED, f"{_CUI}, eq. 7"
    ),
    "difficulty.rmd": Score(
        "md - md_agn; without a label, of the nearest class", "larger = harder", _SQUARED, f"{_CUI}, eq. 5"
    ),
    "difficulty.weight": Score("weight of eq. 10", "larger = harder", "fraction in [0, 1]", f"{_CUI}, eq. 10"),
    "difficulty.nearest_md": Score(
        "squared Mahalanobis distance to the nearest class", "larger = harder", _SQUARED, f"{_CUI}, eq. 6"
    ),
    "difficulty.margin": Score(
        "md - the smallest md of another class",
        "larger = more suspicious label; above 0 = nearer another class",
        _SQUARED,
        "hardset",
    ),
    "difficulty.kmeans": Score(
        "Euclidean distance to the nearest k-means centre", "larger = harder", "distance in the embedding", "hardset"
    ),
    "confusion.confusion": Score(
        "entropy of the members' mean probabilities, mean over epochs",
        "larger = harder",
        "bits",
        f"{_MEMBERS}, eq. 1-3",
    ),
    "confusion.entropy_std": Score(
        "standard deviation over the epochs of the entropy", "larger = less settled", "bits", "hardset"
    ),
    "predictions.confidence": Score(
        "largest softmax probability", "larger = safer", "probability in [1/K, 1]", "Hendrycks and Gimpel 2017"
    ),
    "trust.trust": Score(
        "the oracle's z: a signed distance or a logit; sigmoid(z) is the confidence",
        "larger = safer; above 0 = trusted",
        "logit",
        "Luo et al. 2021",
    ),
    "correctness.correctness": Score(
        "share of the training epochs in which the sample was right", "larger = easier", "fraction in [0, 1]", "hardset"
    ),
}
# The scores that get percentiles, by column group.
RANKED = {DIFFICULTY: ("rmd", "margin"), "confusion": ("confusion",)}


def score_field(column: str) -> pa.Field:
    """A float32 column of `SCORES`, with what it is, in which direction it points, its unit and source as metadata."""
    return pa.field(column.rpartition(".")[2], pa.float32(), metadata=SCORES[column]._asdict())


def percentile_fields(column: str) -> list[pa.Field]:
    """The two columns that say where a score stands: `NAME_percentile` among all, `NAME_percentile_in_class`."""
    name = column.rpartition(".")[2]
    direction = SCORES[column].direction.partition(";")[0]
    fields = []
    for suffix, among in (("", "all samples"), ("_in_class", "the samples of its class")):
        about = {
            "meaning": f"share of {among} of the reference whose {name} does not exceed this one's; ties share it",
            "direction": direction,
            "unit": "fraction in [0, 1]",
            "percentile_of": name,
        }
        fields.append(pa.field(f"{name}_percentile{suffix}", pa.float32(), metadata=about))
    return fields


def known_field(group: str, field: pa.Field) -> pa.Field:
    """The field with today's metadata, where it is a score of ours: files of an older version may say less."""
    column = f"{group}.{field.name}"
    return score_field(column) if column in SCORES else field


def about(field: pa.Field) -> dict[str, str]:
    """The metadata of a column as text: `meaning`, `direction`, `unit`, `source`; of a percentile `percentile_of`."""
    return {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}


def embeddings_schema(width: int, dtype: str, views: int) -> pa.Schema:
    """Schema of `embeddings/`: `embedding` of the plain image, `augmented` its other views - 1 views end to end."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    fields = [*KEYS, LABEL, pa.field("embedding", pa.list_(value, width))]
    if views > 1:
        fields.append(pa.field("augmented", pa.list_(value, width * (views - 1))))
    return pa.schema(fields)


DIFFICULTY_SCHEMA = pa.schema(
    [
        *KEYS,
        LABEL,
        *(score_field(f"difficulty.{name}") for name in ("md", "md_agn", "rmd", "weight")),
        pa.field("nearest_class", pa.int64()),
        *(score_field(f"difficulty.{name}") for name in ("nearest_md", "margin")),
        *(field for name in RANKED[DIFFICULTY] for field in percentile_fields(f"difficulty.{name}")),
    ]
)
KMEANS = score_field("difficulty.kmeans")

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int64()),
        pa.field("key", pa.string()),
        pa.field("member", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
    ]
)


def check_name(option: str, name: str) -> None:
    """A prediction set, a trust set or a subset is called as a folder can be; ValueError otherwise."""
    if not name or name != name.strip(". ") or any(c in name for c in "/\\:") or not name.isprintable():
        raise ValueError(f"{option} {name!r}: expected a plain folder name")


def file_name(group: str, shard: int) -> str:
    """Path inside a run of the file of a column group that belongs to a shard."""
    return f"{group}/{shard:06d}.parquet"


def write(run_uri: str, group: str, shard: int, table: pa.Table, source: str, **more: Any) -> None:
    """Write one shard's file of a column group, whole or not at all; `source` and `more` facts go into its metadata.

    So does the source of the shard's embeddings as `embeddings`, whose rows the group has: see `check_fresh`.
    """
    told = {"source": source, "rows": table.num_rows, **more}
    if group not in (EMBEDDINGS, QUARANTINE) and "embeddings" not in told:
        told["embeddings"] = (facts(run_uri, EMBEDDINGS, shard) or {}).get("source")
    table = table.replace_schema_metadata({METADATA: json.dumps(told, sort_keys=True)})
    # A dictionary of vectors or scores, all different, made files of 1,000 rows a third larger and writing 7 times slower.
    repeating = [f.name for f in table.schema if not (pa.types.is_floating(f.type) or pa.types.is_nested(f.type))]
    storage.write_parquet_atomic(table, storage.join(run_uri, file_name(group, shard)), use_dictionary=repeating)


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
            f"{path} cannot be read ({what}); if it is damaged, delete it and {how_to_make(group)}"
        ) from error


def split_name(column: str, option: str = "column") -> tuple[str, str]:
    """'difficulty.rmd' -> ('difficulty', 'rmd'); a prediction set's column is 'predictions/NAME.confidence'."""
    group, dot, name = column.rpartition(".")
    if not dot or not group or not name:
        raise ValueError(f"{option} {column}: expected GROUP.COLUMN, such as difficulty.rmd")
    return group, name


def check_score(run_uri: str, num_shards: int, column: str, option: str) -> list[dict[str, Any]]:
    """The facts of each shard's file of a column that holds a number per sample.

    Raises
    ------
    ValueError
        Which names `option`, if a shard lacks the group, or the group has no such column of numbers.
    """
    group, name = split_name(column, option)
    found = all_facts(run_uri, group, num_shards)
    lacking = sum(fact is None for fact in found)
    if lacking:
        raise ValueError(
            f"{option} {column}: {run_uri} has no {group}/ for {lacking} of its {num_shards} shards; {how_to_make(group)}"
        )
    fields = {field.name: field.type for field in schema(run_uri, group)}
    scores = [key for key, kind in fields.items() if key not in KEYS_AND_LABEL and is_number(kind)]
    if name not in scores:
        raise ValueError(
            f"{option} {column}: {group}/ has no column {name!r} with a number for each sample, "
            f"it has {', '.join(scores) or 'none'}"
        )
    return found


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type orders samples."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def how_to_make(group: str) -> str:
    """`run hardset score first`, for a group that is not there."""
    makers = {DIFFICULTY: "score", "correctness": "train", "predictions": "predict", EMBEDDINGS: "embed"}
    kind = group.partition("/")[0]
    return f"run hardset {makers.get(kind, kind)} first"


def vectors(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as an array of shape (rows, width), without a copy where it is contiguous."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def vector_array(values: np.ndarray, value_type: pa.DataType) -> pa.FixedSizeListArray:
    """An array of shape (rows, width) as a fixed-size-list column."""
    flat = pa.array(np.ascontiguousarray(values, dtype=value_type.to_pandas_dtype()).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def labels_or_minus_one(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The label column as int64, -1 where there is none."""
    filled = column.fill_null(-1)
    return np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)


def concat(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Tables under one schema, also where there are none."""
    return pa.concat_tables([schema.empty_table(), *tables]).cast(schema)


def schema(run_uri: str, group: str, shard: int = 0) -> pa.Schema:
    """Schema of a column group, read from one shard's file."""
    filesystem, path = storage.open_filesystem(storage.join(run_uri, file_name(group, shard)))
    with _naming(group, path):
        return pq.read_schema(path, filesystem=filesystem)


def join(run_uri: str, shard: int, names: Iterable[str]) -> pa.Table:
    """One shard's keys, label and the named columns ('difficulty.rmd'; 'embeddings.embedding'), joined by row.

    The rows are those of `embeddings/`; where a group lacks a row its columns are null. Columns keep their full names.

    Raises
    ------
    ValueError
        If the run has no such group or column.
    """
    base = read(run_uri, EMBEDDINGS, shard, ["key", "shard", "row", "label"])
    rows = base["row"].to_numpy()
    wanted: dict[str, list[str]] = {}
    for full in names:
        group, name = split_name(full)
        wanted.setdefault(group, []).append(name)
    made_from = (facts(run_uri, EMBEDDINGS, shard) or {}).get("source")
    for group, columns_of_group in wanted.items():
        check_fresh(group, shard, made_from, facts(run_uri, group, shard))
        found = _read_named(run_uri, group, shard, columns_of_group)
        theirs = found["row"].to_numpy()
        if not np.array_equal(rows, theirs):
            at = np.searchsorted(theirs, rows).clip(max=max(0, len(theirs) - 1))
            missing = theirs[at] != rows if len(theirs) else np.ones(len(rows), bool)
            found = found.take(pa.array(at, mask=missing))
        for name in columns_of_group:
            base = base.append_column(found.schema.field(name).with_name(f"{group}.{name}"), found[name])
    return base


def check_fresh(group: str, shard: int, embeddings_source: str | None, found: dict[str, Any] | None) -> None:
    """ValueError if a group's file was made from embeddings that have been replaced since (its fact `embeddings`)."""
    if found and found.get("embeddings", embeddings_source) != embeddings_source:
        raise ValueError(f"{group}/: shard {shard} was embedded again since; {how_to_make(group)}")


def check_group_fresh(group: str, embedded: Sequence[dict[str, Any]], run_uri: str) -> None:
    """`check_fresh` of all shards of a run, of which `embedded` are the facts of the embeddings."""
    for shard, (ours, theirs) in enumerate(zip(embedded, all_facts(run_uri, group, len(embedded)))):
        check_fresh(group, shard, ours["source"], theirs)


def _read_named(run_uri: str, group: str, shard: int, names: list[str]) -> pa.Table:
    try:
        there = schema(run_uri, group, shard).names
    except FileNotFoundError:
        raise ValueError(f"{run_uri} has no {group}/ for shard {shard}; {how_to_make(group)}") from None
    for name in names:
        if name not in there:
            scores = ", ".join(n for n in there if n not in KEYS_AND_LABEL)
            raise ValueError(f"column {group}.{name}: {group}/ has no column {name!r}, it has {scores}")
    return read(run_uri, group, shard, list(dict.fromkeys(["row", *names])))


def load(run_uri: str, names: Iterable[str]) -> pa.Table:
    """Columns of a whole run as one Arrow table, for a notebook: `load(RUN, ["difficulty.rmd", "difficulty.margin"])`.

    Memory grows with the run; the stages themselves go shard by shard.
    """
    files = storage.list_files(storage.join(run_uri, EMBEDDINGS), ".parquet")
    return pa.concat_tables([join(run_uri, shard, list(names)) for shard in range(len(files))])
