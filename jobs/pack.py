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
from pipelines.runs import credentials
from pipelines.runs.errors import UserError


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


def with_flags(words: Sequence[str]) -> list[str]:
    """`SOURCE --out DIR` -> `--source SOURCE --out DIR`, wherever the source stands."""
    switches = {"--json", "--help", "-h"}
    found, rest, value_follows = [], [], False
    for word in words:
        is_flag = word.startswith("-")
        (rest if is_flag or value_follows else found).append(word)
        value_follows = is_flag and word not in switches and "=" not in word
    if len(found) > 1:
        raise UserError(f"expected one source, found {len(found)}: {' '.join(found)}", "source")
    return [part for word in found for part in ("--source", word)] + rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        words = with_flags(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stderr.write(credentials.redact(f"hardset pack: error: {error.message}\n"))
        return 2
    return COMMAND.main(words)


if __name__ == "__main__":
    sys.exit(main())
