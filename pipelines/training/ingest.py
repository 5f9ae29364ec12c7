"""Ingest: shards (or their embeddings) joined with columns of the run by (shard, row) -> training batches.

The samples are the rows of `embeddings/`, so that quarantined ones never appear. Two ways, the same batches in kind:

* resident: what fits in `cache_bytes` is read and decoded once per rank; every epoch is a full permutation.
* streaming: shards in an order drawn from (seed, epoch), a rank's share one contiguous range of their rows, shuffled
  in windows of `window` samples; images are decoded by threads ahead of the model.

Either way each of W ranks gets ceil(N / W) samples per epoch in equally many batches: nothing is lost, and at most W - 1
samples appear twice. Memory in the driver: a few numbers per shard.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.corpus.shards import iter_images
from pipelines.runs import column_groups, columns
from pipelines.runs.retries import StorageError
from pipelines.training.decode import Augmentation, PictureDecoder, ahead
from pipelines.training.groups import Resampling, scores
from pipelines.training.source import Source

CACHE_BYTES = 1 << 30
WINDOW = 8192


class Batch(NamedTuple):
    """B samples. `inputs`: (B, d) float32 or (B, 3, S, S) uint8; `index` (B,): a sample's number among all N, in
    shard order; `values`: the asked-for columns by full name, (B,) float32."""

    inputs: Tensor
    labels: Tensor
    index: Tensor
    values: dict[str, Tensor]


class Rows(NamedTuple):
    """Some samples before they are decoded: `inputs` an array (n, d), or a list of n encoded images."""

    inputs: np.ndarray | list[bytes]
    labels: np.ndarray
    index: np.ndarray
    values: dict[str, np.ndarray]


class Slice(NamedTuple):
    """A part of a shard: positions start <= i < stop among its samples, repeated ones counted as often as they come."""

    shard: int
    start: int
    stop: int


def share_of(counts: Mapping[int, int] | Iterable[int], order: Iterable[int], rank: int, world: int) -> list[Slice]:
    """A rank's share: ceil(N / W) consecutive samples of the shards laid end to end in `order`, the last ones wrapped."""
    counts = list(counts)
    order = list(order)
    total = sum(counts[shard] for shard in order)
    per_rank = -(-total // world)
    wanted, slices = per_rank, []
    position = (rank * per_rank) % total if total else 0
    for shard in itertools.cycle(order) if total else ():
        if position >= counts[shard]:
            position -= counts[shard]
            continue
        stop = min(counts[shard], position + wanted)
        slices.append(Slice(shard, position, stop))
        wanted -= stop - position
        position = 0
        if not wanted:
            break
    return slices


def read_slice(source: Source, part: Slice, first_index: int, resampling: Resampling | None = None) -> Iterator[Rows]:
    """The samples of a slice in shard order, in blocks; `first_index` is the number of the shard's first sample."""
    table = source.keys(part.shard)
    repeats = np.ones(table.num_rows, np.int64)
    if resampling is not None:
        groups = resampling.rule.assign(scores(table, resampling.rule.column), table["label"].to_numpy())
        repeats = resampling.repeats(groups, np.zeros(len(groups)))
    positions = np.repeat(np.arange(table.num_rows), repeats)[part.start : part.stop]
    if not len(positions):
        return
    rows, labels = table["row"].to_numpy(), table["label"].to_numpy()
    values = {name: scores(table, name).astype(np.float32) for name in source.columns}
    read = _read_embeddings if source.input == "embeddings" else _read_images
    done = 0
    # Blocks come in shard order, and so do positions: each block serves the next run of them.
    for block_rows, inputs in read(source, part.shard, rows[np.unique(positions)]):
        stop = np.searchsorted(rows[positions], block_rows[-1], side="right")
        mine = positions[done:stop]
        at = np.searchsorted(block_rows, rows[mine])
        taken = inputs[at] if isinstance(inputs, np.ndarray) else [inputs[i] for i in at]
        yield Rows(taken, labels[mine], first_index + mine, {name: value[mine] for name, value in values.items()})
        done = stop
    if done != len(positions):
        raise StorageError(
            f"shard {source.shards[part.shard].url}: holds {done} of the {len(positions)} samples wanted; embed it again"
        )


def _read_embeddings(source: Source, shard: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in column_groups.iter_batches(source.run_uri, columns.EMBEDDINGS, shard, ["row", "embedding"]):
        rows = batch["row"].to_numpy()
        keep = np.isin(rows, wanted, assume_unique=True)
        if keep.any():
            yield rows[keep], columns.vectors(batch["embedding"])[keep].astype(np.float32, copy=False)
        if rows[-1] >= wanted[-1]:
            return


def _read_images(source: Source, shard: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    return iter_images(source.shards[shard], wanted)


class Loader:
    """Batches of one rank. `steps` per epoch are the same on all ranks; `epoch(e)` yields exactly these.

    Parameters
    ----------
    source : Source
    counts : sequence of int
        Samples per shard, as `survey` counted them (before resampling).
    batch_size : int
        Per rank.
    rank, world : int
    seed : int
        Of shard order, shuffling and augmentation.
    training : bool
        False: shard order, no shuffle, no augmentation, no repeated sample: ranks' numbers of batches may differ.
    resampling : Resampling, optional
    expanded : sequence of int, optional
        Samples per shard after an exact resampling.
    """

    def __init__(
        self,
        source: Source,
        counts: Iterable[int],
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        training: bool = True,
        resampling: Resampling | None = None,
        expanded: Iterable[int] | None = None,
        augmentation: Augmentation | None = None,
        window: int = WINDOW,
        cache_bytes: int = CACHE_BYTES,
        width: int = 0,
        threads: int = 2,
    ):
        self.source, self.counts, self.batch_size = source, list(counts), batch_size
        self.rank, self.world, self.seed, self.training = rank, world, seed, training
        self.resampling, self.augmentation, self.window = resampling, augmentation if training else None, window
        self.expanded = list(expanded) if expanded is not None else self.counts
        self.first_index = np.concatenate([[0], np.cumsum(self.counts)])
        self.decoder = (
            PictureDecoder(source.image_size, source.max_pixels, threads, source.exif)
            if source.input == "images"
            else None
        )
        per_sample = 4 * width if source.input == "embeddings" else 3 * source.image_size**2
        self.resident = sum(self.counts) * per_sample <= cache_bytes
        self._cache: Batch | None = None

    @property
    def num_samples(self) -> int:
        """N: samples of an epoch, on all ranks."""
        return sum(self.expanded)

    @property
    def steps(self) -> int:
        """Batches of an epoch on this rank."""
        if not self.training:
            return -(-sum(p.stop - p.start for p in self._plain_share()) // self.batch_size)
        return -(-self._per_rank // self.batch_size)

    @property
    def _per_rank(self) -> int:
        return -(-self.num_samples // self.world)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; the same ones each time it is asked for."""
        if not self.training:
            return self._in_order()
        return self._from_cache(epoch) if self.resident else self._from_stream(epoch)

    def _plain_share(self) -> list[Slice]:
        """Evaluation: consecutive samples in shard order, none of them twice."""
        total = sum(self.counts)
        begin, end = self.rank * total // self.world, (self.rank + 1) * total // self.world
        bounds = [
            (s, max(0, begin - f), min(c, end - f)) for s, (c, f) in enumerate(zip(self.counts, self.first_index))
        ]
        return [Slice(shard, low, high) for shard, low, high in bounds if low < high]

    def _in_order(self) -> Iterator[Batch]:
        if self.resident:
            if self._cache is None:
                parts = list(self._decoded(_batched(self._rows(self._plain_share()), 1024)))
                self._cache = _concat(parts) if parts else None
            everything = self._cache
            for start in range(0, len(everything.labels) if everything else 0, self.batch_size):
                yield _take(everything, slice(start, start + self.batch_size))
        else:
            yield from ahead(self._decoded(_batched(self._rows(self._plain_share()), self.batch_size)))

    def _from_cache(self, epoch: int) -> Iterator[Batch]:
        if self._cache is None:
            whole = [Slice(shard, 0, count) for shard, count in enumerate(self.counts) if count]
            self._cache = _concat(list(self._decoded(_batched(self._rows(whole), 1024))))
        order = torch.from_numpy(self._order(epoch))
        batches = (_take(self._cache, order[s : s + self.batch_size]) for s in range(0, len(order), self.batch_size))
        yield from self._augmented(batches, epoch)

    def _order(self, epoch: int) -> np.ndarray:
        """This rank's samples of an epoch: every W-th of a permutation of all, wrapped to be equally many on each."""
        rng = np.random.default_rng([self.seed, epoch])
        samples = np.arange(sum(self.counts))
        if self.resampling is not None:
            values = self._cache.values[self.resampling.rule.column].numpy()
            groups = self.resampling.rule.assign(values, self._cache.labels.numpy())
            samples = np.repeat(samples, self.resampling.repeats(groups, rng.random(len(groups))))
        order = rng.permutation(samples)
        wanted = self._per_rank * self.world
        order = np.resize(order, wanted)
        return order[self.rank :: self.world]

    def _from_stream(self, epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, epoch])
        shares = share_of(self.expanded, rng.permutation(len(self.counts)), self.rank, self.world)
        exact = self.resampling is None or self.resampling.exact
        rows = self._rows(shares, self.resampling if exact else None)
        if not exact:
            rows = itertools.chain.from_iterable(
                self._resampled(self._rows(shares), np.random.default_rng([self.seed, epoch, turn]))
                for turn in itertools.count()
            )
        mine = np.random.default_rng([self.seed, epoch, self.rank])
        batches = _batched(_windows(rows, self.window, mine), self.batch_size)
        batches = _exactly(batches, self._per_rank)
        yield from ahead(self._augmented(self._decoded(batches), epoch))

    def _rows(self, slices: list[Slice], resampling: Resampling | None = None) -> Iterator[Rows]:
        for part in slices:
            yield from read_slice(self.source, part, int(self.first_index[part.shard]), resampling)

    def _resampled(self, rows: Iterator[Rows], rng: np.random.Generator) -> Iterator[Rows]:
        """Samples as often as their group's factor says, on average."""
        rule = self.resampling.rule
        for block in rows:
            groups = rule.assign(block.values[rule.column], block.labels)
            positions = np.repeat(np.arange(len(groups)), self.resampling.repeats(groups, rng.random(len(groups))))
            yield _pick(block, positions)

    def _decoded(self, batches: Iterator[Rows]) -> Iterator[Batch]:
        if self.decoder is None:
            return (_as_batch(rows, torch.from_numpy(rows.inputs)) for rows in batches)
        return (_as_batch(rows, pictures) for rows, pictures in self.decoder.decode_all(batches))

    def _augmented(self, batches: Iterator[Batch], epoch: int) -> Iterator[Batch]:
        if self.augmentation is None:
            yield from batches
            return
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, epoch, self.rank]).generate_state(1)[0])
        )
        for batch in batches:
            yield batch._replace(inputs=self.augmentation(batch.inputs, generator))


def _as_batch(rows: Rows, inputs: Tensor) -> Batch:
    values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in rows.values.items()}
    return Batch(
        inputs, torch.from_numpy(rows.labels.astype(np.int64)), torch.from_numpy(rows.index.astype(np.int64)), values
    )


