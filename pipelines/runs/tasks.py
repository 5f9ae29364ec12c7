"""Per-shard work as plain Ray tasks: idempotent functions, a bounded window in flight, results in shard order.

Used where a stage's input is one Parquet file per shard and its output small: core tasks measured 6 to 8 times faster
than Ray Data's aggregations there, and a lost task is simply run again, so nothing is ever counted twice.

Small work is done in this process, by the same function on as many threads as a task has cores, so that the results
are the same: `in_order` begins here, and hands over to Ray as soon as what is left would take longer than Ray's start.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from pipelines.runs import cluster

if TYPE_CHECKING:
    pass

WINDOW = 4  # tasks in flight per core: enough to hide scheduling, few enough to bound what waits in memory
# Seconds of work that are done here rather than wait for Ray: its start and its workers' imports, or the imports alone.
START_S, IMPORTS_S = 10.0, 4.0
TRIAL_S = 1.0  # of work before its pace is trusted: the first items also pay for imports and cold files
PARTS = 1024  # sums that come to the driver: at d = 768 each is 4.7 MB and takes it some 5 ms


def in_order(
    function: Callable[..., Any],
    items: Iterable[tuple],
    *shared: Any,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[Any]:
    """Yield `function(*item, *shared)` for each item, in the order of the items.

    In this process as long as little is left to do, else by Ray tasks, to which `shared` goes once. A task whose worker
    dies is run again; its own error is raised here.
    """
    total = len(items) if isinstance(items, Sequence) else None
    waiting = iter(items)
    if cluster.small_work_stays_here() and not num_gpus:
        yield from _here(function, waiting, shared, total, max(1, int(num_cpus)))
    first = next(waiting, None)
    if first is not None:
        yield from _by_tasks(function, itertools.chain([first], waiting), shared, num_cpus, num_gpus)


def _here(
    function: Callable[..., Any], items: Iterator[tuple], shared: tuple, total: int | None, threads: int
) -> Iterator[Any]:
    """The results of the first items, or of all: it stops where what is left is worth a Ray task."""
    limit, spent = IMPORTS_S if cluster.connected() else START_S, 0.0
    for done, item in enumerate(items, 1):
        started = time.perf_counter()
        with threadpool_limits(threads):
            result = function(*item, *shared)
        last = time.perf_counter() - started
        spent += last
        yield result
        left = float("inf") if total is None else last * (total - done)
        # The first item also pays for imports and cold files: by itself it says nothing of the others' pace.
        if (done > 1 or last > limit) and spent >= TRIAL_S and left > limit:
            return


def _by_tasks(
    function: Callable[..., Any], items: Iterable[tuple], shared: tuple, num_cpus: float, num_gpus: float
) -> Iterator[Any]:
    ray = cluster.connect()
    task = ray.remote(function).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)
    references = [ray.put(value) for value in shared]
    waiting: deque = deque()
    for count, item in enumerate(items):
        if count % 256 == 0:  # an autoscaling cluster grows meanwhile
            window = WINDOW * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting.append(task.remote(*item, *references))
        if len(waiting) >= window:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def merged_parts(
    function: Callable[..., Any],
    items: Sequence[tuple],
    *shared: Any,
    merge: Callable[[Any, Any], Any],
    parts: int = PARTS,
    **resources: float,
) -> Iterator[tuple[Any, int]]:
    """Like `in_order`, for results that add up: yields at most `parts` sums, and how many items are in each.

    Consecutive items share a task that merges their results where they were computed. Which ones depends on the number
    of items alone, so the number of workers changes no bit of the whole.
    """
    size = max(1, -(-len(items) // parts))
    groups = [(items[start : start + size],) for start in range(0, len(items), size)]
    for (group,), part in zip(groups, in_order(_merged, groups, function, merge, *shared, **resources)):
        yield part, len(group)


def _merged(
    group: Sequence[tuple], function: Callable[..., Any], merge: Callable[[Any, Any], Any], *shared: Any
) -> Any:
    """Ray task: the sum of a function over a group of items."""
    return functools.reduce(merge, (function(*item, *shared) for item in group))
