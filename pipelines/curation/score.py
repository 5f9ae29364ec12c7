"""Score: embeddings and Gaussians -> the difficulty columns, one file per shard."""

import dataclasses
import io
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ops.arrays import on_device, to_numpy
from ops.difficulty import Reference, difficulty_weight, fit_centers, kmeans_difficulty
from ops.gaussian import Gaussians
from pipelines.curation import percentiles
from pipelines.curation.fit import load_gaussians
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order, write_shards
from pipelines.summary import group_summary

KMEANS_FILE = "kmeans.npz"
KMEANS_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How rmd becomes the weight of eq. 10."""

    temperature: float = 0.7
    c: float = 1e-3
    scale: str = "per_dim"


def score_shard(
    shard: int,
    source: str,
    scored: str,
    run_uri: str,
    gaussians: Gaussians,
    weighting: Weighting,
    centers: np.ndarray | None,
    device: str,
    tables: percentiles.Tables | None,
) -> int:
    """Ray task: write one shard's difficulty columns, percentiles too if ranks are given; returns its rows."""
    schema = columns.DIFFICULTY_SCHEMA if centers is None else columns.DIFFICULTY_SCHEMA.append(columns.KMEANS)
    names = [field.name for field in columns.KEYS] + ["label", "embedding"]
    batches = [
        _score_batch(batch, gaussians, weighting, centers, device, schema)
        for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, names)
    ]
    table = columns.concat(batches, schema)
    if tables is not None:
        table = percentiles.with_percentiles(
            table, columns.DIFFICULTY, columns.labels_or_minus_one(table["label"]), tables
        )
    column_groups.write(run_uri, columns.DIFFICULTY, shard, table, source, scored=scored)
    return table.num_rows


def _score_batch(
    batch: pa.RecordBatch,
    gaussians: Gaussians,
    weighting: Weighting,
    centers: np.ndarray | None,
    device: str,
    schema: pa.Schema,
) -> pa.Table:
    features = columns.vectors(batch["embedding"])
    labels = columns.labels_or_minus_one(batch["label"])
    # In float64: rmd is a small difference of two large distances, which float32 rounds to steps of 1e-4 of its spread.
    scores = gaussians.scores(on_device(features.astype(np.float64), device), on_device(labels, device))
    values = {
        name: to_numpy(getattr(scores, name))
        for name in ("md", "md_agn", "rmd", "nearest_class", "nearest_md", "margin")
    }
    values["weight"] = _weight(values["rmd"], weighting, gaussians)
    if centers is not None:
        values["kmeans"] = kmeans_difficulty(features, centers=centers)
    data = {name: batch[name] for name in ("key", "shard", "row", "label")}
    data |= {name: _nullable(value) for name, value in values.items()}
    unknown = pa.nulls(batch.num_rows, pa.float32())  # percentiles
    return pa.table({name: data.get(name, unknown) for name in schema.names}).cast(schema)


def _weight(rmd: np.ndarray, weighting: Weighting, gaussians: Gaussians) -> np.ndarray:
    if gaussians.reference is None:
        return np.full(len(rmd), np.nan, np.float32)
    return difficulty_weight(
        rmd,
        weighting.temperature,
        weighting.c,
        scale=weighting.scale,
        dim=gaussians.dim,
        reference=Reference(*gaussians.reference),
    )


def _nullable(values: np.ndarray) -> pa.Array:
    """NaN, and a class of -1, mean that there is no such value: null in Arrow."""
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return pa.array(values, mask=missing)


