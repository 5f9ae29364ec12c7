"""Common corruptions of images, at severities 1 to 5.

The families and their constants are those of Hendrycks and Dietterich 2019 ("Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations"), as in their released code: ImageNet-C's for pictures, CIFAR-10-C's for thumbnails,
whose shorter side is under 64 pixels. ImageNet-C's lengths are pixels of a 224-pixel picture and grow with the picture
here; CIFAR-10-C's are pixels of the thumbnail.

Written anew with numpy, scipy and Pillow, so pictures are not equal to those of their files: the random numbers
differ, motion blur is a line of Gaussian weights, not ImageMagick's, spatter's water has no bevelled edge, and frost is made
of noise, as their photographs of frosted windows aren't shipped here. The package `imagecorruptions` was no choice: it pins
old numpy and wants OpenCV, numba and scikit-image, and it has no constants for thumbnails.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.signal import oaconvolve

from ops.checks import check_choice

SEVERITIES = (1, 2, 3, 4, 5)
_THUMBNAIL = 64  # pixels; shorter sides below it take CIFAR-10-C's constants
_PALE_WATER, _MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def corrupt(image: torch.Tensor, kind: str, severity: int, seed: int | Sequence[int] = 0) -> torch.Tensor:
    """A corrupted copy of `image`.

    Parameters
    ----------
    image : tensor of shape (3, H, W), uint8
    kind : str
        A key of CORRUPTIONS.
    severity : int
        1 (mild) to 5 (strong).
    seed : int or sequence of ints, each ≥ 0
        Decides all randomness: noise, directions, shapes.

    Returns
    -------
    corrupted : tensor of shape (3, H, W), uint8

    Raises
    ------
    ValueError
        For an unknown kind or severity, or an image of another shape or dtype.

    Notes
    -----
    Hendrycks and Dietterich 2019; this file's head says where it departs.
    """
    check_choice("kind", kind, tuple(CORRUPTIONS))
    if severity not in SEVERITIES:
        raise ValueError(f"severity: must be an integer from 1 to 5, got {severity!r}")
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image: expected uint8 of shape (3, H, W), got {image.dtype} of {tuple(image.shape)}")
    picture = image.permute(1, 2, 0).numpy() / 255.0
    result = CORRUPTIONS[kind](picture, severity, np.random.default_rng(seed))
    return torch.from_numpy(np.round(result.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)


# Every corruption takes a picture (H, W, 3), float64 in [0, 1], a severity and a generator, and returns such a picture;
# `corrupt` clips and rounds.


def _gaussian_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a standard deviation: a sensor in low light."""
    sigma = _pick(x, severity, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10))
    return x + rng.normal(scale=sigma, size=x.shape)


def _shot_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Poisson noise of so many photons at white."""
    photons = _pick(x, severity, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50))
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper on a fraction of the values."""
    fraction = _pick(x, severity, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07))
    return np.where(rng.random(x.shape) < fraction, rng.integers(0, 2, x.shape), x)


def _speckle_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Noise in proportion to the value."""
    sigma = _pick(x, severity, (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2))
    return x + x * rng.normal(scale=sigma, size=x.shape)


def _gaussian_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian of a standard deviation in pixels."""
    return _blur(x, _unit(x) * _pick(x, severity, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)))


def _defocus_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A disc of a radius in pixels, its rim softened."""
    small = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    radius, soft = _pick(x, severity, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)), small)
    radius, soft = radius * _unit(x), soft * _unit(x)
    reach = int(np.ceil(radius + 3 * soft)) + 1
    y, x_offset = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = ndimage.gaussian_filter((y**2 + x_offset**2 <= radius**2).astype(float), soft)
    return _filter(x, disc)


def _glass_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels swapped with near ones, between two slight blurs: frosted glass."""
    large = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    small = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, reach, rounds = _pick(x, severity, large, small)
    reach, sigma = max(1, round(reach * _unit(x))), sigma * _unit(x)
    x = _blur(x, sigma)
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
    for _ in range(rounds):
        # All at once, where the original swaps one pixel after the other: each takes the value of a near one.
        down, right = rng.integers(-reach, reach + 1, (2, *x.shape[:2]))
        x = x[(rows + down).clip(0, x.shape[0] - 1), (columns + right).clip(0, x.shape[1] - 1)]
    return _blur(x, sigma)


