"""The Triton backend: packed weights of 2 to 8 bits by signed bytes on NVIDIA GPUs, nothing unpacked in memory.

A layer is two kernels: one pass over the input that quantizes it and takes the branch's hidden values with it, and the product,
which does all the rest. Needs compute capability 8.0: Triton compiles no signed-byte product for older ones (triton 3.9 fails
on 7.5).

With TRITON_INTERPRET=1 the same kernels run on a CPU in Triton's interpreter, thousands of times slower: for proofs.

Beside `linear` and `conv2d` there are the fused forms: a residual is added in the product's epilogue, layers that share their
input quantize it once and take all their hidden values with it (`shared_input`), and a GroupNorm, with SiLU or without, happens
in the quantizing pass (`norm_conv2d`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from qartsr_pipeline.kernels.constraints import Constraints, unavailable_because, unmet
from qartsr_pipeline.kernels.layer_spec import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.shared_input import shared_operand
from qartsr_pipeline.kernels.triton import operators
from qartsr_pipeline.kernels.triton.interpreter import interpreted
from qartsr_pipeline.kernels.triton.prepared import TritonWeights, prepare

NAME = "triton"
CONSTRAINTS = (Constraints(device="cuda", capability=(8, 0)),)
INTERPRETED_CONSTRAINTS = (Constraints(device="cpu"),)


def _constraints() -> tuple[Constraints, ...]:
    return INTERPRETED_CONSTRAINTS if interpreted() else CONSTRAINTS


def unavailable() -> str | None:
    """Why it cannot run on this machine at all."""
    return "triton is not installed" if find_spec("triton") is None else unavailable_because(_constraints())


def unsupported(spec: LayerSpec, device: str) -> str | None:
    """Why it cannot compute such a layer there."""
    return unmet(_constraints(), spec, device)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 is computed in float32, as the integers are anyway."""
    return torch.float32 if x.dtype == torch.float64 else x.dtype


def _computable(x: torch.Tensor) -> torch.Tensor:
    return x.to(_compute_dtype(x))


def linear(x: torch.Tensor, layer: StoredLayer, residual: torch.Tensor | None = None) -> torch.Tensor:
    """(..., C) -> (..., N), in x's dtype. ``residual``: of the output's shape and dtype, added to it."""

    def quantize(layers: Sequence[StoredLayer]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        return _quantized(_computable(x).reshape(1, 1, -1, x.shape[-1]), layers)

    codes, hidden = shared_operand(NAME, x, layer, quantize)
    if residual is not None:
        residual = residual.reshape(-1, residual.shape[-1])
    y = _linear(codes, hidden, layer, residual, _compute_dtype(x))
    return y.view(*x.shape[:-1], layer.spec.out_channels).to(x.dtype)


def conv2d(x: torch.Tensor, layer: StoredLayer, residual: torch.Tensor | None = None) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, H', W'), in x's dtype and channels-last memory. ``residual``: of the output's shape and dtype."""
    return _conv2d(_computable(x).permute(0, 2, 3, 1), layer, residual).to(x.dtype)


def norm_conv2d(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    layer: StoredLayer,
    silu: bool,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`conv2d` of x times scale plus shift, (B, C) each, with SiLU between them if asked for: the normalized picture is never
    written.
    """
    return _conv2d(_computable(x).permute(0, 2, 3, 1), layer, residual, scale, shift, silu).to(x.dtype)


def group_scale_shift(x: torch.Tensor, norm: torch.nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GroupNorm multiplies x (B, C, H, W) by and what it then adds: float32 (B, C), twice."""
    pixels = _computable(x).permute(0, 2, 3, 1)
    return operators.group_scale_shift(pixels, norm.weight, norm.bias, norm.num_groups, norm.eps)


def prepared(layer: StoredLayer, dtype: torch.dtype | None = None) -> TritonWeights:
    """What is kept of the layer, whatever the dtype."""
    return layer.prepared.get(layer, NAME, prepare)


def _quantized(pixels: torch.Tensor, layers: Sequence[StoredLayer], *norm) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """For each of several layers that quantize alike: codes (B, H, W, C), the same for all, and its hidden values (B, H, W, r),
    a slice of one tensor; None without a branch.
    """
    first = layers[0]
    downs = [layer.branch_down for layer in layers if layer.spec.rank]
    stacked = torch.cat(downs) if len(downs) > 1 else (downs or [None])[0]
    quantizer = (first.smooth, first.input_scale, first.input_zero_point, first.spec.activation_bits)
    codes, hidden = operators.quantize(pixels, *quantizer, stacked, *norm)
    slices = hidden.split([layer.spec.rank for layer in layers], dim=-1)
    return [(codes, part if layer.spec.rank else None) for part, layer in zip(slices, layers, strict=True)]


def _stored(layer: StoredLayer) -> tuple:
    """The arguments of a product from the packed weights to the branch."""
    kept = prepared(layer)
    input_quantizer = (layer.input_scale, layer.input_zero_point)
    weights = (layer.weight_packed, layer.weight_scale, layer.weight_zero_point)
    return *weights, *input_quantizer, kept.code_sums, kept.branch_up, layer.bias


def _linear(
    codes: torch.Tensor, hidden: torch.Tensor | None, layer: StoredLayer, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Codes (B, H, W, C) and hidden values (B, H, W, r) -> (B H W, N) in ``dtype``; ``residual`` (B H W, N)."""
    spec = layer.spec
    rows, hidden_rows = codes.view(-1, codes.shape[-1]), None if hidden is None else hidden.flatten(0, 2)
    residual = None if residual is None else residual.contiguous()
    arguments = (*_stored(layer), residual, spec.weight_bits, spec.activation_bits, dtype)
    return operators.linear_product(rows, hidden_rows, *arguments)


def _conv2d(pixels: torch.Tensor, layer: StoredLayer, residual: torch.Tensor | None, *norm) -> torch.Tensor:
    """(B, H, W, C), any strides -> (B, N, H', W'), channels-last."""
    spec = layer.spec
    ((codes, hidden),) = _quantized(pixels, (layer,), *norm)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    if spec.kernel_size == spec.stride == (1, 1) and spec.padding == (0, 0):
        if residual is not None:
            residual = residual.flatten(0, 2)
        out = _linear(codes, hidden, layer, residual, pixels.dtype).view(*pixels.shape[:3], spec.out_channels)
        return out.permute(0, 3, 1, 2)
    geometry = (list(spec.kernel_size), list(spec.stride), list(spec.padding))
    bits = (spec.weight_bits, spec.activation_bits)
    out = operators.conv_product(codes, hidden, *_stored(layer), residual, *bits, *geometry, pixels.dtype)
    return out.permute(0, 3, 1, 2)
