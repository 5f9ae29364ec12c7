"""Tasks in order, and sums of many of them in few."""

import itertools
import operator

import pytest

from pipelines.runs.tasks import in_order, merged_parts

pytestmark = pytest.mark.usefixtures("work_in_ray")


def times(number, factor):
    return [number * factor]


def test_results_come_in_order():
    assert list(in_order(times, [(i,) for i in range(20)], 2)) == [[2 * i] for i in range(20)]


@pytest.mark.parametrize(("count", "parts", "sizes"), [(7, 3, [3, 3, 1]), (3, 8, [1, 1, 1]), (0, 4, [])])
def test_few_parts_hold_the_results_of_all_items_in_order(count, parts, sizes):
    # Lists add up by concatenation, which shows the order.
    found = list(merged_parts(times, [(i,) for i in range(count)], 2, merge=operator.add, parts=parts))
    assert [size for _, size in found] == sizes
    assert list(itertools.chain.from_iterable(part for part, _ in found)) == [2 * i for i in range(count)]
