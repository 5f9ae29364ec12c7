"""What lies in folders: the files that a pattern matches, and only the folders that it asks for are looked into.

Passed over: hidden names, folders that cannot be read, and what lies in a run directory (a folder with run.json), which
a pattern would otherwise take for input once a run has written subsets. A link to a folder is followed, but each folder
is walked once, so a link to a folder above it adds nothing.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow.fs as pafs

from pipelines.runs import storage
from pipelines.runs.record import RECORD

MAGIC = re.compile(r"[*?\[]")
_TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[")
Tell = Callable[[str], object]


class Found(NamedTuple):
    """What a name stands for: kind is "file", "folder" or "missing", size in bytes, time of modification in ns (0: unknown).

    `identity` is (device, inode) of a local file: equal for two names of one file. None in a store.
    """

    url: str
    kind: str
    size: int = 0
    mtime_ns: int = 0
    identity: tuple[int, int] | None = None


def look_at(url: str) -> Found:
    """What stands at a URL; whatever the store's client raises goes through."""
    path = storage.local_path(url)
    if path is not None:
        return _local(str(path))
    filesystem, inner = storage.open_filesystem(url)
    return _remote(url, filesystem.get_file_info(inner))


def children(folder: str, tell: Tell) -> list[Found]:
    """What lies directly in a folder, sorted by name, hidden names left out; OSError where it cannot be listed."""
    return sorted(_children(folder, _anything, tell))


def match(base: str, query: str, pattern: str, tell: Tell) -> list[Found]:
    """The files below the folder `base` whose path there matches `pattern`, sorted by URL.

    Parameters
    ----------
    base : str
        Folder or URI, without a query; `query` is that of the store.
    pattern : str
        `*`, `?`, `[…]` within a name, `**` across folders.
    tell : callable
        Gets a sentence for each folder that was passed over because it cannot be read.

    Raises
    ------
    OSError
        If `base` itself cannot be listed. A store's client may raise any error of its own.
    re.error
        For a pattern that is none.
    """
    parts = pattern.split("/")
    for part in parts:
        re.compile(_regex(part))  # a mistake in it is told even where no folder gets that far
    return sorted(_descend(base, query, parts, tell, by_pattern=False))


def _descend(folder: str, query: str, parts: list[str], tell: Tell, by_pattern: bool = True) -> Iterator[Found]:
    """Matches below one folder; `by_pattern`: a wildcard led here, so a run directory is none of the input."""
    first, rest = parts[0], parts[1:]
    if by_pattern and _reached(storage.join(folder, RECORD) + query, tell, by_pattern).kind != "missing":
        return
    if "**" in first:
        yield from _walk(folder, query, re.compile(_regex("/".join(parts)), re.DOTALL).fullmatch, tell)
        return
    if not MAGIC.search(first):  # a name of its own: no need to list its folder
        found = _reached(storage.join(folder, first) + query, tell, by_pattern)
        if rest and found.kind == "folder":
            yield from _descend(storage.join(folder, first), query, rest, tell, by_pattern)
        elif not rest and found.kind == "file":
            yield found
        return
    matches = re.compile(_regex(first), re.DOTALL).fullmatch
    for child in _readable(folder, query, matches, tell, needed=not by_pattern):
        path = storage.split_query(child.url)[0]
        if rest and child.kind == "folder":
            yield from _descend(path, query, rest, tell)
        elif not rest and child.kind == "file":
            yield child


def _reached(url: str, tell: Tell, by_pattern: bool) -> Found:
    """What stands at a URL; nothing, which is told, where it cannot be looked at and only a wildcard led there."""
    try:
        return look_at(url)
    except OSError as error:
        if not by_pattern:
            raise
        tell(f"passed over {url.rpartition('/')[0]}: it cannot be looked into ({storage.first_line(error)})")
        return Found(url, "missing")


