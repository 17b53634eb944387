"""Where tiles lie and how they are blended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

RAMP_SHARE = 0.5  # share of an overlap over which one tile fades into the next; the outer rest of each tile is context only


@dataclass(frozen=True)
class Tile:
    """A window: rows top..top+height, columns left..left+width."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: torch.Tensor, shrink: int = 1) -> torch.Tensor:
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
