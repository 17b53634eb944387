"""Metrics by name: PSNR and SSIM of the luma, LPIPS and DISTS, and those of the optional package pyiqa."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qartsr_pipeline.calibration.perceptual import Dists, Lpips
from qartsr_pipeline.image.metrics import psnr_y, ssim_y

NAMES = (
    "lpips",
    "lpips_vgg",
    "dists",
    "niqe",
    "musiq",
    "maniqa",
    "clipiqa",
)  # for help texts; pyiqa.list_models() has all of its own


class Metric(Protocol):
    """A number for an output (1, 3, H, W), float32 in [0, 1], given the original of the same shape and range.

    Attributes:
        needs_reference: False for a metric that looks at the output alone.
    """

    @property
    def needs_reference(self) -> bool: ...

    def __call__(self, output: torch.Tensor, original: torch.Tensor) -> float: ...


@dataclass(frozen=True)
class LumaMetric:
    """A built-in metric: see `qartsr_pipeline.image.metrics`."""

    value: Callable[[torch.Tensor, torch.Tensor], float]
    needs_reference: bool = True

    def __call__(self, output: torch.Tensor, original: torch.Tensor) -> float:
        return self.value(output, original)


BUILT_IN: dict[str, Metric] = {"psnr_y": LumaMetric(psnr_y), "ssim_y": LumaMetric(ssim_y)}


@dataclass(frozen=True)
class PerceptualMetric:
    """LPIPS or DISTS: see `qartsr_pipeline.calibration.perceptual`."""

    model: torch.nn.Module
    device: str
    needs_reference: bool = True

    @torch.no_grad()
    def __call__(self, output: torch.Tensor, original: torch.Tensor) -> float:
        """Raises ValueError for images smaller than the backbone can take."""
        return float(self.model(*(image.to(self.device) * 2 - 1 for image in (output, original))))


PERCEPTUAL: dict[str, Callable[[str | os.PathLike | None], torch.nn.Module]] = {
    "lpips": lambda backbones: Lpips("alex", backbones),
    "lpips_vgg": lambda backbones: Lpips("vgg", backbones),
    "dists": Dists,
}


@dataclass(frozen=True)
class PyiqaMetric:
    """A metric of pyiqa."""

    name: str
    model: Callable[..., torch.Tensor]
    needs_reference: bool
    device: str

    @torch.no_grad()
    def __call__(self, output: torch.Tensor, original: torch.Tensor) -> float:
        """The value of ``output``.

        Raises:
            ValueError: the metric cannot take the image; some need a minimum size.
        """
        images = (output, original) if self.needs_reference else (output,)
        try:
            return float(self.model(*(image.to(self.device) for image in images)))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = f"{output.shape[-1]} x {output.shape[-2]}"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"the metric {self.name!r} failed on {size} pixels ({reason}): leave out the metric or the image, or free memory"
            ) from error


def load_metrics(names: Sequence[str], device: str = "cpu", backbones: str | os.PathLike | None = None) -> dict[str, Metric]:
    """Metrics by name, in the order given. The weights of LPIPS' and DISTS' backbones, and those of pyiqa, are downloaded once.

    Args:
        device: where all but PSNR and SSIM compute.
        backbones: folder with the files of the backbones of LPIPS and DISTS; see `qartsr_pipeline.calibration.perceptual`.

    Raises:
        ImportError: the package of one of them is not installed.
        OSError: a backbone is unavailable.
        ValueError: a backbone's file is damaged or of another network; pyiqa knows no such metric, or cannot load it.
    """
    ours = {name: BUILT_IN[name] for name in names if name in BUILT_IN}
    ours |= {name: PerceptualMetric(PERCEPTUAL[name](backbones).to(device), device) for name in names if name in PERCEPTUAL}
    further = [name for name in names if name not in ours]
    if not further:
        return {name: ours[name] for name in names}
    try:
        import pyiqa
    except ImportError as error:
        raise ImportError(
            f"the metrics {', '.join(further)} are computed by the package pyiqa, which cannot be imported ({error}):"
            f" install it with `pip install 'qartsr[iqa]'`, or use {', '.join([*BUILT_IN, *PERCEPTUAL])} alone"
        ) from error
    return {name: ours.get(name) or _load(pyiqa.create_metric, name, device) for name in names}


def _load(create: Callable[..., torch.nn.Module], name: str, device: str) -> PyiqaMetric:
    try:
        model = create(name, device=torch.device(device))
    except Exception as error:  # pyiqa raises whatever its models' files and its downloads raise
        raise ValueError(
            f"the metric {name!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}): check its name"
            " with pyiqa.list_models() and, on first use, the network"
        ) from error
    return PyiqaMetric(name, model, str(model.metric_mode) == "FR", device)
