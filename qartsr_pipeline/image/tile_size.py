"""How an image is cut: the tile size asked for, or one chosen from the memory that is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from qartsr_pipeline.image.tiles import TileGrid, tile_grid
from qartsr_pipeline.memory import free_main_memory

TILE_SIZES = (1024, 768, 512, 256)  # what automatic choice chooses from, pixels of the enlarged image
WHOLE_IMAGE = 1024 * 1024  # up to so many enlarged pixels an image is not tiled if memory suffices
MINIMUM_TILE = 64
MINIMUM_SIDE = 128  # smaller images are padded by mirroring: models have seen nothing smaller in training
OVERLAP_IN_MULTIPLES = 4  # automatic overlap, in units of the network's total down-sampling: its padding reaches that far
USABLE_SHARE = 0.5  # of the free memory: the estimate is rough, and other programs use the device, too
LIVE_MAPS = 8  # full-resolution maps alive at the decoder's widest point; measured 720 to 1200 bytes where this says 1024
SURE_SHARE = 0.7  # of that estimate, which a pass takes in any case


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on the device now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_main_memory()


def bytes_per_pixel(vae: AutoencoderKL, itemsize: int) -> int:
    """Estimated peak of one pass of the network, per pixel of the enlarged image.

    The peak is the decoder's last up-sampling: feature maps as large as the image with the channels of the second level.
    """
    channels = vae.config["block_out_channels"]
    return LIVE_MAPS * itemsize * max(channels[: min(2, len(channels))])


def choose_tile_size(size: tuple[int, int], pixel_bytes: int, memory: int) -> int | None:
    """None (the whole image at once) or one of `TILE_SIZES`.

    Args:
        size: (height, width) of the enlarged image.
        pixel_bytes: see `bytes_per_pixel`.
        memory: free bytes, of which `USABLE_SHARE` may be used. When not even the smallest tile fits it is chosen all the same:
            the estimate may be too careful.
    """
    pixels = int(memory * USABLE_SHARE) // pixel_bytes
    height, width = size
    if height * width <= min(WHOLE_IMAGE, pixels):
        return None
    return next((side for side in TILE_SIZES if side * side <= pixels), TILE_SIZES[-1])


@dataclass(frozen=True)
class TilePlan:
    """How one image is cut.

    Attributes:
        grid: the tiles.
        multiple: the padded image's sides are multiples of it.
        minimum: and at least this long.
        latent_factor: pixels per latent element along each axis.
    """

    grid: TileGrid
    multiple: int
    minimum: int
    latent_factor: int


def plan_tiles(
    size: tuple[int, int],
    tile_size: int | None,
    tile_overlap: int | None,
    multiple: int,
    latent_factor: int,
    automatic: Callable[[tuple[int, int]], int | None],
) -> TilePlan:
    """Rounds what the user asked for and lays out the grid.

    Args:
        size: (height, width) of the enlarged image.
        tile_size, tile_overlap: as in `QArtSRPipeline.__call__`.
        automatic: called with the padded (height, width) when `tile_size` is None; returns the tile size, or None for no tiles.
    """
    minimum = MINIMUM_SIDE if tile_size is None else min(MINIMUM_SIDE, tile_size)
    height, width = (-(-max(side, minimum) // multiple) * multiple for side in size)
    padded = (height, width)
    tile = automatic(padded) if tile_size is None else tile_size
    if tile is not None:
        tile = tile // multiple * multiple
    overlap = min(OVERLAP_IN_MULTIPLES * multiple, (tile or 0) // 4) if tile_overlap is None else tile_overlap
    overlap = -(-overlap // multiple) * multiple
    if tile is not None:
        overlap = min(overlap, tile - multiple)
    return TilePlan(tile_grid(padded, tile, overlap, multiple), multiple, minimum, latent_factor)
