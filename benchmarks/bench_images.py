"""How many images a second does one core decode and resize, against Pillow?  Writes benchmarks/images.md.

python benchmarks/bench_images.py
"""

import datetime
import io
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from ops.decoding import decode_image
from ops.images import resize

ROUNDS = 5  # the best of them: the others were disturbed


def photos(side: int, count: int) -> list[bytes]:
    """JPEGs (quality 90) with a photograph's mix of smooth areas, edges and grain."""
    rng = np.random.default_rng(0)
    return [_photo(rng, side) for _ in range(count)]


def _photo(rng: np.random.Generator, side: int) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    picture = np.asarray(coarse, dtype=float) + rng.normal(0, 6, (side, side, 3))
    for _ in range(30):
        top, left, height, width = rng.integers(0, side, 4) // (1, 1, 3, 3)
        picture[top : top + height, left : left + width] *= rng.uniform(0.5, 1.5)
    stream = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def ours(files: list[bytes], size: int) -> torch.Tensor:
    return resize([decode_image(data) for data in files], size)


def pillow(files: list[bytes], size: int, draft: bool = False) -> torch.Tensor:
    return torch.from_numpy(np.stack([_pillow_one(data, size, draft) for data in files])).permute(0, 3, 1, 2)


def _pillow_one(data: bytes, size: int, draft: bool) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    if draft:
        picture.draft("RGB", (size, size))
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.BICUBIC))


def rate(function: Callable[[list[bytes]], torch.Tensor], files: list[bytes]) -> float:
    """Images per second of the best round."""
    function(files[:4])
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()  # CPU seconds: what other programs take doesn't count
        function(files)
        seconds.append(time.process_time() - started)
    return len(files) / min(seconds)


def row(name: str, function: Callable, files: list[bytes], size: int) -> tuple[str, float, float]:
    off = (ours(files[:20], size).float() - function(files[:20], size).float()).abs().mean().item()
    return name, rate(lambda batch: function(batch, size), files), off


def table(title: str, files: list[bytes], size: int) -> str:
    rows = [
        row("ops.images (torchvision, stacked resize)", ours, files, size),
        row("Pillow", pillow, files, size),
        row("Pillow with draft", lambda batch, s: pillow(batch, s, draft=True), files, size),
    ]
    reference = rows[1][1]
    lines = [f"| {n} | {r:,.0f} | {r / reference:.2f} | {off:.3f} |" for n, r, off in rows]
    head = ["| path | images per CPU second | against Pillow | mean difference to ours, of 255 |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", *head, *lines])


def processor() -> str:
    described = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores seen, one used"


def main() -> None:
    torch.set_num_threads(1)
    large, small = photos(512, 100), photos(32, 2000)
    kilobytes = sum(map(len, large)) / len(large) / 1e3
    text = [
        "# Decoding and resizing, images per second of one core",
        f"{datetime.date.today()}; {processor()}; torchvision {torchvision.__version__}, Pillow {PIL.__version__}. "
        f"Generated JPEGs, quality 90; bicubic, antialiased; best of {ROUNDS} rounds, in CPU seconds. Made by `bench_images.py`.",
        table(f"512 px ({kilobytes:.0f} KB each) to 224 px", large, 224),
        table("32 px to 96 px (CIFAR)", small, 96),
        "Draft mode shrinks within the JPEG decoder, in powers of two: faster, but other pixels than full decoding gives.",
    ]
    Path(__file__).with_name("images.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
