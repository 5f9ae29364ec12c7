"""Encoded images -> uint8 RGB pixels, safely: the one way for encoders, training, the report and corruptions.

Pixels are those of Pillow's `Image.open(...).convert("RGB")`, which open_clip and most loaders of webdataset shards
use: alpha is dropped, an animation gives its first picture, and a picture is turned as its EXIF data says only where that
is asked for. What a file is, its content says, not its name. Only files of FORMATS, and of the two optional packages, are
ever opened, so none of Pillow's readers that start other programs (EPS) can be reached.
"""

import importlib
import io
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from ops.checks import check_choice

if TYPE_CHECKING:
    import torch

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
EXIF = ("ignore", "apply")
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # EXIF's tag

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TEXT_LIMIT = re.compile("[Dd]ecompressed data too large|[Tt]oo much memory used in text")  # as Pillow says it
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_EXIF_SEARCHED = 256 << 10  # bytes of a JPEG in which its EXIF data begins, before any pixel
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class ImageError(ValueError):
    """Bytes that are no usable image; the message is the reason, in a few words."""


class Picture(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    pixels : ndarray of shape (H, W, 3), uint8
        RGB.
    orientation : int
        What its EXIF data says, 1 … 8; 1, upright, also where it says nothing. 5 … 8 exchange width and height.
    """

    pixels: np.ndarray
    orientation: int


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, exif: str = "ignore") -> "torch.Tensor":
    """The pixels of an encoded image as a tensor of shape (3, H, W), uint8; parameters and errors of `decode_picture`.

    Its strides are those of (H, W, 3) memory, which resizing likes best.
    """
    import torch  # not at the top: who only looks at pictures does without

    return torch.from_numpy(decode_picture(data, max_pixels, exif).pixels).permute(2, 0, 1)


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS, exif: str = "ignore") -> Picture:
    """Decode an encoded image of one of FORMATS; HEIC with the package pillow-heif, JPEG XL with pillow-jxl-plugin.

    Parameters
    ----------
    data : bytes
        The whole file. Untrusted.
    max_pixels : int
        Larger pictures (width × height, from the header) are refused before a pixel is decoded. Pillow's own
        limit of 178,956,970 stays in force for all formats but JPEG and can't be raised here.
    exif : {"ignore", "apply"}
        Whether the picture is turned as its EXIF data says. TIFF, and HEIC, whose readers turn by themselves, always are.

    Returns
    -------
    picture : Picture

    Raises
    ------
    ImageError
        Zero bytes, no image, too many pixels, truncated, broken.
    ValueError
        For another `exif`.

    Notes
    -----
    JPEG (grey and colour) goes through libjpeg-turbo by simplejpeg. On the pinned versions its pixels are Pillow's
    (maximal difference 0 over sizes, qualities, subsamplings, progressive or not); other builds of libjpeg may differ by 1.
    A JPEG of which libjpeg-turbo has more to say than that it is cut is Pillow's to judge, as is all else, so what Pillow
    reads is never called broken. One departure from Pillow: of 16-bit grey the high byte is taken, where `convert` clips at
    255 and turns such pictures white. Damage inside a JPEG that leaves its end marker in place is not noticed, here as in
    Pillow.
    """
    check_choice("exif", exif, EXIF)
    if len(data) == 0:
        raise ImageError("zero bytes")
    found = _decode_jpeg(data, max_pixels) if data.startswith(_JPEG) else None
    array, orientation = found if found is not None else _decode_with_pillow(data, max_pixels)
    if exif == "apply" and orientation in _TURNS:
        array = np.ascontiguousarray(_TURNS[orientation](array))
    return Picture(array, orientation)


def format_of(data: bytes) -> str:
    """What an image file is, by its first bytes: the usual suffix of such files; "other" for anything else."""
    known = (
        ("jpg", _JPEG), ("png", _PNG), ("gif", b"GIF8"), ("bmp", b"BM"), ("tif", b"II*\0"), ("tif", b"MM\0*"),
        ("tif", b"II+\0"), ("tif", b"MM\0+"), ("jxl", _JXL[0]), ("jxl", _JXL[1]),
    )  # fmt: skip
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif" if _is_avif(data) else "heic" if data[8:12] in _HEIF_BRANDS else "other"
    return next((suffix for suffix, magic in known if data.startswith(magic)), "other")


def _decode_jpeg(data: bytes, max_pixels: int) -> tuple[np.ndarray, int] | None:
    """Pixels (H, W, 3) and orientation; None for what Pillow has to decide."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, max_pixels)
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB"), _orientation_of_jpeg(data)
    except ValueError as error:
        if "Premature end" in str(error):
            raise ImageError("truncated JPEG") from None
        return None


def _orientation_of_jpeg(data: bytes) -> int:
    at = data.find(b"Exif\0\0", 0, _EXIF_SEARCHED)
    if at < 0:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data[at : at + (1 << 16)])
        return _valid_orientation(exif.get(ORIENTATION))
    except Exception:  # EXIF data is as broken as it likes; the picture is none the worse
        return 1


