"""One pass over a run's shards for the report: evenly spaced rows, the extremes of every score, counts of label doubts.

Up to a million samples every score is read in full; beyond that evenly spaced rows stand for all. Extremes and counts are
exact at any size. What the driver holds: the float columns of those rows, and some thousand full rows.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pipelines.runs import column_groups, columns, joins
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order
from pipelines.summary import groups_of

NEAREST, MARGIN = "difficulty.nearest_class", "difficulty.margin"
# What the hardest samples are the hardest by: the first of these that has values.
MAIN = ("difficulty.rmd", "difficulty.md_agn", "confusion.confusion")
SHOWN_FIRST = (MAIN[0], MARGIN, *MAIN[1:])
GATHERED = 32  # shards whose extremes wait to be merged at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the page holds and reads at most."""

    values: int = 1_000_000  # rows behind histograms and curves
    points: int = 4_000  # of the scatter, drawn as SVG: plotly's WebGL needs eval, which the page forbids
    overall: int = 200  # hardest samples; half as many of the easiest, and by each other score
    per_class: int = 32
    pairs: int = 720  # likely label errors over all pairs of classes
    classes: int = 1000  # beyond this many classes, no extremes per class
    sets: int = 6  # prediction sets, and trust sets: the latest; the table of metrics holds all
    pictures: int = 2400
    picture_chars: int = 12_000_000  # of all pictures, as base64
    read_bytes: int = 8 << 30  # of shards, for pictures


@dataclasses.dataclass(frozen=True)
class Score:
    """A float column of the run, and what its Arrow metadata say of it."""

    name: str
    meaning: str
    direction: str
    unit: str

    @property
    def label(self) -> str:
        """'rmd'; of a named set 'confidence (NAME)'."""
        group, name = columns.split_name(self.name)
        return f"{name} ({group.partition('/')[2]})" if "/" in group else name


@dataclasses.dataclass(frozen=True)
class Available:
    """What a run has: shards embedded, scores, integer columns, what was left out and why."""

    shards: tuple[int, ...]
    scores: tuple[Score, ...]
    integers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def predictions(self) -> list[str]:
        """Names of the prediction sets."""
        return [name.split("/")[1].removesuffix(".prediction") for name in self.integers if name != NEAREST]


@dataclasses.dataclass(frozen=True)
class Pick:
    """The `count` samples with the highest or lowest value of a column, of all, of each class or of each pair of classes.

    A pair is that of the label and the nearest class. `fits`: only samples whose margin is at most 0 (True) or above it.
    """

    column: str
    count: int
    highest: bool = True
    of_each: Literal["", "class", "pair"] = ""
    fits: bool | None = None

    def of(self, table: pa.Table) -> pa.Table:
        """The picked rows, first the first of each; ties in shard order."""
        values = floats(table[self.column])
        order = np.lexsort((table["row"].to_numpy(), table["shard"].to_numpy(), -values if self.highest else values))
        wanted = np.isfinite(values) & self._fitting(table)
        order = order[wanted[order]]
        groups = self._groups(table)[order]
        by_group = np.argsort(groups, kind="stable")
        counts = np.unique(groups, return_counts=True)[1]
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        return table.take(pa.array(order[by_group][np.arange(len(order)) - starts < self.count]))

    def _fitting(self, table: pa.Table) -> np.ndarray:
        if self.fits is None:
            return np.ones(table.num_rows, bool)
        margin = floats(table[MARGIN])
        return margin <= 0 if self.fits else margin > 0

    def _groups(self, table: pa.Table) -> np.ndarray:
        if not self.of_each:
            return np.zeros(table.num_rows, np.int64)
        classes = shown_class(table)
        return classes if self.of_each == "class" else classes << 32 | columns.labels_or_minus_one(table[NEAREST])


