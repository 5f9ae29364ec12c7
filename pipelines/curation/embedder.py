"""The actor that embeds: encoded images in, embeddings out.

On its own because it imports torch and torchvision, nine seconds of CPU in each process that does: readers, writers and a
driver that finds nothing to embed do without.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch

from ops.decoding import ImageError, decode_image
from ops.encoders import Encoder, load_encoder
from ops.images import augment
from pipelines.curation.workers import DECODERS, STEPS, Resources
from pipelines.runs import columns
from pipelines.runs.errors import concerning
from pipelines.runs.record import CorpusConfig

PIXELS_AT_ONCE = 1 << 26  # of decoded pictures per thread: 192 MiB


class EmbedImages:
    """Ray Data actor: rows with encoded images in, rows with embeddings out; the encoder is loaded once."""

    def __init__(self, config: CorpusConfig, resources: Resources):
        # One intra-op thread per actor on a CPU: two actors of one thread each beat one actor of two.
        torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
        self.config, self.device, self.batch_size = config, resources.device, resources.batch_size
        with concerning("encoder"):
            self.encoder: Encoder = load_encoder(config.encoder, l2=config.normalize).to(resources.device)
        self.decoders = ThreadPoolExecutor(DECODERS[resources.device])

    def __call__(self, table: pa.Table) -> pa.Table:
        seconds = dict.fromkeys(STEPS, 0.0)
        images = table["image"]
        rows = np.flatnonzero(images.is_valid().to_numpy(zero_copy_only=False))
        reasons: list[str | None] = table["reason"].to_pylist()
        vectors = np.zeros((table.num_rows, self.config.views, self.config.width), np.float32)
        for decoded, failed, spent in self._decoded_ahead(table, images, rows):
            seconds["decode"] += spent
            reasons = [failed.get(row, reason) for row, reason in enumerate(reasons)] if failed else reasons
            if decoded:
                kept, batch = decoded
                vectors[kept] = self._forward(batch, seconds).reshape(len(kept), self.config.views, -1)
        self._quarantine_overflow(vectors, reasons)
        return self._result(table, vectors, reasons, seconds)

    def _decoded_ahead(self, table: pa.Table, images: pa.ChunkedArray, rows: np.ndarray) -> Iterator[tuple]:
        """Decoded batches in order; threads run ahead of the model by a few batches, not by the whole block."""
        waiting: deque = deque()
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            waiting.append(self.decoders.submit(self._decode, table, images, batch))
            if len(waiting) > DECODERS[self.device] + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _decode(
        self, table: pa.Table, images: pa.ChunkedArray, rows: np.ndarray
    ) -> tuple[tuple[np.ndarray, torch.Tensor] | None, dict[int, str], float]:
        started = time.perf_counter()
        kept, pictures, prepared, failed, pixels = [], [], [], {}, 0
        for row in rows.tolist():
            try:
                picture = decode_image(images[row].as_py(), self.config.max_pixels, self.config.exif)
            except ImageError as error:
                failed[row] = str(error)
                continue
            kept.append(row)
            pictures.append(picture)
            for view in range(1, self.config.views):
                seed = (table["shard"][row].as_py(), table["row"][row].as_py(), view)
                pictures.append(augment(picture, seed))
            pixels += self.config.views * picture.shape[1] * picture.shape[2]
            if pixels > PIXELS_AT_ONCE:  # full-size pictures are let go early, only what the encoder sees is kept
                prepared.append(self.encoder.prepare(pictures))
                pictures, pixels = [], 0
        if pictures:
            prepared.append(self.encoder.prepare(pictures))
        decoded = (np.array(kept), torch.cat(prepared)) if kept else None
        return decoded, failed, time.perf_counter() - started

    def _forward(self, batch: torch.Tensor, seconds: dict[str, float]) -> np.ndarray:
        """Embeddings of a prepared batch; halves the batch where the GPU's memory is too small for it.

        The encoder always sees full batches: its kernels give an image other last digits in a batch of another size, and
        then scores would depend on how the corpus is cut into shards.
        """
        rows, full = len(batch), self.batch_size * self.config.views
        if rows > full:
            return np.concatenate([self._forward(part, seconds) for part in batch.split(full)])
        padded = torch.cat([batch, batch.new_zeros(full - rows, *batch.shape[1:])])
        try:
            started = time.perf_counter()
            on_device = padded.to(self.device)
            moved = time.perf_counter()
            result = self.encoder.encode(on_device, autocast=self.device == "cuda").float().cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            torch.cuda.empty_cache()
            self.batch_size //= 2
            return self._forward(batch, seconds)
        seconds["transfer"] += moved - started
        seconds["model"] += time.perf_counter() - moved
        return result[:rows]

    def _quarantine_overflow(self, vectors: np.ndarray, reasons: list[str | None]) -> None:
        limit = np.finfo(self.config.dtype).max
        for row in np.flatnonzero(~(np.abs(vectors) <= limit).all(axis=(1, 2))):
            reasons[row] = reasons[row] or f"embedding is not finite in {self.config.dtype}"
            vectors[row] = 0

    def _result(
        self, table: pa.Table, vectors: np.ndarray, reasons: list[str | None], seconds: dict[str, float]
    ) -> pa.Table:
        value = {"float16": pa.float16(), "float32": pa.float32()}[self.config.dtype]
        result = table.drop_columns(["image", "reason"])
        result = result.append_column("reason", pa.array(reasons, pa.string()))
        result = result.append_column("embedding", columns.vector_array(vectors[:, 0], value))
        if self.config.views > 1:
            augmented = vectors[:, 1:].reshape(len(vectors), -1)
            result = result.append_column("augmented", columns.vector_array(augmented, value))
        noted = [json.dumps(seconds)] + [None] * (table.num_rows - 1)
        return result.append_column("seconds", pa.array(noted, pa.string()))
