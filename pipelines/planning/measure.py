"""Measure a few shards through the real pipeline: what `pipelines.planning.plan` projects from.

First one worker alone, step by step: what each step could do, and a worker's memory. Then the pipeline as `embed` runs it,
the same shards repeated until it has worked for a while, into a scratch run; then fit, score, select and report on that.
"""

import contextlib
import io
import math
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipelines.curation import embed as embedding
from pipelines.curation import fit as fitting
from pipelines.curation import score as scoring
from pipelines.curation import select as selecting
from pipelines.curation.workers import STEPS, Resources
from pipelines.planning.plan import Measured, StageCost
from pipelines.report import page as reporting
from pipelines.runs import cluster, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.executor import Task, write_file
from pipelines.runs.record import CorpusConfig, Run, Shard

MOST_SHARDS = 64  # of the scratch run: repeating shards of a dozen images until they last is minutes of starting tasks
PARTS = 8  # of the measured time, for the interval
SUBSET = "hard"


class Probe:
    """Ray actor: an embedding worker that runs alone."""

    def __init__(self, config: CorpusConfig, resources: Resources, scratch: str):
        self.scratch = scratch
        self.worker = embedding.make_embedder(config, resources, None)

    def shard(self, number: int, shard: Shard) -> dict[str, Any]:
        """Counts of a shard, and seconds per sample of each step."""
        done = write_file(self.worker, Task(number, shard, ""), self.scratch, columns.EMBEDDINGS)
        samples = max(1, done["rows"] + done["left_out"])
        seconds = {step: value / samples for step, value in done["seconds"].items()}
        return {"samples": samples, "left_out": done["left_out"], "seconds": seconds}

    def peak_bytes(self) -> int:
        """The most memory that this process has had."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    shards: Sequence[Shard],
    config: CorpusConfig,
    resources: Resources,
    scratch: str,
    session_s: float,
    target_s: float = 20.0,
) -> Measured:
    """Take some shards through the pipeline.

    Parameters
    ----------
    shards : sequence of Shard
        To be measured; the more, the better the interval.
    config : CorpusConfig
    resources : Resources
        The workers that run side by side here.
    scratch : str
        A folder for a scratch run, on the store where the real one will be; removed in the end.
    session_s : float
        Seconds that the command took to get here, part of what it returns.
    target_s : float
        Seconds of work that the pipeline is measured for, about; in less the moods of a machine decide.

    Raises
    ------
    ValueError
        If the shards hold no sample that can be embedded.
    """
    try:
        probed, worker_bytes = _probe(shards, config, resources, scratch)
        if not any(p["samples"] > p["left_out"] for p in probed):  # which counts an unreadable rest too
            raise UserError(
                f"the {len(shards)} measured ones hold no usable sample; hardset validate says why",
                "shards",
            )
        alone = {s: _weighted(probed, s) for s in STEPS}
        repeats = _repeats(
            shards, sum(p["samples"] for p in probed) * sum(alone.values()), resources.most_workers, target_s
        )
        run = Run.create(storage.join(scratch, "run"), config, list(shards) * repeats, overwrite=True)
        with contextlib.redirect_stderr(io.StringIO()):  # progress over shards that nobody asked for
            batches, startup_s, left_out = _embed(run, resources)
            stages = _stages(run, len(shards))
        written = _written(run)
    finally:
        storage.remove_tree(scratch)
    return Measured(
        shard_bytes=tuple(shard.size for shard in shards),
        shard_samples=tuple(p["samples"] for p in probed),
        left_out=round(left_out / repeats),
        step_seconds=alone,
        batch_seconds=batches,
        startup_s=startup_s,
        session_s=session_s,
        stages=stages,
        bytes_per_sample=written,
        worker_bytes=worker_bytes,
        device=resources.device,
        workers=resources.most_workers,
        decoders=resources.decode_threads,
        cores=cluster.capacity().cpus,
    )


def _probe(
    shards: Sequence[Shard], config: CorpusConfig, resources: Resources, scratch: str
) -> tuple[list[dict[str, Any]], int]:
    """What each shard took in a worker alone, and the worker's peak memory in bytes."""
    ray = cluster.connect()
    actor = ray.remote(Probe).options(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)
    probe = actor.remote(config, resources, scratch)
    ray.get(probe.shard.remote(0, shards[0]))  # kernels and caches are warm after the first
    found = [ray.get(probe.shard.remote(number, shard)) for number, shard in enumerate(shards)]
    peak = ray.get(probe.peak_bytes.remote())
    ray.kill(probe)
    return found, peak


