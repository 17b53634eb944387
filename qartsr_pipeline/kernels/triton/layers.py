"""Whole layers, made of the kernels: memory formats and dtypes in, the quantizing pass, the product, and back."""

from __future__ import annotations

import torch
from torch import nn

from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.triton.conv import conv_product
from qartsr_pipeline.kernels.triton.linear import linear_product
from qartsr_pipeline.kernels.triton.norm import group_scale_shift as norm_scale_shift
from qartsr_pipeline.kernels.triton.quantize import ChannelNorm, quantize


def _computable(x: torch.Tensor) -> torch.Tensor:
    """float64 is computed in float32, as the integers are anyway."""
    return x.float() if x.dtype == torch.float64 else x


def linear(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(..., C) -> (..., N), in x's dtype."""
    rows = _computable(x).reshape(1, 1, -1, x.shape[-1])
    y = linear_product(quantize(rows, layer), layer, None, rows.dtype)
    return y.view(*x.shape[:-1], layer.spec.out_channels).to(x.dtype)


def conv2d(
    x: torch.Tensor, layer: StoredLayer, residual: torch.Tensor | None = None, norm: ChannelNorm | None = None
) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, H', W'), in x's dtype and channels-last memory.

    Args:
        residual: of the output's shape and dtype, added to it.
        norm: applied to x before it is quantized.
    """
    spec, pixels = layer.spec, _computable(x).permute(0, 2, 3, 1)
    operand = quantize(pixels, layer, norm)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    if spec.is_pointwise:
        rows = None if residual is None else residual.flatten(0, 2)
        y = linear_product(operand, layer, rows, pixels.dtype).view(*pixels.shape[:3], spec.out_channels)
    else:
        y = conv_product(operand, layer, residual, pixels.dtype)
    return y.permute(0, 3, 1, 2).to(x.dtype)


def group_scale_shift(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GroupNorm multiplies x (B, C, H, W) by and what it then adds: float32 (B, C), twice."""
    pixels = _computable(x).permute(0, 2, 3, 1)
    return norm_scale_shift(pixels, norm.weight, norm.bias, norm.num_groups, norm.eps)
