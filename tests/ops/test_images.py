"""Resizing against Pillow and torchvision, views by seed."""

import io
import resource
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ops.images import augment, normalize, resize

CLIP_MEAN, CLIP_STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def photo(height, width, seed=0):
    """Smooth waves, an edge and some noise: what a photograph asks of a codec."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (7 + 3 * c + seed) + y / (11 - 2 * c)) for c in range(3)]
    picture = np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    picture[height // 3 :, : width // 2] *= 0.5
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(picture, kind="JPEG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def with_pillow(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tensor_of(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "size"), [(512, 224), (32, 96), (300, 31), (8, 8), (1, 5)])
def test_squares_resize_as_pillow_does(side, size, interpolation):
    picture = photo(side, side)
    expected = np.asarray(picture.resize((size, size), getattr(Image, interpolation.upper())), dtype=int)
    found = resize([tensor_of(picture)], size, interpolation)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() <= 0.02


def test_near_to_resize_then_crop():
    """The order torchvision's transforms take; ours shifts by half a pixel at most."""
    picture = Image.fromarray(np.asarray(photo(333, 500)))
    both = v2.Compose([v2.Resize(96, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(96)])
    difference = (resize([tensor_of(picture)], 96)[0].float() - both(tensor_of(picture)).float()).abs()
    assert difference.mean() < 3.0


def test_bicubic_overshoot_is_clamped():
    edge = torch.zeros(3, 16, 16, dtype=torch.uint8)
    edge[:, :, 8:] = 255
    larger = resize([edge], 64)[0]
    assert (larger[:, :, :24] < 20).all() and (
        larger[:, :, 40:] > 235
    ).all()  # a wrap-around would leave 250 on the left


def test_a_batch_equals_its_images_alone_in_order():
    shapes = [(32, 32), (50, 40), (32, 32), (9, 200), (96, 96), (50, 40), (32, 64), (200, 9)]
    images = [tensor_of(photo(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    batch = resize(images, 96)
    assert batch.shape == (8, 3, 96, 96) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    alone = torch.cat([resize([image], 96) for image in images])
    assert torch.equal(batch, alone)


def test_only_the_centre_square_is_used():
    image = tensor_of(photo(40, 400))
    changed = image.clone()
    changed[:, :, :180] = 0
    changed[:, :, 220:] = 255
    assert torch.equal(resize([image], 20), resize([changed], 20))
    assert not torch.equal(resize([image], 20, resize_mode="squash"), resize([changed], 20, resize_mode="squash"))


def test_very_elongated_images_are_cheap():
    long = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 2, 5_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resize([long], 224).shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


def test_normalize_is_its_formula():
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8))
    mean, std = np.array(CLIP_MEAN).reshape(3, 1, 1), np.array(CLIP_STD).reshape(3, 1, 1)
    expected = (batch.numpy() / 255.0 - mean) / std
    np.testing.assert_allclose(normalize(batch, CLIP_MEAN, CLIP_STD).numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "images: is empty"),
        ([torch.zeros(3, 4, 4)], {}, r"images: expected uint8 of shape \(3, H, W\), got torch.float32"),
        ([torch.zeros(4, 4, dtype=torch.uint8)], {}, r"\(4, 4\)"),
        (
            [torch.zeros(3, 4, 4, dtype=torch.uint8)],
            {"interpolation": "cubic"},
            "interpolation: must be one of bicubic",
        ),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], {"resize_mode": "fit"}, "resize_mode: must be one of shortest"),
    ],
)
def test_resize_names_the_wrong_argument(images, options, message):
    with pytest.raises(ValueError, match=message):
        resize(images, 8, **options)


# Augmented views


def test_views_follow_their_seed_only():
    image = tensor_of(photo(32, 32))
    views = [augment(image, (3, 14, view)) for view in range(40)]
    again = [augment(image, (3, 14, view)) for view in range(40)]
    assert all(torch.equal(a, b) for a, b in zip(views, again))
    assert len({view.numpy().tobytes() for view in views}) > 30


@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (8, 8), (5, 90), (1, 1)])
def test_a_view_is_a_shifted_perhaps_mirrored_picture_on_black(shape):
    """Padded with black by an eighth and cropped, by the slow way: one of the (2p+1)² × 2 possible."""
    image = tensor_of(photo(*shape)) | 1  # no black of its own
    pad_y, pad_x = shape[0] // 8, shape[1] // 8
    padded = torch.nn.functional.pad(image, (pad_x, pad_x, pad_y, pad_y))
    crops = padded.unfold(1, shape[0], 1).unfold(2, shape[1], 1)  # (3, shifts_y, shifts_x, H, W)
    crops = crops.permute(1, 2, 0, 3, 4).flatten(0, 1)
    possible = {c.numpy().tobytes() for c in crops} | {c.flip(2).numpy().tobytes() for c in crops}
    found = {augment(image, seed).numpy().tobytes() for seed in range(60)}
    assert found <= possible
    assert len(found) > 1 or shape == (1, 1)


def test_half_of_the_views_are_mirrored():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, :8] = 200
    mirrored = sum(augment(image, seed)[0, 8, -4].item() > 0 for seed in range(400))
    assert 160 < mirrored < 240
