"""Look through shards before paying for a GPU: broken tars, key clashes, label problems, class counts, image sizes.

hardset validate --shards 'DIR/train-{000000..001281}.tar'
"""

import dataclasses
import sys
from typing import Any

from jobs.command import Command, say
from jobs.options import SessionOptions, at_least
from jobs.session import ray_session
from pipelines.runs.errors import UserError, concerning

SHOWN = 12  # classes and reasons


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """Which shards, and how closely they are looked at. No GPU is needed."""

    shards: str
    """webdataset shards: quoted braces, globs, a folder, s3://…, a text file of URLs, '::' between sources"""
    encoder: str | None = None
    """also load this encoder, named as for curate: a mistake in its name or its file ends here, not on the cluster"""
    label: str = "cls"
    """cls, json:FIELD, or none for images without labels"""
    classes: str | None = None
    """text file of class names, one a line, in the order of the labels; then cls may hold names"""
    image: str | None = None
    """suffix of the member that is the image, such as input.jpg, where samples have several (default: the only one)"""
    label_member: str | None = None
    """suffix of the member that holds the label, such as output.cls (default: the only one of the kind that label names)"""
    max_pixels: int = 100_000_000
    """an image of more pixels than this is bad"""
    most_shards: int = 1000
    """of more shards than this, so many are read, evenly spread; each that is read is read whole"""
    decode_every: int = 50
    """one image in so many is decoded; 1 = all"""
    max_bad_fraction: float = 0.01
    """fraction of bad samples, in [0, 1], above which the exit status is 1, as curate's would be"""

    def __post_init__(self) -> None:
        at_least(self, 1, ("max_pixels", "most_shards", "decode_every"))
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"{self.max_bad_fraction}: expected a fraction in [0, 1]", "max_bad_fraction")


def validate(session: SessionOptions, asked: ValidateOptions) -> dict[str, Any]:
    """Read, tell; `failed` says so when more is bad than allowed."""
    from pipelines.corpus import validate as validating
    from pipelines.corpus.packed import names_beside
    from pipelines.corpus.samples import LabelSource, plain_suffix
    from pipelines.corpus.shards import expand_shards
    from pipelines.corpus.text import read_names

    image, member = (None if s is None else plain_suffix(s) for s in (asked.image, asked.label_member))
    names = None if asked.classes is None else read_names(asked.classes)
    LabelSource(asked.label, names)  # its own UserError for a label source that is none
    encoder = _encoder(asked.encoder)
    shards = expand_shards(asked.shards, tell=say)
    if names is None and asked.label == "cls":
        names = names_beside([shard.url for shard in shards])
    check = validating.Check(asked.label, names, asked.decode_every, asked.max_pixels, image, member)
    with ray_session(session):
        found = validating.validate(shards, check, asked.most_shards)
    found["encoder"] = encoder
    _show(found, asked, shards[0].url, shards[-1].url)
    if not found["samples"] or found["bad_fraction"] > asked.max_bad_fraction:
        found["failed"] = (
            f"a fraction of {found['bad_fraction']:.4f} of the samples is bad, more than `max_bad_fraction` "
            f"{asked.max_bad_fraction}: curate would end with status 1"
            if found["samples"]
            else "no sample in these shards"
        )
    return found


def _encoder(spec: str | None) -> dict[str, Any] | None:
    """What an encoder makes of images, once it could be loaded; its own ValueError where it cannot."""
    if spec is None:
        return None
    from ops.encoders import load_encoder  # torch

    with concerning("encoder"):
        loaded = load_encoder(spec)
    return {"spec": loaded.spec, "image_size": loaded.image_size, "width": loaded.width}


def _show(found: dict[str, Any], asked: ValidateOptions, first: str, last: str) -> None:
    from pipelines.corpus.samples import SORTING

    shards, images = found["shards"], found["images"]
    say(f"shards: {shards['listed']}, first {first}, last {last}")
    sampled = "all of them" if shards["read"] == shards["listed"] else "an even sample (--most-shards)"
    say(f"  read {shards['read']}, {sampled}: {found['bytes'] / 1e6:,.1f} MB, {shards['damaged']} damaged")
    lost = found["lost"]
    rest = f", {lost['bytes'] / 1e6:,.1f} MB unreadable, about {lost['estimated']:,} samples" if lost["bytes"] else ""
    say(f"  samples {found['samples']:,}, left out as read {lost['certain']:,}{rest}")
    if found["apart"]:
        say(f"  {found['apart']:,} samples stand in two places of their tar: {SORTING}")
    if found["without_end_mark"]:
        say(f"  {found['without_end_mark']:,} tars stop without an end mark: written so, or cut behind a member")
    if found["rotated"]:
        say(f"  {found['rotated']:,} of the decoded images carry an EXIF rotation (curate --exif ignore|apply)")
    say(
        f"  images decoded {images['decoded']:,} (one in {asked.decode_every}), of these {images['undecodable']:,} cannot be; "
        f"{images['mean_bytes'] / 1e3:,.1f} kB on average; {_counts(found['formats'])}; "
        f"shorter side up to {_counts(found['shorter_side'], ' px')}"
    )
    if encoder := found["encoder"]:
        say(f"  encoder {encoder['spec']}: {encoder['image_size']} px in, {encoder['width']} numbers out")
    for reason, entry in list(found["reasons"].items())[:SHOWN]:
        example = entry["examples"][0]
        say(
            f"  {entry['count']:>8,} × {entry['kind']}: {reason}  (e.g. shard {example['shard']}, key {example['key']!r})"
        )
    if found["classes"]:
        say(f"  {len(found['classes'])} classes: {_counts(found['classes'])}")
    say(
        f"  whole list, estimated: {found['estimated']['samples']:,} samples, {found['estimated']['usable']:,} usable; "
        f"bad fraction {found['bad_fraction']:.4f}, allowed {asked.max_bad_fraction}"
    )


def _counts(counts: dict[str, int], unit: str = "") -> str:
    """`jpeg 200, png 3`, at most SHOWN of them."""
    shown = ", ".join(f"{name}{unit}: {count:,}" for name, count in list(counts.items())[:SHOWN])
    return (shown or "none") + (f", … ({len(counts) - SHOWN} more)" if len(counts) > SHOWN else "")


COMMAND = Command("validate", __doc__, (SessionOptions, ValidateOptions), validate)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(main())
