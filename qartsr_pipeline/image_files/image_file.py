"""The content of an image file, and the error for files that cannot be read or written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class ImageFileError(ValueError):
    """An image file cannot be read or written. The message says what happened, why, and the ways out."""


@dataclass(frozen=True)
class Metadata:
    """What an image file holds besides its pixels. Bytes are copied as they are, so no text changes its encoding.

    Attributes:
        icc_profile: the colour profile that the pixels are in; None means sRGB, unless `png_chunks` say otherwise.
        exif: an EXIF block, which begins with its byte order, `II` or `MM`. Its orientation is "upright", as the pixels are.
        xmp: an XMP packet; its orientation is "upright", too.
        iptc: IPTC-IIM records: caption, keywords, credit.
        comment: the comment of a JPEG or GIF file.
        resolution: pixels per inch, (horizontal, vertical).
        png_chunks: (name, content) of the chunks that only PNG has: texts (prompts of ComfyUI and A1111) and colour (gAMA, cICP).
    """

    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    comment: bytes | None = None
    resolution: tuple[float, float] | None = None
    png_chunks: tuple[tuple[bytes, bytes], ...] = ()


@dataclass
class ImageFile:
    """The content of an image file, upright.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, full range; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA (alpha not premultiplied).
        metadata: what else the file holds.
        notices: what could not be taken over from the file, one sentence each, for the user to see.
    """

    pixels: np.ndarray
    metadata: Metadata = Metadata()
    notices: list[str] = field(default_factory=list)

    @property
    def sixteen_bit(self) -> bool:
        return self.pixels.dtype == np.uint16

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)

    @property
    def hides_colors(self) -> bool:
        """Whether transparent pixels have colours that differ from each other: textures have them, cut-out photographs, too."""
        if not self.has_alpha:
            return False
        hidden = self.pixels[self.pixels[..., -1] == 0][:, :-1]
        return hidden.size > 0 and bool((np.ptp(hidden, axis=0) > np.iinfo(hidden.dtype).max // 16).any())

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]