def _valid_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width:,} × {height:,} pixels exceed the limit of {max_pixels:,}")
    if width * height == 0:
        raise ImageError(f"{width} × {height} pixels")


def _decode_with_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    size, formats = _header_size(data), _formats(data)
    if size is not None:
        _check_pixels(*size, max_pixels)
    try:
        return _opened(data, formats, max_pixels)
    except _TooMuchText:
        return _opened(_without_text(data), formats, max_pixels)
    except UnidentifiedImageError:
        what = "not an image" if size is None else "broken image"
        raise ImageError(f"{what} (starts with {data[:8]!r})") from None


class _TooMuchText(Exception):
    """Pillow's limits on a PNG's text and colour profile, which are no pixels."""


def _opened(data: bytes, formats: tuple[str, ...], max_pixels: int) -> tuple[np.ndarray, int]:
    picture = None
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            _check_pixels(*picture.size, max_pixels)
            array = _rgb(picture)
            return array, _orientation_of(picture)
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken data
        if data.startswith(_JPEG) and (b"\xff\xd9" not in data or "truncated" in str(error).lower()):
            raise ImageError("truncated JPEG") from None
        if data.startswith(_PNG) and _TEXT_LIMIT.search(str(error)):
            raise _TooMuchText from None
        if isinstance(error, UnidentifiedImageError) and not data.startswith(_JPEG):
            raise
        kind = "JPEG" if data.startswith(_JPEG) else picture.format if picture is not None else "image"
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ImageError(f"broken {kind} ({re.sub(r' <_io.*?>', '', reason)})") from None


def _orientation_of(picture: Image.Image) -> int:
    try:
        return _valid_orientation(picture.getexif().get(ORIENTATION))
    except Exception:  # as in a JPEG
        return 1


def _rgb(picture: Image.Image) -> np.ndarray:
    """Pixels of shape (H, W, 3), uint8, in memory of their own."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.getextrema()[1] > 255):
        high_byte = (np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats that these bytes may be opened as; ImageError that names the package where one is missing."""
    kind = format_of(data)
    if kind == "jxl":
        return ("JXL",) if _plugin("pillow_jxl") else _missing("JPEG XL", "pillow-jxl-plugin")
    if kind == "heic":
        return ("HEIF",) if _plugin("pillow_heif", "register_heif_opener") else _missing("HEIC", "pillow-heif")
    return FORMATS


def _is_avif(data: bytes) -> bool:
    # The brands follow in a box that begins the file; a HEIF file of another codec may name mif1 first, as AVIF may.
    return any(brand in data[8 : min(72, int.from_bytes(data[:4], "big"))] for brand in (b"avif", b"avis"))


def _missing(format: str, package: str) -> tuple[str, ...]:
    raise ImageError(f"{format}, which needs the package {package}")


def _plugin(module: str, register: str | None = None) -> bool:
    """Whether an optional reader is installed; it is Pillow's from then on."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    if register is not None:
        getattr(found, register)()
    return True


def _without_text(data: bytes) -> bytes:
    """A PNG without its text and colour profile, which no pixel here depends on (PNG specification, 5.3)."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        if data[at + 4 : at + 8] not in _PNG_TEXT:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


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
