"""Names of new checkpoint folders, and paths that users type, for the nodes that make checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from qartsr_pipeline.checkpoint_files import CheckpointError

from .model_folders import find_models, model_folder

NAME_TOOLTIP = (
    "Name of the new checkpoint: the folder below models/qartsr, and what QArtSR Load Model lists. It must not exist yet."
)


def wrong_name(name: str) -> str | None:
    """Why this cannot be a folder's name on every system, or None."""
    if re.fullmatch(r"\w([\w.+ -]*[\w+-])?", name):
        return None
    return (
        f"name is {name!r}: expected a folder's name of letters, digits, spaces, and . _ - + that begins with a letter or digit,"
        " such as photos-w4a4."
    )


def free_folder(name: str) -> Path:
    """models/qartsr/NAME, which does not exist yet.

    Raises:
        CheckpointError: the name is not valid, or such a folder or model exists already.
    """
    problem = wrong_name(name)
    if problem:
        raise CheckpointError(problem)
    folder = model_folder() / name
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: it is left alone. Choose another name, or delete that folder.")
    if name in find_models():
        raise CheckpointError(f"There is a model {name!r} already, which the new one would hide. Choose another name.")
    return folder


_made: dict[Path, int] = {}  # folder -> how often it was made here, and deleted since


def remember(folder: Path) -> None:
    """Notes that a node made ``folder``, so that running the same graph again does nothing until the folder is deleted."""
    _made.setdefault(folder, 0)


def fingerprint(name: str | None) -> int:
    """Changes when the folder that a node made under this name was deleted, so that ComfyUI runs the node again."""
    folder = model_folder() / (name or "")
    if folder in _made and not folder.exists():
        _made[folder] += 1
    return _made.get(folder, 0)


def typed_path(text: str, below: str) -> Path:
    """The path that a user typed or pasted, maybe in quotation marks: absolute, or below a folder of ComfyUI's.

    Raises:
        CheckpointError: there is no such file or folder.
    """
    path = Path(below) / Path(text.strip().strip("\"'")).expanduser()
    if not path.exists():
        raise CheckpointError(f"There is no {path}. Give the path of what is on this computer, absolute or relative to {below}.")
    return path
