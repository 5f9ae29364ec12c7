"""Corrupt: shards -> copies whose images carry a common corruption at a severity; keys, labels and order stay.

    OUT/KIND-SEVERITY/NAME.tar      one folder per corruption, each as usable as the original shards

Images are written as PNG, so that the corruption is exactly what it was computed to be. Samples that the strict reader
would leave out are left out here too, and counted. One task per shard and corruption; done ones are skipped.
"""

import dataclasses
import io
import itertools
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ops.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ops.decoding import ImageError, decode_image
from pipelines.corpus.samples import IMAGE_SUFFIXES, LabelSource, SampleNumbering, member_rank
from pipelines.corpus.shards import read_entries
from pipelines.corpus.tarstream import ByteStream, TarDamage, TarStream
from pipelines.runs import storage
from pipelines.runs.errors import UserError
from pipelines.runs.progress import Progress
from pipelines.runs.record import Shard, fingerprint
from pipelines.runs.tasks import in_order

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
RECORD = "corruption.json"


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One corruption of all shards; `seed` and a sample's place decide its randomness."""

    kind: str
    severity: int
    seed: int = 0
    max_pixels: int = 100_000_000

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.severity}"


def named_kinds(words: Sequence[str]) -> tuple[str, ...]:
    """Corruptions by name, by family (noise, blur, weather, digital), or all of the four families."""
    found: list[str] = []
    for word in words:
        if word == "all":
            found += itertools.chain.from_iterable(FAMILIES.values())
        elif word in FAMILIES:
            found += FAMILIES[word]
        elif word in CORRUPTIONS:
            found.append(word)
        else:
            raise UserError(f"{word}: expected all, {', '.join(FAMILIES)}, or one of {', '.join(CORRUPTIONS)}", "kinds")
    return tuple(dict.fromkeys(found))


def corrupt_shards(
    shards: Sequence[Shard], out: str, kinds: Sequence[str], severities: Sequence[int] = SEVERITIES, seed: int = 0
) -> dict:
    """Write corrupted copies of shards below the folder `out`.

    Parameters
    ----------
    shards : sequence of Shard
    out : str
        Local folder or URI.
    kinds : sequence of str
        Keys of `ops.corruptions.CORRUPTIONS`, or families, or "all".
    severities : sequence of int
        Each in 1 … 5.
    seed : int

    Returns
    -------
    counts : dict
        samples and left_out of all copies, also of those that were there; shards_done, shards_skipped, seconds, folders.

    Raises
    ------
    ValueError
        For a kind or severity that is none, or an `out` that cannot be written to.
    """
    kinds = named_kinds(kinds)
    for severity in severities:
        if severity not in SEVERITIES:
            raise UserError(f"{severity}: expected whole numbers from 1 to 5", "severities")
    if not kinds or not severities:
        raise UserError("at least one of each, `kinds` and `severities`")
    storage.check_writable(out)
    started = time.monotonic()
    corruptions = [Corruption(kind, severity, seed) for kind in kinds for severity in dict.fromkeys(severities)]
    names = output_names(shards)
    items = [
        (number, shard, storage.join(out, corruption.folder, name), corruption)
        for corruption in corruptions
        for number, (shard, name) in enumerate(zip(shards, names))
    ]
    records = [_record(target, shard, corruption) for _, shard, target, corruption in items]
    pending = [item for item, record in zip(items, records) if record is None]
    progress = Progress("corrupt", len(pending), skipped=len(items) - len(pending))
    copies = [record for record in records if record is not None]
    for counts in in_order(corrupt_shard, pending):
        copies.append(counts)
        progress.shard(counts["samples"], counts["left_out"])
    return {
        "samples": sum(copy["samples"] for copy in copies),
        "left_out": sum(copy["left_out"] for copy in copies),
        "shards_done": len(pending),
        "shards_skipped": len(items) - len(pending),
        "seconds": time.monotonic() - started,
        "folders": [storage.join(out, corruption.folder) for corruption in corruptions],
    }


