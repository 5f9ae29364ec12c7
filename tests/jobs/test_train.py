"""`hardset train` end to end on a small run: JSON, checkpoint, one MLflow run, nothing done twice, mistakes in one line."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import evaluate, predict, train
from ops.models import load_classifier
from pipelines.runs import column_groups, joins
from pipelines.training.checkpoints import read_classifier
from tests.jobs.processes import belongs_to, processes
from tests.pipelines.synthetic import make_run

FEW = ["--epochs", "2", "--batch-size", "20", "--lr", "0.05"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs over different shards, with rmd and weight."""
    folder, uris = tmp_path_factory.mktemp("jobs-train"), []
    for number in range(2):
        run, _, _ = make_run(folder / str(number), (40, 25))
        for shard in range(2):
            table = column_groups.read(run.uri, "embeddings", shard, ["key", "shard", "row"])
            rmd = np.random.default_rng([number, shard]).normal(size=table.num_rows).astype(np.float32)
            table = table.append_column("rmd", pa.array(rmd)).append_column("weight", pa.array(1 / (1 + np.exp(-rmd))))
            column_groups.write(run.uri, "difficulty", shard, table, "by hand")
        uris.append(run.uri)
    return uris


def main(capsys, *argv):
    """(exit status, the JSON object or None, standard error) of a training."""
    status = train.main([*argv, "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else None, err


def test_a_training_from_start_to_end(runs, ray_session, tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    uri, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "out"
    argv = ["--run", runs[0], "--eval-run", runs[1], "--loss", "difficulty_entropy", "--loss-params", "alpha=0.2"]
    argv += ["--groups", "difficulty.rmd:0", "--out", str(out), "--mlflow", uri, *FEW]
    status, result, _ = main(capsys, *argv)
    assert status == 0 and 0 <= result["ece"] <= 1 and 0 <= result["ece_mass"] <= 1 and result["nll"] > 0
    assert result["accuracy"] > 0.4 and result["samples"] == 65 and len(result["groups"]) == 2
    assert load_classifier(result["checkpoint"]).extra["lineage"]["run"] == runs[0]

    client = mlflow.MlflowClient(uri)
    logged = client.get_run(result["mlflow_run_id"])
    assert logged.info.status == "FINISHED" and logged.data.params["loss"] == "difficulty_entropy"
    assert logged.data.metrics["accuracy"] == pytest.approx(result["accuracy"])
    assert len(client.get_metric_history(result["mlflow_run_id"], "eval.accuracy")) == 2
    assert {"curves.png", "curve.json", "groups"} <= {a.path for a in client.list_artifacts(result["mlflow_run_id"])}
    assert logged.outputs.model_outputs

    # Again: nothing is trained. Then as if it had been killed before its end: one MLflow run still.
    before = (out / "state.pt").stat().st_mtime_ns
    assert main(capsys, *argv)[1] == result and (out / "state.pt").stat().st_mtime_ns == before
    (out / "result.json").unlink()
    again = main(capsys, *argv)[1]
    assert again["mlflow_run_id"] == result["mlflow_run_id"] and again["accuracy"] == result["accuracy"]
    assert len(client.search_runs([logged.info.experiment_id])) == 1

    status, _, error = main(capsys, *argv, "--seed", "1")
    assert status == 2 and "seed 0 there, 1 asked for" in error

    table = joins.join(runs[0], 0, ["correctness.correctness", "correctness.epochs"])
    assert set(table["correctness.epochs"].to_pylist()) == {2}


@pytest.mark.slow
def test_a_classifier_on_an_object_store_is_trained_used_and_calibrated(runs, ray_session, s3_folder, capsys):
    out = f"{s3_folder}/model"
    status, result, error = main(capsys, "--run", runs[0], "--out", out, "--mlflow", "none", *FEW)
    assert status == 0, error
    assert result["checkpoint"] == f"{out}/best"
    assert main(capsys, "--run", runs[0], "--out", out, "--mlflow", "none", *FEW)[1] == result
    assert predict.main(["--checkpoint", out, "--run", runs[0], "--name", "far", "--mlflow", "none"]) == 0
    words = ["--run", runs[0], "--predictions", "far", "--calibrate", "temperature", "--bootstrap", "0"]
    assert evaluate.main([*words, "--mlflow", "none"]) == 0
    assert read_classifier(out).extra["calibration"]["name"] == "temperature"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--loss", "nothing"], "--loss nothing"),
        (["--loss-params", "alpha=1"], "--loss-params alpha"),
        (["--weights", "difficulty.nothing"], "difficulty.nothing"),
        (["--weights", "weight"], "GROUP.COLUMN"),
        (["--groups", "confusion.confusion:5"], "confusion"),
        (["--groups", "difficulty.rmd:1000"], "has no samples"),
        (["--model", "resnet18"], "--model resnet18"),
        (["--workers", "3"], "--workers 3"),
        (["--correctness", "../x"], "--correctness '../x'"),
        (["--correctness", "difficulty"], "--correctness difficulty"),
        (["--group-step-size", "-1"], "--group-step-size -1"),
        (["--eval-run", "/nowhere"], "/nowhere"),
        (["--epochs", "0"], "--epochs 0"),
        (["--input", "images", "--model", "cifar_resnet9"], "cifar_resnet9"),
    ],
)
def test_a_mistake_is_told_in_one_line(runs, ray_session, tmp_path, capsys, words, message):
    out = tmp_path / "out"
    status, _, error = main(capsys, "--run", runs[0], "--out", str(out), "--mlflow", "none", *words)
    assert status == 2 and message in error and error.strip().count("\n") == 0
    assert not out.exists()


class AfterEpochs(threading.Thread):
    """Does something once, as soon as a training in `out` has saved so many epochs."""

    def __init__(self, out, epochs, action):
        super().__init__(daemon=True)
        self.curve, self.epochs, self.action, self.done = Path(out) / "curve.json", epochs, action, False
        self.start()

    def run(self):
        while not self.done:
            if self.curve.exists() and len(json.loads(self.curve.read_text())) >= self.epochs:
                self.action()
                self.done = True
            time.sleep(0.02)


def kill_a_training_worker():
    victims = [pid for pid, title in processes() if "RayTrainWorker" in title and belongs_to(pid, os.getpid())]
    assert victims, "no training worker was seen"
    os.kill(victims[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_killed_in_mid_training_leaves_one_mlflow_run_with_every_epoch(runs, ray_session, tmp_path, capsys):
    mlflow = pytest.importorskip("mlflow")
    uri, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "out"
    killer = AfterEpochs(out, 3, kill_a_training_worker)
    argv = ["--run", runs[0], "--out", str(out), "--mlflow", uri, "--workers", "2", "--groups", "difficulty.rmd:0"]
    status, result, _ = main(capsys, *argv, "--epochs", "20", "--batch-size", "2", "--lr", "0.01")
    assert killer.done and status == 0 and result["epochs"] == 20
    client = mlflow.MlflowClient(uri)
    logged = client.get_run(result["mlflow_run_id"])
    assert logged.info.status == "FINISHED" and len(client.search_runs([logged.info.experiment_id])) == 1
    steps = [metric.step for metric in client.get_metric_history(result["mlflow_run_id"], "train_loss")]
    assert sorted(set(steps)) == list(range(1, 21)) and len(steps) <= 21


@pytest.mark.slow
def test_a_shard_that_vanishes_ends_the_training_and_keeps_the_checkpoint(tmp_path, ray_session, capsys):
    run, _, _ = make_run(tmp_path / "run", (40, 40))
    shard, out = tmp_path / "run" / "shards" / "train-000001.tar", tmp_path / "out"
    remover = AfterEpochs(out, 1, shard.unlink)
    argv = ["--run", run.uri, "--out", str(out), "--mlflow", "none", "--input", "images", "--image-size", "8"]
    argv += ["--model", "cifar_resnet8", "--cache-bytes", "0", "--epochs", "500", "--batch-size", "8"]
    status, _, error = main(capsys, *argv)
    assert status == 1 and remover.done
    last = error.strip().splitlines()[-1]
    assert "train-000001.tar" in last and "kept" in last
    assert load_classifier(out / "last").input == "images"
