"""Export: columns of a run -> the files that other tools read. Streamed shard by shard, one shard's rows at a time.

table     any columns, joined: .parquet, .arrow or .csv
labels    the labels that hold now, with the corpus's and the decision beside them: .parquet, .arrow or .csv
cleanlab  is_label_issue, label_score, given_label, predicted_label: .parquet, .arrow or .csv
npy       a folder: embeddings.npy, to be memory-mapped, and metadata.parquet, rows alike
fiftyone  a folder: data/ with the images, labels.csv (FiftyOne's CSVDataset)
datacomp  a subset's uids.npy (DataComp's subset file)
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from ops.decoding import format_of
from ops.label_quality import label_quality_of_margin, normalized_margin
from pipelines.corpus import text
from pipelines.corpus.samples import SampleNumbering, member_rank
from pipelines.corpus.shards import read_images
from pipelines.corpus.tarstream import ByteStream, TarStream
from pipelines.curation.select import write_uids
from pipelines.runs import column_groups, columns, joins, storage
from pipelines.runs.errors import UserError
from pipelines.runs.labels import DECISION
from pipelines.runs.record import Run

FORMATS = ("table", "labels", "cleanlab", "npy", "fiftyone", "datacomp")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv")
EMBEDDING = "embeddings.embedding"
AHEAD = 4  # shards read while one is written
FORMULA = r"^([=+\-@\t\r])"  # what begins one, for Excel, LibreOffice and Google Sheets
JSON_BYTES = 1 << 20  # a json member longer than this is no metadata


def export(
    run: Run,
    to: str,
    out: str,
    names: Sequence[str] = (),
    subset: str | None = None,
    predictions: str | None = None,
    threshold: float = 0.5,
    uid: str = "sha256",
) -> dict[str, Any]:
    """Write columns of a run in a form that another tool reads.

    Parameters
    ----------
    run : Run
    to : str
        One of `FORMATS`.
    out : str
        The file to write; of npy and fiftyone the folder.
    names : sequence of str
        'GROUP.COLUMN'; by default every score of difficulty and confusion, of npy the embeddings alone.
    subset : str, optional
        Only the samples of this subset of the run.
    predictions : str, optional
        cleanlab: judge labels by these predictions instead of the margin.
    threshold : float
        cleanlab: a label whose score is below this is an issue.
    uid : str
        datacomp: sha256, of the image's bytes, or json:FIELD, where the shards hold uids of 32 hexadecimal digits.

    Returns
    -------
    written : dict
        format, rows, files, seconds; cleanlab: issues.

    Raises
    ------
    ValueError
        If a column, the subset or the predictions are not there, or `out` does not fit the format.
    """
    started = time.monotonic()
    if subset is not None and not storage.exists(_manifest(run, subset)):
        raise UserError(f"{subset}: {run.uri} has none of that name; make it with hardset select", "subset")
    storage.check_writable(out.rpartition("/")[0] if "/" in out else ".")
    if to == "datacomp":
        written = _export_uids(run, out, subset, uid)
    elif to == "npy":
        written = _export_arrays(run, out, names or [EMBEDDING], subset)
    elif to == "fiftyone":
        written = _export_images(run, out, names or score_columns(run), subset)
    elif to == "labels":
        written = {"rows": write_table(_label_tables(run, subset), out), "files": [out]}
    elif to == "cleanlab":
        written = _export_label_issues(run, out, names, subset, predictions, threshold)
    else:
        tables = shard_tables(run, names or score_columns(run), subset)
        written = {"rows": write_table(tables, out), "files": [out]}
    return {"format": to, **written, "seconds": time.monotonic() - started}


def score_columns(run: Run) -> list[str]:
    """Every score that a run has in difficulty and confusion. ValueError without any."""
    found = []
    for group in (columns.DIFFICULTY, "confusion"):
        if storage.exists(run.path(column_groups.file_name(group, 0))):
            keys = {"key", "shard", "row", "label"}
            found += [f"{group}.{name}" for name in column_groups.schema(run.uri, group).names if name not in keys]
    if not found:
        raise UserError(f"{run.uri}: it has no scores yet; run hardset score, or name `columns`", "run")
    return found


def _manifest(run: Run, subset: str) -> str:
    return run.path("subsets", subset, "manifest.parquet")


def subset_rows(run: Run, subset: str) -> Iterator[tuple[int, np.ndarray]]:
    """(shard, its rows) of a subset, in the order of the run's shards; one batch of the manifest in memory."""
    filesystem, path = storage.open_filesystem(_manifest(run, subset))
    held: list[np.ndarray] = []
    current = None
    with filesystem.open_input_file(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(columns=["shard", "row"]):
            shards, rows = batch["shard"].to_numpy(), batch["row"].to_numpy()
            starts = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1]) if len(shards) else []
            for start, part in zip(starts, np.split(rows, starts[1:])):
                if shards[start] != current and held:
                    yield int(current), np.concatenate(held)
                    held = []
                current = shards[start]
                held.append(part)
    if held:
        yield int(current), np.concatenate(held)


