"""Pictures of chosen samples, fetched from their shards, and a contact sheet of the hardest and easiest per class."""

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from ops.decoding import decode_picture
from pipelines.corpus.shards import read_images
from pipelines.runs import columns, joins
from pipelines.runs.record import CorpusConfig, Run, Shard
from pipelines.runs.tasks import in_order

TILE = 72  # pixels


def extremes(run: Run, column: str, each: int) -> tuple[pa.Table, pa.Table]:
    """The `each` highest and lowest samples of every class by a column, highest first and lowest first.

    Each shard contributes only its own extremes, so the driver holds (classes × each) rows of few shards at a time.
    """
    high = low = None
    for top, bottom in in_order(_shard_extremes, [(s,) for s in range(len(run.shards))], run.uri, column, each):
        high = top if high is None else _first_of_class(pa.concat_tables([high, top]), column, each, "descending")
        low = bottom if low is None else _first_of_class(pa.concat_tables([low, bottom]), column, each, "ascending")
    assert high is not None and low is not None
    return high, low


def _shard_extremes(shard: int, run_uri: str, column: str, each: int) -> tuple[pa.Table, pa.Table]:
    """Ray task: a shard's extremes of each class."""
    table = joins.join(run_uri, shard, [column])
    table = table.filter(pa.compute.is_finite(table[column].fill_null(np.nan)))
    return _first_of_class(table, column, each, "descending"), _first_of_class(table, column, each, "ascending")


def _first_of_class(table: pa.Table, column: str, each: int, order: str) -> pa.Table:
    table = table.sort_by([("label", "ascending"), (column, order), ("shard", "ascending"), ("row", "ascending")])
    labels = columns.labels_or_minus_one(table["label"])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1]) if len(labels) else np.zeros(1, int)
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    return table.filter(pa.array(rank < each))


def fetch_images(run: Run, samples: pa.Table) -> list[bytes]:
    """The encoded image of each sample, in the table's order; every shard is read once."""
    wanted: dict[int, list[int]] = {}
    for shard, row in zip(samples["shard"].to_pylist(), samples["row"].to_pylist()):
        wanted.setdefault(shard, []).append(row)
    items = [(run.shards[shard], shard, sorted(set(rows))) for shard, rows in sorted(wanted.items())]
    found: dict[tuple[int, int], bytes] = {}
    for images in in_order(_shard_images, items):
        found |= images
    return [found[key] for key in zip(samples["shard"].to_pylist(), samples["row"].to_pylist())]


def contact_sheet(run: Run, column: str = "difficulty.rmd", each: int = 12) -> Image.Image:
    """One row per class: its `each` hardest samples at the left, its easiest at the right."""
    high, low = extremes(run, column, each)
    names, gap, margin = run.classes or ["all"], TILE // 2, 110
    sheet = Image.new("RGB", (margin + 2 * each * TILE + gap, 40 + TILE * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 12), f"hardest by {column}, first the hardest", fill="black", font_size=15)
    draw.text((margin + each * TILE + gap, 12), "easiest, first the easiest", fill="black", font_size=15)
    for side, table in enumerate((high, low)):
        place: dict[int, int] = {}
        for label, image in zip(columns.labels_or_minus_one(table["label"]).tolist(), fetch_images(run, table)):
            line, at = max(label, 0), place.get(label, 0)
            place[label] = at + 1
            x = margin + side * (each * TILE + gap) + at * TILE
            sheet.paste(thumbnail(image, run.config), (x + 2, 40 + line * TILE + 2))
    for line, name in enumerate(names):
        draw.text((8, 40 + line * TILE + TILE // 2 - 8), name[:14], fill="black", font_size=15)
    return sheet


def thumbnail(data: bytes, config: CorpusConfig, size: int = TILE - 4) -> Image.Image:
    """A square picture of `size` pixels; small ones are enlarged without smoothing, so that their pixels show."""
    picture = Image.fromarray(decode_picture(data, config.max_pixels, config.exif).pixels)
    method = Image.Resampling.NEAREST if max(picture.size) < size else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, (size, size), method)


def _shard_images(shard: Shard, position: int, rows: list[int]) -> dict[tuple[int, int], bytes]:
    """Ray task: encoded images of some rows of a shard."""
    return {(position, row): image for row, image in read_images(shard, rows)}
