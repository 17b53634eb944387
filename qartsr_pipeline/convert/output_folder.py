"""Writes a converted pipeline under a temporary name and renames it, so a folder that exists is complete."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from qartsr_pipeline.convert.model_card import Card
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

_MARGIN = 16_000_000  # bytes for all files that hold no weights


def check_output(folder: Path) -> None:
    """Raises FileExistsError if `folder` exists and is not empty, NotADirectoryError if it cannot be created."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty, so it was not changed. Choose another name or remove it.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Choose another name for the folder.")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is the root of another disk and cannot be replaced. Give a folder within it.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} cannot be created: {above} is a file. Choose another name.")


def write_folder(pipeline: QArtSRPipeline, folder: Path, card: Card) -> int:
    """Saves the pipeline and its card; returns the bytes written.

    Raises:
        FileExistsError, NotADirectoryError: see `check_output`.
        OSError: no space, or no permission; nothing is left behind.
    """
    check_output(folder)
    folder = folder.resolve()  # a link to the folder stays a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(pipeline, folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card.text(), encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails; not every system renames onto a folder
        os.replace(temporary, folder)
    except SafetensorError as error:  # safetensors' error for a full disk
        raise OSError(f"{folder} could not be written ({error}). Free some space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _check_space(pipeline: QArtSRPipeline, folder: Path) -> None:
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    needed = sum(p.numel() * p.element_size() for model in models for p in model.state_dict().values()) + _MARGIN
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB, but {folder.parent} has {free / 1e9:.2f} GB free. Free some space or choose"
            f" another place."
        )
