"""Reading folders of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qartsr_pipeline.image_files import READABLE_SUFFIXES, read_image


def list_photographs(folder: str | Path) -> list[Path]:
    """Every image file below ``folder``, sorted by path.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the photograph folder {str(folder)!r} does not exist")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no image ({', '.join(READABLE_SUFFIXES)}) was found below {str(folder)!r}")
    return paths


def read_photograph(path: str | Path) -> np.ndarray:
    """The image as uint8 RGB, shape (H, W, 3), upright, without its transparency.

    Raises:
        ImageFileError: the file cannot be read; the message names it.
    """
    pixels = read_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    colors = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1]
    return np.ascontiguousarray(np.broadcast_to(colors, (*pixels.shape[:2], 3)))


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] -> (H, W, 3) uint8; values outside are clipped."""
    return (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
