"""The one filesystem layer: local paths and object stores by URI; a file appears whole under its name or not at all.

A URI is a local path (`~` and relative ones too), `file:…`, a scheme pyarrow knows (s3, gs, abfs, hdfs) or one fsspec
knows. Object keys are taken literally, as the AWS tools take them: `%20` in an `s3://` URI is three characters, not a
space (pyarrow alone would decode it). `file:` URIs are percent-decoded, as `Path.as_uri` writes them. S3 reads its
endpoint, region and keys from the environment (`AWS_ENDPOINT_URL`, …) and options from the query (`?region=eu-west-1`).

Every request to a filesystem that is not local is tried again while what it meets can pass (`pipelines.runs.retries`).
Inside a run directory no link is followed in order to write or delete.
"""

import base64
import contextlib
import functools
import mmap
import os
import re
import secrets
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runs import credentials, local_files
from pipelines.runs.errors import UserError
from pipelines.runs.remote import RetryingHandler
from pipelines.runs.retries import StorageError, retrying

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_QUERY = re.compile(r"\?[a-z_]+=.*")
_BUCKETS = ("s3", "gs", "gcs")
S3_TRIES = 3  # of the client itself: a connection that was closed while idle is nothing to be said


def first_line(error: BaseException) -> str:
    """What an error says in its first line; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def scheme_of(uri: str | os.PathLike) -> str:
    """The URI's scheme in lower case; "file" for a local path."""
    found = _SCHEME.match(os.fspath(uri))
    return found.group(1).lower() if found else "file"


def local_path(uri: str | os.PathLike) -> Path | None:
    """The absolute local path that `uri` names, None if it is not local. Symbolic links are kept."""
    text = _local(uri)
    return None if text is None else Path(text)


def absolute(uri: str | os.PathLike) -> str:
    """`uri` in a form that means the same in every process, to be stored: absolute if local, without a trailing slash.

    Credentials in it are taken out; see `credentials`.
    """
    text = _local(uri)
    return text if text is not None else credentials.strip(os.fspath(uri)).rstrip("/")


def _local(uri: str | os.PathLike) -> str | None:
    text = os.fspath(uri)
    if scheme_of(text) != "file":
        return None
    if text.lower().startswith("file:"):
        text = urllib.parse.unquote(re.sub(r"^//(localhost)?(?=/)", "", text[5:], flags=re.IGNORECASE))
    return os.path.abspath(os.path.expanduser(text))


def split_query(uri: str | os.PathLike) -> tuple[str, str]:
    """An object store's URI and its query (`?region=…`) with the mark, which may be empty; of others all is the name."""
    text = os.fspath(uri)
    found = _QUERY.search(text) if scheme_of(text) in _BUCKETS else None
    return (text[: found.start()], found.group()) if found else (text, "")


def open_filesystem(uri: str | os.PathLike) -> tuple[pafs.FileSystem, str]:
    """The filesystem of `uri` and the path in it.

    Parameters
    ----------
    uri : str or PathLike
        Local path or URI (see the module's text); need not exist.

    Returns
    -------
    filesystem : pyarrow.fs.FileSystem
        One that is not local tries each request again while it can succeed; it reads, lists and deletes, and is
        written to by `write_atomic` alone.
    path : str

    Raises
    ------
    ValueError
        If no filesystem is known for the scheme, or its settings are wrong. One line.
    """
    path = local_path(uri)
    if path is not None:
        return pafs.LocalFileSystem(), str(path)
    text, scheme = credentials.complete(os.fspath(uri)), scheme_of(uri)
    try:
        if scheme in _BUCKETS:
            return _open_bucket(text)
        filesystem, inner = pafs.FileSystem.from_uri(_quoted(text))
        return _retrying(filesystem, scheme), inner
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem" in str(error):
            return _open_fsspec(text)
        raise UserError(f"{os.fspath(uri)}: {credentials.redact(first_line(error))}") from error
    except StorageError:
        raise
    except OSError as error:
        raise UserError(f"{os.fspath(uri)}: {credentials.redact(first_line(error))}") from error


def join(uri: str | os.PathLike, *parts: str) -> str:
    """`uri` with `parts` below it; a query (`?…`) stays at the end."""
    base, query = split_query(uri)
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts if part)]) + query


