"""Writing a clip: into a video file or numbered images, by the name of the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qartsr_pipeline.video_files.clip import Clip, VideoFileError, frames_in_words
from qartsr_pipeline.video_files.damage import Damage
from qartsr_pipeline.video_files.encoding import choose_encoding, stretched
from qartsr_pipeline.video_files.image_sequence import SequenceWriter, is_pattern
from qartsr_pipeline.video_files.joining import join
from qartsr_pipeline.video_files.parts import PartsWriter
from qartsr_pipeline.video_files.reading import read_frames


class ClipWriter(Protocol):
    """Takes the frames of a result, and makes the file of them at the end.

    Attributes:
        done: how many frames are there, those of an earlier run included: the number of the next frame to write.
    """

    done: int

    def write(self, pixels: np.ndarray, time: int, duration: int) -> None:
        """Takes the next frame, (H, W, 3) float in [0, 1], with the time and duration of the clip's."""

    def suspend(self, keep: bool) -> None:
        """Ends the work early; what was finished stays, unless nothing was. `keep` finishes what was begun."""

    def finish(self) -> list[str]:
        """Makes the file; returns what it cannot hold, one sentence each."""


def open_writer(
    clip: Clip,
    target: Path,
    size: tuple[int, int],
    codec: str | None = None,
    crf: int | None = None,
    job: dict[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[ClipWriter, list[str]]:
    """The writer for a result, and what changes with its format, one sentence each.

    Args:
        size: (height, width) of the result's frames.
        codec, crf: see `choose_encoding`.
        job: what the frames depend on besides the clip: the model and its options.
        resume: go on after the frames of an earlier run.
        overwrite: replace a result that exists or appears meanwhile; and, without `resume`, begin anew where there are frames.

    Raises:
        VideoFileError: the result cannot be written like that; the message says why, and the ways out.
    """
    if is_pattern(target):
        if codec is not None or crf is not None:
            raise VideoFileError(f"{target} names images, which have no codec. Leave out --codec and --crf, or write a .mp4.")
        if clip.colour.is_hdr:
            raise VideoFileError(f"{clip.path} is in HDR, which image files cannot hold. Write a .mp4 or .mkv.")
        return SequenceWriter(target, clip, *size, resume, overwrite), stretched(clip, target)
    encoding, notices = choose_encoding(clip, target, *size, codec, crf)
    facts = {"source": _identity(clip), **(job or {})}
    return PartsWriter(target, encoding, partial(join, clip, encoding), facts, resume, overwrite), notices


def write_enlarged(
    enlarge: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]],
    clip: Clip,
    writer: ClipWriter,
    lead: int = 0,
    deinterlace: bool = False,
    damage: Damage | None = None,
) -> Iterator[np.ndarray]:
    """Enlarges and writes every frame that is not done yet, at its time; yields each once it is written.

    Args:
        enlarge: frames (H, W, 3) float32 in [0, 1] -> as many, enlarged, in order.
        lead: how many frames before a place `enlarge` has to see again to go on from there without a seam.
        deinterlace, damage: see `read_frames`.

    Raises:
        VideoFileError: the clip cannot be read, or the result not be written.
        FloatingPointError: a result is not finite. RuntimeError: there are more or fewer of them than frames.
    """
    first = max(0, writer.done - lead)
    again = writer.done - first
    times: deque[tuple[int, int]] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for frame in read_frames(clip, first, deinterlace, damage):
            times.append((frame.time, frame.duration))
            yield frame.pixels

    for index, result in enumerate(enlarge(pixels())):
        if not times:
            raise RuntimeError(f"The model returned more frames than it was given ({index}).")
        shown_at, duration = times.popleft()
        if not np.isfinite(result).all():
            raise FloatingPointError(
                f"frame {first + index} of the result has pixels that are no numbers (NaN). Compute in float32 (--dtype float32)."
            )
        if index >= again:
            writer.write(result, shown_at, duration)
            yield result
    if times:
        raise RuntimeError(f"The model returned {frames_in_words(len(times))} fewer than it was given.")


def _identity(clip: Clip) -> list[Any]:
    """What tells the source from another one of its name."""
    files = clip.images or (clip.path,)
    first = files[0].stat()
    return [str(clip.path.resolve()), len(files), first.st_size, first.st_mtime_ns]
