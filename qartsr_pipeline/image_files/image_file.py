"""What a picture file holds besides its pixels, and the error that its problems raise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class PictureError(ValueError):
    """A picture file cannot be read or written. The message says what happened, why, and the ways out."""


@dataclass
class PictureFile:
    """The content of a picture file, upright.

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
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[1], self.pixels.shape[0]
