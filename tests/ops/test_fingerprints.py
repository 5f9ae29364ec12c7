"""What is one picture after each change that people make to pictures, and what is not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from ops import fingerprints
from ops.duplicates import LIKELY, SURE
from ops.fingerprints import SIDE, extent, fingerprint, picture_correlation


def pictures() -> list[Image.Image]:
    """Eight parts of two photographs, 200 × 160."""
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    return [w.crop((x, y, x + 200, y + 160)) for w in whole for x, y in ((0, 0), (210, 40), (420, 10), (300, 240))]


def of(image: Image.Image) -> np.ndarray:
    return fingerprint(np.asarray(image.convert("RGB")))


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=30)
    return Image.open(stream)


CHANGES = {
    "recompressed": recompressed,
    "resized": lambda image: image.resize((83, 61)),
    "cropped": lambda image: image.crop((20, 0, 200, 144)),
    "mirrored": ImageOps.mirror,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "grey": ImageOps.grayscale,
    "bordered": lambda image: ImageOps.expand(image, 16, "white"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_the_same_picture(change):
    originals = pictures()
    first, second = np.stack([of(p) for p in originals]), np.stack([of(CHANGES[change](p)) for p in originals])
    correlation = picture_correlation(first, second)
    # Of the three with much sky some are lost behind a border, whose own edge is most of their detail then.
    assert (correlation >= LIKELY).sum() >= (5 if change == "bordered" else 8), correlation
    np.testing.assert_allclose(picture_correlation(second, first), correlation, atol=1e-5)


def test_different_pictures_are_not():
    prints = np.stack([of(p) for p in pictures()])
    a, b = np.triu_indices(len(prints), 1)
    assert picture_correlation(prints[a], prints[b]).max() < SURE


def test_a_fingerprint_is_the_mean_luma_of_each_part():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    luma = pixels @ [0.299, 0.587, 0.114]
    expected = luma.reshape(SIDE, 2, SIDE, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(fingerprint(pixels), expected, atol=0.51)


def test_few_details_count_less_as_they_agree_by_chance(monkeypatch):
    rng = np.random.default_rng(0)
    horizons = np.full((2, SIDE, SIDE), 90, np.uint8)
    horizons[:, 16:] = 160
    horizons += rng.integers(0, 6, horizons.shape, dtype=np.uint8)
    noise = rng.integers(0, 256, (1, SIDE, SIDE), dtype=np.uint8)
    assert extent(horizons).max() < 0.2 and extent(noise) > 0.8
    lowered = picture_correlation(horizons[:1], horizons[1:])
    assert picture_correlation(noise, noise) == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr(fingerprints, "STRICTEST", 1.0)
    plain = picture_correlation(horizons[:1], horizons[1:])
    np.testing.assert_allclose(1 - lowered, 2 * (1 - plain), rtol=1e-3)


def test_flat_pictures_have_nothing_to_compare():
    flat = np.full((2, SIDE, SIDE), 80, np.uint8)
    assert not picture_correlation(flat, flat).any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 700), (3000, 40)])
def test_any_size_has_a_fingerprint(shape):
    assert fingerprint(np.zeros((*shape, 3), np.uint8)).shape == (SIDE, SIDE)
