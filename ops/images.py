"""Images: encoded bytes -> uint8 RGB tensor, safely; uint8 tensors -> an encoder's input.

Pixels are those of Pillow's `Image.open(...).convert("RGB")`, which open_clip and most loaders of webdataset shards
use: EXIF orientation is *not* applied, alpha is dropped, an animation gives its first picture. Only files of
FORMATS are ever opened, so none of Pillow's readers that start other programs (EPS) can be reached.
"""

import io
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from ops.checks import check_choice

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")
MAX_PIXELS = 100_000_000
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PIXELS_PER_RESIZE = 1 << 22  # pictures stacked for one call: enough for speed, 12 MiB at most


class ImageError(ValueError):
    """Bytes that are no usable image; the message is the reason, in a few words."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an encoded image of one of FORMATS.

    Parameters
    ----------
    data : bytes
        The whole file. Untrusted.
    max_pixels : int
        Larger pictures (width × height, from the header) are refused before a pixel is decoded. Pillow's own
        limit of 178,956,970 stays in force for all formats but JPEG and can't be raised here.

    Returns
    -------
    image : tensor of shape (3, H, W), uint8
        RGB. Strides may be those of (H, W, 3) memory, which resizing likes best.

    Raises
    ------
    ImageError
        Zero bytes, no image, too many pixels, truncated, broken.

    Notes
    -----
    JPEG (grey and colour) goes through torchvision, all else, CMYK too, through Pillow. On the pinned versions the two
    give equal pixels (maximal difference 0 over sizes, qualities, subsamplings, progressive or not); other builds of
    libjpeg may differ by 1. One departure from Pillow: of 16-bit grey the high byte is taken, where `convert` clips at 255
    and turns such pictures white. Damage inside a JPEG that leaves its end marker in place is not noticed, here as in Pillow.
    """
    if len(data) == 0:
        raise ImageError("zero bytes")
    if not data.startswith(_JPEG):
        return _decode_with_pillow(data, max_pixels)
    width, height, components = _jpeg_frame(data)
    _check_pixels(width, height, max_pixels)
    if components not in (1, 3):
        return _decode_with_pillow(data, max_pixels)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(",")[2].strip()
        raise ImageError("truncated JPEG" if "truncated" in reason else f"broken JPEG ({reason})") from None


