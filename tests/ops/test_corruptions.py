"""Corruptions: deterministic by seed, stronger by severity, and their definitions on pictures where those are known."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from ops.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ops.decoding import decode_image


def photograph(side):
    picture = Image.fromarray(load_sample_image("china.jpg")[:427, 100:527])
    return torch.from_numpy(np.array(picture.resize((side, side), Image.Resampling.BICUBIC))).permute(2, 0, 1)


SMALL, LARGE = photograph(32), photograph(112)


def as_array(image):
    return image.permute(1, 2, 0).numpy() / 255.0


def distance(image, kind, severity, seed=0):
    return (corrupt(image, kind, severity, seed).float() - image.float()).abs().mean().item()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_same_seed_same_picture(kind):
    for image in (SMALL, LARGE[:, :70, :]):
        before = image.clone()
        first, again = corrupt(image, kind, 4, seed=(1, 2)), corrupt(image, kind, 4, seed=(1, 2))
        assert first.dtype == torch.uint8 and first.shape == image.shape
        assert torch.equal(first, again) and torch.equal(image, before) and not torch.equal(first, image)


RANDOM = ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur"]
RANDOM += ["snow", "frost", "fog", "spatter", "elastic_transform"]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_another_seed_another_picture_where_there_is_chance(kind):
    differs = not torch.equal(corrupt(LARGE, kind, 4, seed=1), corrupt(LARGE, kind, 4, seed=2))
    assert differs == (kind in RANDOM)


# Not in order, by their published constants: saturate (two directions), elastic_transform (other parameters at 3),
# glass_blur, snow, frost, and spatter of thumbnails (water, then mud).
MONOTONE = ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "fog"]
MONOTONE += ["motion_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg"]


@pytest.mark.parametrize("kind", MONOTONE)
def test_severity_rises(kind):
    changes = [distance(LARGE, kind, severity) for severity in SEVERITIES]
    assert changes == sorted(changes) and changes[-1] > 1.2 * changes[0]


@pytest.mark.parametrize("kind", ["gaussian_noise", "gaussian_blur", "contrast", "jpeg"])
def test_thumbnails_have_milder_constants(kind):
    smaller = [distance(SMALL, kind, severity) for severity in SEVERITIES]
    assert smaller == sorted(smaller)
    assert distance(photograph(63), kind, 5) < distance(photograph(64), kind, 5)


def grey(value, side=224):
    return torch.full((3, side, side), value, dtype=torch.uint8)


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.08), (3, 0.18)])
def test_gaussian_noise_has_its_deviation(severity, sigma):
    noise = as_array(corrupt(grey(128), "gaussian_noise", severity)) - 128 / 255
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, sigma], atol=0.002)
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T)[0, 1:]).max() < 0.02  # channels are independent


def test_shot_and_speckle_noise_have_theirs():
    shot = as_array(corrupt(grey(51), "shot_noise", 2))
    np.testing.assert_allclose([shot.mean(), shot.var()], [0.2, 0.2 / 25], rtol=0.03)
    speckle = as_array(corrupt(grey(102), "speckle_noise", 1))
    np.testing.assert_allclose([speckle.mean(), speckle.std()], [0.4, 0.4 * 0.15], rtol=0.03)


def test_impulse_noise_hits_its_fraction():
    values = as_array(corrupt(grey(128), "impulse_noise", 5))
    np.testing.assert_allclose([(values == 0).mean(), (values == 1).mean()], 0.27 / 2, atol=0.005)


@pytest.mark.parametrize(("image", "sigma"), [(photograph(224), 3.0), (LARGE, 1.5), (SMALL, 0.7)])
def test_gaussian_blur_is_its_definition(image, sigma):
    """Severity 3: 3 pixels of 224, so half as many of 112; 0.7 of a thumbnail's."""
    found = as_array(corrupt(image, "gaussian_blur", 3))
    expected = np.stack([ndimage.gaussian_filter(c, sigma, mode="nearest") for c in image.numpy() / 255.0], axis=-1)
    np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("kind", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "glass_blur"])
def test_blurs_keep_a_plain_picture(kind):
    for image in (grey(90, 32), grey(90, 100)):
        assert torch.equal(corrupt(image, kind, 5), image)


