"""A strict reader of tar files as a stream: nothing is skipped silently, every damage is said with its byte position.

Python's `tarfile`, and with it plain `webdataset`, ends without an error at a damaged or missing header: half a shard
can vanish. Here a tar is whole only if each header's checksum holds, every member is there to its last byte, and after
two zero blocks comes nothing but zero bytes or another tar (joined by `cat`), read on. One that stops behind a member
without these blocks is read too, and says so: it was written that way, or cut exactly there. Understood: ustar, old v7,
GNU long names, base-256 sizes, pax path and size, gzip around it all. Memory is one chunk plus the member asked for.
Links are never followed, nothing is written.
"""

import abc
import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from pipelines.runs.retries import StorageError, can_pass

BLOCK = 512
CHUNK_BYTES = 4 << 20  # one request on an object store
END_BYTES = 64 << 10  # of each end of a shard: by these it is known again elsewhere
MAX_TEXT_BYTES = 64 << 10  # of a name in an extended header; the rest of a longer one is passed over


_REGULAR = b"\x000\x37"  # NUL (v7), "0", "7" (contiguous)
_BODILESS = b"123456"  # links, devices, folders, pipes: their size field means nothing
_GZIP = b"\x1f\x8b"


class TarDamage(Exception):
    """The tar can't be read further; the message says why and at which byte."""


class Member(NamedTuple):
    """One member: name as stored (UTF-8, other bytes as surrogates), body size in bytes, where its header stands.

    `offset` is the byte of the shard at which the body begins, None in a gzip-compressed one.
    """

    name: str
    size: int
    position: int
    kind: str  # "file", "folder", "link" or "special"
    offset: int | None


class Chunks(abc.ABC):
    """A binary stream in chunks, which `_fetch` gets: counted, and handed out in pieces of any size."""

    def __init__(self) -> None:
        self._chunk, self._offset, self._before = b"", 0, 0

    @abc.abstractmethod
    def _fetch(self) -> bytes:
        """The next bytes; none at the end."""

    @property
    def position(self) -> int:
        """Bytes handed out so far."""
        return self._before + self._offset

    def peek(self, size: int) -> bytes:
        """The next bytes, at most `size` and no more than a chunk holds, which are still to come; none at the end."""
        if self._offset >= len(self._chunk):
            self._refill()
        return self._chunk[self._offset : self._offset + size]

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end of the stream."""
        start = self._offset
        if start + size <= len(self._chunk):
            self._offset = start + size
            return self._chunk[start : start + size]
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces of at most a chunk; fewer only at the end of the stream."""
        while size > 0 and (self._offset < len(self._chunk) or self._refill()):
            piece = self._chunk[self._offset : self._offset + size]
            self._offset += len(piece)
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> int:
        """Pass over `size` bytes; how many there were."""
        if self._offset + size <= len(self._chunk):
            self._offset += size
            return size
        start = self.position
        while size > 0 and (self._offset < len(self._chunk) or self._refill()):
            step = min(size, len(self._chunk) - self._offset)
            self._offset += step
            size -= step
        return self.position - start

    def drain(self) -> None:
        """Pass over the rest."""
        while self._refill():
            pass

    def _refill(self) -> bool:
        self._before += len(self._chunk)
        self._chunk, self._offset = b"", 0
        self._chunk = self._fetch()
        return bool(self._chunk)


