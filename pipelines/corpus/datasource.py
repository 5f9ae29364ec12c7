"""Shards as a Ray Data source: one read task per shard."""

import functools
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from pipelines.corpus.samples import MAX_IMAGE_BYTES, LabelSource
from pipelines.corpus.shards import BLOCK_BYTES, SAMPLES, read_shard
from pipelines.runs.record import Shard


def read_shards(
    pending: Sequence[tuple[int, Shard]],
    labels: LabelSource,
    *,
    num_cpus: float = 0.25,
    block_bytes: int = BLOCK_BYTES,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> ray.data.Dataset:
    """Shards as a stream of blocks with the schema SAMPLES.

    Parameters
    ----------
    pending : sequence of (int, Shard)
        The shards to read, each with its number in the run.
    labels : LabelSource
    num_cpus : float
        Of each read task. A fraction: beside actors a whole core may never be free, and then nothing runs. It keeps
        Ray from fusing reading with a stage of another `num_cpus`, so images stream.
    block_bytes : int
        Image bytes per block, about; the memory of a read task is some times that.

    Returns
    -------
    dataset : ray.data.Dataset
        Blocks of a shard hold its rows in order; its last row has `end`, as `read_shard` says. A shard's blocks are the
        same each time it is read (but for the seconds in it).
    """
    if not pending:
        return ray.data.from_arrow(SAMPLES.empty_table())
    context = DataContext.get_current().copy()
    context.target_max_block_size = block_bytes
    context.raise_original_map_exception = True  # a full disk in a stage reaches the command as what it is
    read = functools.partial(read_shard, labels=labels, block_bytes=block_bytes, max_image_bytes=max_image_bytes)
    with DataContext.current(context):
        # As many blocks as tasks: otherwise Ray adds a step that cuts blocks up.
        return ray.data.read_datasource(ShardSource(pending, read), num_cpus=num_cpus, override_num_blocks=len(pending))


class ShardSource(Datasource):
    """One read task per shard; `read(number, shard)` yields its tables."""

    def __init__(self, pending: Sequence[tuple[int, Shard]], read: Callable[[int, Shard], Iterator[pa.Table]]):
        super().__init__()
        self._pending, self._read = list(pending), read

    def estimate_inmemory_data_size(self) -> int:
        return sum(shard.size for _, shard in self._pending)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                functools.partial(self._read, number, shard),
                BlockMetadata(num_rows=None, size_bytes=shard.size, exec_stats=None, input_files=[shard.url]),
                schema=SAMPLES,
                per_task_row_limit=per_task_row_limit,
            )
            for number, shard in self._pending
        ]
