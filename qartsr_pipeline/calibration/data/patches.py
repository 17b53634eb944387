"""Where high-resolution patches come from: photographs, images in memory, or two sources mixed.

Procedural images are in `dead_leaves.DeadLeaves`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.image.conversion import to_images
from qartsr_pipeline.image_files import READABLE_SUFFIXES, read_image

MemoryImage = PIL.Image.Image | np.ndarray | torch.Tensor
LARGE_SIDE = 1024  # images at least this long are also used at half size, where they are sharper per pixel


class Patches(Protocol):
    """A source of high-resolution patches."""

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """(count, 3, size, size) float32 in [0, 1], the same for the same state of ``rng``."""
        ...


def pixels_of(images: Iterable[MemoryImage], name: str = "data") -> list[np.ndarray]:
    """Images in memory as uint8 RGB, (H, W, 3) each; transparency is dropped, 16 bits are rounded to 8.

    Args:
        images: PIL images, numpy arrays (H, W[, C]) or tensors ([C, ]H, W), of uint8, uint16 or floats in [0, 1], or one of
            these by itself; a batch counts as several images.
        name: what error messages call them.

    Raises:
        TypeError, ValueError: an image is of another kind, shape or range; the message says which.
    """
    if isinstance(images, (PIL.Image.Image, np.ndarray, torch.Tensor)):
        images = [images]  # taken apart, a tensor (3, H, W) would be three grey images
    return [as_pixels(image.rgb) for image in to_images(list(images), name)]


def is_among(image: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Whether the image equals one of the others, pixel by pixel. All are uint8."""
    return any(image.shape == other.shape and np.array_equal(image, other) for other in others)


def images_record(images: Iterable[MemoryImage]) -> dict[str, int | str]:
    """What a record says of images in memory: ``{"count": .., "sha256": ..}``, the hash over their sizes and pixels, in order.

    Args:
        images: see `pixels_of`.
    """
    pixels, digest = pixels_of(images), hashlib.sha256()
    for image in pixels:
        digest.update(f"{image.shape[1]} x {image.shape[0]}\n".encode())
        digest.update(image.tobytes())
    return {"count": len(pixels), "sha256": digest.hexdigest()}


class ImagePatches:
    """Random patches of images that are held in memory.

    Images with a side of at least `LARGE_SIDE` pixels are also used at half size. An image smaller than the patch is left out.

    Args:
        images: see `pixels_of`.
    """

    def __init__(self, images: Sequence[MemoryImage]) -> None:
        self._hold(pixels_of(images))

    def _hold(self, images: Iterable[np.ndarray]) -> None:
        self.images: list[np.ndarray] = []
        for image in images:
            self.images.append(image)
            height, width = image.shape[:2]
            if max(height, width) >= LARGE_SIDE:
                half = PIL.Image.fromarray(image).resize((width // 2, height // 2), PIL.Image.Resampling.LANCZOS)
                self.images.append(np.asarray(half))

    def usable(self, size: int) -> list[np.ndarray]:
        """The images that are as large as patches of that size; ValueError if there is none."""
        usable = [image for image in self.images if min(image.shape[:2]) >= size]
        if not usable:
            raise ValueError(f"no image is at least {size} pixels high and wide: use smaller patches or larger images")
        return usable

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """``count`` patches with random position, flip and quarter turn, float32 in [0, 1], shape (count, 3, size, size).

        Raises:
            ValueError: no image is as large as the patch.
        """
        usable = self.usable(size)
        # by area: a large image holds more patches than a small one
        areas = np.array([image.shape[0] * image.shape[1] for image in usable], dtype=np.float64)
        patches = []
        for index in rng.choice(len(usable), count, p=areas / areas.sum()):
            image = usable[index]
            top = rng.integers(image.shape[0] - size + 1)
            left = rng.integers(image.shape[1] - size + 1)
            patch = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
            patches.append(patch[:, ::-1] if rng.integers(2) else patch)
        batch = torch.from_numpy(np.ascontiguousarray(np.stack(patches)))
        return batch.permute(0, 3, 1, 2).float().div_(255.0)


def check_size(patches: Patches, size: int) -> None:
    """Raises ValueError if no image is as large as patches of that size: said at once, not when a later stage needs them."""
    if isinstance(patches, MixedPatches):
        check_size(patches.first, size)
        check_size(patches.second, size)
    elif isinstance(patches, ImagePatches):
        patches.usable(size)


class PhotographPatches(ImagePatches):
    """As `ImagePatches`, of image files, which are read once."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._hold(read_photograph(path) for path in paths)


class MixedPatches:
    """Patches of two sources in one batch.

    Args:
        share: of the second source, in [0, 1]; a batch has this share of it on average.
    """

    def __init__(self, first: Patches, second: Patches, share: float) -> None:
        self.first, self.second, self.share = first, second, share

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """As `Patches.sample`, in random order: losses treat the first patches of a batch differently."""
        seconds = int(count * self.share + rng.random())
        parts = [
            source.sample(number, size, rng)
            for source, number in ((self.first, count - seconds), (self.second, seconds))
            if number > 0
        ]
        return torch.cat(parts)[torch.from_numpy(rng.permutation(count))]


def list_photographs(folder: str | Path) -> list[Path]:
    """Every image file below ``folder``, sorted by path.

    Raises:
        FileNotFoundError: the folder does not exist or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file: name the folder that it is in" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the photograph folder {str(folder)!r} {what}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE_SUFFIXES)
    paths = [p for p in found if not p.name.startswith("._")]  # what macOS puts beside files is no image
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
