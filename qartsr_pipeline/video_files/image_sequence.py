"""Image sequences: clips whose frames are numbered image files, `frames/%05d.png`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from qartsr_pipeline.image_files import ImageFile, ImageFileError, check_writable, read_image, read_size, write_image
from qartsr_pipeline.video_files.clip import Clip, Frame, PixelKind, VideoFileError
from qartsr_pipeline.video_files.colour import RGB, SRGB, Colour
from qartsr_pipeline.whole_files import make_folder

_NUMBER = re.compile(r"%0?(\d*)d")
DEFAULT_RATE = Fraction(25)


def is_pattern(path: str | os.PathLike) -> bool:
    """Whether the path names an image sequence."""
    return bool(_NUMBER.search(Path(path).name))


def open_sequence(path: Path, fps: float | Fraction | None = None) -> Clip:
    """Looks at an image sequence; see `open_clip`. Its numbers must have no gap."""
    if fps is not None and not 0 < fps <= 1000:
        raise VideoFileError(f"{path}: --fps is {fps:g}, but must be above 0 and at most 1000.")
    images = complete_sequence(path)
    first = _read(images[0])
    notices = (
        [f"{path.name}: image sequences do not say how fast they are; 25 frames a second are taken (--fps)."]
        if fps is None
        else []
    )
    if first.metadata.icc_profile:
        notices.append(
            f"{path.name} has a colour profile, which video files cannot hold; colours are written as if they were sRGB's."
        )
    rate = DEFAULT_RATE if fps is None else Fraction(fps).limit_denominator(1001)
    return Clip(
        path,
        first.height,
        first.width,
        len(images),
        rate,
        1 / rate,
        PixelKind(16 if first.sixteen_bit else 8, "rgb", first.has_alpha),
        Colour(RGB, True, 1, SRGB),
        is_exact=True,
        images=images,
        notices=(*notices, *([f"{path.name}: transparent parts are laid over white."] if first.has_alpha else [])),
    )


def complete_sequence(path: Path) -> tuple[Path, ...]:
    """The files of an image sequence, in order. They are not read.

    Raises:
        VideoFileError: there are none, or numbers are missing between them.
    """
    files = numbered(path)
    if not files:
        raise VideoFileError(
            f"There is no image file of the form {path}. Check the pattern and the folder you are in ({Path.cwd()})."
        )
    numbers = sorted(files)
    gap = next((n for n, following in zip(numbers, numbers[1:], strict=False) if following != n + 1), None)
    if gap is not None:
        raise VideoFileError(
            f"{path}: after number {gap} follows {numbers[numbers.index(gap) + 1]}. Add what is missing, or number them anew."
        )
    return tuple(files[number] for number in numbers)


def numbered(path: Path) -> dict[int, Path]:
    """The files that fit the pattern, by number."""
    match = _NUMBER.search(path.name)
    assert match is not None, path
    digits = f"\\d{{{match[1]},}}" if match[1] else r"\d+"
    form = re.compile(re.escape(path.name[: match.start()]) + f"({digits})" + re.escape(path.name[match.end() :]))
    try:
        names = [(form.fullmatch(entry.name), entry.path) for entry in os.scandir(path.parent) if entry.is_file()]
    except OSError as error:
        raise VideoFileError(f"The folder {path.parent} cannot be read: {error.strerror or error}. Check its name.") from error
    return {int(found[1]): Path(name) for found, name in names if found}


def read_sequence(clip: Clip, start: int = 0) -> Iterator[Frame]:
    """See `read_frames`."""
    for index, path in enumerate(clip.images[start:], start):
        image = _read(path)
        if (image.height, image.width) != (clip.height, clip.width):
            raise VideoFileError(
                f"{path} has {image.width} x {image.height} pixels, but the images before it {clip.width} x {clip.height}. "
                "All frames of a clip must have one size."
            )
        yield Frame(_rgb(image), index, 1)


def _read(path: Path) -> ImageFile:
    try:
        return read_image(path)
    except ImageFileError as error:
        raise VideoFileError(str(error)) from error


def _rgb(image: ImageFile) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1], transparent parts over white."""
    pixels = image.pixels.astype(np.float32) / np.iinfo(image.pixels.dtype).max
    colours, alpha = (pixels[..., :-1], pixels[..., -1:]) if image.has_alpha else (pixels, None)
    colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    # torch warns without W
    return np.require(colours if alpha is None else colours * alpha + (1 - alpha), requirements=["C", "W"])


