"""Embed: shards -> one Parquet file of embeddings per shard, and a quarantine file beside it.

    read (tasks, one per shard)  ->  EmbedImages (actors, a GPU each where there is one)  ->  write_part (tasks)
                                                                    driver: last part of a shard seen -> commit_shard (task)

What travels between the stages is the encoded bytes of an image and, after the actor, its embedding. The driver sees one
tiny row per block. A block's part has a name made of its shard and first row, so a block that Ray computes twice is
written once; a shard counts as done when its file in `embeddings/` is there, and that appears whole or not at all.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.corpus.loss import READER_FACTS, Loss, loss_of
from pipelines.corpus.samples import SORTING, label_source
from pipelines.corpus.shards import shard_digest
from pipelines.curation.workers import STEPS, Resources
from pipelines.runs import cluster, column_groups, columns, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.progress import Progress
from pipelines.runs.record import CorpusConfig, Run, Shard, fingerprints
from pipelines.runs.tasks import in_order, map_actors

if TYPE_CHECKING:
    import ray

SHARDS_AT_ONCE = 20_000  # per Ray dataset, whose driver puts a pickled read task for each before it reads the first
PART_NOTE = pa.schema(
    [
        ("shard", pa.int32()),
        ("first", pa.int64()),  # position within the shard's stream of the part's first row
        ("rows", pa.int64()),
        ("path", pa.string()),
        ("end", pa.string()),  # the reader's closing words, in the last part of a shard
        ("seconds", pa.string()),
    ]
)


def write_part(table: pa.Table, run_uri: str) -> pa.Table:
    """Ray Data task: put one block of embeddings beside the run; a row of PART_NOTE says where."""
    started = time.perf_counter()
    shard, first = table["shard"][0].as_py(), table["position"][0].as_py()
    path = storage.join(run_uri, ".parts", columns.EMBEDDINGS, f"{shard:06d}", f"{first:012d}.arrow")
    with storage.write_atomic(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    spent = table["seconds"][0].as_py()  # null where Ray has cut an actor's large block in two
    seconds = (json.loads(spent) if spent else {}) | {"write": time.perf_counter() - started}
    end = table["end"][table.num_rows - 1].as_py()
    note = {
        "shard": shard,
        "first": first,
        "rows": table.num_rows,
        "path": path,
        "end": end,
        "seconds": json.dumps(seconds),
    }
    return pa.Table.from_pylist([note], schema=PART_NOTE)


def commit_shard(shard: int, paths: list[str], end: dict, entry: Shard, config: CorpusConfig, run_uri: str) -> dict:
    """Ray task: the parts of one shard -> its quarantine file, then its embeddings file, which marks it done."""
    schema = columns.embeddings_schema(config.width, config.dtype, config.views)
    parts = [_read_part(path) for path in paths]
    samples = pa.concat_tables(parts).filter(pa.compute.field("end").is_null())
    good, bad = samples.filter(samples["reason"].is_null()), samples.filter(samples["reason"].is_valid())
    if samples.num_rows != end["entries"]:
        raise StageFailed(f"shard {shard}: the reader saw {end['entries']} samples, the parts hold {samples.num_rows}")
    source = embedding_source(config, end["digest"])
    bad = bad.append_column("stage", pa.array(["embed"] * bad.num_rows, pa.string()))
    quarantined = bad.select(columns.QUARANTINE_SCHEMA.names).cast(columns.QUARANTINE_SCHEMA)
    column_groups.write(run_uri, columns.QUARANTINE, shard, quarantined, source)
    facts = {
        "left_out": bad.num_rows,
        "max_label": pa.compute.max(good["label"]).as_py(),
        **{name: end[name] for name in READER_FACTS},
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
    }
    column_groups.write(run_uri, columns.EMBEDDINGS, shard, good.select(schema.names).cast(schema), source, **facts)
    return {"rows": good.num_rows, "left_out": bad.num_rows}


def _read_part(path: str) -> pa.Table:
    filesystem, inner = storage.open_filesystem(path)
    with filesystem.open_input_file(inner) as stream:
        return pa.ipc.open_file(stream).read_all()


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
        If more than `max_bad_fraction` of the samples are in quarantine, the counts do not reconcile, or a shard cannot
        be read. Finished shards are kept.
    """
    started = time.monotonic()
    run.require_precision("bfloat16" if resources.device == "cuda" else "float32")
    pending = pending_shards(run)
    progress = Progress("embed", len(pending), skipped=len(run.shards) - len(pending))
    seconds = dict.fromkeys(STEPS, 0.0)
    for counts, spent in embed_shards(run, pending, resources):
        for step, value in spent.items():
            seconds[step] += value
        progress.shard(counts["rows"], counts["left_out"])
    storage.remove_tree(run.path(".parts", columns.EMBEDDINGS))
    return _finish(run, pending, seconds, time.monotonic() - started, max_bad_fraction, resources)


