"""What a command logs to MLflow. A process beside the command does the logging, so that MLflow delays and ends no work.

A store that cannot be used at all is the user's mistake, told before work starts. What fails later is a warning: the
result is kept and printed.
"""

import atexit
import contextlib
import io
import math
import os
import pickle
import queue
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipelines.runs.errors import UserError
from pipelines.runs.nested import flatten

END_S = 60.0  # that a finished command waits for MLflow
START_S = 300.0  # and a starting one for a store that must be made first, on a machine that is busy
_PROGRAM = Path(__file__).with_name("mlflow_process.py")
_spare: subprocess.Popen | None = None  # started, and still without a run


def warm_up(uri: str) -> None:
    """Start the process now: it imports MLflow while the command imports what it needs itself.

    UserError where no run can be stored there.
    """
    global _spare
    _place(uri)
    if _spare is None:
        _spare = _started()
        atexit.register(stop_spare)


def stop_spare() -> None:
    """End a process that no run was opened in."""
    global _spare
    if _spare is not None:
        _spare.kill()
        _spare.wait()
        _spare = None


def _started() -> subprocess.Popen:
    complaints = tempfile.TemporaryFile()  # noqa: SIM115  read once the process has ended
    process = subprocess.Popen(
        # -P: its own folder has modules named like those of the standard library
        [sys.executable, "-P", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
    )
    process.complaints = complaints
    return process


class Tracker:
    """One MLflow run. Without a store (`None`) every call does nothing.

    Calls return at once: what they log waits in a queue until MLflow has taken it.
    """

    def __init__(self, uri: str | None = None, run_name: str = "", run_id: str | None = None):
        self.active = uri is not None
        self.problem: str | None = None
        self._run_id: str | None = None
        self._opened = threading.Event()
        self._watch: Callable[[str], None] = lambda run_id: None
        if uri is None:
            return
        global _spare
        place = _place(uri)
        self.uri, self._process, _spare = uri, _spare or _started(), None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self._threads:
            thread.start()
        self._send("open", *place[:3], run_name, run_id)
        if place.must_wait:
            self._opened.wait(START_S)
            if self.problem is not None or self._run_id is None:
                self._process.kill()
                raise _unusable(uri, self.problem or f"no answer within {START_S:.0f} s")

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, waited for; None without one."""
        if self.active:
            self._opened.wait(START_S)
        return self._run_id

    def when_opened(self, call: Callable[[str], None]) -> None:
        """Have the run's id handed to `call` once it is known, in a thread."""
        self._watch = call
        if self._run_id is not None:
            call(self._run_id)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log the configuration; nested names are joined with dots."""
        self._send("params", {_name(k): str(v)[:6000] for k, v in flatten(values).items()})

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log the finite numbers among `values`; nested names are joined with dots."""
        numbers = {_name(k): float(v) for k, v in flatten(values).items() if isinstance(v, int | float)}
        self._send("metrics", {name: value for name, value in numbers.items() if math.isfinite(value)}, step)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._send("tags", {_name(k): str(v)[:5000] for k, v in values.items()})

    def file(self, data: bytes, name: str) -> None:
        """Store an artifact; `name` may have folders."""
        self._send("file", data, name)

    def figure(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure as PNG."""
        if self.active:
            stream = io.BytesIO()
            figure.savefig(stream, format="png")
            self.file(stream.getvalue(), name)

    def model(self, files: dict[str, bytes], inputs: tuple[str, tuple[int, ...]], classes: int, graph: bool) -> None:
        """Log a classifier: its checkpoint's files, dtype and shape of one input, number of classes."""
        self._send("model", files, inputs, classes, graph)

    def end(self, status: str) -> str | None:
        """Wait until all is logged, END_S at most; the first thing that went wrong, if any did."""
        if not self.active:
            return None
        if status != "FINISHED" and not self._opened.is_set():
            self._process.kill()  # no run is there yet that could be marked as failed
        self._send("end", status)
        patience = END_S if status == "FINISHED" else END_S / 4
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.problem = self.problem or f"no answer within {patience:.0f} s"
            self._process.kill()
            self._process.wait()
        self._threads[1].join()
        return self.problem

    def _send(self, name: str, *arguments: Any) -> None:
        if self.active:
            self._queue.put((name, arguments))

    def _write(self) -> None:
        """Thread: the queue into the pipe, which a process that waits for a server may leave full."""
        with contextlib.suppress(OSError, ValueError):
            name = ""
            while name != "end":
                name, arguments = self._queue.get()
                self._process.stdin.write(pickle.dumps((name, arguments)))
                self._process.stdin.flush()

    def _read(self) -> None:
        """Thread: the replies."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                kind, text = pickle.load(self._process.stdout)
                if kind == "run":
                    self._run_id = text
                    self._watch(text)
                else:
                    self.problem = self.problem or text
                self._opened.set()
        if self._process.wait() and self.problem is None:
            self.problem = (
                f"its client ended with status {self._process.returncode}{_last_line(self._process.complaints)}"
            )
        self._opened.set()


class _Place(NamedTuple):
    """A store as MLflow is told of it; `must_wait`: only MLflow can tell whether it works, or it must be made first."""

    folder: str | None  # where the URI counts from
    uri: str
    artifacts: str | None
    must_wait: bool = False


def _place(uri: str) -> _Place:
    """How MLflow is told of a store, after a look whether it can work.

    A database file is named from its own folder, as `?` and `%` in a path would mean something else in a URI.
    """
    if uri.startswith("sqlite:///"):
        path = Path(os.path.abspath(os.path.expanduser(uri.removeprefix("sqlite:///"))))
        artifacts = (path.parent / "mlartifacts").as_uri()
        return _Place(str(path.parent), f"sqlite:///{path.name}", artifacts, must_wait=not _has_tables(path, uri))
    if uri.startswith(("http://", "https://")):
        _check_answers(uri)
        return _Place(None, uri, None)
    return _Place(None, uri, None, must_wait=True)


def _has_tables(path: Path, uri: str) -> bool:
    """Whether MLflow has been here before. UserError where no database can be made or written."""
    name = path.name.partition("?")[0]
    if not path.parent.is_dir():
        raise _unusable(uri, f"there is no folder {path.parent}")
    try:
        with contextlib.closing(sqlite3.connect(path.with_name(name), timeout=5)) as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'").fetchone()[0]
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        if "locked" in str(error):  # by another command, which is at work in it
            return True
        raise _unusable(uri, str(error)) from None
    return bool(tables)


def _check_answers(uri: str, tries: int = 3) -> None:
    place = urllib.parse.urlsplit(uri)
    bare = place._replace(netloc=place.netloc.rpartition("@")[2]).geturl()  # urllib takes no user and password in it
    for attempt in range(tries):
        try:
            urllib.request.urlopen(bare, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # somebody is there; what MLflow makes of it comes later
        except OSError as error:
            problem = str(getattr(error, "reason", error))
        except ValueError as error:
            raise _unusable(uri, str(error)) from None
        if attempt + 1 < tries:
            time.sleep(1 + attempt)
    raise _unusable(uri, problem)


def _last_line(complaints: BinaryIO) -> str:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return f" ({lines[-1][:200]})" if lines else ""


def _unusable(uri: str, problem: str) -> UserError:
    return UserError(f"{uri}: {problem}; take another store, or none", "mlflow")


def _name(text: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", text)[:250]
