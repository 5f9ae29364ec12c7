"""Plan: from what a few shards took (`pipelines.planning.measure`) to what a whole corpus will take, and what it did take.

Arithmetic only; docs/scale.md writes it out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pipelines.runs import columns, storage
from pipelines.runs.record import Run

CONFIDENCE = 0.9
STAGES = ("embed", "fit", "score", "select", "report")
# Of the driver, measured with a million shard entries (benchmarks/scale.md).
DRIVER_BYTES = 500 << 20
DRIVER_BYTES_PER_SHARD = 3_400
DRIVER_S_PER_TASK = 0.0005


@dataclasses.dataclass(frozen=True)
class StageCost:
    """Seconds of a stage: `fixed` once, `per_shard` for each on the cluster that was measured."""

    fixed: float
    per_shard: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a few shards took.

    Attributes
    ----------
    shard_bytes, shard_samples : tuple of int
        Of each measured shard; samples count those left out.
    left_out : int
        Samples of the measured shards that went to quarantine.
    step_seconds : dict
        read, decode, transfer, model, write: seconds per sample in one worker that runs alone.
    batch_seconds : tuple of float
        Seconds per sample of consecutive parts of the real pipeline, all workers together, after it has started.
    startup_s : float
        Of the pipeline: until the workers work, and after the last one has ended.
    session_s : float
        Of the command: imports, Ray, the encoder, MLflow.
    stages : dict of StageCost
        fit, score, select, report.
    bytes_per_sample : dict
        Written, by column group.
    worker_bytes : int
        Peak memory of a worker's process.
    device : str
    workers : int
        That ran side by side, each with `decoders` threads that decode.
    cores : float
        Of the cluster that was measured.
    """

    shard_bytes: tuple[int, ...]
    shard_samples: tuple[int, ...]
    left_out: int
    step_seconds: dict[str, float]
    batch_seconds: tuple[float, ...]
    startup_s: float
    session_s: float
    stages: dict[str, StageCost]
    bytes_per_sample: dict[str, float]
    worker_bytes: int
    device: str
    workers: int
    decoders: int
    cores: float

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def bytes_per_input(self) -> float:
        return sum(self.shard_bytes) / self.samples


