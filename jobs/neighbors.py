"""Who is near whom: the nearest samples of every sample, duplicates, leaks between two runs, and a second opinion on labels.

hardset neighbors --run RUN
hardset neighbors --run TEST --against TRAIN
"""

import dataclasses
import sys
from typing import Any

from jobs.command import Command
from jobs.options import RunOptions, at_least
from jobs.session import ray_session, tracked


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighborOptions:
    """The neighbours."""

    against: str | None = None
    """look in this other run of the same encoder instead: which of this run's pictures are there too, a leak check"""
    name: str | None = None
    """what the other run is called in neighbors/against/NAME (default: the last part of its path)"""
    k: int = 30
    """neighbours of each sample"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("k",))


def neighbors(options: RunOptions, asked: NeighborOptions) -> dict[str, Any]:
    """Write the neighbours and say how many duplicates or leaks there are."""
    from jobs import stages
    from pipelines.runs.record import Run

    run = Run.open(options.run)
    with tracked("neighbors", options, asked) as tracker, ray_session(options):
        counts = stages.neighbors(run, asked.k, asked.against, asked.name)
        tracker.metrics(counts)
    return {"run": run.uri, **counts}


COMMAND = Command("neighbors", __doc__, (RunOptions, NeighborOptions), neighbors)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
