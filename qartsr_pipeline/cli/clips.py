"""Which clip becomes which file: inputs and outputs of `qartsr upscale` for clips, settled before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qartsr_pipeline.cli.jobs import is_folder, matches
from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image_files import WRITABLE_FORMATS
from qartsr_pipeline.video_files import CLIP_SUFFIXES, CONTAINERS, check_codec, complete_sequence, is_pattern


@dataclass(frozen=True)
class ClipOptions:
    """How clips are read and written.

    Attributes:
        output: None for files beside the clips; a folder; or, for a single clip, a file or an image sequence.
        codec, crf: see `video_files.check_codec`.
        fps: frames a second of an image sequence.
        resume: go on after the frames of an earlier run.
        overwrite: replace files that exist.
    """

    output: str | None = None
    codec: str | None = None
    crf: int | None = None
    fps: float | None = None
    deinterlace: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ClipJob:
    """One clip: what to read, and what to write."""

    source: Path
    target: Path


def are_clips(inputs: Sequence[str], output: str | None) -> bool:
    """Whether the inputs are clips. A GIF is one if a clip is to be made of it, else an image.

    Raises:
        UsageError: some are clips and some are not.
    """
    names = [one for name in inputs for one in ([name] if is_pattern(name) else matches(name))]
    into_clip = output is not None and (Path(output).suffix.lower() in CONTAINERS or is_pattern(output))
    clips = [name for name in names if is_clip(name) or (into_clip and Path(name).suffix.lower() == ".gif")]
    if clips and len(clips) < len(names):
        image = next(name for name in names if name not in clips)
        raise UsageError(f"{clips[0]} is a clip, but {image} is not. Enlarge clips and images one after the other.")
    if not clips and into_clip:
        raise UsageError(f"{output} would be a clip, but {names[0]} is none. Frames in images are given as frames/%05d.png.")
    return bool(clips)


def is_clip(name: str) -> bool:
    """Whether the name is that of a clip or an image sequence."""
    return is_pattern(name) or (Path(name).suffix.lower() in CLIP_SUFFIXES and not Path(name).is_dir())


def plan_clips(inputs: Sequence[str], upscale: float, options: ClipOptions) -> tuple[list[ClipJob], list[str]]:
    """One job for every clip that is to be done, and a sentence about each that is left out.

    Raises:
        UsageError, VideoFileError: outputs, codec or quality make no sense.
    """
    names = list(
        dict.fromkeys(os.path.normpath(one) for name in inputs for one in ([name] if is_pattern(name) else matches(name)))
    )
    targets = [_target(Path(name), upscale, options.output, len(names) > 1) for name in names]
    taken: dict[Path, str] = {}
    jobs, left_out = [], []
    for name, target in zip(names, targets, strict=True):
        if target.resolve() in taken:
            raise UsageError(f"{name} would be written to {target} like {taken[target.resolve()]} before it. Rename one of them.")
        taken[target.resolve()] = name
        if target.resolve() in {Path(other).resolve() for other in names}:
            raise UsageError(f"{target} is one of the inputs, which would be lost. Give another output with -o.")
        if is_pattern(name):
            complete_sequence(Path(name))
        if not is_pattern(target):
            check_codec(target, options.codec, options.crf)
        if target.exists() and not options.overwrite:
            if len(names) == 1:
                raise UsageError(f"{target} exists already. Add --overwrite to replace it, or give another output with -o.")
            left_out.append(f"skipped: {target} exists already (--overwrite redoes it)")
        else:
            jobs.append(ClipJob(Path(name), target))
    return jobs, left_out


def _target(source: Path, upscale: float, output: str | None, many: bool) -> Path:
    if output is None or (is_folder(output) and not is_pattern(output)):
        if is_pattern(source):
            raise UsageError(f"{source} is an image sequence. Name its result: -o clip.mp4, or -o enlarged/%05d.png.")
        suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mkv"
        return (source.parent if output is None else Path(output)) / f"{source.stem}_x{upscale:g}{suffix}"
    if many:
        raise UsageError(f"{output} names one file, but there are several clips. Give a folder after -o.")
    if Path(output).suffix.lower() in WRITABLE_FORMATS and not is_pattern(output):
        stem, suffix = os.path.splitext(output)
        raise UsageError(f"{output} is one image, but {source} is a clip. For numbered images give -o {stem}_%05d{suffix}.")
    return Path(output)
