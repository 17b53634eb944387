"""Reading 16-bit images, which Pillow opens but, except for grey ones, delivers with 8 bits.

Pillow's decoders do the work (filters, interlacing, compression, byte order), and an unpacker then picks the high byte of every
value. Decoding a second time with the unpacker for the other byte order picks the low byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Unpacker that delivers the high bytes -> the one that delivers the low bytes.
_LOW_BYTE = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB")}
_LOW_BYTE.update({f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBA")})


def is_sixteen_bit(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded image has 16 bits a channel in its file."""
    return image.mode == "I" or image.mode.startswith("I;16") or any(";16" in name for name in _unpackers(image))


def read_sixteen_bits(path: Path, image: Image.Image) -> np.ndarray | None:
    """(H, W, C) uint16 of an opened, not yet loaded 16-bit image; None where it cannot be had (planes stored apart, CMYK)."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            return None
        return values.astype(np.uint16)[..., None]
    unpackers = _unpackers(image)
    if unpackers == {"LA;16B"}:
        # Grey and alpha, 2 + 2 bytes: read as they lie, as the four channels of an 8-bit image.
        return _decode(path, "RGBA").view(">u2").astype(np.uint16)
    if len(unpackers) != 1 or not unpackers <= set(_LOW_BYTE):
        return None
    (unpacker,) = unpackers
    return _decode(path, unpacker).astype(np.uint16) << 8 | _decode(path, _LOW_BYTE[unpacker])


def _unpackers(image: Image.Image) -> set[str]:
    """The names of Pillow's unpackers for this file ("raw modes"): the first argument of every tile's decoder."""
    arguments = (tile.args for tile in getattr(image, "tile", []))
    names = {given[0] if isinstance(given, tuple) else given for given in arguments if given}
    return {name for name in names if isinstance(name, str)}


def _decode(path: Path, unpacker: str) -> np.ndarray:
    """(H, W, C) uint8 of the file at `path`, read through another unpacker."""
    with Image.open(path) as image:
        image.tile = [
            tile._replace(args=(unpacker, *tile.args[1:]) if isinstance(tile.args, tuple) else unpacker) for tile in image.tile
        ]
        return np.array(image)
