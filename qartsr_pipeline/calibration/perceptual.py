"""LPIPS (arXiv 1801.03924) and DISTS (arXiv 2004.07728), as metrics and as losses.

Both compare features of a recognition network (see `backbones`) with a few weights of their own, which are read from the PyPI
packages lpips and dists-pytorch. Neither package is imported: they import torchvision, which is large, and which stops diffusers
from loading where it does not match PyTorch. The values are the packages' up to float rounding, and the gradients are faster.

Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qartsr_pipeline.calibration.backbones import LAYOUTS, Backbone, package_file

LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10  # of a norm
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _colours(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values)[None, :, None, None]


def _check(image: torch.Tensor, wanted: torch.Tensor, network: str, what: str) -> None:
    if image.shape != wanted.shape:
        raise ValueError(f"{what} compares images of one shape, got {tuple(image.shape)} and {tuple(wanted.shape)}")
    least = LAYOUTS[network].minimum
    if min(image.shape[-2:]) < least:
        raise ValueError(
            f"{what} needs images of at least {least} x {least} pixels, got {image.shape[-1]} x {image.shape[-2]}:"
            " leave it out, or the image"
        )


def rows_of(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (positions, C), without a copy where the channels come last."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """1 / |row|, (positions, 1)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return 1 / (torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide) + EPSILON)


class NormalizedDistance(torch.autograd.Function):
    """mean over positions of sum over channels of weight (x / |x| - y / |y|)^2, in the features' own type.

    The gradient is written out: autograd's takes as long as the network itself.

    Arguments of `apply`: x and y (B, C, H, W), weight (C,) float32. Gradients reach x alone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x_rows, y_rows = rows_of(x), rows_of(y)
        scale = _inverse_norm(x_rows).to(x.dtype)
        normal = x_rows * scale
        difference = normal.addcmul(y_rows, _inverse_norm(y_rows).to(y.dtype), value=-1)
        ctx.shape = x.shape
        ctx.save_for_backward(normal, difference, scale, weight.to(x.dtype))
        return ((difference * difference) @ weight.to(x.dtype)).mean(dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normal, difference, scale, weight = ctx.saved_tensors
        to_normal = difference * weight
        along = (to_normal * normal).sum(1, keepdim=True)
        to_rows = to_normal.addcmul_(normal, along, value=-1)
        to_rows.mul_(scale * (2 / len(normal) * gradient).to(scale.dtype))
        batch, channels, height, width = ctx.shape
        return to_rows.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None


class Lpips(nn.Module):
    """Squared differences of channel-normalized features, weighted by channel, averaged over positions, summed over stages.

    Args:
        network: "vgg" or "alex".
        weights: the backbone's file or folder; see `backbones`.
        stages: how many to use, from the first. The metric uses all 5. For small patches leave the last ones out, which see
            little there and cost a lot.

    Raises:
        ImportError: the package lpips is not installed.
        OSError, ValueError: the backbone is unavailable, damaged or of another network.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: str = "vgg", weights: str | os.PathLike | None = None, stages: int = 5):
        super().__init__()
        self.network = network
        state = torch.load(package_file("lpips", "lpips", f"weights/v0.1/{network}.pth"), "cpu", weights_only=True)
        self.backbone = Backbone(network, weights, stages)
        self.register_buffer("shift", _colours(LPIPS_SHIFT))
        self.register_buffer("scale", _colours(LPIPS_SCALE))
        for index in range(stages):
            self.register_buffer(f"linear{index}", state[f"lin{index}.model.1.weight"].flatten())
        self.name = f"LPIPS ({network})" if stages == 5 else f"LPIPS ({network}, {stages} stages)"

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.backbone((image - self.shift) / self.scale)

    def forward(self, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The mean over the batch, a scalar; gradients reach ``image`` alone.

        Raises:
            ValueError: images of different shapes, or smaller than the backbone can take.
        """
        _check(image, wanted, self.network, self.name)
        with torch.no_grad():
            targets = self.features(wanted)
        total = image.new_zeros(())
        for index, (x, y) in enumerate(zip(self.features(image), targets, strict=True)):
            total = total + NormalizedDistance.apply(x, y, getattr(self, f"linear{index}"))
        return total


class L2PooledBackbone(Backbone):
    """VGG16 with DISTS' L2 pooling in place of max pooling, which reacts to shifts of a single pixel."""

    window: torch.Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__("vgg", weights)
        line = torch.from_numpy(np.hanning(5)[1:-1]).float()
        window = line[:, None] * line[None]
        self.register_buffer("window", (window / window.sum())[None, None])

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        window = self.window.to(x.dtype).expand(channels, 1, -1, -1)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=channels) + 1e-12).sqrt()


class Dists(nn.Module):
    """1 - similarity of the features' means (texture) and of their structure; 0 for equal images.

    Args:
        weights: VGG16's file or folder; see `backbones`.

    Raises:
        ImportError: the package dists-pytorch is not installed.
        OSError, ValueError: the backbone is unavailable, damaged or of another network.
    """

    name = "DISTS"
    mean: torch.Tensor
    std: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        shares = torch.load(package_file("DISTS_pytorch", "dists-pytorch", "weights.pt"), "cpu", weights_only=True)
        self.backbone = L2PooledBackbone(weights)
        self.register_buffer("mean", _colours(IMAGENET_MEAN))
        self.register_buffer("std", _colours(IMAGENET_STD))
        self.channels = (3, 64, 128, 256, 512, 512)
        total = shares["alpha"].detach().sum() + shares["beta"].detach().sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, shares[name].detach() / total)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        unit = (image + 1) / 2
        return [x.float() for x in (unit, *self.backbone((unit - self.mean) / self.std))]

    def forward(self, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The mean over the batch, a scalar; gradients reach ``image`` alone.

        Raises:
            ValueError: images of different shapes, or smaller than 16 x 16.
        """
        _check(image, wanted, "vgg", self.name)
        with torch.no_grad():
            targets = self.features(wanted)
        alpha, beta = self.alpha.split(self.channels, 1), self.beta.split(self.channels, 1)
        similarity = image.new_zeros(())
        for index, (x, y) in enumerate(zip(self.features(image), targets, strict=True)):
            x_mean, y_mean = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
            x_variance, y_variance = x.var((2, 3), correction=0, keepdim=True), y.var((2, 3), correction=0, keepdim=True)
            covariance = (x * y).mean((2, 3), keepdim=True) - x_mean * y_mean
            texture = (2 * x_mean * y_mean + 1e-6) / (x_mean.square() + y_mean.square() + 1e-6)
            structure = (2 * covariance + 1e-6) / (x_variance + y_variance + 1e-6)
            similarity = similarity + (alpha[index] * texture + beta[index] * structure).sum(1).mean()
        return 1 - similarity
