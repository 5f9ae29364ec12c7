"""Webdataset shards: found, read as a stream of samples that loses nothing silently, and written as subsets.

Bad data becomes an entry with a reason; a storage that fails is tried again from where the last entry ended, and then
fails the stage: it says nothing about the data.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipelines.corpus.samples import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    Entry,
    LabelSource,
    SampleNumbering,
    member_rank,
    read_samples,
)
from pipelines.corpus.shardlist import find_shards
from pipelines.corpus.tarstream import BLOCK, CHUNK_BYTES, ByteStream, Member, TarDamage, TarStream
from pipelines.corpus.tarwriter import TarWriter
from pipelines.runs import storage
from pipelines.runs.record import Shard
from pipelines.runs.retries import StorageError, WrongAnswer, retrying

BLOCK_BYTES = 16 << 20  # of encoded images that `iter_images` holds
# Buckets whose ETags are not the MD5 of the bytes, though they look like it: known after one shard was read twice.
_without_md5: set[str] = set()


class ShardChanged(StorageError):
    """A shard does not hold what it held when it was read: trying again won't help."""


class ShardMissing(StorageError):
    """A shard is not where it was: trying again won't help."""


def expand_shards(spec: str, run: str | None = None, tell: Callable[[str], object] = lambda text: None) -> list[Shard]:
    """The shards that `spec` names.

    Parameters
    ----------
    spec : str
        One or several of these, `::` between them, each expanded by itself: a brace pattern `a/{000..049}.tar`, a glob
        (`*`, `?`, `[…]`, `**`), a folder (its `*.tar`), one shard, or a text file (not called .tar) of such sources, a
        line each, `#` for comments; relative lines start at the working folder. Local or a URI of any filesystem that
        `pipelines.runs.storage` opens.
    run : str, optional
        The run that the shards are for: a shard that lies in it is refused.
    tell : callable, optional
        Gets a sentence for each thing that was passed over: a second name of a shard, a folder that cannot be read.

    Returns
    -------
    shards : list of Shard
        In the order given; what a glob or a folder finds is sorted by name. Local URLs are absolute paths. A local
        file with several names counts once. A pattern finds nothing in run directories (folders with run.json).

    Raises
    ------
    UserError
        Nothing matches, a listed shard doesn't exist or is named twice, `pipe:` (never run), a tar compressed by
        anything but gzip. The message contains "shard" and what would do.
    """
    return [Shard(file.url, file.size, file.mtime_ns) for file in find_shards(spec, run, tell)]


def shard_digest(url: str) -> str:
    """sha256 of a shard's bytes, in hexadecimal: what the end of its reading says as `digest`."""
    return retrying(url, lambda: _digest(url))


def read_entries(
    shard: Shard, labels: LabelSource, end: dict[str, Any], max_image_bytes: int = MAX_IMAGE_BYTES
) -> Iterator[Entry]:
    """One shard's samples in order, one in memory; its unreadable rest last.

    Parameters
    ----------
    shard : Shard
    labels : LabelSource
    end : dict
        Gets, before the last entry or the generator's end: `entries` (yielded in all), `samples` (numbered, good or not),
        `left_out`, `ignored` (members of no sample, such as README), `apart` (of the samples: parts of one that the tar
        does not keep together), `digest` (sha256), `ends` (sha256 of both ends), `bytes`, `seconds` (spent reading),
        `end_mark` (False: the tar stops behind a member without one), and of an unreadable rest `rest_bytes` and
        `rest_samples`, an estimate (None where no sample was read before it). entries = samples, plus one if there is an
        unreadable rest.

    Raises
    ------
    StorageError
        If the storage fails for too long or the shard has changed. Another try reads from the start and yields what
        follows what was yielded before.
    WrongAnswer
        If the storage gave other bytes than the shard holds and some may be in what was yielded: read it again.
    """
    done, entries = 0, None

    def following() -> Entry | WrongAnswer | None:
        nonlocal entries
        if entries is None:
            entries = itertools.islice(_entries(shard, labels, end, max_image_bytes), done, None)
        try:
            return next(entries, None)
        except OSError as error:
            entries = None  # from the start
            if isinstance(error, WrongAnswer) and done:
                return error
            raise

    while (entry := retrying(shard.url, following)) is not None:
        if isinstance(entry, WrongAnswer):
            raise entry
        yield entry
        done += 1


