"""Resampling and padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
