"""A thread that reads ahead of whoever works on what was read, by bytes: small images far ahead, large ones not."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item], size_of: Callable[[Item], int], limit_bytes: int) -> Iterator[Item]:
    """The same items in the same order, got by a thread until `limit_bytes` of them wait; its error is raised here."""
    line = _Line(limit_bytes)

    def work() -> None:
        try:
            for item in items:
                if not line.put(item, size_of(item)):
                    return
            line.end(None)
        except BaseException as error:
            line.end(error)

    thread = threading.Thread(target=work, daemon=True, name="read ahead")
    thread.start()
    try:
        yield from line
    finally:
        line.stop()
        thread.join()


class _Line:
    """What waits between the two threads."""

    def __init__(self, limit_bytes: int):
        self._limit, self._bytes = limit_bytes, 0
        self._items: deque = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def put(self, item: object, size: int) -> bool:
        """Waits for room, which an empty line always has; False once nobody wants more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._items or self._bytes + size <= self._limit)
            self._items.append((item, size))
            self._bytes += size
            self._changed.notify_all()
            return not self._stopped

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    break
                item, size = self._items.popleft()
                self._bytes -= size
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error
