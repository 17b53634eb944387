"""Pairs of network input and target, and the set of images that a model is trained and validated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from qartsr_pipeline.calibration.data import MULTIPLE, SCALE
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import photographs_record
from qartsr_pipeline.calibration.data.patches import (
    ImagePatches,
    MemoryImage,
    MixedPatches,
    Patches,
    PhotographPatches,
    as_tensor,
    images_record,
    list_photographs,
    pixels_of,
    read_photograph,
)
from qartsr_pipeline.image.resize import resize

MARGIN = 16  # high-resolution pixels cut off around a patch after degradation, so that resampling never sees the patch's edge
VALIDATION_SIDE = 256  # of the held-out patches, at most
Pair = tuple[torch.Tensor, torch.Tensor]
Item = TypeVar("Item")


def degraded_pair(high: torch.Tensor, degradation: str = "bicubic", rng: np.random.Generator | None = None) -> Pair:
    """(bicubic enlargement of the degraded patch, target), both (B, 3, P, P) in [-1, 1].

    Args:
        high: (B, 3, P + 2 * MARGIN, P + 2 * MARGIN) in [0, 1].
        degradation: a name in `DEGRADATIONS`.
        rng: for degradations that are random; None is a generator with seed 0.
    """
    low = DEGRADATIONS[degradation](high, SCALE, np.random.default_rng(0) if rng is None else rng)
    up = resize(low, (high.shape[-2], high.shape[-1]))
    cut = slice(MARGIN, -MARGIN)
    channels_last = torch.channels_last
    return (
        (up[..., cut, cut] * 2 - 1).contiguous(memory_format=channels_last),
        (high[..., cut, cut] * 2 - 1).contiguous(memory_format=channels_last),
    )


def sample_pair(patches: Patches, count: int, side: int, rng: np.random.Generator, degradation: str = "bicubic") -> Pair:
    """`degraded_pair` of ``count`` patches of ``side`` pixels."""
    return degraded_pair(patches.sample(count, side + 2 * MARGIN, rng), degradation, rng)


def choose_held_out(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, evenly spread over the list: kept out of training, for validation."""
    return list(items[:: max(1, len(items) // count)][:count]) if count else []


def held_out_pairs(images: Sequence[Path | np.ndarray], degradation: str) -> list[Pair]:
    """The middle of each image, as `degraded_pair` with one patch, always degraded in the same way.

    Args:
        images: image files, or pixels (H, W, 3) uint8.

    Raises:
        ValueError: an image is too small to give a patch.
    """
    pairs = []
    for index, image in enumerate(images):
        name, pixels = (f"image {index}", image) if isinstance(image, np.ndarray) else (str(image), read_photograph(image))
        crop = as_tensor(_middle(pixels, name))
        pairs.append(degraded_pair(crop, degradation, np.random.default_rng(index)))
    return pairs


def _middle(pixels: np.ndarray, name: str) -> np.ndarray:
    """The largest square in the middle that validation uses, with `MARGIN` around it."""
    height, width = pixels.shape[:2]
    inside = min(VALIDATION_SIDE, height - 2 * MARGIN, width - 2 * MARGIN) // MULTIPLE * MULTIPLE
    if inside < MULTIPLE:
        least = MULTIPLE + 2 * MARGIN
        raise ValueError(f"{name} has {width} x {height} pixels; validation needs {least} x {least}: leave it out")
    side = inside + 2 * MARGIN
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def procedural_pairs(patches: Patches, count: int, degradation: str) -> list[Pair]:
    """As `held_out_pairs`, for training without photographs."""
    if not count:
        return []
    rng = np.random.default_rng([2**31, count])  # no training step has this seed
    crops = patches.sample(count, VALIDATION_SIDE + 2 * MARGIN, rng)
    return [degraded_pair(crop[None], degradation, rng) for crop in crops]


@dataclass(frozen=True)
class TrainingSet:
    """Images to train on and to validate on.

    Attributes:
        patches: the source of training patches.
        held_out: pairs that nothing is trained on.
        record: what a model's record says of them, as JSON knows it: "data" and "held_out".
    """

    patches: Patches
    held_out: list[Pair]
    record: dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """Which images, and how they are used.

    Attributes:
        data: a folder of photographs, or images in memory; None for procedural images alone.
        procedural: share of procedural images, 0 to 1; with ``data`` None it is taken as 1.
        degradation: of the held-out images, a name in `DEGRADATIONS`.
        held_out: how many images are kept for validation.
    """

    data: str | Path | Sequence[MemoryImage] | None = None
    procedural: float = 0.0
    degradation: str = "bicubic"
    held_out: int = 8

    def load(self) -> TrainingSet:
        """Reads the images.

        Raises:
            FileNotFoundError: no such folder, or no image in it. ImageFileError: a photograph cannot be read.
            ValueError: an image is too small to validate on, or all of them are held out.
        """
        if self.data is None:
            leaves = DeadLeaves()
            pairs = procedural_pairs(leaves, self.held_out, self.degradation)
            return TrainingSet(leaves, pairs, {"data": None, "held_out": []})
        if isinstance(self.data, (str, Path)):
            paths = list_photographs(self.data)
            held, rest = self._split(paths)
            patches = self._mixed(lambda: PhotographPatches(rest))
            record = {"data": photographs_record(paths), "held_out": [path.name for path in held]}
            return TrainingSet(patches, held_out_pairs(held, self.degradation), record)
        images = pixels_of(self.data)
        numbers, others = self._split(range(len(images)))
        patches = self._mixed(lambda: ImagePatches([images[number] for number in others]))
        pairs = held_out_pairs([images[number] for number in numbers], self.degradation)
        return TrainingSet(patches, pairs, {"data": images_record(images), "held_out": numbers})

    def _split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """Those held out, and the rest."""
        held = choose_held_out(items, self.held_out)
        rest = [item for item in items if item not in held]
        if not rest and self.procedural < 1:
            raise ValueError(f"all {len(items)} images are kept for validation: give more images, or hold out fewer")
        return held, rest

    def _mixed(self, own: Callable[[], Patches]) -> Patches:
        """The images' own patches with the share of procedural ones."""
        if self.procedural == 1:
            return DeadLeaves()
        return MixedPatches(own(), DeadLeaves(), self.procedural) if self.procedural > 0 else own()
