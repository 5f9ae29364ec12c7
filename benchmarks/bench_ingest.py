"""Is the joined stream as fast as plain webdataset with torch's DataLoader? Same shards, crop and flip, batches of 128.

    python benchmarks/bench_ingest.py [--run RUN]      (default: a run of made pictures in a temporary folder)

Images/s from the first batch of a pass to its last, each way in turn, and the median ratio to the better DataLoader of the same
round. The DataLoader's workers are kept over the rounds, as in a training; how long each way takes to its very first batch is
said beside it. `resident` is what the loop does with a corpus that fits in memory: only its first epoch decodes.
"""

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from pipelines.corpus.shards import expand_shards
from pipelines.runs import column_groups, columns
from pipelines.runs.record import CorpusConfig, Run
from pipelines.training.decode import Augmentation
from pipelines.training.ingest import Loader
from pipelines.training.source import Source

BATCH = 128


def made_run(folder: Path, size: int, shards: int = 8, per_shard: int = 1000) -> Run:
    """Noise pictures in shards, and embeddings of one number."""
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / "shards" / f"{shard:06d}.tar", "w") as tar:
            for row in range(per_shard):
                stream = io.BytesIO()
                coarse = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((size, size)).save(stream, "JPEG")
                for suffix, data in (("jpg", stream.getvalue()), ("cls", b"%d" % (row % 10))):
                    info = tarfile.TarInfo(f"{shard:03d}{row:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    config = CorpusConfig(encoder="none", encoder_fingerprint="none", width=1)
    run = Run.create(str(folder / "run"), config, expand_shards(str(folder / "shards")))
    for shard in range(shards):
        keys = {"key": [f"{shard:03d}{row:06d}" for row in range(per_shard)], "shard": [shard] * per_shard}
        vectors = columns.vector_array(np.zeros((per_shard, 1)), pa.float32())
        table = pa.table(
            keys | {"row": range(per_shard), "label": [r % 10 for r in range(per_shard)], "embedding": vectors}
        )
        facts = {"left_out": 0, "max_label": 9, "digest": "", "size": 0, "mtime_ns": 0}
        column_groups.write(
            run.uri, "embeddings", shard, table.cast(columns.embeddings_schema(1, "float32", 1)), "", **facts
        )
    return run


def plain(run: Run, size: int, workers: int) -> DataLoader:
    """What one would write with webdataset alone."""
    augment = v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()])

    def prepare(sample: tuple) -> tuple:
        image = decode_jpeg(torch.frombuffer(bytearray(sample[0]), dtype=torch.uint8))
        return augment(image), int(sample[1])

    urls = [shard.url for shard in run.shards]
    data = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).to_tuple("jpg", "cls").map(prepare)
    return DataLoader(data.batched(BATCH), batch_size=None, num_workers=workers, persistent_workers=True)


class Pass(NamedTuple):
    """One epoch: images/s after the first batch, and seconds until that."""

    rate: float
    first: float


def timed(labels_of_batches: Iterable) -> Pass:
    started = time.perf_counter()
    batches = iter(labels_of_batches)
    next(batches)
    first, count = time.perf_counter(), sum(len(labels) for labels in batches)
    return Pass(count / (time.perf_counter() - first), first - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(options.run) if options.run else made_run(Path(folder), options.size)
        source = Source.of(run, input="images", image_size=options.size)
        counts = [source.keys(shard).num_rows for shard in range(len(run.shards))]
        common = {"augmentation": Augmentation.named("crop_flip", options.size), "threads": options.threads}
        stream = Loader(source, counts, BATCH, cache_bytes=0, window=1000, **common)
        resident = Loader(source, counts, BATCH, **common)
        ways: dict[str, Callable[[int], Iterable]] = {
            "stream, joined": lambda turn: (batch.labels for batch in stream.epoch(turn)),
            "resident, joined": lambda turn: (batch.labels for batch in resident.epoch(turn)),
        }
        for workers in (1, 2):
            loader = plain(run, options.size, workers)
            name = f"webdataset + DataLoader, {workers} worker{'s' * (workers > 1)}"
            ways[name] = lambda turn, loader=loader: (labels for _, labels in loader)
        found = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                found[name].append(timed(way(turn)))
    report(found, sum(counts), options.size)


def report(found: dict[str, list[Pass]], images: int, size: int) -> None:
    """A table of the rounds after the first, in which everything starts."""
    print(f"{images:,} images of {size} px, batches of {BATCH}, {len(next(iter(found.values()))) - 1} rounds\n")
    print(
        "| way | images/s of each round | ratio to the better DataLoader | s to the very first batch |\n|---|---|---|---|"
    )
    rates = {name: np.array([one.rate for one in passes[1:]]) for name, passes in found.items()}
    best = np.max([value for name, value in rates.items() if "DataLoader" in name], axis=0)
    for name, value in rates.items():
        each = " · ".join(f"{one:,.0f}" for one in value)
        print(f"| {name} | {each} | {np.median(value / best):.2f} | {found[name][0].first:.2f} |")


if __name__ == "__main__":
    main()
