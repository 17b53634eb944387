"""Affine quantization: bounds -> scale and zero point -> integer codes -> values, and the differentiable simulation.

One arithmetic for calibration and deployment, in float32 whatever the model's dtype, rounding half to even:

    s = (upper - lower) / (2^b - 1)        z = clamp(rint(-lower / s), 0, 2^b - 1)        lower <= 0 <= upper
    q = clamp(rint(x * m) + z, 0, 2^b - 1)        centred code c = q - z        value = c * s

where the multiplier m is 1 / s for weights and phi / s (per input channel) for activations. The bounds always contain 0: then 0
is exactly representable and zero padding is code z. 8-bit weights are symmetric: s = max(|lower|, |upper|) / 127, z = 0, codes in
[-127, 127].

Gradients: rounding is straight-through, everything else is differentiated as written. Clipped values therefore move the bounds
(PassionSR's learned bounds, arXiv 2411.17106) and unclipped ones the scale through the rounding error (LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

BITS = (2, 3, 4, 6, 8)  # bit widths that have a quantizer; 16 means "no quantizer" and never reaches this module
SMALLEST_SCALE = 1e-8  # an all-zero tensor has no range; any positive scale represents it


def round_straight_through(x: torch.Tensor) -> torch.Tensor:
    """Rounds half to even; the gradient passes as if it were the identity."""
    return x + (torch.round(x) - x).detach()


def code_range(bits: int, symmetric: bool = False) -> tuple[int, int]:
    """Smallest and largest code q. Symmetric codes are signed and leave out the most negative one.

    Raises:
        ValueError: for a bit width without a quantizer.
    """
    if bits not in BITS:
        raise ValueError(f"there is no {bits}-bit quantizer; supported are {BITS}, and 16 for no quantization")
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def affine_parameters(
    lower: torch.Tensor, upper: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, float32 tensors of the bounds' shape; the zero point holds integers.

    Bounds on the wrong side of 0 are treated as 0. Differentiable in the bounds.
    """
    smallest, largest = code_range(bits, symmetric)
    lower, upper = lower.float().clamp(max=0), upper.float().clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-lower, upper) / largest).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((upper - lower) / largest).clamp(min=SMALLEST_SCALE)
    return scale, round_straight_through(-lower / scale).clamp(smallest, largest)


def centred_codes(
    x: torch.Tensor, multiplier: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool = False
) -> torch.Tensor:
    """Codes minus zero point, integers in a float32 tensor of x's shape; differentiable (straight-through).

    clamp(rint(x m) + z, low, high) - z is computed as clamp(rint(x m), low - z, high - z): the same integers, fewer passes.

    Args:
        x: values, any floating dtype.
        multiplier: 1 / scale (or phi / scale), broadcastable to x.
        zero_point: integers, broadcastable to x.
    """
    return _CentredCodes.apply(x, multiplier, zero_point, *code_range(bits, symmetric))


class _CentredCodes(torch.autograd.Function):
    """The gradient of clamp(round_straight_through(x m), low - z, high - z), written out: a third of autograd's passes.

    A value that rounds to an extreme code counts as inside, however far within half a step it lies.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, multiplier: torch.Tensor, zero_point: torch.Tensor, smallest: int, largest: int
    ) -> torch.Tensor:
        scaled = (x.float() * multiplier).round_()
        lower, upper = smallest - zero_point, largest - zero_point
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, multiplier, (scaled >= lower) & (scaled <= upper))
            ctx.zero_point_shape = zero_point.shape
        return torch.clamp(scaled, lower, upper, out=scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, multiplier, inside = ctx.saved_tensors
        passed = gradient * inside
        of_x = (passed * multiplier).sum_to_size(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        of_multiplier = (passed * x).sum_to_size(multiplier.shape) if ctx.needs_input_grad[1] else None
        of_zero_point = passed.sub_(gradient).sum_to_size(ctx.zero_point_shape) if ctx.needs_input_grad[2] else None
        return of_x, of_multiplier, of_zero_point, None, None


def fake_quantize(x: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, bits: int, symmetric: bool = False) -> torch.Tensor:
    """The values that x takes after quantization and dequantization, float32, x's shape; differentiable in x and the bounds.

    Args:
        lower, upper: bounds, broadcastable to x (for weights of N output channels: shape (N, 1, ...)).
    """
    scale, zero_point = affine_parameters(lower, upper, bits, symmetric)
    return centred_codes(x, 1 / scale, zero_point, bits, symmetric) * scale
