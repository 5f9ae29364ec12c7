"""What a corpus will take: time, GPU or core hours, storage, memory, from a few measured shards.

hardset plan --shards 'DIR/train-{000000..001281}.tar' --encoder open_clip:ViT-B-32/laion2b_s34b_b79k
"""

import contextlib
import dataclasses
import sys
import tempfile
import time
from typing import Any

from jobs.command import Command, say
from jobs.options import CorpusOptions, RunOptions, SessionOptions, WorkerOptions, at_least
from jobs.session import ray_session, tracked
from pipelines.runs.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned for."""

    run: str | None = None
    """keep the plan with this run (made if it is not there), so that inspect shows planned against actual"""
    samples: float | None = None
    """plan for so many samples in shards like these, such as 5.85e9 (default: the listed shards)"""
    gpus: int | None = None
    """plan for so many GPUs, one worker each: the same as --device cuda --workers N"""
    measure: int = 2
    """shards to measure, evenly picked; more give a better interval"""
    seconds: float = 20.0
    """work that the pipeline is measured for, about: the shards are repeated until there is so much"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("samples", "gpus", "measure"))
        if not self.seconds > 0:
            raise UserError(f"{self.seconds}: must be above 0", "seconds")


def plan(session: SessionOptions, asked: PlanOptions, corpus: CorpusOptions, workers: WorkerOptions) -> dict[str, Any]:
    """Measure, project, tell."""
    started = time.monotonic()
    from jobs import stages
    from pipelines.corpus.shardlist import evenly
    from pipelines.planning.measure import measure
    from pipelines.planning.plan import project, store
    from pipelines.runs import cluster

    if asked.gpus is not None:
        workers = dataclasses.replace(workers, device="cuda", workers=asked.gpus)
    run, config, shards = _corpus(asked, corpus)
    with ray_session(session):
        cluster.connect()
        session_s = time.monotonic() - started + _tracking_s()
        if asked.gpus is not None and not cluster.capacity().gpus:
            raise UserError(
                f"{asked.gpus}: Ray has no GPU here to measure on; plan where there is one, "
                "or leave `gpus` out for a plan on CPU cores",
                "gpus",
            )
        present = stages.resources(dataclasses.replace(workers, workers=None))
        here = min(workers.workers or present.workers, present.workers)
        resources = stages.resources(dataclasses.replace(workers, workers=here))
        picked = [shards[place] for place in evenly(len(shards), asked.measure)]
        say(f"plan: measuring {len(picked)} of {len(shards)} shards, {resources.workers} workers on {resources.device}")
        held = contextlib.nullcontext() if run is None else run.lease("plan")
        with held, _scratch(run, cluster.capacity().nodes) as scratch:
            measured = measure(picked, config, resources, scratch, session_s, asked.seconds)
    samples = None if asked.samples is None else round(asked.samples)
    found = project(measured, len(shards), sum(s.size for s in shards), samples, workers.workers)
    found |= {"encoder": config.encoder, "run": None if run is None else run.uri}
    if run is not None:
        store(run, found)
    _show(found)
    return found


def _corpus(asked: PlanOptions, corpus: CorpusOptions) -> tuple[Any, Any, list]:
    """The run, if one is named, the config and the shards."""
    from jobs import stages
    from pipelines.corpus.shards import expand_shards

    if asked.run is not None:
        run = stages.open_run(RunOptions(run=asked.run), dataclasses.replace(corpus, overwrite=False))
        stages.check_encoder_named(run.config.encoder, corpus)
        return run, run.config, run.shards
    for name in ("shards", "encoder"):
        if getattr(corpus, name) is None:
            raise UserError("needed, or `run` of a run that has it", name)
    shards = expand_shards(corpus.shards, tell=say)
    say(f"shards: {len(shards)}, {sum(s.size for s in shards) / 1e6:,.1f} MB")
    return None, stages.corpus_config(corpus, None), shards


def _tracking_s() -> float:
    """Seconds that a command spends on MLflow: its import, and a store that is new, as the first curate's is."""
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="hardset-plan-") as folder,
        tracked("plan", RunOptions(run="plan", mlflow=f"sqlite:///{folder}/mlflow.db")),
    ):
        pass
    return time.monotonic() - started


def _scratch(run: Any, nodes: int) -> Any:
    """A folder to measure in: below the run, as its store counts, else a local one."""
    if run is not None:
        return contextlib.nullcontext(run.path(".parts", "plan"))
    if nodes > 1:
        raise UserError("needed on a cluster of several nodes, which measure into a folder that all can reach", "run")
    return tempfile.TemporaryDirectory(prefix="hardset-plan-")


def _show(found: dict[str, Any]) -> None:
    """The plan as a short table."""
    from pipelines.planning.plan import STAGES
    from pipelines.runs.progress import duration

    seconds, memory = found["seconds"], found["memory_bytes"]
    low, high = (duration(value) for value in seconds["interval"])
    hours = f"{found['gpu_hours']:,.1f} GPU hours, " if found["device"] == "cuda" else ""
    kept = {name: _size(value) for name, value in found["storage_bytes"].items()}
    lines = {
        "corpus": f"{found['samples']:,} samples in {found['shards']:,} shards, {_size(found['read_bytes'])} to read",
        "workers": f"{found['workers']} on {found['device']}, {found['cores']:g} cores",
        "time": f"{duration(seconds['total'])} ({low} to {high}, {found['interval']})",
        "of which": " · ".join(f"{name} {duration(seconds[name])}" for name in ("start", *STAGES)),
        "cost": f"{hours}{found['core_hours']:,.1f} core hours",
        "rate": f"{found['samples_per_s']:,.0f} samples/s, {_size(found['read_bytes_per_s'])}/s from storage",
        "alone": " · ".join(f"{name} {rate:,.0f}/s" for name, rate in found["steps"].items()) + " in one worker",
        "bottleneck": found["bottleneck"],
        "storage": " · ".join(f"{name} {size}" for name, size in kept.items()),
        "memory": f"{_size(memory['worker'])} per worker, {_size(memory['driver'])} of the driver",
        "left out": f"{100 * found['bad_fraction']:.2f} % of the measured samples",
    }
    for name, text in lines.items():
        say(f"  {name:<11} {text}")


def _size(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


COMMAND = Command("plan", __doc__, (SessionOptions, PlanOptions, CorpusOptions, WorkerOptions), plan)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
