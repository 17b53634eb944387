"""OSEDiff's tiles: equal squares over the latent, one UNet call each, averaged with Gaussian weights.

Not what the pipeline does by default (see tiles.py): here only the UNet is tiled, tiles start at fixed steps with the last one
moved back inside, and every tile has its own group normalisation statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

VARIANCE = 0.01  # of the Gaussian, in units of the tile's side squared


def in_latent_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int, overlap: int
) -> torch.Tensor:
    """`function` on tiles of `latents`, averaged; at once where the latent's area is at most that of a tile.

    OSEDiff averages the predicted noise. The step from it to z_H is the same affine map for every tile, so averaging z_H, what
    `function` gives, is the same.

    Args:
        function: (B, C, h, w) -> the same shape.
        latents: (B, C, h, w).
        tile: longest side of a tile; shorter where the latent is shorter.
        overlap: of neighbours; the last two of an axis may have more in common.

    Raises:
        ValueError: the overlap leaves no step from tile to tile.
    """
    height, width = latents.shape[-2:]
    if height * width <= tile * tile:
        return function(latents)
    tile = min(tile, height, width)
    if not 0 <= overlap < tile:
        raise ValueError(
            f"latent tiles of {tile} cannot overlap by {overlap}. Give an overlap from 0 to below that, or a larger image."
        )
    weights = gaussian_weights(tile).to(latents.device)
    result = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    total = torch.zeros((height, width), dtype=torch.float64, device=latents.device)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            window = (..., slice(top, top + tile), slice(left, left + tile))
            result[window] += function(latents[window]) * weights
            total[window] += weights
    return (result / total).to(latents.dtype)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First elements of the tiles along an axis: steps of tile - overlap, the last tile ends with the axis."""
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    return [*(i * (tile - overlap) for i in range(count - 1)), length - tile]


def gaussian_weights(tile: int) -> torch.Tensor:
    """(tile, tile), float64. Centred on tile / 2 vertically and (tile - 1) / 2 horizontally, as in OSEDiff."""
    position = torch.arange(tile, dtype=torch.float64)

    def bell(centre: float) -> torch.Tensor:
        return torch.exp(-((position - centre) ** 2) / (2 * VARIANCE * tile**2))

    return bell(tile / 2)[:, None] * bell((tile - 1) / 2)[None, :]
