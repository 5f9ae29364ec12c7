"""Embed: shards -> one Parquet file of embeddings per shard, and a quarantine file beside it.

A stage like every other (`pipelines.runs.executor`): a pool of Ray Data actors takes whole shards, each through an
`Embedder` (`pipelines.curation.embedder`) in a process of its own, so that a sample which kills or hangs it is left out.
The quarantine file comes first: a shard counts as done when its file in `embeddings/` is there, whole.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.corpus.loss import Loss, loss_of
from pipelines.corpus.samples import SORTING
from pipelines.corpus.shards import shard_digest
from pipelines.curation.workers import STEPS, Resources
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed
from pipelines.runs.executor import Pool, Stage, Worker, write_shards
from pipelines.runs.record import CorpusConfig, Run, fingerprints
from pipelines.runs.tasks import in_order


def embedding_source(config: CorpusConfig, digest: str) -> str:
    """The source of a shard's embeddings: the config that matters to them and the shard's bytes."""
    return embedding_sources(config)(digest)


def embedding_sources(config: CorpusConfig) -> Callable[[str], str]:
    """`embedding_source` as a function of the digest."""
    return fingerprints(columns.EMBEDDINGS, config.identity())


def pending_shards(run: Run) -> list[int]:
    """Positions of the shards whose embeddings are missing or were made from another config or other bytes.

    Size and time of modification decide where they can; where only the time differs the bytes are hashed, once.
    """
    config, shards, verified = run.config, run.shards, run.record.get("verified", {})
    pending, doubtful, source_of = [], [], embedding_sources(config)
    facts = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(shards))
    for position, (shard, fact) in enumerate(zip(shards, facts)):
        same = fact and fact["size"] == shard.size and fact["source"] == source_of(fact["digest"])
        if not same:
            pending.append(position)
        elif shard.mtime_ns not in (fact["mtime_ns"], verified.get(str(position))):
            doubtful.append((position, fact["digest"]))
    digests = in_order(shard_digest, [(shards[position].url,) for position, _ in doubtful])
    same_bytes = {}
    for (position, before), now in zip(doubtful, digests):
        if now == before:
            same_bytes[str(position)] = shards[position].mtime_ns
        else:
            pending.append(position)
    run.note_verified(same_bytes)
    return sorted(pending)


def embed(run: Run, resources: Resources, max_bad_fraction: float = 0.01) -> dict:
    """Embed the shards of a run that are not embedded yet.

    Returns
    -------
    counts : dict
        rows, left_out (samples in quarantine), shards done now and skipped, seconds by step.

    Raises
    ------
    StageFailed
        If more than `max_bad_fraction` of the samples are in quarantine, the counts do not reconcile, or the encoder
        fails for every sample. Finished shards are kept.
    StorageError
        If a shard cannot be read.
    """
    started = time.monotonic()
    run.require_precision(resources.precision)
    pending = pending_shards(run)
    seconds = dict.fromkeys(STEPS, 0.0)
    for done in embed_shards(run, pending, resources):
        for step, value in done["seconds"].items():
            seconds[step] += value
    return _finish(run, pending, seconds, time.monotonic() - started, max_bad_fraction, resources)


def embed_shards(run: Run, pending: list[int], resources: Resources) -> Iterator[dict[str, Any]]:
    """Yield shard, rows, left_out and seconds by step of each shard as its files are in place."""
    stage = Stage(
        "embed",
        columns.EMBEDDINGS,
        [""] * len(run.shards),  # the worker knows it when it has read the shard
        make_embedder,
        (run.config, resources, run.uri),
        pool=Pool(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker),
        limit_s=resources.sample_limit_s,
    )
    yield from write_shards(run, stage, pending)


def make_embedder(config: CorpusConfig, resources: Resources, run_uri: str | None) -> Worker:
    """An `Embedder`; torch is imported where it is made, a driver does without."""
    from pipelines.curation.embedder import Embedder

    return Embedder(config, resources, run_uri)


def _too_many_bad(loss: Loss, rows: int, limit: float, apart: int) -> None:
    rest = f", {loss.estimated} of them in unreadable rests by estimate" if loss.rests else ""
    why = f"; {apart} stand in two places of their tar: {SORTING}" if apart else ""
    raise StageFailed(
        f"{loss.samples} of {rows + loss.samples} samples are lost{rest}, a fraction of {loss.fraction(rows):.4f}, "
        f"more than `max_bad_fraction` {limit}{why}; finished shards are kept, and hardset inspect lists the reasons"
    )


def _finish(
    run: Run, done: list[int], seconds: dict[str, float], elapsed: float, limit: float, resources: Resources
) -> dict:
    """Reconcile all shards, old and new, settle the classes, and note the stage."""
    facts = run.embedding_facts()
    rows, left_out = sum(f["rows"] for f in facts), sum(f["left_out"] for f in facts)
    loss, apart = loss_of(facts), sum(f.get("apart", 0) for f in facts)
    if loss.fraction(rows) > limit:
        _too_many_bad(loss, rows, limit, apart)
    if not rows:
        raise StageFailed("embed: no sample of any shard is usable; hardset inspect lists the reasons")
    counts = {
        "rows": rows,
        "left_out": left_out,
        "lost": {"certain": loss.certain, "estimated": loss.estimated, "bytes": loss.bytes},
        "rotated": sum(f.get("rotated", 0) for f in facts),
        "shards_done": len(done),
        "shards_skipped": len(facts) - len(done),
        "seconds": elapsed,
        "seconds_by_step": seconds,
        "workers": resources.most_workers,
        "device": resources.device,
        "precision": resources.precision,
    }
    if done or run.stage("embed") is None:
        run.settle_classes(facts)
        run.finish_stage("embed", **counts)
    return counts