def output_names(shards: Sequence[Shard]) -> list[str]:
    """A file name for each shard: its own, with its number in front where several have the same."""
    names = [shard.url.partition("?")[0].rstrip("/").rpartition("/")[2] for shard in shards]
    names = [re.sub(r"\.(tar\.gz|tgz)$", ".tar", name) for name in names]  # copies are not compressed
    count = Counter(names)
    return [name if count[name] == 1 else f"{number:06d}-{name}" for number, name in enumerate(names)]


def _record(target: str, shard: Shard, corruption: Corruption) -> dict | None:
    """What is noted of a copy that is there and was made from the same; None without one."""
    try:
        found = json.loads(storage.read_bytes(f"{target}.json"))
        return found if found["source"] == _source(shard, corruption) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _source(shard: Shard, corruption: Corruption) -> str:
    image = [] if shard.image is None else [shard.image]
    return fingerprint("corrupt", shard.found(), dataclasses.asdict(corruption), *image)


def corrupt_shard(number: int, shard: Shard, target: str, corruption: Corruption) -> dict[str, int]:
    """Ray task: one corrupted copy of a shard and, written last, the record that marks it done."""
    torch.set_num_threads(1)
    # Those that have an image and a key that may be written.
    good = {entry.row for entry in read_entries(shard, LabelSource("none"), {}) if entry.image is not None}
    written = bad = 0
    with (
        storage.write_atomic(target) as output,
        tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for row, members in _samples(shard, good):
            try:
                members = _corrupted(members, shard.image, (corruption.seed, number, row), corruption)
            except ImageError:  # it would be left out when it is embedded, as in the original
                bad += 1
                continue
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
            written += 1
    counts = {"samples": written, "left_out": bad}
    record = {"source": _source(shard, corruption), **dataclasses.asdict(corruption), "shard": shard.url, **counts}
    storage.write_text_atomic(f"{target}.json", json.dumps(record) + "\n")
    return counts


def _samples(shard: Shard, good: set[int]) -> Iterator[tuple[int, list[tuple[str, str, bytes]]]]:
    """(row, [(member name, suffix, bytes), …]) of the good samples of a shard, in order; one sample in memory."""
    filesystem, path = storage.open_filesystem(shard.url)
    stream = ByteStream(lambda: filesystem.open_input_stream(path, compression=None))
    numbering, row, members = SampleNumbering(), None, []
    tar = TarStream(stream)
    try:
        while (member := tar.next()) is not None:
            place = numbering.place(member)
            if place is None or place.row not in good or member.kind != "file":
                continue
            if place.row != row and members:
                yield row, members
                members = []
            row = place.row
            members.append((member.name, place.suffix, tar.body()))
    except TarDamage:
        pass  # what was whole before the damage stays, as when the shard is embedded
    finally:
        stream.close()
    if members:
        yield row, members


def _corrupted(
    members: list[tuple[str, str, bytes]], image: str | None, seed: tuple[int, int, int], corruption: Corruption
) -> list[tuple[str, bytes]]:
    """New names and bytes of a sample's members: its image corrupted and as PNG, all else, masks too, as it is."""
    ranks = [member_rank(suffix, IMAGE_SUFFIXES, image) for _, suffix, _ in members]
    chosen = ranks.index(max(ranks))
    return [
        _corrupted_image(name, data, seed, corruption) if place == chosen else (name, data)
        for place, (name, _, data) in enumerate(members)
    ]


def _corrupted_image(name: str, data: bytes, seed: tuple[int, int, int], corruption: Corruption) -> tuple[str, bytes]:
    picture = corrupt(decode_image(data, corruption.max_pixels), corruption.kind, corruption.severity, seed)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(stream, "PNG")
    return f"{name.rpartition('.')[0]}.png", stream.getvalue()
