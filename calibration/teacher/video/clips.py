"""Clips with known motion: photographs that pan, zoom and turn, a second one moving in front, and frames of real clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qartsr_pipeline.calibration.data.clips import (
    FASTEST,
    as_clips,
    clip_files,
    moving_by_whole_pixels,
    part_of_clip,
    read_clip,
)
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.fingerprint import photographs_record
from qartsr_pipeline.calibration.data.pairs import MARGIN, Pair, TrainingSet, choose_held_out, degraded_pair
from qartsr_pipeline.calibration.data.patches import ImagePatches, as_tensor, list_photographs, read_photograph

VALIDATION_SIDE = 128


@dataclass(frozen=True)
class Shares:
    """Shares of the kinds of clips, 0 to 1 each.

    Attributes:
        real: frames of real clips, if there are any; the others are made of photographs.
        procedural: dead leaves in the place of a photograph.
        whole_pixels: motion by whole pixels: nothing is resampled, so the finest details stay.
        in_front: a second photograph moves in front.
        exposure: brightness drifts.
    """

    real: float = 0.15
    procedural: float = 0.1
    whole_pixels: float = 0.5
    in_front: float = 0.2
    exposure: float = 0.2


@dataclass
class MovingClips:
    """Random clips, with the interface of `patches.Patches`: a sample's frames stand one after the other.

    Attributes:
        photographs: (H, W, 3) uint8 each.
        clips: (F, H, W, 3) uint8 each; those with too few frames are not used.
        frames: of a clip.
    """

    photographs: Sequence[np.ndarray]
    clips: Sequence[np.ndarray] = ()
    frames: int = 5
    shares: Shares = field(default_factory=Shares)

    def __post_init__(self) -> None:
        self.leaves = DeadLeaves()
        self.images = ImagePatches(list(self.photographs)) if len(self.photographs) else None
        self.clips = [clip for clip in self.clips if len(clip) >= self.frames]

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """``count`` clips, float32 in [0, 1], shape (count * frames, 3, size, size), the same for the same state of ``rng``.

        Raises:
            ValueError: no photograph is large enough.
        """
        return torch.cat([self._clip(size, rng) for _ in range(count)])

    def of_length(self, frames: int) -> MovingClips:
        """The same images as clips of another length."""
        other = copy(self)
        other.frames = frames
        return other

    def _clip(self, size: int, rng: np.random.Generator) -> torch.Tensor:
        real = [clip for clip in self.clips if min(clip.shape[1:3]) >= size]
        if real and rng.random() < self.shares.real:
            return part_of_clip(real[int(rng.integers(len(real)))], self.frames, size, rng)
        clip = self._moving(size, rng)
        if rng.random() < self.shares.in_front:
            clip = torch.lerp(clip, self._moving(size, rng), _moving_disk(self.frames, size, rng))
        if rng.random() < self.shares.exposure:
            drift = torch.from_numpy(1 + rng.uniform(-0.03, 0.03) * np.arange(self.frames, dtype=np.float32))
            clip = clip * drift.view(-1, 1, 1, 1)
        return clip.clamp(0, 1)

    def _moving(self, size: int, rng: np.random.Generator) -> torch.Tensor:
        reach = FASTEST * (self.frames - 1)
        image = self._image(size + reach, rng)
        if rng.random() < self.shares.whole_pixels or min(image.shape[1:]) < 1.5 * size + reach:
            return moving_by_whole_pixels(image, self.frames, size, rng)
        return _warped(image, self.frames, size, rng)

    def _image(self, side: int, rng: np.random.Generator) -> torch.Tensor:
        """(3, H, W) in [0, 1], at least that side."""
        if self.images is None or rng.random() < self.shares.procedural:
            return self.leaves.sample(1, side, rng)[0]
        usable = self.images.usable(side)
        areas = np.array([image.shape[0] * image.shape[1] for image in usable], dtype=np.float64)
        image = usable[int(rng.choice(len(usable), p=areas / areas.sum()))]
        height, width = (min(length, 2 * side) for length in image.shape[:2])  # no more of it than the motion can reach
        top, left = (int(rng.integers(have - want + 1)) for have, want in zip(image.shape, (height, width), strict=False))
        part = np.rot90(image[top : top + height, left : left + width], int(rng.integers(4)))
        part = part[:, ::-1] if rng.integers(2) else part
        return torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1).float() / 255


def _warped(image: torch.Tensor, frames: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Motion by fractions of a pixel, with zoom and turn."""
    height, width = image.shape[1:]
    speed = rng.uniform(-FASTEST, FASTEST, 2)
    turn, zoom = rng.normal(0, 0.006), math.exp(rng.normal(0, 0.006))
    angle, scale = rng.normal(0, 0.05), rng.uniform(0.95, 1.1)
    middle = np.array([height, width]) / 2 - speed * (frames - 1) / 2 + rng.uniform(-0.1, 0.1, 2) * size
    offset = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    rows, columns = torch.meshgrid(offset, offset, indexing="ij")
    grids = []
    for index in range(frames):
        cosine, sine = (scale * zoom**index * part for part in (math.cos(angle + turn * index), math.sin(angle + turn * index)))
        y = cosine * rows + sine * columns + float(middle[0] + speed[0] * index)
        x = cosine * columns - sine * rows + float(middle[1] + speed[1] * index)
        grids.append(torch.stack([2 * x / width - 1, 2 * y / height - 1], -1))
    source = image[None].expand(frames, -1, -1, -1)
    return F.grid_sample(source, torch.stack(grids), mode="bicubic", padding_mode="reflection", align_corners=False)


