"""Label quality against a naive posterior, and cleanlab's convention: in [0, 1], lower = worse."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import multivariate_normal

from ops.gaussian import GaussianStats
from ops.label_quality import label_quality_of_margin, normalized_margin


def test_quality_of_the_margin_is_the_posterior_of_two_gaussians():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    features = rng.normal(size=(200, 3)) + 1.5 * labels[:, None]
    gaussians = GaussianStats(2, 3).update(features, labels).fit()
    margin = gaussians.scores(features, labels).margin
    within = sum(
        (features[labels == c] - gaussians.class_means[c]).T @ (features[labels == c] - gaussians.class_means[c])
        for c in (0, 1)
    )
    densities = np.stack(
        [multivariate_normal(gaussians.class_means[c], within / 200).pdf(features) for c in (0, 1)], axis=1
    )
    expected = densities[np.arange(200), labels] / densities.sum(axis=1)
    np.testing.assert_allclose(label_quality_of_margin(margin), expected, rtol=1e-4)


def test_half_is_where_another_class_begins_to_be_nearer_and_nan_stays():
    quality = label_quality_of_margin(np.array([-1e6, -1, 0, 1, 1e6, np.nan], np.float32))
    assert quality[0] == 1 and quality[1] > 0.5 and quality[2] == 0.5 and quality[3] < 0.5 and quality[4] == 0
    assert np.isnan(quality[5])


def test_normalized_margin_is_that_of_each_sample():
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.normal(size=(50, 4)), rng.integers(-1, 4, 50)
    found = normalized_margin(logits, labels)
    for row, label in enumerate(labels):
        probs = softmax(logits[row])
        if label < 0:
            assert np.isnan(found[row])
        else:
            assert found[row] == pytest.approx((probs[label] - np.delete(probs, label).max() + 1) / 2)
            assert (found[row] < 0.5) == (probs.argmax() != label)
    with pytest.raises(ValueError, match=r"labels: expected values below 4.*found up to 4"):
        normalized_margin(logits, np.full(50, 4))
    with pytest.raises(ValueError, match=r"labels: .*found up to 3, shape \(49,\)"):
        normalized_margin(logits, labels[1:])
    with pytest.raises(ValueError, match=r"logits: expected shape \(n, K\) with K >= 2"):
        normalized_margin(logits[:, :1], labels)


def test_tensors_in_tensors_out_and_none_of_none():
    rng = np.random.default_rng(2)
    logits, labels = torch.from_numpy(rng.normal(size=(9, 3))), torch.from_numpy(rng.integers(-1, 3, 9))
    np.testing.assert_array_equal(normalized_margin(logits, labels), normalized_margin(logits.numpy(), labels.numpy()))
    assert isinstance(normalized_margin(logits, labels), torch.Tensor)
    assert isinstance(label_quality_of_margin(logits[:, 0].half()), torch.Tensor)
    assert normalized_margin(np.empty((0, 3)), np.empty(0, int)).shape == (0,)
