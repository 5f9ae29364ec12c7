"""ops.gaussian against golden cases, a naive float64 oracle and what must not change the result."""

import dataclasses
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from ops import gaussian, mahalanobis
from ops.difficulty import Reference
from ops.gaussian import Gaussians, GaussianStats
from tests.ops.golden import cases


def sample(n=300, d=6, k=4, seed=0, separation=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    mixing = rng.normal(size=(d, d)) + 2 * np.eye(d)
    return rng.normal(size=(n, d)) @ mixing + separation * rng.normal(size=(k, d))[labels] + 5, labels


def fitted(features, labels, shrinkage="none", num_classes=None):
    return (
        GaussianStats(num_classes or int(labels.max()) + 1, features.shape[1]).update(features, labels).fit(shrinkage)
    )


def oracle(features, labels, query, query_labels):
    """Eq. 2, 4, 6, 7 word by word, without the printed minus signs: explicit loops, explicit inverses."""
    n, d = features.shape
    means = {k: features[labels == k].mean(axis=0) for k in np.unique(labels)}
    within, total = np.zeros((d, d)), np.zeros((d, d))
    mean = features.mean(axis=0)
    for x, y in zip(features, labels):
        within += np.outer(x - means[y], x - means[y]) / n
        total += np.outer(x - mean, x - mean) / n
    within_inverse, total_inverse = np.linalg.inv(within), np.linalg.inv(total)
    md = np.array([(x - means[y]) @ within_inverse @ (x - means[y]) for x, y in zip(query, query_labels)])
    return md, np.array([(x - mean) @ total_inverse @ (x - mean) for x in query])


@pytest.mark.parametrize("case", cases("scores_rmd.npz"), ids=repr)
def test_golden_distances(case):
    features, labels = case.inputs["features"], case.inputs["labels"]
    model = fitted(features, labels)
    found = model.distances(features, labels)
    close = {"rtol": 1e-8, "atol": 1e-8}
    np.testing.assert_allclose(model.class_means, case.outputs["class_means"], **close)
    np.testing.assert_allclose(model.covariance, case.outputs["cov"], **close)
    np.testing.assert_allclose(model.covariance_agn, case.outputs["cov_agn"], **close)
    np.testing.assert_allclose(found.md, case.outputs["dist_class"], **close)
    np.testing.assert_allclose(found.md_agn, case.outputs["dist_agnostic"], **close)
    np.testing.assert_allclose(found.rmd, case.outputs["rmd_hard"], **close)
    np.testing.assert_array_equal(np.argsort(found.rmd), np.argsort(case.outputs["rmd_hard"]))
    np.testing.assert_allclose(model.class_distances(features), case.outputs["dist_all_classes"], **close)
    np.testing.assert_allclose(model.agnostic_distances(features), case.outputs["dist_agnostic"], **close)
    np.testing.assert_allclose(model.scores(features).rmd, case.outputs["ood_score_min_over_classes"], **close)


@pytest.mark.parametrize("case", cases("scores_rmd.npz"), ids=repr)
def test_golden_distances_in_float32(case):
    features, labels = case.inputs["features"].astype(np.float32), case.inputs["labels"]
    found = fitted(features, labels).distances(features, labels)
    assert found.rmd.dtype == np.float32
    np.testing.assert_allclose(found.rmd, case.outputs["rmd_hard"], rtol=0, atol=1e-4 * case.outputs["rmd_hard"].std())


def test_equals_the_naive_oracle_on_other_samples():
    features, labels = sample()
    query, query_labels = sample(50, seed=1)
    md, md_agn = oracle(features, labels, query, query_labels)
    found = fitted(features, labels).distances(query, query_labels)
    np.testing.assert_allclose(found.md, md, rtol=1e-10)
    np.testing.assert_allclose(found.md_agn, md_agn, rtol=1e-10)
    np.testing.assert_allclose(found.rmd, md - md_agn, rtol=1e-9, atol=1e-10)


def test_both_covariances_are_divided_by_n():
    """Undivided, the background's distances sum to d instead of N d, and rmd hardly differs from md."""
    features, labels = sample()
    found = fitted(features, labels).distances(features, labels)
    assert found.md_agn.sum() == pytest.approx(features.size, rel=1e-10)
    assert found.md.sum() == pytest.approx(features.size, rel=1e-10)
    assert found.rmd.mean() == pytest.approx(0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_merging_any_split_in_any_order_is_the_whole(cuts, random, shared_pilot):
    features, labels = sample(120, d=3)
    pilot = features[:5].mean(axis=0) + 1 if shared_pilot else None
    edges = [0, *sorted(cuts), 120]
    slices = [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]
    parts = [GaussianStats(4, 3, pilot=pilot).update(features[s], labels[s]) for s in slices]
    random.shuffle(parts)
    merged = GaussianStats(0, 3)
    for part in parts:
        merged = merged.merge(part)
    whole, found = fitted(features, labels), merged.fit()
    assert merged.count == 120
    np.testing.assert_allclose(found.class_means, whole.class_means, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(found.covariance_agn, whole.covariance_agn, rtol=1e-10, atol=1e-11)


def test_merging_parts_with_one_pilot_is_the_same_to_the_last_bit_after_a_pickle():
    features, labels = sample(100)
    pilot = features.mean(axis=0)
    parts = [GaussianStats(4, 6, pilot=pilot).update(features[s::2], labels[s::2]) for s in (0, 1)]
    direct = parts[0].merge(parts[1]).fit()
    travelled = pickle.loads(pickle.dumps(parts[0])).merge(pickle.loads(pickle.dumps(parts[1]))).fit()
    np.testing.assert_array_equal(direct.covariance, travelled.covariance)
    np.testing.assert_array_equal(direct.mean, travelled.mean)


def test_merge_leaves_its_parts_alone_and_grows_classes():
    features, labels = sample(100, k=3)
    small = GaussianStats(2, 6).update(features[labels < 2], labels[labels < 2])
    before = pickle.dumps(small)
    merged = small.merge(GaussianStats(5, 6).update(features[labels == 2], labels[labels == 2]))
    assert pickle.dumps(small) == before
    assert merged.class_counts.tolist() == [*np.bincount(labels), 0, 0]
    np.testing.assert_allclose(merged.fit().covariance, fitted(features, labels).covariance, rtol=1e-10, atol=1e-11)


def test_order_of_samples_does_not_matter():
    features, labels = sample()
    order = np.random.default_rng(5).permutation(len(labels))
    rmd = fitted(features, labels).distances(features, labels).rmd
    shuffled = fitted(features[order], labels[order]).distances(features[order], labels[order]).rmd
    np.testing.assert_allclose(shuffled, rmd[order], rtol=1e-9, atol=1e-9)


def test_every_distance_is_invariant_to_invertible_affine_maps():
    features, labels = sample()
    rng = np.random.default_rng(3)
    mapped = features @ (rng.normal(size=(6, 6)) + 3 * np.eye(6)) * 1e3 + rng.normal(size=6) * 1e4
    plain = fitted(features, labels).scores(features, labels)
    other = fitted(mapped, labels).scores(mapped, labels)
    for name in ("md", "md_agn", "rmd", "nearest_md", "margin"):
        np.testing.assert_allclose(getattr(other, name), getattr(plain, name), rtol=1e-7, atol=1e-7)
    np.testing.assert_array_equal(other.nearest_class, plain.nearest_class)


def test_duplicating_every_sample_changes_nothing():
    features, labels = sample()
    twice = fitted(np.repeat(features, 2, axis=0), np.repeat(labels, 2)).distances(features, labels)
    np.testing.assert_allclose(
        twice.rmd, fitted(features, labels).distances(features, labels).rmd, rtol=1e-9, atol=1e-9
    )


def test_blocked_equals_unblocked(monkeypatch):
    features, labels = sample(200)
    whole = fitted(features, labels)
    expected, to_classes = whole.scores(features, labels), whole.class_distances(features)
    monkeypatch.setattr(gaussian, "CHUNK_ROWS", 7)
    monkeypatch.setattr(mahalanobis, "BLOCK_VALUES", 100)
    blocked = fitted(features, labels)
    np.testing.assert_allclose(blocked.covariance, whole.covariance, rtol=1e-11, atol=1e-12)
    for found, wanted in zip(whole.scores(features, labels), expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(whole.class_distances(features), to_classes, rtol=1e-11, atol=1e-11)


def test_float32_products_are_within_a_thousandth_of_float64_ones(monkeypatch):
    features, labels = sample(20_000, d=8)
    features = features.astype(np.float32)
    exact = fitted(features.astype(np.float64), labels).distances(features, labels).rmd
    monkeypatch.setattr(gaussian, "EXACT_ROWS", 0)
    found = fitted(features, labels).distances(features, labels).rmd
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-3 * exact.std())


def test_a_far_mean_costs_no_digits():
    features, labels = sample()
    far = fitted(features.astype(np.float32) + np.float32(2**10), labels)
    near = fitted(features.astype(np.float32), labels)
    np.testing.assert_allclose(far.covariance, near.covariance, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(
        fitted(features + 1e6, labels).covariance, fitted(features, labels).covariance, rtol=1e-6
    )


def test_a_far_mean_costs_no_digits_while_scoring():
    features, labels = sample(2000)
    for offset in (0, 1e3, 1e5):
        far = (features + offset).astype(np.float32)
        model = fitted(far, labels)
        exact = model.scores(far.astype(np.float64), labels)
        for name, values in zip(exact._fields, model.scores(far, labels)):
            np.testing.assert_allclose(values, getattr(exact, name), rtol=1e-4, atol=1e-4, err_msg=name)
        distances = model.class_distances(far)
        np.testing.assert_allclose(distances, model.class_distances(far.astype(np.float64)), rtol=1e-4, atol=1e-4)


def test_one_class_has_no_relative_distance():
    features, _ = sample()
    labels = np.zeros(len(features), int)
    scores = fitted(features, labels).scores(features, labels)
    np.testing.assert_allclose(scores.rmd, 0, atol=1e-10)
    assert np.isnan(scores.margin).all()
    assert (scores.nearest_class == 0).all() and not scores.rmd.any()


def test_scores_agree_with_their_definitions():
    features, labels = sample(separation=0.5)
    labels = labels.copy()
    labels[:20] = (labels[:20] + 1) % 4
    model = fitted(features, labels)
    scores, all_md, distances = (
        model.scores(features, labels),
        model.class_distances(features),
        model.distances(features, labels),
    )
    rows = np.arange(len(labels))
    others = all_md.copy()
    others[rows, labels] = np.inf
    np.testing.assert_array_equal(scores.nearest_class, all_md.argmin(axis=1))
    np.testing.assert_allclose(scores.nearest_md, all_md.min(axis=1), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(scores.margin, all_md[rows, labels] - others.min(axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(scores.margin > 0, scores.nearest_class != labels)
    for name in distances._fields:
        np.testing.assert_allclose(getattr(scores, name), getattr(distances, name), rtol=1e-12, atol=1e-12)


def test_of_equally_near_classes_the_first_is_nearest():
    model = fitted(np.array([[-2.0], [0], [0], [2]]), np.array([0, 0, 1, 1]))
    scores = model.scores(np.zeros((3, 1)), np.array([0, 1, -1]))
    assert scores.nearest_class.tolist() == [0, 0, 0]
    assert scores.margin.tolist()[:2] == [0, 0]


def test_rounding_makes_no_distance_negative():
    features, labels = sample(400, k=20, separation=300.0)
    model = fitted(features, labels)
    distances = model.class_distances(model.class_means.astype(np.float32))
    assert (distances >= 0).all() and np.abs(np.diag(distances)).max() < 1


def test_rows_without_label_are_scored_but_not_fitted():
    features, labels = sample()
    some = np.where(np.arange(len(labels)) % 5 == 0, -1, labels)
    stats = GaussianStats(4, 6).update(features, some)
    known = some >= 0
    assert (stats.count, stats.num_samples) == (len(labels), known.sum())
    model = stats.fit()
    np.testing.assert_allclose(model.covariance_agn, np.cov(features[known].T, bias=True), rtol=1e-10, atol=1e-12)
    scores = model.scores(features, some)
    assert np.isnan(scores.md[~known]).all() and np.isnan(scores.margin[~known]).all()
    nearest = model.distances(features, scores.nearest_class)
    np.testing.assert_allclose(scores.rmd[~known], nearest.rmd[~known], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(model.scores(features).rmd[~known], scores.rmd[~known])
    with pytest.raises(ValueError, match="labels: values must lie in"):
        model.distances(features, some)


def test_without_labels_there_is_the_background_only():
    features, labels = sample()
    model = GaussianStats(0, 6).update(features).update(features, np.full(len(labels), -1)).fit()
    md_agn = fitted(features, labels).distances(features, labels).md_agn
    np.testing.assert_allclose(model.agnostic_distances(features), md_agn, rtol=1e-10)
    scores = model.scores(features)
    np.testing.assert_allclose(scores.md_agn, md_agn, rtol=1e-10)
    assert (
        np.isnan([scores.md, scores.rmd, scores.nearest_md, scores.margin]).all() and (scores.nearest_class == -1).all()
    )
    for call in (lambda: model.class_distances(features), lambda: model.distances(features, labels)):
        with pytest.raises(ValueError, match="without labels"):
            call()
    assert restored(model).covariance is None


def test_an_absent_class_is_infinitely_far():
    features, labels = sample(k=3)
    labels = np.where(labels == 1, 3, labels)
    model = dataclasses.replace(fitted(features, labels, num_classes=5), class_names=tuple("abcde"))
    distances = model.class_distances(features)
    assert np.isinf(distances[:, [1, 4]]).all() and np.isfinite(distances[:, [0, 2, 3]]).all()
    assert set(model.scores(features, labels).nearest_class) <= {0, 2, 3}
    for score in (model.distances, model.scores):
        with pytest.raises(ValueError, match=r"labels: class 'b' \(label 1\) has no sample"):
            score(features[:2], np.array([0, 1]))


def test_more_dimensions_than_samples_need_shrinkage():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 50)), np.arange(20) % 2
    with pytest.raises(ValueError, match=r"rank 18 of d = 50, N = 20.*shrinkage"):
        fitted(features, labels)
    model = fitted(features, labels, "auto")
    assert model.rank == 18 and 0 < model.shrinkage.within <= 1 and 0 < model.shrinkage.agnostic <= 1
    assert np.isfinite(model.distances(features, labels).rmd).all() and np.isfinite(model.condition)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_digits_pixels_have_rank_61(dtype):
    pixels, labels = load_digits(return_X_y=True)
    with pytest.raises(ValueError, match="rank 61 of d = 64, N = 1797"):
        fitted(pixels.astype(dtype), labels)
    model = fitted(pixels.astype(dtype), labels, "auto")
    scaled = StandardScaler().fit_transform(pixels)[:, pixels.std(axis=0) > 0]
    assert model.rank == 61 and model.shrinkage.agnostic == pytest.approx(oas(scaled)[1], rel=1e-4)
    assert (model.covariance == 0).all(axis=0).sum() == 3  # the corners that are always white


def test_a_linearly_dependent_column_is_found_in_float32():
    features, labels = sample(5000, d=20)
    features = features.astype(np.float32)
    features[:, 0] = features[:, 1] + features[:, 2]
    with pytest.raises(ValueError, match="rank 19 of d = 20"):
        fitted(features, labels)


def narrow(deviation, dtype, seed=0):
    """Two features, one of standard deviation 1, and their classes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(400, 2)) * [1, deviation]).astype(dtype), np.arange(400) % 2


def test_working_precision_is_that_of_the_coarsest_features():
    fine, labels = narrow(1e-4, np.float64)
    coarse = fine.astype(np.float32)
    assert fitted(fine, labels).rank == 2  # a ratio of eigenvalues of 1e-8
    with pytest.raises(ValueError, match="rank 1 of d = 2"):
        fitted(coarse, labels)
    parts = GaussianStats(2, 2).update(fine, labels), GaussianStats(2, 2).update(coarse, labels)
    for one, other in (parts, parts[::-1]):
        with pytest.raises(ValueError, match="rank 1 of d = 2"):
            one.merge(other).fit()
    with pytest.raises(ValueError, match="rank 1 of d = 2"):
        GaussianStats(2, 2).update(coarse, labels).update(fine, labels).fit()


def test_oas_is_that_of_scikit_learn():
    features, labels = sample(40, d=12)
    model = fitted(features, labels, "oas")
    covariance, amount = oas(features)
    np.testing.assert_allclose(model.covariance_agn, covariance, rtol=1e-10, atol=1e-12)
    assert model.shrinkage.agnostic == pytest.approx(amount, rel=1e-10)
    centred = features - np.stack([features[labels == k].mean(axis=0) for k in range(4)])[labels]
    np.testing.assert_allclose(model.covariance, oas(centred, assume_centered=True)[0], rtol=1e-10, atol=1e-12)


def test_a_number_is_a_convex_combination():
    features, labels = sample()
    plain, shrunk = fitted(features, labels), fitted(features, labels, 0.25)
    target = np.trace(plain.covariance_agn) / 6 * np.eye(6)
    np.testing.assert_allclose(shrunk.covariance_agn, 0.75 * plain.covariance_agn + 0.25 * target, rtol=1e-12)
    assert shrunk.shrinkage == (0.25, 0.25)
    assert fitted(features, labels, 1).condition == pytest.approx(1)


def restored(model):
    stream = io.BytesIO()
    model.save(stream)
    stream.seek(0)
    return Gaussians.load(stream)


def test_save_and_load(tmp_path):
    features, labels = sample()
    model = dataclasses.replace(
        fitted(features, labels), class_names=("a", "ü", "c", "d"), reference=Reference(1, 2, -3, 4)
    )
    model.save(tmp_path / "named")
    other = Gaussians.load(tmp_path / "named")
    for field in dataclasses.fields(Gaussians):
        assert np.array_equal(getattr(other, field.name), getattr(model, field.name)), field.name
    assert isinstance(other.reference, Reference) and other.class_names[1] == "ü"
    np.testing.assert_array_equal(other.scores(features, labels).rmd, restored(model).scores(features, labels).rmd)
    model.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "named").read_bytes()
    with np.load(tmp_path / "named", allow_pickle=False) as archive:
        assert {"class_means", "mean", "covariance", "covariance_agn", "counts", "class_names"} <= set(archive.files)


@pytest.mark.parametrize("content", [b"", b"no npz", b"PK\x03\x04broken"])
def test_load_refuses_what_is_no_model(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError):
        Gaussians.load(tmp_path / "x.npz")


def test_load_refuses_pickles_and_arrays_that_do_not_fit(tmp_path):
    np.savez(tmp_path / "pickle.npz", class_means=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="allow_pickle"):
        Gaussians.load(tmp_path / "pickle.npz")
    with pytest.raises(ValueError, match="no Gaussians"):
        Gaussians.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="class_means: expected shape"):
        dataclasses.replace(fitted(*sample()), class_means=np.zeros((4, 5)))


def test_a_model_pickles_with_its_caches():
    features, labels = sample()
    model = fitted(features, labels)
    rmd = model.distances(features, labels).rmd
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).distances(features, labels).rmd, rmd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_in_tensors_out(dtype):
    features, labels = sample()
    tensor, targets = torch.from_numpy(features).to(dtype), torch.from_numpy(labels)
    model = GaussianStats(4, 6).update(tensor, targets).fit()
    scores = model.scores(tensor.requires_grad_(), targets)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    assert scores.rmd.dtype == precision and scores.nearest_class.dtype == torch.int64
    assert model.class_distances(tensor).shape == (300, 4) and model.class_distances(tensor).dtype == precision
    exact = tensor.detach().double().numpy()
    expected = fitted(exact, labels).scores(exact, labels).rmd
    np.testing.assert_allclose(scores.rmd.numpy(), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu():
    features, labels = sample(5000, d=16)
    tensor, targets = (
        torch.from_numpy(features).float().cuda(),
        torch.from_numpy(np.where(labels == 1, -1, labels)).cuda(),
    )
    stats = GaussianStats(4, 16).update(tensor, targets)
    model = pickle.loads(pickle.dumps(stats)).fit()
    expected = GaussianStats(4, 16).update(tensor.cpu(), targets.cpu()).fit()
    np.testing.assert_allclose(model.covariance, expected.covariance, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(model.scores(tensor, targets), expected.scores(tensor.cpu(), targets.cpu())):
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


def test_bad_arguments_are_named():
    features, labels = sample()
    stats = GaussianStats(4, 6)
    bad = [
        (r"features: expected shape \(n, 6\), got \(300, 5\)", features[:, :5], labels),
        (r"features: is empty", features[:0], labels[:0]),
        (r"features: contains NaN", np.where(np.arange(6) == 3, np.nan, features), labels),
        (r"features: contains NaN, infinity", np.where(np.arange(6) == 3, np.inf, features), labels),
        (r"labels: expected shape \(300,\), got \(300, 1\)", features, labels[:, None]),
        (r"labels: expected integers", features, labels.astype(float)),
        (r"labels: values must lie in \[-1, 4\), found 4", features, labels + 1),
        (r"labels: values must lie in \[-1, 4\), found -2", features, labels - 2),
        (r"labels: None, but num_classes is 4", features, None),
    ]
    for message, x, y in bad:
        with pytest.raises(ValueError, match=message):
            stats.update(x, y)
    assert stats.count == 0 and not stats.class_counts.any()
    with pytest.raises(ValueError, match="fit: no rows yet"):
        stats.fit()
    with pytest.raises(ValueError, match="none of the 300 rows has a label"):
        GaussianStats(4, 6).update(features, np.full(300, -1)).fit()
    with pytest.raises(ValueError, match="num_classes=0"):
        GaussianStats(0, 6).update(features, labels)
    with pytest.raises(ValueError, match="width 5"):
        stats.merge(GaussianStats(4, 5))
    with pytest.raises(ValueError, match="num_classes is 0"):
        GaussianStats(4, 6).update(features, labels).merge(GaussianStats(0, 6).update(features))


def test_bad_arguments_of_the_model_are_named():
    features, labels = sample()
    model = fitted(features, labels)
    for call in (model.class_distances, model.agnostic_distances, model.scores, lambda x: model.distances(x, labels)):
        with pytest.raises(ValueError, match=r"features: expected shape \(n, 6\)"):
            call(features[:, :4])
        with pytest.raises(ValueError, match="features: contains NaN"):
            call(np.where(np.arange(6) == 3, np.nan, features))
    with pytest.raises(ValueError, match=r"labels: expected shape \(300,\)"):
        model.distances(features, labels[:, None])
    for shrinkage in ("some", -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="shrinkage: must"):
            fitted(features, labels, shrinkage)
    for shrinkage in ("none", "oas", "auto", 0.5):
        with pytest.raises(ValueError, match="don't vary within classes"):
            fitted(np.eye(6), np.arange(6), shrinkage)
