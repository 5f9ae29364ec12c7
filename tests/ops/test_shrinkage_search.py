"""Shrinkage by leave-one-out: the curve against refits, what is chosen, and that it never gives up."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.covariance import oas
from sklearn.preprocessing import StandardScaler

from ops.gaussian import Gaussians, GaussianStats
from ops.shrinkage_search import GRID
from tests.ops.test_leave_one_out import refitted, sample


def stats_of(features, labels, classes=None):
    flat = features.reshape(-1, features.shape[-1])
    repeated = np.repeat(labels, len(flat) // len(labels))
    return GaussianStats(classes or labels.max() + 1, flat.shape[1]).update(flat, repeated)


def naive_curve(features, labels, model, amount):
    """Mean log-loss of the class posterior, and mean negative log-likelihood, of refits without each sample."""
    views, d = features.shape[1:]
    flat, flat_labels = features.reshape(-1, d), np.repeat(labels, views)
    trial = dataclasses.replace(model, shrinkage=type(model.shrinkage)(amount, amount))
    log_prior = np.log(np.bincount(flat_labels) / len(flat))
    total = np.cov(flat.T, bias=True)
    losses, likelihoods = [], []
    for row, label in enumerate(labels):
        md, md_agn = refitted(features, labels, trial, row)
        kept = np.delete(features, row, axis=0).reshape(-1, d)
        deviations = kept - kept.mean(axis=0)
        shrunk = (1 - amount) * deviations.T @ deviations / len(flat) + amount * np.diag(np.diag(total))
        likelihoods.append((md_agn + np.linalg.slogdet(shrunk)[1] - np.log(np.diag(total)).sum()) / 2)
        if label in md:
            losses.append(-log_softmax([log_prior[k] - md.get(k, np.inf) / 2 for k in range(len(log_prior))])[label])
    return np.mean(losses), np.mean(likelihoods)


@pytest.mark.parametrize("views", [1, 3])
def test_the_curve_is_that_of_refits(views):
    features, labels = sample(30, 5, 3, views=views)
    labels[labels == 1] = 2
    labels[0] = 1  # alone in its class: not in the log-loss
    model = stats_of(features, labels).fit("auto", (features, labels))
    np.testing.assert_array_equal(model.curve[0], GRID)
    for at in (0, 4, 8, 12):
        expected = naive_curve(features, labels, model, GRID[at])
        np.testing.assert_allclose(model.curve[1:, at], expected, rtol=1e-9)
    assert model.shrinkage == tuple(GRID[at] for at in model.curve[1:].argmin(axis=1))


def test_parts_of_the_rows_add_up_to_the_whole():
    features, labels = sample(200, 6, 3)
    x = features[:, 0]
    search = stats_of(x, labels).shrinkage_search()
    whole, parts = search.measure(x, labels), search.measure(x[:70], labels[:70]) + search.measure(x[70:], labels[70:])
    np.testing.assert_allclose(parts.within, whole.within, rtol=1e-12)
    np.testing.assert_allclose(parts.agnostic, whole.agnostic, rtol=1e-12)
    assert (parts.rows_within, parts.rows_agnostic) == (200, 200)
    assert search.fit(parts).shrinkage == stats_of(x, labels).fit("auto", (x, labels)).shrinkage


def test_plenty_of_samples_need_no_shrinkage_and_few_do():
    many, few = sample(3000, 5, 3), sample(30, 20, 3)
    assert stats_of(*many).fit("auto", many).shrinkage.within <= 0.01
    model = stats_of(*few).fit("auto", few)
    assert min(model.shrinkage) >= 0.1 and np.isinf(model.curve[1, 0]) == (model.rank < 20)


def test_without_rows_it_is_oas_towards_the_diagonal():
    features, labels = sample(40, 12, 4)
    x = features[:, 0] * 10.0 ** np.arange(-6, 6)
    model = stats_of(x, labels).fit("auto")
    assert model.shrinkage.agnostic == pytest.approx(oas(StandardScaler().fit_transform(x))[1], rel=1e-9)
    assert model.target == "diagonal" and model.curve is None
    plain = np.cov(x.T, bias=True)
    s = model.shrinkage.agnostic
    np.testing.assert_allclose(model.covariance_agn, (1 - s) * plain + s * np.diag(np.diag(plain)), rtol=1e-10)


@pytest.mark.parametrize("with_rows", [True, False])
def test_units_of_single_features_change_nothing(with_rows):
    features, labels = sample(120, 10, 3)
    x = features[:, 0]
    x[:, 4] = 7  # dead
    units = 10.0 ** np.array([-20, 15, 0, 3, -3, 8, -8, 1, 2, -1])
    found = []
    for y in (x, x * units):
        model = stats_of(y, labels).fit("auto", (y, labels) if with_rows else None)
        found.append((model, model.scores(y, labels, fitted=True)))
    (plain, scores), (other, scaled) = found
    assert plain.rank == other.rank == 9
    np.testing.assert_allclose(other.shrinkage, plain.shrinkage, rtol=1e-9)
    np.testing.assert_allclose(other.condition, plain.condition, rtol=1e-7)
    for name in scores._fields:
        np.testing.assert_allclose(getattr(scaled, name), getattr(scores, name), rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_feature_that_does_not_vary_within_classes_has_no_weight():
    features, labels = sample(90, 4, 3)
    x = features[:, 0]
    without = stats_of(x, labels).fit("auto", (x, labels)).scores(x, labels, fitted=True)
    for dead in (np.full(90, 0.1), 10.0 * labels):
        both = np.column_stack([x[:, :2], dead, x[:, 2:]])
        found = stats_of(both, labels).fit("auto", (both, labels)).scores(both, labels, fitted=True)
        for name in without._fields:
            np.testing.assert_allclose(getattr(found, name), getattr(without, name), rtol=1e-8, atol=1e-8)


def test_one_class_is_judged_by_its_likelihood():
    features, labels = sample(40, 10, 1)
    model = stats_of(features, labels).fit("auto", (features, labels))
    assert model.shrinkage.within == model.shrinkage.agnostic == GRID[model.curve[2].argmin()]
    x = features[:, 0]
    assert not stats_of(x, labels).fit("auto").scores(x, labels).rmd.any()
    unlabelled = GaussianStats(0, 10).update(x).fit("auto", (x, None))
    assert unlabelled.shrinkage == model.shrinkage and unlabelled.covariance is None


def test_it_is_stored():
    features, labels = sample(40, 3, 2)
    model = dataclasses.replace(stats_of(features, labels).fit("auto", (features, labels)), source="abc")
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    loaded = Gaussians.load(stream)
    assert (loaded.target, loaded.source) == ("diagonal", "abc")
    np.testing.assert_array_equal(loaded.curve, model.curve)


def test_rows_are_for_auto_only():
    features, labels = sample(40, 3, 2)
    with pytest.raises(ValueError, match="rows: only shrinkage 'auto'"):
        stats_of(features, labels).fit(0.1, (features, labels))


@st.composite
def awkward(draw):
    """Features that vary within classes, but in ways that break a covariance."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, d, classes = draw(st.integers(2, 60)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    labels = rng.integers(0, classes, n)
    labels[:2] = 0  # at least one class has two samples
    rank = draw(st.integers(1, d))
    x = (
        rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))
        + draw(st.sampled_from([0, 1, 100])) * rng.normal(size=(classes, d))[labels]
    )
    x[:, 0] *= draw(st.sampled_from([1, 1e2, 1e6]))  # one strong direction
    dead = rng.random(d) < draw(st.sampled_from([0, 0.3, 0.9]))
    dead[rng.integers(d)] = False
    if draw(st.booleans()):
        x = np.clip(x, 0, 1) if x.clip(0, 1)[labels == 0].std(axis=0)[~dead].max() > 0.01 else x
    x[:, dead] = draw(st.sampled_from([0.0, 0.1, 255.0]))
    if draw(st.booleans()):
        x = x[rng.integers(0, max(1, n // 2), n)]  # duplicates
        x[0] = x[1] + (~dead) * rng.normal(size=d)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    scale = 10.0 ** draw(st.integers(-20, 15))
    units = 10.0 ** rng.integers(-3, 4, d) if draw(st.booleans()) else 1.0
    x = (x * scale * units).astype(dtype)
    wide = x.astype(np.float64)
    spread = np.stack([np.ptp(wide[labels == k], axis=0) for k in np.unique(labels)]).max(axis=0)
    assume(((spread > 0.01 * np.ptp(wide, axis=0)) & (spread > 1e-3 * np.abs(wide).max(axis=0))).any())
    return x, labels, classes


@settings(max_examples=300, deadline=None)
@given(awkward(), st.booleans())
def test_auto_never_gives_up_while_features_vary_within_classes(case, with_rows):
    x, labels, classes = case
    model = GaussianStats(classes, x.shape[1]).update(x, labels).fit("auto", (x, labels) if with_rows else None)
    assert 1 <= model.rank <= x.shape[1] and np.isfinite(model.condition)
    assert all(0 <= amount <= 1 for amount in model.shrinkage)
    scores = model.scores(x.astype(np.float64), labels, fitted=True)
    assert np.isfinite(scores.md).all() and np.isfinite(scores.md_agn).all() and (scores.md >= 0).all()
    known = np.isfinite(scores.md_loo)
    assert (scores.md_loo[known] >= scores.md[known] * (1 - 1e-6)).all()


@pytest.mark.parametrize("factor", [1e-20, 1e-12, 1e15])
def test_float32_features_of_any_scale_are_summed_right(factor, monkeypatch):
    monkeypatch.setattr("ops.gaussian.EXACT_ROWS", 0)
    features, labels = sample(500, 6, 3)
    x = (features[:, 0] * [1, 1, factor, factor, 1, 1]).astype(np.float32)
    found, exact = (stats_of(y, labels).fit("auto") for y in (x, x.astype(np.float64)))
    spread = np.sqrt(exact.covariance_agn.diagonal())
    np.testing.assert_allclose(
        found.covariance_agn / np.outer(spread, spread), exact.covariance_agn / np.outer(spread, spread), atol=1e-5
    )
