"""Shards as a stream of tables, through Ray and without, over a storage that fails; subsets written and read back."""

import builtins
import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from fsspec.implementations.local import LocalFileSystem

from pipelines.corpus import shards
from pipelines.corpus.moved import ends_digest
from pipelines.corpus.samples import LabelSource
from pipelines.corpus.shards import (
    ShardChanged,
    expand_shards,
    iter_images,
    read_entries,
    read_images,
    write_subset_shard,
)
from pipelines.runs import storage
from pipelines.runs.record import Shard
from pipelines.runs.retries import StorageError

CLS = LabelSource("cls")


def sample(i):
    return f"{i:04d}", {"jpg": bytes([i % 251]) * (100 + 37 * i), "cls": b"%d" % (i % 7), "txt": b"text %d" % i}


def entries_of(shard, labels=CLS):
    """All entries, and what the end says."""
    end = {}
    return list(read_entries(shard, labels, end)), end


@pytest.fixture
def shard(tmp_path, make_shard):
    return expand_shards(make_shard(tmp_path / "s.tar", map(sample, range(100))))[0]


def test_rows_and_the_end(shard):
    entries, end = entries_of(shard)
    whole = Path(shard.url).read_bytes()
    assert end | {"seconds": 0} == {
        "samples": 100, "left_out": 0, "ignored": 0, "entries": 100, "bytes": shard.size, "seconds": 0,
        "digest": hashlib.sha256(whole).hexdigest(), "ends": ends_digest(shard.url),
        "apart": 0, "end_mark": True, "rest_bytes": 0, "rest_samples": 0,
    }  # fmt: skip
    assert end["seconds"] > 0 and end["digest"] == shards.shard_digest(shard.url)
    for i, entry in enumerate(entries):
        key, parts = sample(i)
        assert entry[:6] == (i, key, i % 7, parts["jpg"], None, f"{key}.jpg")
        assert whole[entry.offset : entry.offset + len(entry.image)] == entry.image


@pytest.mark.parametrize("block_bytes", [1, 5_000, 50_000, 1 << 24])
def test_chosen_images_come_in_bounded_blocks(shard, monkeypatch, block_bytes):
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    rows = np.array([0, 3, 4, 50, 98])
    blocks = list(iter_images(shard, rows))
    assert np.array_equal(np.concatenate([at for at, _ in blocks]), rows)
    assert [image for _, images in blocks for image in images] == [sample(i)[1]["jpg"] for i in rows]
    assert all(sum(map(len, images[:-1])) < block_bytes for _, images in blocks)
    assert list(iter_images(shard, rows[:0])) == []


