"""The main job end to end: real tars in, columns and a subset out, whatever comes in."""

import json
import os
import shutil
import struct
import zlib

import boto3
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.curate import main as curate
from jobs.embed import main as embed
from jobs.fit import main as fit
from jobs.inspect import main as inspect
from jobs.score import main as score
from jobs.select import main as select
from pipelines.runs import joins
from pipelines.runs.record import Run

pytestmark = pytest.mark.usefixtures("ray_session")


def png_bomb() -> bytes:
    """A PNG of 50,000 × 50,000 pixels in some kilobytes: it must cost nothing to refuse."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def write_corpus(make_image, make_shard):
    """write_corpus(folder, numbers, size=12): good shards `train-NNNNNN.tar` of three classes; returns the folder."""

    def write(folder, numbers, size=12):
        for number in numbers:
            samples = [
                (f"{number:03d}_{i:04d}", {"jpg": make_image(100 * number + i), "cls": str(i % 3).encode()})
                for i in range(size)
            ]
            make_shard(folder / f"train-{number:06d}.tar", samples)
        return str(folder)

    return write


@pytest.fixture
def corpus(tmp_path, write_corpus):
    """corpus(numbers): good shards in this test's own folder."""
    return lambda numbers: write_corpus(tmp_path / "shards", numbers)


@pytest.fixture(scope="module")
def curated(tmp_path_factory, ray_session, write_corpus):
    """A folder with three shards and their run, made once: tests read it or work on a copy of the run."""
    folder = tmp_path_factory.mktemp("curated")
    assert curate(arguments(write_corpus(folder / "shards", range(3)), folder / "run")) == 0
    return folder


@pytest.fixture
def copied(curated, tmp_path):
    """The run of `curated`, copied; its shards stay where they are."""
    return shutil.copytree(curated / "run", tmp_path / "copied")


def arguments(shards, run, *more):
    # One worker: each is a process that has to import torch.
    words = ["--shards", str(shards), "--run", str(run), "--encoder", "pixels:3", "--workers", "1", "--mlflow", "none"]
    return [*words, *more]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def result_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_whole_way(curated, copied, capsys):
    assert curate(arguments(curated / "shards", copied, "--json")) == 0
    result = result_of(capsys)
    assert result["embed"]["rows"] == 36 and result["embed"]["left_out"] == 0
    run = curated / "run"
    margins = ds.dataset(run / "difficulty").to_table(columns=["margin"])["margin"].to_pylist()
    trusted = sum(margin is not None and margin < 0 for margin in margins)
    assert result["select"]["samples"] == max(1, round(0.1 * trusted))
    assert sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) == [
        "difficulty", "embeddings", "gaussians.npz", "percentiles", "quarantine", "report", "run.json", "stages",
        "subsets",
    ]  # fmt: skip
    for group in ("embeddings", "difficulty", "quarantine"):
        assert len(list((run / group).glob("*.parquet"))) == 3
    table = ds.dataset(run / "difficulty").to_table()
    assert table.column_names[:4] == ["key", "shard", "row", "label"]
    assert table["key"].to_pylist() == [f"{s:03d}_{i:04d}" for s in range(3) for i in range(12)]
    assert b"harder" in table.schema.field("rmd").metadata[b"direction"]
    record = json.loads((run / "run.json").read_text())
    assert record["classes"] == ["0", "1", "2"]
    assert "rmd" in json.loads((run / "stages/score.json").read_text())["quantiles"]
    assert "where difficulty.margin < 0" in json.loads((run / "stages/select/hard.json").read_text())["rule"]
    assert "stages" not in record


def test_stages_one_by_one_are_the_same_as_curate(tmp_path, curated):
    assert embed(arguments(curated / "shards", tmp_path / "run")) == 0
    for stage, *more in ((fit,), (score,), (select, "--where", "difficulty.margin < 0")):
        assert stage(["--run", str(tmp_path / "run"), "--mlflow", "none", *more]) == 0
    for name in ("embeddings/000001.parquet", "difficulty/000002.parquet", "subsets/hard/hard-000000.tar"):
        assert (tmp_path / "run" / name).read_bytes() == (curated / "run" / name).read_bytes(), name


