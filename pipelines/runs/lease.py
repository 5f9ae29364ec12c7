"""The right to write a product of a run: one command at a time has it, a second one ends at once and names the first.

A lease is a small file `.leases/PRODUCT` beside what it protects; it says who holds it, and is gone afterwards. How one
of several commands gets it depends on the store, see `lease_stores`. The holder's process refreshes it every `BEAT_S`
seconds: a lease of a process of this machine that has ended is taken over at once, that of another machine after
`STALE_S` seconds without a refresh.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from pipelines.runs import lease_stores, storage
from pipelines.runs.errors import StageFailed
from pipelines.runs.holder import Holder
from pipelines.runs.lease_stores import Held

BEAT_S = 30.0


class Busy(StageFailed):
    """Another command writes the same product at the moment."""


@contextlib.contextmanager
def lease(uri: str, product: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lease of a product of a run, or of a folder, while the body runs.

    Parameters
    ----------
    uri : str
        The run, or another folder that a command writes.
    product : str
        Such as `embeddings` or `subsets/hard`.
    wait_s : float
        How long to wait for another holder, in seconds, for what is written in a moment.

    Raises
    ------
    Busy
        If another command holds it, which is named; or, at the end, if one has taken it over, as this process did not
        run for minutes.
    """
    held = _acquire(uri, product, wait_s)
    with contextlib.suppress(OSError):  # what killed commands left; it can stay
        for left in (product, "percentiles"):  # ranks are written by who fits or scores
            storage.sweep(storage.join(uri, left))
    ended, lost = threading.Event(), threading.Event()

    def refresh() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the store does not answer at the moment; the next time it may
                if not held.beat():
                    lost.set()
                    return

    thread = threading.Thread(target=refresh, name=f"lease of {product}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if not lost.is_set():
            with contextlib.suppress(OSError):  # it ends with this process, or after a while
                held.release()
    if lost.is_set():
        raise Busy(f"{uri}: another command took over {product} while this one stood still; start it again")


def check_idle(uri: str, but: str = "") -> None:
    """Busy, which names the command, if any product of a run, `but` one, is being written."""
    for product in lease_stores.products(uri):
        if product != but:
            with lease(uri, product):
                pass


def _acquire(uri: str, product: str, wait_s: float) -> Held:
    began, pause = time.monotonic(), 0.02
    until = began + wait_s
    while True:
        held = lease_stores.acquire(uri, product, Holder.here())
        if not isinstance(held, Holder | None):
            return held
        # Its holder may be about to write who it is.
        if time.monotonic() > (until if held else max(until, began + 1.0)):
            raise Busy(
                f"{uri}: {product} is being written by {held or 'another command'}; "
                "wait for it, or stop it, then start this command again"
            )
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
