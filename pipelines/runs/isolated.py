"""A worker in a process of its own, so that a sample that kills its process or hangs it is found and left out.

Before a worker gives samples to a decoder or a model it notes them as in hand (`InHand.hold`), in memory that outlives
the process. When the process dies, or has had the same samples in hand for too long and is ended, the worker is made
again in a new process and starts the shard again, carefully: one step at a time, and what was in hand sample by sample
(`Suspects`). A sample whose process dies again with nothing else in hand is left out with the reason, and the rest goes on.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from pipelines.runs.errors import StageFailed

NOTE_BYTES = 1 << 16
POLL_S = 0.5
DEATHS_ALONE = 2  # a kill from outside may meet a sample once
DEATHS_WITHOUT = 3  # with nothing in hand, for one shard
FEW = 3  # samples in a row that a worker dies on without having done any in between: it fails for every one


class Held(NamedTuple):
    """Samples `first` to `last` of the shard (rows, inclusive) that a step has had in hand since then (monotonic, s)."""

    step: str
    first: int
    last: int
    since: float


@dataclasses.dataclass(frozen=True)
class Suspects:
    """What is known of a shard whose worker has died.

    Attributes
    ----------
    careful : bool
        One step at a time, nothing ahead.
    alone : frozenset of (str, int, int)
        Step, first and last row: these samples go through that step one by one.
    bad : dict of int to str
        Rows to leave out, and why.
    """

    careful: bool = False
    alone: frozenset[tuple[str, int, int]] = frozenset()
    bad: dict[int, str] = dataclasses.field(default_factory=dict)

    def go_alone(self, step: str, row: int) -> bool:
        """Whether a sample goes through a step by itself."""
        return any(step == held and first <= row <= last for held, first, last in self.alone)


class InHand:
    """What a worker has in hand, noted in `memory`; without it nothing is noted."""

    def __init__(self, memory: mmap.mmap | None = None):
        self._memory, self._held, self._passed = memory, {}, 0
        self._lock, self._numbers = threading.Lock(), itertools.count()

    @property
    def noted(self) -> bool:
        """Whether another process sees it, and makes the worker again if this one dies."""
        return self._memory is not None

    @contextlib.contextmanager
    def hold(self, step: str, first: int, last: int) -> Iterator[None]:
        """Rows `first` to `last` are in a step's hand while this lasts."""
        taken = self.take(step, first, last)
        yield
        self.release(taken)

    def take(self, step: str, first: int, last: int) -> int:
        """`hold` without its end, which is `release` of what is returned."""
        number = next(self._numbers)
        self._note(number, Held(step, first, last, time.monotonic()))
        return number

    def release(self, taken: int) -> None:
        """No longer in hand."""
        self._note(taken, None)

    def passed(self, samples: int) -> None:
        """So many samples came through the last step."""
        self._passed += samples

    def _note(self, number: int, held: Held | None) -> None:
        if self._memory is None:
            return
        with self._lock:
            if held is None:
                del self._held[number]
            else:
                self._held[number] = held
            text = json.dumps([self._passed, list(self._held.values())]).encode()
            self._memory[: 4 + len(text)] = struct.pack("<i", len(text)) + text


def read_note(memory: mmap.mmap) -> tuple[int, list[Held]]:
    """How many samples a worker has done, and what it has in hand."""
    (length,) = struct.unpack_from("<i", memory)
    try:
        passed, held = json.loads(memory[4 : 4 + length] or b"[0, []]")
    except ValueError:  # read while it is being written
        return 0, []
    return passed, [Held(*entry) for entry in held]


