"""The review page: queues of samples on which a person decides, in the browser, from disk.

    suspects     the highest label_error (without it, margin) among the samples not decided yet
    hard         the highest rmd among those whose label fits (margin <= 0): are they fair test images?
    duplicates   samples that repeat another one, beside the one to keep
    random       drawn at random within ranges of label_error, for an estimate of the whole corpus

One pass over the columns finds all four. A shard contributes at most a queue's length to each, so the driver's memory does not
grow with the corpus. The random sample is the smallest hashes of (seed, shard, row) in each range: no cut into shards and no
number of workers changes it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ops.review import allocate, look_order
from pipelines.report.scan import floats
from pipelines.runs import column_groups, columns, joins
from pipelines.runs import decisions as decided
from pipelines.runs.record import Run
from pipelines.runs.tasks import in_order

EDGES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the ranges of label_error: finer where the errors are
QUESTIONS = {
    "suspects": ("Suspects", "Is the label wrong? The most suspicious labels come first."),
    "hard": ("Hard and clean", "Is this a fair test image: the label right, the picture recognisable? The hardest come first."),
    "duplicates": ("Duplicates", "Is this the same picture as the one to keep? Then drop it."),
    "random": ("Random sample", "Is the label right? Drawn at random, for an estimate of the whole corpus; skip as few as you can."),
}  # fmt: skip
SHOWN = ("label_error", "margin", "rmd")
NEIGHBORS_SHOWN = 4
Place = tuple[int, int]  # shard and row


@dataclasses.dataclass(frozen=True)
class ReviewLimits:
    """How many samples the page holds at most."""

    each: int = 300  # of suspects, hard images and duplicates
    random: int = 300
    seed: int = 0


class Columns(NamedTuple):
    """Full names of the columns that this run has for the review, None where it has none."""

    suspicion: str | None
    rmd: str | None
    margin: str | None
    nearest: str | None
    duplicate: tuple[str, str] | None
    neighbors: tuple[str, str] | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        pairs = [name for pair in (self.duplicate, self.neighbors) if pair for name in pair]
        return list(dict.fromkeys([*(name for name in self[:4] if name), *pairs]))


def available_columns(run: Run) -> Columns:
    """What this run has that the review can use."""

    def there(group: str, *names: str) -> list[str | None]:
        whole = all(column_groups.all_facts(run.uri, group, len(run.shards))) and len(run.shards) > 0
        known = column_groups.schema(run.uri, group).names if whole else ()
        return [f"{group}.{name}" if name in known else None for name in names]

    error, margin, rmd, nearest = there(columns.DIFFICULTY, "label_error", "margin", "rmd", "nearest_class")
    shard, row, near_shard, near_row = there(
        "neighbors", "duplicate_of_shard", "duplicate_of_row", "neighbor_shard", "neighbor_row"
    )
    labelled = bool(run.classes)
    return Columns(
        (error or margin) if labelled else None,
        rmd if labelled else None,
        margin if labelled else None,
        nearest,
        (shard, row) if shard and row else None,
        (near_shard, near_row) if near_shard and near_row else None,
    )


class _Found(NamedTuple):
    """What some shards hold for the queues; `sizes` and `doubtful` count samples by range of label_error."""

    queues: dict[str, pa.Table]
    sizes: np.ndarray
    doubtful: np.ndarray


def collect(run: Run, limits: ReviewLimits) -> dict[str, Any] | None:
    """The queues of a run and the rows of their samples; None where there is nothing to review.

    Returns
    -------
    found : dict
        `queues`: name, title, question, ids, and of the random sample `strata` (of each id) and `sizes` (samples of each
        stratum); `table`: the samples' rows, an id being the position in it.
    """
    have = available_columns(run)
    if have.suspicion is None and have.duplicate is None:
        return None
    items = [(shard,) for shard in range(len(run.shards))]
    parts: list[_Found] = []
    for part in in_order(_shard_queues, items, run.uri, have, limits):
        parts = [_merge([*parts, part], limits)] if len(parts) >= 32 else [*parts, part]
    found = _merge(parts, limits)
    ids: dict[Place, int] = {}
    tables: list[pa.Table] = []
    queues = []
    for name, (title, question) in QUESTIONS.items():
        table = found.queues.get(name)
        if table is None or not table.num_rows:
            continue
        extra: dict[str, Any] = {}
        if name == "random":
            table, strata = _plan_looks(table, found, limits)
            extra = {"strata": strata.tolist(), "sizes": found.sizes.tolist()}
        tables.append(table.select([n for n in table.column_names if not n.startswith("_")]))
        numbers = [ids.setdefault(place, len(ids)) for place in places(table)]
        queues.append({"name": name, "title": title, "question": question, "ids": numbers, **extra})
    if not queues:
        return None
    everything = pa.concat_tables(tables)
    first = {place: at for at, place in reversed(list(enumerate(places(everything))))}
    return {"queues": queues, "table": everything.take(pa.array([first[place] for place in ids])), "have": have}


def _shard_queues(shard: int, run_uri: str, have: Columns, limits: ReviewLimits) -> _Found:
    """Ray task: what one shard holds for each queue."""
    table = joins.join(run_uri, shard, have.names)
    known = decided.in_force(decided.read_history(run_uri, shard))["row"]
    table = table.filter(pa.compute.invert(pa.compute.is_in(table["row"], known.combine_chunks())))
    draws = _hashes(table, limits.seed)
    stratum = np.full(table.num_rows, -1)
    doubtful = np.zeros(table.num_rows, bool)
    if have.suspicion:
        suspicion = floats(table[have.suspicion])
        labelled = np.isfinite(suspicion)
        in_ranks = suspicion if have.suspicion.endswith("label_error") else (suspicion > 0) * 0.5 + 0.25
        stratum[labelled] = np.digitize(in_ranks[labelled], EDGES)
        doubtful = floats(table[have.margin]) > 0
    table = table.append_column("_draw", pa.array(draws)).append_column("_stratum", pa.array(stratum))
    count = len(EDGES) + 1
    return _merge(
        [
            _Found(
                _queues(table, have, doubtful),
                np.bincount(stratum[stratum >= 0], minlength=count),
                np.bincount(stratum[(stratum >= 0) & doubtful], minlength=count),
            )
        ],
        limits,
    )


def _queues(table: pa.Table, have: Columns, doubtful: np.ndarray) -> dict[str, pa.Table]:
    found = {}
    if have.suspicion:
        scored = np.isfinite(floats(table[have.suspicion]))
        found["suspects"] = _ranked(table, have.suspicion, scored)
        found["random"] = table.filter(pa.array(scored))
        if have.rmd:
            rmd = floats(table[have.rmd])
            found["hard"] = _ranked(table, have.rmd, np.isfinite(rmd) & ~doubtful)
    if have.duplicate:
        copies = pa.compute.is_valid(table[have.duplicate[1]])
        found["duplicates"] = table.filter(copies).append_column(
            "_rank", pa.array(-np.arange(pa.compute.sum(copies).as_py() or 0, dtype=np.float64))
        )
    return found


def _ranked(table: pa.Table, column: str, wanted: np.ndarray) -> pa.Table:
    return table.append_column("_rank", pa.array(floats(table[column]))).filter(pa.array(wanted))


def _merge(parts: Sequence[_Found], limits: ReviewLimits) -> _Found:
    """The queues of several parts, each cut to its length."""
    names = dict.fromkeys(name for part in parts for name in part.queues)
    queues = {
        name: _cut(name, pa.concat_tables([p.queues[name] for p in parts if name in p.queues]), limits)
        for name in names
    }
    return _Found(queues, sum(part.sizes for part in parts), sum(part.doubtful for part in parts))


def _cut(name: str, table: pa.Table, limits: ReviewLimits) -> pa.Table:
    shards, rows = table["shard"].to_numpy(), table["row"].to_numpy()
    if name != "random":
        order = np.lexsort((rows, shards, -table["_rank"].to_numpy()))[: limits.each]
        return table.take(pa.array(order))
    stratum = table["_stratum"].to_numpy()
    order = np.lexsort((rows, shards, table["_draw"].to_numpy(), stratum))
    _, starts, counts = np.unique(stratum[order], return_index=True, return_counts=True)
    within = np.arange(len(order)) - np.repeat(starts, counts)
    return table.take(pa.array(order[within < limits.random]))


def _plan_looks(table: pa.Table, found: _Found, limits: ReviewLimits) -> tuple[pa.Table, np.ndarray]:
    """The random sample in the order in which it is looked at, and each sample's stratum.

    The error rate of a range is guessed by its share of samples whose margin is above 0.
    """
    guesses = found.doubtful / np.maximum(found.sizes, 1)
    strata = look_order(allocate(found.sizes, guesses, limits.random))
    own = table["_stratum"].to_numpy()
    waiting = {stratum: iter(np.flatnonzero(own == stratum).tolist()) for stratum in np.unique(strata).tolist()}
    return table.take(pa.array([next(waiting[stratum]) for stratum in strata.tolist()])), strata


def _hashes(table: pa.Table, seed: int) -> np.ndarray:
    """A pseudo-random uint64 of each row's (shard, row): the finaliser of SplitMix64, Steele et al. 2014."""
    with np.errstate(over="ignore"):
        z = table["shard"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += table["row"].to_numpy().astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        for _ in range(2):
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return z


def places(table: pa.Table) -> list[Place]:
    """(shard, row) of each row of a table."""
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist()))


def neighbor_places(row: Mapping[str, Any], have: Columns) -> list[Place]:
    """Where the nearest neighbours of a sample lie, the nearest first."""
    if have.neighbors is None:
        return []
    shards, rows = (row[name] or [] for name in have.neighbors)
    return list(zip(shards, rows))[:NEIGHBORS_SHOWN]


def suggestion(row: Mapping[str, Any], have: Columns, near_labels: Sequence[int]) -> int | None:
    """Another class than the label: the nearest Gaussian's, else the commonest among the neighbours; None without one."""
    nearest = row.get(have.nearest) if have.nearest else None
    if nearest is not None and nearest != row["label"]:
        return nearest
    others = [label for label in near_labels if label >= 0 and label != row["label"]]
    return max(dict.fromkeys(others), key=others.count) if others else None
