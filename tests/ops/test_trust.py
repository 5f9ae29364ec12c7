"""ops.trust against golden cases, values and gradients, and at the extremes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.trust import TRUST_LOSSES, signed_distance, steep_slope, tcp, trust_cross_entropy, trust_focal
from tests.ops.golden import cases


def compute(case, z):
    correct = torch.from_numpy(case.inputs["o"])
    if case.name.startswith("steep_slope"):
        return steep_slope(z, correct, case.params["alpha_pos"], case.params["alpha_neg"])
    if case.name == "binary_ce":
        return trust_cross_entropy(z, correct)
    if case.name == "binary_focal_g2":
        return trust_focal(z, correct, case.params["gamma"])
    return tcp(z, torch.from_numpy(case.outputs["target"]))


LOSSES = [case for case in cases("loss_trust.npz") if case.name != "signed_distance"]


@pytest.mark.parametrize("case", LOSSES, ids=repr)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-11), (torch.float32, 2e-5, 1e-6)])
def test_golden_losses_and_gradients(case, dtype, rtol, atol):
    z = torch.from_numpy(case.inputs["z"]).to(dtype).requires_grad_()
    loss = compute(case, z)
    np.testing.assert_allclose(
        loss.detach(), case.outputs["per_sample"], rtol=rtol, atol=atol if dtype == torch.float32 else 0
    )
    if "mean" in case.outputs:
        loss.mean().backward()
        np.testing.assert_allclose(loss.mean().item(), case.outputs["mean"], rtol=rtol)
        np.testing.assert_allclose(
            z.grad, case.outputs["grad_of_mean"], rtol=rtol if dtype == torch.float32 else 0, atol=atol
        )


@pytest.mark.parametrize("case", cases("loss_trust.npz", "signed_distance"), ids=repr)
def test_golden_signed_distance(case):
    features, weight, bias = case.inputs["features"], case.inputs["w"], case.inputs["b"]
    for b in (bias, float(bias), bias.reshape(1)):
        np.testing.assert_allclose(signed_distance(features, weight, b), case.outputs["z_eq7"], rtol=1e-12)
    np.testing.assert_allclose(
        signed_distance(3 * features, 7 * weight, 21 * bias), 3 * case.outputs["z_eq7"], rtol=1e-12
    )


def test_tcp_target_of_the_golden_case_is_the_true_class():
    case = cases("loss_trust.npz", "tcp")[0]
    probs = torch.softmax(torch.from_numpy(case.inputs["classifier_logits"]), dim=1)
    target = probs[torch.arange(len(probs)), torch.from_numpy(case.inputs["labels"])]
    np.testing.assert_allclose(target, case.outputs["target"], rtol=1e-12)


def call(name, z, correct):
    return TRUST_LOSSES[name](z, correct.to(z.dtype) if name == "tcp" else correct)


@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.booleans()), min_size=1, max_size=20),
    st.sampled_from(sorted(TRUST_LOSSES)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_losses_and_gradients_are_finite_and_not_negative(pairs, name, dtype):
    z = torch.tensor([p[0] for p in pairs], dtype=dtype).requires_grad_()
    loss = call(name, z, torch.tensor([p[1] for p in pairs]))
    loss.sum().backward()
    assert loss.dtype == dtype and loss.shape == z.shape
    assert torch.isfinite(loss).all() and (loss >= 0).all() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", sorted(TRUST_LOSSES))
def test_gradients_by_finite_differences(name):
    z = torch.tensor([-3.0, -0.5, 0.2, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: call(name, x, torch.tensor([1, 0, 1, 0])), (z,))


@pytest.mark.parametrize("name", sorted(TRUST_LOSSES))
def test_correct_predictions_are_pulled_up_and_wrong_ones_down(name):
    z = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    call(name, z, torch.tensor([True, False])).sum().backward()
    assert z.grad[0] < 0 < z.grad[1]


def test_steep_slope_keeps_its_digits_in_the_tail():
    z = torch.tensor([1e4, 1e6], dtype=torch.float64)
    expected = steep_slope(z, torch.ones(2), 1.0, 3.0)
    np.testing.assert_allclose(steep_slope(z.float(), torch.ones(2), 1.0, 3.0), expected, rtol=1e-6)
    np.testing.assert_allclose(expected, np.exp(-1.0) / (1 + z), rtol=1e-4)


def test_focal_with_gamma_zero_is_cross_entropy():
    z, correct = np.linspace(-5, 5, 11), np.arange(11) % 2
    np.testing.assert_allclose(trust_focal(z, correct, 0.0), trust_cross_entropy(z, correct), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(TRUST_LOSSES))
def test_bad_arguments_are_named(name):
    loss, z, correct = TRUST_LOSSES[name], np.zeros(4), np.ones(4)
    second = "true_class_prob" if name == "tcp" else "correct"
    for message, a, b in [
        (r"z: expected shape \(n,\), got \(4, 1\)", z[:, None], correct),
        (rf"{second}: expected shape \(4,\), got \(4, 1\)", z, correct[:, None]),
        (rf"{second}: expected shape \(4,\), got \(3,\)", z, correct[:3]),
        (rf"{second}: ", z, correct + 1),
        (rf"{second}: contains NaN", z, correct * np.nan),
        ("z: contains NaN", z * np.nan, correct),
        ("z: contains infinity", z + np.inf, correct),
        ("z: is empty", z[:0], correct[:0]),
        ("z: expected floats", z.astype(int), correct),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(a, b)


def test_bad_parameters_are_named():
    z = np.zeros(3)
    for message, function in [
        ("alpha_pos: must", lambda: steep_slope(z, z, 0.0, 1.0)),
        ("alpha_neg: must", lambda: steep_slope(z, z, 1.0, -1.0)),
        ("gamma: must", lambda: trust_focal(z, z, -1.0)),
        ("weight: its norm", lambda: signed_distance(np.ones((3, 2)), np.zeros(2), 0.0)),
        (
            r"weight: expected shape \(2,\), got \(2, 1\)",
            lambda: signed_distance(np.ones((3, 2)), np.ones((2, 1)), 0.0),
        ),
        (r"bias: expected one number, got shape \(3,\)", lambda: signed_distance(np.ones((3, 2)), np.ones(2), z)),
        (r"features: expected shape \(n, d\)", lambda: signed_distance(z, np.ones(2), 0.0)),
    ]:
        with pytest.raises(ValueError, match=message):
            function()


def test_steep_slope_keeps_float64_for_slopes_that_float32_rounds():
    z, correct = np.linspace(-4, 4, 17), np.arange(17) % 2
    expected = np.where(
        correct == 1,
        np.exp(-0.7 * z / (1 + np.abs(z))) - np.exp(-0.7),
        np.exp(2.3 * z / (1 + np.abs(z))) - np.exp(-2.3),
    )
    np.testing.assert_allclose(steep_slope(z, correct, 0.7, 2.3), expected, rtol=1e-12)


@pytest.mark.parametrize(("features", "weight", "bias"), [
    (np.array([[1.0, np.nan]]), np.ones(2), 0.0),
    (np.ones((1, 2)), np.array([1.0, np.inf]), 0.0),
    (np.ones((1, 2)), np.ones(2), np.nan),
])  # fmt: skip
def test_signed_distance_refuses_what_is_not_finite(features, weight, bias):
    with pytest.raises(ValueError):
        signed_distance(features, weight, bias)
