"""A person's corrections -> the labels that every later stage uses.

hardset decide --run RUN --from decisions.csv --by anna
"""

import dataclasses
import getpass
import sys
from typing import Any

from jobs.command import Command, say
from jobs.options import RunOptions
from jobs.session import ray_session, tracked


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecideOptions:
    """The decisions."""

    from_: list[str] = dataclasses.field(default_factory=list)
    """CSV files with the columns key, or shard and row; and decision (keep, relabel, drop), label, or both. The report's
    review page saves such a file; tables of cleanlab, FiftyOne and Label Studio are read too"""
    by: str | None = None
    """who decided, where a file does not say it (default: the name of the user who is logged in)"""
    undo: bool = False
    """take back what the last hardset decide added"""

    def __post_init__(self) -> None:
        from pipelines.runs.errors import UserError

        if bool(self.from_) == self.undo:
            raise UserError("give a file of decisions, or take back the last ones with undo", "from_")


def decide(options: RunOptions, asked: DecideOptions) -> dict[str, Any]:
    """Add the decisions to the run, or take back the last ones."""
    from pipelines.curation import decide as deciding
    from pipelines.runs.record import Run

    run = Run.open(options.run)
    with tracked("decide", options, asked) as tracker, ray_session(options):
        if asked.undo:
            counts = deciding.undo(run)
            say(f"decide: took back {counts['undone']:,} decisions of {counts['source']}")
        else:
            counts = deciding.decide(run, asked.from_, asked.by or _user())
            _tell(counts)
        tracker.metrics({name: value for name, value in counts.items() if name != "examples"})
    return {"run": run.uri, "decide": counts}


def _tell(counts: dict[str, Any]) -> None:
    kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("keep", "relabel", "drop"))
    say(f"decide: {counts['added']:,} decisions added ({kinds}), {counts['unchanged']:,} were there already")
    if counts["conflicts"]:
        say(f"decide: {counts['conflicts']:,} of them differ from what somebody else decided; the new ones count:")
        for line in counts["examples"]:
            say(f"  {line}")
    if counts["added"]:
        say("decide: labels changed; hardset fit and hardset score bring the difficulty up to date")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


COMMAND = Command("decide", __doc__, (RunOptions, DecideOptions), decide)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
