"""The folder of a run: one process at a time works in it, and what killed processes left behind is removed.

Nothing heavy is imported here, so that command lines can look at a folder quickly.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from qartsr_pipeline import whole_files
from qartsr_pipeline.whole_files import FORBIDDEN, FULL, SavingError, remedy

LOCK_NAME = ".lock"
ACTIVATIONS = ".activations."  # temporary folders of `TensorStore` begin with this
LEFT_OVER = re.compile(
    whole_files.LEFT_OVER.pattern + r"|\.activations\..+"
    # of earlier versions
    r"|\.(model|given-[0-9a-f]{16})\.[0-9a-f]{8}(\.old)?"
    r"|\..+\.[0-9a-f]{8}\.tmp|(run\.json|state\.pt|history\.json)\.tmp"
)


class FolderInUseError(OSError):
    """Another process works in the folder."""


def explained(error: OSError, folder: Path) -> OSError:
    """A `SavingError` with the remedy, if the error is about the disk or about ``folder``; any other error as it is."""
    if isinstance(error, (SavingError, FolderInUseError)) or error.errno is None:
        return error
    name = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
    ours = name is not None and folder.absolute() in (Path(name).absolute(), *Path(name).absolute().parents)
    if error.errno in (*FULL, errno.EROFS) or (ours and error.errno in FORBIDDEN):
        return SavingError(f"{name or 'a temporary file'} cannot be written: {error.strerror}. {remedy(error)}")
    return error


def check_free(folder: Path) -> None:
    """Makes sure that a new run can have the folder: it does not exist, or holds nothing but what killed processes left.

    Raises:
        FileExistsError: it is a file, or holds something else. SavingError: it cannot be read.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file, not a folder: choose another output folder")
        if folder.is_dir() and not all(_is_left_over(path.name) for path in folder.iterdir()):
            raise FileExistsError(f"{folder} exists and holds something else: choose another output folder")
    except PermissionError as error:
        raise SavingError(f"{folder} cannot be read: {error.strerror}. {remedy(error)}") from error


def _is_left_over(name: str) -> bool:
    return name == LOCK_NAME or LEFT_OVER.fullmatch(name) is not None


def remove_left_over(folder: Path) -> None:
    """Removes what processes that were killed while saving left in the folder. Only for the process that holds its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFT_OVER.fullmatch(path.name) is None:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class FolderLock:
    """Held by the one process that works in a folder. The system releases it when the process ends, however it ends.

    A context manager, which releases the lock at its end. Where the file system has no locks, it keeps nobody out.

    Attributes:
        held: whether `take` has succeeded.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        # The folder may have become unwritable meanwhile. That is said by what failed in it, and the lock ends all the same.
        if sys.platform != "win32":  # while it is held: nobody takes a file that is about to go, see `take`
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self._file.close()
        self._file = None

    def take(self) -> FolderLock:
        """Takes the lock of an existing folder.

        Raises:
            FolderInUseError: another process has it; the message says which. SavingError: the folder cannot be written to.
        """
        while self._file is None:
            try:
                file = open(self.path, "a+", encoding="utf-8")
            except OSError as error:
                raise SavingError(f"{self.path.parent} cannot be written to: {error.strerror}. {remedy(error)}") from error
            if not _lock(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise FolderInUseError(
                    f"{self.path.parent} is in use by {holder}: wait until that ends, stop it, or choose another output folder"
                )
            if self._is_there(file):
                self._file = file
            else:  # who held it before has removed it since it was opened
                file.close()
        with suppress(OSError):  # the disk is full: others are told of "another process" then
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            self._file.flush()
        return self

    def _is_there(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False


if sys.platform == "win32":
    import msvcrt

    def _lock(file: TextIO) -> bool:
        file.seek(2**30)  # beyond the text, which others read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(file: TextIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        return True
