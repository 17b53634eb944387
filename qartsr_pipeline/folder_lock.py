"""One process at a time works in a folder: a calibration's, or that of a clip's finished frames."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from qartsr_pipeline.whole_files import SavingError, remedy

LOCK_NAME = ".lock"


class FolderInUseError(OSError):
    """Another process works in the folder."""


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
        self.release()

    def release(self) -> None:
        """Gives up the lock, if it is held."""
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
