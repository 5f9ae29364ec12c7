"""Rules: which samples of a run a subset holds, found exactly without gathering a run's scores anywhere.

Samples compete within groups: all of them, those of a class, those of an interval of a score. In each group the first so
many in some order are taken, the order being a score or a random number that belongs to the sample. `ops.cuts` finds the
place of the cut from counts; ties are taken in shard order.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ops.cuts import CutFinder, Cuts, spread_evenly
from ops.draws import uniform
from ops.ranks import Cells, merge_counts, sortable
from pipelines.curation import subsets
from pipelines.curation.conditions import Condition, condition
from pipelines.runs import column_groups, columns, joins
from pipelines.runs.errors import UserError
from pipelines.runs.labels import DECISION, Which, is_dropped, label_sources
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order, merged_parts

MOST_INTERVALS = 10_000
SELECTION = 0x5E1EC7  # the stream of random numbers of selections: training holds samples out by another one


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which samples: the `count` (or, a float, the fraction) with the highest score, or with the lowest.

    Attributes
    ----------
    by : str
        GROUP.COLUMN. Samples without a value there are never selected.
    count : int or float
        A fraction is one of the samples that pass `where` and are not excluded.
    per_class : bool
        The count or fraction is one of each class.
    where : str
        A condition that samples must pass (`pipelines.curation.conditions`); empty: all pass.
    stratify : (str, int) or None
        GROUP.COLUMN and N: as many of each of N equally full intervals of it, drawn at random instead of by the score.
        Where an interval has too few, the others give more.
    exclude : tuple of str
        Subsets of the run whose samples are left out.
    random : bool
        Drawn at random, not by the score.
    seed : int
        Of what is drawn at random.
    labels : {"decided", "original"}
        original: the labels of the corpus; nothing counts as dropped.
    """

    by: str
    count: int | float
    lowest: bool = False
    per_class: bool = False
    where: str = ""
    stratify: tuple[str, int] | None = None
    exclude: tuple[str, ...] = ()
    random: bool = False
    seed: int = 0
    labels: Which = "decided"

    def __post_init__(self) -> None:
        columns.split_name(self.by, "by")
        if self.count <= 0 or (isinstance(self.count, float) and self.count > 1):
            raise UserError(f"count {self.count}: expected a fraction in (0, 1], a float, or a whole number of samples")
        if self.random and self.stratify:
            raise UserError("it has no meaning beside `stratify`, which draws at random already", "random")
        if self.stratify:
            columns.split_name(self.stratify[0], "stratify")
            if not 1 <= self.stratify[1] <= MOST_INTERVALS:
                raise UserError(f"{self.stratify[1]}: expected 1 to {MOST_INTERVALS:,} intervals", "stratify")

    @property
    def drawn(self) -> bool:
        """Whether chance decides."""
        return self.random or self.stratify is not None

    def __str__(self) -> str:
        amount = f"{100 * self.count:g} %" if isinstance(self.count, float) else f"{self.count:,}"
        words = amount + (" of each class" if self.per_class else "")
        if self.stratify:
            column, intervals = self.stratify
            words += (
                f", as many of each of {intervals} equally full intervals of {column}, at random (seed {self.seed})"
            )
        elif self.random:
            words += f" at random (seed {self.seed}), of those with a {self.by}"
        else:
            words += f" with the {'lowest' if self.lowest else 'highest'} {self.by}"
        words += f", where {self.where}" if self.where else ""
        words += ", by the corpus's own labels" if self.labels == "original" else ""
        return words + (f", without {', '.join(self.exclude)}" if self.exclude else "")

    def told(self) -> dict[str, Any]:
        """The rule as JSON: what it asks for, without what it leaves open."""
        open_ = {f.name: f.default for f in dataclasses.fields(self)}
        values = dataclasses.asdict(self).items()
        return {name: value for name, value in values if value != open_[name] or name in ("by", "count", "lowest")}

    def wanted(self, available: np.ndarray) -> np.ndarray:
        """How many samples to take of each class, given how many may be: of a fraction at least one."""
        if isinstance(self.count, float):
            return np.minimum(np.maximum(np.round(self.count * available).astype(np.int64), 1), available)
        return np.minimum(self.count, available)


class Candidates(NamedTuple):
    """Samples of a shard that a rule may take: key, shard, row, label, score; what they compete by and in which group."""

    table: pa.Table
    keys: np.ndarray
    groups: np.ndarray


