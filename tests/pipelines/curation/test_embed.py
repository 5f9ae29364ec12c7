"""The embedding worker by itself: what it does to a shard, without Ray."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ops.decoding import decode_image
from ops.encoders import load_encoder
from pipelines.corpus.shards import expand_shards
from pipelines.curation import embedder as embedder_module
from pipelines.curation.embed import make_embedder
from pipelines.curation.embedder import Embedder
from pipelines.curation.workers import Resources
from pipelines.runs import column_groups, columns
from pipelines.runs.errors import StageFailed
from pipelines.runs.executor import Task, write_file
from pipelines.runs.isolated import IsolatedWorker
from pipelines.runs.record import CorpusConfig

FACTORY = """
import os, time, torch

class Net(torch.nn.Module):
    image_size, mean, std, interpolation = 32, (0.5,) * 3, (0.5,) * 3, "bilinear"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 24, 3))

    def forward(self, x):
        return self.net(x).mean((2, 3))

class Views(Net):
    # Takes a view of its activations, which only a contiguous layout allows.
    def forward(self, x):
        return self.net(x).view(len(x), 24, -1).mean(2)

class Poisoned(Net):
    # Does `what` where a picture of the batch is `sees`: the red or the green one, or any but a blank one.
    def __init__(self, what, sees):
        super().__init__()
        self.what, self.sees = what, sees

    def forward(self, x):
        red, green = (x[:, 0] > 0.9).float().mean((1, 2)) > 0.9, (x[:, 1] > 0.9).float().mean((1, 2)) > 0.9
        poison = {"red": red & ~green, "any": (x > -0.99).any(dim=(1, 2, 3)) if x.ndim == 4 else red}[self.sees]
        if poison.any():
            self.what()
        return super().forward(x)

def net():
    return Net()

def views():
    return Views()

def exits():
    return Poisoned(lambda: os._exit(7), "red")

def sleeps():
    return Poisoned(lambda: time.sleep(3600), "red")

def fails():
    raise ValueError("the red one")

def raises():
    return Poisoned(fails, "red")

def raises_always():
    return Poisoned(fails, "any")

def exits_always():
    return Poisoned(lambda: os._exit(7), "any")
