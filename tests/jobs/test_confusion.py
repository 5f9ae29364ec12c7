"""hardset confusion end to end: trained, scored, another run scored, done again, refused."""

import json

import pytest

from jobs import confusion
from pipelines.runs import column_groups, joins, storage
from pipelines.runs.record import Run
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


def run_job(capsys, *words):
    """(status, the JSON of the last line or what went to standard error)."""
    capsys.readouterr()
    status = confusion.main([*map(str, words), "--mlflow", "none", "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if not status else err


def test_trains_scores_goes_on_and_does_nothing_twice(tmp_path, capsys):
    run = make_run(tmp_path / "a", (60, 40))[0]
    other = make_run(tmp_path / "b", (30,), labelled=False)[0]
    words = ("--run", run.uri, "--score-run", other.uri, "--seeds", 2, "--batch-size", 16, "--workers", 1)
    status, first = run_job(capsys, *words, "--epochs", 2)
    assert status == 0, first
    assert (first["epochs_trained"], first["confusion"]["rows"], first["scored"]["rows"]) == (4, 100, 30)
    assert [m["seed"] for m in first["members"]] == [0, 1] and all(m["accuracy"] > 0.3 for m in first["members"])
    for uri, rows in ((run.uri, 100), (other.uri, 30)):
        scores = joins.load(uri, ["confusion.confusion"])["confusion.confusion"].to_numpy()
        assert len(scores) == rows and 0 <= scores.min() <= scores.max() <= 1.585
    assert Run.open(other.uri).stage("confusion")["trained_on"] == run.uri

    before = {uri: storage.read_bytes(uri) for uri in storage.list_files(run.uri) + storage.list_files(other.uri)}
    status, again = run_job(capsys, *words, "--epochs", 2)
    assert (status, again["epochs_trained"], again["confusion"]["shards_done"], again["scored"]["shards_done"]) == (
        0,
    ) * 4
    assert before == {uri: storage.read_bytes(uri) for uri in before}

    status, more = run_job(capsys, "--run", run.uri, "--seeds", 2, "--batch-size", 16, "--epochs", 3, "--workers", 1)
    assert (status, more["epochs_trained"], more["confusion"]["shards_done"]) == (0, 2, 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--epochs", 0), "--epochs 0: at least 1"),
        (("--seeds", 0), "--seeds 0: at least 1"),
        (("--model", "resnet18"), "--model resnet18"),
        (("--lr", -1), "--lr -1"),
        (("--input", "images", "--bootstrap"), "--bootstrap"),
        (("--input", "images", "--model", "no_such_net", "--epochs", 1), "--model no_such_net"),
        (("--score-run", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(tmp_path, capsys, words, told):
    run = make_run(tmp_path, (40,))[0]
    try:
        status = confusion.main(["--run", run.uri, *map(str, words), "--mlflow", "none"])
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status == 2 and told in err and err.count("\n") == 1
    assert not storage.exists(run.path("models/confusion"))


def test_a_run_of_another_encoder_is_refused_before_anything_is_trained(tmp_path, capsys):
    run, other = make_run(tmp_path / "a", (30,))[0], make_run(tmp_path / "b", (20,))[0]
    other.record["config"]["encoder_fingerprint"] = "1"
    other.save()
    assert confusion.main(["--run", run.uri, "--score-run", other.uri, "--mlflow", "none"]) == 2
    assert "same encoder" in capsys.readouterr().err
    assert not storage.exists(run.path("models"))


@pytest.mark.slow
def test_small_networks_on_images_go_on_where_they_stopped_and_score_unlabelled_images(tmp_path, capsys):
    run = make_run(tmp_path / "a", (150, 50))[0]
    other = make_run(tmp_path / "b", (12, 8), labelled=False)[0]
    words = ("--run", run.uri, "--input", "images", "--model", "cifar_resnet8", "--seeds", 2, "--schedule", "constant")
    words = (*words, "--lr", 0.01, "--batch-size", 32)
    status, first = run_job(capsys, *words, "--epochs", 1, "--score-run", other.uri)
    assert (status, first["epochs_trained"], first["scored"]["rows"]) == (0, 2, 20)
    kept = {uri: storage.read_bytes(uri) for uri in storage.list_files(run.path("models"), "epoch-0001.safetensors")}
    assert len(kept) == 2
    status, more = run_job(capsys, *words, "--epochs", 2)
    assert (status, more["epochs_trained"]) == (0, 2)
    assert kept == {uri: storage.read_bytes(uri) for uri in kept}
    assert column_groups.read(run.uri, "confusion", 0)["epochs"].to_pylist() == [2] * 150
