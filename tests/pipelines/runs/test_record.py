"""A run's record: what may share it, how it grows, what is refused."""

import dataclasses
import json
import subprocess
import sys

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
    with pytest.raises(ValueError, match=f"made with {name}.*`overwrite`"):
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
    run = Run.open(f"{s3_folder}/run")
    assert run.stage("embed")["rows"] == 3 and run.stage("fit") is None
    run.finish_stage("select/hard", rows=1)
    assert [*run.stages()] == ["embed", "select/hard"]


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
    run.record["shards"] = [shard.found() for shard in SHARDS]
    assert run.shards == SHARDS


@pytest.mark.parametrize("last", ["digest", None, {"b": 1, "a": [2]}])
def test_fingerprints_of_many_are_those_of_one(last):
    parts = ("embeddings", {"z": 1, "a": ("é", None)})
    assert fingerprints(*parts)(last) == fingerprint(*parts, last)


def test_four_processes_that_note_twenty_stages_each_keep_eighty(tmp_path):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    code = (
        "import sys; from pipelines.runs.record import Run; run = Run.open(sys.argv[1])\n"
        "for number in range(20): run.finish_stage(f'select/{sys.argv[2]}-{number}', rows=number)"
    )
    noting = [subprocess.Popen([sys.executable, "-c", code, run.uri, str(number)]) for number in range(4)]
    assert [process.wait() for process in noting] == [0] * 4
    noted = Run.open(run.uri).stages()
    assert noted.keys() == {f"select/{process}-{number}" for process in range(4) for number in range(20)}
    assert noted["select/3-19"]["rows"] == 19


def test_a_run_that_grows_under_a_running_command_loses_nothing(tmp_path):
    running = Run.create(str(tmp_path), CONFIG, SHARDS[:2])
    grown = Run.create(str(tmp_path), CONFIG, SHARDS)
    grown.set_classes(["0", "1", "2"])
    running.finish_stage("trust/t", rows=1)
    running.settle_classes([{"max_label": 0}, {"max_label": 1}])
    running.require_precision("bfloat16")
    running.note_verified({"0": 7})
    assert (running.shards, running.classes) == (SHARDS[:2], ["0", "1"])
    now = Run.open(str(tmp_path))
    assert (now.shards, now.classes, now.stage("trust/t")["rows"]) == (SHARDS, ["0", "1", "2"], 1)
    assert (now.record["precision"], now.record["verified"]) == ("bfloat16", {"0": 7})
    with pytest.raises(ValueError, match=r"computed in bfloat16; these cannot be mixed"):
        grown.require_precision("float32")


def test_a_run_of_an_earlier_version_opens_and_its_stages_move_to_their_files(tmp_path):
    entry = {"finished": "2026-01-01T00:00:00+00:00", "rows": 7}
    plan = {"shards": 3}
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    run.record |= {"stages": {"embed": entry, "select/hard": entry | {"rule": "r"}}, "plan": plan}
    run.save()
    old = Run.open(str(tmp_path))
    assert old.stage("embed") == entry and old.stages().keys() == {"embed", "select/hard"}
    old.finish_stage("fit", rank=1)
    old.forget("embed", "embeddings")
    assert Run.open(str(tmp_path)).stages().keys() == {"select/hard", "fit"}
    moved = Run.create(str(tmp_path), CONFIG, SHARDS)
    assert "stages" not in json.loads((tmp_path / "run.json").read_text()) and "plan" not in moved.record
    assert json.loads((tmp_path / "stages/select/hard.json").read_text())["rule"] == "r"
    assert moved.stages().keys() == {"select/hard", "fit", "plan"} and moved.stage("plan")["plan"] == plan


def test_a_stage_is_forgotten_with_its_product(tmp_path):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    run.finish_stage("select/hard", rows=1)
    (tmp_path / "subsets/hard").mkdir(parents=True)
    run.forget("select/hard", "subsets/hard")
    assert run.stage("select/hard") is None and not (tmp_path / "subsets/hard").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\0", '{"a": ' * 5_000, "9" * 5_000])
def test_a_strange_entry_of_a_stage_is_one_line_with_its_file(tmp_path, text):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/fit.json").write_text(text)
    for read in (lambda: run.stage("fit"), run.stages):
        with pytest.raises(ValueError, match=r"stages/fit.json: .*start that stage again"):
            read()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("config", "width"), "wide"), (("config", "views"), None), (("config", "normalize"), 1), (("shards",), {"a": 1}),
        (("shards", 0, "size"), "1"), (("shards", 1, "url"), ["x"]), (("classes",), [1]), (("classes",), ["\ud800"]),
        (("config",), "x"), (("config", "class_names"), 3),
    ],
)  # fmt: skip
def test_a_strange_record_is_one_line(tmp_path, where, value):
    run = Run.create(str(tmp_path), CONFIG, SHARDS)
    inner = run.record
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(run.record))
    with pytest.raises(ValueError, match=r"run.json is not one that hardset wrote"):
        Run.open(str(tmp_path))
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"run.json cannot be read \(nested too deep\)"):
        Run.open(str(tmp_path))
