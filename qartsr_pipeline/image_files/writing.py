"""Writing an image file: complete or not at all, in the format that its suffix names."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from qartsr_pipeline.image import GREY_WEIGHTS
from qartsr_pipeline.image_files import png
from qartsr_pipeline.image_files.image_file import ImageFile, ImageFileError, Metadata
from qartsr_pipeline.image_files.metadata import fitting, pillow_arguments, resized
from qartsr_pipeline.image_files.tiff import encode_tiff
from qartsr_pipeline.whole_files import SavingError, check_place, write_whole


@dataclass(frozen=True)
class Format:
    """What a file format can hold.

    Attributes:
        name: Pillow's name for it.
        holds: which of `Metadata` it can hold, by name.
        alpha, sixteen_bit: whether it holds transparency, and 16 bits a channel.
        lossy: whether it takes a quality.
        options: for Pillow's encoder, besides the quality.
    """

    name: str
    holds: frozenset[str]
    alpha: bool = False
    sixteen_bit: bool = False
    lossy: bool = False
    largest_side: int = 2**31 - 1
    options: tuple[tuple[str, int], ...] = ()


DEFAULT_QUALITY = 95
_ROWS = 256  # converted at a time
_PHOTOGRAPH = frozenset({"icc_profile", "exif", "xmp", "iptc", "resolution"})
_JPEG = Format("JPEG", _PHOTOGRAPH | {"comment"}, lossy=True, largest_side=65500, options=(("subsampling", 0),))
_TIFF = Format("TIFF", _PHOTOGRAPH, alpha=True, sixteen_bit=True)
WRITABLE_FORMATS = {
    ".png": Format("PNG", _PHOTOGRAPH | {"comment", "png_chunks"}, alpha=True, sixteen_bit=True),
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), _JPEG),
    ".webp": Format("WebP", _PHOTOGRAPH - {"iptc"}, alpha=True, lossy=True, largest_side=16383, options=(("method", 4),)),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format("BMP", frozenset({"resolution"})),
}


def check_writable(path: str | os.PathLike, height: int = 0, width: int = 0) -> None:
    """Checks, before the pixels exist, that the format is known and holds so many pixels, and that the folder takes files.

    Raises:
        ImageFileError: with the reason and the ways out. Nothing is left behind.
    """
    path = Path(path)
    kind = _format_of(path)
    if max(height, width) > kind.largest_side:
        raise ImageFileError(
            f"{path} would have {width} x {height} pixels, but {kind.name} holds at most {kind.largest_side} a side."
            " Write a .png or .tif."
        )
    try:
        check_place(path)
    except SavingError as error:
        raise ImageFileError(str(error)) from error


class Bands(Protocol):
    """The pixels of an image in bands of rows, from top to bottom."""

    @property
    def height(self) -> int: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...


def write_image(
    path: str | os.PathLike, pixels: np.ndarray | Bands, source: ImageFile, quality: int = DEFAULT_QUALITY
) -> list[str]:
    """Writes a result with the bits and metadata of the file it was made from.

    Args:
        path: its suffix chooses the format, see `WRITABLE_FORMATS`. An existing file is replaced, in one step.
        pixels: (H, W, 3) or (H, W, 4) float in [0, 1], whole or in bands; values outside are clipped. Grey again if `source` is.
        source: the image file that was read.
        quality: of JPEG and WebP, 1 to 100; other formats are lossless.

    Returns:
        What the format could not hold, one sentence each, for the user to see: alpha is laid over white, 16 bits become 8.

    Raises:
        ImageFileError: unknown suffix, too many pixels for the format, folder missing or not writable, disk full. Whatever the
            failure, no half-written file remains and an existing one is untouched.
    """
    path = Path(path)
    kind = _format_of(path)
    pixels, notices = _collected(pixels, source, kind)
    height, width = pixels.shape[:2]
    if max(width, height) > kind.largest_side:
        check_writable(path, height, width)
    metadata, lost = fitting(resized(source.metadata, height, width), kind.name, kind.holds)
    if lost:
        notices.append(f"{path.name}: {kind.name} cannot hold {', '.join(lost)}; left out. Write a .png to keep more.")
    options = dict(kind.options) | ({"quality": quality} if kind.lossy else {})
    try:
        write_whole(path, _encoded(pixels, kind, metadata, options))
    except SavingError as error:
        raise ImageFileError(str(error)) from error
    except (ValueError, OSError, struct.error) as error:  # an encoder's refusal, such as EXIF beyond JPEG's 64 kB
        raise ImageFileError(f"{path} cannot be written in this format: {error}. Write a .png or .tif.") from error
    return notices


def _format_of(path: Path) -> Format:
    kind = WRITABLE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ImageFileError(f"{path} does not end in a known image format. Use one of {', '.join(WRITABLE_FORMATS)}.")
    return kind


def _collected(pixels: np.ndarray | Bands, source: ImageFile, kind: Format) -> tuple[np.ndarray, list[str]]:
    """What `_fitted` gives for the whole image, of which only some rows are floats at a time."""
    bands: Iterator[np.ndarray]
    if isinstance(pixels, np.ndarray):
        height = len(pixels)
        bands = (pixels[start : start + _ROWS] for start in range(0, height, _ROWS))
    else:
        height, bands = pixels.height, iter(pixels)
    first, notices = _fitted(next(bands), source, kind)
    values = np.empty((height, *first.shape[1:]), first.dtype)
    values[: len(first)], done = first, len(first)
    for band in bands:
        values[done : done + len(band)], done = _fitted(band, source, kind)[0], done + len(band)
    return values, notices


def _fitted(pixels: np.ndarray, source: ImageFile, kind: Format) -> tuple[np.ndarray, list[str]]:
    """(H, W, C) float -> uint8 or uint16 in channels that the format has, and what was lost."""
    notices = []
    colour, alpha = np.clip(pixels[..., :3], 0, 1), np.clip(pixels[..., 3:], 0, 1)
    if alpha.shape[-1] and not kind.alpha:
        notices.append(f"{kind.name} holds no transparency; it is laid over white. Write a .png to keep it.")
        colour, alpha = colour * alpha + (1 - alpha), alpha[..., :0]
    if source.pixels.shape[2] <= 2:
        colour = (colour @ np.array(GREY_WEIGHTS, np.float32))[..., None]
    sixteen_bit = source.sixteen_bit and kind.sixteen_bit
    if source.sixteen_bit and not sixteen_bit:
        notices.append(f"{kind.name} holds 8 bits, the source has 16. Write a .png or .tif to keep them.")
    values = np.concatenate([colour, alpha], axis=-1)
    return np.rint(values * (65535 if sixteen_bit else 255)).astype(np.uint16 if sixteen_bit else np.uint8), notices


def _encoded(pixels: np.ndarray, kind: Format, metadata: Metadata, options: dict[str, int]) -> bytes | memoryview:
    if kind.name == "TIFF":
        return encode_tiff(pixels, metadata)
    if pixels.dtype == np.uint16:
        return png.with_metadata(png.encode_sixteen_bits(pixels), metadata)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    # Not straight into the file: Pillow's encoders take a short write, as on a full disk, for a whole one.
    encoded = io.BytesIO()
    if kind.name == "PNG":
        image.save(encoded, "PNG")
        return png.with_metadata(encoded.getbuffer(), metadata)
    image.save(encoded, kind.name, **options, **pillow_arguments(metadata, kind.name))
    return encoded.getbuffer()
