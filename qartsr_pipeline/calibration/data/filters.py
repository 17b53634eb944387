"""Filters for batches of images: Gaussian blur, round or elongated, and sinc filters, which make edges ring."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

SINC_SIDES = (7, 9, 11, 13, 15, 17, 19, 21)  # Real-ESRGAN's


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


def sinc_kernel(cutoff: float, size: int) -> torch.Tensor:
    """The circular low-pass filter of that cutoff: an ideal one, cut off at the kernel's border, so that edges ring as
    after sharpening and careless resampling.

    Args:
        cutoff: angular frequency in radians per pixel, above 0 and at most pi (nothing filtered along the axes).
        size: side of the kernel, odd.

    Returns:
        (size, size) float32 with sum 1; some entries are negative.
    """
    if not 0 < cutoff <= math.pi or size < 1 or size % 2 == 0:
        raise ValueError(f"sinc filter of cutoff {cutoff:g} and side {size}: expected a cutoff in (0, pi] and an odd side")
    position = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.hypot(position[:, None], position[None])
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit at radius 0
    return (kernel / kernel.sum()).float()


def random_sinc_kernel(rng: np.random.Generator) -> torch.Tensor:
    """With the sizes and cutoffs of Real-ESRGAN: pi/3 to pi, and from pi/5 in kernels of 13 pixels and more."""
    size = int(rng.choice(SINC_SIDES))
    return sinc_kernel(rng.uniform(math.pi / (3 if size < 13 else 5), math.pi), size)