def exists(uri: str | os.PathLike) -> bool:
    """Whether a file or a folder stands at `uri`."""
    filesystem, path = open_filesystem(uri)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def list_infos(uri: str | os.PathLike, *, recursive: bool = True) -> list[tuple[str, pafs.FileInfo]]:
    """(URI, info) of every file below a folder, in the order of the URIs; none if there is no such folder.

    Hidden names, this layer's temporary files among them, are left out.
    """
    filesystem, root = open_filesystem(uri)
    selector = pafs.FileSelector(root, recursive=recursive, allow_not_found=True)
    found = []
    for info in filesystem.get_file_info(selector):
        below = _below(info.path, root)
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in below.split("/")):
            found.append((join(uri, below), info))
    return sorted(found, key=lambda pair: pair[0])


def list_files(uri: str | os.PathLike, suffix: str = "", *, recursive: bool = True) -> list[str]:
    """The sorted URIs of the files below the folder `uri` whose name ends in `suffix`; hidden ones left out."""
    return [name for name, info in list_infos(uri, recursive=recursive) if info.path.endswith(suffix)]


def list_folders(uri: str | os.PathLike) -> list[str]:
    """The sorted names of the folders directly below a folder, hidden ones left out."""
    filesystem, root = open_filesystem(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    names = (info.base_name for info in infos if info.type == pafs.FileType.Directory)
    return sorted(name for name in names if not name.startswith("."))


def read_bytes(uri: str | os.PathLike) -> bytes:
    """The whole content of a file."""
    filesystem, path = open_filesystem(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return stream.read()


def stored_md5(uri: str | os.PathLike) -> str | None:
    """The MD5 of an object's bytes, in hexadecimal, as the store noted it; None where it has none.

    S3 calls it the ETag of an object that was not uploaded in parts. With some kinds of encryption the ETag looks the same
    and is none, so what differs from it is a reason to read again, not a proof of anything.
    """
    if scheme_of(uri) != "s3":
        return None
    filesystem, path = open_filesystem(uri)
    etag = str(filesystem.handler.version(path)[1] or "").strip('"')
    return etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None


def file_size(uri: str | os.PathLike) -> int | None:
    """Bytes of a file as the store tells them now; None if there is none."""
    filesystem, path = open_filesystem(uri)
    return filesystem.get_file_info(path).size


def remove_tree(uri: str | os.PathLike) -> None:
    """Delete the file, or the folder with all below it, if there is one. A link is unlinked, not followed."""
    local = local_path(uri)
    if local is not None:
        local_files.remove(local)
        return
    filesystem, path = open_filesystem(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind != pafs.FileType.NotFound:
        filesystem.delete_file(path)


def sweep(uri: str | os.PathLike) -> None:
    """Delete the temporary files that killed writers left of a local product: beside it, and below a folder.

    Who calls holds the product's lease.
    """
    local = local_path(uri)
    if local is not None:
        local_files.sweep_product(local)


@contextlib.contextmanager
def write_atomic(uri: str | os.PathLike, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A local binary file to write to; on leaving without an exception it appears whole at `uri`, else nothing does.

    Locally the file is `.NAME.tmp-HOST-PID-RANDOM` beside the target, renamed over it at the end. For an object store it
    lies in the temporary folder without a name, so that nothing of it outlives its process, and goes up as one object
    after it is complete (an object is visible only once its upload has ended). A filesystem that only fsspec knows is
    treated as an object store.

    Parameters
    ----------
    uri : str or PathLike
        Target; its folders are made. An existing file is replaced.
    sync : bool
        Flush the file to the disk before the rename, so that a power cut can't leave an empty one.

    Raises
    ------
    StorageError
        If the upload fails, or the way to the target leads through a link inside a run directory.
    """
    target = local_path(uri)
    if target is None:
        with tempfile.TemporaryFile(prefix="hardset-") as file:
            yield file
            file.flush()
            _upload(file, uri)
        return
    local_files.refuse_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = local_files.temporary_beside(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(uri: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with write_atomic(uri) as file:
        file.write(text.encode())


def write_parquet_atomic(
    tables: pa.Table | Iterable[pa.Table],
    uri: str | os.PathLike,
    schema: pa.Schema | None = None,
    told: Callable[[int], dict[bytes, bytes]] | None = None,
    **options: object,
) -> int:
    """Write one Parquet file, whole or not at all; equal tables give equal bytes.

    Parameters
    ----------
    tables : Table or iterable of Tables
        Written one after the other as they come, each its own row groups; one in memory at a time.
    schema : Schema, optional
        With its metadata; by default the first table's. Needed where there may be no table. Tables are cast to it.
    told : callable, optional
        Called with the number of rows after the last table; what it returns becomes the schema's metadata.
    options
        For `pyarrow.parquet.ParquetWriter`; zstd is the default compression.

    Returns
    -------
    rows : int
    """
    stream = iter([tables] if isinstance(tables, pa.Table) else tables)
    first = next(stream, None)
    if schema is None:
        if first is None:
            raise ValueError(f"{os.fspath(uri)}: no table to write and no schema given")
        schema = first.schema
    rows, options = 0, {"compression": "zstd", "store_schema": told is None} | options
    with write_atomic(uri) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for table in _chain(first, stream):
            writer.write_table(table if table.schema.equals(schema) else table.cast(schema))
            rows += table.num_rows
        if told is not None:
            # Arrow writes a schema's metadata before the first row; this is how it looks when it comes after the last.
            metadata = told(rows)
            encoded = base64.b64encode(schema.with_metadata(metadata).serialize())
            writer.add_key_value_metadata({b"ARROW:schema": encoded} | metadata)
    return rows


def check_writable(uri: str | os.PathLike) -> None:
    """Raise a ValueError of one line unless files can be written below the folder `uri`.

    A probe is written and deleted: locally in the nearest folder that exists, so no folder is made, on an object store
    below `uri` itself, where an empty folder marker may stay.
    """
    path = local_path(uri)
    try:
        if path is None:
            probe = join(uri, f".hardset-probe-{secrets.token_hex(4)}")
            with write_atomic(probe) as file:
                file.write(b"probe")
            remove_tree(probe)
            return
        folder = next(p for p in (path, *path.parents) if os.path.lexists(p))
        if not folder.is_dir():
            raise UserError(f"{uri}: not writable, {folder} is not a folder; name another output folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{uri}: not writable ({first_line(error)}); name another output folder") from error


def _retrying(filesystem: pafs.FileSystem, scheme: str) -> pafs.FileSystem:
    return pafs.PyFileSystem(RetryingHandler(filesystem, f"{scheme}://"))


@functools.lru_cache(maxsize=64)
def _bucket(scheme: str, bucket: str, query: str) -> tuple[pafs.FileSystem, str]:
    # Cached: without a region in the URI the store is asked for it, one request each time.
    if scheme == "s3":
        found = _s3(bucket, query)
        if found is not None:
            return _retrying(found, scheme), bucket
    elif "retry_limit_seconds" not in query:  # by itself Google's client tries a quarter of an hour
        query += ("&" if query else "?") + "retry_limit_seconds=10"
    filesystem, root = retrying(f"{scheme}://{bucket}", lambda: pafs.FileSystem.from_uri(f"{scheme}://{bucket}{query}"))
    return _retrying(filesystem, scheme), root


def _s3(bucket: str, query: str) -> pafs.FileSystem | None:
    """S3 with few tries of its own (`retries` has the rest); None where the URI asks for what is not known here."""
    options = dict(urllib.parse.parse_qsl(query.removeprefix("?"), keep_blank_values=True))
    if "@" in bucket or options.keys() - {"region", "scheme", "endpoint_override"}:
        return None
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    if not options.get("region") and "endpoint_override" not in options:
        options["region"] = retrying(f"s3://{bucket}", lambda: pafs.resolve_s3_region(bucket))
    return pafs.S3FileSystem(retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_TRIES), **options)


def _open_bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    base, query = split_query(uri)
    scheme, rest = base.split("://", 1)
    bucket, _, key = rest.partition("/")
    filesystem, root = _bucket(scheme.lower(), bucket, query)
    return filesystem, "/".join(part for part in (root.rstrip("/"), key.rstrip("/")) if part)


def _open_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"{uri}: no filesystem for it ({first_line(error)})") from error
    return _retrying(pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), scheme_of(uri)), path


def _quoted(uri: str) -> str:
    scheme, rest = uri.split("://", 1)
    return f"{scheme}://{urllib.parse.quote(rest, safe='/:@?&=+,;!$()*~')}"


def _below(path: str, root: str) -> str:
    root = root.rstrip("/")
    return (
        path[len(root) :].lstrip("/")
        if path.startswith(root)
        else path.lstrip("/").removeprefix(root.lstrip("/") + "/")
    )


def _chain(first: pa.Table | None, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    if first is not None:
        yield first
        yield from rest


def _upload(source: BinaryIO, uri: str | os.PathLike) -> None:
    filesystem, path = open_filesystem(uri)
    size = os.fstat(source.fileno()).st_size
    data = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    filesystem.handler.put(pa.py_buffer(data), path)
