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

from qartsr_pipeline.kernels.triton.epilogue import scaled, write_output
from qartsr_pipeline.kernels.triton.numbers import convert, dot_float
from qartsr_pipeline.kernels.triton.tuning import autotune_product, rank_block, size_class
from qartsr_pipeline.kernels.triton.weights import readable, weight_tile


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
    hidden_stride,
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
        hidden = tl.load(hidden_ptr + (row_offsets * hidden_stride)[:, None] + ranks[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + outputs[:, None] * RANK + ranks[None, :], mask=inside, other=0.0)
        values = dot_float(hidden, tl.trans(convert(up.to(tl.float32), hidden.dtype)), values)
    write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, rows_count, OUTPUTS)


def linear_product(
    codes: torch.Tensor,
    hidden: torch.Tensor | None,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
    code_sums: torch.Tensor | None,
    branch_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    bits: int,
    activation_bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The layer's output from quantized input: (M, C) -> (M, N) in ``dtype``.

    Args:
        codes: int8 (M, C), contiguous, of `quantize.quantize`.
        hidden: the branch's hidden values, ``dtype`` (M, r), last stride 1; None without a branch.
        code_sums: int32 (N,), sums of centred weight codes; None unless activations have 8 bits.
        residual: ``dtype`` (M, N), contiguous, added to the output; None for nothing.
        others: as stored (`docs/stored_format.md`, section 3).
    """
    rows, channels = codes.shape
    outputs = weight_packed.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    rank = 0 if branch_up is None else branch_up.shape[1]
    weights, aligned = readable(weight_packed, bits, channels)
    with torch.cuda.device_of(codes):
        _linear_kernel[lambda chosen: (triton.cdiv(rows, chosen["BLOCK_M"]) * triton.cdiv(outputs, chosen["BLOCK_N"]),)](
            codes,
            weights,
            weight_zero_point,
            weight_scale,
            input_scale,
            input_zero_point,
            code_sums,
            hidden,
            branch_up,
            bias,
            residual,
            out,
            rows,
            hidden.stride(0) if rank else 0,
            size_class(rows),
            OUTPUTS=outputs,
            CHANNELS=channels,
            RANK=rank,
            BITS=bits,
            ACTIVATION_BITS=activation_bits,
            ROW_BYTES=weight_packed.shape[1],
            ALIGNED=aligned,
            BLOCK_R=rank_block(rank),
        )
    return out