def _weighted(probed: list[dict[str, Any]], step: str) -> float:
    """Seconds per sample of a step over all measured shards."""
    samples = sum(p["samples"] for p in probed)
    return sum(p["seconds"][step] * p["samples"] for p in probed) / samples


def _repeats(shards: Sequence[Shard], alone_s: float, workers: int, target_s: float) -> int:
    """How often shards that take one worker `alone_s` are repeated: for `target_s`, and six for each worker."""
    wanted = max(target_s * workers / max(alone_s, 1e-6), 6 * workers / len(shards))
    return max(1, math.ceil(min(wanted, MOST_SHARDS / len(shards))))


def _embed(run: Run, resources: Resources) -> tuple[tuple[float, ...], float, int]:
    """Seconds per sample of consecutive parts, seconds of start-up and end, samples left out."""
    started = time.monotonic()
    times, samples, left_out = [], [], 0
    for done in embedding.embed_shards(run, list(range(len(run.shards))), resources):
        times.append(time.monotonic() - started)
        samples.append(done["rows"] + done["left_out"])
        left_out += done["left_out"]
    embedding.embed(run, resources, max_bad_fraction=1.0)  # nothing is pending: it notes the stage
    whole = time.monotonic() - started
    batches = _parts(np.array(times), np.array(samples), resources.most_workers)
    return batches, max(0.0, whole - sum(samples) * float(np.mean(batches))), left_out


def _parts(times: np.ndarray, samples: np.ndarray, workers: int) -> tuple[float, ...]:
    """Seconds per sample of up to `PARTS` consecutive parts, between the first and the last shard of each worker.

    Before and after those not all workers have work.
    """
    last = len(times) - 1
    ends = (workers - 1, last - workers + 1) if last >= 3 * workers else (0, last)
    edges = np.unique(np.linspace(*ends, min(PARTS, ends[1] - ends[0]) + 1).round().astype(int))
    return tuple((np.diff(times[edges]) / np.diff(np.cumsum(samples)[edges])).tolist())


def _stages(run: Run, few: int) -> dict[str, StageCost]:
    """What fit, score, select and report cost, from the first `few` shards of the scratch run and from all of them."""
    small = Run(run.uri, run.record | {"shards": run.record["shards"][:few]})

    def fit(run: Run) -> None:
        fitting.fit(run)

    def score(run: Run) -> None:
        storage.remove_tree(run.path(columns.DIFFICULTY))
        scoring.score(run, scoring.Weighting())

    def select(run: Run) -> None:
        by = "difficulty.rmd" if run.classes else "difficulty.md_agn"
        selecting.select(run, selecting.Rule(by, 0.1), SUBSET)

    def report(run: Run) -> None:
        reporting.report(run)

    found = {}
    for name, stage, product in (
        ("fit", fit, fitting.GAUSSIANS),
        ("score", score, columns.DIFFICULTY),
        ("select", select, f"subsets/{SUBSET}"),
        ("report", report, "report"),
    ):
        entry = f"select/{SUBSET}" if name == "select" else name
        found[name] = _cost(stage, lambda some, e=entry, p=product: some.forget(e, p), small, run)
    return found


def _cost(stage: Callable[[Run], None], forget: Callable[[Run], None], small: Run, large: Run) -> StageCost:
    """Cold on few shards, warm on few, warm on many: what is spent once, and what each shard adds."""

    def seconds(run: Run) -> float:
        forget(run)
        started = time.monotonic()
        stage(run)
        return time.monotonic() - started

    cold, warm, many = seconds(small), seconds(small), seconds(large)
    few, all_ = len(small.shards), len(large.shards)
    per_shard = max(0.0, (many - warm) / (all_ - few)) if all_ > few else warm / few
    return StageCost(max(0.0, cold - few * per_shard), per_shard)


def _written(run: Run) -> dict[str, float]:
    """Bytes per sample of each column group of the scratch run, and of its subset."""
    samples = sum(f["rows"] + f["left_out"] for f in run.embedding_facts())
    groups = (columns.EMBEDDINGS, columns.DIFFICULTY, columns.QUARANTINE, f"subsets/{SUBSET}")
    return {name: sum(info.size for _, info in storage.list_infos(run.path(name))) / samples for name in groups}