def kmeans_centers(run: Run, k: int, seed: int = 0) -> np.ndarray:
    """k-means centres of a run's embeddings, shape (k, d); fitted once and kept in `kmeans.npz`.

    At most `KMEANS_ROWS` embeddings, evenly spaced over the corpus, go through the driver.

    Raises
    ------
    ValueError
        If there are fewer embeddings than centres.
    """
    facts = run.embedding_facts()
    source = fingerprint("kmeans", [f["source"] for f in facts], k, seed)
    before = run.stage("kmeans")
    if before and before["source"] == source and storage.exists(run.path(KMEANS_FILE)):
        return np.load(io.BytesIO(storage.read_bytes(run.path(KMEANS_FILE))), allow_pickle=False)["centers"]
    rows = sum(f["rows"] for f in facts)
    if k > rows:
        raise UserError(f"{k}: more centres than the {rows} embeddings", "kmeans")
    step = -(-rows // KMEANS_ROWS)
    offsets = np.cumsum([0, *(f["rows"] for f in facts)])[:-1]
    shards = [(shard, int(-offset % step)) for shard, offset in enumerate(offsets)]
    sample = np.concatenate(list(in_order(_every, shards, run.uri, step)))
    centers = fit_centers(sample, k, seed)
    with storage.write_atomic(run.path(KMEANS_FILE)) as stream:
        np.savez(stream, centers=centers)
    run.finish_stage("kmeans", source=source, k=k, seed=seed, sampled=len(sample))
    return centers


def _every(shard: int, first: int, run_uri: str, step: int) -> np.ndarray:
    """Ray task: every `step`-th embedding of a shard."""
    column = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["embedding"])["embedding"]
    return columns.vectors(column)[first::step]


def score(run: Run, weighting: Weighting, centers: np.ndarray | None = None, device: str = "cpu") -> dict:
    """Write `difficulty/` for the shards whose embeddings, Gaussians or weighting changed.

    Returns
    -------
    counts : dict
        rows, shards done now and skipped, seconds; quantiles of each score if any shard was scored now.

    Notes
    -----
    Percentiles need the scores of all shards: a file is first written without, under another source, then completed. With
    ranks that are known (another run's Gaussians, one shard lost) each file is written once.
    """
    started = time.monotonic()
    facts = run.embedding_facts()
    scored, reference = _sources(run, weighting, centers, facts), percentiles.difficulty_reference(run)
    final = [percentiles.source_of(source, reference) for source in scored]
    tables = percentiles.load(run, columns.DIFFICULTY, reference)
    known = reference is None or tables is not None
    pending, unscored = percentiles.what_is_left(run, columns.DIFFICULTY, scored, final)
    shared = (run.uri, load_gaussians(run), weighting, centers, device, tables)
    items = [(s, final[s] if known else scored[s], scored[s]) for s in unscored]
    write_shards("score", score_shard, items, *shared, embedded=facts, num_gpus=1 if device == "cuda" else 0)
    if not known and pending:
        tables = percentiles.count(run, columns.DIFFICULTY, [f["rows"] for f in facts], reference)
    incomplete = sorted(set(pending) - set(unscored)) if known else pending
    percentiles.complete(run, columns.DIFFICULTY, incomplete, final, tables)
    counts = {
        "rows": sum(f["rows"] for f in facts),
        "shards_done": len(pending),
        "shards_skipped": len(facts) - len(pending),
        "seconds": time.monotonic() - started,
    }
    if pending or run.stage("score") is None:
        counts["quantiles"] = group_summary(run, columns.DIFFICULTY)["quantiles"]
        run.finish_stage("score", **counts, weighting=dataclasses.asdict(weighting))
    return counts


def _sources(run: Run, weighting: Weighting, centers: np.ndarray | None, facts: Sequence[dict]) -> list[str]:
    """What each shard's scores are made from. ValueError if the Gaussians are missing or of other embeddings."""
    fitted = run.stage("fit")
    if fitted is None:
        raise UserError(
            f"{run.uri}: no Gaussians yet; run hardset fit first, or score with `gaussians` of another run",
            "run",
        )
    if "from" not in fitted and fitted["embeddings"] != fingerprint([f["source"] for f in facts]):
        raise UserError(f"{run.uri}: embeddings changed since the Gaussians were fitted; run hardset fit first", "run")
    kmeans = None if centers is None else fingerprint(centers.tolist())
    how = (fitted["source"], dataclasses.asdict(weighting), kmeans, columns.DIFFICULTY_SCHEMA.names)
    return [fingerprint(columns.DIFFICULTY, f["source"], *how) for f in facts]
