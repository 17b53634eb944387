"""Clips: video files, folders of images, clips in memory, or procedural images that move, as a source of patches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.fingerprint import photographs_record
from qartsr_pipeline.calibration.data.pairs import Pair
from qartsr_pipeline.calibration.data.patches import as_pixels, list_photographs, read_photograph
from qartsr_pipeline.video.frames import checked_frames, frames_of, scenes
from qartsr_pipeline.video_files.clip import CLIP_SUFFIXES, Clip, Frame, VideoFileError
from qartsr_pipeline.video_files.damage import Damage
from qartsr_pipeline.video_files.reading import open_clip, read_frames

FRAMES = 5  # of a clip that is calibrated on
FASTEST = 4  # pixels a frame
HELD = 2 << 30  # bytes of frames that are held of all video files together
ROW = 12  # frames in a row that are taken of a file that is not held whole


def clip_files(source: str | os.PathLike) -> dict[str, list[Path]]:
    """Name -> its files, for each clip: a video file by itself; or below a folder each video file, and the images of each folder
    in order of the numbers in their names: 2.png before 10.png.

    Raises:
        FileNotFoundError: there is no such file or folder, or it holds neither an image nor a video file.
    """
    source = Path(source)
    videos = video_files_in(source)
    if source.is_file() and videos:
        return {source.name: videos}
    if not source.is_dir():
        suffixes = ", ".join(CLIP_SUFFIXES)
        what = "is no video file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"{source} {what}: give a folder of clips, or a video file ({suffixes})")
    if not videos and not has_images(source):
        raise FileNotFoundError(f"neither an image nor a video file was found below {source}: give a folder that holds clips")
    clips: dict[str, list[Path]] = {}
    for path in list_photographs(source) if has_images(source) else []:
        name = source.name if path.parent == source else path.parent.relative_to(source).as_posix()
        clips.setdefault(name, []).append(path)
    for images in clips.values():
        images.sort(key=_by_numbers)
    return dict(sorted((clips | {path.relative_to(source).as_posix(): [path] for path in videos}).items()))


def _by_numbers(path: Path) -> list[str | int]:
    """Numbers in the name as such, with the texts between them."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def video_files_in(source: str | os.PathLike) -> list[Path]:
    """The file itself if it is a video file, or every video file below a folder, sorted by path; none if there is neither."""
    source = Path(source)
    found = [source] if source.is_file() else sorted(source.rglob("*"))
    found = [path for path in found if is_video_file(path) and path.is_file()]
    return [path for path in found if not path.name.startswith("._")]  # what macOS puts beside files


def is_video_file(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in CLIP_SUFFIXES


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
    if len(paths) == 1 and is_video_file(paths[0]):
        clip, damage = opened_clip(paths[0]), Damage()
        found = [(frame.pixels * 255).round().astype(np.uint8) for frame in islice(read_frames(clip, damage=damage), frames)]
        check_whole(clip, damage)
        return np.stack(found)
    images = [read_photograph(path) for path in paths[:frames]]
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: each folder of images is taken for a clip, whose images must have one size, not {sizes} (width, height)"
        )
    return np.stack(images)


def opened_clip(path: Path, deepest: int = 8) -> Clip:
    """A video file, looked at.

    Raises:
        VideoFileError: it cannot be read, is in HDR, or has more bits a channel than ``deepest``.
    """
    clip = open_clip(path)
    if clip.kind.depth > deepest or clip.colour.is_hdr:
        what = "in HDR" if clip.colour.is_hdr else f"of {clip.kind.depth} bits a channel"
        taken = "clips of 8 bits" if deepest == 8 else "clips that are not"
        raise VideoFileError(f"{path} is {what}, but only {taken} are taken here. Convert it, or leave it out.")
    return clip


def check_whole(clip: Clip, damage: Damage) -> None:
    """Raises VideoFileError if the frames that were read are not as they were made."""
    if damage.packets or damage.frames or damage.end:
        raise VideoFileError(
            f"{clip.path} is damaged: only {damage.read} frames were read as they are. Copy it again, or leave it out."
        )