class Tally(NamedTuple):
    """Samples that have the score (and the column of the intervals), and how many of them a rule may take."""

    scored: int
    passed: int


@dataclasses.dataclass(frozen=True)
class Pool:
    """Which samples a rule chooses among, in a form that travels to tasks.

    Attributes
    ----------
    num_classes : int
        1 unless the rule is one of each class.
    edges : Cuts or None
        Of the rule's intervals, once they are found.
    """

    run_uri: str
    rule: Rule
    condition: Condition | None
    num_classes: int
    edges: Cuts | None = None

    @classmethod
    def of(cls, run: Run, rule: Rule) -> "Pool":
        """Check a rule against a run. UserError for a column, a condition or a subset that is not there."""
        _check_columns(run, rule)
        asked = condition(run, rule.where) if rule.where else None
        if rule.per_class and not run.classes:
            raise UserError("this run has no labels", "per_class")
        return cls(run.uri, rule, asked, max(1, len(run.classes)) if rule.per_class else 1)

    @property
    def num_groups(self) -> int:
        """Groups within which samples compete."""
        return self.num_classes * (self.rule.stratify[1] if self.edges is not None else 1)

    def candidates(self, shard: int, by_interval: bool = False) -> tuple[Candidates, Tally]:
        """The samples of a shard; `by_interval`: ordered by the column of the intervals, to find these."""
        rule, names = self.rule, [self.rule.by]
        names += [rule.stratify[0]] if rule.stratify else []
        asked = self.condition.names if self.condition else ()
        table = joins.join(self.run_uri, shard, dict.fromkeys([*names, *asked, DECISION]), rule.labels)
        labels, dropped = columns.labels_or_minus_one(table["label"]), is_dropped(table[DECISION])
        values = [_finite(table[name]) for name in names]
        scored = np.logical_and.reduce([np.isfinite(v) for v in values]) & ~dropped
        passed = scored & (labels >= 0) if rule.per_class else scored
        if self.condition is not None:
            passed = passed & self.condition.holds(table)
        for name in rule.exclude:
            passed &= ~subsets.holds(table, self.run_uri, name, shard)
        groups = labels[passed] if rule.per_class else np.zeros(passed.sum(), np.int64)
        keys = sortable(values[-1][passed], lowest=not (by_interval or rule.lowest))
        if self.edges is not None:
            groups = groups * rule.stratify[1] + self.edges.intervals(sortable(values[-1][passed]), groups)
        if rule.drawn and not by_interval:
            drawn = uniform(rule.seed, shard, table["row"].to_numpy()[passed], SELECTION)
            keys = (drawn * 2.0**32).astype(np.uint32)
        score = pa.array(values[0], mask=~np.isfinite(values[0]))
        chosen = pa.table({name: table[name] for name in ("key", "shard", "row")})
        chosen = chosen.append_column("label", columns.nullable(labels)).append_column("score", score)
        return Candidates(chosen.filter(pa.array(passed)), keys, groups), Tally(int(scored.sum()), int(passed.sum()))


