"""Clips: video files, folders of images, clips in memory, or procedural images that move, as a source of patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.pairs import Pair
from qartsr_pipeline.calibration.data.patches import as_pixels, list_photographs, read_photograph
from qartsr_pipeline.video.frames import checked_frames, frames_of
from qartsr_pipeline.video_files.clip import CLIP_SUFFIXES, VideoFileError
from qartsr_pipeline.video_files.damage import Damage
from qartsr_pipeline.video_files.reading import open_clip, read_frames

FRAMES = 5  # of a clip that is calibrated on
FASTEST = 4  # pixels a frame


def clip_files(folder: str | Path) -> dict[str, list[Path]]:
    """Name -> its files, for each clip below ``folder``: the images of a folder in order of their names, or one video file.

    Raises:
        FileNotFoundError: no such folder, or neither an image nor a video file in it.
    """
    folder = Path(folder)
    videos = video_files_in(folder)
    clips: dict[str, list[Path]] = {}
    for path in [] if videos and not has_images(folder) else list_photographs(folder):
        name = folder.name if path.parent == folder else path.parent.relative_to(folder).as_posix()
        clips.setdefault(name, []).append(path)
    return dict(sorted((clips | {path.relative_to(folder).as_posix(): [path] for path in videos}).items()))


def video_files_in(folder: str | Path) -> list[Path]:
    """Every video file below ``folder``, sorted by path; none if there is no such folder."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file())
    return [path for path in found if not path.name.startswith("._")]  # what macOS puts beside files


def has_images(folder: Path) -> bool:
    """Whether an image lies somewhere below the folder."""
    try:
        return bool(list_photographs(folder))
    except FileNotFoundError:
        return False


def read_clip(name: str, paths: list[Path], frames: int | None = None) -> np.ndarray:
    """(F, H, W, 3) uint8, of the files that `clip_files` gives.

    Args:
        frames: only so many, the first ones; None for all.

    Raises:
        ValueError: the images differ in size. ImageFileError: one cannot be read.
        VideoFileError: a video file cannot be read, is damaged, or has more than 8 bits a channel, which would be lost.
    """
    if len(paths) == 1 and paths[0].suffix.lower() in CLIP_SUFFIXES:
        return _read_video(paths[0], frames)
    images = [read_photograph(path) for path in paths[:frames]]
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: each folder of images is taken for a clip, whose images must have one size, not {sizes} (width, height)"
        )
    return np.stack(images)


def _read_video(path: Path, frames: int | None) -> np.ndarray:
    clip, damage = open_clip(path), Damage()
    if clip.kind.depth > 8 or clip.colour.is_hdr:
        what = "in HDR" if clip.colour.is_hdr else f"of {clip.kind.depth} bits a channel"
        raise VideoFileError(f"{path} is {what}, but only clips of 8 bits are taken here. Convert it, or leave it out.")
    found = [(frame.pixels * 255).round().astype(np.uint8) for frame in islice(read_frames(clip, damage=damage), frames)]
    if damage.packets or damage.frames or damage.end:
        raise VideoFileError(
            f"{path} is damaged: only {len(found)} frames were read as they are. Copy it again, or leave it out."
        )
    return np.stack(found)


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
