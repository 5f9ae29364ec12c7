"""What is in a run: counts, quantiles, quarantine reasons, what is pending.

hardset inspect --run RUN
"""

import sys
from collections.abc import Iterator

from jobs.command import Command, say
from jobs.options import RunOptions


def inspect(options: RunOptions) -> dict:
    """Print the summary of a run; reads only."""
    from pipelines.planning.plan import against_actual
    from pipelines.runs.record import Run
    from pipelines.summary import summarize

    run = Run.open(options.run)
    summary = summarize(run) | {"plan": against_actual(run)}
    if not options.json:
        _show(summary)
    return summary


def _show(summary: dict) -> None:
    shards = summary["shards"]
    say(
        f"{summary['run']}: {shards['embedded']} of {shards['listed']} shards embedded with {summary['encoder']} (d = {summary['width']})"
    )
    say(
        f"{summary['samples']:,} samples = {summary['rows']:,} rows + {summary['left_out']:,} in quarantine "
        f"({100 * summary['bad_fraction']:.2f} %), {summary['classes']} classes from {summary['label']}"
    )
    for line in _lost(summary):
        say(line)
    for reason, entry in summary["quarantine"].items():
        say(
            f"  {entry['count']:>8,} × {reason}  (e.g. shard {entry['example']['shard']}, key {entry['example']['key']!r})"
        )
    if any(summary["decisions"].values()):
        say("decided: " + ", ".join(f"{count:,} {kind}" for kind, count in summary["decisions"].items()))
    for name, entry in summary["neighbors"].items():
        where = f"also in {entry['against']}" if entry["against"] else f"in {entry['duplicate_groups']:,} groups"
        say(
            f"{name}: {entry['duplicates']:,} duplicates {where}, recall of the {entry['k']} nearest {entry['recall']:.3f}"
        )
    for group, found in summary["groups"].items():
        say(f"{group}: {found['shards']} shards")
        for name, quantiles in found["quantiles"].items():
            if quantiles:
                spread = "  ".join(f"{q} {quantiles[q]:.4g}" for q in ("0", "0.05", "0.5", "0.95", "1"))
                say(f"  {name:<14} quantiles  {spread}  mean {quantiles['mean']:.4g}")
    for name, entry in summary["stages"].items():
        seconds = f", {entry['seconds']:.1f} s" if "seconds" in entry else ""
        say(f"stage {name}: finished {entry['finished']}{seconds}")
    for name, entry in (summary["plan"] or {}).items():
        if name != "note":
            say(f"planned {name}: {entry['planned']:,.4g}, actual {entry['actual']:,.4g}")
        else:
            say(f"planned, note: {entry}")


def _lost(summary: dict) -> Iterator[str]:
    """What is lost beyond the entries of the quarantine, and what the tars and pictures said of themselves."""
    from pipelines.corpus.samples import SORTING

    lost = summary["lost"]
    if lost["bytes"]:
        yield (
            f"lost: {lost['certain']:,} samples for certain, about {lost['estimated']:,} more in {lost['bytes'] / 1e6:,.1f} MB "
            "that cannot be read"
        )
    if summary["apart"]:
        yield f"{summary['apart']:,} samples stand in two places of their tar: {SORTING}"
    if summary["without_end_mark"]:
        yield f"{summary['without_end_mark']:,} tars stop without an end mark: written so, or cut behind a member"
    if summary["rotated"]:
        yield f"{summary['rotated']:,} images carry an EXIF rotation, which was {summary['exif']}"


COMMAND = Command("inspect", __doc__, (RunOptions,), inspect)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
