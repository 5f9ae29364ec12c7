"""What a person types for --shards, to a list."""

import os

import pytest

from pipelines.corpus import shardlist
from pipelines.corpus.shards import expand_shards
from pipelines.runs.record import Shard


@pytest.fixture
def folder(tmp_path, make_shard):
    for name in ("a-0.tar", "a-1.tar", "a-2.tar", "b.tar", ".hidden.tar", "sub/c.tar", "sub/deep/d.tar"):
        make_shard(tmp_path / name, [("k", {"jpg": b"x"})])
    (tmp_path / "notes.md").write_text("no shard")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(folder, spec):
    return [os.path.relpath(shard.url, folder) for shard in expand_shards(spec.replace("@", str(folder)))]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("@/b.tar", ["b.tar"]),
        ("@/a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("@/a-{2..0}.tar", ["a-2.tar", "a-1.tar", "a-0.tar"]),
        ("@/{b,a-1}.tar", ["b.tar", "a-1.tar"]),
        ("@/a-[!1].tar", ["a-0.tar", "a-2.tar"]),
        ("@/?-*.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("@/*/*.tar", ["sub/c.tar"]),
        ("@/**/*.tar", ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar", "sub/c.tar", "sub/deep/d.tar"]),
        ("@", ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]),
        ("@/", ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]),
        ("@/sub::@/a-{1..0}.tar", ["sub/c.tar", "a-1.tar", "a-0.tar"]),
        ("file:@/b.tar", ["b.tar"]),
        ("file://@/a-*.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
    ],
)
def test_forms(folder, spec, expected):
    assert names(folder, spec) == expected


def test_sizes_and_times(folder):
    for spec in (f"{folder}/b.tar", f"{folder}/b*", str(folder)):
        shard = expand_shards(spec)[-1]
        stat = os.stat(folder / "b.tar")
        assert shard == Shard(str(folder / "b.tar"), stat.st_size, stat.st_mtime_ns)


def test_relative_becomes_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [s.url for s in expand_shards("a-{0..1}.tar::sub")] == [
        f"{folder}/a-0.tar",
        f"{folder}/a-1.tar",
        f"{folder}/sub/c.tar",
    ]


def test_list_file(folder, monkeypatch):
    (folder / "list.txt").write_text(f"# mine\n\n{folder}/b.tar\n  {folder}/a-{{1..0}}.tar\nsub/*.tar\n")
    monkeypatch.chdir(folder)
    assert names(folder, "@/list.txt") == ["b.tar", "a-1.tar", "a-0.tar", "sub/c.tar"]
    assert names(folder, "@/list.txt::@/a-2.tar")[-1] == "a-2.tar"


def test_many_listed_shards_keep_their_order(tmp_path, make_shard):
    order = [f"{i * 37 % 101:03d}.tar" for i in range(101)]
    for name in order:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list").write_text("\n".join(str(tmp_path / name) for name in order))
    assert names(tmp_path, "@/list") == order


def test_s3(s3_folder, s3_server, folder):
    import boto3

    client = boto3.client("s3", endpoint_url=s3_server)
    bucket = s3_folder.split("/")[2]
    for name in ("t-0.tar", "t-1.tar", "x y.tar"):
        client.put_object(Bucket=bucket, Key=f"folder/{name}", Body=b"12345")
    found = expand_shards(s3_folder + "/t-{0..1}.tar")
    assert [s.url for s in found] == [f"{s3_folder}/t-0.tar", f"{s3_folder}/t-1.tar"]
    assert found[0].size == 5 and found[0].mtime_ns > 0
    assert found == expand_shards(s3_folder + "/t-*.tar") == expand_shards(s3_folder)[:2]
    assert expand_shards(s3_folder + "/x*")[0].url == f"{s3_folder}/x y.tar"
    assert expand_shards(s3_folder + "/t-?.tar?region=us-east-1")[0].url == f"{s3_folder}/t-0.tar?region=us-east-1"
    with pytest.raises(ValueError, match="shard"):
        expand_shards(s3_folder + "/t-{0..2}.tar")
    with pytest.raises(ValueError, match="shard"):
        expand_shards("s3://no-such-bucket-at-all/x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("@/none.tar", "none.tar"),
        ("@/a-{0..3}.tar", "1 of 4 shards do not exist, the first is .*a-3.tar"),
        ("@/z*.tar", "no shard matches"),
        ("@/nothing/*.tar", "no shard matches"),
        ("@/empty", "no \\*.tar"),
        ("@/b.tar::@/*.tar", "named twice"),
        ("@/b.tar::", "empty shard source"),
        ("", "empty shard source"),
        ("@/a-{0..2.tar", "unbalanced braces"),
        ("@/a-{0..99999999999999999999}.tar", "more than 1000 "),
        ("@/a-{0..99}{0..99}.tar", "more than 1000 "),
        ("pipe:cat @/b.tar", "never run"),
        ("@/notes.md", "notes.md"),
        ("@/blank.txt", "lists no shard"),
        ("@/piped.txt", "never run"),
        ("@/broken.txt", "relative lines start at the working folder"),
        ("@/packed.tar.bz2", "compressed"),
        ("quux://a/b.tar", "quux"),
    ],
)
def test_refused_with_the_word_shard(folder, monkeypatch, spec, message):
    monkeypatch.setattr(shardlist, "MAX_SHARDS", 1000)
    (folder / "blank.txt").write_text("# nothing\n")
    (folder / "piped.txt").write_text("pipe:touch /tmp/x\n")
    (folder / "broken.txt").write_text("no-such.tar\n")
    (folder / "packed.tar.bz2").write_bytes(b"BZh")
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(spec.replace("@", str(folder)))
    assert "shard" in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_looks_like_a_pattern_but_exists(tmp_path, make_shard):
    make_shard(tmp_path / "a[1].tar", [])
    assert names(tmp_path, "@/a[1].tar") == ["a[1].tar"]


def test_many_shards_of_a_folder_are_found_by_listing_it(tmp_path, monkeypatch):
    names = [f"{i:03d}.tar" for i in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    spec = f"{tmp_path}/{{000..039}}.tar"
    one_by_one = expand_shards(spec)
    monkeypatch.setattr("pipelines.corpus.shardlist.LISTED_FROM", 10)
    assert expand_shards(spec) == one_by_one
    (tmp_path / "017.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of 40 shards do not exist, the first is .*017\.tar"):
        expand_shards(spec)


@pytest.mark.parametrize(("total", "count", "expected"), [(50, 2, [12, 37]), (3, 5, [0, 1, 2]), (7, 1, [3])])
def test_evenly(total, count, expected):
    assert shardlist.evenly(total, count) == expected
