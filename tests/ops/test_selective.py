import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.integrate import quad
from scipy.special import softmax
from scipy.stats import norm

from ops.checks import UndefinedMetricError
from ops.selective import (
    accuracy_rejection_curve,
    augrc,
    aurc,
    confidence,
    detection_metrics,
    excess_aurc,
    fpr_at_tpr,
    gaussian_kl,
    gaussian_separability,
    optimal_aurc,
    risk_at_coverage,
    risk_coverage_curve,
    separability,
    true_rates,
)
from tests.ops.golden import cases

SELECTIVE = cases("metrics_selective.npz")
CURVES = [risk_coverage_curve, aurc, excess_aurc, augrc, accuracy_rejection_curve]
OUTCOMES = [*CURVES, detection_metrics, fpr_at_tpr, true_rates, lambda c, e: risk_at_coverage(c, e, 0.5)]


def golden_scores(case, kind=np.asarray):
    """Confidence and correctness of a golden case; `kind` makes the arrays."""
    if "confidence" in case.inputs:
        return kind(case.inputs["confidence"]), kind(case.inputs["correct"])
    logits, labels = case.inputs["logits"], case.inputs["labels"]
    name = "msp" if case.params["score"] == "max softmax probability" else "entropy"
    return confidence(kind(softmax(logits, axis=1)), name), kind((logits.argmax(1) == labels) * 1)


@st.composite
def scored_outcomes(draw, both=False):
    n = draw(st.integers(2 if both else 1, 20))
    scores = draw(hnp.arrays(np.float64, n, elements=st.integers(-4, 4).map(float)))
    outcomes = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 1)))
    if both:
        outcomes[:2] = 0, 1
    return scores, outcomes


# ---- golden values


