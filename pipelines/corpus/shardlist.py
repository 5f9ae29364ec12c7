"""Which shards: what a person types, as webdataset people type it, to a checked list of URLs with sizes."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow.fs as pafs
from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.runs import storage

MAX_SHARDS = 1_000_000
STAT_THREADS = 32  # each look-up is a round trip on an object store
LISTED_FROM = 1000  # shards of one folder: from here a listing of it, a thousand names a request, is quicker

_MAGIC = re.compile(r"[*?\[]")
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_GLOB_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|[^*?\[]+|\[")


class _Found(NamedTuple):
    url: str
    info: pafs.FileInfo


def evenly(total: int, count: int) -> list[int]:
    """At most `count` positions in [0, total), evenly spread, ascending: which shards stand for all."""
    count = min(total, count)
    return [int((2 * place + 1) * total / (2 * count)) for place in range(count)]


def find_shards(spec: str) -> list[_Found]:
    """The files that a shard list names, in order; ValueErrors as in `pipelines.corpus.shards.expand_shards`."""
    found = [file for source in _sources(spec) for file in _expand(source)]
    twice = [url for url, count in Counter(file.url for file in found).items() if count > 1]
    if twice:
        raise ValueError(f"--shards {spec}: {len(twice)} shards are named twice, the first is {twice[0]}")
    if len(found) > MAX_SHARDS:
        raise ValueError(f"--shards {spec}: {len(found)} shards, at most {MAX_SHARDS}")
    return found


def _sources(spec: str) -> list[str]:
    sources = [source.strip() for source in spec.split("::")]
    if not all(sources):
        raise ValueError(f"--shards {spec!r}: an empty shard source; name a folder, a pattern, or a list file")
    for source in sources:
        if source.lower().startswith("pipe:"):
            raise ValueError(
                f"--shards {source}: shard commands (pipe:) are never run; use s3://, gs:// or a local copy"
            )
    return sources


def _expand(source: str, nested: bool = False) -> list[_Found]:
    """One source: braces, a glob, a folder, a list file, or a shard."""
    names = _braces(source)
    globs = {name for name in names if _is_glob(name)}
    plain = {name: storage.absolute(name) for name in names if name not in globs}
    urls = list(plain.values())
    infos = dict(zip(urls, look_up(urls, source)))
    _check_there(source, infos)
    if len(names) == 1 and not nested and urls and _is_list(urls[0], infos[urls[0]]):
        return _from_list(urls[0])
    groups = [_glob(name) if name in globs else _files(infos[plain[name]], plain[name]) for name in names]
    return [_checked(file) for group in groups for file in group]


def _braces(source: str) -> list[str]:
    if "{" not in source and "}" not in source:
        return [source]
    if any(abs(int(high) - int(low)) >= MAX_SHARDS for low, high in _RANGE.findall(source)):
        raise ValueError(f"--shards {source}: braces for more than {MAX_SHARDS} shards")
    try:
        names = list(itertools.islice(braceexpand(source), MAX_SHARDS + 1))
    except UnbalancedBracesError:
        raise ValueError(f"--shards {source}: unbalanced braces in the shard pattern; put it in quotes?") from None
    if len(names) > MAX_SHARDS:
        raise ValueError(f"--shards {source}: braces for more than {MAX_SHARDS} shards; join sources with :: instead")
    return names


def _is_glob(name: str) -> bool:
    if not _MAGIC.search(storage.split_query(name)[0]) or storage.scheme_of(name) in ("http", "https"):
        return False
    local = storage.local_path(name)
    return local is None or not local.exists()


def look_up(urls: list[str], source: str) -> list[pafs.FileInfo]:
    """What the store says of each URL, side by side or by listings; ValueError, which names `source`, where it cannot."""

    def info(url: str) -> pafs.FileInfo:
        filesystem, path = storage.open_filesystem(url)
        return filesystem.get_file_info(path)

    try:
        if len(urls) < STAT_THREADS:
            return [info(url) for url in urls]
        found = _listed_together(urls)
        single = [url for url in urls if url not in found]
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            found.update(zip(single, pool.map(info, single)))
        return [found[url] for url in urls]
    except (OSError, ValueError) as error:
        raise ValueError(f"--shards {source}: the shards can't be looked up ({storage.first_line(error)})") from error


def _listed_together(urls: list[str]) -> dict[str, pafs.FileInfo]:
    """What listings of the folders that hold many of these URLs say; a URL that they do not name is missing here."""
    folders = Counter(_folder_of(url) for url in urls if storage.scheme_of(url) in ("file", "s3", "gs", "gcs"))
    wanted = set(urls) if max(folders.values(), default=0) >= LISTED_FROM else set()
    return {
        url: info
        for folder, count in folders.items()
        if count >= LISTED_FROM
        for url, info in storage.list_infos(folder, recursive=False)
        if url in wanted
    }


def _folder_of(url: str) -> str:
    base, query = storage.split_query(url)
    return (base.rpartition("/")[0] or "/") + query


def _check_there(source: str, infos: dict[str, pafs.FileInfo]) -> None:
    missing = [url for url, info in infos.items() if info.type == pafs.FileType.NotFound]
    if missing:
        raise ValueError(
            f"--shards {source}: {len(missing)} of {len(infos)} shards do not exist, the first is {missing[0]}; "
            "name a folder, a quoted brace or glob pattern, or a list file"
        )


def _files(info: pafs.FileInfo, url: str) -> list[_Found]:
    if info.type != pafs.FileType.Directory:
        return [_Found(url, info)]
    found = [_Found(name, i) for name, i in _listed(url, recursive=False) if i.path.endswith(".tar")]
    if not found:
        raise ValueError(f"--shards {url}: no shard there, the folder holds no *.tar")
    return found


def _glob(pattern: str) -> list[_Found]:
    """Files that match, sorted: `*`, `?`, `[…]` within a name, `**` across folders; hidden names never."""
    base, query = storage.split_query(storage.absolute(pattern))
    folder = base[: base.rindex("/", 0, _MAGIC.search(base).start())] or "/"
    start = len(folder.rstrip("/")) + 1
    try:
        matches = re.compile(_regex(base[start:]), re.DOTALL).fullmatch
    except re.error as error:
        raise ValueError(f"--shards {pattern}: not a pattern ({error})") from None
    listed = _listed(folder + query, recursive="/" in base[start:] or "**" in base)
    found = [_Found(url, info) for url, info in listed if matches(storage.split_query(url)[0][start:])]
    if not found:
        raise ValueError(f"--shards {pattern}: no shard matches; quote a pattern, or name a folder or a list file")
    return found


def _regex(pattern: str) -> str:
    parts = []
    for token in _GLOB_PARTS.findall(pattern):
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


def _listed(folder: str, recursive: bool) -> list[tuple[str, pafs.FileInfo]]:
    try:
        return storage.list_infos(folder, recursive=recursive)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--shards {folder}: the shards there can't be listed ({storage.first_line(error)})"
        ) from error


def _is_list(url: str, info: pafs.FileInfo) -> bool:
    """Whether a file is a text file of URLs: not called .tar, and text from its beginning."""
    if info.type != pafs.FileType.File or info.path.endswith((".tar", *_COMPRESSED)):
        return False
    filesystem, path = storage.open_filesystem(url)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(4096)
    return b"\0" not in head


def _from_list(url: str) -> list[_Found]:
    try:
        lines = [line.strip() for line in storage.read_bytes(url).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--shards {url}: neither a .tar shard nor a text file of shard URLs") from None
    sources = [line for line in lines if line and not line.startswith("#")]
    if not sources:
        raise ValueError(f"--shards {url}: the file lists no shard; one URL a line is expected")
    try:
        return _expand_lines([part for line in sources for part in _sources(line)])
    except ValueError as error:
        hint = "" if all(_is_absolute(line) for line in sources) else " (relative lines start at the working folder)"
        raise ValueError(f"{error}; listed in {url}{hint}") from error


def _expand_lines(sources: list[str]) -> list[_Found]:
    # All plain lines are looked up side by side; the few that are patterns go one by one.
    plain = [source for source in sources if not _MAGIC.search(source) and "{" not in source and "}" not in source]
    url_of = {source: storage.absolute(source) for source in plain}
    urls = list(url_of.values())
    infos = dict(zip(urls, look_up(urls, "list file")))
    _check_there(f"{len(sources)} lines", infos)
    patterns = set(sources) - set(plain)
    groups: Iterable[list[_Found]] = (
        _expand(source, nested=True) if source in patterns else _files(infos[url_of[source]], url_of[source])
        for source in sources
    )
    return [_checked(file) for group in groups for file in group]


def _is_absolute(line: str) -> bool:
    return line.startswith(("/", "~", "file:")) or storage.scheme_of(line) != "file"


def _checked(file: _Found) -> _Found:
    if file.info.path.endswith(_COMPRESSED):
        raise ValueError(f"--shards {file.url}: a compressed shard; shards are plain .tar (images don't shrink anyway)")
    return file
