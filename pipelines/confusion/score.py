"""Confusion: an ensemble of small models, M members × T epochs -> how much they disagree about each sample.

    train   heads on the embeddings (pipelines.confusion.heads) or small image models (pipelines.confusion.images)
    score   driver: shards whose file is missing or old -> ScoreShards (Ray Data actors) -> confusion/SHARD.parquet

A Ray Data row is a shard's number, and what comes back is how many rows it has. An actor loads the members once and reads,
scores and writes a shard by itself: the column group has one file per shard, so no rows are regrouped behind the actors, a
shard computed twice is written twice the same, and what waits in memory does not grow with the corpus. Plain tasks would
load M × T checkpoints again for each shard (or move them to the GPU), so it is actors here, not `pipelines.tasks`.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from ops.head_ensemble import HeadEntropies
from pipelines import columns
from pipelines.confusion.members import Member, find_member, load_epoch, report
from pipelines.curation import percentiles
from pipelines.progress import Progress
from pipelines.run import Run, StageFailed, fingerprint

CONFUSION = "confusion"
SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.score_field("confusion.confusion"),
        pa.field("epochs", pa.int32(), metadata={"meaning": "epochs T that the score is a mean over"}),
        pa.field("seeds", pa.int32(), metadata={"meaning": "members M whose probabilities are averaged"}),
        columns.score_field("confusion.entropy_std"),
        *columns.percentile_fields("confusion.confusion"),
    ]
)


class Training(Protocol):
    """How members are made: `HeadTraining` or `ImageTraining`."""

    model: str

    @property
    def form(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ScoringPlan:
    """The actors of a scoring pass. None of it changes a score."""

    device: str = "cpu"
    workers: int = 1
    cpus_per_worker: float = 1.0
    batch_rows: int | None = None


class HeadScorer:
    """The entropies of all heads, in products of a batch of embeddings with many heads."""

    def __init__(self, run_uri: str, members: Sequence[Member], epochs: int, plan: ScoringPlan):
        with ThreadPoolExecutor(16) as pool:  # on an object store each checkpoint is a round trip
            loads = [[pool.submit(load_epoch, run_uri, m, epoch) for m in members] for epoch in range(1, epochs + 1)]
            states = [[load.result() for load in epoch] for epoch in loads]
        self.mean, self.scale = states[0][0]["mean"], states[0][0]["scale"]
        heads = [[{k: v for k, v in s.items() if k not in ("mean", "scale")} for s in epoch] for epoch in states]
        self.entropies = HeadEntropies(heads, plan.device, plan.batch_rows)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Entropies (n, T) in bits of embeddings (n, d)."""
        x = torch.from_numpy(features.astype(np.float32))
        return self.entropies((x - self.mean) / self.scale).numpy()

    def shard(self, run_uri: str, shard: int) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """(keys, entropies) of a shard's batches."""
        names = [field.name for field in columns.KEYS] + ["embedding"]
        for batch in columns.iter_batches(run_uri, columns.EMBEDDINGS, shard, names, batch_rows=8192):
            yield batch, self(columns.vectors(batch["embedding"]))


class ScoreShards:
    """Ray Data actor: shard numbers in, the shards' rows out; their confusion files are written on the way."""

    def __init__(
        self, scorer: type, members_uri: str, members: Sequence[Member], epochs: int, plan: ScoringPlan, run_uri: str
    ):
        torch.set_num_threads(max(1, int(plan.cpus_per_worker)))
        self.run_uri, self.epochs, self.seeds = run_uri, epochs, len(members)
        self.scorer = scorer(members_uri, members, epochs, plan)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards, sources = batch["shard"].tolist(), batch["source"].tolist()
        rows = [self._score(shard, source) for shard, source in zip(shards, sources)]
        return {"shard": batch["shard"], "rows": np.array(rows)}

    def _score(self, shard: int, source: str) -> int:
        parts = self.scorer.shard(self.run_uri, shard)
        table = columns.concat((confusion_table(keys, found, self.seeds) for keys, found in parts), SCHEMA)
        columns.write(self.run_uri, CONFUSION, shard, table, source)
        return table.num_rows


def confusion_table(keys: pa.RecordBatch | pa.Table, entropies: np.ndarray, seeds: int) -> pa.Table:
    """The confusion columns of samples whose entropies at each epoch, (n, T) in bits, are given."""
    rows, epochs = entropies.shape
    values = {
        "confusion": entropies.mean(axis=1, dtype=np.float64),
        "epochs": np.full(rows, epochs),
        "seeds": np.full(rows, seeds),
        "entropy_std": entropies.std(axis=1, dtype=np.float64),
    }
    data = {field.name: keys[field.name] for field in columns.KEYS} | values
    unknown = pa.nulls(rows, pa.float32())  # percentiles, until all shards are scored
    return pa.table({name: data.get(name, unknown) for name in SCHEMA.names}).cast(SCHEMA)


