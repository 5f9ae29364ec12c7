"""The strict tar reader against Python's tarfile, GNU tar's formats, and every damage."""

import gzip
import io
import random
import tarfile

import pytest

from pipelines.corpus.tarstream import BLOCK, ByteStream, TarDamage, TarStream
from pipelines.runs.retries import StorageError


def walk(data: bytes, chunk_bytes: int = 1 << 20):
    """(name, kind, body) of each member read whole, and the damage or None."""
    tar, found = TarStream(ByteStream(lambda: io.BytesIO(data), chunk_bytes)), []
    try:
        while (member := tar.next()) is not None:
            found.append((member.name, member.kind, tar.body()))
    except TarDamage as damage:
        return found, str(damage)
    return found, None


def make(members, format=tarfile.PAX_FORMAT, **fields):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


MEMBERS = [
    ("a.jpg", b"x" * 700),
    ("empty.txt", b""),
    ("d" * 90 + "/" + "n" * 80 + ".cls", b"7"),
    ("long/" * 60 + "x.jpg", b"y" * 512),
    ("bärchen.png", b"z" * 513),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 100, 512, 513])
def test_agrees_with_tarfile(format, chunk_bytes):
    data = make(MEMBERS, format, mtime=1.5)  # a fraction gives pax a header of its own
    assert walk(data, chunk_bytes) == ([(name, "file", body) for name, body in MEMBERS], None)


def test_ustar_prefix():
    members = [("folder/" * 20 + "x.jpg", b"1")]
    assert walk(make(members, tarfile.USTAR_FORMAT))[0][0][0] == members[0][0]


def test_old_v7_header():
    data = bytearray(make([("x.jpg", b"1")], tarfile.USTAR_FORMAT))
    data[257:265] = bytes(8)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    assert walk(bytes(data)) == ([("x.jpg", "file", b"1")], None)


