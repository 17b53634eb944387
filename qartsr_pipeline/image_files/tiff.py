"""Writing TIFF files, which Pillow cannot do with 16-bit colour, nor with compression and EXIF together. Format: TIFF 6.0."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction

import numpy as np
from PIL import TiffImagePlugin as Tiff
from PIL.ExifTags import Base

from qartsr_pipeline.image_files import exif
from qartsr_pipeline.image_files.image_file import Metadata

_SHORT, _LONG, _RATIONAL, _UNDEFINED = 3, 4, 5, 7
_XMP, _IPTC, _SAMPLE_FORMAT = 700, 33723, 339
# Tags that say how a file is built: those of the source's EXIF block, if it has any, are about another file.
_STRUCTURE = {
    *(254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293),
    *(301, 317, 318, 319, 320, 322, 323, 324, 325, 330, 332, 333, 334, 336, 337, 338, 339, 340, 341, 347),
    *range(512, 522),
    *(529, 530, 531, 532),
}


def encode_tiff(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """A TIFF file (one deflate strip) of (H, W, C) uint8 or uint16, C = 1, 2, 3 or 4.

    The EXIF block stands at the beginning, as it is, so that all offsets in it stay right; the file's directory, at the end, has
    the block's tags and the file's own.

    Raises:
        ValueError: more than 4 GiB.
    """
    height, width, channels = pixels.shape
    block = metadata.exif or b"II*\0" + struct.pack("<I", 8) + bytes(6)
    directories = exif.Directories(block)
    order = directories.order
    strip = zlib.compress(pixels.astype(np.dtype(f"{order}u{pixels.itemsize}")).tobytes(), 6)
    parts = [block, bytes(len(block) % 2), strip, bytes(len(strip) % 2)]
    end = sum(map(len, parts))
    if end + sum(len(one or b"") for one in (metadata.icc_profile, metadata.xmp, metadata.iptc)) >= 2**32 - 65536:
        raise ValueError("TIFF holds at most 4 GiB")
    tags = [
        _numbers(Tiff.IMAGEWIDTH, _LONG, order, width),
        _numbers(Tiff.IMAGELENGTH, _LONG, order, height),
        _numbers(Tiff.BITSPERSAMPLE, _SHORT, order, *[8 * pixels.itemsize] * channels),
        _numbers(Tiff.COMPRESSION, _SHORT, order, 8),  # deflate
        _numbers(Tiff.PHOTOMETRIC_INTERPRETATION, _SHORT, order, 1 if channels <= 2 else 2),  # black is zero, or RGB
        _numbers(Tiff.STRIPOFFSETS, _LONG, order, len(block) + len(block) % 2),
        _numbers(Tiff.SAMPLESPERPIXEL, _SHORT, order, channels),
        _numbers(Tiff.ROWSPERSTRIP, _LONG, order, height),
        _numbers(Tiff.STRIPBYTECOUNTS, _LONG, order, len(strip)),
    ]
    if channels in (2, 4):
        tags.append(_numbers(Tiff.EXTRASAMPLES, _SHORT, order, 2))  # alpha, not premultiplied
    if metadata.resolution:
        for axis, value in zip((Base.XResolution, Base.YResolution), metadata.resolution, strict=True):
            fraction = Fraction(round(value, 2)).limit_denominator(100)
            tags.append(_numbers(axis, _RATIONAL, order, fraction.numerator, fraction.denominator))
        tags.append(_numbers(Base.ResolutionUnit, _SHORT, order, 2))  # inch
    for number, data in ((_XMP, metadata.xmp), (_IPTC, metadata.iptc), (Tiff.ICCPROFILE, metadata.icc_profile)):
        if data:
            tags.append(exif.Tag(number, _UNDEFINED, len(data), data))
    own = {tag.number for tag in tags} | _STRUCTURE
    described = [exif.kept_in_place(tag, block) for tag in directories.read(directories.first) if tag.number not in own]
    directory = exif.packed(tags + described, order, end)
    header = block[:4] + struct.pack(f"{order}I", end)
    return b"".join([header, block[8:], *parts[1:], directory])


def _numbers(number: int, kind: int, order: str, *values: int) -> exif.Tag:
    data = struct.pack(f"{order}{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
    return exif.Tag(number, kind, len(values) // (2 if kind == _RATIONAL else 1), data)
