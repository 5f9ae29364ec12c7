"""Duplicates and leaks for the report: groups as rows of pictures, and pairs of a picture here and the one in another run."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipelines.corpus.shardlist import evenly
from pipelines.report.pictures import Place, pictures
from pipelines.report.scan import Limits
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run

NEIGHBORS, AGAINST = "neighbors", "neighbors/against"
GROUPS, MEMBERS, PAIRS = 24, 12, 60  # shown at most
THUMBNAIL = 96  # pixels
SIZES = ((2, 2), (3, 3), (4, 5), (6, 10), (11, 100), (101, None))
CHARS = 2_000_000  # of pictures, as base64


def collect(run: Run, limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """What the sections Duplicates and Leaks show, each None where there is nothing to show; and notes.

    Only finished groups of columns count, made from the embeddings that are there now.
    """
    embedded = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards))
    notes: list[str] = []
    found: dict[str, Any] = {"duplicates": None, "leaks": []}
    if _fresh(run, NEIGHBORS, embedded):
        found["duplicates"] = _duplicates(run, limits, notes)
    for name in storage.list_folders(run.path(*AGAINST.split("/"))):
        group = f"{AGAINST}/{name}"
        if _fresh(run, group, embedded):
            found["leaks"].append(_leaks(run, name, group, limits, notes))
    return found, notes


def _fresh(run: Run, group: str, embedded: Sequence[dict[str, Any] | None]) -> bool:
    there = column_groups.all_facts(run.uri, group, len(embedded))
    return all(e and f and f["embeddings"] == e["source"] for e, f in zip(embedded, there))


def _pairs(run: Run, group: str) -> Iterator[tuple[Place, Place, float, str]]:
    """(sample, what it is a duplicate of, how well they fit, kind) of every duplicate."""
    names = ["shard", "row", "duplicate_of_shard", "duplicate_of_row", "duplicate_similarity", "duplicate_kind"]
    for shard in range(len(run.shards)):
        table = column_groups.read(run.uri, group, shard, names)
        for *places, fit, kind in zip(
            *(table.filter(table["duplicate_of_row"].is_valid())[n].to_pylist() for n in names)
        ):
            yield (places[0], places[1]), (places[2], places[3]), fit, kind


def _duplicates(run: Run, limits: Limits, notes: list[str]) -> dict[str, Any]:
    groups: dict[Place, list[tuple[Place, float, str]]] = defaultdict(list)
    for sample, kept, fit, kind in _pairs(run, NEIGHBORS):
        groups[kept].append((sample, fit, kind))
    order = sorted(groups, key=lambda kept: (-len(groups[kept]), kept))
    # The largest, and as many evenly spaced over the others: the largest are often all of one kind.
    rest = order[GROUPS // 2 :]
    shown = order[: GROUPS // 2] + [rest[i] for i in evenly(len(rest), GROUPS // 2)]
    members = {kept: [kept, *(sample for sample, _, _ in groups[kept][: MEMBERS - 1])] for kept in shown}
    thumbnails = _thumbnails(run, [place for places in members.values() for place in places], limits, notes)
    sizes = np.array([len(found) + 1 for found in groups.values()], int)
    about = {sample: (fit, kind) for found in groups.values() for sample, fit, kind in found}
    return {
        "rows": sum(facts["rows"] for facts in run.embedding_facts()),
        "duplicates": int((sizes - 1).sum()),
        "groups": len(groups),
        "identical": sum(kind == "identical" for _, kind in about.values()),
        "sizes": [(_range(low, high), int(_inside(sizes, low, high).sum())) for low, high in SIZES],
        "shown": [
            {
                "size": len(groups[kept]) + 1,
                "pictures": [_picture(place, thumbnails, *about.get(place, (None, None))) for place in places],
            }
            for kept, places in members.items()
        ],
    }


def _inside(sizes: np.ndarray, low: int, high: int | None) -> np.ndarray:
    return (sizes >= low) & (sizes <= (high or sizes.max(initial=0)))


def _range(low: int, high: int | None) -> str:
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


def _picture(place: Place, thumbnails: dict[Place, str], fit: float | None, kind: str | None) -> dict[str, Any]:
    return {"shard": place[0], "row": place[1], "image": thumbnails.get(place), "fit": fit, "kind": kind}


def _leaks(run: Run, name: str, group: str, limits: Limits, notes: list[str]) -> dict[str, Any]:
    found = sorted(_pairs(run, group), key=lambda pair: (-pair[2], pair[0]))
    chosen = [found[i] for i in evenly(len(found), PAIRS)]
    other = run.stage(group)["against"]
    ours = _thumbnails(run, [sample for sample, *_ in chosen], limits, notes)
    try:
        theirs = _thumbnails(Run.open(other), [place for _, place, *_ in chosen], limits, notes)
    except UserError:
        theirs = {}
        notes.append(f"{other} is not there any more: its pictures are left out")
    return {
        "name": name,
        "other": other,
        "rows": sum(facts["rows"] for facts in run.embedding_facts()),
        "count": len(found),
        "identical": sum(kind == "identical" for *_, kind in found),
        "pairs": [
            {"here": _picture(sample, ours, fit, kind), "there": _picture(place, theirs, fit, kind)}
            for sample, place, fit, kind in chosen
        ],
    }


def _thumbnails(run: Run, places: Sequence[Place], limits: Limits, notes: list[str]) -> dict[Place, str]:
    own = Limits(pictures=len(places), picture_chars=CHARS, read_bytes=limits.read_bytes)
    shown, problems = pictures(run, places, own, THUMBNAIL)
    notes += problems
    return shown