class ByteStream(Chunks):
    """Counts, times and hashes what is read from `open_raw()`, a function that opens a binary stream.

    Attributes
    ----------
    seconds : float
        Spent opening and reading the storage.
    expected_md5 : str or None
        What the store says of the whole file; only then `md5()` is computed.
    """

    def __init__(
        self, open_raw: Callable[[], BinaryIO], chunk_bytes: int = CHUNK_BYTES, expected_md5: str | None = None
    ):
        super().__init__()
        self.seconds, self.expected_md5 = 0.0, expected_md5
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._hash, self._head, self._tail, self._chunk_bytes = hashlib.sha256(), b"", b"", chunk_bytes
        self._raw = self._timed(open_raw)

    def digest(self) -> str:
        """sha256, in hexadecimal, of every byte fetched so far: of the whole file after its end was reached."""
        return self._hash.hexdigest()

    def ends(self) -> str:
        """sha256, in hexadecimal, of the first and the last 64 KiB fetched so far, which overlap in a small file."""
        return hashlib.sha256(self._head + self._tail).hexdigest()

    def md5(self) -> str:
        """MD5, in hexadecimal, of every byte fetched so far; only where one is expected."""
        return self._md5.hexdigest()

    def close(self) -> None:
        self._raw.close()

    def _fetch(self) -> bytes:
        chunk = self._timed(lambda: self._raw.read(self._chunk_bytes))
        self._hash.update(chunk)
        if self.expected_md5 is not None:
            self._md5.update(chunk)
        if len(self._head) < END_BYTES:
            self._head = (self._head + chunk)[:END_BYTES]
        self._tail = chunk[-END_BYTES:] if len(chunk) >= END_BYTES else (self._tail + chunk)[-END_BYTES:]
        return chunk

    def _timed(self, call: Callable) -> object:
        start = time.perf_counter()
        try:
            return call()
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # object-store clients raise types of their own; all of them are the storage's fault
            if can_pass(error):
                raise  # of a mounted file system: who reads tries again
            raise StorageError(f"{type(error).__name__}: {str(error).strip() or 'no message'}") from error
        finally:
            self.seconds += time.perf_counter() - start


class Gunzip(Chunks):
    """What a gzip-compressed stream holds, several of them joined too; TarDamage where it is cut or damaged."""

    def __init__(self, packed: Chunks):
        super().__init__()
        self._packed, self._input = packed, b""
        self._inflate = None  # between two gzip streams

    @property
    def packed_position(self) -> int:
        """Compressed bytes used up so far."""
        return self._packed.position - len(self._input)

    def _fetch(self) -> bytes:
        while True:
            self._input = self._input or next(self._packed.pieces(CHUNK_BYTES), b"")
            if self._inflate is None and not self._input:
                return b""
            if self._inflate is None:
                self._input = self._input.lstrip(b"\0")  # zeros may pad the end
                if not self._input:
                    continue
                self._inflate = zlib.decompressobj(wbits=31)
            if not self._input:
                raise TarDamage(f"gzip: truncated at byte {self._packed.position}")
            try:
                chunk = self._inflate.decompress(self._input, CHUNK_BYTES)
            except zlib.error as error:
                raise TarDamage(f"gzip: damaged at about byte {self.packed_position} ({error})") from None
            ended = self._inflate.eof
            self._input = self._inflate.unused_data if ended else self._inflate.unconsumed_tail
            self._inflate = None if ended else self._inflate
            if chunk:
                return chunk


