"""The corpus of `tests.chaos`: small shards, and an encoder that is slow enough to be disturbed."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARDS, SAMPLES = 6, 20
ENCODER = """
import time, torch

class Slow(torch.nn.Module):
    image_size, mean, std, interpolation = 4, (0.5,) * 3, (0.5,) * 3, "bilinear"

    def forward(self, x):
        time.sleep(0.05 * len(x) / 20)
        return x.flatten(1)[:, :12]

def slow():
    return Slow()
"""


def write_corpus(folder: Path) -> list[str]:
    """Write shards and the encoder; the options of embed that name them."""
    (folder / "shards").mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"shards/{shard:03d}.tar", "w") as tar:
            for sample in range(SAMPLES):
                pixels = np.random.default_rng(shard * SAMPLES + sample).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "PNG")
                for suffix, data in (("png", stream.getvalue()), ("cls", str(sample % 3).encode())):
                    info = tarfile.TarInfo(f"{shard}_{sample:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "slow.py").write_text(ENCODER)
    return ["--shards", str(folder / "shards"), "--encoder", f"module:{folder}/slow.py:slow", "--batch-size", "5"]