def test_base_256_size_and_pax_size():
    data = bytearray(make([("x.jpg", b"123")], tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    assert walk(bytes(data))[0] == [("x.jpg", "file", b"123")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.jpg")
        info.pax_headers = {"size": "3", "comment": "ä" * 300}
        info.size = 3
        tar.addfile(info, io.BytesIO(b"123"))
    assert walk(buffer.getvalue()) == ([("x.jpg", "file", b"123")], None)


def test_what_is_no_file_has_no_body_and_says_so():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("x"))
    kinds = [("d", "folder"), ("s", "link"), ("h", "link"), ("f", "special"), ("x", "file")]
    found, damage = walk(buffer.getvalue())
    assert [(name.rstrip("/"), kind) for name, kind, _ in found] == kinds and damage is None


def test_gnu_tar_sparse_file_keeps_the_walk_in_step(tmp_path):
    """Sparse maps with continuation blocks, as GNU tar writes them."""
    import shutil
    import subprocess

    if shutil.which("tar") is None:
        pytest.skip("no tar command here")
    with open(tmp_path / "holes", "wb") as file:
        for i in range(40):
            file.seek(i << 20)
            file.write(b"data" * 1024)
    (tmp_path / "x.jpg").write_bytes(b"123")
    for format in ("gnu", "posix"):
        subprocess.run(["tar", "-cSf", "t.tar", f"--format={format}", "holes", "x.jpg"], cwd=tmp_path, check=True)
        found, damage = walk((tmp_path / "t.tar").read_bytes())
        assert damage is None
        assert [kind for _, kind, _ in found] == ["special", "file"] and found[1][2] == b"123"


BODY = 1000
WHOLE = make([(f"{i}.jpg", random.Random(i).randbytes(BODY)) for i in range(10)], tarfile.USTAR_FORMAT)
STEP = BLOCK + 2 * BLOCK  # a header and a padded body


def over(start, replacement):
    return WHOLE[:start] + replacement + WHOLE[start + len(replacement) :]


@pytest.mark.parametrize(
    ("data", "whole", "reason"),
    [
        (WHOLE[: 5 * STEP + 100], 5, f"truncated at byte {5 * STEP + 100}, inside a header"),
        (WHOLE[: 5 * STEP + 700], 5, f"truncated at byte {5 * STEP + 700}, inside member 5.jpg of 1000 bytes"),
        (WHOLE[: 6 * STEP - 5], 6, f"truncated at byte {6 * STEP - 5}, after a member"),
        (over(5 * STEP, bytes(BLOCK)), 5, f"marker at byte {5 * STEP}, but data at byte {5 * STEP + BLOCK}"),
        (over(5 * STEP, random.Random(0).randbytes(BLOCK)), 5, f"damaged header at byte {5 * STEP}"),
        (over(5 * STEP + 124, b"0000777xxxx\0"), 5, f"damaged header at byte {5 * STEP}"),
        (WHOLE + b"trailing", 10, f"data at byte {len(WHOLE)}: a zeroed header, or trailing bytes"),
        (WHOLE + b"t" * 9999, 10, f"data at byte {len(WHOLE)}: a zeroed header, or trailing bytes"),
        (b"", 0, "empty file"),
        (b"<!DOCTYPE html><html>" + b" " * 600, 0, "at byte 0: an HTML"),
        (b"<html>404</html>", 0, "at byte 0: an HTML"),
        (b"\x1f\x8b" + bytes(600), 0, "gzip: damaged at about byte"),
        (gzip.compress(WHOLE)[:5000], 4, "gzip: truncated at byte 5000"),
        (gzip.compress(b"x" * 5000), 0, "not a tar file at byte 0"),
        (b"x" * 5000, 0, "not a tar file at byte 0"),
    ],
)
def test_every_damage_is_said_with_its_place(data, whole, reason):
    found, damage = walk(data)
    assert len(found) == whole and reason in damage
    assert damage is not None and "byte" in damage


def test_plain_tarfile_would_lose_half_silently():
    """Why this reader exists: the day this fails, tarfile has become strict."""
    data = over(5 * STEP, bytes(BLOCK))
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
        assert len(list(tar)) == 5


def with_field(start, value):
    """A one-member tar with a field replaced and the checksum made right again."""
    data = bytearray(make([("x.jpg", b"123")], tarfile.GNU_FORMAT))
    data[start : start + len(value)] = value
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_field(124, b"-0000000001\0"), "bad size"),
        (with_field(124, b"0o000000003\0"), "bad size"),
        (with_field(124, b"\xff" * 12), "bad size"),
        (with_field(124, b"\x80" + b"\x7f" * 11), "truncated"),
        (with_field(124, b"77777777777\0"), "inside member x.jpg of 8589934591 bytes"),
        (with_field(156, b"L"), "extended header without a member"),
        (with_field(124, b"77777777777\0")[:156], "not a tar"),
    ],
)
def test_hostile_headers_are_damage(data, reason):
    with pytest.raises(TarDamage, match=reason):
        tar = TarStream(ByteStream(lambda: io.BytesIO(data)))
        while tar.next() is not None:
            tar.body()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_an_absurd_extended_header_is_not_held(kind):
    header = bytearray(with_field(124, b"%011o\0" % (1 << 30))[:BLOCK])
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 256)
    assert "inside an extended header" in walk(bytes(header) + b"9" * 4096)[1] or kind in b"xg"


@pytest.mark.parametrize(
    "records", [b"9 path=x", b"99 path=x\n", b"path=x\n", b"0 path=x\n", b"9 size=-1\n", b"11 size=1e3\n"]
)
def test_malformed_pax_records_are_damage(records):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    data = header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK, b"\0") + make([("x.jpg", b"1")])
    assert "pax" in walk(data)[1]


