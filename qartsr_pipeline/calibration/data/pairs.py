"""Pairs of network input and target, for training and for validation."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.photographs import read_photograph
from qartsr_pipeline.image.resize import resize

MARGIN = 16  # HR pixels cut off around a patch after degradation, so that resampling never sees the patch's edge
SCALE = 4
VALIDATION_SIDE = 256  # of the held-out patches, at most
MULTIPLE = 16  # the network takes sides that are multiples of it
Pair = tuple[torch.Tensor, torch.Tensor]


class Patches(Protocol):
    """Where high-resolution patches come from."""

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """(count, 3, size, size) float32 in [0, 1], the same for the same state of ``rng``."""


class MixedPatches:
    """Two sources in one batch.

    Args:
        share: of the second source, in [0, 1]; a batch has so many of it on average.
    """

    def __init__(self, first: Patches, second: Patches, share: float):
        self.first, self.second, self.share = first, second, share

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """As `Patches.sample`, in random order: losses treat the first patches of a batch differently."""
        seconds = int(count * self.share + rng.random())
        parts = [
            source.sample(number, size, rng)
            for source, number in ((self.first, count - seconds), (self.second, seconds))
            if number > 0
        ]
        return torch.cat(parts)[torch.from_numpy(rng.permutation(count))]


def degraded_pair(high: torch.Tensor, degradation: str = "bicubic", rng: np.random.Generator | None = None) -> Pair:
    """(bicubic enlargement of the degraded patch, target), both (B, 3, P, P) in [-1, 1].

    Args:
        high: (B, 3, P + 2 * MARGIN, P + 2 * MARGIN) in [0, 1].
        degradation: a name in `DEGRADATIONS`.
        rng: for degradations that are random.
    """
    low = DEGRADATIONS[degradation](high, SCALE, rng)
    up = resize(low, high.shape[-2:])
    cut = slice(MARGIN, -MARGIN)
    channels_last = torch.channels_last
    return (
        (up[..., cut, cut] * 2 - 1).contiguous(memory_format=channels_last),
        (high[..., cut, cut] * 2 - 1).contiguous(memory_format=channels_last),
    )


def sample_pair(patches: Patches, count: int, side: int, rng: np.random.Generator, degradation: str = "bicubic") -> Pair:
    """`degraded_pair` of ``count`` patches of ``side`` pixels."""
    return degraded_pair(patches.sample(count, side + 2 * MARGIN, rng), degradation, rng)


def choose_held_out(paths: list[Path], count: int) -> list[Path]:
    """``count`` of the photographs, evenly spread over the sorted list: kept out of training, for validation."""
    return paths[:: max(1, len(paths) // count)][:count] if count else []


def held_out_pairs(paths: list[Path], degradation: str) -> list[Pair]:
    """The middle of each photograph, as `degraded_pair` with one patch, always degraded in the same way.

    Raises:
        ValueError: a photograph is too small to give a patch.
    """
    pairs = []
    for index, path in enumerate(paths):
        picture = read_photograph(path)
        height, width = picture.shape[:2]
        inside = min(VALIDATION_SIDE, height - 2 * MARGIN, width - 2 * MARGIN) // MULTIPLE * MULTIPLE
        if inside < MULTIPLE:
            least = MULTIPLE + 2 * MARGIN
            raise ValueError(
                f"{path} has {width} x {height} pixels; validation needs {least} x {least}: remove it from the folder"
            )
        side = inside + 2 * MARGIN
        top, left = (height - side) // 2, (width - side) // 2
        crop = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float() / 255
        pairs.append(degraded_pair(crop, degradation, np.random.default_rng(index)))
    return pairs


def procedural_pairs(patches: Patches, count: int, degradation: str) -> list[Pair]:
    """As `held_out_pairs`, for training without photographs."""
    rng = np.random.default_rng([2**31, count])  # no training step's
    crops = patches.sample(count, VALIDATION_SIDE + 2 * MARGIN, rng)
    return [degraded_pair(crop[None], degradation, rng) for crop in crops]
