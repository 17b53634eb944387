"""The parts that a result is written in, in a folder beside it: whatever stops the work, finished parts stay.

`clip_x4.mp4.parts` holds what the work was (`job.json`), and for every 96 frames, or ten minutes, a file with the encoded
frames and one with their times. A part is renamed to its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic as time_now
from typing import Any

import numpy as np

from qartsr_pipeline.folder_lock import FolderInUseError, FolderLock
from qartsr_pipeline.video_files.clip import VideoFileError, frames_in_words, import_av
from qartsr_pipeline.video_files.encoding import Encoding, PartWriter
from qartsr_pipeline.whole_files import NO_ROOM, SavingError, check_place

PART_FRAMES = 96
PART_SECONDS = 600.0  # for slow models: more than this is not lost, whatever happens
_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """Attributes:
    first: number of its first frame.
    times, durations: of its frames, in the clip's time base.
    order: numbers of frames in the order in which they are encoded.
    """

    path: Path
    first: int
    times: list[int]
    durations: list[int]
    order: list[int]


def parts_folder(target: Path) -> Path:
    """Where the parts of a result are kept."""
    return target.with_name(target.name + ".parts")


Join = Callable[[list[Part], Path], list[str]]


class PartsWriter:
    """Writes a result in parts, and joins them."""

    def __init__(self, target: Path, encoding: Encoding, join: Join, job: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Args:
        join: makes the file of the parts; returns what it cannot hold.
        overwrite: replace a result that exists, also one that appears meanwhile; and, without `resume`, parts of an earlier run.
        job: what the frames depend on: a result goes on only if it is the same.

        Raises:
            VideoFileError: parts of another job, or of this one without `resume`; another process is at work on this result;
                the folder or the result cannot be written.
        """
        if os.path.lexists(target):  # a folder, or write-protected: known now, not when all frames are done
            try:
                check_place(target)
            except SavingError as error:
                raise VideoFileError(str(error)) from error
        self._target, self._encoding, self._join = target, encoding, join
        self._replaces = overwrite or os.path.lexists(target)  # who calls has seen that file
        self.folder = parts_folder(target)
        self._lock = FolderLock(self.folder)
        self._job = json.loads(json.dumps({"format_version": _FORMAT, "encoding": asdict(encoding), **job}, default=str))
        self.parts: list[Part] = []
        self._writer: PartWriter | None = None
        self._begun = 0.0
        self._times: list[int] = []
        self._durations: list[int] = []
        try:
            if self.folder.exists():
                self._take_lock()
                self._take_up(resume, overwrite)
            self._create()
        except BaseException:
            self._lock.release()
            raise
        self.done = sum(len(part.times) for part in self.parts)

    def _take_lock(self) -> None:
        """Raises VideoFileError where another process writes parts here."""
        try:
            self._lock.take()
        except (FolderInUseError, SavingError) as error:
            raise VideoFileError(f"{str(error).rstrip('.')}.") from error

    def _take_up(self, resume: bool, overwrite: bool) -> None:
        found = _read_json(self.folder / "job.json")
        parts = _finished(self.folder)
        if overwrite and not resume:
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path != self._lock.path:
                    path.unlink(missing_ok=True)
        elif not resume:
            frames = sum(len(part.times) for part in parts)
            raise VideoFileError(
                f"{self.folder} holds {frames_in_words(frames)} of an earlier run. Add --resume to go on after them, --overwrite "
                "to begin anew, or delete the folder."
            )
        elif found != self._job:
            before, now = _flat(found or {}), _flat(self._job)
            keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            raise VideoFileError(
                f"{self.folder} was made from another file or with other options ({', '.join(keys)}), and is of no use for this. "
                "Give the same ones, or begin anew: --overwrite without --resume."
            )
        else:
            self.parts = parts
            for path in set(self.folder.glob("[0-9]*.mkv")) - {part.path for part in parts}:
                path.unlink()  # after a gap

    def _create(self) -> None:
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            temporary = self.folder / "job.json.tmp"
            temporary.write_text(json.dumps(self._job, indent=1), encoding="utf-8")
            os.replace(temporary, self.folder / "job.json")

    def write(self, pixels: np.ndarray, time: int, duration: int) -> None:
        """Encodes the next frame, (H, W, 3) in [0, 1]."""
        with _uninterrupted(), self._disk():
            if self._writer is None:
                self._writer = PartWriter(self._temporary, self._encoding, self.done)
                self._begun = time_now()
            self._writer.write(pixels)
            self._times.append(time)
            self._durations.append(duration)
            self.done += 1
            if len(self._times) >= PART_FRAMES or time_now() - self._begun > PART_SECONDS:
                self._finish_part()

    @property
    def _temporary(self) -> Path:
        return self.folder / "unfinished.mkv"

    def _finish_part(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        times, durations, self._times, self._durations = self._times, self._durations, [], []
        self.done -= len(times)
        try:
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        if sorted(writer.order) != list(range(self.done, self.done + len(times))):
            raise VideoFileError(  # or joining would fail, when all is done
                f"{self._target}: the encoder has not returned every frame. Add --resume, or choose another --codec."
            )
        part = Part(self.folder / f"{self.done:08}.mkv", self.done, times, durations, writer.order)
        _sync(self._temporary)
        table = {"times": times, "durations": durations, "order": part.order}
        temporary = self.folder / "unfinished.json"
        temporary.write_text(json.dumps(table), encoding="utf-8")
        os.replace(temporary, part.path.with_suffix(".json"))
        os.replace(self._temporary, part.path)
        self.parts.append(part)
        self.done += len(times)

    def suspend(self, keep: bool) -> None:
        """Ends a run early.

        Args:
            keep: finish the part that is being written. Where that failed before, it is left out.
        """
        try:
            if keep:
                self._finish_part()
        except (OSError, ValueError, import_av().error.FFmpegError):
            pass
        if self._writer is not None:
            self._writer.abandon()
            self.done -= len(self._times)
            self._writer, self._times, self._durations = None, [], []
        for name in ("unfinished.mkv", "unfinished.json"):
            (self.folder / name).unlink(missing_ok=True)
        if not self.parts:
            self.remove()
        self._lock.release()

    def finish(self) -> list[str]:
        """Joins the parts into the result and removes them; returns what the file cannot hold."""
        with self._disk():
            self._finish_part()
            temporary = self.folder / f"joined{self._target.suffix}"
            try:
                notices = self._join(self.parts, temporary)
                _sync(temporary)
                if not self._replaces and os.path.lexists(self._target):
                    raise VideoFileError(
                        f"{self._target} has appeared while this ran, and is left alone. Move it away and add --resume, or"
                        " replace it: --resume --overwrite."
                    )
                os.replace(temporary, self._target)
            finally:
                temporary.unlink(missing_ok=True)
        self.remove()
        return notices

    def remove(self) -> None:
        """Deletes the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if sys.platform == "win32":  # where a file that is open, as the lock's, is not deleted
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Says in one sentence what the disk refused."""
        try:
            yield
        except OSError as error:
            if error.errno in NO_ROOM:
                why = "the disk is full or a size limit is reached. Free some space, or choose another folder."
            else:
                why = f"{error.strerror or error}. Choose another name or folder, or change its permissions."
            raise VideoFileError(f"{self.folder.with_suffix('')} cannot be written: {why}") from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait: between encoder and tables it would leave a frame in one and not in the other."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    waiting: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if waiting:
            previous(*waiting[0])


def _finished(folder: Path) -> list[Part]:
    """The parts that are complete, without a gap from the first frame on."""
    parts: list[Part] = []
    first = 0
    for path in sorted(folder.glob("[0-9]*.mkv")):
        table = _read_json(path.with_suffix(".json"))
        if table and path.stem == f"{first:08}":
            parts.append(Part(path, first, table["times"], table["durations"], table["order"]))
            first += len(table["times"])
    return parts


def _flat(job: dict[str, Any]) -> dict[str, Any]:
    """Options by their own names (`crf`, `fidelity`) instead of in groups."""
    return {
        name: value for key, group in job.items() for name, value in (group if isinstance(group, dict) else {key: group}).items()
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
