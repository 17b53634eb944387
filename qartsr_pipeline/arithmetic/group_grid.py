"""The grids of groups: a scale for every few neighbours along an axis, symmetric or with a zero point. In simulation only.

Float32 throughout; rounding and its gradient are those of `affine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qartsr_pipeline.arithmetic.affine import SMALLEST_SCALE, centred_codes, code_range, fake_quantize


def _grouped(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Splits an axis into (groups, size), zeros behind the last channel; ``size`` 0 is one group."""
    channels = x.shape[axis]
    size = min(size or channels, channels)
    missing = -channels % size
    if missing:
        x = torch.cat([x, x.new_zeros([missing if i == axis else n for i, n in enumerate(x.shape)])], axis)
    return x.unflatten(axis, (-1, size))


def quantize_groups(x: torch.Tensor, axis: int, size: int, bits: int, unsigned: bool = False) -> torch.Tensor:
    """``x`` after quantization with one scale for every ``size`` neighbours along ``axis``, from their largest magnitude.

    Symmetric codes are -(2^(b-1) - 1) to 2^(b-1) - 1, so -1 to 1 at 2 bits; unsigned ones 0 to 2^b - 1. The last group may be
    smaller. Float32, x's shape; differentiable, through the scales too.
    """
    groups = _grouped(x.float(), axis, size)
    largest = groups.clamp(min=0) if unsigned else groups.abs()
    scale = (largest.amax(axis + 1, keepdim=True) / code_range(bits, not unsigned)[1]).clamp(min=SMALLEST_SCALE)
    codes = centred_codes(groups, 1 / scale, torch.zeros_like(scale), bits, symmetric=not unsigned)
    return (codes * scale).flatten(axis, axis + 1).narrow(axis, 0, x.shape[axis])


def quantize_affine_groups(x: torch.Tensor, axis: int, size: int, bits: int, factors: Sequence[float]) -> torch.Tensor:
    """``x`` after quantization with a scale and a zero point for every ``size`` neighbours along ``axis``, float32, x's shape.

    Args:
        factors: of the extremes; each group has the one that leaves it the least squared error.
    """
    groups = _grouped(x.float(), axis, size)
    lower, upper = groups.amin(axis + 1, keepdim=True), groups.amax(axis + 1, keepdim=True)
    best, least = groups, torch.full_like(lower, float("inf"))
    for factor in factors:
        quantized = fake_quantize(groups, lower.clamp(max=0) * factor, upper.clamp(min=0) * factor, bits)
        error = (quantized - groups).square().sum(axis + 1, keepdim=True)
        best, least = torch.where(error < least, quantized, best), torch.minimum(error, least)
    return best.flatten(axis, axis + 1).narrow(axis, 0, x.shape[axis])