def test_again_nothing_is_redone_and_no_byte_changes(curated, copied, capsys):
    before = contents(copied)
    assert curate(arguments(curated / "shards", copied, "--json")) == 0
    again = result_of(capsys)
    assert (again["embed"]["shards_done"], again["embed"]["shards_skipped"]) == (0, 3)
    assert again["fit"]["skipped"] and again["select"]["skipped"] and again["score"]["shards_done"] == 0
    assert contents(copied) == before


@pytest.mark.slow
def test_more_shards_are_embedded_alone_and_the_scores_equal_a_fresh_run(tmp_path, corpus, curated, copied, capsys):
    first = copied / "embeddings/000000.parquet"
    old = (first.stat().st_ino, first.stat().st_mtime_ns)
    both = f"{curated / 'shards'}::{corpus(range(3, 5))}"
    assert curate(arguments(both, copied, "--json")) == 0
    assert result_of(capsys)["embed"]["shards_done"] == 2
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == old
    assert curate(arguments(both, tmp_path / "fresh")) == 0
    grown, fresh = (joins.load(str(run), ["difficulty.rmd"]) for run in (copied, tmp_path / "fresh"))
    assert grown["key"] == fresh["key"]
    rmd = fresh["difficulty.rmd"].to_numpy()
    np.testing.assert_allclose(grown["difficulty.rmd"].to_numpy(), rmd, atol=1e-4 * rmd.std())


@pytest.mark.slow
def test_a_shard_whose_bytes_changed_is_redone_one_whose_time_changed_is_not(
    tmp_path, corpus, capsys, make_image, make_shard
):
    shards = corpus(range(3))
    assert curate(arguments(shards, tmp_path / "run")) == 0
    corpus([1])  # the same bytes, written again
    make_shard(tmp_path / "shards/train-000002.tar", [("new", {"jpg": make_image(7), "cls": b"1"})])
    capsys.readouterr()
    assert curate(arguments(shards, tmp_path / "run", "--json")) == 0
    result = result_of(capsys)
    assert result["embed"]["shards_done"] == 1 and result["embed"]["rows"] == 25


