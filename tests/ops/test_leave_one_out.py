"""Leave-one-out scores against refits: every sample of a small set, or all its views, taken out and fitted again."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.gaussian import Gaussians, GaussianStats

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def sample(n, d, classes, seed=0, views=1):
    """Features (n, views, d) about class means that overlap, and labels in which every class occurs at least twice."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    plain = (
        rng.normal(size=(n, 1, d)) @ (rng.normal(size=(d, d)) / d + np.eye(d))
        + rng.normal(size=(classes, d))[labels][:, None]
    )
    return plain + (views > 1) * 0.3 * rng.normal(size=(n, views, d)) + 3, labels


def targets(features, labels, model):
    """What the covariances are shrunk towards: that of the whole, which stays when a sample is left out."""
    n, d = features.shape
    means = np.stack([features[labels == y].mean(axis=0) for y in labels])
    covariances = [(features - m).T @ (features - m) / n for m in (means, features.mean(axis=0))]
    if model.target == "diagonal":
        return [np.diag(np.diag(c)) for c in covariances]
    return [np.trace(c) / d * np.eye(d) for c in covariances]


def refitted(features, labels, model, row):
    """md to every class that is left, and md_agn, of a row's first view, the row taken out: loops and inverses.

    Sums over the samples that are left, divided by the N of all of them, shrunk as the whole was, towards the whole's target.
    """
    views, d = features.shape[1:]
    flat, flat_labels = features.reshape(-1, d), np.repeat(labels, views)
    total, (to, to_agnostic) = len(flat), targets(flat, flat_labels, model)
    kept, kept_labels = np.delete(features, row, axis=0).reshape(-1, d), np.repeat(np.delete(labels, row), views)
    means = {k: kept[kept_labels == k].mean(axis=0) for k in np.unique(kept_labels)}
    within, agnostic, mean = np.zeros((d, d)), np.zeros((d, d)), kept.mean(axis=0)
    for x, y in zip(kept, kept_labels):
        within += np.outer(x - means[y], x - means[y]) / total
        agnostic += np.outer(x - mean, x - mean) / total
    s, s_agnostic = model.shrinkage
    precision = np.linalg.inv((1 - s) * within + s * to)
    x = features[row, 0]
    to_mean = x - mean
    md_agn = to_mean @ np.linalg.inv((1 - s_agnostic) * agnostic + s_agnostic * to_agnostic) @ to_mean
    return {k: (x - m) @ precision @ (x - m) for k, m in means.items()}, md_agn


def fitted(features, labels, shrinkage, classes=None):
    n, views, d = features.shape
    stats = GaussianStats(classes or labels.max() + 1, d)
    stats.update(features.reshape(n * views, d), np.repeat(labels, views))
    return stats.fit(shrinkage, (features, labels) if shrinkage == "auto" else None)


