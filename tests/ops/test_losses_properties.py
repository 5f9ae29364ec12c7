"""What must hold of every loss, whatever the batch (hypothesis)."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ops import losses
from ops.losses import LOSSES, SAMPLE_ARGUMENTS, confidence_score

CSF = ["msp", "entropy", "margin"]
VARIANTS = [
    *((name, {}) for name in LOSSES),
    *(("focal", {"gamma": g}) for g in (0.0, 0.5, 1.0, 7.0)),
    ("inverse_focal", {"gamma": 0.5}),
    *(("dual_focal", {"gamma": g, "variant": v}) for g in (0.5, 2.0) for v in ("equation", "released")),
    *((name, {"csf": csf}) for name in ("aurc", "selective_aurc", "correctness_ranking") for csf in CSF[1:]),
    ("aurc", {"weighting": "log"}),
    ("selective_aurc", {"nu": 1e-7, "coverage": 1.0}),
    ("selective_aurc", {"nu": 1e-7, "coverage": 0.01}),
    *(
        ("kde_cross_entropy", {"kind": k, "bandwidth": b, "p": 1.5})
        for k in ("marginal", "top_label")
        for b in (1e-3, 1)
    ),
]
some = settings(max_examples=10, deadline=None, derandomize=True)


def draw_batch(seed, n, k, scale, saturated):
    """Logits within ±1e4; with `saturated` most rows have probabilities of exactly 0 and 1, or exact ties."""
    rng = np.random.default_rng(seed)
    logits = np.clip(scale * rng.standard_normal((n, k)), -1e4, 1e4)
    if saturated:
        rows = rng.random(n) < 0.7
        logits[rows] = rng.choice([-1e4, 0.0, 1e4], (n, k))[rows]
    return logits, rng.integers(0, k, n), np.round(rng.random(n), 1)


batches = st.builds(
    draw_batch,
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(2, 7),
    st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    st.booleans(),
)
mild = st.builds(
    draw_batch, st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 7), st.just(1.5), st.just(False)
)


def call(name, logits, targets, extra, **options):
    """LOSSES[name] with the one more value per sample that it may want."""
    if name in SAMPLE_ARGUMENTS:
        options[SAMPLE_ARGUMENTS[name]] = torch.as_tensor(extra)
    return LOSSES[name](logits, torch.as_tensor(targets), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@some
@given(batches)
def test_finite_with_finite_gradients(name, options, dtype, drawn):
    logits, targets, extra = drawn
    logits = torch.tensor(logits, dtype=dtype, requires_grad=True)
    value = call(name, logits, targets, extra, **options)
    value.mean().backward()
    assert value.shape == (len(targets),) and value.dtype == dtype
    assert torch.isfinite(value).all(), value
    assert torch.isfinite(logits.grad).all(), logits.grad


def central_difference(function, logits, direction, step=1e-6):
    with torch.no_grad():
        return float(function(logits + step * direction) - function(logits - step * direction)) / (2 * step)


def check_gradient(function, logits, seed):
    """The gradient along a random direction against a central difference (float64)."""
    logits = torch.tensor(logits, requires_grad=True)
    direction = torch.tensor(np.random.default_rng(seed).standard_normal(logits.shape))
    (gradient,) = torch.autograd.grad(function(logits), logits)
    expected = central_difference(function, logits.detach(), direction)
    np.testing.assert_allclose(float((gradient * direction).sum()), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options"),
    [v for v in VARIANTS if v[0] not in ("selective_aurc", "au") and "bandwidth" not in v[1]]
    + [("kde_cross_entropy", {"kind": k, "bandwidth": 0.2, "p": 1.5}) for k in ("canonical", "marginal", "top_label")],
    ids=str,
)
@some
@given(mild)
def test_gradient_by_finite_differences(name, options, drawn):
    logits, targets, extra = drawn
    if name.startswith("kde"):
        options = {"bandwidth": 0.2} | options  # the choice among twenty widths is a step function
    check_gradient(lambda x: call(name, x, targets, extra, **options).mean(), logits, len(targets))


def selective_oracle(logits, targets, score, edges, histogram, tau, nu):
    """Zhou et al., eq. 19–23 as printed, with the histogram and τ given: they are constants of the gradient."""
    centres = (edges[1:] + edges[:-1]) / 2

    def cdf(s):
        return (histogram * torch.sigmoid((s[:, None] - centres) / nu)).sum(1) / len(logits)

    weight = torch.where(score < tau, -torch.log(1 - cdf(score)), -torch.log(1 - cdf(tau[None]))) / cdf(tau[None])
    return weight * torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@some
@given(mild, st.sampled_from(CSF), st.floats(0.05, 1.0), st.floats(0.02, 0.5), st.integers(1, 40))
def test_selective_aurc_is_the_equation_and_so_is_its_gradient(drawn, csf, coverage, nu, bins):
    logits, targets = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    score = confidence_score(logits.log_softmax(1), csf)
    tau = torch.quantile(score, coverage)
    histogram = torch.tensor(np.histogram(score, edges)[0])

    def frozen(x):
        return selective_oracle(x, targets, confidence_score(x.log_softmax(1), csf), edges, histogram, tau, nu)

    actual = losses.selective_aurc(logits, targets, csf, coverage, nu, edges)
    np.testing.assert_allclose(actual, frozen(logits), rtol=1e-9)
    assume(float((score - tau).abs().min()) == 0 or float((score - tau).abs().min()) > 1e-4)
    x = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.selective_aurc(x, targets, csf, coverage, nu, edges).mean(), x)
    (expected,) = torch.autograd.grad(frozen(x).mean(), x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.sampled_from(CSF))
def test_selective_aurc_with_coverage_one_and_a_bin_per_sample_ranks(seed, n, csf):
    """Below the top rank its weights are −C ln(1 − Ĝ), Ĝ the empirical CDF at the bin centres."""
    logits, targets, _ = draw_batch(seed, n, 5, 1.5, False)
    score = confidence_score(torch.tensor(logits).log_softmax(1), csf).numpy()
    ordered = np.sort(score)
    share = np.random.default_rng(seed).uniform(0.1, 0.9, n + 1)
    around = np.concatenate([[ordered[0] - 0.1], ordered, [ordered[-1] + 0.1]])
    edges = around[:-1] + share * np.diff(around)  # between any two neighbours: one sample in each bin
    centres = (edges[1:] + edges[:-1]) / 2
    clearance = np.abs(score[:, None] - centres).min()
    assume(clearance > 1e-8)

    value = losses.selective_aurc(logits, targets, csf, coverage=1.0, nu=clearance / 40, edges=edges)
    weight = value / losses.cross_entropy(logits, targets)
    empirical = (centres <= score[:, None]).mean(axis=1)
    below = score < score.max()
    at_tau = empirical[~below][0]
    assert np.isfinite(value).all() and below.sum() == n - 1
    np.testing.assert_allclose(weight[below], -np.log(1 - empirical[below]) / at_tau, rtol=1e-9, atol=1e-12)
    assert (weight[~below] >= weight[below].max() - 1e-9).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("label_smoothing", {"smoothing": 0.0}),
        ("focal", {"gamma": 0.0}),
        ("inverse_focal", {"gamma": 0.0}),
        ("dual_focal", {"gamma": 0.0}),
        ("dual_focal", {"gamma": 0.0, "variant": "released"}),
        ("entropy_regularized", {"alpha": 0.0}),
        ("l1_norm", {"alpha": 0.0}),
        ("poly1", {"epsilon": 0.0}),
        ("kde_cross_entropy", {"lam": 0.0}),
        ("difficulty_entropy", {}),
        ("correctness_ranking", {"strength": 0.0}),
    ],
    ids=str,
)
@some
@given(batches)
def test_switched_off_it_is_cross_entropy(name, options, drawn):
    logits, targets, _ = drawn
    nothing = np.zeros(len(targets))
    x, y = (torch.tensor(logits, requires_grad=True) for _ in range(2))
    value, expected = call(name, x, targets, nothing, **options), losses.cross_entropy(y, torch.tensor(targets))
    value.mean().backward()
    expected.mean().backward()
    np.testing.assert_allclose(value.detach(), expected.detach(), rtol=1e-14)
    np.testing.assert_allclose(x.grad, y.grad, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", [n for n in LOSSES if SAMPLE_ARGUMENTS.get(n) != "correctness"])
@some
@given(mild)
def test_order_of_the_batch_does_not_matter(name, drawn):
    logits, targets, extra = drawn
    order = np.random.default_rng(len(targets)).permutation(len(targets))
    value = call(name, torch.tensor(logits), targets, extra)
    permuted = call(name, torch.tensor(logits[order]), targets[order], extra[order])
    np.testing.assert_allclose(permuted, value[order], rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "l1_norm"])
@some
@given(mild)
def test_a_constant_added_to_a_row_of_logits_does_not_matter(name, drawn):
    logits, targets, extra = drawn
    value = call(name, torch.tensor(logits), targets, extra)
    shifted = call(name, torch.tensor(logits + np.arange(len(targets))[:, None]), targets, extra)
    np.testing.assert_allclose(shifted, value, rtol=1e-9)


@some
@given(batches, st.sampled_from(CSF))
def test_confidence_lies_in_the_unit_interval(drawn, csf):
    score = confidence_score(torch.tensor(drawn[0]).log_softmax(1), csf)
    assert score.min() >= -1e-12 and score.max() <= 1 + 1e-12


def au_gradient_parts(nu):
    """Norms of the gradient of AU's weighted cross entropy and of its weights, at a new classifier's logits."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(0.3 * rng.standard_normal((512, 10))).requires_grad_()
    targets = torch.from_numpy(rng.integers(0, 10, 512))
    own = losses.cross_entropy(logits, targets)
    value = losses.selective_aurc(logits, targets, **nu)
    constant_weights = ((value / own).detach() * own).mean()
    (full,) = torch.autograd.grad(value.mean(), logits, retain_graph=True)
    (weighted,) = torch.autograd.grad(constant_weights, logits)
    return float(weighted.norm()), float((full - weighted).norm())


def test_selective_aurc_by_default_teaches_a_new_classifier_more_than_it_lowers_its_confidence():
    weighted, of_weights = au_gradient_parts({})
    assert of_weights < 0.8 * weighted
    weighted, of_weights = au_gradient_parts({"nu": 0.05})
    assert of_weights > 2 * weighted, "then it is the other way round, and it learns nothing"
