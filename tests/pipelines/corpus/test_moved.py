"""Shards under other names: taken once, taken up where they lie now, and never a run's own."""

import os
import shutil

import pytest

from pipelines.corpus import moved
from pipelines.corpus.samples import LabelSource
from pipelines.corpus.shards import expand_shards, read_entries
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import UserError
from pipelines.runs.record import CorpusConfig, Run, Shard


@pytest.fixture
def data(tmp_path, make_shard):
    """Three shards, all of one size, and a text file beside them."""
    for name in "abc":
        make_shard(tmp_path / f"data/{name}.tar", [(name, {"jpg": name.encode() * 9, "cls": b"1"})])
    return tmp_path / "data"


def found(spec, **options):
    return [shard.url for shard in expand_shards(str(spec), **options)]


def test_a_file_counts_once_whatever_links_lead_to_it(data):
    (data / "latest").symlink_to(".")
    (data / "0-link.tar").symlink_to("c.tar")
    os.link(data / "a.tar", data / "d.tar")
    told = []
    assert found(f"{data}/**/*.tar", tell=told.append) == [f"{data}/{n}.tar" for n in ("0-link", "a", "b")]
    assert "2 names lead to a shard" in told[0]
    (data.parent / "snapshot").mkdir()
    for name in "abc":
        (data.parent / f"snapshot/{name}.tar").symlink_to(data / f"{name}.tar")
    assert found(f"{data}/[abc].tar::{data.parent}/snapshot") == [f"{data}/{n}.tar" for n in "abc"]


def test_a_folder_keeps_its_own_name_whatever_its_links_are_called(data):
    (data.parent / "a-link").symlink_to("data")
    assert found(f"{data.parent}/**/a.tar") == [f"{data}/a.tar"]


def test_what_a_run_wrote_is_never_input(data, make_shard):
    for run in (data / "run", data / "deep/other"):
        make_shard(run / "subsets/hard/hard-000000.tar", [("k", {"jpg": b"x"})])
        (run / "run.json").write_text("{}")
    own = [f"{data}/{name}.tar" for name in "abc"]
    assert found(f"{data}/**/*.tar") == found(f"{data}/**") == own
    with pytest.raises(UserError, match="no shard matches"):
        found(f"{data}/*/subsets/hard/*.tar")
    inside = f"{data}/run/subsets/hard"
    assert found(inside) == [f"{inside}/hard-000000.tar"]  # a person who names a subset means it
    (data.parent / "link").symlink_to(data)
    for spec in (inside, f"{data.parent}/link/run/subsets/hard/*.tar"):
        with pytest.raises(UserError, match="lies in the run directory"):
            found(spec, run=str(data / "run"))


