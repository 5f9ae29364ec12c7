"""Score: embeddings and Gaussians -> the difficulty columns, one file per shard, each written once."""

import dataclasses
import io
import time
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ops.arrays import to_numpy
from ops.difficulty import Reference, difficulty_weight, fit_centers, kmeans_difficulty
from ops.gaussian import Gaussians
from ops.ranks import RankSketch, RankTable
from pipelines.curation import margins, votes
from pipelines.curation.embedded import Embedded, iter_embedded, scores_of
from pipelines.curation.fit import load_gaussians
from pipelines.curation.weighting import Weighting
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.executor import Output, Stage, Task, write_shards
from pipelines.runs.labels import Which, label_sources
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order, merged_parts
from pipelines.summary import group_summary

KMEANS_FILE = "kmeans.npz"
KMEANS_ROWS = 100_000


class Scorer(NamedTuple):
    """What every shard is scored with.

    Attributes
    ----------
    gaussians : Gaussians
    fitted : bool
        Whether they were fitted on this run, so that each sample is left out of them.
    views : int
        R of the run.
    weighting : Weighting
    centers : ndarray of shape (k, d), or None
        Of k-means.
    margins, votes : RankTable, or None
        Among the run's samples; None where there is no such score.
    voters : LabelTable, or None
        The labels that neighbours vote with.
    labels : {"decided", "original"}
    device : str
    """

    gaussians: Gaussians
    fitted: bool
    views: int
    weighting: Weighting
    centers: np.ndarray | None
    margins: RankTable | None
    votes: RankTable | None
    voters: votes.LabelTable | None
    labels: Which
    device: str

    @property
    def views_read(self) -> int:
        """The other views are only needed to leave a sample out."""
        return self.views if self.fitted else 1


class ScoreShards:
    """The difficulty columns of a shard: `pipelines.runs.executor`'s worker."""

    def __init__(self, run_uri: str, scorer: Scorer, together: str):
        self.run_uri, self.scorer, self.together = run_uri, scorer, together
        self.schema = columns.DIFFICULTY_SCHEMA
        if scorer.centers is not None:
            self.schema = self.schema.append(columns.KMEANS)

    def run(self, task: Task) -> Output:
        return Output(self._tables(task.shard), facts={"together": self.together}, schema=self.schema)

    def _tables(self, shard: int) -> Iterator[pa.Table]:
        scorer, vote = self.scorer, None
        if scorer.voters is not None:
            vote = votes.of_shard(self.run_uri, shard, scorer.voters, scorer.labels)
        beside, start = tuple(field.name for field in columns.KEYS), 0
        for part in iter_embedded(self.run_uri, shard, self.scorer.views_read, beside, self.scorer.labels):
            rows = slice(start, start + len(part.labels))
            yield _score_batch(part, None if vote is None else vote[rows], self.scorer, self.schema)
            start = rows.stop


def _score_batch(part: Embedded, vote: np.ndarray | None, scorer: Scorer, schema: pa.Schema) -> pa.Table:
    scores = scores_of(part, scorer.gaussians, scorer.fitted, scorer.device)
    values = {name: to_numpy(getattr(scores, name)) for name in scores._fields}
    values["weight"] = _weight(values["rmd"], scorer)
    values["label_error"] = label_error(values["margin"], scorer.margins, vote, scorer.votes)
    if one_class(scorer.gaussians):  # md is md_agn, the rest is rounding
        values = {"md_agn": values["md_agn"]}
    if scorer.centers is not None:
        values["kmeans"] = kmeans_difficulty(part.features[:, 0], centers=scorer.centers)
    data = {name: part.batch[name] for name in ("key", "shard", "row")}
    data["label"] = columns.nullable(part.labels)
    data |= {name: columns.nullable(value) for name, value in values.items()}
    missing = pa.nulls(len(part.labels))
    return pa.table({field.name: data.get(field.name, missing.cast(field.type)) for field in schema}).cast(schema)


