"""Fit: embeddings -> the class-conditional and class-agnostic Gaussians of a run, and the reference its weights refer to.

    sums       one task per shard (of several in a run of more than 1,024) returns its sums, and its share of the rows that
               the amount of shrinkage is chosen by; the driver adds them in shard order
    shrinkage  tasks measure every amount of a grid on these rows, each left out of the Gaussians (ops.shrinkage_search)
    reference  one task per shard scores its samples: what weights refer to, and the ranks of margin

Tasks are idempotent, and what the driver adds it adds in shard order, so that the result does not depend on the number of
workers, down to the last bit.
"""

import dataclasses
import io
import time
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from ops.arrays import on_device, to_numpy
from ops.difficulty import Reference
from ops.gaussian import Gaussians, GaussianStats
from ops.moments import Moments
from ops.ranks import RankSketch
from ops.shrinkage_search import ShrinkageCurve, ShrinkageSearch
from pipelines.curation import margins
from pipelines.curation.embedded import iter_embedded, scores_of
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.labels import Which, label_sources, labels_of
from pipelines.runs.progress import Progress
from pipelines.runs.record import CorpusConfig, Run, fingerprint
from pipelines.runs.tasks import in_order, merged_parts

GAUSSIANS = "gaussians.npz"
# Rows that the amount of shrinkage is chosen by: of this many values at most, fewer where many classes make each dear.
CHOICE_ROWS, LEAST_CHOICE_ROWS, CHOICE_VALUES, CHOICE_DISTANCES = 100_000, 20_000, 1 << 27, 10_000_000
CHOICE_TASK_ROWS = 8_192


@dataclasses.dataclass
class ReferenceSums:
    """Moments, minimum and maximum of rmd."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def add(self, other: "ReferenceSums") -> "ReferenceSums":
        if not other.count:
            return self
        merged = Moments(self.count, self.mean, self.squares).merge(Moments(other.count, other.mean, other.squares))
        return ReferenceSums(*merged, min(self.low, other.low), max(self.high, other.high))

    @classmethod
    def of(cls, rmd: np.ndarray) -> "ReferenceSums":
        if not len(rmd):
            return cls()
        return cls(*Moments.of(rmd), *rmd.astype(np.float64)[[rmd.argmin(), rmd.argmax()]])

    def reference(self) -> Reference:
        return Reference(self.mean, float(np.sqrt(self.squares / self.count)), self.low, self.high)


@dataclasses.dataclass
class ShardSums:
    """What a shard adds to a fit: its sums, its embeddings, its rows to choose the shrinkage by and their labels."""

    stats: GaussianStats
    embeddings: int
    rows: list[np.ndarray]
    labels: list[np.ndarray]

    def merge(self, other: "ShardSums") -> "ShardSums":
        return ShardSums(
            self.stats.merge(other.stats),
            self.embeddings + other.embeddings,
            self.rows + other.rows,
            self.labels + other.labels,
        )


def shard_sums(
    shard: int,
    first: int,
    run_uri: str,
    num_classes: int,
    views: int,
    pilot: np.ndarray,
    step: int,
    which: Which,
    device: str,
) -> ShardSums:
    """Ray task: the sums of one shard, all its views, and every `step`-th of its rows from `first` on; step 0 = none."""
    sums, start = ShardSums(GaussianStats(num_classes, len(pilot), pilot=pilot), 0, [], []), 0
    for part in iter_embedded(run_uri, shard, views, which=which):
        labels = part.fitted_labels
        sums.embeddings += len(labels) * views
        kept = ~part.dropped if not num_classes else np.ones(len(labels), bool)
        if kept.any():
            features = on_device(part.features[kept].reshape(-1, len(pilot)), device)
            repeated = on_device(np.repeat(labels[kept], views), device)
            sums.stats.update(features, repeated if num_classes else None)
        if step:
            chosen = np.arange((first - start) % step, len(labels), step)
            chosen = chosen[kept[chosen] & ((labels[chosen] >= 0) | (num_classes == 0))]
            sums.rows.append(part.features[chosen])
            sums.labels.append(labels[chosen])
        start += len(labels)
    return sums


def rows_curve(rows: np.ndarray, labels: np.ndarray, search: ShrinkageSearch, device: str) -> ShrinkageCurve:
    """Ray task: how well each amount of shrinkage predicts some rows."""
    return search.measure(on_device(rows, device), on_device(labels, device) if len(search.counts) else None)


@dataclasses.dataclass
class ShardScores:
    """What a shard adds to the reference: the sums of its rmd, and its margins."""

    reference: ReferenceSums
    margins: np.ndarray

    def merge(self, other: "ShardScores") -> "ShardScores":
        return ShardScores(self.reference.add(other.reference), np.concatenate([self.margins, other.margins]))


def shard_scores(shard: int, run_uri: str, gaussians: Gaussians, views: int, which: Which, device: str) -> ShardScores:
    """Ray task: rmd of one shard's samples that were fitted on, and the margins of all."""
    sums, found = ReferenceSums(), []
    for part in iter_embedded(run_uri, shard, views, which=which):
        scores = scores_of(part, gaussians, True, device)
        sums = sums.add(ReferenceSums.of(to_numpy(scores.rmd)[part.fitted_labels >= 0]))
        found.append(to_numpy(scores.margin).astype(np.float32))
    return ShardScores(sums, np.concatenate(found or [np.empty(0, np.float32)]))


