"""Clips: folders of images, clips in memory, or procedural images that move, as a source of patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.pairs import Pair
from qartsr_pipeline.calibration.data.patches import as_pixels, list_photographs, read_photograph
from qartsr_pipeline.video.frames import checked_frames, frames_of

FRAMES = 5  # of a clip that is calibrated on
FASTEST = 4  # pixels a frame


def clip_files(folder: str | Path) -> dict[str, list[Path]]:
    """Name -> image files in order of their names, for each folder of images below ``folder``, or for ``folder`` itself.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder)
    clips: dict[str, list[Path]] = {}
    for path in list_photographs(folder):
        name = folder.name if path.parent == folder else path.parent.relative_to(folder).as_posix()
        clips.setdefault(name, []).append(path)
    return clips


def read_clip(name: str, paths: list[Path]) -> np.ndarray:
    """(F, H, W, 3) uint8; raises ValueError if the images differ in size, and ImageFileError for one that cannot be read."""
    images = [read_photograph(path) for path in paths]
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1:
        raise ValueError(f"{name}: the images of a clip must have one size, these have {sizes} (width, height)")
    return np.stack(images)


def clips_of(clips: Iterable[Any], name: str = "data") -> list[np.ndarray]:
    """Clips in memory as uint8 RGB, (F, H, W, 3) each.

    Args:
        clips: each as `LSGQuantVideoPipeline` takes one; or one by itself, as an array or tensor of four dimensions.
        name: what error messages call them.

    Raises:
        TypeError, ValueError: a clip is of another kind, shape or range.
    """
    if isinstance(clips, (np.ndarray, torch.Tensor)) and clips.ndim == 4:
        clips = [clips]
    found = []
    for number, clip in enumerate(clips):
        try:
            found.append(np.stack([as_pixels(frame) for frame in checked_frames(frames_of(clip))]))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}[{number}] is no clip: {error}") from error
    return found


class ClipPatches:
    """Parts of clips, with the interface of `patches.Patches`: the frames of a sample stand one after the other.

    Args:
        clips: (F, H, W, 3) uint8 each; none for procedural images that move by whole pixels.

    Attributes:
        images: all frames, in order.
    """

    frames = FRAMES

    def __init__(self, clips: Sequence[np.ndarray] = ()) -> None:
        self.clips = [clip for clip in clips if len(clip) >= self.frames]
        if clips and not self.clips:
            raise ValueError(f"the longest clip has {max(map(len, clips))} frames: give clips of at least {self.frames}")
        self.images = [frame for clip in self.clips for frame in clip]
        self._leaves = DeadLeaves()

    def usable(self, size: int) -> list[np.ndarray]:
        """The clips that are as large as patches of that size, none if there are none; ValueError if all are smaller."""
        usable = [clip for clip in self.clips if min(clip.shape[1:3]) >= size]
        if self.clips and not usable:
            raise ValueError(f"no clip is at least {size} pixels high and wide: use smaller patches or larger clips")
        return usable

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """``count`` clips, float32 in [0, 1], shape (count * frames, 3, size, size), the same for the same state of ``rng``.

        Raises:
            ValueError: no clip is as large as the patch.
        """
        usable = self.usable(size)
        if usable:
            return torch.cat([part_of_clip(usable[int(rng.integers(len(usable)))], self.frames, size, rng) for _ in range(count)])
        images = self._leaves.sample(count, size + FASTEST * (self.frames - 1), rng)
        return torch.cat([moving_by_whole_pixels(image, self.frames, size, rng) for image in images])


def part_of_clip(clip: np.ndarray, frames: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """(frames, 3, size, size) in [0, 1], from a random place of (F, H, W, 3) uint8, forwards or backwards, perhaps flipped."""
    start = int(rng.integers(len(clip) - frames + 1))
    top, left = (int(rng.integers(length - size + 1)) for length in clip.shape[1:3])
    part = clip[start : start + frames, top : top + size, left : left + size]
    part = part[::-1] if rng.integers(2) else part
    part = part[:, :, ::-1] if rng.integers(2) else part
    return torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2).float() / 255


def moving_by_whole_pixels(image: torch.Tensor, frames: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """(frames, 3, size, size) of (3, H, W), `FASTEST` (frames - 1) larger at least: motion by a whole number of pixels a frame,
    which may be 0."""
    speed = rng.integers(-FASTEST, FASTEST + 1, 2)
    starts = []
    for length, step in zip(image.shape[1:], speed, strict=True):
        reach = int(step) * (frames - 1)
        starts.append(int(rng.integers(max(0, -reach), length - size - max(0, reach) + 1)))
    places = [[start + int(step) * index for start, step in zip(starts, speed, strict=True)] for index in range(frames)]
    return torch.stack([image[:, top : top + size, left : left + size] for top, left in places])


def as_clips(pair: Pair, frames: int) -> Pair:
    """Two batches of frames (B * F, 3, P, P) -> two batches of clips (B, 3, F, P, P)."""
    up, high = (images.contiguous().unflatten(0, (-1, frames)).transpose(1, 2) for images in pair)
    return up, high