def resize(
    images: Sequence[torch.Tensor], size: int, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> torch.Tensor:
    """Resize images to `size` × `size`, antialiased; smaller ones are enlarged.

    Parameters
    ----------
    images : sequence of B tensors of shape (3, H, W), uint8
        Sizes may differ; those of equal size are resized in one call.
    interpolation : {"bicubic", "bilinear"}
    resize_mode : {"shortest", "squash"}
        "shortest" resizes the shorter side to `size` and crops the centre; "squash" takes the whole picture and does
        not keep its shape. (The terms are open_clip's.)

    Returns
    -------
    batch : tensor of shape (B, 3, size, size), uint8
        Rounded and clamped to 0..255, as Pillow's `resize` does; pixels differ from Pillow's by 1 at most.

    Raises
    ------
    ValueError
        For no images, another shape or dtype, or an unknown interpolation or mode.

    Notes
    -----
    The centre square is cut out first and only that is resized, so a very elongated picture costs no more than a square
    one. Against "resize, then crop" the picture may shift by up to half an output pixel.
    """
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    _check_images(images)
    if resize_mode == "shortest":
        images = [_center_square(image) for image in images]
    batch = torch.empty((len(images), size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for rows in _equal_sizes(images):
        # (H, W, 3) memory: torch's vectorised uint8 resize is ten times faster on it than float32.
        stacked = torch.stack([images[row].permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2)
        if stacked.shape[-2:] != (size, size):
            stacked = interpolate(stacked, size=(size, size), mode=interpolation, antialias=True)
        batch[rows] = stacked
    return batch.contiguous()


def normalize(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(batch / 255 − mean) / std per channel.

    Parameters
    ----------
    batch : tensor of shape (B, 3, S, S), uint8, on any device
    mean, std : 3 floats each, of pixel values in [0, 1]

    Returns
    -------
    batch : tensor of shape (B, 3, S, S), float32
    """
    mean_c11 = torch.tensor(mean, dtype=torch.float32, device=batch.device).view(3, 1, 1)
    std_c11 = torch.tensor(std, dtype=torch.float32, device=batch.device).view(3, 1, 1)
    return batch.float().mul_(1 / (255 * std_c11)).sub_(mean_c11 / std_c11)


def augment(image: torch.Tensor, seed: int | Sequence[int]) -> torch.Tensor:
    """A randomly cropped and flipped view of `image`, the standard augmentation of CIFAR training.

    Parameters
    ----------
    image : tensor of shape (3, H, W), uint8
    seed : int or sequence of ints, each ≥ 0
        Say (shard, row, view): the same seed always gives the same view, on any machine.

    Returns
    -------
    view : tensor of shape (3, H, W), uint8
        Moved by up to 4/32 of each side, black where nothing was, mirrored left to right with probability 1/2.

    Notes
    -----
    Cui et al. 2023: random flips and crops (section 5), drawn anew in each of the five runs that the Gaussians are fitted
    on (section 4).
    """
    rng = np.random.default_rng(seed)
    down, right = (int(rng.integers(-(side // 8), side // 8 + 1)) for side in image.shape[1:])
    view = torch.zeros_like(image)
    (to_y, from_y), (to_x, from_x) = _overlap(down), _overlap(right)
    view[:, to_y, to_x] = image[:, from_y, from_x]
    return view.flip(2) if rng.random() < 0.5 else view


def _overlap(shift: int) -> tuple[slice, slice]:
    """Where a picture moved by `shift` goes to, and which part of it is kept."""
    return (
        (slice(shift, None), slice(None, -shift or None)) if shift >= 0 else (slice(None, shift), slice(-shift, None))
    )


def _check_images(images: Sequence[torch.Tensor]) -> None:
    if len(images) == 0:
        raise ValueError("images: is empty")
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or image.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 of shape (3, H, W), got {image.dtype} of {tuple(image.shape)}")


def _center_square(image: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def _equal_sizes(images: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions of images of equal size, no more together than memory should hold twice."""
    groups: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    parts = []
    for shape, rows in groups.items():
        step = max(1, _PIXELS_PER_RESIZE // math.prod(shape[1:]))
        parts += [rows[start : start + step] for start in range(0, len(rows), step)]
    return parts


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width:,} × {height:,} pixels exceed the limit of {max_pixels:,}")
    if width * height == 0:
        raise ImageError(f"{width} × {height} pixels")


def _decode_with_pillow(data: bytes, max_pixels: int) -> torch.Tensor:
    size = _header_size(data)
    if size is not None:
        _check_pixels(*size, max_pixels)
    picture = None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_pixels(*picture.size, max_pixels)
            return torch.from_numpy(_rgb(picture)).permute(2, 0, 1)
    except ImageError:
        raise
    except UnidentifiedImageError:
        what = "not an image" if size is None else "broken image"
        raise ImageError(f"{what} (starts with {data[:8]!r})") from None
    except Exception as error:  # Pillow's readers raise nearly anything on broken data
        kind = picture.format if picture is not None else "image"
        raise ImageError(f"broken {kind} ({str(error).splitlines()[0] if str(error) else repr(error)})") from None


def _rgb(picture: Image.Image) -> np.ndarray:
    """Pixels of shape (H, W, 3), uint8, in memory of their own."""
    if picture.mode.startswith("I;16"):
        high_byte = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _header_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG, GIF or WebP, read before Pillow sets up a decoder of that size; else None."""
    try:
        if data.startswith(_PNG):
            return struct.unpack_from(">II", data, 16)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return struct.unpack_from("<HH", data, 6)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
    except struct.error:
        raise ImageError("truncated image (the header is not whole)") from None
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    """RFC 9649: sizes are 14 bits in VP8, 14 bits less one in VP8L, 24 bits less one in VP8X."""
    if data[12:16] == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """(width, height, components) from a JPEG's frame header (ITU T.81, B.2.2)."""
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            raise ImageError("broken JPEG (no marker where one must be)")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return width, height, components
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ImageError("truncated JPEG")
