"""Losses against public reference code (golden cases), against float64 oracles, and at their edges."""

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln

from ops import losses
from ops.losses import LOSSES, SAMPLE_ARGUMENTS
from tests.ops.golden import cases

# golden case name -> the loss it belongs to; the parameters' names there -> ours
POINTWISE = {
    "cross_entropy": losses.cross_entropy,
    "label_smoothing": losses.label_smoothing,
    "focal_g2": losses.focal,
    "focal_g3": losses.focal,
    "fl53": losses.focal_53,
    "inverse_focal_g1": losses.inverse_focal,
    "inverse_focal_g2": losses.inverse_focal,
    "dual_focal_g2_equation": losses.dual_focal,
    "dual_focal_g5_equation": losses.dual_focal,
    "dual_focal_g2_released": lambda *args, **options: losses.dual_focal(*args, **options, variant="released"),
    "dual_focal_g5_released": lambda *args, **options: losses.dual_focal(*args, **options, variant="released"),
    "entropy_reg": losses.entropy_regularized,
    "l1_norm": losses.l1_norm,
    "poly1": losses.poly1,
    "brier": losses.brier,
}
CSF = {"MSP": "msp", "NegEntropy": "entropy", "SoftmaxMargin": "margin"}
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 2e-5, "atol": 1e-6}}


def run(loss, case, dtype, *args, **options):
    """The loss on a case's logits and labels, and the gradient of its mean."""
    logits = torch.tensor(case.inputs["logits"], dtype=dtype, requires_grad=True)
    value = loss(logits, torch.tensor(case.inputs["labels"]), *args, **options)
    value.mean().backward()
    assert value.dtype == dtype
    return value.detach().numpy(), logits.grad.numpy()


def close(actual, expected, dtype, **tolerance):
    np.testing.assert_allclose(actual, expected, **(TOLERANCE[dtype] | tolerance))


def pointwise():
    found = [c for c in cases("losses_pointwise.npz") if c.name.split("/")[1] in POINTWISE]
    assert len(found) == 4 * len(POINTWISE)
    return found


@BOTH
@pytest.mark.parametrize("case", pointwise(), ids=lambda c: c.name)
def test_pointwise_golden(case, dtype):
    names = {"epsilon": "smoothing"} if "smoothing" in case.name else {}
    known = {"gamma", "alpha", "epsilon"}
    options = {names.get(k, k): v for k, v in case.params.items() if k in known}
    per_sample, grad = run(POINTWISE[case.name.split("/")[1]], case, dtype, **options)
    close(per_sample, case.outputs["per_sample"], dtype)
    close(per_sample.mean(), case.outputs["mean"], dtype)
    close(grad, case.outputs["grad_of_mean"], dtype)


def test_dual_focal_variants_differ_only_where_the_label_is_not_on_top():
    case = cases("losses_pointwise.npz", "small/cross_entropy")[0]
    equation, _ = run(losses.dual_focal, case, torch.float64)
    released, _ = run(losses.dual_focal, case, torch.float64, variant="released")
    right = case.inputs["logits"].argmax(1) == case.inputs["labels"]
    np.testing.assert_array_equal(equation[right], released[right])
    assert (equation[~right] > released[~right]).all()


@BOTH
@pytest.mark.parametrize("case", cases("loss_difficulty_er.npz"), ids=repr)
def test_difficulty_entropy_golden(case, dtype):
    weight = torch.tensor(case.outputs["s"], dtype=dtype, requires_grad=True)
    per_sample, grad = run(losses.difficulty_entropy, case, dtype, weight=weight, alpha=case.params["alpha"])
    close(per_sample, case.outputs["per_sample"], dtype)
    close(grad, case.outputs["grad_of_mean"], dtype)
    assert weight.grad is None


@BOTH
@pytest.mark.parametrize("weighting", ["harmonic", "log"])
@pytest.mark.parametrize("case", cases("loss_aurc_au.npz", "aurc/"), ids=repr)
def test_aurc_golden(case, weighting, dtype):
    per_sample, grad = run(losses.aurc, case, dtype, csf=CSF[case.params["csf"]], weighting=weighting)
    cross_entropy, _ = run(losses.cross_entropy, case, dtype)
    close(per_sample, case.outputs[f"weight_{weighting}"] * cross_entropy, dtype)
    close(per_sample.mean(), case.outputs[f"mean_{weighting}"], dtype)
    close(grad, case.outputs[f"grad_{weighting}"], dtype)


