"""The worker that embeds a shard: a plain class, which needs no Ray.

    reader thread (ahead by bytes) -> decode threads -> batches, across pieces -> encoder -> tables, row group by row group

On its own because it imports torch, seconds of CPU in each process that does: a driver does without.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ops.decoding import ImageError, decode_picture
from ops.encoders import Encoder, load_encoder
from ops.images import augment
from pipelines.corpus.loss import READER_FACTS
from pipelines.corpus.readahead import read_ahead
from pipelines.corpus.samples import Entry, label_source
from pipelines.corpus.shards import read_entries
from pipelines.curation.embed import embedding_source
from pipelines.curation.workers import STEPS, Resources
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed, concerning
from pipelines.runs.executor import Output, Task
from pipelines.runs.isolated import InHand, Suspects
from pipelines.runs.record import CorpusConfig

READ_AHEAD_BYTES = 64 << 20
PIECE_BYTES = 16 << 20  # of encoded images that a thread decodes at once, at most a batch
PIXELS_AT_ONCE = 1 << 26  # of decoded pictures per thread: 192 MiB
GROUP_BYTES = 32 << 20  # of embeddings that wait for their row group
FAILURES = 10  # samples in a row for which the encoder raises: it raises for every one


class Sample(NamedTuple):
    """A decoded sample as its row says it: `width` and `height` in pixels, where its image lies, half of its SHA-256."""

    key: str
    row: int
    label: int | None
    width: int
    height: int
    offset: int | None
    bytes: int
    sha256: bytes
    member: str | None


class Piece(NamedTuple):
    """Some samples of a shard in order, decoded: uint8 (n · views, 3, S, S), or None without a good one."""

    samples: list[Sample]
    pictures: torch.Tensor | None
    seconds: float
    rotated: int  # of the samples: how many their EXIF data turns, or would turn


class Embedder:
    """Embeds shards: `run(task)` gives the tables of `embeddings/`, and writes the quarantine file if a run is given.

    Parameters
    ----------
    config : CorpusConfig
    resources : Resources
    run_uri : str, optional
        Where the quarantine file goes.
    """

    in_hand, suspects = InHand(), Suspects()

    def __init__(self, config: CorpusConfig, resources: Resources, run_uri: str | None = None):
        # One intra-op thread per worker on a CPU: two workers of one thread each beat one worker of two.
        torch.set_num_threads(max(1, int(resources.cpus_per_worker)))
        self.config, self.resources, self.run_uri = config, resources, run_uri
        self.batch_size, self.failed_in_a_row = resources.batch_size, 0
        self.labels = label_source(config)
        self.schema = columns.embeddings_schema(config.width, config.dtype, config.views)
        with concerning("encoder"):
            self.encoder: Encoder = load_encoder(config.encoder, l2=config.normalize).to(resources.device)
        self.layout = self._best_layout()
        self.decoders = ThreadPoolExecutor(resources.decode_threads)

    def _best_layout(self) -> torch.memory_format:
        """Channels last, which convolutions compute faster; not for an encoder that takes views of its activations."""
        blank = torch.zeros(1, 3, self.encoder.image_size, self.encoder.image_size, dtype=torch.uint8)
        self.encoder.module.to(memory_format=torch.channels_last)
        try:
            self.encoder.encode(blank.to(self.resources.device, memory_format=torch.channels_last))
        except RuntimeError:
            self.encoder.module.to(memory_format=torch.contiguous_format)
            return torch.contiguous_format
        return torch.channels_last

    def run(self, task: Task) -> Output:
        """One shard; see `pipelines.runs.executor`. A StorageError if it cannot be read."""
        facts: dict[str, Any] = {}
        notes: dict[str, Any] = {}
        return Output(self._tables(task, facts, notes), facts, notes, self.schema)

    def _tables(self, task: Task, facts: dict, notes: dict) -> Iterator[pa.Table]:
        seconds, end = dict.fromkeys(STEPS, 0.0), {}
        rows = Rows(task.shard, self.config, self.schema)
        entries = read_ahead(read_entries(task.entry, self.labels, end), _size, READ_AHEAD_BYTES)
        pieces = self._decoded(self._usable(entries, rows), task.shard, rows)
        for samples, vectors in self._encoded(self._batches(pieces, seconds), rows, seconds):
            rows.add(samples, vectors)
            if rows.waiting_bytes >= GROUP_BYTES:
                yield rows.table()
        yield rows.table()
        if rows.count + len(rows.bad) != end["entries"]:
            raise StageFailed(
                f"shard {task.shard}: {end['entries']} entries read, {rows.count} embedded + {len(rows.bad)} left out"
            )
        facts |= {
            "source": embedding_source(self.config, end["digest"]),
            "left_out": len(rows.bad),
            "max_label": rows.max_label,
            "rotated": rows.rotated,
            **{name: end[name] for name in READER_FACTS},
            "size": task.entry.size,
            "mtime_ns": task.entry.mtime_ns,
        }
        if self.run_uri is not None:
            column_groups.write(self.run_uri, columns.QUARANTINE, task.shard, rows.quarantine(), facts["source"])
        notes |= {"left_out": len(rows.bad), "seconds": seconds | {"read": end["seconds"]}}

    def _usable(self, entries: Iterable[Entry], rows: "Rows") -> Iterator[Entry]:
        for entry in entries:
            reason = entry.reason or self.suspects.bad.get(entry.row)
            if reason is None:
                yield entry
            else:
                rows.leave_out(entry.row, entry.key, entry.member, reason)

    def _decoded(self, entries: Iterator[Entry], shard: int, rows: "Rows") -> Iterator[Piece]:
        """Decoded pieces in order; threads run ahead of the encoder by a few pieces, not by the whole shard."""
        waiting: deque[Future] = deque()
        for piece in self._pieces(entries):
            waiting.append(self.decoders.submit(self._decode, piece, shard, rows))
            if self.suspects.careful or len(waiting) > self.resources.decode_threads:
                yield rows.counted(waiting.popleft().result())
        while waiting:
            yield rows.counted(waiting.popleft().result())

    def _pieces(self, entries: Iterator[Entry]) -> Iterator[list[Entry]]:
        piece, size = [], 0
        for entry in entries:
            alone = self.suspects.go_alone("decode", entry.row)
            if piece and (alone or len(piece) == self.batch_size or size + len(entry.image) > PIECE_BYTES):
                yield piece
                piece, size = [], 0
            piece.append(entry)
            size += len(entry.image)
            if alone:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece

    def _decode(self, piece: list[Entry], shard: int, rows: "Rows") -> Piece:
        started = time.perf_counter()
        samples, pictures, prepared, pixels, rotated = [], [], [], 0, 0
        with self.in_hand.hold("decode", piece[0].row, piece[-1].row):
            for entry in piece:
                try:
                    decoded = decode_picture(entry.image, self.config.max_pixels, self.config.exif)
                except ImageError as error:
                    rows.leave_out(entry.row, entry.key, entry.member, str(error))
                    continue
                picture = torch.from_numpy(decoded.pixels).permute(2, 0, 1)
                rotated += decoded.orientation != 1
                samples.append(_sample(entry, picture))
                views = range(1, self.config.views)
                pictures += [picture, *(augment(picture, (shard, entry.row, view)) for view in views)]
                pixels += self.config.views * picture.shape[1] * picture.shape[2]
                if pixels > PIXELS_AT_ONCE:  # full-size pictures are let go early, only what the encoder sees is kept
                    prepared.append(self.encoder.resize(pictures))
                    pictures, pixels = [], 0
            if pictures:
                prepared.append(self.encoder.resize(pictures))
        whole = torch.cat(prepared) if len(prepared) > 1 else prepared[0] if prepared else None
        if whole is not None and self.resources.device == "cuda":
            whole = whole.pin_memory()
        return Piece(samples, whole, time.perf_counter() - started, rotated)

    def _batches(
        self, pieces: Iterable[Piece], seconds: dict[str, float]
    ) -> Iterator[tuple[list[Sample], torch.Tensor]]:
        """Full batches, whatever the pieces, and one with the rest of the shard."""
        samples, parts, views = [], [], self.config.views
        for piece in pieces:
            seconds["decode"] += piece.seconds
            if piece.pictures is None:
                continue
            samples += piece.samples
            parts.append(piece.pictures)
            while size := self._next_batch(samples):
                pictures = torch.cat(parts) if len(parts) > 1 else parts[0]
                yield samples[:size], pictures[: size * views]
                samples, parts = samples[size:], [pictures[size * views :]]
        if samples:
            yield samples, torch.cat(parts)

    def _next_batch(self, samples: list[Sample]) -> int:
        """How many of these samples make the next batch, 0 if more are needed; a suspect is alone in its batch."""
        if self.suspects.alone:
            for place, sample in enumerate(samples[: self.batch_size]):
                if self.suspects.go_alone("encode", sample.row):
                    return max(1, place)
        return self.batch_size if len(samples) >= self.batch_size else 0

    def _encoded(
        self, batches: Iterable[tuple[list[Sample], torch.Tensor]], rows: "Rows", seconds: dict[str, float]
    ) -> Iterator[tuple[list[Sample], np.ndarray]]:
        """Samples and their embeddings (n, views, d) float32; a GPU computes one batch while the next one is sent."""
        depth = 1 if self.resources.device == "cuda" and not self.suspects.careful else 0
        waiting: deque = deque()
        for samples, pictures in batches:
            taken = self.in_hand.take("encode", samples[0].row, samples[-1].row)
            waiting.append((taken, *self._sent(samples, pictures, rows, seconds)))
            if len(waiting) > depth:
                yield self._received(*waiting.popleft(), seconds)
        while waiting:
            yield self._received(*waiting.popleft(), seconds)

    def _sent(
        self, samples: list[Sample], pictures: torch.Tensor, rows: "Rows", seconds: dict[str, float]
    ) -> tuple[list[Sample], torch.Tensor]:
        """A batch's embeddings, on a GPU perhaps still being computed; where the encoder raises, sample by sample."""
        try:
            result = self._forward(pictures, seconds)
        except Exception as error:
            self._give_up_on(error)
            if len(samples) > 1:
                return self._sent_one_by_one(samples, pictures, rows, seconds)
            self._leave_out(samples[0], error, rows)
            return [], torch.zeros(0, self.config.width)
        self.failed_in_a_row = 0
        return samples, result

    def _sent_one_by_one(
        self, samples: list[Sample], pictures: torch.Tensor, rows: "Rows", seconds: dict[str, float]
    ) -> tuple[list[Sample], torch.Tensor]:
        parts = [
            self._sent([sample], part, rows, seconds)
            for sample, part in zip(samples, pictures.split(self.config.views))
        ]
        return [sample for good, _ in parts for sample in good], torch.cat([result for _, result in parts])

    def _give_up_on(self, error: Exception) -> None:
        """After an error of the GPU itself every later call fails: only another process can go on."""
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            if self.in_hand.noted:
                os._exit(1)
            raise error

    def _leave_out(self, sample: Sample, error: Exception, rows: "Rows") -> None:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.leave_out(sample.row, sample.key, sample.member, f"the encoder fails: {told}")
        self.failed_in_a_row += 1
        if self.failed_in_a_row == FAILURES:
            raise StageFailed(f"embed: the encoder fails for every sample, {FAILURES} in a row: {told}")

    def _received(
        self, taken: int, samples: list[Sample], result: torch.Tensor, seconds: dict[str, float]
    ) -> tuple[list[Sample], np.ndarray]:
        started = time.perf_counter()
        vectors = result.float().cpu().numpy().reshape(len(samples), self.config.views, self.config.width)
        seconds["model"] += time.perf_counter() - started
        self.in_hand.release(taken)
        self.in_hand.passed(len(samples))
        return samples, vectors

    def _forward(self, batch: torch.Tensor, seconds: dict[str, float]) -> torch.Tensor:
        """Embeddings of a batch uint8 (n, 3, S, S); halves the batch where the GPU's memory is too small for it.

        The encoder always sees full batches: its kernels give an image other last digits in a batch of another size, and
        then scores would depend on how the corpus is cut into shards.
        """
        rows, full = len(batch), self.batch_size * self.config.views
        if rows > full:
            return torch.cat([self._forward(part, seconds) for part in batch.split(full)])
        if rows < full:
            batch = torch.cat([batch, batch.new_zeros(full - rows, *batch.shape[1:])])
        try:
            started = time.perf_counter()
            batch = batch.contiguous(memory_format=self.layout)
            if self.resources.device == "cuda":
                batch = batch.pin_memory()
            on_device = batch.to(self.resources.device, non_blocking=True)
            moved = time.perf_counter()
            result = self.encoder.encode(on_device, autocast=self.resources.precision == "bfloat16")
        except torch.cuda.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            torch.cuda.empty_cache()
            self.batch_size //= 2
            return self._forward(batch[:rows], seconds)
        seconds["transfer"] += moved - started
        seconds["model"] += time.perf_counter() - moved
        return result[:rows]