def _moving_disk(frames: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """(frames, 1, size, size) in [0, 1]: 1 in an ellipse that moves."""
    speed, middle = rng.uniform(-FASTEST, FASTEST, 2), rng.uniform(0.1, 0.9, 2) * size
    radii = rng.uniform(0.1, 0.4, 2) * size
    position = torch.arange(size, dtype=torch.float32)
    masks = []
    for index in range(frames):
        y, x = ((position - float(middle[axis] + speed[axis] * index)) / float(radii[axis]) for axis in (0, 1))
        distance = torch.sqrt(y[:, None] ** 2 + x[None] ** 2)
        masks.append(((1 - distance) * float(radii.min()) + 0.5).clamp(0, 1)[None])  # an edge one pixel wide
    return torch.stack(masks)


@dataclass(frozen=True)
class VideoData:
    """What a video model is trained on.

    Attributes:
        data: folder of photographs; None for procedural images alone.
        clips: folder of real clips, a folder of images each; None for none.
        frames: of a training clip.
        held_out: how many photographs are kept for validation.
    """

    data: str | None = None
    clips: str | None = None
    frames: int = 5
    held_out: int = 8

    def load(self) -> TrainingSet:
        """Reads the images; raises FileNotFoundError or ValueError if there are none, or they are unusable."""
        paths = list_photographs(self.data) if self.data else []
        held = choose_held_out(paths, self.held_out)
        rest = [read_photograph(path) for path in paths if path not in held]
        if paths and not rest:
            raise ValueError(f"all {len(paths)} photographs are kept for validation: give more, or hold out fewer")
        clips = [read_clip(*clip) for clip in clip_files(self.clips).items()] if self.clips else []
        record = {
            "data": photographs_record(paths) if paths else None,
            "clips": photographs_record(list_photographs(self.clips)) if self.clips else None,
            "held_out": [path.name for path in held],
        }
        return TrainingSet(MovingClips(rest, clips, self.frames), self._validation(held), record)

    def _validation(self, held: list[Path]) -> list[Pair]:
        """A clip of each held-out photograph, always the same."""
        pairs = []
        side = VALIDATION_SIDE + 2 * MARGIN
        for index, path in enumerate(held):
            image, rng = as_tensor(read_photograph(path))[0], np.random.default_rng([2**31, index])
            move = moving_by_whole_pixels if index % 2 else _warped
            pairs.append(as_clips(degraded_pair(move(image, self.frames, side, rng).clamp(0, 1)), self.frames))
        return pairs
