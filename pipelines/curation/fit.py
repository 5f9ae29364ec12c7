"""Fit: embeddings -> the class-conditional and class-agnostic Gaussians of a run, and the reference its weights refer to.

Idempotent tasks return the sums of a shard, of several in a run of more than 1,024; the driver adds them in shard order,
so that the result does not depend on the number of workers, down to the last bit.
"""

import dataclasses
import io
import time
import zipfile

import numpy as np

from ops.arrays import on_device, to_numpy
from ops.difficulty import Reference
from ops.gaussian import Gaussians, GaussianStats
from pipelines.curation import percentiles
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError, concerning
from pipelines.runs.progress import Progress
from pipelines.runs.record import CorpusConfig, Run, fingerprint
from pipelines.runs.tasks import in_order, merged_parts

GAUSSIANS = "gaussians.npz"


@dataclasses.dataclass
class ReferenceSums:
    """Count, mean, sum of squared deviations, minimum and maximum of rmd; merges exactly (Chan et al.)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def add(self, other: "ReferenceSums") -> "ReferenceSums":
        count = self.count + other.count
        if not other.count:
            return self
        step = other.mean - self.mean
        return ReferenceSums(
            count,
            self.mean + step * other.count / count,
            self.squares + other.squares + step**2 * self.count * other.count / count,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @classmethod
    def of(cls, rmd: np.ndarray) -> "ReferenceSums":
        values = rmd.astype(np.float64)
        return cls(len(values), values.mean(), ((values - values.mean()) ** 2).sum(), values.min(), values.max())

    def reference(self) -> Reference:
        return Reference(self.mean, float(np.sqrt(self.squares / self.count)), self.low, self.high)


def shard_statistics(
    shard: int, run_uri: str, num_classes: int, views: int, pilot: np.ndarray, device: str
) -> GaussianStats:
    """Ray task: the mergeable statistics of one shard, all its views."""
    stats = GaussianStats(num_classes, pilot.shape[0], pilot=pilot)
    names = ["label", "embedding"] + (["augmented"] if views > 1 else [])
    for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, names):
        labels = columns.labels_or_minus_one(batch["label"])
        for name in names[1:]:
            features = columns.vectors(batch[name]).reshape(-1, pilot.shape[0])
            repeats = np.repeat(labels, len(features) // max(1, len(labels)))
            stats.update(on_device(features, device), on_device(repeats, device) if num_classes else None)
    return stats


def shard_reference(shard: int, run_uri: str, gaussians: Gaussians, device: str) -> ReferenceSums:
    """Ray task: the sums of rmd over one shard's labelled samples."""
    sums = ReferenceSums()
    for batch in column_groups.iter_batches(run_uri, columns.EMBEDDINGS, shard, ["label", "embedding"]):
        labels = columns.labels_or_minus_one(batch["label"])
        features = columns.vectors(batch["embedding"]).astype(np.float64)
        rmd = gaussians.distances(on_device(features, device), on_device(labels, device)).rmd
        sums = sums.add(ReferenceSums.of(to_numpy(rmd)))
    return sums