def test_a_pattern_descends_only_where_it_must(data):
    """An odd name beside the shards, and a folder that nobody may read, do not matter."""
    os.mkdir(os.fsencode(data) + b"/\xff\xfe")
    (data / "sub").mkdir()
    shutil.copy(data / "a.tar", data / "sub/e.tar")
    assert found(f"{data}/*/e.tar") == [f"{data}/sub/e.tar"]
    assert found(f"{data}/s*/*.tar") == [f"{data}/sub/e.tar"]
    os.rename(data / "sub", os.fsencode(data) + b"/sub\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        found(f"{data}/s*/*.tar")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_an_unreadable_neighbour_is_passed_over_and_told(data):
    (data / "lost+found").mkdir(mode=0o700)
    (data / "sub").mkdir(mode=0o755)
    (data / "sub/a.tar").write_bytes((data / "a.tar").read_bytes())
    for folder in [data, *list(data.parents)[:3]]:
        folder.chmod(0o755)
    told = []
    os.seteuid(65534)
    try:
        assert len(found(f"{data}/**/*.tar", tell=told.append)) == 4
        assert found(f"{data}/*/a.tar", tell=told.append) == [f"{data}/sub/a.tar"]
        with pytest.raises(UserError, match="can't be listed"):
            found(f"{data}/lost+found")
    finally:
        os.seteuid(0)
    assert told and all("lost+found" in line for line in told)


def embedded(tmp_path, shards):
    """A run whose shards are embedded, as far as its files say: facts as the stage writes them."""
    config = CorpusConfig("pixels:1", "f", 3)
    run = Run.create(str(tmp_path / "run"), config, shards)
    for number, shard in enumerate(shards):
        end = {}
        list(read_entries(shard, LabelSource("cls"), end))
        facts = {"left_out": 0, "max_label": 1, "size": shard.size, "mtime_ns": shard.mtime_ns}
        table = columns.embeddings_schema(3, "float32", 1).empty_table()
        column_groups.write(
            run.uri, columns.EMBEDDINGS, number, table, "s", digest=end["digest"], ends=end["ends"], **facts
        )
    return run


def test_moved_shards_are_known_by_their_bytes(tmp_path, data):
    run = embedded(tmp_path, expand_shards(str(data)))
    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    for old, new in (("a", "z"), ("b", "y")):  # other names and another order
        (elsewhere / f"{old}.tar").rename(elsewhere / f"{new}.tar")
    shutil.copy(elsewhere / "z.tar", elsewhere / "more.tar")
    listed = expand_shards(str(elsewhere))
    found = moved.take_up(run, listed)
    assert found[f"{data}/b.tar"] == f"{elsewhere}/y.tar" and found[f"{data}/c.tar"] == f"{elsewhere}/c.tar"
    assert found[f"{data}/a.tar"] in (f"{elsewhere}/z.tar", f"{elsewhere}/more.tar")
    grown = Run.create(run.uri, run.config, listed, moved=found)
    assert [grown.shards[i].url for i in (1, 2)] == [f"{elsewhere}/y.tar", f"{elsewhere}/c.tar"]
    assert len(grown.shards) == 4 and len({shard.url for shard in grown.shards}) == 4


def test_what_a_person_says_moved_is_compared(tmp_path, data):
    run = embedded(tmp_path, expand_shards(str(data)))
    there = data.rename(tmp_path / "there")
    moves = moved.parse_moves([f"{data}={there}"])
    assert moved.take_up(run, expand_shards(str(there)), moves) == {
        f"{data}/{n}.tar": f"{there}/{n}.tar" for n in "abc"
    }
    content = bytearray((there / "b.tar").read_bytes())
    content[600] ^= 1
    (there / "b.tar").write_bytes(content)
    with pytest.raises(UserError, match="does not hold what"):
        moved.take_up(run, expand_shards(str(there)), moves)
    missing = moved.take_up(run, expand_shards(str(there)))
    assert f"{data}/b.tar" not in missing and len(missing) == 2
    with pytest.raises(ValueError, match="not listed now"):
        Run.create(run.uri, run.config, expand_shards(str(there)), moved=missing)


@pytest.mark.parametrize("move", ["", "a", "=b", "a="])
def test_moves_that_are_none(move):
    with pytest.raises(UserError, match="expected FROM=TO"):
        moved.parse_moves([move])


def test_moves_change_whole_folders_only():
    moves = moved.parse_moves(["/a/b=/c", "s3://x/y=s3://z"])
    assert moved.moved_url("/a/b/t.tar", moves) == "/c/t.tar"
    assert moved.moved_url("/a/bb/t.tar", moves) == "/a/bb/t.tar"
    assert moved.moved_url("s3://x/y/t.tar?region=q", moves) == "s3://z/t.tar?region=q"


def test_a_shard_that_was_not_embedded_yet_moves_by_name_and_size(tmp_path, data):
    run = Run.create(str(tmp_path / "run"), CorpusConfig("pixels:1", "f", 3), expand_shards(str(data)))
    there = data.rename(tmp_path / "there")
    (there / "b.tar").rename(there / "q.tar")
    assert moved.take_up(run, expand_shards(str(there))) == {f"{data}/{n}.tar": f"{there}/{n}.tar" for n in "ac"}
    assert moved.take_up(run, [Shard(f"{there}/a.tar", 1, 0)]) == {}
