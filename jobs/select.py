"""A rule over the columns of a run -> a subset of webdataset shards, manifest and card.

hardset select --run RUN --by difficulty.rmd --where 'difficulty.margin < 0' --top 0.1 --name hard
"""

import sys

from jobs.command import Command
from jobs.options import RunOptions, SelectOptions
from jobs.session import ray_session, tracked


def select(options: RunOptions, selection: SelectOptions) -> dict:
    """Write the subset, unless it is there and up to date."""
    from jobs import stages
    from pipelines.runs.record import Run

    run = Run.open(options.run)
    with tracked("select", options, selection) as tracker, ray_session(options):
        result = {
            "run": run.uri,
            "select": stages.select(run, stages.rule(selection, selection.seed, selection.labels), selection),
        }
        tracker.metrics(result)
    return result


COMMAND = Command("select", __doc__, (RunOptions, SelectOptions), select)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