def _take(batch: Batch, at: Tensor | slice) -> Batch:
    return Batch(batch.inputs[at], batch.labels[at], batch.index[at], {n: v[at] for n, v in batch.values.items()})


def _concat(batches: list[Batch]) -> Batch:
    values = {name: torch.cat([b.values[name] for b in batches]) for name in batches[0].values}
    return Batch(*(torch.cat([getattr(b, f) for b in batches]) for f in ("inputs", "labels", "index")), values)


def _pick(rows: Rows, at: np.ndarray | slice) -> Rows:
    inputs = rows.inputs
    if isinstance(inputs, np.ndarray) or isinstance(at, slice):
        taken = inputs[at]
    else:
        taken = [inputs[i] for i in at]
    return Rows(taken, rows.labels[at], rows.index[at], {name: value[at] for name, value in rows.values.items()})


def _join(blocks: list[Rows]) -> Rows:
    first = blocks[0]
    if len(blocks) == 1:
        return first
    inputs = (
        np.concatenate([b.inputs for b in blocks])
        if isinstance(first.inputs, np.ndarray)
        else [image for block in blocks for image in block.inputs]
    )
    values = {name: np.concatenate([b.values[name] for b in blocks]) for name in first.values}
    return Rows(inputs, np.concatenate([b.labels for b in blocks]), np.concatenate([b.index for b in blocks]), values)


def _batched(blocks: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Blocks of any size -> blocks of `size`, the last one smaller; order kept."""
    held: list[Rows] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block.labels)
        if count >= size:
            whole = _join(held)
            cut = count - count % size
            for start in range(0, cut, size):
                yield _pick(whole, slice(start, start + size))
            held, count = ([_pick(whole, slice(cut, count))], count - cut) if count > cut else ([], 0)
    if count:
        yield _join(held)


def _windows(blocks: Iterable[Rows], window: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Shuffle within windows of `window` consecutive samples; that many are in memory, encoded."""
    for block in _batched(blocks, window):
        yield _pick(block, rng.permutation(len(block.labels)))


def _exactly(batches: Iterable[Rows], wanted: int) -> Iterator[Rows]:
    """The first `wanted` samples of a stream of batches."""
    for batch in batches:
        size = len(batch.labels)
        yield batch if size <= wanted else _pick(batch, slice(0, wanted))
        wanted -= min(size, wanted)
        if not wanted:
            return