def fit(run: Run, shrinkage: str | float = "auto", device: str = "cpu") -> dict:
    """Fit the Gaussians of a run's embeddings, unless the ones there were made from the same.

    Returns
    -------
    summary : dict
        rank, condition number and shrinkage of both covariances, samples, classes, seconds, skipped.

    Raises
    ------
    ValueError
        If a shard is not embedded, or shrinkage "none" meets a singular covariance.
    """
    facts = run.embedding_facts()
    run.settle_classes(facts)
    if not any(f["rows"] for f in facts):
        raise UserError(f"{run.uri}: it holds no embedding, all samples are in quarantine; nothing to fit", "run")
    embeddings = fingerprint([f["source"] for f in facts])
    source = fingerprint("gaussians", embeddings, str(shrinkage))
    before = run.stage("fit")
    if before and before["source"] == source and storage.exists(run.path(GAUSSIANS)):
        return before | {"skipped": True}
    started = time.monotonic()
    shards = [(shard,) for shard, f in enumerate(facts) if f["rows"]]
    gpus = 1 if device == "cuda" else 0
    num_classes, views = len(run.classes), run.config.views
    pilot = _pilot_mean(run, shards[0][0])
    stats = GaussianStats(num_classes, run.config.width, pilot=pilot)
    progress = Progress("fit", len(shards))
    shared = (run.uri, num_classes, views, pilot, device)
    for part, done in merged_parts(shard_statistics, shards, *shared, merge=GaussianStats.merge, num_gpus=gpus):
        stats = stats.merge(part)
        progress.shard(part.count // views, shards=done)
    expected = sum(f["rows"] for f in facts) * views
    assert stats.count == expected, f"fit counted {stats.count} embeddings of {expected}"
    with concerning("shrinkage"):
        fitted = stats.fit(shrinkage)
    gaussians = dataclasses.replace(fitted, class_names=tuple(run.classes))
    if num_classes:
        sums = ReferenceSums()
        _ready(gaussians)
        shared = (run.uri, gaussians, device)
        for part, _ in merged_parts(shard_reference, shards, *shared, merge=ReferenceSums.add, num_gpus=gpus):
            sums = sums.add(part)
        gaussians = dataclasses.replace(gaussians, reference=sums.reference())
    save_gaussians(run, gaussians)
    entry = {"source": source, "embeddings": embeddings, "asked": str(shrinkage), **describe(gaussians)}
    entry["seconds"] = time.monotonic() - started
    run.finish_stage("fit", **entry)
    return entry | {"skipped": False}


def adopt(run: Run, other: Run) -> dict:
    """Take over another run's Gaussians instead of fitting: its means, covariances and reference.

    Raises
    ------
    ValueError
        If the other run has none, was made with another encoder, or does not know a class of this run.
    """
    check_adoptable(run.config, other)
    entry, gaussians = other.stage("fit"), load_gaussians(other)
    _refuse_unknown_classes(run, gaussians, other)
    adopted = {"source": entry["source"], "from": other.uri, **describe(gaussians)}
    adopted["percentiles"] = percentiles.adopt(run, other)
    before, classes = run.stage("fit") or {}, list(gaussians.class_names or ())
    if before != before | adopted or run.classes != classes:
        run.set_classes(classes)
        save_gaussians(run, gaussians)
        run.finish_stage("fit", **adopted)
    return adopted | {"skipped": False}


def check_adoptable(config: CorpusConfig, other: Run) -> None:
    """ValueError unless the other run has Gaussians of this config's encoder; costs no look at any embeddings."""
    if not config.same_embedding(other.config):
        raise UserError(
            f"{other.uri}: fitted on encoder {other.config.encoder!r}, this run uses {config.encoder!r}; "
            "distances need the same encoder",
            "gaussians",
        )
    if other.stage("fit") is None or not storage.exists(other.path(GAUSSIANS)):
        raise UserError(f"{other.uri}: no {GAUSSIANS} there; run hardset fit on it first", "gaussians")


def _refuse_unknown_classes(run: Run, gaussians: Gaussians, other: Run) -> None:
    names = run.config.class_names
    if names is not None and other.config.class_names is not None and names != other.config.class_names[: len(names)]:
        raise UserError(f"{other.uri}: its class names are not this run's", "gaussians")
    known = set(np.flatnonzero(gaussians.counts > 0).tolist())
    for labels in in_order(_labels_of_shard, [(shard,) for shard in range(len(run.shards))], run.uri):
        for label in sorted(labels - known - {-1}):
            name = names[label] if names else str(label)
            raise UserError(
                f"{other.uri}: class {name!r} (label {label}) is unknown there, it has {len(known)} classes; "
                "fit on shards that hold it, or leave its samples out",
                "gaussians",
            )


def _labels_of_shard(shard: int, run_uri: str) -> set[int]:
    """Ray task: the labels that occur in a shard, -1 for none."""
    labels = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["label"])["label"]
    return set(np.unique(columns.labels_or_minus_one(labels)).tolist())


def describe(gaussians: Gaussians) -> dict:
    """What a person should know of a fit, JSON-able."""
    return {
        "samples": int(gaussians.num_samples),
        "classes": len(gaussians.counts),
        "width": int(gaussians.dim),
        "rank": gaussians.rank,
        "condition": gaussians.condition,
        "shrinkage": list(gaussians.shrinkage),
    }


def load_gaussians(run: Run) -> Gaussians:
    """The Gaussians stored with a run. ValueError where they are gone or broken."""
    try:
        return _ready(Gaussians.load(io.BytesIO(storage.read_bytes(run.path(GAUSSIANS)))))
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{run.uri}: {GAUSSIANS} cannot be read ({type(error).__name__}); delete it and run hardset fit first",
            "run",
        ) from None


def _ready(gaussians: Gaussians) -> Gaussians:
    """The same, its eigenproblem solved here once instead of in every task that it travels to."""
    gaussians.agnostic_distances(gaussians.mean[None])
    return gaussians


def save_gaussians(run: Run, gaussians: Gaussians) -> None:
    """Store Gaussians with a run, whole or not at all."""
    with storage.write_atomic(run.path(GAUSSIANS)) as stream:
        gaussians.save(stream)


def _pilot_mean(run: Run, shard: int) -> np.ndarray:
    """A rough mean, shared by all tasks: sums about it keep their digits."""
    first = next(column_groups.iter_batches(run.uri, columns.EMBEDDINGS, shard, ["embedding"]))
    return columns.vectors(first["embedding"]).astype(np.float64).mean(axis=0)
