"""oneDNN's integer convolution and matrix product on x86 processors: unsigned activations with a zero point, signed weights.

Centred weight codes of 2 to 8 bits are signed bytes, codes of activations unsigned ones, and products are summed in 32 bits, so
the integers are those of the reference. Scale and bias are oneDNN's own epilogue; the 16-bit branch is a float convolution that
oneDNN adds to the result in place. Feature maps are channels-last throughout: others are converted, and so are all results.

Memory: beside the stored weights of b bits stands a prepacked copy of them, one byte per weight (twice the stored bytes at 4
bits), and the branch in the model's dtype. With `prepared.low_memory` neither is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from qartsr_pipeline.kernels.constraints import X86, Constraints, unavailable_because, unmet
from qartsr_pipeline.kernels.layer_spec import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.operand import quantized_rows
from qartsr_pipeline.kernels.shared_input import shared_codes
from qartsr_pipeline.kernels.weights import weight_bytes

NAME = "onednn"


@cache
def has_vnni() -> bool:
    """Whether sums are in 32 bits. Without VNNI two neighbouring products are added in 16 bits, saturating: 2 x 255 x 127 is
    beyond 2^15, 2 x 63 x 127 and 2 x 255 x 31 are not.
    """
    codes, weight = torch.full((8, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    scale, zero_point = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    sums = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((sums == 64 * 255 * 127).all())


CONSTRAINTS = (
    Constraints(
        device="cpu",
        machines=X86,
        operators=(
            "onednn.qconv_prepack",
            "onednn.qconv2d_pointwise",
            "onednn.qlinear_prepack",
            "onednn.qlinear_pointwise",
            "mkldnn._linear_pointwise",
            "mkldnn._convolution_pointwise_",
        ),
        needs_vnni=frozenset({(8, 8)}),
        has_vnni=has_vnni,
    ),
)


def unavailable() -> str | None:
    return unavailable_because(CONSTRAINTS)


def unsupported(spec: LayerSpec, device: str) -> str | None:
    return unmet(CONSTRAINTS, spec, device)


@dataclass(frozen=True)
class Prepacked:
    """A layer's constants as oneDNN wants them. `down` (r, C) has phi in it; both factors are in the dtype computed in."""

    weight: torch.Tensor  # opaque layout
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    multiplier: torch.Tensor
    input_scale: float
    input_zero_point: int
    down: torch.Tensor | None
    up: torch.Tensor | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the branch is computed in and the product is returned in, for inputs of this dtype; float16 is too slow or absent on
    processors, and so is bfloat16 on older ones.
    """
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def prepack(layer: StoredLayer, dtype: torch.dtype) -> Prepacked:
    spec, weight = layer.spec, weight_bytes(layer)
    input_scale, input_zero_point = float(layer.input_scale), int(layer.input_zero_point)
    if spec.kind == "conv2d":
        weight = torch.ops.onednn.qconv_prepack(
            weight, layer.weight_scale, input_scale, input_zero_point, spec.stride, spec.padding, (1, 1), 1, None
        )
    else:
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
    return Prepacked(
        weight,
        layer.weight_scale,
        torch.zeros_like(layer.weight_scale, dtype=torch.int32),
        layer.smooth / layer.input_scale,
        input_scale,
        input_zero_point,
        (layer.branch_down * layer.smooth).to(dtype) if spec.rank else None,
        layer.branch_up.to(dtype) if spec.rank else None,
    )


def prepared(layer: StoredLayer, dtype: torch.dtype) -> Prepacked:
    """What is kept of the layer for inputs of this dtype."""
    computed = compute_dtype(dtype)
    return layer.prepared.get(layer, (NAME, computed), lambda stored: prepack(stored, computed))


def linear(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(..., C) -> (..., N), in x's dtype."""
    packed = prepared(layer, x.dtype)
    rows, codes = shared_codes(NAME, x, layer, lambda rows: input_codes(rows, packed, layer.spec))
    y = linear_product(codes, packed, layer, compute_dtype(x.dtype))
    if layer.spec.rank:
        y.addmm_(hidden_rows(rows, packed), packed.up.t())
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def conv2d(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, H', W'), in x's dtype, channels-last."""
    packed = prepared(layer, x.dtype)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])  # a view of channels-last input
    y = conv2d_product(as_map(input_codes(rows, packed, layer.spec), x), packed, layer, compute_dtype(x.dtype))
    if layer.spec.rank:
        add_branch(y, as_map(hidden_rows(rows, packed), x), packed, layer.spec)
    return y.to(x.dtype)


def as_map(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B H W, K) -> (B, K, H, W) channels-last, for B, H and W of `x`."""
    return rows.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


def input_codes(rows: torch.Tensor, packed: Prepacked, spec: LayerSpec) -> torch.Tensor:
    """Unsigned codes of (rows, C)."""
    zero_point = packed.input_zero_point
    return quantized_rows(rows, packed.multiplier, zero_point, spec.activation_bits, zero_point)


def hidden_rows(rows: torch.Tensor, packed: Prepacked) -> torch.Tensor:
    """(rows, C) -> (rows, r), the branch's down-projection. oneDNN's: the BLAS is several times slower for so few outputs."""
    return torch.ops.mkldnn._linear_pointwise(rows.to(packed.down.dtype), packed.down, None, "none", [], "")


def linear_product(codes: torch.Tensor, packed: Prepacked, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
    """Codes (rows, C) -> scaled product with bias (rows, N) in `dtype`."""
    return torch.ops.onednn.qlinear_pointwise(
        codes,
        packed.input_scale,
        packed.input_zero_point,
        packed.weight,
        packed.weight_scale,
        packed.weight_zero_point,
        layer.bias,
        1.0,
        0,
        dtype,
        "none",
        [],
        "",
    )


def conv2d_product(codes: torch.Tensor, packed: Prepacked, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
    """Codes (B, C, H, W) channels-last -> scaled product with bias (B, N, H', W') in `dtype`, channels-last."""
    spec = layer.spec
    return torch.ops.onednn.qconv2d_pointwise(
        codes,
        packed.input_scale,
        packed.input_zero_point,
        packed.weight,
        packed.weight_scale,
        packed.weight_zero_point,
        layer.bias,
        spec.stride,
        spec.padding,
        (1, 1),
        1,
        1.0,
        0,
        dtype,
        "none",
        [],
        "",
    )


def add_branch(y: torch.Tensor, hidden: torch.Tensor, packed: Prepacked, spec: LayerSpec) -> None:
    """y (B, N, H', W') += the up-convolution of hidden (B, r, H, W), in place and in the convolution's own epilogue."""
    torch.ops.mkldnn._convolution_pointwise_(
        y, hidden, packed.up, None, spec.padding, spec.stride, (1, 1), 1, "add", 1.0, None, [], None
    )
