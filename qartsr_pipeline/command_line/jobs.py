"""Which picture becomes which file: the inputs and the output of `qartsr upscale`, sorted out before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..picture_files import READABLE_SUFFIXES
from .messages import UsageError


@dataclass(frozen=True)
class Job:
    """One picture: the file to read and the file to write."""

    source: Path
    target: Path


def plan_jobs(inputs: Sequence[str], output: str | None, upscale: float) -> list[Job]:
    """Folders become the pictures in them; every picture gets its output file.

    Args:
        inputs: files and folders. Files are taken as they are, existing or not.
        output: None for files beside the inputs, a folder, or, for a single picture, a file.
        upscale: part of the names of files beside their inputs and in folders.

    Raises:
        UsageError: a folder without pictures, several pictures for one output file.
    """
    ending = f"_x{upscale:g}"
    sources = [source for name in inputs for source in _pictures(Path(name), ending)]
    if output is None:
        return [Job(source, source.with_name(f"{source.stem}{ending}.png")) for source in sources]
    if _is_folder(output):
        return [Job(source, Path(output) / f"{source.stem}{ending}.png") for source in sources]
    if len(sources) > 1 or Path(inputs[0]).is_dir():
        raise UsageError(f"{output} names one file, but there may be several pictures. Give a folder after -o.")
    return [Job(sources[0], Path(output))]


def check_job(job: Job, taken: set[Path], overwrite: bool) -> None:
    """Raises UsageError when the output file may not be written: it is the input, taken by another picture, or there already.

    Args:
        taken: the resolved output files of the jobs before this one; this one's is added.
    """
    target = job.target.resolve()
    if target == job.source.resolve():
        raise UsageError(f"{job.target} is the input itself. Give another output file.")
    if target in taken:
        raise UsageError(f"{job.source} would be written to {job.target} like a picture before it. Rename one of them.")
    taken.add(target)
    if job.target.exists() and not overwrite:
        raise UsageError(f"{job.target} exists already. Add --overwrite to replace it, or give another output with -o.")


def _pictures(path: Path, ending: str) -> list[Path]:
    """A folder's pictures by name, without those that an earlier run wrote beside their sources; or the file itself."""
    if not path.is_dir():
        return [path]
    files = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in READABLE_SUFFIXES and entry.is_file()]
    stems = {entry.stem for entry in files}
    pictures = [entry for entry in files if not (entry.stem.endswith(ending) and entry.stem.removesuffix(ending) in stems)]
    if not pictures:
        raise UsageError(
            f"The folder {path} holds no pictures ({', '.join(READABLE_SUFFIXES)}). Folders within it are not searched."
        )
    return pictures


def _is_folder(output: str) -> bool:
    path = Path(output)
    return path.is_dir() or output.endswith(("/", "\\")) or not path.suffix