@BOTH
@pytest.mark.parametrize("case", [c for c in cases("loss_aurc_au.npz") if c.name.startswith("au/")], ids=repr)
def test_selective_aurc_golden(case, dtype):
    csf, nu, edges = CSF[case.params["csf"]], case.params["nu"], case.inputs["edges"]
    if csf == "entropy":  # the case has −H in nats, ours is 1 − H/ln K
        log_k = math.log(case.inputs["logits"].shape[1])
        nu, edges = nu / log_k, 1 + edges / log_k
    per_sample, grad = run(losses.selective_aurc, case, dtype, csf, case.params["kappa"], nu, edges)
    close(per_sample, case.outputs["per_sample"], dtype)
    close(per_sample.mean(), case.outputs["mean"], dtype)
    close(grad, case.outputs["grad_of_mean"], dtype)


def test_selective_aurc_default_edges_are_64_bins():
    case = cases("loss_aurc_au.npz", "au/a/MSP")[0]
    expected, _ = run(losses.selective_aurc, case, torch.float64, edges=case.inputs["edges"])
    actual, _ = run(losses.selective_aurc, case, torch.float64)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("case", cases("loss_crl.npz"), ids=repr)
def test_correctness_ranking_golden(case):
    """The case's entropy score is −H/2.302585, `scale` times ours but for a constant; so is then its hinge."""
    csf = {"softmax": "msp"}.get(case.params["confidence"], case.params["confidence"])
    scale = math.log(10) / 2.302585 if csf == "entropy" else 1.0
    counts = case.inputs["correctness_counts"]
    correctness = (counts - counts.min()) / (case.params["max_correctness"] - counts.min())
    correctness = torch.tensor(correctness[case.inputs["sample_index"]] / scale)
    logits = torch.tensor(case.inputs["logits"], requires_grad=True)
    value = losses.correctness_ranking(logits, correctness, csf)
    value.backward()
    assert value.ndim == 0
    close(scale * value.item(), case.outputs["ranking_loss"], torch.float64)
    close(scale * logits.grad.numpy(), case.outputs["grad_ranking_loss"], torch.float64)
    labels = torch.tensor(case.inputs["labels"])
    together = losses.ranking_cross_entropy(logits, labels, correctness, csf, strength=0.5)
    close(together.detach(), (losses.cross_entropy(logits, labels) + 0.5 * value).detach(), torch.float64)


@BOTH
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["canonical", "marginal", "top_label"])
@pytest.mark.parametrize("case", cases("loss_kde.npz", "k"), ids=repr)
def test_kde_golden(case, kind, p, dtype):
    value, grad = run(losses.kde_calibration_error, case, dtype, case.params["bandwidth"], p, kind)
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {}
    assert value.ndim == 0
    close(value, case.outputs[f"{kind}_p{p}"], dtype, **tolerance)
    close(grad, case.outputs[f"{kind}_p{p}_grad"], dtype, **tolerance)


@pytest.mark.parametrize("case", cases("loss_kde.npz", "single_sample_class"), ids=repr)
def test_kde_class_with_one_sample_golden(case):
    value, grad = run(losses.kde_calibration_error, case, torch.float64, case.params["bandwidth"], case.params["p"])
    close(value, case.outputs["canonical_p1"], torch.float64, rtol=1e-8)
    close(grad, case.outputs["canonical_p1_grad"], torch.float64, atol=1e-9)


@pytest.mark.parametrize("case", cases("loss_kde.npz", "k"), ids=repr)
def test_kde_cross_entropy_and_bandwidth_golden(case):
    bandwidth = losses.kde_bandwidth(case.inputs["logits"])
    np.testing.assert_allclose(bandwidth, case.outputs["loo_bandwidth"], rtol=1e-6)
    per_sample, grad = run(losses.kde_cross_entropy, case, torch.float64, case.params["bandwidth"], case.params["lam"])
    close(per_sample.mean(), case.outputs["kde_xe_canonical_p1"], torch.float64, rtol=1e-8)
    close(grad, case.outputs["kde_xe_canonical_p1_grad"], torch.float64, atol=1e-9)
    chosen, _ = run(losses.kde_calibration_error, case, torch.float64)
    given, _ = run(losses.kde_calibration_error, case, torch.float64, bandwidth)
    np.testing.assert_array_equal(chosen, given)


