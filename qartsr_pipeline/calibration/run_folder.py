"""The folder of a run: whether a new one can have it, and what killed processes left behind is removed.

Nothing heavy is imported here, so that command lines can look at a folder quickly.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from qartsr_pipeline import whole_files
from qartsr_pipeline.folder_lock import LOCK_NAME, FolderInUseError
from qartsr_pipeline.whole_files import FORBIDDEN, FULL, SavingError, remedy

ACTIVATIONS = ".activations."  # temporary folders of `TensorStore` begin with this
LEFT_OVER = re.compile(
    whole_files.LEFT_OVER.pattern + r"|\.activations\..+"
    # of earlier versions
    r"|\.(model|given-[0-9a-f]{16})\.[0-9a-f]{8}(\.old)?"
    r"|\..+\.[0-9a-f]{8}\.tmp|(run\.json|state\.pt|history\.json)\.tmp"
)


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