class TarStream:
    """Walks a tar: `next()`, then `body()` or `pieces()` or `skip()`, and again until `next()` gives None.

    Raises TarDamage; the stream stands wherever the damage was met then.

    Attributes
    ----------
    compressed : bool
        By gzip; known after the first `next()`.
    end_mark : bool
        Whether the last tar ended in two zero blocks; known after `next()` gave None.
    joined : int
        Tars that followed the first one in the same file.
    """

    def __init__(self, stream: Chunks):
        self._packed = self._stream = stream
        self._left = self._padding = 0
        self._global: dict[str, str] = {}
        self._member: Member | None = None
        self._ahead: bytes | None = None  # the first header of a tar that was joined to the one before
        self.compressed, self.end_mark, self.joined = False, True, 0

    @property
    def position(self) -> int:
        """Bytes of the shard used up so far; of a compressed one about."""
        return self._stream.packed_position if isinstance(self._stream, Gunzip) else self._stream.position

    def next(self) -> Member | None:
        """The next member's header; None after a proper end of the archive."""
        if not self._packed.position and self._packed.peek(2) == _GZIP:
            self._stream, self.compressed = Gunzip(self._packed), True
        self.skip()
        if self._padding:
            self._skip_padding()
        extended: dict[str, str] = {}
        pending = False
        while True:
            position = self._stream.position - (BLOCK if self._ahead else 0)
            header = self._header(position)
            if header is None:
                if pending:
                    raise TarDamage(f"extended header without a member at byte {position}")
                if not self._next_tar(position):
                    return None
                continue
            kind = header[156:157]
            size = _number(header[124:136], position)
            if kind in b"LKxg":
                self._extend(kind, size, position, extended)
                pending = pending or kind != b"g"
                continue
            return self._start(header, kind, size, position, extended)

    def body(self) -> bytes:
        """The whole body of the current member."""
        wanted = self._left
        data = self._stream.read(wanted)
        if len(data) < wanted:
            raise self._truncated()
        self._left = 0
        return data

    def pieces(self) -> Iterator[bytes]:
        """The body of the current member in bounded pieces."""
        for piece in self._stream.pieces(self._left):
            self._left -= len(piece)
            yield piece
        if self._left:
            raise self._truncated()

    def skip(self) -> None:
        """Pass over what is left of the current member's body."""
        if self._left and self._stream.skip(self._left) < self._left:
            raise self._truncated()
        self._left = 0

    def _truncated(self) -> TarDamage:
        name = ascii(self._member.name)[1:-1][:200]
        return TarDamage(
            f"truncated at byte {self._stream.position}, inside member {name} of {self._member.size} bytes"
        )

    def _skip_padding(self) -> None:
        if self._stream.skip(self._padding) < self._padding:
            raise TarDamage(f"truncated at byte {self._stream.position}, after a member")
        self._padding = 0

    def _header(self, position: int) -> bytes | None:
        """A checked header; None for zeros, or where the file ends behind a member."""
        header, self._ahead = self._ahead or self._stream.read(BLOCK), None
        if position and not header:
            return None
        if len(header) < BLOCK and (not position or header.strip(b"\0")):
            raise TarDamage(_cut_header(header, position))
        if not header.strip(b"\0"):
            return None
        if not _checksum_holds(header):
            raise TarDamage(_not_a_header(header, position))
        return header

    def _next_tar(self, position: int) -> bool:
        """At the end of a tar, or behind its first zero block: whether another tar follows the zeros."""
        while piece := self._stream.peek(1 << 16):
            zeros = len(piece) - len(piece.lstrip(b"\0"))
            self._stream.skip(zeros)
            if zeros < len(piece):
                break
        where = self._stream.position
        self.end_mark = where - position >= 2 * BLOCK
        if not piece:
            return False
        header = self._stream.read(BLOCK) if self.end_mark and (where - position) % BLOCK == 0 else b""
        if len(header) < BLOCK or not _checksum_holds(header):
            raise TarDamage(
                f"end-of-archive marker at byte {position}, but data at byte {where}: a zeroed header, or trailing bytes"
            )
        self._ahead, self._global = header, {}
        self.joined += 1
        return True

    def _start(self, header: bytes, kind: bytes, size: int, position: int, extended: dict[str, str]) -> Member:
        fields = self._global | extended if self._global else extended
        if "size" in fields:
            size = _decimal(fields["size"], position)
        name = fields.get("sparse_name") or fields.get("path") or _name(header)
        sparse = kind == b"S" or "sparse" in fields
        if kind == b"S":
            self._skip_sparse_maps(header)
        self._left = 0 if kind in _BODILESS else size
        self._padding = -self._left % BLOCK
        offset = None if self.compressed else self._stream.position
        self._member = Member(name, self._left, position, "special" if sparse else _kind(kind, name), offset)
        return self._member

    def _extend(self, kind: bytes, size: int, position: int, extended: dict[str, str]) -> None:
        """Read a long name (L), a long link target (K, not used), or pax records (x, or g for all that follows)."""
        start = self._stream.position
        if kind == b"L":
            extended["path"] = _text(self._stream.read(min(size, MAX_TEXT_BYTES)).split(b"\0", 1)[0])
        elif kind in b"xg":
            (extended if kind == b"x" else self._global).update(self._pax_records(size, position))
        rest = size + -size % BLOCK - (self._stream.position - start)
        if self._stream.skip(rest) < rest:
            raise TarDamage(f"truncated at byte {self._stream.position}, inside an extended header")

    def _pax_records(self, left: int, position: int) -> dict[str, str]:
        """Records `LENGTH KEYWORD=VALUE\\n`, LENGTH in bytes and counting itself; those kept that say what a member is.

        `left` bytes hold them. However long a record is, no more than a window of it is in memory.
        """
        records, window = {}, b""
        while window or left:
            if len(window) < MAX_TEXT_BYTES and left:
                more = self._stream.read(min(left, MAX_TEXT_BYTES))
                if not more:
                    raise TarDamage(f"truncated at byte {self._stream.position}, inside an extended header")
                window, left = window + more, left - len(more)
            if not window[0]:  # padding
                break
            length, keyword, value = _pax_record(window, left, position)
            if keyword in (b"path", b"size"):
                records[keyword.decode()] = _text(value)
            elif keyword.startswith(b"GNU.sparse."):
                records["sparse"] = "yes"
                if keyword == b"GNU.sparse.name":
                    records["sparse_name"] = _text(value)
            beyond = max(0, length - len(window))
            window, left = window[length:], left - self._stream.skip(beyond)
        return records

    def _skip_sparse_maps(self, header: bytes) -> None:
        more = header[482]
        while more:
            block = self._stream.read(BLOCK)
            if len(block) < BLOCK:
                raise TarDamage(f"truncated at byte {self._stream.position}, inside a sparse map")
            more = block[504]