@pytest.mark.parametrize("large", ["comment", "SCHILY.xattr.user.x", "path"])
def test_a_large_pax_header_costs_nothing_but_itself(large):
    """Two MB of an attribute: the member keeps its name, and what follows is read. As a name it is one without end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("ä" * 120 + ".jpg")
        info.pax_headers, info.size = {large: "v" * 2_000_000, "zzz": "last"}, 3
        tar.addfile(info, io.BytesIO(b"123"))
        tar.addfile(tarfile.TarInfo("next.txt"))
    found, damage = walk(buffer.getvalue(), 4096)
    assert damage is None and [body for _, _, body in found] == [b"123", b""] and found[1][0] == "next.txt"
    assert (
        found[0][0] == ("v" * len(found[0][0]) if large == "path" else "ä" * 120 + ".jpg")
        and len(found[0][0]) < 1 << 17
    )


TEN = [(f"{i}.jpg", "file", random.Random(i).randbytes(BODY)) for i in range(10)]


@pytest.mark.parametrize("chunk_bytes", [100, 512, 1 << 20])
@pytest.mark.parametrize(
    ("data", "tars", "end_mark", "joined"),
    [
        (WHOLE[: 10 * STEP], 1, False, 0),
        (WHOLE[: 10 * STEP + BLOCK], 1, False, 0),
        (WHOLE[: 10 * STEP + 2 * BLOCK], 1, True, 0),
        (WHOLE + WHOLE + WHOLE, 3, True, 2),
        (WHOLE[: 10 * STEP] + WHOLE, 2, True, 0),  # GNU tar's -A: one tar, as far as anyone can tell
        (gzip.compress(WHOLE), 1, True, 0),
        (gzip.compress(WHOLE) + gzip.compress(WHOLE), 2, True, 1),
        (gzip.compress(WHOLE + WHOLE) + bytes(700), 2, True, 1),
        (gzip.compress(WHOLE, 1)[:100] + gzip.compress(WHOLE, 1)[100:], 1, True, 0),
    ],
)
def test_tars_without_end_mark_joined_and_compressed_are_read(data, tars, end_mark, joined, chunk_bytes):
    tar, found = TarStream(ByteStream(lambda: io.BytesIO(data), chunk_bytes)), []
    while (member := tar.next()) is not None:
        body = tar.body()
        found.append((member.name, member.kind, body))
        assert member.offset is None if tar.compressed else data[member.offset :].startswith(body)
    assert found == TEN * tars and (tar.end_mark, tar.joined) == (end_mark, joined)
    assert tar.compressed == (data[:2] == b"\x1f\x8b") and tar.position == len(data)


def test_a_single_zeroed_header_is_damage_and_no_join():
    """One block of zeros where a member without a body stood: it must not vanish as if two tars were joined there."""
    data = make([("a.jpg", b"1" * 512), ("empty.txt", b""), ("b.jpg", b"2")], tarfile.USTAR_FORMAT)
    found, damage = walk(data[:1024] + bytes(BLOCK) + data[1536:])
    assert len(found) == 1 and "marker at byte 1024, but data at byte 1536" in damage


def test_memory_is_a_chunk_not_the_file():
    import tracemalloc

    size = 128 << 20
    header = tarfile.TarInfo("x.bin")
    header.size = size - 3 * BLOCK

    class Large(io.RawIOBase):
        given = 0

        def read(self, count=-1):
            piece = header.tobuf()[self.given : self.given + count] or bytes(min(count, size - self.given))
            self.given += len(piece)
            return piece

    tar = TarStream(ByteStream(Large, 1 << 20))
    tracemalloc.start()
    assert tar.next().size == header.size and tar.next() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_digest_is_of_the_whole_file_after_damage_too():
    import hashlib

    stream = ByteStream(lambda: io.BytesIO(over(STEP, bytes(BLOCK))), 700)
    tar = TarStream(stream)
    with pytest.raises(TarDamage):
        while tar.next() is not None:
            pass
    stream.drain()
    assert stream.digest() == hashlib.sha256(over(STEP, bytes(BLOCK))).hexdigest()
    assert stream.position == len(WHOLE)


def test_errors_of_the_storage_are_not_damage():
    class Failing(io.RawIOBase):
        def read(self, size=-1):
            raise KeyError("a client's own error")

    with pytest.raises(StorageError, match="KeyError"):
        TarStream(ByteStream(Failing)).next()