def num_rows(run: Run, subset: str | None = None) -> int:
    """Samples of a run, or of a subset of it."""
    if subset is None:
        return sum(facts["rows"] for facts in run.embedding_facts())
    filesystem, path = storage.open_filesystem(_manifest(run, subset))
    return pq.read_metadata(path, filesystem=filesystem).num_rows


def shard_tables(run: Run, names: Iterable[str], subset: str | None = None) -> Iterator[pa.Table]:
    """Keys, label and columns of one shard after the other, some read ahead; ValueError for a column that is not there."""
    wanted = list(dict.fromkeys(names))

    def table_of(shard: int, rows: np.ndarray | None) -> pa.Table:
        table = joins.join(run.uri, shard, wanted).replace_schema_metadata(None)  # a shard's own facts
        return table if rows is None else table.filter(pa.array(np.isin(table["row"].to_numpy(), rows)))

    parts = (
        ((shard, None) for shard in range(len(run.embedding_facts()))) if subset is None else subset_rows(run, subset)
    )
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque = deque()
        for part in parts:
            waiting.append(pool.submit(table_of, *part))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def check_table_name(out: str) -> None:
    """ValueError unless a file name says how a table is to be written."""
    if not out.endswith(TABLE_SUFFIXES):
        raise UserError(f"{out}: expected a file name that ends in {', '.join(TABLE_SUFFIXES)}", "out")


def write_table(tables: Iterable[pa.Table], out: str) -> int:
    """Write tables of one schema to a .parquet, .arrow or .csv file, whole or not at all; returns the rows."""
    check_table_name(out)
    rows, writer = 0, None
    with ExitStack() as stack:
        stream = stack.enter_context(storage.write_atomic(out))
        for table in tables:
            writer = writer or stack.enter_context(_open_writer(stream, table.schema, out))
            writer.write_table(without_formulas(table) if out.endswith(".csv") else table)
            rows += table.num_rows
        if writer is None:
            raise UserError(f"{out}: there is not one shard to export", "out")
    return rows


def without_formulas(table: pa.Table) -> pa.Table:
    """Text that a spreadsheet would take for a formula, as keys and class names of strangers may be, with a ' in front."""
    for at, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            plain = pa.compute.replace_substring_regex(table[field.name], FORMULA, r"'\1")
            table = table.set_column(at, field, plain)
    return table


def _open_writer(stream: BinaryIO, schema: pa.Schema, out: str) -> AbstractContextManager:
    if out.endswith(".parquet"):
        return pq.ParquetWriter(stream, schema, compression="zstd")
    if out.endswith(".arrow"):
        return pa.ipc.new_file(stream, schema)
    nested = [field.name for field in schema if pa.types.is_nested(field.type)]
    if nested:
        raise UserError(f"{nested[0]}: a CSV file holds no vectors; take .parquet, or `to` npy", "columns")
    return pcsv.CSVWriter(stream, schema)


def _label_tables(run: Run, subset: str | None) -> Iterator[pa.Table]:
    """key, shard, row, label, original_label, decision of one shard after the other; classes by name where there are names."""
    names = run.config.class_names
    for table in shard_tables(run, [DECISION], subset):
        shard = table["shard"][0].as_py() if table.num_rows else 0
        known = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["row", "label"])
        original = known.filter(pa.compute.is_in(known["row"], table["row"].combine_chunks()))["label"]
        yield pa.table(
            {
                **{name: table[name] for name in ("key", "shard", "row")},
                "label": _named(table["label"], names),
                "original_label": _named(original, names),
                "decision": table[DECISION],
            }
        )