def embed_shards(
    run: Run, pending: list[int], resources: Resources, noted: Callable[[int], None] = lambda rows: None
) -> Iterator[tuple[dict, dict[str, float]]]:
    """Yield (counts, seconds by step) of each shard as its files are in place; `noted(rows)` is told of each block."""
    if not pending:
        return
    ray = cluster.connect()
    config, shards = run.config, run.shards
    commit = ray.remote(commit_shard).options(num_cpus=0.25, max_retries=3)
    parts: dict[int, dict[int, dict]] = {}
    commits: dict = {}
    starts = range(0, len(pending), SHARDS_AT_ONCE)
    for note in itertools.chain.from_iterable(
        _notes(run, pending[start : start + SHARDS_AT_ONCE], resources) for start in starts
    ):
        position = note["shard"]
        noted(note["rows"] - (note["end"] is not None))
        parts.setdefault(position, {})[note["first"]] = note
        notes = [parts[position][first] for first in sorted(parts[position])]
        # Blocks of a shard may arrive out of order: it is whole when its last row is there and all before it.
        if notes[-1]["end"] and sum(n["rows"] for n in notes) == notes[-1]["first"] + notes[-1]["rows"]:
            end = json.loads(notes[-1]["end"])
            reference = commit.remote(position, [n["path"] for n in notes], end, shards[position], config, run.uri)
            spent = _sum_seconds([json.loads(n["seconds"]) for n in notes] + [{"read": end["seconds"]}])
            commits[reference] = (position, spent)
            del parts[position]
        ready, _ = ray.wait(list(commits), num_returns=len(commits), timeout=0) if commits else ([], [])
        for reference in ready:
            yield _committed(run, reference, commits)
    for reference in list(commits):
        yield _committed(run, reference, commits)
    if parts:
        raise StageFailed(f"embed: shards {sorted(parts)} came out incomplete; start the same command again")


def _committed(run: Run, reference: "ray.ObjectRef", commits: dict) -> tuple[dict, dict[str, float]]:
    position, spent = commits.pop(reference)
    counts = cluster.connect().get(reference)
    # Only now: a commit that is killed after its last write is run again, and needs the parts.
    storage.remove_tree(run.path(".parts", columns.EMBEDDINGS, f"{position:06d}"))
    return counts, spent


def _notes(run: Run, pending: list[int], resources: Resources) -> Iterator[dict]:
    """Stream the shards through the actors; yields one PART_NOTE row per written block."""
    # Torch and Ray, which a driver with nothing to embed does not wait for.
    from pipelines.corpus.datasource import read_shards
    from pipelines.curation.embedder import EmbedImages

    config, shards = run.config, run.shards
    dataset = read_shards([(position, shards[position]) for position in pending], label_source(config))
    dataset = map_actors(
        dataset,
        EmbedImages,
        (config, resources),
        workers=resources.workers,
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
    dataset = dataset.map_batches(
        write_part, fn_kwargs={"run_uri": run.uri}, batch_size=None, batch_format="pyarrow", num_cpus=0.25
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _sum_seconds(entries: list[dict[str, float]]) -> dict[str, float]:
    return {step: sum(entry.get(step, 0.0) for entry in entries) for step in STEPS}


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
        "shards_done": len(done),
        "shards_skipped": len(facts) - len(done),
        "seconds": elapsed,
        "seconds_by_step": seconds,
        "workers": resources.workers,
        "device": resources.device,
    }
    if done or run.stage("embed") is None:
        run.settle_classes(facts)
        run.finish_stage("embed", **counts)
    return counts