def fit(run: Run, shrinkage: str | float = "auto", device: str = "cpu", labels: Which = "decided") -> dict:
    """Fit the Gaussians of a run's embeddings, unless the ones there were made from the same.

    Returns
    -------
    summary : dict
        rank, condition number and shrinkage of both covariances, samples, classes, seconds, skipped; with "auto" the curve
        that the shrinkage was chosen from.

    Raises
    ------
    UserError
        If a shard is not embedded, nothing is, or shrinkage "none" meets a singular covariance.
    """
    facts = run.embedding_facts()
    run.settle_classes(facts)
    if not any(f["rows"] for f in facts):
        raise UserError(f"{run.uri}: it holds no embedding, all samples are in quarantine; nothing to fit", "run")
    embeddings = fingerprint(label_sources(run, facts, labels))
    source = fingerprint("gaussians", embeddings, str(shrinkage))
    made_from = {"source": source, "embeddings": embeddings, "asked": str(shrinkage), "labels": labels}
    there = _stored(run, source)
    if there is not None:  # also where a command died between the file and its record
        return _noted(run, there, made_from) | {"skipped": True}
    started = time.monotonic()
    shards = [shard for shard, f in enumerate(facts) if f["rows"]]
    sums = _sums(run, shards, [f["rows"] for f in facts], shrinkage == "auto", labels, device)
    names = tuple(run.classes)
    gaussians = dataclasses.replace(_gaussians(sums, shrinkage, device), class_names=names, source=source)
    if names:
        gaussians = dataclasses.replace(gaussians, reference=_reference(run, gaussians, shards, labels, device))
    save_gaussians(run, gaussians)
    entry = made_from | describe(gaussians) | {"seconds": time.monotonic() - started}
    run.finish_stage("fit", **entry)
    return entry | {"skipped": False}


def _stored(run: Run, source: str) -> Gaussians | None:
    """The Gaussians of a run, if they say that they were made from this."""
    try:
        found = load_gaussians(run)
    except ValueError:
        return None
    return found if found.source == source else None


def _noted(run: Run, gaussians: Gaussians, made_from: dict) -> dict:
    """The record of Gaussians that are there, written if it is lost or speaks of others."""
    before = run.stage("fit")
    if before and before["source"] == made_from["source"] and "from" not in before:
        return before
    entry = made_from | describe(gaussians) | {"seconds": 0.0}
    run.finish_stage("fit", **entry)
    return entry


