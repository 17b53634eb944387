"""Which image becomes which file: the inputs and outputs of `qartsr upscale`, settled before anything is loaded."""

from __future__ import annotations

import glob
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image_files import DEFAULT_QUALITY, READABLE_SUFFIXES, WRITABLE_FORMATS, list_images, read_size
from qartsr_pipeline.video_files import CLIP_SUFFIXES

FORMATS = ("png", "jpg", "webp", "tif", "same")


@dataclass(frozen=True)
class OutputOptions:
    """Where results go, and in which form.

    Attributes:
        output: None for files beside the inputs; a folder; or, for a single image, a file.
        format: one of `FORMATS`, "same" for the input's; None for the suffix of `output` where that is a file, else png.
        quality: of JPEG and WebP, 1 to 100; None for `DEFAULT_QUALITY`.
        overwrite: replace files that exist.
    """

    output: str | None = None
    format: str | None = None
    quality: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """One image: the file to read and the file to write.

    Attributes:
        one_of_many: from a folder, or named with others. Their existing outputs are left alone, so that an interrupted run can be
            repeated. The output of a file that is named alone must not exist.
        quality: of JPEG and WebP.
        notice: for the user to see.
        replaces_input: the output was named among the inputs, too. It may be the only copy of something.
    """

    source: Path
    target: Path
    one_of_many: bool = False
    quality: int = DEFAULT_QUALITY
    notice: str | None = None
    replaces_input: bool = False


@dataclass(frozen=True)
class Plan:
    """The jobs to do, how many were done before, and why others cannot be done."""

    pending: list[Job]
    skipped: int
    refusals: list[str]


def plan_jobs(
    inputs: Sequence[str], upscale: float, options: OutputOptions, recursive: bool = False
) -> tuple[list[Job], list[str]]:
    """One job for every file, and for every image in a folder; and sentences about what is left out.

    Args:
        inputs: files, folders, and patterns such as `*.png`, which Windows leaves to programs. Files are taken as they are,
            existing or not.
        upscale: part of the names of files beside their inputs and in folders.
        recursive: search the folders within folders; results get the same folders within the output folder.

    Raises:
        UsageError: no images, several images for one output file, format or quality that do not fit the outputs.
    """
    sources, left_out = _find(inputs, recursive, options.output)
    many = len(inputs) > 1 or _is_dir(inputs[0]) or _is_pattern(inputs[0])
    sources, results, named = _apart_from_results(sources, options)
    if results:
        names = "is what an earlier run wrote" if len(results) == 1 else "and others are what earlier runs wrote"
        left_out.append(f"left out: {results[0]} {names}. Name such a file alone to enlarge it once more.")
    if options.output is None or is_folder(options.output):
        jobs = [_named_job(source, f"_x{upscale:g}", options, many) for source in sources]
    elif many:
        raise UsageError(
            f"{options.output} names one file, but there may be several images. Give a folder after -o,"
            " with a / at the end if there is a dot in its name."
        )
    else:
        jobs = [Job(sources[0].path, Path(options.output))]
        _check_format(jobs[0], options)
    jobs = [replace(job, replaces_input=job.target.resolve() in named) for job in jobs] if named else jobs
    if options.quality is None:
        return jobs, left_out
    lossy = [kind.lossy for kind in (WRITABLE_FORMATS.get(job.target.suffix.lower()) for job in jobs) if kind]
    if lossy and not any(lossy):
        raise UsageError("--quality is for JPEG and WebP, but no result would be either. Add --format jpg or --format webp.")
    return [replace(job, quality=options.quality) for job in jobs], left_out


def sort_out(jobs: Sequence[Job], overwrite: bool) -> Plan:
    """Checks all output files before anything is computed."""
    pending: list[Job] = []
    refusals: list[str] = []
    taken: dict[str, Path] = {}
    sources = {job.source.resolve() for job in jobs}
    skipped = 0
    for job in jobs:
        try:
            _check_target(job, taken)
            lost = f"{job.target} is another of the inputs, which would be lost. Give another output with -o."
            if job.target.resolve() in sources:
                raise UsageError(lost)
            if is_done(job, overwrite):
                skipped += 1
            elif job.replaces_input:
                raise UsageError(lost)
            else:
                pending.append(job)
        except UsageError as error:
            refusals.append(str(error))
        except OSError as error:
            reason = error.strerror or error
            refusals.append(f"{job.source} cannot become {job.target}: {reason}. Rename the image, or give another output.")
    return Plan(pending, skipped, refusals)


def is_done(job: Job, overwrite: bool) -> bool:
    """Whether the output file exists and may stay. It is complete: files are renamed to their name when they are finished.

    Raises:
        UsageError: it exists, but the image was named alone.
    """
    if overwrite or not job.target.exists():
        return False
    if job.one_of_many and job.target.is_file():
        return True
    raise UsageError(f"{job.target} exists already. Add --overwrite to replace it, or give another output with -o.")


def _named_job(source: _Source, ending: str, options: OutputOptions, many: bool) -> Job:
    """The job of a source whose output gets its name here."""
    path = source.path
    folder = path.parent if options.output is None else Path(options.output) / source.below
    suffix = _suffix(path, options.format or "png")
    notice = None
    if options.format == "same" and suffix != path.suffix:
        notice = f"{path.name}: results cannot be written in this format; a PNG is written instead."
    return Job(path, folder / f"{path.stem}{ending}{suffix}", many, notice=notice)


