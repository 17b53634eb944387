"""Device functions on numbers: rounding, conversion and products that mean the same on a GPU and in Triton's interpreter.

The interpreter (triton 3.9) multiplies the bit patterns of bfloat16 in `tl.dot` and cuts where a GPU rounds to bfloat16; the two
functions that step around that are the plain operations on a GPU. Only built-in operations of triton.language are used in all
kernels, not its library functions (`tl.sum`, `tl.zeros`, ...): these exist either compiled or interpreted, as triton was first
imported in the process.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qartsr_pipeline.kernels.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers of this size are whole, so adding it rounds half to even


@triton.jit
def round_into(values, low, high):
    """clamp(rint(values), low, high) in float32 for whole low and high within +-2^21; NaN gives 0.

    Clamping first is the same, as rint is monotone and leaves whole numbers alone. It also stands between the caller's product
    and the addition, so that no compiler makes one fused operation of them, which would round only once.
    """
    values = tl.where(values == values, values, 0.0)
    values = tl.minimum(tl.maximum(values, low), high)
    return (values + ROUNDER) - ROUNDER


@triton.jit
def convert(values, dtype: tl.constexpr):
    """float32 -> ``dtype``, rounding to nearest even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
            values = tl.where(values == values, rounded, values)
    return values.to(dtype)


@triton.jit
def dot_float(a, b, total):
    """total + a @ b in float32, for operands of one floating dtype; float32 operands without TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
