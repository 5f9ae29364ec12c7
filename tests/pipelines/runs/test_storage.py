"""Storage: URIs, whole-or-nothing writing, listing, on a local disk, on S3 (a real server) and on fsspec's memory."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipelines.runs import local_files, storage


@pytest.fixture(params=["local", "s3", "memory"])
def root(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    return str(tmp_path / "out put") if request.param == "local" else f"memory://{tmp_path.name}"


def write(uri, data):
    with storage.write_atomic(uri) as file:
        file.write(data)


def test_write_list_read_remove(root):
    names = ["b/two.bin", "a.bin", "b/c/three.txt", "odd %20 {name} [x].bin"]
    for name in names:
        write(storage.join(root, name), name.encode())
    listed = storage.list_files(root)
    assert listed == sorted(storage.join(root, name) for name in names)
    assert [storage.read_bytes(uri).decode() for uri in listed] == sorted(names)
    assert storage.list_files(root, ".txt") == [storage.join(root, "b/c/three.txt")]
    assert storage.list_files(root, recursive=False) == sorted(storage.join(root, n) for n in names if "/" not in n)
    assert storage.list_files(storage.join(root, "nothing here")) == []
    assert storage.exists(storage.join(root, "b")) and storage.exists(storage.join(root, "a.bin"))
    storage.remove_tree(storage.join(root, "b"))
    storage.remove_tree(storage.join(root, "b"))
    assert not storage.exists(storage.join(root, "b/two.bin"))
    assert len(storage.list_files(root)) == 2


def test_an_exception_leaves_nothing_and_keeps_what_was_there(root):
    uri = storage.join(root, "x.parquet")
    for before in (None, b"old"):
        if before:
            write(uri, before)
        with pytest.raises(RuntimeError), storage.write_atomic(uri) as file:
            file.write(b"half")
            raise RuntimeError
        assert storage.exists(uri) == bool(before)
    assert storage.read_bytes(uri) == b"old"


def test_the_local_file_has_its_name_only_when_it_is_whole(tmp_path):
    with storage.write_atomic(tmp_path / "x.tar") as file:
        file.write(b"half")
        file.flush()
        (other,) = os.listdir(tmp_path)
        assert other.startswith(".x.tar.tmp-") and not other.endswith((".tar", ".parquet"))
        assert storage.list_files(tmp_path) == []
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_large_object_arrives_whole(s3_folder):
    data = os.urandom(1 << 20) * 23
    write(storage.join(s3_folder, "large"), data)
    assert storage.read_bytes(storage.join(s3_folder, "large")) == data


def test_parquet_is_the_same_bytes_each_time(root):
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    uris = [storage.join(root, name) for name in ("one.parquet", "two.parquet")]
    assert storage.write_parquet_atomic(table, uris[0]) == 3
    assert storage.write_parquet_atomic(iter([table]), uris[1]) == 3
    assert storage.read_bytes(uris[0]) == storage.read_bytes(uris[1])
    filesystem, path = storage.open_filesystem(uris[0])
    assert pq.read_table(path, filesystem=filesystem) == table


def test_parquet_of_no_table_needs_a_schema(tmp_path):
    schema = pa.schema([("a", pa.int32())], metadata={"made": "here"})
    assert storage.write_parquet_atomic([], tmp_path / "x.parquet", schema) == 0
    assert pq.read_schema(tmp_path / "x.parquet").metadata[b"made"] == b"here"
    assert storage.write_parquet_atomic(pa.table({"a": [5]}), tmp_path / "y.parquet", schema) == 1
    assert pq.read_table(tmp_path / "y.parquet").schema.equals(schema, check_metadata=True)
    with pytest.raises(ValueError, match="no table"):
        storage.write_parquet_atomic([], tmp_path / "z.parquet")
    assert not (tmp_path / "z.parquet").exists()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("/a/b%20c", "/a/b%20c"),
        ("~/x", str(Path.home() / "x")),
        ("a/../b", str(Path.cwd() / "b")),
        ("a:b", str(Path.cwd() / "a:b")),
    ],
)
def test_local_paths(uri, expected):
    filesystem, path = storage.open_filesystem(uri)
    assert isinstance(filesystem, pafs.LocalFileSystem)
    assert path == expected == storage.absolute(uri)


@pytest.mark.parametrize(
    ("base", "parts", "expected"),
    [
        ("/a/", ("b", "c/d"), "/a/b/c/d"),
        ("/", ("b",), "/b"),
        ("s3://b/k", ("c",), "s3://b/k/c"),
        ("s3://b/k?region=eu-west-1", ("c",), "s3://b/k/c?region=eu-west-1"),
        ("s3://b/k-?", ("c",), "s3://b/k-?/c"),
    ],
)
def test_join(base, parts, expected):
    assert storage.join(base, *parts) == expected


def test_unknown_scheme_is_one_line():
    with pytest.raises(ValueError, match="quux://a/b") as error:
        storage.open_filesystem("quux://a/b")
    assert "\n" not in str(error.value)


def test_check_writable_leaves_no_file(root, tmp_path):
    storage.check_writable(storage.join(root, "deep/er"))
    assert storage.list_files(root) == []
    assert os.listdir(tmp_path) == []


def test_check_writable_refuses(tmp_path, s3_server):
    (tmp_path / "file").write_text("x")
    for uri in (tmp_path / "file", tmp_path / "file" / "below" / "it", "s3://no-such-bucket-here/x", "/proc/x"):
        with pytest.raises(ValueError, match="not writable") as error:
            storage.check_writable(uri)
        assert "\n" not in str(error.value) and str(uri) in str(error.value)


def test_remove_tree_unlinks_a_link_and_spares_its_target(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    storage.remove_tree(tmp_path / "link")
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept" / "x").exists()


@pytest.mark.parametrize("place", ["subsets/hard/x.tar", "report/x.html", ".parts/x", "stages/x.json"])
def test_nothing_is_written_or_deleted_through_a_link_inside_a_run(tmp_path, place):
    """A stranger's run with a link to a folder of ours."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / Path(place).name).write_text("ours")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    folder = (run / place).parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(tmp_path / "ours")
    with pytest.raises(storage.StorageError, match="is a link inside a run directory"):
        write(run / place, b"theirs")
    with pytest.raises(storage.StorageError, match="is a link inside a run directory"):
        storage.remove_tree(run / place)
    assert (tmp_path / "ours" / Path(place).name).read_text() == "ours"
    storage.remove_tree(folder)
    assert not folder.is_symlink() and (tmp_path / "ours" / Path(place).name).exists()


def test_a_run_behind_a_link_of_the_user_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link/run.json", b"{}")
    write(tmp_path / "link/stages/x.json", b"{}")
    assert (tmp_path / "disk/stages/x.json").exists()


def test_temporary_files_of_dead_writers_are_swept_others_stay(tmp_path):
    import subprocess
    import sys

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = local_files.temporary_beside(tmp_path / "group" / "000000.parquet")
    dead = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
    elsewhere = ours.with_name(ours.name.replace(local_files._host(), "00000000"))
    old = elsewhere.with_name(elsewhere.name[:-1] + "0")
    ours.parent.mkdir()
    for path in (ours, dead, elsewhere, old, ours.with_name("000000.parquet"), ours.with_name(".notes.tmp")):
        path.write_text("x")
    os.utime(old, (0, 0))
    storage.sweep(tmp_path / "group")
    left = {path.name for path in (tmp_path / "group").iterdir()}
    assert left == {ours.name, elsewhere.name, "000000.parquet", ".notes.tmp"} - (
        {elsewhere.name} if elsewhere == old else set()
    )