def test_defocus_spreads_a_point_over_its_disc():
    point = torch.zeros(3, 224, 224, dtype=torch.uint8)
    point[:, 108:117, 108:117] = 255
    bright = as_array(corrupt(point, "defocus_blur", 5))[..., 0]
    np.testing.assert_allclose(bright.sum(), 81, rtol=0.02)
    reach = np.ptp(np.flatnonzero(bright.max(axis=0) > 0.02)) + 1
    assert 25 <= reach <= 31  # 9 pixels wide, radius 10 on either side
    assert np.abs(bright[112 - 40 : 112 + 41, 112 - 40 : 112 + 41].T - bright[72:153, 72:153]).max() < 0.01


def test_defocus_grows_with_the_picture():
    def spread(side):
        point = torch.zeros(3, side, side, dtype=torch.uint8)
        point[:, side // 2, side // 2] = 255
        return np.ptp(np.flatnonzero(corrupt(point, "defocus_blur", 2)[0].amax(dim=0))) + 1  # a radius of 4 of 224

    assert spread(112) == 5 and 8 <= spread(224) <= 11


def test_motion_blur_runs_more_across_than_down():
    point = torch.zeros(3, 224, 224, dtype=torch.uint8)
    point[:, 110:114, 110:114] = 255
    for seed in range(6):
        bright = corrupt(point, "motion_blur", 4, seed)[0] > 2
        down, across = (np.ptp(np.flatnonzero(bright.any(dim=axis))) for axis in (1, 0))
        assert across >= down and across > 8


@pytest.mark.parametrize(("image", "factors"), [
    (LARGE, (0.4, 0.3, 0.2, 0.1, 0.05)), (SMALL, (0.75, 0.5, 0.4, 0.3, 0.15)),
])  # fmt: skip
def test_contrast_is_its_definition(image, factors):
    x = as_array(image)
    mean = x.mean(axis=(0, 1))
    for severity, factor in zip(SEVERITIES, factors):
        found = as_array(corrupt(image, "contrast", severity))
        np.testing.assert_allclose(found, (x - mean) * factor + mean, atol=0.5 / 255 + 1e-9)


@pytest.mark.parametrize("kind", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 4])
def test_hsv_corruptions_against_colorsys(kind, severity):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8))
    image[:, 0, :8], image[:, 1, :8] = 0, 77  # black and grey have no hue
    factor, added = [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)][severity - 1]

    def slow(rgb):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        if kind == "brightness":
            return colorsys.hsv_to_rgb(h, s, min(v + severity / 10, 1))
        return colorsys.hsv_to_rgb(h, min(s * factor + added, 1), v)

    expected = np.apply_along_axis(slow, -1, as_array(image))
    np.testing.assert_allclose(as_array(corrupt(image, kind, severity)), expected, atol=0.51 / 255)


def test_pixelate_makes_blocks():
    blocks = corrupt(photograph(224), "pixelate", 5)  # a quarter of 224: 4 × 4 blocks
    assert torch.equal(blocks, blocks[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    tiny = corrupt(photograph(8), "pixelate", 5)
    assert tiny.shape == (3, 8, 8)


def test_jpeg_is_a_jpeg_of_its_quality():
    stream = io.BytesIO()
    Image.fromarray(LARGE.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=10)
    assert torch.equal(corrupt(LARGE, "jpeg", 4), decode_image(stream.getvalue()))


def test_fog_keeps_the_brightest_value_possible():
    assert corrupt(LARGE, "fog", 5).max() <= LARGE.max()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 70), (64, 65)])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_any_size_works(kind, shape):
    for value in (0, 255):
        image = torch.full((3, *shape), value, dtype=torch.uint8)
        assert corrupt(image, kind, 5).shape == (3, *shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rain"}, "kind: must be one of gaussian_noise, .*got 'rain'"),
        ({"severity": 6}, "severity: must be an integer from 1 to 5, got 6"),
        ({"severity": 0}, "got 0"),
        ({"image": torch.zeros(3, 4, 4)}, r"image: expected uint8 of shape \(3, H, W\), got torch.float32"),
        ({"image": torch.zeros(4, 4, dtype=torch.uint8)}, r"of \(4, 4\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(**({"image": SMALL, "kind": "fog", "severity": 1} | options))
