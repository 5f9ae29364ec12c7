"""Per-shard work as plain Ray tasks: idempotent functions, a bounded window in flight, results in shard order.

Used where a stage's input is one Parquet file per shard and its output small: core tasks measured 6 to 8 times faster
than Ray Data's aggregations there, and a lost task is simply run again, so nothing is ever counted twice.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

WINDOW = 4  # tasks in flight per core: enough to hide scheduling, few enough to bound what waits in memory


def in_order(
    function: Callable[..., Any],
    items: Iterable[tuple],
    *shared: Any,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[Any]:
    """Yield `function(*item, *shared)` for each item, in the order of the items, computed by Ray tasks.

    `shared` goes to the object store once. A task whose worker dies is run again; its own error is raised here.
    """
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
