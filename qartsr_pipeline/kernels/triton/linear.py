"""The linear layer's product: int8 codes by packed weights, with its epilogue, in one kernel. (rows, C) -> (rows, N).

A program computes BLOCK_M x BLOCK_N outputs. Programs that share rows come one after another, so that these rows come from the
cache; all weights fit it anyway.

Assumed of the GPU: sm_80 or later (`tl.dot` of signed bytes, bfloat16); rows start at multiples of 16 bytes wherever C is a
multiple of 16. Programs share nothing, so there is nothing to race for. Registers: the int32 sums become the float32 ones, both
are never alive at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.triton.numbers import convert, dot_float
from qartsr_pipeline.kernels.triton.product import product_arguments, product_grid, scaled, write_output
from qartsr_pipeline.kernels.triton.quantize import QuantizedInput
from qartsr_pipeline.kernels.triton.tuning import autotune_product, size_class
from qartsr_pipeline.kernels.triton.weights import weight_tile


@autotune_product(["size_class", "OUTPUTS", "CHANNELS", "RANK", "BITS", "ACTIVATION_BITS"])
@triton.jit
def _linear_kernel(
    codes_ptr,
    weight_ptr,
    zero_points_ptr,
    weight_scale_ptr,
    input_scale_ptr,
    input_zero_point_ptr,
    code_sums_ptr,
    hidden_ptr,
    up_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows_count,
    size_class,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION_BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % COLUMN_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = columns % OUTPUTS  # what lies beyond the last output is computed twice and not written
    row_offsets = (rows % rows_count).to(tl.int64)
    zero_points = None
    if BITS < 8:
        zero_points = tl.load(zero_points_ptr + outputs).to(tl.int8)

    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for block in range(0, (CHANNELS + BLOCK_K - 1) // BLOCK_K):
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        pointers = codes_ptr + (row_offsets * CHANNELS)[:, None] + channels[None, :]
        if ALIGNED:
            codes = tl.load(pointers)
        else:
            codes = tl.load(pointers, mask=(channels < CHANNELS)[None, :], other=0)
        weights = weight_tile(weight_ptr, zero_points, outputs, 0, block, BITS, CHANNELS, ROW_BYTES, ALIGNED, BLOCK_K)
        total = tl.dot(codes, tl.trans(weights), total)

    values = scaled(total, outputs, input_scale_ptr, input_zero_point_ptr, weight_scale_ptr, code_sums_ptr, ACTIVATION_BITS)
    for first in tl.static_range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = (ranks < RANK)[None, :]
        hidden = tl.load(hidden_ptr + (row_offsets * RANK)[:, None] + ranks[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + outputs[:, None] * RANK + ranks[None, :], mask=inside, other=0.0)
        values = dot_float(hidden, tl.trans(convert(up.to(tl.float32), hidden.dtype)), values)
    write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, rows_count, OUTPUTS)


def linear_product(
    operand: QuantizedInput, layer: StoredLayer, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The layer's output from its quantized input: (B, H, W, C) -> (B H W, N) in ``dtype``.

    Args:
        residual: ``dtype`` (B H W, N), contiguous, added to the output; None for nothing.
    """
    outputs, rows = layer.spec.out_channels, operand.codes.shape[:3].numel()
    out = torch.empty(rows, outputs, dtype=dtype, device=operand.codes.device)
    if out.numel() == 0:
        return out
    tensors, constants = product_arguments(operand, layer, residual, out)
    with torch.cuda.device_of(out):
        _linear_kernel[product_grid(rows, outputs)](*tensors, rows, size_class(rows), **constants)
    return out
