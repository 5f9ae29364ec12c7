"""Encoded images -> uint8 batches, by threads ahead of the model; and the augmentation of a batch.

Threads, not processes: decoding and resizing release the interpreter's lock, a batch then needs no copy between
processes, and nothing is forked under Ray's threads.
"""

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ops.decoding import decode_image
from pipelines.runs.errors import UserError

AUGMENTATIONS = ("none", "crop_flip", "randaugment")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding, and horizontal flip, of uint8 batches (B, 3, S, S); optionally RandAugment before.

    Attributes
    ----------
    padding : int
        Pixels on each side; the usual eighth of the size.
    randaugment : bool
        Two of torchvision's operations at magnitude 9, drawn per image (Cubuk et al. 2020).
    """

    padding: int
    randaugment: bool = False

    @classmethod
    def named(cls, name: str, image_size: int) -> "Augmentation | None":
        """none, crop_flip or randaugment."""
        if name not in AUGMENTATIONS:
            raise UserError(f"{name}: expected one of {', '.join(AUGMENTATIONS)}", "augment")
        return None if name == "none" else cls(max(1, image_size // 8), name == "randaugment")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """An augmented copy of `images`; all randomness from `generator`."""
        if self.randaugment:
            images = self._randaugment(images, generator)
        size, span = images.shape[-1], 2 * self.padding + 1
        padded = pad(images, (self.padding,) * 4)
        top, left = torch.randint(0, span, (2, len(images)), generator=generator).tolist()
        flip = torch.rand(len(images), generator=generator) < 0.5
        # A slice per picture: one gather for the whole batch needs an index per pixel, and took eight times as long.
        views = torch.empty_like(images)
        for view, whole, y, x in zip(views, padded, top, left):
            view.copy_(whole[:, y : y + size, x : x + size])
        views[flip] = views[flip].flip(3)
        return views

    def _randaugment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        from torchvision.transforms.v2 import RandAugment  # seconds to import, which others do without

        transform = RandAugment()
        seed = int(torch.randint(0, 2**62, (1,), generator=generator))
        # torchvision draws from the global generator only.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([transform(image) for image in images])


class PictureDecoder:
    """Encoded images to (B, 3, S, S) uint8: shorter side to S (bicubic, antialiased), centre crop; as is where it fits."""

    def __init__(self, image_size: int, max_pixels: int, threads: int = 2, exif: str = "ignore"):
        self.image_size, self.max_pixels, self.threads, self.exif = image_size, max_pixels, max(1, threads), exif

    def decode(self, data: bytes) -> Tensor:
        """One image. ops.images.ImageError if it cannot be decoded (it could when it was embedded)."""
        image = decode_image(data, self.max_pixels, self.exif)
        return fit_square(image, self.image_size)

    def decode_all(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """Each batch of rows with its pictures, in order, some batches ahead. `batch.inputs` is a list of bytes."""
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque = deque()
            batches = iter(batches)
            for batch in batches:
                # Chunks, not single images: a future costs about as much as a small image.
                step = max(1, -(-len(batch.inputs) // self.threads))
                chunks = [batch.inputs[start : start + step] for start in range(0, len(batch.inputs), step)]
                waiting.append((batch, [pool.submit(self._decode_some, chunk) for chunk in chunks]))
                if len(waiting) > 2:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())

    def _decode_some(self, images: list[bytes]) -> Tensor:
        return torch.stack([self.decode(data) for data in images])

    def _finished(self, batch: Any, futures: list) -> tuple[Any, Tensor]:
        parts = [future.result() for future in futures]
        return batch, parts[0] if len(parts) == 1 else torch.cat(parts)


def fit_square(image: Tensor, size: int) -> Tensor:
    """A picture (3, H, W) uint8 as (3, size, size): shorter side resized, the centre of the longer kept."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    height, width = image.shape[-2:]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    image = interpolate(image[None], target, mode="bicubic", antialias=True)[0]
    top, left = (round((side - size) / 2) for side in target)
    return image[:, top : top + size, left : left + size]


def ahead(items: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """The same items, computed by a thread up to `depth` of them ahead; its errors are raised here."""
    line: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                line.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        for kind, item in iter(line.get, None):
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stop.set()
        thread.join()
