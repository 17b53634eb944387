"""Which picture becomes which file: the inputs and the output of `qartsr upscale`, sorted out before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image_files import READABLE_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One picture: the file to read and the file to write.

    Attributes:
        one_of_many: from a folder, or named with others. What an earlier run wrote of those is left alone, so that an interrupted
            run can be repeated; a file that is named alone must be meant, and one in its place is an error.
    """

    source: Path
    target: Path
    one_of_many: bool = False


@dataclass(frozen=True)
class Plan:
    """Jobs that are to be done, how many were done before, and why others cannot be."""

    pending: list[Job]
    skipped: int
    refusals: list[str]


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
    many = len(sources) > 1 or Path(inputs[0]).is_dir()
    if output is None:
        return [Job(source, source.with_name(f"{source.stem}{ending}.png"), many) for source in sources]
    if _is_folder(output):
        return [Job(source, Path(output) / f"{source.stem}{ending}.png", many) for source in sources]
    if many:
        raise UsageError(f"{output} names one file, but there may be several pictures. Give a folder after -o.")
    return [Job(sources[0], Path(output))]


def sort_out(jobs: Sequence[Job], overwrite: bool) -> Plan:
    """Looks at all output files before anything is computed."""
    plan, taken = Plan([], 0, []), set()
    for job in jobs:
        try:
            _check_target(job, taken)
            done = is_done(job, overwrite)
        except UsageError as error:
            plan.refusals.append(str(error))
            continue
        if done:
            plan = replace(plan, skipped=plan.skipped + 1)
        else:
            plan.pending.append(job)
    return plan


def is_done(job: Job, overwrite: bool) -> bool:
    """Whether the output file is there, whole as all that are written, and may stay.

    Raises:
        UsageError: it is there, but the picture was named alone.
    """
    if overwrite or not job.target.exists():
        return False
    if job.one_of_many and job.target.is_file():
        return True
    raise UsageError(f"{job.target} exists already. Add --overwrite to replace it, or give another output with -o.")


def _check_target(job: Job, taken: set[Path]) -> None:
    """Raises UsageError when the output file is the input, or that of a job before, as listed in `taken`; this one's is added."""
    target = job.target.resolve()
    if target == job.source.resolve():
        raise UsageError(f"{job.target} is the input itself. Give another output file.")
    if target in taken:
        raise UsageError(f"{job.source} would be written to {job.target} like a picture before it. Rename one of them.")
    taken.add(target)


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
