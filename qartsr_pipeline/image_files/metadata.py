"""Metadata on their way from one format to another: what fits, what is said to be left out, and how Pillow is told."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np

from qartsr_pipeline.image_files import exif, png
from qartsr_pipeline.image_files.image_file import Metadata

_PLAUSIBLE = (1, 65535)  # pixels per inch; all formats can hold these
_SEGMENT = 65533  # bytes in one segment of a JPEG file
_NAMES = {
    "icc_profile": "the colour profile",
    "exif": "the EXIF data",
    "xmp": "the XMP data",
    "iptc": "the IPTC data",
    "comment": "the comment",
    "resolution": "the resolution",
}


def turn_upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, C) as stored -> as meant to be seen, for an EXIF orientation of 1 to 8. Contiguous, any dtype."""
    if turn >= 5:  # rows and columns are exchanged; what is left after that is the same table
        pixels = pixels.transpose(1, 0, 2)
        turn = {5: 1, 6: 2, 7: 3, 8: 4}[turn]
    mirror: dict[int, slice | tuple[slice, slice]] = {1: np.s_[:], 2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}
    return np.ascontiguousarray(pixels[mirror[turn]])


def resized(metadata: Metadata, height: int, width: int) -> Metadata:
    """The metadata of the image when it has a new size."""
    return replace(
        metadata,
        exif=None if metadata.exif is None else exif.with_size(metadata.exif, height, width),
        xmp=None if metadata.xmp is None else exif.xmp_with_size(metadata.xmp, height, width),
    )


def fitting(metadata: Metadata, format_name: str, holds: frozenset[str]) -> tuple[Metadata, list[str]]:
    """What of the metadata a format can hold, and the names of what it cannot."""
    absurd = []
    if metadata.resolution and not all(_PLAUSIBLE[0] <= value <= _PLAUSIBLE[1] for value in metadata.resolution):  # NaN is not
        absurd = ["a resolution of {:g} x {:g} pixels per inch".format(*metadata.resolution)]
        metadata = replace(metadata, resolution=None)
    dropped = {name for name in _NAMES if name not in holds and getattr(metadata, name) is not None}
    lost = absurd + [_NAMES[name] for name in _NAMES if name in dropped]
    if "png_chunks" not in holds:
        dropped.add("png_chunks")
        lost += [f"the text {word!r}" for word in png.keywords(metadata.png_chunks)]
        colours = png.colour_chunks(metadata.png_chunks) if metadata.icc_profile is None else []
        lost += [f"{word}, so that colours will look different" for word in colours]
    if format_name == "JPEG":
        sizes = {"exif": 6, "xmp": 29, "iptc": 28, "comment": 0}  # with the name in front of each
        large = [name for name, more in sizes.items() if len(getattr(metadata, name) or b"") + more > _SEGMENT]
        dropped.update(large)
        lost += [f"{_NAMES[name]} (more than {_SEGMENT} bytes)" for name in large]
    if format_name == "WebP" and metadata.resolution:
        if metadata.exif is None:
            metadata = replace(metadata, exif=exif.block_with_resolution(metadata.resolution))
        elif exif.resolution(metadata.exif) is None:
            lost.append(_NAMES["resolution"])
    kept = {name: value for name, value in vars(metadata).items() if name not in dropped}
    return Metadata(**kept), lost


def pillow_arguments(metadata: Metadata, format_name: str) -> dict[str, object]:
    """The arguments that have Pillow write the metadata into a JPEG, WebP or BMP file."""
    arguments: dict[str, object] = {
        "icc_profile": metadata.icc_profile,
        "exif": None if metadata.exif is None else b"Exif\0\0" + metadata.exif,
        "xmp": metadata.xmp,
        "comment": metadata.comment,
        "dpi": metadata.resolution if format_name != "WebP" else None,
    }
    if metadata.iptc and format_name == "JPEG":
        resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(metadata.iptc)) + metadata.iptc
        content = b"Photoshop 3.0\0" + resource + bytes(len(metadata.iptc) % 2)
        arguments["extra"] = b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
    return {name: value for name, value in arguments.items() if value is not None}
