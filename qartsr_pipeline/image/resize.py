"""Resampling and padding, and what transparent images need for it: colours to resample, and their alpha channel enlarged."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FULL_WEIGHT = 1 / 16  # from this alpha on, a pixel's own colour counts in full
ROUNDING = 1e-6  # the filter's weights add up to 1 only up to this


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic resampling (a = -0.5, the one of Pillow). Not clamped: bicubic overshoots at edges.

    Args:
        image: float32 (B, C, H, W), any range.
        size: (height, width) of the result.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)


def enlarged_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(round(height * factor), round(width * factor)), at least one pixel each."""
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def pad_to_multiple(image: torch.Tensor, multiple: int, minimum: int) -> torch.Tensor:
    """Mirrors the right and bottom edge until both sides are multiples of `multiple` and at least `minimum` long.

    Works on any size from 1 x 1: unlike torch's reflection the mirror image may be longer than the image itself.

    Args:
        image: (B, C, H, W).
    """
    for axis in (-2, -1):
        length = image.shape[axis]
        wanted = -(-max(length, minimum) // multiple) * multiple
        if wanted > length:
            image = image.index_select(axis, mirror_indices(length, wanted))
    return image


def mirror_indices(length: int, wanted: int) -> torch.Tensor:
    """0, 1, .. length-1, length-2, .. 1, 0, 1, ..: `wanted` of them, without repeating the edge pixel."""
    period = max(1, 2 * (length - 1))
    position = torch.arange(wanted) % period
    return torch.minimum(position, period - position) if length > 1 else torch.zeros_like(position)


def fill_transparent(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Replaces the colours of transparent pixels by their visible neighbours', so that an enlargement of the result never mixes
    the arbitrary colours stored under transparency (often black or white) into visible pixels.

    Push-pull: colours are averaged, weighted by visibility, over ever larger blocks; going back, a pixel takes from the
    coarser level what its own visibility lacks. An image that is transparent everywhere is returned as it is.

    Args:
        rgb: float32 (1, 3, H, W) in [0, 1], straight colour.
        alpha: float32 (1, 1, H, W) in [0, 1].

    Returns:
        (1, 3, H, W), equal to `rgb` wherever alpha is at least `FULL_WEIGHT`.
    """
    weight = (alpha / FULL_WEIGHT).clamp(max=1)
    if bool((weight == 1).all()) or not bool(weight.any()):
        return rgb
    return _push_pull(rgb * weight, weight)


def _push_pull(weighted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Colours for every pixel from weighted colours (1, 3, H, W) and weights (1, 1, H, W) in [0, 1]."""
    height, width = weight.shape[-2:]
    if height == width == 1:
        return weighted / weight.clamp(min=1e-12)
    pooled = [F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (weighted, weight)]
    peak = pooled[1].clamp(min=1e-12)
    strength = (2 * pooled[1]).clamp(max=1)  # half a block visible is enough to stand for the block
    coarse = _push_pull(pooled[0] / peak * strength, strength)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return weighted + (1 - weight) * coarse


def enlarge_alpha(alpha: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic enlargement to `size`, in [0, 1]; areas wholly opaque or wholly transparent stay exactly so.

    Args:
        alpha: float32 (1, 1, H, W).
    """
    enlarged = resize(alpha, size)
    enlarged = torch.where(enlarged > 1 - ROUNDING, 1.0, enlarged)
    return torch.where(enlarged < ROUNDING, 0.0, enlarged)


class PaddedEnlargement:
    """What `resize` and `pad_to_multiple` make of an image, of which only the windows that are asked for are computed.

    Args:
        image: float32 (B, C, H, W).
        scale: whole number.
        size: (height, width) with the padding; None without any.
    """

    MARGIN = 3  # pixels of the image around a window, more than bicubic interpolation looks at

    def __init__(self, image: torch.Tensor, scale: int, size: tuple[int, int] | None = None) -> None:
        self.image, self.scale = image, scale
        sides = [scale * side for side in image.shape[-2:]]
        self._rows, self._columns = (mirror_indices(side, wanted) for side, wanted in zip(sides, size or sides, strict=True))

    def __getitem__(self, window: tuple) -> torch.Tensor:
        """`padded[..., rows, columns]` with two slices without steps."""
        rows, columns = self._rows[window[-2]], self._columns[window[-1]]
        (top, bottom), (left, right) = (self._around(*one) for one in ((rows, -2), (columns, -1)))
        part = self.image[..., top:bottom, left:right]
        part = resize(part, (self.scale * part.shape[-2], self.scale * part.shape[-1]))
        return part.index_select(-2, rows - self.scale * top).index_select(-1, columns - self.scale * left)

    def _around(self, indices: torch.Tensor, axis: int) -> tuple[int, int]:
        """Which pixels of the image these of the enlargement depend on."""
        first, last = int(indices.min()) // self.scale, int(indices.max()) // self.scale
        return max(0, first - self.MARGIN), min(self.image.shape[axis], last + 1 + self.MARGIN)
