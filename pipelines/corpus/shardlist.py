"""Which shards: what a person types, as webdataset people type it, to a checked list of URLs with sizes."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from braceexpand import UnbalancedBracesError, braceexpand

from pipelines.corpus import listing, text
from pipelines.corpus.listing import MAGIC, Found, Tell
from pipelines.corpus.samples import IMAGE_SUFFIXES
from pipelines.runs import storage
from pipelines.runs.errors import UserError

MAX_SHARDS = 1_000_000
STAT_THREADS = 32  # each look-up is a round trip on an object store
LISTED_FROM = 1000  # shards of one folder: from here a listing of it, a thousand names a request, is quicker
TARS = (".tar", ".tar.gz", ".tgz")

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_COMPRESSED = (".tar.bz2", ".tar.xz", ".tar.zst", ".tbz2", ".txz")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def evenly(total: int, count: int) -> list[int]:
    """At most `count` positions in [0, total), evenly spread, ascending: which shards stand for all."""
    count = min(total, count)
    return [int((2 * place + 1) * total / (2 * count)) for place in range(count)]


def find_shards(spec: str, run: str | None = None, tell: Tell = lambda text: None) -> list[Found]:
    """The files that a shard list names, in order; UserErrors as in `pipelines.corpus.shards.expand_shards`."""
    found = [file for source in _sources(spec) for file in _expand(source, tell)]
    twice = [url for url, count in Counter(file.url for file in found).items() if count > 1]
    if twice:
        raise _error(spec, f"{len(twice)} shards are named twice, the first is {twice[0]}")
    if len(found) > MAX_SHARDS:
        raise _error(spec, f"{len(found)} shards, at most {MAX_SHARDS}")
    if run is not None:
        _refuse_inside(spec, found, run)
    return _one_name_each(found, tell)


def _error(source: str, message: str) -> UserError:
    return UserError(f"{source}: {message}", "shards")


def _one_name_each(found: list[Found], tell: Tell) -> list[Found]:
    """Without the second and later names of a local file: a sample counts once, whatever links lead to it."""
    first: dict[object, str] = {}
    kept = [file for file in found if first.setdefault(file.identity or file.url, file.url) == file.url]
    if len(kept) < len(found):
        other = next(file for file in found if first[file.identity or file.url] != file.url)
        tell(
            f"shards: {len(found) - len(kept)} names lead to a shard that is listed already and are left out; "
            f"the first, {other.url}, is {first[other.identity]}"
        )
    return kept


def _refuse_inside(spec: str, found: list[Found], run: str) -> None:
    """UserError where a shard lies in the run directory: what a run wrote is not its input."""
    root = storage.absolute(run)
    roots = {root, os.path.realpath(root)} if storage.scheme_of(root) == "file" else {storage.split_query(root)[0]}
    real: dict[str, str] = {}
    for file in found:
        folder = file.url.rpartition("/")[0]
        if file.identity is not None:
            folder = real.get(folder) or real.setdefault(folder, os.path.realpath(folder))
        if any(f"{folder}/".startswith(f"{inside}/") for inside in roots):
            raise _error(spec, f"shard {file.url} lies in the run directory {run}: what a run wrote is never its input")


def _sources(spec: str) -> list[str]:
    sources = [source.strip() for source in spec.split("::")]
    if not all(sources):
        raise _error(repr(spec), "an empty shard source; name a folder, a pattern, or a list file")
    for source in sources:
        if source.lower().startswith("pipe:"):
            raise _error(source, "shard commands (pipe:) are never run; use s3://, gs:// or a local copy")
    return sources


def _expand(source: str, tell: Tell, nested: bool = False) -> list[Found]:
    """One source: braces, a glob, a folder, a list file, or a shard."""
    names = _braces(source)
    globs = {name for name in names if _is_glob(name)}
    plain = {name: storage.absolute(name) for name in names if name not in globs}
    urls = list(plain.values())
    infos = dict(zip(urls, look_up(urls, source)))
    _check_there(source, infos)
    if len(names) == 1 and not nested and urls and _is_list(infos[urls[0]]):
        return _from_list(urls[0], tell)
    groups = [_glob(name, tell) if name in globs else _files(infos[plain[name]], tell) for name in names]
    return [_checked(file) for group in groups for file in group]


def _braces(source: str) -> list[str]:
    if "{" not in source and "}" not in source:
        return [source]
    if any(abs(int(high) - int(low)) >= MAX_SHARDS for low, high in _RANGE.findall(source)):
        raise _error(source, f"braces for more than {MAX_SHARDS} shards")
    try:
        names = list(itertools.islice(braceexpand(source), MAX_SHARDS + 1))
    except UnbalancedBracesError:
        raise _error(source, "unbalanced braces in the shard pattern; put it in quotes?") from None
    if len(names) > MAX_SHARDS:
        raise _error(source, f"braces for more than {MAX_SHARDS} shards; join sources with :: instead")
    return names


def _is_glob(name: str) -> bool:
    if not MAGIC.search(storage.split_query(name)[0]) or storage.scheme_of(name) in ("http", "https"):
        return False
    local = storage.local_path(name)
    return local is None or not os.path.lexists(local)


def look_up(urls: list[str], source: str) -> list[Found]:
    """What stands at each URL, looked up side by side or by listings; UserError, which names `source`, where it cannot."""
    try:
        if len(urls) < STAT_THREADS:
            return [listing.look_at(url) for url in urls]
        found = _listed_together(urls)
        single = [url for url in urls if url not in found]
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            step = 1 + len(single) // (4 * STAT_THREADS)  # a chunk at a time: a future costs more than a local look
            chunks = [single[start : start + step] for start in range(0, len(single), step)]
            looked = pool.map(lambda chunk: [listing.look_at(url) for url in chunk], chunks)
            found.update(zip(single, itertools.chain.from_iterable(looked)))
        return [found[url] for url in urls]
    except Exception as error:  # clients of object stores raise types of their own
        raise _error(source, f"the shards can't be looked up ({_told(error)})") from error


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return kind + storage.first_line(error)


def _listed_together(urls: list[str]) -> dict[str, Found]:
    """What listings of the folders in a store that hold many of these URLs say; a URL that they do not name is missing."""
    folders = Counter(_folder_of(url) for url in urls if storage.scheme_of(url) in ("s3", "gs", "gcs"))
    wanted = set(urls) if max(folders.values(), default=0) >= LISTED_FROM else set()
    return {
        file.url: file
        for folder, count in folders.items()
        if count >= LISTED_FROM
        for file in listing.children(folder, lambda text: None)
        if file.url in wanted
    }


def _folder_of(url: str) -> str:
    base, query = storage.split_query(url)
    return (base.rpartition("/")[0] or "/") + query


def _check_there(source: str, infos: dict[str, Found]) -> None:
    missing = [url for url, info in infos.items() if info.kind == "missing"]
    if missing:
        raise _error(
            source,
            f"{len(missing)} of {len(infos)} shards do not exist, the first is {missing[0]}; "
            "name a folder, a quoted brace or glob pattern, or a list file",
        )


def _files(info: Found, tell: Tell) -> list[Found]:
    if info.kind != "folder":
        return [info]
    try:
        within = listing.children(info.url, tell)
    except Exception as error:
        raise _error(info.url, f"the shards there can't be listed ({_told(error)})") from error
    found = [file for file in within if file.kind == "file" and storage.split_query(file.url)[0].endswith(TARS)]
    if not found:
        raise _error(info.url, f"no shard there, the folder holds no *.tar{_packable(info.url, within)}")
    return found


def _packable(folder: str, within: list[Found]) -> str:
    """What to do where a folder holds pictures, or folders of them, or Parquet: the command that makes shards of it."""
    names = [file.url for file in within if file.kind == "file"]
    for child in (child for child in within if child.kind == "folder"):
        try:
            names += [file.url for file in listing.children(child.url, lambda text: None) if file.kind == "file"]
        except OSError:
            continue
        if len(names) > 1000:
            break
    suffixes = {storage.split_query(name)[0].rpartition(".")[2].lower() for name in names}
    if not suffixes & (IMAGE_SUFFIXES | {"parquet"}):
        return ""
    what = "images" if suffixes & IMAGE_SUFFIXES else "Parquet"
    return f" but {what}; make shards of it first: hardset pack {folder} --out {folder}-shards"


def _glob(pattern: str, tell: Tell) -> list[Found]:
    """Files that match, sorted: `*`, `?`, `[…]` within a name, `**` across folders; hidden names never."""
    base, query = storage.split_query(storage.absolute(pattern))
    folder = base[: base.rindex("/", 0, MAGIC.search(base).start())] or "/"
    try:
        found = listing.match(folder, query, base[len(folder.rstrip("/")) + 1 :], tell)
    except re.error as error:
        raise _error(pattern, f"not a pattern ({error})") from None
    except Exception as error:
        raise _error(pattern, f"the shards in {folder} can't be listed ({_told(error)})") from error
    if not found:
        raise _error(pattern, "no shard matches; quote a pattern, or name a folder or a list file")
    return found


def _is_list(info: Found) -> bool:
    """Whether a file is a text file of URLs: not called .tar, and text from its beginning."""
    name = storage.split_query(info.url)[0]
    if info.kind != "file" or name.endswith((*TARS, *_COMPRESSED)):
        return False
    filesystem, path = storage.open_filesystem(info.url)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(4096)
    return b"\0" not in head or head.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, as Windows' shells write


def _from_list(url: str, tell: Tell) -> list[Found]:
    try:
        lines = text.lines(text.decode(storage.read_bytes(url)))
    except ValueError:
        raise _error(url, "neither a .tar shard nor a text file of shard URLs") from None
    sources = [line for line in lines if line and not line.startswith("#")]
    if not sources:
        raise _error(url, "the file lists no shard; one URL a line is expected")
    try:
        return _expand_lines([part for line in sources for part in _sources(line)], tell)
    except UserError as error:
        hint = "" if all(_is_absolute(line) for line in sources) else " (relative lines start at the working folder)"
        raise UserError(f"{error.message}; listed in {url}{hint}", "shards") from error


def _expand_lines(sources: list[str], tell: Tell) -> list[Found]:
    # All plain lines are looked up side by side; the few that are patterns go one by one.
    plain = [source for source in sources if not MAGIC.search(source) and "{" not in source and "}" not in source]
    url_of = {source: storage.absolute(source) for source in plain}
    urls = list(url_of.values())
    infos = dict(zip(urls, look_up(urls, "list file")))
    _check_there(f"{len(sources)} lines", infos)
    patterns = set(sources) - set(plain)
    groups: Iterable[list[Found]] = (
        _expand(source, tell, nested=True) if source in patterns else _files(infos[url_of[source]], tell)
        for source in sources
    )
    return [_checked(file) for group in groups for file in group]


def _is_absolute(line: str) -> bool:
    return line.startswith(("/", "~", "file:")) or storage.scheme_of(line) != "file"


def _checked(file: Found) -> Found:
    if storage.split_query(file.url)[0].endswith(_COMPRESSED):
        raise _error(file.url, "a compressed shard; shards are plain .tar, or .tar.gz (images don't shrink anyway)")
    if _SURROGATE.search(file.url):
        raise _error(ascii(file.url), "the shard's name is not UTF-8; rename it")
    return file
