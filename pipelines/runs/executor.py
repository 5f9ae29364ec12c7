"""The one way to run a stage: a shard in, a file out.

A stage is the column group it writes, the source of each shard's file, and a worker: a class that sets up once what
every shard needs (a model, Gaussians) and whose `run(task)` turns one shard into tables and facts. `execute` does the
rest for all stages: pending shards -> workers -> the file written whole by the worker -> counts reconciled -> progress
-> the stage's record. CONTRIBUTING.md has an example.

Without a pool the shards are plain tasks, here or in Ray (`pipelines.runs.tasks.in_order`). With one they go through Ray
Data actors, each of which keeps its worker. What travels is a shard's number and address; what comes back, a few
numbers. A shard that is done twice, because a process died, is written twice the same.
"""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from pipelines.runs import cluster, column_groups
from pipelines.runs.errors import StageFailed
from pipelines.runs.isolated import IsolatedWorker
from pipelines.runs.progress import Progress
from pipelines.runs.record import Run, Shard
from pipelines.runs.retries import retrying
from pipelines.runs.tasks import in_order

RETRIES = 3  # of a task or an actor whose process dies
MOST_BLOCKS = 4096  # of a pool's dataset, whose driver spends a millisecond on each before the first is begun
HANDFUL_BYTES, HANDFUL_SHARDS = 32 << 20, 64  # what one block holds at most, unless there are more shards than blocks
BLOCKS_PER_WORKER = 8  # at least, so that workers end at about the same time


class Task(NamedTuple):
    """One shard that a stage has to do: its number in the run, where it lies, the source of the file to be written."""

    shard: int
    entry: Shard
    source: str


class Output(NamedTuple):
    """What a worker makes of a shard.

    Attributes
    ----------
    tables : Table or iterable of Table
        The rows. Tables of an iterable go into the file as they come, so that memory doesn't grow with the shard.
    facts : mapping
        What the file says of itself beside source, rows and the source of the embeddings; read after the last table, so
        that the iterator may fill it. It may give another `source`.
    notes : mapping
        What only the driver is told (seconds, say), also read at the end. JSON-able, as are the facts.
    schema : Schema, optional
        Needed where the iterable may be empty.
    """

    tables: pa.Table | Iterable[pa.Table]
    facts: Mapping[str, Any] = {}
    notes: Mapping[str, Any] = {}
    schema: pa.Schema | None = None


class Worker(Protocol):
    """What sets up once what every shard needs; made in the process that uses it."""

    def run(self, task: Task) -> Output: ...


class Pool(NamedTuple):
    """Ray Data actors that keep a worker each: how many (`min, max` for a pool that grows), and what each takes."""

    workers: int | tuple[int, int]
    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """How a column group is made.

    Attributes
    ----------
    name : str
        Of the stage's record, and in progress and errors.
    group : str
        The column group written.
    sources : sequence of str
        Of each shard of the run: what its file is made from. A file with another source is made again.
    worker : callable
        Makes a `Worker` of `arguments`: a class of a module, or a function.
    arguments : tuple
        Sent once; large arrays are shared by the plain tasks of a machine.
    rows : sequence of int, optional
        How many each shard's file must have.
    pool : Pool, optional
        For a worker that is expensive to make. Without one the shards are plain tasks.
    num_gpus : float
        Of each plain task.
    limit_s : float, optional
        The worker lives in a process of its own beside each actor and notes what it has in hand; see
        `pipelines.runs.isolated`. Longer than this with the same sample in hand and it is ended.
    """

    name: str
    group: str
    sources: Sequence[str]
    worker: Callable[..., Worker]
    arguments: tuple = ()
    rows: Sequence[int] | None = None
    pool: Pool | None = None
    num_gpus: float = 0.0
    limit_s: float | None = None


def execute(run: Run, stage: Stage, **entry: Any) -> dict[str, Any]:
    """Make the files of a stage that are missing or made from something else, and note the stage.

    Parameters
    ----------
    run : Run
    stage : Stage
    entry
        What the stage's record says beside the counts.

    Returns
    -------
    counts : dict
        rows (of all shards), shards_done, shards_skipped, seconds; and `entry`.

    Raises
    ------
    StageFailed
        If a file has other rows than it must have, or workers die again and again. Finished shards are kept.
    """
    started = time.monotonic()
    pending = column_groups.pending(run.uri, stage.group, stage.sources)
    for _ in write_shards(run, stage, pending):
        pass
    rows = stage.rows or [f["rows"] for f in column_groups.all_facts(run.uri, stage.group, len(stage.sources))]
    counts = {
        "rows": sum(rows),
        "shards_done": len(pending),
        "shards_skipped": len(stage.sources) - len(pending),
        "seconds": time.monotonic() - started,
        **entry,
    }
    if pending or run.stage(stage.name) is None:
        run.finish_stage(stage.name, **counts)
    return counts


