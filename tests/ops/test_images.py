"""Decoding against Pillow, the damage of contract §6, resizing against Pillow and torchvision, views by seed."""

import io
import math
import resource
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from ops.images import ImageError, augment, decode_image, normalize, resize

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


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_zeros(width, height):
    """A valid grey PNG of any size, in no time: one run of compressed rows, repeated (zlib: RFC 1950 and 1951)."""
    rows = math.gcd(height, 100)
    packer = zlib.compressobj(9, wbits=-15)
    run = packer.compress(bytes(rows * (width + 1))) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = ((width + 1) * height % 65521) << 16 | 1  # Adler-32 of zeros
    pixels = b"\x78\x01" + run * (height // rows) + packer.flush() + struct.pack(">I", checksum)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


JPEG_OPTIONS = [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"quality": 98, "optimize": True}]


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (201, 303), (1, 1), (7, 300)])
def test_jpeg_pixels_are_pillows(options, shape):
    data = encoded(photo(*shape), **options)
    image = decode_image(data)
    assert image.dtype == torch.uint8 and image.shape == (3, *shape)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - with_pillow(data))
    # 0 and 0 with torchvision 0.29 and Pillow 13; 1 is what another libjpeg may round differently.
    assert difference.max() <= 1 and difference.mean() <= 0.01


def numpy_png(array, **options):
    return encoded(Image.fromarray(array), "PNG", **options)


ODD_FILES = {
    "grey jpeg": lambda p: encoded(p.convert("L")),
    "cmyk jpeg": lambda p: encoded(p.convert("CMYK")),
    "rotated by exif": lambda p: encoded(
        p, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "jpeg with a tail": lambda p: encoded(p) + b"\0junk after the end" * 50,
    "png": lambda p: encoded(p, "PNG"),
    "grey png": lambda p: encoded(p.convert("L"), "PNG"),
    "1-bit png": lambda p: encoded(p.convert("1"), "PNG"),
    "palette png": lambda p: encoded(p.quantize(17), "PNG"),
    "palette png, transparent": lambda p: encoded(p.quantize(17), "PNG", transparency=bytes(range(17))),
    "alpha png": lambda p: encoded(Image.merge("RGBA", (*p.split(), p.convert("L"))), "PNG"),
    "grey alpha png": lambda p: encoded(p.convert("LA"), "PNG"),
    "animated png": lambda p: encoded(p, "PNG", save_all=True, append_images=[p.rotate(90)]),
    "webp": lambda p: encoded(p, "WEBP"),
    "lossless webp": lambda p: encoded(p, "WEBP", lossless=True),
    "alpha webp": lambda p: encoded(Image.merge("RGBA", (*p.split(), p.convert("L"))), "WEBP"),
    "animated webp": lambda p: encoded(p, "WEBP", save_all=True, append_images=[p.rotate(90)]),
    "animated gif": lambda p: encoded(p.convert("P"), "GIF", save_all=True, append_images=[p.rotate(90).convert("P")]),
    "bmp": lambda p: encoded(p, "BMP"),
    "tiff": lambda p: encoded(p, "TIFF", compression="tiff_lzw"),
    "ppm": lambda p: encoded(p, "PPM"),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("name", ODD_FILES)
def test_other_files_as_pillow_converts_them(name):
    data = ODD_FILES[name](photo(40, 60))
    np.testing.assert_array_equal(decode_image(data).permute(1, 2, 0).numpy(), with_pillow(data))


def test_16_bit_png_keeps_its_high_byte():
    values = (np.arange(64 * 48, dtype=np.uint16) * 21).reshape(64, 48)
    image = decode_image(numpy_png(values))
    np.testing.assert_array_equal(image.numpy(), np.broadcast_to(values >> 8, (3, 64, 48)))


def test_a_png_bomb_costs_nothing():
    assert (decode_image(png_of_zeros(70, 300)) == 0).all()  # what makes the bomb makes sound files
    data = png_of_zeros(50_000, 50_000)
    assert len(data) > 1_000_000
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ImageError, match=r"50,000 × 50,000 pixels exceed the limit of 100,000,000"):
        decode_image(data)
    assert time.perf_counter() - started < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KiB


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_limit_is_exact_for_every_format(kind):
    data = encoded(photo(20, 30), kind)
    assert decode_image(data, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(ImageError, match="30 × 20 pixels exceed the limit of 599"):
        decode_image(data, max_pixels=599)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"save_all": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}]
)
def test_webp_headers_are_read_before_pillow_opens_them(options, monkeypatch):
    pages = {"append_images": [photo(20, 30, seed=1)]} if "save_all" in options else {}
    data = encoded(photo(20, 30), "WEBP", **options, **pages)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ImageError, match="30 × 20 pixels exceed"):
        decode_image(data, max_pixels=599)


def test_half_a_jpeg_is_an_error_whatever_its_size_and_coding():
    for seed in range(10):
        for shape in [(32, 32), (8, 8), (60, 90), (256, 200)]:
            for options in JPEG_OPTIONS:
                data = encoded(photo(*shape, seed=seed), **options)
                for fraction in (0.25, 0.5, 0.75, 0.97):
                    with pytest.raises(ImageError, match="truncated JPEG"):
                        decode_image(data[: int(len(data) * fraction)])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_half_of_any_file_is_an_error(kind):
    data = encoded(photo(64, 64), kind)
    with pytest.raises(ImageError, match=r"truncated|broken|not an image"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html>", r"not an image \(starts with b'<!DOCTYP'\)"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "broken JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated image"),
        (b"\x89PNG\r\n\x1a\n" + b"\1" * 100, "exceed the limit"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "truncated image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (png_of_zeros(0, 5), "0 × 5 pixels"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def test_a_damaged_checksum_is_an_error():
    data = bytearray(encoded(photo(64, 64), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="broken PNG"):
        decode_image(bytes(data))


SAMPLES = [encoded(photo(24, 24), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6), st.data())
def test_whatever_the_bytes_an_image_or_an_image_error(data, changes, draw):
    data = bytearray(data)
    for at, value in changes:
        data[at % len(data)] = value
    data = bytes(data[: draw.draw(st.integers(0, len(data)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode_image(data, max_pixels=1_000_000)
        except ImageError as error:
            assert 0 < len(str(error)) < 200 and "\n" not in str(error)
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_an_image_error(data):
    with pytest.raises(ImageError):
        decode_image(data)


# Resizing


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
    assert batch.shape == (8, 3, 96, 96) and batch.dtype == torch.uint8 and batch.is_contiguous()
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
