"""The loops of `tokens`, in what of Python numba compiles; see `loops`. A row is a token.

Rotations are the sums and differences of `arithmetic.token_grid.rotate_`, of the same numbers in the same order, and so the same
bit for bit: those of neighbours up to 8 apart within a vector of 16 numbers, the others between vectors.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from qartsr_pipeline.arithmetic.token_grid import SMALLEST
from qartsr_pipeline.kernels.loops import OPTIONS, F, code, narrowed, plus, stored, widened

LANES = 16
INDEX = np.uint64
WITHOUT_SIGN = np.int32(0x7FFFFFFF)
VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _vector_at(context, builder, array_type, array, index):
    """Address of 16 numbers of a contiguous float32 array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


@intrinsic
def turn_neighbours(typing, row, start):
    """Sums and differences of the 16 numbers from `start` on that are 1, 2, 4 and 8 apart, in place."""

    def make(context, builder, signature, arguments):
        address = _vector_at(context, builder, signature.args[0], *arguments)
        vector = builder.load(address, align=4)
        for step in (1, 2, 4, 8):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane ^ step for lane in range(LANES)])
            signs = ir.Constant(VECTOR, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
            other = builder.shuffle_vector(vector, vector, mask)
            vector = builder.fadd(other, builder.fmul(vector, signs))
        builder.store(vector, address, align=4)

    return types.void(row, types.intp), make


@intrinsic
def turn_vectors(typing, row, first, second):
    """Sums and differences of 16 numbers from `first` on and 16 others, in place."""

    def make(context, builder, signature, arguments):
        array, *indices = arguments
        one, other = (_vector_at(context, builder, signature.args[0], array, index) for index in indices)
        above, below = (builder.load(address, align=4) for address in (one, other))
        builder.store(builder.fadd(above, below), one, align=4)
        builder.store(builder.fsub(above, below), other, align=4)

    return types.void(row, types.intp, types.intp), make


@intrinsic
def bits_of(typing, value):
    """float32 -> the int32 of the same bits."""

    def make(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), make


@intrinsic
def float_of(typing, bits):
    """int32 -> the float32 of the same bits."""

    def make(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), make


@njit(**OPTIONS)
def rotate(row, start, end):
    """Sums and differences of a block of 16 2^n numbers of a contiguous row; not yet normalized."""
    for first in range(start, end, LANES):
        turn_neighbours(row, first)
    step = LANES
    while step < end - start:
        for above in range(start, end, 2 * step):
            for first in range(above, above + step, LANES):
                turn_vectors(row, first, first + step)
        step *= 2


@njit(**OPTIONS)
def quantize(x, smooth, size, inverse_powers, powers, most, codes, scales):
    """`compiled.quantize_tokens`; without powers of two these are empty. Codes are the bytes of int8."""
    channels, factor, block = x.shape[1], F(1), x.shape[1]
    row = np.empty(channels, np.float32)
    if size:
        factor, block = F(size**-0.5), size
    low, high, none, smallest = F(-most), F(most), np.int32(0), F(SMALLEST)
    for i in range(x.shape[0]):
        for start in range(0, channels, block):
            for j in range(INDEX(start), INDEX(start + block)):  # one that may be negative keeps a loop from vector instructions
                row[j] = widened(x[i, j]) * smooth[j]
            if size:
                rotate(row, start, start + block)
        largest = np.int32(0)  # as bits, by which NaN is larger than all numbers
        if powers.shape[0]:
            for j in range(channels):
                row[j] = row[j] * factor * inverse_powers[j]
                largest = max(largest, bits_of(row[j]) & WITHOUT_SIGN)
        else:
            for j in range(channels):
                row[j] = row[j] * factor
                largest = max(largest, bits_of(row[j]) & WITHOUT_SIGN)
        scale = float_of(largest)
        scale = F(np.nan) if scale != scale else max(scale, smallest)
        multiplier = F(1) / scale * high
        scales[i] = scale / high
        if powers.shape[0]:
            for j in range(channels):
                codes[i, j] = stored(code(row[j] * multiplier, low, high) * powers[j], none, codes[i, j])
        else:
            for j in range(channels):
                codes[i, j] = stored(code(row[j] * multiplier, low, high), none, codes[i, j])


@njit(**OPTIONS)
def scale(y, scales, bias, out):
    """`compiled.scale_tokens`; without a bias that is empty."""
    for i in range(y.shape[0]):
        factor = scales[i]
        if bias.shape[0]:
            for j in range(y.shape[1]):
                out[i, j] = narrowed(plus(bias[j], y[i, j], factor), out[i, j])
        else:
            for j in range(y.shape[1]):
                out[i, j] = narrowed(y[i, j] * factor, out[i, j])