def clips_to_calibrate_on(
    source: str | Path, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The clips of a folder or file for `ClipPatches`, and what a record says of them.

    The images of a folder are one clip. A video file is cut into its scenes, each of which is one; of more than 8 bits a channel,
    8 are kept. Of files that together have more than `HELD` bytes of frames, rows of `ROW` frames are taken at evenly spaced
    times: the same ones in every run.

    Args:
        report: called as (what, done, total), in frames.

    Raises:
        FileNotFoundError: see `clip_files`. ValueError, ImageFileError, VideoFileError: see `read_clip`; a clip in HDR.
    """
    files = clip_files(source)
    videos = {name: opened_clip(paths[0], deepest=16) for name, paths in files.items() if is_video_file(paths[0])}
    rows = {name: rows_within(clip, HELD // len(videos)) for name, clip in videos.items()}
    total = sum(clip.frames or 0 for clip in videos.values())
    total += sum(len(paths) for name, paths in files.items() if name not in videos)
    done, clips = 0, []
    short: list[str] = []
    for name, paths in files.items():
        report("read clips", done, total)
        if name in videos:
            before = done

            def step(read: int, before: int = before) -> None:
                report("read clips", min(before + read, total), total)

            found = list(scenes_in_rows(videos[name], rows[name], step))
            done = before + (videos[name].frames or 0)
        else:
            found = [read_clip(name, paths)]
            done += len(paths)
        clips += found
        short += [] if any(len(clip) >= FRAMES for clip in found) else [name]
    report("read clips", total, total)
    record = {"clips": len(clips), **photographs_record([path for paths in files.values() for path in paths])}
    if videos:
        record |= {"video_files": len(videos), "frames": sum(map(len, clips))}
    return clips, record | ({"too_short": short} if short else {})


def rows_within(clip: Clip, size: int) -> list[range]:
    """Numbers of the frames to take of a video file so that they have about ``size`` bytes."""
    most = max(FRAMES, size // (3 * clip.height * clip.width))
    if clip.frames is None or clip.frames <= most:
        return [range(most)]
    count = max(1, most // ROW)
    middles = ((2 * index + 1) * clip.frames // (2 * count) for index in range(count))
    return [range(start, start + ROW) for start in (max(0, middle - ROW // 2) for middle in middles)]


def scenes_in_rows(clip: Clip, rows: Sequence[range], step: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The scenes in each row of frames, (F, H, W, 3) uint8.

    Args:
        step: called with the number of frames that were decoded.
    """
    damage = Damage()
    frames = read_frames(clip, damage=damage, wanted=lambda index: any(index in row for row in rows))

    def tensors(row: Iterable[Frame]) -> Iterator[torch.Tensor]:
        for frame in row:
            step(damage.read)
            yield torch.from_numpy(frame.pixels).permute(2, 0, 1)[None]

    for row in rows:
        for scene in scenes(tensors(islice(frames, len(row)))):
            yield np.stack([as_pixels(frame) for frame in scene])
    check_whole(clip, damage)


def clips_of(clips: Iterable[Any], name: str = "data") -> list[np.ndarray]:
    """Clips in memory as uint8 RGB, (F, H, W, 3) each.

    Args:
        clips: each as `LSGQuantVideoPipeline` takes one, or the path of a video file or of a folder of images; or one by itself,
            as an array or tensor of four dimensions.
        name: what error messages call them.

    Raises:
        TypeError, ValueError: a clip is of another kind, shape or range. VideoFileError: see `read_clip`.
    """
    if isinstance(clips, (np.ndarray, torch.Tensor)) and clips.ndim == 4:
        clips = [clips]
    found = []
    for number, clip in enumerate(clips):
        if isinstance(clip, (str, os.PathLike)):
            found += [read_clip(name_there, paths) for name_there, paths in clip_files(clip).items()]
            continue
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
            raise ValueError(
                f"the longest clip has {max(map(len, clips))} frames, and a cut begins a new one: give clips of at least"
                f" {self.frames}"
            )
        self.images = [frame for clip in self.clips for frame in clip]
        self._leaves = DeadLeaves()

    def usable(self, size: int) -> list[np.ndarray]:
        """The clips that are as large as patches of that size, none if there are none; ValueError if all are smaller."""
        usable = [clip for clip in self.clips if min(clip.shape[1:3]) >= size]
        if self.clips and not usable:
            height, width = max((clip.shape[1:3] for clip in self.clips), key=min)
            raise ValueError(
                f"no clip is at least {size} pixels high and wide, the largest has {width} x {height}: use smaller patches or"
                " larger clips"
            )
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
