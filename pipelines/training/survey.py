"""One pass over the labels and columns of a source before training: how many samples, of which class and group.

Everything that would stop a training in its first epoch is found here instead: a column that lacks values, a group
without samples, one class only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ops.moments import Moments
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import UserError
from pipelines.runs.tasks import in_order
from pipelines.training.groups import GroupRule, Resampling, scores
from pipelines.training.source import Source


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes
    ----------
    counts : tuple of int
        Samples of each shard.
    class_counts : ndarray of shape (K,), int64
    means, ranges : dict
        Mean, and (least, largest) value, of each column over the samples, by full name.
    group_counts : ndarray of shape (G,), int64, or None without a rule
    group_counts_by_shard : ndarray of shape (S, G), int64, or None
    """

    counts: tuple[int, ...]
    class_counts: np.ndarray
    means: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    group_counts_by_shard: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def commonest(self) -> float:
        """Share of the commonest class: what a classifier is right about that has learnt nothing."""
        return float(self.class_counts.max() / self.num_samples)

    @property
    def group_counts(self) -> np.ndarray | None:
        return None if self.group_counts_by_shard is None else self.group_counts_by_shard.sum(axis=0)

    def expanded(self, resampling: Resampling | None) -> tuple[int, ...]:
        """Samples of each shard with an exact resampling; the counts themselves with none or one that draws lots."""
        if resampling is None or not resampling.exact:
            return self.counts
        return tuple((self.group_counts_by_shard @ np.asarray(resampling.factors)).astype(int).tolist())


def survey(source: Source, num_classes: int, rule: GroupRule | None = None) -> Survey:
    """Count the samples of a source.

    Raises
    ------
    ValueError
        If it has no labelled sample, a label is outside [0, K), or a sample has no value in one of its columns (the
        column was made from other shards, or for some of them only).
    """
    shards = [(shard,) for shard in range(len(source.shards))]
    parts = list(in_order(_survey_shard, shards, source, num_classes, rule))
    counts = tuple(part["rows"] for part in parts)
    total = sum(counts)
    if not total:
        raise UserError(f"{source.run_uri}: no labelled sample to use (part {source.part})")
    for name in source.columns:
        missing = sum(part["missing"][name] for part in parts)
        if missing:
            raise UserError(
                f"column {name}: {missing} of {total} samples of {source.run_uri} have no value there; "
                "make the column again for all shards of this run"
            )
    means = {name: sum(part["sums"][name] for part in parts) / total for name in source.columns}
    extremes = {name: np.stack([part["extremes"][name] for part in parts]) for name in source.columns}
    ranges = {
        name: (float(low.min()), float(high.max())) for name, (low, high) in ((n, e.T) for n, e in extremes.items())
    }
    groups = np.stack([part["groups"] for part in parts]) if rule else None
    return Survey(counts, sum(part["classes"] for part in parts), means, ranges, groups)


def _survey_shard(shard: int, source: Source, num_classes: int, rule: GroupRule | None) -> dict:
    """Ray task: the counts of one shard."""
    table = source.keys(shard)
    labels = table["label"].to_numpy()
    if len(labels) and labels.max() >= num_classes:
        raise UserError(f"{source.run_uri}: label {labels.max()} in shard {shard}, but there are {num_classes} classes")
    values = {name: scores(table, name) for name in source.columns}
    part = {
        "rows": len(labels),
        "classes": np.bincount(labels, minlength=num_classes),
        "missing": {name: int(np.isnan(value).sum()) for name, value in values.items()},
        "extremes": {name: (value.min(initial=np.inf), value.max(initial=-np.inf)) for name, value in values.items()},
        "sums": {name: float(np.nansum(value)) for name, value in values.items()},
    }
    if rule is not None:
        groups = rule.assign(values[rule.column], labels)
        part["groups"] = np.bincount(groups, minlength=rule.num_groups)
    return part


def check_trainable(found: Survey, classes: Sequence[str], rule: GroupRule | None) -> None:
    """ValueError for one class only, or a group without samples."""
    there = np.flatnonzero(found.class_counts)
    if len(there) < 2:
        raise UserError(f"one class only ({classes[there[0]]!r}): a classifier needs at least 2")
    if rule is not None and not found.group_counts.all():
        empty = int(np.flatnonzero(found.group_counts == 0)[0])
        sizes = ", ".join(f"{name}: {count}" for name, count in zip(rule.names(), found.group_counts))
        low, high = found.ranges[rule.column]
        raise UserError(
            f"group {rule.names()[empty]!r} has no samples ({sizes}): {rule.column} lies in [{low:.4g}, {high:.4g}]; "
            f"move the edges, or take {rule.column}:q2 for two halves"
        )


def moments(source: Source, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (d,) float32 of a source's embeddings, accumulated in float64; 1 of a feature that is constant."""
    shards = [(shard,) for shard in range(len(source.shards))]
    whole = Moments.of(np.zeros((0, width)))
    for part in in_order(_moments_of_shard, shards, source, width):
        whole = whole.merge(part)
    assert whole.count, "moments of a source without samples"
    mean, deviation = whole.mean, whole.deviation
    return mean.astype(np.float32), np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0).astype(np.float32)


def _moments_of_shard(shard: int, source: Source, width: int) -> Moments:
    """Ray task: the moments of one shard's embeddings."""
    wanted = source.keys(shard)["row"].to_numpy()
    found = Moments.of(np.zeros((0, width)))
    for batch in column_groups.iter_batches(source.run_uri, columns.EMBEDDINGS, shard, ["row", "embedding"]):
        keep = np.isin(batch["row"].to_numpy(), wanted, assume_unique=True)
        found = found.merge(Moments.of(columns.vectors(batch["embedding"])[keep]))
    return found
