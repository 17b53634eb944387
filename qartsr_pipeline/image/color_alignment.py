"""Gives the network's result the colours of its input.

Both methods come from diffusion super-resolution (StableSR introduced them, OSEDiff kept them): generated detail is kept, tone
and colour, which a generative decoder shifts, are taken from the bicubic enlargement. The code here is written from the formulas.

An image of 64 megapixels takes 0.8 GB as floats, so beside images and result nothing of that size is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

COLOR_FIXES = ("wavelet", "adain")
WAVELET_LEVELS = 5
BAND_PIXELS = 1 << 22
EPSILON = 1e-5


def align_color(image: torch.Tensor, reference: torch.Tensor, color_fix: str | None) -> torch.Tensor:
    """Dispatches on `color_fix`, one of `COLOR_FIXES` or None (image returned as it is).

    Args:
        image: float32 (B, 3, H, W), the result; any range.
        reference: same shape, the enlarged input.
    """
    if color_fix is None:
        return image
    return {"wavelet": wavelet_alignment, "adain": adain_alignment}[color_fix](image, reference)


def wavelet_alignment(image: torch.Tensor, reference: torch.Tensor, levels: int = WAVELET_LEVELS) -> torch.Tensor:
    """High frequencies of `image`, low frequencies of `reference`.

    An a-trous wavelet decomposition splits each image into `levels` detail bands and a low-pass rest; the bands of one add up
    to image minus rest, and the filter is linear, so the exchange of the rests is

        image + low(reference - image)

    done in bands of rows: what lies further away than the filter reaches does not count.
    """
    aligned, height, reach = torch.empty_like(image), image.shape[-2], 2**levels - 1
    rows = max(2 * reach, BAND_PIXELS // image.shape[-1])
    for start in range(0, height, rows):
        end = min(start + rows, height)
        first, last = max(start - reach, 0), min(end + reach, height)
        low = low_pass(reference[..., first:last, :] - image[..., first:last, :], levels)
        torch.add(image[..., start:end, :], low[..., start - first : end - first, :], out=aligned[..., start:end, :])
    return aligned


def low_pass(image: torch.Tensor, levels: int = WAVELET_LEVELS) -> torch.Tensor:
    """The rest after `levels` a-trous steps: binomial [1, 2, 1] / 4, taps 1, 2, 4, .. pixels apart, both axes, edges repeated.

    Five levels blur like a Gaussian of 13 pixels standard deviation.
    """
    for level in range(levels):
        step = 2**level
        image = _binomial(image, step, axis=-1)
        image = _binomial(image, step, axis=-2)
    return image


def _binomial(image: torch.Tensor, step: int, axis: int) -> torch.Tensor:
    length = image.shape[axis]
    padding = (step, step, 0, 0) if axis == -1 else (0, 0, step, step)
    padded = F.pad(image, padding, mode="replicate")
    outer = padded.narrow(axis, 0, length) + padded.narrow(axis, 2 * step, length)
    return image * 0.5 + outer * 0.25


def adain_alignment(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Adaptive instance normalization: mean and standard deviation of every channel become the reference's."""
    mean, deviation = _moments(image)
    reference_mean, reference_deviation = _moments(reference)
    return (image - mean).div_(deviation).mul_(reference_deviation).add_(reference_mean)


def _moments(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, each (B, C, 1, 1)."""
    mean = image.mean((-2, -1), keepdim=True)
    return mean, (image.var((-2, -1), keepdim=True, unbiased=False) + EPSILON).sqrt()
