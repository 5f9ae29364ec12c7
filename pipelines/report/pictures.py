"""Small pictures of chosen samples for the report, from the original shards, within a number and an amount to read."""

import base64
import io
from collections.abc import Iterable, Sequence
from itertools import accumulate

import pyarrow as pa
from PIL import Image

from ops.decoding import ImageError, decode_picture
from pipelines.corpus.shards import ShardChanged, read_images
from pipelines.report.scan import Limits
from pipelines.runs.record import Run, Shard
from pipelines.runs.retries import StorageError
from pipelines.runs.tasks import in_order

SIZE = 128  # pixels of the longer side; smaller pictures stay as they are
QUALITY = 80
Place = tuple[int, int]  # shard and row


def pictures(run: Run, wanted: Iterable[Place], limits: Limits, size: int = SIZE) -> tuple[dict[Place, str], list[str]]:
    """Thumbnails of samples, the most wanted first.

    Parameters
    ----------
    run : Run
    wanted : iterable of (shard, row)
        In order of importance.
    limits : Limits
        At most `pictures` of them and `picture_chars` of base64, from the shards of the most wanted ones up to
        `read_bytes` in all.
    size : int
        Pixels of the longer side at most; smaller pictures stay as they are.

    Returns
    -------
    thumbnails : dict of (shard, row) -> str
        WebP as base64.
    notes : list of str
        Shards that could not be read any more: their samples stay without a picture.
    """
    wanted = list(dict.fromkeys(wanted))
    by_shard = _affordable(run, wanted, limits)
    items = [(run.shards[shard], shard, tuple(sorted(rows))) for shard, rows in sorted(by_shard.items())]
    found: dict[Place, str] = {}
    notes = []
    for part, problem in in_order(_shard_thumbnails, items, run.config.max_pixels, size):
        found |= part
        notes += [problem] if problem else []
    return _fitting({place: found[place] for place in wanted if place in found}, limits.picture_chars), notes


def _fitting(thumbnails: dict[Place, str], most: int) -> dict[Place, str]:
    """The first thumbnails that have at most so many characters together."""
    ends = accumulate(map(len, thumbnails.values()))
    return {place: picture for (place, picture), end in zip(thumbnails.items(), ends) if end <= most}


def _affordable(run: Run, wanted: Iterable[Place], limits: Limits) -> dict[int, set[int]]:
    shards = run.shards
    chosen: dict[int, set[int]] = {}
    left, count = limits.read_bytes, 0
    for shard, row in wanted:
        if count >= limits.pictures:
            break
        if shard not in chosen:
            if shards[shard].size > left and chosen:
                continue
            left -= shards[shard].size
            chosen[shard] = set()
        chosen[shard].add(row)
        count += 1
    return chosen


def _shard_thumbnails(
    shard: Shard, position: int, rows: Sequence[int], max_pixels: int, size: int
) -> tuple[dict[Place, str], str | None]:
    """Ray task: thumbnails of some rows of a shard, and what was wrong with it."""
    try:
        images = read_images(shard, rows)
    except ShardChanged as error:
        return {}, str(error)
    except StorageError as error:
        return {}, f"{error}; its samples have no picture here"
    found = {(position, row): thumbnail(image, max_pixels, size, shard.exif) for row, image in images}
    return {place: picture for place, picture in found.items() if picture}, None


def thumbnail(data: bytes, max_pixels: int, size: int = SIZE, exif: str = "ignore") -> str | None:
    """An encoded image as base64 of a WebP whose longer side is at most `size` pixels; None if it is no image any more.

    Decoded as for the encoder, so the report shows what the encoder saw.
    """
    try:
        picture = Image.fromarray(decode_picture(data, max_pixels, exif).pixels)
    except ImageError:
        return None
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=QUALITY, method=4)
    return base64.b64encode(stream.getvalue()).decode()


def places(table: pa.Table) -> list[Place]:
    """(shard, row) of each row of a table."""
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist()))