def test_everything_bad_is_in_quarantine_with_its_reason(tmp_path, corpus, capsys, make_image, make_shard):
    good = make_image(0)
    shards = corpus(range(3))
    big = make_image(5, size=256)
    bad = {
        "zero": {"jpg": b"", "cls": b"0"},
        "bomb": {"png": png_bomb(), "cls": b"0"},
        "half": {"jpg": big[: len(big) // 2], "cls": b"0"},
        "text": {"jpg": b"<!DOCTYPE html>", "cls": b"0"},
        "word": {"jpg": good, "cls": b"cat"},
        "minus": {"jpg": good, "cls": b"-1"},
        "../../x": {"jpg": good, "cls": b"0"},
        "nolabel": {"jpg": good},
        "noimage": {"cls": b"0"},
    }
    samples = [("twice", {"jpg": good, "cls": b"0"}), *bad.items(), ("twice", {"jpg": make_image(1), "cls": b"1"})]
    make_shard(tmp_path / "shards/train-000003.tar", samples)
    whole = (tmp_path / "shards/train-000000.tar").read_bytes()
    (tmp_path / "shards/train-000004.tar").write_bytes(whole[: len(whole) // 2 + 700])  # within a member
    (tmp_path / "shards/train-000005.tar").write_bytes(b"")
    (tmp_path / "shards/train-000006.tar").write_bytes(b"<html>not found</html>" * 100)

    status = curate(arguments(shards, tmp_path / "run", "--max-bad-fraction", "0.5", "--json"))
    result = result_of(capsys)
    assert status == 0
    entries = ds.dataset(tmp_path / "run/quarantine").to_table().to_pylist()
    assert len(entries) == result["embed"]["left_out"] == len(bad) + 1 + 3
    reasons = {entry["key"]: entry["reason"] for entry in entries if entry["shard"] == 3}
    words = {
        "zero": "empty image", "bomb": "50,000 × 50,000", "half": "truncated", "text": "not an image", "word": "'cat'", "minus": "-1",
        "../../x": "..", "nolabel": "missing label", "noimage": "missing image", "twice": "duplicate key",
    }  # fmt: skip
    assert reasons.keys() == words.keys()
    for key, word in words.items():
        assert word in reasons[key], (key, reasons[key])
    rest = [entry for entry in entries if entry["shard"] > 3]
    assert [(e["shard"], e["row"], e["key"]) for e in rest] == [(4, None, None), (5, None, None), (6, None, None)]
    kept = ds.dataset(tmp_path / "run/embeddings").to_table(columns=["key", "shard"]).to_pylist()
    assert len(kept) == result["embed"]["rows"] and {"key": "twice", "shard": 3} in kept
    assert any(sample["shard"] == 4 for sample in kept)  # what was whole before the damage stays
    assert not (tmp_path / "x.jpg").exists()
    capsys.readouterr()
    assert inspect(["--run", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "13 in quarantine" in shown and "duplicate key" in shown


@pytest.mark.slow
def test_too_many_bad_samples_end_the_run_with_status_1_and_keep_what_is_done(tmp_path, corpus, capsys, make_shard):
    shards = corpus(range(2))
    make_shard(tmp_path / "shards/train-000002.tar", [(f"bad{i}", {"jpg": b"no", "cls": b"0"}) for i in range(4)])
    assert curate(arguments(shards, tmp_path / "run")) == 1
    assert "more than --max-bad-fraction 0.01" in capsys.readouterr().err.splitlines()[-1]
    assert len(list((tmp_path / "run/embeddings").glob("*.parquet"))) == 3
    assert curate(arguments(shards, tmp_path / "run", "--max-bad-fraction", "0.2")) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--shards": "nowhere/{0..3}.tar"}, "shard"),
        ({"--encoder": "pixels:many"}, "pixels:many"),
        ({"--encoder": "timm:no_such_net"}, "no_such_net"),
        ({"--label": "txt"}, "--label txt"),
        ({"--classes": "no-such-file.txt"}, "--classes"),
        ({"--by": "difficulty.fear"}, "fear"),
        ({"--name": "a/b"}, "--name"),
        ({"--top": "1.5"}, "--top 1.5"),
        ({"--gaussians": "no-such-run"}, "no-such-run"),
        ({"--shrinkage": "some"}, "--shrinkage some"),
        ({"--temperature": "0"}, "temperature"),
        ({"--device": "cuda"}, "--device cuda"),
        ({"--views": "0"}, "--views 0"),
        ({"--run": " "}, "--run ''"),
        ({"--by": "difficulty.key"}, "--by difficulty.key"),
        ({"--by": "confusion.confusion"}, "run hardset confusion first"),
        ({"--shards": "[z-a].tar"}, "not a pattern"),
    ],
)
def test_bad_options_are_status_2_and_one_line(tmp_path, corpus, capsys, change, words):
    options = dict(zip(*[iter(arguments(corpus(range(1)), tmp_path / "run"))] * 2)) | change
    status = curate([word for pair in options.items() for word in pair])
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and words in last and last.startswith("hardset curate: error: ")
    assert not (tmp_path / "run/embeddings").exists()  # found before any work


@pytest.mark.slow
def test_a_run_of_another_config_and_an_unwritable_output_are_status_2(tmp_path, curated, copied, capsys):
    other = [word.replace("pixels:3", "pixels:4") for word in arguments(curated / "shards", copied)]
    assert embed(other) == 2
    assert "pixels:3" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "file").write_text("in the way")
    assert embed(arguments(curated / "shards", tmp_path / "file/run")) == 2
    assert embed([*other, "--overwrite"]) == 0
    assert Run.open(str(copied)).config.width == 16 and not (copied / "difficulty").exists()


def test_options_that_cannot_be_mixed_are_refused_without_shards_too(copied, capsys):
    for words in (["--label", "none"], ["--views", "3"], ["--dtype", "float16"], ["--normalize"]):
        assert embed(["--run", str(copied), "--mlflow", "none", *words]) == 2
        assert f"made with {words[0][2:]}" in capsys.readouterr().err.splitlines()[-1]
    assert embed(["--run", str(copied), "--mlflow", "none", "--label", "cls"]) == 0


def test_another_encoders_gaussians_are_refused_before_a_run_is_made(tmp_path, curated, capsys):
    command = arguments(curated / "shards", tmp_path / "new", "--gaussians", str(curated / "run"))
    assert curate([word.replace("pixels:3", "pixels:4") for word in command]) == 2
    assert "distances need the same encoder" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_broken_files_of_a_run_are_named(copied, capsys):
    words = ["--run", str(copied), "--mlflow", "none"]
    group = copied / "difficulty/000001.parquet"
    data = group.read_bytes()
    group.write_bytes(data[:200] + bytes(400) + data[600:])
    assert select([*words, "--name", "again"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert str(group) in last and "run hardset score first" in last
    (copied / "gaussians.npz").write_bytes(b"no archive")
    assert score([*words, "--temperature", "0.6"]) == 2
    assert "gaussians.npz cannot be read" in capsys.readouterr().err.splitlines()[-1]
    for record in ("{}", "[]", '{"config": {"encoder": 1}, "shards": [], "classes": [], "stages": {}}', "\0"):
        (copied / "run.json").write_text(record)
        assert inspect(words) == 2
        assert f"--run {copied}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_labels_from_json_names_and_none(tmp_path, make_image, make_shard):
    words = ["ant", "bee"]
    samples = [
        (
            f"k{i:02d}",
            {"JPG": make_image(i), "json": json.dumps({"a": {"y": i % 2}}).encode(), "cls": words[i % 2].encode()},
        )
        for i in range(20)
    ]
    shard = make_shard(tmp_path / "s.tar", samples)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert curate(arguments(shard, tmp_path / "json", "--label", "json:a.y")) == 0
    assert curate(arguments(shard, tmp_path / "names", "--classes", str(tmp_path / "names.txt"))) == 0
    labels = [ds.dataset(tmp_path / run / "embeddings").to_table()["label"].to_pylist() for run in ("json", "names")]
    assert labels == [[0, 1] * 10] * 2
    assert Run.open(str(tmp_path / "names")).classes == words
    assert curate(arguments(shard, tmp_path / "none", "--label", "none")) == 0
    table = ds.dataset(tmp_path / "none/difficulty").to_table()
    assert table["rmd"].null_count == table["label"].null_count == 20 and table["md_agn"].null_count == 0


@pytest.mark.slow
def test_scored_with_another_runs_gaussians(tmp_path, curated, capsys, make_image, make_shard):
    gaussians = ("--gaussians", str(curated / "run"))
    samples = [(f"n{i}", {"jpg": make_image(i), "cls": str(i % 2).encode()}) for i in range(5)]
    command = arguments(make_shard(tmp_path / "new.tar", samples), tmp_path / "scored", *gaussians)
    assert curate(command) == 0
    assert Run.open(str(tmp_path / "scored")).classes == ["0", "1", "2"]
    before = contents(tmp_path / "scored")
    assert curate(command) == 0
    assert contents(tmp_path / "scored") == before
    strange = make_shard(tmp_path / "strange.tar", [("s", {"jpg": make_image(1), "cls": b"9"})])
    assert curate(arguments(strange, tmp_path / "strange", *gaussians)) == 2
    assert "class '9'" in capsys.readouterr().err.splitlines()[-1]
    # Without labels: rmd to the nearest class.
    assert curate(arguments(tmp_path / "new.tar", tmp_path / "blind", *gaussians, "--label", "none")) == 0
    blind = ds.dataset(tmp_path / "blind/difficulty").to_table()
    assert blind["rmd"].null_count == blind["nearest_class"].null_count == 0 and blind["md"].null_count == 5


@pytest.mark.slow
def test_columns_of_embeddings_that_were_replaced_are_refused(tmp_path, corpus, capsys, make_image, make_shard):
    shards = corpus(range(2))
    assert curate(arguments(shards, tmp_path / "run")) == 0
    make_shard(tmp_path / "shards/train-000001.tar", [(f"n{i}", {"jpg": make_image(i), "cls": b"1"}) for i in range(5)])
    assert embed(arguments(shards, tmp_path / "run")) == 0
    assert score(["--run", str(tmp_path / "run"), "--mlflow", "none"]) == 2
    assert "hardset fit first" in capsys.readouterr().err.splitlines()[-1]
    assert select(["--run", str(tmp_path / "run"), "--mlflow", "none", "--name", "new"]) == 2
    assert "shard 1 was embedded again" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_large_block_that_ray_cuts_in_two_is_written_whole(tmp_path, make_image, make_shard, capsys):
    small = make_image(0, size=4)
    shard = make_shard(tmp_path / "s.tar", [(f"k{i:04d}", {"jpg": small, "cls": b"0"}) for i in range(2000)])
    command = arguments(shard, tmp_path / "run", "--json")
    command[5] = "pixels:64"  # 2,000 embeddings of 16 KB: a block of 32 MB
    assert embed(command) == 0
    assert result_of(capsys)["embed"]["rows"] == 2000
    assert ds.dataset(tmp_path / "run/embeddings").to_table(columns=["row"])["row"].to_pylist() == list(range(2000))


@pytest.mark.slow
def test_augmented_views_enter_the_fit_and_not_the_scored_embedding(tmp_path, curated):
    assert curate(arguments(curated / "shards", tmp_path / "five", "--views", "5")) == 0
    one, five = (pq.read_table(run / "embeddings/000000.parquet") for run in (curated / "run", tmp_path / "five"))
    assert one["embedding"].to_pylist() == five["embedding"].to_pylist()
    assert five.schema.field("augmented").type.list_size == 4 * 9
    assert [Run.open(str(run)).stage("fit")["samples"] for run in (curated / "run", tmp_path / "five")] == [36, 180]


def test_mlflow_has_one_run_per_command(tmp_path, curated, copied):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert curate([*arguments(curated / "shards", copied)[:-1], uri]) == 0
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("hardset").experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert runs[0].data.params["encoder"] == "pixels:3" and runs[0].data.metrics["embed.rows"] == 36


@pytest.mark.slow
def test_a_run_on_an_object_store_is_the_same(curated, s3_folder):
    bucket, _, folder = s3_folder.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for path in sorted((curated / "shards").glob("*.tar")):
        client.upload_file(str(path), bucket, f"{folder}/{path.name}")
    assert curate(arguments(f"{s3_folder}/train-{{000000..000002}}.tar", f"{s3_folder}/run")) == 0
    there, here = (joins.load(run, ["difficulty.rmd"]) for run in (f"{s3_folder}/run", str(curated / "run")))
    assert there["difficulty.rmd"].to_pylist() == here["difficulty.rmd"].to_pylist()
    body = client.get_object(Bucket=bucket, Key=f"{folder}/run/subsets/hard/hard-000000.tar")["Body"].read()
    assert body == (curated / "run/subsets/hard/hard-000000.tar").read_bytes()
