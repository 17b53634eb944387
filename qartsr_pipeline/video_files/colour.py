"""What the numbers of a clip's pixels mean. Codes are those of ITU-T H.273, which FFmpeg uses, too."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from fractions import Fraction

UNSPECIFIED = 2
RGB, BT709, BT601, BT2020 = 0, 1, 6, 9  # matrices
SRGB, PQ, HLG = 13, 16, 18  # transfer functions
# Shares of red and blue in the luma of each matrix.
LUMA = {
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}


@dataclass(frozen=True)
class Colour:
    """Attributes:
    matrix: between R'G'B' and Y'CbCr; `RGB` for pixels that are stored as R'G'B'.
    full_range: whether black is 0 and white the largest number.
    """

    matrix: int
    full_range: bool
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED

    @property
    def is_hdr(self) -> bool:
        return self.transfer in (PQ, HLG)

    @property
    def refusal(self) -> str | None:
        """Why pixels of this colour cannot be converted to R'G'B'; None if they can."""
        if self.matrix == RGB or self.matrix in LUMA:
            return None
        return f"its colours are stored by matrix {self.matrix} of ITU-T H.273, which is not supported"

    def specified(self, height: int, width: int) -> Colour:
        """With a matrix where the file names none: what players assume for frames of this size. It has to be settled before the
        frames become larger, because players would assume another one for the result."""
        if self.matrix != UNSPECIFIED:
            return self
        return replace(self, matrix=BT709 if height > 576 or width >= 1280 else BT601)

    def as_ycbcr(self) -> Colour:
        """For R'G'B' that is to be stored as Y'CbCr."""
        if self.matrix != RGB:
            return self
        transfer = SRGB if self.transfer == UNSPECIFIED else self.transfer
        primaries = 1 if self.primaries == UNSPECIFIED else self.primaries
        return Colour(BT2020 if primaries == 9 else BT709, False, primaries, transfer)


@dataclass(frozen=True)
class HdrMetadata:
    """The static metadata of HDR10.

    Attributes:
        primaries: (x, y) of red, green, blue and white of the screen that the clip was made on.
        luminance: (least, most) of that screen, in cd/m2.
        light: the most of any pixel, and of any frame's average, in cd/m2.
    """

    primaries: tuple[tuple[Fraction, Fraction], ...] | None = None
    luminance: tuple[Fraction, Fraction] | None = None
    light: tuple[int, int] | None = None

    @staticmethod
    def of_side_data(mastering: bytes | None, light: bytes | None) -> HdrMetadata | None:
        """From FFmpeg's structures AVMasteringDisplayMetadata and AVContentLightMetadata."""
        primaries = luminance = levels = None
        if mastering:
            *numbers, has_primaries, has_luminance = struct.unpack("22i", mastering[:88])
            ratios = [Fraction(n, d or 1) for n, d in zip(numbers[::2], numbers[1::2], strict=True)]
            if has_primaries:
                primaries = tuple(zip(ratios[0:8:2], ratios[1:8:2], strict=True))
            if has_luminance:
                luminance = (ratios[8], ratios[9])
        if light:
            levels = struct.unpack("2I", light[:8])
        return HdrMetadata(primaries, luminance, levels) if primaries or luminance or levels else None

    def parameters(self, encoder: str) -> str:
        """The option of libx264, libx265 or libsvtav1 that stores it; empty if there is nothing to store."""
        found = []
        if self.primaries and self.luminance:
            if encoder == "libsvtav1":
                show, light_show = (lambda value: f"{float(value):.5f}"), (lambda value: f"{float(value):.4f}")
            else:
                show, light_show = (lambda value: str(round(value * 50000))), (lambda value: str(round(value * 10000)))
            pairs = [f"({show(x)},{show(y)})" for x, y in self.primaries]
            least, most = self.luminance
            names = "R", "G", "B", "WP"
            shown = dict(zip(names, pairs, strict=True))
            screen = "".join(f"{name}{shown[name]}" for name in ("G", "B", "R", "WP"))
            key = "master-display" if encoder == "libx265" else "mastering-display"
            found.append(f"{key}={screen}L({light_show(most)},{light_show(least)})")
        if self.light:
            key = {"libx264": "cll", "libx265": "max-cll", "libsvtav1": "content-light"}[encoder]
            found.append(f"{key}={self.light[0]},{self.light[1]}")
        return ":".join(found)
