"""ops.bootstrap against the normal interval, and where replicates are undefined."""

import numpy as np
import pytest
import torch

from ops.bootstrap import bootstrap_interval, joint_bootstrap_intervals
from ops.calibration import negative_log_likelihood
from ops.checks import UndefinedMetricError
from ops.selective import DetectionMetrics, detection_metrics


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(np.mean, values, replicates=2000)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.06 * half)
    assert bootstrap_interval(np.mean, values, replicates=50, seed=1) == bootstrap_interval(
        np.mean, values, replicates=50, seed=1
    )


def test_bootstrap_resamples_arrays_together():
    x = np.arange(30)
    y = torch.arange(30)
    assert bootstrap_interval(lambda a, b: np.abs(a - b.numpy()).max(), x, y, replicates=20) == (0, 0)


def test_bootstrap_of_several_metrics_is_that_of_each():
    rng = np.random.default_rng(3)
    scores, correct = rng.random(60), rng.random(60) < 0.7
    together = joint_bootstrap_intervals(detection_metrics, scores, correct, replicates=40, seed=2)
    for number, name in enumerate(DetectionMetrics._fields):
        alone = bootstrap_interval(
            lambda s, c, at=number: detection_metrics(s, c)[at], scores, correct, replicates=40, seed=2
        )
        assert together[number] == alone, name


def test_bootstrap_of_undefined_and_infinite_replicates():
    scores, correct = np.arange(6.0), np.array([0, 1, 1, 1, 1, 1])  # one in three resamples has no wrong one
    interval = bootstrap_interval(lambda s, c: detection_metrics(s, c).auroc, scores, correct, replicates=100)
    assert interval == (1, 1)
    with pytest.raises(UndefinedMetricError, match="metric: undefined on 20 of 20"):
        bootstrap_interval(lambda s, c: detection_metrics(s, c).auroc, scores, np.ones(6), replicates=20)
    probs = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = bootstrap_interval(negative_log_likelihood, probs, np.array([1, 0]), replicates=50)
    assert found == (pytest.approx(np.log(2)), np.inf)


def test_bootstrap_refuses_bad_input():
    with pytest.raises(ValueError, match="arrays: expected one common length"):
        bootstrap_interval(np.mean, np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="arrays: expected one common length"):
        bootstrap_interval(np.mean)
    with pytest.raises(ValueError, match="metric: contains NaN"):
        bootstrap_interval(lambda x: np.nan, np.ones(3))
    with pytest.raises(ValueError, match="replicates: "):
        bootstrap_interval(np.mean, np.ones(3), replicates=0)
