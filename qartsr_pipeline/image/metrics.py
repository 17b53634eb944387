"""How close two images are: PSNR and SSIM of the luma, as the super-resolution literature measures them.

Luma is BT.601 with its nominal range of 16 to 235 (Matlab's rgb2ycbcr); a border as wide as the scale is left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

_BT601 = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_OFFSET = 16 / 255


def luma(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """BT.601 luma in [16/255, 235/255].

    Args:
        image: float in [0, 1]; a numpy array (H, W, 3), or a tensor (3, H, W) or (1, 3, H, W).

    Returns:
        (H, W) float64 tensor on the CPU.
    """
    if isinstance(image, np.ndarray):
        channels = torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0) if image.ndim == 3 else None
    else:
        channels = image.detach().cpu()[0] if image.ndim == 4 and image.shape[0] == 1 else image.detach().cpu()
    if channels is None or channels.ndim != 3 or channels.shape[0] != 3 or not channels.is_floating_point():
        raise ValueError(
            f"An image must be a float array (H, W, 3) or a float tensor (3, H, W), in [0, 1]; got {image.dtype}"
            f" of shape {tuple(image.shape)}."
        )
    weights = torch.tensor(_BT601, dtype=torch.float64).view(3, 1, 1)
    return (channels.double() * weights).sum(0) + _OFFSET


def psnr_y(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, border: int = 4) -> float:
    """Peak signal-to-noise ratio of the luma in dB, peak 1; infinite for equal images.

    Args:
        a, b: two images of one size, see `luma`.
        border: pixels left out on every side.
    """
    first, second = _cropped(a, b, border)
    error = float((first - second).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim_y(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, border: int = 4) -> float:
    """Structural similarity of the luma: Gaussian window 11 x 11 with sigma 1.5, K1 0.01, K2 0.03, windows that fit wholly.

    Args:
        a, b: two images of one size, at least 11 x 11 within the border; see `luma`.
        border: pixels left out on every side.
    """
    first, second = _cropped(a, b, border)
    if min(first.shape) < 11:
        height, width = (side + 2 * border for side in first.shape)
        raise ValueError(
            f"SSIM needs images of at least {11 + 2 * border} x {11 + 2 * border} pixels (11 x 11 within a border of {border}),"
            f" got {width} x {height}."
        )
    mean = _blur(torch.stack([first, second, first * first, second * second, first * second]))
    mean_a, mean_b = mean[0], mean[1]
    variance_a, variance_b, covariance = mean[2] - mean_a**2, mean[3] - mean_b**2, mean[4] - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def _cropped(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor, border: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = luma(a), luma(b)
    if first.shape != second.shape:
        raise ValueError(f"The images differ in size: {tuple(first.shape)} and {tuple(second.shape)} (height, width).")
    if min(first.shape) <= 2 * border:
        raise ValueError(f"A border of {border} pixels leaves nothing of an image of {tuple(first.shape)} (height, width).")
    inner = (slice(border, first.shape[0] - border), slice(border, first.shape[1] - border))
    return first[inner], second[inner]


def _blur(maps: torch.Tensor) -> torch.Tensor:
    """(N, H, W) -> (N, H - 10, W - 10)."""
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    rows = F.conv2d(maps[:, None], window.view(1, 1, 11, 1))
    return F.conv2d(rows, window.view(1, 1, 1, 11))[:, 0]
