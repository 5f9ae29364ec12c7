"""Validate: what curate would find in shards, before a GPU is paid for.

The reader is curate's own, so what it leaves out, and why, is the same: damaged tars, repeated keys, missing images and
labels. Every shard (or an even sample of very many) is read whole, as a tar is whole only if its last byte is there; of
the images every so-manieth is decoded.
"""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ops.decoding import ImageError, decode_picture, format_of
from pipelines.corpus.loss import loss_of
from pipelines.corpus.samples import Entry, LabelSource
from pipelines.corpus.shardlist import evenly
from pipelines.corpus.shards import read_entries
from pipelines.runs.progress import Progress
from pipelines.runs.record import Shard
from pipelines.runs.retries import retrying
from pipelines.runs.tasks import in_order

CPUS_PER_SHARD = 0.5  # reading waits for the store half of the time
EXAMPLES = 3  # per reason
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # classes of the shorter side, pixels


@dataclasses.dataclass(frozen=True)
class Check:
    """What is looked at.

    Attributes
    ----------
    label : str
        cls, json:FIELD or none, as for curate.
    class_names : tuple of str or None
    decode_every : int
        One image in so many is decoded; 1 = all.
    max_pixels : int
    image, label_member : str or None
        Suffixes of the members that are image and label, where samples have several.
    """

    label: str = "cls"
    class_names: tuple[str, ...] | None = None
    decode_every: int = 50
    max_pixels: int = 100_000_000
    image: str | None = None
    label_member: str | None = None


@dataclasses.dataclass
class Findings:
    """What was found in some shards; adds up.

    Attributes
    ----------
    samples, left_out, unreadable : int
        Samples that were numbered; those left out as read; shards whose rest cannot be read.
    apart, unmarked, rotated : int
        Samples that are a part of one which the tar does not keep together; tars that stop without an end mark; of the
        decoded images those that their EXIF data would turn.
    shards : list of dict
        What `pipelines.corpus.loss` needs of each.
    decoded, undecodable : int
        Of the sample of images.
    reasons, examples : Counter, dict
        By reason, digits made alike: how many, and the first few as {shard, row, key, member, reason}.
    labels, formats, sizes : Counter
        Samples by label; decoded images by format and by their shorter side (at most so many pixels).
    """

    samples: int = 0
    left_out: int = 0
    unreadable: int = 0
    decoded: int = 0
    undecodable: int = 0
    ignored: int = 0
    bytes: int = 0
    image_bytes: int = 0
    apart: int = 0
    unmarked: int = 0
    rotated: int = 0
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    reasons: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    labels: Counter = dataclasses.field(default_factory=Counter)
    formats: Counter = dataclasses.field(default_factory=Counter)
    sizes: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: "Findings") -> None:
        """Take over what was found in the shards that follow."""
        for field in dataclasses.fields(self):
            if field.name != "examples":
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        for reason, found in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + found)[:EXAMPLES]

    def leave_out(self, entry: dict[str, Any]) -> None:
        """Note one sample, or one rest of a shard, and why."""
        reason = re.sub(r"\d+", "#", entry["reason"])
        self.reasons[reason] += 1
        if len(self.examples.setdefault(reason, [])) < EXAMPLES:
            self.examples[reason].append(entry)


def validate_shard(number: int, shard: Shard, check: Check) -> Findings:
    """Ray task: what is in one shard."""
    return retrying(shard.url, lambda: _validated(number, shard, check))


def _validated(number: int, shard: Shard, check: Check) -> Findings:
    found, end = Findings(), {}
    shard = dataclasses.replace(shard, image=check.image)
    for entry in read_entries(shard, LabelSource(check.label, check.class_names, member=check.label_member), end):
        if entry.reason is not None:
            found.left_out += 1
            found.unreadable += entry.row is None
            found.leave_out(_told(number, entry, entry.reason))
            continue
        found.image_bytes += len(entry.image)
        if entry.label is not None:
            found.labels[entry.label] += 1
        if entry.row % check.decode_every == 0:
            _decode(number, entry, check, found)
    found.samples, found.ignored, found.bytes = end["samples"], end["ignored"], end["bytes"]
    found.apart, found.unmarked = end["apart"], int(not end["end_mark"])
    noted = {name: end[name] for name in ("left_out", "rest_bytes", "rest_samples")}
    found.shards.append(noted | {"rows": end["entries"] - end["left_out"], "size": end["bytes"]})
    return found