class SequenceWriter:
    """Writes frames as numbered images. Each appears whole or not at all, so those that exist are the ones that are done."""

    def __init__(self, path: Path, clip: Clip, height: int, width: int, resume: bool, overwrite: bool) -> None:
        """Args:
        path: the pattern; numbers are those of `clip` where it is a sequence itself, else they begin with 1.
        height, width: of the frames to come.

        Raises:
            VideoFileError: images are there already, are frames of `clip`, or have another size than those to go on after.
        """
        self._path, self._first = path, min(numbered(clip.path)) if clip.images else 1
        self._source = ImageFile(np.zeros((1, 1, 3), np.uint16 if clip.kind.depth > 8 else np.uint8))
        if clip.images:
            self._source = replace(self._source, metadata=replace(_read(clip.images[0]).metadata, exif=None, xmp=None))
        self._check_apart(clip)
        make_folder(path.parent)
        check_writable(self._file(0), height, width)
        existing = numbered(path)
        if existing and not (resume or overwrite):
            raise VideoFileError(
                f"{existing[max(existing)]} exists already. Add --resume to go on after it, --overwrite to begin anew."
            )
        self.done = 0
        while resume and self._file(self.done).is_file():
            self.done += 1
        last = self._file(self.done - 1)
        if self.done and read_size(last) != (height, width):
            raise VideoFileError(
                f"{last} does not have the {width} x {height} pixels of this result, so it was made from another clip or with "
                "other options. Give the same ones, begin anew with --overwrite, or choose another folder."
            )
        self.notices: list[str] = []
        self._mine = None if overwrite else set(existing.values())  # files that may be replaced; None: all

    def _check_apart(self, clip: Clip) -> None:
        """Raises VideoFileError where a result has the name of an image that is read, such as `%1d.png` of `%d.png`."""
        if not clip.images or clip.path.parent.resolve() != self._path.parent.resolve():
            return
        sources = {image.name for image in clip.images}
        lost = next((file for file in map(self._file, range(len(clip.images))) if file.name in sources), None)
        if lost is not None:
            raise VideoFileError(f"{lost} is one of the input's images, which would be lost. Give another output with -o.")

    def _file(self, index: int) -> Path:
        match = _NUMBER.search(self._path.name)
        assert match is not None, self._path
        return self._path.with_name(
            self._path.name[: match.start()] + (match[0] % (self._first + index)) + self._path.name[match.end() :]
        )

    def write(self, pixels: np.ndarray, time: int, duration: int) -> None:
        """Writes the next frame, (H, W, 3) in [0, 1]."""
        file = self._file(self.done)
        if self._mine is not None and file not in self._mine and os.path.lexists(file):
            raise VideoFileError(f"{file} has appeared while this ran, and is left alone. Move it away, and add --resume.")
        said = write_image(file, pixels, self._source)
        self.notices += [] if self.notices else said
        self.done += 1

    def suspend(self, keep: bool) -> None:
        """Everything that was written is complete."""

    def finish(self) -> list[str]:
        """What the format could not hold, and files of an earlier run that are not of this one."""
        later = {number: path for number, path in numbered(self._path).items() if number >= self._first + self.done}
        if not later:
            return self.notices
        first = min(later.values()).name
        said = f"{self._path.parent} holds {len(later)} more images of this form, from {first} on, which this run did not write."
        return [*self.notices, f"{said} Delete them if they do not belong to this clip."]
