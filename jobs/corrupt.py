"""Corrupted copies of shards: noise, blur, weather and digital corruptions at five severities.

hardset corrupt --shards 'DIR/test-{000000..000009}.tar' --out CORRUPTED --kinds noise blur --severities 1 3 5
"""

import dataclasses
import sys
from typing import Any

from jobs.command import Command, say
from jobs.options import SessionOptions, at_least, named
from jobs.session import ray_session


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorruptOptions:
    """Which shards, how corrupted, and where to."""

    shards: str
    """webdataset shards: quoted braces, globs, a folder, s3://…, a text file of URLs, '::' between sources"""
    out: str
    """folder or URI; each corruption gets a folder KIND-SEVERITY of shards"""
    kinds: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    """corruptions by name, by family (noise, blur, weather, digital), or all of the four families"""
    severities: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 4, 5])
    """from 1 (mild) to 5 (strong)"""
    image: str | None = None
    """suffix of the member that is the image, such as input.jpg, where samples have several (default: the only one)"""
    seed: int = 0
    """of noise, directions and shapes"""

    def __post_init__(self) -> None:
        at_least(self, 0, ("seed",))
        named(self, ("out",))


def corrupt(session: SessionOptions, asked: CorruptOptions) -> dict[str, Any]:
    """Write the copies that are not there yet."""
    from pipelines.corpus.corrupt import corrupt_shards, named_kinds
    from pipelines.corpus.samples import plain_suffix
    from pipelines.corpus.shards import expand_shards
    from pipelines.runs import storage
    from pipelines.runs.lease import lease
    from pipelines.runs.progress import duration

    kinds, shards = named_kinds(asked.kinds), expand_shards(asked.shards, tell=say)
    if asked.image is not None:
        shards = [dataclasses.replace(shard, image=plain_suffix(asked.image)) for shard in shards]
    say(
        f"shards: {len(shards)}, first {shards[0].url}, last {shards[-1].url}; {len(kinds)} corruptions at severities "
        f"{', '.join(map(str, asked.severities))}"
    )
    with lease(storage.absolute(asked.out), "shards"), ray_session(session):
        counts = corrupt_shards(shards, asked.out, kinds, asked.severities, asked.seed)
    say(
        f"corrupt: {counts['samples']:,} samples written, {counts['left_out']:,} left out, {counts['shards_done']} shards "
        f"done, {counts['shards_skipped']} skipped, {duration(counts['seconds'])}: {asked.out}"
    )
    return counts


COMMAND = Command("corrupt", __doc__, (SessionOptions, CorruptOptions), corrupt)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
