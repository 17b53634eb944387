"""The reference backend: plain torch operations in float32, on every device, for every scheme. All other backends are tested
against it.

Centred codes are small integers, so their products and sums are exact in float32 while the sum stays below 2^24: always up to
6 bits on layers of this field; at 8 bits the last bits of long sums are rounded.

An input of NaN counts as 0 and an infinite one as the largest or smallest code, so the integers are always defined. The branch
and 16-bit activations pass both on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from qartsr_pipeline.arithmetic.affine import centred_codes
from qartsr_pipeline.arithmetic.token_grid import centred_token_codes
from qartsr_pipeline.kernels.backend import Backend, Constraints
from qartsr_pipeline.kernels.codes import weight_bytes
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.tokens import rotated_rows

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weight_codes(layer: StoredLayer) -> torch.Tensor:
    """Centred weight codes, integers in float32: (N, C) of a linear layer, (N, C, kh, kw) of a convolution."""
    return weight_bytes(layer).float()


def _per_channel(values: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """A vector over channels, shaped to broadcast over the layer's input or output."""
    return values.view(-1, 1, 1) if spec.kind == "conv2d" else values


def _operand(x: torch.Tensor, layer: StoredLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """What weights are multiplied with, and its scale: one, or one for each token."""
    spec, one = layer.spec, torch.ones((), device=x.device)
    smooth = _per_channel(layer.smooth, spec)
    if spec.grid == "token":
        values = rotated_rows(x, layer)
        if spec.activation_bits == 16:
            return values, one
        codes, scales = centred_token_codes(values, spec.activation_bits, layer.input_exponents if spec.exponents else None)
        return torch.nan_to_num(codes, nan=0.0), scales
    if spec.activation_bits == 16:
        return x.float() * smooth, one
    codes = centred_codes(x, smooth / layer.input_scale, layer.input_zero_point.float(), spec.activation_bits)
    return torch.nan_to_num(codes, nan=0.0), layer.input_scale


def _compute(x: torch.Tensor, layer: StoredLayer, product: Product, inner: Product, outer: Product) -> torch.Tensor:
    spec = layer.spec
    operand, scale = _operand(x, layer)
    if spec.weight_bits == 16:
        weight = layer.weight.float()
    else:
        weight, scale = weight_codes(layer), scale * _per_channel(layer.weight_scale, spec)
    y = product(operand, weight).mul_(scale)
    if spec.rank:
        smooth = _per_channel(layer.smooth, spec)
        hidden = inner(x * smooth.to(x.dtype), layer.branch_down.to(x.dtype))
        y += outer(hidden, layer.branch_up.to(x.dtype))
    if layer.bias is not None:
        y += _per_channel(layer.bias, spec)
    return y.to(x.dtype)


class Reference(Backend):
    """Everywhere, for every scheme."""

    name = "reference"
    constraints: tuple[Constraints, ...] = ()

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        return _compute(x, layer, F.linear, F.linear, F.linear)

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        spec = layer.spec

        def convolve(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.conv2d(operand, weight, stride=spec.stride, padding=spec.padding)

        def pointwise(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.conv2d(operand, weight[:, :, None, None])

        return _compute(x, layer, convolve, pointwise, convolve)