def iter_images(shard: Shard, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """(rows, encoded images) of chosen samples, ascending `rows` (n,), some MiB at a time in shard order.

    For whole corpora: what lies behind the last row is not read. A row whose image is not there any more is missing from
    what comes; the caller knows what it wanted.
    """
    wanted, found, size = set(rows.tolist()), {}, 0
    # Without labels: they come from the run, and a sample is wanted because it was good when it was embedded.
    for entry in read_entries(shard, LabelSource("none"), {}) if wanted else ():
        if entry.row in wanted and entry.image is not None:
            found[entry.row], size = entry.image, size + len(entry.image)
        if found and (size >= BLOCK_BYTES or entry.row == rows[-1]):
            yield np.array(list(found)), list(found.values())
            found, size = {}, 0
        if entry.row == rows[-1]:
            return
    if found:
        yield np.array(list(found)), list(found.values())


def read_images(shard: Shard, rows: Sequence[int]) -> list[tuple[int, bytes]]:
    """(row, encoded image) of a few samples of a shard at once, in its order; the rest is passed over, not held.

    StorageError if the storage fails, its kind ShardChanged if the shard does not hold a row's image any more.
    """
    return retrying(shard.url, lambda: _images(shard, set(rows)))


class SubsetSample(NamedTuple):
    """A sample in a subset: where it came from, its key there and here, sha256 of its image's bytes (hexadecimal)."""

    shard: int
    row: int
    source_key: str
    key: str
    sha256: str


class Relabelled(NamedTuple):
    """Samples that get another label: how labels are read and written, and by (shard, row) the old label and the new."""

    source: LabelSource
    labels: Mapping[tuple[int, int], tuple[int, int]]


def write_subset_shard(
    sources: Sequence[tuple[Shard, int, Sequence[int]]], uri: str, relabelled: Relabelled | None = None
) -> list[SubsetSample]:
    """Copy chosen samples of one or more shards into one new tar, whole or not at all.

    Every regular member of a sample is copied byte for byte under its name, in the order found, but for the label member of
    a sample that is relabelled; headers are always the same (mode 0644, no owner, no time), so equal sources give equal
    files. Memory: a chunk.

    Parameters
    ----------
    sources : sequence of (Shard, int, sequence of int)
        A shard, its number in the run, the ascending rows wanted of it.
    uri : str
        The tar to write.
    relabelled : Relabelled, optional

    Returns
    -------
    samples : list of SubsetSample
        In the order written. A key that an earlier source brought already gets its shard's number in front of its last
        part (`dir/0001` -> `dir/000003_0001`); all others stay.

    Raises
    ------
    StorageError
        If the storage fails; ShardChanged, a kind of it, if a shard does not hold the rows wanted any more.
    """

    def write() -> list[SubsetSample]:
        with storage.write_atomic(uri) as output:
            writer = _SubsetWriter(output, relabelled)
            written = [sample for source in sources for sample in _copy_samples(*source, writer)]
            writer.close()
        return written

    return retrying(uri, write)


def _entries(shard: Shard, labels: LabelSource, end: dict[str, Any], max_image_bytes: int) -> Iterator[Entry]:
    md5 = storage.stored_md5(shard.url) if _bucket_of(shard.url) not in _without_md5 else None
    stream, numbering = _open(shard.url, md5), SampleNumbering()
    samples = left_out = 0
    rest = None
    try:
        tar = TarStream(stream)
        for entry in read_samples(tar, labels, max_image_bytes, numbering, shard.image, shard.size):
            samples += entry.row is not None
            left_out += entry.reason is not None
            if entry.row is None:
                rest = entry  # of a cut shard it is told after the size was checked below
            else:
                yield entry
        stream.drain()
    finally:
        stream.close()
    _check_whole(shard, stream, rest is not None)
    end |= {
        "entries": samples + (rest is not None),
        "samples": samples,
        "left_out": left_out,
        "ignored": numbering.ignored,
        "apart": numbering.apart,
        "end_mark": tar.end_mark,
        "rest_bytes": numbering.rest.bytes if numbering.rest else 0,
        "rest_samples": numbering.rest.samples if numbering.rest else 0,
        "digest": stream.digest(),
        "ends": stream.ends(),
        "bytes": stream.position,
        "seconds": stream.seconds,
    }
    if rest is not None:
        yield rest


def _check_whole(shard: Shard, stream: ByteStream, damaged: bool) -> None:
    """An error that can pass unless what came is what the store holds, as far as this can be known.

    Where the shard seems damaged, or its bytes are not those of the store's checksum, it is read once more: a store that
    answers twice differently is at fault, not the shard.
    """
    if shard.size and stream.position != shard.size:
        now = storage.file_size(shard.url)
        if now is not None and now != shard.size:
            raise ShardChanged(
                f"shard {shard.url}: it has {now} bytes instead of {shard.size}, so it has changed since it was listed; "
                "start the same command again"
            )
        raise WrongAnswer(f"{stream.position} bytes came instead of {shard.size}")
    differs = stream.expected_md5 is not None and stream.md5() != stream.expected_md5
    if damaged or differs:
        if _digest(shard.url) != stream.digest():
            raise WrongAnswer("two readings of it differ")
        if differs:
            _without_md5.add(_bucket_of(shard.url))


def _bucket_of(url: str) -> str:
    return url[: url.find("/", url.find("://") + 3)] if storage.scheme_of(url) == "s3" else ""


def _images(shard: Shard, wanted: set[int]) -> list[tuple[int, bytes]]:
    found: dict[int, bytes] = {}
    ranks: dict[int, int] = {}
    why, stream, last = "it ends before", _open(shard.url), max(wanted, default=-1)
    try:
        tar, numbering = TarStream(stream), SampleNumbering()
        while (len(found) < len(wanted) or min(ranks.values(), default=2) < 2) and (member := tar.next()) is not None:
            place = numbering.place(member)
            if place is None or place.row not in wanted or member.kind != "file":
                if place is not None and place.row > last:
                    break
                continue
            rank = member_rank(place.suffix, IMAGE_SUFFIXES, shard.image)
            if rank > ranks.get(place.row, 0):
                found[place.row], ranks[place.row] = tar.body(), rank
    except TarDamage as damage:
        why = str(damage)
    finally:
        stream.close()
    _check_found(shard, wanted - found.keys(), why)
    return sorted(found.items())


def _check_found(shard: Shard, missing: set[int], why: str) -> None:
    if missing:
        raise ShardChanged(f"shard {shard.url} holds no image of row {min(missing)} any more: {why}; embed it again")


def _open(url: str, expected_md5: str | None = None) -> ByteStream:
    def open_raw() -> BinaryIO:
        filesystem, path = storage.open_filesystem(url)
        return filesystem.open_input_stream(path, compression=None)

    try:
        return ByteStream(open_raw, CHUNK_BYTES, expected_md5)
    except FileNotFoundError as error:
        raise ShardMissing(f"shard {url}: it is not there any more") from error


def _digest(url: str) -> str:
    stream = _open(url)
    try:
        stream.drain()
        return stream.digest()
    finally:
        stream.close()


class _SubsetWriter(TarWriter):
    """Gives samples keys that are unique in this tar."""

    def __init__(self, output: BinaryIO, relabelled: Relabelled | None = None):
        super().__init__(output)
        self._keys, self._relabelled = set(), relabelled

    def unique(self, key: str, number: int) -> str:
        folder, last = key[: key.rfind("/") + 1], key[key.rfind("/") + 1 :]
        while key in self._keys:
            last = f"{number:06d}_{last}"
            key = folder + last
        self._keys.add(key)
        return key

    def relabel(self, tar: TarStream, member: Member, sample: SubsetSample, suffix: str) -> bytes | None:
        """The bytes of a member that holds the old label of a sample that gets another; None for every other member."""
        if self._relabelled is None or not self._relabelled.source.rank(suffix):
            return None
        old, new = self._relabelled.labels.get((sample.shard, sample.row), (None, None))
        if old is None or member.size > MAX_LABEL_BYTES:
            return None
        data = tar.body()
        try:
            return self._relabelled.source.write(data, new) if self._relabelled.source.read(data) == old else data
        except ValueError:  # another member of that suffix, which is no label
            return data

    def close(self) -> None:
        self._output.write(bytes(2 * BLOCK))


def _copy_samples(shard: Shard, number: int, rows: Sequence[int], writer: _SubsetWriter) -> list[SubsetSample]:
    copied: dict[int, SubsetSample] = {}
    why = "it ends before"
    stream = _open(shard.url)
    try:
        _copy_wanted(TarStream(stream), number, set(rows), writer, copied, shard.image)
    except TarDamage as damage:
        # Not an error by itself: rows before the damage were read whole when they were chosen, so they are now.
        why = str(damage)
    except StorageError as error:
        raise StorageError(f"reading {shard.url}: {error}") from error
    finally:
        stream.close()
    _check_found(shard, {row for row in rows if row not in copied or not copied[row].sha256}, why)
    return [copied[row] for row in rows]


def _copy_wanted(
    tar: TarStream,
    number: int,
    wanted: set[int],
    writer: _SubsetWriter,
    copied: dict[int, SubsetSample],
    image: str | None,
) -> None:
    numbering, last, ranks = SampleNumbering(), max(wanted, default=-1), Counter()
    while (member := tar.next()) is not None:
        place = numbering.place(member)
        if place is None or place.row not in wanted:
            if place is not None and place.row > last:
                return
            continue
        sample = copied.get(place.row)
        if sample is None:
            sample = SubsetSample(number, place.row, place.key, writer.unique(place.key, number), "")
        if member.kind == "file":
            digest = _copy_member(tar, member, sample, writer, place.suffix)
            rank = member_rank(place.suffix, IMAGE_SUFFIXES, image)
            if rank > ranks[place.row]:
                ranks[place.row], sample = rank, sample._replace(sha256=digest)
        copied[place.row] = sample


def _copy_member(tar: TarStream, member: Member, sample: SubsetSample, writer: _SubsetWriter, suffix: str) -> str:
    digest = hashlib.sha256()
    name = sample.key + member.name[len(sample.source_key) :]
    data = writer.relabel(tar, member, sample, suffix)
    if data is not None:
        writer.add(name, len(data), iter([data]))
        return hashlib.sha256(data).hexdigest()

    def hashed() -> Iterator[bytes]:
        for piece in tar.pieces():
            digest.update(piece)
            yield piece

    writer.add(name, member.size, hashed())
    return digest.hexdigest()