def _sums(run: Run, shards: Sequence[int], rows: Sequence[int], choose: bool, which: Which, device: str) -> ShardSums:
    """The sums of all shards, and the rows to choose the shrinkage by, evenly spaced over the corpus."""
    views, num_classes, pilot = run.config.views, len(run.classes), _pilot_mean(run, shards[0])
    most = max(LEAST_CHOICE_ROWS, CHOICE_DISTANCES // max(1, num_classes))
    most = max(1, min(CHOICE_ROWS, most, CHOICE_VALUES // (run.config.width * views)))
    step = -(-sum(rows) // most) if choose else 0
    starts = np.cumsum([0, *rows])
    items = [(shard, int(-starts[shard] % step) if step else 0) for shard in shards]
    progress = Progress("fit", len(shards))
    sums = ShardSums(GaussianStats(num_classes, run.config.width, pilot=pilot), 0, [], [])
    shared = (run.uri, num_classes, views, pilot, step, which, device)
    gpus = 1 if device == "cuda" else 0
    for part, done in merged_parts(shard_sums, items, *shared, merge=ShardSums.merge, num_gpus=gpus):
        sums = sums.merge(part)
        progress.shard(part.embeddings // views, shards=done)
    expected = sum(rows) * views
    assert sums.embeddings == expected, f"fit counted {sums.embeddings} embeddings of {expected}"
    return sums


def _gaussians(sums: ShardSums, shrinkage: str | float, device: str) -> Gaussians:
    try:
        if shrinkage != "auto":
            return sums.stats.fit(shrinkage)
        search = sums.stats.shrinkage_search()
    except ValueError as error:
        raise UserError(f"{shrinkage}: {error}", "shrinkage") from None
    curve, items = ShrinkageCurve.empty(), list(_portions(sums))
    for part in in_order(rows_curve, items, search, device, num_gpus=1 if device == "cuda" else 0):
        curve += part
    return search.fit(curve)


def _portions(sums: ShardSums) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows to choose the shrinkage by, so many at a time as are worth a task; always the same ones together."""
    rows, labels = np.concatenate(sums.rows), np.concatenate(sums.labels)
    for start in range(0, len(rows), CHOICE_TASK_ROWS):
        yield rows[start : start + CHOICE_TASK_ROWS], labels[start : start + CHOICE_TASK_ROWS]


def _reference(run: Run, gaussians: Gaussians, shards: Sequence[int], which: Which, device: str) -> Reference:
    """Reference of the weights; on the way the ranks of margin are counted and stored, which score needs."""
    sums, sketch = ReferenceSums(), RankSketch()
    shared = (run.uri, _ready(gaussians), run.config.views, which, device)
    gpus = 1 if device == "cuda" else 0
    items = [(shard,) for shard in shards]
    for part, _ in merged_parts(shard_scores, items, *shared, merge=ShardScores.merge, num_gpus=gpus):
        sums = sums.add(part.reference)
        sketch.add(part.margins)
    margins.save(run, sketch.table(), margins.source_of(gaussians.source, None))
    return sums.reference()


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
    gaussians = dataclasses.replace(gaussians, source=gaussians.source or entry["source"])
    adopted = {"source": gaussians.source, "from": other.uri, **describe(gaussians)}
    before, classes = run.stage("fit") or {}, list(gaussians.class_names or ())
    if before != before | adopted or run.classes != classes or _stored(run, gaussians.source) is None:
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
    return set(np.unique(labels_of(run_uri, shard)[0]).tolist())


def describe(gaussians: Gaussians) -> dict:
    """What a person should know of a fit, JSON-able."""
    return {
        "samples": int(gaussians.num_samples),
        "classes": len(gaussians.counts),
        "classes_present": int((gaussians.counts > 0).sum()),
        "smallest_class": int(gaussians.counts[gaussians.counts > 0].min()) if gaussians.counts.any() else 0,
        "width": int(gaussians.dim),
        "rank": gaussians.rank,
        "condition": gaussians.condition,
        "shrinkage": list(gaussians.shrinkage),
        "target": gaussians.target,
        "curve": None if gaussians.curve is None else _told(gaussians.curve),
    }


def _told(curve: np.ndarray) -> dict[str, list[float | None]]:
    """A curve of shrinkage, JSON-able: None where an amount left a covariance singular."""
    told = [[float(value) if np.isfinite(value) else None for value in row] for row in curve]
    return dict(zip(("shrinkage", "log_loss", "negative_log_likelihood"), told))


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
