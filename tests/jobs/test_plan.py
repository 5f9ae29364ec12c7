"""validate and plan end to end: what they say before is what curate does."""

import json

import pyarrow.dataset as ds
import pytest

from jobs.curate import main as curate
from jobs.inspect import main as inspect
from jobs.plan import main as plan
from jobs.validate import main as validate
from pipelines.planning.plan import STAGES
from pipelines.runs.record import Run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_image, make_shard):
    """Three shards of twelve: the second holds a bad label, a repeated key and a broken image, the third is cut."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        samples = [
            (f"{number}_{i:02d}", {"jpg": make_image(100 * number + i), "cls": str(i % 3).encode()}) for i in range(12)
        ]
        if number == 1:
            samples[3][1]["cls"] = b"cat"
            samples[5] = (samples[4][0], {"png": make_image(5, format="PNG"), "cls": b"0"})
            samples.insert(5, ("between", {"jpg": make_image(6), "cls": b"0"}))
            samples[8][1]["jpg"] = b"\xff\xd8\xff broken"
        path = folder / f"train-{number:06d}.tar"
        make_shard(path, samples)
    path.write_bytes(path.read_bytes()[:-14_000])
    return folder


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_validate_says_what_curate_leaves_out_and_plan_what_it_takes(shards, tmp_path, capsys):
    assert validate(["--shards", str(shards), "--decode-every", "1", "--max-bad-fraction", "0.2", "--json"]) == 0
    checked = last_line(capsys)
    words = ["--shards", str(shards), "--encoder", "pixels:3", "--run", str(tmp_path / "run"), "--workers", "1"]
    assert plan([*words, "--measure", "2", "--seconds", "0.5", "--json"]) == 0
    planned = last_line(capsys)
    assert not (tmp_path / "run/.parts/plan").exists()
    before = Run.open(str(tmp_path / "run"))
    assert (
        before.stages().keys() == {"plan"} and len(before.shards) == 3 and before.stage("plan")["plan"]["shards"] == 3
    )
    assert curate([*words, "--max-bad-fraction", "0.2", "--mlflow", "none", "--json"]) == 0
    done = last_line(capsys)["embed"]
    # The same reasons in the same words, and the same fraction.
    quarantine = ds.dataset(tmp_path / "run/quarantine").to_table().to_pylist()
    told = {(e["shard"], e["row"], e["reason"]) for entry in checked["reasons"].values() for e in entry["examples"]}
    assert told == {(entry["shard"], entry["row"], entry["reason"]) for entry in quarantine} and len(told) == 4
    assert checked["bad_fraction"] == pytest.approx(done["left_out"] / (done["rows"] + done["left_out"]))
    assert checked["shards"]["damaged"] == 1
    # The plan lies with the run, beside what happened.
    assert planned["shards"] == 3 and planned["workers"] == 1 and planned["device"] == "cpu"
    low, high = planned["samples_interval"]
    assert low <= done["rows"] + done["left_out"] <= high
    assert set(planned["seconds"]) == {"start", *STAGES, "total", "interval"}
    assert planned["memory_bytes"]["worker"] > 100e6
    assert inspect(["--run", str(tmp_path / "run"), "--json"]) == 0
    beside = last_line(capsys)["plan"]
    assert beside["seconds embed"]["actual"] == pytest.approx(done["seconds"])
    assert beside["seconds embed"]["planned"] == pytest.approx(planned["seconds"]["embed"])
    # Files of a dozen rows are mostly schema, so their sizes scale with the number of files.
    assert 0.5 < beside["bytes embeddings"]["ratio"] < 2
    assert inspect(["--run", str(tmp_path / "run")]) == 0
    assert "planned seconds embed" in capsys.readouterr().out


def test_more_is_bad_than_allowed(shards, capsys):
    assert validate(["--shards", str(shards), "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["bad_fraction"] > 0.01
    assert "--max-bad-fraction 0.01" in told.err.splitlines()[-1]


def test_an_even_sample_of_the_shards(shards, capsys):
    words = ["--shards", str(shards), "--most-shards", "1", "--label", "none", "--decode-every", "12", "--json"]
    assert validate([*words, "--max-bad-fraction", "1"]) == 0
    found = last_line(capsys)
    assert found["shards"] == {"listed": 3, "read": 1, "damaged": 0}
    assert found["samples"] == 13 and found["classes"] == {} and found["images"]["decoded"] == 2
    assert 26 < found["estimated"]["samples"] < 39


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (validate, ["--shards", "/nowhere"], "--shards"),
        (validate, ["--shards", "SHARDS", "--label", "text"], "--label text"),
        (validate, ["--shards", "SHARDS", "--decode-every", "0"], "--decode-every 0"),
        (plan, ["--shards", "SHARDS"], "--encoder"),
        (plan, ["--encoder", "pixels:3"], "--shards"),
        (plan, ["--shards", "SHARDS", "--encoder", "pixels:3", "--samples", "0"], "--samples"),
        (plan, ["--shards", "SHARDS", "--encoder", "pixels:3", "--gpus", "8"], "--gpus 8: Ray has no GPU here"),
        (plan, ["--shards", "SHARDS", "--encoder", "pixels:3", "--label", "json:nothing"], "no usable sample"),
    ],
)
def test_mistakes_end_with_status_2(shards, capsys, command, words, said):
    assert command([str(shards) if word == "SHARDS" else word for word in words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_plan_without_a_run_leaves_nothing_behind(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--shards", f"{shards}/train-000000.tar", "--encoder", "pixels:3", "--workers", "1", "--samples", "5.85e9"]
    assert plan([*words, "--seconds", "0.2", "--json"]) == 0
    found = last_line(capsys)
    assert found["samples"] == 5_850_000_000 and found["shards"] == 5_850_000_000 // 12
    assert found["run"] is None and not list(tmp_path.iterdir())
