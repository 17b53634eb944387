"""Deployed layers: packed integers, scales and 16-bit branch in plain buffers; the forward goes to a kernel backend.

Stored buffers (format version 2; N outputs, C inputs, r rank, b weight bits; absent where the scheme has no use for them)

    weight_packed       uint8    (N, ceil(K b / 8))   codes of (kh, kw, C), C fastest; K = kh kw C. 8 bits: two's complement
    weight_scale        float32  (N,)
    weight_zero_point   uint8    (N,)                 b < 8 only
    weight              float16  the float layer's    instead of the three above when weights are kept at 16 bits
    input_scale         float32  ()                   activations below 16 bits on the tensor grid only
    input_zero_point    uint8    ()
    input_exponents     int8     (C,)                 where the scheme has exponents
    smooth              float32  (C,)                 phi > 0
    branch_down         float16  (r, C)               L2 / phi, acts on phi x
    branch_up           float16  (N, r[, kh, kw])     L1
    bias                float32  (N,)

These dtypes stay whatever dtype the model is loaded in. The exact arithmetic is in `arithmetic.affine` and `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qartsr_pipeline.arithmetic.packing import packed_width
from qartsr_pipeline.arithmetic.token_grid import largest_exponent, rotation_size
from qartsr_pipeline.kernels import LayerSpec, PreparedWeights, register, run_layer
from qartsr_pipeline.quantization.scheme import LayerScheme

ABOVE_ZERO = ("weight_scale", "input_scale", "smooth")
ZERO_POINTS = ("weight_zero_point", "input_zero_point")


class DeployedLayer(nn.Module):
    """Buffers common to both kinds of layer. Built empty: `freeze` or a checkpoint fills them.

    As in `kernels.StoredLayer`, the buffers' types leave out that those without a use are None.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    weight: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    input_exponents: torch.Tensor
    smooth: torch.Tensor
    branch_down: torch.Tensor
    branch_up: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, spec: LayerSpec, bias: bool, device: torch.device | str | None = None):
        super().__init__()
        self.spec = spec
        self.prepared = PreparedWeights()
        self.number = register(self)
        kernel = spec.kernel_size if spec.kind == "conv2d" else ()

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, present: bool) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device) if present else None)

        outputs, inputs, rank = spec.out_channels, spec.in_channels, spec.rank
        length = inputs * spec.taps
        packed = spec.weight_bits < 16
        buffer("weight_packed", (outputs, packed_width(length, min(spec.weight_bits, 8))), torch.uint8, packed)
        buffer("weight_scale", (outputs,), torch.float32, packed)
        buffer("weight_zero_point", (outputs,), torch.uint8, spec.weight_bits < 8)
        buffer("weight", (outputs, inputs, *kernel), torch.float16, not packed)
        static = spec.activation_bits < 16 and spec.grid == "tensor"
        buffer("input_scale", (), torch.float32, static)
        buffer("input_zero_point", (), torch.uint8, static)
        buffer("input_exponents", (inputs,), torch.int8, spec.exponents)
        buffer("smooth", (inputs,), torch.float32, True)
        buffer("branch_down", (rank, inputs), torch.float16, rank > 0)
        buffer("branch_up", (outputs, rank, *kernel), torch.float16, rank > 0)
        buffer("bias", (outputs,), torch.float32, bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled layers are layers of their own."""
        super().__setstate__(state)
        self.number = register(self)

    def _apply(self, fn: Callable, recurse: bool = True) -> DeployedLayer:
        self.prepared.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.prepared.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def flaw(self, name: str, stored: torch.Tensor) -> str | None:
        """Why values for the buffer of this name cannot be right, or None. Such a layer would compute, and wrongly."""
        if name in ZERO_POINTS:
            bits = self.spec.weight_bits if name == "weight_zero_point" else self.spec.activation_bits
            largest, most = int(stored.max()), 2**bits - 1
            return None if largest <= most else f"holds the zero point {largest}, but its {bits}-bit grid ends at {most}"
        if name == "input_exponents":
            most = largest_exponent(self.spec.activation_bits)
            fits = bool(((stored >= 0) & (stored <= most)).all())
            return None if fits else f"holds exponents outside of 0 to {most}, which codes have no room for"
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            return "holds NaN or infinity"
        if name in ABOVE_ZERO and not bool((stored > 0).all()):
            return f"holds {float(stored.min()):g}, but must be above 0 everywhere"
        return None

    def joint_flaw(self) -> str | None:
        """The same for buffers that are right one by one, and too large or too small together."""
        if self.spec.grid == "token":
            return None
        multiplier = self.smooth if self.spec.activation_bits == 16 else self.smooth / self.input_scale
        if not bool(torch.isfinite(multiplier).all()):
            return "smooth divided by input_scale is infinite"
        if self.spec.weight_bits == 16 or self.spec.activation_bits == 16:
            return None
        scale = self.weight_scale * self.input_scale
        return None if bool((torch.isfinite(scale) & (scale > 0)).all()) else "weight_scale times input_scale is 0 or infinite"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., N) or (B, C, H, W) -> (B, N, H', W'), in x's dtype."""
        return run_layer(x, self)

    @property
    def packed_bytes(self) -> int:
        """Bytes of everything stored."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @property
    def weight_count(self) -> int:
        """Parameters of the float layer that this one replaces."""
        spec = self.spec
        return spec.out_channels * (spec.in_channels * spec.taps + (self.bias is not None))

    def extra_repr(self) -> str:
        spec = self.spec
        text = f"{spec.in_channels}, {spec.out_channels}, w{spec.weight_bits}a{spec.activation_bits}, rank={spec.rank}"
        if spec.grid == "token":
            text = f"{text}, grid=token, rotation={spec.rotation}, exponents={spec.exponents}"
        return text if spec.kind == "linear" else f"{text}, kernel_size={spec.kernel_size}, stride={spec.stride}"


class DeployedLinear(DeployedLayer):
    """y = L1 (L2 / phi) (phi x) + Q_W Q_A(phi x) + b, (..., C) -> (..., N)."""


class DeployedConv2d(DeployedLayer):
    """The same for a convolution, (B, C, H, W) -> (B, N, H', W'); L2 is a 1 x 1 and L1 the k x k convolution."""


def deployed_like(layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, device: torch.device | str | None = None) -> DeployedLayer:
    """An empty deployed layer for a linear or convolution layer.

    Raises:
        ValueError: for a convolution whose padding is a word; see `scheme.quantizable_layers`.
    """
    bits = (scheme.weight_bits, scheme.activation_bits, scheme.rank_for(layer))
    if not isinstance(layer, nn.Conv2d):
        inputs = layer.in_features
        spec = LayerSpec("linear", *bits, inputs, layer.out_features)
        rotation = rotation_size(inputs, scheme.rotation)
        spec = replace(spec, grid=scheme.grid, rotation=rotation, exponents=scheme.exponents)
        return DeployedLinear(spec, layer.bias is not None, device)
    if isinstance(layer.padding, str):
        raise ValueError(f"{layer} has padding {layer.padding!r}; only numbers have a quantized form")
    geometry = (_pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding))
    spec = LayerSpec("conv2d", *bits, layer.in_channels, layer.out_channels, *geometry)
    return DeployedConv2d(spec, layer.bias is not None, device)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    vertical, horizontal = sizes
    return vertical, horizontal
