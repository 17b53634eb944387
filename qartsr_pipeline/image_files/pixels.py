"""The pixels of an opened image as 8-bit or 16-bit values, with the full range that the file means.

Pillow's decoders do the work (filters, interlacing, compression, byte order). What it gets wrong or leaves to its users is done
here: 16-bit colour, which it delivers with 8 bits; grey values of 12 bits or with white as zero; TIFF planes of 16 bits.

16-bit colour: an unpacker of Pillow picks the high byte of every value. Decoding a second time with the unpacker for the other
byte order picks the low byte.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile
from PIL import TiffImagePlugin as Tiff
from PIL.ExifTags import Base

from qartsr_pipeline.image.pil_images import grey_levels, has_deep_planes, is_grey_16, plain_mode, undefined_range
from qartsr_pipeline.image_files.metadata import turn_upright

# Unpacker that delivers the high bytes -> the one that delivers the low bytes.
_LOW_BYTE = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBX", "RGBA") for order, other in ("BL", "LB")}
_LOW_BYTE.update({f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBX", "RGBA")})
_PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX")


class UnreadablePixels(ValueError):
    """An image is sound, but its values cannot be understood. The message lacks the file's name in front."""


# Opens the file anew: decoding changes an opened image.
Opener = Callable[[], Image.Image]


