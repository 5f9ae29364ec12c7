"""Tars by random writers, read alike by us and by tarfile: names, kinds and bodies of every member, in order."""

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile

import pytest

from pipelines.corpus.tarstream import ByteStream, TarStream

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
COMMANDS = {
    "gnu tar": (shutil.which("tar"), ["--format=gnu"], ["--format=posix"], ["--format=ustar"], ["--format=v7"]),
    "bsdtar": (shutil.which("bsdtar"), ["--format=pax"], ["--format=ustar"], ["--format=gnutar"]),
}
WRITERS = [*FORMATS, *(name for name, (path, *_) in COMMANDS.items() if path)]


def names(draw, format):
    """A name that the format can hold: long, deep, not ASCII."""
    part = draw.choice(["a", "x.y", "long" * draw.randint(1, 20), "bärchen", "ü" * draw.randint(1, 40), "sp ace"])
    folder = "/".join(draw.choice(["d", "deep" * 3, "é"]) for _ in range(draw.randint(0, 12)))
    return (folder + "/" if folder else "") + part[: 40 if format == "v7" else 90]


def by_tarfile(draw, format):
    buffer, written = io.BytesIO(), set()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format]) as tar:
        for number in range(draw.randint(0, 8)):
            name = f"{names(draw, format)}{number}.jpg"
            info = tarfile.TarInfo(name)
            info.mtime = draw.choice([0, 1.5 if format == "pax" else 1, 2**31])
            kind = draw.random()
            if kind < 0.15:
                info.type, info.linkname = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "elsewhere" * 5
            elif kind < 0.25:
                info.type = draw.choice([tarfile.DIRTYPE, tarfile.FIFOTYPE])
            elif kind < 0.35 and format == "pax":
                info.pax_headers = {
                    "comment": "c" * draw.choice([9, 70_000, 1_200_000]),
                    "SCHILY.xattr.user.k": "v" * 99,
                }
            data = draw.randbytes(draw.choice([0, 1, 511, 512, 513, 5000])) if info.isreg() else b""
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that ustar cannot hold
                continue
            written.add(name)
    return buffer.getvalue()


def by_command(draw, name, folder):
    path, *formats = COMMANDS[name]
    for number in range(draw.randint(1, 5)):
        file = folder / f"{names(draw, 'v7')[-60:].strip('/')}{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(draw.randbytes(draw.choice([0, 1, 700, 4096])))
    (folder / "link").symlink_to("nowhere")
    os.link(file, folder / "hard.jpg")
    with open(folder / "holes.bin", "wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(draw.choice([0, 70_000]))
        sparse.write(b"data")
    options = draw.choice(formats)
    if name == "gnu tar" and options != ["--format=v7"] and draw.random() < 0.5:
        options = [*options, "-S"] if options != ["--format=ustar"] else options
    done = subprocess.run([path, "-cf", "-", *options, "."], cwd=folder, capture_output=True)
    return done.stdout


def ours(data):
    tar, found = TarStream(ByteStream(lambda: io.BytesIO(data), random.Random(len(data)).choice([513, 1 << 16]))), []
    while (member := tar.next()) is not None:
        body = tar.body()
        assert tar.compressed or data[member.offset : member.offset + member.size] == body or member.kind == "special"
        found.append((member.name.rstrip("/"), member.kind, body if member.kind == "file" else None))
    return found


def theirs(data):
    found = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*", ignore_zeros=True) as tar:
        for member in tar:
            kind = "file" if member.isreg() and not member.issparse() else "special"
            kind = "folder" if member.isdir() else "link" if member.issym() or member.islnk() else kind
            body = tar.extractfile(member).read() if kind == "file" else None
            found.append((member.name.rstrip("/"), kind, body))
    return found


def without_end_mark(data):
    """The tar cut behind its last member, if that is a plain file."""
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
        last = tar.getmembers()[-1:]
    if not last or not last[0].isreg() or last[0].issparse():
        return data
    return data[: last[0].offset_data + -(-last[0].size // 512) * 512]


def check(seed, folder):
    draw = random.Random(seed)
    parts = []
    for part in range(draw.choice([1, 1, 1, 2, 3])):
        writer = draw.choice(WRITERS)
        inside = folder / f"{seed}-{part}"
        inside.mkdir()
        parts.append(by_command(draw, writer, inside) if writer in COMMANDS else by_tarfile(draw, writer))
        shutil.rmtree(inside)
    data = b"".join(parts)
    if draw.random() < 0.2:
        data = without_end_mark(data)
    expected = theirs(data)
    assert ours(data) == expected, seed
    packed = draw.choice([None, gzip.compress(data, 1), b"".join(gzip.compress(part, 1) for part in parts)])
    if packed is not None and theirs(data):
        assert ours(packed) == (
            expected if packed != b"".join(gzip.compress(p, 1) for p in parts) else theirs(b"".join(parts))
        )


@pytest.mark.parametrize("start", range(0, 300, 100))
def test_some_hundred_tars(start, tmp_path):
    for seed in range(start, start + 100):
        check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2000, 250))
def test_a_thousand_tars(start, tmp_path):
    for seed in range(start, start + 250):
        check(seed, tmp_path)


def test_every_writer_is_there():
    """So that the property above says what it claims; bsdtar is not on every machine."""
    assert {*FORMATS, "gnu tar"} <= set(WRITERS)
