"""Processes of this machine, for the tests that kill some."""

from pathlib import Path


def processes():
    """(pid, command line, which for a worker of Ray is its title) of each."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def belongs_to(pid, ancestor):
    """Whether a process descends from another (workers from their raylet, and that from the command)."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