class Rows:
    """The rows of a shard: those that wait for their row group, and what is left out."""

    def __init__(self, shard: int, config: CorpusConfig, schema: pa.Schema):
        self.shard, self.config, self.schema = shard, config, schema
        self.bad: list[dict[str, Any]] = []
        self.count, self.max_label, self.rotated = 0, None, 0
        self._samples: list[Sample] = []
        self._vectors: list[np.ndarray] = []
        self._value = {"float16": pa.float16(), "float32": pa.float32()}[config.dtype]

    @property
    def waiting_bytes(self) -> int:
        return sum(part.nbytes for part in self._vectors)

    def counted(self, piece: Piece) -> Piece:
        """The same piece, once what was seen of its pictures is added up."""
        self.rotated += piece.rotated
        return piece

    def leave_out(self, row: int | None, key: str | None, member: str | None, reason: str) -> None:
        """Note a sample, or a shard's unreadable rest, and why."""
        entry = {"shard": self.shard, "row": row, "key": key, "member": member, "stage": "embed", "reason": reason}
        self.bad.append(entry)

    def add(self, samples: list[Sample], vectors: np.ndarray) -> None:
        """Samples with their embeddings (n, views, d); those that do not fit the stored precision are left out."""
        good = (np.abs(vectors) <= np.finfo(self.config.dtype).max).all(axis=(1, 2))
        for place in np.flatnonzero(~good):
            sample = samples[place]
            reason = f"embedding is not finite in {self.config.dtype}"
            self.leave_out(sample.row, sample.key, sample.member, reason)
        self._samples += [sample for sample, fine in zip(samples, good) if fine]
        self._vectors.append(vectors[good])
        self.count += int(good.sum())

    def table(self) -> pa.Table:
        """What waits, as rows of `embeddings/`."""
        samples, views, width = self._samples, self.config.views, self.config.width
        vectors = np.concatenate(self._vectors) if self._vectors else np.zeros((0, views, width), np.float32)
        self._samples, self._vectors = [], []
        data = {name: [getattr(sample, name) for sample in samples] for name in ("key", "row", *columns.IMAGE_NAMES)}
        labels = [sample.label for sample in samples]
        known = [label for label in (*labels, self.max_label) if label is not None]
        self.max_label = max(known, default=None)
        data |= {"shard": [self.shard] * len(samples), "label": labels}
        arrays = {name: pa.array(values, self.schema.field(name).type) for name, values in data.items()}
        arrays["embedding"] = columns.vector_array(vectors[:, 0], self._value)
        if views > 1:
            arrays["augmented"] = columns.vector_array(vectors[:, 1:].reshape(len(samples), -1), self._value)
        return pa.table([arrays[name] for name in self.schema.names], schema=self.schema)

    def quarantine(self) -> pa.Table:
        """What is left out, in the order of the rows, a shard's rest last."""
        bad = sorted(self.bad, key=lambda entry: (entry["row"] is None, entry["row"]))
        return pa.Table.from_pylist(bad, schema=columns.QUARANTINE_SCHEMA)


def _sample(entry: Entry, picture: torch.Tensor) -> Sample:
    height, width = picture.shape[1:]
    half = hashlib.sha256(entry.image).digest()[:16]
    return Sample(entry.key, entry.row, entry.label, width, height, entry.offset, len(entry.image), half, entry.member)


def _size(entry: Entry) -> int:
    return 256 + len(entry.image or b"")
