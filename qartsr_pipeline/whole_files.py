"""Files and folders that appear whole or not at all, what processes that were killed leave of them, and what to do about errors.

Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

MARK = ".qartsr-saving-"  # begins the name of a folder that is being written
LEFT_OVER = re.compile(rf"\.[0-9a-f]{{12}}\.part|{re.escape(MARK)}.+")  # temporary names of files, and of folders
_QUOTA = getattr(errno, "EDQUOT", errno.ENOSPC)  # Windows knows no quotas
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or choose a folder on another disk",
    _QUOTA: "The disk is full: free some space, or choose a folder on another disk",
    errno.EFBIG: "A size limit is reached: choose a folder on another disk, or raise the limit",
    errno.EROFS: "The disk is read-only: choose a folder on another disk",
    errno.EACCES: "Writing is not allowed there: change the permissions, or choose another folder",
    errno.EPERM: "Writing is not allowed there: change the permissions, or choose another folder",
    errno.ENOENT: "The folder does not exist: create it, or choose another one",
    errno.ENOTDIR: "What stands in the place of its folder is a file: choose another folder",
    errno.EISDIR: "That is a folder: choose another name",
    errno.ENAMETOOLONG: "The name is too long for this folder: choose a shorter one",
}
FULL, FORBIDDEN = (errno.ENOSPC, _QUOTA), (errno.EACCES, errno.EPERM)
NO_ROOM = (*FULL, errno.EFBIG)  # full, or a size limit


class SavingError(OSError):
    """A file or folder could not be written. The message says why, what is kept, and the way out.

    A command that can continue a run adds how to continue it.
    """


def remedy(error: Exception) -> str:
    """What to do about a file that could not be written, in a sentence."""
    number, text = getattr(error, "errno", None), str(error)
    if "No space left" in text or "os error 28" in text:  # libraries in Rust have errors without a number
        number = errno.ENOSPC
    return _REMEDIES.get(number or 0, "Free some space, check the permissions, or choose another folder") + "."


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes to a temporary name and renames: after a crash, or on a full disk, the file's old content is still there.

    Raises:
        SavingError: the disk is full, or the folder cannot be written to.
    """
    _write(path, content, keep=True)


def check_place(path: Path) -> None:
    """Raises SavingError if a file cannot be written there: before the work, not after it. Nothing is left behind."""
    _write(path, b"", keep=False)


def _write(path: Path, content: bytes | memoryview, keep: bool) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.part")  # short, because the file's own name may be as long as it can be
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(path) and not os.lstat(path).st_mode & 0o222:  # renaming asks for the folder's permission alone
            raise PermissionError(errno.EACCES, "the file is write-protected")
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            os.replace(temporary, path)
    except OSError as error:
        size = f" ({len(content) / 1e6:.0f} MB)" if len(content) > 1e6 else ""
        kept = " The file that was saved before is untouched." if os.path.isfile(path) else ""
        raise SavingError(f"{path}{size} cannot be written: {error.strerror or error}.{kept} {remedy(error)}") from error
    finally:
        with suppress(OSError):  # the folder may be the very thing that does not work
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it where they are missing.

    Raises:
        SavingError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise SavingError(f"{folder} is a file, not a folder: choose another output folder") from error
    except OSError as error:
        raise SavingError(f"the folder {folder} cannot be made: {error.strerror or error}. {remedy(error)}") from error


def temporary_folder(target: Path) -> Path:
    """A name beside `target` for a folder that is to be renamed to it; `remove_left_over` knows who writes there."""
    return target.with_name(f"{MARK}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove_left_over(place: Path) -> None:
    """Removes folders that processes of this machine left in `place`, which ended while they were saving."""
    for path in place.glob(f"{MARK}*"):
        host, _, process = path.name.removeprefix(MARK).rpartition("-")[0].rpartition("-")
        if host == platform.node() and process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)
