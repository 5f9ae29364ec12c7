import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr

from ops.checks import UndefinedMetricError
from ops.correlation import error_bands, error_correlation
from tests.ops.golden import cases

RANKED = [case for case in cases("correlation.npz") if "x" in case.inputs]
BANDED = cases("correlation.npz", "banded")


@pytest.mark.parametrize("case", RANKED, ids=repr)
def test_scipy_correlations_are_the_golden_ones(case):
    x, y, out = case.inputs["x"], case.inputs["y"], case.outputs
    tau = kendalltau(x, y)
    np.testing.assert_allclose(tau.statistic, out["kendall_tau_b"], rtol=1e-12)
    np.testing.assert_allclose(tau.pvalue, out["kendall_tau_b_pvalue"], rtol=1e-9)
    np.testing.assert_allclose(kendalltau(x, y, variant="c").statistic, out["kendall_tau_c"], rtol=1e-12)
    np.testing.assert_allclose(pearsonr(x, y).statistic, out["pearson"], rtol=1e-12)
    np.testing.assert_allclose(spearmanr(x, y).statistic, out["spearman"], rtol=1e-12)


@pytest.mark.parametrize("case", BANDED, ids=repr)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_banded_error_equals_the_golden_values(case, kind):
    score, error, edges = (kind(case.inputs[name]) for name in ("score", "error", "edges"))
    bands, out = error_bands(score, error, edges), case.outputs
    np.testing.assert_array_equal(bands.count, out["count"][out["count"] > 0])
    np.testing.assert_allclose(bands.error_rate, out["error_rate_nonempty"], rtol=1e-12)
    np.testing.assert_allclose(bands.centre, out["centre_nonempty"], rtol=1e-12)
    found = error_correlation(score, error, edges)
    np.testing.assert_allclose(found, (out["pearson_bands"], out["pearson_samples"]), rtol=1e-12)
    assert all(isinstance(part, type(score)) for part in bands)


def test_bands_are_closed_below_and_open_above():
    bands = error_bands(np.array([0.0, 1.0, 1.0, 2.0, -1.0]), np.array([1, 1, 0, 1, 1]), np.array([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(bands.count, [1, 2])
    np.testing.assert_array_equal(bands.error_rate, [1, 0.5])


def test_equal_width_bands_hold_every_sample():
    score = np.random.default_rng(0).random(1000).astype(np.float32)
    bands = error_bands(score, score > 0.5, 10)
    assert bands.count.sum() == 1000
    assert len(bands.centre) == 10
    assert error_correlation(score, score > 0.5).bands > 0.85


def test_a_score_without_variation_is_undefined():
    assert error_bands(np.ones(5), np.array([0, 1, 0, 1, 0])).count.sum() == 5
    with pytest.raises(UndefinedMetricError, match="score: correlation over bands is undefined"):
        error_correlation(np.ones(5), np.array([0, 1, 0, 1, 0]))
    with pytest.raises(UndefinedMetricError, match="score: correlation over bands is undefined"):
        error_correlation(np.arange(5.0), np.zeros(5))


@pytest.mark.parametrize("function", [error_bands, error_correlation])
@pytest.mark.parametrize(
    ("score", "errors", "edges", "message"),
    [
        (np.arange(3.0), np.ones((3, 1)), 10, r"errors: expected shape \(3,\), got \(3, 1\)"),
        (np.arange(3.0)[:, None], np.ones(3), 10, r"score: expected shape \(n,\), got \(3, 1\)"),
        (np.array([0, np.nan]), np.ones(2), 10, "score: contains NaN"),
        (np.array([0, np.inf]), np.ones(2), 10, "score: contains infinity"),
        (np.arange(3.0), np.full(3, 2), 10, "errors: expected only 0 and 1"),
        (np.arange(3.0), np.ones(3), np.array([2.0, 1.0]), "edges: expected at least two rising"),
        (np.arange(3.0), np.ones(3), np.array([5.0, 6.0]), "edges: no score lies in"),
        (np.arange(3.0), np.ones(3), 0, "edges: expected an integer of at least 1, got 0"),
        (np.zeros(0), np.zeros(0), 10, "score: is empty"),
    ],
)
def test_bad_input_is_refused(function, score, errors, edges, message):
    with pytest.raises(ValueError, match=message):
        function(score, errors, edges)
