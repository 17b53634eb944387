"""The same integers multiplied as float32 numbers, for processors that multiply bytes no faster: oneDNN's float kernels.

Codes are rounded and clamped as in every backend, and are exact in float32; scale and bias ride on the product, and oneDNN adds
the 16-bit branch in place. Against the reference: constants are made once, and every pass over a feature map that can be left out
is. Feature maps are channels-last.

Memory: one byte a weight beside the stored ones, none at 8 bits, where the stored bytes are the codes; with `prepared.low_memory`
none ever. A layer's weights are floats during its own call only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qartsr_pipeline.kernels.constraints import Constraints, unavailable_because, unmet
from qartsr_pipeline.kernels.cpu.onednn import add_branch, as_map, compute_dtype, hidden_rows
from qartsr_pipeline.kernels.layer_spec import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.operand import quantized_floats
from qartsr_pipeline.kernels.shared_input import shared_codes
from qartsr_pipeline.kernels.weights import weight_bytes

NAME = "float"
CONSTRAINTS = (Constraints(device="cpu", operators=("mkldnn._linear_pointwise", "mkldnn._convolution_pointwise_")),)


def unavailable() -> str | None:
    return unavailable_because(CONSTRAINTS)


def unsupported(spec: LayerSpec, device: str) -> str | None:
    return unmet(CONSTRAINTS, spec, device)


@dataclass(frozen=True)
class Prepared:
    """A layer's constants. `scale` is weights' times input's; `down` has phi in it."""

    codes: torch.Tensor  # int8, as `weight_bytes` gives them
    scale: torch.Tensor  # (N,), shaped to broadcast over `codes`
    multiplier: torch.Tensor
    zero_point: int
    down: torch.Tensor | None
    up: torch.Tensor | None


def prepare(layer: StoredLayer, dtype: torch.dtype) -> Prepared:
    codes = weight_bytes(layer)
    has_branch = layer.spec.rank > 0
    return Prepared(
        codes,
        (layer.weight_scale * layer.input_scale).view(-1, *[1] * (codes.dim() - 1)),
        layer.smooth / layer.input_scale,
        int(layer.input_zero_point),
        (layer.branch_down * layer.smooth).to(dtype) if has_branch else None,
        layer.branch_up.to(dtype) if has_branch else None,
    )


def prepared(layer: StoredLayer, dtype: torch.dtype) -> Prepared:
    """What is kept of the layer for inputs of this dtype."""
    computed = compute_dtype(dtype)
    return layer.prepared.get(layer, (NAME, computed), lambda stored: prepare(stored, computed))


def _weight(ready: Prepared) -> torch.Tensor:
    """The float weights that codes of inputs are multiplied by."""
    return ready.codes.float().mul_(ready.scale)


def _codes(rows: torch.Tensor, ready: Prepared, layer: StoredLayer) -> torch.Tensor:
    return quantized_floats(rows, ready.multiplier, ready.zero_point, layer.spec.activation_bits)


def linear(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(..., C) -> (..., N), in x's dtype."""
    ready = prepared(layer, x.dtype)
    rows, codes = shared_codes(NAME, x, layer, lambda rows: _codes(rows, ready, layer))
    y = F.linear(codes, _weight(ready), layer.bias)
    if layer.spec.rank:
        y += F.linear(hidden_rows(rows, ready), ready.up)
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def conv2d(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, H', W'), in x's dtype, channels-last."""
    spec, ready = layer.spec, prepared(layer, x.dtype)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of channels-last input
    codes = as_map(_codes(rows, ready, layer), x)
    y = F.conv2d(codes, _weight(ready), layer.bias, spec.stride, spec.padding).to(compute_dtype(x.dtype))
    if spec.rank:
        add_branch(y, as_map(hidden_rows(rows, ready), x), ready, spec)
    return y.to(x.dtype)