def _export_label_issues(
    run: Run, out: str, names: Sequence[str], subset: str | None, predictions: str | None, threshold: float
) -> dict[str, Any]:
    sources = ["difficulty.margin", "difficulty.nearest_class"]
    if predictions is not None:
        sources = [f"predictions/{predictions}.logits", f"predictions/{predictions}.prediction"]
    issues = 0

    def judged() -> Iterator[pa.Table]:
        nonlocal issues
        for table in shard_tables(run, [*sources, *names], subset):
            labelled = label_issues(table, *sources, run.config.class_names, threshold)
            issues += pa.compute.sum(labelled["is_label_issue"]).as_py() or 0
            for name in names:
                labelled = labelled.append_column(table.schema.field(name), table[name])
            yield labelled

    return {"rows": write_table(judged(), out), "files": [out], "issues": issues}


def label_issues(
    table: pa.Table, evidence: str, suggestion: str, class_names: Sequence[str] | None, threshold: float
) -> pa.Table:
    """cleanlab's columns of a shard's samples; null where a sample has no label or no score.

    `evidence` names the margin or the logits among the table's columns, `suggestion` the predicted class. Classes are told
    by name where the run has names, else by number.
    """
    labels = columns.labels_or_minus_one(table["label"])
    if pa.types.is_fixed_size_list(table.schema.field(evidence).type):
        quality = normalized_margin(columns.vectors(table[evidence]), labels)
    else:
        quality = label_quality_of_margin(table[evidence].fill_null(np.nan).to_numpy())
    unknown = np.isnan(quality)
    about = {"meaning": "quality of the given label", "direction": "lower = worse", "unit": "fraction in [0, 1]"}
    fields = {
        "is_label_issue": (pa.array(quality < threshold, mask=unknown), None),
        "label_score": (pa.array(quality, mask=unknown), about),
        "given_label": (_named(table["label"], class_names), None),
        "predicted_label": (_named(table[suggestion], class_names), None),
    }
    result = table.select(["key", "shard", "row"])
    for name, (array, metadata) in fields.items():
        result = result.append_column(pa.field(name, array.type, metadata=metadata), array)
    return result


def _named(labels: pa.ChunkedArray, class_names: Sequence[str] | None) -> pa.Array:
    labels = labels.combine_chunks()
    return labels if class_names is None else pa.array(class_names, pa.string()).take(labels)


def _export_arrays(run: Run, out: str, names: Sequence[str], subset: str | None) -> dict[str, Any]:
    """Vector columns as one .npy each, the others with the keys as metadata.parquet; all rows in the same order."""
    rows, found, files = num_rows(run, subset), 0, {}
    metadata = storage.join(out, "metadata.parquet")
    with ExitStack() as stack:

        def split() -> Iterator[pa.Table]:
            nonlocal found
            for table in shard_tables(run, names, subset):
                for name in _vector_columns(table, names):
                    values = columns.vectors(table[name])
                    if name not in files:
                        files[name] = _open_array(stack, storage.join(out, array_name(name)), rows, values)
                    files[name](values)
                found += table.num_rows
                yield table.drop_columns(list(files))

        write_table(split(), metadata)
        assert found == rows, f"{found} rows written of {rows}"
    return {"rows": rows, "files": [*(storage.join(out, array_name(name)) for name in files), metadata]}


def _vector_columns(table: pa.Table, names: Sequence[str]) -> list[str]:
    found = [name for name in names if pa.types.is_fixed_size_list(table.schema.field(name).type)]
    if not found:
        raise UserError(f"{' '.join(names)}: `to` npy needs a column of vectors, such as {EMBEDDING}", "columns")
    for name in found:
        if table[name].null_count:
            raise UserError(f"{name}: {table[name].null_count} samples of a shard have none", "columns")
    return found


def array_name(column: str) -> str:
    """'embeddings.embedding' -> embeddings.npy; other vectors keep their full name."""
    return "embeddings.npy" if column == EMBEDDING else column.replace("/", "_") + ".npy"


