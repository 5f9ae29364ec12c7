"""Decoding against Pillow, and the damage that files come with."""

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
from PIL import Image, ImageOps

from ops.decoding import ImageError, decode_image, decode_picture, format_of


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
    "avif": lambda p: encoded(p, "AVIF"),
    "jpeg with junk between segments": lambda p: (d := encoded(p))[:20] + b"\0\0" + d[20:],
    "jpeg with fill bytes": lambda p: (d := encoded(p))[:20] + b"\xff" * 9 + d[20:],
    "jpeg with a second end": lambda p: encoded(p) + b"\xff\xd9",
    "jpeg in RGB": lambda p: encoded(p, keep_rgb=True),
    "jpeg with damage inside": lambda p: (d := encoded(p))[:700] + bytes(20) + d[720:],
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
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


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_half_of_any_file_is_an_error(kind):
    data = encoded(photo(64, 64), kind)
    with pytest.raises(ImageError, match=r"truncated|broken|not an image"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html>", r"not an image \(starts with b'<!DOCTYP'\)"),
        (b"\xff\xd8\xff", "broken JPEG|truncated JPEG"),
        (
            b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99),
            "HEIC, which needs the package pillow-heif|broken|not an image",
        ),
        (b"\xff\x0a" + bytes(99), "JPEG XL, which needs the package pillow-jxl-plugin|broken|not an image"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50 + b"\xff\xd9", "broken JPEG"),
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


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_text_and_profiles_of_a_png_are_no_part_of_its_pixels(kind):
    """8 MB of text or colour profile, packed to some KB: Pillow alone refuses the picture for it."""
    data = encoded(photo(20, 30), "PNG")
    packed = zlib.compress(b"x" * 8_000_000)
    body = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0", "iCCP": b"p\0\0"}[kind] + packed
    odd = data[:33] + chunk(kind.encode(), body) + data[33:]
    np.testing.assert_array_equal(decode_image(odd), decode_image(data))


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte_in_every_format(kind):
    values = (np.arange(64 * 48, dtype=np.uint16) * 21).reshape(64, 48)
    data = encoded(Image.fromarray(values), "TIFF")
    if kind == "PPM":
        data = b"P5 48 64 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(data).numpy(), np.broadcast_to(values >> 8, (3, 64, 48)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_a_picture_only_where_it_is_asked_for(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(20, 32), kind, exif=exif.tobytes())
    as_stored, turned = decode_picture(data), decode_picture(data, exif="apply")
    assert as_stored.orientation == turned.orientation == orientation
    np.testing.assert_array_equal(as_stored.pixels, with_pillow(data))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(turned.pixels, expected)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
)
def test_broken_exif_costs_nothing(exif):
    assert decode_picture(encoded(photo(20, 30), exif=exif), exif="apply").orientation == 1


def test_another_exif_is_named():
    with pytest.raises(ValueError, match="exif"):
        decode_image(encoded(photo(8, 8)), exif="turn")


def test_an_eps_file_never_starts_ghostscript(monkeypatch):
    """Whatever it is called; Pillow's EPS reader would run gs on it."""
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("started"))
    eps = encoded(photo(20, 30), "EPS")
    with pytest.raises(ImageError, match="not an image"):
        decode_image(eps)


def test_heic_is_decoded_where_its_package_is_installed():
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(photo(64, 48)).save(stream, quality=90)
    image = decode_image(stream.getvalue())
    assert image.shape == (3, 64, 48)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(photo(64, 48)))
    assert difference.mean() < 12


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("AVIF", "avif"),
        ("PPM", "other"),
    ],
)
def test_what_a_file_is(kind, suffix):
    assert format_of(encoded(photo(8, 8), kind)) == suffix


def test_decoding_imports_neither_torchvision_nor_torch():
    import subprocess
    import sys

    code = "import sys, ops.decoding as d; d.decode_picture(sys.stdin.buffer.read()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=SAMPLES[0], capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]
