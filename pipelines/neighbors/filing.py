"""The first pass: rows of a run, whitened and filed by cell, a file for each block of consecutive shards.

A file holds a record batch per cell, so that a search reads the cells that it looks into and no others.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ops.cells import nearest_cells
from ops.fingerprints import SIDE
from ops.neighbors import Nearest, nearest
from ops.whitening import Whitening
from pipelines.neighbors.ids import ids_of
from pipelines.neighbors.pictures import PICTURE_FIELDS, pictures_of
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.record import CorpusConfig, Shard

UNSEEN = b"unseen"  # in a file's metadata: its rows without a picture
BLOCK_BYTES = 256 << 20  # of vectors and pictures that a task holds; a larger shard is a block by itself


class Filed(NamedTuple):
    """A block that is filed: the rows of each cell (C,), and the sample queries' nearest in it with the cells they lie in.

    `unseen` counts the rows of which no picture could be had.
    """

    counts: np.ndarray
    unseen: int
    nearest: Nearest | None
    homes: np.ndarray | None


def blocks_of(embedded: Sequence[dict[str, Any]], width: int) -> list[list[int]]:
    """Consecutive shards together, at most `BLOCK_BYTES` of filed rows."""
    most = BLOCK_BYTES // (4 * width + SIDE * SIDE + 64)
    blocks, rows = [], 0
    for shard, facts in enumerate(embedded):
        if not blocks or rows + facts["rows"] > most:
            blocks.append([])
            rows = 0
        blocks[-1].append(shard)
        rows += facts["rows"]
    return blocks


def file_block(
    block: int,
    shards: Sequence[tuple[int, Shard]],
    run_uri: str,
    config: CorpusConfig,
    folder: str,
    whitening: Whitening,
    centres: np.ndarray,
    probe: tuple[np.ndarray, np.ndarray, int] | None,
) -> Filed:
    """Ray task: file one block, unless it is filed; `probe` = vectors, their own ids (−1: none) and k of sample queries."""
    path = storage.join(folder, f"{block:06d}.arrow")
    if not storage.exists(path):
        table = pa.concat_tables([_whitened(run_uri, number, shard, config, whitening) for number, shard in shards])
        own = nearest_cells(columns.vectors(table["vector"]), centres, 1)[:, 0] if table.num_rows else np.zeros(0, int)
        order = np.lexsort((table["id"].to_numpy(), own))
        starts = np.searchsorted(own[order], np.arange(len(centres) + 1))
        table = table.take(order).replace_schema_metadata({UNSEEN: str(table["fingerprint"].null_count)})
        with storage.write_atomic(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
            for start, stop in itertools.pairwise(starts):
                writer.write_batch(_batch(table.slice(start, stop - start)))
    file = _open(folder, block, ["id", "vector"])
    batches = [file.get_batch(cell) for cell in range(len(centres))]
    counts, unseen = np.array([batch.num_rows for batch in batches]), int(file.schema.metadata[UNSEEN])
    if probe is None:
        return Filed(counts, unseen, None, None)
    return Filed(counts, unseen, *_probed(pa.Table.from_batches(batches), counts, *probe))


def _batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _whitened(run_uri: str, number: int, shard: Shard, config: CorpusConfig, whitening: Whitening) -> pa.Table:
    """The rows of a shard as they are filed."""
    table = column_groups.read(run_uri, columns.EMBEDDINGS, number, ["row", "embedding"])
    rows, vectors = table["row"].to_numpy(), columns.vectors(table["embedding"])
    directions = whitening.apply(vectors) if len(vectors) else np.zeros((0, len(whitening.mean)), np.float32)
    data = {"id": ids_of(number, rows), "vector": columns.vector_array(directions, pa.float32())}
    pictures = pictures_of(shard, rows, config)
    return pa.table(data | {name: pictures[name] for name in PICTURE_FIELDS})


class FiledRows:
    """The filed rows of a folder, with the columns `names`; each block's file is opened once, its cells are read as asked.

    Parameters
    ----------
    folder : str
    counts : ndarray of shape (blocks, C)
        Rows of each block and cell: where there are none, nothing is opened.
    names : sequence of str
    """

    def __init__(self, folder: str, counts: np.ndarray, names: Sequence[str]):
        self.folder, self.counts, self.names = folder, counts, names
        self._files: dict[int, pa.ipc.RecordBatchFileReader] = {}

    def cell(self, cell: int) -> Iterator[pa.RecordBatch]:
        """The rows of a cell, a batch for each block that has some; their ids rise."""
        for block in np.flatnonzero(self.counts[:, cell]).tolist():
            if block not in self._files:
                self._files[block] = _open(self.folder, block, self.names)
            yield self._files[block].get_batch(cell)


def _open(folder: str, block: int, names: Sequence[str]) -> pa.ipc.RecordBatchFileReader:
    filesystem, path = storage.open_filesystem(storage.join(folder, f"{block:06d}.arrow"))
    stream = filesystem.open_input_file(path)
    schema = pa.ipc.open_file(stream).schema
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
    return pa.ipc.open_file(stream, options=options)


def _probed(
    table: pa.Table, counts: np.ndarray, queries: np.ndarray, own: np.ndarray, k: int
) -> tuple[Nearest, np.ndarray]:
    """The nearest of sample queries in a block, by ids, and the cell of each."""
    ids, homes = table["id"].to_numpy(), np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(ids)  # ties by shard and row
    if not len(ids):
        nothing = np.full((len(queries), 0), -1)
        return Nearest(nothing, nothing.astype(np.float32)), nothing
    at = np.searchsorted(ids[order], own).clip(max=len(ids) - 1)
    found = nearest(queries, columns.vectors(table["vector"])[order], k, np.where(ids[order][at] == own, at, -1))
    there = found.positions >= 0
    return (
        Nearest(np.where(there, ids[order][found.positions], -1), found.similarity),
        np.where(there, homes[order][found.positions], -1),
    )
