"""The distributed selection equals sorting, and what comes out is what went in."""

import hashlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipelines.curation.select import Rule, select, sortable
from pipelines.runs import column_groups, columns
from tests.pipelines.synthetic import make_run, picture

pytestmark = pytest.mark.usefixtures("ray_session")


def with_scores(folder, values, **options):
    """A run with a column group `toy` of one score."""
    run, _, labels = make_run(folder, **options)
    start = 0
    for shard in range(len(run.shards)):
        keys = column_groups.read(run.uri, columns.EMBEDDINGS, shard, ["key", "shard", "row", "label"])
        part = pa.array(values[start : start + keys.num_rows], pa.float32())
        column_groups.write(
            run.uri, "toy", shard, keys.append_column("score", part), f"toy {hashlib.sha256(values).hexdigest()}"
        )
        start += keys.num_rows
    return run, labels


def manifest(run, name):
    return pq.read_table(run.path("subsets", name, "manifest.parquet"))


def expected_keys(values, count, chosen_from=None):
    """By a stable sort: the highest first, ties in corpus order."""
    order = np.argsort(-values, kind="stable")
    order = [i for i in order if np.isfinite(values[i]) and (chosen_from is None or chosen_from[i])]
    return {f"s{i:06d}" for i in order[:count]}


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30))
def test_sortable_keeps_the_order(values):
    values = np.array(values, np.float32)
    order = np.argsort(values, kind="stable")
    keys = sortable(values[order]).astype(np.int64)
    assert (np.diff(keys) >= 0).all()
    assert (np.diff(sortable(values[order], lowest=True).astype(np.int64)) <= 0).all()


def test_top_takes_exactly_the_highest_ties_in_shard_order(tmp_path):
    values = np.random.default_rng(0).integers(-3, 4, 100).astype(np.float32)
    values[[7, 60]] = np.nan
    run, _ = with_scores(tmp_path, values)
    assert select(run, Rule("toy.score", 37), "a")["samples"] == 37
    assert set(manifest(run, "a")["key"].to_pylist()) == expected_keys(values, 37)


def test_a_fraction_of_every_class(tmp_path):
    values = np.random.default_rng(1).normal(size=100).astype(np.float32)
    run, labels = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 0.2, per_class=True), "a")
    expected = set().union(*(expected_keys(values, round(0.2 * (labels == c).sum()), labels == c) for c in range(3)))
    assert set(manifest(run, "a")["key"].to_pylist()) == expected


def test_lowest(tmp_path):
    values = np.random.default_rng(2).normal(size=100).astype(np.float32)
    run, _ = with_scores(tmp_path, values)
    select(run, Rule("toy.score", 5, lowest=True), "a")
    assert set(manifest(run, "a")["key"].to_pylist()) == expected_keys(-values, 5)


def test_the_subset_holds_the_original_bytes_and_webdataset_reads_it(tmp_path):
    values = (np.arange(100) * 37 % 100).astype(np.float32)
    run, labels = with_scores(tmp_path, values)
    entry = select(run, Rule("toy.score", 0.3), "hard", samples_per_shard=10)
    tars = sorted((tmp_path / "run/subsets/hard").glob("*.tar"))
    assert entry["shards"] == len(tars) > 1
    samples = list(webdataset.WebDataset([str(t) for t in tars], shardshuffle=False))
    chosen = np.flatnonzero(values >= 70)
    assert [s["__key__"] for s in samples] == [f"s{index:06d}" for index in chosen]
    for index, sample, row in zip(chosen, samples, manifest(run, "hard").to_pylist(), strict=True):
        assert (sample["png"], sample["txt"]) == (picture(int(index)), b"kept")
        assert int(sample["cls"]) == labels[index] == row["label"]
        assert row["sha256"] == hashlib.sha256(sample["png"]).hexdigest()
        assert (row["score"], row["subset_key"]) == (values[index], sample["__key__"])
    with tarfile.open(tars[0]) as tar:
        assert all(member.mtime == 0 for member in tar)
    uids = np.load(tmp_path / "run/subsets/hard/uids.npy")
    assert uids.dtype == np.dtype("u8,u8") and len(uids) == 30 and (np.sort(uids) == uids).all()
    card = (tmp_path / "run/subsets/hard/README.md").read_text()
    assert "30 samples" in card and "30 % with the highest toy.score" in card


def test_again_it_is_skipped_and_another_rule_replaces_it(tmp_path):
    values = np.arange(100, dtype=np.float32)
    run, _ = with_scores(tmp_path, values)
    assert not select(run, Rule("toy.score", 50), "a", samples_per_shard=5)["skipped"]
    assert select(run, Rule("toy.score", 50), "a", samples_per_shard=5)["skipped"]
    select(run, Rule("toy.score", 3), "a")
    assert len(list((tmp_path / "run/subsets/a").glob("*.tar"))) == 1


@pytest.mark.parametrize("by", ["toy.nothing", "nothing.score", "score"])
def test_a_column_that_is_not_there_is_named(tmp_path, by):
    run, _ = with_scores(tmp_path, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match=by):
        select(run, Rule(by, 3), "a")


@pytest.mark.parametrize("count", [0, -1, 1.5, 0.0])
def test_a_count_that_cannot_be(count):
    with pytest.raises(ValueError, match="a fraction in"):
        Rule("toy.score", count)


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".."])
def test_a_name_stays_inside_the_run(tmp_path, name):
    run, _ = with_scores(tmp_path, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="--name"):
        select(run, Rule("toy.score", 3), name)
