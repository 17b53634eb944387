"""How a high-resolution patch becomes the model's low-resolution input.

Every degradation is a function of (high, scale, rng): high (B, 3, H, W) float32 in [0, 1] with sides divisible by scale; the
result is (B, 3, H / scale, W / scale), multiples of 1/255 in [0, 1], and the same for the same state of ``rng``.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from qartsr_pipeline.calibration.data.filters import convolve, gaussian_kernel
from qartsr_pipeline.calibration.data.photographs import as_pixels
from qartsr_pipeline.image.resize import resize


def as_bytes(image: torch.Tensor) -> torch.Tensor:
    """Rounded to multiples of 1/255 in [0, 1], as if written to a file."""
    return (image.clamp(0, 1) * 255).round() / 255


def bicubic_degradation(high: torch.Tensor, scale: int = 4, rng: np.random.Generator | None = None) -> torch.Tensor:
    """The benchmark degradation: bicubic reduction. Nothing in it is random."""
    height, width = high.shape[-2:]
    return as_bytes(resize(high, (height // scale, width // scale)))


@dataclass(frozen=True)
class Order:
    """The ranges of one of the two rounds of degradation; the numbers are those of Real-ESRGAN.

    Attributes:
        blur: probability of a blur. sigma: standard deviation in pixels.
        up, down: probabilities of enlarging and of reducing. factor: the smallest and largest factor.
        gaussian: standard deviation of Gaussian noise, in 255ths. poisson: strength of photon noise, 1 for 255 photons in white.
        jpeg: quality.
    """

    blur: float
    sigma: tuple[float, float]
    up: float
    down: float
    factor: tuple[float, float]
    gaussian: tuple[float, float]
    poisson: tuple[float, float]
    jpeg: tuple[int, int]


FIRST = Order(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95))
SECOND = Order(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95))


def realesrgan_degradation(high: torch.Tensor, scale: int, rng: np.random.Generator) -> torch.Tensor:
    """Real-world-like: blur, resampling, noise and JPEG, twice over, each with random parameters for every picture.

    After Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data" (arXiv 2107.10833),
    without its sinc filters. The second resampling is relative to the final size.
    """
    height, width = high.shape[-2:]
    final = (height // scale, width // scale)
    return torch.cat([_degrade_twice(picture[None], final, rng) for picture in high])


def _degrade_twice(picture: torch.Tensor, final: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, *final)."""
    low = _blur(picture, FIRST, rng)
    low = _resample(low, _random_size(picture.shape[-2:], FIRST, rng), rng)
    low = _jpeg(_noise(low, FIRST, rng), FIRST, rng)
    low = _blur(low, SECOND, rng)
    low = _noise(_resample(low, _random_size(final, SECOND, rng), rng), SECOND, rng)
    if rng.random() < 0.5:  # the last program reduces and saves, or the picture is reduced after it was saved
        return _jpeg(_resample(low, final, rng), SECOND, rng)
    return as_bytes(_resample(_jpeg(low, SECOND, rng), final, rng))


def _blur(image: torch.Tensor, order: Order, rng: np.random.Generator) -> torch.Tensor:
    """Round in two cases of three, else elongated in any direction."""
    if rng.random() >= order.blur:
        return image
    sigma_x, sigma_y = rng.uniform(*order.sigma, 2)
    if rng.random() < 2 / 3:
        sigma_y = sigma_x
    return convolve(image, gaussian_kernel(sigma_x, sigma_y, rng.uniform(0, math.pi)))


def _random_size(size: tuple[int, int], order: Order, rng: np.random.Generator) -> tuple[int, int]:
    kind = rng.random()
    factor = 1.0
    if kind < order.up:
        factor = rng.uniform(1, order.factor[1])
    elif kind < order.up + order.down:
        factor = rng.uniform(order.factor[0], 1)
    return tuple(max(1, round(side * factor)) for side in size)


def _resample(image: torch.Tensor, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    mode = ("area", "bilinear", "bicubic")[rng.integers(3)]
    if mode == "area":
        return F.interpolate(image, size=size, mode=mode)
    antialias = bool(rng.integers(2))  # programs differ
    return F.interpolate(image, size=size, mode=mode, antialias=antialias, align_corners=False).clamp(0, 1)


def _noise(image: torch.Tensor, order: Order, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian or photon noise, grey in two cases of five."""
    grey, gaussian = rng.random() < 0.4, rng.random() < 0.5
    base = (image.mean(1, keepdim=True) if grey else image).clamp(0, 1).numpy()
    if gaussian:
        noise = rng.standard_normal(base.shape) * (rng.uniform(*order.gaussian) / 255)
    else:
        noise = (rng.poisson(base * 255.0) / 255.0 - base) * rng.uniform(*order.poisson)
    return (image + torch.from_numpy(noise.astype(np.float32))).clamp(0, 1)


def _jpeg(image: torch.Tensor, order: Order, rng: np.random.Generator) -> torch.Tensor:
    """(1, 3, H, W) through a JPEG file in memory."""
    pixels = as_pixels(image)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(order.jpeg[0], order.jpeg[1] + 1)))
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None].float() / 255


DEGRADATIONS = {"bicubic": bicubic_degradation, "realesrgan": realesrgan_degradation}
