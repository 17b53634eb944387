"""What Pillow's images mean: the range of their values, their transparent colour, their orientation. Free of torch."""

from __future__ import annotations

import struct

import numpy as np
import PIL.Image
import PIL.ImageFile
from PIL import TiffImagePlugin as Tiff
from PIL.ExifTags import Base

_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def plain_mode(image: PIL.Image.Image) -> str:
    """The smallest of the modes L, LA, RGB and RGBA that holds an 8-bit image."""
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    return ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")


def is_grey_16(image: PIL.Image.Image) -> bool:
    """Whether the image has one channel of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def undefined_range(image: PIL.Image.Image) -> str | None:
    """Which values an image has that cannot be understood without knowing what they measure; None for ordinary images."""
    if image.mode == "F":
        return "floating-point values"
    if not isinstance(image, Tiff.TiffImageFile):
        return None
    if max(image.tag_v2.get(Tiff.SAMPLEFORMAT, (1,))) == 2:
        return "signed values"
    return "32-bit values" if image.mode == "I" else None


def has_deep_planes(image: PIL.Image.Image) -> bool:
    """Whether a TIFF file has 16-bit channels one after the other, uncompressed: Pillow takes their bytes for 8-bit values."""
    if not isinstance(image, Tiff.TiffImageFile) or image.info.get("compression") != "raw":
        return False
    tags = image.tag_v2
    return tags.get(Tiff.PLANAR_CONFIGURATION) == 2 and max(tags.get(Tiff.BITSPERSAMPLE, (1,))) == 16


def grey_levels(image: PIL.Image.Image) -> np.ndarray:
    """(H, W) of an image for which `is_grey_16`: 0 is black, 65535 is white.

    Pillow leaves to its users that a TIFF file may have white as zero, and 12 bits. An image in memory that has mode "I" may have
    any values; they are returned as they are.
    """
    tags = image.tag_v2 if isinstance(image, Tiff.TiffImageFile) else {}
    bits, white_is_zero = max(tags.get(Tiff.BITSPERSAMPLE, (16,))), tags.get(Tiff.PHOTOMETRIC_INTERPRETATION) == 0
    levels = np.asarray(image)
    if bits < 16:
        largest = (1 << bits) - 1
        levels = ((levels.astype(np.uint32) * 65535 + largest // 2) // largest).astype(np.uint16)
    return 65535 - levels if white_is_zero else levels


def load(image: PIL.Image.Image) -> None:
    """Decodes an opened image, unless that was done before.

    Pillow maps uncompressed files that were opened by their path into memory. For TIFF files that lie on their side it does so
    with sides already exchanged, which gives a sheared image (11.0 to 13.0 at least). Without the name it reads the file.
    And 11.0 fails when it turns an image with XMP.
    """
    if isinstance(image, Tiff.TiffImageFile) and image.tile:
        name, image.filename = image.filename, ""
        xmp = {"xmp": image.info.pop("xmp")} if "xmp" in image.info else {}
        try:
            image.load()
        finally:
            image.filename = name
            image.info.update(xmp)
    else:
        image.load()


def transparent_value(image: PIL.Image.Image) -> int | tuple[int, ...] | None:
    """The value of all channels that means "transparent", in the units of the loaded pixels (1-bit images: of mode "L").

    To be asked before the image is loaded: afterwards nobody knows how many bits the file has, and Pillow scales the pixels of
    PNG files, but not this value. None where there is no such value, or Pillow understands it (palettes).
    """
    value = image.info.get("transparency")
    if isinstance(value, bytes) or value is None or image.mode not in ("1", "L", "I;16", "I", "RGB"):
        return None
    tiles = image.tile if isinstance(image, PIL.ImageFile.ImageFile) else []
    stored = {tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in tiles}
    if image.mode == "RGB":
        deep = "RGB;16B" in stored or max(value) > 255
        return tuple(one >> 8 if deep else one for one in value)
    if image.mode == "1":
        return 255 if value else 0
    return value * {"L;2": 85, "L;4": 17}.get(next(iter(stored), ""), 1)


def orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or where the EXIF data are damaged."""
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, EOFError, struct.error):
        return 1
    return value if value in range(1, 9) else 1


def turned_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The loaded image as it is meant to be seen. Pillow turns TIFF files while it loads them."""
    turn = orientation(image)
    return image.transpose(_TURNS[turn]) if turn > 1 else image
