"""ops.groupdro against golden cases, empirical risk, and itself on two ranks."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional

from ops.groupdro import GroupDRO
from tests.ops.golden import cases


def of_case(case, **options):
    p = case.params
    return GroupDRO(p["group_counts"], p["step_size"], p["adj"] or 0.0, p["normalize_loss"], **options)


@pytest.mark.filterwarnings("ignore:adjustment")
@pytest.mark.parametrize("case", cases("group_dro.npz"), ids=repr)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-5, 1e-6)])
def test_golden_steps(case, dtype, rtol, atol):
    dro, close = of_case(case), {"rtol": rtol, "atol": atol}
    for step, groups in enumerate(torch.from_numpy(case.inputs["groups"])):
        logits = torch.from_numpy(case.inputs["logits"][step]).to(dtype).requires_grad_()
        losses = functional.cross_entropy(logits, torch.from_numpy(case.inputs["labels"][step]), reduction="none")
        dro.statistics.reset()
        loss = dro.loss(losses, groups)
        loss.backward()
        np.testing.assert_allclose(loss.item(), case.outputs["robust_loss"][step], **close)
        np.testing.assert_allclose(logits.grad, case.outputs["grad_logits"][step], **close)
        np.testing.assert_allclose(dro.weights, case.outputs["q_after_step"][step], **close)
        np.testing.assert_allclose(dro.statistics.mean_loss.nan_to_num(), case.outputs["group_loss"][step], **close)
        # the reference takes its memory of 0.1 in float32
        np.testing.assert_allclose(
            dro.statistics.running_loss, case.outputs["exp_avg_loss"][step], rtol=max(rtol, 1e-8)
        )


def batches(steps=5, n=40, num_groups=3, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.exponential(size=n), rng.integers(0, num_groups, n)) for _ in range(steps)]


def test_one_group_is_the_mean():
    dro = GroupDRO([100], step_size=0.5)
    for losses, _ in batches():
        found = dro.loss(losses, np.zeros(40, int))
        assert isinstance(found, np.float64) and found == pytest.approx(losses.mean(), rel=1e-12)
    assert dro.weights.tolist() == [1.0]


def test_step_size_zero_weighs_groups_alike():
    dro = GroupDRO([10, 10, 10], step_size=0.0)
    for losses, groups in batches():
        expected = np.mean([losses[groups == g].mean() for g in range(3)])
        assert dro.loss(losses, groups) == pytest.approx(expected, rel=1e-12)


def test_weights_move_to_the_worst_group_and_survive_huge_losses():
    dro = GroupDRO([10, 10, 10], step_size=1.0)
    losses, groups = np.array([1e4, 1.0, 2.0]), np.array([0, 1, 2])
    assert dro.loss(losses, groups) == pytest.approx(1e4)
    dro.loss(losses[::-1].copy(), groups)
    dro.loss(losses[::-1].copy(), groups)
    assert dro.weights[2] > 0.999 and torch.isfinite(dro.weights).all()


def test_an_absent_group_keeps_its_weight_relative_to_losses_of_zero():
    dro = GroupDRO([10, 10, 10], step_size=0.1)
    dro.loss(np.array([1.0, 2.0]), np.array([0, 1]))
    q = np.exp([0.1, 0.2, 0.0])
    np.testing.assert_allclose(dro.weights, q / q.sum(), rtol=1e-12)
    assert np.isnan(dro.statistics.mean_loss[2])


def test_the_adjustment_is_in_the_loss_but_not_in_the_reported_losses():
    dro = GroupDRO([4, 16], step_size=0.0, adjustment=[1.0, 2.0])
    assert dro.loss(np.array([1.0, 3.0]), np.array([0, 1])) == pytest.approx(2 + 0.5)
    assert dro.statistics.mean_loss.tolist() == [1.0, 3.0]


def test_a_zero_among_adjustments_is_said_aloud():
    with pytest.warns(UserWarning, match="turns it off for all groups"):
        assert not GroupDRO([4, 16], adjustment=[0.0, 2.0]).margins.any()


def test_statistics_over_an_epoch():
    dro, data = GroupDRO([50, 50, 50]), batches()
    correct = [np.arange(40) % 3 == 0 for _ in data]
    for (losses, groups), right in zip(data, correct):
        dro.loss(losses, groups, right)
    losses, groups, right = (
        np.concatenate([d[0] for d in data]),
        np.concatenate([d[1] for d in data]),
        np.concatenate(correct),
    )
    for g in range(3):
        assert dro.statistics.mean_loss[g] == pytest.approx(losses[groups == g].mean())
        assert dro.statistics.accuracy[g] == pytest.approx(right[groups == g].mean())
    assert dro.statistics.counts.tolist() == np.bincount(groups).tolist()
    dro.statistics.reset()
    assert not dro.statistics.counts.any() and dro.statistics.running_loss.all()


def test_a_checkpoint_goes_on_as_if_nothing_had_happened():
    through, first = GroupDRO([50, 60, 70], adjustment=1.0), GroupDRO([50, 60, 70], adjustment=1.0)
    data = batches(6)
    for step in data[:3]:
        through.loss(*step), first.loss(*step)
    resumed = GroupDRO([50, 60, 70], adjustment=1.0)
    resumed.load_state_dict(first.state_dict())
    first.loss(*data[0])  # must not reach into the state that was given
    for step in data[3:]:
        assert through.loss(*step) == resumed.loss(*step)
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"log_weights.*expected shape \(2,\), got \(3,\)"):
        GroupDRO([1, 2]).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="seen is missing"):
        first.load_state_dict({k: v for k, v in first.state_dict().items() if k != "seen"})


class Ranks:
    """Sums tensors over threads that stand for ranks."""

    def __init__(self, count):
        self.slots, self.barrier = [None] * count, threading.Barrier(count, timeout=20)

    def reduce_on(self, rank):
        def reduce(tensor):
            self.slots[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.slots).sum(dim=0)
            self.barrier.wait()
            return total

        return reduce


@pytest.mark.parametrize("case", cases("group_dro.npz", "adjusted_per_group"), ids=repr)
def test_two_ranks_of_unequal_batches_are_one(case):
    """Values and weights equal the single process's on each rank, and so does the mean of the gradients."""
    ranks, parts, found = Ranks(2), (slice(0, 11), slice(11, 32)), {}
    whole = of_case(case)

    def train(rank):
        dro = of_case(case, reduce=ranks.reduce_on(rank))
        for step in range(6):
            logits = torch.from_numpy(case.inputs["logits"][step][parts[rank]]).requires_grad_()
            labels = torch.from_numpy(case.inputs["labels"][step][parts[rank]])
            losses = functional.cross_entropy(logits, labels, reduction="none")
            loss = dro.loss(losses, torch.from_numpy(case.inputs["groups"][step][parts[rank]]))
            loss.backward()
            found[rank, step] = (loss.item(), logits.grad.numpy(), dro.weights, dro.statistics.mean_loss)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for step in range(6):
        losses = functional.cross_entropy(
            torch.from_numpy(case.inputs["logits"][step]),
            torch.from_numpy(case.inputs["labels"][step]),
            reduction="none",
        )
        whole.loss(losses, torch.from_numpy(case.inputs["groups"][step]))
        for rank in range(2):
            loss, _, weights, means = found[rank, step]
            assert loss == pytest.approx(case.outputs["robust_loss"][step], rel=1e-10)
            np.testing.assert_allclose(weights, case.outputs["q_after_step"][step], rtol=1e-10)
            np.testing.assert_allclose(means, whole.statistics.mean_loss, rtol=1e-10)
        # each parameter's gradient after averaging: here every logit lives on one rank and gets 0 from the other
        gradient = np.concatenate([found[rank, step][1] for rank in range(2)]) / 2
        np.testing.assert_allclose(gradient, case.outputs["grad_logits"][step], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_floats(dtype):
    losses, groups = batches(1)[0]
    x = torch.tensor(losses, dtype=dtype, requires_grad=True)
    loss = GroupDRO([10, 10, 10]).loss(x, torch.from_numpy(groups))
    loss.backward()
    exact = GroupDRO([10, 10, 10]).loss(x.detach().double(), torch.from_numpy(groups))
    assert loss.dtype == dtype and loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert torch.isfinite(x.grad).all()


def test_any_mixture_of_arrays_tensors_and_lists():
    losses, groups = batches(1)[0]
    expected = GroupDRO([10, 10, 10]).loss(losses, groups)
    for x in (losses, losses.tolist(), torch.from_numpy(losses)):
        for g in (groups, groups.tolist(), torch.from_numpy(groups).to(torch.uint8)):
            found = GroupDRO((10, 10, 10)).loss(x, g, correct=groups > 0)
            assert isinstance(found, torch.Tensor) == isinstance(x, torch.Tensor)
            assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_bad_arguments_are_named():
    dro, losses, groups = GroupDRO([5, 5]), np.ones(4), np.array([0, 1, 0, 1])
    for message, function in [
        (r"per_sample_losses: expected shape \(n,\), got \(4, 1\)", lambda: dro.loss(losses[:, None], groups)),
        (r"groups: expected shape \(4,\), got \(4, 1\)", lambda: dro.loss(losses, groups[:, None])),
        (r"groups: values must lie in \[0, 2\), found 2", lambda: dro.loss(losses, groups + 1)),
        (r"groups: values must lie in \[0, 2\), found -1", lambda: dro.loss(losses, groups - 1)),
        ("groups: expected integers", lambda: dro.loss(losses, groups * 0.5)),
        ("per_sample_losses: contains NaN", lambda: dro.loss(losses * np.nan, groups)),
        ("per_sample_losses: contains infinity", lambda: dro.loss(losses + np.inf, groups)),
        ("per_sample_losses: is empty", lambda: dro.loss(losses[:0], groups[:0])),
        (r"correct: expected shape \(4,\)", lambda: dro.loss(losses, groups, groups[:3])),
        (r"group_counts: expected shape \(n,\)", lambda: GroupDRO(5)),
        ("group_counts: must not be negative", lambda: GroupDRO([5, -1])),
        ("group_counts: group 1 has no sample", lambda: GroupDRO([5, 0], adjustment=1.0)),
        (r"adjustment: expected shape \(2,\), got \(3,\)", lambda: GroupDRO([5, 5], adjustment=[1.0, 1.0, 1.0])),
        ("adjustment: must not be negative", lambda: GroupDRO([5, 5], adjustment=-1.0)),
        ("step_size: must", lambda: GroupDRO([5, 5], step_size=-0.1)),
    ]:
        with pytest.raises(ValueError, match=message):
            function()
    assert dro.weights.tolist() == [0.5, 0.5]
