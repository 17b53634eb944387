"""Checkpoint folders: those that are there (shipped with the package, or under ComfyUI's `qartsr` model paths), and new ones."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import lru_cache
from pathlib import Path

from qartsr_pipeline.checkpoint_files import CheckpointError, label_of, shipped_checkpoints
from qartsr_pipeline.checkpoint_files.checking import PIPELINE_CLASS, VIDEO_PIPELINE_CLASS, named_class

KIND = "qartsr"  # the folder below models/, and the key in extra_model_paths.yaml

# What a node loads, by the pipeline class that a folder names.
FOR_IMAGES: tuple[str, ...] = (PIPELINE_CLASS,)
FOR_CLIPS: tuple[str, ...] = (VIDEO_PIPELINE_CLASS,)
FOR_BOTH = FOR_CLIPS + FOR_IMAGES

# Photographs before clean images; few bits, which can hardly be told from full precision, before many; 2 bits last.
BEST_FIRST = [*("video-w4a4", "video-fp"), *("photo-w4a4", "photo-w8a8", "photo-fp", "photo-w2a2")]
BEST_FIRST += ["tiny-w4a4", "tiny-w8a8", "tiny-fp", "tiny-w3a3", "tiny-w2a2"]

DEPTH = 2  # models/qartsr/name and models/qartsr/owner/name

_complained: set[Path] = set()
_made: dict[Path, int] = {}  # folder -> how often it was made here, and deleted since

NAME_TOOLTIP = (
    "Name of the new checkpoint: the folder below models/qartsr, and what QArtSR Load Model lists. It must not exist yet."
)


def register_model_folder() -> Path:
    """Makes models/qartsr known to ComfyUI, before any extra paths, and returns it."""
    import folder_paths

    own = os.path.join(folder_paths.models_dir, KIND)
    paths = list(folder_paths.folder_names_and_paths.get(KIND, ([], set()))[0])
    folder_paths.folder_names_and_paths[KIND] = ([own, *(path for path in paths if path != own)], {"folder"})
    return Path(own)


def model_folder() -> Path:
    """models/qartsr, where new checkpoints are written, created if missing."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths(KIND)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_models(classes: tuple[str, ...] = FOR_IMAGES) -> dict[str, Path]:
    """Name -> folder of every usable checkpoint: others by their path below the model folder, then shipped ones, best first.

    With several classes, those of the first come before the others.

    A folder in an earlier path hides one of the same name in a later path, or a shipped one.
    """
    import folder_paths

    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(KIND)):
        for folder in _usable_folders(base, DEPTH):
            found.setdefault(folder.relative_to(base).as_posix(), folder)
    shipped = {name: found.pop(name, folder) for name, folder in sorted(shipped_checkpoints().items(), key=_recommended)}
    every = {folder: class_of(folder) for folder in (*found.values(), *shipped.values())}
    ordered = [*sorted(found.items()), *shipped.items()]
    return {name: folder for wanted in classes for name, folder in ordered if every[folder] == wanted}


def _recommended(shipped: tuple[str, Path]) -> tuple[int, str]:
    name, _ = shipped
    return (BEST_FIRST.index(name) if name in BEST_FIRST else len(BEST_FIRST)), name


def label_of_model(folder: Path) -> str:
    """What a model is for, its bits and its size, such as "real photographs, 4 bits, 4 MB"; "" if its files cannot be read."""
    try:
        return _label(folder, (folder / "model_index.json").stat().st_mtime_ns)
    except (CheckpointError, OSError):
        return ""


@lru_cache(maxsize=256)
def _label(folder: Path, written: int) -> str:
    return label_of(folder)


def _usable_folders(folder: Path, depth: int) -> list[Path]:
    usable = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if (entry / "model_index.json").is_file():
            usable += [entry] if class_of(entry) in FOR_BOTH else []
        elif depth > 1:
            usable += _usable_folders(entry, depth - 1)
    return usable


def class_of(folder: Path) -> str | None:
    """The pipeline class that its model_index.json names; a file that cannot be read is logged once."""
    try:
        return named_class(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        if folder not in _complained:
            _complained.add(folder)
            logging.warning("QArtSR: %s is left out, its model_index.json cannot be read (%s)", folder, error)
        return None


def check_class(name: str, folder: Path, classes: tuple[str, ...]) -> None:
    """Raises CheckpointError where a node for images is to load a model for clips."""
    if class_of(folder) in FOR_CLIPS and not set(FOR_CLIPS) & set(classes):
        raise CheckpointError(
            f"{name} is a model for clips, and this node loads models for images. Load it with QArtSR Load Video Model, for"
            " QArtSR Video Upscale or QArtSR Video Frames; or choose a model for images."
        )


def folder_of(name: str, classes: tuple[str, ...] = FOR_IMAGES) -> Path:
    """The folder of a model in the list.

    Raises:
        CheckpointError: there is no such model, or not any more; or it is one for clips, and not wanted.
    """
    models = find_models(classes)
    if name not in models:
        if (folder := find_models(FOR_CLIPS).get(name)) is not None:
            check_class(name, folder, classes)
        raise CheckpointError(
            f"There is no model {name!r} any more: its folder was deleted, renamed or is damaged. Choose another one of"
            f" {', '.join(models)}, or put it back into {model_folder()}; the key R refreshes the list."
        )
    return models[name]


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
    if name in find_models(FOR_BOTH):
        raise CheckpointError(f"There is a model {name!r} already, which the new one would hide. Choose another name.")
    return folder


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
