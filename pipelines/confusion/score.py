"""Confusion: an ensemble of small models, M members × T epochs -> how much they disagree about each sample.

    train   heads on the embeddings (pipelines.confusion.heads) or small image models (pipelines.confusion.images)
    score   driver: shards whose file is missing or old -> ScoreShards (Ray Data actors) -> confusion/SHARD.parquet

A Ray Data row is a shard's number, and what comes back is how many rows it has. An actor loads the members once and reads,
scores and writes a shard by itself: the column group has one file per shard, so no rows are regrouped behind the actors, a
shard computed twice is written twice the same, and what waits in memory does not grow with the corpus. Plain tasks would
load M × T checkpoints again for each shard (or move them to the GPU), so it is actors here, not `pipelines.runs.tasks`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.confusion.members import Member, Placement, report
from pipelines.runs import cluster, column_groups, columns, storage
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.progress import Progress
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import map_actors

CONFUSION = "confusion"
SCHEMA = pa.schema(
    [
        *columns.KEYS,
        columns.score_field("confusion.confusion"),
        pa.field("epochs", pa.int32(), metadata={"meaning": "epochs T that the score is a mean over"}),
        pa.field("seeds", pa.int32(), metadata={"meaning": "members M whose probabilities are averaged"}),
        columns.score_field("confusion.entropy_std"),
    ]
)


class ScoreShards:
    """Ray Data actor: shard numbers in, the shards' rows out; their confusion files are written on the way."""

    def __init__(
        self, scorer: type, members_uri: str, members: Sequence[Member], epochs: int, place: Placement, run_uri: str
    ):
        torch.set_num_threads(max(1, int(place.cpus_per_worker)))
        self.run_uri, self.epochs, self.seeds = run_uri, epochs, len(members)
        self.scorer = scorer(members_uri, members, epochs, place)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shards, sources = batch["shard"].tolist(), batch["source"].tolist()
        rows = [self._score(shard, source) for shard, source in zip(shards, sources)]
        return {"shard": batch["shard"], "rows": np.array(rows)}

    def _score(self, shard: int, source: str) -> int:
        parts = self.scorer.shard(self.run_uri, shard)
        table = columns.concat((confusion_table(keys, found, self.seeds) for keys, found in parts), SCHEMA)
        column_groups.write(self.run_uri, CONFUSION, shard, table, source)
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
    return pa.table({field.name: keys[field.name] for field in columns.KEYS} | values).select(SCHEMA.names).cast(SCHEMA)


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
        raise StageFailed(f"confusion: members diverged ({told}); leave them out with `drop_diverged`, or lower `lr`")
    kept = [m for m in members if not drop or m.seed not in reasons]
    if not kept:
        raise StageFailed(f"confusion: all {len(members)} members diverged: {'; '.join(reasons.values())}")
    return kept, reasons


def check_same_encoder(run: Run, other: Run) -> None:
    """ValueError unless heads trained on one run's embeddings understand the other's."""
    ours, theirs = run.config, other.config
    if not ours.same_embedding(theirs):
        raise UserError(
            f"{other.uri}: embedded with {theirs.encoder!r}, the members learnt from {ours.encoder!r} "
            f"embeddings of {run.uri}; embed it with the same encoder, or take `input` images",
            "score_run",
        )


def score(
    run: Run, trained: Run, members: Sequence[Member], epochs: int, scorer: type, place: Placement
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
    pending = column_groups.pending(run.uri, CONFUSION, sources)
    progress = Progress(CONFUSION, len(pending), skipped=len(facts) - len(pending))
    constructor = (scorer, trained.uri, tuple(members), epochs, place, run.uri)
    for shard, rows in _score_shards(pending, sources, constructor, place):
        if rows != facts[shard]["rows"]:
            raise StageFailed(f"confusion: shard {shard} has {facts[shard]['rows']} embeddings, {rows} were scored")
        progress.shard(rows)
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


def _score_shards(
    pending: Sequence[int], sources: Sequence[str], constructor: tuple, place: Placement
) -> Iterator[tuple[int, int]]:
    """Yield (shard, rows) as shards are written."""
    if not pending:
        return
    ray = cluster.connect()
    # One row per block: an actor takes a shard at a time, and a free one takes the next.
    items = [{"shard": shard, "source": sources[shard]} for shard in pending]
    dataset = map_actors(
        ray.data.from_items(items, override_num_blocks=len(items)),
        ScoreShards,
        constructor,
        workers=min(place.workers, len(items)),
        num_cpus=place.cpus_per_worker,
        num_gpus=1 if place.device == "cuda" else 0,
        batch_size=1,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            yield from zip(batch["shard"].tolist(), batch["rows"].tolist())
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        raise StageFailed(
            f"confusion: a scoring worker died ({storage.first_line(error)}); finished shards are kept"
        ) from error
