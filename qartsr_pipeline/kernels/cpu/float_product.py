"""The same integers multiplied as float32 numbers, for processors that multiply bytes no faster: oneDNN's float kernels.

Codes are rounded and clamped as in every backend, and are exact in float32; scale and bias ride on the product, and oneDNN adds
the 16-bit branch in place. Against the reference: constants are made once, and every pass over a feature map that can be left out
is. Feature maps are channels-last.

Memory: one byte a weight beside the stored ones, none at 8 bits, where the stored bytes are the codes; with `low_memory`
none ever. A layer's weights are floats during its own call only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qartsr_pipeline.kernels.backend import Backend, Constraints
from qartsr_pipeline.kernels.codes import quantized_floats, weight_bytes
from qartsr_pipeline.kernels.cpu.branch import (
    BRANCH_OPERATORS,
    Branch,
    add_branch,
    as_map,
    as_rows,
    compute_dtype,
    hidden_rows,
    prepare_branch,
)
from qartsr_pipeline.kernels.stored_layer import StoredLayer


@dataclass(frozen=True)
class Constants:
    """A layer's constants. `scale` is weights' times input's."""

    codes: torch.Tensor  # int8, as `weight_bytes` gives them
    scale: torch.Tensor  # (N,), shaped to broadcast over `codes`
    multiplier: torch.Tensor  # (C,)
    zero_point: int
    branch: Branch | None

    def weight(self) -> torch.Tensor:
        """The float weights that the input's codes are multiplied by."""
        return self.codes.float().mul_(self.scale)


def _make(layer: StoredLayer, dtype: torch.dtype) -> Constants:
    codes = weight_bytes(layer)
    return Constants(
        codes,
        (layer.weight_scale * layer.input_scale).view(-1, *[1] * (codes.dim() - 1)),
        layer.smooth / layer.input_scale,
        int(layer.input_zero_point),
        prepare_branch(layer, dtype),
    )


def _constants(layer: StoredLayer, dtype: torch.dtype) -> Constants:
    computed = compute_dtype(dtype)
    return layer.prepared.get(layer, ("float", computed), lambda stored: _make(stored, computed))


def _codes(rows: torch.Tensor, ready: Constants, layer: StoredLayer) -> torch.Tensor:
    return quantized_floats(rows, ready.multiplier, ready.zero_point, layer.spec.activation_bits)


class FloatProduct(Backend):
    """Any CPU whose torch was built with oneDNN."""

    name = "float"
    constraints = (Constraints(device="cpu", operators=BRANCH_OPERATORS),)

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        _constants(layer, dtype)

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        ready = _constants(layer, x.dtype)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = F.linear(_codes(rows, ready, layer), ready.weight(), layer.bias)
        if ready.branch is not None:
            y += F.linear(hidden_rows(rows, ready.branch), ready.branch.up)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """The result is channels-last."""
        spec, ready, rows = layer.spec, _constants(layer, x.dtype), as_rows(x)
        codes = as_map(_codes(rows, ready, layer), x)
        y = F.conv2d(codes, ready.weight(), layer.bias, spec.stride, spec.padding).to(compute_dtype(x.dtype))
        if ready.branch is not None:
            add_branch(y, as_map(hidden_rows(rows, ready.branch), x), ready.branch, spec)
        return y.to(x.dtype)
