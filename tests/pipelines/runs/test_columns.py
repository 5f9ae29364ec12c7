"""Footers: read once, and again when their file has changed."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runs import column_groups, columns, joins
from tests.pipelines.synthetic import make_run

TABLE = pa.table({"row": pa.array([0, 1], pa.int64()), "md": pa.array([0.5, 1.5], pa.float32())})


def age(path, seconds=60):
    """Make a file look as if it had been written some time ago."""
    then = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


@pytest.fixture
def group(tmp_path):
    """group(shard, source): write a file of the group `g`; returns its path."""

    def write(shard, source):
        column_groups.write(str(tmp_path), "g", shard, TABLE, source)
        return tmp_path / column_groups.file_name("g", shard)

    return write


def sources(tmp_path, count=3):
    return [found and found["source"] for found in column_groups.all_facts(str(tmp_path), "g", count)]


def test_all_facts_are_those_of_each_file(tmp_path, group):
    assert sources(tmp_path) == [None] * 3
    age(group(0, "a"))
    age(group(2, "c"))
    group(3, "not asked for")
    assert sources(tmp_path) == ["a", None, "c"] == sources(tmp_path)
    assert column_groups.all_facts(str(tmp_path), "g", 1) == [column_groups.facts(str(tmp_path), "g", 0)]


def test_a_file_that_was_replaced_is_read_again(tmp_path, group):
    age(group(0, "a"))
    assert sources(tmp_path)[0] == "a"
    group(0, "b")
    assert sources(tmp_path)[0] == "b"
    group(0, "c").unlink()
    assert sources(tmp_path)[0] is None


def test_a_young_file_is_not_trusted(tmp_path, group):
    path = group(0, "a")
    size, times = path.stat().st_size, (path.stat().st_mtime_ns,) * 2
    assert sources(tmp_path)[0] == "a"
    group(0, "b")  # of the same size, within the resolution of the time
    os.utime(path, ns=times)
    assert path.stat().st_size == size and sources(tmp_path)[0] == "b"


def test_a_settled_file_is_read_once(tmp_path, group, monkeypatch):
    age(group(0, "a"))
    sources(tmp_path)
    monkeypatch.setattr(column_groups, "_footer", lambda *_: pytest.fail("read again"))
    assert sources(tmp_path)[0] == "a"


def test_what_is_no_file_of_ours_is_none(tmp_path, group):
    (tmp_path / "g").mkdir()
    (tmp_path / "g/000000.parquet").write_text("no parquet")
    pq.write_table(TABLE, tmp_path / "g/000001.parquet")
    group(2, "a")
    assert sources(tmp_path) == [None, None, "a"] == sources(tmp_path)


def test_only_what_repeats_is_written_with_a_dictionary(tmp_path, group):
    row_group = pq.read_metadata(group(0, "a")).row_group(0)
    assert [row_group.column(i).has_dictionary_page for i in range(2)] == [True, False]


def test_a_group_whose_shard_was_embedded_again_is_refused_whoever_wrote_it(tmp_path):
    run, _, _ = make_run(tmp_path, (5, 4))
    for shard, rows in enumerate((5, 4)):
        keys = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
        column_groups.write(
            run.uri, "trust/t", shard, keys.append_column("trust", pa.array(np.zeros(rows, np.float32))), "x"
        )
    column_groups.check_group_fresh("trust/t", run.embedding_facts(), run.uri)
    column_groups.write(
        run.uri, "embeddings", 1, column_groups.read(run.uri, "embeddings", 1), "other bytes", left_out=0
    )
    with pytest.raises(ValueError, match=r"trust/t/: shard 1 was embedded again since; run hardset trust first"):
        column_groups.check_group_fresh("trust/t", run.embedding_facts(), run.uri)
    with pytest.raises(ValueError, match="shard 1 was embedded again"):
        joins.join(run.uri, 1, ["trust/t.trust"])


def test_a_folder_that_query_engines_take_for_a_column_is_known():
    assert columns.column_in_path("/data/label=worst/run") == "label=worst"
    assert columns.column_in_path("/data/alpha=0.3/run") is None
    columns.check_name("--name", "alpha=0.3")
    with pytest.raises(ValueError, match="take it for the column label"):
        columns.check_name("--name", "label=1")
