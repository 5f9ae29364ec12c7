"""Is the joined stream as fast as plain webdataset with torch's DataLoader? Same shards, crop and flip, batches of 128.

    python benchmarks/bench_ingest.py [--run RUN]      (default: a run of made pictures in a temporary folder)

Images/s of one pass each, taken in turns; `resident` is a second epoch of what fits in memory.
"""

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from pipelines import columns
from pipelines.decode import Augmentation
from pipelines.ingest import Loader
from pipelines.run import CorpusConfig, Run
from pipelines.shards import expand_shards
from pipelines.source import Source

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
        columns.write(run.uri, "embeddings", shard, table.cast(columns.embeddings_schema(1, "float32", 1)), "", **facts)
    return run


def plain(run: Run, size: int, workers: int) -> DataLoader:
    """What one would write with webdataset alone."""
    augment = v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()])

    def prepare(sample: tuple) -> tuple:
        image = decode_jpeg(torch.frombuffer(bytearray(sample[0]), dtype=torch.uint8))
        return augment(image), int(sample[1])

    urls = [shard.url for shard in run.shards]
    data = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000).to_tuple("jpg", "cls").map(prepare)
    return DataLoader(data.batched(BATCH), batch_size=None, num_workers=workers)


def rate(batches: object, labels: object) -> float:
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += len(labels(batch))
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
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
        found: dict[str, list[float]] = {}
        for turn in range(options.rounds):
            ours = {"stream": stream, "resident (first epoch decodes)": resident}
            for name, loader in ours.items():
                found.setdefault(name, []).append(rate(loader.epoch(turn), lambda batch: batch.labels))
            for workers in (1, 2):
                name = f"webdataset + DataLoader, {workers} workers"
                found.setdefault(name, []).append(rate(plain(run, options.size, workers), lambda batch: batch[1]))
    print(f"{sum(counts):,} images of {options.size} px, batches of {BATCH}, images/s of each round\n")
    for name, rates in found.items():
        print(f"| {name} | {' · '.join(f'{value:,.0f}' for value in rates)} |")


if __name__ == "__main__":
    main()