def _finite(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float32 (n,), NaN where there is no value."""
    return column.cast(pa.float32(), safe=False).fill_null(np.nan).to_numpy()


def _check_columns(run: Run, rule: Rule) -> None:
    asked = [(rule.by, "by"), *([(rule.stratify[0], "stratify")] if rule.stratify else [])]
    for column, field in asked:
        column_groups.check_score(run.uri, len(run.shards), column, field)
        column_groups.check_group_fresh(columns.split_name(column)[0], run.embedding_facts(), run.uri)
    for name in rule.exclude:
        subsets.check_subset(run, name, "exclude")


def sources_of(run: Run, pool: Pool) -> dict[str, list[str]]:
    """What a rule's choice is made from: the sources of the column groups it looks at, by group, and of other subsets."""
    rule = pool.rule
    names = [rule.by, *([rule.stratify[0]] if rule.stratify else []), *(pool.condition.names if pool.condition else ())]
    groups = sorted({columns.split_name(name)[0] for name in names} - {columns.DECISIONS})
    found = {group: [f["source"] for f in column_groups.all_facts(run.uri, group, len(run.shards))] for group in groups}
    found[columns.EMBEDDINGS] = label_sources(run, run.embedding_facts(), rule.labels)
    others = {f"subsets/{name}": [subsets.check_subset(run, name, "exclude")["source"]] for name in rule.exclude}
    return found | others


def find_cuts(run: Run, pool: Pool) -> tuple[Pool, Cuts, Tally]:
    """The exact cut of a rule in each group, the pool with its intervals, and how many samples have a score and pass."""
    rows = sum(facts["rows"] for facts in run.embedding_facts())
    rule, tally = pool.rule, None
    if rule.stratify:
        intervals = rule.stratify[1]
        edges = np.arange(1, intervals)
        finder = CutFinder(pool.num_classes, rows, lambda totals: totals[:, None] * edges // intervals)
        tally = _count(run, pool, finder, by_interval=True)
        pool = dataclasses.replace(pool, edges=finder.cuts())
    finder = CutFinder(pool.num_groups, rows, _ranks(pool))
    tally = _count(run, pool, finder) or tally
    return pool, finder.cuts(), tally


def _ranks(pool: Pool) -> Callable[[np.ndarray], np.ndarray]:
    def ranks(totals: np.ndarray) -> np.ndarray:
        of_class = totals.reshape(pool.num_classes, -1)
        return spread_evenly(pool.rule.wanted(of_class.sum(axis=1)), of_class).reshape(-1, 1)

    return ranks


def _count(run: Run, pool: Pool, finder: CutFinder, by_interval: bool = False) -> Tally:
    """Rounds over the shards until the cuts are found."""
    shards, tally = [(shard,) for shard in range(len(run.shards))], Tally(0, 0)
    while finder.open is not None:
        counts, scored, passed = [], 0, 0
        for part, _ in merged_parts(_count_shard, shards, pool, finder.open, by_interval, merge=_merged_counts):
            counts.append(part[0])
            scored, passed = scored + part[1].scored, passed + part[1].passed
            if len(counts) == 64:  # so that what waits is a table's size, not the corpus's
                counts = [merge_counts(counts)]
        finder.add(*merge_counts(counts))
        tally = Tally(scored, passed)
    return tally


Counts = tuple[tuple[np.ndarray, np.ndarray], Tally]


def _count_shard(shard: int, pool: Pool, cells: Cells, by_interval: bool) -> Counts:
    """Ray task: the parts of open cells that a shard's samples fall into, how many into each, and the tally."""
    candidates, tally = pool.candidates(shard, by_interval)
    codes = candidates.groups.astype(np.uint64) << np.uint64(32) | candidates.keys.astype(np.uint64)
    return cells.count(codes), tally


def _merged_counts(one: Counts, other: Counts) -> Counts:
    tally = Tally(one[1].scored + other[1].scored, one[1].passed + other[1].passed)
    return merge_counts([one[0], other[0]]), tally


class TiesBefore(NamedTuple):
    """Groups of which a shard holds ties of the cut, ascending, and how many of these earlier shards hold."""

    groups: np.ndarray
    counts: np.ndarray


def taken_of_shards(run: Run, pool: Pool, cuts: Cuts) -> Iterator[tuple[int, TiesBefore]]:
    """Per shard, in order: how many samples the cuts take of it, and what it must know of earlier shards for that."""
    ties = np.zeros(len(cuts.keys), np.int64)
    for below, groups, on in in_order(_count_taken, [(shard,) for shard in range(len(run.shards))], pool, cuts):
        before = ties[groups]
        ties[groups] += on
        yield below + int(np.clip(cuts.ties[groups, 0] - before, 0, on).sum()), TiesBefore(groups, before)


def _count_taken(shard: int, pool: Pool, cuts: Cuts) -> tuple[int, np.ndarray, np.ndarray]:
    """Ray task: a shard's samples within the cuts, and the groups with samples exactly on one, and how many."""
    candidates, _ = pool.candidates(shard)
    cut = cuts.keys[candidates.groups, 0]
    tied = (candidates.keys == cut) & (cuts.ties[candidates.groups, 0] > 0)
    groups, on = np.unique(candidates.groups[tied], return_counts=True)
    return int((candidates.keys < cut).sum()), groups, on


def selected(shard: int, pool: Pool, cuts: Cuts, before: TiesBefore) -> pa.Table:
    """The samples of a shard that a rule takes: key, shard, row, label, score, in shard order."""
    candidates, _ = pool.candidates(shard)
    cut = cuts.keys[candidates.groups, 0]
    take = candidates.keys < cut
    for group, earlier in zip(before.groups, before.counts):
        mine = np.flatnonzero((candidates.groups == group) & (candidates.keys == cut))
        take[mine[: max(0, int(cuts.ties[group, 0] - earlier))]] = True
    return candidates.table.filter(pa.array(take))
