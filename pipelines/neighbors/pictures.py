"""What duplicates are told by: bytes, size and fingerprint of each picture of a shard, in one reading of it.

Reading the candidates alone would hardly save anything, though it was not measured: nearly every sample is among the ten
nearest of another one, so that as many pictures would be read and decoded, in as many requests.
"""

import hashlib

import numpy as np
import pyarrow as pa

from ops.decoding import ImageError, decode_picture
from ops.fingerprints import SIDE, fingerprint
from pipelines.corpus.shards import iter_images
from pipelines.corpus.tarstream import StorageError
from pipelines.runs.record import CorpusConfig, Shard

_SIZES = dict.fromkeys(("width", "height", "bytes"), pa.int64())
PICTURE_FIELDS = {"sha256": pa.binary(16), "fingerprint": pa.binary(SIDE * SIDE)} | _SIZES


def pictures_of(shard: Shard, rows: np.ndarray, config: CorpusConfig) -> pa.Table:
    """PICTURE_FIELDS of the ascending rows (n,) of a shard, which is read once; null where it cannot be read any more."""
    found: dict[int, tuple] = {}
    try:
        for places, images in iter_images(shard, rows):
            for row, data in zip(places.tolist(), images):
                found[row] = _about(data, config)
    except (StorageError, FileNotFoundError):
        pass  # what was read before counts; the others have no picture, which is counted and said
    values = [found.get(row, (None,) * len(PICTURE_FIELDS)) for row in rows.tolist()]
    arrays = [pa.array([value[i] for value in values], kind) for i, kind in enumerate(PICTURE_FIELDS.values())]
    return pa.table(arrays, names=list(PICTURE_FIELDS))


def _about(data: bytes, config: CorpusConfig) -> tuple:
    try:
        pixels = decode_picture(data, max_pixels=config.max_pixels, exif=config.exif).pixels
    except ImageError:  # it decoded when it was embedded: the shard holds another picture now
        return (None,) * len(PICTURE_FIELDS)
    height, width = pixels.shape[:2]
    return hashlib.sha256(data).digest()[:16], fingerprint(pixels).tobytes(), width, height, len(data)