# Oracles


def batch(n=24, k=5, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, k)), rng.integers(0, k, n)


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_harmonic_aurc_is_the_mean_of_the_selective_risks():
    logits, labels = batch()
    order = np.argsort(-softmax(logits).max(1))
    loss = losses.cross_entropy(logits, labels)[order]
    selective_risk = np.cumsum(loss) / np.arange(1, len(loss) + 1)
    np.testing.assert_allclose(losses.aurc(logits, labels).mean(), selective_risk.mean(), rtol=1e-12)


def dirichlet_pdf(x, alpha):
    """Density at the rows of x; that of the Beta is the one of (x, 1 − x)."""
    return np.exp(((alpha - 1) * np.log(x)).sum(-1) + gammaln(alpha.sum(-1)) - gammaln(alpha).sum(-1))


def with_complement(x):
    return np.stack([x, 1 - x], axis=-1)


def kde_oracle(probs, labels, b, p, kind):
    """Popordanoska et al. 2022, one sample at a time."""
    n, k = probs.shape
    true = np.eye(k)[labels]
    if kind == "top_label":
        top = probs.argmax(1)
        probs, true = probs.max(1)[:, None], (top == labels).astype(float)[:, None]
    total = 0.0
    for i in range(n):
        others = np.arange(n) != i
        if kind == "canonical":
            kernel = dirichlet_pdf(probs[i], probs[others] / b + 1)[:, None]
        else:
            kernel = dirichlet_pdf(with_complement(probs[i]), with_complement(probs[others]) / b + 1)
        total += (np.abs((kernel * true[others]).sum(0) / kernel.sum(0) - probs[i]) ** p).sum()
    return total / n


@pytest.mark.parametrize(("k", "kind"), [(4, "canonical"), (70, "canonical"), (4, "marginal"), (4, "top_label")])
def test_kde_oracle(k, kind):
    logits, labels = batch(16, k, scale=1.0)
    expected = kde_oracle(softmax(logits), labels, 0.3, 1.5, kind)
    np.testing.assert_allclose(losses.kde_calibration_error(logits, labels, 0.3, 1.5, kind), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["marginal", "top_label"])
def test_bandwidth_maximises_the_leave_one_out_likelihood(kind):
    logits, _ = batch(20, 3)
    probs = softmax(logits)
    columns = probs if kind == "marginal" else probs.max(1, keepdims=True)
    grid = np.concatenate([np.logspace(-5, -1, 15), np.linspace(0.2, 1, 5)])

    def likelihood(b):
        total = 0.0
        for x in map(with_complement, columns.T):
            kernel = dirichlet_pdf(x[:, None], x[None] / b + 1)
            np.fill_diagonal(kernel, 0)
            with np.errstate(divide="ignore"):
                total += np.log(kernel.sum(1) / ((len(x) - 1) * b)).sum()
        return total

    np.testing.assert_allclose(losses.kde_bandwidth(logits, kind), max(grid, key=likelihood), rtol=1e-12)


def test_selective_aurc_in_float32_keeps_the_digits_of_both_tails():
    logits, labels = batch(100_000, 3, scale=1.0)
    options = {"coverage": 1.0, "nu": 1e-2}
    expected = losses.selective_aurc(logits, labels, **options) / losses.cross_entropy(logits, labels)
    logits32 = logits.astype(np.float32)
    actual = losses.selective_aurc(logits32, labels, **options) / losses.cross_entropy(logits32, labels)
    edges = np.linspace(0, 1, 65)
    distance = np.abs(softmax(logits).max(1)[:, None] - edges).min(1)  # on an edge, rounding may choose the bin
    np.testing.assert_allclose(actual[distance > 1e-6], expected[distance > 1e-6], rtol=1e-5)


