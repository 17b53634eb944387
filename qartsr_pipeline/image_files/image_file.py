"""The content of an image file, and the error for files that cannot be read or written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class ImageFileError(ValueError):
    """An image file cannot be read or written. The message says what happened, why, and the ways out."""


@dataclass
class ImageFile:
    """The content of an image file, upright.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, full range; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA (alpha not premultiplied).
        icc_profile: the colour profile that `pixels` are in; None means sRGB.
        exif: EXIF block starting with `Exif\\0\\0`, its orientation reset because the pixels are upright already; or None.
        notices: what could not be taken over from the file, one sentence each, for the user to see.
    """

    pixels: np.ndarray
    icc_profile: bytes | None = None
    exif: bytes | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def sixteen_bit(self) -> bool:
        return self.pixels.dtype == np.uint16

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]
