"""The second pass: a group of queries at a time against the cells that they look into, then the pictures of the nearest.

A group is a piece of the filed queries, which lie beside each other: what it looks into is read once for all of them.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ops.cells import nearest_cells
from ops.duplicates import is_same_picture
from ops.fingerprints import SIDE, picture_correlation
from ops.neighbors import Nearest, above, merged, nearest, with_pairs
from pipelines.neighbors.filing import FiledRows
from pipelines.neighbors.ids import shards_and_rows
from pipelines.neighbors.pictures import PICTURE_FIELDS
from pipelines.runs import columns, storage

GROUP_ROWS = 8_192  # queries that a task holds
CHUNK_ROWS = 65_536  # references that it compares at once
VERIFIED = 10  # nearest of a sample whose pictures are compared with its own

EDGE_FIELDS = (
    ("query", np.int64),
    ("reference", np.int64),
    ("correlation", np.float32),
    ("identical", np.bool_),
    ("query_pixels", np.int64),
    ("query_bytes", np.int64),
    ("pixels", np.int64),
    ("bytes", np.int64),
)  # of pairs that show one picture


class Part(NamedTuple):
    """Some queries of a cell: rows `start` to `stop` of those filed there, counted over all blocks."""

    cell: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """What all groups share.

    Attributes
    ----------
    queries, references : str
        Folders of filed rows; the same one where a run is searched in itself.
    query_counts, reference_counts : ndarray of shape (blocks, C)
        Rows filed in each.
    centres : ndarray of shape (C, d)
    probes : int
        Cells that a query looks into, its own among them.
    k : int
    found : str
        Folder of the results.
    query_blocks : ndarray of shape (shards,)
        The block that each shard of the queries is filed in.
    """

    queries: str
    references: str
    query_counts: np.ndarray
    reference_counts: np.ndarray
    centres: np.ndarray
    probes: int
    k: int
    found: str
    query_blocks: np.ndarray

    @property
    def itself(self) -> bool:
        """Whether a query is among the references, and not its own neighbour."""
        return self.queries == self.references


def groups_of(counts: np.ndarray) -> list[list[Part]]:
    """The filed queries in groups of about `GROUP_ROWS`; a cell with more of them is in several."""
    groups, room = [], 0
    for cell, rows in enumerate(counts.sum(axis=0).tolist()):
        start = 0
        while start < rows:
            if not room:
                groups.append([])
                room = GROUP_ROWS
            take = min(room, rows - start)
            groups[-1].append(Part(cell, start, start + take))
            start, room = start + take, room - take
    return groups


def search_group(group: int, parts: list[Part], search: Search) -> str:
    """Ray task: the lists of one group's queries, in files by block of the queries; a folder that is there is kept.

    The path of the group's edges, which is written last.
    """
    done = storage.join(search.found, f"edges-{group:06d}.arrow")
    if storage.exists(done):
        return done
    ids, vectors, pictures = _queries(parts, search)
    probed = nearest_cells(vectors, search.centres, search.probes)
    lists = _lists(ids, vectors, probed, search)
    edges = _edges(ids, pictures, lists, probed, search)
    _write(group, ids, lists, search)
    with storage.write_atomic(done) as stream, pa.ipc.new_file(stream, edges.schema) as writer:
        writer.write_table(edges)
    return done


def _queries(parts: list[Part], search: Search) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    filed = FiledRows(search.queries, search.query_counts, ["id", "vector", *PICTURE_FIELDS])
    cells = ((part, pa.Table.from_batches(filed.cell(part.cell))) for part in parts)
    table = pa.concat_tables(table.slice(part.start, part.stop - part.start) for part, table in cells).combine_chunks()
    return table["id"].to_numpy(), columns.vectors(table["vector"]), table.select(list(PICTURE_FIELDS))


def _chunks(rows: FiledRows, cell: int) -> Iterator[pa.Table]:
    """The rows of a cell, at most about `CHUNK_ROWS` at a time."""
    waiting, count = [], 0
    for batch in rows.cell(cell):
        waiting.append(batch)
        count += batch.num_rows
        if count >= CHUNK_ROWS:
            yield pa.Table.from_batches(waiting).combine_chunks()
            waiting, count = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _lists(ids: np.ndarray, vectors: np.ndarray, probed: np.ndarray, search: Search) -> Nearest:
    """The k nearest of each query: first in its own cell, then what is nearer in the others."""
    n, k = len(ids), search.k
    lists = Nearest(np.full((n, k), -1), np.full((n, k), -np.inf, np.float32))
    filed = FiledRows(search.references, search.reference_counts, ["id", "vector"])
    for cell in np.unique(probed[:, 0]):
        mine = np.flatnonzero(probed[:, 0] == cell)
        for chunk in _chunks(filed, int(cell)):
            there, references = chunk["id"].to_numpy(), columns.vectors(chunk["vector"])
            found = nearest(vectors[mine], references, k, own=_own(ids[mine], there) if search.itself else None)
            found = Nearest(np.where(found.positions < 0, -1, there[found.positions]), found.similarity)
            both = merged([Nearest(*(x[mine] for x in lists)), found], k)
            lists.positions[mine], lists.similarity[mine] = both.positions, both.similarity
    others = probed[:, 1:]
    order = np.argsort(others, axis=None, kind="stable")
    cells, starts = np.unique(others.ravel()[order], return_index=True)
    for cell, rows in zip(cells, np.split(order // max(1, others.shape[1]), starts[1:])):
        for chunk in _chunks(filed, int(cell)):
            there = chunk["id"].to_numpy()
            near = above(vectors[rows], columns.vectors(chunk["vector"]), lists.similarity[rows, -1])
            with_pairs(lists, rows[near[0]], there[near[1]], near[2])
    return lists


def _own(ids: np.ndarray, there: np.ndarray) -> np.ndarray:
    at = np.searchsorted(there, ids).clip(max=len(there) - 1)
    return np.where(there[at] == ids, at, -1)


def _edges(ids: np.ndarray, pictures: pa.Table, lists: Nearest, probed: np.ndarray, search: Search) -> pa.Table:
    """The pairs of a query and one of its nearest that show one picture."""
    wanted = lists.positions[:, :VERIFIED]
    edges = {name: [np.empty(0, kind)] for name, kind in EDGE_FIELDS}
    filed = FiledRows(search.references, search.reference_counts, ["id", *PICTURE_FIELDS])
    for cell in np.unique(probed):
        for chunk in _chunks(filed, int(cell)):
            there = chunk["id"].to_numpy()
            at = np.searchsorted(there, wanted).clip(max=len(there) - 1)
            row, column = np.nonzero(there[at] == wanted)
            one, other = pictures.take(row), chunk.take(at[row, column])
            fit, identical = _compare(one, other)
            same = identical | is_same_picture(fit, lists.similarity[row, column])
            values = (ids[row], wanted[row, column], fit, identical, *_size(one), *_size(other))
            for (name, _), value in zip(EDGE_FIELDS, values):
                edges[name].append(value[same])
    return pa.table({name: np.concatenate(edges[name]).astype(kind) for name, kind in EDGE_FIELDS})


def _compare(one: pa.Table, other: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """How well pictures fit, 0 where one has no fingerprint, 1 where their bytes are the same; and whether these are."""
    fit = np.zeros(one.num_rows, np.float32)
    identical = pa.compute.equal(one["sha256"], other["sha256"]).fill_null(False).to_numpy()
    known = pa.compute.and_(one["fingerprint"].is_valid(), other["fingerprint"].is_valid()).to_numpy()
    rows = np.flatnonzero(known & ~identical)
    if len(rows):
        fit[rows] = picture_correlation(_prints(one, rows), _prints(other, rows))
    fit[identical] = 1.0
    return fit, identical


def _prints(table: pa.Table, rows: np.ndarray) -> np.ndarray:
    column = table["fingerprint"].take(rows)
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, SIDE, SIDE)


def _size(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and bytes of pictures, 0 where unknown."""
    width, height, size = (table[name].fill_null(0).to_numpy() for name in ("width", "height", "bytes"))
    return width * height, size


def _write(group: int, ids: np.ndarray, lists: Nearest, search: Search) -> None:
    """The group's lists in a file for each block of the queries, a batch for each of its shards."""
    order = np.argsort(ids)
    shards, rows = shards_and_rows(ids[order])
    table = pa.table(
        {
            "row": rows,
            "neighbor": columns.vector_array(lists.positions[order], pa.int64()),
            "similarity": columns.vector_array(lists.similarity[order], pa.float32()),
        }
    )
    bounds = np.arange(len(search.query_blocks) + 1)
    starts = np.searchsorted(shards, bounds)
    for block in np.unique(search.query_blocks[shards]):
        inside = np.flatnonzero(search.query_blocks == block)
        path = storage.join(search.found, f"{block:06d}", f"{group:06d}.arrow")
        with storage.write_atomic(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
            for shard in inside:
                writer.write_batch(_slice(table, starts[shard], starts[shard + 1]))


def _slice(table: pa.Table, start: int, stop: int) -> pa.RecordBatch:
    batches = table.slice(start, stop - start).combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