def test_scores_outside_the_edges_count_in_the_end_bins():
    logits, labels = batch(scale=1.0)
    score = softmax(logits).max(1)
    actual = losses.selective_aurc(logits, labels, coverage=1.0, nu=0.2, edges=[0.45, 0.5, 0.6])
    upper = (score >= 0.5).mean()
    assert score.min() < 0.45 and score.max() > 0.6

    def cdf(s):
        return (1 - upper) / (1 + np.exp((0.475 - s) / 0.2)) + upper / (1 + np.exp((0.55 - s) / 0.2))

    weight = -np.log(1 - cdf(score)) / cdf(score.max())
    np.testing.assert_allclose(actual, weight * losses.cross_entropy(logits, labels), rtol=1e-10)


def test_a_score_on_an_edge_counts_in_the_upper_bin():
    cdf = 1 / (1 + math.exp((0.75 - 0.5) / 0.1))  # both scores are 1/2; the bins' centres 1/4 and 3/4
    value = losses.selective_aurc(np.zeros((2, 2)), np.array([0, 1]), nu=0.1, edges=[0.0, 0.5, 1.0])
    np.testing.assert_allclose(value, -math.log(1 - cdf) / cdf * math.log(2), rtol=1e-12)


# Edges


def per_sample_arguments(name, n):
    return {SAMPLE_ARGUMENTS[name]: np.linspace(0, 1, n)} if name in SAMPLE_ARGUMENTS else {}