def compare(features, labels, model):
    views = features[:, 1:] if features.shape[1] > 1 else None
    found = model.scores(features[:, 0], labels, fitted=True, views=views)
    for row, label in enumerate(labels):
        md, md_agn = refitted(features, labels, model, row)
        others = {k: v for k, v in md.items() if k != label}
        if label in md:
            np.testing.assert_allclose(found.md_loo[row], md[label], **CLOSE)
            np.testing.assert_allclose(found.rmd_loo[row], md[label] - md_agn if others else 0, rtol=1e-6, atol=1e-7)
        else:
            assert np.isnan([found.md_loo[row], found.rmd_loo[row], found.margin[row]]).all()
        nearest = min(md, key=md.get)
        assert found.nearest_class[row] == nearest
        np.testing.assert_allclose(found.nearest_md[row], md[nearest], **CLOSE)
        if others and label in md:
            np.testing.assert_allclose(found.margin[row], md[label] - min(others.values()), rtol=1e-6, atol=1e-7)
        else:
            assert np.isnan(found.margin[row])
    return found


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("shrinkage", ["none", 0.3, "oas", "auto"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_every_sample_equals_a_refit_without_it(classes, shrinkage, views):
    features, labels = sample(40, 6, classes, views=views)
    compare(features, labels, fitted(features, labels, shrinkage))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("shrinkage", [0.2, "auto"])
def test_more_dimensions_than_samples(shrinkage, views):
    features, labels = sample(14, 25, 3, views=views)
    model = fitted(features, labels, shrinkage)
    assert model.rank < 25 * views
    compare(features, labels, model)


@pytest.mark.parametrize("views", [1, 2])
def test_two_samples_and_a_class_of_one(views):
    features, labels = sample(2, 3, 1, views=views)
    compare(features, labels, fitted(features, labels, 0.5))
    features, labels = sample(30, 4, 3, views=views)
    labels[labels == 1] = 2
    labels[0] = 1  # alone: without it its class is gone
    found = compare(features, labels, fitted(features, labels, 0.1))
    assert found.nearest_class[0] != 1 and found.md[0] >= 0 and np.isnan(found.margin[0])
    assert np.isfinite(np.delete(found.margin, 0)).all()


def test_at_no_shrinkage_it_is_the_plain_refit_times_its_samples_over_all():
    features, labels = sample(60, 5, 3)
    x = features[:, 0]
    found = fitted(features, labels, "none").scores(x, labels, fitted=True)
    for row in range(0, 60, 7):
        rest = np.delete(np.arange(60), row)
        refit = GaussianStats(3, 5).update(x[rest], labels[rest]).fit().scores(x[[row]], labels[[row]])
        np.testing.assert_allclose(found.margin[row], refit.margin[0] * 60 / 59, rtol=1e-9)
        np.testing.assert_allclose(found.rmd_loo[row], refit.rmd[0] * 60 / 59, rtol=1e-9)


def test_what_was_not_fitted_on_is_not_left_out():
    features, labels = sample(60, 5, 3)
    x = features[:, 0]
    model = fitted(features, labels, "none")
    plain, some = model.scores(x, labels), model.scores(x, labels, fitted=np.arange(60) % 2 == 0)
    every = model.scores(x, labels, fitted=True)
    np.testing.assert_array_equal(plain.md_loo, plain.md)
    np.testing.assert_array_equal(plain.rmd_loo, plain.rmd)
    for name in plain._fields:
        np.testing.assert_allclose(getattr(some, name)[1::2], getattr(plain, name)[1::2], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(getattr(some, name)[::2], getattr(every, name)[::2], rtol=1e-12, atol=1e-12)
    for name in ("md", "md_agn", "rmd"):
        np.testing.assert_array_equal(getattr(every, name), getattr(plain, name))
    unlabelled, nothing = model.scores(x, fitted=True), model.scores(x)
    np.testing.assert_array_equal(unlabelled.rmd_loo, nothing.rmd)
    np.testing.assert_array_equal(unlabelled.nearest_md, nothing.nearest_md)
    assert np.isnan(unlabelled.md_loo).all()


def test_a_sample_that_alone_makes_the_covariance_regular_has_no_distance_without_it():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 4)), np.arange(12) % 2
    x[:, 3] = 0
    x[1, 3] = 5  # the only sample of its class that differs in this feature, and of the other none does
    found = GaussianStats(2, 4).update(x, labels).fit().scores(x, labels, fitted=True)
    assert np.flatnonzero(np.isnan(found.md_loo)).tolist() == [1] == np.flatnonzero(np.isnan(found.margin)).tolist()
    assert np.isnan(found.rmd_loo[1]) and np.isfinite(found.nearest_md).all() and found.nearest_class[1] == 0


def test_n_equal_to_d_plus_classes_leaves_nobody_a_distance():
    features, labels = sample(8, 6, 2)
    found = fitted(features, labels, "none").scores(features[:, 0], labels, fitted=True)
    assert np.isnan(found.md_loo).all() and np.isnan(found.margin).all() and np.isfinite(found.nearest_md).all()


def test_a_sample_no_longer_vouches_for_itself():
    """With few samples per feature the in-sample margin takes the label's side."""
    features, labels = sample(120, 80, 4, seed=2)
    wrong = np.arange(120) % 10 == 0
    given_labels = np.where(wrong, (labels + 1) % 4, labels)
    model = fitted(features, given_labels, "none")
    inside = model.scores(features[:, 0], given_labels).margin
    outside = model.scores(features[:, 0], given_labels, fitted=True).margin

    def auroc(margin):
        return (margin[wrong][:, None] > margin[~wrong]).mean()

    assert auroc(outside) > auroc(inside) + 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 30), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from([0.05, 0.5, 0.9]), st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_equals_a_refit(n, d, classes, views, shrinkage, seed):
    features, labels = sample(n, d, min(classes, n), seed, views)
    try:
        model = fitted(features, labels, shrinkage)
    except ValueError:
        return  # no variation within classes
    compare(features, labels, model)


@pytest.mark.parametrize("views", [1, 3])
def test_blocks_kinds_and_precisions_agree(views, monkeypatch):
    features, labels = sample(90, 8, 3, views=views)
    labels[::9] = -1
    model = fitted(features, labels, 0.1, classes=3)
    others = features[:, 1:] if views > 1 else None
    expected = model.scores(features[:, 0], labels, fitted=True, views=others)
    narrow = [None if x is None else x.astype(np.float32) for x in (features[:, 0], others)]
    tensors = [None if x is None else torch.from_numpy(x) for x in (features[:, 0], others)]
    monkeypatch.setattr("ops.mahalanobis.BLOCK_VALUES", 100)
    blocked = model.scores(features[:, 0], labels, fitted=True, views=others)
    in_torch = model.scores(tensors[0], torch.from_numpy(labels), fitted=torch.ones(90, dtype=bool), views=tensors[1])
    in_float32 = model.scores(narrow[0], labels, fitted=True, views=narrow[1])
    for name in expected._fields:
        wanted = getattr(expected, name)
        np.testing.assert_allclose(getattr(blocked, name), wanted, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(getattr(in_torch, name).numpy(), wanted, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(getattr(in_float32, name), wanted, rtol=1e-3, atol=1e-3)


def test_bad_views_are_named():
    features, labels = sample(20, 4, 2, views=2)
    model = fitted(features, labels, "none")
    with pytest.raises(ValueError, match=r"views: expected shape \(20, R - 1, 4\), got \(20, 4\)"):
        model.scores(features[:, 0], labels, fitted=True, views=features[:, 1])


def test_gaussians_of_an_older_version_open(tmp_path):
    """Files that say neither target nor curve: the target was tr(Σ)/d I."""
    features, labels = sample(30, 4, 2)
    model = fitted(features, labels, 0.2)
    model.save(tmp_path / "now.npz")
    arrays = dict(np.load(tmp_path / "now.npz"))
    assert not {"target", "curve", "source"} & set(arrays)
    loaded = Gaussians.load(tmp_path / "now.npz")
    assert loaded.target == "identity" and loaded.curve is None
    compare(features, labels, loaded)