def relative_half_width(values: Sequence[float]) -> float:
    """Half the width of the t-interval of a mean at `CONFIDENCE`, as a fraction of the mean; 0 for a single value."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return 0.0
    t = stdtrit(len(x) - 1, 0.5 + CONFIDENCE / 2)
    return float(t * x.std(ddof=1) / math.sqrt(len(x)) / x.mean())


def project(
    measured: Measured, num_shards: int, total_bytes: int, samples: int | None = None, workers: int | None = None
) -> dict[str, Any]:
    """What the whole corpus will take, JSON-able.

    Parameters
    ----------
    measured : Measured
    num_shards, total_bytes : int
        Of the listed shards.
    samples : int, optional
        Plan for so many samples in shards like these, instead of for the listed shards.
    workers : int, optional
        Plan for so many workers. Their rates add up, and so do the cores that come with each: what storage and network
        must bear for that is stated as `read_bytes_per_s`.

    Returns
    -------
    plan : dict
        samples, shards, seconds (by stage, total, interval), hours of GPUs or cores, storage_bytes by column group,
        memory_bytes of a worker and of the driver, rates, bottleneck.
    """
    workers = workers or measured.workers
    per_shard = measured.samples / len(measured.shard_samples)
    unsure_of_samples = 0.0
    if samples is None:
        samples = round(total_bytes / measured.bytes_per_input)
        if len(measured.shard_samples) < num_shards:
            unsure_of_samples = relative_half_width(
                [s / b for s, b in zip(measured.shard_samples, measured.shard_bytes)]
            )
    else:
        num_shards = max(1, round(samples / per_shard))
    speedup = workers / measured.workers
    per_sample = float(np.mean(measured.batch_seconds)) / speedup
    seconds = {"start": measured.session_s, "embed": measured.startup_s + samples * per_sample}
    for name, cost in measured.stages.items():
        seconds[name] = cost.fixed + num_shards * max(cost.per_shard / speedup, DRIVER_S_PER_TASK)
    unsure = math.hypot(relative_half_width(measured.batch_seconds), unsure_of_samples)
    total = sum(seconds.values())
    spread = unsure * (total - seconds["start"] - measured.startup_s)
    cores = measured.cores * speedup
    return {
        "samples": samples,
        "samples_interval": _around(samples, unsure_of_samples * samples),
        "shards": num_shards,
        "device": measured.device,
        "workers": workers,
        "cores": cores,
        "seconds": seconds | {"total": total, "interval": _around(total, spread)},
        "interval": f"{CONFIDENCE:.0%} t-interval from {len(measured.batch_seconds)} parts of the measured run and "
        f"{len(measured.shard_samples)} shards; another load or slower storage later is not in it",
        "gpu_hours": workers * seconds["embed"] / 3600 if measured.device == "cuda" else 0.0,
        "core_hours": cores * total / 3600,
        "samples_per_s": 1 / per_sample,
        "samples_per_s_per_worker": 1 / per_sample / workers,
        "read_bytes": samples * measured.bytes_per_input,
        "read_bytes_per_s": measured.bytes_per_input / per_sample,
        "storage_bytes": {name: value * samples for name, value in measured.bytes_per_sample.items()},
        "memory_bytes": {
            "worker": measured.worker_bytes,
            "driver": DRIVER_BYTES + DRIVER_BYTES_PER_SHARD * num_shards,
        },
        "bad_fraction": measured.left_out / measured.samples,
        "steps": steps(measured),
        "bottleneck": bottleneck(measured),
        "measured": dataclasses.asdict(measured),
    }


def _around(value: float, half: float) -> list[float]:
    return [max(0.0, value - half), value + half]


def steps(measured: Measured) -> dict[str, float]:
    """Samples per second of each step in one worker with nothing else to do."""
    lanes = {"decode": measured.decoders}
    return {name: lanes.get(name, 1) / max(value, 1e-9) for name, value in measured.step_seconds.items()}


def bottleneck(measured: Measured) -> str:
    """The slowest step, and what would make the whole faster, in a sentence.

    On a GPU steps overlap and the slowest sets the pace; on CPUs all share the cores, so the largest share does.
    """
    rates = steps(measured)
    slowest = min(rates, key=rates.__getitem__)
    advice = {
        "read": "storage: read from a nearer or faster store, or with more workers side by side",
        "decode": "decoding on CPUs: give each worker more cores, or store smaller images",
        "transfer": "copying to the GPU: larger batches",
        "model": "the encoder: more GPUs, or a smaller one",
        "write": "writing embeddings: a faster store, or float16 embeddings",
    }
    advice["model"] = (
        advice["model"] if measured.device == "cuda" else "the encoder: a GPU, more cores, or a smaller one"
    )
    if measured.device == "cuda":
        pace = 1 / float(np.mean(measured.batch_seconds)) / measured.workers
        if pace < 0.6 * rates[slowest]:
            return (
                f"cores: a worker alone could do {rates[slowest]:,.0f} samples/s, together they do {pace:,.0f} each; "
                "more CPU cores per GPU"
            )
        return f"{slowest}: {rates[slowest]:,.0f} samples/s per worker at most; {advice[slowest]}"
    share = measured.step_seconds[slowest] / sum(measured.step_seconds.values())
    return f"{slowest}: {100 * share:.0f} % of a worker's time; {advice[slowest]}"


def store(run: Run, plan: dict[str, Any]) -> None:
    """Keep a plan with the run that it is for, so that `inspect` can hold it against what happened."""
    run.finish_stage("plan", plan=plan)


def against_actual(run: Run) -> dict[str, Any] | None:
    """Planned beside actual of a run that has a plan, None without one.

    Returns
    -------
    comparison : dict
        By quantity (samples, bad_fraction, `seconds STAGE` of finished stages, `bytes GROUP`): planned, actual and their
        ratio, actual / planned; `note` where a stage was resumed, so that its seconds are of its last part.
    """
    entry = run.stage("plan") or run.record  # where earlier versions kept it
    plan = entry.get("plan")
    if plan is None:
        return None
    stages = [name for name in STAGES if name in plan["seconds"]]
    planned = {f"seconds {name}": plan["seconds"][name] for name in stages}
    actual: dict[str, float] = {}
    for name in stages:
        entry = run.stage("select/hard" if name == "select" else name)
        if entry and "seconds" in entry:
            actual[f"seconds {name}"] = entry["seconds"]
    embedded = run.stage("embed")
    if embedded:
        samples = embedded["rows"] + embedded["left_out"]
        planned |= {"samples": plan["samples"], "bad_fraction": plan["bad_fraction"]}
        actual |= {"samples": samples, "bad_fraction": embedded["left_out"] / max(1, samples)}
        for group in (columns.EMBEDDINGS, columns.DIFFICULTY, columns.QUARANTINE):
            planned[f"bytes {group}"] = plan["storage_bytes"][group]
            actual[f"bytes {group}"] = sum(info.size for _, info in storage.list_infos(run.path(group)))
    found: dict[str, Any] = {name: _beside(planned[name], value) for name, value in actual.items()}
    if embedded and embedded["shards_skipped"]:
        found["note"] = f"embed was resumed: its seconds are those of the last {embedded['shards_done']} shards"
    return found


def _beside(planned: float, actual: float) -> dict[str, float | None]:
    return {"planned": planned, "actual": actual, "ratio": actual / planned if planned else None}