def write_shards(run: Run, stage: Stage, pending: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Do some shards; yield {shard, rows, left_out, notes…} as their files are in place, in any order, with progress."""
    shards = run.shards
    tasks = [Task(shard, shards[shard], stage.sources[shard]) for shard in pending]
    progress = Progress(stage.name, len(tasks), skipped=len(shards) - len(tasks))
    for done in _by_actors(run.uri, stage, tasks) if stage.pool else _by_tasks(run.uri, stage, tasks):
        if stage.rows is not None and done["rows"] != stage.rows[done["shard"]]:
            raise StageFailed(
                f"{stage.name}: {done['rows']} rows for the {stage.rows[done['shard']]} embeddings of shard {done['shard']}"
            )
        progress.shard(done["rows"], done.get("left_out", 0))
        yield done


def write_file(worker: Worker, task: Task, run_uri: str, group: str) -> dict[str, Any]:
    """Have a worker do one shard, and write its file; what the driver is told of it, seconds of writing among it.

    From the start where it comes out in the end that the storage gave wrong bytes.
    """
    return retrying(task.entry.url, lambda: _written(worker, task, run_uri, group))


def _written(worker: Worker, task: Task, run_uri: str, group: str) -> dict[str, Any]:
    started, output = time.perf_counter(), worker.run(task)
    tables = _Timed([output.tables] if isinstance(output.tables, pa.Table) else output.tables)
    facts = _Told(task.source, output.facts)
    rows = column_groups.write_tables(run_uri, group, task.shard, tables, facts, output.schema)
    write = time.perf_counter() - started - tables.seconds
    seconds = {**output.notes.get("seconds", {}), "write": write}
    return {"shard": task.shard, "rows": rows, **output.notes, "seconds": seconds}


class _Timed:
    """The same tables; `seconds` is what they took to come."""

    def __init__(self, tables: Iterable[pa.Table]):
        self._tables, self.seconds = iter(tables), 0.0

    def __iter__(self) -> Iterator[pa.Table]:
        return self

    def __next__(self) -> pa.Table:
        started = time.perf_counter()
        try:
            return next(self._tables)
        finally:
            self.seconds += time.perf_counter() - started


class _Told(Mapping):
    """A file's source and facts, looked up when they are asked for: an iterator of tables fills them on its way."""

    def __init__(self, source: str, facts: Mapping[str, Any]):
        self._source, self._facts = source, facts

    def _now(self) -> dict[str, Any]:
        return {"source": self._source, **self._facts}

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


def _by_tasks(run_uri: str, stage: Stage, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    shared = (run_uri, stage.group, stage.worker, *stage.arguments)
    yield from in_order(_task, [(task,) for task in tasks], *shared, num_gpus=stage.num_gpus)


def _task(task: Task, run_uri: str, group: str, worker: Callable[..., Worker], *arguments: Any) -> dict[str, Any]:
    """Ray task: one shard."""
    return write_file(worker(*arguments), task, run_uri, group)


class WriteShards:
    """Ray Data actor: shards' addresses in, a note of each file written out; the worker is made once."""

    def __init__(self, run_uri: str, stage: Stage):
        self.run_uri, self.group = run_uri, stage.group
        if stage.limit_s is None:
            self.worker = stage.worker(*stage.arguments)
            self.write = lambda task: write_file(self.worker, task, self.run_uri, self.group)
        else:
            self.worker = IsolatedWorker(stage.worker, stage.arguments, stage.limit_s)
            self.write = lambda task: self.worker.call(write_file, task, self.run_uri, self.group)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            task = Task(row["shard"], Shard(**json.loads(row["entry"])), row["source"])
            yield pa.table({"note": [json.dumps(self.write(task))]})


def _by_actors(run_uri: str, stage: Stage, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    if not tasks:
        return
    ray = cluster.connect()
    blocks = handfuls(tasks, _most(stage.pool))
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # a note leaves the actor when it is yielded, not with the others of its block
    context.raise_original_map_exception = True  # a full disk in a worker reaches the command as what it is
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray deprecates the arguments that bound restarts and has no other way yet.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = ray.data.from_arrow([rows_of(block) for block in blocks]).map_batches(
            WriteShards,
            fn_constructor_args=(run_uri, stage),
            compute=_strategy(stage.pool, len(blocks)),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=stage.pool.num_cpus,
            num_gpus=stage.pool.num_gpus,
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from map(json.loads, batch["note"].to_pylist())
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            why = str(error).strip().splitlines()[0]
            raise StageFailed(
                f"{stage.name}: a worker died {1 + RETRIES} times ({why}); finished shards are kept"
            ) from error


def handfuls(tasks: Sequence[Task], workers: int) -> list[list[Task]]:
    """Consecutive tasks in blocks: small shards together, and no more blocks than a driver can take."""
    least = min(len(tasks), BLOCKS_PER_WORKER * workers)
    most_shards = max(-(-len(tasks) // MOST_BLOCKS), min(HANDFUL_SHARDS, len(tasks) // least))
    most_bytes = max(HANDFUL_BYTES, sum(task.entry.size for task in tasks) / MOST_BLOCKS)
    blocks: list[list[Task]] = []
    size = 0.0
    for task in tasks:
        if not blocks or len(blocks[-1]) >= most_shards or size + task.entry.size > most_bytes:
            blocks.append([])
            size = 0.0
        blocks[-1].append(task)
        size += task.entry.size
    return blocks


def rows_of(block: Sequence[Task]) -> pa.Table:
    """Tasks as rows of a dataset."""
    return pa.Table.from_pylist([t._asdict() | {"entry": json.dumps(dataclasses.asdict(t.entry))} for t in block])


def _most(pool: Pool) -> int:
    return pool.workers if isinstance(pool.workers, int) else pool.workers[1]


def _strategy(pool: Pool, blocks: int) -> Any:
    from ray.data import ActorPoolStrategy

    # One block waits at each actor: it begins the next at once, and few are stuck behind a slow one.
    ahead = {"max_tasks_in_flight_per_actor": 2}
    if isinstance(pool.workers, int):
        return ActorPoolStrategy(size=min(pool.workers, blocks), **ahead)
    least, most = (min(number, blocks) for number in pool.workers)
    return ActorPoolStrategy(min_size=least, max_size=most, **ahead)
