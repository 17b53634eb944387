"""What Pillow cannot write: PNG with 16-bit colour, and TIFF with 16-bit colour or with compression and EXIF together."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.ExifTags import IFD

_ROWS = 64  # filtered at once


def encode_png(pixels: np.ndarray, icc_profile: bytes | None = None, exif: bytes | None = None) -> bytes:
    """A 16-bit PNG file of (H, W, C) uint16, C = 1, 2, 3 or 4; `exif` with or without its leading `Exif\\0\\0`."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if icc_profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    chunks += [(b"IDAT", _compressed(rows, 2 * channels)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _compressed(rows: np.ndarray, step: int) -> bytes:
    """The rows, (H, bytes) uint8 with `step` bytes a pixel, filtered and compressed block by block: small temporaries."""
    compressor = zlib.compressobj(6)
    with_first = np.pad(rows[:1], ((1, 0), (0, 0)))  # above the first row are zeros
    packed = [compressor.compress(_filtered(with_first, step))]
    for start in range(0, len(rows) - 1, _ROWS):
        packed.append(compressor.compress(_filtered(rows[start : start + _ROWS + 1], step)))
    return b"".join([*packed, compressor.flush()])


def _filtered(rows: np.ndarray, step: int) -> bytes:
    """PNG's filter type 4 (Paeth), with which photographs compress best, on every row but the first, which is only above."""
    padded = np.pad(rows.astype(np.int16), ((0, 0), (step, 0)))
    rows = rows[1:]
    left, above, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    distance = [np.abs(above - corner), np.abs(left - corner), np.abs(left + above - 2 * corner)]
    nearest = np.where(distance[1] <= distance[2], above, corner)
    nearest = np.where((distance[0] <= distance[1]) & (distance[0] <= distance[2]), left, nearest)
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 4
    filtered[:, 1:] = (rows - nearest).astype(np.uint8)
    return filtered.tobytes()


def encode_tiff(pixels: np.ndarray, icc_profile: bytes | None = None, exif: bytes | None = None) -> bytes:
    """A TIFF file (little-endian, one deflate strip) of (H, W, C) uint8 or uint16, C = 1, 2, 3 or 4."""
    height, width, channels = pixels.shape
    strip = zlib.compress(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), 6)
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    for tag, value in _exif_tags(exif).items():
        directory[tag] = value
    directory[TiffImagePlugin.IMAGEWIDTH] = width
    directory[TiffImagePlugin.IMAGELENGTH] = height
    directory[TiffImagePlugin.BITSPERSAMPLE] = (8 * pixels.itemsize,) * channels
    directory[TiffImagePlugin.COMPRESSION] = 8  # deflate
    directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 1 if channels <= 2 else 2  # black is zero, or RGB
    directory[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    directory[TiffImagePlugin.ROWSPERSTRIP] = height
    directory[TiffImagePlugin.STRIPOFFSETS] = 0  # counted from the directory's end: Pillow adds that
    directory[TiffImagePlugin.STRIPBYTECOUNTS] = len(strip)
    if channels in (2, 4):
        directory[TiffImagePlugin.EXTRASAMPLES] = 2  # alpha, not premultiplied
    if icc_profile:
        directory.tagtype[TiffImagePlugin.ICCPROFILE] = 7
        directory[TiffImagePlugin.ICCPROFILE] = icc_profile
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + strip


def _exif_tags(block: bytes | None) -> dict:
    if block is None:
        return {}
    exif = Image.Exif()
    exif.load(block)
    return {tag: exif.get_ifd(tag) if tag in (IFD.Exif, IFD.GPSInfo) else value for tag, value in exif.items()}
