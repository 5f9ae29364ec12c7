"""predict, evaluate, trust and corrupt end to end, as a person calls them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.corrupt import main as corrupt
from jobs.evaluate import main as evaluate
from jobs.predict import main as predict
from jobs.trust import main as trust
from ops.models import load_classifier, save_classifier
from pipelines.runs import column_groups, columns
from tests.pipelines.classifiers import nearest_mean
from tests.pipelines.predicted import noisy_logits, replace, write_predictions
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")
PROMISED = [
    *("accuracy", "ece", "ece_mass", "cwece", "cwece_mass", "mce", "nll", "brier", "aurc", "e_aurc"),
    *("fpr95", "auroc", "aupr_success", "aupr_error"),
]


def call(command, capsys, *words):
    """Exit status, the JSON of the last line (None if there is none), standard error."""
    status = command(
        [*map(str, words), "--mlflow", "none", "--json"] if command is not corrupt else [*map(str, words), "--json"]
    )
    captured = capsys.readouterr()
    lines = captured.out.strip().splitlines()
    return status, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, captured.err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, ray_session):
    """Two runs of one kind and a checkpoint that errs on both: (run, run2, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("evaluation")
    run, features, labels = make_run(folder / "a", sizes=(60, 40, 50))
    other, *_ = make_run(folder / "b", sizes=(30, 20))
    model = nearest_mean(run, features, labels)
    with torch.no_grad():
        model.last.bias[1] += 2.0
    save_classifier(model, folder / "model")
    return run.uri, other.uri, str(folder / "model")


def test_the_chain_gives_every_number_that_is_promised(corpus, capsys):
    run, other, model = corpus
    for uri in (run, other):
        status, counts, _ = call(predict, capsys, "--checkpoint", model, "--run", uri, "--name", "p")
        assert status == 0 and counts["shards_skipped"] == 0
    words = ["--checkpoint", model, "--run", run, "--loss", "steep_slope", "--eval-run", other, "--name", "ss"]
    status, entry, _ = call(
        trust, capsys, *words, "--alpha-pos", 1, "--alpha-neg", 3, "--epochs", 3, "--backbone", "mlp:8"
    )
    assert status == 0 and entry["errors"] > 0 and entry["alpha_neg"] == 3
    status, result, _ = call(
        evaluate, capsys, "--run", other, "--predictions", "p", "--trust", "ss", "--bootstrap", 20, "--figures"
    )
    assert status == 0
    assert all(isinstance(result["p"][name], float) for name in PROMISED)
    assert {"tpr", "tnr", "fpr95", "auroc", "kl", "bhattacharyya"} <= set(result["ss"])
    assert result["p"]["trust"]["ss"] == result["ss"] and result["p"]["tpr"] == result["ss"]["tpr"]
    assert result["p"]["intervals"]["accuracy"][0] <= result["p"]["accuracy"] <= result["p"]["intervals"]["accuracy"][1]
    stored = json.loads(open(f"{other}/evaluation/p.json").read())  # noqa: SIM115
    assert stored["ece"] == result["p"]["ece"]
    assert "accuracy" in pq.read_table(f"{other}/evaluation/p.parquet")["metric"].to_pylist()
    for name in ("p-reliability", "ss-trust-histogram", "risk-coverage"):
        assert open(f"{other}/evaluation/{name}.png", "rb").read(4) == b"\x89PNG"  # noqa: SIM115


def test_calibration_is_saved_in_the_checkpoint_and_applied(corpus, tmp_path, capsys):
    run, _, model = corpus
    save_classifier(load_classifier(model), tmp_path / "model")
    checkpoint = tmp_path / "model"
    call(predict, capsys, "--checkpoint", checkpoint, "--run", run, "--name", "c")
    words = ["--run", run, "--predictions", "c", "--bootstrap", 0, "--calibrate"]
    status, result, _ = call(evaluate, capsys, *words, "temperature", "--calibration-shards", 0.4)
    assert status == 0 and set(result) >= {"c", "c.temperature"}
    assert result["c"]["accuracy"] == result["c.temperature"]["accuracy"]
    assert result["c"]["samples"] < 150
    saved = load_classifier(checkpoint).extra["calibration"]
    assert saved["name"] == "temperature" and len(saved["fitted_on"]["shards"]) == 1
    status, counts, _ = call(predict, capsys, "--checkpoint", checkpoint, "--run", run, "--name", "d")
    assert counts["calibration"] == "temperature"
    status, _, err = call(evaluate, capsys, "--run", run, "--predictions", "d", "--calibrate", "temperature")
    assert status == 2 and "calibrated already (temperature)" in err and "--raw" in err


def test_several_methods_side_by_side_leave_the_checkpoint_alone(corpus, capsys):
    run, _, model = corpus
    call(predict, capsys, "--checkpoint", model, "--run", run, "--name", "p")
    methods = ["temperature", "meta_misclassification", "meta_accuracy"]
    words = ["--run", run, "--predictions", "p", "--bootstrap", 0, "--meta-accuracy", 0.7, "--calibrate", *methods]
    status, result, _ = call(evaluate, capsys, *words)
    assert status == 0 and {f"p.{m}" for m in methods} <= set(result)
    assert "calibration" not in load_classifier(model).extra


def test_out_of_distribution_and_groups(corpus, tmp_path, capsys):
    run, other, _ = corpus
    from pipelines.runs.record import Run

    for uri in (run, other):
        opened = Run.open(uri)
        labels = np.concatenate(
            [
                column_groups.read(uri, columns.EMBEDDINGS, s, ["label"])["label"].to_numpy()
                for s in range(len(opened.shards))
            ]
        )
        write_predictions(opened, noisy_logits(labels, strength=3.0 if uri == run else 0.0), "n")
    words = [
        "--run",
        run,
        "--predictions",
        "n",
        "--ood",
        other,
        "--bootstrap",
        0,
        "--groups",
        "predictions/n.confidence:0.6",
    ]
    status, result, _ = call(evaluate, capsys, *words)
    assert status == 0
    assert result["n"]["ood"]["msp"]["auroc"] > 0.5 and result["n"]["ood"]["notes"]
    assert result["n"]["worst_group_accuracy"] < result["n"]["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "nothing"], "no predictions/nothing"),
        ([], "--predictions"),
        (["--predictions", "p", "--trust", "none"], "--trust none"),
        (["--predictions", "p", "--groups", "rmd"], "expected GROUP.COLUMN"),
        (["--predictions", "p", "--ood", "/nowhere"], "/nowhere"),
        (["--predictions", "p", "--calibrate", "temperature", "--calibration-shards", "2"], "--calibration-shards 2"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(corpus, capsys, words, message):
    run, _, model = corpus
    call(predict, capsys, "--checkpoint", model, "--run", run, "--name", "p")
    status, _, err = call(evaluate, capsys, "--run", run, *words)
    line = err.strip().splitlines()[-1]
    assert status == 2 and message in line and "Traceback" not in err


def test_nan_logits_end_with_status_2_not_with_nan(tmp_path, capsys):
    run, _, labels = make_run(tmp_path, sizes=(10,))
    write_predictions(run, noisy_logits(labels))

    def break_one(table):
        logits = columns.vectors(table["logits"]).copy()
        logits[4] = np.nan
        return table.set_column(4, "logits", columns.vector_array(logits, table["logits"].type.value_type))

    replace(run, 0, break_one)
    status, result, err = call(evaluate, capsys, "--run", run.uri, "--predictions", "p")
    assert status == 2 and result is None and "1 of 10 rows have NaN logits (first: row 4)" in err


def test_a_checkpoint_that_is_none(corpus, tmp_path, capsys):
    for command in (predict, trust):
        status, _, err = call(command, capsys, "--checkpoint", tmp_path, "--run", corpus[0], "--name", "x")
        assert status == 2 and "--checkpoint" in err


def test_mlflow_gets_metrics_and_figures(corpus, tmp_path, capsys):
    import mlflow

    run, _, model = corpus
    call(predict, capsys, "--checkpoint", model, "--run", run, "--name", "p")
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["--run", run, "--predictions", "p", "--bootstrap", "0", "--mlflow", tracking]
    assert evaluate([*words, "--calibrate", "temperature", "meta_misclassification"]) == 0
    client = mlflow.MlflowClient(tracking)
    logged = client.search_runs([client.get_experiment_by_name("hardset").experiment_id])[0]
    assert 0 <= logged.data.metrics["p.ece"] <= 1 and "p.temperature.nll" in logged.data.metrics
    assert "figures/p-reliability.png" in {f.path for f in client.list_artifacts(logged.info.run_id, "figures")}


def test_corrupt(corpus, tmp_path, capsys):
    shards = str(corpus[0]).replace("/run", "/shards")
    words = ["--shards", shards, "--out", tmp_path / "out", "--kinds", "fog", "--severities", "1", "5"]
    status, counts, _ = call(corrupt, capsys, *words)
    assert status == 0 and counts["samples"] == 300 and len(counts["folders"]) == 2
    status, counts, _ = call(corrupt, capsys, *words)
    assert counts["shards_skipped"] == 6
    status, _, err = call(corrupt, capsys, "--shards", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 2 and "shard" in err