class IsolatedWorker:
    """Makes a worker in a process of its own, calls it there, and finds the samples that it dies on.

    The worker takes what it needs from attributes that are set on it: `in_hand` (an `InHand`) once, `suspects` (a
    `Suspects`) before each call.

    Parameters
    ----------
    make : callable
        Of a module; makes the worker from `arguments`.
    limit_s : float
        A process that has the same samples in hand for longer is ended.
    """

    def __init__(self, make: Callable[..., Any], arguments: tuple, limit_s: float):
        self._setup, self._limit_s = (make, arguments), limit_s
        self._lost_in_a_row = 0
        self._start()

    def call(self, function: Callable[..., Any], task: Any, *arguments: Any) -> Any:
        """`function(worker, task, *arguments)` there, as often as samples have to be left out first.

        StageFailed if it dies without a sample in hand, or on each of the first samples.
        """
        suspects, alone, without = Suspects(), Counter(), 0
        while True:
            death = self._ask(function, task, arguments, suspects)
            if not isinstance(death, _Death):
                return death
            self._start()
            if not death.held:
                without += 1
                if without == DEATHS_WITHOUT:
                    raise StageFailed(f"the worker's process died {without} times on shard {task.shard} ({death.how})")
                continue
            (step, first, last, _), *others = death.held
            if suspects.careful and not others and first == last and suspects.go_alone(step, first):
                alone[first] += 1
                if death.hung or alone[first] == DEATHS_ALONE:
                    suspects = dataclasses.replace(suspects, bad=suspects.bad | {first: death.reason})
                    self._count_lost(death, task.shard, first)
            else:
                found = {(held.step, held.first, held.last) for held in death.held}
                suspects = Suspects(True, suspects.alone | found, suspects.bad)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._memory.close()
        os.unlink(self._note)

    def _count_lost(self, death: "_Death", shard: int, row: int) -> None:
        self._lost_in_a_row = 1 if death.passed else self._lost_in_a_row + 1
        if self._lost_in_a_row >= FEW:
            raise StageFailed(
                f"the encoder fails for every sample: {death.reason}, {FEW} in a row, the last of them row {row} of "
                f"shard {shard} ({death.how})"
            )

    def _start(self) -> None:
        if hasattr(self, "_process"):
            self.close()
        ours, theirs = socket.socketpair()
        handle, self._note = tempfile.mkstemp(prefix="hardset-in-hand-")
        os.truncate(handle, NOTE_BYTES)
        self._memory = mmap.mmap(handle, NOTE_BYTES)
        os.close(handle)
        words = [sys.executable, "-m", "pipelines.runs.isolated", str(theirs.fileno()), self._note]
        paths = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=os.environ | paths)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._ready = False
        with contextlib.suppress(BrokenPipeError):  # a process that is gone already is met in `_ask`
            self._connection.send(self._setup)

    def _ask(self, function: Callable, task: Any, arguments: tuple, suspects: Suspects) -> Any:
        try:
            if not self._ready:
                self._answer()
                self._ready = True
            self._connection.send((function, task, arguments, suspects))
            return self._answer()
        except (EOFError, ConnectionError):
            hung = False
        except TimeoutError:
            hung = True
        self._process.kill()
        status = self._process.wait()
        passed, held = read_note(self._memory)
        reason = f"no answer in {self._limit_s:g} s" if hung else "the process died on it"
        how = "it hung" if hung else f"by signal {-status}" if status < 0 else f"with status {status}"
        return _Death(hung, reason, how, passed, held)

    def _answer(self) -> Any:
        while not self._connection.poll(POLL_S):
            since = min((held.since for held in read_note(self._memory)[1]), default=None)
            if since is not None and time.monotonic() - since > self._limit_s:
                raise TimeoutError
        kind, value = pickle.loads(self._connection.recv_bytes())
        if kind == "error":
            raise value
        return value


class _Death(NamedTuple):
    """How a worker's process ended, how many samples it had done, and what it had in hand."""

    hung: bool
    reason: str
    how: str
    passed: int
    held: list[Held]


def serve(connection: Connection, note: str) -> None:
    """The process of a worker: made from the first message, called by all others, until the other side is gone."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with open(note, "r+b") as file:
        memory = mmap.mmap(file.fileno(), NOTE_BYTES)
    with contextlib.suppress(EOFError, ConnectionError):
        make, arguments = connection.recv()
        worker = None

        def made() -> None:
            nonlocal worker
            worker = make(*arguments)
            worker.in_hand = InHand(memory)

        _reply(connection, made)
        while True:
            function, task, more, suspects = connection.recv()
            worker.suspects = suspects
            _reply(connection, lambda: function(worker, task, *more))  # noqa: B023  called at once


def _reply(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        answer = ("value", work())
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # a traceback doesn't travel by itself
        answer = ("error", error)
    try:
        encoded = pickle.dumps(answer)
        pickle.loads(encoded)  # some errors can be written and not be read
    except Exception:
        encoded = pickle.dumps(("error", RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}")))
    connection.send_bytes(encoded)


def _end_with_parent(parent: int) -> None:
    """No process is left behind by a parent that was killed, not even one that holds the interpreter's lock."""
    with open(os.devnull, "w") as nowhere:
        while os.getppid() == parent:
            faulthandler.dump_traceback_later(3600, exit=True, file=nowhere)
            time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2])