def label_error(
    margin: np.ndarray, margin_ranks: RankTable | None, vote: np.ndarray | None, vote_ranks: RankTable | None
) -> np.ndarray:
    """How likely labels are wrong, (n,) float32 in [0, 1]: the mean of the percentile ranks of margin and vote that there are.

    NaN where there is neither.
    """
    pairs = ((margin, margin_ranks), (vote, vote_ranks))
    parts = [table.fraction(values) for values, table in pairs if table is not None and values is not None]
    if not parts:
        return np.full(len(margin), np.nan, np.float32)
    known = [np.isfinite(part) for part in parts]
    total = sum(np.where(there, part, 0) for there, part in zip(known, parts))
    number = sum(there.astype(np.float32) for there in known)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan).astype(np.float32)


def one_class(gaussians: Gaussians) -> bool:
    """Whether one class alone was fitted on: its Gaussian is the class-agnostic one, and rmd is nothing."""
    return int((gaussians.counts > 0).sum()) == 1


def _weight(rmd: np.ndarray, scorer: Scorer) -> np.ndarray:
    reference = scorer.gaussians.reference
    if reference is None:
        return np.full(len(rmd), np.nan, np.float32)
    weighting = scorer.weighting
    return difficulty_weight(
        rmd,
        weighting.temperature,
        weighting.c,
        scale=weighting.scale,
        dim=scorer.gaussians.dim,
        reference=Reference(*reference),
    )


