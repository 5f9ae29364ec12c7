"""The run as one HTML page: hardest and easiest, likely label errors, scores, predictions, quarantine.

hardset report --run RUN
"""

import dataclasses
import sys
from typing import Any

from jobs.command import Command
from jobs.options import RunOptions
from jobs.session import ray_session, tracked


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the page shows."""

    classes: str | None = None
    """text file of class names to show, one a line in the order of the labels, for a run made without names"""


def report(options: RunOptions, asked: ReportOptions) -> dict[str, Any]:
    """Write RUN/report/index.html, unless it is there and up to date."""
    from jobs import stages
    from pipelines.corpus.text import read_names
    from pipelines.runs.record import Run

    run = Run.open(options.run)
    names = read_names(asked.classes) if asked.classes else ()
    with tracked("report", options, asked) as tracker, ray_session(options):
        entry = stages.report(run, tracker, names)
        tracker.metrics(entry)
    return {"run": run.uri, "report": entry}


COMMAND = Command("report", __doc__, (RunOptions, ReportOptions), report)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
