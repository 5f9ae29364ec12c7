"""What pack leaves beside its shards, so that later commands find the names of the classes by themselves."""

import json
from collections.abc import Sequence
from typing import Any

from pipelines.corpus.text import read_names
from pipelines.runs import storage

RECORD, CLASSES = "pack.json", "classes.txt"


def record_beside(urls: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The folder and the record of a pack, if these shards all lie in one folder that pack wrote."""
    folders = {_folder(url) for url in urls}
    if len(folders) != 1:
        return None
    (folder,) = folders
    try:
        record = json.loads(storage.read_bytes(storage.join(folder, RECORD)))
    except (OSError, ValueError):
        return None
    return (folder, record) if isinstance(record, dict) and record.get("packed_by") == "hardset" else None


def names_beside(urls: Sequence[str]) -> tuple[str, ...] | None:
    """Class names of shards that pack wrote, in the order of their labels; None for other shards, or without names."""
    found = record_beside(urls)
    return read_names(storage.join(found[0], CLASSES)) if found is not None and found[1].get("classes") else None


def labelled_beside(urls: Sequence[str]) -> bool | None:
    """Whether shards that pack wrote hold labels; None for other shards."""
    found = record_beside(urls)
    return None if found is None else bool(found[1].get("labelled"))


def _folder(url: str) -> str:
    base, query = storage.split_query(url)
    return base.rpartition("/")[0] + query
