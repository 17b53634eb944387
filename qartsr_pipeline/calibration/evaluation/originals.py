"""The images to be measured on: originals, each with its low-resolution image or with one made from it.

Four layouts of a folder are told apart by their names:

* DIV2K: ``DIV2K_valid_HR/0801.png`` with ``DIV2K_valid_LR_bicubic/X4/0801x4.png`` (https://data.vision.ee.ethz.ch/cvl/DIV2K/);
* RealSR: ``Canon_001_HR.png`` beside ``Canon_001_LR4.png``, at any depth (https://github.com/csjcai/RealSR);
* two folders with equal names, ``HR/0001.png`` with ``LR/0001.png``; also ``test_HR`` with ``test_LR`` and ``gt`` with ``lq``, as
  the test sets of StableSR are packed (https://huggingface.co/datasets/Iceclear/StableSR-TestSets);
* anything else: high-resolution photographs, which the caller degrades.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.patches import MemoryImage, as_tensor, list_photographs, read_photograph
from qartsr_pipeline.image.conversion import to_images

EQUAL_NAMES = {"hr": "lr", "test_hr": "test_lr", "gt": "lq"}
REALSR = re.compile(r"(?P<scene>.+)_(?P<kind>HR|LR\d)")

HR_ONLY = "HR only"  # the layout of photographs that come alone


@dataclass(frozen=True)
class ImagePair:
    """An original and its low-resolution image of a quarter of the sides; None where that is made from the original."""

    high: Path
    low: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [self.high] if self.low is None else [self.high, self.low]


Data: TypeAlias = str | os.PathLike | MemoryImage | Sequence[str | os.PathLike | ImagePair | MemoryImage]


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
    for index, item in enumerate([data] if isinstance(data, MemoryImage) else data):
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


def find_pairs(folder: str | Path) -> tuple[str, list[ImagePair]]:
    """The pairs below a folder, sorted by the original's path, and the layout: "DIV2K", "RealSR", "HR and LR" or `HR_ONLY`.

    Raises:
        FileNotFoundError: no such folder, no image in it, or an image without its partner.
        ValueError: the layout is ambiguous, or a pair's sizes do not fit.
    """
    folder = Path(folder)
    paths = list_photographs(folder)
    for layout, search in (("DIV2K", _div2k), ("RealSR", _realsr), ("HR and LR", _equal_names)):
        pairs = search(folder, paths)
        if pairs:
            for pair in pairs:
                check_sizes(pair)
            return layout, sorted(pairs, key=lambda pair: pair.high)
    return HR_ONLY, [ImagePair(path) for path in paths]


def check_sizes(pair: ImagePair) -> None:
    """Raises ValueError unless the low-resolution image has the original's sides divided by 4, rounded down."""
    if pair.low is None:
        return
    sizes = []
    for path in pair.files:
        with PIL.Image.open(path) as image:
            sizes.append(image.size)
    high, low = sizes
    expected = (high[0] // SCALE, high[1] // SCALE)
    if low != expected:
        raise ValueError(
            f"{pair.high} has {high[0]} x {high[1]} pixels and {pair.low} has {low[0]} x {low[1]}: a quarter would be"
            f" {expected[0]} x {expected[1]}. Give a folder of pairs for x{SCALE}, or the high-resolution images alone."
        )


def read_pair(pair: ImagePair) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Original and low-resolution image, (1, 3, H, W) and (1, 3, H / 4, W / 4) float32 in [0, 1]; the latter None if not given.

    The original is cut at the right and bottom to multiples of 4.
    """
    high = as_tensor(read_photograph(pair.high))
    height, width = (side // SCALE * SCALE for side in high.shape[-2:])
    return high[..., :height, :width], None if pair.low is None else as_tensor(read_photograph(pair.low))


def _div2k(folder: Path, paths: list[Path]) -> list[ImagePair]:
    high_folders = [child for child in folder.iterdir() if child.is_dir() and child.name.endswith("_HR")]
    low_folders = {high: sorted(folder.glob(f"{high.name.removesuffix('_HR')}_LR_*")) for high in high_folders}
    found = [(high, low) for high, lows in low_folders.items() for low in lows]
    if not found:
        return []
    if len(found) > 1:
        names = ", ".join(f"{high.name} with {low.name}" for high, low in sorted(found))
        raise ValueError(f"{folder} holds several sets of pairs ({names}): leave one high- and one low-resolution folder in it")
    high, low = found[0][0], found[0][1] / f"X{SCALE}"
    if not low.is_dir():
        raise FileNotFoundError(f"{high} needs its low-resolution images in {low}, which is no folder")
    originals = {path.relative_to(high).with_suffix(""): path for path in paths if path.is_relative_to(high)}
    suffix = f"x{SCALE}"
    reduced = {}
    for path in paths:
        if path.is_relative_to(low):
            name = path.relative_to(low).with_suffix("")
            reduced[name.with_name(name.name.removesuffix(suffix))] = path
    return _matched(originals, reduced, high, low, lambda name: f"{name}{suffix}")


def _realsr(folder: Path, paths: list[Path]) -> list[ImagePair]:
    named = {path: REALSR.fullmatch(path.stem) for path in paths}
    if not any(match and match["kind"] != "HR" for match in named.values()):
        return []
    scenes: dict[Path, dict[str, Path]] = {}
    for path, match in named.items():
        if match is None:
            raise ValueError(f"{path} is named neither .._HR nor .._LR{SCALE} like the rest of {folder}: remove or rename it")
        scenes.setdefault(path.with_name(match["scene"]), {})[match["kind"]] = path
    pairs = []
    for scene, files in scenes.items():
        low = files.get(f"LR{SCALE}")
        if low and "HR" in files:
            pairs.append(ImagePair(files["HR"], low))
        elif low or set(files) == {"HR"}:  # pairs for other scales are left out
            there, missing = (low, "HR") if low else (files["HR"], f"LR{SCALE}")
            raise FileNotFoundError(f"{there} has no partner: {scene.name}_{missing}{there.suffix} is not beside it")
    if not pairs:
        raise FileNotFoundError(f"{folder} holds pairs, but none for x{SCALE}: no file is named .._LR{SCALE}")
    return pairs


def _equal_names(folder: Path, paths: list[Path]) -> list[ImagePair]:
    children = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    found = [(children[high], children[low]) for high, low in EQUAL_NAMES.items() if high in children and low in children]
    if not found:
        return []
    if len(found) > 1:
        names = ", ".join(f"{high.name} with {low.name}" for high, low in found)
        raise ValueError(f"{folder} holds several sets of pairs ({names}): give the folder of one of them")
    high, low = found[0]
    originals, reduced = (
        {p.relative_to(part).with_suffix(""): p for p in paths if p.is_relative_to(part)} for part in (high, low)
    )
    return _matched(originals, reduced, high, low, str)


def _matched(
    originals: dict[Path, Path], reduced: dict[Path, Path], high: Path, low: Path, low_name: Callable[[Path], str]
) -> list[ImagePair]:
    """Pairs by name, after checking that none lacks its partner."""
    for name, path in originals.items():
        if name not in reduced:
            raise FileNotFoundError(f"{path} has no partner: there is no {low / low_name(name)}{path.suffix}")
    for name, path in reduced.items():
        if name not in originals:
            raise FileNotFoundError(f"{path} has no partner: there is no {high / name}{path.suffix}")
    return [ImagePair(path, reduced[name]) for name, path in originals.items()]
