"""How large a result is to be, by the inputs of QArtSR Upscale, and resampling to sizes below the image's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LARGEST_SCALE = 8
BY_SCALE = "scale, or long_side"
LONG_SIDE, SHORT_SIDE, MEGAPIXELS = "long side", "short side", "megapixels"
FIXED = {"x2": 2.0, "x4": 4.0}
SIZES = (BY_SCALE, *FIXED, LONG_SIDE, SHORT_SIDE, MEGAPIXELS)  # in users' workflows: new ones at the end
MEGAPIXEL = 1024 * 1024  # as in core's Scale Image to Total Pixels


@dataclass(frozen=True)
class Sizing:
    """The inputs that decide the size; see the node's tooltips."""

    scale: float = 4.0
    long_side: int = 0
    size: str = BY_SCALE
    side: int = 2048
    megapixels: float = 4.0

    def factor(self, image: tuple[int, int]) -> float:
        """The enlargement of an image of (height, width); below 1 if the target is smaller than the image.

        Raises:
            ValueError: more than `LARGEST_SCALE` times; the message says what is possible.
        """
        longest, shortest = max(image), min(image)
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r} is none of {', '.join(SIZES)}.")
        if self.size in FIXED:
            return FIXED[self.size]
        if self.size == MEGAPIXELS:
            factor = math.sqrt(self.megapixels * MEGAPIXEL / (longest * shortest))
            largest = longest * shortest * LARGEST_SCALE**2 / MEGAPIXEL
            return _possible(factor, f"megapixels {self.megapixels:g}", f"at most {math.floor(largest * 100) / 100:g} megapixels")
        if self.size in (LONG_SIDE, SHORT_SIDE):
            length = longest if self.size == LONG_SIDE else shortest
            asked = f"{self.size} {self.side}, which is {self.side / length:.3g} times the image's {length} pixels,"
            return _possible(self.side / length, asked, f"at most {length * LARGEST_SCALE} pixels")
        if self.long_side:
            factor = self.long_side / longest
            asked = f"long_side {self.long_side}, which is {factor:.3g} times the image's {longest} pixels,"
            return _possible(factor, asked, f"long_side up to {longest * LARGEST_SCALE}")
        return _possible(self.scale, f"scale {self.scale:g}", f"scale up to {LARGEST_SCALE}")

    @property
    def decided_by(self) -> str:
        """In words for the line that is shown after a run."""
        if self.size == MEGAPIXELS:
            return f"{self.megapixels:g} megapixels"
        if self.size in (LONG_SIDE, SHORT_SIDE):
            return f"{self.size} {self.side}"
        if self.size == BY_SCALE:
            return f"long_side {self.long_side}" if self.long_side else f"scale {self.scale:g}"
        return self.size


def _possible(factor: float, asked: str, possible: str) -> float:
    if not 0 < factor <= LARGEST_SCALE:
        raise ValueError(
            f"{asked} is not possible: choose {possible}. For more, connect a second QArtSR Upscale behind this one."
        )
    return factor


def resample(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(1, 3 or 4, H, W) in [0, 1] -> (3 or 4, *size), bicubic, without a model; colours under alpha 0 do not bleed."""
    from qartsr_pipeline.image.conversion import to_images
    from qartsr_pipeline.image.resize import enlarge_alpha, fill_transparent, resize

    given = to_images(image)[0]
    rgb = given.rgb if given.alpha is None else fill_transparent(given.rgb, given.alpha)
    channels = [resize(rgb, size).clamp(0, 1)]
    if given.alpha is not None:
        channels.append(enlarge_alpha(given.alpha, size))
    return torch.cat(channels, 1)[0]