def test_an_empty_tar_and_damaged_ones(tmp_path, make_shard, shard):
    data = Path(shard.url).read_bytes()
    cases = {
        make_shard(tmp_path / "none.tar"): (0, 0),
        "empty.tar": (b"", 1),
        "html.tar": (b"<html>" * 300, 1),
        "cut.tar": (data[: len(data) // 2], 1),
    }
    for name, (content, left_out) in cases.items():
        path = tmp_path / name
        if content != 0:
            path.write_bytes(content)
        entries, end = entries_of(expand_shards(str(path))[0])
        assert (end["left_out"], end["entries"], len(entries)) == (left_out, end["samples"] + left_out, end["entries"])
        assert end["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
        if left_out:
            assert entries[-1].row is None and entries[-1].key is None and "byte" in entries[-1].reason
    assert 40 < end["samples"] < 90


class Flaky(LocalFileSystem):
    """A local disk whose reads fail at set bytes, once each; or always."""

    protocol = "flaky"
    fail_at: builtins.list[int] = []  # noqa: RUF012
    always = False
    opened = 0

    def _open(self, path, mode="rb", **options):
        type(self).opened += 1
        file = super()._open(path, mode, **options)
        read = file.read

        def read_or_fail(size=-1):
            here = file.tell()
            if self.always or (self.fail_at and here >= self.fail_at[0]):
                if not self.always:
                    self.fail_at.pop(0)
                raise ConnectionError(f"connection lost at {here}")
            return read(size)

        file.read = read_or_fail
        return file

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))


@pytest.fixture
def flaky(shard, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr("pipelines.runs.retries.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("pipelines.runs.retries.JITTER_S", 0.001)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 4096)
    Flaky.fail_at, Flaky.always, Flaky.opened = [], False, 0
    return Shard("flaky://" + shard.url, shard.size, shard.mtime_ns)


def test_a_storage_error_is_tried_again_after_the_rows_already_given(shard, flaky):
    expected, _ = entries_of(shard)
    for positions in ([0], [shard.size // 2], [1000, 50_000, 150_000], [shard.size - 3000]):
        Flaky.fail_at, Flaky.opened = list(positions), 0
        entries, end = entries_of(flaky)
        assert Flaky.opened == len(positions) + 1 and not Flaky.fail_at
        assert end["digest"] == shards.shard_digest(shard.url) and entries == expected


def test_a_storage_error_that_stays_fails_and_names_the_shard(flaky, monkeypatch):
    monkeypatch.setenv("HARDSET_STORAGE_RETRY_S", "0.5")
    Flaky.always = True
    with pytest.raises(StorageError, match=r"s\.tar: the storage did not answer well .*connection lost"):
        entries_of(flaky)
    assert Flaky.opened > 2


def test_a_shard_that_vanished_or_was_cut_since_it_was_listed_fails(shard):
    os.truncate(shard.url, shard.size // 2)
    with pytest.raises(shards.ShardChanged, match=f"instead of {shard.size}"):
        entries_of(shard)
    os.unlink(shard.url)
    with pytest.raises(StorageError, match="not there any more"):
        entries_of(shard)


def test_from_s3(s3_folder, shard):
    with storage.write_atomic(storage.join(s3_folder, "s.tar")) as file:
        file.write(Path(shard.url).read_bytes())
    (remote,) = expand_shards(s3_folder)
    assert entries_of(remote)[0] == entries_of(shard)[0]
    written = write_subset_shard([(remote, 0, [1, 50])], storage.join(s3_folder, "subset.tar"))
    assert [w.row for w in written] == [1, 50]
    assert storage.read_bytes(storage.join(s3_folder, "subset.tar"))[:8] == b"0001.jpg"


def test_subset_is_read_by_webdataset_tarfile_and_tar(tmp_path, make_shard):
    keys = ["plain", "dir/" * 40 + "x", "n" * 120, "bär"]
    source = make_shard(tmp_path / "s.tar", [(k, {"JPG": k.encode() * 300, "cls": b"1", "json": b"{}"}) for k in keys])
    out = tmp_path / "o.tar"
    written = write_subset_shard([(expand_shards(source)[0], 0, [0, 1, 3])], str(out))
    chosen = [keys[0], keys[1], keys[3]]
    assert [(w.row, w.key, w.source_key) for w in written] == [(r, k, k) for r, k in zip((0, 1, 3), chosen)]
    assert [w.sha256 for w in written] == [hashlib.sha256(k.encode() * 300).hexdigest() for k in chosen]
    found = list(webdataset.WebDataset(str(out), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s["cls"], s["json"]) for s in found] == [
        (k, k.encode() * 300, b"1", b"{}") for k in chosen
    ]
    with tarfile.open(out) as tar:
        assert [m.name for m in tar] == [f"{k}.{s}" for k in chosen for s in ("JPG", "cls", "json")]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    subprocess.run(["tar", "-tf", str(out)], check=True, capture_output=True)
    assert entries_of(expand_shards(str(out))[0])[1]["left_out"] == 0


def test_subset_of_several_shards_has_unique_keys_and_the_same_bytes_each_time(tmp_path, make_shard):
    for name in ("0.tar", "1.tar"):
        make_shard(tmp_path / name, [("d/a", {"jpg": name.encode()}), ("b", {"jpg": b"b" + name.encode()})])
    first, second = expand_shards(str(tmp_path))
    sources = [(first, 0, [0, 1]), (second, 1, [0])]
    for out in ("x.tar", "y.tar"):
        written = write_subset_shard(sources, str(tmp_path / out))
    assert [(w.shard, w.row, w.key) for w in written] == [(0, 0, "d/a"), (0, 1, "b"), (1, 0, "d/000001_a")]
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    found = {s["__key__"]: s["jpg"] for s in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)}
    assert found == {"d/a": b"0.tar", "b": b"b0.tar", "d/000001_a": b"1.tar"}


def test_subset_of_a_damaged_shard_takes_what_was_whole(tmp_path, shard, make_shard):
    data = Path(shard.url).read_bytes()
    with tarfile.open(shard.url) as tar:
        end = tar.getmember("0050.txt").offset_data + 512
    (tmp_path / "cut.tar").write_bytes(data[:end])
    cut = expand_shards(str(tmp_path / "cut.tar"))[0]
    assert entries_of(cut)[1]["samples"] == 51
    assert len(write_subset_shard([(cut, 0, [3, 50])], str(tmp_path / "o.tar"))) == 2
    with pytest.raises(ShardChanged, match="no image of row 51 any more: it ends before"):
        write_subset_shard([(cut, 0, [3, 51])], str(tmp_path / "p.tar"))
    assert not (tmp_path / "p.tar").exists()


def test_subset_storage_errors_are_tried_again(tmp_path, flaky):
    Flaky.fail_at = [1000, 100_000]
    written = write_subset_shard([(flaky, 0, [0, 99])], str(tmp_path / "o.tar"))
    assert [w.row for w in written] == [0, 99] and Flaky.opened == 3
    assert len(list(webdataset.WebDataset(str(tmp_path / "o.tar"), shardshuffle=False))) == 2


def test_rows_of_the_reader_are_rows_of_the_writer(tmp_path, make_shard):
    """Also with everything that is left out in between."""
    members = [
        ("a.jpg", b"1"), ("a.jpg", b"2"), ("README", b""), ("../b.jpg", b"3"), ("c.cls", b"4"), ("d.jpg", b"5"),
        ("d.txt", b"6"), ("a.png", b"7"), ("e.png", b"8"),
    ]  # fmt: skip
    source = expand_shards(make_shard(tmp_path / "s.tar", members=members))[0]
    rows = [entry._asdict() for entry in entries_of(source, LabelSource("none"))[0]]
    kept = [row for row in rows if row["reason"] is None]
    assert [row["key"] for row in kept] == ["a", "d", "e"]
    written = write_subset_shard([(source, 0, [row["row"] for row in kept])], str(tmp_path / "o.tar"))
    assert [w.sha256 for w in written] == [hashlib.sha256(row["image"]).hexdigest() for row in kept]
    with tarfile.open(tmp_path / "o.tar") as tar:
        assert [m.name for m in tar] == ["a.jpg", "d.jpg", "d.txt", "e.png"]


def test_images_of_chosen_rows(shard, flaky):
    expected = [(row, sample(row)[1]["jpg"]) for row in (0, 7, 99)]
    assert read_images(shard, [99, 0, 7]) == expected
    Flaky.fail_at = [100_000]
    assert read_images(flaky, [99, 0, 7]) == expected and Flaky.opened == 2
    Flaky.opened = 0
    with pytest.raises(ShardChanged, match="no image of row 100 any more: it ends before"):
        read_images(flaky, [5, 100])
    assert Flaky.opened == 1
    assert read_images(shard, []) == []


def test_nothing_is_unpickled_run_or_written(tmp_path, make_shard, monkeypatch):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    bomb = pickle.dumps(Bomb())
    parts = {"jpg": bomb, "cls": b"1", "pkl": bomb, "pyd": bomb, "pt": bomb}
    members = [(f"../escape.{suffix}", data) for suffix, data in parts.items()]
    source = make_shard(tmp_path / "in" / "s.tar", [("a", parts)], members=members)
    before = sorted(os.listdir(tmp_path))
    entries_of(expand_shards(source)[0])
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "in") == ["s.tar"]