def _pax_record(window: bytes, left: int, position: int) -> tuple[int, bytes, bytes]:
    """Length, keyword and value, or the value's beginning, of the record at the start of `window`, `left` bytes behind it."""
    space = window.find(b" ", 0, 20)
    digits = window[: max(0, space)]
    length = int(digits) if digits.isdigit() else 0
    whole = length <= len(window)
    if not space < length <= len(window) + left or (whole and window[length - 1 : length] != b"\n"):
        raise TarDamage(f"bad pax header at byte {position}")
    keyword, _, value = window[space + 1 : length - 1 if whole else None].partition(b"=")
    return length, keyword, value


def _checksum_holds(header: bytes) -> bool:
    try:
        stored = int(header[148:156].split(b"\0", 1)[0], 8)
    except ValueError:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes, position: int) -> int:
    """A size: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise TarDamage(f"bad size in the header at byte {position}")
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        if digits and not digits.isdigit():
            raise ValueError
        return int(digits or b"0", 8)
    except ValueError:
        raise TarDamage(f"bad size in the header at byte {position}") from None


def _decimal(text: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarDamage(f"bad pax size before the header at byte {position}")
    return int(text)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # The prefix is ustar's; GNU's own format ("ustar  ") keeps times in its place.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _kind(flag: bytes, name: str) -> str:
    if flag == b"5" or (flag == b"\0" and name.endswith("/")):
        return "folder"
    if flag in _REGULAR:
        return "file"
    return "link" if flag in b"12" else "special"


def _cut_header(start: bytes, position: int) -> str:
    if position == 0:
        return "empty file (0 bytes)" if not start else _not_a_header(start, 0)
    return f"truncated at byte {position + len(start)}, inside a header"


def _not_a_header(header: bytes, position: int) -> str:
    if position:
        return f"damaged header at byte {position} (its checksum fails)"
    if header.lstrip()[:1] == b"<":
        return "not a tar file at byte 0: an HTML or XML page"
    return "not a tar file at byte 0 (the header's checksum fails)"
