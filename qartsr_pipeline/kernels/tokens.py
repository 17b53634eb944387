"""The quantize step of the token grid: smooth, rotate, take each token's largest magnitude, make codes of it.

One implementation for all backends, so that their integers are the same bit for bit: those of
`arithmetic.token_grid.centred_token_codes`, worked through in blocks of tokens that stay in the processor's cache.
"""

from __future__ import annotations

import torch

from qartsr_pipeline.arithmetic.token_grid import Codes, largest_code, rotate_, rotated, token_scale
from qartsr_pipeline.kernels.codes import block_rows
from qartsr_pipeline.kernels.stored_layer import StoredLayer

SMALLER_BLOCKS = 2  # where they are rotated, which takes two more copies of them
SIGN = 128  # added to a signed code, it makes an unsigned one


def rotated_rows(rows: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """H (phi x), (..., C) float32 of its own: what is quantized."""
    smoothed = rows.float() * layer.smooth
    return rotated(smoothed, layer.spec.rotation) if layer.spec.rotation else smoothed


def quantized_tokens(rows: torch.Tensor, layer: StoredLayer) -> Codes:
    """Codes of (rows, C), with the exponents in them, and the scale of each token, which is not finite where the token is not."""
    spec, (count, channels), device = layer.spec, rows.shape, rows.device
    codes = torch.empty(rows.shape, dtype=torch.int8, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    powers = torch.exp2(layer.input_exponents.float()) if spec.exponents else None
    most = largest_code(spec.activation_bits)
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


def of_tokens(y: torch.Tensor, scales: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """A product (rows, N) that has the weights' scales, with those of the tokens and the bias; may overwrite it."""
    return y.mul_(scales[:, None]) if layer.bias is None else torch.addcmul(layer.bias, y, scales[:, None])
