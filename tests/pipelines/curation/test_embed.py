"""The embedding actor by itself: what it does to a block, without Ray."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from ops.encoders import load_encoder
from pipelines.corpus.shards import SAMPLES
from pipelines.curation.embedder import EmbedImages
from pipelines.curation.workers import Resources
from pipelines.runs import columns
from pipelines.runs.record import CorpusConfig

FACTORY = """
import torch

class Net(torch.nn.Module):
    image_size, mean, std, interpolation = 32, (0.5,) * 3, (0.5,) * 3, "bilinear"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 24, 3))

    def forward(self, x):
        return self.net(x).mean((2, 3))

def net():
    return Net()
"""


def block(images):
    """A block as the reader gives it, the row that ends its shard included."""
    count = len(images)
    rows = {"shard": [0] * count, "position": range(count), "row": range(count), "key": [f"k{i}" for i in range(count)]}
    table = pa.table(
        rows
        | {
            "label": [0] * count,
            "image": images,
            "reason": [None] * count,
            "member": [None] * count,
            "end": [None] * count,
        }
    )
    end = pa.Table.from_pylist([{"shard": 0, "position": count, "end": "{}"}], schema=SAMPLES)
    return pa.concat_tables([table.cast(SAMPLES), end])


@pytest.fixture
def actor(tmp_path):
    """actor(batch_size, **config) over a small convolutional encoder."""
    (tmp_path / "net.py").write_text(FACTORY)
    spec = f"module:{tmp_path}/net.py:net"

    def make(batch_size=8, **config):
        return EmbedImages(CorpusConfig(spec, "", width=24, **config), Resources(batch_size=batch_size))

    make.spec = spec
    return make


def test_embeddings_are_those_of_the_encoder(actor, make_image):
    from ops.decoding import decode_image

    images = [make_image(i) for i in range(11)]
    result = actor()(block(images))
    encoder = load_encoder(actor.spec)
    expected = encoder.encode(encoder.prepare([decode_image(image) for image in images])).numpy()
    np.testing.assert_allclose(columns.vectors(result["embedding"])[:11], expected, rtol=1e-4, atol=1e-5)
    assert result["end"].to_pylist() == [None] * 11 + ["{}"]


def test_the_cut_into_blocks_changes_no_bit(actor, make_image):
    images = [make_image(i) for i in range(11)]
    embed = actor()
    whole = columns.vectors(embed(block(images))["embedding"])[:11]
    alone = np.concatenate([columns.vectors(embed(block([image]))["embedding"])[:1] for image in images])
    assert np.array_equal(whole, alone)


def test_a_bad_image_costs_itself_only(actor, make_image):
    result = actor()(block([make_image(0), b"no image", make_image(1)]))
    assert result["reason"].to_pylist()[::2] == [None, None] and result["reason"][1].as_py()


def test_full_size_pictures_are_let_go_before_the_batch_is_complete(actor, make_image, monkeypatch):
    images = [make_image(i, size=40) for i in range(6)]
    whole = columns.vectors(actor()(block(images))["embedding"])
    monkeypatch.setattr("pipelines.curation.embedder.PIXELS_AT_ONCE", 2000)
    assert np.array_equal(columns.vectors(actor()(block(images))["embedding"]), whole)


def test_an_embedding_that_overflows_is_left_out(actor, make_image):
    embed = actor(dtype="float16")
    with torch.no_grad():
        embed.encoder.module.net[2].bias.fill_(1e6)
    result = embed(block([make_image(0)]))
    assert "not finite in float16" in result["reason"][0].as_py()


def test_memory_that_does_not_suffice_halves_the_batch(actor, make_image):
    images = [make_image(i) for i in range(8)]
    whole = columns.vectors(actor()(block(images))["embedding"])
    embed, encode = actor(), load_encoder(actor.spec).encode

    def small_memory(batch, autocast=False):
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return encode(batch, autocast)

    object.__setattr__(embed.encoder, "encode", small_memory)
    np.testing.assert_allclose(columns.vectors(embed(block(images))["embedding"]), whole, rtol=1e-4, atol=1e-5)
    assert embed.batch_size == 2
