"""Predictions are the classifier's, row by row, of the samples that were embedded and of no others."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import softmax

from ops.decoding import decode_image
from ops.models import load_classifier, save_classifier
from pipelines.evaluation import calibrate
from pipelines.evaluation.outcomes import open_predictions
from pipelines.evaluation.predict import Forward, predict
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed
from pipelines.runs.record import Run
from tests.pipelines.classifiers import nearest_mean, small_network
from tests.pipelines.predicted import replace
from tests.pipelines.synthetic import make_run, picture

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def made(tmp_path):
    run, features, labels = make_run(tmp_path, sizes=(14, 6, 10))
    return run, nearest_mean(run, features, labels), features


def logits_of(run, name="p"):
    tables = [column_groups.read(run.uri, f"predictions/{name}", shard) for shard in range(len(run.shards))]
    return np.concatenate([columns.vectors(table["logits"]) for table in tables]), pa.concat_tables(tables)


def test_a_head_over_embeddings(made):
    run, model, features = made
    counts = predict(run, model, "p")
    logits, table = logits_of(run)
    with torch.no_grad():
        expected = model(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert table["prediction"].to_pylist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(table["confidence"].to_numpy(), softmax(expected, axis=1).max(axis=1), rtol=1e-5)
    assert table.schema.field("logits").type == pa.list_(pa.float32(), 3)
    assert table.column_names == ["key", "shard", "row", "label", "logits", "prediction", "confidence"]
    assert (counts["rows"], counts["shards_done"]) == (30, 3)


def test_a_network_over_images_skips_quarantined_samples(tmp_path):
    run, *_ = make_run(tmp_path, sizes=(9, 7))
    replace(run, 1, lambda table: table.take(pa.array([0, 2, 3, 6])), columns.EMBEDDINGS)  # rows 1, 4, 5 left out
    model = small_network()
    predict(run, model, "p", Forward(batch_size=4))
    logits, table = logits_of(run)
    assert table["row"].to_pylist() == [*range(9), 0, 2, 3, 6]
    values = [*range(9), 9, 11, 12, 15]
    pictures = torch.stack([decode_image(picture(value)) for value in values])
    with torch.no_grad():
        expected = model(pictures).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_again_nothing_is_redone_another_classifier_redoes_all(made):
    run, model, _ = made
    predict(run, model, "p")
    assert predict(Run.open(run.uri), model, "p")["shards_done"] == 0
    with torch.no_grad():
        model.last.bias.add_(1.0)
    assert predict(run, model, "p")["shards_done"] == 3


def test_the_checkpoints_calibration_is_applied_and_left_out_on_request(made, tmp_path):
    run, model, _ = made
    save_classifier(model, tmp_path / "model")
    folder = str(tmp_path / "model")
    predict(run, load_classifier(folder), "p", checkpoint=folder)
    predictions = open_predictions(run, "p")
    fitted, _ = calibrate.split_shards(predictions, 0.5, 0)
    calibrator = calibrate.fit_calibrator("temperature", fitted, calibrate.MetaTargets())
    assert calibrate.save_calibration(run, predictions, calibrator, "temperature", fitted) == folder
    counts = predict(run, load_classifier(folder), "q", checkpoint=folder)
    assert counts["calibration"] == "temperature"
    assert calibrate.applied_calibration(run, open_predictions(run, "q")) == "temperature"
    before, after = logits_of(run)[0], logits_of(run, "q")[0]
    np.testing.assert_allclose(after, before / calibrator.temperature, rtol=1e-5)
    predict(run, load_classifier(folder), "r", checkpoint=folder, raw=True)
    np.testing.assert_array_equal(logits_of(run, "r")[0], before)


def test_a_calibration_is_not_put_into_other_weights(made, tmp_path):
    run, model, _ = made
    save_classifier(model, tmp_path / "model")
    folder = str(tmp_path / "model")
    predict(run, model, "p", checkpoint=folder)
    with torch.no_grad():
        model.last.bias.add_(1.0)
    save_classifier(model, folder)
    predictions = open_predictions(run, "p")
    calibrator = calibrate.fit_calibrator("temperature", predictions, calibrate.MetaTargets())
    assert calibrate.save_calibration(run, predictions, calibrator, "temperature", predictions) is None
    assert "calibration" not in load_classifier(folder).extra


def test_embeddings_of_another_encoder_are_refused(made):
    run, model, _ = made
    model.spec = dataclasses.replace(model.spec, encoder="other", encoder_fingerprint="1")
    with pytest.raises(ValueError, match="trained on embeddings of other"):
        predict(run, model, "p")
    model.spec = dataclasses.replace(model.spec, width=5)
    with pytest.raises(ValueError, match="takes embeddings of width 5"):
        predict(run, model, "p")
    with pytest.raises(ValueError, match=r"^name "):
        predict(run, model, "../p")


def test_a_shard_that_lost_its_samples_fails_the_stage(tmp_path):
    run, *_ = make_run(tmp_path, sizes=(5,))
    replace(run, 0, lambda t: t.set_column(2, "row", pa.array([0, 1, 2, 3, 9])), columns.EMBEDDINGS)
    with pytest.raises(StageFailed, match="no longer holds the image of row 9"):
        predict(run, small_network(), "p")
