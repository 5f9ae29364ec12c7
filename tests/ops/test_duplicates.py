"""Groups against a naive union, the kept one against its rule in words."""

import numpy as np

from ops.duplicates import duplicate_groups, is_same_picture, kept_of_groups


def naive_groups(pairs, samples):
    group = list(range(samples))
    for a, b in list(pairs) * samples:  # until nothing changes, and then some
        group[a] = group[b] = min(group[a], group[b])
    return group


def test_pairs_connect_in_chains():
    np.testing.assert_array_equal(duplicate_groups(np.array([[3, 1], [1, 5], [2, 4]]), 6), [0, 1, 2, 1, 2, 1])
    rng = np.random.default_rng(0)
    for pairs in (rng.integers(0, 30, (n, 2)) for n in (0, 5, 20, 60)):
        np.testing.assert_array_equal(duplicate_groups(pairs, 30), naive_groups(pairs.tolist(), 30))


def test_the_kept_one_has_most_pixels_then_most_bytes_then_comes_first():
    groups, pixels = np.array([7, 7, 2, 7, 2, 5]), np.array([10, 30, 4, 30, 4, 1])
    num_bytes = np.array([99, 5, 6, 6, 6, 1])
    np.testing.assert_array_equal(kept_of_groups(groups, pixels, num_bytes), [3, 3, 2, 3, 2, 5])
    rng = np.random.default_rng(1)
    groups, pixels, num_bytes = (rng.integers(0, 4, 40) for _ in range(3))
    for sample, kept in enumerate(kept_of_groups(groups, pixels, num_bytes)):
        members = [i for i in range(40) if groups[i] == groups[sample]]
        assert kept == max(members, key=lambda i: (pixels[i], num_bytes[i], -i))


def test_the_same_picture_by_its_details_or_by_both():
    same = is_same_picture(np.array([0.7, 0.66, 0.66, 0.6]), np.array([-1, 0.5, 0.4, 0.9]))
    np.testing.assert_array_equal(same, [True, True, False, False])
