"""uint8 tensors of images -> an encoder's input: resized, normalised, augmented. `ops.decoding` makes them of files."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from ops.checks import check_choice

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "squash")
_PIXELS_PER_RESIZE = 1 << 22  # pictures stacked for one call: enough for speed, 12 MiB at most


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
        Rounded and clamped to 0..255, as Pillow's `resize` does; pixels differ from Pillow's by 1 at most. Its memory
        is channels-last, as convolutions like it.

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
    return batch


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
    scale_c11, shift_c11 = _scale_and_shift(tuple(mean), tuple(std), batch.device)
    return batch.float().mul_(scale_c11).sub_(shift_c11)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the device once: sending them with every batch would wait for all that a GPU has to do."""
    mean_c11 = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
    std_c11 = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)
    return 1 / (255 * std_c11), mean_c11 / std_c11


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
