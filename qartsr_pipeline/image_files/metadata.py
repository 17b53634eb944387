"""EXIF: the orientation is applied to the pixels, and what describes the photograph is taken over."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.ExifTags import IFD, Base

# Tags of the main directory that say something about the photograph. A TIFF file's directory also says where its strips lie and
# how they are compressed: none of that may reach another file.
_KEPT = {
    Base.ImageDescription,
    Base.Make,
    Base.Model,
    Base.Orientation,
    Base.XResolution,
    Base.YResolution,
    Base.ResolutionUnit,
    Base.Software,
    Base.DateTime,
    Base.Artist,
    Base.HostComputer,
    Base.Copyright,
    Base.ExifOffset,
    Base.GPSInfo,
}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where none or nonsense is given."""
    value = image.getexif().get(Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def turn_upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, C) as stored -> as meant to be seen, for an EXIF orientation of 1 to 8. Contiguous, any dtype."""
    if turn >= 5:  # rows and columns are exchanged; what is left after that is the same table
        pixels = pixels.transpose(1, 0, 2)
        turn = {5: 1, 6: 2, 7: 3, 8: 4}[turn]
    mirror: dict[int, slice | tuple[slice, slice]] = {1: np.s_[:], 2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}
    return np.ascontiguousarray(pixels[mirror[turn]])


def kept_exif(image: Image.Image) -> bytes | None:
    """The describing tags of `image` as an EXIF block with the orientation set to upright; None if there are none."""
    exif = image.getexif()
    for tag in list(exif):
        if tag not in _KEPT:
            del exif[tag]
    if not exif:
        return None
    if Base.Orientation in exif:
        exif[Base.Orientation] = 1
    return _serialized(exif)


def exif_for_size(block: bytes | None, height: int, width: int) -> bytes | None:
    """The EXIF block with the image's new size, where it records one."""
    if block is None:
        return None
    exif = Image.Exif()
    exif.load(block)
    details = exif.get_ifd(IFD.Exif)
    if Base.ExifImageWidth in details:
        details[Base.ExifImageWidth], details[Base.ExifImageHeight] = width, height
    return _serialized(exif)


def _serialized(exif: Image.Exif) -> bytes | None:
    # Cameras write odd values that Pillow reads but cannot write again; a photograph is not refused for that.
    try:
        block = exif.tobytes()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    return block if block.startswith(b"Exif\x00\x00") else b"Exif\x00\x00" + block
