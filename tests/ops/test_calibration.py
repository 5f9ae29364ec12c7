import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from ops.calibration import (
    MetaCalibration,
    TemperatureScaling,
    brier_score,
    calibrator_from_dict,
    classwise_calibration_error,
    confidence_calibration_error,
    confidence_reliability_curve,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    per_class_calibration_error,
    reliability_curve,
)
from tests.ops.golden import cases

METRICS = [
    expected_calibration_error,
    maximum_calibration_error,
    classwise_calibration_error,
    per_class_calibration_error,
    reliability_curve,
    brier_score,
    negative_log_likelihood,
]
BINNED = METRICS[:5]


def golden_probs(case):
    return case.inputs["probs"] if "probs" in case.inputs else softmax(case.inputs["logits"], axis=1)


def some_logits(n=300, k=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return 2 * rng.normal(size=(n, k)) + 4 * np.eye(k)[labels], labels


def mean_nll(logits, labels, temperature):
    return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()


@st.composite
def labelled_logits(draw, bound=50.0):
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 5)))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-bound, bound)))
    return logits, draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))


# ---- metrics


@pytest.mark.parametrize("case", cases("metrics_calibration.npz"), ids=repr)
def test_metrics_equal_the_golden_values(case):
    probs, labels, out, bins = golden_probs(case), case.inputs["labels"], case.outputs, case.params["n_bins"]
    found = {
        "ece": expected_calibration_error(probs, labels, bins),
        "mce": maximum_calibration_error(probs, labels, bins),
        "ece_equal_mass": expected_calibration_error(probs, labels, bins, "mass"),
        "cwece": classwise_calibration_error(probs, labels, bins),
        "cwece_equal_mass": classwise_calibration_error(probs, labels, bins, "mass"),
        "cwece_per_class": per_class_calibration_error(probs, labels, bins),
        "brier": brier_score(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "bins_count_acc_conf": np.stack(reliability_curve(probs, labels, bins), axis=1),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, out[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", cases("metrics_calibration.npz"), ids=repr)
def test_float32_tensors_give_the_golden_values(case):
    probs, labels = torch.tensor(golden_probs(case)).float(), torch.tensor(case.inputs["labels"])
    bins = case.params["n_bins"]
    assert expected_calibration_error(probs, labels, bins) == pytest.approx(case.outputs["ece"], abs=2e-5)
    assert brier_score(probs, labels) == pytest.approx(case.outputs["brier"], abs=2e-5)
    assert negative_log_likelihood(probs, labels) == pytest.approx(case.outputs["nll"], abs=2e-5)
    per_class = per_class_calibration_error(probs, labels, bins)
    assert isinstance(per_class, torch.Tensor)
    np.testing.assert_allclose(per_class, case.outputs["cwece_per_class"], atol=2e-5)


def naive_calibration_error(confidence, hit, bins):
    """Guo et al. 2017, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 2, 7, 49])
def test_calibration_errors_equal_a_loop_over_bins(bins):
    logits, labels = some_logits()
    probs = softmax(logits, axis=1)
    top = naive_calibration_error(probs.max(1), (probs.argmax(1) == labels) * 1.0, bins)
    each = [naive_calibration_error(probs[:, k], (labels == k) * 1.0, bins) for k in range(5)]
    np.testing.assert_allclose(expected_calibration_error(probs, labels, bins), top, rtol=1e-12)
    np.testing.assert_allclose(per_class_calibration_error(probs, labels, bins), each, rtol=1e-12)


def test_mass_bins_are_those_of_array_split():
    confidence = np.random.default_rng(1).random(53)
    correct = np.arange(53) % 2
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, 15)
    expected = sum(abs(correct[p].sum() - confidence[p].sum()) for p in parts) / 53
    np.testing.assert_allclose(confidence_calibration_error(confidence, correct, binning="mass"), expected, rtol=1e-12)


@pytest.mark.parametrize("bins", [10, 15, 49])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(bins):
    for j in range(bins + 1):
        probs = np.array([[j / bins, 1 - j / bins]]) if 2 * j >= bins else None
        if probs is not None:
            count = reliability_curve(probs, np.array([0]), bins).count
            assert count.argmax() == j - 1


def test_zero_confidence_falls_in_the_first_bin_of_a_plain_confidence():
    assert confidence_calibration_error(np.zeros(4), np.ones(4)) == 1.0


def test_many_columns_are_the_same_as_few():
    logits, labels = some_logits(n=50, k=200)
    probs = softmax(logits, axis=1)
    each = [naive_calibration_error(probs[:, k], (labels == k) * 1.0, 15) for k in range(200)]
    np.testing.assert_allclose(per_class_calibration_error(probs, labels), each, rtol=1e-12)


def test_reliability_curve_keeps_the_kind_and_all_samples():
    logits, labels = some_logits()
    probs = torch.softmax(torch.tensor(logits), dim=1)
    for binning in ("width", "mass"):
        curve = reliability_curve(probs, torch.tensor(labels), 10, binning)
        assert all(isinstance(part, torch.Tensor) for part in curve)
        assert curve.count.sum() == 300
        ece = (curve.count.double() / 300 * (curve.accuracy - curve.confidence).abs()).sum()
        assert expected_calibration_error(probs, labels, 10, binning) == pytest.approx(float(ece), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(labelled_logits(), st.integers(1, 20), st.randoms(use_true_random=False))
def test_errors_lie_in_unit_range_and_ignore_the_order(data, bins, random):
    logits, labels = data
    probs = softmax(logits, axis=1)
    order = np.array(random.sample(range(len(labels)), len(labels)))
    for metric in (expected_calibration_error, maximum_calibration_error, classwise_calibration_error):
        value = metric(probs, labels, bins)
        assert 0 <= value <= 1
        assert metric(probs[order], labels[order], bins) == pytest.approx(value, abs=1e-12)
        assert 0 <= metric(probs, labels, bins, "mass") <= 1
    assert 0 <= brier_score(probs, labels) <= 2
    assert negative_log_likelihood(probs, labels) >= 0


def test_perfect_and_worst_predictions():
    right, wrong = np.eye(3), np.eye(3)[[1, 2, 0]]
    labels = np.arange(3)
    for metric in (*METRICS[:3], brier_score, negative_log_likelihood):
        assert metric(right, labels) == 0
    assert [m(wrong, labels) for m in (*METRICS[:2], brier_score)] == [1, 1, 2]
    assert negative_log_likelihood(wrong, labels) == np.inf


def test_one_sample_and_one_class_have_values():
    assert expected_calibration_error(np.array([[0.75, 0.25]]), np.array([1])) == 0.75
    for metric in (*METRICS[:3], brier_score, negative_log_likelihood):
        assert metric(np.ones((4, 1)), np.zeros(4, int)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities_of_many_classes_are_taken(dtype):
    logits, labels = some_logits(n=64, k=1000)
    probs = torch.softmax(torch.tensor(logits), dim=1)
    labels = torch.tensor(labels)
    rounded = brier_score(probs.to(dtype), labels)
    assert rounded == pytest.approx(brier_score(probs, labels), abs=1e-2)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (np.full((4, 2), 0.5), np.zeros((4, 1), int), r"labels: expected shape \(4,\), got \(4, 1\)"),
        (np.full((4, 2), 0.5), np.zeros(3, int), r"labels: expected shape \(4,\), got \(3,\)"),
        (np.full((4, 2), 0.5), np.zeros(4), "labels: expected integers"),
        (np.full((4, 2), 0.5), np.full(4, 2), r"labels: values must lie in \[0, 2\), found 2"),
        (np.full((4, 2), 0.5), np.full(4, -1), "labels.*found -1"),
        (np.full(4, 0.5), np.zeros(4, int), r"probs: expected shape \(n, K\), got \(4,\)"),
        (np.full((4, 2), np.nan), np.zeros(4, int), "probs: contains NaN"),
        (np.full((4, 2), 2.0), np.zeros(4, int), r"probs: probabilities must lie in \[0, 1\], found 2"),
        (np.full((4, 2), 0.4), np.zeros(4, int), "probs: each row must sum to 1"),
        (np.ones((0, 2)), np.zeros(0, int), "probs: is empty"),
    ],
)
def test_bad_input_is_refused(metric, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)


@pytest.mark.parametrize("metric", BINNED, ids=lambda m: m.__name__)
def test_bad_bins_are_refused(metric):
    probs, labels = np.full((4, 2), 0.5), np.zeros(4, int)
    with pytest.raises(ValueError, match="bins: "):
        metric(probs, labels, 0)
    with pytest.raises(ValueError, match="binning: must be one of width, mass"):
        metric(probs, labels, 5, "equal")


def test_plain_confidence_is_checked():
    with pytest.raises(ValueError, match=r"correct: expected shape \(3,\), got \(3, 1\)"):
        confidence_calibration_error(np.full(3, 0.5), np.ones((3, 1)))
    with pytest.raises(ValueError, match="confidence: must lie in"):
        confidence_calibration_error(np.array([0.5, 1.5]), np.ones(2))


# ---- temperature scaling


@pytest.mark.parametrize("case", cases("temperature.npz"), ids=repr)
def test_temperature_is_the_exact_minimiser(case):
    logits, labels, out = case.inputs["logits"], case.inputs["labels"], case.outputs
    scaling = TemperatureScaling().fit(logits, labels)
    np.testing.assert_allclose(scaling.temperature, out["T_nll"], rtol=1e-9)
    probs = scaling.transform(logits)
    np.testing.assert_allclose(negative_log_likelihood(probs, labels), out["nll_after"], rtol=1e-12)
    np.testing.assert_allclose(expected_calibration_error(probs, labels), out["ece15_after_T_nll"], rtol=1e-7)
    untouched = TemperatureScaling(1.0).transform(logits)
    np.testing.assert_allclose(negative_log_likelihood(untouched, labels), out["nll_before"], rtol=1e-12)
    np.testing.assert_allclose(expected_calibration_error(untouched, labels), out["ece15_before"], rtol=1e-12)


@pytest.mark.parametrize("case", cases("temperature.npz"), ids=repr)
def test_temperature_of_float32_tensors(case):
    logits = torch.tensor(case.inputs["logits"], dtype=torch.float32)
    scaling = TemperatureScaling().fit(logits, torch.tensor(case.inputs["labels"]))
    np.testing.assert_allclose(scaling.temperature, case.outputs["T_nll"], rtol=1e-6)
    assert isinstance(scaling.transform(logits), torch.Tensor)


def test_temperature_agrees_with_a_search_and_scales_with_the_logits():
    logits, labels = some_logits(seed=3)
    search = minimize_scalar(lambda u: mean_nll(logits, labels, np.exp(u)), bounds=(-3, 3), options={"xatol": 1e-10})
    found = TemperatureScaling().fit(logits, labels).temperature
    assert found == pytest.approx(np.exp(search.x), rel=1e-5)
    assert TemperatureScaling().fit(30 * logits, labels).temperature == pytest.approx(30 * found, rel=1e-9)


@settings(deadline=None, max_examples=80)
@given(labelled_logits(bound=1e4))
def test_temperature_never_raises_the_nll_nor_changes_a_prediction(data):
    logits, labels = data
    scaling = TemperatureScaling().fit(logits, labels)
    assert 1e-3 <= scaling.temperature <= 1e3
    before, after = (mean_nll(logits, labels, t) for t in (1.0, scaling.temperature))
    assert after <= before + 1e-12 * (1 + before)
    np.testing.assert_array_equal(scaling.transform(logits).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_nearly_tied_logits_stay_in_order(temperature):
    logits = np.array([[1.0, np.nextafter(1.0, 2), 0.0], [0.0, 5e-324, 0.0], [3.0, 3.0, 3.0]])
    probs = TemperatureScaling(temperature).transform(logits)
    np.testing.assert_array_equal(probs.argmax(1), [1, 1, 0])
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-15)


def test_temperature_bounds_where_there_is_no_minimum():
    logits = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert TemperatureScaling().fit(logits, np.array([0, 1])).temperature == 1e-3
    assert TemperatureScaling().fit(logits, np.array([1, 0])).temperature == 1e3
    assert TemperatureScaling().fit(np.ones((3, 4)), np.array([0, 1, 2])).temperature == 1
    assert TemperatureScaling().fit(np.ones((3, 1)), np.zeros(3, int)).temperature == 1
    assert TemperatureScaling().fit(1e4 * logits, np.array([0, 1])).temperature == 1  # NLL is 0 already


def test_calibrators_refuse_bad_input():
    for calibrator in (TemperatureScaling(), MetaCalibration("misclassification", alpha=0.1)):
        with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(3, 1\)"):
            calibrator.fit(np.ones((3, 2)), np.zeros((3, 1), int))
        with pytest.raises(ValueError, match="logits: contains NaN"):
            calibrator.fit(np.full((3, 2), np.nan), np.zeros(3, int))
        with pytest.raises(ValueError, match="logits: contains infinity"):
            calibrator.fit(np.full((3, 2), np.inf), np.zeros(3, int))
        with pytest.raises(ValueError, match="isn't fitted"):
            calibrator.transform(np.ones((3, 2)))


# ---- MetaCal


def fit_golden(case, dtype=np.float64):
    kind, option = ("accuracy", "acc") if "acc" in case.params else ("misclassification", "alpha")
    name = "accuracy" if option == "acc" else option
    rows = case.inputs["threshold_set_index"], case.inputs["calibration_set_index"]
    calibrator = MetaCalibration(kind, **{name: case.params[option]})
    return calibrator.fit(case.inputs["logits"].astype(dtype), case.inputs["labels"], *rows)


@pytest.mark.parametrize("case", cases("metacal.npz"), ids=repr)
def test_metacal_equals_the_golden_values(case):
    calibrator, out, logits = fit_golden(case), case.outputs, case.inputs["logits_test"]
    probs, kept = calibrator.transform(logits), calibrator.keeps(logits)
    right = logits.argmax(1) == case.inputs["labels_test"]
    np.testing.assert_allclose(calibrator.threshold, out["threshold"], rtol=1e-12)
    np.testing.assert_allclose(calibrator.temperature, out["temperature"], rtol=1e-5)
    np.testing.assert_allclose(probs, out["proba_test"], atol=1e-5)
    assert (probs[~kept] == 1 / logits.shape[1]).all()
    assert (probs.argmax(1) == case.inputs["labels_test"]).mean() == pytest.approx(out["accuracy_test"], abs=1e-12)
    if "empirical_type1" in out:
        assert (~kept[right]).mean() == pytest.approx(out["empirical_type1"], abs=1e-12)
        assert kept[~right].mean() == pytest.approx(out["empirical_type2"], abs=1e-12)
    else:
        assert right[kept].mean() == pytest.approx(out["empirical_coverage_accuracy"], abs=1e-12)


def test_metacal_of_float32_logits():
    case = cases("metacal.npz")[0]
    calibrator = fit_golden(case, np.float32)
    np.testing.assert_allclose(calibrator.threshold, case.outputs["threshold"], rtol=1e-12)
    probs = calibrator.transform(torch.tensor(case.inputs["logits_test"]).float())
    np.testing.assert_allclose(probs, case.outputs["proba_test"], atol=2e-5)


def test_metamis_threshold_is_strict_and_looks_at_correct_rows_only():
    logits, labels = some_logits(n=200)
    rows = np.arange(100)
    right = rows[logits[rows].argmax(1) == labels[rows]]
    found = MetaCalibration("misclassification", alpha=0.2).fit(logits, labels, threshold_rows=rows)
    entropies = entropy(softmax(logits[right], axis=1), axis=1)
    assert found.threshold == pytest.approx(np.quantile(entropies, 0.8, method="higher"), rel=1e-12)
    at = right[np.abs(entropies - found.threshold).argmin()]
    assert not found.keeps(logits)[at]
    kept = np.setdiff1d(np.arange(200), rows)
    kept = kept[found.keeps(logits[kept])]
    assert found.temperature == pytest.approx(TemperatureScaling().fit(logits[kept], labels[kept]).temperature)


def test_a_calibration_row_at_the_threshold_is_not_kept():
    logits, labels = some_logits(n=200)
    twice, labels = np.concatenate([logits, logits]), np.concatenate([labels, labels])
    found = MetaCalibration("misclassification", alpha=0.5).fit(twice, labels, np.arange(200), np.arange(200, 400))
    entropies = entropy(softmax(logits, axis=1), axis=1)
    kept = entropies < found.threshold - 1e-9
    expected = TemperatureScaling().fit(logits[kept], labels[:200][kept]).temperature
    assert (np.abs(entropies - found.threshold) < 1e-9).sum() == 1
    assert found.temperature == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "size"), [(5, 1), (2000, 200), (20000, 500)])
def test_a_tenth_of_the_rows_at_most_500_chooses_the_threshold(n, size):
    first, second = MetaCalibration("accuracy", accuracy=0.9)._split(np.ones(n, bool), None, None)
    assert len(first) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), np.arange(n))


@pytest.mark.parametrize("options", [("misclassification", 0.1, None), ("accuracy", None, 0.9)])
def test_metacal_random_split_is_seeded_and_the_state_survives(options):
    logits, labels = some_logits(n=2000)
    fits = [MetaCalibration(*options, seed=seed).fit(logits, labels) for seed in (0, 0, 1)]
    assert fits[0] == fits[1]
    assert fits[0].threshold != fits[2].threshold
    again = calibrator_from_dict(json.loads(json.dumps(fits[0].to_dict())))
    np.testing.assert_array_equal(again.transform(logits), fits[0].transform(logits))
    scaling = TemperatureScaling().fit(logits, labels)
    assert calibrator_from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling


def test_metamis_gives_up_about_alpha_of_the_correct():
    logits, labels = some_logits(n=20000)
    found = MetaCalibration("misclassification", alpha=0.1).fit(logits, labels)
    right = logits.argmax(1) == labels
    assert 1 - found.keeps(logits)[right].mean() == pytest.approx(0.1, abs=0.04)  # 500 rows: sd 0.013


def test_metacc_reaches_about_its_accuracy():
    logits, labels = some_logits(n=20000)
    found = MetaCalibration("accuracy", accuracy=0.95).fit(logits, labels)
    kept = found.keeps(logits)
    assert (logits.argmax(1) == labels)[kept].mean() == pytest.approx(0.95, abs=0.03)


def test_metacal_says_what_would_do():
    logits, labels = some_logits(n=400)
    with pytest.raises(ValueError, match=r"accuracy: no threshold reaches 0.001 .* must lie in \[0\.\d+, 1\]"):
        MetaCalibration("accuracy", accuracy=0.001).fit(logits, labels)
    with pytest.raises(ValueError, match=r"threshold_rows: all .* equal"):
        MetaCalibration("accuracy", accuracy=0.5).fit(np.ones((40, 2)), np.zeros(40, int))
    with pytest.raises(ValueError, match=r"calibration_rows: none of .* lower alpha"):
        MetaCalibration("misclassification", alpha=1.0).fit(logits, labels, threshold_rows=np.arange(400)[::2])
    with pytest.raises(ValueError, match=r"threshold_rows: .*0 classified correctly"):
        MetaCalibration("misclassification", alpha=0.1).fit(np.eye(2), np.array([1, 0]))
    with pytest.raises(ValueError, match="calibration_rows: no row left"):
        MetaCalibration("misclassification", alpha=0.1).fit(np.array([[1.0, 0.0]]), np.array([0]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([0, 1], [1, 2]), "calibration_rows: shares rows"),
        (([0, 0], None), "threshold_rows: row numbers repeat"),
        ((None, [99]), "calibration_rows: values must lie"),
        (([[0], [1]], None), "threshold_rows: expected shape"),
    ],
)
def test_metacal_refuses_bad_rows(rows, message):
    logits, labels = some_logits(n=20)
    rows = [None if r is None else np.array(r) for r in rows]
    with pytest.raises(ValueError, match=message):
        MetaCalibration("accuracy", accuracy=0.5).fit(logits, labels, *rows)


def test_metacal_needs_its_option():
    with pytest.raises(ValueError, match=r"alpha: .*needs it"):
        MetaCalibration("misclassification", accuracy=0.9)
    with pytest.raises(ValueError, match="accuracy: must lie in"):
        MetaCalibration("accuracy", accuracy=90)
    with pytest.raises(ValueError, match="kind: must be one of"):
        MetaCalibration("coverage")


def test_reliability_of_confidences_alone_is_that_of_the_probabilities():
    rng = np.random.default_rng(8)
    probs = rng.dirichlet(np.ones(4), 500)
    labels = rng.integers(0, 4, 500)
    expected = reliability_curve(probs, labels)
    found = confidence_reliability_curve(probs.max(axis=1), probs.argmax(axis=1) == labels)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    with pytest.raises(ValueError, match="confidence"):
        confidence_reliability_curve(np.array([1.5]), np.array([1]))
