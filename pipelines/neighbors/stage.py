"""Neighbours: the k nearest of every sample, in its run or in another one; what is a duplicate; a second opinion on labels.

    embeddings ── mean, covariance ─▶ whitening ── file by cell (a task per block of shards) ─▶ .parts
    .parts ── search (a task per group of queries) ─▶ lists and pairs of one picture ── union ─▶ duplicates
    lists, duplicates, labels ── write (a task per shard) ─▶ neighbors/SHARD.parquet

Up to `EXACT_PAIRS` pairs of a query and a reference there is one cell: the search is exact. Beyond, k-means centres of a
sample make 2 √N cells, and a query looks into as many as the recall needs: that is known beforehand, for the exact
neighbours of 1,000 samples were found while the rows were filed, and measured afterwards on 1,000 others.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ops.cells import fit_cells, recall_by_probes
from ops.neighbors import Nearest, merged, recall
from ops.whitening import Whitening
from pipelines.curation.votes import NEIGHBORS, LabelTable
from pipelines.neighbors import filing, search
from pipelines.neighbors.filing import blocks_of, file_block
from pipelines.neighbors.groups import duplicates_in_another, duplicates_within, read_edges
from pipelines.neighbors.ids import ids_of, shards_and_rows
from pipelines.neighbors.lists import Duplicates, WriteLists
from pipelines.neighbors.space import even_sample, whitening_of
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.executor import Stage, execute
from pipelines.runs.labels import label_sources
from pipelines.runs.progress import Progress
from pipelines.runs.record import Run, fingerprint
from pipelines.runs.tasks import in_order

VERSION = 2  # of what the lists are made with; another one makes them again
EXACT_PAIRS = 50_000**2
CELL_SAMPLE = 50  # rows per cell that k-means sees
SAMPLED = 2_000  # queries whose exact neighbours are found: half of them choose the probes, half measure the recall
RECALL = 0.97  # that the probes are chosen for; 0.95 is promised


class Side(NamedTuple):
    """A run whose rows are filed: its embeddings' facts and the blocks of its shards."""

    run: Run
    embedded: Sequence[dict[str, Any]]
    blocks: list[list[int]]

    @classmethod
    def of(cls, run: Run) -> "Side":
        """Of an embedded run; UserError where it isn't."""
        embedded = run.embedding_facts()
        return cls(run, embedded, blocks_of(embedded, run.config.width))

    @property
    def rows(self) -> int:
        """Embeddings of the run."""
        return sum(facts["rows"] for facts in self.embedded)

    @property
    def block_of_shard(self) -> np.ndarray:
        """The block of each shard."""
        return np.repeat(np.arange(len(self.blocks)), [len(block) for block in self.blocks])


def group_of(against: str | None) -> str:
    """The column group of the neighbours within the run, or in the run that is called `against`."""
    return NEIGHBORS if against is None else f"{NEIGHBORS}/against/{against}"


