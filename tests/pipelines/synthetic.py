"""A small run made by hand: real tar shards and real embeddings files, without an encoder."""

import io
import tarfile

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.corpus.shards import expand_shards
from pipelines.runs import column_groups, columns
from pipelines.runs.record import CorpusConfig, Run


def picture(value: int, size: int = 8) -> bytes:
    """A PNG of one grey value."""
    stream = io.BytesIO()
    Image.new("L", (size, size), value % 256).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder, sizes, classes=3, seed=0, first=0):
    """Shards of `sizes` samples each, keys s000000 …, random labels; returns the labels of all of them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    labels, count = [], 0
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{first + number:06d}.tar", "w") as tar:
            for _ in range(size):
                label = int(rng.integers(classes))
                for suffix, data in (("png", picture(count)), ("cls", str(label).encode()), ("txt", b"kept")):
                    info = tarfile.TarInfo(f"s{count:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                labels.append(label)
                count += 1
    return np.array(labels, np.int64)


def make_run(folder, sizes=(40, 25, 35), classes=3, dim=6, seed=0, labelled=True, views=1):
    """A run whose embeddings are Gaussian clusters; returns (run, features, labels) in corpus order.

    Features are (N, dim), with several views (N, views, dim).
    """
    labels = write_shards(folder / "shards", sizes, classes, seed)
    rng = np.random.default_rng(seed + 1)
    centers = 2 * rng.normal(size=(classes, dim))
    features = (centers[labels] + rng.normal(size=(len(labels), dim)) @ rng.normal(size=(dim, dim))).astype(np.float32)
    if views > 1:
        features = features[:, None] + 0.3 * rng.normal(size=(len(labels), views, dim)).astype(np.float32)
    label = "cls" if labelled else "none"
    config = CorpusConfig(encoder="by hand", encoder_fingerprint="0", width=dim, label=label, views=views)
    run = Run.create(str(folder / "run"), config, expand_shards(str(folder / "shards")))
    schema = columns.embeddings_schema(dim, "float32", views)
    start = 0
    for shard, size in enumerate(sizes):
        rows = slice(start, start + size)
        found = features[rows].reshape(size, views * dim)
        others = {field.name: pa.nulls(size, field.type) for field in columns.IMAGE_FIELDS}
        if views > 1:
            others["augmented"] = columns.vector_array(found[:, dim:], pa.float32())
        table = (
            pa.table(
                others
                | {
                    "key": [f"s{index:06d}" for index in range(start, start + size)],
                    "shard": [shard] * size,
                    "row": list(range(size)),
                    "label": labels[rows] if labelled else [None] * size,
                    "embedding": columns.vector_array(found[:, :dim], pa.float32()),
                }
            )
            .select(schema.names)
            .cast(schema)
        )
        facts = {
            "left_out": 0,
            "max_label": int(labels[rows].max()) if labelled and size else None,
            "digest": str(shard),
            "size": 0,
            "mtime_ns": 0,
        }
        column_groups.write(run.uri, columns.EMBEDDINGS, shard, table, f"by hand {seed} {shard}", **facts)
        start += size
    run.set_classes([str(label) for label in range(classes)] if labelled else [])
    run.finish_stage("embed", rows=len(labels), left_out=0, seconds=0.0)
    return run, features, labels
