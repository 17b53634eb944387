"""Which image becomes which file: the inputs and outputs of `qartsr upscale`, settled before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image_files import DEFAULT_QUALITY, READABLE_SUFFIXES, WRITABLE_FORMATS

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
    """

    source: Path
    target: Path
    one_of_many: bool = False
    quality: int = DEFAULT_QUALITY
    notice: str | None = None


@dataclass(frozen=True)
class Plan:
    """The jobs to do, how many were done before, and why others cannot be done."""

    pending: list[Job]
    skipped: int
    refusals: list[str]


def plan_jobs(inputs: Sequence[str], upscale: float, options: OutputOptions) -> list[Job]:
    """One job for every file, and for every image in a folder.

    Args:
        inputs: files and folders. Files are taken as they are, existing or not.
        upscale: part of the names of files beside their inputs and in folders.

    Raises:
        UsageError: a folder without images, several images for one output file, format or quality that do not fit the outputs.
    """
    ending = f"_x{upscale:g}"
    sources = [source for name in inputs for source in _images(Path(name), ending)]
    many = len(sources) > 1 or Path(inputs[0]).is_dir()
    if options.output is None or _is_folder(options.output):
        jobs = [_named_job(source, ending, options, many) for source in sources]
    elif many:
        raise UsageError(f"{options.output} names one file, but there may be several images. Give a folder after -o.")
    else:
        jobs = [Job(sources[0], Path(options.output))]
        _check_format(jobs[0], options)
    if options.quality is None:
        return jobs
    lossy = [kind.lossy for kind in (WRITABLE_FORMATS.get(job.target.suffix.lower()) for job in jobs) if kind]
    if lossy and not any(lossy):
        raise UsageError("--quality is for JPEG and WebP, but no result would be either. Add --format jpg or --format webp.")
    return [replace(job, quality=options.quality) for job in jobs]


def sort_out(jobs: Sequence[Job], overwrite: bool) -> Plan:
    """Checks all output files before anything is computed."""
    pending: list[Job] = []
    refusals: list[str] = []
    taken: set[Path] = set()
    sources = {job.source.resolve() for job in jobs}
    skipped = 0
    for job in jobs:
        try:
            _check_target(job, taken)
            if is_done(job, overwrite):
                skipped += 1
            elif job.target.resolve() in sources:
                raise UsageError(f"{job.target} is another of the inputs, which would be lost. Give another output with -o.")
            else:
                pending.append(job)
        except UsageError as error:
            refusals.append(str(error))
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


def _named_job(source: Path, ending: str, options: OutputOptions, many: bool) -> Job:
    """The job of a source whose output gets its name here."""
    folder = source.parent if options.output is None else Path(options.output)
    suffix = _suffix(source, options.format or "png")
    notice = None
    if options.format == "same" and suffix != source.suffix:
        notice = f"{source.name}: results cannot be written in this format; a PNG is written instead."
    return Job(source, folder / f"{source.stem}{ending}{suffix}", many, notice=notice)


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


def _check_target(job: Job, taken: set[Path]) -> None:
    """Raises UsageError when the output file is the input, or that of an earlier job, listed in `taken`; this one's is added."""
    target = job.target.resolve()
    if target == job.source.resolve():
        raise UsageError(f"{job.target} is the input itself. Give another output file.")
    if target in taken:
        raise UsageError(f"{job.source} would be written to {job.target} like an image before it. Rename one of them.")
    taken.add(target)


def _images(path: Path, ending: str) -> list[Path]:
    """A folder's images by name, without those that an earlier run wrote beside their sources; or the file itself."""
    if not path.is_dir():
        return [path]
    files = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in READABLE_SUFFIXES and entry.is_file()]
    stems = {entry.stem for entry in files}
    images = [entry for entry in files if not (entry.stem.endswith(ending) and entry.stem.removesuffix(ending) in stems)]
    if not images:
        raise UsageError(f"The folder {path} holds no images ({', '.join(READABLE_SUFFIXES)}). Sub-folders are not searched.")
    return images


def _is_folder(output: str) -> bool:
    path = Path(output)
    return path.is_dir() or output.endswith(("/", "\\")) or not path.suffix
