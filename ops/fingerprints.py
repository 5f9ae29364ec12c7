"""Fingerprints: a grey picture of 32 × 32 of each image, and whether two of them show one picture.

A similar embedding says that two pictures are of a kind. One picture, cropped, mirrored, recoloured, recompressed, rescaled
or framed, is found by the correlation of grey values after the best small change of scale, shift and mirroring.
"""

import functools

import numpy as np

from ops.checks import check_shape

SIDE = 32  # of a fingerprint: 1 KB
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SCALES = (0.8, 0.85, 0.9, 0.95, 1.0)  # of one picture within the other
SHIFT = 3  # of the whole pictures against each other, in pixels of the fingerprint, either way
GATE = 0.7  # correlation of rough shapes below which details are not compared
FITS = 3  # scales at which details are compared, those at which the rough shapes fit best
BLUR = 1.5  # pixels of the fingerprint: what is finer counts as detail
FLAT = 2.0  # standard deviation of grey values below which a picture has nothing to compare
EXTENT = 0.25  # share of a picture that its details fill below which chance makes pictures alike
STRICTEST = 2.0  # a copy that was saved again still counts
PAIRS = 64  # compared together: 40 MiB of windows


def fingerprint(pixels: np.ndarray) -> np.ndarray:
    """The grey picture of 32 × 32 of an image.

    Parameters
    ----------
    pixels : ndarray of shape (H, W, 3), uint8, RGB

    Returns
    -------
    grey : ndarray of shape (32, 32), uint8
        Luma (ITU-R BT.601), each value the mean of its share of the image, whatever its shape.
    """
    height, width = pixels.shape[:2]
    step = max(1, min(height, width) // (4 * SIDE))  # of a large image every step-th pixel is enough: 16 to a value
    grey = pixels[::step, ::step].astype(np.float32) @ LUMA
    small = _shares(grey.shape[0]) @ grey @ _shares(grey.shape[1]).T
    return np.clip(np.round(small), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _shares(size: int) -> np.ndarray:
    """The matrix (32, size) that takes the mean of each 32nd of a line of pixels, parts of a pixel counted as such."""
    edges = np.arange(SIDE + 1) * (size / SIDE)
    at = np.arange(size)
    inside = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
    return (np.maximum(inside, 0) * (SIDE / size)).astype(np.float32)


def picture_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How well two pictures agree in their details where they fit best.

    Parameters
    ----------
    first, second : ndarray of shape (n, 32, 32), uint8
        Fingerprints of the two pictures of each pair.

    Returns
    -------
    correlation : ndarray of shape (n,), float32
        Of the details of the middle of one picture and of a part of the other (0.8 to 1 of its side, or the whole shifted
        by up to 3 of 32 pixels), mirrored or not: in [0, 1], larger = more alike (see `ops.duplicates`).
        Symmetric. 0 where a picture is flat, or where their rough shapes differ.

    Raises
    ------
    ValueError
        Wrong shapes.

    Notes
    -----
    The rough shapes, grey values of 16 × 16, find the scales of the best fit; two pictures whose rough shapes correlate by
    less than `GATE` are two pictures. At the three best scales the correlation of details decides: the grey values less their blur of
    `BLUR` pixels. Grey values alone take every dark ship on a light sea for the next. Few details agree by chance: where
    those of one picture fill less than `EXTENT` of it (a horizon, a bird in the sky), what the correlation lacks to 1 is
    multiplied by EXTENT / extent, at most by `STRICTEST`.
    """
    check_shape("first", first, ("n", SIDE, SIDE))
    check_shape("second", second, (len(first), SIDE, SIDE))
    result = np.zeros(len(first), np.float32)
    spread = np.minimum(first.std(axis=(1, 2), dtype=np.float32), second.std(axis=(1, 2), dtype=np.float32))
    worth = np.flatnonzero(spread >= FLAT)
    for start in range(0, len(worth), PAIRS):
        rows = worth[start : start + PAIRS]
        result[rows] = _of_block(first[rows].astype(np.float32), second[rows].astype(np.float32))
    return result


def _of_block(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = np.concatenate([_halved(a), _halved(b)]), np.concatenate([_halved(b), _halved(a)])
    rough = np.stack([_found_in(*both, scale) for scale in SCALES]).reshape(
        -1, len(a)
    )  # (scales of a in b, then of b in a)
    order = np.argsort(-rough, axis=0, kind="stable")[:FITS]
    worth = np.take_along_axis(rough, order, axis=0) >= GATE
    result = np.zeros(len(a), np.float32)
    for fit in np.unique(order[worth]):
        rows = np.flatnonzero((worth & (order == fit)).any(axis=0))
        scale, swapped = fit // 2, fit % 2
        one, other = (b, a) if swapped else (a, b)
        result[rows] = np.maximum(result[rows], _found_in(_details(one[rows]), _details(other[rows]), SCALES[scale]))
    stricter = np.clip(EXTENT / np.minimum(extent(a), extent(b)), 1, STRICTEST)
    return np.maximum(0, 1 - (1 - result) * stricter)


def extent(pictures: np.ndarray) -> np.ndarray:
    """The share of each picture (n, 32, 32) that its details fill, (n,) in (0, 1]: of its rows times of its columns.

    Of rows: (Σ e)² / (n Σ e²) with the energy e of the details in each of the n rows: 1 where all have the same, 1/n where
    one has all of it.
    """
    inner = slice(SHIFT, SIDE - SHIFT)
    energy = _details(pictures.astype(np.float32))[:, inner, inner] ** 2
    shares = []
    for axis in (1, 2):
        line = energy.sum(axis=axis, dtype=np.float64)
        shares.append(line.sum(axis=1) ** 2 / np.maximum(line.shape[1] * (line**2).sum(axis=1), 1e-12))
    return np.maximum(shares[0] * shares[1], 1e-3)


def _halved(pictures: np.ndarray) -> np.ndarray:
    n, side = pictures.shape[:2]
    return pictures.reshape(n, side // 2, 2, side // 2, 2).mean(axis=(2, 4))


def _details(pictures: np.ndarray) -> np.ndarray:
    blur = _blurring(pictures.shape[1])
    return pictures - blur @ pictures @ blur.T


def _found_in(part: np.ndarray, whole: np.ndarray, scale: float) -> np.ndarray:
    """The best correlation (n,) in [0, 1] of the middle of `part`, or of its mirror image, with windows of `whole`.

    `part` shows `scale` of the side of `whole`.
    """
    n, side = part.shape[:2]
    margin = SHIFT * side // SIDE
    inner = side - 2 * margin
    middle = part[:, margin : margin + inner, margin : margin + inner]
    templates = np.stack([middle.reshape(n, -1), middle[:, :, ::-1].reshape(n, -1)], axis=2)
    templates -= templates.mean(axis=1, keepdims=True)
    templates /= np.sqrt(np.maximum((templates**2).sum(axis=1, keepdims=True), 1e-6))
    enlarge = _resizing(side, round(side / scale))
    scaled = enlarge @ (whole - whole.mean(axis=(1, 2), keepdims=True)) @ enlarge.T
    windows = np.lib.stride_tricks.sliding_window_view(scaled, (inner, inner), axis=(1, 2))
    products = (windows.reshape(n, -1, inner * inner) @ templates).max(axis=2)
    spread = _window_sums(scaled**2, inner) - _window_sums(scaled, inner) ** 2 / inner**2
    return np.clip((products / np.sqrt(np.maximum(spread, inner * inner))).max(axis=1), 0, 1)


def _window_sums(pictures: np.ndarray, inner: int) -> np.ndarray:
    """Sums (n, windows) over all square windows, in the order of `sliding_window_view`."""
    size = pictures.shape[1]
    band = _band(size, inner)
    return (band @ pictures.astype(np.float64) @ band.T).reshape(len(pictures), -1)


@functools.cache
def _band(size: int, inner: int) -> np.ndarray:
    at = np.arange(size - inner + 1)[:, None]
    return ((np.arange(size) >= at) & (np.arange(size) < at + inner)).astype(np.float64)


@functools.cache
def _resizing(side: int, to: int) -> np.ndarray:
    """The matrix (to, side) that resamples a line of pixels linearly, ends held."""
    at = (np.arange(to) + 0.5) * side / to - 0.5
    low = np.clip(np.floor(at).astype(int), 0, side - 2)
    share = np.clip(at - low, 0, 1)
    matrix = np.zeros((to, side), np.float32)
    matrix[np.arange(to), low] = 1 - share
    matrix[np.arange(to), low + 1] = share
    return matrix


@functools.cache
def _blurring(side: int) -> np.ndarray:
    """The matrix (side, side) of a Gaussian blur of a line of pixels, its weights of sum 1 at the ends too."""
    distance = np.arange(side)[:, None] - np.arange(side)
    weights = np.exp(-0.5 * (distance / BLUR) ** 2).astype(np.float32)
    return weights / weights.sum(axis=1, keepdims=True)