@pytest.mark.parametrize("case", SELECTIVE, ids=repr)
def test_selective_metrics_equal_the_golden_values(case):
    scores, correct = golden_scores(case)
    errors, out = 1 - correct, case.outputs
    curve = risk_coverage_curve(scores, errors)
    rejection = accuracy_rejection_curve(scores, errors, out["rejection_rate"])
    point, rates = fpr_at_tpr(scores, correct), true_rates(scores, correct)
    found = {
        "coverage": curve.coverage,
        "risk": curve.risk,
        "aurc": aurc(scores, errors),
        "aurc_ties_averaged": aurc(scores, errors, ties="average"),
        "e_aurc": excess_aurc(scores, errors),
        "optimal_aurc_finite_n": optimal_aurc(errors),
        "optimal_aurc_formula": aurc(scores, errors) - excess_aurc(scores, errors),
        "kept": rejection.kept,
        "accuracy_at_rejection": rejection.accuracy,
        "fpr95": point.fpr,
        "fpr95_threshold": point.threshold,
        "tpr_at_half": rates.tpr,
        "tnr_at_half": rates.tnr,
        **detection_metrics(scores, correct)._asdict(),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, out[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", SELECTIVE, ids=repr)
def test_float32_tensors_give_the_golden_values(case):
    scores, correct = golden_scores(case, lambda x: torch.tensor(x).float())
    out = case.outputs
    curve = risk_coverage_curve(scores, 1 - correct)
    assert isinstance(curve.risk, torch.Tensor)
    np.testing.assert_allclose(curve.risk, out["risk"], atol=2e-5)
    assert aurc(scores, 1 - correct) == pytest.approx(out["aurc"], abs=2e-5)
    for name, value in detection_metrics(scores, correct)._asdict().items():
        assert value == pytest.approx(out[name], abs=2e-5), name


@pytest.mark.parametrize("case", cases("separability.npz", "gauss"), ids=repr)
def test_gaussian_separability_equals_the_golden_values(case):
    moments = [float(case.inputs[name]) for name in ("mu1", "sigma1", "mu2", "sigma2")]
    found, out = gaussian_separability(*moments), case.outputs
    np.testing.assert_allclose(gaussian_kl(*moments), out["kl_12"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gaussian_kl(*moments[2:], *moments[:2]), out["kl_21"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.kl, out["kl_average"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.bhattacharyya, out["bhattacharyya"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("separability.npz", "samples"), ids=repr)
def test_separability_of_samples_equals_the_golden_values(case):
    a, b = case.inputs["conf_correct"], case.inputs["conf_wrong"]
    kl, bhattacharyya = separability(a, b)
    np.testing.assert_allclose(kl, case.outputs["kl_average"], rtol=1e-12)
    np.testing.assert_allclose(bhattacharyya, case.outputs["bhattacharyya"], rtol=1e-12)
    np.testing.assert_allclose(separability(b, a), (kl, bhattacharyya), rtol=1e-12)
    np.testing.assert_allclose(separability(torch.tensor(a).float(), torch.tensor(b).float()).kl, kl, rtol=2e-5)


# ---- oracles and properties


def test_confidences_equal_their_definitions():
    probs = softmax(np.random.default_rng(0).normal(size=(40, 6)) * 3, axis=1)
    ordered = np.sort(probs, axis=1)
    entropy = -(probs * np.log(probs)).sum(axis=1)
    np.testing.assert_allclose(confidence(probs), ordered[:, -1], rtol=1e-15)
    np.testing.assert_allclose(confidence(probs, "margin"), ordered[:, -1] - ordered[:, -2], rtol=1e-12)
    np.testing.assert_allclose(confidence(probs, "entropy"), 1 - entropy / np.log(6), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["msp", "entropy", "margin"])
def test_confidence_at_the_ends(kind):
    certain, uniform = confidence(np.array([[0.0, 1.0, 0.0, 0.0], [0.25] * 4]), kind)
    assert certain == 1
    assert uniform == (0.25 if kind == "msp" else 0)
    np.testing.assert_array_equal(confidence(np.ones((3, 1)), kind), 1)
    half = confidence(torch.full((2, 4), 0.25, dtype=torch.bfloat16), kind)
    assert isinstance(half, torch.Tensor)
    assert half.shape == (2,)


def test_msp_ranks_are_kept_in_float16():
    probs = torch.softmax(torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), dim=1)
    np.testing.assert_allclose(confidence(probs.half()), confidence(probs), atol=1e-3)


def expected_aurc_over_tie_orders(scores, errors, draws=4000):
    rng = np.random.default_rng(0)
    orders = (rng.permutation(len(scores)) for _ in range(draws))
    return np.mean([aurc(scores[order], errors[order]) for order in orders])


def test_averaged_ties_are_the_mean_over_orders():
    scores, errors = np.array([1, 1, 1, 0, 0, 2.0]), np.array([1, 0, 0, 1, 0, 0])
    expected = expected_aurc_over_tie_orders(scores, errors)
    assert aurc(scores, errors, ties="average") == pytest.approx(expected, abs=5e-3)
    assert aurc(scores, errors) != aurc(scores[::-1], errors[::-1])


@settings(deadline=None)
@given(scored_outcomes())
def test_aurc_lies_between_the_optimum_and_one(data):
    scores, errors = data
    value, n = aurc(scores, errors), len(errors)
    assert optimal_aurc(errors) - 1e-12 <= value <= 1
    assert aurc(-errors, errors) == pytest.approx(optimal_aurc(errors), abs=1e-12)
    assert excess_aurc(scores, errors) >= 0
    prefixes = [errors[np.argsort(-scores, kind="stable")][: k + 1].mean() for k in range(n)]
    assert value == pytest.approx(np.mean(prefixes), abs=1e-12)
    assert aurc(3 * scores + 1, errors) == value


@settings(deadline=None)
@given(scored_outcomes(both=True))
def test_augrc_equals_its_closed_form(data):
    scores, errors = data
    accuracy = 1 - errors.mean()
    auroc = detection_metrics(scores, 1 - errors).auroc
    closed = (1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(scores, errors) == pytest.approx(closed, abs=1e-12)


@settings(deadline=None)
@given(scored_outcomes(both=True))
def test_auroc_and_fpr95_equal_a_count(data):
    scores, correct = data
    right, wrong = scores[correct == 1], scores[correct == 0]
    pairs = (right[:, None] > wrong) + 0.5 * (right[:, None] == wrong)
    found = detection_metrics(scores, correct)
    assert found.auroc == pytest.approx(pairs.mean(), abs=1e-12)
    thresholds = [t for t in scores if (right >= t).mean() >= 0.95]
    assert found.fpr95 == pytest.approx((wrong >= max(thresholds)).mean(), abs=1e-12)
    assert fpr_at_tpr(scores, correct) == (found.fpr95, max(thresholds))
    assert detection_metrics(np.exp(scores), correct) == found


def test_infinite_confidences_are_ranked():
    scores = np.array([np.inf, 1.0, -np.inf, 0.0])
    correct = np.array([1, 1, 0, 0])
    assert detection_metrics(scores, correct) == (0, 1, 1, 1)
    assert aurc(scores, 1 - correct) == pytest.approx((1 / 3 + 1 / 2) / 4)


def test_accuracy_rejection_and_risk_at_coverage_agree():
    scores, errors = np.arange(100.0), np.arange(100) % 3 == 0
    full = accuracy_rejection_curve(scores, errors)
    assert full.kept[0] == 100
    assert full.kept[-1] == 1
    for rate in (0.0, 0.07, 0.29, 0.58, 0.99):  # 0.29 * 100 is 28.999999999999996
        at = accuracy_rejection_curve(scores, errors, np.array([rate]))
        assert at.kept[0] == 100 - round(100 * rate)
        assert at.accuracy[0] == pytest.approx(1 - errors[round(100 * rate) :].mean())
        assert risk_at_coverage(scores, errors, 1 - rate) == pytest.approx(1 - at.accuracy[0])
    assert risk_at_coverage(scores, errors, 1e-9) == errors[-1]


def test_separability_equals_integrals():
    (ma, sa), (mb, sb) = (0.3, 0.7), (1.1, 0.4)
    p, q = norm(ma, sa).pdf, norm(mb, sb).pdf
    kl = quad(lambda x: p(x) * (norm(ma, sa).logpdf(x) - norm(mb, sb).logpdf(x)), -8, 8)[0]
    overlap = quad(lambda x: np.sqrt(p(x) * q(x)), -8, 8)[0]
    assert gaussian_kl(ma, sa, mb, sb) == pytest.approx(kl, rel=1e-8)
    assert gaussian_separability(ma, sa, mb, sb).bhattacharyya == pytest.approx(-np.log(overlap), rel=1e-8)


# ---- degenerate data: a value that the docstring states, or an error with a name


@pytest.mark.parametrize("n", [1, 5])
def test_no_errors_and_all_errors_have_values(n):
    scores, none, every = np.arange(n) * 1.0, np.zeros(n, bool), np.ones(n, bool)
    assert [m(scores, none) for m in (aurc, excess_aurc, augrc)] == [0, 0, 0]
    assert [m(scores, every) for m in (aurc, excess_aurc, augrc)] == [1, 0, 0.5]
    np.testing.assert_array_equal(accuracy_rejection_curve(scores, none).accuracy, 1)
    np.testing.assert_array_equal(risk_coverage_curve(scores, every).risk, 1)


@pytest.mark.parametrize("metric", [detection_metrics, fpr_at_tpr, true_rates])
@pytest.mark.parametrize(("outcome", "word"), [(0, "wrong"), (1, "right")])
def test_one_outcome_only_leaves_detection_undefined(metric, outcome, word):
    with pytest.raises(UndefinedMetricError, match=f"correct: undefined, all 3 predictions are {word}"):
        metric(np.arange(3.0), np.full(3, outcome))


@pytest.mark.parametrize("values", [np.array([0.5]), np.full(4, 0.5)])
def test_separability_without_spread_is_undefined(values):
    with pytest.raises(UndefinedMetricError, match="b: no spread"):
        separability(np.arange(3.0), values)
    with pytest.raises(ValueError, match="std_a: must lie in"):
        gaussian_separability(0.0, 0.0, 1.0, 1.0)


# ---- bad input


@pytest.mark.parametrize("metric", OUTCOMES)
@pytest.mark.parametrize(
    ("scores", "outcomes", "message"),
    [
        (np.arange(4.0), np.array([[0], [1], [0], [1]]), r": expected shape \(4,\), got \(4, 1\)"),
        (np.arange(4.0)[:, None], np.array([0, 1, 0, 1]), r"confidence: expected shape \(n,\), got \(4, 1\)"),
        (np.arange(4.0), np.array([0, 1, 0]), r": expected shape \(4,\), got \(3,\)"),
        (np.arange(4.0), np.array([0, 1, 2, 1]), ": expected only 0 and 1"),
        (np.array([0, 1, np.nan, 3]), np.array([0, 1, 0, 1]), "confidence: contains NaN"),
        (np.zeros(0), np.zeros(0), "confidence: is empty"),
    ],
)
def test_bad_input_is_refused(metric, scores, outcomes, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, outcomes)


def test_bad_options_are_refused():
    scores, errors = np.arange(4.0), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="kind: must be one of msp, entropy, margin"):
        confidence(np.full((2, 2), 0.5), "max")
    with pytest.raises(ValueError, match="probs: probabilities must lie"):
        confidence(np.array([[3.0, -2.0]]))
    with pytest.raises(ValueError, match="ties: "):
        aurc(scores, errors, ties="random")
    with pytest.raises(ValueError, match=r"rates: must lie in \[0, 1\)"):
        accuracy_rejection_curve(scores, errors, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"coverage: must lie in \(0, 1\]"):
        risk_at_coverage(scores, errors, 0.0)
    with pytest.raises(ValueError, match=r"a: expected shape \(n,\)"):
        separability(np.ones((4, 1)), scores)
