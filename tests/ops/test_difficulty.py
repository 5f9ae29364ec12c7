"""ops.difficulty against golden cases, eq. 10 written naively, and the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ops import difficulty
from ops.difficulty import SCALES, Reference, difficulty_weight, fit_centers, kmeans_difficulty
from tests.ops.golden import cases

RMD = np.random.default_rng(0).normal(-3, 4, 200)


@pytest.mark.parametrize("case", cases("difficulty_weight.npz"), ids=repr)
def test_golden_weight(case):
    weight = difficulty_weight(case.inputs["rmd_hard"], case.params["T"], case.params["c"])
    np.testing.assert_allclose(weight, case.outputs["s"], rtol=1e-10)


@pytest.mark.parametrize("case", cases("scores_kmeans.npz"), ids=repr)
def test_golden_kmeans_distance(case):
    distance = kmeans_difficulty(case.inputs["features"], centers=case.outputs["centers"])
    np.testing.assert_allclose(distance, case.outputs["distance_to_nearest"], rtol=1e-8, atol=1e-8)


def naive(rmd, scale, temperature=0.7, c=1e-3, dim=None):
    """Eq. 10 as printed, after scaling; overflows for large rmd."""
    scaled = {
        "none": lambda: rmd,
        "per_dim": lambda: rmd / dim,
        "standardize": lambda: (rmd - rmd.mean()) / rmd.std(),
        "minmax": lambda: (rmd - rmd.min()) / (rmd.max() - rmd.min()),
    }[scale]()
    e = np.exp(scaled / temperature)
    return e / (e.max() + c)


@pytest.mark.parametrize("scale", SCALES)
def test_scales_equal_the_naive_form(scale):
    np.testing.assert_allclose(difficulty_weight(RMD, scale=scale, dim=8), naive(RMD, scale, dim=8), rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_a_reference_of_values_and_of_facts_is_the_same(scale):
    facts = (RMD.mean(), RMD.std(), RMD.min(), RMD.max())
    expected = difficulty_weight(RMD, scale=scale, dim=8)[:50]
    for reference in (RMD, facts, Reference(*facts), Reference.of(RMD), torch.from_numpy(RMD)):
        np.testing.assert_allclose(
            difficulty_weight(RMD[:50], scale=scale, dim=8, reference=reference), expected, rtol=1e-12
        )


def test_harder_than_the_reference_is_clipped_to_one():
    weight = difficulty_weight(np.array([0.0, 1.0, 1e6]), reference=(0.0, 1.0, -1.0, 0.5))
    assert weight[2] == 1 and weight[1] == 1 and 0 < weight[0] < 1


def test_four_values_in_an_array_are_values_and_in_a_tuple_facts():
    four = (1.0, 2.0, -3.0, 4.0)
    as_values = difficulty_weight(RMD, scale="standardize", reference=np.array(four))
    facts = Reference.of(np.array(four))
    np.testing.assert_array_equal(as_values, difficulty_weight(RMD, scale="standardize", reference=tuple(facts)))
    assert not np.allclose(as_values, difficulty_weight(RMD, scale="standardize", reference=four))
    with pytest.raises(ValueError, match="a list is ambiguous"):
        difficulty_weight(RMD, reference=list(four))


@given(
    arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from(SCALES),
    st.floats(0.01, 100),
)
def test_weight_is_monotone_and_within_zero_and_one(rmd, scale, temperature):
    weight = difficulty_weight(rmd, temperature, scale=scale, dim=3)
    assert weight.dtype == np.float32 and ((weight >= 0) & (weight <= 1)).all()
    assert (np.diff(weight[np.argsort(rmd, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("scale", ["standardize", "minmax"])
def test_zero_spread_weighs_all_alike(scale):
    np.testing.assert_allclose(difficulty_weight(np.full(5, 7.0), scale=scale), 1 / 1.001, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_type(dtype):
    rmd = torch.tensor([-300.0, 100.0, 101.0], dtype=dtype, requires_grad=True)
    weight = difficulty_weight(rmd)
    assert weight.dtype == dtype and not weight.requires_grad and weight.max() > 0.99
    np.testing.assert_allclose(weight[1].item(), np.exp(-(rmd[2] - rmd[1]).item() / 0.7), rtol=1e-2)


def test_numpy_keeps_its_type():
    for dtype in (np.float16, np.float32, np.float64):
        assert difficulty_weight(RMD.astype(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"rmd: expected shape \(n,\), got \(200, 1\)", {"rmd": RMD[:, None]}),
        ("rmd: is empty", {"rmd": RMD[:0]}),
        ("rmd: contains NaN", {"rmd": np.array([1.0, np.nan])}),
        ("rmd: contains infinity", {"rmd": np.array([1.0, np.inf])}),
        ("temperature: must", {"temperature": 0.0}),
        ("c: must", {"c": -1.0}),
        ("scale: must be one of", {"scale": "log"}),
        ("dim: scale 'per_dim' needs", {"scale": "per_dim"}),
        ("reference: a tuple is", {"reference": (1.0, 2.0)}),
        ("reference: expected finite", {"reference": (0.0, -1.0, 0.0, 1.0)}),
        ("reference: expected finite", {"reference": (0.0, 1.0, 2.0, 1.0)}),
        ("rmd: contains NaN", {"reference": np.array([np.nan])}),
    ],
)
def test_bad_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        difficulty_weight(**({"rmd": RMD} | arguments))


def clusters(dtype=np.float64):
    rng = np.random.default_rng(1)
    return (rng.normal(size=(90, 3)) + 20 * np.eye(3)[np.arange(90) % 3]).astype(dtype)


def test_kmeans_finds_separate_clusters_and_repeats():
    features = clusters()
    means = np.stack([features[k::3].mean(axis=0) for k in range(3)])[np.arange(90) % 3]
    found = kmeans_difficulty(features, 3, seed=4)
    np.testing.assert_allclose(found, np.linalg.norm(features - means, axis=1), rtol=1e-9)
    np.testing.assert_array_equal(found, kmeans_difficulty(features, k=3, seed=4))
    np.testing.assert_array_equal(found, kmeans_difficulty(features, centers=fit_centers(features, 3, seed=4)))


def test_another_seed_starts_elsewhere():
    features = np.random.default_rng(2).normal(size=(60, 2))
    assert not np.array_equal(kmeans_difficulty(features, 9, seed=0), kmeans_difficulty(features, 9, seed=1))


def test_blocks_of_rows_are_put_together_in_order():
    features = np.random.default_rng(3).normal(size=(9_000, 2))
    expected = np.linalg.norm(features[:, None] - features[:4], axis=2).min(axis=1)
    np.testing.assert_allclose(kmeans_difficulty(features, centers=features[:4]), expected, rtol=1e-12)


def test_minibatches_take_over_for_many_rows(monkeypatch):
    monkeypatch.setattr(difficulty, "MINIBATCH_ROWS", 50)
    np.testing.assert_allclose(kmeans_difficulty(clusters(), 3), kmeans_difficulty(clusters()[:49], 3)[0], atol=6)


def test_given_centers_are_not_refitted():
    features, centers = clusters(), np.array([[100.0, 0, 0], [0, 0, 0]])
    expected = np.linalg.norm(features[:, None] - centers, axis=2).min(axis=1)
    np.testing.assert_allclose(kmeans_difficulty(features, centers=centers), expected, rtol=1e-12)


def test_lists_and_whole_numbers_have_distances_that_are_not_whole():
    found = kmeans_difficulty([[0, 0], [4, 4]], centers=[[1, 1]])
    np.testing.assert_allclose(found, np.sqrt([2, 18]), rtol=1e-15)
    np.testing.assert_array_equal(kmeans_difficulty(np.array([[0, 0], [4, 4]]), centers=np.array([[1, 1]])), found)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_sample_on_its_center_has_distance_zero(dtype):
    features = clusters(dtype) + dtype(100)
    distance = kmeans_difficulty(features, centers=features[:5])
    assert (distance[:5] == 0).all() and distance.dtype == np.result_type(dtype, np.float32)
    assert isinstance(kmeans_difficulty(torch.from_numpy(features), centers=features[:5]), torch.Tensor)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("exactly one", {}),
        ("exactly one", {"k": 2, "centers": np.zeros((2, 3))}),
        (r"k: expected an integer in \[1, 90\], got 91", {"k": 91}),
        ("k: expected an integer", {"k": 2.5}),
        (r"centers: expected shape \(n, 3\), got \(2, 4\)", {"centers": np.zeros((2, 4))}),
        ("centers: contains NaN", {"centers": np.full((2, 3), np.nan)}),
        ("features: contains NaN", {"features": np.full((2, 3), np.nan), "k": 1}),
    ],
)
def test_bad_arguments_of_kmeans_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        kmeans_difficulty(**({"features": clusters()} | arguments))
