"""The quantize step of the token grid: smooth, rotate, take each token's largest magnitude, make codes of it.

For all backends, so that their integers are the same bit for bit: those of `arithmetic.token_grid.centred_token_codes`. On a CPU
with numba it is one loop (`compiled_clips`); otherwise blocks of tokens are worked through that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qartsr_pipeline.arithmetic.token_grid import Codes, largest_code, rotate_, rotated, token_scale
from qartsr_pipeline.kernels import compiled_clips
from qartsr_pipeline.kernels.codes import block_rows
from qartsr_pipeline.kernels.stored_layer import StoredLayer

FEWEST_TOKENS, PRODUCT_BYTES = 256, 1 << 23  # of one product
SMALLER_BLOCKS = 2  # where they are rotated, which takes two more copies of them
SIGN = 128  # added to a signed code, it makes an unsigned one
Product = Callable[[torch.Tensor], torch.Tensor]
Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rotated_rows(rows: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """H (phi x), (..., C) float32 of its own: what is quantized."""
    smoothed = rows.float() * layer.smooth
    return rotated(smoothed, layer.spec.rotation) if layer.spec.rotation else smoothed


def quantized_tokens(rows: torch.Tensor, layer: StoredLayer) -> Codes:
    """Codes of (rows, C), with the exponents in them, and the scale of each token, which is not finite where the token is not."""
    spec, (count, channels), device = layer.spec, rows.shape, rows.device
    powers = torch.exp2(layer.input_exponents.float()) if spec.exponents else None
    most = largest_code(spec.activation_bits)
    if compiled_clips.can_run_tokens(rows, spec.rotation):
        return Codes(*compiled_clips.quantize_tokens(rows, layer.smooth, spec.rotation, powers, most))
    codes = torch.empty(rows.shape, dtype=torch.int8, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    step = min(count, max(1, block_rows(channels, device.type) // (SMALLER_BLOCKS if spec.rotation else 1)))
    scratch = torch.empty(3, step, channels, dtype=torch.float32, device=device)  # made once: memory is slow to get
    for source, target, scale in zip(rows.split(step), codes.split(step), scales.split(step), strict=True):
        values = torch.mul(source, layer.smooth, out=scratch[0, : len(source)])
        if spec.rotation:
            rotate_(values, spec.rotation, scratch[1:])
        if powers is not None:
            values /= powers
        magnitudes = torch.abs(values, out=scratch[1, : len(source)])  # aminmax takes ten times as long
        multiplier, own = token_scale(magnitudes.amax(1), most)
        values.mul_(multiplier[:, None]).round_()
        if powers is not None:
            values *= powers
        # a NaN in float converts to the integer 0 on all supported hardware
        target.copy_(values)
        scale.copy_(own)
    return Codes(codes, scales)


def unsigned(codes: torch.Tensor) -> torch.Tensor:
    """Signed bytes plus `SIGN`, in place: uint8."""
    return codes.view(torch.uint8).add_(SIGN)


def linear_of_tokens(rows: torch.Tensor, layer: StoredLayer, product: Product, branch: Branch | None) -> torch.Tensor:
    """The layer's output for (rows, C), in their dtype.

    On a CPU a part of the tokens at a time, in memory that is used again: to get it for all products of a layer takes as long as
    a quarter of these.

    Args:
        product: int8 codes, which it may overwrite -> their product, float32 (rows, N), with the weights' scales.
        branch: rows and the output so far, float32 -> the output with the branch in it.
    """
    out = rows.new_empty(len(rows), layer.spec.out_channels)
    step = max(FEWEST_TOKENS, PRODUCT_BYTES // (4 * layer.spec.out_channels)) if rows.device.type == "cpu" else len(rows)
    for source, target in zip(rows.split(step), out.split(step), strict=True):
        codes, scales = quantized_tokens(source, layer)
        y = product(codes)
        scale_tokens(y, scales, layer.bias, target if branch is None else y)
        if branch is not None:
            target.copy_(branch(source, y))
    return out


def scale_tokens(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = bias + scales y, of rows; y is float32, and may be overwritten."""
    if compiled_clips.can_run_tokens(out, 0):
        return compiled_clips.scale_tokens(y, scales, bias, out)
    direct = out if out.dtype == y.dtype else y  # an operator that also converts takes several times as long
    if bias is None:
        torch.mul(y, scales[:, None], out=direct)
    else:
        torch.addcmul(bias, y, scales[:, None], out=direct)
    if direct is not out:
        out.copy_(direct)
