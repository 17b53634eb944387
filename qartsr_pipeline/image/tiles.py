"""Tiles: their size, asked for or chosen from the memory that is free, where they lie, and how they are blended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL

from qartsr_pipeline.memory import free_main_memory

TILE_SIZES = (1024, 768, 512, 256)  # what automatic choice chooses from, pixels of the enlarged image
WHOLE_IMAGE = 1024 * 1024  # up to so many enlarged pixels an image is not tiled if memory suffices
MINIMUM_TILE = 64
MINIMUM_SIDE = 128  # smaller images are padded by mirroring: models have seen nothing smaller in training
OVERLAP_IN_MULTIPLES = 4  # automatic overlap, in units of the network's total down-sampling: its padding reaches that far
USABLE_SHARE = 0.5  # of the free memory: the estimate is rough, and other programs use the device, too
LIVE_MAPS = 8  # full-resolution maps alive at the decoder's widest point; measured 720 to 1200 bytes where this says 1024
SURE_SHARE = 0.7  # of that estimate, which a pass takes in any case
RAMP_SHARE = 0.5  # share of an overlap over which one tile fades into the next; the outer rest of each tile is context only


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


class Windowed(Protocol):
    """An image (.., H, W) of which windows are taken: a tensor, or one that is computed where it is looked at."""

    def __getitem__(self, window: Any, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Tile:
    """A window: rows top..top+height, columns left..left+width."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Windowed, shrink: int = 1) -> torch.Tensor:
        """The window's part of (.., H, W); `shrink` is how many image pixels one of `image`'s elements spans."""
        top, left, height, width = (x // shrink for x in (self.top, self.left, self.height, self.width))
        return image[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class TileGrid:
    """Tiles that cover an image of size (height, width).

    Attributes:
        tops, lefts: sorted first rows and columns, multiples of the network's multiple, so that every tile samples the same grid
            of strided convolutions as the whole image would.
        tile_height, tile_width: size of all tiles.
    """

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    tile_height: int
    tile_width: int

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __iter__(self) -> Iterator[Tile]:
        """Row by row."""
        for top in self.tops:
            for left in self.lefts:
                yield Tile(top, left, self.tile_height, self.tile_width)

    def windows(self, shrink: int = 1) -> Iterator[torch.Tensor]:
        """Blend weights (tile_height / shrink, tile_width / shrink) of every tile in order; they add up to 1 on every pixel."""
        rows = axis_weights([x // shrink for x in self.tops], self.tile_height // shrink)
        columns = axis_weights([x // shrink for x in self.lefts], self.tile_width // shrink)
        for row in rows:
            for column in columns:
                yield row[:, None] * column[None, :]


def tile_grid(size: tuple[int, int], tile: int | None, overlap: int, multiple: int) -> TileGrid:
    """Evenly spread tiles with at least `overlap` pixels in common: as few as possible, and no larger than so many need to be.

    Args:
        size: (height, width), multiples of `multiple`.
        tile: longest side of a tile, a multiple of `multiple`; None for the whole image in one.
        overlap: a multiple of `multiple`, smaller than `tile`.
    """
    height, width = size
    tile_height, tops = axis_positions(height, tile or height, overlap, multiple)
    tile_width, lefts = axis_positions(width, tile or width, overlap, multiple)
    return TileGrid(height, width, tops, lefts, tile_height, tile_width)


def axis_positions(length: int, tile: int, overlap: int, multiple: int) -> tuple[int, tuple[int, ...]]:
    """Length of the tiles along one axis, at most `tile`, and their first pixels: evenly spaced, rounded down to `multiple`."""
    if tile >= length:
        return length, (0,)
    count = -(-(length - overlap) // (tile - overlap))
    needed = -(-(length + (count - 1) * overlap) // count)
    tile = -(-needed // multiple) * multiple
    return tile, tuple(i * (length - tile) // (count - 1) // multiple * multiple for i in range(count))


def axis_weights(positions: list[int], tile: int) -> list[torch.Tensor]:
    """One float32 weight vector (tile,) for each position; along the axis they add up to 1.

    In the overlap of two neighbours the weight rises along a raised cosine over the middle `RAMP_SHARE`; what lies outside of it,
    where a tile has seen zero padding instead of its surroundings, does not count.
    """
    weights = [torch.ones(tile) for _ in positions]
    for i in range(len(positions) - 1):
        overlap = positions[i] + tile - positions[i + 1]
        if overlap > 0:
            rise = ramp(overlap)
            weights[i][tile - overlap :] *= 1 - rise
            weights[i + 1][:overlap] *= rise
    total = torch.zeros(positions[-1] + tile)
    for position, weight in zip(positions, weights, strict=True):
        total[position : position + tile] += weight
    return [weight / total[position : position + tile] for position, weight in zip(positions, weights, strict=True)]


def ramp(overlap: int) -> torch.Tensor:
    """(overlap,) from 0 to 1, symmetric: ramp(n) + reversed ramp(n) = 1."""
    centre = (torch.arange(overlap, dtype=torch.float32) + 0.5) / overlap - 0.5
    return 0.5 + 0.5 * torch.sin(torch.pi * (centre / RAMP_SHARE).clamp(-0.5, 0.5))