def read_pixels(image: Image.Image, reopen: Opener, file: BinaryIO) -> tuple[np.ndarray, bool, list[str]]:
    """The pixels of an opened, not yet loaded image.

    Args:
        image: its TIFF orientation is applied, as Pillow does; other formats' are not.
        reopen: opens the same file.
        file: the same file's bytes.

    Returns:
        (H, W, C) uint8 or uint16; whether they are in the colours of the file's profile; and notices.

    Raises:
        UnreadablePixels: values without a defined range, or stored in a way that is not read.
    """
    undefined = undefined_range(image)
    if undefined:
        raise UnreadablePixels(f"holds {undefined}, whose range is not known. Convert it to a 16-bit image.")
    if is_grey_16(image):
        levels = grey_levels(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise UnreadablePixels("holds 32-bit values, whose range is not known. Convert it to a 16-bit image.")
        return levels.astype(np.uint16, copy=False)[..., None], True, []
    if has_deep_planes(image) and isinstance(image, Tiff.TiffImageFile):
        return _planes(image, image.tag_v2, file), True, []
    pixels = None if _in_planes(image) else _sixteen_bits(image, reopen)
    if pixels is not None:
        return pixels, True, []
    notices = ["stores more than 8 bits in a way that can only be read at 8 bits."] if _deeper(image, file) else []
    pixels, in_profile = _eight_bits(image)
    if not in_profile:
        notices.append(f"has {image.mode} colours, which become sRGB.")
    return pixels, in_profile, notices


def _sixteen_bits(image: Image.Image, reopen: Opener) -> np.ndarray | None:
    """(H, W, C) uint16; None where the file has 8 bits, or Pillow cannot deliver 16."""
    unpackers = _unpackers(image)
    if unpackers == {"LA;16B"}:
        # Grey and alpha, 2 + 2 bytes: read as they lie, as the four channels of an 8-bit image.
        return _decoded(reopen(), "RGBA").view(">u2").astype(np.uint16)
    premultiplied = unpackers <= {"RGBa;16L", "RGBa;16B", "RGBa;16N"}
    unpackers = {name.replace("RGBa", "RGBA") for name in unpackers}
    if len(unpackers) != 1 or not unpackers <= set(_LOW_BYTE):
        return None
    (unpacker,) = unpackers
    pixels = _decoded(reopen(), unpacker).astype(np.uint16) << 8 | _decoded(reopen(), _LOW_BYTE[unpacker])
    return _divided_by_alpha(pixels) if premultiplied else pixels


def _divided_by_alpha(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint16 with colours multiplied by alpha -> straight colours."""
    alpha = np.maximum(pixels[..., 3:].astype(np.float32), 1)
    pixels[..., :3] = np.rint(np.minimum(pixels[..., :3] * (65535 / alpha), 65535))
    return pixels


def _unpackers(image: Image.Image) -> set[str]:
    """The names of Pillow's unpackers for this file ("raw modes"): the first argument of every tile's decoder."""
    arguments = (tile.args for tile in _tiles(image))
    names = {given[0] if isinstance(given, tuple) else given for given in arguments if given}
    return {name for name in names if isinstance(name, str)}


def _tiles(image: Image.Image) -> list[ImageFile._Tile]:
    return image.tile if isinstance(image, ImageFile.ImageFile) else []


def _decoded(image: Image.Image, unpacker: str) -> np.ndarray:
    """(H, W, C) uint8 of an opened image, read through another unpacker."""
    with image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [
            tile._replace(args=(unpacker, *tile.args[1:]) if isinstance(tile.args, tuple) else unpacker) for tile in image.tile
        ]
        return np.array(image)


def _in_planes(image: Image.Image) -> bool:
    """Whether a TIFF file stores its channels one after the other: its unpackers cannot be chosen then."""
    return isinstance(image, Tiff.TiffImageFile) and image.tag_v2.get(Tiff.PLANAR_CONFIGURATION) == 2


def _planes(image: Image.Image, tags: Tiff.ImageFileDirectory_v2, file: BinaryIO) -> np.ndarray:
    """(H, W, C) uint16, upright, of uncompressed channels that are stored one after the other."""
    if image.mode not in ("RGB", "RGBA") or Tiff.STRIPOFFSETS not in tags or max(tags.get(Tiff.EXTRASAMPLES, (2,))) != 2:
        raise UnreadablePixels("stores 16-bit planes in a way that is not read. Save it with interleaved channels.")
    width, height, count = tags[Tiff.IMAGEWIDTH], tags[Tiff.IMAGELENGTH], len(image.getbands())
    data = b""
    for offset, length in zip(tags[Tiff.STRIPOFFSETS], tags[Tiff.STRIPBYTECOUNTS], strict=True):
        file.seek(offset)
        data += file.read(length)
    kind = np.dtype("<u2" if tags.prefix == b"II" else ">u2")
    pixels = np.frombuffer(data[: 2 * count * height * width], kind).reshape(count, height, width)
    turn = tags.get(Base.Orientation, 1)
    return turn_upright(pixels.transpose(1, 2, 0).astype(np.uint16), turn if turn in range(1, 9) else 1)


def _deeper(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the file has more than 8 bits a channel, although Pillow delivers 8."""
    if any(";16" in name for name in _unpackers(image)):
        return True
    if image.format == "PPM":
        return any(isinstance(tile.args, tuple) and tile.args[-1] > 255 for tile in _tiles(image))
    file.seek(0)
    head = file.read(65536)
    if image.format == "JPEG2000":
        start = head.find(b"\xff\x4f\xff\x51")  # the size segment: channels, and for each its bits - 1, the sign above them
        depths = head[start + 42 :: 3][: head[start + 41]] if start >= 0 else b""
        return any(depth & 127 > 7 for depth in depths)
    if image.format in ("AVIF", "HEIF"):
        start = head.find(b"av1C")
        return start >= 0 and bool(head[start + 6] & 0x40) or image.info.get("bit_depth", 8) > 8
    return False


def _eight_bits(image: Image.Image) -> tuple[np.ndarray, bool]:
    """(H, W, C) uint8, and whether they are in the colours of the file's profile."""
    image.load()
    in_profile = image.mode in _PLAIN or image.mode == "YCbCr"
    converted = image if image.mode in _PLAIN else _to_srgb(image)
    pixels = np.asarray(converted.convert(plain_mode(converted)))
    return pixels.reshape(*pixels.shape[:2], -1), in_profile


def _to_srgb(image: Image.Image) -> Image.Image:
    """CMYK, Lab and the like, whose profile does not describe the RGB values that come out."""
    icc_profile = image.info.get("icc_profile")
    if image.mode == "LAB" or icc_profile:
        try:
            lab = image.mode == "LAB"
            source = ImageCms.createProfile("LAB") if lab else ImageCms.ImageCmsProfile(io.BytesIO(icc_profile or b""))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:  # None is for conversions in place
                return converted
        except (ImageCms.PyCMSError, OSError, struct.error):
            pass  # a profile of another colour space or a broken one: the plain conversion below is what viewers do, too
    return image.convert("RGB")


def with_transparent_value(pixels: np.ndarray, value: tuple[int, ...], depth: int) -> np.ndarray:
    """Grey or RGB pixels, (H, W, 1 or 3), with an alpha channel that is 0 where all channels have the given value.

    Args:
        value: as PNG stores it, with `depth` bits.
    """
    full, largest = np.iinfo(pixels.dtype).max, (1 << depth) - 1
    key = np.array([(one & largest) * full // largest for one in value], pixels.dtype)
    opaque = (pixels != key).any(-1, keepdims=True)
    return np.concatenate([pixels, opaque.astype(pixels.dtype) * full], -1)
