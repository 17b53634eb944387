"""Gaussian blur, round or elongated, of batches of images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float = 0.0) -> torch.Tensor:
    """A Gaussian with the two standard deviations in pixels, its first axis rotated by ``angle`` radians.

    Returns:
        (k, k) float32 with sum 1; k is odd and reaches three deviations.
    """
    reach = max(1, math.ceil(3 * max(sigma_x, sigma_y)))
    position = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = torch.meshgrid(position, position, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))
    return kernel / kernel.sum()


def convolve(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Every channel of ``image`` (B, C, H, W) with an odd ``kernel`` (kh, kw); edges are repeated."""
    height, width = kernel.shape
    channels = image.shape[1]
    padded = F.pad(image, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, height, width), groups=channels)


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Round Gaussian blur of ``image`` (B, C, H, W); below 0.1 pixels it changes nothing."""
    if sigma < 0.1:
        return image
    kernel = gaussian_kernel(sigma, sigma)
    line = kernel.sum(0)  # a round Gaussian is separable
    return convolve(convolve(image, line[None]), line[:, None])
