"""Local files: temporary names, what is swept of them, and links that are not followed."""

import functools
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

from pipelines.runs.retries import StorageError

ABANDONED_S = 86_400.0  # a temporary file of another machine that nobody wrote to for a day
RUN_RECORD = "run.json"  # what makes a folder a run

_TEMPORARY = re.compile(r"\..+\.tmp-(?:([0-9a-f]{8})-)?(\d+)-[0-9a-f]{8}")


def temporary_beside(path: Path) -> Path:
    """A hidden name beside `path` for what becomes it: `.NAME.tmp-HOST-PID-RANDOM`."""
    return path.with_name(f".{path.name[:100]}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def _host() -> str:
    """Where a process's number means the same: this boot of this machine, and this container."""
    parts = [socket.gethostname()]
    for source in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(source())
        except OSError:  # not Linux
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def refuse_links(path: Path) -> None:
    """StorageError if a folder on the way to `path` is a link inside a run directory, which may be a stranger's.

    Links above the run are the user's own. The last name may be a link: it is replaced or unlinked, never followed.
    """
    for folder in path.parents:
        if folder.is_symlink() and any((above / RUN_RECORD).is_file() for above in folder.parents):
            raise StorageError(
                f"{path}: {folder} is a link inside a run directory, which leads elsewhere: nothing is written or deleted "
                "through it; put a real folder in its place"
            )


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to), or a folder with all below it; nothing if there is none."""
    refuse_links(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_product(path: Path) -> None:
    """Delete what killed writers of a product left beside it and below it; who calls holds the product's lease."""
    if not path.parent.is_dir():
        return
    for what in ("staged", "old"):  # of pipelines.runs.staging: nobody else may write them now
        remove(path.with_name(f".{path.name}.{what}"))
    for left in path.parent.glob(f".{glob.escape(path.name[:100])}.tmp-*"):
        match = _TEMPORARY.fullmatch(left.name)
        if match and _is_abandoned(left, match[1], int(match[2])):
            remove(left)
    if path.is_dir() and not path.is_symlink():
        sweep(path)


def sweep(folder: Path) -> int:
    """Delete what killed writers left below a folder; returns how many files and folders.

    That is what has a temporary name and either a dead process of this machine, or no change for a day.
    """
    found = 0
    for path, folders, files in os.walk(folder):  # does not follow links
        for name in [*folders, *files]:
            match = _TEMPORARY.fullmatch(name)
            if match and _is_abandoned(Path(path, name), match[1], int(match[2])):
                remove(Path(path, name))
                found += 1
        folders[:] = [name for name in folders if not _TEMPORARY.fullmatch(name)]
    return found


def _is_abandoned(path: Path, host: str | None, pid: int) -> bool:
    try:
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return False
    return age > ABANDONED_S or (host == _host() and not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