@dataclasses.dataclass(frozen=True)
class Scan:
    """What the pass found. `picked` follows the picks asked for."""

    values: pa.Table  # shard, label, integers and scores of evenly spaced rows
    step: int  # every how manieth row that is
    points: pa.Table  # full rows, evenly spaced
    picked: dict[Pick, pa.Table]
    pairs: Counter[tuple[int, int]]  # (given, nearest class): samples with margin > 0
    classes: Counter[int]  # samples of each class shown, -1 where there is none


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column as float64, NaN where it is null."""
    return column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)


def shown_class(table: pa.Table) -> np.ndarray:
    """The label of each row; without one the nearest class; -1 without either."""
    labels = columns.labels_or_minus_one(table["label"])
    if NEAREST not in table.column_names:
        return labels
    return np.where(labels >= 0, labels, columns.labels_or_minus_one(table[NEAREST]))


def available(run: Run, limits: Limits) -> Available:
    """What the report can show: groups that are whole and made from the embeddings that are there now."""
    embedded = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards))
    shards = tuple(shard for shard, facts in enumerate(embedded) if facts)
    fields: list[tuple[str, pa.Field]] = []
    groups, notes = _latest(run, groups_of(run) if shards else [], limits.sets)
    for group in groups:
        found = column_groups.all_facts(run.uri, group, len(run.shards))
        why = _unusable([found[shard] for shard in shards], [embedded[shard]["source"] for shard in shards])
        if why:
            notes.append(f"{group}/ {why} and is left out; run its stage again")
        else:
            fields += [(group, field) for field in column_groups.schema(run.uri, group, shards[0])]
    floating = [(group, field) for group, field in fields if pa.types.is_floating(field.type)]
    # Files of an older version hold percentiles too.
    scores = [_score(*pair) for pair in floating if "percentile_of" not in columns.about(pair[1])]
    scores.sort(key=lambda score: SHOWN_FIRST.index(score.name) if score.name in SHOWN_FIRST else len(SHOWN_FIRST))
    return Available(shards, tuple(scores), tuple(_integers(fields)), tuple(notes))


def _latest(run: Run, groups: Sequence[str], most: int) -> tuple[list[str], list[str]]:
    """The groups without all but the latest prediction sets and trust sets, and a note on what that leaves out."""
    kept, notes = list(groups), []
    for kind, stage in (("predictions", "predict"), ("trust", "trust")):
        named = [group for group in groups if group.startswith(f"{kind}/")]
        when = {g: (run.stage(f"{stage}/{g.partition('/')[2]}") or {}).get("finished", "") for g in named}
        late = sorted(named, key=when.__getitem__, reverse=True)[:most]
        if len(late) < len(named):
            notes.append(
                f"{len(named)} sets in {kind}/: charts and rows show the {most} latest, {', '.join(sorted(late))}"
            )
            kept = [group for group in kept if group not in named or group in late]
    return kept, notes


def _unusable(found: Sequence[dict | None], sources: Sequence[str]) -> str | None:
    """Why a group cannot be joined with the embeddings, if it cannot."""
    if None in found:
        return "lacks some shards"
    old = any(facts.get("embeddings", source) != source for facts, source in zip(found, sources))
    return "is older than the embeddings" if old else None


def _integers(fields: Sequence[tuple[str, pa.Field]]) -> list[str]:
    """The nearest class and the predictions."""
    names = [f"{group}.{field.name}" for group, field in fields]
    return [n for n in names if n == NEAREST or (n.startswith("predictions/") and n.endswith(".prediction"))]


def _score(group: str, field: pa.Field) -> Score:
    about = columns.about(columns.known_field(group, field))
    return Score(f"{group}.{field.name}", *(about.get(what, "") for what in ("meaning", "direction", "unit")))


def picks(have: Available, limits: Limits, num_classes: int) -> dict[str, Pick]:
    """The extremes to look for, by what they are for."""
    names = [score.name for score in have.scores]
    found = {}
    for name in names:
        found[f"high {name}"] = Pick(name, limits.overall // 2)
        found[f"low {name}"] = Pick(name, limits.overall // 4, highest=False)
    each = _of_each_class(limits, num_classes)
    doubts = MARGIN in names and NEAREST in have.integers
    for main in [name for name in MAIN if name in names]:
        found[f"high {main}"] = Pick(main, limits.overall)
        found[f"hardest of each class by {main}"] = Pick(main, each, of_each="class")
        found[f"easiest of each class by {main}"] = Pick(main, each, highest=False, of_each="class")
        if doubts:
            found[f"fitting {main}"] = Pick(main, limits.overall, fits=True)
            found[f"fitting of each class by {main}"] = Pick(main, each, of_each="class", fits=True)
    if doubts:
        found["suspects"] = Pick(MARGIN, limits.overall, fits=False)
        found["suspects of each class"] = Pick(MARGIN, each, of_each="class", fits=False)
        pairs = min(each, limits.pairs // max(1, num_classes * (num_classes - 1)))
        found["suspects of each pair of classes"] = Pick(MARGIN, pairs, of_each="pair", fits=False)
    return found


def _of_each_class(limits: Limits, num_classes: int) -> int:
    """Extremes per class: fewer where there are many classes, none beyond the limit."""
    if num_classes > limits.classes:
        return 0
    return limits.per_class if num_classes <= 20 else max(1, 20 * limits.per_class // num_classes)


def scan(run: Run, have: Available, wanted: Sequence[Pick], limits: Limits) -> Scan:
    """Go once over the columns of every shard, a Ray task each."""
    facts = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards))
    rows = [facts[shard]["rows"] for shard in have.shards]
    steps = [-(-max(1, sum(rows)) // most) for most in (limits.values, limits.points)]
    starts = np.cumsum([0, *rows])[:-1]
    items = [(shard, tuple(int(-start % step) for step in steps)) for shard, start in zip(have.shards, starts)]
    names = [*have.integers, *(score.name for score in have.scores)]
    shared = (run.uri, names, list(wanted), tuple(steps))
    parts: list[Scan] = []
    for part in in_order(scan_shard, items, *shared):
        parts.append(part)
        if len(parts) > GATHERED:
            parts = [_merged(parts)]
    return _merged(parts)


def scan_shard(
    shard: int,
    firsts: tuple[int, int],
    run_uri: str,
    names: list[str],
    wanted: list[Pick],
    steps: tuple[int, int],
) -> Scan:
    """Ray task: what one shard adds; `firsts` are where its evenly spaced rows begin."""
    table = joins.join(run_uri, shard, names)
    values, points = (table.take(pa.array(np.arange(f, table.num_rows, s))) for f, s in zip(firsts, steps))
    return Scan(
        values.select(["shard", "label", *names]),
        steps[0],
        points,
        {pick: pick.of(table) for pick in wanted},
        _pairs(table),
        Counter(shown_class(table).tolist()),
    )


def _pairs(table: pa.Table) -> Counter[tuple[int, int]]:
    """(given, suggested) of the rows that sit nearer another class."""
    if MARGIN not in table.column_names or NEAREST not in table.column_names:
        return Counter()
    doubted = table.filter(pa.compute.greater(table[MARGIN], 0.0).fill_null(False))
    return Counter(zip(doubted["label"].to_pylist(), doubted[NEAREST].to_pylist()))


def _merged(parts: Iterable[Scan]) -> Scan:
    parts = list(parts)
    return Scan(
        pa.concat_tables([part.values for part in parts]),
        parts[0].step,
        pa.concat_tables([part.points for part in parts]),
        {pick: pick.of(pa.concat_tables([part.picked[pick] for part in parts])) for pick in parts[0].picked},
        sum((part.pairs for part in parts), Counter()),
        sum((part.classes for part in parts), Counter()),
    )
