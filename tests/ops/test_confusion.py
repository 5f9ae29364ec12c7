"""ops.confusion against golden cases, a naive loop, and any order of updates."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from ops import confusion
from ops.confusion import ConfusionScore, entropy_of_mean, epoch_entropies
from tests.ops.golden import cases


def golden_probs(case):
    return softmax(case.inputs["logits_epoch_member_sample_class"], axis=-1)


@pytest.mark.parametrize("case", cases("scores_confusion.npz"), ids=repr)
def test_golden_score(case):
    probs = golden_probs(case)
    score = ConfusionScore(probs.shape[2])
    for epoch, nats in zip(probs, case.outputs["entropy_per_epoch_nats"]):
        np.testing.assert_allclose(entropy_of_mean(epoch), nats / np.log(2), rtol=1e-12, atol=1e-14)
        score.update(epoch, np.arange(probs.shape[2]))
    np.testing.assert_allclose(score.score(), case.outputs["score_bits"], rtol=1e-12, atol=1e-14)
    per_epoch = case.outputs["entropy_per_epoch_nats"] / np.log(2)
    np.testing.assert_allclose(score.spread(), per_epoch.std(axis=0), rtol=1e-9, atol=1e-12)
    assert (score.epochs == len(probs)).all()


def random_probs(epochs=4, members=3, n=12, k=5, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.3), size=(epochs, members, n))


def naive(probs):
    """Eq. 1-3 sample by sample, in bits."""
    epochs, members, n, k = probs.shape
    scores = []
    for i in range(n):
        entropies = []
        for t in range(epochs):
            p = [sum(probs[t, m, i, j] for m in range(members)) / members for j in range(k)]
            entropies.append(-sum(x * math.log2(x) for x in p if x > 0))
        scores.append(sum(entropies) / epochs)
    return np.array(scores)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 4))
def test_any_subset_in_any_order_on_any_number_of_parts(random, pieces, parts):
    probs = random_probs()
    jobs = [(t, rows) for t in range(4) for rows in np.array_split(np.arange(12), pieces)]
    random.shuffle(jobs)
    scores = [ConfusionScore(12) for _ in range(parts)]
    for i, (t, rows) in enumerate(jobs):
        scores[i % parts].update(probs[t][:, rows], rows)
    merged = ConfusionScore(12)
    for score in scores:
        merged = merged.merge(pickle.loads(pickle.dumps(score)))
    entropies = np.stack([entropy_of_mean(p) for p in probs])
    np.testing.assert_allclose(merged.score(), naive(probs), rtol=1e-12)
    np.testing.assert_allclose(merged.spread(), entropies.std(axis=0), rtol=1e-9)
    assert (merged.epochs == 4).all()


def test_rows_may_have_different_numbers_of_epochs():
    probs = random_probs()
    score = ConfusionScore(12)
    score.update(probs[0], np.arange(12))
    score.update(probs[1][:, 3:5], np.array([3, 4]))
    np.testing.assert_allclose(score.score([3])[0], naive(probs[:2, :, 3:4])[0], rtol=1e-12)
    np.testing.assert_allclose(score.score()[:3], naive(probs[:1])[:3], rtol=1e-12)
    assert score.spread()[0] == 0 and score.epochs[3] == 2


def test_members_are_averaged_before_the_entropy():
    """Two certain members that disagree are one bit apart, though each alone has no entropy."""
    probs = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    score = ConfusionScore(1)
    score.update(probs, np.array([0]))
    assert score.score().tolist() == [1.0]
    score = ConfusionScore(1)
    score.update(probs[:1], np.array([0]))
    assert score.score().tolist() == [0.0]


def test_uniform_probabilities_have_log2_k_bits():
    for k in (1, 2, 1000):
        assert entropy_of_mean(np.full((2, 3, k), 1 / k)) == pytest.approx(np.log2(k))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 1e-2), (torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)],
)
def test_tensors_in_tensors_out(dtype, tolerance):
    probs = random_probs()
    score = ConfusionScore(12)
    for epoch in torch.from_numpy(probs).to(dtype):
        score.update(epoch.requires_grad_(), torch.arange(12))
    assert isinstance(score.score(), torch.Tensor) and not score.score().requires_grad
    np.testing.assert_allclose(score.score(), naive(probs), rtol=tolerance, atol=tolerance)
    score.update(probs[0].astype(np.float16), np.arange(12))
    assert isinstance(score.score(), np.ndarray)


def test_lists_are_taken():
    score = ConfusionScore(2)
    score.update([[[0.5, 0.5], [1.0, 0.0]]], [1, 0])
    assert score.score().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("case", cases("scores_confusion.npz"), ids=repr)
def test_entropies_are_the_golden_ones_in_bits(case):
    logits = torch.from_numpy(case.inputs["logits_epoch_member_sample_class"]).permute(2, 0, 1, 3)
    expected = case.outputs["entropy_per_epoch_nats"] / np.log(2)
    expected = expected if expected.shape == tuple(logits.shape[:2]) else expected.T
    np.testing.assert_allclose(epoch_entropies(logits), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(epoch_entropies(logits.float()), expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(epoch_entropies(logits).mean(dim=1), case.outputs["score_bits"], rtol=1e-10, atol=1e-12)


def test_entropy_is_between_nothing_and_log2_k_and_members_that_disagree_confuse():
    sure = torch.full((1, 1, 2, 4), -1e4)
    sure[..., 0] = 1e4
    torch.testing.assert_close(epoch_entropies(sure), torch.zeros(1, 1))
    torch.testing.assert_close(epoch_entropies(torch.zeros(1, 1, 2, 4)), torch.full((1, 1), 2.0))
    sure[0, 0, 1] = sure[0, 0, 1].roll(1)  # two sure members of different opinion: one bit
    torch.testing.assert_close(epoch_entropies(sure), torch.ones(1, 1))


def test_blocked_equals_unblocked(monkeypatch):
    probs = random_probs()[0]
    whole = entropy_of_mean(probs)
    monkeypatch.setattr(confusion, "BLOCK_VALUES", 11)
    np.testing.assert_allclose(entropy_of_mean(probs), whole, rtol=1e-14)


def test_samples_never_updated_are_counted():
    score = ConfusionScore(12)
    score.update(random_probs()[0][:, :5], np.arange(5))
    with pytest.raises(ValueError, match="score: 7 of 12 samples were never updated"):
        score.score()
    assert score.score(np.arange(5)).shape == (5,)


def test_bad_arguments_are_named_and_nothing_is_added():
    score, probs, rows = ConfusionScore(12), random_probs()[0], np.arange(12)
    for message, p, r in [
        (r"probs: expected shape \(M, n, K\), got \(12, 5\)", probs[0], rows),
        ("probs: is empty", probs[:0], rows),
        (r"rows: expected shape \(12,\), got \(12, 1\)", probs, rows[:, None]),
        (r"rows: expected shape \(12,\), got \(11,\)", probs, rows[:11]),
        (r"rows: values must lie in \[0, 12\), found 12", probs, rows + 1),
        (r"rows: values must lie in \[0, 12\), found -1", probs, rows - 1),
        ("rows: 11 of 12 are given twice", probs, rows * 0),
        ("rows: expected integers", probs, rows * 1.0),
        ("probs: contains NaN", probs * np.nan, rows),
        ("probs: probabilities must lie in", np.log(probs), rows),
        ("probs: each row must sum to 1", probs / 2, rows),
    ]:
        with pytest.raises(ValueError, match=message):
            score.update(p, r)
    assert not score.epochs.any()
    with pytest.raises(ValueError, match="over 3 samples"):
        score.merge(ConfusionScore(3))
    with pytest.raises(ValueError, match="num_samples"):
        ConfusionScore(0)