"""


def colour(rgb, size=16):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(stream, "PNG")
    return stream.getvalue()


RED = colour((255, 0, 0))


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    return lambda factory="net": f"module:{tmp_path}/net.py:{factory}"


@pytest.fixture
def worker(spec):
    """worker(batch_size, factory, **config): an Embedder over a small convolutional encoder."""

    def make(batch_size=8, factory="net", run_uri=None, threads=1, **config):
        resources = Resources(batch_size=batch_size, decode_threads=threads)
        return Embedder(CorpusConfig(spec(factory), "", width=24, **config), resources, run_uri)

    return make


@pytest.fixture
def task(tmp_path, make_shard):
    """task(images): a shard of these, all of class 1."""

    def make(images, number=0):
        samples = [(f"k{place}", {"png": image, "cls": b"1"}) for place, image in enumerate(images)]
        (shard,) = expand_shards(make_shard(tmp_path / f"shards/{number}.tar", samples))
        return Task(number, shard, "")

    return make


def embedded(worker, task):
    """All rows of a shard, the facts, the notes."""
    output = worker.run(task)
    return pa.concat_tables(output.tables), output.facts, output.notes


def test_rows_are_the_encoders_features_and_where_each_image_lies(worker, spec, task, make_image):
    images = [make_image(i, size=20 + i, format="PNG") for i in range(11)]
    found = task(images)
    table, facts, notes = embedded(worker(), found)
    encoder = load_encoder(spec())
    expected = encoder.encode(encoder.prepare([decode_image(image) for image in images])).numpy()
    np.testing.assert_allclose(columns.vectors(table["embedding"]), expected, rtol=1e-4, atol=1e-5)
    assert table["row"].to_pylist() == list(range(11)) and table["label"].to_pylist() == [1] * 11
    assert table["width"].to_pylist() == table["height"].to_pylist() == [20 + i for i in range(11)]
    whole = Path(found.entry.url).read_bytes()
    for image, offset, size, half in zip(images, *(table[name].to_pylist() for name in ("offset", "bytes", "sha256"))):
        assert whole[offset : offset + size] == image and half == hashlib.sha256(image).digest()[:16]
    assert facts["digest"] == hashlib.sha256(whole).hexdigest()
    assert facts["max_label"] == 1 and facts["left_out"] == 0 and notes["seconds"]["model"] > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_threads_and_row_groups_change_no_bit(worker, task, make_image, monkeypatch, threads):
    images = [make_image(i, size=40) for i in range(29)]
    whole, _, _ = embedded(worker(), task(images))
    monkeypatch.setattr(embedder_module, "PIXELS_AT_ONCE", 2000)
    monkeypatch.setattr(embedder_module, "PIECE_BYTES", 3000)
    monkeypatch.setattr(embedder_module, "GROUP_BYTES", 500)
    cut = worker(threads=threads)
    assert len(list(cut.run(task(images)).tables)) > 3
    table, _, _ = embedded(cut, task(images))
    assert table.combine_chunks().equals(whole.combine_chunks())
    alone = np.concatenate([columns.vectors(embedded(cut, task([image]))[0]["embedding"]) for image in images])
    assert np.array_equal(columns.vectors(whole["embedding"]), alone)


def test_an_encoder_that_takes_views_of_its_activations_keeps_its_layout(worker, task, make_image):
    images = [make_image(i) for i in range(3)]
    views, net = (columns.vectors(embedded(worker(factory=f), task(images))[0]["embedding"]) for f in ("views", "net"))
    np.testing.assert_allclose(views, net, rtol=1e-4, atol=1e-5)


def test_bad_images_go_to_quarantine_and_cost_themselves_only(worker, task, make_image, tmp_path):
    run = str(tmp_path / "run")
    found = task([make_image(0), b"no image", make_image(1)])
    note = write_file(worker(run_uri=run), found, run, "embeddings")
    assert (note["rows"], note["left_out"]) == (2, 1)
    assert column_groups.read(run, "embeddings", 0)["row"].to_pylist() == [0, 2]
    (bad,) = column_groups.read(run, "quarantine", 0).to_pylist()
    assert (bad["row"], bad["key"], bad["stage"]) == (1, "k1", "embed") and bad["reason"]
    facts = column_groups.facts(run, "embeddings", 0)
    assert facts["source"] == column_groups.facts(run, "quarantine", 0)["source"] and facts["left_out"] == 1


def test_an_embedding_that_overflows_is_left_out(worker, task, make_image):
    made = worker(dtype="float16")
    with torch.no_grad():
        made.encoder.module.net[2].bias.fill_(1e6)
    table, facts, _ = embedded(made, task([make_image(0)]))
    assert table.num_rows == 0 and facts["left_out"] == 1 and facts["max_label"] is None


def test_memory_that_does_not_suffice_halves_the_batch(worker, spec, task, make_image):
    images = [make_image(i) for i in range(8)]
    whole, _, _ = embedded(worker(), task(images))
    made, encode = worker(), load_encoder(spec()).encode

    def small_memory(batch, autocast=False):
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return encode(batch, autocast)

    object.__setattr__(made.encoder, "encode", small_memory)
    table, _, _ = embedded(made, task(images))
    np.testing.assert_allclose(
        columns.vectors(table["embedding"]), columns.vectors(whole["embedding"]), rtol=1e-4, atol=1e-5
    )
    assert made.batch_size == 2


def test_bfloat16_is_near_and_not_the_same(spec, task, make_image):
    images = [make_image(i) for i in range(4)]
    found = {}
    for precision in ("float32", "bfloat16"):
        made = Embedder(CorpusConfig(spec(), "", width=24), Resources(precision=precision, batch_size=4))
        found[precision] = columns.vectors(embedded(made, task(images))[0]["embedding"])
    assert not np.array_equal(found["float32"], found["bfloat16"])
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.1, atol=0.02)


def test_a_sample_that_the_encoder_raises_on_is_left_out_with_its_message(worker, task, make_image, tmp_path):
    images = [make_image(i) for i in range(20)]
    images[11] = RED
    whole, _, _ = embedded(worker(), task(images))
    run = str(tmp_path / "run")
    note = write_file(worker(factory="raises", run_uri=run), task(images), run, "embeddings")
    assert (note["rows"], note["left_out"]) == (19, 1)
    (bad,) = column_groups.read(run, "quarantine", 0).to_pylist()
    assert bad["row"] == 11 and bad["reason"] == "the encoder fails: ValueError: the red one"
    kept = column_groups.read(run, "embeddings", 0)
    assert kept.equals(whole.filter(pa.compute.field("row") != 11).combine_chunks())


def test_an_encoder_that_raises_on_every_sample_ends_the_stage_after_a_few(worker, task, make_image):
    with pytest.raises(StageFailed, match="fails for every sample, 10 in a row: ValueError: the red one"):
        embedded(worker(factory="raises_always"), task([make_image(i) for i in range(30)]))


def isolated(spec, factory, task, run, limit_s):
    config = CorpusConfig(spec(factory), "", width=24)
    worker = IsolatedWorker(make_embedder, (config, Resources(batch_size=8), run), limit_s)
    try:
        return worker.call(write_file, task, run, "embeddings")
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("factory", "limit_s", "reason"),
    [("exits", 60.0, "the process died on it"), ("sleeps", 8.0, "no answer in 8 s")],
)
def test_a_sample_that_ends_or_hangs_its_process_is_left_out(
    spec, task, make_image, tmp_path, factory, limit_s, reason
):
    images = [make_image(i) for i in range(20)]
    images[11] = RED
    run = str(tmp_path / "run")
    note = isolated(spec, factory, task(images), run, limit_s)
    assert (note["rows"], note["left_out"]) == (19, 1)
    (bad,) = column_groups.read(run, "quarantine", 0).to_pylist()
    assert (bad["row"], bad["key"], bad["reason"]) == (11, "k11", reason)
    assert column_groups.read(run, "embeddings", 0)["row"].to_pylist() == [r for r in range(20) if r != 11]


@pytest.mark.slow
def test_an_encoder_that_ends_its_process_on_every_sample_ends_the_stage(spec, task, make_image, tmp_path):
    with pytest.raises(StageFailed, match="fails for every sample: the process died on it, 3 in a row"):
        isolated(spec, "exits_always", task([make_image(i) for i in range(30)]), str(tmp_path / "run"), 60.0)


def test_memory_does_not_grow_with_the_shard(worker, task, make_image, monkeypatch):
    """What waits at any time is bounded by the constants, not by the shard."""
    monkeypatch.setattr(embedder_module, "GROUP_BYTES", 4000)
    monkeypatch.setattr(embedder_module, "READ_AHEAD_BYTES", 10_000)
    sizes = [table.num_rows for table in worker().run(task([make_image(i % 7) for i in range(200)])).tables]
    assert sum(sizes) == 200 and max(sizes) <= 48


def test_exif_rotations_are_counted_and_applied_only_where_asked(worker, task, make_image):
    """A PNG of 20 × 30 pixels that its EXIF data turns, among two that say nothing."""
    exif, turned = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30), (200, 30, 10)).save(turned, "PNG", exif=exif.tobytes())
    found = task([make_image(0, format="PNG"), turned.getvalue(), make_image(1, format="PNG")])
    for choice, size in (("ignore", (20, 30)), ("apply", (30, 20))):
        table, facts, _ = embedded(worker(exif=choice), found)
        assert facts["rotated"] == 1
        assert (table["width"][1].as_py(), table["height"][1].as_py()) == size
