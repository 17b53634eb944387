"""The images to be measured on: originals, each with its low-resolution image or with one made from it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.paired_folders import SCALE, ImagePair, find_pairs, read_pair
from qartsr_pipeline.calibration.data.patches import as_tensor, list_photographs, read_photograph
from qartsr_pipeline.image.conversion import to_images

ImageInput: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor
Data: TypeAlias = str | os.PathLike | ImageInput | Sequence[str | os.PathLike | ImagePair | ImageInput]


@dataclass(frozen=True)
class Original:
    """One original.

    Attributes:
        label: names it in messages and in results.
        source: its file, with that of its low-resolution image if there is one; or the image, (1, 3, H, W) float32 in [0, 1].
        ground_truth: False if ``source`` is the low-resolution image itself, and nothing is known of what it should become.
    """

    label: str
    source: ImagePair | torch.Tensor
    ground_truth: bool = True

    @property
    def files(self) -> list[Path]:
        """The files that are read; none for an image in memory."""
        return self.source.files if isinstance(self.source, ImagePair) else []

    def read(self, degradation: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The original, cut at the right and bottom to multiples of 4, and the low-resolution image.

        Args:
            degradation: a name in `DEGRADATIONS`, for an original that comes alone. What is random in it depends on the file's
                name alone.

        Returns:
            (1, 3, H, W), None without ground truth, and (1, 3, H / 4, W / 4), float32 in [0, 1].
        """
        if not self.ground_truth:
            whole = self.source if isinstance(self.source, torch.Tensor) else as_tensor(read_photograph(self.source.high))
            return None, whole
        low = None
        if isinstance(self.source, ImagePair):
            high, low = read_pair(self.source)
        else:
            height, width = (side // SCALE * SCALE for side in self.source.shape[-2:])
            high = self.source[..., :height, :width]
        if low is None:
            seed = zlib.crc32(Path(self.label).name.encode())
            low = DEGRADATIONS[degradation](high, SCALE, np.random.default_rng(seed))
        return high, low


def originals_of(data: Data, ground_truth: bool = True) -> list[Original]:
    """What `evaluate` is given as its data.

    Args:
        ground_truth: False if the images are the low-resolution ones themselves.

    Raises:
        FileNotFoundError, ValueError: see `find_pairs`; or no image is given.
        TypeError: neither a folder nor images.
    """
    if not ground_truth:
        files = [ImagePair(path) for path in list_photographs(Path(data))] if isinstance(data, (str, os.PathLike)) else data
        return [replace(each, ground_truth=False) for each in originals_of(files)]
    if isinstance(data, (str, os.PathLike)):
        return [_of_pair(pair) for pair in find_pairs(Path(data))[1]]
    originals: list[Original] = []
    for index, item in enumerate([data] if isinstance(data, ImageInput) else data):
        if isinstance(item, ImagePair):
            originals.append(_of_pair(item))
        elif isinstance(item, (str, os.PathLike)):
            originals.append(_of_pair(ImagePair(Path(item))))
        else:
            images = to_images(item, f"data[{index}]")
            originals += [Original(f"image {len(originals) + number}", each.rgb) for number, each in enumerate(images, 1)]
    if not originals:
        raise ValueError("`data` is an empty list: give a folder of images, or at least one image")
    return originals


def _of_pair(pair: ImagePair) -> Original:
    return Original(str(pair.high), pair)
