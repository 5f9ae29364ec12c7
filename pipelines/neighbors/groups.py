"""Pairs of one picture -> of what each sample is a duplicate: within a run the one of its group to keep, in another the best."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from ops.duplicates import duplicate_groups, kept_of_groups
from pipelines.neighbors.lists import Duplicates
from pipelines.neighbors.search import EDGE_FIELDS
from pipelines.runs import storage


def read_edges(paths: Iterable[str]) -> dict[str, np.ndarray]:
    """The pairs that the groups of a search found, in the order of the groups. About 60 bytes of memory each."""
    parts: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in EDGE_FIELDS}
    for uri in paths:
        filesystem, path = storage.open_filesystem(uri)
        with filesystem.open_input_file(path) as stream:
            table = pa.ipc.open_file(stream).read_all()
        for name, columns in parts.items():
            columns.append(table[name].to_numpy())
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def duplicates_within(edges: dict[str, np.ndarray]) -> tuple[Duplicates, dict[str, Any]]:
    """What is a duplicate of what in one run, chains included, and how many groups there are."""
    ids, at = np.unique(np.concatenate([edges["query"], edges["reference"]]), return_inverse=True)
    pairs = at.reshape(2, -1).T
    pixels, num_bytes = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    for side, names in enumerate((("query_pixels", "query_bytes"), ("pixels", "bytes"))):
        pixels[pairs[:, side]], num_bytes[pairs[:, side]] = edges[names[0]], edges[names[1]]
    groups = duplicate_groups(pairs, len(ids))
    kept = kept_of_groups(groups, pixels, num_bytes)
    best, identical = np.zeros(len(ids), np.float32), np.zeros(len(ids), bool)
    for side in (0, 1):
        np.maximum.at(best, pairs[:, side], edges["correlation"])
        np.logical_or.at(identical, pairs[:, side], edges["identical"])
    others = kept != np.arange(len(ids))
    sizes = np.bincount(groups, minlength=len(ids)) if len(ids) else np.zeros(0, int)
    counts = {
        "duplicates": int(others.sum()),
        "duplicate_groups": int((sizes > 1).sum()),
        "identical": int((others & identical).sum()),
        "largest_group": int(sizes.max(initial=0)),
    }
    return Duplicates(ids[others], ids[kept[others]], best[others], identical[others]), counts


def duplicates_in_another(edges: dict[str, np.ndarray]) -> tuple[Duplicates, dict[str, Any]]:
    """Of each sample the one of the other run that shows its picture best; ties by shard and row."""
    order = np.lexsort((edges["reference"], -edges["correlation"], ~edges["identical"], edges["query"]))
    query = edges["query"][order]
    first = order[np.flatnonzero(np.diff(query, prepend=-1))]
    found = Duplicates(*(edges[name][first] for name in ("query", "reference", "correlation", "identical")))
    counts = {
        "duplicates": len(found.ids),
        "duplicate_groups": len(np.unique(found.of)),
        "identical": int(found.identical.sum()),
    }
    return found, counts