def _motion_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A line of a random direction within 45° of level, weights falling off as a Gaussian."""
    small = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    radius, sigma = _pick(x, severity, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), small)
    return _filter(x, _streak(radius * _unit(x), sigma * _unit(x), rng.uniform(-45, 45)))


def _zoom_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The mean of the picture and of its centre at growing magnifications."""
    large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
    stop, step = _pick(x, severity, large, small)
    factors = np.arange(1, stop, step)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _fog(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A plasma fractal of a strength and a roughness, added; then the brightest value as it was."""
    large = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    strength, decay = _pick(x, severity, large, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)))
    white = x.max()
    return (x + strength * _plasma(x.shape[:2], decay, rng)[..., None]) * white / (white + strength)


def _frost(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Ice made of ridged noise over the picture; the original lays photographs of frost over it."""
    large = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
    small = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    kept, strength = _pick(x, severity, large, small)
    ridges = 1 - np.abs(2 * _plasma(x.shape[:2], 1.6, rng) - 1)
    ice = np.clip(1.4 * ridges**2, 0, 1)[..., None] * np.array([0.85, 0.93, 1.0])
    return kept * x + strength * ice


def _snow(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Flakes: noise above a threshold, enlarged and blurred along a falling line; the picture whitened a little."""
    mean, sigma, scale, threshold, radius, spread, kept = _pick(x, severity, _SNOW_LARGE, _SNOW_SMALL)
    shape = tuple(max(2, int(np.ceil(side / (scale * _unit(x))))) for side in x.shape[:2])
    flakes = _stretch(rng.normal(mean, sigma, shape), x.shape[:2])
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)[..., None]
    flakes = _filter(flakes, _streak(radius * _unit(x), spread * _unit(x), rng.uniform(-135, -45)))
    whitened = np.maximum(x, (_grey(x) * 1.5 + 0.5)[..., None])
    return kept * x + (1 - kept) * whitened + flakes + flakes[::-1, ::-1]


_SNOW_LARGE = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_SNOW_SMALL = (
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)


def _spatter(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Drops on the lens: blurred noise above a threshold; water brightens, mud (severity 4, 5) covers."""
    mean, sigma, blur, threshold, strength, mud = _pick(x, severity, _SPATTER_LARGE, _SPATTER_SMALL)
    # Blurred noise has a smaller spread on larger pictures: noise is drawn at the constants' own scale, then stretched.
    shape = tuple(max(2, round(side / _unit(x))) for side in x.shape[:2])
    liquid = _stretch(ndimage.gaussian_filter(rng.normal(mean, sigma, shape), blur), x.shape[:2])
    if mud:
        cover = ndimage.gaussian_filter((liquid > threshold).astype(float), strength * _unit(x))[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return x * (1 - cover) + _MUD * cover
    drops = np.where(liquid < threshold, 0, liquid - threshold)
    return x + strength * (drops / max(drops.max(), 1e-9))[..., None] * _PALE_WATER


_SPATTER_LARGE = (
    (0.65, 0.3, 4, 0.69, 0.6, 0),
    (0.65, 0.3, 3, 0.68, 0.6, 0),
    (0.65, 0.3, 2, 0.68, 0.5, 0),
    (0.65, 0.3, 1, 0.65, 1.5, 1),
    (0.67, 0.4, 1, 0.65, 1.5, 1),
)
_SPATTER_SMALL = (
    (0.62, 0.1, 0.7, 0.7, 0.5, 0),
    (0.65, 0.1, 0.8, 0.7, 0.5, 0),
    (0.65, 0.3, 1, 0.69, 0.5, 0),
    (0.65, 0.1, 0.7, 0.69, 0.6, 1),
    (0.65, 0.1, 0.5, 0.68, 0.6, 1),
)


def _brightness(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """So much added to the V of HSV, hue and saturation kept."""
    added = _pick(x, severity, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3))
    value = x.max(axis=-1, keepdims=True)
    # Scaling all channels by V'/V is what HSV and back does; black has no hue and becomes grey.
    return np.where(value > 0, x / np.maximum(value, 1e-9), 1) * np.minimum(value + added, 1)


def _contrast(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Distances from each channel's mean, multiplied."""
    factor = _pick(x, severity, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15))
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _saturate(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """S of HSV multiplied, then added to; hue and V kept. Severities 1 and 2 wash out, 3 to 5 glare."""
    large = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
    factor, added = _pick(x, severity, large, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)))
    value, span = x.max(axis=-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    saturation = span / np.maximum(value, 1e-9)
    # 1 − channel / V is S times a share that only hue decides; grey counts as red, as it does in HSV.
    share = np.where(span > 0, (value - x) / np.maximum(span, 1e-9), np.array([0.0, 1.0, 1.0]))
    return value * (1 - np.clip(saturation * factor + added, 0, 1) * share)


def _elastic_transform(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A random affine map, then smooth random displacements."""
    side = min(x.shape[:2])
    strength, smooth, affine = side * np.array(_pick(x, severity, _ELASTIC_LARGE, _ELASTIC_SMALL))
    anchors = side // 3 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = anchors + rng.uniform(-affine, affine, anchors.shape)
    ones = np.ones((3, 1))
    linear = np.linalg.lstsq(np.hstack([anchors, ones]), moved, rcond=None)[0]
    centre = np.array(x.shape[:2]) // 2
    grid = np.stack(np.mgrid[: x.shape[0], : x.shape[1]], axis=-1) - centre
    at = grid @ linear[:2] + linear[2] + centre
    noise = rng.uniform(-1, 1, (2, *x.shape[:2]))
    shift = np.stack(
        [ndimage.gaussian_filter(n, smooth, mode="reflect", truncate=3) * strength for n in noise], axis=-1
    )
    where = np.moveaxis(at + shift, -1, 0)
    return np.stack([ndimage.map_coordinates(x[..., c], where, order=1, mode="reflect") for c in range(3)], axis=-1)


# Strength, smoothness and affine shift, in shorter sides. (Their 244 for 224 is kept.)
_ELASTIC_LARGE = tuple(
    tuple(244 / 224 * value for value in row)
    for row in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
)
_ELASTIC_SMALL = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))


def _pixelate(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to a fraction of its sides by box averages, and enlarged again."""
    fraction = _pick(x, severity, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65))
    height, width = x.shape[:2]
    shrunk = _as_pillow(x).resize((max(1, int(width * fraction)), max(1, int(height * fraction))), Image.Resampling.BOX)
    return np.asarray(shrunk.resize((width, height), Image.Resampling.BOX)) / 255.0


def _jpeg_compression(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Through a JPEG of a quality."""
    quality = _pick(x, severity, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40))
    stream = io.BytesIO()
    _as_pillow(x).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream, formats=("JPEG",))) / 255.0


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _gaussian_noise,
        _shot_noise,
        _impulse_noise,
        _speckle_noise,
        _gaussian_blur,
        _defocus_blur,
        _glass_blur,
        _motion_blur,
        _zoom_blur,
        _snow,
        _frost,
        _fog,
        _spatter,
        _brightness,
        _contrast,
        _saturate,
        _elastic_transform,
        _pixelate,
        _jpeg_compression,
    )
}
CORRUPTIONS["jpeg"] = _jpeg_compression  # the short name of its file in CIFAR-10-C and here


def _pick(x: np.ndarray, severity: int, large: Sequence[Any], small: Sequence[Any]) -> Any:
    return (small if min(x.shape[:2]) < _THUMBNAIL else large)[severity - 1]


def _unit(x: np.ndarray) -> float:
    """Pixels of this picture to a pixel of the constants."""
    side = min(x.shape[:2])
    return 1.0 if side < _THUMBNAIL else side / 224


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _filter(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel convolved with `kernel` scaled to a sum of 1, the border mirrored."""
    return np.stack([_convolve(x[..., c], kernel / kernel.sum()) for c in range(x.shape[-1])], axis=-1)


def _convolve(channel: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    rows, columns = (side // 2 for side in kernel.shape)
    padded = np.pad(channel, ((rows, rows), (columns, columns)), mode="symmetric")
    return oaconvolve(padded, kernel, mode="valid")


def _streak(radius: float, sigma: float, degrees: float) -> np.ndarray:
    """Weights along a line through the centre, falling off as a Gaussian to one side: a camera that comes to rest."""
    reach = max(1, int(np.ceil(radius)))
    along = np.linspace(0, reach, 4 * reach + 1)
    weights = np.exp(-(along**2) / (2 * sigma**2))
    rows = reach - along * np.sin(np.deg2rad(degrees))
    columns = reach + along * np.cos(np.deg2rad(degrees))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (np.round(rows).astype(int), np.round(columns).astype(int)), weights)
    return kernel


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The centre of the picture enlarged by `factor`, at the picture's size."""
    matrix = np.array([1 / factor, 1 / factor, 1])
    offset = (np.array(x.shape) - 1) / 2 * (1 - matrix)
    return ndimage.affine_transform(x, matrix, offset, order=1, mode="nearest")


def _stretch(layer: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A 2-D layer, linearly interpolated to `shape`."""
    where = np.meshgrid(*(np.linspace(0, old - 1, new) for old, new in zip(layer.shape, shape)), indexing="ij")
    return ndimage.map_coordinates(layer, where, order=1)


def _plasma(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> np.ndarray:
    """Noise at every octave, each `decay` times weaker than the one twice as coarse, scaled to [0, 1]."""
    octaves = int(np.ceil(np.log2(max(*shape, 2))))
    layer = np.zeros(shape)
    for octave in range(octaves):
        points = rng.uniform(-1, 1, (2**octave + 1, 2**octave + 1))
        layer += _stretch(points, shape) / decay**octave
    return (layer - layer.min()) / max(np.ptp(layer), 1e-9)


def _grey(x: np.ndarray) -> np.ndarray:
    return x @ np.array([0.299, 0.587, 0.114])


def _as_pillow(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x * 255).astype(np.uint8))
