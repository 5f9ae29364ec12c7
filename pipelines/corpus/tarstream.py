"""A strict reader of tar files as a stream: nothing is skipped silently, every damage is said with its byte position.

Python's `tarfile`, and with it plain `webdataset`, ends without an error at a damaged or missing header: half a shard
can vanish. Here a tar is whole only if each header's checksum holds, every member is there to its last byte, two zero
blocks end it, and nothing but zero bytes follows. Understood: ustar, old v7, GNU long names, base-256 sizes, pax path
and size. Memory is one chunk plus the member asked for. Links are never followed, nothing is written.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
CHUNK_BYTES = 4 << 20  # one request on an object store
MAX_EXTENDED_BYTES = 1 << 20  # a long name or a pax header; real ones have some hundred bytes

_ZERO = bytes(BLOCK)
_REGULAR = b"\x000\x37"  # NUL (v7), "0", "7" (contiguous)
_BODILESS = b"123456"  # links, devices, folders, pipes: their size field means nothing


class StorageError(OSError):
    """The storage failed, not the data: worth another try, and never a reason to leave a sample out."""


class TarDamage(Exception):
    """The tar can't be read further; the message says why and at which byte."""


class Member(NamedTuple):
    """One member: name as stored (UTF-8, other bytes as surrogates), body size in bytes, where its header stands."""

    name: str
    size: int
    position: int
    kind: str  # "file", "folder", "link" or "special"


class ByteStream:
    """Counts, times and hashes what is read from `open_raw()`, a function that opens a binary stream.

    Attributes
    ----------
    position : int
        Bytes handed out so far.
    seconds : float
        Spent opening and reading the storage.
    """

    def __init__(self, open_raw: Callable[[], BinaryIO], chunk_bytes: int = CHUNK_BYTES):
        self.seconds = 0.0
        self._hash = hashlib.sha256()
        self._chunk, self._offset, self._before, self._chunk_bytes = b"", 0, 0, chunk_bytes
        self._raw = self._timed(open_raw)

    @property
    def position(self) -> int:
        return self._before + self._offset

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

    def digest(self) -> str:
        """sha256, in hexadecimal, of every byte fetched so far: of the whole file after its end was reached."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._raw.close()

    def _refill(self) -> bool:
        self._before += len(self._chunk)
        self._chunk, self._offset = self._timed(lambda: self._raw.read(self._chunk_bytes)), 0
        self._hash.update(self._chunk)
        return bool(self._chunk)

    def _timed(self, call: Callable) -> object:
        start = time.perf_counter()
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # object-store clients raise types of their own; all of them are the storage's fault
            raise StorageError(f"{type(error).__name__}: {str(error).strip() or 'no message'}") from error
        finally:
            self.seconds += time.perf_counter() - start


class TarStream:
    """Walks a tar: `next()`, then `body()` or `pieces()` or `skip()`, and again until `next()` gives None.

    Raises TarDamage; the stream stands wherever the damage was met then.
    """

    def __init__(self, stream: ByteStream):
        self._stream = stream
        self._left = self._padding = 0
        self._global: dict[str, str] = {}
        self._member: Member | None = None

    def next(self) -> Member | None:
        """The next member's header; None after a proper end of the archive."""
        self.skip()
        if self._padding:
            self._skip_padding()
        extended: dict[str, str] = {}
        pending = False
        while True:
            position = self._stream.position
            header = self._header(position)
            if header is None:
                if pending:
                    raise TarDamage(f"extended header without a member at byte {position}")
                return self._end(position)
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
        """A checked header; None for a block of zeros."""
        header = self._stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(_cut_header(header, position))
        if header == _ZERO:
            return None
        if not _checksum_holds(header):
            raise TarDamage(_not_a_header(header, position))
        return header

    def _start(self, header: bytes, kind: bytes, size: int, position: int, extended: dict[str, str]) -> Member:
        fields = self._global | extended if self._global else extended
        if "size" in fields:
            size = _decimal(fields["size"], position)
        name = fields.get("path") or _name(header)
        sparse = kind == b"S" or "sparse" in fields
        if kind == b"S":
            self._skip_sparse_maps(header)
        self._left = 0 if kind in _BODILESS else size
        self._padding = -self._left % BLOCK
        self._member = Member(name, self._left, position, "special" if sparse else _kind(kind, name))
        return self._member

    def _extend(self, kind: bytes, size: int, position: int, extended: dict[str, str]) -> None:
        """Read a long name (L), a long link target (K, not used), or pax records (x, or g for all that follows)."""
        if size > MAX_EXTENDED_BYTES:
            raise TarDamage(f"extended header of {size} bytes at byte {position}")
        data = self._stream.read(size)
        padding = -size % BLOCK
        if len(data) < size or self._stream.skip(padding) < padding:
            raise TarDamage(f"truncated at byte {self._stream.position}, inside an extended header")
        if kind == b"L":
            extended["path"] = _text(data.split(b"\0", 1)[0])
        elif kind in b"xg":
            (extended if kind == b"x" else self._global).update(_pax_records(data, position))

    def _skip_sparse_maps(self, header: bytes) -> None:
        more = header[482]
        while more:
            block = self._stream.read(BLOCK)
            if len(block) < BLOCK:
                raise TarDamage(f"truncated at byte {self._stream.position}, inside a sparse map")
            more = block[504]

    def _end(self, position: int) -> None:
        """A zero block was read: another one must follow, and nothing but zeros after it."""
        while piece := self._stream.read(1 << 16):
            nonzero = piece.lstrip(b"\0")
            if nonzero:
                where = self._stream.position - len(nonzero)
                raise TarDamage(
                    f"end-of-archive marker at byte {position}, but data at byte {where}: "
                    "a zeroed header, trailing bytes, or joined archives"
                )
        if self._stream.position - position < 2 * BLOCK:
            raise TarDamage(f"truncated at byte {self._stream.position}, inside the end-of-archive marker")


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


def _pax_records(data: bytes, position: int) -> dict[str, str]:
    """Records `LENGTH KEYWORD=VALUE\\n`, LENGTH in bytes and counting itself; those kept that say what a member is."""
    records, start = {}, 0
    while start < len(data) and data[start]:
        space = data.find(b" ", start, start + 20)
        digits = data[start:space]
        end = start + int(digits) if space > 0 and digits.isdigit() else 0
        if not space < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarDamage(f"bad pax header at byte {position}")
        keyword, _, value = data[space + 1 : end - 1].partition(b"=")
        if keyword in (b"path", b"size"):
            records[keyword.decode()] = _text(value)
        elif keyword.startswith(b"GNU.sparse."):
            records["sparse"] = "yes"
        start = end
    return records


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
    where = "inside a header" if start else "where a header or the end-of-archive marker should be"
    return f"truncated at byte {position + len(start)}, {where}"


def _not_a_header(header: bytes, position: int) -> str:
    if position:
        return f"damaged header at byte {position} (its checksum fails)"
    if header[:2] == b"\x1f\x8b":
        return "not a tar file at byte 0: gzip-compressed, shards must be plain tar"
    if header.lstrip()[:1] == b"<":
        return "not a tar file at byte 0: an HTML or XML page"
    return "not a tar file at byte 0 (the header's checksum fails)"
