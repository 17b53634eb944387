"""A folder of photographs, held in memory, from which random patches are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qartsr_pipeline.image_files import READABLE_SUFFIXES, read_picture


def list_photographs(folder: str | Path) -> list[Path]:
    """Every picture file below ``folder``, sorted by path.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the photograph folder {str(folder)!r} does not exist")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no picture ({', '.join(READABLE_SUFFIXES)}) was found below {str(folder)!r}")
    return paths


def read_photograph(path: str | Path) -> np.ndarray:
    """The picture as uint8 RGB, shape (H, W, 3), upright, without its transparency.

    Raises:
        PictureError: it cannot be read; the message names it.
    """
    pixels = read_picture(path).pixels
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1]
    return np.ascontiguousarray(np.broadcast_to(colours, (*pixels.shape[:2], 3)))


def as_pixels(picture: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] -> (H, W, 3) uint8; values outside are clipped."""
    return (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


class PhotographPatches:
    """Random patches of the given photographs.

    Pictures whose longest side is at least 1024 pixels are also used at half size, where they are sharper per pixel.
    A picture smaller than the patch is left out.
    """

    def __init__(self, paths: list[Path]):
        self.pictures: list[np.ndarray] = []
        for path in paths:
            picture = read_photograph(path)
            self.pictures.append(picture)
            height, width = picture.shape[:2]
            if max(height, width) >= 1024:
                half = Image.fromarray(picture).resize((width // 2, height // 2), Image.Resampling.LANCZOS)
                self.pictures.append(np.asarray(half))

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """``count`` patches with random position, flip and quarter turn, float32 in [0, 1], shape (count, 3, size, size).

        Raises:
            ValueError: if no picture is as large as the patch.
        """
        usable = [p for p in self.pictures if min(p.shape[:2]) >= size]
        if not usable:
            raise ValueError(f"no photograph is at least {size} pixels high and wide; use smaller patches")
        # by area: a large photograph holds more patches than a small one
        areas = np.array([p.shape[0] * p.shape[1] for p in usable], dtype=np.float64)
        patches = []
        for index in rng.choice(len(usable), count, p=areas / areas.sum()):
            picture = usable[index]
            top = rng.integers(picture.shape[0] - size + 1)
            left = rng.integers(picture.shape[1] - size + 1)
            patch = np.rot90(picture[top : top + size, left : left + size], rng.integers(4))
            patches.append(patch[:, ::-1] if rng.integers(2) else patch)
        batch = torch.from_numpy(np.ascontiguousarray(np.stack(patches)))
        return batch.permute(0, 3, 1, 2).float().div_(255.0)
