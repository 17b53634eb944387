"""How a high-resolution patch becomes the model's low-resolution input.

A degradation is a function of (high, scale, rng): high is (B, 3, H, W) float32 in [0, 1] with sides divisible by scale. The
result is (B, 3, H / scale, W / scale), multiples of 1/255 in [0, 1], and the same for the same state of ``rng``.

To add one, enter the function in `DEGRADATIONS` and its name in `qartsr_pipeline.calibration.data.DEGRADATION_NAMES`.
The filters that degradations are made of stand at the end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.patches import as_pixels, as_tensor
from qartsr_pipeline.image.resize import resize

SINC_SIDES = (7, 9, 11, 13, 15, 17, 19, 21)  # Real-ESRGAN's
Size = tuple[int, int]
Degradation = Callable[[torch.Tensor, int, np.random.Generator], torch.Tensor]


def as_bytes(image: torch.Tensor) -> torch.Tensor:
    """Rounded to multiples of 1/255 in [0, 1], as if written to a file."""
    return (image.clamp(0, 1) * 255).round() / 255


def reduced_size(image: torch.Tensor, scale: int) -> Size:
    """(H // scale, W // scale) of an image (B, C, H, W)."""
    return image.shape[-2] // scale, image.shape[-1] // scale


def bicubic_degradation(high: torch.Tensor, scale: int = SCALE, rng: np.random.Generator | None = None) -> torch.Tensor:
    """The degradation of the benchmarks: bicubic reduction. Nothing in it is random."""
    return as_bytes(resize(high, reduced_size(high, scale)))


@dataclass(frozen=True)
class Round:
    """The ranges of one of the two rounds of `two_rounds`.

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


# Real-ESRGAN's numbers.
FIRST = Round(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1, 30), (0.05, 3.0), (30, 95))
SECOND = Round(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95))


def blur(image: torch.Tensor, ranges: Round, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian: round in two cases of three, else elongated in any direction."""
    if rng.random() >= ranges.blur:
        return image
    sigma_x, sigma_y = rng.uniform(*ranges.sigma, 2)
    if rng.random() < 2 / 3:
        sigma_y = sigma_x
    return convolve(image, gaussian_kernel(sigma_x, sigma_y, rng.uniform(0, math.pi)))


def random_size(size: Size, ranges: Round, rng: np.random.Generator) -> Size:
    """The size enlarged, reduced or kept, with the probabilities of ``ranges``."""
    kind = rng.random()
    factor = 1.0
    if kind < ranges.up:
        factor = rng.uniform(1, ranges.factor[1])
    elif kind < ranges.up + ranges.down:
        factor = rng.uniform(ranges.factor[0], 1)
    height, width = (max(1, round(side * factor)) for side in size)
    return height, width


def resample(image: torch.Tensor, size: Size, rng: np.random.Generator) -> torch.Tensor:
    """To ``size`` by a random filter."""
    mode = ("area", "bilinear", "bicubic")[rng.integers(3)]
    if mode == "area":
        return F.interpolate(image, size=size, mode=mode)
    antialias = bool(rng.integers(2))  # programs differ
    return F.interpolate(image, size=size, mode=mode, antialias=antialias, align_corners=False).clamp(0, 1)


def add_noise(image: torch.Tensor, ranges: Round, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian or photon noise, grey in two cases of five."""
    grey, gaussian = rng.random() < 0.4, rng.random() < 0.5
    base = (image.mean(1, keepdim=True) if grey else image).clamp(0, 1).numpy()
    if gaussian:
        noise = rng.standard_normal(base.shape) * (rng.uniform(*ranges.gaussian) / 255)
    else:
        noise = (rng.poisson(base * 255.0) / 255.0 - base) * rng.uniform(*ranges.poisson)
    return (image + torch.from_numpy(noise.astype(np.float32))).clamp(0, 1)


def compress(image: torch.Tensor, quality: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """(1, 3, H, W) through a JPEG file in memory, of a random quality in the range."""
    file = io.BytesIO()
    Image.fromarray(as_pixels(image)).save(file, "JPEG", quality=int(rng.integers(quality[0], quality[1] + 1)))
    with Image.open(file) as decoded:
        return as_tensor(np.asarray(decoded))


@dataclass(frozen=True)
class SingleRound:
    """The parts of the single, milder round of `one_round`.

    Attributes:
        blur: largest standard deviation in pixels of the original. noise: of Gaussian noise, in 255ths. jpeg: quality from, to.
        present: probability of each of the three, independent of the others.
        other_filters: probability that the reduction is not bicubic.
    """

    blur: float
    noise: float
    jpeg: tuple[int, int]
    present: float
    other_filters: float


MILD = SingleRound(blur=2.0, noise=12.0, jpeg=(40, 95), present=0.75, other_filters=0.25)
REAL = SingleRound(blur=2.0, noise=12.0, jpeg=(40, 90), present=1.0, other_filters=0.0)
SINC_BLUR = 0.1  # share of sinc filters among the blurs, where there are any
FINAL_SINC = 0.8  # probability of one at the end of the second round


def one_round(image: torch.Tensor, scale: int, rng: np.random.Generator, parts: SingleRound = MILD) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, H / scale, W / scale): blur, reduction, noise and JPEG as ``parts`` says."""
    final = reduced_size(image, scale)
    blurred, noisy, compressed = rng.random(3) < parts.present
    if blurred:
        image = gaussian_blur(image, rng.uniform(0, parts.blur))
    if rng.random() < parts.other_filters:
        low = F.interpolate(image, size=final, mode="area") if rng.integers(2) else resample(image, final, rng)
    else:
        low = resize(image, final).clamp(0, 1)
    if noisy:
        low = _add_gaussian_noise(low, rng.uniform(0, parts.noise), rng)
    return compress(low, parts.jpeg, rng) if compressed else as_bytes(low)


def _add_gaussian_noise(image: torch.Tensor, deviation: float, rng: np.random.Generator) -> torch.Tensor:
    """Of that standard deviation in 255ths; grey in one case of three."""
    channels = 1 if rng.random() < 1 / 3 else image.shape[1]
    noise = rng.standard_normal((1, channels, *image.shape[-2:])).astype(np.float32)
    return (image + torch.from_numpy(noise) * (deviation / 255)).clamp(0, 1)


def two_rounds(image: torch.Tensor, scale: int, rng: np.random.Generator, sinc: bool = True) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, H / scale, W / scale) as Real-ESRGAN trains, with its sinc filters or without.

    After Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data" (arXiv 2107.10833). The
    second resampling is relative to the final size.
    """
    final = reduced_size(image, scale)
    low = _blur_or_ring(image, FIRST, rng, sinc)
    low = resample(low, random_size((image.shape[-2], image.shape[-1]), FIRST, rng), rng)
    low = compress(add_noise(low, FIRST, rng), FIRST.jpeg, rng)
    low = _blur_or_ring(low, SECOND, rng, sinc)
    low = add_noise(resample(low, random_size(final, SECOND, rng), rng), SECOND, rng)
    ringing = random_sinc_kernel(rng) if sinc and rng.random() < FINAL_SINC else None
    if rng.random() < 0.5:  # the image is reduced, then saved; or it is reduced after it was saved
        return compress(_ring(resample(low, final, rng), ringing), SECOND.jpeg, rng)
    return as_bytes(_ring(resample(compress(low, SECOND.jpeg, rng), final, rng), ringing))


def _blur_or_ring(image: torch.Tensor, ranges: Round, rng: np.random.Generator, sinc: bool) -> torch.Tensor:
    if sinc and rng.random() < SINC_BLUR:
        return _ring(image, random_sinc_kernel(rng))
    return blur(image, ranges, rng)


def _ring(image: torch.Tensor, kernel: torch.Tensor | None) -> torch.Tensor:
    return image if kernel is None else convolve(image, kernel).clamp(0, 1)


def realesrgan_degradation(high: torch.Tensor, scale: int, rng: np.random.Generator) -> torch.Tensor:
    """As in the real world: `two_rounds` without sinc filters, each with random parameters for every image."""
    return torch.cat([two_rounds(image[None], scale, rng, sinc=False) for image in high])


MIXTURE: dict[str, tuple[float, Degradation]] = {  # shares of `photo_degradation`
    "bicubic": (0.4, bicubic_degradation),
    "one round": (0.4, one_round),
    "two rounds": (0.2, two_rounds),
}


def photo_degradation(high: torch.Tensor, scale: int, rng: np.random.Generator) -> torch.Tensor:
    """The photograph model's mixture: each image of the batch in one of the ways of `MIXTURE`.

    Most are mild and many are reduced and nothing else: a model trained on bad images alone smooths good ones.
    """
    kinds = rng.choice(list(MIXTURE), len(high), p=[share for share, _ in MIXTURE.values()])
    return torch.cat([MIXTURE[kind][1](image[None], scale, rng) for kind, image in zip(kinds, high, strict=True)])


def real_degradation(high: torch.Tensor, scale: int, rng: np.random.Generator) -> torch.Tensor:
    """Blur up to 2 pixels, bicubic reduction, noise up to 12 and JPEG of quality 40 to 90, all of them, for every image."""
    return torch.cat([one_round(image[None], scale, rng, REAL) for image in high])


DEGRADATIONS: dict[str, Degradation] = {
    "bicubic": bicubic_degradation,
    "realesrgan": realesrgan_degradation,
    "photo": photo_degradation,
    "real": real_degradation,
}


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