def _told(number: int, entry: Entry, reason: str) -> dict[str, Any]:
    return {"shard": number, "row": entry.row, "key": entry.key, "member": entry.member, "reason": reason}


def _decode(number: int, entry: Entry, check: Check, found: Findings) -> None:
    """Decode one image as the embedding actor would."""
    found.decoded += 1
    try:
        picture, orientation = decode_picture(entry.image, max_pixels=check.max_pixels)
    except ImageError as error:
        found.undecodable += 1
        found.leave_out(_told(number, entry, str(error)))
        return
    side = min(picture.shape[:2])
    found.rotated += orientation != 1
    found.sizes[next((size for size in SIZES if side <= size), 1 << 20)] += 1
    kind = format_of(entry.image)
    found.formats[{"jpg": "jpeg", "tif": "tiff"}.get(kind, kind)] += 1


def validate(shards: Sequence[Shard], check: Check, most_shards: int | None = None) -> dict[str, Any]:
    """Look through shards, side by side as Ray tasks.

    Parameters
    ----------
    shards : sequence of Shard
    check : Check
    most_shards : int, optional
        Of more shards than this, so many are read, evenly spread.

    Returns
    -------
    result : dict
        JSON-able: shards (listed, read), samples, left_out, lost (samples for certain, samples that unreadable rests are
        estimated to hold, bytes of these), bad_fraction (that of curate: lost samples of all, with the undecodable share
        of the decoded images put in for all), reasons, classes, formats, sizes, and what the whole
        list would hold (`estimated`) if it is like the shards that were read.
    """
    started = time.monotonic()
    places = evenly(len(shards), most_shards or len(shards))
    items = [(place, shards[place]) for place in places]
    found, progress = Findings(), Progress("validate", len(items))
    for part in in_order(validate_shard, items, check, num_cpus=CPUS_PER_SHARD):
        found.add(part)
        progress.shard(part.samples, part.left_out)
    loss = loss_of(found.shards)
    usable = found.samples - loss.certain
    broken = found.undecodable / max(1, found.decoded)
    bad = loss.certain + broken * usable
    scale = sum(shard.size for shard in shards) / max(1, sum(shard.size for _, shard in items))
    return {
        "shards": {"listed": len(shards), "read": len(items), "damaged": found.unreadable},
        "samples": found.samples,
        "left_out": found.left_out,
        "images": {
            "decoded": found.decoded,
            "undecodable": found.undecodable,
            "mean_bytes": found.image_bytes / max(1, usable),
        },
        "lost": {"certain": loss.certain, "estimated": loss.estimated, "bytes": loss.bytes},
        "bad_fraction": (bad + loss.estimated) / max(1, found.samples + loss.estimated),
        "apart": found.apart,
        "without_end_mark": found.unmarked,
        "rotated": found.rotated,
        "reasons": {
            reason: {"count": count, "kind": kind_of(found.examples[reason][0]), "examples": found.examples[reason]}
            for reason, count in found.reasons.most_common(50)
        },
        "classes": {str(label): count for label, count in sorted(found.labels.items())},
        "formats": dict(found.formats.most_common()),
        "shorter_side": {str(size): found.sizes[size] for size in sorted(found.sizes)},
        "members_ignored": found.ignored,
        "bytes": found.bytes,
        "estimated": {"samples": round(scale * found.samples), "usable": round(scale * (found.samples - bad))},
        "seconds": time.monotonic() - started,
    }


def kind_of(entry: dict[str, Any]) -> str:
    """What an entry left out is about: tar, key, label or image."""
    reason = entry["reason"]
    if entry["row"] is None:
        return "tar"
    if reason.startswith(("duplicate key", "key ", "members apart")):
        return "key"
    return "label" if re.match(r".*label|unknown class|malformed json", reason) else "image"
