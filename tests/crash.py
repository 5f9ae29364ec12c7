"""Local storage operations seen one by one, so that a test can stop a stage dead at any of them, or let another run there.

A stage changes what others see by renames and deletions alone. Python tells of each before it is done (`sys.addaudithook`),
so nothing in the product is changed for this.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path


class Killed(BaseException):
    """The process ended here: no handler of the product sees this, and nothing is cleaned up after it."""


class Operations:
    """Counts the renames and deletions below `root` while it is entered, and calls `act` before number `at`.

    With `act` None the process is killed there: it and every later operation fail, those of `finally` too.
    """

    _active: "Operations | None" = None
    _hooked = False

    def __init__(self, root: Path, at: int | None = None, act: Callable[[], None] | None = None):
        self.root, self.at, self.act = str(root), at, act
        self.seen: list[str] = []
        self.dead = False

    def __enter__(self) -> "Operations":
        if not Operations._hooked:
            sys.addaudithook(Operations._hook)
            Operations._hooked = True
        Operations._active = self
        return self

    def __exit__(self, *_: object) -> None:
        Operations._active = None

    @staticmethod
    def _hook(event: str, arguments: tuple) -> None:
        active = Operations._active
        if active is None or event not in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        path = _path(arguments[1] if event == "os.rename" else arguments[0], arguments[-1])
        if path.startswith(active.root) and "/.leases" not in path and (event == "os.rename" or os.path.lexists(path)):
            active._operation(f"{event} {path}")

    def _operation(self, what: str) -> None:
        if self.dead:
            raise Killed(what)
        number = len(self.seen)
        self.seen.append(what)
        if number != self.at:
            return
        if self.act is None:
            self.dead = True
            raise Killed(what)
        Operations._active = None
        try:
            self.act()
        finally:
            Operations._active = self


def _path(name: object, folder: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)
