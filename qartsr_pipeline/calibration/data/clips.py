"""Clips as folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qartsr_pipeline.calibration.data.patches import list_photographs, read_photograph


def clip_files(folder: str | Path) -> dict[str, list[Path]]:
    """Name -> image files in order of their names, for each folder of images below ``folder``, or for ``folder`` itself.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder)
    clips: dict[str, list[Path]] = {}
    for path in list_photographs(folder):
        name = folder.name if path.parent == folder else path.parent.relative_to(folder).as_posix()
        clips.setdefault(name, []).append(path)
    return clips


def read_clip(name: str, paths: list[Path]) -> np.ndarray:
    """(F, H, W, 3) uint8; raises ValueError if the images differ in size, and ImageFileError for one that cannot be read."""
    images = [read_photograph(path) for path in paths]
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1:
        raise ValueError(f"{name}: the images of a clip must have one size, these have {sizes} (width, height)")
    return np.stack(images)