def plan_members(run: Run, training: Training, seeds: Sequence[int]) -> list[Member]:
    """The members that an ensemble consists of, with the epochs that are there already.

    A member is made from the run's shards, how it is trained and its seed. The number of epochs is no part of that: a
    longer training goes on from a shorter one.
    """
    inputs = [facts["source"] for facts in run.embedding_facts()]
    sources = {seed: fingerprint("confusion member", inputs, dataclasses.asdict(training), seed) for seed in seeds}
    return [find_member(run.uri, training.form, seed, source) for seed, source in sources.items()]


def usable(members: Sequence[Member], epochs: int, commonest: float, drop: bool) -> tuple[list[Member], dict[int, str]]:
    """The members to score with, and why others diverged (by seed).

    Raises
    ------
    StageFailed
        If a member with a loss that is not finite would have to be used, or none is left.
    """
    reasons = {m.seed: reason for m in members if (reason := m.diverged(epochs, commonest))}
    fatal = {seed: why for seed, why in reasons.items() if why.startswith("loss")}
    if fatal and not drop:
        told = "; ".join(f"seed {seed}: {why}" for seed, why in fatal.items())
        raise StageFailed(f"confusion: members diverged ({told}); leave them out with --drop-diverged, or lower --lr")
    kept = [m for m in members if not drop or m.seed not in reasons]
    if not kept:
        raise StageFailed(f"confusion: all {len(members)} members diverged: {'; '.join(reasons.values())}")
    return kept, reasons


def check_same_encoder(run: Run, other: Run) -> None:
    """ValueError unless heads trained on one run's embeddings understand the other's."""
    ours, theirs = run.config, other.config
    if ours.encoder_fingerprint != theirs.encoder_fingerprint or ours.normalize != theirs.normalize:
        raise ValueError(
            f"--score-run {other.uri}: embedded with {theirs.encoder!r}, the members learnt from {ours.encoder!r} "
            f"embeddings of {run.uri}; embed it with the same encoder, or take --input images"
        )


def score(
    run: Run, trained: Run, members: Sequence[Member], epochs: int, scorer: type, plan: ScoringPlan
) -> dict[str, Any]:
    """Write `confusion/` of `run` with members of the run `trained` (it may be the same), where it is missing or old.

    Returns
    -------
    counts : dict
        rows, shards done now and skipped, seconds, seeds, epochs.

    Raises
    ------
    ValueError
        If the run is not embedded.
    StageFailed
        If a scoring worker dies again and again, or writes other rows than the run has. Finished shards are kept.
    """
    started = time.monotonic()
    facts = run.embedding_facts()
    made_from = [member.source for member in members]
    sources = [fingerprint(CONFUSION, f["source"], made_from, epochs) for f in facts]
    reference = fingerprint("reference", sources)
    final = [percentiles.source_of(source, reference) for source in sources]
    # New shards change every percentile but no older score: files that were scored are only completed again.
    incomplete, pending = percentiles.what_is_left(run, CONFUSION, sources, final)
    progress = Progress(CONFUSION, len(pending), skipped=len(facts) - len(pending))
    constructor = (scorer, trained.uri, tuple(members), epochs, plan, run.uri)
    for shard, rows in _score_shards(pending, sources, constructor, plan):
        if rows != facts[shard]["rows"]:
            raise StageFailed(f"confusion: shard {shard} has {facts[shard]['rows']} embeddings, {rows} were scored")
        progress.shard(rows)
    _complete(run, incomplete, final, reference)
    counts = {
        "rows": sum(f["rows"] for f in facts),
        "shards_done": len(pending),
        "shards_skipped": len(facts) - len(pending),
        "seconds": time.monotonic() - started,
    }
    entry = {"seeds": len(members), "epochs": epochs, "trained_on": trained.uri, "form": members[0].form}
    if pending or run.stage(CONFUSION) is None:
        run.finish_stage(CONFUSION, **counts, **entry, members=report(members, epochs))
    return counts | entry


def _complete(run: Run, shards: Sequence[int], sources: Sequence[str], reference: str) -> None:
    """Add the percentiles, once all shards of the run are scored."""
    if shards:
        rows = [facts["rows"] for facts in run.embedding_facts()]
        tables = percentiles.load(run, CONFUSION, reference) or percentiles.count(run, CONFUSION, rows, reference)
        percentiles.complete(run, CONFUSION, shards, sources, tables)


def _score_shards(
    pending: Sequence[int], sources: Sequence[str], constructor: tuple, plan: ScoringPlan
) -> Iterator[tuple[int, int]]:
    """Yield (shard, rows) as shards are written."""
    if not pending:
        return
    # One row per block: an actor takes a shard at a time, and a free one takes the next.
    items = [{"shard": shard, "source": sources[shard]} for shard in pending]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ScoreShards,
        fn_constructor_args=constructor,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(plan.workers, len(items))),
        num_cpus=plan.cpus_per_worker,
        num_gpus=1 if plan.device == "cuda" else 0,
        max_restarts=2,
        max_task_retries=2,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            yield from zip(batch["shard"].tolist(), batch["rows"].tolist())
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StageFailed(f"confusion: a scoring worker died ({reason}); finished shards are kept") from error