@pytest.mark.parametrize("name", LOSSES)
def test_registry_runs_with_defaults_on_any_kind_of_array(name):
    logits, labels = batch()
    extra = per_sample_arguments(name, len(labels))
    value = LOSSES[name](logits, labels, **extra)
    assert isinstance(value, np.ndarray) and value.shape == labels.shape and value.dtype == np.float64
    tensors = {key: torch.tensor(x) for key, x in extra.items()}
    as_tensor = LOSSES[name](torch.tensor(logits), torch.tensor(labels, dtype=torch.uint8), **tensors)
    np.testing.assert_array_equal(as_tensor.numpy(), value)
    assert LOSSES[name](logits[:1], labels[:1], **{k: x[:1] for k, x in extra.items()}).shape == (1,)
    for dtype in (np.float16, np.float32):
        narrow = LOSSES[name](logits.astype(dtype), labels, **extra)
        assert narrow.dtype == dtype
        np.testing.assert_allclose(narrow, value, rtol=5e-2 if dtype == np.float16 else 1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    logits, labels = (torch.tensor(x) for x in batch())
    logits = logits.float()
    extra = {key: torch.tensor(x) for key, x in per_sample_arguments(name, len(labels)).items()}
    expected = LOSSES[name](logits, labels, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(LOSSES[name](logits, labels, **extra), expected)


# Published settings that docstrings name as defaults.
DEFAULTS = {
    "label_smoothing": {"smoothing": 0.05},
    "focal": {"gamma": 2.0},
    "inverse_focal": {"gamma": 1.0},
    "dual_focal": {"gamma": 5.0, "variant": "equation"},
    "entropy_regularized": {"alpha": 0.1},
    "l1_norm": {"alpha": 0.05},
    "poly1": {"epsilon": 1.0},
    "difficulty_entropy": {"alpha": 0.3},
    "aurc": {"csf": "msp", "weighting": "harmonic"},
    "selective_aurc": {"csf": "msp", "coverage": 0.75, "nu": 0.3, "edges": np.linspace(0, 1, 65)},
    "kde_cross_entropy": {"bandwidth": None, "lam": 0.3, "p": 1, "kind": "canonical"},
    "correctness_ranking": {"csf": "msp", "strength": 1.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_published_settings(name):
    logits, labels = batch()
    extra = per_sample_arguments(name, len(labels))
    expected = LOSSES[name](logits=logits, targets=labels, **extra, **DEFAULTS[name])
    np.testing.assert_array_equal(LOSSES[name](logits, labels, **extra), expected)


LOGITS, LABELS = batch(6, 4)
NAN = np.where(np.arange(24).reshape(6, 4) == 5, np.nan, LOGITS)
WRONG = {
    "labels (n, 1)": (LOGITS, LABELS[:, None], r"targets: expected shape \(6,\), got \(6, 1\)"),
    "labels too short": (LOGITS, LABELS[:5], r"targets: expected shape \(6,\), got \(5,\)"),
    "label K": (LOGITS, np.full(6, 4), r"targets: values must lie in \[0, 4\), found 4"),
    "label -1": (LOGITS, np.full(6, -1), r"targets: .* found -1"),
    "float labels": (LOGITS, LABELS.astype(float), "targets: expected integers"),
    "logits (n,)": (LOGITS[:, 0], LABELS, r"logits: expected shape \(n, K\), got \(6,\)"),
    "one class": (LOGITS[:, :1], LABELS * 0, r"logits: .*\(6, 1\)"),
    "empty": (LOGITS[:0], LABELS[:0], "logits: is empty"),
    "nan": (NAN, LABELS, "logits: contains NaN"),
    "infinite": (np.nan_to_num(NAN, nan=-np.inf), LABELS, "logits: contains infinity"),
    "integers": (LOGITS.astype(int), LABELS, "logits: expected floats"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*LOSSES, "kde_calibration_error"])
def test_wrong_arrays_are_value_errors(name, wrong):
    logits, labels, message = WRONG[wrong]
    loss = LOSSES.get(name, losses.kde_calibration_error)
    with pytest.raises(ValueError, match=message):
        loss(logits, labels, **per_sample_arguments(name, len(logits)))


@pytest.mark.parametrize(
    ("loss", "argument"),
    [
        (losses.difficulty_entropy, "weight"),
        (losses.ranking_cross_entropy, "correctness"),
        (lambda logits, targets, correctness: losses.correctness_ranking(logits, correctness), "correctness"),
    ],
)
@pytest.mark.parametrize(
    "bad", [np.ones((6, 1)), np.ones(5), np.ones(0), np.ones((1,)), np.full(6, np.nan), -np.ones(6)]
)
def test_wrong_sample_values_are_value_errors(loss, argument, bad):
    with pytest.raises(ValueError, match=f"{argument}: "):
        loss(LOGITS, LABELS, **{argument: bad})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("label_smoothing", {"smoothing": 1.5}),
        ("focal", {"gamma": -1.0}),
        ("inverse_focal", {"gamma": math.nan}),
        ("dual_focal", {"gamma": -0.1}),
        ("dual_focal", {"variant": "paper"}),
        ("entropy_regularized", {"alpha": -1.0}),
        ("l1_norm", {"alpha": -1.0}),
        ("poly1", {"epsilon": -2.0}),
        ("difficulty_entropy", {"alpha": -1.0}),
        ("aurc", {"csf": "MSP"}),
        ("aurc", {"weighting": "linear"}),
        ("selective_aurc", {"csf": "max"}),
        ("selective_aurc", {"coverage": 0.0}),
        ("selective_aurc", {"coverage": 1.1}),
        ("selective_aurc", {"nu": 0.0}),
        ("selective_aurc", {"edges": np.array([0.0, 0.5, 0.5, 1.0])}),
        ("selective_aurc", {"edges": np.array([1.0])}),
        ("selective_aurc", {"edges": np.array([[0.0, 1.0]])}),
        ("selective_aurc", {"edges": np.array([0.0, np.inf])}),
        ("kde_cross_entropy", {"bandwidth": 0.0}),
        ("kde_cross_entropy", {"p": 0.5}),
        ("kde_cross_entropy", {"lam": -1.0}),
        ("kde_cross_entropy", {"kind": "binary"}),
        ("correctness_ranking", {"csf": "softmax"}),
        ("correctness_ranking", {"strength": -1.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_options_are_value_errors(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: "):
        LOSSES[name](LOGITS, LABELS, **per_sample_arguments(name, 6), **options)


def test_correctness_must_be_normalised():
    with pytest.raises(ValueError, match="correctness: must lie in"):
        losses.correctness_ranking(LOGITS, np.arange(6))


def test_leave_one_out_needs_two_samples():
    for function in (losses.kde_calibration_error, lambda logits, _: losses.kde_bandwidth(logits)):
        with pytest.raises(ValueError, match="logits: leave-one-out needs at least 2 samples"):
            function(LOGITS[:1], LABELS[:1])
