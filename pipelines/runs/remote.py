"""Any filesystem but the local one, with every request tried again as `pipelines.runs.retries` says."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.runs.retries import StorageError, lasting, retrying

Result = TypeVar("Result")


class RetryingHandler(pafs.FileSystemHandler):
    """A filesystem through another one; `name` (`s3://`, …) goes before a path in what is said of it.

    Files that it opens for reading stand at any place and open themselves again where the connection broke; a file that
    was replaced meanwhile is an error, never a mixture.
    """

    def __init__(self, inner: pafs.FileSystem, name: str):
        self.inner, self.name = inner, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryingHandler) and self.inner.equals(other.inner) and self.name == other.name

    def get_type_name(self) -> str:
        return self.inner.type_name

    def normalize_path(self, path: str) -> str:
        return self.inner.normalize_path(path)

    def get_file_info(self, paths: Sequence[str]) -> list[pafs.FileInfo]:
        found = self._do(paths[0] if len(paths) == 1 else "", lambda: self.inner.get_file_info(paths))
        missing = [info.path for info in found if info.type == pafs.FileType.NotFound]
        if missing and isinstance(self.inner, pafs.S3FileSystem):
            # The answer for a missing object and for one in a missing bucket is the same.
            for bucket in {path.partition("/")[0] for path in missing if "/" in path}:
                self._require_bucket(bucket)
        return found

    def _require_bucket(self, bucket: str) -> None:
        if self._do(bucket, lambda: self.inner.get_file_info(bucket)).type == pafs.FileType.NotFound:
            raise StorageError(
                f"{self.name}{bucket}: there is no such bucket: check its name, and the endpoint and region"
            )

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found = self._do(selector.base_dir, lambda: self.inner.get_file_info(selector))
        if not found and isinstance(self.inner, pafs.S3FileSystem):
            self._require_bucket(selector.base_dir.partition("/")[0])
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do(path, lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._do(path, lambda: self._delete(path, self.inner.delete_dir))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._do(path, lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise PermissionError("the whole of a filesystem is never deleted")

    def delete_file(self, path: str) -> None:
        self._do(path, lambda: self._delete(path, self.inner.delete_file))

    def _delete(self, path: str, delete: Callable[[str], None]) -> None:
        # A deletion whose answer was lost is repeated: that it is gone is what was wanted.
        if self.inner.get_file_info(path).type != pafs.FileType.NotFound:
            delete(path)

    def move(self, src: str, dest: str) -> None:
        self._do(src, lambda: self.inner.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._do(src, lambda: self.inner.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(_RetryingFile(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("written whole: pipelines.runs.storage.write_atomic")

    open_append_stream = open_output_stream

    def version(self, path: str) -> tuple[int, str | None]:
        """Size of an object and its ETag, which differs between contents; None where the store has no such."""

        def ask() -> tuple[int, str | None]:
            with self.inner.open_input_file(path) as raw:
                return _version(raw)

        return self._do(path, ask)

    def put(self, data: pa.Buffer, path: str) -> None:
        """One object with these bytes, in one request or in parts; visible only when it is whole."""

        def write() -> None:
            if not isinstance(self.inner, pafs.S3FileSystem | pafs.GcsFileSystem):
                self.inner.create_dir(path.rpartition("/")[0], recursive=True)
            # One write: nothing of ours can fail between the first byte and the last, and a part that the store refuses
            # makes the close fail too, so a partial object never gets its name.
            stream = self.inner.open_output_stream(path, compression=None)
            try:
                if data.size:
                    stream.write(data)
            finally:
                stream.close()

        self._do(path, write)

    def _do(self, path: str, work: Callable[[], Result]) -> Result:
        return retrying(self.name + path, work, lambda error: self._reason(path))

    def _reason(self, path: str) -> str | None:
        """What the store says of a request with a body where one without failed."""
        if not isinstance(self.inner, pafs.S3FileSystem):
            return None
        try:
            self.inner.get_file_info(
                pafs.FileSelector(f"{path.partition('/')[0]}/.hardset-no-such-folder", allow_not_found=True)
            )
        except OSError as error:
            return lasting(error)
        return None


class _RetryingFile:
    """A file for reading at any place, as Arrow's PythonFile wants it."""

    closed = False

    def __init__(self, handler: RetryingHandler, path: str):
        self._handler, self._path, self._position = handler, path, 0
        self._raw: pa.NativeFile | None = None
        self._first: Any = None
        self._size: int | None = None
        handler._do(path, self._open)

    def _open(self) -> pa.NativeFile:
        if self._raw is None:
            raw = self._handler.inner.open_input_file(self._path)
            version = _version(raw)
            if self._first is None:
                self._first = version
                self._size = raw.size()
            elif version != self._first:
                raise StorageError(f"{self._handler.name}{self._path}: it was replaced while it was read")
            self._raw = raw
        return self._raw

    def read(self, size: int | None = -1) -> bytes:
        left = self._size - self._position
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._handler._do(self._path, lambda: self._read(wanted)) if wanted > 0 else b""
        self._position += len(data)
        return data

    def _read(self, wanted: int) -> bytes:
        try:
            raw = self._open()
            if raw.tell() != self._position:
                raw.seek(self._position)
            data = raw.read(wanted)
            while len(data) < wanted:
                more = raw.read(wanted - len(data))
                if not more:
                    raise ConnectionError(f"partial answer: {len(data)} bytes of {wanted}")
                data += more
            return data
        except BaseException:
            self._drop()
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        self._drop()

    def _drop(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.close()


def _version(raw: pa.NativeFile) -> tuple[int, str | None]:
    try:
        etag = (raw.metadata() or {}).get("ETag")
    except (OSError, NotImplementedError):
        etag = None
    return raw.size(), None if etag is None else etag.decode()