def _open_array(stack: ExitStack, out: str, rows: int, like: np.ndarray) -> Callable[[np.ndarray], object]:
    """Start a .npy of known shape; returns what appends rows to it."""
    stream = stack.enter_context(storage.write_atomic(out))
    header = {
        "descr": np.lib.format.dtype_to_descr(like.dtype),
        "fortran_order": False,
        "shape": (rows, like.shape[1]),
    }
    np.lib.format.write_array_header_2_0(stream, header)
    return lambda values: stream.write(np.ascontiguousarray(values).data)


def _export_images(run: Run, out: str, names: Sequence[str], subset: str | None) -> dict[str, Any]:
    """data/SHARD/ROW.ext with the original bytes and labels.csv; memory: the chosen images of one shard."""
    labels = storage.join(out, "labels.csv")

    def extracted() -> Iterator[pa.Table]:
        for table in shard_tables(run, names, subset):
            yield _fiftyone_rows(table, _write_images(run, table, storage.join(out, "data")), run.config.class_names)

    return {"rows": write_table(extracted(), labels), "files": [labels, storage.join(out, "data")]}


def _write_images(run: Run, table: pa.Table, folder: str) -> list[str]:
    """Write the images of a shard's rows; their paths below `folder`, which no key can lead out of."""
    if not table.num_rows:
        return []
    shard, paths = table["shard"][0].as_py(), []
    for row, data in read_images(run.shards[shard], table["row"].to_pylist()):
        paths.append(f"{shard:06d}/{row:08d}.{format_of(data)}")
        with storage.write_atomic(storage.join(folder, paths[-1]), sync=False) as stream:
            stream.write(data)
    return paths


def _fiftyone_rows(table: pa.Table, paths: Sequence[str], class_names: Sequence[str] | None) -> pa.Table:
    """`filepath` first; FiftyOne's field names hold neither dots nor slashes."""
    label = _named(table["label"], class_names)
    table = table.set_column(table.schema.get_field_index("label"), "label", label)
    names = [name.replace(".", "_").replace("/", "_") for name in table.column_names]
    return table.rename_columns(names).add_column(0, "filepath", pa.array(paths, pa.string()))


def _export_uids(run: Run, out: str, subset: str | None, uid: str) -> dict[str, Any]:
    kind, colon, field = uid.partition(":")
    if subset is None:
        raise UserError("datacomp: a uid file names chosen samples; add `subset` NAME, made with hardset select", "to")
    if not out.endswith(".npy"):
        raise UserError(f"{out}: expected a file name that ends in .npy", "out")
    if uid == "sha256":
        filesystem, path = storage.open_filesystem(_manifest(run, subset))
        digests = pq.read_table(path, columns=["sha256"], filesystem=filesystem)["sha256"]
        uids = [digest[:32] for digest in digests.to_pylist()]
    elif kind == "json" and colon and field:
        tars = storage.list_files(run.path("subsets", subset), ".tar")
        uids = [value for tar in tars for value in _json_uids(tar, field)]
        if len(uids) != num_rows(run, subset):
            raise UserError(f"{uid}: {len(uids)} of {num_rows(run, subset)} samples have a json member", "uid")
    else:
        raise UserError(f"{uid}: expected sha256 or json:FIELD", "uid")
    write_uids(out, uids)
    return {"rows": len(uids), "files": [out]}


def _json_uids(uri: str, field: str) -> Iterator[str]:
    """The uids in the json members of a subset's tar, which select wrote: one of each sample that has such a member."""
    filesystem, path = storage.open_filesystem(uri)
    stream = ByteStream(lambda: filesystem.open_input_stream(path, compression=None))
    tar, numbering, row, best = TarStream(stream), SampleNumbering(), -1, (0, b"", "")
    try:
        while (member := tar.next()) is not None:
            place = numbering.place(member)
            if place is None or member.kind != "file" or member.size > JSON_BYTES:
                continue
            if place.row != row and best[0]:
                yield _checked_uid(best[1], field, best[2])
            row, best = place.row, best if place.row == row else (0, b"", "")
            rank = member_rank(place.suffix, ("json",))
            if rank > best[0]:
                best = (rank, tar.body(), f"{uri}: {member.name}")
    finally:
        stream.close()
    if best[0]:
        yield _checked_uid(best[1], field, best[2])


def _checked_uid(data: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(text.decode(data))[field]
        if len(value) == 32 and int(value, 16) >= 0:
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"json:{field}: {where} holds no uid of 32 hexadecimal digits under {field!r}", "uid")