def _walk(folder: str, query: str, matches: Callable, tell: Tell) -> Iterator[Found]:
    """All files below a folder whose path there matches: in a store by one listing, locally folder by folder."""
    start = len(folder.rstrip("/")) + 1
    everything = _walk_local(folder, tell) if storage.local_path(folder) is not None else _walk_store(folder, query)
    return (found for found in everything if matches(storage.split_query(found.url)[0][start:]))


def _walk_store(folder: str, query: str) -> Iterator[Found]:
    listed = storage.list_infos(folder + query)
    runs = [storage.split_query(url)[0].removesuffix(RECORD) for url, _ in listed if url.endswith(f"/{RECORD}{query}")]
    inside = tuple(run for run in runs if run.rstrip("/") != folder.rstrip("/"))
    return (_remote(url, info) for url, info in listed if not url.startswith(inside))


def _walk_local(folder: str, tell: Tell) -> Iterator[Found]:
    seen: set[tuple[int, int]] = set()
    folders, links, needed = [folder], [], True
    while folders or links:
        # Links last: what lies in a folder and behind a link to it keeps the folder's own name.
        current = folders.pop() if folders else links.pop(0)
        within = _readable(current, "", _anything, tell, needed)
        identity = look_at(current).identity
        if identity in seen or (not needed and any(child.url == os.path.join(current, RECORD) for child in within)):
            continue
        needed = False
        seen.add(identity)
        for child in within:
            if child.kind == "file":
                yield child
            elif child.kind == "folder":
                (links if os.path.islink(child.url) else folders).append(child.url)


def _anything(name: str) -> bool:
    return True


def _readable(folder: str, query: str, wanted: Callable, tell: Tell, needed: bool) -> list[Found]:
    """A folder's children, or none, which is told, where it cannot be read and only a wildcard led there."""
    try:
        return _children(folder + query, wanted, tell)
    except OSError as error:
        if needed:
            raise
        tell(f"passed over {folder}: it cannot be listed ({storage.first_line(error)})")
        return []


def _children(folder: str, wanted: Callable, tell: Tell) -> list[Found]:
    """The children whose names are wanted, not hidden; a name behind which nothing can be looked at is told."""
    path = storage.local_path(folder)
    if path is None:
        filesystem, root = storage.open_filesystem(folder)
        infos = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        shown = [info for info in infos if info.base_name and not info.base_name.startswith(".")]
        return [_remote(storage.join(folder, i.base_name), i) for i in shown if wanted(i.base_name)]
    try:
        names = [name for name in os.listdir(path) if not name.startswith(".") and wanted(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        try:
            found.append(_local(os.path.join(path, name)))
        except OSError as error:
            tell(f"passed over {os.path.join(path, name)}: {storage.first_line(error)}")
    return found


def _local(path: str) -> Found:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Found(path, "missing")
    except OSError:
        if os.path.islink(path):  # a link to itself, or to where nobody may look
            return Found(path, "missing")
        raise
    kind = "folder" if stat.S_ISDIR(found.st_mode) else "file"
    return Found(path, kind, found.st_size, found.st_mtime_ns, _known(path, found))


def _known(path: str, found: os.stat_result) -> tuple[int, int]:
    # Some network and user-space filesystems give each file the number 0.
    return (found.st_dev, found.st_ino or hash(os.path.realpath(path)))


def _remote(url: str, info: pafs.FileInfo) -> Found:
    kind = {pafs.FileType.NotFound: "missing", pafs.FileType.Directory: "folder"}.get(info.type, "file")
    return Found(url, kind, info.size or 0, info.mtime_ns or 0)


def _regex(pattern: str) -> str:
    parts = []
    for token in _TOKENS.findall(pattern):
        if token.startswith("**"):
            parts.append("(?:.*/)?" if token.endswith("/") else ".*")
        elif token in "*?":
            parts.append("[^/]*" if token == "*" else "[^/]")
        elif token.startswith("[") and len(token) > 2:
            inside = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            parts.append(f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)
