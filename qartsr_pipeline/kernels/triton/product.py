"""What the two products (`linear`, `conv`) have in common: their arguments, and the epilogue that turns the integer product into
the layer's output, with scale, zero-point correction, bias and residual.

8-bit activations are multiplied as code - 128, which fits a signed byte where code - zero point may not. The difference, (128 -
zero point) times the sum of an output's weight codes, is added to the sum in integers: exact. All activations of fewer bits are
multiplied as centred codes and need no correction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qartsr_pipeline.arithmetic.packing import unpack
from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.triton.numbers import convert
from qartsr_pipeline.kernels.triton.quantize import QuantizedInput
from qartsr_pipeline.kernels.triton.tuning import rank_block
from qartsr_pipeline.kernels.triton.weights import readable


@dataclass(frozen=True)
class ProductConstants:
    """What is kept of a layer beside what is stored: a few bytes per output.

    Attributes:
        code_sums: sums of an output's centred weight codes, int32 (N,); None unless activations have 8 bits.
        branch_up: as stored, but with the rank fastest in memory; None without a branch.
    """

    code_sums: torch.Tensor | None
    branch_up: torch.Tensor | None


def product_constants(layer: StoredLayer) -> ProductConstants:
    """Made at the layer's first call, and kept."""
    return layer.prepared.get(layer, "triton", _make)


def _make(layer: StoredLayer) -> ProductConstants:
    up = layer.branch_up if layer.spec.rank else None
    if up is not None and up.dim() == 4:
        up = up.contiguous(memory_format=torch.channels_last)
    return ProductConstants(_code_sums(layer) if layer.spec.activation_bits == 8 else None, up)


def _code_sums(layer: StoredLayer) -> torch.Tensor:
    spec = layer.spec
    length = spec.in_channels * spec.taps
    codes = unpack(layer.weight_packed, spec.weight_bits, length)
    if spec.weight_bits == 8:
        return codes.view(torch.int8).sum(1, dtype=torch.int32)
    return codes.sum(1, dtype=torch.int32) - length * layer.weight_zero_point.to(torch.int32)


def product_arguments(
    operand: QuantizedInput, layer: StoredLayer, residual: torch.Tensor | None, out: torch.Tensor
) -> tuple[tuple[torch.Tensor | None, ...], dict[str, int]]:
    """The tensors that both kernels begin with, and the constants that both are compiled for.

    Args:
        residual: of out's shape and dtype, contiguous, added to the output; None for nothing.
        out: (..., N), contiguous, to be written.
    """
    spec, kept = layer.spec, product_constants(layer)
    weights, aligned = readable(layer.weight_packed, spec.weight_bits, spec.in_channels)
    tensors = (
        operand.codes,
        weights,
        layer.weight_zero_point,
        layer.weight_scale,
        layer.input_scale,
        layer.input_zero_point,
        kept.code_sums,
        operand.hidden if spec.rank else None,
        kept.branch_up,
        layer.bias,
        residual,
        out,
    )
    constants = {
        "OUTPUTS": spec.out_channels,
        "CHANNELS": spec.in_channels,
        "RANK": spec.rank,
        "BITS": spec.weight_bits,
        "ACTIVATION_BITS": spec.activation_bits,
        "ROW_BYTES": layer.weight_packed.shape[1],
        "ALIGNED": aligned,
        "BLOCK_R": rank_block(spec.rank),
    }
    return tensors, constants


def product_grid(rows: int, outputs: int) -> Callable[[dict[str, int]], tuple[int]]:
    """One program for each block of rows and outputs."""
    return lambda chosen: (triton.cdiv(rows, chosen["BLOCK_M"]) * triton.cdiv(outputs, chosen["BLOCK_N"]),)


@triton.jit
def outside_code(zero_point_ptr, ACTIVATION_BITS: tl.constexpr):
    """What zero padding is multiplied as: int8 scalar."""
    if ACTIVATION_BITS == 8:
        return (tl.load(zero_point_ptr).to(tl.int32) - 128).to(tl.int8)
    else:
        return tl.full((), 0, tl.int8)


@triton.jit
def scaled(
    total,
    outputs,
    input_scale_ptr,
    input_zero_point_ptr,
    weight_scale_ptr,
    code_sums_ptr,
    ACTIVATION_BITS: tl.constexpr,
):
    """The integer product int32 (rows, outputs) as float32 values."""
    if ACTIVATION_BITS == 8:
        shift = 128 - tl.load(input_zero_point_ptr).to(tl.int32)
        total += (shift * tl.load(code_sums_ptr + outputs))[None, :]
    scale = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr + outputs)
    return total.to(tl.float32) * scale[None, :]


@triton.jit
def write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, ROWS, OUTPUTS: tl.constexpr):
    """Adds bias and residual, converts and writes (rows, columns) of the row-major output.

    Args:
        columns: column numbers, which may lie beyond OUTPUTS; ``outputs`` are the same, wrapped into range.
    """
    if bias_ptr is not None:
        values += tl.load(bias_ptr + outputs)[None, :]
    offsets = rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    mask = (rows < ROWS)[:, None] & (columns < OUTPUTS)[None, :]
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, convert(values, out_ptr.dtype.element_ty), mask=mask)
