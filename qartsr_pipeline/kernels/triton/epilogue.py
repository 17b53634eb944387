"""Device functions that turn the integer product into the layer's output: scale, zero-point correction, bias, residual.

8-bit activations are multiplied as code - 128, which fits a signed byte where code - zero point may not. The difference, (128 -
zero point) times the sum of an output's weight codes, is added to the sum in integers: exact. All activations of fewer bits are
multiplied as centred codes and need no correction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qartsr_pipeline.kernels.triton.numbers import convert


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