def neighbors(
    run: Run, k: int = 30, other: Run | None = None, name: str | None = None, exact_pairs: int = EXACT_PAIRS
) -> dict[str, Any]:
    """Write `neighbors/`, or `neighbors/against/NAME/` for the neighbours in another run, where it is missing or old.

    Parameters
    ----------
    run : Run
        Embedded.
    k : int
        Neighbours of each sample; fewer where there are no more.
    other : Run, optional
        Where to look for neighbours and duplicates instead.
    name : str, optional
        The other run's, in the path of the column group.
    exact_pairs : int
        Products of rows up to which every pair is compared.

    Returns
    -------
    counts : dict
        rows, k, duplicates, duplicate_groups, identical, recall (of the exact k nearest, on a sample; 1.0 where all pairs
        are compared), exact, cells, probes, shards_done, shards_skipped, seconds.

    Raises
    ------
    UserError
        If a run is not embedded, the encoders differ, or NAME is taken by another run.
    StageFailed
        If workers die again and again. What is done is kept, and the same command goes on from there.
    """
    if other is not None and not run.config.same_embedding(other.config):
        raise UserError(
            f"{other.uri}: embedded with {other.config.encoder!r}, this run with {run.config.encoder!r}; "
            "neighbours need the same encoder",
            "against",
        )
    started = time.monotonic()
    group, queries = group_of(name), Side.of(run)
    references = queries if other is None else Side.of(other)
    _refuse_other_run(run, group, other)
    made_of = [[f["source"] for f in side.embedded] for side in {id(s): s for s in (queries, references)}.values()]
    whole = fingerprint(group, VERSION, made_of, k, exact_pairs)
    lists = [fingerprint(whole, facts["source"]) for facts in queries.embedded]
    voted = fingerprint(label_sources(run, queries.embedded)) if other is None else None
    sources = [fingerprint(source, voted) for source in lists]
    there = column_groups.all_facts(run.uri, group, len(lists))
    told = run.stage(group) or {}
    labels = None
    if other is None and column_groups.pending(run.uri, group, sources):
        labels = LabelTable.of(run.uri, len(lists))
    scratch = run.path(".parts", group.replace("/", "-"))
    if told.get("lists") == whole and all(f and f.get("lists") == source for f, source in zip(there, lists)):
        found, facts = None, {key: told[key] for key in _TOLD}
        worker = (run.uri, group, None, None, None, labels, lists, {})
    else:
        folder = storage.join(scratch, whole)
        found, duplicates, facts = _search(queries, references, k, folder, exact_pairs)
        about = {"k": k, "against": other and other.uri}
        worker = (run.uri, group, found, queries.block_of_shard, duplicates, labels, lists, about)
    stage = Stage(group, group, sources, WriteLists, worker, rows=[f["rows"] for f in queries.embedded])
    counts = execute(run, stage, k=k, against=other and other.uri, lists=whole, **facts)
    storage.remove_tree(scratch)
    return counts | {"seconds": time.monotonic() - started, "searched": found is not None}


_TOLD = ("exact", "recall", "cells", "probes", "shrinkage", "unseen", "duplicates", "duplicate_groups", "identical",
         "largest_group")  # fmt: skip


def _refuse_other_run(run: Run, group: str, other: Run | None) -> None:
    """A name stands for one other run."""
    before = (run.stage(group) or {}).get("against")
    if other is not None and before not in (None, other.uri):
        raise UserError(f"{group}/ holds the neighbours in {before}; give {other.uri} another name", "name")


def _search(
    queries: Side, references: Side, k: int, folder: str, exact_pairs: int
) -> tuple[str, Duplicates, dict[str, Any]]:
    """File, search, and join pairs: where the lists are, the duplicates, and what is said of the search."""
    whitening = whitening_of(references.run)
    exact = queries.rows * references.rows <= exact_pairs
    centres = _centres(references, whitening, exact)
    sample, places = (None, None) if exact else _sample(queries, whitening)
    itself = queries.run is references.run
    probe = None if exact else (sample, ids_of(*places.T) if itself else np.full(len(sample), -1), k)
    folders = [storage.join(folder, "references"), storage.join(folder, "references" if itself else "queries")]
    reference_counts, unseen, truth, homes = _file(references, folders[0], whitening, centres, probe)
    query_counts = reference_counts
    if not itself:
        query_counts, more, *_ = _file(queries, folders[1], whitening, centres, None)
        unseen += more
    probes = 1 if exact else _probes(sample[::2], centres, homes[::2])
    plan = search.Search(
        folders[1],
        folders[0],
        query_counts,
        reference_counts,
        centres,
        probes,
        k,
        storage.join(folder, "found"),
        queries.block_of_shard,
    )
    groups = search.groups_of(query_counts)
    progress = Progress("search", len(groups), skipped=0)
    paths = []
    for parts, path in zip(groups, in_order(search.search_group, list(enumerate(groups)), plan)):
        paths.append(path)
        progress.shard(sum(part.stop - part.start for part in parts))
    duplicates, counts = (duplicates_within if itself else duplicates_in_another)(read_edges(paths))
    measured = 1.0 if exact else _measured(plan, ids_of(*places[1::2].T), truth.positions[1::2])
    facts = {
        "exact": exact,
        "recall": measured,
        "cells": len(centres),
        "probes": probes,
        "shrinkage": whitening.shrinkage,
        "unseen": unseen,
        "largest_group": 0,
    }
    return plan.found, duplicates, facts | counts


