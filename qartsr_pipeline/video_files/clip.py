"""What a clip is, apart from its pixels, and the error for files that cannot be read or written."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qartsr_pipeline.video_files.colour import Colour, HdrMetadata

CLIP_SUFFIXES = (
    *(".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".wmv", ".flv", ".ts", ".m2ts", ".mts"),
    *(".mpg", ".mpeg", ".vob", ".ogv", ".3gp", ".mxf", ".y4m"),
)


class VideoFileError(ValueError):
    """A video file cannot be read or written. The message says what happened, why, and the ways out."""


def import_av() -> ModuleType:
    """PyAV, which only clips need.

    Raises:
        VideoFileError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise VideoFileError(
            f"Video files are read and written with PyAV ({error}). pip install 'qartsr[video]' installs it."
        ) from error
    return av


def frames_in_words(count: int) -> str:
    """ "1 frame", "7 frames"."""
    return f"{count} frame" if count == 1 else f"{count} frames"


def ratio(value: Any) -> Fraction | None:
    """FFmpeg's ratios, which are 0 or None where they are not known; the type depends on the version of PyAV."""
    return Fraction(value.numerator, value.denominator) if value and value.denominator else None


def seconds_of(time_base: Any) -> Fraction:
    """The unit of a time, in seconds. Packets and frames always have one."""
    return Fraction(time_base.numerator, time_base.denominator)


@dataclass(frozen=True)
class PixelKind:
    """How the pixels of a file are stored.

    Attributes:
        depth: bits a channel.
        chroma: "420", "422" or "444" for Y'CbCr, "grey", or "rgb". What is rarer, as 4:1:1, is called by the next of these.
        alpha: whether there is transparency.
    """

    depth: int
    chroma: str
    alpha: bool = False

    @property
    def format(self) -> str:
        """FFmpeg's name of the planar format."""
        if self.chroma == "rgb":
            return "gbrp" if self.depth == 8 else f"gbrp{self.depth}le"
        name = "gray" if self.chroma == "grey" else f"yuv{self.chroma}p"
        return name if self.depth == 8 else f"{name}{self.depth}le"


@dataclass(frozen=True)
class Turn:
    """How stored frames become upright: columns and rows are exchanged, then they are mirrored."""

    transpose: bool = False
    flip_columns: bool = False
    flip_rows: bool = False

    @staticmethod
    def of_matrix(matrix: np.ndarray) -> Turn:
        """What a display matrix [[a, b, u], [c, d, v], [x, y, w]] asks for: the point (p, q) goes to (a p + c q, b p + d q).

        Raises:
            ValueError: it turns by another angle than a multiple of 90 degrees.
        """
        (a, b), (c, d) = (matrix[:2, :2] / (1 << 16)).tolist()
        if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or a * b:
            raise ValueError("the frames are to be shown at an angle that is no multiple of 90 degrees, or scaled")
        return Turn(True, c < 0, b < 0) if a == 0 else Turn(False, a < 0, d < 0)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, C) as stored -> upright."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1])


@dataclass(frozen=True)
class Clip:
    """A clip that was looked at, upright.

    Attributes:
        path: the file, or a pattern such as `frames/%05d.png`.
        height, width: of the frames.
        frames: how many there are; an estimate, or None, unless `is_exact`.
        rate: frames a second, on average.
        time_base: the unit of frame times, in seconds.
        aspect: width of a pixel in heights of a pixel.
        seconds: how long the file says it lasts, and None where it does not, or has sound, which may last longer than the frames.
        interlaced: whether frames show two moments each.
        origin: the time that the file begins at, where its format has no beginning of its own (MPEG-TS), in `time_base`.
        images: the files of an image sequence.
        notices: one sentence each, for the user to see.
    """

    path: Path
    height: int
    width: int
    frames: int | None
    rate: Fraction
    time_base: Fraction
    kind: PixelKind
    colour: Colour
    aspect: Fraction = Fraction(1)
    turn: Turn = Turn()
    seconds: float | None = None
    interlaced: bool = False
    hdr: HdrMetadata | None = None
    origin: int = 0
    is_exact: bool = False
    images: tuple[Path, ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """A frame.

    Attributes:
        pixels: (H, W, 3) float32 in [0, 1], upright, with the clip's transfer function.
        time: when it is shown, in the clip's `time_base`.
        duration: how long, in the same unit; 0 where the file does not say.
    """

    pixels: np.ndarray
    time: int
    duration: int
