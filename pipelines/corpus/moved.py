"""Shards that lie elsewhere now: taken up where they are, so that nothing is embedded again.

A shard is what its bytes are. Where a person says what moved (FROM=TO), sizes are compared, and the digest of both ends
where one was noted; else a shard that is no longer listed is looked for among the new ones by size and that digest.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.corpus.shardlist import STAT_THREADS
from pipelines.corpus.shards import shard_digest
from pipelines.corpus.tarstream import END_BYTES
from pipelines.runs import column_groups, columns, storage
from pipelines.runs.errors import UserError
from pipelines.runs.record import Run, Shard


def parse_moves(moves: Sequence[str]) -> list[tuple[str, str]]:
    """`FROM=TO` as pairs of absolute beginnings of URLs; UserError for what is none."""
    pairs = []
    for move in moves:
        old, equals, new = move.partition("=")
        if not (old.strip() and equals and new.strip()):
            raise UserError(f"{move}: expected FROM=TO, two folders or beginnings of URLs", "moved")
        pairs.append((storage.absolute(old.strip()), storage.absolute(new.strip())))
    return pairs


def moved_url(url: str, moves: Sequence[tuple[str, str]]) -> str:
    """Where a shard lies by the first move whose FROM is a folder above it, or its whole URL; else where it lay."""
    for old, new in moves:
        if url == old or url.startswith(old.rstrip("/") + "/"):
            return new + url[len(old) :]
    return url


def take_up(run: Run, listed: Sequence[Shard], moves: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """For the run's shards that are not listed any more: the listed shard that each is now, by URL.

    Raises
    ------
    UserError
        A move leads to a shard that is not the one that was embedded.
    """
    there = {shard.url: shard for shard in listed}
    missing = [position for position, shard in enumerate(run.shards) if shard.url not in there]
    known = {shard.url for shard in run.shards}
    new = [shard for shard in listed if shard.url not in known]
    if not missing or not new:
        return {}
    facts = column_groups.all_facts(run.uri, columns.EMBEDDINGS, len(run.shards))
    found: dict[str, str] = {}
    for position in missing:
        old = run.shards[position]
        target = there.get(moved_url(old.url, moves))
        if target is not None:
            _check_same(old, target, facts[position])
            found[old.url] = target.url
    taken = set(found.values())
    rest = [position for position in missing if run.shards[position].url not in found]
    return found | _by_bytes(run, rest, facts, [shard for shard in new if shard.url not in taken])


def ends_digest(url: str) -> str:
    """sha256 (hexadecimal) of a file's first and last 64 KiB, which overlap in a small one."""
    filesystem, path = storage.open_filesystem(url)
    with filesystem.open_input_file(path) as file:
        size = file.size()
        return hashlib.sha256(
            file.read_at(min(size, END_BYTES), 0) + file.read_at(min(size, END_BYTES), max(0, size - END_BYTES))
        ).hexdigest()


def _check_same(old: Shard, now: Shard, facts: dict[str, Any] | None) -> None:
    if facts is None:
        return
    if now.size != facts["size"]:
        raise UserError(f"shard {now.url} has {now.size} bytes, {old.url} had {facts['size']}: not the same", "moved")
    if "ends" in facts and ends_digest(now.url) != facts["ends"]:
        raise UserError(f"shard {now.url} does not hold what {old.url} held when it was embedded", "moved")


def _by_bytes(run: Run, missing: Sequence[int], facts: Sequence[dict | None], new: Sequence[Shard]) -> dict[str, str]:
    """Matches by size and digest; of shards that are not embedded yet by size and file name."""
    sizes = {(facts[position] or {}).get("size", run.shards[position].size) for position in missing}
    candidates = [shard for shard in new if shard.size in sizes]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        ends = dict(zip([s.url for s in candidates], pool.map(lambda s: ends_digest(s.url), candidates)))
    by_ends: dict[tuple, list[Shard]] = defaultdict(list)
    by_name: dict[tuple, list[Shard]] = defaultdict(list)
    for shard in candidates:
        by_ends[shard.size, ends[shard.url]].append(shard)
        by_name[shard.size, _name(shard)].append(shard)
    found: dict[str, str] = {}
    for position in missing:
        old, noted = run.shards[position], facts[position]
        if noted is None:
            matches = by_name[old.size, _name(old)]
        elif "ends" in noted:
            matches = by_ends[noted["size"], noted["ends"]]
        else:  # embedded before both ends were noted
            matches = [s for s in by_name[noted["size"], _name(old)] if shard_digest(s.url) == noted["digest"]]
        free = [shard for shard in matches if shard.url not in found.values()]
        # Of equal ones the one of the same name: which of them it is decides nothing but the name that is shown.
        best = next((shard for shard in free if _name(shard) == _name(old)), free[0] if free else None)
        if best is not None:
            found[old.url] = best.url
    return found


def _name(shard: Shard) -> str:
    return storage.split_query(shard.url)[0].rpartition("/")[2]