def _centres(references: Side, whitening: Whitening, exact: bool) -> np.ndarray:
    """The centres of the cells; one, which nothing is measured against, where all pairs are compared."""
    if exact:
        return np.zeros((1, len(whitening.mean)), np.float32)
    cells = max(1, round(2 * math.sqrt(references.rows)))
    _, vectors = even_sample(references.run, references.embedded, CELL_SAMPLE * cells)
    return fit_cells(whitening.apply(vectors), cells)


def _sample(queries: Side, whitening: Whitening) -> tuple[np.ndarray, np.ndarray]:
    places, vectors = even_sample(queries.run, queries.embedded, SAMPLED)
    return whitening.apply(vectors), places


def _file(
    side: Side, folder: str, whitening: Whitening, centres: np.ndarray, probe: tuple | None
) -> tuple[np.ndarray, int, Nearest | None, np.ndarray | None]:
    """File a run's rows: how many each block has of each cell; the sample's exact neighbours and the cells these are in."""
    run, shards = side.run, side.run.shards
    items = [(block, [(number, shards[number]) for number in numbers]) for block, numbers in enumerate(side.blocks)]
    counts, unseen, truth, homes = [], 0, None, None
    progress = Progress("file", len(items), skipped=0)
    for filed in in_order(file_block, items, run.uri, run.config, folder, whitening, centres, probe):
        counts.append(filed.counts)
        unseen += filed.unseen
        progress.shard(int(filed.counts.sum()))
        if filed.nearest is not None:
            truth, homes = _joined(truth, homes, filed, probe[2])
    return np.stack(counts), unseen, truth, homes


def _joined(truth: Nearest | None, homes: np.ndarray | None, filed: filing.Filed, k: int) -> tuple[Nearest, np.ndarray]:
    if truth is None:
        return filed.nearest, filed.homes
    both = merged([truth, filed.nearest], k)
    positions = np.concatenate([truth.positions, filed.nearest.positions], axis=1)
    cells = np.concatenate([homes, filed.homes], axis=1)
    at = (both.positions[:, :, None] == positions[:, None, :]).argmax(axis=2)
    return both, np.where(both.positions >= 0, np.take_along_axis(cells, at, axis=1), -1)


def _probes(sample: np.ndarray, centres: np.ndarray, homes: np.ndarray) -> int:
    """The cells to look into for `RECALL` on the sample."""
    return int(np.searchsorted(recall_by_probes(sample, centres, homes), RECALL)) + 1


def _measured(plan: search.Search, ids: np.ndarray, exact: np.ndarray) -> float:
    """The recall of the lists of some queries, whose exact neighbours are known."""
    wanted = {}
    for shard in np.unique(shards_and_rows(ids)[0]).tolist():
        wanted[shard] = [i for i, own in enumerate(shards_and_rows(ids)[0]) if own == shard]
    reader = WriteLists("", "", plan.found, plan.query_blocks, None, None, (), {})
    found = np.full_like(exact, -1)
    for shard, at in wanted.items():
        table = reader.lists_of(shard)
        rows = np.searchsorted(table["row"].to_numpy(), shards_and_rows(ids[at])[1])
        lists = columns.vectors(table["neighbor"])[rows]
        found[at, : lists.shape[1]] = lists[:, : found.shape[1]]
    return recall(found, exact)
