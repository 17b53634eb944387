"""What a case may end with: the sound result, or an error that says what happened, why, and what to do."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import numpy as np

import qartsr_pipeline

PACKAGE = str(Path(qartsr_pipeline.__file__).parent)
# What our messages end with, and how those about an argument begin to say what it may be.
_WAY_OUT = re.compile(
    r"\b(Download|Give|Leave|Load|Upgrade|Update|Save|Remove|Ask|Choose|Pass|Take|Change|Use|Free|Convert|Set|Install|Try|Call|Lower|Repair"
    r"|load it with|must|[Ee]xpected|may hold|one of)\b"
)
_CLEAR = (ValueError, TypeError, OSError, FloatingPointError)  # CheckpointError is a ValueError


class Failure(Exception):
    """A case did not end as it may; the message says how."""


class CallersError(Exception):
    """What a callback of a case raises: it must come out as it is."""


def judge_error(error: BaseException, must_name: str = "") -> None:
    """Raises Failure unless the error is one of the package's clear ones.

    Args:
        must_name: what the message has to contain, such as the folder.
    """
    message, frames = str(error), traceback.extract_tb(error.__traceback__)
    faults = []
    if not isinstance(error, _CLEAR):
        faults.append("of a type that says nothing")
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        faults.append("not raised by this package")
    if len(message) < 30 or "\n" in message:
        faults.append("too short, or of several lines")
    if not _WAY_OUT.search(message):
        faults.append("without a way out")
    if must_name not in message:
        faults.append(f"without {must_name}")
    if faults:
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
        raise Failure(f"an error that is {' and '.join(faults)}: {type(error).__name__}: {message[:300]} ({place})")


def judge_image(found: np.ndarray, sound: np.ndarray, tolerance: float = 1e-4) -> None:
    """Raises Failure unless an image is the one that the sound folder or file gives."""
    if found.shape != sound.shape:
        raise Failure(f"a result of shape {found.shape} instead of {sound.shape}, without a word")
    difference = float(np.abs(found.astype(np.float64) - sound.astype(np.float64)).max())
    if not difference <= tolerance:
        raise Failure(f"a wrong image without a word: it differs by up to {difference:.4f}")


def tree(folder: Path) -> dict[str, int]:
    """Relative path -> size of everything in a folder, to find what was left over."""
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in sorted(folder.rglob("*"))}
