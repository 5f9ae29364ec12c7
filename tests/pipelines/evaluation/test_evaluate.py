"""Evaluation over shards equals the metrics of the whole array; broken prediction sets are refused by name."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax

from ops import calibration, selective
from pipelines.curation import fit, score
from pipelines.evaluation import calibrate, detection, figures, sidebyside
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.outcomes import calibrated, held_out_logits, load_outcomes, open_predictions
from pipelines.runs import columns, joins
from pipelines.runs.record import Run
from tests.pipelines.predicted import noisy_logits, replace, write_predictions, write_trust
from tests.pipelines.synthetic import make_run

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, ray_session):
    """A run of 100 samples, scored, with predictions p; (run, logits, labels)."""
    run, _, labels = make_run(tmp_path_factory.mktemp("evaluate"))
    fit.fit(run, "none")
    score.score(run, score.Weighting())
    logits = noisy_logits(labels).astype(np.float32)
    write_predictions(run, logits)
    return run, logits.astype(float), labels


@pytest.fixture
def own(tmp_path):
    """A small run of its own, to break: (run, logits, labels)."""
    run, _, labels = make_run(tmp_path, sizes=(12, 8))
    logits = noisy_logits(labels)
    write_predictions(run, logits)
    return run, logits, labels


def evaluated(run, name="p", **options):
    return evaluation.evaluate(run, open_predictions(run, name), **{"replicates": 0, **options})


def test_metrics_are_those_of_the_whole_array(predicted):
    run, logits, labels = predicted
    probs, metrics = softmax(logits, axis=1), evaluated(run).metrics
    errors, msp = probs.argmax(axis=1) != labels, probs.max(axis=1)
    detection_of_all = selective.detection_metrics(msp, ~errors)
    expected = {
        "samples": len(labels),
        "errors": errors.sum(),
        "accuracy": 1 - errors.mean(),
        "ece": calibration.expected_calibration_error(probs, labels),
        "ece_mass": calibration.expected_calibration_error(probs, labels, binning="mass"),
        "cwece": calibration.classwise_calibration_error(probs, labels),
        "cwece_mass": calibration.classwise_calibration_error(probs, labels, binning="mass"),
        "mce": calibration.maximum_calibration_error(probs, labels),
        "nll": calibration.negative_log_likelihood(probs, labels),
        "brier": calibration.brier_score(probs, labels),
        "aurc": selective.aurc(msp, errors),
        "e_aurc": selective.excess_aurc(msp, errors),
        "augrc": selective.augrc(msp, errors),
        **detection_of_all._asdict(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_class_probabilities_in_several_passes_change_nothing(predicted, monkeypatch):
    run = predicted[0]
    whole = evaluated(run).metrics
    monkeypatch.setattr("pipelines.evaluation.outcomes.CLASS_COLUMN_BYTES", 8 * 100)  # one class a pass
    assert evaluated(run).metrics == whole


def test_three_confidences_each_with_its_own_ranking(predicted):
    run, logits, labels = predicted
    probs = softmax(logits, axis=1)
    wrong = probs.argmax(axis=1) != labels
    for kind, found in evaluated(run).selective.items():
        values = selective.confidence(probs, kind)
        np.testing.assert_allclose(found["aurc"], selective.aurc(values, wrong), rtol=1e-12)
        np.testing.assert_allclose(found["auroc"], selective.detection_metrics(values, ~wrong).auroc, rtol=1e-12)
        np.testing.assert_allclose(found["kl"], selective.separability(values[~wrong], values[wrong]).kl, rtol=1e-12)
        assert found["risk_at_coverage"]["0.9"] == selective.risk_at_coverage(values, wrong, 0.9)


def test_slices_count_every_sample_once(predicted):
    run, logits, labels = predicted
    slicing = evaluation.Slicing.parse("difficulty.rmd:-1,1")
    result = evaluated(run, slicing=slicing)
    correct = logits.argmax(axis=1) == labels
    for kind, parts in (("class", 3), ("difficulty", 10), ("group", 3)):
        entries = [entry for entry in result.slices if entry["slice"] == kind]
        assert len(entries) == parts
        assert sum(entry["count"] for entry in entries) == len(labels)
        hits = sum(entry["count"] * (entry["accuracy"] or 0) for entry in entries)
        np.testing.assert_allclose(hits, correct.sum(), rtol=1e-12)
    rmd = joins.load(run.uri, ["difficulty.rmd"])["difficulty.rmd"].to_numpy()
    group = [entry for entry in result.slices if entry["slice"] == "group"][1]
    assert group["count"] == ((rmd >= -1) & (rmd < 1)).sum()
    accuracies = [correct[rows].mean() for rows in (rmd < -1, (rmd >= -1) & (rmd < 1), rmd >= 1) if rows.any()]
    np.testing.assert_allclose(result.metrics["worst_group_accuracy"], min(accuracies), rtol=1e-12)
    tenths = [entry["low"] for entry in result.slices if entry["slice"] == "difficulty"]
    assert tenths == sorted(tenths)


def test_intervals_hold_the_value_and_repeat_with_the_seed(predicted):
    run = predicted[0]
    one, two = (evaluated(run, replicates=15, seed=3) for _ in range(2))
    assert one.intervals == two.intervals
    assert set(one.intervals) >= {"accuracy", "ece", "aurc", "auroc", "nll", "brier"}
    for name in ("accuracy", "nll", "brier", "auroc", "aurc"):
        low, high = one.intervals[name]
        assert low < one.metrics[name] < high


def test_the_result_is_stored_whole(predicted):
    run = predicted[0]
    result = evaluated(run, replicates=20)
    stored = json.loads(Path(evaluation.store(run, result, 0.0)).read_text())
    assert stored["accuracy"] == result.metrics["accuracy"]
    table = evaluation.as_table(result).to_pandas().set_index(["slice", "part", "metric"])
    np.testing.assert_allclose(table.loc[("all", "", "ece"), "value"], result.metrics["ece"])
    np.testing.assert_allclose(table.loc[("all", "", "accuracy"), "low"], result.intervals["accuracy"][0])
    assert ("difficulty", "tenth 10", "accuracy") in table.index


def broken(name):
    def change(table):
        logits = columns.vectors(table["logits"]).copy()
        if name == "nan":
            logits[3, 1] = np.nan
        if name == "infinite":
            logits[3, 1] = np.inf
        if name == "missing row":
            return table.slice(0, 7)
        if name == "foreign row":
            return table.set_column(table.schema.get_field_index("row"), "row", pa.array([*range(7), 99]))
        if name == "repeated row":
            return pa.concat_tables([table, table.slice(0, 1)])
        if name == "another order":
            return table.take(pa.array([1, 0, *range(2, 8)]))
        if name == "other classes in one shard":
            logits = logits[:, :2]
        if name == "no logits":
            return table.drop_columns(["logits"])
        if name == "null logits":
            values = columns.vector_array(logits, pa.float32()).to_pylist()
            values[2] = None
            return table.set_column(4, "logits", pa.array(values, pa.list_(pa.float32(), 3)))
        return table.set_column(4, "logits", columns.vector_array(logits, pa.float32()))

    return change


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", r"predictions p: shard 1: 1 of 8 rows have NaN logits \(first: row 3\)"),
        ("infinite", r"predictions p: shard 1: 1 of 8 rows have infinite logits"),
        ("missing row", r"predictions p: shard 1: 1 of 8 samples are missing \(first: row 7\)"),
        ("foreign row", r"predictions p: shard 1: 1 of 8 samples are missing \(first: row 7\)"),
        ("repeated row", r"predictions p: shard 1: 9 rows for 8 samples"),
        ("another order", r"predictions p: shard 1: 8 rows for 8 samples, repeated or not in shard order"),
        (
            "other classes in one shard",
            r"predictions p: logits of different class counts: 3 \(shard 0\), 2 \(shard 1\)",
        ),
        ("no logits", r"predictions p: shard 1 has no column 'logits'"),
        ("null logits", r"predictions p: shard 1: cannot be read, its logits are null somewhere"),
    ],
)
def test_a_broken_prediction_set_is_refused_by_name_shard_and_row(own, what, message):
    run = own[0]
    replace(run, 1, broken(what))
    with pytest.raises(ValueError, match=message):
        evaluated(run)


def test_fewer_classes_than_labels_are_refused(own):
    run, logits, _ = own
    write_predictions(run, logits[:, :2], "two")
    with pytest.raises(ValueError, match="logits of 2 classes, but shard 0 has the label 2"):
        evaluated(run, "two")


def test_more_classes_than_the_run_knows_are_fine(own):
    run, logits, _ = own
    write_predictions(run, np.pad(logits, ((0, 0), (0, 2)), constant_values=-9.0), "five")
    np.testing.assert_allclose(evaluated(run, "five").metrics["accuracy"], evaluated(run).metrics["accuracy"])


def test_lists_as_pandas_writes_them_count_too(own):
    run, *_ = own
    expected = evaluated(run).metrics

    def change(table, length=3):
        values = [row[:length] if i == 2 else row for i, row in enumerate(table["logits"].to_pylist())]
        return table.set_column(4, "logits", pa.array(values, pa.list_(pa.float64())))

    for shard in range(2):
        replace(run, shard, change)
    assert evaluated(run).metrics == expected
    replace(run, 1, lambda table: change(table, 2))
    with pytest.raises(ValueError, match="shard 1: sample 2 has 2 logits, others 3"):
        evaluated(run)


def test_missing_sets_and_shards_name_what_is_there(own):
    run = own[0]
    with pytest.raises(ValueError, match=r"no predictions/q for 2 of its 2 shards .*or take one of p"):
        open_predictions(run, "q")
    for name in ("", "..", "a/b", "."):
        with pytest.raises(ValueError, match="expected a plain folder name"):
            open_predictions(run, name)


@pytest.mark.parametrize(("right", "aurc", "message"), [(True, 0.0, "no error"), (False, 1.0, "wrong")])
def test_no_error_or_nothing_but_errors_gives_defined_values_and_a_note(own, right, aurc, message):
    run, _, labels = own
    logits = 3.0 * np.eye(3)[labels if right else (labels + 1) % 3] + 0.1 * np.arange(len(labels))[:, None]
    write_predictions(run, logits)
    result = evaluated(run, replicates=10)
    assert result.metrics["accuracy"] == right and result.metrics["aurc"] == aurc and result.metrics["e_aurc"] == 0
    assert result.metrics["auroc"] is None and result.metrics["fpr95"] is None
    assert "auroc" not in result.intervals
    assert message in result.notes[0]
    assert "NaN" not in json.dumps(result.record()) and "Infinity" not in json.dumps(result.record())


def test_one_sample(tmp_path):
    run, _, labels = make_run(tmp_path, sizes=(1,))
    write_predictions(run, 2.0 * np.eye(3)[labels])
    record = evaluated(run, replicates=10).record()
    p = float(softmax(np.float32([2, 0, 0]).astype(float)).max())
    assert record["accuracy"] == 1 and record["samples"] == 1
    np.testing.assert_allclose(record["ece"], 1 - p, rtol=1e-12)
    assert "NaN" not in json.dumps(record)


def test_samples_without_a_label_are_left_out_and_counted(own):
    run, logits, labels = own
    group = columns.EMBEDDINGS
    replace(run, 1, lambda t: t.set_column(3, "label", pa.array([None, *labels[13:].tolist()], pa.int64())), group)
    result = evaluated(run)
    keep = np.arange(len(labels)) != 12
    np.testing.assert_allclose(result.metrics["accuracy"], (logits.argmax(axis=1) == labels)[keep].mean())
    assert result.notes == ["1 samples without a label are left out"]


def test_no_label_at_all_is_refused(tmp_path):
    run, _, labels = make_run(tmp_path, sizes=(5,), labelled=False)
    write_predictions(run, noisy_logits(labels))
    with pytest.raises(ValueError, match=r"no sample of .* has a label"):
        evaluated(run)


@pytest.mark.parametrize("method", calibrate.METHODS)
def test_calibrated_logits_are_the_calibrators_probabilities(predicted, method):
    run, logits, labels = predicted
    calibrator = calibrate.fit_calibrator(method, open_predictions(run, "p"), calibrate.MetaTargets(0.2, 0.7))
    np.testing.assert_allclose(
        softmax(calibrated(logits, calibrator), axis=1), calibrator.transform(logits), atol=1e-12
    )
    result = evaluated(run, calibrator=calibrator).metrics
    np.testing.assert_allclose(
        result["ece"], calibration.expected_calibration_error(calibrator.transform(logits), labels), atol=1e-12
    )


def test_calibration_shards_are_not_those_evaluated(predicted):
    run, _, labels = predicted
    fitted, rest = calibrate.split_shards(open_predictions(run, "p"), 0.3, seed=1)
    assert sorted(fitted.shards + rest.shards) == [0, 1, 2] and len(fitted.shards) == 1
    assert len(load_outcomes(rest)) + len(held_out_logits(fitted)[0]) == len(labels)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        calibrate.split_shards(rest, 1.0, 0)
    with pytest.raises(ValueError, match=r"one shard, which cannot be split.*`calibration_run`"):
        calibrate.split_shards(fitted, 0.5, 0)


def test_trust_rates_and_ranking(predicted):
    run, logits, labels = predicted
    correct = logits.argmax(axis=1) == labels
    z = np.random.default_rng(0).normal(size=len(labels)) + 1.5 * correct - 0.5
    write_trust(run, z)
    metrics = detection.evaluate_trust(run, "t", open_predictions(run, "p"), replicates=4).metrics
    z32 = z.astype(np.float32).astype(float)
    np.testing.assert_allclose(metrics["auroc"], selective.detection_metrics(z32, correct).auroc, rtol=1e-12)
    np.testing.assert_allclose(metrics["tpr"], (z32[correct] > 0).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["tnr"], (z32[~correct] < 0).mean(), rtol=1e-12)
    write_trust(run, z, "tcp", loss="tcp")
    of_tcp = detection.evaluate_trust(run, "tcp", open_predictions(run, "p"), replicates=0).metrics
    sure = 1 / (1 + np.exp(-z32))
    np.testing.assert_allclose(of_tcp["tnr"], (sure[~correct] < 1 / 3).mean(), rtol=1e-12)
    assert of_tcp["tpr"] == metrics["tpr"]


def test_trust_with_a_missing_row_or_a_nan_is_refused(own):
    run, _, labels = own
    write_trust(run, np.where(np.arange(len(labels)) == 14, np.nan, 1.0))
    with pytest.raises(ValueError, match="trust t: shard 1: 1 of 8 values are NaN"):
        detection.evaluate_trust(run, "t", open_predictions(run, "p"), replicates=0)
    write_trust(run, np.ones(len(labels)))
    replace(run, 0, lambda table: table.slice(1), "trust/t")
    with pytest.raises(ValueError, match="trust t: shard 0: 1 of 12 samples are missing"):
        detection.evaluate_trust(run, "t", open_predictions(run, "p"), replicates=0)
    with pytest.raises(ValueError, match=r"trust u: .* hardset trust `name` u"):
        detection.evaluate_trust(run, "u", open_predictions(run, "p"))


def test_out_of_distribution_by_four_scores(predicted, tmp_path):
    run, logits, _ = predicted
    other, features, labels = make_run(tmp_path, seed=9, sizes=(20, 10))
    outside = 0.3 * noisy_logits(labels, seed=6)
    write_predictions(other, outside)
    found, notes = detection.out_of_distribution(
        run, open_predictions(run, "p"), other, open_predictions(other, "p"), replicates=30
    )
    for metrics in found.values():
        intervals = metrics.pop("intervals")
        assert all(low <= metrics[name] <= high and low < high for name, (low, high) in intervals.items())
    assert notes == [] and set(found) == {"msp", "entropy", "max_logit", "rmd"}
    inside = np.arange(len(logits) + len(outside)) < len(logits)
    values = np.concatenate([logits.max(axis=1), outside.astype(np.float32).max(axis=1)])
    expected = selective.detection_metrics(values, inside)
    np.testing.assert_allclose(list(found["max_logit"].values()), expected, rtol=1e-9)
    # In-sample on both sides: the columns of difficulty/ leave each sample out.
    gaussians = fit.load_gaussians(run)
    own = columns.vectors(joins.load(run.uri, ["embeddings.embedding"])["embeddings.embedding"])
    ours, theirs = (gaussians.class_distances(x).min(axis=1) - gaussians.agnostic_distances(x) for x in (own, features))
    expected = selective.detection_metrics(-np.concatenate([ours, theirs]), inside)
    np.testing.assert_allclose(found["rmd"]["auroc"], expected.auroc, rtol=1e-6)


def test_rmd_is_left_out_with_a_reason(own, predicted):
    run, *_ = own
    found, notes = detection.out_of_distribution(
        run, open_predictions(run, "p"), predicted[0], open_predictions(predicted[0], "p")
    )
    assert "rmd" not in found and "has no class Gaussians" in notes[0]


@pytest.mark.parametrize("text", ["rmd", "difficulty.rmd:a", "difficulty.rmd:3,1", ":5"])
def test_a_grouping_that_is_none(text):
    with pytest.raises(ValueError, match="groups "):
        evaluation.Slicing.parse(text)


def test_groups_by_value():
    parts = evaluation.Slicing.parse("correctness.votes").parts(np.array([0, 2, 2, np.nan]))
    assert {name: rows.sum() for name, rows in parts.items()} == {"votes = 0": 1, "votes = 2": 2}


def test_figures_are_pictures(predicted):
    result = evaluated(predicted[0])
    msp, correct = result.figures["confidences"]["msp"], result.figures["correct"]
    drawn = [
        figures.reliability_diagram(result.figures["curve"], "p", result.metrics["ece"]),
        figures.risk_coverage({"p": (msp, correct)}),
        figures.confidence_histogram(msp, correct),
        figures.box_plots({"a": [[1, 2], [2, 3]], "b": [[1, 1], [4, 5]]}, ["0", "1"], "severity", "ECE"),
        figures.lines({"a": ([1, 2], [3, 4])}, "epoch", "NLL"),
    ]
    for figure in drawn:
        assert figures.png(figure).startswith(b"\x89PNG")
    assert result.figures["curve"][:, 0].sum() == len(msp)


def test_the_terminal_shows_intervals_of_a_set_that_has_them(predicted):
    run, *_ = predicted
    found, lines = [evaluated(run, replicates=20), dataclasses.replace(evaluated(run), name="bare")], []
    sidebyside.show(sidebyside.Answer(found, {}, {e.name: e.record() for e in found}, []), lines.append)
    low, high = found[0].intervals["accuracy"]
    assert [line for line in lines if "resamples" in line] == [lines[-1]]
    assert lines[-1].startswith(f"95 % of resamples, p: accuracy {100 * low:.2f} to {100 * high:.2f}, ece ")


def test_run_is_unchanged(predicted):
    assert Run.open(predicted[0].uri).stages().keys() == {
        "embed",
        "fit",
        "score",
    }
