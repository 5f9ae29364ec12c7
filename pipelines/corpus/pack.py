"""Pack: a folder of images, or Parquet with image bytes -> webdataset shards with the original bytes.

    OUT/shard-{000000..}.tar    samples KEY.SUFFIX and, where there is a label, KEY.cls
    OUT/classes.txt             names of the classes, one a line in the order of the labels
    OUT/pack.json               what was packed, written first; `complete` says whether all of it is there

One task per shard; those that are there are skipped. The same source gives the same bytes.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from pipelines.corpus.listing import Tell
from pipelines.corpus.packed import CLASSES, RECORD
from pipelines.corpus.packsources import Item, PackSource, open_source, read_items
from pipelines.corpus.tarwriter import TarWriter
from pipelines.runs import storage
from pipelines.runs.errors import StageFailed, UserError
from pipelines.runs.progress import Progress
from pipelines.runs.record import fingerprint
from pipelines.runs.tasks import in_order

NAME = "shard-{:06d}.tar"


def pack(
    source: str, out: str, samples_per_shard: int = 1000, labels: str | None = None, tell: Tell = print
) -> dict[str, Any]:
    """Write the shards of a source that are not there yet.

    Parameters
    ----------
    source : str
        What `pipelines.corpus.packsources.open_source` takes; so is `labels`.
    out : str
        Folder or URI of the shards.
    samples_per_shard : int
    tell : callable
        Gets sentences for a person.

    Returns
    -------
    counts : dict
        samples, labelled, classes (names), shards, shards_done, shards_skipped, ignored (files that are no images),
        without_bytes (rows of Parquet), bytes, seconds, out.

    Raises
    ------
    UserError
        For a source that holds nothing, or an `out` that holds another pack.
    StageFailed
        If a file cannot be read; finished shards are kept.
    """
    started = time.monotonic()
    found = open_source(source, labels, tell)
    storage.check_writable(out)
    made_of = fingerprint("pack", found.fingerprint, samples_per_shard)
    _begin(out, source, found, made_of, samples_per_shard)
    starts = range(0, len(found.items), samples_per_shard)
    items = [
        (storage.join(out, NAME.format(number)), found.items[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]
    there = set(storage.list_files(out, ".tar", recursive=False))
    pending = [item for item in items if item[0] not in there]
    progress = Progress("pack", len(pending), skipped=len(items) - len(pending))
    empty = 0
    for (_, chosen), without in zip(pending, in_order(write_shard, pending, found.columns)):
        empty += without
        progress.shard(len(chosen))
    record = _record(source, found, made_of, samples_per_shard) | {"complete": True}
    storage.write_text_atomic(storage.join(out, RECORD), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return {
        "samples": len(found.items),
        "labelled": sum(item.label is not None for item in found.items),
        "classes": list(found.classes),
        "shards": len(items),
        "shards_done": len(pending),
        "shards_skipped": len(items) - len(pending),
        "ignored": found.ignored,
        "without_bytes": empty,
        "bytes": sum(info.size for _, info in storage.list_infos(out, recursive=False)),
        "seconds": time.monotonic() - started,
        "out": storage.absolute(out),
    }


def write_shard(url: str, items: Sequence[Item], columns: Sequence[str]) -> int:
    """Ray task: one shard, whole or not at all; how many of its samples have no image bytes."""
    without = 0
    try:
        with storage.write_atomic(url) as stream:
            writer = TarWriter(stream)
            for item, data in read_items(items, columns):
                if data is None:
                    without += 1
                else:
                    writer.add(f"{item.key}.{item.suffix}", len(data), [data])
                if item.label is not None or data is None:
                    label = b"" if item.label is None else b"%d" % item.label
                    writer.add(f"{item.key}.cls", len(label), [label])
            writer.close()
    except FileNotFoundError as error:
        raise StageFailed(
            f"pack: {storage.first_line(error)}; the source has changed, finished shards are kept"
        ) from error
    return without


def _begin(out: str, source: str, found: PackSource, made_of: str, samples_per_shard: int) -> None:
    """Note what is being packed, before the first shard; UserError where something else is there."""
    record_url = storage.join(out, RECORD)
    try:
        before = json.loads(storage.read_bytes(record_url))
    except FileNotFoundError:
        before = None
    except ValueError:
        before = {}
    if before is None and storage.list_files(out, ".tar", recursive=False):
        raise UserError(f"{out}: it holds shards that pack did not write; take an empty folder", "out")
    if before is not None and before.get("made_of") != made_of:
        raise UserError(
            f"{out}: it holds a pack of something else (of {before.get('source', 'an unknown source')}, which may have changed, "
            f"or with another number of samples per shard); take another folder, or remove it",
            "out",
        )
    if before is None:
        if found.classes:
            names = "".join(f"{name}\n" for name in found.classes)
            storage.write_text_atomic(storage.join(out, CLASSES), names)
        record = _record(source, found, made_of, samples_per_shard) | {"complete": False}
        storage.write_text_atomic(record_url, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _record(source: str, found: PackSource, made_of: str, samples_per_shard: int) -> dict[str, Any]:
    return {
        "packed_by": "hardset",
        "source": storage.absolute(source),
        "kind": found.kind,
        "samples": len(found.items),
        "samples_per_shard": samples_per_shard,
        "classes": len(found.classes),
        "labelled": found.labelled,
        "made_of": made_of,
    }
