"""Images or Parquet to webdataset shards: the original bytes, a label by folder, by CSV or by column.

hardset pack PHOTOS --out SHARDS
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command, say
from jobs.options import SessionOptions, at_least, named
from jobs.session import ray_session


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What is packed, and where to. `hardset pack SOURCE --out DIR` is short for --source SOURCE."""

    source: str
    """a folder with a folder per class, a flat folder of images, or Parquet files with image bytes; local or a URI"""
    out: str
    """folder or URI of the shards; classes.txt there keeps the names of the classes"""
    samples_per_shard: int = 1000
    """samples per shard"""
    labels: str | None = None
    """CSV of a flat folder with the columns file_name and label (default: the only CSV that lies in it)"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("samples_per_shard",))
        named(self, ("source", "out"))


def pack(session: SessionOptions, asked: PackOptions) -> dict[str, Any]:
    """Write the shards that are not there yet, and say the command that takes them."""
    from pipelines.corpus import pack as packing
    from pipelines.runs.progress import duration

    with ray_session(session):
        found = packing.pack(asked.source, asked.out, asked.samples_per_shard, asked.labels, say)
    labels = (
        f"{found['labelled']:,} labelled, {len(found['classes'])} named classes" if found["labelled"] else "no labels"
    )
    ignored = f"; {found['ignored']:,} other files left alone" if found["ignored"] else ""
    say(
        f"pack: {found['samples']:,} samples ({labels}) in {found['shards']} shards, {found['shards_done']} done, "
        f"{found['shards_skipped']} skipped, {found['bytes'] / 1e6:,.1f} MB, {duration(found['seconds'])}: {found['out']}{ignored}"
    )
    if found["without_bytes"]:
        say(f"pack: {found['without_bytes']:,} rows hold no image bytes; they go to quarantine when they are embedded")
    say(f"next: hardset curate --shards {found['out']} --run RUN")
    return found


COMMAND = Command("pack", __doc__, (SessionOptions, PackOptions), pack)


def main(argv: Sequence[str] | None = None) -> int:
    """`SOURCE --out DIR` -> `--source SOURCE --out DIR`."""
    words = list(sys.argv[1:] if argv is None else argv)
    # A word in front of all options is the source; behind them it might be an option's value.
    if words and not words[0].startswith("-"):
        words = ["--source", *words]
    elif len(words) > 1 and words[-2].startswith("--json") and not words[-1].startswith("-"):
        words = [*words[:-1], "--source", words[-1]]
    return COMMAND.main(words)


if __name__ == "__main__":
    sys.exit(main())
