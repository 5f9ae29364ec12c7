"""The oracle learns where a classifier errs, from the training run alone."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from ops.selective import detection_metrics
from ops.trust import TRUST_LOSSES
from pipelines.evaluation.predict import Forward, predict
from pipelines.evaluation.trust import OracleTraining, targets, trust
from pipelines.runs import column_groups
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run
from tests.pipelines.classifiers import nearest_mean, small_network
from tests.pipelines.predicted import write_predictions
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")
QUICK = OracleTraining(backbone="mlp:16", epochs=8, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, ray_session):
    """A run whose classifier never says class 2, a run of the same kind, and that classifier."""
    folder = tmp_path_factory.mktemp("trust")
    run, features, labels = make_run(folder / "a", sizes=(90, 60))
    model = nearest_mean(run, features, labels)
    with torch.no_grad():
        model.last.bias[2] -= 1e3
    other, *_ = make_run(folder / "b", sizes=(40,))
    return run, other, model, features, labels


def trust_of(run, name):
    tables = [column_groups.read(run.uri, f"trust/{name}", shard) for shard in range(len(run.shards))]
    return pa.concat_tables(tables)


def correctness(model, features, labels):
    with torch.no_grad():
        return model(torch.from_numpy(features)).argmax(dim=1).numpy() == labels


@pytest.mark.parametrize("loss", TRUST_LOSSES)
def test_every_loss_ranks_right_above_wrong_on_its_own_run(watched, loss):
    run, _, model, features, labels = watched
    entry = trust(run, model, loss, dataclasses.replace(QUICK, loss=loss))
    table = trust_of(run, loss)
    z, correct = table["trust"].to_numpy(), correctness(model, features, labels)
    assert entry["samples"] == 150 and entry["errors"] == (~correct).sum()
    assert detection_metrics(z, correct).auroc > 0.8
    assert table["trusted"].to_pylist() == (z > 0).tolist()
    assert table.column_names == ["key", "shard", "row", "trust", "trusted"]
    assert entry["losses"][-1] < entry["losses"][0]


def test_targets_are_the_classifiers_hits_per_sample(watched):
    run, _, model, features, labels = watched
    found = targets(run, model, Forward())
    np.testing.assert_array_equal(np.concatenate(found.correct), correctness(model, features, labels))
    with torch.no_grad():
        probs = model(torch.from_numpy(features)).softmax(dim=1).numpy()
    own = probs[np.arange(len(labels)), labels]
    np.testing.assert_allclose(np.concatenate(found.true_class_prob), own, rtol=1e-4, atol=1e-6)


def test_the_evaluated_run_does_not_touch_the_training(watched):
    run, other, model, *_ = watched
    trust(run, model, "alone", QUICK)
    trust(run, model, "both", QUICK, [other])
    assert trust_of(run, "alone")["trust"].equals(trust_of(run, "both")["trust"])
    assert trust_of(other, "both").num_rows == 40
    assert column_groups.facts(other.uri, "trust/both", 0)["trained_on"] == run.uri


def test_again_nothing_is_redone(watched):
    run, other, model, *_ = watched
    trust(run, model, "again", QUICK, [other])
    before = trust_of(run, "again")
    assert trust(Run.open(run.uri), model, "again", QUICK, [other])["skipped"]
    assert not trust(run, model, "again", dataclasses.replace(QUICK, seed=1), [other])["skipped"]
    assert not trust_of(run, "again")["trust"].equals(before["trust"])


def test_stored_predictions_can_be_the_targets(watched):
    run, _, model, _, labels = watched
    right = np.arange(len(labels)) % 3 > 0
    write_predictions(run, 4.0 * np.eye(3)[np.where(right, labels, (labels + 1) % 3)], "folds")
    found = targets(run, model, Forward(), "folds")
    np.testing.assert_array_equal(np.concatenate(found.correct), right)


@pytest.mark.slow
def test_the_search_tries_alpha_neg_first(watched):
    run, _, model, *_ = watched
    entry = trust(run, model, "searched", dataclasses.replace(QUICK, epochs=2), search=True)
    tried = [(row["alpha_pos"], row["alpha_neg"]) for row in entry["search"]]
    assert tried[:6] == [(1.0, a) for a in (1.0, 2.0, 3.0, 4.0, 5.0, 8.0)]
    best = max(entry["search"][:6], key=lambda row: row["balanced"])["alpha_neg"]
    assert {a for _, a in tried[6:]} == {best} and entry["alpha_neg"] == best
    with pytest.raises(ValueError, match="only steep_slope"):
        trust(run, model, "x", dataclasses.replace(QUICK, loss="tcp"), search=True)


@pytest.mark.parametrize("signed", [True, False])
def test_a_copy_of_an_image_classifier_is_trained_on_and_the_classifier_stays(tmp_path, signed):
    run, _, labels = make_run(tmp_path, sizes=(12, 8))
    write_predictions(run, np.eye(3)[(labels + (np.arange(20) % 4 == 0)) % 3])
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = dataclasses.replace(QUICK, backbone="classifier", epochs=1, signed=signed)
    trust(run, model, "t", training, predictions="p")
    assert np.isfinite(trust_of(run, "t")["trust"].to_numpy()).all()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_classifier_that_is_always_right_leaves_nothing_to_learn(watched):
    run, _, model, _, labels = watched
    write_predictions(run, 4.0 * np.eye(3)[labels], "right")
    with pytest.raises(ValueError, match=r"right on all 150 samples.*`target_predictions`"):
        trust(run, model, "x", QUICK, predictions="right")


@pytest.mark.parametrize("bad", [{"loss": "hinge"}, {"alpha_neg": 0.0}, {"epochs": 0}, {"gamma": -1.0}, {"lr": 0.0}])
def test_training_options_that_cannot_be(bad):
    with pytest.raises(UserError) as caught:
        OracleTraining(**bad)
    assert caught.value.field == next(iter(bad))


def test_trust_metrics_of_a_written_set(watched):
    from pipelines.evaluation.detection import evaluate_trust
    from pipelines.evaluation.outcomes import open_predictions

    run, _, model, features, labels = watched
    predict(run, model, "own")
    trust(run, model, "scored", QUICK)
    metrics = evaluate_trust(run, "scored", open_predictions(run, "own"), replicates=0).metrics
    correct = correctness(model, features, labels)
    z = trust_of(run, "scored")["trust"].to_numpy().astype(float)
    np.testing.assert_allclose(metrics["auroc"], detection_metrics(z, correct).auroc)
    np.testing.assert_allclose(metrics["tnr"], (z[~correct] < 0).mean())
