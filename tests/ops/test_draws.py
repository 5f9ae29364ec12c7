"""A sample's random numbers: uniform, and unrelated where anything differs."""

import numpy as np

from ops.draws import uniform


def test_the_hash_is_uniform_and_depends_on_each_part():
    u = uniform(1, 2, np.arange(20_000))
    assert abs(u.mean() - 0.5) < 0.01 and abs((u < 0.1).mean() - 0.1) < 0.01 and u.min() >= 0 and u.max() < 1
    for other in (
        uniform(2, 2, np.arange(20_000)),
        uniform(1, 3, np.arange(20_000)),
        uniform(1, 2, np.arange(20_000), 1),
    ):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
