"""One readable line per finished shard, or one line rewritten in place on a terminal; and where the time went."""

import sys
import time
from collections.abc import Mapping

LINES = 200  # a run of a million shards still prints at most about this many lines
QUIET_S = 2.0  # and a quick stage the first line and the last


class Progress:
    """Counts finished shards of a stage and says so on standard error, with rate and time left."""

    def __init__(self, stage: str, total: int, skipped: int = 0):
        self.stage, self.total, self.done, self.rows, self.left_out = stage, total, 0, 0, 0
        self.started = time.monotonic()
        self.every, self.said = max(1, total // LINES), -QUIET_S
        if skipped:
            self._say(f"{stage}: {skipped} of {skipped + total} shards already done, skipped\n")

    def shard(self, rows: int, left_out: int = 0, shards: int = 1) -> None:
        """One more shard (or several) is finished, with this many rows and samples left out."""
        before = self.done // self.every
        self.done, self.rows, self.left_out = self.done + shards, self.rows + rows, self.left_out + left_out
        terminal, now = sys.stderr.isatty(), time.monotonic() - self.started
        due = self.done // self.every > before and now - self.said >= QUIET_S
        if terminal or due or self.done == self.total:
            self.said = now
            end = "\n" if not terminal or self.done == self.total else ""
            self._say(("\r\x1b[K" if terminal else "") + self.line() + end)

    def line(self) -> str:
        """`embed: shards 812/1282 · 5.6 M images · 2,140 img/s · 0.20 % quarantined · ETA 56 min`"""
        seconds = max(time.monotonic() - self.started, 1e-9)
        seen = self.rows + self.left_out
        parts = [
            f"{self.stage}: shards {self.done}/{self.total}",
            f"{_count(seen)} images",
            f"{seen / seconds:,.0f} img/s",
        ]
        if self.left_out:
            parts.append(f"{100 * self.left_out / seen:.2f} % quarantined")
        left = seconds / self.done * (self.total - self.done)
        return " · ".join([*parts, f"ETA {duration(left)}" if left else f"took {duration(seconds)}"])

    def _say(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def bottleneck(seconds: Mapping[str, float], workers: int, elapsed: float) -> str:
    """`read 3.1 s · decode 10 s · … (summed over 2 workers); bottleneck: model`, or start-up where that took most."""
    spent = " · ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    idle = elapsed - sum(seconds.values()) / workers
    slowest = max(seconds, key=seconds.__getitem__) if idle < elapsed / 2 else f"start-up, {duration(idle)}"
    return f"{spent} (summed over {workers} workers); bottleneck: {slowest}"


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"