def _suffix(source: Path, name: str) -> str:
    """The suffix of a format of `FORMATS`; "same" is png where the input's cannot be written."""
    if name != "same":
        return f".{name}"
    return source.suffix if source.suffix.lower() in WRITABLE_FORMATS else ".png"


def _check_format(job: Job, options: OutputOptions) -> None:
    """Raises UsageError when an output file that is named is of another format than the one that is asked for."""
    kind = WRITABLE_FORMATS.get(job.target.suffix.lower())
    if options.format and kind and kind != WRITABLE_FORMATS[_suffix(job.source, options.format).lower()]:
        raise UsageError(
            f"{job.target} is a {kind.name} file by its suffix, but --format asks for {options.format}. Leave --format out, or"
            " give -o another suffix."
        )


def _check_target(job: Job, taken: dict[str, Path]) -> None:
    """Raises UsageError when the output file is the input, or that of an earlier job, listed in `taken`; this one's is added."""
    target = job.target.resolve()
    if target == job.source.resolve():
        raise UsageError(f"{job.target} is the input itself. Give another output file.")
    name = str(target)
    if sys.platform in ("win32", "darwin"):  # their file systems take some different names for the same
        name = unicodedata.normalize("NFC", name).casefold()
    if name in taken:
        suffixes = {one.suffix.lower() for one in (taken[name], job.source)}
        way = " or add --format same" if len(suffixes) == 2 and suffixes <= WRITABLE_FORMATS.keys() else ""
        raise UsageError(f"{job.source} would be written to {job.target} like {taken[name]} before it. Rename one of them{way}.")
    taken[name] = job.source


@dataclass(frozen=True)
class _Source:
    """An input, and the folder within the given one that it was found in; its result gets the same within the output folder."""

    path: Path
    below: Path = Path(".")
    named: bool = False  # by itself, not found in a folder or by a pattern


def _find(inputs: Sequence[str], recursive: bool, output: str | None) -> tuple[list[_Source], list[str]]:
    """The files that the inputs name, each once, and what is left out of folders."""
    sources: dict[str, _Source] = {}
    left_out, empty = [], []
    for name in inputs:
        for path in map(Path, matches(name)):
            found = [_Source(path, named=not _is_pattern(name))]
            if _is_dir(path):
                listing = list_images(path, recursive, Path(output) if output and is_folder(output) else None)
                found = [_Source(one, one.parent.relative_to(path)) for one in listing.images]
                said = listing.left_out("; links are not followed" if recursive else "; --recursive searches them")
                left_out += [said] if said else []
                clips = min((suffix for suffix in listing.others if suffix in CLIP_SUFFIXES), default=None)
                left_out += [f"Clips are enlarged in a command of their own: qartsr upscale '{path}/*{clips}'"] if clips else []
                empty += [str(path)] if not found else []
            sources |= {os.path.abspath(source.path): source for source in found if os.path.abspath(source.path) not in sources}
    if not sources:
        raise UsageError(
            " ".join([f"The folder {', '.join(empty)} holds no images ({', '.join(READABLE_SUFFIXES)}).", *left_out])
        )
    return list(sources.values()), left_out + [f"The folder {folder} holds no images." for folder in empty]


def matches(name: str) -> list[str]:
    """The files that a pattern stands for; the name itself if it is none."""
    if not _is_pattern(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise UsageError(f"No file matches {name}. Check the pattern and the folder you are in ({Path.cwd()}).")
    return found


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not os.path.lexists(name)


def _is_dir(path: str | Path) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # the name is too long: reading the file will say so
        return False


def _apart_from_results(sources: list[_Source], options: OutputOptions) -> tuple[list[_Source], list[Path], set[Path]]:
    """The sources without what runs with any factor made of other sources; those results; and which of them were named.

    A result has the name and the size of one, and is beside its original; those that are found in folders may be in another one.
    Where sizes cannot be read, what was named, or is in another folder, is taken for no result.
    """
    written: dict[tuple[str, str], list[Path]] = {}
    for one in sources:
        written.setdefault((one.path.stem, _suffix(one.path, options.format or "png").lower()), []).append(one.path)
    kept: list[_Source] = []
    results: list[_Source] = []
    for source in sources:
        match = re.fullmatch(r"(.+)_x(\d+(?:\.\d+)?)", source.path.stem, re.DOTALL)
        is_result = match and any(
            _is_enlargement(source.path, original, float(match[2]), unknown=beside and not source.named)
            for original in written.get((match[1], source.path.suffix.lower()), [])
            if (beside := original.parent == source.path.parent) or not source.named
        )
        (results if is_result else kept).append(source)
    return kept, [one.path for one in results], {one.path.resolve() for one in results if one.named}


def _is_enlargement(path: Path, original: Path, factor: float, unknown: bool) -> bool:
    """Whether an image has the size of another one's enlargement; `unknown` where their sizes cannot be read."""
    sizes = read_size(path), read_size(original)
    if None in sizes:
        return unknown
    sides, before = (sorted(size) for size in sizes if size)  # results are upright, their originals need not be
    # sides are rounded, and names have six digits of the factor
    return all(abs(side - max(1, factor * other)) <= 0.5 + 1e-5 * side for side, other in zip(sides, before, strict=True))


def is_folder(output: str) -> bool:
    path = Path(output)
    return path.is_dir() or output.endswith(("/", "\\")) or not path.suffix
