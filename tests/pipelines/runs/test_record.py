"""A run's record: what may share it, how it grows, what is refused."""

import dataclasses
import json

import pytest

from pipelines.runs.record import CorpusConfig, Run, Shard, fingerprint, fingerprints

CONFIG = CorpusConfig(encoder="pixels:8", encoder_fingerprint="abc", width=64)
SHARDS = [Shard(f"s3://b/{i}.tar", 100 + i, 5) for i in range(3)]


def test_what_is_saved_is_what_is_opened(tmp_path):
    config = dataclasses.replace(CONFIG, class_names=("cat", "dog"))
    Run.create(str(tmp_path / "run"), config, SHARDS)
    run = Run.open(str(tmp_path / "run"))
    assert (run.config, run.shards, run.classes) == (config, SHARDS, ["cat", "dog"])
    assert json.loads((tmp_path / "run/run.json").read_text())["versions"]["ray"]


def test_new_shards_follow_the_known_ones_which_keep_their_number(tmp_path):
    Run.create(str(tmp_path), CONFIG, SHARDS[1:])
    grown = Run.create(str(tmp_path), CONFIG, SHARDS)
    assert grown.shards == [SHARDS[1], SHARDS[2], SHARDS[0]] == Run.open(str(tmp_path)).shards


def test_shards_that_are_gone_are_refused(tmp_path):
    Run.create(str(tmp_path), CONFIG, SHARDS)
    with pytest.raises(ValueError, match=r"holds 3 shards, 2 of them not listed now.*s3://b/1.tar"):
        Run.create(str(tmp_path), CONFIG, SHARDS[:1])


@pytest.mark.parametrize(
    "change", [{"encoder_fingerprint": "xyz"}, {"label": "json:y"}, {"views": 5}, {"dtype": "float16"}]
)
def test_what_cannot_be_mixed_is_named(tmp_path, change):
    Run.create(str(tmp_path), CONFIG, SHARDS)
    name = next(iter(change)).split("_")[0]
    with pytest.raises(ValueError, match=f"made with {name}.*--overwrite"):
        Run.create(str(tmp_path), dataclasses.replace(CONFIG, **change), SHARDS)


def test_the_same_encoder_under_another_name_is_the_same(tmp_path):
    Run.create(str(tmp_path), CONFIG, SHARDS)
    assert Run.create(str(tmp_path), dataclasses.replace(CONFIG, encoder="module:x.py:y"), SHARDS).shards == SHARDS


def test_overwrite_removes_the_products_and_nothing_else(tmp_path):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    run.finish_stage("embed", rows=1)
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings/000000.parquet").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    fresh = Run.create(str(tmp_path), dataclasses.replace(CONFIG, views=2), SHARDS, overwrite=True)
    assert not (tmp_path / "embeddings").exists() and fresh.stage("embed") is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_no_run_there(tmp_path):
    with pytest.raises(ValueError, match=r"no run.json there"):
        Run.open(str(tmp_path))


def test_a_run_lives_on_an_object_store(s3_folder):
    Run.create(f"{s3_folder}/run", CONFIG, SHARDS).finish_stage("embed", rows=3)
    assert Run.open(f"{s3_folder}/run").stage("embed")["rows"] == 3


def test_run_json_has_a_line_per_shard_and_is_plain_json(tmp_path):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    lines = (tmp_path / "run.json").read_text().splitlines()
    assert [json.loads(line.strip().rstrip(","))["url"] for line in lines if '"url"' in line] == [s.url for s in SHARDS]
    (tmp_path / "run.json").write_text(json.dumps(run.record, indent=1))  # as earlier versions wrote it
    assert Run.open(str(tmp_path)).shards == SHARDS
    assert Run.create(str(tmp_path / "none"), CONFIG, []).shards == Run.open(str(tmp_path / "none")).shards == []


def test_shards_are_those_of_the_record(tmp_path):
    run = Run.create(str(tmp_path), CONFIG, SHARDS[:1])
    assert run.shards is run.shards
    run.record["shards"] = [dataclasses.asdict(shard) for shard in SHARDS]
    assert run.shards == SHARDS


@pytest.mark.parametrize("last", ["digest", None, {"b": 1, "a": [2]}])
def test_fingerprints_of_many_are_those_of_one(last):
    parts = ("embeddings", {"z": 1, "a": ("é", None)})
    assert fingerprints(*parts)(last) == fingerprint(*parts, last)