def kmeans_centers(run: Run, k: int, seed: int = 0) -> np.ndarray:
    """k-means centres of a run's embeddings, shape (k, d); fitted once and kept in `kmeans.npz`, which says from what.

    At most `KMEANS_ROWS` embeddings, evenly spaced over the corpus, go through the driver.

    Raises
    ------
    UserError
        If there are fewer embeddings than centres.
    """
    facts = run.embedding_facts()
    source = fingerprint("kmeans", [f["source"] for f in facts], k, seed)
    before = _stored_centers(run, source)
    if before is not None:
        return before
    rows = sum(f["rows"] for f in facts)
    if k > rows:
        raise UserError(f"{k}: more centres than the {rows} embeddings", "kmeans")
    step = -(-rows // KMEANS_ROWS)
    offsets = np.cumsum([0, *(f["rows"] for f in facts)])[:-1]
    shards = [(shard, int(-offset % step)) for shard, offset in enumerate(offsets)]
    sample = np.concatenate(list(in_order(_every, shards, run.uri, step)))
    centers = fit_centers(sample, k, seed)
    with storage.write_atomic(run.path(KMEANS_FILE)) as stream:
        np.savez(stream, centers=centers, source=np.array(source))
    run.finish_stage("kmeans", source=source, k=k, seed=seed, sampled=len(sample))
    return centers


def _stored_centers(run: Run, source: str) -> np.ndarray | None:
    try:
        with np.load(io.BytesIO(storage.read_bytes(run.path(KMEANS_FILE))), allow_pickle=False) as arrays:
            return arrays["centers"] if str(arrays["source"]) == source else None
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _every(shard: int, first: int, run_uri: str, step: int) -> np.ndarray:
    """Ray task: every `step`-th embedding of a shard."""
    column = column_groups.read(run_uri, columns.EMBEDDINGS, shard, ["embedding"])["embedding"]
    return columns.vectors(column)[first::step]


def score(
    run: Run,
    weighting: Weighting,
    centers: np.ndarray | None = None,
    device: str = "cpu",
    labels: Which = "decided",
) -> dict:
    """Write `difficulty/` for the shards whose embeddings, labels, neighbours, Gaussians or weighting changed.

    Returns
    -------
    counts : dict
        rows, shards done now and skipped, seconds, what label_error was made from; quantiles of each score if any shard
        was scored now.

    Notes
    -----
    One pass over the embeddings. The ranks of margin are counted while fitting; with another run's Gaussians, and where they
    are lost, a pass before this one counts them.
    """
    started = time.monotonic()
    facts = run.embedding_facts()
    labelled = label_sources(run, facts, labels)
    gaussians, fitted = _gaussians(run, labelled)
    judged = gaussians.num_classes > 0 and not one_class(gaussians)
    voted = votes.source_of(run, facts) if judged else None
    how = _how(weighting, centers, labelled, gaussians, voted)
    sources = [fingerprint(columns.DIFFICULTY, source, *how) for source in labelled]
    pending = column_groups.pending(run.uri, columns.DIFFICULTY, sources)
    margin_ranks = vote_ranks = voters = None
    if pending and judged:
        margin_ranks = _margin_ranks(run, gaussians, fitted, labelled, labels, device)
    if pending and voted:
        voters = votes.LabelTable.of(run.uri, len(facts), labels)
        vote_ranks = votes.ranks(run, voters, labels)
    ranks = (margin_ranks, vote_ranks, voters)
    scorer = Scorer(gaussians, fitted, run.config.views, weighting, centers, *ranks, labels, device)
    gpus = 1 if device == "cuda" else 0
    arguments, rows = (run.uri, scorer, fingerprint(columns.DIFFICULTY, *how)), [f["rows"] for f in facts]
    stage = Stage("score", columns.DIFFICULTY, sources, ScoreShards, arguments, rows=rows, num_gpus=gpus)
    for _ in write_shards(run, stage, pending):
        pass
    counts = {
        "rows": sum(rows),
        "shards_done": len(pending),
        "shards_skipped": len(facts) - len(pending),
        "seconds": time.monotonic() - started,
        "label_error_of": (["margin"] if judged else []) + (["vote"] if voted else []),
    }
    if pending or run.stage("score") is None:
        counts["quantiles"] = group_summary(run, columns.DIFFICULTY)["quantiles"]
        run.finish_stage("score", **counts, weighting=dataclasses.asdict(weighting), labels=labels)
    return counts


def _gaussians(run: Run, labelled: list[str]) -> tuple[Gaussians, bool]:
    """The run's Gaussians and whether they were fitted on it. UserError if they are missing or of other embeddings."""
    entry = run.stage("fit")
    if entry is None:
        raise UserError(
            f"{run.uri}: no Gaussians yet; run hardset fit first, or score with the Gaussians of another run", "run"
        )
    gaussians = load_gaussians(run)
    fitted = "from" not in entry
    if gaussians.source not in (None, entry["source"]):  # None: of a version whose files didn't say
        raise UserError(f"{run.uri}: its Gaussians are not those that the last fit noted; run hardset fit first", "run")
    if fitted and entry["embeddings"] != fingerprint(labelled):
        raise UserError(
            f"{run.uri}: embeddings or labels changed since the Gaussians were fitted; run hardset fit first", "run"
        )
    return dataclasses.replace(gaussians, source=entry["source"]), fitted


def _how(
    weighting: Weighting,
    centers: np.ndarray | None,
    labelled: list[str],
    gaussians: Gaussians,
    voted: str | None,
) -> tuple:
    """What the scores of all shards are made from. Ranks change with every shard of the run."""
    kmeans = None if centers is None else fingerprint(centers.tolist())
    names = columns.DIFFICULTY_SCHEMA.names
    return fingerprint(labelled), gaussians.source, dataclasses.asdict(weighting), kmeans, names, voted


def _margin_ranks(
    run: Run, gaussians: Gaussians, fitted: bool, labelled: list[str], which: Which, device: str
) -> RankTable:
    """The ranks of margin among the run's samples: stored, or counted now and stored."""
    source = margins.source_of(gaussians.source, None if fitted else fingerprint(labelled))
    table = margins.load(run, source)
    if table is None:
        sketch, views = RankSketch(), run.config.views if fitted else 1
        items = [(shard,) for shard in range(len(labelled))]
        shared = (run.uri, gaussians, fitted, views, which, device)
        gpus = 1 if device == "cuda" else 0
        for part, _ in merged_parts(_shard_margins, items, *shared, merge=_joined, num_gpus=gpus):
            sketch.add(part)
        table = sketch.table()
        margins.save(run, table, source)
    return table


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.concatenate([one, other])


def _shard_margins(
    shard: int, run_uri: str, gaussians: Gaussians, fitted: bool, views: int, which: Which, device: str
) -> np.ndarray:
    """Ray task: the margins of a shard's samples, (rows,) float32."""
    batches = iter_embedded(run_uri, shard, views, which=which)
    parts = [scores_of(part, gaussians, fitted, device).margin for part in batches]
    return np.concatenate([to_numpy(part).astype(np.float32) for part in parts] or [np.empty(0, np.float32)])
