"""Who holds a lease: a process, told so that a person finds it and another process can tell whether it still runs."""

import contextvars
import dataclasses
import json
import os
import platform
import secrets
from datetime import UTC, datetime
from pathlib import Path

STALE_S = 180.0  # a holder on another machine that has not refreshed its lease for so long is gone
COMMAND = contextvars.ContextVar("command", default="a Python program")  # what this process does; `jobs` sets it


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes
    ----------
    command, pid, host, since
        For a person: which process, and since when (UTC).
    machine, namespace : str
        A boot of a machine, and a PID namespace (a container) on it; processes that share both can look for each other
        by their number.
    started : str
        When the process started, as the kernel counts; tells it from a later one with the same number.
    token : str
        Different for every lease.
    """

    command: str
    pid: int
    host: str
    since: str
    machine: str
    namespace: str
    started: str
    token: str

    @classmethod
    def here(cls) -> "Holder":
        """This process, with a new token."""
        pid, now = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        where = (platform.node(), now, machine(), _namespace())
        return cls(COMMAND.get(), pid, *where, _started(pid), secrets.token_hex(8))

    @classmethod
    def read(cls, text: bytes) -> "Holder | None":
        """What `text` says; None where it is not of this form, as while it is being written."""
        try:
            values = json.loads(text)
            holder = cls(**{f.name: (int if f.name == "pid" else str)(values[f.name]) for f in dataclasses.fields(cls)})
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return None
        return holder

    def text(self, beat: int = 0) -> bytes:
        """One line of JSON; another `beat` makes it another text."""
        return json.dumps({**dataclasses.asdict(self), "beat": beat}).encode()

    def alive(self, age_s: float) -> bool:
        """Whether the process still holds a lease that was refreshed `age_s` seconds ago."""
        if (self.machine, self.namespace) == (machine(), _namespace()):
            return self.started != "" and _started(self.pid) == self.started
        return age_s < STALE_S

    def __str__(self) -> str:
        printable = "".join(c for c in f"{self.command} (process {self.pid} on {self.host}" if c.isprintable())
        return f"{printable[:200]}, since {self.since[:25]})"


def machine() -> str:
    """Names this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, as its kernel tells it; empty for one that is gone, or is only waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return "" if os.path.isdir("/proc/self") else _answers(pid)


def _answers(pid: int) -> str:
    """ "yes" where a process of this number runs, on a system without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "yes"
    return "yes"
